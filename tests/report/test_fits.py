"""Laws recovered from data that were made by them, and refused where data are too few."""

import numpy as np
import pytest
from helpers import study_rows

from sret_cli.report.figures import draw_figures
from sret_cli.report.fits import bootstrap, fit, fit_rows
from sret_cli.report.laws import LAWS
from sret_cli.runtime.errors import SretError
from sret_cli.study.view import FigureSpec, ReportSpec

# Two widths, five recursion counts, three amounts of data, two seeds: 60 runs.
WIDTHS, RECURSIONS, IMAGES, SEEDS = (5e4, 8e5), (1, 2, 4, 8, 16), (2e4, 1e5, 5e5), 2
TRUTH = np.array([0.3, 60.0, 10.0, 0.30, 0.28, 0.46])  # E, A, B, alpha, beta, phi


def recurrence_inputs():
    settings = [(w, 3 * w, r, d) for w in WIDTHS for r in RECURSIONS for d in IMAGES]
    values = np.repeat(np.array(settings, dtype=float), SEEDS, axis=0)
    columns = dict(zip(("N_once", "N_rec", "r", "D"), values.T, strict=True))
    return columns, np.repeat(np.arange(len(settings)), SEEDS)


def noisy(values, seed, size=0.01):
    return values * (1 + size * np.random.default_rng(seed).standard_normal(len(values)))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("power", [0.5, 3.0, 0.7]),
        ("power", [2.0, -1.0, 0.35]),  # a curve that rises
        ("exponential", [0.4, 2.0, 2.5]),
        ("chinchilla", [1.69, 406.4, 410.7, 0.34, 0.28]),  # Hoffmann et al., 2022, approach 3
        ("recurrence", TRUTH),
    ],
)
def test_data_without_noise_give_the_law_back(name, parameters):
    law, truth = LAWS[name], np.array(parameters)
    if name == "recurrence":
        inputs, _ = recurrence_inputs()
    elif name == "chinchilla":
        pairs = [(n, d) for n in (1e8, 3e8, 1e9, 3e9, 1e10) for d in (1e9, 1e10, 1e11, 3e11)]
        inputs = dict(zip(("N", "D"), np.array(pairs).T, strict=True))
    else:
        inputs = {"x": np.array([1.0, 2, 4, 8, 16, 32, 64])}
    found = fit(law, inputs, law.predict(inputs, truth))
    assert found.has_converged
    split = len(law.coefficients)
    np.testing.assert_allclose(found.parameters[split:], truth[split:], atol=1e-3)
    np.testing.assert_allclose(found.parameters[:split], truth[:split], rtol=1e-2)
    assert np.abs(found.residuals).max() < 1e-6


def test_phi_is_found_from_sixty_runs_with_one_percent_of_noise():
    law = LAWS["recurrence"]
    inputs, settings = recurrence_inputs()
    assert len(settings) == 60
    exact = law.predict(inputs, TRUTH)
    for seed in range(5):
        found = fit(law, inputs, noisy(exact, seed))
        assert found.has_converged
        assert abs(found.parameters[-1] - 0.46) <= 0.03
    drawn = bootstrap(law, inputs, noisy(exact, 0), settings, found, draws=100)[:, -1]
    low, high = np.percentile(drawn, [2.5, 97.5])
    assert low < 0.46 < high
    assert high - low < 0.1


def test_one_wrong_measurement_moves_a_fit_little():
    law, truth = LAWS["power"], np.array([0.5, 3.0, 0.7])
    inputs = {"x": np.geomspace(1, 64, 14)}
    y = noisy(law.predict(inputs, truth), 3, 0.002)
    y[6] *= 1.3
    found = fit(law, inputs, y)
    assert found.weights[6] < 0.05
    assert abs(found.parameters[2] - 0.7) < 0.03


def rows_of(losses, **tables):
    rows = study_rows([50.0] * len(losses), **tables)
    for row, loss in zip(rows, losses, strict=True):
        row |= {"test_loss": loss, "images_seen": 1000 * row["train.epochs"]}
    return rows


