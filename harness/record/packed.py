"""Many numbers in little text: a number per token of a whole text, written out, would take tens of megabytes.

A number is 0 or greater. What is kept is its logarithm in steps of 1/512 of a power of two, that is to 0.07 % of the
number, or an exact zero: two bytes each, in base64.
"""

import base64
import binascii

import numpy as np
from numpy.typing import ArrayLike, NDArray

_STEPS = 512
"""Steps per power of two."""
_LEAST = -64
"""The power of two of the smallest number; anything less becomes zero."""


def pack_numbers(values: ArrayLike) -> str:
    """Numbers [n], from 0 (or less by rounding) to 2^63, as text of 8n/3 characters."""
    array = np.asarray(values, np.float64)
    is_zero = array <= 2.0**_LEAST
    logs = np.log2(np.where(is_zero, 1.0, array))
    codes = np.rint((logs - _LEAST) * _STEPS).clip(1, 2**16 - 1)
    return base64.b64encode(np.where(is_zero, 0, codes).astype("<u2").tobytes()).decode()


def unpack_numbers(text: str) -> NDArray[np.float64]:
    """The numbers [n] in a text of `pack_numbers`; `ValueError` for any other text."""
    try:
        codes = np.frombuffer(base64.b64decode(text, validate=True), dtype="<u2")
    except binascii.Error as error:
        raise ValueError(f"not base64: {error}") from error
    return np.where(codes == 0, 0.0, np.exp2(codes / _STEPS + _LEAST))
