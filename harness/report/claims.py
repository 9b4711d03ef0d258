"""Claims in a suite's prose, held to its records.

A card has tables that are computed, and a title and a description that people write. What these say of quality and
speed ("near-lossless", "within noise", "1.5x faster than the source") must follow from the same records as the tables.
`harness.report.prose` finds the claims; here is what each kind asks for:

- `lossless`, `identical`: the weights come back exactly (`harness verify`), and what `noise` asks for. Weights that
  were rounded never pass.
- `noise`: the whole interval of the difference in log-perplexity, by every protocol, and that of the divergence lie
  within what the source differs from itself by, which must have been measured; and no task is shown to have lost.
- `near-lossless`, and `equal` ("on par", "matches", "full BF16 quality"): equivalence. The whole interval of the
  difference in log-perplexity, by every protocol, of the divergence, and of the mean score where the suite has tasks,
  lies within the margins of the suite's [claims] table, to both sides. One that reaches beyond leaves the question
  open, and open is no.
- `faster`: the whole interval of the ratio of speeds, of runs of one session and over starts of the engine, lies above
  1, at batch 1 or at the batch sizes that the sentence names. A number ("51 % faster") lies within the interval or
  below it. The torch engine and CPUs do not multiply 4-bit weights, and say nothing of how fast that is.
- `no-slower` ("as fast as", "3 % slower"): the same with the ratio above 0.97, or above what the sentence leaves.
- `better` ("beats", "outperforms", "most accurate"): the whole interval of the paired difference lies on the good side,
  in what the sentence speaks of (perplexity, divergence, tasks, speed; each task if it says so), else in all of the
  quality that is measured. The best of the variants is held against the other variants, not against the source.
- `within` ("within 1.8 % of BF16", "only 0.2 % worse"): the bad end of the interval of what is lost lies at or below
  the number: of the perplexity itself, by every protocol, of the source's score, or of the speed; in what the sentence
  speaks of, else in all of the quality that is measured.
- `recovery` ("99 % recovery", "retains 99 % of the accuracy"): the share of the source's score, of the same items
  under the same conditions, mean over tasks. Its interval lies at or above the number, since that much is promised.
  Of a score that was assumed, or read somewhere, there is no share.

The numbers are the gate's: a claim comes down to rules, and what keeps a rule from being judged (a missing run, an
older checkpoint, other conditions, a kernel that computed another model) keeps a claim from being supported.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from harness.record import stats
from harness.record.store import Record, Skipped
from harness.report import columns, fidelity_tables, gate, prose, runs, task_tables
from harness.report.numbers import format_estimate
from harness.report.prose import Mention
from harness.suite.metrics import METRICS
from harness.suite.names import NOISE, SOURCE
from harness.suite.schema import Rule, Suite

REMEDY = "Measure what would support it, say what the tables say, or take the words out."


@dataclass(frozen=True)
class Claim:
    """A claim and what the records say to it.

    `key` is of the suite file, `sentence` as it stands there, `words` what makes the claim, `kind` one of
    `prose.KINDS`; said `of` some rows and held against others. `reason` is what supports it, with the numbers; of one
    that is not supported it says where the claim stands, and why it cannot. `runs` are the ids of the runs that were
    looked at.
    """

    key: str
    sentence: str
    words: str
    kind: str
    of: tuple[str, ...]
    versus: tuple[str, ...]
    supported: bool
    reason: str
    runs: tuple[str, ...]


def claims_of(suite: Suite, records: Sequence[Record], skipped: Sequence[Skipped] = ()) -> tuple[Claim, ...]:
    """Every claim in the prose of a suite, in the order in which they are made, held to records, of which the newest
    speak; `skipped` as for `gate.judge`."""
    facts = _Facts(suite, records, skipped)
    return tuple(_claim(facts, mention) for mention in prose.mentions(suite))


def rows(claims: Sequence[Claim]) -> list[dict[str, Any]]:
    """The claims as JSON values."""
    return [asdict(claim) for claim in claims]


@dataclass(frozen=True)
class _Finding:
    """One thing that a claim asks for: whether the records have it, and the numbers."""

    holds: bool
    told: str
    runs: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Facts:
    """A suite and its records, as the gate reads them."""

    suite: Suite
    records: Sequence[Record]
    skipped: Sequence[Skipped]

    def judged(self, metric: str, row: str, versus: str, margin: float = 0.0, **more: Any) -> gate.Judgement:
        """The gate's verdict on a rule that need not be the suite's."""
        rule = Rule(metric=metric, variant=row, versus=versus, margin=margin, **more)
        (judgement,) = gate.judge(replace(self.suite, gate=(rule,)), self.records, {}, self.skipped)
        return judgement

    def measures(self, metric: str) -> bool:
        return bool(getattr(self.suite, METRICS[metric].table or ""))

    def newest(self, measure: str) -> dict[str, Record]:
        return runs.newest_runs(self.records, self.suite.name, measure, (*self.suite.rows(), *NOISE))

    def engines(self, runs: Sequence[str]) -> list[Mapping[str, Any]]:
        return [record.run.engine or {} for record in self.records if record.run.run_id in runs]

    @cached_property
    def perplexities(self) -> dict[str, dict[str, Record]]:
        protocols = self.suite.ppl.protocols if self.suite.ppl else ()
        return runs.newest_by_protocol(self.records, self.suite.name, protocols, self.suite.rows())


_MOST = 3  # reasons why a claim is not supported

_Check = Callable[[_Facts, Mention, str, str], list[_Finding]]  # of a row, against another


def _claim(facts: _Facts, mention: Mention) -> Claim:
    of, versus = mention.of, mention.versus
    check, says = _KINDS[mention.kind]
    pairs = [(row, other) for row in of for other in versus if row != other and mention.unknown is None]
    findings = [finding for pair in pairs for finding in check(facts, mention, *pair)]
    lacking = [finding.told for finding in findings if not finding.holds]
    if mention.unknown is not None:
        lacking = [f"there is no record of '{mention.unknown}', and what was read or assumed is no baseline"]
    elif not pairs:
        lacking = ["the suite has nothing else to hold it against"]
    reason = "; ".join(finding.told for finding in findings)
    if lacking:
        said = f"{_listed(of)} {'is' if len(of) == 1 else 'are'} {says} {mention.unknown or _listed(versus)}"
        where = f"suite '{facts.suite.name}', {mention.key}: '{mention.context()}' says that {said}"
        lacking = list(dict.fromkeys(lacking))
        more = f"; and {len(lacking) - _MOST:,} more" if len(lacking) > _MOST else ""
        reason = f"{where}, and the records do not: {'; '.join(lacking[:_MOST])}{more}"
    runs = tuple(dict.fromkeys(run for finding in findings for run in finding.runs))
    return Claim(mention.key, mention.sentence, mention.words, mention.kind, of, versus, not lacking, reason, runs)


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _words(judgement: gate.Judgement) -> str:
    return f"{judgement.name}: {judgement.reason}"


def _unmeasured(metric: str) -> _Finding:
    return _Finding(False, f"the suite has no [{METRICS[metric].table}], so there is no record of {metric}")


# -- Equivalence -------------------------------------------------------------------------------------------------


def _equivalent(judgement: gate.Judgement) -> _Finding:
    """That the interval of a difference lies within the margin of its rule to both sides: two one-sided tests, of which
    the gate has made the one against a loss."""
    loss, margin = judgement.loss, judgement.rule.margin
    assert margin is not None
    if judgement.verdict != "pass" or loss is None or loss.low is None:
        return _Finding(False, f"{_words(judgement)} (margin {margin:.3g})", judgement.runs)
    told = f"{judgement.name}: {format_estimate(loss, '+.3g')} {METRICS[judgement.rule.metric].unit}"
    if loss.low < -margin:
        return _Finding(False, f"{told} lost, which reaches beyond {-margin:+.3g}", judgement.runs)
    return _Finding(True, f"{told} lost, within ± {margin:.3g}", judgement.runs)


def _log_ppl(facts: _Facts, row: str, versus: str, nats: float) -> Iterator[gate.Judgement]:
    """By every protocol, with a margin of so many nats per token, also where perplexity is per word."""
    assert facts.suite.ppl is not None
    for protocol in facts.suite.ppl.protocols:
        clusters, tokens = [(0.0, 1)], 1
        if record := facts.perplexities.get(protocol, {}).get(row):
            clusters = runs.clusters_of(record)
            tokens = sum(window["num_scored"] for window in record.kind("window"))
        units = sum(weight for _, weight in clusters)
        yield facts.judged("log_ppl", row, versus, nats * tokens / units if units else nats, protocol=protocol)


def _near(facts: _Facts, _: Mention, row: str, versus: str) -> list[_Finding]:
    margins = facts.suite.claims
    if missing := [_unmeasured(metric) for metric in ("log_ppl", "kl") if not facts.measures(metric)]:
        return missing
    judged = [
        *_log_ppl(facts, row, versus, margins.near_lossless_log_ppl),
        facts.judged("kl", row, versus, margins.near_lossless_kl),
    ]
    if facts.measures("score"):
        judged.append(facts.judged("score", row, versus, margins.near_lossless_score))
    return [_equivalent(judgement) for judgement in judged]


def _at_noise(facts: _Facts, _: Mention, row: str, versus: str) -> list[_Finding]:
    if missing := [_unmeasured(metric) for metric in ("log_ppl", "kl") if not facts.measures(metric)]:
        return missing
    runs = facts.newest("fidelity")
    floor = fidelity_tables.noise_floor(runs, runs[row]) if row in runs else None
    log_ppl_nats = fidelity_tables.log_ppl_floor(runs, facts.perplexities)
    if floor is None or log_ppl_nats is None:
        told = f"there is no record of {row} in [fidelity] with the source beside itself: run `nox -s fidelity`"
        return [_Finding(False, told)]
    judged = [*_log_ppl(facts, row, versus, log_ppl_nats), facts.judged("kl", row, versus, floor.kl_nats)]
    found = [_equivalent(judgement) for judgement in judged]
    if facts.measures("score"):
        judgement = facts.judged("score", row, versus)
        found.append(_Finding(judgement.verdict in ("pass", "inconclusive"), _words(judgement), judgement.runs))
    return found


def _lossless(facts: _Facts, mention: Mention, row: str, versus: str) -> list[_Finding]:
    found = _at_noise(facts, mention, row, versus)
    if versus != SOURCE:  # no record has the weights of two variants side by side
        return found
    record = facts.newest("verify").get(row)
    errors = {role["role"]: float(role["max_abs_error"]) for role in record.kind("roundtrip")} if record else {}
    if record is None or not errors:
        return [
            *found,
            _Finding(False, f"there is no record of {row} beside the source's weights: run `nox -s verify`"),
        ]
    role = max(errors, key=lambda name: errors[name])
    told = f"rounded by up to {errors[role]:.3g} in {role}" if errors[role] else "exactly the source's"
    return [*found, _Finding(not errors[role], f"{row}: its weights are {told}", (record.run.run_id,))]


# -- Superiority -------------------------------------------------------------------------------------------------


# A slowdown that "as fast as" may hide. A choice, three times the 1 % that the margins of quality allow.
_AS_FAST = 0.97


def _faster(facts: _Facts, mention: Mention, row: str, versus: str) -> list[_Finding]:
    return _speeds(facts, mention, row, versus, 1.0, mention.number)


def _no_slower(facts: _Facts, mention: Mention, row: str, versus: str) -> list[_Finding]:
    return _speeds(facts, mention, row, versus, mention.number[0] if mention.number else _AS_FAST)


def _speeds(
    facts: _Facts, mention: Mention, row: str, versus: str, above: float, number: tuple[float, float] | None = None
) -> list[_Finding]:
    if not facts.measures("decode_speed"):
        return [_unmeasured("decode_speed")]
    if mention.speaks_of("depth"):
        return [
            _Finding(False, "a speed at some depth stands in the tables, and no rule judges it: leave the depth out")
        ]
    judged = [facts.judged("prefill_speed", row, versus)] if mention.speaks_of("prefill_speed") else []
    if not judged or mention.speaks_of("decode_speed"):
        judged += [facts.judged("decode_speed", row, versus, batch=batch) for batch in mention.batches or (1,)]
    return [_ratio(facts, judgement, above, number) for judgement in judged]


def _ratio(facts: _Facts, judgement: gate.Judgement, above: float, number: tuple[float, float] | None) -> _Finding:
    """That the interval of a ratio of speeds lies above a bound, and a number not above the interval."""
    loss, runs = judgement.loss, judgement.runs
    if loss is None:
        return _Finding(False, _words(judgement), runs)
    if idle := [told for engine in facts.engines(runs) if (told := _says_nothing(engine))]:
        return _Finding(False, f"{judgement.name}: {idle[0]}, which says nothing of how fast NVFP4 is", runs)
    low, high = (None if bound is None else 1 - bound for bound in (loss.high, loss.low))
    ratio = replace(loss, value=1 - loss.value, low=low, high=high)
    told = f"{judgement.name}: {format_estimate(ratio, '.3f')} × its speed"
    if ratio.low is None or ratio.high is None:
        return _Finding(False, f"{told}, and {judgement.reason}", runs)
    if ratio.low <= above:
        return _Finding(False, f"{told}, and {above:g} is not below that interval", runs)
    if number is not None and number[0] - number[1] > ratio.high:
        return _Finding(False, f"{told}, and {number[0]:g} is above that interval", runs)
    return _Finding(True, told, runs)


def _says_nothing(engine: Mapping[str, Any]) -> str | None:
    """Why an engine's speed is not that of NVFP4; None if it is."""
    if engine.get("name") == "torch":
        return "the torch engine decompresses weights before it computes"
    return "a CPU has no kernels for 4-bit floats" if engine.get("device") == "cpu" else None


