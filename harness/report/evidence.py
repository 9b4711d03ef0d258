"""What speaks for a suite: of every measure the newest whole run of each variant, and every table of them computed
once. Cards, pages, figures and exports all look at the same one.
"""

import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from harness.record.store import Record
from harness.report import builds, columns, evaluations, fidelities, tables
from harness.suite.names import NOISE, SOURCE
from harness.suite.schema import Suite

MEASURES = ("build", "verify", "ppl", "fidelity", "bench")  # in the order in which they run; each is also a nox session
OTHERS = ("sensitivity", "served")  # of the source alone, and measured elsewhere


@dataclass(frozen=True, eq=False)  # frames have no equality, and each evidence is gathered once
class Evidence:
    """A suite and the runs that speak for it, with every frame computed once."""

    suite: Suite
    results_dir: str
    records: Mapping[str, tables.Records]  # measure -> variant -> record; all but perplexities and tasks
    perplexities: tables.ByProtocol  # protocol -> variant -> record
    tasks: evaluations.ByTask  # task -> variant -> record
    frames: Mapping[str, pd.DataFrame]
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
        measure: tables.newest(records, suite.name, measure, (*variants, *NOISE))
        for measure in (*MEASURES, *OTHERS)
        if measure != "ppl"
    }
    protocols = suite.ppl.protocols if suite.ppl else ()
    perplexities = tables.newest_by_protocol(records, suite.name, protocols, variants)
    tasks = evaluations.newest(records, suite, variants)
    versus = suite.bench.versus if suite.bench else SOURCE
    frames = {
        "totals": builds.totals(chosen["build"]),
        "size": tables.size(chosen["build"]),
        "method": builds.method(chosen["build"]),
        "calibration": builds.calibration(chosen["build"]),
        "sizes": builds.sizes(chosen["build"]),
        "roundtrip": tables.roundtrip(chosen["verify"]),
        "findings": tables.findings(chosen["verify"]),
        "sensitivity": tables.sensitivity(chosen["sensitivity"]),
        "perplexity": tables.perplexity(perplexities, fidelities.log_ppl_floor(chosen["fidelity"], perplexities)),
        "fidelity": fidelities.divergences(chosen["fidelity"]),
        "bands": fidelities.bands(chosen["fidelity"]),
        "decode": tables.decode(chosen["bench"], versus),
        "prefill": tables.prefill(chosen["bench"], versus),
        "kernels": tables.kernels(chosen["bench"]),
        "memory": tables.memory(chosen["bench"]),
        "served": tables.served(chosen["served"]),
        "tasks": evaluations.scores(tasks),
        "answers": evaluations.answers(tasks),
    }
    evidence = Evidence(suite, results_dir, chosen, perplexities, tasks, frames, repo)
    return replace(evidence, frames={**frames, "runs": tables.runs(evidence.chosen)})


def row_of(frame: pd.DataFrame, **wanted: object) -> dict[str, Any] | None:
    """The first row with the wanted values, if there is one."""
    rows = columns.rows_of(frame)
    return next((row for row in rows if all(row[key] == value for key, value in wanted.items())), None)
