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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal
from xml.etree import ElementTree

from harness.errors import UserError
from harness.record import stats
from harness.record.baselines import Slots
from harness.record.run import Record, Skipped
from harness.record.stats import Estimate
from harness.report import runs, speed_tables, task_tables
from harness.report.gate_runs import (
    GateRuns,
    IncomparableError,
    check_comparable,
    check_valid,
    command_for,
    lost_runs,
    newest_by_slot,
    slots_of,
)
from harness.report.tables import Table, cell_text, markdown_table, table_of
from harness.suite.names import BASELINE, SOURCE, row_name
from harness.suite.rules import METRICS, Rule
from harness.suite.schema import Suite

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


def judge(
    suite: Suite, records: Sequence[Record], baseline: Slots, skipped: Sequence[Skipped] = ()
) -> tuple[Judgement, ...]:
    """A verdict on every rule of the suite, in its order. `baseline` is `baselines.baseline_in_force`, and `skipped`
    what `store.read_all` could not use: an older run does not speak for one that failed or was cut since."""
    evidence = GateRuns(suite, newest_by_slot(suite, records), baseline, lost_runs(suite, skipped))
    return tuple(_judged(evidence, rule) for rule in _rules(suite))


def exit_code(judgements: Sequence[Judgement]) -> int:
    """0 if everything passes, 1 if anything fails, else 3."""
    codes = {EXIT_CODES[one.verdict] for one in judgements}
    return 1 if 1 in codes else max(codes)


