"""Records of perplexity to tables: what every variant loses against the source, by protocol."""

import math
from collections.abc import Sequence
from typing import Any

from harness.record import stats
from harness.report import columns, runs
from harness.report.tables import Table, table_of
from harness.suite.names import SOURCE


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
        return {"delta_log_ppl": columns.AT_NOISE}
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
