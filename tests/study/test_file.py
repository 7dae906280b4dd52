import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from sret_cli.commands.arguments import study_from_flags
from sret_cli.cost.budget import twin_spec
from sret_cli.cost.count import count
from sret_cli.runtime.errors import SretError
from sret_cli.spec.contents import Contents
from sret_cli.spec.model import ModelSpec
from sret_cli.spec.presets import PRESETS
from sret_cli.spec.run import Run
from sret_cli.spec.train import TrainSpec, read_train
from sret_cli.study.file import load_study, study_from_tables
from sret_cli.study.resolve import resolve_model, resolve_run
from sret_cli.training.config import refuse_other_config

# A model too narrow for an untied one to have its parameters within 1 %.
TINY_TWINS = """
twins = ["params"]
[[runs]]
name = "tiny"
[model]
img_size = 16
embed_dims = [2]
num_heads = [1]
blocks = [1]
recursions = [2]
slices = [1]
recursive_slices = [1]
mlp_ratio = 1
nll = "per_pass"
num_classes = 0
"""


def study(text, tmp_path):
    path = tmp_path / "depth.toml"
    path.write_text(text)
    return load_study(path)


def test_the_grid_is_the_product_of_its_axes(tmp_path):
    found = study(
        """
        [model]
        preset = "nano"
        [train]
        epochs = 2
        [grid]
        "model.recursions" = [1, 2, 4]
        "train.seed" = [0, 1]
        """,
        tmp_path,
    )
    assert found.name == "depth"
    points = [(run.model.recursions[0], run.train.seed) for run in found.runs]
    assert points == [(1, 0), (1, 1), (2, 0), (2, 1), (4, 0), (4, 1)]
    assert len({run.run_id for run in found.runs}) == 6
    assert all(run.model.num_classes == 10 for run in found.runs)


def test_zipped_axes_move_together_and_runs_are_listed(tmp_path):
    found = study(
        """
        [[runs]]
        name = "wide"
        "model.preset" = "deep"
        [[runs]]
        "model.preset" = "sret_t"
        [zip]
        "model.nll" = ["per_pass", "none"]
        "model.mlp_ratio" = [2, 3]
        """,
        tmp_path,
    )
    assert [(r.name, r.model.nll, r.model.mlp_ratio) for r in found.runs] == [
        ("wide", "per_pass", 2.0),
        ("wide", "none", 3.0),
        ("sret_t", "per_pass", 2.0),
        ("sret_t", "none", 3.0),
    ]
    assert found.runs[0].train is None


def test_a_run_id_says_what_a_run_does_and_nothing_else():
    one = resolve_run("a", {"preset": "nano"}, {"epochs": 2})
    same = resolve_run("b", {"preset": "nano", "recursions": 2}, {"epochs": 2, "seed": 0}, "x")
    other = resolve_run("a", {"preset": "nano"}, {"epochs": 3})
    assert one.run_id == same.run_id != other.run_id
    assert len(one.run_id) == 10


def test_run_ids_stay_what_they_are():
    assert resolve_run("a", {"preset": "nano"}, None).run_id == "e7ee5c964c"
    assert resolve_run("a", {}, {}).run_id == "9647993dc4"
    assert resolve_run("a", {}, {"recipe": "small"}).run_id == "e06b0e99e5"
    assert resolve_run("a", {}, {"seed": 3, "epochs": 2}).run_id == "96ddeef3e7"
    synthetic = resolve_run("a", {"preset": "nano", "num_classes": 10}, {"dataset": "synthetic"})
    assert synthetic.run_id == "8629205494"
    assert replace(resolve_run("a", {}, {}), continues="abc").run_id == "fb2429d9d9"
    taught = resolve_run("a", {"preset": "nano"}, {"teacher": "vit_tiny_patch16_224"})
    assert replace(taught, contents=Contents()).run_id == "077aa20f9a"


