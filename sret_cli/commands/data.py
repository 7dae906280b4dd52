"""`sret data check`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from sret_cli.commands.flags import WHERE, Json
from sret_cli.commands.output import Output, print_json, stderr_console
from sret_cli.runtime.errors import DATA, SretError

data_app = typer.Typer(
    name="data", help="Check images before training on them.", rich_markup_mode=None
)


@data_app.callback()
def data_root() -> None:
    """Check images before training on them."""


@data_app.command()
def check(
    data_dir: Annotated[Path, typer.Argument(metavar="DIR", help="Folder with train/ and test/.")],
    *,
    manifest: Annotated[
        Path | None,
        typer.Option(
            help="Write the list of all files here; to NAME-OF-DIR.csv if not given.",
            rich_help_panel=WHERE,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="<int>",
            min=1,
            help="Processes; one for each core if not given.",
            rich_help_panel=WHERE,
        ),
    ] = None,
    json_: Json = False,
) -> None:
    """Decode every image once, and list errors and oddities; exit 4 if an image is unreadable.

    Also lists: images of each class; classes whose sizes differ more than tenfold; images that are
    in two splits, by their bytes or pixels; classes without images in a split; EXIF orientations;
    Pillow's warnings; and the files that training leaves out, by extension. The manifest holds
    sizes, modes, orientations, warnings and SHA-256 of all images. An earlier manifest is
    replaced; any other file is not.
    """
    from sret_cli.data.check import check_folder, refuse_to_overwrite, write_manifest
    from sret_cli.report.data_check import summary_lines
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
        for line in summary_lines(summary):
            Output().print(line)
    stderr_console().print(f"wrote {path}")
    if bad := len(findings.unreadable):
        files = f"{bad:,} of {len(findings.files):,} images"
        raise SretError(f"{files} cannot be read; fix or remove them", DATA)
