"""How commands read their arguments: no flag twice, advice for unknown flags, and `~` in paths."""

import os
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand

from sret_cli.runtime.errors import USAGE, SretError
from sret_cli.study.paths import PATH_FIELDS

TRAINING_COMMANDS = ("train", "run", "distill-labels")


class Command(TyperCommand):
    """A command that refuses a flag that is given twice, and says what stands in for unknown ones.

    Raises:
        SretError: a flag is given twice, or is not one of the command's.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Fills the context with the values of the arguments; returns those that are left over."""
        if not ctx.resilient_parsing:
            self._check(ctx, args)
        rest = super().parse_args(ctx, args)
        for name, value in ctx.params.items():
            if isinstance(value, Path) or (name in PATH_FIELDS and value is not None):
                ctx.params[name] = type(value)(os.path.expanduser(value))
        return rest

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
        """What to say of a flag that the command does not have."""
        instead = {flag: flag for parameter in self.params for flag in parameter.opts}
        wrong = f"{option} is no flag of `{ctx.command_path}`"
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