def _better(facts: _Facts, mention: Mention, row: str, versus: str) -> list[_Finding]:
    tasks = tuple(facts.suite.tasks)
    tasks = tasks if mention.speaks_of("every_task") else mention.names(tasks)
    metrics = [metric for metric in ("log_ppl", "kl", "score", "decode_speed") if mention.speaks_of(metric)]
    if tasks and "score" not in metrics:
        metrics.append("score")
    if not metrics:  # of the divergence from itself the source has none
        quality = ("log_ppl", "score") if SOURCE in (row, versus) else ("log_ppl", "kl", "score")
        metrics = [metric for metric in quality if facts.measures(metric)] or ["log_ppl"]
    found = []
    for metric in metrics:
        if not facts.measures(metric):
            found.append(_unmeasured(metric))
        elif metric == "decode_speed":
            found += _speeds(facts, mention, row, versus, 1.0)
        elif metric == "log_ppl":
            found += [_superior(judgement) for judgement in _log_ppl(facts, row, versus, 0.0)]
        elif metric == "score":
            found += [_superior(facts.judged(metric, row, versus, task=task)) for task in tasks or (None,)]
        else:
            found.append(_superior(facts.judged(metric, row, versus)))
    return found


def _superior(judgement: gate.Judgement) -> _Finding:
    """That the interval of a loss lies wholly below zero."""
    loss = judgement.loss
    if judgement.verdict != "pass" or loss is None or loss.high is None or loss.high >= 0:
        return _Finding(False, _words(judgement), judgement.runs)
    unit = METRICS[judgement.rule.metric].unit
    return _Finding(True, f"{judgement.name}: {format_estimate(loss, '+.3g')} {unit} lost", judgement.runs)


