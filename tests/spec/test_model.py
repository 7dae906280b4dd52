import pytest

from sret_cli.runtime.errors import SretError
from sret_cli.spec.model import ModelSpec
from sret_cli.spec.passes import Pass
from sret_cli.spec.presets import PRESETS, preset
from sret_cli.spec.train import TrainSpec

DEEP = PRESETS["deep"]


def test_sret_t_has_ten_blocks_and_twenty_layers():
    assert sum(PRESETS["sret_t"].blocks) == 10
    assert PRESETS["sret_t"].layers == 20
    assert PRESETS["sret_t"].tokens == (784, 196, 49)


@pytest.mark.parametrize(
    ("layers", "recursions"),
    [(1000, (100, 100, 100)), (108, (11, 10, 12)), (20, (2, 2, 2)), (10, (1, 1, 1))],
)
def test_layers_set_recursions_in_proportion(layers, recursions):
    assert DEEP.at(layers=layers).recursions == recursions


def test_every_count_that_blocks_can_reach_is_reached_exactly():
    spec = DEEP.with_values(blocks=(2, 5, 3))
    reached = [n for n in range(12, 200) if spec.at(layers=n).layers == n]
    assert reached == list(range(12, 200))


def test_a_depth_that_cannot_be_reached_names_its_neighbours():
    with pytest.raises(SretError, match=r"11 layers cannot be reached .* use 10 or 12"):
        DEEP.at(layers=11)


@pytest.mark.parametrize("layers", [0, -5, 9, 100_001, 10**12])
def test_absurd_layer_counts_are_refused(layers):
    with pytest.raises(SretError, match="layers"):
        DEEP.at(layers=layers)


def test_slices_take_the_greatest_common_divisor_with_a_stages_tokens():
    assert DEEP.at(slices=4).slices == (4, 4, 1)
    assert DEEP.at(slices=28).slices == (28, 28, 7)
    assert DEEP.at(slices=4).recursive_slices == (4, 4, 1)
    assert DEEP.at(slices=4, recursive_slices=2).recursive_slices == (2, 2, 1)


def test_slices_that_divide_no_stage_are_refused_with_those_that_do():
    with pytest.raises(SretError, match="3 slices divide no stage.*784, 196, 49.*use 2, 4"):
        DEEP.at(slices=3)


def test_slices_that_do_not_divide_a_stage_name_those_that_do():
    message = r"stage 3: 4 slices \(slices\) do not divide 49 tokens \(7x7\); use 1, 7, 49"
    with pytest.raises(SretError, match=message):
        ModelSpec(slices=4)


def test_internal_loop_passes_a_block_in_a_row(tiny):
    spec = tiny.with_values(recursions=2, nll="per_pass")
    assert spec.schedule(1) == (
        Pass(block=0, visit=0, nll=0, slices=2, shuffled=False, gathers=False),
        Pass(block=0, visit=1, nll=1, slices=2, shuffled=True, gathers=True),
        Pass(block=1, visit=0, nll=2, slices=2, shuffled=False, gathers=True),
        Pass(block=1, visit=1, nll=3, slices=2, shuffled=True, gathers=True),
    )


def test_external_loop_passes_all_blocks_in_turn(tiny):
    spec = tiny.with_values(recursions=2, loop="external")
    assert [(p.block, p.nll, p.shuffled) for p in spec.schedule(1)] == [
        (0, 0, False),
        (1, 1, False),
        (0, 0, True),
        (1, 1, True),
    ]


def test_later_passes_use_recursive_slices_and_shuffle_by_default(tiny):
    assert [p.slices for p in tiny.schedule(0)] == [4, 2]
    assert not any(p.shuffled for p in tiny.with_values(shuffle="none").schedule(0))
    assert not any(p.shuffled for p in tiny.schedule(2))


def test_drop_path_ramps_over_the_whole_depth(tiny):
    spec = tiny.with_values(drop_path_rate=0.7)
    rates = [rate for stage in range(3) for rate in spec.drop_path_rates(stage)]
    assert len(rates) == 8
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])


