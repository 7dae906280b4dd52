"""How commands read their arguments and print their help.

No flag may be given twice, an unknown flag gets advice, `~` in a path is the home directory, and
help lists the flags in sections.
"""

import os
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand

from sret_cli.commands.flags import PANELS
from sret_cli.runtime.errors import USAGE, SretError
from sret_cli.study.paths import PATH_FIELDS

TRAINING_COMMANDS = ("train", "run", "distill-labels")


class Command(TyperCommand):
    """A command that refuses repeated flags, and names the right flag for an unknown one.

    Raises:
        SretError: a flag is given twice, or the command does not have it.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Fills the context with the values of the arguments; returns the remaining arguments."""
        if not ctx.resilient_parsing:
            self._check(ctx, args)
        rest = super().parse_args(ctx, args)
        for name, value in ctx.params.items():
            if isinstance(value, Path) or (name in PATH_FIELDS and value is not None):
                ctx.params[name] = type(value)(os.path.expanduser(value))
        return rest

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes the arguments, then one section of flags for each panel, as plain text."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            is_argument = parameter.param_type_name == "argument"
            panel = "Arguments" if is_argument else getattr(parameter, "rich_help_panel", None)
            if (record := parameter.get_help_record(ctx)) is not None:
                sections.setdefault(panel or "Options", []).append(record)
        for section in ("Arguments", *PANELS, "Options"):
            if section in sections:
                with formatter.section(section):
                    formatter.write_dl(sections[section])

    def _check(self, ctx: Any, args: list[str]) -> None:
        try:
            _, _, given = self.make_parser(ctx).parse_args(list(args))
        except typer.TyperException as error:
            if hasattr(error, "possibilities"):
                option = getattr(error, "option_name", "")
                raise SretError(self._advice(ctx, option), USAGE) from None
            raise
        for index, parameter in enumerate(given):
            repeats = parameter.multiple or getattr(parameter, "is_flag", False)
            if parameter in given[:index] and not repeats:
                flag = max(parameter.opts, key=len)
                raise SretError(f"{flag} is given twice; leave one of the two out", USAGE)

    def _advice(self, ctx: Any, option: str) -> str:
        """The message about a flag that the command does not have."""
        instead = {flag: flag for parameter in self.params for flag in parameter.opts}
        wrong = f"{option} is not a flag of `{ctx.command_path}`"
        if any(parameter.name == "set_" for parameter in self.params):
            from sret_cli.study.points import field_keys

            for key in field_keys():
                table, _, name = key.partition(".")
                flag = f"--{name.replace('_', '-')}"
                if table == "model" or self.name in TRAINING_COMMANDS:
                    instead.setdefault(flag, f"--set {key}=…")
                elif option == flag:
                    return f"{wrong}, which trains nothing; use it with `sret train`"
        if option in instead:
            return f"{wrong}; use {instead[option]}"
        near = get_close_matches(option, instead, n=1, cutoff=0.6)
        return f"{wrong}; " + (f"did you mean {instead[near[0]]}?" if near else "see --help")