def test_a_run_from_before_a_recipe_had_more_fields_keeps_its_id_and_its_schedule():
    model = ModelSpec(**PRESETS["nano"].with_values(drop_path_rate=0.1).model_dump())
    stored = TrainSpec(recipe="sret").model_dump(mode="json")
    for name in ("warmup_lr", "sched_on_updates", "model_ema_warmup"):
        del stored[name]
    train = read_train(stored)
    assert (train.warmup_lr, train.sched_on_updates, train.warmup_epochs) == (None, True, 30)
    assert Run("a", "nano", model, train).run_id == "3bb9300a0c"
    assert Run("a", "nano", model, TrainSpec(recipe="sret")).run_id != "3bb9300a0c"
    new = {"model": model.model_dump(mode="json"), "train": train.model_dump(mode="json")}
    old = {"model": dict(new["model"]), "train": stored}
    del old["model"]["drop_path_ramp"]
    refuse_other_config("the run", old, new)
    new["train"]["warmup_lr"] = 1e-6
    with pytest.raises(SretError, match=r"train.warmup_lr \(None, not 1e-06\) differ"):
        refuse_other_config("the run", old, new)


def test_layers_and_slices_in_a_study_are_those_of_the_flags():
    spec = resolve_model({"preset": "deep", "layers": 1000, "slices": 4})
    assert (spec.layers, spec.slices) == (1000, (4, 4, 1))
    assert resolve_model({"slices": 4, "recursive_slices": [2, 1, 1]}).recursive_slices == (2, 1, 1)
    assert resolve_model({"slices": [8, 4, 1]}).recursive_slices == (4, 4, 1)


def test_a_budget_and_a_twin_in_a_study_are_those_of_the_flags():
    wide = resolve_model({"preset": "sret_t", "params": "14M"})
    assert wide.embed_dims == (112, 224, 448)
    assert resolve_model({"preset": "sret_t", "params": 14e6}) == wide
    run = resolve_run("a", {"preset": "sret_t", "params": "14M", "twin": "layers"}, None)
    assert (run.name, run.model) == ("sret_t twin layers", twin_spec(wide, "layers"))
    found = study_from_flags(None, {"preset": "sret_t", "macs": "4.2G", "twin": "macs"}, None, [])
    assert abs(count(found.runs[0].model).macs - 4.2e9) <= 2 * 0.01 * 4.2e9


def test_twins_are_added_once_for_every_run_that_shares_weights(tmp_path):
    found = study(
        """
        twins = ["layers", "macs"]
        [model]
        preset = "nano"
        [train]
        epochs = 2
        [grid]
        "model.recursions" = [1, 2]
        "train.seed" = [0, 1]
        """,
        tmp_path,
    )
    # A recursion of 1 is its own twin, and with equal slices the two kinds are one model.
    assert [(r.name, r.model.blocks, r.model.recursions, r.train.seed) for r in found.runs] == [
        ("nano", (1, 2, 1), (1, 1, 1), 0),
        ("nano", (1, 2, 1), (1, 1, 1), 1),
        ("nano", (1, 2, 1), (2, 2, 2), 0),
        ("nano", (1, 2, 1), (2, 2, 2), 1),
        ("nano twin layers", (2, 4, 2), (1, 1, 1), 0),
        ("nano twin layers", (2, 4, 2), (1, 1, 1), 1),
    ]
    assert {run.train.epochs for run in found.runs} == {2}


