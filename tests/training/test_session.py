import json

import pytest
import torch

from sret_cli.runtime.device import choose_device
from sret_cli.runtime.errors import SretError
from sret_cli.runtime.progress import Progress
from sret_cli.spec.options import RunOptions
from sret_cli.spec.run import Run
from sret_cli.spec.train import TrainSpec
from sret_cli.training.evaluate import EvaluationOptions, evaluate, evaluate_run
from sret_cli.training.optimizer import draw_recursions
from sret_cli.training.session import train
from sret_cli.weights.store import load_model

SHORT = {"epochs": 2, "warmup_epochs": 0, "batch_size": 240}


def run_of(tiny, **values):
    return Run("test", "tiny", tiny, TrainSpec(**{**SHORT, **values}))


def losses(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "step" in line]


def test_training_writes_its_metrics_config_checkpoint_and_weights(tiny, tmp_path):
    row = train(run_of(tiny), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".lock",
        "checkpoint-10",
        "config.json",
        "metrics.jsonl",
        "model.safetensors",
    ]
    assert len(losses(tmp_path)) == 2 * 5
    assert row["epochs_trained"] == 2
    assert row["test_images"] == 360
    assert row["images_per_second"] > 0
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model"]["embed_dims"] == [8, 16, 32]
    assert evaluate_run(tmp_path)["top1_percent"] == row["top1_percent"]


def test_the_progress_of_a_step_shows_the_epoch_and_the_last_accuracy(tiny, tmp_path):
    texts = []
    train(
        run_of(tiny),
        tmp_path,
        progress=Progress(on_step=lambda done, total, text: texts.append(text)),
    )
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    top1, _ = [line["top1_percent"] for line in lines if "top1_percent" in line]
    assert [text.split(", loss ")[0] for text in texts] == [
        *5 * ["epoch 1/2"],
        *5 * [f"epoch 2/2, top-1 {top1:.2f} %"],
    ]


def test_the_notes_of_a_training_go_to_the_given_function(tiny, folder, capfd):
    for path in (folder / "train" / "cat" / "0.jpg", folder / "test" / "dog" / "7.jpg"):
        path.write_bytes(path.read_bytes()[:300])
    values = {"dataset": "folder", "data_dir": str(folder), "batch_size": 4, "epochs": 1}
    notes, spec = [], tiny.with_values(num_classes=2)
    run = Run("test", "tiny", spec, TrainSpec(**{**SHORT, **values, "on_bad_image": "skip"}))
    row = train(run, folder / "run", progress=Progress(note=notes.append))
    assert row["bad_images"] == 2
    assert [line.rpartition("; ")[2] for line in notes] == 2 * ["it is left out"]
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_the_loss_falls(tiny, tmp_path):
    row = train(run_of(tiny, epochs=6, batch_size=32, lr=5e-3), tmp_path)
    assert losses(tmp_path)[0] > 2.2
    assert row["final_loss"] < 1.6
    assert row["top1_percent"] > 60


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_seed_gives_bitwise_the_same_losses(tiny, tmp_path, precision):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(run_of(tiny, seed=seed, precision=precision, epochs=1), tmp_path / name)
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")
    assert all(loss > 0 for loss in losses(tmp_path / "a"))


@pytest.mark.slow
def test_recomputing_passes_leaves_the_losses_unchanged(tiny, tmp_path):
    for recompute in ("none", "pass"):
        train(run_of(tiny, recompute=recompute, epochs=1), tmp_path / recompute)
    assert losses(tmp_path / "none") == losses(tmp_path / "pass")


@pytest.mark.slow
def test_recursions_are_drawn_at_each_step_from_the_seed_and_the_step(tiny, tmp_path):
    run = run_of(tiny, recursions_range=(1, 4))
    drawn = [draw_recursions(run.train, step) for step in range(100)]
    assert sorted(set(drawn)) == [1, 2, 3, 4]
    assert drawn == [draw_recursions(run.train, step) for step in range(100)]
    assert drawn != [draw_recursions(run.train.with_values(seed=1), step) for step in range(100)]
    for name in ("a", "b"):
        train(run, tmp_path / name)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    with pytest.raises(SretError, match="4 recursions are more than the 2"):
        train(Run("t", "t", tiny.with_values(nll="per_pass"), run.train), tmp_path / "c")


