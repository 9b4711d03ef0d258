"""Estimates against hand arithmetic, against scipy, and against a simulated truth."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize
from scipy import stats as scipy_stats

from harness.record import stats
from harness.record.stats import (
    Estimate,
    hodges_lehmann_ratio,
    holm,
    mcnemar,
    median,
    num_needed,
    p_above,
    paired_mean_difference,
    paired_permutation,
    paired_share_difference,
    paired_sum_ratio,
    pooled,
    ratio_of_groups,
    weighted_mean,
)
from studies.simulation.planning import detectable_margin, equivalence_p, non_inferiority_p, num_for_margin


def expanded_level(num: int) -> float:
    """The level of a percentile interval that Hesterberg (2015), section 5.3, takes for one of 95 %."""
    student = scipy_stats.t.ppf(0.975, num - 1)
    return float(1 - 2 * scipy_stats.norm.cdf(-math.sqrt(num / (num - 1)) * student))


# -- Clusters ----------------------------------------------------------------------------------------------------


def test_a_paired_difference_is_the_ratio_of_sums() -> None:
    estimate = paired_mean_difference([10.0, 20.0, 40.0], [11.0, 23.0, 42.0], [5, 10, 15])
    assert estimate.value == pytest.approx((1 + 3 + 2) / 30)
    assert estimate.num == 3


def test_the_interval_of_a_paired_difference_is_scipys_percentile_interval_at_the_expanded_level() -> None:
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
        confidence_level=expanded_level(40),
        rng=np.random.default_rng(3),  # another seed: equal up to the bootstrap's own noise
    )
    assert estimate.standard_error == pytest.approx(reference.standard_error * math.sqrt(40 / 39), rel=0.05)
    width = reference.confidence_interval.high - reference.confidence_interval.low
    assert estimate.low == pytest.approx(reference.confidence_interval.low, abs=0.05 * width)
    assert estimate.high == pytest.approx(reference.confidence_interval.high, abs=0.05 * width)


@pytest.mark.parametrize("num", [2, 3, 5, 8])
def test_the_interval_of_few_clusters_is_no_shorter_than_students(num: int) -> None:
    data = np.random.default_rng(num).normal(0, 1, num)
    estimate = weighted_mean(data.tolist(), [1.0] * num)
    student = scipy_stats.ttest_1samp(data, 0).confidence_interval(0.95)
    assert estimate.low is not None and estimate.high is not None
    assert estimate.low <= student.low + 0.05 * (student.high - student.low)
    assert estimate.high >= student.high - 0.05 * (student.high - student.low)
    assert estimate.standard_error == pytest.approx(data.std(ddof=1) / math.sqrt(num), rel=0.05)


def test_a_weighted_mean_is_a_difference_to_nothing() -> None:
    totals, weights = [3.0, 8.0, 1.0, 4.0], [1.0, 2.0, 1.0, 3.0]
    mean = weighted_mean(totals, weights)
    assert mean.value == pytest.approx(16 / 7)
    difference = paired_mean_difference([0.0] * 4, totals, weights)
    assert (mean.low, mean.high, mean.standard_error) == (difference.low, difference.high, difference.standard_error)


def test_blocks_are_clusters_of_neighbours() -> None:
    rng = np.random.default_rng(3)
    base, variant, weights = rng.normal(9, 1, 11), rng.normal(10, 1, 11), rng.uniform(1, 2, 11)
    blocked = paired_mean_difference(base.tolist(), variant.tolist(), weights.tolist(), block=4)
    parts = [slice(0, 4), slice(4, 8), slice(8, 11)]
    by_hand = paired_mean_difference(
        *([float(side[part].sum()) for part in parts] for side in (base, variant, weights))
    )
    assert (blocked.num, blocked.degrees, by_hand.num, by_hand.degrees) == (11, 2, 3, None)
    assert blocked.value == pytest.approx(by_hand.value)
    assert (blocked.low, blocked.high) == (pytest.approx(by_hand.low), pytest.approx(by_hand.high))


@pytest.mark.parametrize("num", [1, 11, 24, 100, 215, 581])
def test_blocks_are_twelve_or_more_and_fewer_than_twice_as_many(num: int) -> None:
    num_blocks = math.ceil(num / stats.block_length(num))
    assert min(num, 12) <= num_blocks < 24


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=8), st.floats(-100, 100), st.floats(0.1, 10))
def test_an_interval_moves_and_stretches_with_its_data(data: list[float], shift: float, scale: float) -> None:
    weights = [1.0] * len(data)
    one = weighted_mean(data, weights)
    other = weighted_mean([scale * value + shift for value in data], weights)
    for before, after in ((one.value, other.value), (one.low, other.low), (one.high, other.high)):
        if before is None or after is None:  # what is equal, or nearly, has no interval
            assert max(data) - min(data) < 1e-6
            continue
        assert after == pytest.approx(scale * before + shift, rel=1e-6, abs=1e-6)


def test_many_clusters_are_drawn_in_parts_and_come_to_the_textbooks_standard_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stats, "BATCH_ELEMENTS", 1 << 16)
    data = np.random.default_rng(6).normal(0, 1, 300)
    estimate = weighted_mean(data.tolist(), [1.0] * 300)
    assert estimate.standard_error == pytest.approx(data.std(ddof=1) / math.sqrt(300), rel=0.03)


@pytest.mark.parametrize("num", [6, 10, 40])
def test_the_permutation_test_is_the_share_of_exchanges_at_least_as_far_out(num: int) -> None:
    rng = np.random.default_rng(num)
    base, difference = rng.normal(0, 5, num), rng.normal(0.3, 1, num)
    p_value = paired_permutation(base.tolist(), (base + difference).tolist())
    if num <= 10:
        signs = np.array(list(itertools.product((1, -1), repeat=num)))
        exact = np.mean(np.abs(signs @ difference) >= abs(difference.sum()) - 1e-9)
        assert p_value == pytest.approx(float(exact))
    else:  # nearly normal by then
        assert p_value == pytest.approx(float(scipy_stats.ttest_1samp(difference, 0).pvalue), abs=0.02)


def test_sides_that_are_equal_have_a_permutation_p_of_one() -> None:
    assert paired_permutation([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == 1


def test_the_standard_error_of_equal_clusters_is_the_textbooks() -> None:
    difference = np.random.default_rng(5).normal(0.02, 0.01, 200)
    estimate = paired_mean_difference([0.0] * 200, difference.tolist(), [1.0] * 200)
    assert estimate.standard_error == pytest.approx(difference.std(ddof=1) / math.sqrt(200), rel=0.03)
    assert estimate.standard_errors_from_zero == pytest.approx(estimate.value / (estimate.standard_error or 1))


def test_pairing_removes_what_both_sides_share() -> None:
    rng = np.random.default_rng(11)
    shared = rng.normal(1000, 100, 100)
    estimate = paired_mean_difference(shared.tolist(), (shared + rng.normal(1, 0.01, 100)).tolist(), [500.0] * 100)
    assert estimate.low == pytest.approx(0.002, abs=1e-5) and estimate.high == pytest.approx(0.002, abs=1e-5)


def test_a_model_against_itself_differs_by_exactly_zero_and_shows_no_spread_to_draw_from() -> None:
    values = np.random.default_rng(0).normal(1000, 100, 30).tolist()
    estimate = paired_mean_difference(values, values, [500.0] * 30)
    assert (estimate.value, estimate.low, estimate.high) == (0, None, None)
    assert estimate.standard_errors_from_zero is None
    assert ratio_of_groups([[2.0], [2.0]], [[4.0], [4.0]]).low is None


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


def test_the_interval_of_a_ratio_of_sums_is_scipys_at_the_expanded_level() -> None:
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
        confidence_level=expanded_level(60),
        rng=np.random.default_rng(3),  # another seed: equal up to the bootstrap's own noise
    )
    assert estimate.standard_error == pytest.approx(reference.standard_error * math.sqrt(60 / 59), rel=0.05)
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
    assert estimate.value == pytest.approx(0.5) and (estimate.low, estimate.high) == (None, None)


@pytest.mark.parametrize(
    ("variant", "baseline"), [([1.0], [1.0, 2.0]), ([1.0, -1.0], [1.0, 1.0]), ([1.0, 1.0], [0.0, 0.0])]
)
def test_totals_of_a_ratio_must_match_and_not_be_negative(variant: list[float], baseline: list[float]) -> None:
    with pytest.raises(ValueError, match="not negative"):
        paired_sum_ratio(variant, baseline)


@pytest.mark.parametrize(("variant", "baseline"), [([1.0], [2.0]), ([1.0, 0.0], [2.0, 0.0])])
def test_a_ratio_whose_resamples_may_divide_by_nothing_has_no_interval(
    variant: list[float], baseline: list[float]
) -> None:
    estimate = paired_sum_ratio(variant, baseline)
    assert (estimate.value, estimate.low, estimate.high) == (0.5, None, None)


@pytest.mark.parametrize(
    ("num", "low", "high"),
    # The ranks of the 95 % interval for a median: Conover (1999), table of the binomial with p = 1/2.
    [(6, 1, 6), (7, 1, 7), (8, 1, 8), (9, 2, 8), (10, 2, 9), (15, 4, 12), (20, 6, 15)],
)
def test_the_medians_interval_is_between_the_tabled_ranks(num: int, low: int, high: int) -> None:
    estimate = median([float(value) for value in range(1, num + 1)])
    assert (estimate.value, estimate.low, estimate.high, estimate.num) == ((num + 1) / 2, low, high, num)


@pytest.mark.parametrize("num", range(1, 6))
def test_a_median_of_too_few_values_has_no_interval(num: int) -> None:
    estimate = median([1.0] * num)
    assert (estimate.value, estimate.low, estimate.high, estimate.num) == (1, None, None, num)


speeds = st.lists(st.floats(0.1, 1000), min_size=1, max_size=7)


@given(speeds, speeds)
def test_a_speed_ratio_is_the_reciprocal_of_the_other_way_round(variant: list[float], baseline: list[float]) -> None:
    one, other = hodges_lehmann_ratio(variant, baseline), hodges_lehmann_ratio(baseline, variant)
    assert one.value == pytest.approx(1 / other.value)
    assert (one.low is None) == (other.high is None)
    if one.low is not None and one.high is not None and other.low is not None and other.high is not None:
        assert (one.low, one.high) == (pytest.approx(1 / other.high), pytest.approx(1 / other.low))
        assert one.low <= one.value <= one.high


def test_a_speed_ratio_is_the_median_of_all_ratios() -> None:
    estimate = hodges_lehmann_ratio([1.0, 2.0, 9.0], [1.0, 4.0, 4.0])
    assert estimate.value == pytest.approx(1)  # the fifth of 0.25 0.25 0.5 0.5 1 2 2.25 2.25 9


@pytest.mark.parametrize(("num", "other"), [(4, 4), (5, 5), (3, 5), (6, 9), (10, 10)])
def test_the_interval_of_a_speed_ratio_holds_what_the_exact_mann_whitney_test_does_not_reject(
    num: int, other: int
) -> None:
    rng = np.random.default_rng(num + other)
    variant, baseline = np.exp(rng.normal(0.1, 0.2, num)), np.exp(rng.normal(0, 0.2, other))
    estimate = hodges_lehmann_ratio(variant.tolist(), baseline.tolist())
    assert estimate.low is not None and estimate.high is not None

    def p_value(ratio: float) -> float:
        return float(scipy_stats.mannwhitneyu(variant / ratio, baseline, method="exact").pvalue)

    for bound, outside in ((estimate.low, 0.999), (estimate.high, 1.001)):
        assert p_value(bound * outside) <= 0.05 < p_value(bound / outside)


@pytest.mark.parametrize(("num", "other"), [(3, 3), (2, 7), (1, 30)])
def test_a_speed_ratio_that_no_test_could_reject_has_no_interval(num: int, other: int) -> None:
    estimate = hodges_lehmann_ratio([1.0] * num, [2.0] * other)
    assert (estimate.value, estimate.low, estimate.high, estimate.num) == (0.5, None, None, num)
    assert estimate.standard_error is None
    # The most extreme order of the two samples is one of this many, and its mirror another.
    assert 2 / math.comb(num + other, num) > 0.05


def test_the_orders_of_two_samples_are_scipys() -> None:
    counts = stats._mann_whitney_counts(4, 6)
    assert sum(counts) == math.comb(10, 4)
    for statistic in range(25):
        # Four values with `statistic` pairs in which the one of the four is the larger.
        full, rest = divmod(statistic, 6)
        ours = [9.0] * full + [rest - 0.5] * (full < 4) + [-1.0] * (3 - full)
        expected = scipy_stats.mannwhitneyu(
            np.array(ours) + 1e-3 * np.arange(4), np.arange(6.0), alternative="less", method="exact"
        )
        assert expected.statistic == statistic
        assert sum(counts[: statistic + 1]) / math.comb(10, 4) == pytest.approx(expected.pvalue)


@pytest.mark.parametrize("values", [[], [1.0, 0.0], [1.0, -2.0], [math.nan]])
def test_speeds_must_be_positive(values: list[float]) -> None:
    with pytest.raises(ValueError, match="positive values"):
        hodges_lehmann_ratio(values, [1.0])
    with pytest.raises(ValueError, match="positive values"):
        hodges_lehmann_ratio([1.0], values)


def test_the_ratio_of_groups_is_students_test_of_the_groups_mean_logarithms() -> None:
    rng = np.random.default_rng(12)
    variant, baseline = np.exp(rng.normal(0.1, 0.2, (3, 5))), np.exp(rng.normal(0, 0.2, (4, 5)))
    estimate = ratio_of_groups(variant.tolist(), baseline.tolist())
    reference = scipy_stats.ttest_ind(np.log(variant).mean(axis=1), np.log(baseline).mean(axis=1))
    interval = reference.confidence_interval(0.95)
    assert (estimate.low, estimate.high) == (
        pytest.approx(math.exp(interval.low)),
        pytest.approx(math.exp(interval.high)),
    )
    assert estimate.degrees == reference.df and estimate.num == 3
    assert p_above(estimate, estimate.value) == pytest.approx(0.5)


def test_one_group_a_side_has_no_interval() -> None:
    estimate = ratio_of_groups([[1.0, 2.0, 4.0]], [[2.0, 4.0, 8.0]])
    assert (estimate.value, estimate.low, estimate.high) == (pytest.approx(0.5), None, None)


# -- Pairs of right and wrong ------------------------------------------------------------------------------------


def test_mcnemars_p_is_the_binomials_two_tails() -> None:
    assert mcnemar(10, 2) == pytest.approx(2 * (1 + 12 + 66) / 2**12)
    assert mcnemar(2, 10) == mcnemar(10, 2)
    assert mcnemar(0, 0) == mcnemar(7, 7) == 1


flips = st.integers(1, 200).flatmap(
    lambda num: st.integers(0, num).flatmap(
        lambda lost: st.tuples(st.just(lost), st.integers(0, num - lost), st.just(num))
    )
)


def test_the_paired_shares_interval_is_the_published_one() -> None:
    # Airway reactivity before and after stem cell transplantation, Fagerland, Lydersen and Laake, Stat. in Medicine
    # 33 (2014) 2850-2875: 7 and 1 of 21 change, Tango's interval is -0.517 to -0.026.
    estimate = paired_share_difference(7, 1, 21)
    assert estimate.value == pytest.approx(-6 / 21)
    assert estimate.low is not None and estimate.high is not None
    assert (round(estimate.low, 3), round(estimate.high, 3)) == (-0.517, -0.026)


@given(flips)
def test_the_paired_shares_bounds_are_where_the_score_test_is_undecided(case: tuple[int, int, int]) -> None:
    num_lost, num_won, num = case
    estimate = paired_share_difference(*case)

    def score(difference: float) -> float:
        """The score statistic, its lost share found by search instead of by Tango's formula."""

        def minus_log_likelihood(lost: float) -> float:
            shares = (lost, lost + difference, 1 - 2 * lost - difference)
            counts = (num_lost, num_won, num - num_lost - num_won)
            return -sum(n * math.log(max(share, 1e-300)) for n, share in zip(counts, shares, strict=True) if n)

        ends = (max(0.0, -difference), (1 - difference) / 2)
        lost = optimize.minimize_scalar(minus_log_likelihood, bounds=ends, method="bounded", options={"xatol": 1e-13}).x
        variance = num * (2 * lost + difference * (1 - difference))
        return float((num_won - num_lost - num * difference) / math.sqrt(variance))

    assert estimate.low is not None and estimate.high is not None and estimate.low < estimate.high
    for bound, expected in ((estimate.low, 1.95996), (estimate.high, -1.95996)):
        if abs(bound) != 1:
            assert score(bound) == pytest.approx(expected, rel=2e-3)


