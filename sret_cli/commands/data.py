"""The commands about data: check a folder of images."""

import os
from pathlib import Path
from typing import Annotated

import typer

from sret_cli.commands.flags import Json
from sret_cli.commands.output import Output, print_json, stderr_console
from sret_cli.runtime.errors import DATA, SretError

SHOWN = 10  # of a long list; the manifest and --json have all

data_app = typer.Typer(
    name="data", help="Check images before they are trained on.", rich_markup_mode=None
)


@data_app.callback()
def data_root() -> None:
    """Check images before they are trained on."""


@data_app.command()
def check(
    data_dir: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder with train/ and test/.")
    ],
    manifest: Annotated[
        Path | None, typer.Option(help="The list of all files; DIR's name and .csv if not given.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; one a core if not given.")
    ] = None,
    json_: Json = False,
) -> None:
    """Decode every image once, and list what is wrong or odd; exit 4 where one cannot be read.

    Also lists the images of each class and classes more than ten times apart, images that are in
    two splits, by their bytes or pixels, classes that a split has no images of, EXIF orientations,
    Pillow's warnings, and the files that are not trained on, by their extensions. The manifest
    holds sizes, modes, orientations, warnings and SHA-256 of all images; one that is there is
    replaced, and any other file is not.
    """
    from sret_cli.data.check import check_folder, refuse_to_overwrite, write_manifest
    from sret_cli.runtime.progress import Display

    path = manifest or Path(f"{Path(os.path.abspath(data_dir)).name}.csv")
    refuse_to_overwrite(path)
    with Display(stderr_console(), f"check {data_dir}", 1).showing() as progress:
        findings = check_folder(data_dir, workers, progress.on_step)
    write_manifest(findings, path)
    summary = findings.summary()
    if json_:
        print_json(summary)
    else:
        show(summary)
    stderr_console().print(f"wrote {path}")
    if bad := len(findings.unreadable):
        files = f"{bad:,} of {len(findings.files):,} images"
        raise SretError(f"{files} cannot be read; mend or remove them", DATA)


def show(summary: dict) -> None:
    """Prints what a check found."""
    for split, counts in summary["splits"].items():
        size = f"{counts['images']:,} images of {counts['classes']:,} classes"
        _print(f"{split or 'all'}: {size}, {counts['bytes'] / 1e6:,.1f} MB")
    by_class = summary["images_by_class"]
    classes = sorted(
        dict.fromkeys(name for counts in by_class.values() for name in counts),
        key=lambda name: sum(counts[name] for counts in by_class.values()),
    )
    if classes:
        lines = [
            f"{name}: "
            + ", ".join(f"{n[name]:,} in {split or 'all'}" for split, n in by_class.items())
            for name in classes
        ]
        _list("images of each class, the fewest first", lines)
    for split, ends in summary["imbalanced"].items():
        (most, images), (least, few) = ends["largest"], ends["smallest"]
        _print(
            f"{split or 'all'}: classes are more than ten times apart: {images:,} images of "
            f"{most}, {few:,} of {least}"
        )
    for error in summary["unreadable"].values():
        _print(error)
    if ignored := summary["ignored"]:
        counts = ", ".join(f"{count:,} {kind}" for kind, count in ignored.items())
        _print(f"files that training leaves out: {counts}")
    for kind, paths in summary["odd"].items():
        _list(f"{kind}: {_images(paths)}", paths)
    if turned := summary["orientations"]:
        kinds = ", ".join(f"{len(paths):,} with {kind}" for kind, paths in turned.items())
        paths = [path for own in turned.values() for path in own]
        title = f"EXIF orientation other than 1: {_images(paths)} ({kinds})"
        _list(f"{title}; training takes them as they are stored, not turned", paths)
    if warnings := summary["warnings"]:
        lines = [f"{path}: {text}" for path, text in warnings.items()]
        _list(f"Pillow warns of {_images(lines)}", lines)
    duplicates = [" = ".join(paths) for paths in summary["duplicates"]]
    if duplicates:
        _list(f"the same image in two splits: {len(duplicates):,}", duplicates)
    for split, classes in summary["missing_classes"].items():
        _list(f"{split} has no images of {len(classes):,} classes", classes)


def _images(found: list[str]) -> str:
    return "1 image" if len(found) == 1 else f"{len(found):,} images"


def _list(title: str, lines: list[str]) -> None:
    _print(title)
    for line in lines[:SHOWN]:
        _print(f"  {line}")
    if len(lines) > SHOWN:
        _print(f"  and {len(lines) - SHOWN:,} more")


def _print(line: str) -> None:
    Output().print(line)
