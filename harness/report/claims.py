"""Claims of a suite, held to its records: what the card may say of a variant in words.

A suite declares what it claims in `[[claim]]` tables, the gate's statistics judge each claim, and the sentence of a
claim that holds is generated. What each kind asks:

- `lossless`: the weights come back exactly (`harness verify`), and what `noise` asks. Rounded weights never pass.
- `noise`: the whole interval of the difference in log-perplexity, by every protocol, and that of the divergence lie
  within what the source differs from itself by, which must have been measured; and no task is shown to have lost.
- `near-lossless`: the whole interval of the difference in log-perplexity, by every protocol, of the divergence, and of
  the mean score where the suite has tasks, lies within the margins of the suite's [claims] table, to both sides. An
  interval that reaches beyond a margin leaves the question open, and open is no.
- `better`: the whole interval of the paired difference lies on the good side, in the metric that the claim names, else
  in all of the quality that is measured.
- `faster`: the whole interval of the ratio of speeds, of runs of one session and over starts of the engine, lies above
  1 + margin. The torch engine and CPUs do not multiply 4-bit weights, and support no claim of speed.
- `within`: the whole interval of what is lost lies at or below the margin: a share of the perplexity itself, by every
  protocol, or of the speed.
- `recovery`: the share of the source's score that is left, of the same items under the same conditions and mean over
  tasks: its interval lies at or above 1 - margin.

A claim comes down to rules of the gate. What keeps a rule from being judged (a missing run, an older checkpoint, other
conditions, a kernel that computed another model) keeps a claim from being supported.
"""

import math
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from harness.errors import UserError
from harness.record import stats
from harness.record.run import Record, Skipped
from harness.report import gate, quality_tables, runs, task_tables
from harness.report.numbers import format_estimate
from harness.report.tables import scaled
from harness.suite.names import NOISE, SOURCE
from harness.suite.rules import METRICS, Claim, Rule
from harness.suite.schema import Suite

REMEDY = "Measure what would support it, or take the [[claim]] out."


@dataclass(frozen=True)
class JudgedClaim:
    """A claim and what the records say to it.

    `sentence` is what the card says of it. `reason` has the numbers that support it; of a claim that is not supported
    it says where the claim stands, and why it cannot. `runs` are the ids of the runs that were looked at.
    """

    claim: Claim
    sentence: str
    supported: bool
    reason: str
    runs: tuple[str, ...]


def judged_claims(suite: Suite, records: Sequence[Record], skipped: Sequence[Skipped] = ()) -> tuple[JudgedClaim, ...]:
    """Every claim of a suite, held to records, of which the newest speak; `skipped` as for `gate.judge`."""
    facts = _Facts(suite, records, skipped)
    return tuple(_judged(facts, place, claim) for place, claim in enumerate(suite.claim))


def claim_rows(judged: Sequence[JudgedClaim]) -> list[dict[str, Any]]:
    """The claims as JSON values."""
    said = ("sentence", "supported", "reason", "runs")
    return [{**asdict(one.claim), **{key: getattr(one, key) for key in said}} for one in judged]


@dataclass(frozen=True)
class _Finding:
    """One thing that a claim asks: whether the records have it, and the numbers."""

    holds: bool
    words: str
    runs: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Facts:
    """A suite and its records, as the gate reads them."""

    suite: Suite
    records: Sequence[Record]
    skipped: Sequence[Skipped]

    def judged(self, metric: str, claim: Claim, margin: float = 0.0, **more: Any) -> gate.Judgement:
        """The gate's verdict on a rule that need not be the suite's."""
        rule = Rule(metric=metric, variant=claim.variant, versus=claim.versus, margin=margin, **more)
        (judgement,) = gate.judge(replace(self.suite, gate=(rule,)), self.records, {}, self.skipped)
        return judgement

    def measures(self, metric: str) -> bool:
        return bool(getattr(self.suite, METRICS[metric].table or ""))

    def newest(self, measure: str) -> dict[str, Record]:
        return runs.newest_runs(self.records, self.suite.name, measure, (*self.suite.rows(), *NOISE))

    def protocols(self, claim: Claim) -> tuple[str, ...]:
        """The protocol that a claim names, or every one of the suite."""
        return (claim.protocol,) if claim.protocol else self.suite.ppl.protocols if self.suite.ppl else ()

    @cached_property
    def perplexities(self) -> dict[str, dict[str, Record]]:
        protocols = self.suite.ppl.protocols if self.suite.ppl else ()
        return runs.newest_by_protocol(self.records, self.suite.name, protocols, self.suite.rows())