@given(flips)
def test_losing_is_winning_the_other_way_round(case: tuple[int, int, int]) -> None:
    num_lost, num_won, num = case
    one, other = paired_share_difference(num_lost, num_won, num), paired_share_difference(num_won, num_lost, num)
    assert one.value == -other.value
    assert one.low is not None and other.low is not None
    assert (one.low, one.high) == (pytest.approx(-(other.high or 0), abs=1e-9), pytest.approx(-other.low, abs=1e-9))


def test_items_of_which_none_flips_have_the_interval_of_wilson() -> None:
    # z^2 / (n + z^2) is also the upper bound of Wilson's interval for 0 of n.
    estimate = paired_share_difference(0, 0, 300)
    wilson = scipy_stats.binomtest(0, 300).proportion_ci(0.95, "wilson").high
    assert (estimate.value, estimate.low, estimate.high) == (0, pytest.approx(-wilson), pytest.approx(wilson))
    assert estimate.standard_error is not None and estimate.standard_error > 0


@pytest.mark.parametrize("case", [(-1, 0, 5), (3, 3, 5), (0, 0, 0)])
def test_flips_must_fit_the_items(case: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="flips"):
        paired_share_difference(*case)


@pytest.mark.parametrize(
    ("num", "flip_share", "points"),
    # The usual figures for GSM8K, IFEval, MMLU-Pro, GPQA Diamond and AIME.
    [(1319, 0.05, "1.5"), (541, 0.08, "3.0"), (12032, 0.10, "0.7"), (198, 0.15, "6.8"), (30, 0.25, "23")],
)
def test_detectable_margins_are_the_quoted_ones_at_one_sided_5_percent(
    num: int, flip_share: float, points: str
) -> None:
    found = 100 * detectable_margin(flip_share, num, alpha=0.05)
    assert f"{found:.{len(points.partition('.')[2])}f}" == points
    assert 100 * detectable_margin(flip_share, num) == pytest.approx(1.127 * found, rel=1e-3)