def test_the_published_drop_path_has_one_rate_for_all_passes_through_a_block():
    spec = PRESETS["sret_t"].with_values(drop_path_rate=0.1, drop_path_ramp="per_block")
    rates = [spec.drop_path_rates(stage) for stage in range(3)]
    assert rates[0] == pytest.approx((0, 0, 0.005, 0.005))
    assert rates[1] == pytest.approx(
        (0.02, 0.02, 0.025, 0.025, 0.03, 0.03, 0.035, 0.035, 0.04, 0.04)
    )
    assert rates[2] == pytest.approx((0.07, 0.07, 0.075, 0.075, 0.08, 0.08))
    assert sum(map(sum, rates)) / 20 == pytest.approx(0.038)
    by_passes = spec.with_values(drop_path_ramp="per_pass")
    assert sum(sum(by_passes.drop_path_rates(stage)) for stage in range(3)) / 20 == pytest.approx(
        0.05
    )
    turned = spec.with_values(loop="external").drop_path_rates(0)
    assert turned == pytest.approx((0, 0.005, 0, 0.005))


def test_one_value_stands_for_all_stages():
    assert ModelSpec(recursions=3, slices=1, recursive_slices=1).recursions == (3, 3, 3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mlp_ration": 3}, "unknown key 'mlp_ration'; did you mean 'mlp_ratio'"),
        ({"mlp_ratio": "3"}, "mlp_ratio = '3': input should be a valid number"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio = nan"),
        ({"blocks": (1, 0, 2)}, r"blocks = 0 \(stage 2\)"),
        ({"blocks": 2.5}, "blocks = 2.5"),
        ({"blocks": True}, "blocks = True"),
        ({"blocks": (1, 2)}, "blocks has 2 values for 3 stages"),
        ({"loop": "both"}, "loop = 'both'"),
        ({"num_heads": (3, 4, 8)}, "3 heads do not divide the width 128"),
        ({"embed_dims": (127, 254, 508), "num_heads": 1}, "127 is odd"),
        ({"embed_dims": (128, 200, 512), "num_heads": 4}, "200 is not a multiple of the 128"),
        ({"nll_ratio": 0.001}, "leaves no hidden unit"),
        ({"residual": "highway"}, "residual = 'highway'"),
        ({"order": ((0,), (0,), (0,))}, r"stage 1: order \[0\] does not visit its blocks 0 to 1"),
        ({"order": ((0, 1), (0, 1))}, "order has 2 lists for 3 stages"),
        ({"order": (0, 1, 2), "blocks": 2}, r"order \[0, 1, 2\] does not visit its blocks 0 to 1"),
        ({"recursions": 50_000}, "500,000 layers are more than"),
    ],
)
def test_an_invalid_model_is_refused_in_one_line(values, message):
    with pytest.raises(SretError, match=message) as refused:
        ModelSpec(**values)
    assert "\n" not in str(refused.value)
    assert refused.value.code == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dataset": "digit"}, "unknown dataset 'digit'; did you mean 'digits'"),
        ({"dataset": "folder"}, "--data-dir"),
        ({"dataset": "torch/cifar10"}, "--data-dir"),
        ({"dataset": "tfds/cats"}, "unknown dataset 'tfds/cats'; .*hfds/NAME"),
        ({"dataset": "digits", "data_dir": "x"}, "not used by dataset = 'digits'"),
        ({"epochs": 0}, "epochs = 0"),
        ({"epochs": 3, "warmup_epochs": 3}, "warm-up"),
        ({"lr": float("inf")}, "lr = inf"),
        ({"scale": (1.0, 0.5)}, "smallest crop"),
        ({"recursions_range": [4, 1]}, "smallest count"),
    ],
)
def test_an_invalid_training_is_refused(values, message):
    with pytest.raises(SretError, match=message):
        TrainSpec(**values)


def test_a_folder_of_images_is_flipped_and_cropped_by_default():
    assert TrainSpec(data_dir="x").dataset == "folder"
    assert TrainSpec(dataset="wds/", data_dir="x").dataset == "wds"
    assert TrainSpec(data_dir="x").hflip == 0.5
    assert TrainSpec(dataset="folder", data_dir="x", hflip=0.0).hflip == 0.0
    assert TrainSpec().hflip == 0.0


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(SretError, match="unknown preset 'sret_z'; did you mean 'sret_"):
        preset("sret_z")
