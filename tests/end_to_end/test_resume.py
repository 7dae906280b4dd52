import json
import multiprocessing
import multiprocessing.queues
import os
import signal
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from sret_cli.data.prepare import load_data
from sret_cli.runtime import signals as interrupt
from sret_cli.runtime.errors import SretError
from sret_cli.runtime.lock import Busy, locked_directory
from sret_cli.runtime.progress import Progress
from sret_cli.spec.backbone import BackboneSpec
from sret_cli.spec.options import RunOptions
from sret_cli.spec.run import Run
from sret_cli.spec.train import TrainSpec
from sret_cli.study.resolve import continue_run
from sret_cli.training import out_of_memory as room
from sret_cli.training.checkpoint import read_checkpoint
from sret_cli.training.divergence import Diverged
from sret_cli.training.out_of_memory import out_of_memory_error
from sret_cli.training.session import train
from sret_cli.training.trainer import Trainer

# Ten steps in two epochs with every kind of random number: shuffles, drop path, mixup, recursions.
SHORT = {"epochs": 2, "warmup_epochs": 0, "batch_size": 240, "mixup": 0.8, "cutmix": 1.0}
SHORT |= {"model_ema_decay": 0.9, "recursions_range": (1, 3)}
FILES = ("model.safetensors", "ema/model.safetensors", "metrics.jsonl")


def run_of(tiny, **values):
    model = tiny.with_values(drop_path_rate=0.1, drop_rate=0.1)
    return Run("test", "tiny", model, TrainSpec(**{**SHORT, **values}))


def left(directory, row):
    unequal = ("train_seconds", "images_per_second")
    files = [(directory / name).read_bytes() for name in FILES]
    return files, {k: v for k, v in row.items() if k not in unequal}


def signalled(number, step):
    """Sends a signal to this process after a step."""
    return lambda done, total, text: done == step and os.kill(os.getpid(), number)


