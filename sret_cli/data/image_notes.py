"""What Pillow warns of while it decodes, as notes that name the image.

Images are decoded in other processes, whose output would land in the middle of a bar of progress:
the warnings come back with the sample, and the process that trains tells them.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import PIL

from sret_cli.runtime.errors import show_note

SHOWN_IMAGES = 10  # of which warnings are told, in a process
PILLOW = os.path.dirname(PIL.__file__) + os.sep


@dataclass(frozen=True)
class Noted:
    """What was made of an image, and what Pillow warned of meanwhile, as lines with its name."""

    made: Any
    warnings: tuple[str, ...]


_told: set[str] = set()
_left_to_python: dict[Any, Any] = {}


@contextmanager
def pillow_warnings() -> Iterator[list[str]]:
    """Hands out a list that has, at the end, what Pillow warned of within: each text once.

    Warnings of other packages are left to Python.
    """
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
    for warning in caught:
        if warning.filename.startswith(PILLOW):
            text = " ".join(str(warning.message).split())
            texts += [text] if text not in texts else []
        else:
            warnings.warn_explicit(
                warning.message,
                warning.category,
                warning.filename,
                warning.lineno,
                registry=_left_to_python,
            )


def noted(make: Callable[[], Any], name: Callable[[], str]) -> Any:
    """What `make` makes of an image of that name; `Noted` where Pillow warned of something."""
    with pillow_warnings() as texts:
        made = make()
    return Noted(made, tuple(f"{name()}: {text}" for text in texts)) if texts else made


def without_notes(batch: list[Any]) -> tuple[list[Any], list[str]]:
    """What was made of images, and all warnings among them."""
    texts = [text for sample in batch if isinstance(sample, Noted) for text in sample.warnings]
    return [sample.made if isinstance(sample, Noted) else sample for sample in batch], texts


def tell_warnings(texts: list[str]) -> None:
    """Tells what Pillow warned of, each text once, and of so many images in a process."""
    for text in texts:
        if text not in _told and len(_told) <= SHOWN_IMAGES:
            _told.add(text)
            if len(_told) > SHOWN_IMAGES:
                text = "more images have such faults; `sret data check DIR` lists all of a folder"
            show_note(text)
