"""Trains on several ranks in double precision, so that rounding cannot hide an error.

    python -m torch.distributed.run --nproc-per-node 2 tests/end_to_end/rank_harness.py FOLDER

`plain` and `sharded` train to the end. `stopped` is sharded, and trains until the second rank gets
a SIGTERM after its seventh step. `published` is the first 20 steps of the published recipe, in
single precision.
"""

import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import torch
from helpers import TINY

from sret_cli.data.loader import Loader
from sret_cli.runtime.progress import Progress
from sret_cli.spec.options import RunOptions
from sret_cli.spec.run import Run
from sret_cli.spec.train import TrainSpec
from sret_cli.training.ranks import ALONE, start_ranks
from sret_cli.training.session import train

# Ten steps an epoch with every kind of random number: shuffles, drop path, mixup, and numbers of
# recursions, some of which leave NLLs unused. Passes are recomputed, and steps have two parts.
MODEL = TINY.with_values(recursions=(3, 3, 3), nll="per_pass", drop_path_rate=0.2)
TRAIN = TrainSpec(
    epochs=2,
    warmup_epochs=0,
    batch_size=136,
    accumulation=2,
    recompute=2,
    recursions_range=(1, 3),
    mixup=0.8,
    cutmix=1.0,
    model_ema_decay=0.9,
)
RUN = Run("test", "tiny", MODEL, TRAIN)
PUBLISHED = Run("test", "tiny", MODEL, TrainSpec(recipe="sret", batch_size=136))


def in_double():
    """Makes weights, images and all other tensors double precision."""
    torch.set_default_dtype(torch.double)
    plain = Loader.normalize
    Loader.normalize = lambda self, x: plain(self, x).double()


def train_until(step, run, folder, ranks=ALONE, shards=False):
    """Trains until the last rank gets a SIGTERM after a step."""

    def stop(done, total, text):
        if done == step and ranks.rank == ranks.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with suppress(SystemExit):
        train(
            run,
            folder,
            ranks=ranks,
            options=RunOptions(shard=shards),
            progress=Progress(on_step=stop),
        )


def main():
    """Trains all folders as one of the ranks."""
    folder, ranks = Path(sys.argv[1]), start_ranks("cpu")
    train_until(20, PUBLISHED, folder / "published", ranks)
    in_double()
    row = train(RUN, folder / "plain", ranks=ranks)
    if ranks.is_leader:
        (folder / "row.json").write_text(json.dumps(row))
    train(RUN, folder / "sharded", ranks=ranks, options=RunOptions(shard=True))
    train_until(7, RUN, folder / "stopped", ranks, shards=True)


if __name__ == "__main__":
    assert ALONE.is_leader
    main()
