import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from sret_cli.runtime import progress
from sret_cli.runtime.files import cannot_write_error
from sret_cli.runtime.lock import locked_directory
from sret_cli.study import execute
from sret_cli.study.file import load_study

# A study that trains in seconds: five passes of a tiny model, two depths.
STUDY = """
[model]
preset = "nano"
embed_dims = [8, 16, 32]
blocks = 1

[train]
epochs = 1
warmup_epochs = 0
batch_size = 240

[grid]
"model.recursions" = [1, 2]
"""
TINY = ("--set", "model.embed_dims=[8, 16, 32]", "--set", "train.warmup_epochs=0")
QUICK = ("--epochs", 1, "--batch-size", 240, *TINY)


@pytest.fixture
def study(tmp_path):
    path = tmp_path / "depth.toml"
    path.write_text(STUDY)
    return path


def test_a_thousand_layers_are_built_and_say_where_slices_were_fitted(sret):
    code, out, err = sret("build", "--layers", 1000, "--slices", 4, "--img-size", 32, "--json")
    built = json.loads(out)
    assert code == 0
    assert built["layers"] == 1000
    assert [stage["recursions"] for stage in built["stages"]] == [100, 100, 100]
    assert built["logits_are_finite"]
    assert "stage 3: its 1 tokens take 1 slice, not 4" in err


def test_a_twin_at_a_parameter_budget_is_built_from_flags(sret):
    code, out, _ = sret(
        *("build", "--preset", "nano", "--params", "1.3M", "--twin", "layers", "--json")
    )
    stages = json.loads(out)["stages"]
    assert code == 0
    assert [stage["embed_dims"] for stage in stages] == [64, 128, 256]
    assert [(stage["blocks"], stage["recursions"]) for stage in stages] == [(2, 1), (4, 1), (2, 1)]


@pytest.mark.slow
def test_a_twin_is_profiled_and_trained_under_its_name(sret):
    code, out, _ = sret("profile", "--preset", "nano", "--macs", "8.1M", "--twin=params", "--json")
    (row,) = json.loads(out)
    assert (code, row["name"], row["model.blocks"]) == (0, "nano twin params", [1, 3, 2])
    code, out, _ = sret("train", "--twin", "layers", *QUICK, "--json")
    (row,) = json.loads(out)
    assert (code, row["name"], row["model.blocks"]) == (0, "nano twin layers", [2, 4, 2])
    assert row["top1_percent"] > 0


def test_build_prints_a_table_of_stages(sret):
    code, out, err = sret("build", "--preset", "sret_t")
    assert (code, err) == (0, "")
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines()]
    assert ["1", "784", "64", "2 x 2", "4", "8", "2", "0.13"] in cells
    assert ["total", "", "", "", "20", "", "", "4.76"] in cells


def test_a_built_model_is_written_and_read_back(sret, tmp_path):
    assert sret("build", "--preset", "nano", "--out", "model")[0] == 0
    assert sorted(os.listdir("model")) == ["config.json", "model.safetensors"]
    code, out, _ = sret("build", "--from", "model", "--json")
    assert (code, json.loads(out)["params"]) == (0, 331_842)
    code, _, err = sret("build", "--preset", "nano", "--out", "model")
    assert (code, err) == (2, "sret: model already holds a model; choose another directory\n")


def test_profile_without_arguments_shows_presets_next_to_published_figures(sret):
    code, out, _ = sret("profile")
    assert code == 0
    (line,) = [line for line in out.splitlines() if "sret_s" in line]
    assert [cell.strip() for cell in line.split("│")[1:7]] == [
        *("sret_s", "20", "20.90", "20.9", "4.191", "4.2"),
    ]
    assert "one multiply-add counts as one" in out


def test_profile_of_one_model_adds_up_by_kind(sret):
    code, out, _ = sret("profile", "--preset", "nano")
    assert code == 0
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines()]
    kinds = {row[0]: tuple(map(float, row[1:])) for row in cells if len(row) == 3}
    assert list(kinds) == [
        *("stem", "projections", "attention products", "mlp", "nll", "norms", "pools", "head")
    ]
    # The total is 8,121,216 multiply-adds; cells have three digits, shares one decimal.
    assert sum(macs for macs, _ in kinds.values()) == pytest.approx(0.008121216, abs=2e-5)
    assert sum(share for _, share in kinds.values()) == pytest.approx(100, abs=0.4)


