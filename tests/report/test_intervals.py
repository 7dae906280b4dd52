import pytest

from sret_cli.report.intervals import spread, wilson


@pytest.mark.parametrize(
    ("kind", "half_width"),
    [
        ("sd", 1.0),  # of 1, 2, 3
        ("sem", 0.5773502691896258),  # 1 / sqrt(3)
        ("ci95", 2.484137711719546),  # 4.302652729911275 / sqrt(3), t with 2 degrees of freedom
        ("none", None),
    ],
)
def test_the_interval_of_a_mean_is_the_one_asked_for(kind, half_width):
    found = spread([1.0, 2.0, 3.0], kind)
    assert (found.mean, found.n) == (2.0, 3)
    assert found.half_width == (None if half_width is None else pytest.approx(half_width))


def test_one_value_has_no_interval_and_equal_values_have_one_of_zero():
    assert spread([5.0]) == (5.0, None, 1)
    assert spread([5.0, 5.0]) == (5.0, 0.0, 2)


@pytest.mark.parametrize(
    ("percent", "images", "low", "high"),
    [
        # R. G. Newcombe, Statistics in Medicine 17 (1998), 857-872, table I, method 3.
        (100 * 81 / 263, 263, 25.53, 36.62),
        (100 * 15 / 148, 148, 6.24, 16.05),
        (0.0, 20, 0.0, 16.11),
        (100 / 29, 29, 0.61, 17.18),
    ],
)
def test_an_accuracy_has_the_interval_of_its_test_images(percent, images, low, high):
    assert wilson(percent, images) == (pytest.approx(low, abs=0.01), pytest.approx(high, abs=0.01))
