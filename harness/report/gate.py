"""The gate: the suite's rules over the records, and for each a verdict with its reason.

A rule names a metric, a variant, what it is held against (the source, another variant, or its own baseline) and the
largest loss that is accepted. The loss is computed from raw samples, paired wherever both sides saw the same thing,
with its 95 % interval; positive is worse. Then

- `pass`: the whole interval is within the margin;
- `fail`: the whole interval is beyond it. A failure takes evidence and size: noise has no such interval, and a loss
  that is certain and small is none;
- `inconclusive`: the interval holds the margin, or there is none. The reason says how much more would decide;
- `incomparable`: there is nothing to judge: a run is missing, two runs are not of the same thing, an item is there
  twice, an engine computed another model than the checkpoint says. Never averaged over, never passed.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal
from xml.etree import ElementTree

import pandas as pd

from harness.errors import UserError
from harness.record import stats
from harness.record.baselines import Slots, slot
from harness.record.stats import Estimate
from harness.record.store import Record, Skipped
from harness.report import columns, evaluations, tables
from harness.suite.metrics import METRICS
from harness.suite.names import BASELINE, SOURCE, row_name
from harness.suite.schema import Rule, Suite

Verdict = Literal["pass", "fail", "inconclusive", "incomparable"]
EXIT_CODES: dict[Verdict, int] = {"pass": 0, "inconclusive": 3, "incomparable": 3, "fail": 1}
"""Of a command; a failure goes before what could not be judged."""


@dataclass(frozen=True)
class Judgement:
    """What came of a rule. `loss` is in the unit of its metric, from so many `units`, and `num_needed` of them would
    decide what is open; `runs` are the ids of the runs, the variant's first."""

    rule: Rule
    verdict: Verdict
    reason: str
    loss: Estimate | None = None
    units: str | None = None
    num_needed: int | None = None
    runs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The rule in words."""
        rule = self.rule
        batch = None if rule.batch is None else f"batch {rule.batch}"
        what = " ".join(filter(None, (rule.metric, rule.protocol or rule.task or batch)))
        return f"{rule.variant}: {what}" + (f" against {rule.versus}" if rule.versus else "")


class _IncomparableError(Exception):
    """Why a rule cannot be judged, and the runs that were looked at."""

    def __init__(self, reason: str, *records: Record) -> None:
        super().__init__(reason)
        self.records = records


def newest(suite: Suite, records: Sequence[Record]) -> dict[str, dict[str, Record]]:
    """The run that speaks for each row in everything that was measured: the latest whole one."""
    by_slot: dict[str, list[Record]] = {}
    for record in records:
        by_slot.setdefault(slot(record), []).append(record)
    return {
        where: tables.newest(those, suite.name, those[0].run.measure, suite.rows()) for where, those in by_slot.items()
    }


def judge(
    suite: Suite, records: Sequence[Record], baseline: Slots, skipped: Sequence[Skipped] = ()
) -> tuple[Judgement, ...]:
    """A verdict on every rule of the suite, in its order. `baseline` is what `baselines.read` found, and `skipped` what
    `store.read_all` could not use: an older run does not speak for one that failed or was cut since."""
    evidence = _Evidence(suite, newest(suite, records), baseline, _lost_runs(suite, skipped))
    return tuple(_judged(evidence, rule) for rule in _rules(suite))


def exit_code(judgements: Sequence[Judgement]) -> int:
    """0 if everything passes, 1 if anything fails, else 3."""
    codes = {EXIT_CODES[one.verdict] for one in judgements}
    return 1 if 1 in codes else max(codes)


def for_baseline(suite: Suite, records: Sequence[Record]) -> dict[str, dict[str, Record]]:
    """The newest whole runs that the suite's rules against a baseline are about."""
    found: dict[str, dict[str, Record]] = {}
    evidence = _Evidence(suite, newest(suite, records), {}, ())
    for rule in _rules(suite):
        for where in _slots(suite, rule) if rule.versus == BASELINE else ():
            try:
                record = evidence.computed(rule.variant, where)
                _comparable(record, record, over_time=True)
                if record.run.measure == "tasks":
                    _valid(record, evidence.slots[where].get(SOURCE))
            except _IncomparableError as error:
                raise UserError(
                    f"There is no baseline of {rule.variant} in {where} to be had: {error}.",
                    f"Measure it again by {_command(where)}.",
                ) from error
            found.setdefault(where, {})[rule.variant] = record
    if not found:
        raise UserError(
            f"No rule of suite '{suite.name}' is against a baseline.", f'Give one versus = "{BASELINE}" first.'
        )
    return found


