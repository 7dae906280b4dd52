"""The most bytes that torch allocates on a CPU while something runs."""

import os
from collections.abc import Callable
from itertools import accumulate

import torch


def most_allocated(call: Callable[[], object]) -> int:
    """The most bytes that a call has allocated on the CPU at once, on top of what was there."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it reports to stderr that it is there
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU],
        profile_memory=True,
        acc_events=True,  # or torch 2.11 warns
    ) as record:
        call()
    assert record.profiler is not None
    events = record.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate(size for _, size in changes), default=0)
