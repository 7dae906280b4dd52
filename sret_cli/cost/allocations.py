"""The most bytes that torch allocates on a CPU during a call.

`kineto_results` is private API of torch; `tests/cost/test_private_torch.py` has a test for it.
"""

import os
from collections.abc import Callable
from itertools import accumulate

import torch


def most_allocated(call: Callable[[], object]) -> int:
    """The most bytes that a call has allocated on the CPU at once; earlier ones do not count."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else Kineto prints its start to stderr
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU],
        profile_memory=True,
        acc_events=True,  # else torch 2.11 warns
    ) as record:
        call()
    assert record.profiler is not None
    events = record.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate(size for _, size in changes), default=0)
