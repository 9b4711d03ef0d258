"""Roots by Brent's method: the same bits as scipy's."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq

from harness.record.roots import root_between


@given(st.integers(0, 400), st.integers(0, 400), st.integers(1, 1000), st.sampled_from([-1.959963984540054, 2.5]))
def test_roots_of_tangos_score_have_the_bits_of_scipys(num_lost: int, num_won: int, more: int, bound: float) -> None:
    num = num_lost + num_won + more
    value = (num_won - num_lost) / num

    def score(difference: float) -> float:
        b = (2 * num - num_won + num_lost) * difference - num_won - num_lost
        c = -num_lost * difference * (1 - difference)
        lost = (math.sqrt(max(0.0, b * b - 8 * num * c)) - b) / (4 * num)
        variance = num * (2 * lost + difference * (1 - difference))
        return num * (value - difference) - bound * math.sqrt(max(0.0, variance))

    ends = (-1.0, value - 1e-12) if bound > 0 else (value + 1e-12, 1.0)
    assert root_between(score, *ends) == brentq(score, *ends)


@given(st.floats(-3, 3), st.floats(0.1, 20))
def test_other_functions_have_the_same_root_too(place: float, steepness: float) -> None:
    for function in (
        lambda x: math.tanh(steepness * (x - place)),
        lambda x: (x - place) ** 3 + 1e-3 * (x - place),
        lambda x: math.exp(steepness * (x - place) / 10) - 1,
    ):
        assert root_between(function, -4.0, 5.0) == brentq(function, -4.0, 5.0)


def test_ends_of_one_sign_are_refused_and_a_root_at_an_end_is_found() -> None:
    with pytest.raises(ValueError, match="one sign"):
        root_between(lambda x: x, 1.0, 2.0)
    assert root_between(lambda x: x, 0.0, 2.0) == 0.0
    assert root_between(lambda x: x - 2, 0.0, 2.0) == 2.0