def power_rows(noise=0.0):
    recursions = [1, 2, 4, 8, 16]
    grid = {"model.recursions": recursions, "train.seed": [0, 1]}
    depth = np.repeat(4.0 * np.array(recursions), 2)
    return rows_of(noisy(1 + 2 * depth**-0.5, 0, noise), grid=grid)


def test_rows_give_a_law_with_its_interval_before_its_value():
    found = fit_rows(power_rows(0.002), "power", "layers")
    assert (found.settings, len(found.measured)) == (5, 10)
    low, high = found.intervals["alpha"]
    assert low < 0.5 < high
    lines = found.lines()
    assert lines[0] == (
        "test_loss = E + A x^-alpha (power law with offset), fitted to 10 runs of 5 settings."
    )
    assert lines[3].startswith(f"alpha: {low:.3g} to {high:.3g} (95 %), best ")
    error = fit_rows(power_rows(), "power", "layers", "error")
    assert set(error.measured) == {50.0}


def test_what_the_data_do_not_determine_is_said():
    found = fit_rows(power_rows(0.5), "power", "layers")
    assert not found.is_determined("alpha")
    assert any(line.startswith("The data do not determine alpha") for line in found.lines())


def test_the_law_of_recurrence_takes_parameters_from_the_specs_of_runs():
    grid = {
        "model.recursions": [1, 2, 4],
        "model.params": [331_842, 3_425_898],
        "train.epochs": [2, 20],
    }
    rows = study_rows(grid=grid)
    for row in rows:
        row |= {"images_seen": 1000 * row["train.epochs"], "test_loss": 1.0, "top1_percent": 50.0}
        row["params"] = 331_842 if row["model.embed_dims"][0] < 64 else 3_425_898
        row["test_loss"] += row["params"] ** -0.1 / row["model.recursions"][0] ** 0.05
    found = fit_rows(rows, "recurrence")
    assert set(found.inputs["r"]) == {1.0, 2.0, 4.0}
    assert set(found.inputs["D"]) == {2_000.0, 20_000.0}
    assert (found.inputs["N_rec"] > 100_000).all()


@pytest.mark.parametrize(
    ("change", "name", "message"),
    [
        ({"model.recursions": [1, 2, 4]}, "power", "3 settings have all that the law takes"),
        ({"model.recursions": [1, 2, 3, 4]}, "power", "Layers goes from 4 to 16, 4.0 times; a law"),
        ({"model.recursions": [1, 2, 8, 16]}, "chinchilla", "N goes from 331842 to 331842"),
        ({"model.recursions": [[1, 2, 3], 4, 8, 16]}, "recurrence", "the same count in all stages"),
    ],
)
def test_too_few_settings_and_too_small_ranges_are_refused(change, name, message):
    count = len(next(iter(change.values())))
    with pytest.raises(SretError, match=message) as caught:
        fit_rows(rows_of([1.0 + 0.1 * n for n in range(count)], grid=change), name)
    assert caught.value.code == 4


def test_failed_runs_do_not_count_and_wrong_names_are_refused():
    rows = power_rows()
    rows[0]["error"] = "diverged"
    assert len(fit_rows(rows, "power").measured) == 9
    with pytest.raises(SretError, match="law 'powr': did you mean 'power'"):
        fit_rows(rows, "powr")
    with pytest.raises(SretError, match="law of 'loss': did you mean 'test_loss'"):
        fit_rows(rows, "power", y="loss")
    rows[1]["test_loss"] = 0.0
    with pytest.raises(SretError, match="needs values above 0"):
        fit_rows(rows, "power")


def test_a_law_is_drawn_with_its_residuals_and_its_sentences():
    spec = ReportSpec(figures=(FigureSpec(kind="law", x="layers", law="power"),))
    (drawn,) = draw_figures(power_rows(0.002), spec)
    curve, residuals = drawn.figure.axes
    assert (curve.get_xlabel(), curve.get_ylabel()) == ("Layers", "Test loss")
    assert residuals.get_ylabel() == "Residual (%)"
    assert len(residuals.collections[0].get_offsets()) == 10
    assert "alpha: " in drawn.caption
    assert drawn.title == "Test loss over layers: E + A x^-alpha"
    with pytest.raises(SretError, match="needs at least 4"):
        draw_figures(power_rows()[:4], spec)
