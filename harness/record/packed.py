"""Many numbers in little text: a value per token of a whole text would make records of tens of megabytes.

What is kept is the logarithm of a number that is never negative, to a step of 1/512 of a power of two: 0.07 % of the
value, and exact zero. Two bytes each, in base64.
"""

import base64
import binascii

import numpy as np
from numpy.typing import ArrayLike, NDArray

_STEPS = 512
"""Per power of two."""
_LEAST = -64
"""The power of two of the smallest value; what is less becomes zero."""


def pack_numbers(values: ArrayLike) -> str:
    """Numbers [n], none negative beyond rounding or above 2^63, as text of 8n/3 characters."""
    array = np.asarray(values, np.float64)
    is_zero = array <= 2.0**_LEAST
    logs = np.log2(np.where(is_zero, 1.0, array))
    codes = np.rint((logs - _LEAST) * _STEPS).clip(1, 2**16 - 1)
    return base64.b64encode(np.where(is_zero, 0, codes).astype("<u2").tobytes()).decode()


def unpack_numbers(text: str) -> NDArray[np.float64]:
    """The numbers [n] of `pack`'s text; `ValueError` for any other."""
    try:
        codes = np.frombuffer(base64.b64decode(text, validate=True), dtype="<u2")
    except binascii.Error as error:
        raise ValueError(f"not base64: {error}") from error
    return np.where(codes == 0, 0.0, np.exp2(codes / _STEPS + _LEAST))
