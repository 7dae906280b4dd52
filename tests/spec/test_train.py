import copy
import json

import pytest
import torch

from sret_cli.data.loader import Loader
from sret_cli.data.prepare import load_data
from sret_cli.model.kinds import build_any
from sret_cli.runtime.errors import SretError, show_note_once
from sret_cli.spec.backbone import BackboneSpec
from sret_cli.spec.run import Run
from sret_cli.spec.train import TrainSpec
from sret_cli.study.resolve import resolve_run
from sret_cli.training.evaluate import EvaluationOptions, evaluate_run
from sret_cli.training.optimizer import create_ema, create_optimizer, create_schedule, set_rate
from sret_cli.training.session import train
from sret_cli.training.trainer import Trainer
from sret_cli.weights.store import save_model

VIT = BackboneSpec(backbone="vit_tiny_patch16_224", img_size=16, num_classes=10)


def test_the_recipe_of_the_paper_is_filled_in():
    spec = TrainSpec(recipe="sret").model_dump()
    expected = {
        "epochs": 300,
        "batch_size": 1024,
        "opt": "adamw",
        "lr": 0.002,  # 0.001 for 512 images
        "weight_decay": 0.05,
        "sched": "cosine",
        "sched_on_updates": False,
        "min_lr": 1e-5,
        "warmup_lr": 1e-6,
        "warmup_epochs": 30,
        "smoothing": 0.1,
        "clip_grad": 0.0,
        "mixup": 0.8,
        "cutmix": 1.0,
        "model_ema_decay": 0.99996,
        "auto_augment": "rand-m9-mstd0.5-inc1",
        "reprob": 0.25,
        "aug_repeats": 3,
    }
    assert {key: spec[key] for key in expected} == expected


def test_recipes_differ_where_their_sources_differ():
    deit = TrainSpec(recipe="deit", batch_size=512)
    assert (deit.lr, deit.warmup_epochs, deit.min_lr) == (5e-4, 5, 1e-5)
    tune = TrainSpec(recipe="finetune")
    assert (tune.lr, tune.min_lr, tune.warmup_lr) == (5e-6, 5e-6, 1e-6)
    assert (tune.weight_decay, tune.epochs) == (1e-8, 30)
    assert (tune.warmup_epochs, tune.batch_size) == (5, 512)
    small = TrainSpec(recipe="small", epochs=3)
    assert (small.lr, small.batch_size, small.mixup) == (1e-3, 128, 0.2)
    assert (small.sched_on_updates, small.warmup_lr) == (True, None)


@pytest.mark.parametrize(
    ("model", "recipe", "rate", "ramp"),
    [
        ({"preset": "sret_t"}, "sret", 0.1, "per_block"),
        ({"preset": "sret_lt_16_14"}, "sret", 0.1, "per_block"),
        ({"preset": "sret_s"}, "sret", 0.2, "per_block"),
        ({"preset": "sret_s_384"}, "sret", 0.2, "per_block"),
        ({"preset": "sret_s"}, "deit", 0.1, "per_pass"),
        ({"preset": "sret_s"}, "finetune", 0.0, "per_pass"),
        ({"preset": "nano"}, "small", 0.05, "per_pass"),
        ({"preset": "sret_s"}, "none", 0.0, "per_pass"),
        ({"preset": "sret_s", "drop_path_ramp": "per_pass"}, "sret", 0.2, "per_pass"),
    ],
)
def test_drop_path_follows_from_the_recipe_and_the_model(model, recipe, rate, ramp):
    found = resolve_run("t", model, {"recipe": recipe, "dataset": "synthetic"}).model
    assert (found.drop_path_rate, found.drop_path_ramp) == (rate, ramp)


def test_a_backbone_takes_the_rate_of_drop_path_and_timms_ramp():
    found = resolve_run("t", {"backbone": "deit_tiny_patch16_224"}, {"recipe": "sret"}).model
    assert found.drop_path_rate == 0.1


def test_rates_that_a_recipe_fills_in_are_never_above_the_learning_rate():
    spec = TrainSpec(recipe="deit", lr=5e-7)
    assert (spec.min_lr, spec.warmup_lr) == (5e-7, 5e-7)
    spec = TrainSpec(recipe="finetune", batch_size=8)
    assert spec.lr == spec.min_lr == spec.warmup_lr == 5e-6 * 8 / 512


