"""P-values, verdicts and sample sizes. Nothing here knows what is measured: numbers or an `Estimate` in, numbers out.

Sources are named where they are used. What the tests and verdicts really decide, on data with the correlations of real
windows, items and speeds, is simulated by `python -m studies.simulation`.
"""

import math
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from scipy import special

from harness.record import stats
from harness.record.stats import Estimate, student_quantile


def paired_permutation(baseline: Sequence[float], variant: Sequence[float]) -> float:
    """Two-sided p-value of two sides having the same totals over clusters (both [clusters]), by exchanging the sides.

    If nothing but chance tells the sides of a pair apart, every pair may be exchanged: the p-value is the share of
    exchanges whose mean difference is at least as far from zero (Fisher 1935): of all 2^n, or of `stats.RESAMPLES`
    random ones. Assumes independent clusters, no distribution. Fewer than six cannot give a p-value below 5 %.
    """
    difference = np.asarray(variant, float) - np.asarray(baseline, float)
    if len(difference) == 1:  # which scipy refuses
        return 1.0
    from scipy.stats import permutation_test

    result = permutation_test(
        (difference,),
        lambda one, axis: one.mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=stats.RESAMPLES,
        batch=max(1, stats.BATCH_ELEMENTS // max(1, len(difference))),
        rng=np.random.default_rng(stats.SEED),
    )
    return float(result.pvalue)


def mcnemar(num_lost: int, num_won: int) -> float:
    """Two-sided p-value of losing and winning being equally likely, from the pairs in which the two sides differ.

    The exact test of McNemar (1947): the lost ones are binomial(lost + won, 1/2). Assumes independent pairs.
    """
    from scipy.stats import binomtest

    return float(binomtest(num_lost, num_lost + num_won).pvalue) if num_lost + num_won else 1.0


def p_above(estimate: Estimate, bound: float) -> float | None:
    """One-sided p-value of "the true value is at most `bound`"; None without an interval.

    Student's t with the estimate's degrees of freedom, its scale that of the interval's half that points to `bound`:
    the p-value is 2.5 % exactly where that end of the interval meets `bound`. Assumes that each half is about that of a
    normal distribution.
    """
    distance = estimate.value - bound
    end = estimate.low if distance >= 0 else estimate.high
    if end is None:
        return None
    reach = abs(end - estimate.value)
    if reach == 0:
        return 0.0 if distance > 0 else 1.0
    degrees = estimate.degrees_of_freedom
    return float(special.stdtr(degrees, -distance / reach * student_quantile(degrees)))


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """p-values of several tests, adjusted so that all that are below a level hold together at that level.

    In the order given. Step-down (Holm, Scandinavian Journal of Statistics 6 (1979) 65-70): the smallest times their
    number, the next times one fewer, and so on, none below the one before it and none above 1. Assumes nothing of how
    the tests depend on each other.
    """
    order = sorted(range(len(p_values)), key=lambda at: p_values[at])
    scaled = (min(1.0, (len(order) - step) * p_values[at]) for step, at in enumerate(order))
    by_place = dict(zip(order, accumulate(scaled, max), strict=True))
    return tuple(by_place[at] for at in range(len(p_values)))


def num_needed(estimate: Estimate, margin: float) -> int | None:
    """How many units like those seen would bring the interval clear of `margin`, if the value stayed the same.

    The interval shrinks with the root of their number: num * (half-width / |value - margin|)^2, rounded up, with the
    half that points to the margin. None where there is no interval, or where the value is the margin itself.
    """
    bound = estimate.high if margin > estimate.value else estimate.low
    if bound is None or margin == estimate.value:
        return None
    num = estimate.num * ((bound - estimate.value) / (margin - estimate.value)) ** 2
    return math.ceil(num * (1 - 1e-12))  # an error of rounding is no unit more