@pytest.mark.slow
def test_a_study_is_run_reported_and_not_run_again(sret, study):
    code, out, err = sret("run", study)
    assert code == 0
    assert err.splitlines()[-1].endswith("files to runs/depth/report; open report.html there")
    assert {"table.tex", "accuracy.pdf", "report.html"} <= set(os.listdir("runs/depth/report"))
    rows = {path: path.read_bytes() for path in study.parent.glob("runs/depth/*/row.json")}
    assert len(rows) == 2
    for path in rows:
        row = json.loads(rows[path])
        assert row["layers"] in (3, 6)
        assert row["macs"] > 0
        assert row["top1_percent"] > 0
        assert row["error"] is None
        assert row["peak_memory_bytes"] is None
        assert row["torch_version"] == torch.__version__
        assert {p.name for p in path.parent.iterdir()} == {
            *("config.json", "metrics.jsonl", "model.safetensors", "row.json", "checkpoint-5"),
            ".lock",
        }
    code, again, err = sret("run", study)
    assert (code, again) == (0, out)
    assert err.count("already done") == 2
    assert all(path.read_bytes() == rows[path] for path in rows)


@pytest.mark.slow
def test_a_study_that_grew_trains_only_the_missing_runs(sret, study):
    sret("train", study)
    study.write_text(STUDY.replace("[1, 2]", "[1, 2, 3]"))
    code, _, err = sret("train", study)
    assert code == 0
    assert err.count("already done") == 2
    assert len(list(study.parent.glob("runs/depth/*/row.json"))) == 3


@pytest.mark.slow
def test_profiling_a_study_keeps_rows_that_training_completes(sret, study):
    code, out, _ = sret("profile", study, "--json")
    assert code == 0
    profiled = json.loads(out)
    assert [row["top1_percent"] for row in profiled] == [None, None]
    trained = json.loads(sret("train", study, "--json")[1])
    assert [row["run_id"] for row in trained] == [row["run_id"] for row in profiled]
    assert [row["macs"] for row in trained] == [row["macs"] for row in profiled]
    assert all(row["top1_percent"] is not None for row in trained)


@pytest.mark.slow
def test_a_run_is_trained_evaluated_and_reported(sret):
    code, out, _ = sret("train", *QUICK, "--json")
    assert code == 0
    (row,) = json.loads(out)
    code, out, err = sret("eval", "--json")
    assert code == 0
    assert json.loads(out)[0]["top1_percent"] == row["top1_percent"]
    assert f"evaluated runs/train/{row['run_id']}" in err
    assert sret("report")[0] == 0
    assert os.path.exists("runs/report/accuracy.svg")
    assert sret("report", f"runs/train/{row['run_id']}", "--out", "here")[0] == 0
    assert os.path.exists("here/training.png")


@pytest.mark.slow
def test_one_run_is_evaluated_at_other_recursion_counts(sret):
    code, out, _ = sret("train", *QUICK, "--json")
    (run,) = json.loads(out)
    code, out, err = sret("eval", "--recursions", "1,2,4", "--json")
    assert code == 0
    taken = f"took the newest run, runs/train/{run['run_id']} (nano, of {run['started_at']})"
    assert err.splitlines()[0] == taken
    rows = json.loads(out)
    assert [(row["recursions"], row["layers"]) for row in rows] == [(1, 4), (2, 8), (4, 16)]
    assert rows[1]["top1_percent"] == run["top1_percent"]
    assert {row["params"] for row in rows} == {run["params"]}
    assert os.path.exists(f"runs/train/{run['run_id']}/report/recursions.png")
    for wrong in ("0,1", "two", "1;2"):
        assert sret("eval", "--recursions", wrong)[0] == 2
    sret("train", *QUICK, "--nll", "per_pass", "--runs", "other")
    code, _, err = sret("eval", "--runs", "other", "--recursions", "1,4")
    assert code == 3
    assert "4 recursions are more than the 2 that this model has weights for" in err


