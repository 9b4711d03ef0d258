"""The first section of a card: a line for every variant, and one for every claim that the records support."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from harness.record.run import Record
from harness.record.stats import Estimate
from harness.report import columns, speed_tables, task_tables
from harness.report.evidence import Evidence
from harness.report.pieces import Link, paragraphs, reference
from harness.report.tables import cell_text, runs_of
from harness.suite.names import SOURCE

if TYPE_CHECKING:
    from harness.report.claims import JudgedClaim


def headline(evidence: Evidence, link: Link, claims: Sequence[JudgedClaim]) -> str:
    """One line per variant: what it weighs, what it loses, how fast it decodes, each with the run that says so."""
    lines = []
    for name, variant in evidence.suite.variants.items():
        parts = [
            part(evidence, name) for part in (_size_words, _perplexity_words, _kl_words, _task_words, _decode_words)
        ]
        said = "; ".join(
            f"{words} {' '.join(reference(evidence, link, record) for record in records)}"
            for words, records in filter(None, parts)
        )
        lines.append(f"- **{name}** ({columns.escape(variant.recipe)}): {said or 'not measured yet'}.")
    marked = any(columns.NO_INTERVAL_MARK in line for line in lines)
    return paragraphs("\n".join(lines), _claim_lines(evidence, link, claims), columns.NO_INTERVAL if marked else None)


def _claim_lines(evidence: Evidence, link: Link, claims: Sequence[JudgedClaim]) -> str:
    """One line for every claim of the suite that the records support, with the runs that support it."""
    by_id = {record.run.run_id: record for record in evidence.chosen}
    return "\n".join(
        f"- {claim.sentence}: {columns.escape(claim.reason)} "
        f"{' '.join(reference(evidence, link, by_id[run]) for run in claim.runs if run in by_id)}."
        for claim in claims
        if claim.supported
    )


_Words = tuple[str, tuple[Record, ...]] | None  # what runs say of a variant


def _size_words(evidence: Evidence, variant: str) -> _Words:
    row = evidence.tables["totals"].row(variant=variant)
    if row is None:
        return None
    share, output, source = (cell_text(key, row[key]) for key in ("bytes_share", "output_bytes", "source_bytes"))
    return f"{output} of {source} ({share})", (evidence.records["build"][variant],)


def _perplexity_words(evidence: Evidence, variant: str) -> _Words:
    row = evidence.tables["perplexity"].row(variant=variant, protocol=evidence.protocol)
    base = evidence.tables["perplexity"].row(variant=SOURCE, protocol=evidence.protocol)
    if row is None or evidence.protocol is None:
        return None
    runs = (evidence.perplexities[evidence.protocol][variant],)
    kind = "perplexity" if row["unit"] == "token" else f"{row['unit']} perplexity"
    words = f"{kind} {cell_text('ppl', row['ppl'])}"
    loss = row["delta_log_ppl"]
    if base is None or not isinstance(loss, Estimate):
        return f"{words} ({f'Δ {loss}' if loss == columns.AT_NOISE else loss})", runs
    change = cell_text("relative_change_ratio", row["relative_change_ratio"])
    against = cell_text("ppl", base["ppl"])
    return f"{words} against {against} ({change}; Δ log-perplexity {cell_text('delta_log_ppl', loss)})", runs


def _kl_words(evidence: Evidence, variant: str) -> _Words:
    row = evidence.tables["fidelity"].row(variant=variant)
    if row is None:
        return None
    unit = " nats" if isinstance(row["kl"], Estimate) else ""
    return f"KL to the source {cell_text('kl', row['kl'])}{unit}", (evidence.records["fidelity"][variant],)


def _task_words(evidence: Evidence, variant: str) -> _Words:
    """All tasks together, or the only one."""
    rows = [row for row in evidence.tables["tasks"].rows if row["variant"] == variant]
    row = next((row for row in rows if row["task"] == task_tables.ALL_TASKS), rows[0] if len(rows) == 1 else None)
    if row is None or not isinstance(row["delta_score"], Estimate):
        return None
    change = cell_text("delta_score", row["delta_score"])
    return f"tasks {change} ({row['metric'] if len(rows) > 1 else row['task']})", runs_of(row["run"])


def _decode_words(evidence: Evidence, variant: str) -> _Words:
    decoded = evidence.tables["decode"]
    if not decoded:
        return None
    row = speed_tables.single_user(decoded).row(variant=variant) or speed_tables.by_depth(decoded).row(variant=variant)
    if row is None:
        return None
    speed, ratio = cell_text("tokens_per_second", row["tokens_per_second"]), row["speed_ratio"]
    other = "the source" if row["versus"] == SOURCE else row["versus"]
    relation = f"{cell_text('speed_ratio', ratio)} × {other}" if isinstance(ratio, Estimate) else ratio
    record = evidence.records["bench"][variant]
    caveat = "; no NVFP4 kernel" if (record.run.engine or {}).get("name") == "torch" else ""
    return f"decode {speed} tok/s at batch 1 ({relation or f'not measured for {other}'}{caveat})", (record,)
