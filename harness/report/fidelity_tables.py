"""Records of fidelity to tables: how far each variant predicts from its source, in all and by place in the window.

The source beside itself, after a restart, in another batch or on another engine, is the noise floor. A variant's
divergence that does not exceed it says nothing of the variant, and is printed so.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from harness.record import stats
from harness.record.comparable import incomparable
from harness.record.packed import unpack_numbers
from harness.record.run import Record
from harness.record.stats import Estimate
from harness.report import columns, runs
from harness.report.tables import Table, table_of
from harness.suite.names import NOISE, SOURCE

PERCENTILES = {"kl_median": 50, "kl_p90": 90, "kl_p95": 95, "kl_p99": 99, "kl_p999": 99.9, "kl_max": 100}
_OTHER_ENGINE = NOISE[-1]
_OF_THE_ENGINE = ("engine.", "dataset.distribution")
"""Header keys in which a source on another engine differs from the variants, and may."""


@dataclass(frozen=True)
class Floor:
    """The largest that the source came to beside itself, at the upper end of its interval, in nats per token."""

    kl_nats: float
    log_ppl_nats: float


def divergence_table(records: runs.Records) -> Table:
    """One row a variant: the mean divergence per token, its percentiles over tokens, how often both find the same token
    the likeliest, the root mean square of what the probability of the token that came has changed by, and what it
    all makes of log-perplexity in these windows. Intervals are bootstraps over blocks of windows."""
    rows = []
    for variant, record in records.items():
        windows = record.kind("window")
        nats = np.concatenate([unpack_numbers(window["kl_codes"]) for window in windows])
        percentiles = np.percentile(nats, list(PERCENTILES.values()))
        kl = mean_kl(record)
        floor = None if variant in NOISE else noise_floor(records, record)
        rows.append(
            {
                **_told(variant, record),
                "num_tokens": (record.run.dataset or {}).get("num_tokens"),
                "num_windows": len(windows),
                "num_scored": sum(window["num_scored"] for window in windows),
                "kl": columns.AT_NOISE if floor and kl.value <= floor.kl_nats else kl,
                **{name: float(value) for name, value in zip(PERCENTILES, percentiles, strict=True)},
                "agreement": _mean(windows, "num_agreed"),
                "rms_dp": _rms(windows),
                "kl_log_ppl": log_ppl_difference(record),
                "run": record,
                **runs.served_as(record),
            }
        )
    return table_of(rows)


def band_table(records: runs.Records) -> Table:
    """The same by the number of tokens before the predicted one, one row a variant and band, without the rows of noise;
    empty where all windows lie in the first band. The last band ends where the longest window does."""
    rows = []
    for variant, record in records.items():
        if variant in NOISE:
            continue
        by_end: dict[int, list[dict[str, Any]]] = {}
        windows = record.kind("window")
        longest = max((window["num_tokens"] for window in windows), default=0)
        for window in windows:
            for band in window["bands"]:
                by_end.setdefault(band["end"], []).append(band)
        ends = sorted(by_end)
        for first, end in zip([1, *ends], ends, strict=False):
            sums, last = by_end[end], min(end, longest) - 1
            rows.append(
                {
                    **_told(variant, record),
                    "before": f"{first:,}" if first == last else f"{first:,} – {last:,}",
                    "num_scored": sum(one["num_scored"] for one in sums),
                    "kl": _mean(sums, "kl_nats"),
                    "agreement": _mean(sums, "num_agreed"),
                    "rms_dp": _rms(sums),
                    "run": record,
                }
            )
    frame = table_of(rows)
    return frame if len({row["before"] for row in rows}) > 1 else table_of([])


def mean_kl(record: Record) -> Estimate:
    """Nats per token, with a bootstrap over blocks of neighbouring windows."""
    return _mean(record.kind("window"), "kl_nats")


def log_ppl_difference(record: Record) -> Estimate:
    """The variant's log-perplexity less the source's, in nats, over all predictions of a fidelity run; paired."""
    windows = record.kind("window")
    source, variant, weights = (
        [float(window[key]) for window in windows] for key in ("source_nll_nats", "nll_nats", "num_scored")
    )
    return stats.paired_mean_difference(source, variant, weights, stats.block_length(len(windows)))


def noise_floor(records: runs.Records, record: Record) -> Floor | None:
    """The floor under a run, of fidelity or of another measure of the same source on the same engine; None where no row
    of noise stands beside it."""
    found = [
        (mean_kl(one), log_ppl_difference(one))
        for name, one in records.items()
        if name in NOISE and _is_floor_of(name, one, record)
    ]
    if not found:
        return None
    return Floor(max(_bound(kl) for kl, _ in found), max(_bound(loss) for _, loss in found))


def log_ppl_floor(records: runs.Records, perplexities: runs.ByProtocol) -> float | None:
    """The floor under perplexities, in nats per token, where the source was measured beside itself on their engine."""
    source = next((by_row[SOURCE] for by_row in perplexities.values() if SOURCE in by_row), None)
    floor = source and noise_floor(records, source)
    return floor.log_ppl_nats if floor else None


def _is_floor_of(name: str, noise: Record, record: Record) -> bool:
    if noise.run.measure == record.run.measure:
        differing = incomparable(noise, record)
        return not [key for key in differing if name != _OTHER_ENGINE or not key.startswith(_OF_THE_ENGINE)]
    sides = [(one.run.variant.get("source_digest"), one.run.engine or {}) for one in (noise, record)]
    same_source = sides[0][0] == sides[1][0]
    return same_source and all(_family(sides[0][1]) == _family(side[1]) for side in sides)


def _family(engine: Mapping[str, Any]) -> tuple[str, Any]:
    """An engine and its type of activations; streamed layers compute what the torch engine does, to the last bit."""
    name = engine.get("name", "")
    return ("torch" if name == "streamed" else name, engine.get("dtype"))


def _bound(estimate: Estimate) -> float:
    return max(abs(end) for end in (estimate.value, estimate.low, estimate.high) if end is not None)


def _told(variant: str, record: Record) -> dict[str, Any]:
    dataset = record.run.dataset or {}
    return {
        "variant": variant,
        "dataset": dataset.get("name"),
        "window": dataset.get("window"),
        "distribution": dataset.get("distribution"),
    }


def _mean(sums: Sequence[Mapping[str, Any]], key: str) -> Estimate:
    weights = [one["num_scored"] for one in sums]
    return stats.weighted_mean([one[key] for one in sums], weights, stats.block_length(len(sums)))


def _rms(sums: Sequence[Mapping[str, Any]]) -> float:
    return math.sqrt(math.fsum(one["squared_dp"] for one in sums) / sum(one["num_scored"] for one in sums))
