"""Estimates against hand arithmetic, against scipy, and against a simulated truth."""

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from harness.record import stats
from harness.record.stats import Estimate, median, median_ratio, paired_mean_difference, paired_sum_ratio


def test_a_paired_difference_is_the_ratio_of_sums() -> None:
    estimate = paired_mean_difference([10.0, 20.0, 40.0], [11.0, 23.0, 42.0], [5, 10, 15])
    assert estimate.value == pytest.approx((1 + 3 + 2) / 30)
    assert estimate.num == 3


def test_the_interval_of_a_paired_difference_is_scipys() -> None:
    rng = np.random.default_rng(7)
    weights = rng.integers(100, 512, 40).astype(float)
    base = rng.normal(1000, 100, 40)
    difference = 0.02 * weights + rng.normal(0, 1, 40)
    estimate = paired_mean_difference(base.tolist(), (base + difference).tolist(), weights.tolist())
    reference = scipy_stats.bootstrap(
        (difference, weights),
        lambda d, w, axis: d.sum(axis=axis) / w.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=9999,
        method="percentile",
        rng=np.random.default_rng(3),  # another seed: equal up to the bootstrap's own noise
    )
    assert estimate.standard_error == pytest.approx(reference.standard_error, rel=0.05)
    width = reference.confidence_interval.high - reference.confidence_interval.low
    assert estimate.low == pytest.approx(reference.confidence_interval.low, abs=0.05 * width)
    assert estimate.high == pytest.approx(reference.confidence_interval.high, abs=0.05 * width)


def test_the_standard_error_of_equal_clusters_is_the_textbooks() -> None:
    difference = np.random.default_rng(5).normal(0.02, 0.01, 200)
    estimate = paired_mean_difference([0.0] * 200, difference.tolist(), [1.0] * 200)
    assert estimate.standard_error == pytest.approx(difference.std() / math.sqrt(200), rel=0.03)
    assert estimate.standard_errors_from_zero == pytest.approx(estimate.value / (estimate.standard_error or 1))


def test_pairing_removes_what_both_sides_share() -> None:
    rng = np.random.default_rng(11)
    shared = rng.normal(1000, 100, 100)
    estimate = paired_mean_difference(shared.tolist(), (shared + 1).tolist(), [500.0] * 100)
    assert estimate.low == pytest.approx(0.002) and estimate.high == pytest.approx(0.002)


def test_a_model_against_itself_differs_by_exactly_zero() -> None:
    values = np.random.default_rng(0).normal(1000, 100, 30).tolist()
    estimate = paired_mean_difference(values, values, [500.0] * 30)
    assert (estimate.value, estimate.low, estimate.high) == (0, 0, 0)
    assert estimate.standard_errors_from_zero is None


def test_one_cluster_has_no_interval() -> None:
    estimate = paired_mean_difference([1.0], [2.0], [4.0])
    assert (estimate.value, estimate.low, estimate.high, estimate.standard_error) == (0.25, None, None, None)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, -1.0]])
def test_weights_must_match_and_be_positive(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="positive weights"):
        paired_mean_difference([1.0, 2.0], [1.0, 2.0], weights)


def test_the_same_data_give_the_same_interval_in_any_run() -> None:
    data = [0.1, 0.5, 0.2, 0.9, 0.3, 0.7]
    assert paired_mean_difference([0.0] * 6, data, [1.0] * 6) == paired_mean_difference([0.0] * 6, data, [1.0] * 6)


def test_a_ratio_of_sums_is_no_mean_of_ratios() -> None:
    estimate = paired_sum_ratio([1.0, 9.0, 10.0], [2.0, 12.0, 11.0])
    assert estimate.value == pytest.approx(20 / 25)
    assert estimate.num == 3


def test_the_interval_of_a_ratio_of_sums_is_scipys() -> None:
    rng = np.random.default_rng(8)
    base = np.exp(rng.normal(0, 0.7, 60))
    above = base * rng.normal(0.7, 0.1, 60)
    estimate = paired_sum_ratio(above.tolist(), base.tolist())
    reference = scipy_stats.bootstrap(
        (above, base),
        lambda a, b, axis: a.sum(axis=axis) / b.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=9999,
        method="percentile",
        rng=np.random.default_rng(3),  # another seed: equal up to the bootstrap's own noise
    )
    assert estimate.standard_error == pytest.approx(reference.standard_error, rel=0.05)
    width = reference.confidence_interval.high - reference.confidence_interval.low
    assert estimate.low == pytest.approx(reference.confidence_interval.low, abs=0.05 * width)
    assert estimate.high == pytest.approx(reference.confidence_interval.high, abs=0.05 * width)


def test_the_standard_error_of_a_ratio_of_sums_is_cochrans() -> None:
    rng = np.random.default_rng(9)
    base = rng.uniform(1, 3, 400)
    above = 0.8 * base + rng.normal(0, 0.1, 400)
    estimate = paired_sum_ratio(above.tolist(), base.tolist())
    # Cochran, Sampling Techniques, equation 6.5: the spread of the residuals over the mean of the divisor.
    residuals = above - estimate.value * base
    assert estimate.standard_error == pytest.approx(residuals.std(ddof=1) / base.mean() / math.sqrt(400), rel=0.05)