def _rules(suite: Suite) -> tuple[Rule, ...]:
    if not suite.gate:
        raise UserError(f"Suite '{suite.name}' has no [[gate]] rules.", "Add one, or gate another suite.")
    return suite.gate


def _slots(suite: Suite, rule: Rule) -> list[str]:
    """What a rule's numbers are in."""
    if rule.metric == "log_ppl":
        return [f"ppl/{rule.protocol}"]
    if rule.metric == "score":
        return [f"tasks/{label}" for label in ([rule.task] if rule.task else suite.tasks)]
    return [METRICS[rule.metric].table or rule.metric]


def _command(where: str) -> str:
    """What makes a run."""
    return f"`harness {where.partition('/')[0]}`"


# -- Evidence ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _LostRun:
    """A run of a row that cannot be used. `where` is None where the file does not even say of what it was."""

    row: str
    measure: str
    where: str | None
    utc: str
    told: str


def _lost_runs(suite: Suite, skipped: Sequence[Skipped]) -> tuple[_LostRun, ...]:
    """Those of a suite, by the names of their files; without the ones that somebody interrupted."""
    found = []
    for one in skipped:
        run = one.record and one.record.run
        if one.record is not None and one.record.end.status == "interrupted":
            continue
        for row in suite.rows():
            name = rf"(?P<utc>\d{{8}}T\d{{6}}Z)-(?P<measure>\w+)-{re.escape(suite.name)}-{re.escape(row)}-[0-9a-f]{{8}}"
            if told := re.fullmatch(name, one.path.stem):
                where = slot(one.record) if one.record and run and run.dataset else None
                found.append(_LostRun(row, told["measure"], where, told["utc"], f"{one.path.name}: {one.reason}"))
    return tuple(found)


@dataclass(frozen=True)
class _Evidence:
    suite: Suite
    slots: Slots
    baseline: Slots
    lost: tuple[_LostRun, ...]

    def record(self, row: str, where: str) -> Record:
        """The run that speaks for a row: of the checkpoint that was measured last, and with no failure since."""
        found = self.slots.get(where, {}).get(row)
        utc = "" if found is None else _file_time(found)
        for lost in self.lost:
            is_of = lost.where or lost.measure
            if lost.row == row and where in (is_of, f"{is_of}/{where.partition('/')[2]}") and lost.utc > utc:
                raise _IncomparableError(f"a newer run of {row} cannot be used ({lost.told})")
        if found is None:
            raise _IncomparableError(f"no whole run of {row} ({where}): run {_command(where)}")
        last = max((rows[row] for rows in self.slots.values() if row in rows), key=_file_time)
        mine, newest = _digest(found), _digest(last)
        if mine and newest and mine != newest:
            told = f"run {found.run.run_id} is of another checkpoint ({mine[:8]}) than run {last.run.run_id} since"
            raise _IncomparableError(f"{told} ({newest[:8]}): run {_command(where)}", found)
        return found

    def is_baseline(self, rule: Rule) -> bool:
        """Whether nothing was measured since the baseline that a rule holds a variant against."""
        sides = (self.slots, self.baseline)
        ids = [[side[where][rule.variant].run.run_id for where in _slots(self.suite, rule)] for side in sides]
        return ids[0] == ids[1]

    def computed(self, row: str, where: str) -> Record:
        """The same, of an engine that computed what the checkpoint says."""
        return _as_meant(self.record(row, where))

    def pair(self, rule: Rule, where: str | None = None) -> tuple[Record, Record]:
        """The run of a rule's variant, and the one that it is held against, of the same thing. `where`: in what, for a
        rule that is about several."""
        if where is None:
            (where,) = _slots(self.suite, rule)
        record = self.computed(rule.variant, where)
        if rule.versus == BASELINE:
            other = self.baseline.get(where, {}).get(rule.variant)
            if other is None:
                how = "`harness gate --update-baseline --reason …` makes one"
                raise _IncomparableError(f"no baseline of {rule.variant} ({where}): {how}", record)
            other = _as_meant(other)
        else:
            assert rule.versus is not None
            other = self.computed(rule.versus, where)
        _comparable(record, other, over_time=rule.versus == BASELINE)
        return record, other


