"""What speaks for a suite: of every measure the newest whole run of each variant, and every table of them computed
once. Cards, pages, figures and exports all look at the same one.
"""

import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from harness.record.run import Record
from harness.report import (
    build_tables,
    fidelity_tables,
    perplexity_tables,
    runs,
    sensitivity_tables,
    speed_tables,
    task_tables,
)
from harness.report.tables import Table
from harness.suite.names import NOISE, SOURCE
from harness.suite.schema import Suite

MEASURES = ("build", "verify", "ppl", "fidelity", "bench")  # in the order in which they run; each is also a nox session
OTHERS = ("sensitivity", "served")  # of the source alone, and measured elsewhere


@dataclass(frozen=True, eq=False)  # frames have no equality, and each evidence is gathered once
class Evidence:
    """A suite and the runs that speak for it, with every frame computed once."""

    suite: Suite
    results_dir: str
    records: Mapping[str, runs.Records]  # measure -> variant -> record; all but perplexities and tasks
    perplexities: runs.ByProtocol  # protocol -> variant -> record
    tasks: task_tables.ByTask  # task -> variant -> record
    tables: Mapping[str, Table]
    repo: str | None = None  # the id on the hub, of a card that is published

    @property
    def chosen(self) -> list[Record]:
        """Every run that speaks on the card."""
        measured = (*self.records.values(), *self.perplexities.values(), *self.tasks.values())
        return [record for runs in measured for record in runs.values()]

    @property
    def protocol(self) -> str | None:
        """Of the perplexities that stand where there is room for one: the suite's first."""
        return self.suite.ppl.protocols[0] if self.suite.ppl else None

    def record_path(self, record: Record) -> str:
        return posixpath.join(self.results_dir, record.path.parent.name, record.path.name)


def gather(suite: Suite, records: Sequence[Record], results_dir: str, repo: str | None = None) -> Evidence:
    """The evidence of a suite among `records`, which lie under `results_dir` (a POSIX path from the project's root)."""
    variants = suite.rows()
    chosen = {
        measure: runs.newest_runs(records, suite.name, measure, (*variants, *NOISE))
        for measure in (*MEASURES, *OTHERS)
        if measure != "ppl"
    }
    protocols = suite.ppl.protocols if suite.ppl else ()
    perplexities = runs.newest_by_protocol(records, suite.name, protocols, variants)
    tasks = task_tables.newest_by_task(records, suite, variants)
    versus = suite.bench.versus if suite.bench else SOURCE
    tables = {
        "totals": build_tables.total_table(chosen["build"]),
        "size": build_tables.role_table(chosen["build"]),
        "method": build_tables.method_table(chosen["build"]),
        "calibration": build_tables.calibration_table(chosen["build"]),
        "sizes": build_tables.sizing_table(chosen["build"]),
        "roundtrip": build_tables.roundtrip_table(chosen["verify"]),
        "findings": build_tables.finding_table(chosen["verify"]),
        "sensitivity": sensitivity_tables.sensitivity_table(chosen["sensitivity"]),
        "perplexity": perplexity_tables.perplexity_table(
            perplexities, fidelity_tables.log_ppl_floor(chosen["fidelity"], perplexities)
        ),
        "fidelity": fidelity_tables.divergence_table(chosen["fidelity"]),
        "bands": fidelity_tables.band_table(chosen["fidelity"]),
        "decode": speed_tables.decode_table(chosen["bench"], versus),
        "prefill": speed_tables.prefill_table(chosen["bench"], versus),
        "kernels": speed_tables.kernel_table(chosen["bench"]),
        "memory": speed_tables.memory_table(chosen["bench"]),
        "served": speed_tables.served_table(chosen["served"]),
        "tasks": task_tables.score_table(tasks),
        "answers": task_tables.answer_table(tasks),
    }
    evidence = Evidence(suite, results_dir, chosen, perplexities, tasks, tables, repo)
    return replace(evidence, tables={**tables, "runs": runs.run_table(evidence.chosen)})
