import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sret_cli

PACKAGE = Path(sret_cli.__file__).parent

# A file imports only from files above it.
ORDER = (
    *("__init__", "processes", "signs", "errors", "classes", "paths", "progress"),
    *("strict", "depth", "recipe", "spec", "registry"),
    *(
        "backbone",
        "contents",
        "records",
        "axes",
        "published",
        "cost",
        "folders",
        "interrupt",
        "augment",
        "image_notes",
        "sources",
        "readers",
    ),
    *("streams", "run", "points", "study", "linear", "blocks", "recompute", "stage", "model"),
    *("compilation", "layer_places", "recurse", "state_dicts", "safe_read", "reference"),
    *("weights", "breakdown", "profiler"),
    *("liveness", "allocations", "footprint", "memory", "measure", "soft_labels", "listing"),
    *("fingerprint", "identify", "data"),
    *("distributed", "evaluate", "checkpoint", "distill", "parallel", "metrics", "optimizer"),
    *("clean", "trainer", "room", "training_notes", "train", "team", "launch", "label_writer"),
    *("views", "origin", "model_card", "export", "figures"),
    *("report", "data_check", "completion", "command", "flags", "clean_commands"),
    *("train_commands", "weight_commands", "data_commands", "distill_commands", "cli", "__main__"),
)


def imports(name):
    tree = ast.parse((PACKAGE / f"{name}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sret_cli"):
            if node.module == "sret_cli":
                names = {alias.name for alias in node.names}
                yield from names & {p.stem for p in PACKAGE.glob("*.py")}
            else:
                yield node.module.partition(".")[2]


def test_every_file_has_its_place():
    assert sorted(ORDER) == sorted(path.stem for path in PACKAGE.glob("*.py"))


@pytest.mark.parametrize("name", ORDER)
def test_a_file_imports_only_from_files_above_it(name):
    above = ORDER[: ORDER.index(name)]
    assert [module for module in imports(name) if module not in above] == []


def loaded_by(code):
    """The modules that a fresh interpreter has loaded after some code."""
    code += "\nimport sys; print('loaded:', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.rpartition("loaded:")[2].split())


def test_help_loads_neither_torch_nor_pandas():
    loaded = loaded_by(
        "import sys; sys.argv = ['sret', '--help']\n"
        "from sret_cli.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass"
    )
    assert "typer" in loaded
    heavy = {"torch", "timm", "fvcore", "pandas", "matplotlib", "scipy", "sklearn", "pydantic"}
    assert not loaded & heavy


@pytest.mark.parametrize(
    "name",
    [
        "spec",
        "backbone",
        "cost",
        "run",
        "study",
        "records",
        "axes",
        "published",
        "team",
        "launch",
        "views",
        "report",
    ],
)
def test_light_files_load_no_heavy_package(name):
    loaded = loaded_by(f"import sret_cli.{name}")
    assert not loaded & {"torch", "timm", "fvcore", "pandas", "matplotlib", "scipy", "sklearn"}


@pytest.mark.parametrize(
    "name", ["model", "compilation", "recurse", "profiler", "weights", "memory", "measure"]
)
def test_model_and_costs_do_not_need_timm(name):
    loaded = loaded_by(f"import sret_cli.{name}")
    assert "torch" in loaded
    assert not loaded & {"timm", "torchvision"}