@given(st.floats(0.01, 0.5), st.floats(0.005, 0.2), st.floats(0.5, 0.95))
def test_the_items_for_a_margin_are_the_fewest_that_detect_it(flip_share: float, margin: float, power: float) -> None:
    num = num_for_margin(flip_share, margin, power)
    assert detectable_margin(flip_share, num, power) <= margin * (1 + 1e-9)
    assert num == 1 or detectable_margin(flip_share, num - 1, power) > margin


def test_the_power_of_a_margin_is_scipys() -> None:
    error = math.sqrt(0.1 / 500)
    margin = detectable_margin(0.1, 500, power=0.9)
    assert scipy_stats.norm(margin, error).sf(1.959964 * error) == pytest.approx(0.9)


# -- Verdicts ----------------------------------------------------------------------------------------------------


def estimate_of(data: np.ndarray) -> Estimate:
    """The textbook's mean, with Student's interval."""
    mean, error = float(data.mean()), float(data.std(ddof=1) / math.sqrt(len(data)))
    reach = float(scipy_stats.t.ppf(0.975, len(data) - 1)) * error
    return Estimate(mean, mean - reach, mean + reach, len(data), "textbook", error)


def test_p_above_is_students_one_sided_test() -> None:
    data = np.random.default_rng(1).normal(0.4, 1, 12)
    estimate = estimate_of(data)
    for bound in (-0.5, 0.0, 0.6):
        expected = scipy_stats.ttest_1samp(data, bound, alternative="greater").pvalue
        assert p_above(estimate, bound) == pytest.approx(expected)
        expected = scipy_stats.ttest_1samp(data, bound, alternative="less").pvalue
        assert non_inferiority_p(estimate, bound) == pytest.approx(expected)