def test_a_value_given_overrides_the_recipe():
    spec = TrainSpec(recipe="sret", batch_size=256, mixup=0.0, epochs=100)
    assert (spec.lr, spec.mixup, spec.cutmix, spec.epochs) == (5e-4, 0.0, 1.0, 100)
    assert TrainSpec(recipe="deit", lr=1.0, batch_size=8).lr == 1.0
    assert TrainSpec(recipe="deit", batch_size=8).min_lr == 5e-4 * 8 / 512
    run = resolve_run("t", {"drop_path_rate": 0.3}, {"recipe": "sret"})
    assert run.model.drop_path_rate == 0.3
    assert spec.with_values(seed=1).lr == 5e-4


def test_no_recipe_changes_nothing():
    assert TrainSpec(recipe="none") == TrainSpec()
    assert resolve_run("t", {}, {}).model.drop_path_rate == 0.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"recipe": "deti"}, "unknown recipe 'deti'; did you mean 'deit'"),
        ({"epochs": 20, "warmup_epochs": 30}, "30 warm-up epochs leave nothing of 20 epochs"),
        ({"epochs": 1, "warmup_epochs": 1}, "1 warm-up epochs leave nothing of 1 epochs"),
        ({"lr": 1e-6, "min_lr": 1e-5}, "min_lr = 1e-05 is above lr = 1e-06"),
        ({"accumulation": 7}, "64 is not accumulation = 7 equal parts; use 70"),
        ({"mixup": 0.1, "batch_size": 9}, "9 is odd, and mixup mixes pairs of images; use 10"),
        ({"sched": "cosin"}, "sched = 'cosin'"),
        ({"layer_decay": 0.0}, "layer_decay = 0.0"),
        ({"warmup_lr": 0.1}, "warmup_lr = 0.1, where warm-up starts, is above lr = 0.002"),
        ({"model_ema_warmup": True}, "needs averaged weights; set model_ema_decay"),
    ],
)
def test_values_that_do_not_fit_together_are_refused(values, message):
    with pytest.raises(SretError, match=message):
        TrainSpec(**values)