def test_slices_fit_the_image_size_that_comes_with_them():
    assert resolve_model({"preset": "sret_t", "img_size": 112, "slices": 4}).slices == (4, 1, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[modle]\n", r"unknown table \[modle\]; did you mean 'model'"),
        ("[model]\nmlp_ration = 3\n", r"\[model\] unknown key 'mlp_ration'; did you mean"),
        ('[model]\npreset = "depe"\n', "unknown preset 'depe'; did you mean 'deep'"),
        ("[model]\nlayers = 2.5\n", "layers = 2.5: give one whole number"),
        ("[model]\nlayers = true\n", "layers = True: give one whole number"),
        ("[train]\nepoch = 3\n", r"\[train\] unknown key 'epoch'; did you mean 'epochs'"),
        ('[train]\nlr = "fast"\n', "lr = 'fast': input should be a valid number"),
        ('[grid]\n"model.recursion" = [1]\n', "did you mean 'model.recursions'"),
        ("[grid]\nmodel.recursions = [1]\n", "write it in quotes"),
        ('[grid]\n"model.recursions" = 4\n', "give a list of values"),
        ('[zip]\n"train.seed" = [1, 2]\n"train.lr" = [1e-3]\n', "must have the same length"),
        ('[model]\n[report]\ny = ["top2"]\n', r"\[report\] no column 'top2'; did you mean top"),
        ("model = 3\n", r"write model as \[model\]"),
        ('twins = "layers"\n', "twins = 'layers': give a list of layers, params, macs"),
        ('twins = ["layer"]\n', "twins: unknown kind 'layer'; did you mean 'layers'"),
        (TINY_TWINS, "twins: 'params' of 'tiny': no untied model has the shared one's 192 params"),
        ('[model]\ntwin = "deep"\n', r"\[model\] unknown twin 'deep'; choose from layers"),
        ('[model]\nparams = "14X"\n', r"\[model\] '14X' is not a quantity"),
        ("[model]\nmacs = -3\n", r"\[model\] -3 is not a quantity"),
        ('[model]\nparams = "14M"\nmacs = "4G"\n', "a width meets one budget"),
        ('[grid]\n"model.params" = ["14M"]\n', "no width has 14,000,000 params within 1 %"),
        ("", "needs at least one of the tables"),
        ("[model\n", "is not a study, which is a TOML file"),
        ("[model]\nnum_classes = 5\n[train]\n", "fewer than the 10 classes"),
        ('[model]\npreset = ["deep"]\n', r"unknown preset \['deep'\]"),
        ("[[runs]]\nname = 3\n", "name = 3: give a text"),
        ("runs = []\n", "runs is an empty list"),
        ("[runs]\n", r"write runs as \[\[runs\]\]"),
        ('[[runs]]\nname = "a"\n[[runs]]\nname = "b"\n', "'a' and 'b' are the same run"),
        ('[model]\n[report]\nx = "model.shuffle"\n', "is not a single number for each run"),
        ("[model]\nimg_size = 8\n", "the stem leaves one token of a 8-px image; use img_size 9"),
        ("[train]\nmin_lr = 1.0\n", "min_lr = 1 is above lr"),
        (
            '[grid]\n"train.seed" = [0, 1]\n[zip]\n"train.seed" = [5, 6, 7]\n',
            r"train.seed is in \[grid\] and in \[zip\]",
        ),
        (
            '[grid]\n"train.seed" = [0, 1]\n'
            '[[runs]]\n"train.lr" = 1e-3\n[[runs]]\n"train.seed" = 5\n',
            r"train.seed is in \[grid\] and in \[\[runs\]\]",
        ),
        (
            '[zip]\n"model.nll" = ["none"]\n[[runs]]\n"model.nll" = "per_pass"\n',
            r"model.nll is in \[zip\] and in \[\[runs\]\]",
        ),
        ('[grid]\n"train.seed" = [0, 1, 0]\n', r"\[grid\] train.seed has 0 twice"),
        ('[grid]\n"model.mlp_ratio" = [3, 3.0]\n', r"\[grid\] model.mlp_ratio has 3.0 twice"),
        ('[zip]\n"train.seed" = [2, 2]\n', r"\[zip\] train.seed has 2 twice"),
        (
            '[zip]\n"train.seed" = [0, 1, 0]\n"train.lr" = [1.0, 1.0, 1]\n',
            r"\[zip\] train.seed, train.lr has \[0, 1\] twice",
        ),
        (
            '[grid]\n"model.recursions" = [1, [1, 1, 1]]\n',
            r"model.recursions = 1 and model.recursions = \[1, 1, 1\] are the same run",
        ),
        (
            '[grid]\n"model.recursions" = [1, 2]\n"model.layers" = [20]\n',
            "recursions = 1, model.layers = 20 and model.recursions = 2, .* are the same run",
        ),
        ("[[runs]]\n[[runs]]\n", "no values and no values are the same run"),
        ('twins = ["layers", "layers"]\n[model]\n', "twins has 'layers' twice"),
        ('baselines = ["vit_tiny", "vit_tiny"]\n', "baselines has 'vit_tiny' twice"),
    ],
)
def test_a_study_that_cannot_be_says_why(text, message, tmp_path):
    with pytest.raises(SretError, match=message) as refused:
        study(text, tmp_path)
    assert refused.value.code == 3
    assert "\n" not in str(refused.value)


