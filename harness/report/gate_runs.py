"""The runs that a rule of the gate compares, or why they cannot be compared."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from harness.record.baselines import Slots, slot
from harness.record.run import Record, Skipped
from harness.report import runs, task_tables
from harness.suite.names import BASELINE
from harness.suite.rules import METRICS, Rule
from harness.suite.schema import Suite


class IncomparableError(Exception):
    """Why a rule cannot be judged, and the runs that were looked at."""

    def __init__(self, reason: str, *records: Record) -> None:
        super().__init__(reason)
        self.records = records


def newest_by_slot(suite: Suite, records: Sequence[Record]) -> dict[str, dict[str, Record]]:
    """The run that speaks for each row in everything that was measured: the latest whole one."""
    by_slot: dict[str, list[Record]] = {}
    for record in records:
        by_slot.setdefault(slot(record), []).append(record)
    return {
        where: runs.newest_runs(those, suite.name, those[0].run.measure, suite.rows())
        for where, those in by_slot.items()
    }


def slots_of(suite: Suite, rule: Rule) -> list[str]:
    """What a rule's numbers are in."""
    if rule.metric == "log_ppl":
        return [f"ppl/{rule.protocol}"]
    if rule.metric == "score":
        return [f"tasks/{label}" for label in ([rule.task] if rule.task else suite.tasks)]
    return [METRICS[rule.metric].table or rule.metric]


def command_for(where: str) -> str:
    """What makes a run."""
    return f"`harness {where.partition('/')[0]}`"


@dataclass(frozen=True)
class LostRun:
    """A run of a row that cannot be used. `where` is its slot, or only its measure where the file says no more."""

    row: str
    where: str
    utc: str
    told: str


def lost_runs(suite: Suite, skipped: Sequence[Skipped]) -> tuple[LostRun, ...]:
    """Those of a suite, by the names of their files; without the ones that somebody interrupted."""
    found = []
    for one in skipped:
        record = one.record
        if record is not None and record.end.status == "interrupted":
            continue
        for row in suite.rows():
            name = rf"(?P<utc>\d{{8}}T\d{{6}}Z)-(?P<measure>\w+)-{re.escape(suite.name)}-{re.escape(row)}-[0-9a-f]{{8}}"
            if told := re.fullmatch(name, one.path.stem):
                where = slot(record) if record is not None and record.run.dataset else told["measure"]
                found.append(LostRun(row, where, told["utc"], f"{one.path.name}: {one.reason}"))
    return tuple(found)


@dataclass(frozen=True)
class GateRuns:
    """The runs of a suite that the gate compares: the newest of each row by slot, its baseline, and the lost runs."""

    suite: Suite
    slots: Slots
    baseline: Slots
    lost: tuple[LostRun, ...]

    def record(self, row: str, where: str) -> Record:
        """The run that speaks for a row: of the checkpoint that was measured last, and with no failure since."""
        found = self.slots.get(where, {}).get(row)
        utc = "" if found is None else _file_time(found)
        for lost in self.lost:
            if lost.row == row and lost.where in (where, where.partition("/")[0]) and lost.utc > utc:
                raise IncomparableError(f"a newer run of {row} cannot be used ({lost.told})")
        if found is None:
            raise IncomparableError(f"no whole run of {row} ({where}): run {command_for(where)}")
        last = max((rows[row] for rows in self.slots.values() if row in rows), key=_file_time)
        mine, newest = (one.run.variant.get("artifact_digest") for one in (found, last))
        if mine and newest and mine != newest:
            told = f"run {found.run.run_id} is of another checkpoint ({mine[:8]}) than run {last.run.run_id} since"
            raise IncomparableError(f"{told} ({newest[:8]}): run {command_for(where)}", found)
        return found

    def is_baseline(self, rule: Rule) -> bool:
        """Whether nothing was measured since the baseline that a rule holds a variant against."""
        sides = (self.slots, self.baseline)
        ids = [[side[where][rule.variant].run.run_id for where in slots_of(self.suite, rule)] for side in sides]
        return ids[0] == ids[1]

    def computed(self, row: str, where: str) -> Record:
        """The same, of an engine that computed what the checkpoint says."""
        return _as_meant(self.record(row, where))

    def pair(self, rule: Rule, where: str | None = None) -> tuple[Record, Record]:
        """The run of a rule's variant, and the one that it is held against, of the same thing. `where`: in what, for a
        rule that is about several."""
        if where is None:
            (where,) = slots_of(self.suite, rule)
        record = self.computed(rule.variant, where)
        if rule.versus == BASELINE:
            other = self.baseline.get(where, {}).get(rule.variant)
            if other is None:
                how = "`harness gate --update-baseline --reason …` makes one"
                raise IncomparableError(f"no baseline of {rule.variant} ({where}): {how}", record)
            other = _as_meant(other)
        else:
            assert rule.versus is not None
            other = self.computed(rule.versus, where)
        check_comparable(record, other, over_time=rule.versus == BASELINE)
        return record, other


def _file_time(record: Record) -> str:
    """When a run began, as its file's name says it."""
    return record.run.started_utc.replace("-", "").replace(":", "")


def _as_meant(record: Record) -> Record:
    engine = record.run.engine or {}
    if served := engine.get("served_as"):
        name = record.run.variant["name"]
        told = f"the {engine.get('name')} engine served {name} as {served}, which is another model"
        raise IncomparableError(told, record)
    return record


def check_comparable(record: Record, other: Record, *, over_time: bool) -> None:
    """`IncomparableError` unless two runs are of the same thing, piece by piece, every piece once."""
    differing = task_tables.item_differences if record.run.measure == "tasks" else runs.differences
    if found := differing(record, other, over_time=over_time):
        raise IncomparableError(f"differing: {', '.join(found)}", record, other)


def check_valid(record: Record, source: Record | None) -> None:
    """`IncomparableError` where the audit calls a run of a task invalid."""
    if reasons := task_tables.invalid(record, source):
        raise IncomparableError(f"run {record.run.run_id} is invalid: {'; '.join(reasons)}", record)
