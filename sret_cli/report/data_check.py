"""The findings of `sret data check` as lines of text."""

from collections.abc import Iterator, Sequence
from typing import Any

SHOWN = 10  # lines of a long list; the manifest and --json have all


def summary_lines(summary: dict[str, Any]) -> Iterator[str]:
    """What a check of images found, most important numbers first.

    Args:
        summary: what `data.check`'s findings give as plain values.
    """
    for split, counts in summary["splits"].items():
        size = f"{counts['images']:,} images of {counts['classes']:,} classes"
        yield f"{split or 'all'}: {size}, {counts['bytes'] / 1e6:,.1f} MB"
    yield from _class_lines(summary["images_by_class"])
    for split, ends in summary["imbalanced"].items():
        (most, images), (least, few) = ends["largest"], ends["smallest"]
        yield (
            f"{split or 'all'}: classes are more than ten times apart: {images:,} images of "
            f"{most}, {few:,} of {least}"
        )
    yield from summary["unreadable"].values()
    if ignored := summary["ignored"]:
        counts = ", ".join(f"{count:,} {kind}" for kind, count in ignored.items())
        yield f"files that training leaves out: {counts}"
    for kind, paths in summary["odd"].items():
        yield from _list_lines(f"{kind}: {_images(paths)}", paths)
    if turned := summary["orientations"]:
        kinds = ", ".join(f"{len(paths):,} with {kind}" for kind, paths in turned.items())
        paths = [path for listed in turned.values() for path in listed]
        title = f"EXIF orientation other than 1: {_images(paths)} ({kinds})"
        yield from _list_lines(
            f"{title}; training takes them as they are stored, not turned", paths
        )
    if warnings := summary["warnings"]:
        lines = [f"{path}: {text}" for path, text in warnings.items()]
        yield from _list_lines(f"Pillow warns of {_images(lines)}", lines)
    if duplicates := [" = ".join(paths) for paths in summary["duplicates"]]:
        yield from _list_lines(f"the same image in two splits: {len(duplicates):,}", duplicates)
    for split, classes in summary["missing_classes"].items():
        yield from _list_lines(f"{split} has no images of {len(classes):,} classes", classes)


def _class_lines(by_split: dict[str, dict[str, int]]) -> Iterator[str]:
    """The images of each class, the classes with the fewest images first."""
    classes = sorted(
        dict.fromkeys(name for counts in by_split.values() for name in counts),
        key=lambda name: sum(counts[name] for counts in by_split.values()),
    )
    if not classes:
        return
    lines = []
    for name in classes:
        counts = (f"{n[name]:,} in {split or 'all'}" for split, n in by_split.items())
        lines.append(f"{name}: {', '.join(counts)}")
    yield from _list_lines("images of each class, the fewest first", lines)


def _images(found: Sequence[str]) -> str:
    return "1 image" if len(found) == 1 else f"{len(found):,} images"


def _list_lines(title: str, lines: Sequence[str]) -> Iterator[str]:
    yield title
    for line in lines[:SHOWN]:
        yield f"  {line}"
    if len(lines) > SHOWN:
        yield f"  and {len(lines) - SHOWN:,} more"
