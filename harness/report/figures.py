"""What the figures of a suite show: rows for `plots`, from the same evidence as the tables."""

from harness.record.stats import Estimate
from harness.report import plots, tables
from harness.report.evidence import Evidence, row_of
from harness.suite import SOURCE


def files(evidence: Evidence) -> dict[str, bytes]:
    """Every figure of a suite: name -> bytes."""
    rows = []
    sizes = evidence.frames["size"]
    for variant in (SOURCE, *evidence.suite.variants):
        # Every build read the same source, so any of them tells its size.
        total = row_of(sizes, role="total") if variant == SOURCE else row_of(sizes, role="total", variant=variant)
        num_bytes = total and total["source_bytes" if variant == SOURCE else "output_bytes"]
        ppl = row_of(evidence.frames["perplexity"], variant=variant, protocol=evidence.protocol) or {}
        loss = ppl.get("delta_log_ppl")
        speed = row_of(evidence.frames["decode"], variant=variant, batch=1)
        steps: list[float] = []
        if speed and not isinstance(speed["speed_ratio"], str):
            shape = (1, int(str(speed["prompt_tokens"])), int(str(speed["new_tokens"])))
            for sample in tables.by_shape(evidence.records["bench"][variant], "decode")[shape]:
                steps += tables.token_seconds(sample)
        rows.append(
            plots.Row(
                variant,
                num_bytes if isinstance(num_bytes, int) else None,
                loss if isinstance(loss, Estimate) else None,
                tuple(steps),
            )
        )
    return {**plots.overview(rows), **_heat_map(evidence)}


def _heat_map(evidence: Evidence) -> dict[str, bytes]:
    """The figure of the sensitivities, groups in the order of the table; none without a record."""
    order = {role: place for place, role in enumerate(evidence.frames["sensitivity"].get("role", ()))}
    samples = [one for record in evidence.records["sensitivity"].values() for one in record.kind("sensitivity")]
    cells = [plots.Cell(one["index"], one["role"], one["format"], one["layer_error"]) for one in samples]
    return plots.heat_map(sorted(cells, key=lambda cell: (order[cell.role], cell.layer))) if cells else {}