def test_a_variant_with_half_of_everything_has_exactly_half() -> None:
    base = np.exp(np.random.default_rng(10).normal(0, 1, 30))
    estimate = paired_sum_ratio((base / 2).tolist(), base.tolist())
    assert estimate.low == pytest.approx(0.5) and estimate.high == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("variant", "baseline"), [([1.0], [1.0, 2.0]), ([1.0, -1.0], [1.0, 1.0]), ([1.0, 1.0], [0.0, 0.0])]
)
def test_totals_of_a_ratio_must_match_and_not_be_negative(variant: list[float], baseline: list[float]) -> None:
    with pytest.raises(ValueError, match="not negative"):
        paired_sum_ratio(variant, baseline)


@pytest.mark.parametrize(("variant", "baseline"), [([1.0], [2.0]), ([1.0, 0.0], [2.0, 0.0])])
def test_one_cluster_has_no_interval_of_a_ratio(variant: list[float], baseline: list[float]) -> None:
    estimate = paired_sum_ratio(variant, baseline)
    assert (estimate.value, estimate.low, estimate.high) == (0.5, None, None)


@pytest.mark.parametrize(
    ("num", "low", "high"),
    # The ranks of the 95 % interval for a median: Conover (1999), table of the binomial with p = 1/2.
    [(6, 1, 6), (7, 1, 7), (8, 1, 8), (9, 2, 8), (10, 2, 9), (15, 4, 12), (20, 6, 15)],
)
def test_the_medians_interval_is_between_the_tabled_ranks(num: int, low: int, high: int) -> None:
    values = [float(value) for value in range(1, num + 1)]
    assert median(values) == Estimate((num + 1) / 2, low, high, num, "median, order-statistic interval")


@pytest.mark.parametrize("num", range(1, stats.MEDIAN_MIN))
def test_a_median_of_too_few_values_has_no_interval(num: int) -> None:
    estimate = median([1.0] * num)
    assert (estimate.value, estimate.low, estimate.high, estimate.num) == (1, None, None, num)


def test_a_ratio_of_medians_is_the_variants_over_the_baselines() -> None:
    estimate = median_ratio([1.0, 2.0, 3.0, 4.0, 5.0, 60.0], [2.0, 4.0, 6.0, 8.0, 10.0, 120.0])
    assert estimate.value == pytest.approx(0.5) and estimate.num == 6
    assert estimate.low is not None and estimate.high is not None and estimate.low < 0.5 < estimate.high


def test_a_ratio_of_too_few_repetitions_has_no_interval() -> None:
    estimate = median_ratio([1.0] * 5, [2.0] * 20)
    assert (estimate.value, estimate.low, estimate.high, estimate.num) == (0.5, None, None, 5)


# A simulated truth. Each share below is of 300 intervals, so its own standard error is about 1.3 points; the bounds are
# what the docstrings promise, less three of those.


def coverage(hits: list[bool]) -> float:
    return sum(hits) / len(hits)


def covers(estimate: Estimate, truth: float) -> bool:
    return estimate.low is not None and estimate.high is not None and estimate.low <= truth <= estimate.high


@pytest.fixture
def fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "RESAMPLES", 999)


@pytest.mark.parametrize(("num", "least"), [(10, 0.85), (200, 0.91)])
def test_the_paired_interval_covers_the_truth(fewer_resamples: None, num: int, least: float) -> None:
    rng = np.random.default_rng(1)
    hits = []
    for _ in range(300):
        # Tokens of a window share a random effect, and windows have different lengths, as a text's last one has.
        weights = rng.integers(300, 512, num)
        difference = weights * rng.normal(0.02, 0.01, num) + np.sqrt(weights) * rng.normal(0, 0.05, num)
        base = rng.normal(3, 0.5, num) * weights
        estimate = paired_mean_difference(base.tolist(), (base + difference).tolist(), weights.tolist())
        hits.append(covers(estimate, 0.02))
    assert least <= coverage(hits) <= 0.99


def test_the_ratio_of_sums_interval_covers_the_truth(fewer_resamples: None) -> None:
    rng = np.random.default_rng(4)
    hits = []
    for _ in range(300):
        base = np.exp(rng.normal(0, 0.5, 60))  # windows differ in how hard they are, for both sides alike
        above = base * np.exp(rng.normal(math.log(0.7) - 0.02, 0.2, 60))
        hits.append(covers(paired_sum_ratio(above.tolist(), base.tolist()), 0.7))
    assert 0.90 <= coverage(hits) <= 0.99


@pytest.mark.parametrize("num", [6, 10, 25])
def test_the_medians_interval_covers_the_truth_of_skewed_timings(num: int) -> None:
    rng = np.random.default_rng(2)
    hits = [covers(median(np.exp(rng.normal(0, 0.3, num)).tolist()), 1.0) for _ in range(300)]
    assert coverage(hits) >= 0.95 - 0.04


@pytest.mark.parametrize("num", [6, 12])
def test_the_ratios_interval_covers_the_truth_of_skewed_timings(fewer_resamples: None, num: int) -> None:
    rng = np.random.default_rng(3)
    hits = []
    for _ in range(300):
        variant, base = np.exp(rng.normal(0, 0.1, num)) * 0.9, np.exp(rng.normal(0, 0.1, num))
        hits.append(covers(median_ratio(variant.tolist(), base.tolist()), 0.9))
    assert coverage(hits) >= 0.95 - 0.04
