"""The evidence that cards, pages, figures and exports look at; `gather` makes it."""

import posixpath
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.record.run import Record
from harness.report import runs
from harness.report.tables import Table
from harness.suite.schema import Suite

MEASURES = ("build", "verify", "ppl", "fidelity", "bench")  # in the order in which they run; each is also a nox session
OTHERS = ("sensitivity", "served")  # of the source alone, and measured elsewhere


@dataclass(frozen=True, eq=False)  # each evidence is gathered once
class Evidence:
    """A suite and the runs that speak for it, with every table and the data of every figure computed once."""

    suite: Suite
    results_dir: str
    records: Mapping[str, runs.Records]  # measure -> variant -> record; all but perplexities and tasks
    perplexities: runs.ByProtocol  # protocol -> variant -> record
    tasks: runs.ByTask  # task -> variant -> record
    tables: Mapping[str, Table]
    repo: str | None = None  # the id on the hub, of a card that is published
    figures: Mapping[str, Any] = field(default_factory=dict)  # name -> what the figure shows, if there is anything

    @property
    def chosen(self) -> list[Record]:
        """Every run that speaks on the card."""
        measured = (*self.records.values(), *self.perplexities.values(), *self.tasks.values())
        return [record for runs in measured for record in runs.values()]

    @property
    def protocol(self) -> str | None:
        """The protocol of the perplexity that stands where there is room for one: the suite's first."""
        return self.suite.ppl.protocols[0] if self.suite.ppl else None

    def record_path(self, record: Record) -> str:
        """Where a record lies, as a POSIX path from the project's root."""
        return posixpath.join(self.results_dir, record.path.parent.name, record.path.name)
