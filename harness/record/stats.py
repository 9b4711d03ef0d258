"""Estimates with intervals, and tests. Nothing here knows what is measured: numbers in, an `Estimate` or a p-value out.

All intervals are at 95 %. A bound is None where the data cannot support one at that level. Resampling uses one fixed
seed, so the same records give the same figures everywhere. What the intervals and the tests really do is simulated by
`python -m studies.simulation`: reports/statistics/README.md.

Sources: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 6, 8 and 13; Hesterberg, What Teachers
Should Know About the Bootstrap, The American Statistician 69 (2015), section 5.3 (the expanded percentile interval);
Cochran, Sampling Techniques (1977), chapter 6 (ratio estimators); Conover, Practical Nonparametric Statistics (1999),
section 3.2 (the quantile test that `scipy.stats.quantile_test` inverts). Others are named where they are used.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray
from scipy import special

from harness.record.roots import root_between

LEVEL = 0.95
RESAMPLES = 9999
SEED = 0
BATCH_ELEMENTS = 1 << 23  # counts drawn at a time: bounds the memory of a bootstrap at about 200 MB
TAIL = (1 - LEVEL) / 2
_Z = -float(special.ndtri(TAIL))

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A value from `num` units, with its 95 % interval by `method`. A bound is None where the data allow no interval.

    `degrees` are the degrees of freedom of the standard error: None means `num` - 1, as for independent units; they are
    fewer where units belong together.
    """

    value: float
    low: float | None
    high: float | None
    num: int
    method: str
    standard_error: float | None = None
    degrees: float | None = None

    @property
    def degrees_of_freedom(self) -> float:
        """Of the standard error: `degrees`, or `num` - 1."""
        return self.num - 1 if self.degrees is None else self.degrees

    @property
    def standard_errors_from_zero(self) -> float | None:
        """|value| / standard error; None without a standard error or where it is zero."""
        return abs(self.value) / self.standard_error if self.standard_error else None


# -- Clusters: windows of a text, documents of a task ------------------------------------------------------------


def weighted_mean(totals: Sequence[float], weights: Sequence[float], block: int = 1) -> Estimate:
    """The weighted mean over clusters: sum(totals) / sum(weights).

    Args (both [clusters]): each cluster's total, and how many observations it adds up. Sums of a divergence with token
    counts give the divergence per token. Assumptions, interval and `block` are those of `paired_mean_difference`.
    """
    total, weight = np.asarray(totals, float), np.asarray(weights, float)
    if total.shape != weight.shape or total.ndim != 1 or not np.all(weight > 0):
        raise ValueError("totals and positive weights must be of one length")
    return _ratio_of_sums(total, weight, block, "percentile bootstrap over clusters")


def paired_mean_difference(
    baseline: Sequence[float], variant: Sequence[float], weights: Sequence[float], block: int = 1
) -> Estimate:
    """The difference of two weighted means over the same clusters: sum(variant - baseline) / sum(weights).

    Args (all [clusters]): each cluster's total under the baseline and under the variant, and its weight: how many
    observations the total adds up. Totals of negative log-likelihood with token counts give the difference of
    log-perplexities. With `block` = b, every b neighbours are added up to one cluster (a last, shorter block is one
    too): neighbouring windows of an article are not independent.

    Whole clusters are resampled, pair and weight together, because observations within a cluster are correlated and
    both sides saw the same ones. Assumes that the clusters are exchangeable and independent of each other.

    The interval is Hesterberg's expanded percentile interval: the percentile interval of n clusters is too narrow by
    sqrt(1 - 1/n) and by the ratio of normal to Student's t quantiles (10 % at 20 clusters), so the quantiles are taken
    at the level where sqrt(n / (n - 1)) times Student's t would be. Resamples never leave the range of the data, which
    holds the mean of five clusters or fewer in less than 95 % of cases; so a bound is never nearer than Student's t
    times the standard error. It is too narrow where clusters are few and rare ones decide. BCa has no answer when all
    differences are equal, as those of a model and itself are. Fewer than two clusters have no interval.
    """
    difference = np.asarray(variant, float) - np.asarray(baseline, float)
    weight = np.asarray(weights, float)
    if difference.shape != weight.shape or difference.ndim != 1 or not np.all(weight > 0):
        raise ValueError("totals and positive weights must be of one length")
    return _ratio_of_sums(difference, weight, block, "paired percentile bootstrap over clusters")


