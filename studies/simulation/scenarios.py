"""Data sets with a known truth, what the statistics make of each, and the count of how often they are right.

A scenario draws a data set and hands it to a function of `harness.record.stats`, which returns an interval, which holds
the truth or does not, or a decision. Scenarios on the same data and number of units draw the same data sets.

**Running text.** Windows of the embedded text, which is made of independent sentences, have no autocorrelation. Windows
of an encyclopaedia have, because an article is easy or hard as a whole. That was measured with the dense embedded model
and its two variants in float32, on all 1,557 windows of 512 tokens of WikiText-2's test text, and on 519 groups of
three windows, which are as long as windows of a real vocabulary. The loss to the source has autocorrelations of 0.06 to
0.17 at lag 1, 0.00 to 0.08 at lag 2 and at most 0.04 beyond; the mean of 16 neighbours varies 1.2 to 1.9 times as much
as the mean of 16 independent windows. The divergence has 0.11 to 0.19, 0.10 to 0.12, 0.03 to 0.12, 0.02 to 0.07 and
-0.01 to 0.08 at lags 1 to 5; its mean of 16 varies 1.8 to 2.4 times as much. The model here is an article effect that
has a share of the variance, over articles whose lengths are geometric with a mean of 9.4 windows (62 articles in 581
windows). A share of 0.05 gives 1.4 times for 16 neighbours, a share of 0.12 gives 2.0 times.
"""

import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from numpy.random import Generator
from scipy.stats import norm

from harness.progress import Progress
from harness.record import stats
from harness.record.stats import Estimate
from studies.simulation import planning
from studies.simulation.populations import Array, Flips, Populations, Windows

Goal = Literal["coverage", "false alarms", "power"]
Trial = Callable[[Generator], Estimate | bool]

LOSSES = "Losses over independent windows"
DIVERGENCES = "Divergences over independent windows"
TEXT = "Windows of running text"
ITEMS = "Items and documents"
REPETITIONS = "Independent repetitions"
STARTS = "Repetitions within starts"
DECISIONS = "Decisions"
POWERS = "Power"

COVERAGE = stats.LEVEL
ALARMS = 0.025
"""The level of a one-sided decision, such as a gate's."""
POWER = 0.8

ARTICLE_WINDOWS = 9.4
LOSS_SHARE = 0.05
DIVERGENCE_SHARE = 0.12
SPEED_RATIO = 0.95
MARGIN = 0.03


@dataclass(frozen=True)
class Scenario:
    """A function of the statistics on `num` units of `data`. `level` is the share of draws that the goal asks for,
    `truth` the value that an interval should hold (None where the trial decides)."""

    group: str
    data: str
    function: str
    num: int
    goal: Goal
    level: float
    trial: Trial
    truth: float | None = None
    spread: float | None = None
    """The spread of starts over the spread of repetitions within a start; None where there are no starts."""


@dataclass(frozen=True)
class Result:
    """How the draws of a scenario ended. The counts of an interval are `covered`, `truth_below` it, `truth_above` it
    and `without` an interval; those of a decision are `yes` and `no`."""

    group: str
    data: str
    function: str
    num: int
    goal: Goal
    level: float
    spread: float | None
    counts: dict[str, int]

    @property
    def num_draws(self) -> int:
        """The number of draws."""
        return sum(self.counts.values())

    @property
    def num_right(self) -> int:
        """The number of draws whose interval held the truth, or whose decision was yes."""
        return self.counts.get("covered" if self.goal == "coverage" else "yes", 0)


def simulate(scenarios: Sequence[Scenario], num_draws: int, seed: int, progress: Progress) -> list[Result]:
    """The results of `num_draws` draws of each scenario; the same for the same seed, whatever other scenarios run."""
    results = []
    for done, one in enumerate(scenarios):
        progress(done, len(scenarios), "simulating", f"{one.data}, {one.function}, {one.num:,}")
        rng = np.random.default_rng([seed, zlib.crc32(f"{one.data} {one.num} {one.spread}".encode())])
        counts = Counter(_outcome(one, one.trial(rng)) for _ in range(num_draws))
        counted = {name: counts[name] for name in sorted(counts)}
        results.append(Result(one.group, one.data, one.function, one.num, one.goal, one.level, one.spread, counted))
    progress(len(scenarios), len(scenarios), "simulating")
    return results