@pytest.mark.slow
def test_the_learning_rate_warms_up_and_falls_as_a_cosine(tiny, tmp_path):
    train(run_of(tiny, epochs=4, warmup_epochs=1, lr=1e-2, min_lr=1e-4), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rates = [line["lr"] for line in lines if "step" in line]
    assert rates[0] == pytest.approx(1e-4)
    assert max(rates) == rates[5] < 1e-2
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[-1] < 1e-3


def test_a_loss_that_is_not_finite_stops_the_run_with_its_step(tiny, tmp_path):
    with pytest.raises(SretError, match=r"diverged: the loss is .* at step \d+ \(epoch") as refused:
        train(run_of(tiny, lr=1e30, clip_grad=0.0), tmp_path)
    assert refused.value.code == 6
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("sched_on_updates", [True, False])
def test_a_divergence_found_by_evaluation_names_the_learning_rate_of_the_step_before(
    tiny, tmp_path, sched_on_updates
):
    values = {"batch_size": 1437, "min_lr": 1e10, "sched_on_updates": sched_on_updates}
    run = run_of(tiny, lr=1e30, clip_grad=0.0, epochs=4, **values)  # rates 1e30, 8.5e29, 5e29 ...
    with pytest.raises(SretError, match=r"test loss is (nan|inf) at step 1 \(epoch 1, lr 1e\+30\)"):
        train(run, tmp_path)
    report = json.loads((tmp_path / "diverged.json").read_text())
    assert (report["lr"], report["steps_done"], report["epoch"]) == (1e30, 1, 1)
    assert "lr 1e+30" in report["error"]


def test_missing_data_are_refused_before_anything_is_written(tiny, tmp_path):
    train_spec = TrainSpec(dataset="folder", data_dir=str(tmp_path / "none"))
    with pytest.raises(SretError):
        train(Run("test", "tiny", tiny, train_spec), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_error_for_an_unknown_optimizer_names_the_nearest_one(tiny, tmp_path):
    with pytest.raises(SretError, match="unknown opt 'adamv'; did you mean 'adam"):
        train(run_of(tiny, opt="adamv"), tmp_path)


def test_accuracy_is_counted_over_every_image(tiny):
    class Constant(torch.nn.Module):
        def forward(self, x):
            return torch.tensor([[0.0, 3, 2, 1, 0.5, -1]]).expand(len(x), -1)

    class Three:
        """Seven images of class 1, two of class 2 and one of class 5, in batches of 4."""

        def __len__(self):
            return 3

        normalize = staticmethod(torch.Tensor.float)

        def epoch(self, epoch):
            targets = torch.tensor([1] * 7 + [2] * 2 + [5])
            return ((torch.zeros(len(t), 1), t) for t in targets.split(4))

    result = evaluate(Constant(), Three(), torch.device("cpu"))
    assert (result.top1_percent, result.top5_percent, result.test_images) == (70.0, 90.0, 10)


def test_two_evaluations_are_bitwise_equal(tiny, tmp_path):
    train(run_of(tiny, epochs=1), tmp_path)
    assert evaluate_run(tmp_path) == evaluate_run(tmp_path)


def test_weights_of_another_model_are_refused(tiny, tmp_path):
    train(run_of(tiny, epochs=1), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model"]["mlp_ratio"] = 2.0
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SretError, match="is of another model: .* tensors differ") as refused:
        load_model(tmp_path)
    assert refused.value.code == 5
    (tmp_path / "model.safetensors").write_bytes(b"PK\x03\x04 a pickle")
    with pytest.raises(SretError, match="damaged or not a safetensors file"):
        load_model(tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_on_cuda_is_repeatable(tiny, tmp_path, precision):
    assert choose_device("auto").type == "cuda"
    for name in ("a", "b"):
        train(run_of(tiny, precision=precision), tmp_path / name, options=RunOptions(device="cuda"))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_images_of_other_classes_than_those_trained_on_are_refused(tiny, tmp_path):
    from PIL import Image

    for data, names in (("pets", ("cat", "dog")), ("farm", ("cow", "dog"))):
        for split in ("train", "test"):
            for name in names:
                (tmp_path / data / split / name).mkdir(parents=True)
                for number in range(2):
                    path = tmp_path / data / split / name / f"{number}.png"
                    Image.new("RGB", (16, 16)).save(path)
    pets = {"dataset": "folder", "data_dir": str(tmp_path / "pets"), "batch_size": 2}
    run = Run("test", "tiny", tiny.with_values(num_classes=2), TrainSpec(**{**SHORT, **pets}))
    train(run, tmp_path / "run", options=RunOptions(workers=0))
    assert (
        evaluate_run(
            tmp_path / "run",
            EvaluationOptions(data_dir=str(tmp_path / "pets")),
            options=RunOptions(workers=0),
        )["test_images"]
        == 4
    )
    expected = "different classes: 'cat' is only in the first, 'cow' is only in the second"
    with pytest.raises(SretError, match=expected) as refused:
        evaluate_run(
            tmp_path / "run",
            EvaluationOptions(data_dir=str(tmp_path / "farm")),
            options=RunOptions(workers=0),
        )
    assert refused.value.code == 4
