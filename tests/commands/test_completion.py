import os
import shutil
import subprocess
import sys

import pytest

PRESETS_OF_T = ["sret_t", "sret_t_unsliced", "sret_t_384"]


def sret(cwd, *arguments, **environment):
    done = subprocess.run(
        [sys.executable, "-m", "sret_cli", *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def completed(cwd, *words):
    """What the shell is offered for the last word."""
    offered = sret(
        cwd,
        COMP_WORDS="\n".join(("sret", *words)),
        COMP_CWORD=str(len(words)),
        _SRET_COMPLETE="complete_bash",
    )
    return offered.split()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("tr",), ["train"]),
        (("build", "--preset", "sret_t"), PRESETS_OF_T),
        (("convert", "x.pth", "--preset", "na"), ["nano"]),
        (("train", "--dataset", "h"), ["hfds", "hfds/"]),
        (("train", "--recipe", ""), ["none", "sret", "deit", "finetune", "small"]),
        (("eval", "--precision", ""), ["fp32", "bf16"]),
        (("run", ""), ["here.toml", "studies/a.toml", "studies/b.toml"]),
        (("train", "studies/b"), ["studies/b.toml"]),
        (("report", "st"), ["studies/a.toml", "studies/b.toml"]),
        (("train", "--prec"), ["--precision"]),
    ],
)
def test_commands_flags_values_and_studies_are_completed(tmp_path, words, offered):
    (tmp_path / "studies" / "c.toml").mkdir(parents=True)
    for name in ("here.toml", "studies/b.toml", "studies/a.toml", "studies/notes.txt"):
        (tmp_path / name).touch()
    assert completed(tmp_path, *words) == offered


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_completion_is_installed_for_bash_and_works_there(tmp_path):
    home, folder = tmp_path / "home", tmp_path / "bin"
    home.mkdir(), folder.mkdir()
    (folder / "sret").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m sret_cli "$@"\n')
    (folder / "sret").chmod(0o755)
    sret(
        tmp_path,
        *("--install-completion", "bash"),
        HOME=str(home),
        _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1",
    )
    script = (
        'source "$HOME/.bashrc"; COMP_WORDS=(sret build --preset sret_t); COMP_CWORD=3; '
        '_sret_completion sret; echo "${COMPREPLY[*]}"'
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        env={**os.environ, "HOME": str(home), "PATH": f"{folder}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert (done.stdout.split(), done.stderr) == (PRESETS_OF_T, "")


@pytest.mark.slow
def test_completion_loads_neither_torch_nor_pandas(tmp_path):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "sret_cli"],
        cwd=tmp_path,
        env={
            **os.environ,
            "COMP_WORDS": "sret build --preset sret_t",
            "COMP_CWORD": "3",
            "_SRET_COMPLETE": "complete_bash",
        },
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == PRESETS_OF_T
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "sret_cli.spec.presets" in loaded
    assert not loaded & {"torch", "timm", "fvcore", "pandas", "matplotlib", "scipy", "sklearn"}