def test_a_picture_is_no_study(tmp_path):
    path = tmp_path / "figure.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n\x00")
    with pytest.raises(SretError, match="figure.png is not a study, .*: it is not text"):
        load_study(path)


def test_flags_beside_a_study_file_are_refused_but_for_the_data(tmp_path):
    path = tmp_path / "s.toml"
    path.write_text("[train]\nepochs = 3\n")
    with pytest.raises(SretError, match="leave out layers"):
        study_from_flags(path, {"layers": 100}, {}, [])
    assert study_from_flags(path, {}, {}, []).runs[0].train.epochs == 3


def test_names_of_directories_with_another_use_are_refused(tmp_path):
    (tmp_path / "report.toml").write_text("[model]\n")
    with pytest.raises(SretError, match="runs/report is used by sret itself"):
        load_study(tmp_path / "report.toml")


def test_the_spelling_of_a_folder_does_not_change_the_run(tmp_path, monkeypatch):
    for name in ("cat", "dog"):
        (tmp_path / "images" / "train" / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    runs = [
        resolve_run("s", {}, {"dataset": "folder", "data_dir": d}) for d in ("images", "./images/")
    ]
    assert runs[0].spec() == runs[1].spec()
    assert runs[0].model.num_classes == 2


def test_any_field_can_be_set_by_a_flag():
    found = study_from_flags(None, {"preset": "nano"}, {}, ["model.mlp_ratio=4", "train.opt=lion"])
    assert found.runs[0].model.mlp_ratio == 4.0
    assert found.runs[0].train.opt == "lion"
    with pytest.raises(SretError, match="--set unknown key 'model.mlp'"):
        study_from_flags(None, {}, {}, ["model.mlp=4"])
    with pytest.raises(SretError, match="write it as model.FIELD=VALUE"):
        study_from_flags(None, {}, {}, ["mlp_ratio=4"])
    with pytest.raises(SretError, match="nothing is trained here"):
        study_from_flags(None, {}, None, ["train.lr=1"])


@pytest.mark.parametrize("folder", ["missing", "empty", "single"])
def test_a_folder_without_classes_is_a_data_error(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "single" / "train" / "cat").mkdir(parents=True)
    tables = {"train": {"dataset": "folder", "data_dir": str(tmp_path / folder)}}
    with pytest.raises(SretError) as refused:
        study_from_tables("s", tables)
    assert refused.value.code == 4


def test_values_repeat_in_a_zip_where_its_rows_differ(tmp_path):
    found = study(
        """
        [model]
        preset = "nano"
        [zip]
        "train.seed" = [0, 0, 1]
        "train.lr" = [1e-3, 2e-3, 1e-3]
        """,
        tmp_path,
    )
    assert [(run.train.seed, run.train.lr) for run in found.runs] == [
        *((0, 1e-3), (0, 2e-3), (1, 1e-3)),
    ]


def test_listed_runs_and_axes_replace_values_of_the_model_and_the_training(tmp_path):
    text = '[train]\nseed = 3\nepochs = 2\n[[runs]]\n[[runs]]\n"train.seed" = 4\n'
    assert [run.train.seed for run in study(text, tmp_path).runs] == [3, 4]
    text = '[train]\nseed = 3\nepochs = 2\n[grid]\n"train.seed" = [5, 6]\n'
    assert [run.train.seed for run in study(text, tmp_path).runs] == [5, 6]


def test_a_flag_does_not_hide_behind_an_axis(tmp_path):
    path = tmp_path / "s.toml"
    path.write_text('[grid]\n"train.data_dir" = ["a", "b"]\n')
    with pytest.raises(SretError, match=r"\[grid\] has values of train.data_dir; leave out the"):
        study_from_flags(path, {}, {"data_dir": "c"}, [])


@pytest.mark.parametrize(
    ("flags", "settings", "message"),
    [
        ({"lr": 0.1}, ["train.lr=2"], "train.lr=2 is the second value of train.lr, after 0.1"),
        ({}, ["train.lr=1", "train.lr=1"], "train.lr=1 is the second value of train.lr, after 1"),
        ({"dataset": "synthetic"}, ["train.dataset=digits"], "after 'synthetic'; leave one of"),
    ],
)
def test_a_field_that_has_two_values_is_refused(flags, settings, message):
    with pytest.raises(SretError, match=message) as refused:
        study_from_flags(None, {}, flags, settings)
    assert refused.value.code == 2


def test_paths_of_a_study_are_beside_it_or_in_the_working_directory(tmp_path, monkeypatch):
    for folder in ("studies/images", "studies/both", "work/both", "work/other"):
        for name in ("cat", "dog"):
            (tmp_path / folder / "train" / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    path = tmp_path / "studies" / "s.toml"
    found = {}
    for name in ("images", "both", "other"):
        path.write_text(f'[train]\ndata_dir = "{name}"\n')
        found[name] = load_study(path).runs[0].train.data_dir
    beside = tmp_path / "studies"
    assert found == {"images": f"{beside}/images", "both": f"{beside}/both", "other": "other"}
    path.write_text('[train]\ndata_dir = "nowhere"\n')
    message = (
        f"data_dir = 'nowhere' does not exist; a relative path is relative to the study file "
        f"({beside}) or to the working directory ({tmp_path}/work)"
    )
    with pytest.raises(SretError, match=re.escape(message)) as refused:
        load_study(path)
    assert refused.value.code == 4
    # A flag is relative to the working directory alone.
    assert load_study(path, {"data_dir": "other"}).runs[0].train.data_dir == "other"


def test_a_study_in_the_working_directory_keeps_its_paths_and_run_ids(tmp_path, monkeypatch):
    for name in ("cat", "dog"):
        (tmp_path / "images" / "train" / name).mkdir(parents=True)
    (tmp_path / "s.toml").write_text('[train]\ndata_dir = "images"\n')
    monkeypatch.chdir(tmp_path)
    for path in (Path("s.toml"), tmp_path / "s.toml"):
        assert load_study(path).runs[0].train.data_dir == "images"


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch):
    for name in ("cat", "dog"):
        (tmp_path / "images" / "train" / name).mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "s.toml").write_text('[train]\ndata_dir = "~/images"\ninit = "~/x"\n')
    train = load_study(tmp_path / "s.toml").runs[0].train
    assert (train.data_dir, train.init) == (f"{tmp_path}/images", f"{tmp_path}/x")


@pytest.mark.slow
def test_settings_of_the_training_stand_before_those_of_a_study_file(sret, tmp_path):
    text = '[model]\npreset = "nano"\nembed_dims = [8, 16, 32]\n[train]\nepochs = 3\n'
    (tmp_path / "s.toml").write_text(f'{text}[grid]\n"train.seed" = [0, 1]\n')
    settings = ["train.epochs=1", "train.batch_size=480", "train.warmup_epochs=0"]
    flags = [part for setting in settings for part in ("--set", setting)]
    code, out, err = sret("run", "s.toml", *flags, "--json")
    assert code == 0, err
    rows = json.loads(out)
    assert [(row["train.epochs"], row["train.seed"]) for row in rows] == [(1, 0), (1, 1)]
    code, _, err = sret("run", "s.toml", "--set", "train.seed=3")
    assert (code, "[grid] has values of train.seed; leave out the flag" in err) == (2, True)
    code, _, err = sret("run", "s.toml", "--set", "model.nll=none")
    assert (code, "s.toml says what to run; leave out nll" in err) == (2, True)
