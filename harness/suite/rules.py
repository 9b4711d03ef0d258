"""What holds variants to account: metrics, kinds of claims, and the keys of the gate's rules and the card's claims."""

from dataclasses import dataclass
from typing import Annotated

from harness.suite.values import AtLeast1, NonEmpty, Share, one_of


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What a rule on one metric may say."""

    unit: str | None
    """The unit of the loss and its margin; None where something is found or not, of one model alone."""
    table: str | None = None
    """The suite's table that says how the metric is measured."""
    option: str | None = None
    """The key that says which of several numbers is meant."""
    has_baseline: bool = True
    """Whether an older run may be compared with."""


SHARE = "share"
METRICS = {
    # Per token, or per word, as the protocol counts.
    "log_ppl": Metric(unit="nats", table="ppl", option="protocol"),
    "kl": Metric(unit="nats", table="fidelity"),  # per token, to the source
    "top1": Metric(unit=SHARE, table="fidelity"),  # of the places where the likeliest token is not the source's
    "score": Metric(unit=SHARE, table="tasks", option="task"),
    # Speed is a ratio within one session: a stored figure lets regressions through.
    "decode_speed": Metric(unit=SHARE, table="bench", option="batch", has_baseline=False),
    "prefill_speed": Metric(unit=SHARE, table="bench", has_baseline=False),
    "verify": Metric(unit=None),  # no finding that is an error
    "arithmetic": Metric(unit=None),  # every engine computed what the checkpoint says
}


@dataclass(frozen=True, kw_only=True)
class ClaimKind:
    """What a claim of one kind may say."""

    metrics: tuple[str, ...]
    """The metrics that it is about: all of them at once, or the one that its key `metric` names."""
    names_metric: bool = False
    """Whether `metric` may be set; where it is left out, the first metric is meant."""
    default_margin: float | None = None
    """The margin where it is left out."""
    needs_margin: bool = False
    """Whether the claim must say a margin."""
    of_source: bool = False
    """Whether it can only be held against the source."""


CLAIM_KINDS = {
    "lossless": ClaimKind(metrics=("log_ppl", "kl"), of_source=True),
    "noise": ClaimKind(metrics=("log_ppl", "kl"), of_source=True),
    "near-lossless": ClaimKind(metrics=("log_ppl", "kl")),
    "better": ClaimKind(metrics=("log_ppl", "kl", "score"), names_metric=True),
    "faster": ClaimKind(metrics=("decode_speed", "prefill_speed"), names_metric=True, default_margin=0.0),
    "within": ClaimKind(metrics=("log_ppl", "decode_speed", "prefill_speed"), names_metric=True, needs_margin=True),
    "recovery": ClaimKind(metrics=("score",), needs_margin=True, of_source=True),
}
"""By kind; `harness.report.claims` says what each asks of the records."""
CLAIM_METRICS = tuple(dict.fromkeys(metric for kind in CLAIM_KINDS.values() for metric in kind.metrics))


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What `harness gate` holds a variant to: it loses at most `margin` against `versus`.

    `load` fills in what a rule leaves open, but for `task` where the rule is about all tasks together.
    """

    metric: Annotated[str, one_of(*METRICS)]
    """What is judged."""
    variant: NonEmpty
    """The row that is judged: a variant, a variant in a setup ("w4a4+mtp1"), or the source against its baseline."""
    versus: NonEmpty | None = None
    """What it is held against: "source" (where left out), another row, or "baseline"."""
    margin: float | None = None
    """The largest loss that is accepted, in the metric's unit; below zero where a gain is wanted."""
    task: NonEmpty | None = None
    """The task whose score is meant; all tasks where left out."""
    protocol: NonEmpty | None = None
    """The protocol whose log-perplexity is meant; the suite's first one where left out."""
    batch: AtLeast1 | None = None
    """The batch size whose decoding speed is meant; 1 where left out."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What the card says of a variant, if the records support it; if they do not, no card is written."""

    kind: Annotated[str, one_of(*CLAIM_KINDS)]
    """What is claimed: "near-lossless", "faster", ..."""
    variant: NonEmpty
    """The row that the claim is of: a variant, or a variant in a setup ("w4a4+mtp1")."""
    versus: NonEmpty | None = None
    """What it is held against: "source" (where left out), or another row."""
    metric: Annotated[str, one_of(*CLAIM_METRICS)] | None = None
    """What "better", "faster" and "within" are about. Where left out, "faster" is about decode_speed, "within" about
    log_ppl, and "better" about all of the quality that is measured."""
    margin: float | None = None
    """A share: how much faster at least ("faster"), or how much is lost at most ("within": of perplexity or speed;
    "recovery": of the source's score)."""
    task: NonEmpty | None = None
    """The task whose score is meant; all tasks where left out."""
    protocol: NonEmpty | None = None
    """The protocol whose perplexity is meant; every protocol of the suite where left out."""
    batch: AtLeast1 | None = None
    """The batch size whose decoding speed is meant; 1 where left out."""


@dataclass(frozen=True, kw_only=True)
class ClaimMargins:
    """The margins of the claim "near-lossless": the whole interval of a difference must lie within them, to both sides.

    0.01 nats of log-perplexity are one per cent of perplexity. Of llama.cpp's formats on an 8B model, those of 8 and 6
    bits are called near-lossless: they diverge by 0.0014 and 0.0055 nats and lose 0.0004 and 0.0035 nats of
    log-perplexity. The one of 5 bits, which few would call near-lossless, diverges by 0.0108 nats
    (https://github.com/ggml-org/llama.cpp/pull/6936). A point of the mean score is the least that tasks of usual size
    can tell: identical weights, run twice, differ by a third of it.
    """

    near_lossless_log_ppl: Share = 0.01
    """The margin of log-perplexity, in nats per token."""
    near_lossless_kl: Share = 0.01
    """The margin of the divergence from the source, in nats per token."""
    near_lossless_score: Share = 0.01
    """The margin of the mean score over tasks."""
