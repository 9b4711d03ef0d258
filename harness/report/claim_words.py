"""The words of claims: which words a suite's title and description may not use, and the sentence of a claim."""

import re
import unicodedata
from collections.abc import Callable

from harness.errors import UserError
from harness.suite.names import SOURCE
from harness.suite.rules import Claim
from harness.suite.schema import Suite

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


def _other(claim: Claim) -> str:
    return "the source" if claim.versus == SOURCE else f"`{claim.versus}`"


def _where(claim: Claim) -> str:
    """Which of several numbers a claim means."""
    batch = None if claim.batch is None else f"batch {claim.batch}"
    place = claim.task or claim.protocol or batch
    return f" ({place})" if place else ""


def _near_sentence(claim: Claim) -> str:
    return "is near-lossless" if claim.versus == SOURCE else f"is as good as {_other(claim)}"


def _better_sentence(claim: Claim) -> str:
    quantity = f" in {_QUANTITIES[claim.metric]}" if claim.metric else ""
    return f"is better than {_other(claim)}{quantity}{_where(claim)}"


def _faster_sentence(claim: Claim) -> str:
    verb = "decodes" if claim.metric == "decode_speed" else "reads prompts"
    much = f"at least {100 * claim.margin:g} % " if claim.margin else ""
    return f"{verb} {much}faster than {_other(claim)}{_where(claim)}"


def _lost_sentence(claim: Claim) -> str:
    assert claim.margin is not None and claim.metric is not None
    quantity, share = _QUANTITIES[claim.metric], f"{100 * claim.margin:g} %"
    if claim.metric == "log_ppl":
        return f"has at most {share} more {quantity} than {_other(claim)}{_where(claim)}"
    return f"loses at most {share} of the {quantity} of {_other(claim)}{_where(claim)}"


def _recovery_sentence(claim: Claim) -> str:
    assert claim.margin is not None
    return f"recovers at least {100 * (1 - claim.margin):g} % of the source's score{_where(claim)}"


_SENTENCES: dict[str, Callable[[Claim], str]] = {
    "lossless": lambda _: "is lossless",
    "noise": lambda _: "differs from the source by no more than noise",
    "near-lossless": _near_sentence,
    "better": _better_sentence,
    "faster": _faster_sentence,
    "within": _lost_sentence,
    "recovery": _recovery_sentence,
}
"""By kind of `CLAIM_KINDS`: what is said after the variant's name."""


def claim_sentence(claim: Claim) -> str:
    """What a claim says, as Markdown without a full stop."""
    return f"`{claim.variant}` {_SENTENCES[claim.kind](claim)}"
