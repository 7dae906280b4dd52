"""Runs `sret` and kills its process at a named point of writing.

    python tests/end_to_end/kill_points.py "metrics.jsonl line:15" train --epochs 1

The points lie before and after the calls that make files durable. A point may be passed several
times; the number after the colon says which time counts. The package knows nothing of this: its
functions are replaced here.
"""

import os
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path

from sret_cli.commands import app
from sret_cli.runtime import files
from sret_cli.training import checkpoint


def kill_at(point):
    """Has this process end by SIGKILL at a point such as "row.json renamed:1"."""
    passed = Counter()

    def reached(name):
        passed[name] += 1
        if point == f"{name}:{passed[name]}":
            os.kill(os.getpid(), signal.SIGKILL)

    def around(owner, name, before=lambda *arguments: None, after=lambda *arguments: None):
        """Replaces a function by one that reaches points before and after it."""
        plain = getattr(owner, name)

        def observed(*arguments, **options):
            before(*arguments)
            result = plain(*arguments, **options)
            after(*arguments)
            return result

        setattr(owner, name, observed)

    around(
        os,
        "replace",
        before=lambda source, target: reached(f"{Path(target).name} written"),
        after=lambda source, target: reached(f"{Path(target).name} renamed"),
    )
    around(files.LineFile, "write", after=lambda file, line: reached(f"{file.path.name} line"))

    def before_writing(path, data):
        if path.name == checkpoint.MANIFEST_FILE:
            reached("checkpoint without its manifest")

    around(checkpoint, "write_atomically", before=before_writing)
    around(checkpoint, "write_checkpoint", after=lambda *_: reached("checkpoint durable"))

    def remove(path):
        (path / checkpoint.MANIFEST_FILE).unlink(missing_ok=True)
        reached("old manifest removed")
        shutil.rmtree(path)
        reached("old checkpoint removed")

    checkpoint.remove_checkpoint = remove


if __name__ == "__main__":
    kill_at(sys.argv[1])
    app.main(sys.argv[2:])
