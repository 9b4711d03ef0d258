"""What data sets are drawn from: the windows, items and speeds of committed records.

The names below fix which records these are, so that a later measurement of something else changes nothing. The newest
whole run of each is taken.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from harness.errors import UserError
from harness.record.run import Record

Array = NDArray[np.float64]

NUM_LAGS = 5
SOURCE = "source"
PROTOCOL = "wikitext2-512"
# (suite, variant): from almost no skewness to a window that outweighs all others.
LOSSES = (("demo", "w4a4"), ("demo", "nvfp4a16"), ("demo-moe", "nvfp4a16"))
# (part of the comparison with peers, variant, text): the most even divergence, and a divergence with an outlier.
DIVERGENCES = (
    ("quality-dense", "rtn-a16", "far"),
    ("quality-moe", "a16-weighted-search-rtn", "near"),
)
DIVERGENCE_RATIO = ("quality-dense", "a16-absmax-gptq", "rtn-a16", "near")
# (suite, task, variant): many flips, few, one.
FLIPS = (
    ("demo-moe", "arithmetic", "w4a4-deltanet"),
    ("demo", "recall", "nvfp4a16"),
    ("demo-moe", "recall", "w4a4-experts"),
)
REPEATED = ("demo-moe", "arithmetic-thinking", "w4a4")
BENCHES = ("demo", "demo-moe")


@dataclass(frozen=True)
class Windows:
    """The windows of a text: `above` [windows] are sums of what is measured, `below` [windows] what divides them."""

    name: str
    above: Array
    below: Array

    @property
    def truth(self) -> float:
        """The value that data sets drawn from the windows estimate."""
        return float(self.above.sum() / self.below.sum())

    def facts(self) -> dict[str, object]:
        """Mean, spread, skewness and autocorrelation of the windows in their order, for the page."""
        rates = self.above / self.below
        centred = rates - rates.mean()
        lags = [float((centred[lag:] * centred[:-lag]).mean() / centred.var()) for lag in range(1, NUM_LAGS + 1)]
        return {
            "name": self.name,
            "num": len(rates),
            "mean": self.truth,
            "standard_deviation": float(rates.std(ddof=1)),
            "skewness": float(stats.skew(rates)),
            "autocorrelation": lags,
        }


@dataclass(frozen=True)
class Flips:
    """Items of a task that only one side solves, as shares of all items."""

    name: str
    lost_share: float
    won_share: float


@dataclass(frozen=True)
class Speeds:
    """Logarithms of times. `noise` [repetitions] is the difference of a repetition from the mean of its start, scaled
    to the spread of independent repetitions; `within` and `between` are standard deviations in and between starts."""

    noise: Array
    within: float
    between: float


@dataclass(frozen=True)
class Populations:
    """All that data sets are drawn from, and the files of its records."""

    losses: tuple[Windows, ...]
    divergences: tuple[Windows, ...]
    divergence_ratio: Windows
    flips: tuple[Flips, ...]
    repeated: tuple[Array, Array]
    """Scores of documents [documents, repetitions] under the source and under a variant."""
    speeds: Speeds
    files: tuple[str, ...]


def populations_in(records: Sequence[Record]) -> Populations:
    """The populations in the records; a `UserError` names a record that is missing."""
    used: dict[str, None] = {}

    def newest(measure: str, suite: str, variant: str, **dataset: str) -> Record:
        found = [
            record
            for record in records
            if record.whole
            and (record.run.measure, record.run.suite["name"], record.run.variant["name"]) == (measure, suite, variant)
            and all((record.run.dataset or {}).get(key) == value for key, value in dataset.items())
        ]
        if not found:
            raise UserError(
                f"There is no whole {measure} record of {variant} in {suite}.", "Give the --results with the records."
            )
        record = max(found, key=lambda record: (record.run.started_utc, record.run.run_id))
        used[f"{record.path.parent.name}/{record.path.name}"] = None
        return record

    def losses(suite: str, variant: str) -> Windows:
        base, other = (newest("ppl", suite, one, protocol=PROTOCOL).kind("window") for one in (SOURCE, variant))
        return Windows(
            f"Δ log-PPL, {suite}, {variant}",
            _column(other, "nll_nats") - _column(base, "nll_nats"),
            _column(other, "num_scored"),
        )

    def divergences(suite: str, variant: str, text: str) -> Windows:
        windows = [one for one in newest("peers", suite, variant).kind("window") if one["text"] == text]
        return Windows(
            f"KL, {suite}, {variant}, {text}",
            np.maximum(0.0, _column(windows, "kl_nats")),
            _column(windows, "num_scored"),
        )

    def scores(suite: str, task: str, variant: str) -> tuple[Array, Array]:
        sides = []
        for one in (SOURCE, variant):
            by_document: dict[int, list[float]] = {}
            for item in newest("tasks", suite, one, name=task).kind("item"):
                by_document.setdefault(item["doc_id"], []).append(float(next(iter(item["outcomes"].values()))))
            sides.append(np.array([by_document[document] for document in sorted(by_document)]))
        return sides[0], sides[1]

    def flips(suite: str, task: str, variant: str) -> Flips:
        base, other = scores(suite, task, variant)
        return Flips(f"{suite}, {task}, {variant}", float(np.mean(base > other)), float(np.mean(base < other)))

    suite, variant, baseline, text = DIVERGENCE_RATIO
    over, under = divergences(suite, variant, text), divergences(suite, baseline, text)
    benches = [record for suite in BENCHES for record in _benches(records, suite)]
    used |= {f"{record.path.parent.name}/{record.path.name}": None for record in benches}
    return Populations(
        losses=tuple(losses(*which) for which in LOSSES),
        divergences=tuple(divergences(*which) for which in DIVERGENCES),
        divergence_ratio=Windows(f"KL ratio, {suite}, {variant} / {baseline}, {text}", over.above, under.above),
        flips=tuple(flips(*which) for which in FLIPS),
        repeated=scores(*REPEATED),
        speeds=_speeds(benches),
        files=tuple(sorted(used)),
    )


def _column(samples: Sequence[Mapping[str, float]], key: str) -> Array:
    return np.array([sample[key] for sample in samples], float)


def _benches(records: Sequence[Record], suite: str) -> list[Record]:
    """The newest whole bench record of every variant of a suite."""
    found = [r for r in records if r.whole and r.run.measure == "bench" and r.run.suite["name"] == suite]
    found.sort(key=lambda record: (record.run.started_utc, record.run.run_id))
    if not found:
        raise UserError(f"There is no whole bench record of {suite}.", "Give the --results with the records.")
    return list({record.run.variant["name"]: record for record in found}.values())


def _speeds(benches: Sequence[Record]) -> Speeds:
    """One-way analysis of variance of log times over starts, averaged over variants and shapes: the components of
    variance from their expected mean squares (Cochran 1977, section 9.3)."""
    noise, within, between = [], [], []
    for record in benches:
        starts: dict[tuple[object, ...], dict[int, list[float]]] = {}
        for kind, seconds in (("decode", "step_seconds"), ("prefill", "prefill_seconds")):
            for sample in record.kind(kind):
                if not sample["warmup"]:
                    shape = (kind, sample["batch"], sample["prompt_tokens"])
                    time = math.log(float(np.sum(sample[seconds])))
                    starts.setdefault(shape, {}).setdefault(sample["start"], []).append(time)
        for by_start in starts.values():
            times = np.array(list(by_start.values()))  # [starts, repetitions]
            num_starts, num_repetitions = times.shape
            residuals = times - times.mean(axis=1, keepdims=True)
            noise.append(residuals.ravel() * math.sqrt(num_repetitions / (num_repetitions - 1)))
            mean_square = float((residuals**2).sum()) / (num_starts * (num_repetitions - 1))
            within.append(mean_square)
            between.append(float(times.mean(axis=1).var(ddof=1)) - mean_square / num_repetitions)
    return Speeds(
        noise=np.concatenate(noise),
        within=math.sqrt(float(np.mean(within))),
        between=math.sqrt(max(0.0, float(np.mean(between)))),
    )