def for_baseline(suite: Suite, records: Sequence[Record]) -> dict[str, dict[str, Record]]:
    """The newest whole runs that the suite's rules against a baseline are about."""
    found: dict[str, dict[str, Record]] = {}
    evidence = GateRuns(suite, newest_by_slot(suite, records), {}, ())
    for rule in _rules(suite):
        for where in slots_of(suite, rule) if rule.versus == BASELINE else ():
            try:
                record = evidence.computed(rule.variant, where)
                check_comparable(record, record, over_time=True)
                if record.run.measure == "tasks":
                    check_valid(record, evidence.slots[where].get(SOURCE))
            except IncomparableError as error:
                raise UserError(
                    f"There is no baseline of {rule.variant} in {where} to be had: {error}.",
                    f"Measure it again by {command_for(where)}.",
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


def _judged(evidence: GateRuns, rule: Rule) -> Judgement:
    try:
        judgement = _JUDGES[rule.metric](evidence, rule)
    except IncomparableError as error:
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


def _log_ppl(evidence: GateRuns, rule: Rule) -> Judgement:
    """The difference of log-perplexities over the same windows, or the same documents."""
    return _by_cluster(rule, *evidence.pair(rule), runs.clusters_of)


def _fidelity(evidence: GateRuns, rule: Rule) -> Judgement:
    """The divergence from the source, or the share of places with another likeliest token than the source's; against
    another side than the source, how much more of it there is."""

    def clusters(record: Record) -> list[tuple[float, int]]:
        windows = record.kind("window")
        if rule.metric == "kl":
            return [(one["kl_nats"], one["num_scored"]) for one in windows]
        return [(one["num_scored"] - one["num_agreed"], one["num_scored"]) for one in windows]

    if rule.versus != SOURCE:
        return _by_cluster(rule, *evidence.pair(rule), clusters)
    # The run of a variant is the comparison with the source.
    record = evidence.computed(rule.variant, *slots_of(evidence.suite, rule))
    check_comparable(record, record, over_time=False)
    totals, weights = zip(*clusters(record), strict=True)
    units, block = runs.clustering(record)
    return _decided(rule, stats.weighted_mean(totals, weights, block), units, record, exact=not any(totals))


def _by_cluster(
    rule: Rule, record: Record, other: Record, clusters: Callable[[Record], list[tuple[float, int]]]
) -> Judgement:
    """The paired difference of two means over the same clusters, each a total and its weight."""
    (before, weights), (after, _) = (zip(*clusters(one), strict=True) for one in (other, record))
    units, block = runs.clustering(record)
    loss = stats.paired_mean_difference(before, after, weights, block)
    return _decided(rule, loss, units, record, other, exact=before == after)


def _speed(evidence: GateRuns, rule: Rule) -> Judgement:
    """What a decode or a prefill of the suite's own length loses of its speed: 1 - the ratio of speeds, of runs that
    took turns in one session."""
    bench, kind = evidence.suite.bench, rule.metric.removesuffix("_speed")
    assert bench is not None
    shape = (
        (rule.batch or 1, bench.prompt_tokens, bench.new_tokens) if kind == "decode" else (1, bench.prefill_tokens, 1)
    )
    record, other = evidence.pair(rule)
    sides = []
    for one in (record, other):
        samples = speed_tables.by_shape(one, kind).get(shape)
        if samples is None:
            size = f"batch {shape[0]} with {shape[1]:,} prompt tokens and {shape[2]:,} new ones"
            raise IncomparableError(f"run {one.run.run_id} has no {kind} of {size}: run {command_for('bench')}", one)
        sides.append(samples)
    ratio, units = speed_tables.speed_ratio(kind, *sides)
    loss = one_minus(ratio)
    if units != "starts":  # what one start did to all its repetitions cannot be told from what the variant does
        loss = replace(loss, low=None, high=None, num=1)
    return _decided(rule, loss, "starts", record, other)


def one_minus(share: Estimate) -> Estimate:
    """What is lost of a share that is left, or left of one that is lost, with its interval."""
    low, high = (None if bound is None else 1 - bound for bound in (share.high, share.low))
    return replace(share, value=1 - share.value, low=low, high=high)


def _score(evidence: GateRuns, rule: Rule) -> Judgement:
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
        except IncomparableError as error:
            refused.append(f"{label}: {error}")
            looked_at += error.records
    unjudged = "; ".join(refused)
    if not found:
        raise IncomparableError(unjudged, *looked_at)
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
        raise IncomparableError(unjudged, *looked_at)
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


def _task(evidence: GateRuns, rule: Rule, label: str) -> _TaskLoss:
    where = f"tasks/{label}"
    records = evidence.pair(rule, where)
    source = evidence.slots.get(where, {}).get(SOURCE)
    for one in records:
        check_valid(one, source)
    found = task_tables.score_loss(*records)
    if isinstance(found, str):
        raise IncomparableError(found, *records)
    exact = rule.versus == BASELINE and task_tables.same_outcomes(*records)
    return _TaskLoss(*found, records, exact)


def _verify(evidence: GateRuns, rule: Rule) -> Judgement:
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


def _arithmetic(evidence: GateRuns, rule: Rule) -> Judgement:
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
        raise IncomparableError(f"no whole run of {rule.variant} on any engine: run `harness ppl`")
    others = [
        f"the {record.run.engine.get('name')} engine served it as {served} ({where})"
        for where, record in runs
        if record.run.engine and (served := record.run.engine.get("served_as"))
    ]
    reason = "; ".join(others) or f"computed as the checkpoint says in {len(runs):,} runs"
    return Judgement(rule, "fail" if others else "pass", reason, runs=_ids(*(one for _, one in runs)))


_JUDGES: dict[str, Callable[[GateRuns, Rule], Judgement]] = {
    "log_ppl": _log_ppl,
    "kl": _fidelity,
    "top1": _fidelity,
    "score": _score,
    "decode_speed": _speed,
    "prefill_speed": _speed,
    "verify": _verify,
    "arithmetic": _arithmetic,
}


# -- Verdicts for people and for CI systems ----------------------------------------------------------------------


def verdict_table(judgements: Sequence[Judgement]) -> Table:
    """One row a rule."""
    return table_of(
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


def verdict_counts(judgements: Sequence[Judgement]) -> str:
    """How many rules came to which verdict."""
    counts = {verdict: sum(one.verdict == verdict for one in judgements) for verdict in EXIT_CODES}
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)


def verdict_rows(judgements: Sequence[Judgement]) -> list[dict[str, Any]]:
    """The judgements as JSON values."""
    return [{"name": one.name, **asdict(one), "unit": METRICS[one.rule.metric].unit} for one in judgements]


def step_summary(suite: str, judgements: Sequence[Judgement]) -> str:
    """Markdown for the page of a CI run."""
    table = markdown_table(verdict_table(judgements), lambda record: record.path.as_posix())
    return f"### harness gate: {suite}\n\n{verdict_counts(judgements)}\n\n{table}\n"


# XML 1.0 has no other characters.
_NO_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(suite: str, judgements: Sequence[Judgement]) -> str:
    """JUnit XML, one test case a rule. What could not be judged did not pass, and a CI system shows a skipped case as
    green: inconclusive is a failure of that type, incomparable an error."""
    tags = {"fail": "failure", "inconclusive": "failure", "incomparable": "error"}
    cases = [_case(suite, one, tags.get(one.verdict)) for one in judgements]
    counts = {
        "tests": str(len(cases)),
        "failures": str(sum(case.find("failure") is not None for case in cases)),
        "errors": str(sum(case.find("error") is not None for case in cases)),
        "skipped": "0",
    }
    root = ElementTree.Element("testsuites", counts)
    group = ElementTree.SubElement(root, "testsuite", {"name": f"harness gate: {suite}", **counts})
    group.extend(cases)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=False) + "\n"


def _case(suite: str, judgement: Judgement, tag: str | None) -> ElementTree.Element:
    margin = "" if judgement.rule.margin is None else f", margin {judgement.rule.margin:g}"  # which makes it unique
    name, reason = (_NO_XML.sub("\ufffd", text) for text in (judgement.name + margin, judgement.reason))
    case = ElementTree.Element("testcase", {"classname": f"harness.gate.{suite}", "name": name})
    loss = cell_text("loss", judgement.loss)
    said = f"{judgement.verdict}: {reason}\nloss {loss}, margin {cell_text('margin', judgement.rule.margin)}"
    if tag is None:
        ElementTree.SubElement(case, "system-out").text = said
    else:
        ElementTree.SubElement(case, tag, {"type": judgement.verdict, "message": reason}).text = said
    return case
