"""Which passes the backward pass recomputes: fixed plans, and plans that need least memory or time.

"Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174, keeps only the input of each
segment; here segments of each stage have their own length, and the last passes may be kept.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from sret_cli.cost.footprint import Parts, StageParts, Weights
from sret_cli.spec.model import ModelSpec

LEVELS = 24  # for each stage, "auto" tries this many numbers of recomputed passes
SEGMENTS = 48  # and segments of up to this many passes

Recompute = str | int


class Plan(NamedTuple):
    """What is recomputed in each stage.

    A stage's first passes are recomputed: the memory of its last passes is free again before that.

    Attributes:
        segments: for each stage, the passes of a segment; 0 recomputes none.
        recomputed: for each stage, how many of its first passes are recomputed.
    """

    segments: tuple[int, ...]
    recomputed: tuple[int, ...]


def fixed_plan(spec: ModelSpec, recompute: Recompute) -> Plan:
    """The plan for "none", "pass" or a number of passes."""
    segment = {"none": 0, "pass": 1}.get(str(recompute), recompute)
    passes = tuple(map(spec.passes, range(spec.stages)))
    return Plan((int(segment),) * spec.stages, passes)


class _Option(NamedTuple):
    """One way to recompute a stage."""

    held: int  # bytes after the stage's forward pass
    peak: int  # most bytes in its backward pass
    time: int  # multiply-adds that are repeated
    segment: int
    recomputed: int


def _options(stage: StageParts, macs: int) -> list[_Option]:
    """The ways to recompute a stage that no other way beats in held bytes, peak and time."""
    passes, x = len(stage.usages), stage.usages[0].input
    sums = [0]
    for usage in stage.usages:
        sums.append(sums[-1] + usage.kept)
    more = max(max(u.backward_peak - u.kept, u.forward_peak - u.kept) for u in stage.usages)
    pool = stage.pool.kept if stage.pool else 0
    found = [_Option(pool + sums[-1], pool + sums[-1] + more, 0, 0, 0)]
    levels = sorted({-(-passes * level // LEVELS) for level in range(1, LEVELS + 1)})
    for segment in range(1, min(passes, SEGMENTS) + 1):
        live, done = 0, 0
        for first in levels:
            starts = range(done, first, segment)
            live = max([live, *(sums[min(i + segment, first)] - sums[i] for i in starts)])
            done = starts[-1] if len(starts) else done
            held = pool + -(-first // segment) * x + sums[-1] - sums[first]
            peak = max(held, held - (sums[-1] - sums[first]) + live - x) + more
            found.append(_Option(held, peak, first * macs, segment, first))
    return _undominated(found)


def _undominated(options: Iterable[Any]) -> list[Any]:
    """Those tuples (held, peak, time, …) that no other one equals or beats in all three."""
    kept: list[Any] = []
    for option in sorted(options):
        if not any(k[1] <= option[1] and k[2] <= option[2] for k in kept):
            kept.append(option)
    return kept


def _search(parts: Parts, weights: Weights, limit: int | None) -> list[tuple]:
    """Plans as (held, peak, time, options); with a limit, those whose peak is within it."""
    states: list[tuple] = [(parts.stem.kept, 0, 0, ())]
    for stage, macs in zip(parts.stages, weights.macs, strict=True):
        options = _options(stage, macs)
        combined = []
        for held, peak, time, chosen in states:
            for option in options:
                highest = max(peak, held + option.peak)
                if limit is None or highest <= limit:
                    spent = 0 if limit is None else time + option.time
                    top = highest if limit is None else 0
                    combined.append((held + option.held, top, spent, (*chosen, option)))
        states = _undominated(combined)
    head = parts.head.backward_peak
    return [
        (held, max(peak, held + head), time, chosen)
        for held, peak, time, chosen in states
        if limit is None or held + head <= limit
    ]


def least_memory_plan(parts: Parts, weights: Weights) -> Plan:
    """The plan with the lowest peak."""
    return _plan_of(min(_search(parts, weights, None), key=lambda state: state[1]))


def least_time_plan(parts: Parts, weights: Weights, limit: int) -> Plan | None:
    """The plan that recomputes least of those whose peak is within a limit in bytes, if any."""
    found = _search(parts, weights, limit)
    return _plan_of(min(found, key=lambda state: state[2])) if found else None


def _plan_of(state: tuple) -> Plan:
    options: tuple[_Option, ...] = state[3]
    return Plan(tuple(o.segment for o in options), tuple(o.recomputed for o in options))


def planned_peak(parts: Parts, plan: Plan) -> int:
    """The peak of a plan as the search estimates it, without the order of events."""
    held, peak = parts.stem.kept, 0
    for stage, segment, first in zip(parts.stages, *plan, strict=True):
        option = next(
            o for o in _options(stage, 0) if (o.segment, o.recomputed) == (segment, first)
        )
        peak, held = max(peak, held + option.peak), held + option.held
    return max(peak, held + parts.head.backward_peak)