@pytest.mark.parametrize(
    ("sched", "halfway", "last"),
    [
        ("cosine", 5.05e-4, 1e-3 * (0.01 + 0.99 * 0.0244717)),
        ("step", 1e-4, 1e-4),
        ("multistep", 1e-4, 1e-5),
        ("constant", 1e-3, 1e-3),
    ],
)
def test_schedules_have_timms_names(sched, halfway, last):
    spec = TrainSpec(
        sched=sched,
        epochs=10,
        warmup_epochs=0,
        lr=1e-3,
        min_lr=1e-5,
        decay_epochs=5,
        decay_milestones=[4, 8],
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    schedule, rates = create_schedule(optimizer, spec, 1), []
    for step in range(10):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(1e-3)
    assert rates[5] == pytest.approx(halfway)
    assert rates[9] == pytest.approx(last, rel=1e-4)


def rates_of(spec, steps_per_epoch):
    """The learning rate of every step of a training."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=spec.lr)
    schedule, rates = create_schedule(optimizer, spec, steps_per_epoch), []
    for step in range(spec.epochs * steps_per_epoch):
        set_rate(schedule, step, steps_per_epoch)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def test_the_published_schedule_has_one_rate_for_all_steps_of_an_epoch():
    rates = rates_of(TrainSpec(recipe="deit"), 2)
    assert rates[0::2] == rates[1::2]
    # 1e-6 and a fifth of the way to 0.001; half of the cosine, and its last epoch.
    assert rates[:10:2] == pytest.approx([1e-6, 2.008e-4, 4.006e-4, 6.004e-4, 8.002e-4])
    assert rates[300] == pytest.approx(1e-5 + 0.5 * (1e-3 - 1e-5))
    assert rates[-1] == pytest.approx(1e-5 + 9.9e-4 * 2.7415e-5, rel=1e-6)


def test_warm_up_starts_at_warmup_lr_or_a_hundredth_of_lr():
    values = {"epochs": 4, "warmup_epochs": 2, "lr": 1e-3}
    assert rates_of(TrainSpec(**values), 2)[:4] == pytest.approx(
        [1e-5, 2.575e-4, 5.05e-4, 7.525e-4]
    )
    found = rates_of(TrainSpec(**values, warmup_lr=2e-4), 2)
    assert found[:4] == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4])


def test_layers_nearer_to_the_input_learn_more_slowly(tiny):
    model = build_any(tiny.with_values(nll="per_pass", nll_ratio=1.0))
    optimizer = create_optimizer(model, TrainSpec(layer_decay=0.5))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    scales = {
        names[id(parameter)]: group["lr_scale"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert len(scales) == len(names)
    assert scales["head.weight"] == 1.0
    assert scales["stages.2.blocks.0.attn.qkv.weight"] == scales["pools.1.conv.weight"] == 0.5
    assert scales["stages.1.blocks.1.attn.qkv.weight"] == 0.25
    assert scales["stages.1.nlls.2.mlp.fc1.weight"] == scales["stages.1.nlls.3.norm.bias"] == 0.25
    assert scales["stages.1.blocks.0.attn.qkv.weight"] == 0.125
    assert scales["stages.0.blocks.0.attn.qkv.weight"] == 0.0625
    assert scales["stem.conv1.weight"] == scales["pos_embed"] == 0.03125


@pytest.fixture
def double(monkeypatch):
    """Weights, images and all else in double precision, so that only what is wrong shows."""
    plain = Loader.normalize
    monkeypatch.setattr(Loader, "normalize", lambda self, x: plain(self, x).double())
    torch.set_default_dtype(torch.double)
    yield
    torch.set_default_dtype(torch.float)


def trainer_of(model, **values):
    spec = TrainSpec(**{"epochs": 1, "warmup_epochs": 0, "batch_size": 240, **values})
    run = Run("test", "test", model, spec)
    loader, _ = load_data(spec, model)
    return Trainer(run, loader, torch.device("cpu")), next(iter(loader.epoch(0)))


@pytest.mark.slow
def test_a_step_in_parts_equals_the_complete_step_up_to_rounding():
    losses, weights = [], []
    for parts in (1, 3):
        trainer, batch = trainer_of(VIT, accumulation=parts, opt="sgd")
        losses.append(trainer.step(*batch))
        weights.append(trainer.module.state_dict())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert all(torch.allclose(weights[0][k], weights[1][k], atol=1e-6) for k in weights[0])
    assert trainer.progress.step == 1


@pytest.mark.parametrize("drop_path_ramp", ["per_pass", "per_block"])
def test_parts_of_a_batch_use_shuffles_and_drop_path_of_the_complete_batch(
    tiny, double, drop_path_ramp
):
    model = tiny.with_values(drop_path_rate=0.5, drop_path_ramp=drop_path_ramp)
    losses = {}
    for parts, seed in ((1, 0), (4, 0), (1, 1)):
        trainer, batch = trainer_of(model, accumulation=parts, seed=seed, batch_size=32)
        trainer.module.stem.eval()  # BatchNorm's statistics are those of each part
        losses[parts, seed] = [trainer.step(*batch) for _ in range(5)]
    assert losses[4, 0] == pytest.approx(losses[1, 0], abs=2e-6, rel=0)
    assert losses[1, 1] != pytest.approx(losses[1, 0], abs=1e-3, rel=0)


def test_a_batch_that_is_not_full_is_split_into_parts_with_the_same_draws(tiny, double):
    losses = []
    for parts in (1, 3):
        trainer, (images, target) = trainer_of(
            tiny.with_values(drop_path_rate=0.5), accumulation=parts, batch_size=48
        )
        trainer.module.stem.eval()
        losses.append([trainer.step(images[:19], target[:19]) for _ in range(2)])
    assert losses[1] == pytest.approx(losses[0], abs=2e-6, rel=0)


def test_mixed_targets_are_drawn_from_the_seed_and_the_step(tiny):
    losses = []
    for seed in (0, 0, 1):
        trainer, batch = trainer_of(tiny, mixup=0.8, cutmix=1.0, seed=seed)
        torch.rand(3)
        losses.append(trainer.step(*batch))
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("kind", ["sret", "tied"])
def test_a_shared_tensor_is_averaged_once_in_a_step(tiny, kind):
    model = build_any(tiny if kind == "sret" else VIT.with_values(share=2, recursions=2))
    ema = create_ema(model, TrainSpec(model_ema_decay=0.9))
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    ema.update(model)
    found = ema.module.state_dict()
    assert found.keys() == before.keys()
    for name, _ in model.named_parameters():
        assert torch.allclose(found[name], before[name] + 0.1, atol=1e-6), name
    if kind == "tied":
        first, second = (ema.module.blocks[n].mlp.fc1.weight for n in (0, 1))
        assert first is second
    model.load_state_dict(found)
    x = torch.zeros(2, 3, 16, 16)
    assert torch.equal(model.eval()(x), ema.module(x))


def test_the_decay_of_averaged_weights_can_be_warmed_up(tiny):
    trainer, batch = trainer_of(tiny, model_ema_decay=0.99996, model_ema_warmup=True)
    weights = []
    for _ in range(2):
        trainer.step(*batch)
        weights.append(trainer.module.head.weight.detach().clone())
        if len(weights) == 1:
            assert torch.equal(trainer.ema.module.head.weight, weights[0])
    # The second step's decay: 1 - 2 ** (-2/3).
    expected = 0.37003948 * weights[0] + 0.62996052 * weights[1]
    assert torch.allclose(trainer.ema.module.head.weight, expected, atol=1e-7)


@pytest.mark.slow
def test_averaged_weights_are_evaluated_and_kept_next_to_the_others(tiny, tmp_path):
    values = {"epochs": 2, "warmup_epochs": 0, "batch_size": 240, "model_ema_decay": 0.5}
    values |= {"accumulation": 3, "mixup": 0.1}
    row = train(Run("test", "tiny", tiny, TrainSpec(**values)), tmp_path)
    assert row["ema_test_loss"] != row["test_loss"]
    assert (
        evaluate_run(tmp_path, EvaluationOptions(batch_size=240))["test_loss"] == row["test_loss"]
    )
    assert (
        evaluate_run(tmp_path / "ema", EvaluationOptions(batch_size=240))["test_loss"]
        == row["ema_test_loss"]
    )
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["ema_top1_percent"] == row["ema_top1_percent"]


def test_fine_tuning_notes_once_what_it_does_not_load(tiny, tmp_path, capsys):
    show_note_once.cache_clear()
    nowhere = TrainSpec(recipe="finetune", data_dir=str(tmp_path / "none"))
    for _ in range(2):
        with pytest.raises(SretError, match="none"):
            train(Run("test", "tiny", tiny, nowhere), tmp_path)
    error = capsys.readouterr().err
    assert error.count("recipe finetune without train.init trains from scratch") == 1
    save_model(build_any(tiny), tmp_path / "first")
    for _ in range(2):
        trainer_of(tiny.with_values(num_classes=12), init=str(tmp_path / "first"))
    error = capsys.readouterr().err
    assert error.count("first has 10 classes, and the model 12: the head is not loaded") == 1
    assert error.count("\n") == 1


def test_fine_tuning_starts_from_a_runs_weights_at_another_resolution(tiny, tmp_path):
    first = TrainSpec(epochs=1, warmup_epochs=0, batch_size=240)
    train(Run("test", "tiny", tiny, first), tmp_path / "first")
    larger = tiny.with_values(img_size=32)
    fresh, _ = trainer_of(larger)
    tuned, _ = trainer_of(larger, recipe="finetune", batch_size=64, init=str(tmp_path / "first"))
    assert tuned.module.pos_embed.shape == (1, 8, 16, 16)
    assert not torch.equal(fresh.module.head.weight, tuned.module.head.weight)
    with pytest.raises(SretError, match="has no model.safetensors; name a trained run"):
        trainer_of(larger, init=str(tmp_path))


def test_a_default_warm_up_is_shortened_in_proportion_to_the_epochs():
    assert TrainSpec(epochs=1).warmup_epochs == 0
    assert TrainSpec(epochs=2).warmup_epochs == 1
    assert TrainSpec(recipe="sret", epochs=20).warmup_epochs == 2
    assert TrainSpec(recipe="sret", epochs=31).warmup_epochs == 30
    assert TrainSpec(recipe="deit", epochs=5).warmup_epochs == 0


def test_a_default_min_lr_is_at_most_lr():
    assert TrainSpec(lr=1e-6).min_lr == 1e-6
    assert TrainSpec(lr=1e-4).min_lr == 1e-5
    assert TrainSpec(recipe="finetune", lr=1e-6).min_lr == 1e-6


def test_none_switches_off_fields_that_are_off_by_default():
    assert TrainSpec(recipe="sret", auto_augment="none").auto_augment is None
    assert TrainSpec(teacher="none", recursions_range="none") == TrainSpec()
    assert TrainSpec(recompute="none").recompute == "none"
