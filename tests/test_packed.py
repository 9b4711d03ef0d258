"""Packed numbers against the numbers themselves."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.record.packed import pack_numbers, unpack_numbers


@given(st.lists(st.floats(1e-19, 1e18)))
def test_a_number_comes_back_to_seven_parts_in_ten_thousand(values: list[float]) -> None:
    assert unpack_numbers(pack_numbers(values)) == pytest.approx(np.array(values), rel=7e-4)


def test_zero_stays_zero_and_rounding_below_it_becomes_zero() -> None:
    assert unpack_numbers(pack_numbers([0.0, -1e-17, 1e-30])).tolist() == [0, 0, 0]


def test_two_bytes_a_number() -> None:
    assert len(pack_numbers(np.ones(300))) == 800


@pytest.mark.parametrize("text", ["?", "AAA", "AAAA"])
def test_another_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"base64|multiple"):
        unpack_numbers(text)
