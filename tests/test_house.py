import subprocess
import sys

import pytest
from house import ORDER, floors, folder, imports, modules, upward

import sret_cli

HEAVY = {"torch", "torchvision", "timm", "fvcore", "pandas", "matplotlib", "scipy", "sklearn"}


def loaded_by(code):
    """The modules that a fresh interpreter has loaded after some code."""
    code += "\nimport sys; print('loaded:', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.rpartition("loaded:")[2].split())


def test_every_folder_has_its_place_and_says_what_it_is_for():
    folders = {folder(name) for name in modules()} - {""}
    assert folders <= {place for places in ORDER for place in places}
    for name, path in modules().items():
        if name.endswith(".__init__"):
            text = path.read_text(encoding="utf-8")
            assert "Its central idea is" in text and len(text.split()) > 30, name


def test_a_folder_imports_only_from_folders_before_it():
    assert upward(imports()) == []


def test_an_import_against_the_order_is_found():
    edges = {"spec.model": {"runtime.errors", "cost.count"}, "data.check": {"model.sret"}}
    assert upward(edges) == ["spec.model imports cost.count", "data.check imports model.sret"]


def test_no_files_import_each_other_in_a_circle():
    assert max(floors(imports()).values()) > 1
    with pytest.raises(ValueError, match="a circle of imports: a -> b -> a"):
        floors({"a": {"b"}, "b": {"a"}})


def test_help_and_the_package_itself_load_no_heavy_package():
    loaded = loaded_by(
        "import sys; sys.argv = ['sret', '--help']\n"
        "import sret_cli\n"
        "from sret_cli.commands.app import main\n"
        "try: main()\n"
        "except SystemExit: pass"
    )
    assert "typer" in loaded
    assert not loaded & (HEAVY | {"pydantic"})


def test_specs_counts_studies_and_reports_load_no_heavy_package():
    light = [n for n in modules() if folder(n) in ("runtime", "spec", "study", "commands")]
    light += [
        "cost.count",
        "cost.budget",
        "cost.published",
        "report.tables",
        "report.write",
        "report.card",
        "report.page",
    ]
    lines = [f"import sret_cli.{name.removesuffix('.__init__')}" for name in light]
    assert not loaded_by("\n".join(lines)) & HEAVY


def test_models_weights_and_costs_do_not_need_timm():
    names = [n for n in modules() if folder(n) in ("model", "cost")]
    names += ["weights.store", "weights.convert", "weights.safe_read"]
    lines = [f"import sret_cli.{name.removesuffix('.__init__')}" for name in names]
    loaded = loaded_by("\n".join(lines))
    assert "torch" in loaded
    assert not loaded & {"timm", "torchvision"}


def test_every_public_name_is_there_and_nothing_else_is_promised():
    assert set(sret_cli.PUBLIC) == {
        *("ModelSpec", "TrainSpec", "PRESETS", "count", "build_model", "load_reference"),
        *("profile", "train", "evaluate", "read_rows"),
    }
    for name in sret_cli.PUBLIC:
        assert getattr(sret_cli, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = sret_cli.nothing
