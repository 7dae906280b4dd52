import pytest

from sret_cli.cost.published import published_columns, published_table
from sret_cli.cost.trace import trace_costs
from sret_cli.spec.presets import PRESETS

# Measured by running the reference implementation under fvcore 0.1.5.post20221221, batch of one.
EXACT = {
    "sret_t": (4_755_979, 1_121_665_792),
    "sret_t_unsliced": (4_755_979, 1_374_904_064),
    "sret_lt": (4_988_024, 1_173_698_304),
    "sret_lt_unsliced": (4_988_024, 1_426_936_576),
    "sret_s": (20_899_692, 4_190_973_192),
    "sret_s_unsliced": (20_899_692, 4_689_536_040),
}
# 21,091,212 parameters are printed as 21.0: the one digit that differs (it is cut off, while 4.76
# and 4.85 are printed rounded, as 4.8 and 4.9).
DIFFERS = {"sret_s_384": 0.1}
VARIANTS = list(dict.fromkeys(line.preset for line in published_table()))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_published_variant_has_its_printed_digits_and_exact_integers(name):
    costs = trace_costs(PRESETS[name])
    for line in published_table():
        if line.preset == name:
            assert round(costs.macs / 1e9, 1) == line.gmacs
            difference = DIFFERS.get(name, 0.0)
            assert round(costs.params / 1e6, 1) == pytest.approx(line.params_m + difference)
    if name in EXACT:
        assert (costs.params, costs.macs) == EXACT[name]
    columns = published_columns(PRESETS[name], costs.params, costs.macs)
    assert columns["params_m_minus_published"] == DIFFERS.get(name, 0.0)
    assert columns["gmacs_minus_published"] == 0.0


def test_the_table_holds_fourteen_models_of_ten_architectures():
    assert len(published_table()) == 14
    assert VARIANTS == [
        *("sret_t_unsliced", "sret_t", "sret_lt_unsliced", "sret_lt", "sret_lt_16_14"),
        *("sret_s_unsliced", "sret_s", "sret_t_384", "sret_s_384", "sret_s_512"),
    ]
    assert sum(line.distilled for line in published_table()) == 7
    assert [PRESETS[name].slices for name in VARIANTS[1:5:3]] == [(8, 4, 1), (16, 14, 1)]
    assert {PRESETS[name].img_size for name in VARIANTS[-3:]} == {384, 512}


def test_other_models_have_no_published_figures():
    assert published_columns(PRESETS["deep"], 1, 1) == {}
    assert published_columns(PRESETS["sret_t"].with_values(num_classes=10), 1, 1) == {}


def test_a_variant_shows_both_published_accuracies():
    columns = published_columns(PRESETS["sret_t"], 4_755_979, 1_121_665_792)
    assert columns["published_top1_percent"] == 76.0
    assert columns["published_distilled_top1_percent"] == 77.6


def test_the_official_study_lists_every_variant_once(request):
    from sret_cli.study.file import load_study

    study = load_study(request.config.rootpath / "studies" / "official.toml")
    assert [run.name for run in study.runs] == VARIANTS
    assert [run.model for run in study.runs] == [PRESETS[name] for name in VARIANTS]
    assert all(run.train is None for run in study.runs)
