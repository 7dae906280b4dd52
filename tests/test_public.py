"""The names that `from sret_cli import …` promises, and their examples."""

import doctest
from importlib import import_module

import pytest

import sret_cli


@pytest.mark.parametrize("name", sret_cli.PUBLIC)
def test_every_public_name_has_an_example_that_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module, _, attribute = sret_cli.PUBLIC[name].partition(":")
    value = getattr(import_module(f"sret_cli.{module}"), attribute)
    assert getattr(sret_cli, name) is value
    documented = value if callable(value) else import_module(f"sret_cli.{module}")
    examples = doctest.DocTestFinder(recurse=False).find(documented, name, globs={})
    assert [test for test in examples if test.examples], f"{name} has no example"
    for test in examples:
        assert doctest.DocTestRunner().run(test).failed == 0
