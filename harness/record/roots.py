"""Roots of functions, without the import of scipy.optimize, which takes longer than a gate has."""

import math
from collections.abc import Callable

_ABSOLUTE, _RELATIVE = 2e-12, 4 * 2.0**-52
"""How near the root is found, in absolute terms and as a share of it."""
_MOST_STEPS = 100


def root_between(function: Callable[[float], float], low: float, high: float) -> float:
    """Where `function` is zero between `low` and `high`; `ValueError` where it has one sign at both ends.

    By Brent's method (Algorithms for Minimization Without Derivatives, 1973, chapter 4), with the steps and so the bits
    of `scipy.optimize.brentq`: importing that package costs more than all the roots that a command looks for.
    """
    previous, current, other = low, high, 0.0
    at_previous, at_current, at_other = function(previous), function(current), 0.0
    if at_previous == 0:
        return previous
    if at_current == 0:
        return current
    if math.copysign(1, at_previous) == math.copysign(1, at_current):
        raise ValueError("the function has one sign at both ends")
    step = last_step = 0.0
    for _ in range(_MOST_STEPS):
        if at_previous != 0 and math.copysign(1, at_previous) != math.copysign(1, at_current):
            other, at_other = previous, at_previous
            last_step = step = current - previous
        if abs(at_other) < abs(at_current):
            previous, current, other = current, other, current
            at_previous, at_current, at_other = at_current, at_other, at_current
        near = (_ABSOLUTE + _RELATIVE * abs(current)) / 2
        half = (other - current) / 2
        if at_current == 0 or abs(half) < near:
            return current
        guess = math.inf  # which is too far, so that the interval is halved
        if abs(last_step) > near and abs(at_current) < abs(at_previous):
            if previous == other:  # the secant
                guess = -at_current * (current - previous) / (at_current - at_previous)
            else:  # a parabola through three points, by its inverse
                slope = (at_previous - at_current) / (previous - current)
                other_slope = (at_other - at_current) / (other - current)
                guess = -at_current * (at_other * other_slope - at_previous * slope)
                guess /= other_slope * slope * (at_other - at_previous)
        if 2 * abs(guess) < min(abs(last_step), 3 * abs(half) - near):
            last_step, step = step, guess
        else:
            last_step = step = half
        previous, at_previous = current, at_current
        current += step if abs(step) > near else math.copysign(near, half)
        at_current = function(current)
    raise ValueError(f"no root was found in {_MOST_STEPS} steps")