_MOST = 3  # reasons why a claim is not supported


def _judged(facts: _Facts, place: int, claim: Claim) -> JudgedClaim:
    findings, sentence = _KINDS[claim.kind](facts, claim), claim_sentence(claim)
    lacking = list(dict.fromkeys(finding.words for finding in findings if not finding.holds))
    reason = "; ".join(finding.words for finding in findings)
    if lacking:
        more = f"; and {len(lacking) - _MOST:,} more" if len(lacking) > _MOST else ""
        where = f"suite '{facts.suite.name}', claim[{place}]: no record supports that {sentence}"
        reason = f"{where}: {'; '.join(lacking[:_MOST])}{more}"
    ids = tuple(dict.fromkeys(run for finding in findings for run in finding.runs))
    return JudgedClaim(claim, sentence, not lacking, reason, ids)


def _finding(judgement: gate.Judgement, holds: bool, words: str = "") -> _Finding:
    return _Finding(holds, words or f"{judgement.name}: {judgement.reason}", judgement.runs)


def _lost(judgement: gate.Judgement) -> str:
    assert judgement.loss is not None
    return f"{judgement.name}: {format_estimate(judgement.loss, '+.3g')} {METRICS[judgement.rule.metric].unit} lost"


# -- Equivalence -------------------------------------------------------------------------------------------------


def _equivalent(judgement: gate.Judgement) -> _Finding:
    """That the interval of a difference lies within the margin of its rule to both sides: two one-sided tests, of which
    the gate has made the one against a loss."""
    loss, margin = judgement.loss, judgement.rule.margin
    assert margin is not None
    if judgement.verdict != "pass" or loss is None or loss.low is None:
        return _finding(judgement, False, f"{judgement.name}: {judgement.reason} (margin {margin:.3g})")
    beyond = f"which reaches beyond {-margin:+.3g}" if loss.low < -margin else None
    return _finding(judgement, not beyond, f"{_lost(judgement)}, {beyond or f'within ± {margin:.3g}'}")


def _log_ppl(facts: _Facts, claim: Claim, nats: float) -> Iterator[gate.Judgement]:
    """By every protocol, with a margin of so many nats per token, also where perplexity is per word."""
    for protocol in facts.protocols(claim):
        clusters, tokens = [(0.0, 1)], 1
        if record := facts.perplexities.get(protocol, {}).get(claim.variant):
            clusters = runs.clusters_of(record)
            tokens = sum(window["num_scored"] for window in record.kind("window"))
        units = sum(weight for _, weight in clusters)
        yield facts.judged("log_ppl", claim, nats * tokens / units if units else nats, protocol=protocol)


def _near(facts: _Facts, claim: Claim) -> list[_Finding]:
    margins = facts.suite.claims
    judged = [
        *_log_ppl(facts, claim, margins.near_lossless_log_ppl),
        facts.judged("kl", claim, margins.near_lossless_kl),
    ]
    if facts.measures("score"):
        judged.append(facts.judged("score", claim, margins.near_lossless_score))
    return [_equivalent(judgement) for judgement in judged]


def _at_noise(facts: _Facts, claim: Claim) -> list[_Finding]:
    found = facts.newest("fidelity")
    floor = quality_tables.noise_floor(found, found[claim.variant]) if claim.variant in found else None
    log_ppl_nats = quality_tables.log_ppl_floor(found, facts.perplexities)
    if floor is None or log_ppl_nats is None:
        missing = f"there is no record of {claim.variant} in [fidelity] with the source beside itself"
        return [_Finding(False, f"{missing}: run `nox -s fidelity`")]
    judged = [*_log_ppl(facts, claim, log_ppl_nats), facts.judged("kl", claim, floor.kl_nats)]
    findings = [_equivalent(judgement) for judgement in judged]
    if facts.measures("score"):
        score = facts.judged("score", claim)
        findings.append(_finding(score, score.verdict in ("pass", "inconclusive")))
    return findings


