"""Turns Pillow's warnings into notes that name the image.

Images are decoded in other processes, whose output would break the progress bar. So the warnings
are returned with the sample, and the process that trains shows them.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import PIL

from sret_cli.runtime.errors import show_note

SHOWN_IMAGES = 10  # warnings are shown for this many images in a process
PILLOW = os.path.dirname(PIL.__file__) + os.sep


@dataclass(frozen=True)
class Noted:
    """The result for an image, and Pillow's warnings about it as lines with its name."""

    made: Any
    warnings: tuple[str, ...]


_shown: set[str] = set()
_left_to_python: dict[Any, Any] = {}


@contextmanager
def pillow_warnings() -> Iterator[list[str]]:
    """Yields a list that holds Pillow's warnings when the context ends, each text once.

    Warnings of other packages are handled by Python as usual.
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
    """The result of `make` for the image of a name, as `Noted` if Pillow warned."""
    with pillow_warnings() as texts:
        made = make()
    return Noted(made, tuple(f"{name()}: {text}" for text in texts)) if texts else made


def without_notes(batch: list[Any]) -> tuple[list[Any], list[str]]:
    """The results for the images of a batch, and all warnings about them."""
    texts = [text for sample in batch if isinstance(sample, Noted) for text in sample.warnings]
    return [sample.made if isinstance(sample, Noted) else sample for sample in batch], texts


def show_warnings(texts: list[str]) -> None:
    """Shows Pillow's warnings, each text once, for up to `SHOWN_IMAGES` images in a process."""
    for text in texts:
        if text not in _shown and len(_shown) <= SHOWN_IMAGES:
            _shown.add(text)
            if len(_shown) > SHOWN_IMAGES:
                text = "more images have such faults; `sret data check DIR` lists them all"
            show_note(text)