def _file_time(record: Record) -> str:
    """When a run began, as its file's name says it."""
    return record.run.started_utc.replace("-", "").replace(":", "")


def _digest(record: Record) -> str | None:
    digest: str | None = record.run.variant.get("artifact_digest")
    return digest


def _as_meant(record: Record) -> Record:
    engine = record.run.engine or {}
    if served := engine.get("served_as"):
        name = record.run.variant["name"]
        told = f"the {engine.get('name')} engine served {name} as {served}, which is another model"
        raise _IncomparableError(told, record)
    return record


def _comparable(record: Record, other: Record, *, over_time: bool) -> None:
    """`_IncomparableError` unless two runs are of the same thing, piece by piece, every piece once."""
    differing = evaluations.differing if record.run.measure == "tasks" else tables.differing
    if found := differing(record, other, over_time=over_time):
        raise _IncomparableError(f"differing: {', '.join(found)}", record, other)


# -- Verdicts ----------------------------------------------------------------------------------------------------


def _judged(evidence: _Evidence, rule: Rule) -> Judgement:
    try:
        judgement = _JUDGES[rule.metric](evidence, rule)
    except _IncomparableError as error:
        return Judgement(rule, "incomparable", str(error), runs=_ids(*error.records))
    if rule.versus == BASELINE and judgement.verdict == "pass" and evidence.is_baseline(rule):
        return replace(judgement, reason=f"{judgement.reason}: nothing was measured since the baseline")
    return judgement


def _ids(*records: Record) -> tuple[str, ...]:
    return tuple(dict.fromkeys(record.run.run_id for record in records))


def _decided(
    rule: Rule, loss: Estimate, units: str, *records: Record, exact: bool = False, note: str = ""
) -> Judgement:
    """The verdict on a loss. `exact`: both sides have the same numbers, which needs no interval."""
    margin = rule.margin
    assert margin is not None
    if exact:
        loss = replace(loss, low=loss.value, high=loss.value, standard_error=0.0)
    needed = None
    verdict: Verdict = "inconclusive"
    if loss.low is None or loss.high is None:
        needed = 2 if loss.num < 2 else None
        reason = f"there is no interval from {loss.num:,} of the {units}" + ("; 2 would give one" if needed else "")
    elif loss.high <= margin:
        verdict = "pass"
        told = f"at most {loss.high:.3g} is lost" if loss.high > 0 else f"at least {-loss.high:.3g} is gained"
        reason = f"the same numbers in all {units}" if exact else told
    elif loss.low > margin:
        verdict = "fail"
        told = f"at least {loss.low:.3g} is lost" if loss.low > 0 else f"at most {-loss.low:.3g} is gained"
        reason = f"{told}, and {margin:g} is accepted" if margin >= 0 else f"{told}, and {-margin:g} is wanted"
    else:
        needed = stats.num_needed(loss, margin)
        more = f"{needed:,} {units} would decide" if needed else f"no number of {units} would decide"
        reason = f"from {loss.low:.3g} to {loss.high:.3g} may be lost: at this loss {more}"
    reason = f"{reason} ({note})" if note else reason
    return Judgement(rule, verdict, reason, loss, units, needed, _ids(*records))


