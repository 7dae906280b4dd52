import pytest

from sret_cli.runtime.errors import first_line


@pytest.mark.parametrize(
    ("error", "default", "line"),
    [
        (ValueError("one\ntwo"), None, "one"),
        (ValueError("\n  one\ntwo"), None, "one"),
        (ValueError(), None, "ValueError"),
        (ValueError("\n"), "no reason given", "no reason given"),
    ],
)
def test_the_first_line_of_an_error_is_never_empty(error, default, line):
    assert first_line(error, default) == line