def paired_sum_ratio(variant: Sequence[float], baseline: Sequence[float], block: int = 1) -> Estimate:
    """sum(variant) / sum(baseline) of two totals over the same clusters.

    Args (both [clusters]): each cluster's total under the variant and under the baseline, never negative and of the
    baseline not all zero. Assumptions, interval and `block` are those of `paired_mean_difference`. There is no interval
    where a resample draws a baseline of zero.
    """
    above, below = np.asarray(variant, float), np.asarray(baseline, float)
    if above.shape != below.shape or above.ndim != 1 or (above < 0).any() or (below < 0).any() or not below.any():
        raise ValueError("totals must be of one length and not negative, and the baseline's not all zero")
    return _ratio_of_sums(above, below, block, "paired percentile bootstrap of a ratio of sums over clusters")


def block_length(num: int) -> int:
    """How many neighbouring windows of running text to take for one cluster, of `num` windows in all: a twelfth.

    The longer a block is, the less the blocks are correlated, and the fewer are left. The simulation finds that a
    twelfth suffices; where the windows are independent after all, the interval is a tenth longer than it need be.
    """
    return max(1, num // 12)


def _ratio_of_sums(above: Array, below: Array, block: int, method: str) -> Estimate:
    """sum(above) / sum(below) over clusters (both [clusters]), with the expanded percentile bootstrap over blocks."""
    value = math.fsum(above) / math.fsum(below)
    starts = np.arange(0, len(above), block)
    columns = np.stack([np.add.reduceat(above, starts), np.add.reduceat(below, starts)], axis=1)
    num = len(columns)
    if block > 1:
        method = f"{method} in blocks of {block}"
    none = Estimate(value, None, None, len(above), method)
    if num < 2:
        return none
    dividends, divisors = _resampled_sums(columns)
    if not divisors.all():
        return none
    ratios = dividends / divisors
    wider = math.sqrt(num / (num - 1))
    standard_error = wider * float(ratios.std(ddof=1))
    if _is_nothing(standard_error, value):
        return none
    student = student_quantile(num - 1)
    tail = float(special.ndtr(-wider * student))
    low, high = np.quantile(ratios, (tail, 1 - tail))
    reach = student * standard_error
    return replace(
        none,
        low=min(float(low), value - reach),
        high=max(float(high), value + reach),
        standard_error=standard_error,
        degrees=None if block == 1 else num - 1,
    )


def student_quantile(degrees: float) -> float:
    """How many standard errors Student's t puts between a value and either end of its 95 % interval.

    As `scipy.stats.t.isf(TAIL, degrees)`, without the import of `scipy.stats`, which is slow."""
    return -float(special.stdtrit(degrees, TAIL))


def _is_nothing(standard_error: float, value: float) -> bool:
    """Whether all values are equal: nothing to draw from, and no evidence that there is no spread."""
    return standard_error <= 1e-12 * abs(value)


def _resampled_sums(columns: Array) -> Array:
    """Sums [columns, resamples] of `RESAMPLES` resamples, with replacement, of the rows of columns [rows, columns]."""
    num = len(columns)
    size = max(1, BATCH_ELEMENTS // num)
    drawn = (_draws(num, start, min(size, RESAMPLES - start)) for start in range(0, RESAMPLES, size))
    sums: Array = np.concatenate([[counts @ column for column in columns.T.copy()] for counts in drawn], axis=1)
    return sums


@lru_cache(maxsize=1)  # estimates come in series over the same number of clusters
def _draws(num: int, start: int, size: int) -> Array:
    """How often each of `num` rows is drawn [size, num] in the resamples from number `start` on; in column order, for
    fast products with a column."""
    drawn = np.random.default_rng((SEED, start)).integers(num, size=(size, num), dtype=np.int32)
    cells = drawn * size + np.arange(size, dtype=np.int32)[:, None]
    return np.bincount(cells.ravel(), minlength=size * num).reshape(num, size).astype(float).T


# -- Repetitions: timings and speeds -----------------------------------------------------------------------------


def median(values: Sequence[float]) -> Estimate:
    """The median with the exact interval between two order statistics.

    The number of values below the true median is binomial(n, 1/2) whatever their distribution, so the interval covers
    at least 95 % for skewed timings too. Below n = 6 not even the range of the values does (1 - 2 / 2**5 = 93.8 %), and
    there is no interval. Assumes independent values of one distribution: one per repetition, not one per step.
    """
    data = np.asarray(values, float)
    num = len(data)
    counts = accumulate(math.comb(num, below) for below in range(num // 2))
    rank = sum(at_most / 2**num < TAIL for at_most in counts)
    ordered = np.sort(data)
    low, high = (float(ordered[rank - 1]), float(ordered[-rank])) if rank else (None, None)
    method = "median, order-statistic interval"
    return Estimate(float(np.median(data)), low, high, num, method, _implied_error(low, high, num))


def hodges_lehmann_ratio(variant: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """The ratio of two independent samples of positive values: variant / baseline.

    The value is exp of the median of all differences of logarithms (Hodges and Lehmann 1963). The interval inverts
    the exact Mann-Whitney test (Moses; Hollander and Wolfe, Nonparametric Statistical Methods (1999), section 4.3): it
    lies between the k-th smallest and the k-th largest of those differences, and covers the true ratio in at
    least 95 % of cases whatever the distribution, as long as the two differ by a factor only. Four values a side
    have an interval (97.1 %), three and three have none. Takes memory for all pairs.

    Assumes independent values. Repetitions within one start of an engine are not: what a start does to the speed it
    does to all its repetitions; `ratio_of_groups` is for those.
    """
    above, below = _positive(variant), _positive(baseline)
    ratios = np.sort((above[:, None] / below).ravel())
    value = math.sqrt(ratios[(len(ratios) - 1) // 2] * ratios[len(ratios) // 2])
    num = min(len(above), len(below))
    method = "Hodges-Lehmann, exact Mann-Whitney interval"
    counts = _mann_whitney_counts(num, max(len(above), len(below)))
    arrangements = math.comb(len(above) + len(below), num)
    rank = sum(at_most / arrangements <= TAIL for at_most in accumulate(counts))
    if rank == 0:
        return Estimate(value, None, None, num, method)
    low, high = float(ratios[rank - 1]), float(ratios[-rank])
    return Estimate(value, low, high, num, method, _implied_error(low, high, num))


def ratio_of_groups(variant: Sequence[Sequence[float]], baseline: Sequence[Sequence[float]]) -> Estimate:
    """Like `hodges_lehmann_ratio`, for positive values that come in groups of correlated ones: variant / baseline.

    Args: the groups of each side (starts of an engine), each with its values (repetitions); at least two groups a
    side for an interval.

    Each group counts as one value, its mean logarithm; the interval is Student's t for two samples with common
    variance, on the logarithms, with as many degrees of freedom as there are groups less two, and the value is exp of
    the difference. Assumes that groups are independent and their means, as logarithms, normal with one variance.
    """
    sides = [np.array([np.log(_positive(group)).mean() for group in side]) for side in (variant, baseline)]
    above, below = sides
    log_ratio = float(above.mean() - below.mean())
    value = math.exp(log_ratio)
    num, degrees = min(map(len, sides)), len(above) + len(below) - 2
    method = "ratio of group means, Student's t on logarithms"
    if num < 2:
        return Estimate(value, None, None, num, method)
    variance = sum(float(((side - side.mean()) ** 2).sum()) for side in sides) / degrees
    log_error = math.sqrt(variance * (1 / len(above) + 1 / len(below)))
    if _is_nothing(log_error, 1.0):
        return Estimate(value, None, None, num, method)
    reach = student_quantile(degrees) * log_error
    low, high = math.exp(log_ratio - reach), math.exp(log_ratio + reach)
    return Estimate(value, low, high, num, method, value * log_error, degrees)


def _positive(values: Sequence[float]) -> Array:
    data = np.asarray(values, float)
    if data.ndim != 1 or not len(data) or not np.all(data > 0):
        raise ValueError("a ratio needs positive values on both sides")
    return data


@lru_cache
def _mann_whitney_counts(fewer: int, more: int) -> tuple[int, ...]:
    """In how many orders of two samples of these sizes the Mann-Whitney statistic is 0, 1, ... fewer * more: the
    coefficients of the product of (1 - q^(more + i)) / (1 - q^i) over i = 1 ... fewer (Mann and Whitney 1947)."""
    most = fewer * more
    counts = [1] + [0] * most
    for i in range(1, fewer + 1):
        for statistic in range(most, more + i - 1, -1):
            counts[statistic] -= counts[statistic - more - i]
        for statistic in range(i, most + 1):
            counts[statistic] += counts[statistic - i]
    return tuple(counts)


# -- Pairs of right and wrong ------------------------------------------------------------------------------------


def paired_share_difference(num_lost: int, num_won: int, num: int) -> Estimate:
    """The difference of two shares of the same `num` items: (num_won - num_lost) / num.

    Lost are the items that the baseline solves and the variant does not, won those the other way round; the rest does
    not matter. The interval is Tango's (Statistics in Medicine 17 (1998) 891-908): all differences that the score test,
    whose variance is the one under the tested difference, does not reject. So it has a length also where nothing
    flipped, unlike Wald's and the bootstrap's, and stays within -1 and 1. Newcombe's method 10 (1998), its usual rival,
    needs the items that both sides solve as well. Assumes independent items: repetitions of one document are not, and
    belong to `paired_mean_difference`.

    The standard error is the interval's half-width over Student's t, so that it is not zero without flips.
    """
    if not (num_lost >= 0 and num_won >= 0 and 0 < num >= num_lost + num_won):
        raise ValueError("flips must not be negative, nor more than the items")
    value = (num_won - num_lost) / num

    def score(difference: float, bound: float) -> float:
        # The share of lost items that is most likely under this difference: the root of a quadratic (Tango, section 2).
        b = (2 * num - num_won + num_lost) * difference - num_won - num_lost
        c = -num_lost * difference * (1 - difference)
        lost = (math.sqrt(max(0.0, b * b - 8 * num * c)) - b) / (4 * num)
        variance = num * (2 * lost + difference * (1 - difference))
        return num * (value - difference) - bound * math.sqrt(max(0.0, variance))

    # Without flips the value itself solves the equation too, so the search keeps off it.
    low = -1.0 if num_lost == num else root_between(partial(score, bound=_Z), -1.0, value - 1e-12)
    high = 1.0 if num_won == num else root_between(partial(score, bound=-_Z), value + 1e-12, 1.0)
    method = "paired shares, Tango's score interval"
    return Estimate(value, low, high, num, method, _implied_error(low, high, num))


# -- Several estimates together ----------------------------------------------------------------------------------


def pooled(estimates: Sequence[Estimate]) -> Estimate:
    """The unweighted mean of independent estimates, one verdict over several tasks.

    Its limits are put together from theirs, each side by itself, so that a skewed interval stays skewed and the mean of
    one is that one: the root of the sum of squares of the distances to their limits, over their number (MOVER: Zou and
    Donner, Statistics in Medicine 27 (2008) 1693-1702). So is its standard error from theirs, with the degrees of
    freedom of Welch and Satterthwaite (Biometrics Bulletin 2 (1946) 110-114). Where an estimate has no interval,
    neither has the mean. Assumes independent estimates; `num` adds up their units.
    """
    if not estimates:
        raise ValueError("a mean needs at least one estimate")
    value = math.fsum(one.value for one in estimates) / len(estimates)
    num = sum(one.num for one in estimates)
    method = f"mean of {len(estimates)}, limits by MOVER"
    bounds = [
        (one.value - one.low, one.high - one.value) for one in estimates if one.low is not None and one.high is not None
    ]
    if len(bounds) < len(estimates):
        return Estimate(value, None, None, num, method)
    below, above = (math.hypot(*side) / len(estimates) for side in zip(*bounds, strict=True))
    known = [error for one in estimates if (error := _error_of(one)) is not None]
    error = math.hypot(*known) / len(estimates)
    spread = math.fsum(error**4 / one.degrees_of_freedom for error, one in zip(known, estimates, strict=True))
    degrees = math.fsum(error**2 for error in known) ** 2 / spread if spread else None
    return Estimate(value, value - below, value + above, num, method, error, degrees)


def _error_of(estimate: Estimate) -> float | None:
    """The standard error of an estimate that has an interval."""
    if estimate.low is None or estimate.high is None:
        return None
    if estimate.standard_error is not None:
        return estimate.standard_error
    return _implied_error(estimate.low, estimate.high, estimate.num)


def _implied_error(low: float | None, high: float | None, num: int) -> float | None:
    """The standard error with which Student's t of `num` units would have given an interval of this length; None for
    one unit."""
    if low is None or high is None or num < 2:
        return None
    return (high - low) / 2 / student_quantile(num - 1)


# -- P-values, verdicts and sample sizes -------------------------------------------------------------------------


def paired_permutation(baseline: Sequence[float], variant: Sequence[float]) -> float:
    """Two-sided p-value of two sides having the same totals over clusters (both [clusters]), by exchanging the sides.

    If nothing but chance tells the sides of a pair apart, every pair may be exchanged: the p-value is the share of
    exchanges whose mean difference is at least as far from zero (Fisher 1935): of all 2^n, or of `RESAMPLES`
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
        n_resamples=RESAMPLES,
        batch=max(1, BATCH_ELEMENTS // max(1, len(difference))),
        rng=np.random.default_rng(SEED),
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
