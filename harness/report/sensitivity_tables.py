"""Records of sensitivity to a table: what each format does to each group of linear layers."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from harness.formats.names import FP8_DYNAMIC, NVFP4
from harness.model.families import role_is
from harness.report import columns, runs
from harness.report.numbers import format_bytes, format_percent
from harness.report.tables import Table, table_of


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


def _spread(samples: Sequence[Mapping[str, Any]]) -> columns.Spread | None:
    known = [(one["layer_error"], one["index"]) for one in samples if one["layer_error"] is not None]
    if not known:
        return None
    largest, layer = max(known, key=lambda pair: pair[0])
    return columns.Spread(statistics.median(error for error, _ in known), largest, layer)


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