@pytest.mark.slow
def test_a_failed_run_is_a_row_with_its_error_and_the_others_continue(sret, study):
    study.write_text(STUDY.replace("epochs = 1\n", "epochs = 1\nclip_grad = 1e9\n", 1))
    study.write_text(study.read_text() + '"train.lr" = [1e30, 1e-3]\n')
    code, _, err = sret("train", study)
    assert code == 6
    assert err.splitlines()[-1].startswith("sret: 2 runs failed, the first, ")
    rows = [json.loads(p.read_text()) for p in study.parent.glob("runs/depth/*/row.json")]
    failed = [row for row in rows if row["error"]]
    assert sorted(row["train.lr"] for row in failed) == [1e30, 1e30]
    assert all("diverged" in row["error"] for row in failed)
    assert sorted(row["status"] for row in rows) == ["diverged", "diverged", "done", "done"]
    assert all(row["top1_percent"] is None for row in failed)
    assert len([row for row in rows if row["top1_percent"]]) == 2
    code, out, _ = sret("report", study)
    assert code == 0
    assert "diverged" in out


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_running_out_of_memory_is_a_row_with_its_error_and_exit_7(sret, study, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(execute, "measure_cost", fail)
    code, _, err = sret("train", study)
    assert code == 7
    assert "out of memory" in err
    rows = [json.loads(p.read_text()) for p in study.parent.glob("runs/depth/*/row.json")]
    assert [row["status"] for row in rows] == ["out_of_memory", "out_of_memory"]


@pytest.mark.slow
def test_a_run_in_use_by_another_process_is_waited_for_after_the_others_are_done(sret, study):
    (first, second) = load_study(study).runs
    directories = [run.directory(study.parent / "runs") for run in (first, second)]
    with locked_directory(directories[0]):
        process = start("train", study, cwd=study.parent)
        while not (directories[1] / "row.json").exists():
            assert process.poll() is None
            time.sleep(0.1)
        assert not (directories[0] / "row.json").exists()
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert f"is in use by process {os.getpid()} on " in err
    assert "its row is taken when it ends" in err
    assert (directories[0] / "row.json").exists()


def test_a_full_disk_ends_the_study_and_leaves_no_row(sret, study, monkeypatch):
    def full(*_):
        raise cannot_write_error(study, OSError(28, "No space left on device"), 1_000_000)

    monkeypatch.setattr(execute, "measure_cost", full)
    code, _, err = sret("train", study)
    assert code == 7
    assert "(1,000,000 bytes, and " in err
    assert list(study.parent.glob("runs/depth/*/row.json")) == []


@pytest.mark.slow
def test_more_epochs_make_a_new_run_next_to_the_run_with_fewer(sret):
    code, out, _ = sret("train", *QUICK, "--json")
    (first,) = json.loads(out)
    directory = f"runs/train/{first['run_id']}"
    code, out, _ = sret("train", "--resume", directory, "--epochs", 2, "--json")
    (second,) = json.loads(out)
    assert (code, second["train.epochs"], second["continues"]) == (0, 2, first["run_id"])
    code, out, err = sret("train", "--resume", directory, "--json")
    assert (code, json.loads(out)) == (0, [first])
    code, _, err = sret("train", "--resume", directory, "--seed", 1, "--layers", 8)
    assert (code, err.count("\n")) == (2, 1)
    assert "leave out layers, seed" in err
    assert "give a larger number" not in err
    assert sret("report")[0] == 0


def test_a_run_is_resumed_from_its_own_directory_or_its_study_directory(sret, monkeypatch):
    code, out, _ = sret("train", *QUICK, "--json")
    (first,) = json.loads(out)
    directory = Path("runs", "train", first["run_id"]).absolute()
    for folder, name in ((directory, "."), (directory.parent, directory.name)):
        monkeypatch.chdir(folder)
        code, out, err = sret("train", "--resume", name, "--json")
        assert (code, json.loads(out)) == (0, [first]), err
    assert sorted(directory.parents[2].iterdir()) == [directory.parents[1]]


def test_without_a_terminal_progress_is_printed_as_lines(sret, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_A_LINE", 0)
    code, _, err = sret("train", *QUICK)
    assert code == 0
    line = err.splitlines()[-3]
    assert " nano, 8 layers, seed 0: step 5 of 5, epoch 1/1, loss " in line
    for part in (", lr ", " images/s, ", " GB, "):
        assert part in line
    assert line.endswith(", – left")


@pytest.mark.slow
def test_a_model_that_does_not_fit_the_device_is_a_row_and_the_others_continue(sret, monkeypatch):
    monkeypatch.setattr("sret_cli.cost.timing.free_bytes", lambda device: 10**8)
    Path("sizes.toml").write_text(
        '[model]\npreset = "nano"\n[grid]\n"model.recursions" = [1, 400]\n', encoding="utf-8"
    )
    flags = ("--device", "cpu", "--batch-size", 32, "--json")
    code, out, err = sret("profile", "sizes.toml", *flags)
    assert code == 7
    small, large = json.loads(out)
    assert small["error"] is None
    assert small["step_seconds"] > 0
    assert "out of memory: a training step of 32 images needs" in large["error"]
    assert large["step_seconds"] is None
    code, out, err = sret("profile", "--preset", "nano", "--layers", 40, *flags)
    assert code == 7
    assert "use --batch-size" in json.loads(out)[0]["error"]


def test_our_own_errors_are_not_hidden(sret, monkeypatch):
    def fail(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(execute, "profile_run", fail)
    monkeypatch.setattr(sys, "argv", ["sret", "profile"])
    with pytest.raises(RuntimeError, match="a bug"):
        from sret_cli.commands.app import main

        main()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["build", "--layers", 0], 3, "0 layers: use 10 or more"),
        (["build", "--layers", -20], 3, "-20 layers"),
        (["build", "--layers", 2.5], 2, "Invalid value for '--layers'"),
        (["build", "--layers", 10**9], 3, "more than the 100,000 that sret builds"),
        (["build", "--layers", 11], 3, "use 10 or 12"),
        (["build", "--slices", 3], 3, "3 slices divide no stage"),
        (["build", "--slices", 0], 3, "0 slices"),
        (["build", "--params", "14X"], 3, "'14X' is not a quantity"),
        (["train", "--params", "0"], 3, "'0' is rounded to 0; give 1 or more"),
        (["profile", "--macs=-3G"], 3, "'-3G' is not a quantity"),
        (["build", "--params", "14M"], 3, "embed_dims (124, 248, 496) has 13,776,344 and embed_"),
        (["profile", "--params", "14M", "--macs", "4.2G"], 3, "a width meets one budget"),
        (["train", "--twin", "layer"], 3, "unknown twin 'layer'; did you mean 'layers'"),
        (["build", "--preset", "sret"], 3, "unknown preset 'sret'; did you mean 'sret_"),
        (["build", "--img-size", 0], 3, "img_size = 0"),
        (["build", "--set", "model.residual=rezro"], 3, "residual = 'rezro': input should be"),
        (["build", "--set", "mlp_ratio=4"], 3, "write it as model.FIELD=VALUE"),
        (["build", "--from", "nowhere"], 5, "nowhere has no config.json"),
        (["build", "--from", "x", "--layers", 20], 2, "leave out layers"),
        (["build", "--preset", "nano", "--out", "file/x"], 2, "cannot write file/x"),
        (["build", "none.toml"], 3, "no study file none.toml"),
        (["build", "picture.png"], 3, "picture.png is not a study"),
        (["biuld"], 2, "No such command 'biuld'"),
        (["profile", "--precision", "fp16"], 2, "unknown precision 'fp16'"),
        (["profile", "--device", "tpu"], 2, "unknown device 'tpu'"),
        (["train", "--dataset", "cifar"], 3, "unknown dataset 'cifar'"),
        (["train", "--dataset", "folder"], 3, "--data-dir"),
        (["train", "--dataset", "folder", "--data-dir", "nowhere"], 4, "no folder nowhere"),
        (["train", "--data-dir", "nowhere"], 4, "no folder nowhere"),
        (["train", "--synthetic", "--dataset", "digits"], 2, "--synthetic cannot be combined"),
        (["train", "--on-bad-image", "ask"], 3, "on_bad_image = 'ask'"),
        (["train", "--epochs", 0], 3, "epochs = 0"),
        (["train", "--set", "train.opt=adamv"], 3, "unknown opt 'adamv'; did you mean"),
        (["train", "--runs", "file/x", *QUICK], 2, "cannot write file/x"),
        (["eval"], 4, "no directory runs"),
        (["eval", "nowhere"], 5, "nowhere has no config.json"),
        (["report"], 4, "no directory runs"),
        (["report", "."], 4, "no finished runs in ."),
    ],
)
def test_bad_input_gets_one_line_and_its_exit_code(sret, arguments, code, message):
    open("file", "w").close()
    Image.new("RGB", (8, 8)).save("picture.png")
    ended, out, err = sret(*arguments)
    assert ended == code
    assert out == ""
    assert err.startswith("sret: ")
    assert message in err
    assert err.count("\n") == 1
    assert sorted(os.listdir()) == ["file", "picture.png"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("command", ["train", "profile", "eval", "run"])
def test_missing_cuda_is_refused_before_anything_is_done(sret, command):
    code, out, err = sret(command, "--device", "cuda")
    assert (code, out) == (2, "")
    assert err == "sret: no CUDA device on this machine; use --device cpu\n"
    assert os.listdir() == []


def test_debug_shows_a_traceback(sret):
    code, _, err = sret("build", "--layers", 0, "--debug")
    assert code == 3
    assert "Traceback" in err


def test_version_and_help_are_printed(sret):
    assert sret("--version") == (0, "sret 0.1.0\n", "")
    code, out, _ = sret()
    assert code == 0
    for command in ("build", "profile", "train", "eval", "report", "run"):
        assert command in out


def start(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "sret_cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.mark.slow
def test_a_closed_pipe_ends_quietly(tmp_path):
    process = start("profile", cwd=tmp_path)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(300) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_study_says_what_it_kept_and_resumes(study, number, code):
    study.write_text(STUDY.replace("[1, 2]", "[1, 30]").replace("epochs = 1\n", "epochs = 4\n"))
    process = start("train", study, cwd=study.parent)
    # On a busy machine, lines of progress may come first.
    assert any(line.startswith("[1/2] ") for line in process.stderr)
    deadline = time.monotonic() + 300
    while len(list(study.parent.glob("runs/depth/*/metrics.jsonl"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code
    assert "Traceback" not in err
    assert "stopped: 1 of 2 runs finished (in runs/depth)" in err
    assert "run the same command again to resume" in err
    assert len(list(study.parent.glob("runs/depth/*/row.json"))) == 1

    study.write_text(study.read_text().replace("[1, 30]", "[1, 2]"))
    process = start("train", study, cwd=study.parent)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0
    assert err.count("already done") == 1


@pytest.mark.slow
def test_timm_models_are_measured_next_to_ours(sret):
    code, out, err = sret(
        *("profile", "--preset", "nano", "--img-size", 32, "--batch-size", 2, "--json"),
        *("--against", "vit_tiny_patch16_224, resmlp_12_224", "--device", "cpu"),
    )
    assert (code, err) == (0, "")
    rows = json.loads(out)
    assert [row["name"] for row in rows] == ["nano", "vit_tiny_patch16_224", "resmlp_12_224"]
    assert {row["model.img_size"] for row in rows} == {32}
    assert all(row["forward_seconds"] > 0 and row["peak_memory_bytes"] > 10**6 for row in rows)


def test_a_bare_compile_means_on_and_other_modes_are_refused(sret):
    from sret_cli.commands.app import expand_bare_compile

    assert expand_bare_compile(["train", "--compile"]) == ["train", "--compile", "on"]
    assert expand_bare_compile(["train", "--compile", "auto"]) == ["train", "--compile", "auto"]
    assert expand_bare_compile(["run", "--compile", "a.toml"]) == [
        "run",
        "--compile",
        "on",
        "a.toml",
    ]
    code, _, err = sret("profile", "--preset", "nano", "--device", "cpu", "--compile", "yes")
    assert code == 2
    assert err == ("sret: unknown mode of compilation 'yes'; choose from off, on, auto\n")


def test_a_full_trace_gives_the_same_costs_as_one_pass_of_each_kind(sret):
    found = []
    for trace in ("passes", "full"):
        code, out, _ = sret(
            "profile", "--preset", "nano", "--layers", 40, "--trace", trace, "--json"
        )
        assert code == 0
        (row,) = json.loads(out)
        found.append([row[k] for k in ("layers", "params", "macs", "activations")])
    assert found[0] == found[1]
    code, out, _ = sret("profile", "--preset", "nano", "--trace", "full")
    assert code == 0 and "scaled_dot_product_attention" in out
    assert sret("profile", "--trace", "half")[0] == 2
