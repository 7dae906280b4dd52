"""How many workers are fastest on this machine's CPU, by a short measurement.

`python -m sret_cli.study.pace FILE SECONDS` trains the pickled run on random images for a few
seconds after it was told to start, and prints the images that it did in a second.
"""

import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from sret_cli.runtime.errors import SretError
from sret_cli.spec.run import Run
from sret_cli.study.shares import Share, cores, divide

SECONDS = 2.0  # of one measurement
GAIN = 1.05  # that more workers must bring


def best_jobs(run: Run, most: int) -> tuple[int, str]:
    """The number of workers that trains a run fastest on this machine, and why.

    Args:
        run: the smallest run of a study.
        most: the number of runs that there are to do.
    """
    counts = [1]
    while counts[-1] * 2 <= min(cores(), most):
        counts.append(counts[-1] * 2)
    if len(counts) == 1:
        return 1, "one run, or one core"
    speeds = {jobs: measured_speed(run, divide(jobs, "cpu", [])) for jobs in counts}
    best = 1
    for jobs in counts[1:]:
        if speeds[jobs] > GAIN * speeds[best]:
            best = jobs
    told = ", ".join(f"{speed:,.0f} images/s with {jobs}" for jobs, speed in speeds.items())
    return best, f"{run.name} trains {told}"


def measured_speed(run: Run, shares: Sequence[Share]) -> float:
    """Images per second of workers that train a run at the same time, all together.

    Raises:
        SretError: a worker ended without a measurement.
    """
    with tempfile.TemporaryDirectory(prefix="sret-") as folder:
        path = Path(folder, "run")
        path.write_bytes(pickle.dumps(run))
        command = [sys.executable, "-m", "sret_cli.study.pace", str(path), str(SECONDS)]
        processes = [
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, **share.environment()},
            )
            for share in shares
        ]
        try:
            for process in processes:
                assert process.stdout is not None
                process.stdout.readline()  # "ready"
            total = 0.0
            for process in processes:
                assert process.stdin is not None
                process.stdin.write("go\n")
                process.stdin.flush()
            for process in processes:
                out, err = process.communicate()
                try:
                    total += float(out)
                except ValueError:
                    told = err.strip().splitlines()[-1:] or ["it printed nothing"]
                    raise SretError(f"the speed could not be measured: {told[0]}") from None
            return total
        finally:
            for process in processes:
                process.kill()


def _measure(run: Run, seconds: float) -> float:
    import torch

    from sret_cli.model.kinds import build_any
    from sret_cli.spec.train import TrainSpec

    torch.set_flush_denormal(True)
    train = run.train or TrainSpec()
    model = build_any(run.model)
    size, channels = run.model.img_size, run.model.in_chans
    images = torch.rand(train.batch_size // train.accumulation or 1, channels, size, size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        model(images).logsumexp(1).mean().backward()
        optimizer.step()

    step()
    print("ready", flush=True)
    sys.stdin.readline()
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        step()
        done += len(images)
    return done / (time.perf_counter() - start)


if __name__ == "__main__":
    found: Run = pickle.loads(Path(sys.argv[1]).read_bytes())
    print(_measure(found, float(sys.argv[2])), flush=True)
