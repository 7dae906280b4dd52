"""How the residual rules fare at 1,000 shared passes, at initialisation: what the README says."""

import math

import pytest
from benchmarks.residuals import RULES, probe


@pytest.fixture(scope="module")
def at_1000():
    return {rule: probe(rule, 1000) for rule in RULES}


def test_no_rule_overflows_in_a_thousand_passes(at_1000):
    for norms in at_1000.values():
        assert math.isfinite(norms.forward)
        assert math.isfinite(norms.backward)
