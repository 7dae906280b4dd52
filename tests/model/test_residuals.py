"""How the residual rules fare in 1,000 shared passes at initialisation: what the README says."""

import pytest
from benchmarks.residuals import RULES, probe

# Root mean squares over 1,000 layers of 10 blocks: output over input, and gradient back likewise.
# Measured by benchmarks/residuals.py; the tests allow a quarter to each side.
AT_1000 = {
    "lrc": (127, 26),
    "plain": (127, 26),
    "layerscale": (1.0, 1.0),
    "rezero": (1.0, 1.0),
    "sqrt": (3.79, 2.87),
    "loop": (1.06, 1.06),
    "deepnorm": (1.01, 0.000368),
}


def test_every_rule_is_probed():
    assert set(AT_1000) == set(RULES)


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_signal_and_gradient_in_a_thousand_passes_agree_with_the_readme(rule):
    norms = probe(rule, 1000)
    assert (norms.forward, norms.backward) == pytest.approx(AT_1000[rule], rel=0.25)
