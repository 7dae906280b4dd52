"""Output for any terminal: ASCII replaces characters that its encoding lacks."""

import codecs
import io
import os
import sys

ASCII = {"–": "-", "−": "-", "±": "+-", "…": "...", "×": "x"}
REPLACE = "sret_cli.ascii"  # the name of the error handler, for `str.encode` and streams


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    signs = error.object[error.start : error.end]
    return "".join(ASCII.get(sign) or ascii(sign)[1:-1] for sign in signs), error.end


codecs.register_error(REPLACE, _replace)


def fit_to_encoding(text: str, encoding: str) -> str:
    r"""The text with ASCII, such as - or \xe9, for every character that an encoding lacks."""
    return text.encode(encoding, REPLACE).decode(encoding)


def prepare_streams() -> None:
    """Lets stdout and stderr take every character; output to a closed stream is dropped."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=REPLACE)


def in_one_line(text: str) -> str:
    """The text in one line: no control characters, and single spaces for all white space."""
    printable = "".join(sign if sign.isprintable() or sign.isspace() else "\ufffd" for sign in text)
    return " ".join(printable.split())