def test_equivalence_is_both_one_sided_tests() -> None:
    data = np.random.default_rng(2).normal(0.1, 0.5, 40)
    below = scipy_stats.ttest_1samp(data, 0.3, alternative="less").pvalue
    above = scipy_stats.ttest_1samp(data, -0.3, alternative="greater").pvalue
    assert equivalence_p(estimate_of(data), 0.3) == pytest.approx(max(below, above))


def test_an_interval_and_its_p_agree() -> None:
    estimate = estimate_of(np.random.default_rng(3).normal(0, 1, 9))
    assert estimate.low is not None and estimate.high is not None
    assert p_above(estimate, estimate.low) == pytest.approx(0.025)
    assert non_inferiority_p(estimate, estimate.high) == pytest.approx(0.025)


def test_without_a_standard_error_there_is_no_p() -> None:
    estimate = Estimate(1.0, None, None, 1, "one")
    assert p_above(estimate, 0) is non_inferiority_p(estimate, 0) is equivalence_p(estimate, 1) is None


def test_certainty_has_a_p_of_zero_or_one() -> None:
    certain = Estimate(0.0, 0.0, 0.0, 5, "equal", 0.0)
    assert (p_above(certain, -0.1), p_above(certain, 0.0), p_above(certain, 0.1)) == (0, 1, 1)
    assert (non_inferiority_p(certain, 0.1), non_inferiority_p(certain, 0.0)) == (0, 1)
    assert equivalence_p(certain, 0.1) == 0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holms_p_values_are_those_of_the_closed_test(p_values: list[float]) -> None:
    """Holm closes Bonferroni: a p-value's is the largest of Bonferroni's over all sets that it belongs to."""
    everything = range(len(p_values))
    sets = [chosen for size in everything for chosen in itertools.combinations(everything, size + 1)]
    bonferroni = {chosen: min(1.0, len(chosen) * min(p_values[one] for one in chosen)) for chosen in sets}
    expected = [max(p for chosen, p in bonferroni.items() if one in chosen) for one in everything]
    assert holm(p_values) == pytest.approx(expected)