def _log_ppl(evidence: _Evidence, rule: Rule) -> Judgement:
    """The difference of log-perplexities over the same windows, or the same documents."""
    record, other = evidence.pair(rule)
    return _by_cluster(rule, record, other, tables.clusters_of)


def _kl(evidence: _Evidence, rule: Rule) -> Judgement:
    """The divergence from the source, or how much more of it there is than on the other side."""
    return _fidelity(evidence, rule, lambda window: window["kl_nats"])


def _top1(evidence: _Evidence, rule: Rule) -> Judgement:
    """The share of places with another likeliest token than the source's, or how much larger it is."""
    return _fidelity(evidence, rule, lambda window: window["num_scored"] - window["num_agreed"])


def _fidelity(evidence: _Evidence, rule: Rule, total: Callable[[Mapping[str, Any]], float]) -> Judgement:
    def clusters(record: Record) -> list[tuple[float, int]]:
        return [(total(window), window["num_scored"]) for window in record.kind("window")]

    if rule.versus != SOURCE:
        return _by_cluster(rule, *evidence.pair(rule), clusters)
    # The run of a variant is the comparison with the source.
    record = evidence.computed(rule.variant, *_slots(evidence.suite, rule))
    _comparable(record, record, over_time=False)
    totals, weights = zip(*clusters(record), strict=True)
    units, block = tables.clustering(record)
    return _decided(rule, stats.weighted_mean(totals, weights, block), units, record, exact=not any(totals))


def _by_cluster(
    rule: Rule, record: Record, other: Record, clusters: Callable[[Record], list[tuple[float, int]]]
) -> Judgement:
    """The paired difference of two means over the same clusters, each a total and its weight."""
    (before, weights), (after, _) = (zip(*clusters(one), strict=True) for one in (other, record))
    units, block = tables.clustering(record)
    loss = stats.paired_mean_difference(before, after, weights, block)
    return _decided(rule, loss, units, record, other, exact=before == after)


def _decode_speed(evidence: _Evidence, rule: Rule) -> Judgement:
    """What a decode of the suite's own length loses of its speed."""
    bench = evidence.suite.bench
    assert bench is not None and rule.batch is not None
    return _speed(evidence, rule, "decode", (rule.batch, bench.prompt_tokens, bench.new_tokens))


def _prefill_speed(evidence: _Evidence, rule: Rule) -> Judgement:
    """The same of a prefill."""
    bench = evidence.suite.bench
    assert bench is not None
    return _speed(evidence, rule, "prefill", (1, bench.prefill_tokens, 1))


def _speed(evidence: _Evidence, rule: Rule, kind: str, shape: tuple[int, int, int]) -> Judgement:
    """1 - the ratio of speeds, of runs that took turns in one session."""
    record, other = evidence.pair(rule)
    sides = []
    for one in (record, other):
        samples = tables.by_shape(one, kind).get(shape)
        if samples is None:
            size = f"batch {shape[0]} with {shape[1]:,} prompt tokens and {shape[2]:,} new ones"
            raise _IncomparableError(f"run {one.run.run_id} has no {kind} of {size}: run {_command('bench')}", one)
        sides.append(samples)
    ratio, units = tables.speed_ratio(kind, *sides)
    if units != "starts":  # what one start did to all its repetitions cannot be told from what the variant does
        ratio, units = replace(ratio, low=None, high=None, num=1), "starts"
    low, high = (None if bound is None else 1 - bound for bound in (ratio.high, ratio.low))
    return _decided(rule, replace(ratio, value=1 - ratio.value, low=low, high=high), units, record, other)


