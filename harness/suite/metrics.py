"""What a gate rule can be about: every metric with its unit and the keys that a rule on it may have."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What a rule on one metric may say."""

    unit: str | None  # of the loss and its margin; None: found or not found, of one model alone, without a margin
    table: str | None = None  # of the suite, which says how it is measured
    option: str | None = None  # the key that says which of several numbers is meant
    has_baseline: bool = True


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
