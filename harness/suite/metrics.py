"""What a gate rule and a claim can be about: every metric with its unit, and every kind of claim with what it asks."""

from dataclasses import dataclass


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