def _score(evidence: _Evidence, rule: Rule) -> Judgement:
    """What a task loses; without a task, what all of them lose on average, and that none of them loses too much."""
    if rule.task is not None:
        one = _task(evidence, rule, rule.task)
        return _decided(rule, one.loss, "documents", *one.records, note=one.metric, exact=one.exact)
    found: dict[str, _TaskLoss] = {}
    refused: list[str] = []
    looked_at: list[Record] = []
    for label in evidence.suite.tasks:
        try:
            found[label] = _task(evidence, rule, label)
            looked_at += found[label].records
        except _IncomparableError as error:
            refused.append(f"{label}: {error}")
            looked_at += error.records
    unjudged = "; ".join(refused)
    if not found:
        raise _IncomparableError(unjudged, *looked_at)
    assert rule.margin is not None
    p_values = [stats.p_above(one.loss, rule.margin) for one in found.values()]
    adjusted = stats.holm([1.0 if p is None else p for p in p_values])
    loss = stats.pooled([one.loss for one in found.values()])
    beyond = [
        f"{label} loses {one.loss.value:.3g} (p = {p:.2g} after Holm)"
        for (label, one), p in zip(found.items(), adjusted, strict=True)
        if p <= (1 - stats.LEVEL) / 2
    ]
    if beyond:
        reason = f"{'; '.join(beyond)}, and {rule.margin:g} is accepted" + (f"; {unjudged}" if unjudged else "")
        return Judgement(rule, "fail", reason, loss, "documents", runs=_ids(*looked_at))
    if refused:
        raise _IncomparableError(unjudged, *looked_at)
    return _decided(
        rule,
        loss,
        "documents",
        *looked_at,
        note="mean over tasks, none shown to be beyond the margin",
        exact=all(one.exact for one in found.values()),
    )


@dataclass(frozen=True)
class _TaskLoss:
    loss: Estimate
    metric: str
    records: tuple[Record, Record]
    exact: bool
    """Whether a rerun gave what the baseline did, item by item."""


def _task(evidence: _Evidence, rule: Rule, label: str) -> _TaskLoss:
    where = f"tasks/{label}"
    records = evidence.pair(rule, where)
    source = evidence.slots.get(where, {}).get(SOURCE)
    for one in records:
        _valid(one, source)
    found = evaluations.loss(*records)
    if isinstance(found, str):
        raise _IncomparableError(found, *records)
    exact = rule.versus == BASELINE and evaluations.same_outcomes(*records)
    return _TaskLoss(*found, records, exact)


def _valid(record: Record, source: Record | None) -> None:
    if reasons := evaluations.invalid(record, source):
        raise _IncomparableError(f"run {record.run.run_id} is invalid: {'; '.join(reasons)}", record)


def _verify(evidence: _Evidence, rule: Rule) -> Judgement:
    """That nothing is wrong with the checkpoint."""
    record = evidence.record(rule.variant, "verify")
    findings = record.kind("finding")
    errors = [finding for finding in findings if finding["severity"] == "error"]
    if not errors:
        found = f"no error, {len(findings):,} warnings" if findings else "nothing is found"
        return Judgement(rule, "pass", found, runs=_ids(record))
    first = f"{errors[0]['tensor']} {errors[0]['problem']}"
    more = f", and {len(errors) - 1:,} more" if len(errors) > 1 else ""
    return Judgement(rule, "fail", f"{first}{more}", runs=_ids(record))