def _outcome(scenario: Scenario, found: Estimate | bool) -> str:
    if isinstance(found, bool):
        return "yes" if found else "no"
    if found.low is None or found.high is None:
        return "without"
    assert scenario.truth is not None
    if found.low <= scenario.truth <= found.high:
        return "covered"
    return "truth_below" if scenario.truth < found.low else "truth_above"


def all_scenarios(populations: Populations) -> list[Scenario]:
    """The scenarios of the page, in its order."""
    return [
        *_independent_windows(populations),
        *_running_text(populations),
        *_items(populations),
        *_verdicts(populations),
        *_powers(),
        *_speeds(populations),
    ]


# -- Windows -----------------------------------------------------------------------------------------------------


def _independent_windows(populations: Populations) -> Iterator[Scenario]:

    def drawn(windows: Windows, num: int, rng: Generator) -> tuple[list[float], list[float]]:
        chosen = rng.integers(len(windows.above), size=num)
        return windows.above[chosen].tolist(), windows.below[chosen].tolist()

    def difference(windows: Windows, num: int, rng: Generator) -> Estimate:
        above, below = drawn(windows, num, rng)
        return stats.paired_mean_difference([0.0] * num, above, below)

    def mean(windows: Windows, num: int, rng: Generator) -> Estimate:
        return stats.weighted_mean(*drawn(windows, num, rng))

    def ratio(windows: Windows, num: int, rng: Generator) -> Estimate:
        return stats.paired_sum_ratio(*drawn(windows, num, rng))

    ratios = (populations.divergence_ratio,)
    for group, function, trial, chosen in (
        (LOSSES, "paired_mean_difference", difference, populations.losses),
        (DIVERGENCES, "weighted_mean", mean, (*populations.divergences, _long_tail())),
        (DIVERGENCES, "paired_sum_ratio", ratio, ratios),
    ):
        for windows in chosen:
            for num in (5, 10, 20, 60, 215):
                yield _coverage(group, windows.name, function, num, windows.truth, partial(trial, windows, num))


def _long_tail() -> Windows:
    """Divergences worse than those of the records: log-normal, with a standard deviation of 0.94 means and a skewness
    of 3.7."""
    quantiles = (np.arange(20_000) + 0.5) / 20_000
    divergences = np.exp(0.8 * norm.ppf(quantiles))
    return Windows("KL, made up, log-normal", 500 * 0.01 * divergences, np.full(len(divergences), 500.0))


def _running_text(populations: Populations) -> Iterator[Scenario]:
    """Intervals with and without blocks of neighbours."""

    def trial(windows: Windows, share: float, num: int, block: int, rng: Generator) -> Estimate:
        above, below = articles(windows, share, num, rng)
        return stats.weighted_mean(above.tolist(), below.tolist(), block)

    for windows, share in ((populations.losses[0], LOSS_SHARE), (populations.divergences[0], DIVERGENCE_SHARE)):
        for num in (60, 100, 215, 581):
            for block in (1, stats.block_length(num)):
                data, function = (
                    f"{windows.name}, articles {share:g}",
                    "weighted_mean, blocks" if block > 1 else "weighted_mean",
                )
                yield _coverage(TEXT, data, function, num, windows.truth, partial(trial, windows, share, num, block))
    for num in (60, 100, 215, 581):
        # What blocks cost where they are not needed.
        windows, block = populations.losses[0], stats.block_length(num)
        data, function = f"{windows.name}, articles 0", "weighted_mean, blocks"
        yield _coverage(TEXT, data, function, num, windows.truth, partial(trial, windows, 0.0, num, block))


def articles(windows: Windows, share: float, num: int, rng: Generator) -> tuple[Array, Array]:
    """Sums and weights of `num` neighbouring windows whose mean is that of `windows`. Articles have a `share` of their
    variance; windows drawn from `windows` have the rest."""
    chosen = rng.integers(len(windows.above), size=num)
    weights = windows.below[chosen]
    rates = windows.above / windows.below
    lengths = rng.geometric(1 / ARTICLE_WINDOWS, size=num)
    article = np.searchsorted(np.cumsum(lengths), np.arange(num), side="right")
    effect = rng.normal(size=num)[article] * rates.std()
    mixed = windows.truth + math.sqrt(share) * effect + math.sqrt(1 - share) * (rates[chosen] - windows.truth)
    return mixed * weights, weights