def test_the_pooled_mean_of_one_is_that_one_skewed_as_it_is_and_its_p_agrees_with_its_interval() -> None:
    one = paired_share_difference(6, 0, 100)
    alone = pooled([one])
    assert (alone.value, alone.low, alone.high) == pytest.approx((one.value, one.low, one.high))
    assert one.low is not None and one.high is not None
    assert p_above(one, one.low) == pytest.approx(0.025) and non_inferiority_p(one, one.high) == pytest.approx(0.025)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx((0.03, 0.06, 0.06))
    assert holm([]) == ()


def test_a_pooled_mean_has_welchs_standard_error_and_limits_put_together_side_by_side() -> None:
    rng = np.random.default_rng(4)
    one, other = rng.normal(0, 1, 8), rng.normal(0, 3, 20)
    estimate = pooled([estimate_of(one), estimate_of(-other)])
    # The mean of a and -b is half the difference of a and b.
    welch = scipy_stats.ttest_ind(one, other, equal_var=False)
    assert estimate.value == pytest.approx((one.mean() - other.mean()) / 2)
    halves = [scipy_stats.t.ppf(0.975, len(x) - 1) * scipy_stats.sem(x) for x in (one, other)]
    reach = math.hypot(*halves) / 2
    assert (estimate.low, estimate.high) == (
        pytest.approx(estimate.value - reach, rel=1e-6),
        pytest.approx(estimate.value + reach, rel=1e-6),
    )
    assert estimate.standard_error == pytest.approx(math.hypot(scipy_stats.sem(one), scipy_stats.sem(other)) / 2)
    assert estimate.degrees == pytest.approx(welch.df) and estimate.num == 28