def _arithmetic(evidence: _Evidence, rule: Rule) -> Judgement:
    """That every run was computed as the checkpoint says, in every setup."""
    suite = evidence.suite
    measured = [f"ppl/{name}" for name in (suite.ppl.protocols if suite.ppl else ())]
    measured += ["fidelity", "bench", *(f"tasks/{label}" for label in suite.tasks)]
    in_setups = [row for row in suite.rows() if row == rule.variant or row.startswith(row_name(rule.variant, ""))]
    runs = [
        (where if row == rule.variant else f"{row}, {where}", one)
        for where in measured
        for row in in_setups
        if (one := evidence.slots.get(where, {}).get(row))
    ]
    if not runs:
        raise _IncomparableError(f"no whole run of {rule.variant} on any engine: run `harness ppl`")
    others = [
        f"the {record.run.engine.get('name')} engine served it as {served} ({where})"
        for where, record in runs
        if record.run.engine and (served := record.run.engine.get("served_as"))
    ]
    reason = "; ".join(others) or f"computed as the checkpoint says in {len(runs):,} runs"
    return Judgement(rule, "fail" if others else "pass", reason, runs=_ids(*(one for _, one in runs)))


_JUDGES: dict[str, Callable[[_Evidence, Rule], Judgement]] = {
    "log_ppl": _log_ppl,
    "kl": _kl,
    "top1": _top1,
    "score": _score,
    "decode_speed": _decode_speed,
    "prefill_speed": _prefill_speed,
    "verify": _verify,
    "arithmetic": _arithmetic,
}


# -- Output ------------------------------------------------------------------------------------------------------


def frame(judgements: Sequence[Judgement]) -> pd.DataFrame:
    """One row a rule."""
    return columns.frame_of(
        [
            {
                "rule": one.name,
                "loss": one.loss,
                "margin": one.rule.margin,
                "num_units": f"{one.loss.num:,} {one.units}" if one.loss else None,
                "judged": one.verdict,
                "reason": one.reason,
            }
            for one in judgements
        ]
    )


def words(judgements: Sequence[Judgement]) -> str:
    """How many rules came to which verdict."""
    counts = {verdict: sum(one.verdict == verdict for one in judgements) for verdict in EXIT_CODES}
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)


def rows(judgements: Sequence[Judgement]) -> list[dict[str, Any]]:
    """The judgements as JSON values."""
    return [{"name": one.name, **asdict(one), "unit": METRICS[one.rule.metric].unit} for one in judgements]


def step_summary(suite: str, judgements: Sequence[Judgement]) -> str:
    """Markdown for the page of a CI run."""
    table = columns.markdown(frame(judgements), lambda record: record.path.as_posix())
    return f"### harness gate: {suite}\n\n{words(judgements)}\n\n{table}\n"


# XML 1.0 has no other characters.
_NO_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(suite: str, judgements: Sequence[Judgement]) -> str:
    """JUnit XML, one test case a rule. What could not be judged did not pass, and a CI system shows a skipped case as
    green: inconclusive is a failure of that type, incomparable an error."""
    tags = {"fail": "failure", "inconclusive": "failure", "incomparable": "error"}
    cases = [_case(suite, one, tags.get(one.verdict)) for one in judgements]
    counts = {
        "tests": len(cases),
        "failures": sum(case.find("failure") is not None for case in cases),
        "errors": sum(case.find("error") is not None for case in cases),
        "skipped": 0,
    }
    given = {key: str(count) for key, count in counts.items()}
    root = ElementTree.Element("testsuites", given)
    group = ElementTree.SubElement(root, "testsuite", {"name": f"harness gate: {suite}", **given})
    group.extend(cases)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=False) + "\n"


def _case(suite: str, judgement: Judgement, tag: str | None) -> ElementTree.Element:
    margin = "" if judgement.rule.margin is None else f", margin {judgement.rule.margin:g}"  # which makes it unique
    name, reason = (_NO_XML.sub("\ufffd", text) for text in (judgement.name + margin, judgement.reason))
    case = ElementTree.Element("testcase", {"classname": f"harness.gate.{suite}", "name": name})
    loss = columns.shown("loss", judgement.loss)
    said = f"{judgement.verdict}: {reason}\nloss {loss}, margin {columns.shown('margin', judgement.rule.margin)}"
    if tag is None:
        ElementTree.SubElement(case, "system-out").text = said
    else:
        ElementTree.SubElement(case, tag, {"type": judgement.verdict, "message": reason}).text = said
    return case
