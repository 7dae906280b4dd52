"""What `pip` gets: the files of the wheel."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.slow
def test_the_wheel_has_the_package_with_its_data_and_nothing_else(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "sret_cli", source / "sret_cli", ignore=ignored)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "-w",
        str(tmp_path),
        ".",
    ]
    subprocess.run(command, cwd=source, check=True)
    (wheel,) = tmp_path.glob("sret-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    package = {name for name in names if ".dist-info/" not in name}
    in_tree = (source / "sret_cli").rglob("*")
    assert package == {path.relative_to(source).as_posix() for path in in_tree if path.is_file()}
    for name in ("py.typed", "cost/published.csv", "report/templates/model_card.md"):
        assert f"sret_cli/{name}" in package