def test_pooling_takes_a_missing_standard_error_from_the_interval() -> None:
    whole = estimate_of(np.random.default_rng(5).normal(0, 1, 10))
    bare = Estimate(whole.value, whole.low, whole.high, whole.num, whole.method)
    assert pooled([bare, whole]) == pooled([whole, whole])


def test_what_has_no_interval_takes_it_from_the_pool() -> None:
    whole = estimate_of(np.random.default_rng(5).normal(0, 1, 10))
    none = Estimate(1.0, None, None, 30, "equal", 0.0)
    estimate = pooled([whole, none])
    assert (estimate.value, estimate.low, estimate.high) == (pytest.approx((whole.value + 1) / 2), None, None)
    with pytest.raises(ValueError, match="at least one"):
        pooled([])


def test_four_times_as_many_halve_an_interval() -> None:
    estimate = Estimate(1.0, 0.6, 1.4, 100, "any", 0.2)
    assert num_needed(estimate, 1.2) == num_needed(estimate, 0.8) == 400
    assert num_needed(estimate, 2.0) == 16  # it is clear already
    assert num_needed(estimate, 1.0) is None
    assert num_needed(Estimate(1.0, None, None, 1, "one"), 2.0) is None


def test_the_half_of_an_uneven_interval_that_points_to_the_margin_decides() -> None:
    estimate = Estimate(1.0, 0.9, 1.4, 100, "any", 0.2)
    assert (num_needed(estimate, 1.2), num_needed(estimate, 0.8)) == (400, 25)


