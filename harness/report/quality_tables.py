"""Records of quality to tables: what every variant loses in perplexity against the source, how far it predicts from it,
and what each format does to each group of linear layers.

The source beside itself, after a restart, in another batch or on another engine, is the noise floor. A difference that
does not exceed it says nothing of the variant, and is printed so.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from harness.formats.names import FP8_DYNAMIC, NVFP4
from harness.model.families import role_is
from harness.record import stats
from harness.record.packed import unpack_numbers
from harness.record.run import Record
from harness.record.schema import incomparable
from harness.record.stats import Estimate
from harness.report import runs
from harness.report.numbers import format_bytes, format_percent
from harness.report.tables import AT_NOISE, Spread, Table, table_of
from harness.suite.names import NOISE, SOURCE

PERCENTILES = {"kl_median": 50, "kl_p90": 90, "kl_p95": 95, "kl_p99": 99, "kl_p999": 99.9, "kl_max": 100}
_OTHER_ENGINE = NOISE[-1]
_OF_THE_ENGINE = ("engine.", "dataset.distribution")
"""Header keys in which a source on another engine differs from the variants, and may."""


# -- Perplexity -------------------------------------------------------------------------------------------------


def perplexity_table(by_protocol: runs.ByProtocol, floor: float | None = None) -> Table:
    """Perplexity = exp(sum of nll / scored tokens), and what each variant loses against the source.

    The loss is the paired difference of log-perplexities in nats, with its interval over blocks of neighbouring
    windows; the relative change of perplexity is exp(difference) - 1. A loss of at most `floor` nats per token, which
    is what the source differs from itself by, is no difference: the cell says so in place of a number.

    By a protocol whose `unit` is the word, the sum is divided by words, the loss is per word, and pairs and interval
    are over documents; of a run with a limit only the documents that it read to their end count.
    """
    rows = []
    for protocol, records in by_protocol.items():
        for variant, record in records.items():
            windows = record.kind("window")
            dataset = record.run.dataset or {}
            clusters = runs.clusters_of(record)
            row = {
                "variant": variant,
                "protocol": protocol,
                "unit": dataset.get("unit", "token"),
                "dataset": dataset.get("name"),
                "num_tokens": dataset.get("num_tokens"),
                "num_windows": len(windows),
                "num_scored": sum(window["num_scored"] for window in windows),
                "ppl": _ppl(clusters),
                "delta_ppl": None,
                "relative_change_ratio": None,
                "delta_log_ppl": runs.refusal(records, variant),
                "standard_errors": None,
                "run": record,
                **runs.served_as(record),
            }
            if "documents" in dataset:
                row |= {"num_words": sum(weight for _, weight in clusters), "num_documents": len(clusters)}
            if variant != SOURCE and clusters and row["delta_log_ppl"] is None:
                block = 1 if "documents" in dataset else stats.block_length(len(clusters))
                tokens_per_unit = row["num_scored"] / sum(weight for _, weight in clusters)
                least = None if floor is None else floor * tokens_per_unit
                row |= _lost(clusters, runs.clusters_of(records[SOURCE]), block, least)
            rows.append(row)
    return table_of(rows)


def _lost(
    clusters: Sequence[tuple[float, int]], base: Sequence[tuple[float, int]], block: int, floor: float | None
) -> dict[str, Any]:
    """The cells that compare a variant with the source over the same clusters, `block` neighbours together."""
    loss = stats.paired_mean_difference(
        [nll for nll, _ in base], [nll for nll, _ in clusters], [weight for _, weight in clusters], block
    )
    if floor is not None and abs(loss.value) <= floor:
        return {"delta_log_ppl": AT_NOISE}
    ppl, base_ppl = _ppl(clusters), _ppl(base)
    return {
        "delta_ppl": ppl - base_ppl if ppl is not None and base_ppl is not None else None,
        "relative_change_ratio": math.expm1(loss.value),
        "delta_log_ppl": loss,
        "standard_errors": loss.standard_errors_from_zero,
    }


def _ppl(clusters: Sequence[tuple[float, int]]) -> float | None:
    if not clusters:
        return None
    return math.exp(math.fsum(nll for nll, _ in clusters) / sum(weight for _, weight in clusters))


# -- Fidelity ---------------------------------------------------------------------------------------------------


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
                "kl": AT_NOISE if floor and kl.value <= floor.kl_nats else kl,
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


# -- Sensitivity ------------------------------------------------------------------------------------------------


def sensitivity_table(records: runs.Records) -> Table:
    """What storing a group of linear layers in each format does to the output of its half of a layer.

    One row a group, the one that NVFP4 hurts most first: the layer errors of each format over the layers, the bytes
    that FP8 takes more than NVFP4 in all of them, and the error that a gigabyte of those would take away.
    """
    rows = []
    for variant, record in records.items():
        by_role: dict[str, dict[str, list[dict[str, Any]]]] = {}
        for sample in record.kind("sensitivity"):
            by_role.setdefault(sample["role"], {}).setdefault(sample["format"], []).append(sample)
        dataset = record.run.dataset or {}
        found: list[dict[str, Any]] = []
        for role, formats in by_role.items():
            spreads = {form: _spread(samples) for form, samples in formats.items()}
            extra_bytes = sum(one["extra_bytes"] for one in formats[FP8_DYNAMIC])
            saved = sum(
                nvfp4["layer_error"] - fp8["layer_error"]
                for nvfp4, fp8 in zip(formats[NVFP4], formats[FP8_DYNAMIC], strict=True)
                if nvfp4["layer_error"] is not None
            )
            row = {
                "variant": variant,
                "role": role,
                "num_layers": len(formats[NVFP4]),
                **spreads,
                "fp8_extra_bytes": extra_bytes,
                "fp8_gain_per_gb": saved / extra_bytes * 1e9,
                "num_tokens": dataset.get("num_tokens"),
                "dataset": dataset.get("name"),
                "run": record,
            }
            found.append(row)
        # The row with the largest median error in NVFP4 first; last where there is none.
        rows += sorted(found, key=lambda row: -row[NVFP4].median if row[NVFP4] else math.inf)
    return table_of(rows)


def _spread(samples: Sequence[Mapping[str, Any]]) -> Spread | None:
    known = [(one["layer_error"], one["index"]) for one in samples if one["layer_error"] is not None]
    if not known:
        return None
    largest, layer = max(known, key=lambda pair: pair[0])
    return Spread(statistics.median(error for error, _ in known), largest, layer)


def sensitivity_words(frame: Table) -> list[str]:
    """What the table of sensitivities says, in sentences: where FP8 pays, and how DeltaNet compares with the rest."""
    rows = [row for row in frame.rows if row[NVFP4] is not None]
    if not rows:
        return []

    def median(row: Mapping[Any, Any], form: str = NVFP4) -> str:
        return format_percent(row[form].median, ".2g")

    best = max(rows, key=lambda row: row["fp8_gain_per_gb"])
    words = [
        f"FP8 gains most for its bytes in {best['role']}: median layer error {median(best)} in NVFP4 and "
        f"{median(best, FP8_DYNAMIC)} in FP8, for {format_bytes(best['fp8_extra_bytes'])} more in "
        f"{best['num_layers']} {'layer' if best['num_layers'] == 1 else 'layers'}."
    ]
    worst = f"NVFP4 costs most in {rows[0]['role']} (median layer error {median(rows[0])})"
    is_deltanet = [role_is(row["role"], "deltanet") for row in rows]
    if len(set(is_deltanet)) == 2:
        other = rows[is_deltanet.index(not is_deltanet[0])]
        place = "outside of DeltaNet" if is_deltanet[0] else "in DeltaNet"
        worst += f", and {place} in {other['role']} ({median(other)})"
    return [*words, f"{worst}."]
