"""`sret help`: pages of reference that are longer than a command's `--help`."""

from collections.abc import Callable
from typing import Annotated

import typer

from sret_cli.commands.completion import choices
from sret_cli.commands.output import Output
from sret_cli.runtime.errors import USAGE, SretError, nearest_choice


def help_command(
    topic: Annotated[
        str | None,
        typer.Argument(
            metavar="TOPIC",
            help="A topic, such as studies; all topics are listed if not given.",
            autocompletion=choices("studies"),
        ),
    ] = None,
) -> None:
    """Print the reference of a topic, or list the topics."""
    if topic is None:
        return print_topics()
    if topic not in TOPICS:
        raise SretError(f"unknown topic {topic!r}; {nearest_choice(topic, list(TOPICS))}", USAGE)
    _, print_topic = TOPICS[topic]
    print_topic()


def print_topics() -> None:
    """Prints what `sret help` has pages about."""
    print("Topics of `sret help TOPIC`:\n")
    for name, (meaning, _) in TOPICS.items():
        print(f"  {name}  {meaning}")
    print("\n`sret --help` lists the commands; `sret COMMAND --help` describes one.")


def print_study_keys() -> None:
    """Prints every key of a study file, a table for each table of the file."""
    from sret_cli.report.tables import terminal_table
    from sret_cli.study.keys import NOTES, study_keys

    keys = study_keys()
    for name, note in NOTES.items():
        lines = [
            [key.name, key.default, f"{key.meaning}\nType: {key.type}."]
            for key in keys
            if key.table == name
        ]
        table = terminal_table(["Key", "Default", "Meaning"], lines, name)
        table.caption = note
        table.columns[0].no_wrap = True
        Output().print(table, end="\n\n")


TOPICS: dict[str, tuple[str, Callable[[], None]]] = {
    "studies": ("Every table and key of a study file, with types and defaults.", print_study_keys),
}