@pytest.fixture(scope="module")
def uninterrupted(tiny, tmp_path_factory):
    """The results of a run that is not interrupted."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    return left(directory, train(run_of(tiny), directory))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kills", "flags"),
    [
        (12, ()),
        (1, ("--workers", "2", "--seed", "3")),
    ],  # the last one while a checkpoint is written
)
def test_runs_that_are_killed_anywhere_end_with_the_same_results(kills, flags):
    command = [sys.executable, str(Path(__file__).parent / "kill_harness.py")]
    done = subprocess.run([*command, "--kills", str(kills), *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"{kills} kills, ")
    assert done.stdout.splitlines()[-1].endswith(" 0 lost")


@pytest.mark.slow
def test_a_signal_to_all_processes_of_a_run_loses_no_step(tmp_path):
    command = [sys.executable, "-m", "sret_cli", "train", "--epochs", "9", "--workers", "2"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, **streams)
    while not list(tmp_path.glob("runs/train/*/checkpoint-*/manifest.json")):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 143
    messages = [line for line in errors.splitlines() if ": step " not in line]  # without progress
    assert len(messages) == 1 and messages[0].startswith("stopped: 0 of 1 runs finished")
    (metrics,) = tmp_path.glob("runs/train/*/metrics.jsonl")
    steps = [json.loads(line)["step"] for line in metrics.open() if "step" in json.loads(line)]
    assert read_checkpoint(metrics.parent / f"checkpoint-{steps[-1]}")["progress"]["step"] == len(
        steps
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "step", "code"),
    [
        (signal.SIGTERM, 3, 143),
        (signal.SIGUSR1, 5, 75),  # between the last step of an epoch and its evaluation
        (signal.SIGUSR2, 10, 75),
    ],
)
def test_a_signal_saves_the_state_and_the_run_ends_with_the_same_results(
    tiny, tmp_path, uninterrupted, number, step, code
):
    handler = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended:
        train(run_of(tiny), tmp_path, progress=Progress(on_step=signalled(number, step)))
    assert ended.value.code == code
    assert signal.getsignal(number) is handler
    assert (tmp_path / f"checkpoint-{step}" / "manifest.json").exists()
    assert not (tmp_path / "model.safetensors").exists()
    steps = []
    row = train(
        run_of(tiny), tmp_path, progress=Progress(on_step=lambda done, *_: steps.append(done))
    )
    assert steps == list(range(step + 1, 11))
    assert left(tmp_path, row) == uninterrupted


@pytest.mark.slow
def test_a_step_that_takes_too_long_is_stopped_and_repeated(
    tiny, tmp_path, uninterrupted, monkeypatch
):
    monkeypatch.setattr(interrupt, "PATIENCE", 0.01)
    loss = Trainer.loss

    def endless(trainer, x, target):
        found = loss(trainer, x, target)  # BatchNorm has seen the images
        if trainer.progress.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        return found

    monkeypatch.setattr(Trainer, "loss", endless)
    with pytest.raises(SystemExit):
        train(run_of(tiny), tmp_path)
    assert (tmp_path / "checkpoint-6" / "manifest.json").exists()
    monkeypatch.setattr(Trainer, "loss", loss)
    assert left(tmp_path, train(run_of(tiny), tmp_path)) == uninterrupted


@pytest.mark.slow
def test_a_killed_process_of_the_loader_ends_the_run_with_its_state_saved(
    tiny, tmp_path, uninterrupted
):
    def kill(done, total, text):
        if done == 3:
            for process in multiprocessing.active_children():
                process.kill()

    with pytest.raises(SretError, match="loads images was killed .* fewer --workers") as refused:
        train(
            run_of(tiny), tmp_path, options=RunOptions(workers=2), progress=Progress(on_step=kill)
        )
    assert (refused.value.code, refused.value.status) == (7, "loader_lost")
    (checkpoint,) = tmp_path.glob("checkpoint-*/manifest.json")
    assert checkpoint.parent.name in ("checkpoint-3", "checkpoint-4", "checkpoint-5")
    assert left(tmp_path, train(run_of(tiny), tmp_path)) == uninterrupted


@pytest.mark.slow
@pytest.mark.parametrize(
    "error", [ConnectionResetError(104, "reset"), BrokenPipeError(32, "broken"), EOFError()]
)
def test_a_broken_pipe_of_a_loader_process_is_reported_as_its_end(
    tiny, tmp_path, uninterrupted, monkeypatch, error
):
    plain, calls = multiprocessing.queues.Queue.get, []

    def broken(queue, *arguments, **options):
        if multiprocessing.parent_process() is None:
            calls.append(queue)
            if len(calls) == 4:
                raise error
        return plain(queue, *arguments, **options)

    monkeypatch.setattr(multiprocessing.queues.Queue, "get", broken)
    with pytest.raises(SretError, match="loads images was killed .* fewer --workers") as refused:
        train(run_of(tiny), tmp_path, options=RunOptions(workers=2))
    assert (refused.value.code, refused.value.status) == (7, "loader_lost")
    monkeypatch.undo()
    assert left(tmp_path, train(run_of(tiny), tmp_path)) == uninterrupted


@pytest.mark.slow
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DataLoader worker (pid(s) 42) exited unexpectedly"),
        ConnectionResetError(104, "Connection reset by peer"),
    ],
)
def test_a_killed_process_of_the_test_loader_ends_the_run_with_its_state_saved(
    tiny, tmp_path, uninterrupted, monkeypatch, error
):
    plain = DataLoader.__iter__

    def lost(loader):
        if loader.batch_sampler.plan.seed is not None:
            return plain(loader)
        loader.num_workers = 2
        raise error

    monkeypatch.setattr(DataLoader, "__iter__", lost)
    with pytest.raises(SretError, match="fewer --workers"):
        train(run_of(tiny), tmp_path)
    assert (tmp_path / "checkpoint-5" / "manifest.json").exists()
    monkeypatch.undo()
    assert left(tmp_path, train(run_of(tiny), tmp_path)) == uninterrupted


@pytest.mark.slow
def test_ctrl_c_saves_the_state(tiny, tmp_path, uninterrupted):
    with pytest.raises(KeyboardInterrupt):
        train(run_of(tiny), tmp_path, progress=Progress(on_step=signalled(signal.SIGINT, 7)))
    assert left(tmp_path, train(run_of(tiny), tmp_path)) == uninterrupted


@pytest.mark.slow
def test_a_finished_run_that_is_started_again_returns_the_same(tiny, tmp_path, uninterrupted):
    train(run_of(tiny), tmp_path)
    steps = []
    row = train(
        run_of(tiny), tmp_path, progress=Progress(on_step=lambda done, *_: steps.append(done))
    )
    assert steps == []
    assert left(tmp_path, row) == uninterrupted


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_gives_the_same_results(
    tiny, tmp_path, uninterrupted
):
    with pytest.raises(SystemExit):
        train(run_of(tiny), tmp_path, progress=Progress(on_step=signalled(signal.SIGTERM, 7)))
    file = tmp_path / "checkpoint-7" / "tensors.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    notes = []
    assert (
        left(tmp_path, train(run_of(tiny), tmp_path, progress=Progress(note=notes.append)))
        == uninterrupted
    )
    (line,) = notes
    assert "checkpoint-7 is damaged" in line
    assert "resuming from" in line and line.endswith("checkpoint-5")


@pytest.mark.slow
def test_lines_of_metrics_after_the_checkpoint_are_cut_off_and_missing_ones_refused(
    tiny, tmp_path, uninterrupted
):
    with pytest.raises(SystemExit):
        train(run_of(tiny), tmp_path, progress=Progress(on_step=signalled(signal.SIGTERM, 3)))
    file = tmp_path / "metrics.jsonl"
    lines = file.read_bytes()
    file.write_bytes(lines[:-5])
    with pytest.raises(SretError, match=r"metrics.jsonl has \d+ bytes, and the checkpoint counts"):
        train(run_of(tiny), tmp_path)
    file.write_bytes(lines + b'{"step": 4, "lo')
    assert left(tmp_path, train(run_of(tiny), tmp_path)) == uninterrupted


@pytest.mark.slow
def test_checkpoints_are_written_every_n_steps_or_minutes(tiny, tmp_path):
    def kept(**saving):
        directory, stop = tmp_path / str(saving), signalled(signal.SIGTERM, 9)
        with pytest.raises(SystemExit):
            train(
                run_of(tiny),
                directory,
                options=RunOptions(**saving),
                progress=Progress(on_step=stop),
            )
        return sorted(path.name for path in directory.glob("checkpoint-*"))

    assert kept(checkpoint_minutes=0) == ["checkpoint-5", "checkpoint-9"]
    assert kept(checkpoint_every_steps=4) == ["checkpoint-8", "checkpoint-9"]
    assert kept(checkpoint_minutes=1e-9) == ["checkpoint-8", "checkpoint-9"]


@pytest.mark.slow
def test_a_finished_run_keeps_one_checkpoint_without_a_copy_of_the_weights(tiny, tmp_path):
    train(run_of(tiny, recursions_range=None), tmp_path)
    (path,) = tmp_path.glob("checkpoint-*")
    assert path.name == "checkpoint-10"
    stored = load_file(path / "tensors.safetensors")
    assert {name.partition("/")[0] for name in stored} == {"optimizer", "random"}
    state = read_checkpoint(path)
    for part, file in (("model", "model.safetensors"), ("ema", "ema/model.safetensors")):
        weights = load_file(tmp_path / file)
        assert state[part].keys() == weights.keys()
        assert all(torch.equal(state[part][key], weights[key]) for key in weights)
    averaged = tmp_path / "ema" / "model.safetensors"
    averaged.write_bytes(averaged.read_bytes()[:-1] + b"?")
    with pytest.raises(SretError, match=r"damaged \(../ema/model.safetensors is not what was"):
        read_checkpoint(path)


@pytest.mark.slow
def test_a_run_stopped_in_its_last_evaluation_ends_with_one_checkpoint(
    tiny, tmp_path, uninterrupted
):
    with pytest.raises(SystemExit):
        train(run_of(tiny), tmp_path, progress=Progress(on_step=signalled(signal.SIGUSR2, 10)))
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2
    assert left(tmp_path, train(run_of(tiny), tmp_path)) == uninterrupted
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-10"]


@pytest.mark.slow
def test_another_config_in_the_directory_is_refused_with_the_keys_that_differ(tiny, tmp_path):
    train(run_of(tiny, epochs=1), tmp_path)
    with pytest.raises(SretError, match=r"train.lr \(0.002, not 0.001\), train.seed") as refused:
        train(run_of(tiny, epochs=1, lr=1e-3, seed=1), tmp_path)
    assert refused.value.code == 5
    with pytest.raises(SretError, match=r"another run: train.epochs \(1, not 2\) differ"):
        train(run_of(tiny, epochs=2), tmp_path)


@pytest.mark.slow
def test_more_epochs_continue_in_a_new_run_with_the_schedule_of_all_epochs(tiny, tmp_path):
    first = run_of(tiny, recursions_range=None)
    directory = first.directory(tmp_path)
    before = left(directory, train(first, directory))
    longer = continue_run(directory, 3)
    assert (longer.train.epochs, longer.continues) == (3, first.run_id)
    assert longer.run_id != run_of(tiny, recursions_range=None, epochs=3).run_id
    row = train(longer, longer.directory(tmp_path))
    assert row["epochs_trained"] == 3
    assert left(directory, train(first, directory)) == before
    lines = [
        (d / "metrics.jsonl").read_text().splitlines()
        for d in (directory, longer.directory(tmp_path))
    ]
    assert len(lines[0]) == 12 and len(lines[1]) == 18
    assert lines[1][:12] == lines[0]
    rates = [json.loads(line)["lr"] for line in lines[1] if "lr" in line]
    assert rates[9] < rates[10] < rates[5]  # the cosine of 15 steps is higher at step 11
    with pytest.raises(SretError, match="has 2 epochs; give a larger number"):
        continue_run(directory, 1)
    assert continue_run(directory, None) == first


@pytest.mark.slow
def test_more_epochs_need_the_metrics_of_the_epochs_before(tiny, tmp_path):
    first = run_of(tiny, epochs=1)
    directory = first.directory(tmp_path)
    train(first, directory)
    longer = continue_run(directory, 2)
    file = directory / "metrics.jsonl"
    lines = file.read_bytes()
    for change in (lambda: file.write_bytes(lines[:-5]), file.unlink):
        change()
        with pytest.raises(SretError, match=r"metrics.jsonl has \d+ bytes, and the") as refused:
            train(longer, longer.directory(tmp_path))
        assert refused.value.code == 5


def test_a_second_process_is_refused_by_an_error_that_names_the_first_one(tiny, tmp_path):
    code = (
        "import sys; from pathlib import Path\n"
        "from sret_cli.runtime.lock import locked_directory\n"
        "with locked_directory(Path(sys.argv[1])):\n"
        "    print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"locked\n"
    with pytest.raises(Busy, match=rf"in use by process {holder.pid} on .* since 2") as refused:
        train(run_of(tiny), tmp_path)
    assert refused.value.code == 2
    holder.kill()
    holder.communicate()
    with locked_directory(tmp_path), locked_directory(tmp_path):
        assert json.loads((tmp_path / ".lock.json").read_text())["pid"] == os.getpid()


def trainer_of(tiny, **values):
    run = run_of(tiny, **values)
    loader, _ = load_data(run.train, run.model)
    trainer = Trainer(run, loader, torch.device("cpu"))
    return trainer, next(iter(loader.epoch(0)))


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_not_taken(tiny, bad):
    trainer, batch = trainer_of(tiny)
    trainer.step(*batch)
    before = {k: v.clone() for k, v in trainer.module.state_dict().items()}
    averaged = {k: v.clone() for k, v in trainer.ema.module.state_dict().items()}
    if bad == "loss":
        loss = trainer.loss
        trainer.loss = lambda x, target: loss(x, target) * float("nan")
    else:
        trainer.module.head.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(Diverged, match=f"{bad} is (nan|inf) at step 2 .epoch 1"):
        trainer.step(*batch)
    assert all(torch.equal(v, before[k]) for k, v in trainer.module.state_dict().items())
    assert all(torch.equal(v, averaged[k]) for k, v in trainer.ema.module.state_dict().items())
    assert trainer.progress.step == 1


def test_a_run_that_diverges_leaves_its_state_and_the_images_of_the_step(tiny, tmp_path):
    with pytest.raises(SretError, match="diverged: the loss is .* at step 2 "):
        train(run_of(tiny, lr=1e30, clip_grad=0.0), tmp_path)
    report = json.loads((tmp_path / "diverged.json").read_text())
    assert (report["steps_done"], report["epoch"]) == (1, 1)
    assert report["lr"] == pytest.approx(9.755e29, rel=1e-3)  # of the cosine, after one of 10 steps
    assert len(set(report["batch_indices"])) == 240
    assert read_checkpoint(tmp_path / "checkpoint-1")["progress"]["batch"] == 1
    with pytest.raises(SretError, match="diverged: the loss is .* at step 2 "):
        train(run_of(tiny, lr=1e30, clip_grad=0.0), tmp_path)


def test_the_out_of_memory_error_gives_the_memory_in_use_and_advice(tiny, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(Trainer, "loss", full)
    with pytest.raises(
        SretError, match=r"step 1 with 240 images at a time: .* GB in use"
    ) as refused:
        train(run_of(tiny), tmp_path)
    assert (refused.value.code, refused.value.status) == (7, "out_of_memory")
    assert "use train.accumulation = 2, or a smaller batch_size" in str(refused.value)


def test_the_advice_after_out_of_memory_is_an_accumulation_that_fits(tiny, monkeypatch):
    run = run_of(tiny)
    trainer = Trainer(run, load_data(run.train, run.model)[0], torch.device("cpu"))
    for fits, accumulation in ((50, 5), (48, 5), (47, 6), (1, 240), (500, 2), (0, 2)):
        monkeypatch.setattr(room, "largest_batch", Mock(return_value=fits))
        message = str(out_of_memory_error(MemoryError(), trainer))
        assert f"use train.accumulation = {accumulation}, or a smaller batch_size" in message
    timm = Trainer(run, trainer.loader, torch.device("cpu"))
    timm.run = replace(run, model=BackboneSpec(backbone="vit_tiny_patch16_224"))
    assert "use train.accumulation = 2, or" in str(out_of_memory_error(MemoryError(), timm))


class BrokenWriter:
    """A TensorBoard writer whose disk fails."""

    def __init__(self, directory, purge_step):
        self.directory = directory

    def add_scalar(self, name, value, step):
        raise OSError("the disk is gone")


@pytest.mark.slow
@pytest.mark.parametrize("module", [None, types.SimpleNamespace(SummaryWriter=BrokenWriter)])
def test_tensorboard_is_turned_off_when_it_fails_and_the_run_continues(
    tiny, tmp_path, uninterrupted, monkeypatch, module
):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    notes = []
    row = train(
        run_of(tiny),
        tmp_path,
        options=RunOptions(tensorboard=True),
        progress=Progress(note=notes.append),
    )
    assert left(tmp_path, row) == uninterrupted
    assert sum(line.startswith("TensorBoard is off: ") for line in notes) == 1


@pytest.mark.slow
def test_tensorboard_gets_the_numbers_of_the_lines(tiny, tmp_path, monkeypatch):
    written = []

    class Recorder(BrokenWriter):
        def add_scalar(self, name, value, step):
            written.append((name, step))

        def close(self):
            written.append("closed")

    module = types.SimpleNamespace(SummaryWriter=Recorder)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    train(run_of(tiny), tmp_path, options=RunOptions(tensorboard=True))
    assert written[:2] == [("loss", 1), ("lr", 1)]
    assert ("top1_percent", 10) in written
    assert written[-1] == "closed"