# -- A simulated truth -------------------------------------------------------------------------------------------

# A simulated truth. Each share below is of 300 intervals, so its own standard error is about 1.3 points; the bounds are
# what the docstrings promise, less three of those.


def coverage(hits: list[bool]) -> float:
    return sum(hits) / len(hits)


def covers(estimate: Estimate, truth: float) -> bool:
    return estimate.low is not None and estimate.high is not None and estimate.low <= truth <= estimate.high


@pytest.fixture
def fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "RESAMPLES", 999)


@pytest.mark.parametrize(("num", "least"), [(3, 0.90), (10, 0.90), (200, 0.91)])
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


@pytest.mark.parametrize("num", [4, 5, 10])
def test_the_interval_of_a_speed_ratio_covers_the_truth_of_skewed_timings(num: int) -> None:
    rng = np.random.default_rng(3)
    hits = []
    for _ in range(300):
        variant, base = 0.9 * (1 + rng.exponential(0.1, num)), 1 + rng.exponential(0.1, num)
        hits.append(covers(hodges_lehmann_ratio(variant.tolist(), base.tolist()), 0.9))
    assert coverage(hits) >= 0.95 - 0.04


def test_blocks_cover_the_truth_of_correlated_neighbours_where_windows_alone_do_not(fewer_resamples: None) -> None:
    rng = np.random.default_rng(5)
    alone, blocked = [], []
    for _ in range(300):
        data = (np.repeat(rng.normal(0, 1, 25), 8) + rng.normal(0, 1, 200)).tolist()
        alone.append(covers(weighted_mean(data, [1.0] * 200), 0))
        blocked.append(covers(weighted_mean(data, [1.0] * 200, block=16), 0))
    assert coverage(alone) < 0.75
    assert coverage(blocked) >= 0.90