def _within(facts: _Facts, mention: Mention, row: str, versus: str) -> list[_Finding]:
    """That what is lost is at most a share: of the perplexity, of the score, or of the speed."""
    assert mention.number is not None
    share, _ = mention.number
    named = [metric for metric in ("log_ppl", "score", "decode_speed", "prefill_speed") if mention.speaks_of(metric)]
    metrics = named or [metric for metric in ("log_ppl", "score") if facts.measures(metric)] or ["log_ppl"]
    left = replace(mention, number=(1 - share, 0.0))
    found = []
    for metric in metrics:
        if not facts.measures(metric):
            found.append(_unmeasured(metric))
        elif metric == "log_ppl":
            assert facts.suite.ppl is not None
            for protocol in facts.suite.ppl.protocols:
                judgement = facts.judged(metric, row, versus, math.log1p(share), protocol=protocol)
                found.append(_Finding(judgement.verdict == "pass", _words(judgement), judgement.runs))
        else:
            found += (_recovery if metric == "score" else _no_slower)(facts, left, row, versus)
    return found


# -- Recovery ----------------------------------------------------------------------------------------------------


def _recovery(facts: _Facts, mention: Mention, row: str, versus: str) -> list[_Finding]:
    basis = "recovery is a share of what the source itself scored under the same conditions"
    if not facts.measures("score"):
        return [_Finding(False, f"{basis}, and the suite has no [tasks]")]
    if versus != SOURCE:
        return [_Finding(False, f"{basis}, and not of what {versus} scored")]
    if mention.speaks_of("assumption"):
        return [_Finding(False, f"{basis}, and not of an assumed baseline")]
    labels = mention.names(tuple(facts.suite.tasks)) or tuple(facts.suite.tasks)
    judged = [facts.judged("score", row, versus, task=label) for label in labels]
    runs = tuple(run for judgement in judged for run in judgement.runs)
    if refused := [_words(judgement) for judgement in judged if judgement.verdict == "incomparable"]:
        return [_Finding(False, f"{basis}, and not of an assumed baseline: {'; '.join(refused)}", runs)]
    measured = task_tables.newest_by_task(facts.records, facts.suite, (SOURCE, row))
    frame = task_tables.score_table({label: measured[label] for label in labels})
    # Adjusted p-values are of the metric that a task names first.
    compared = [one for one in frame.rows if one["variant"] == row and one.get("p_holm") is not None]
    shares = [one["recovery_ratio"] for one in compared]
    if not shares or None in shares:
        return [_Finding(False, f"{row}: not every task has a score of which a share could be left", runs)]
    share, (wanted, half) = stats.pooled(shares), mention.number or (1.0, 0.0)
    percent = format_estimate(columns.scaled(share, 100), ".1f")
    told = f"{row}: {percent} % of the source's score, mean of {len(shares)} {'task' if len(shares) == 1 else 'tasks'}"
    if share.low is None or share.low < wanted - half:
        return [_Finding(False, f"{told}, which does not make sure of {100 * wanted:g} %", runs)]
    return [_Finding(True, told, runs)]


# By kind: what it asks for, and what it says of a row and another one.
_KINDS: dict[str, tuple[_Check, str]] = {
    "near-lossless": (_near, "nearly without loss beside"),
    "noise": (_at_noise, "within the noise of"),
    "lossless": (_lossless, "without loss beside"),
    "equal": (_near, "as good as"),
    "recovery": (_recovery, "at such a share of the score of"),
    "faster": (_faster, "faster than"),
    "no-slower": (_no_slower, "about as fast as"),
    "within": (_within, "at most so much worse than"),
    "better": (_better, "better than"),
}