# -- Items -------------------------------------------------------------------------------------------------------


def _flipped(lost_share: float, won_share: float, num: int, rng: Generator) -> tuple[int, int]:
    lost, won, _ = rng.multinomial(num, (lost_share, won_share, 1 - lost_share - won_share))
    return int(lost), int(won)


def _loss(lost_share: float, won_share: float, num: int, rng: Generator) -> Estimate:
    """The loss of a share of solved items; positive is worse."""
    lost, won = _flipped(lost_share, won_share, num, rng)
    return stats.paired_share_difference(won, lost, num)


def _documents(populations: Populations, num: int, rng: Generator) -> tuple[list[float], list[float], list[float]]:
    base, variant = populations.repeated
    chosen = rng.integers(len(base), size=num)
    repetitions = float(base.shape[1])
    return base[chosen].sum(axis=1).tolist(), variant[chosen].sum(axis=1).tolist(), [repetitions] * num


def _items(populations: Populations) -> Iterator[Scenario]:

    def share(flips: Flips, num: int, rng: Generator) -> Estimate:
        return stats.paired_share_difference(*_flipped(flips.lost_share, flips.won_share, num, rng), num)

    for flips in populations.flips:
        for num in (30, 100, 198, 300, 1319):
            truth, trial = flips.won_share - flips.lost_share, partial(share, flips, num)
            yield _coverage(ITEMS, f"flips, {flips.name}", "paired_share_difference", num, truth, trial)

    def difference(num: int, rng: Generator) -> Estimate:
        return stats.paired_mean_difference(*_documents(populations, num, rng))

    base, variant = populations.repeated
    for num in (20, 50, 100, 300):
        truth = float((variant - base).mean())
        data = "documents, two answers each"
        yield _coverage(ITEMS, data, "paired_mean_difference", num, truth, partial(difference, num))

    tasks = (300, 198, 100, 541, 180)

    def pool(rng: Generator) -> Estimate:
        losses = [_loss(0.05 + 0.01 * step, 0.05, num, rng) for step, num in enumerate(tasks)]
        return stats.pooled(losses)

    yield _coverage(ITEMS, "five tasks of 100 to 541 items", "pooled", sum(tasks), 0.02, pool)


# -- Decisions ---------------------------------------------------------------------------------------------------


def _verdicts(populations: Populations) -> Iterator[Scenario]:
    """How often a decision is taken that must not be taken: the hypothesis holds, at its edge."""

    def changed(num: int, rng: Generator) -> bool:
        return stats.mcnemar(*_flipped(0.05, 0.05, num, rng)) <= 2 * ALARMS

    def exchanged(num: int, rng: Generator) -> bool:
        base, variant, _ = _documents(populations, num, rng)
        swap = rng.random(num) < 0.5
        one, other = np.where(swap, variant, base), np.where(swap, base, variant)
        return stats.paired_permutation(one.tolist(), other.tolist()) <= 2 * ALARMS

    def worse(num: int, rng: Generator) -> bool:
        p_value = stats.p_above(_loss(0.05, 0.05, num, rng), 0)
        return p_value is not None and p_value <= ALARMS

    def no_worse(num: int, rng: Generator) -> bool:
        p_value = planning.non_inferiority_p(_loss(0.05 + MARGIN, 0.05, num, rng), MARGIN)
        return p_value is not None and p_value <= ALARMS

    def equal(windows: Windows, num: int, rng: Generator) -> bool:
        chosen = rng.integers(len(windows.above), size=num)
        found = stats.weighted_mean(windows.above[chosen].tolist(), windows.below[chosen].tolist())
        p_value = planning.equivalence_p(found, abs(windows.truth))
        return p_value is not None and p_value <= ALARMS

    def any_of_seven(num: int, rng: Generator) -> bool:
        p_values = [stats.p_above(_loss(0.05, 0.05, num, rng), 0) for _ in range(7)]
        return min(stats.holm([1.0 if one is None else one for one in p_values])) <= ALARMS

    def alarm(data: str, function: str, num: int, level: float, trial: Callable[[int, Generator], bool]) -> Scenario:
        return Scenario(DECISIONS, data, f"{function} ≤ {level:g}", num, "false alarms", level, partial(trial, num))

    two_sided = 2 * ALARMS
    for num in (30, 198, 1319):
        items = "items, 10 % flip, none lost on the whole"
        yield alarm(items, "mcnemar", num, two_sided, changed)
        yield alarm(items, "p_above", num, ALARMS, worse)
        yield alarm("items, the loss is the margin of 3 points", "non_inferiority_p", num, ALARMS, no_worse)
        yield alarm("seven tasks of such items", "least of holm(p_above)", num, ALARMS, any_of_seven)
    for num in (20, 40):
        documents = "documents, two answers each, sides exchanged"
        yield alarm(documents, "paired_permutation", num, two_sided, exchanged)
    for windows in populations.losses[:2]:
        for num in (20, 60, 215):
            edge = f"{windows.name}, the loss is the margin"
            yield alarm(edge, "equivalence_p", num, ALARMS, partial(equal, windows))


