import math

import pytest
import timm
import torch
from safetensors.torch import save_file

from sret_cli.data.prepare import load_data
from sret_cli.model.sret import build_model
from sret_cli.runtime.errors import SretError
from sret_cli.spec.run import Run
from sret_cli.spec.train import TrainSpec
from sret_cli.training.distill import create_distillation
from sret_cli.training.evaluate import evaluate
from sret_cli.training.session import train
from sret_cli.training.teacher import Teacher
from sret_cli.training.trainer import Trainer
from sret_cli.weights.store import load_model, save_model

SHORT = {"epochs": 2, "warmup_epochs": 0, "batch_size": 240}
LONG = {"epochs": 6, "batch_size": 32, "lr": 5e-3}
CPU = torch.device("cpu")


def run_of(tiny, **values):
    return Run("test", "tiny", tiny, TrainSpec(**{**SHORT, **values}))


def trainer_of(run):
    return Trainer(run, load_data(run.train, run.model)[0], CPU)


@pytest.fixture(scope="module")
def teacher(tiny, tmp_path_factory):
    """The directory of a briefly trained model."""
    directory = tmp_path_factory.mktemp("teacher")
    train(run_of(tiny, epochs=1), directory)
    return directory


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A file of weights of timm's `test_resnet` for ten classes."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint") / "resnet.safetensors"
    save_file(timm.create_model("test_resnet", num_classes=10).state_dict(), path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_loss_is_the_cross_entropy_of_both_logits_at_the_temperature(
    tiny, teacher, temperature
):
    spec = TrainSpec(teacher=str(teacher), distill_temperature=temperature)
    distillation = create_distillation(spec, tiny, CPU)
    distillation.teacher = lambda x: torch.tensor([[0.0, 0.0]])  # probabilities 1/2, 1/2
    output = torch.tensor([[0.0, temperature * math.log(3)]])  # probabilities 1/4, 3/4
    for target in (0, 1):
        loss = distillation.loss(output, torch.zeros(1), torch.tensor([target]))
        assert loss.item() == pytest.approx(0.836988)  # -(ln 1/4 + ln 3/4) / 2


def test_the_classes_and_their_smoothing_do_not_change_the_loss(tiny, teacher):
    x, target = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    losses = []
    for smoothing, wanted in ((0.1, target), (0.0, target.flip(0))):
        trainer = trainer_of(run_of(tiny, teacher=str(teacher), smoothing=smoothing))
        trainer.module.eval()
        losses.append(trainer.loss(x, wanted).item())
    assert losses[0] == losses[1]


def test_the_teacher_is_frozen_in_eval_and_in_no_checkpoint(tiny, teacher):
    trainer = trainer_of(run_of(tiny, teacher=str(teacher), mixup=0.8))
    before = load_model(teacher).state_dict()
    trainer.module.train()
    for images, target in [next(iter(trainer.loader.epoch(0)))] * 2:
        trainer.step(images, target)
    model = trainer.distillation.teacher.model
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    assert trainer.state().keys() == trainer_of(run_of(tiny)).state().keys()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_distillation_is_repeatable(tiny, teacher, tmp_path, precision):
    run = run_of(tiny, teacher=str(teacher), precision=precision, mixup=0.2, epochs=1)
    for name in ("a", "b"):
        train(run, tmp_path / name)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_a_student_learns_the_classes_from_its_teacher_alone(tiny, tmp_path):
    train(run_of(tiny, **LONG), tmp_path)
    trainer = trainer_of(run_of(tiny, teacher=str(tmp_path), **LONG))
    for epoch in range(6):
        for images, target in trainer.loader.epoch(epoch):
            trainer.step(images, torch.zeros_like(target))  # every target is class 0
    assert evaluate(trainer.module, load_data(trainer.spec, tiny)[1], CPU).top1_percent > 50


def test_a_timm_teacher_gets_images_with_its_own_mean_and_size(tiny, checkpoint):
    spec = TrainSpec(dataset="synthetic", teacher="test_resnet", teacher_checkpoint=str(checkpoint))
    teacher = Teacher(spec, tiny, CPU)
    seen = []
    teacher.model.register_forward_pre_hook(lambda model, arguments: seen.append(arguments[0]))
    loader, _ = load_data(spec, tiny)
    white = loader.normalize(torch.full((2, 3, 16, 16), 255, dtype=torch.uint8))
    assert teacher(white).shape == (2, 10)
    assert seen[0].shape == (2, 3, 160, 160)
    assert seen[0].max().item() == pytest.approx(1.0, abs=1e-5)  # mean and deviation are 0.5
    smaller = Teacher(spec.with_values(teacher_img_size=16), tiny, CPU)
    smaller.model.register_forward_pre_hook(lambda model, arguments: seen.append(arguments[0]))
    smaller(white)
    assert seen[1].shape == (2, 3, 16, 16)


def test_a_teacher_that_was_trained_here_gets_the_pixels_of_its_own_data(tiny, teacher):
    spec = TrainSpec(dataset="synthetic", teacher=str(teacher))
    ours = load_data(spec, tiny)[0].normalize(torch.full((1, 3, 16, 16), 100, dtype=torch.uint8))
    seen = []
    distilled = Teacher(spec, tiny, CPU)
    distilled.model.register_forward_pre_hook(lambda model, arguments: seen.append(arguments[0]))
    distilled(ours)
    assert seen[0].mean().item() == pytest.approx((100 / 255 - 0.305) / 0.376, abs=1e-5)


def test_a_converted_model_can_teach(tiny, tmp_path):
    torch.manual_seed(0)
    save_model(build_model(tiny), tmp_path / "model")
    x = torch.zeros(2, 3, 16, 16)
    spec = TrainSpec(teacher=str(tmp_path / "model"))
    assert Teacher(spec, tiny, CPU)(x).shape == (2, 10)


def test_a_teacher_of_other_classes_or_channels_is_refused(tiny, teacher, checkpoint):
    with pytest.raises(SretError, match="has 10 classes and 3 channels, but the model has 7 and 3"):
        Teacher(TrainSpec(teacher=str(teacher)), tiny.with_values(num_classes=7), CPU)
    spec = TrainSpec(teacher="test_resnet", teacher_checkpoint=str(checkpoint))
    with pytest.raises(
        SretError, match="has 10 classes and 3 channels, but the model has 10 and 1"
    ):
        Teacher(spec, tiny.with_values(in_chans=1), CPU)
    with pytest.raises(
        SretError, match="has 1,000 classes and 3 channels, but the model has 10 and 3"
    ):
        Teacher(TrainSpec(teacher="test_resnet"), tiny, CPU)


def test_the_error_for_a_missing_teacher_names_it(tiny, checkpoint, teacher, tmp_path):
    with pytest.raises(SretError, match="no directory runs/x, and timm .* has no model 'runs/x'"):
        Teacher(TrainSpec(teacher="runs/x/"), tiny, CPU)
    with pytest.raises(SretError, match="timm has no weights for the teacher coatnet_0_224"):
        Teacher(TrainSpec(teacher="coatnet_0_224"), tiny, CPU)
    values = {"teacher": "test_vit", "teacher_checkpoint": str(checkpoint)}
    with pytest.raises(SretError, match="is of another model") as refused:
        Teacher(TrainSpec(**values), tiny, CPU)
    assert refused.value.code == 5
    with pytest.raises(SretError, match="is a directory of a model; leave"):
        Teacher(TrainSpec(teacher=str(teacher), teacher_checkpoint="x.pth"), tiny, CPU)


def test_weights_that_cannot_be_downloaded_give_an_error_of_one_line(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SretError, match="cannot be downloaded .*give a file") as refused:
        Teacher(TrainSpec(teacher="test_vit"), tiny.with_values(num_classes=1000), CPU)
    assert refused.value.code == 5
    assert "\n" not in str(refused.value)


def test_settings_that_exclude_each_other_are_refused_with_the_reason():
    with pytest.raises(SretError, match="leave one of the two out"):
        TrainSpec(teacher="a", soft_labels="b")
    with pytest.raises(SretError, match="teacher_checkpoint = 'a.pth' needs a teacher"):
        TrainSpec(teacher_checkpoint="a.pth")
    with pytest.raises(SretError, match="distill_temperature = 2 needs a teacher or soft_labels"):
        TrainSpec(distill_temperature=2.0)