def _lossless(facts: _Facts, claim: Claim) -> list[_Finding]:
    findings, record = _at_noise(facts, claim), facts.newest("verify").get(claim.variant)
    errors = {role["role"]: float(role["max_abs_error"]) for role in record.kind("roundtrip")} if record else {}
    if record is None or not errors:
        missing = f"there is no record of {claim.variant} beside the source's weights: run `nox -s verify`"
        return [*findings, _Finding(False, missing)]
    role = max(errors, key=lambda name: errors[name])
    are = f"rounded by up to {errors[role]:.3g} in {role}" if errors[role] else "exactly the source's"
    return [*findings, _Finding(not errors[role], f"{claim.variant}: its weights are {are}", (record.run.run_id,))]


# -- Gains and losses --------------------------------------------------------------------------------------------


def _better(facts: _Facts, claim: Claim) -> list[_Finding]:
    # The source has no divergence from itself to be better in.
    metrics = ("log_ppl", "score") if claim.versus == SOURCE else ("log_ppl", "kl", "score")
    judged: list[gate.Judgement] = []
    for metric in (claim.metric,) if claim.metric else filter(facts.measures, metrics):
        if metric == "log_ppl":
            judged += _log_ppl(facts, claim, 0.0)
        else:
            judged.append(facts.judged(metric, claim, task=claim.task))
    return [_gained(judgement) for judgement in judged]


def _gained(judgement: gate.Judgement) -> _Finding:
    """That the interval of a loss lies wholly below zero."""
    loss = judgement.loss
    if judgement.verdict != "pass" or loss is None or loss.high is None or loss.high >= 0:
        return _finding(judgement, False)
    return _finding(judgement, True, _lost(judgement))


def _within(facts: _Facts, claim: Claim) -> list[_Finding]:
    """That what is lost is at most a share: of the perplexity, or of the speed."""
    if claim.metric != "log_ppl":
        return _speed(facts, claim)
    nats = math.log1p(claim.margin or 0.0)
    judged = [facts.judged("log_ppl", claim, nats, protocol=protocol) for protocol in facts.protocols(claim)]
    return [_finding(judgement, judgement.verdict == "pass") for judgement in judged]


def _speed(facts: _Facts, claim: Claim) -> list[_Finding]:
    """That the interval of a ratio of speeds lies above 1 + margin ("faster"), or above 1 - margin ("within")."""
    assert claim.metric is not None and claim.margin is not None
    above = 1 + claim.margin if claim.kind == "faster" else 1 - claim.margin
    judgement = facts.judged(claim.metric, claim, 1 - above, batch=claim.batch)
    if (loss := judgement.loss) is None:
        return [_finding(judgement, False)]
    engines = [record.run.engine or {} for record in facts.records if record.run.run_id in judgement.runs]
    ratio = gate.one_minus(loss)
    words, against = f"{judgement.name}: {format_estimate(ratio, '.3f')} × its speed", None
    if idle := [why for engine in engines if (why := _not_of_nvfp4(engine))]:
        words, against = f"{judgement.name}: {idle[0]}", "which says nothing of how fast NVFP4 is"
    elif ratio.low is None:
        against = f"and {judgement.reason}"
    elif ratio.low <= above:
        against = f"and {above:g} is not below that interval"
    return [_finding(judgement, not against, ", ".join(filter(None, (words, against))))]


def _not_of_nvfp4(engine: Mapping[str, Any]) -> str | None:
    """Why an engine's speed is not that of NVFP4; None if it is."""
    if engine.get("name") == "torch":
        return "the torch engine decompresses weights before it computes"
    return "a CPU has no kernels for 4-bit floats" if engine.get("device") == "cpu" else None