def _powers() -> Iterator[Scenario]:
    """With the number of items that `num_for_margin` asks for: how often a variant that loses nothing is shown to lose
    less than the margin, and how often a loss of the margin is seen."""

    def shown(flip_share: float, num: int, rng: Generator) -> bool:
        found = _loss(flip_share / 2, flip_share / 2, num, rng)
        return found.high is not None and found.high <= MARGIN

    def seen(flip_share: float, num: int, rng: Generator) -> bool:
        found = _loss((flip_share + MARGIN) / 2, (flip_share - MARGIN) / 2, num, rng)
        return found.low is not None and found.low > 0

    for flip_share in (0.05, 0.1, 0.25):
        num = planning.num_for_margin(flip_share, MARGIN)
        flip = f"{100 * flip_share:g} % flip, margin {100 * MARGIN:g} points"
        for data, function, trial in (
            (f"{flip}, nothing lost", "interval below the margin", shown),
            (f"{flip}, the margin lost", "interval above zero", seen),
        ):
            yield Scenario(POWERS, data, function, num, "power", POWER, partial(trial, flip_share, num))


# -- Speeds ------------------------------------------------------------------------------------------------------


def _speeds(populations: Populations) -> Iterator[Scenario]:
    """Repetitions within starts: the noise of a repetition is drawn from the records, that of a start is normal."""
    speeds = populations.speeds

    def side(between: float, num_starts: int, num: int, ratio: float, rng: Generator) -> Array:
        starts = rng.normal(0, between, (num_starts, 1))
        drawn: Array = ratio * np.exp(starts + rng.choice(speeds.noise, (num_starts, num)))
        return drawn

    def both(between: float, num_starts: int, num: int, rng: Generator) -> tuple[Array, Array]:
        return side(between, num_starts, num, SPEED_RATIO, rng), side(between, num_starts, num, 1.0, rng)

    def alone(between: float, num_starts: int, num: int, rng: Generator) -> Estimate:
        variant, baseline = both(between, num_starts, num, rng)
        return stats.hodges_lehmann_ratio(variant.ravel().tolist(), baseline.ravel().tolist())

    def grouped(between: float, num_starts: int, num: int, rng: Generator) -> Estimate:
        variant, baseline = both(between, num_starts, num, rng)
        return stats.ratio_of_groups(variant.tolist(), baseline.tolist())

    def middle(num: int, rng: Generator) -> Estimate:
        return stats.median(side(0.0, 1, num, 1.0, rng).ravel().tolist())

    truth = float(np.exp(np.median(speeds.noise)))
    for num in (6, 10, 20):
        yield _coverage(REPETITIONS, "times", "median", num, truth, partial(middle, num))
    for num in (4, 5, 10, 20):
        trial = partial(alone, 0.0, 1, num)
        yield _coverage(REPETITIONS, "times of two sides", "hodges_lehmann_ratio", num, SPEED_RATIO, trial)
    for num_starts in (2, 4):
        for spread in (0.0, speeds.between / speeds.within, 1.0, 3.0):
            for function, ratio in (("hodges_lehmann_ratio", alone), ("ratio_of_groups", grouped)):
                trial = partial(ratio, spread * speeds.within, num_starts, 5)
                data, num = f"{num_starts} starts × 5 a side", 5 * num_starts
                yield _coverage(STARTS, data, function, num, SPEED_RATIO, trial, spread)


def _coverage(
    group: str, data: str, function: str, num: int, truth: float, trial: Trial, spread: float | None = None
) -> Scenario:
    return Scenario(group, data, function, num, "coverage", COVERAGE, trial, truth, spread)