def _recovery(facts: _Facts, claim: Claim) -> list[_Finding]:
    assert claim.margin is not None
    labels = (claim.task,) if claim.task else tuple(facts.suite.tasks)
    judged = [facts.judged("score", claim, task=label) for label in labels]
    ids = tuple(run for judgement in judged for run in judgement.runs)
    if refused := [f"{one.name}: {one.reason}" for one in judged if one.verdict == "incomparable"]:
        basis = "recovery is a share of what the source itself scored under the same conditions"
        return [_Finding(False, f"{basis}: {'; '.join(refused)}", ids)]
    measured = task_tables.newest_by_task(facts.records, facts.suite, (SOURCE, claim.variant))
    scores = task_tables.score_table({label: measured[label] for label in labels})
    # Adjusted p-values are of the metric that a task names first.
    compared = [one for one in scores.rows if one["variant"] == claim.variant and one.get("p_holm") is not None]
    shares = [one["recovery_ratio"] for one in compared]
    if not shares or None in shares:
        return [_Finding(False, f"{claim.variant}: not every task has a score of which a share could be left", ids)]
    share, wanted = stats.pooled(shares), 1 - claim.margin
    percent = format_estimate(scaled(share, 100), ".1f")
    words = f"{percent} % of the source's score, mean of {len(shares)} {'task' if len(shares) == 1 else 'tasks'}"
    if share.low is None or share.low < wanted:
        return [_Finding(False, f"{claim.variant}: {words}, which does not make sure of {100 * wanted:g} %", ids)]
    return [_Finding(True, words, ids)]


_KINDS: dict[str, Callable[[_Facts, Claim], list[_Finding]]] = {
    "lossless": _lossless,
    "noise": _at_noise,
    "near-lossless": _near,
    "better": _better,
    "faster": _speed,
    "within": _within,
    "recovery": _recovery,
}
"""By kind of `CLAIM_KINDS`: what the records must say."""


# -- Words -------------------------------------------------------------------------------------------------------

CLAIM_WORDS = (
    "lossless",
    "no loss",
    "without loss",
    "identical quality",
    "same quality",
    "indistinguishable",
    "on par",
    "faster",
    "fastest",
    "speedup",
    "outperform",
    "beats",
    "better than",
    "state of the art",
    "sota",
)
"""Beginnings of words that claim something, which title and description leave to claims that are declared."""
_WORDS = re.compile(rf"\b(?:{'|'.join(words.replace(' ', '[ -]') for words in CLAIM_WORDS)})\w*")


def check_words(suite: Suite) -> None:
    """`UserError` for a title or a description that claims something: no record would be asked whether it is true."""
    for key, text in (("title", suite.title), ("description", suite.description or "")):
        plain = re.sub("[\u00ad\u200b-\u200d\u2060\ufeff*_]", "", unicodedata.normalize("NFKC", text)).casefold()
        plain = " ".join(re.sub("[\u2010-\u2015]", "-", plain).split())
        if found := _WORDS.search(plain):
            raise UserError(
                f"The {key} of suite '{suite.name}' says '{found[0]}', and no record is asked whether that is true.",
                "Take the word out, and declare a [[claim]], whose sentence the card then has with its numbers.",
            )


_QUANTITIES = {
    "log_ppl": "perplexity",
    "kl": "divergence from the source",
    "score": "score",
    "decode_speed": "decoding speed",
    "prefill_speed": "prefill speed",
}


def claim_sentence(claim: Claim) -> str:
    """What a claim says, as Markdown without a full stop."""
    other = "the source" if claim.versus == SOURCE else f"`{claim.versus}`"
    batch = None if claim.batch is None else f"batch {claim.batch}"
    where = f" ({place})" if (place := claim.task or claim.protocol or batch) else ""
    quantity, margin = _QUANTITIES.get(claim.metric or "", ""), claim.margin or 0.0
    share, verb = f"{100 * margin:g} %", "decodes" if claim.metric == "decode_speed" else "reads prompts"
    more, less = f"has at most {share} more {quantity} than", f"loses at most {share} of the {quantity} of"
    said = {
        "lossless": "is lossless",
        "noise": "differs from the source by no more than noise",
        "near-lossless": "is near-lossless" if claim.versus == SOURCE else f"is as good as {other}",
        "better": f"is better than {other}{f' in {quantity}' if quantity else ''}{where}",
        "faster": f"{verb} {f'at least {share} ' if margin else ''}faster than {other}{where}",
        "within": f"{more if claim.metric == 'log_ppl' else less} {other}{where}",
        "recovery": f"recovers at least {100 * (1 - margin):g} % of the source's score{where}",
    }
    return f"`{claim.variant}` {said[claim.kind]}"
