"""Fidelity: how far a variant's predictions are from its source's, token by token.

Perplexity asks how probable the text was; a quantized model may by luck find a text more probable than its source
does, and then looks better than what it was made from. The Kullback-Leibler divergence KL(P || Q) asks instead
how much of the source's whole distribution P over the next token the variant's Q has lost. It is never negative,
it is zero only where the two agree on every token of the vocabulary, and it does not need to know which token came.

The arithmetic. Both engines give float32 log-probabilities, whose sum of probabilities misses 1 by about 1e-6, while
a good variant's divergence is 1e-3. Written as usual, Σ p (ln p - ln q), that miss enters at first order. So every
token of the vocabulary contributes

    p (ln p - ln q) - p + q   >= 0

in float64: the two further terms add up to zero for exact distributions, no term cancels another, and a miss
enters at second order only.
"""

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from harness.errors import UserError
from harness.progress import Progress

VERSION = 1

_ROWS_ELEMENTS = 1 << 20  # log-probabilities widened at a time: 8 MB of float64 per temporary


class Predictor(Protocol):
    """What gives distributions: every `Engine`, or anything that remembers one."""

    def log_probs(self, windows: Sequence[Sequence[int]], batch_size: int) -> Iterator[NDArray[np.float32]]:
        """For each window of n token ids, in order, the natural-log probabilities [n - 1, vocabulary] of what
        follows its tokens 0 … n - 2."""


def token_kl_nats(reference: NDArray[np.float32], variant: NDArray[np.float32]) -> NDArray[np.float64]:
    """KL(reference || variant) in nats at each position: two arrays of log-probabilities [n, vocabulary] -> [n].

    A token that the reference rules out (-inf) costs only what the variant gives it; one that only the variant
    rules out costs infinitely much.
    """
    if reference.shape != variant.shape or reference.ndim != 2:
        raise ValueError(f"log-probabilities of shapes {reference.shape} and {variant.shape}")
    num, vocabulary = reference.shape
    divergence = np.empty(num)
    step = max(1, _ROWS_ELEMENTS // vocabulary)
    for start in range(0, num, step):
        rows = slice(start, start + step)
        log_p, log_q = reference[rows].astype(np.float64), variant[rows].astype(np.float64)
        p = np.exp(log_p)
        with np.errstate(invalid="ignore"):  # 0 · (-inf - x), replaced by its limit 0
            lost = np.where(p > 0, p * (log_p - log_q), 0.0)
        divergence[rows] = (lost - p + np.exp(log_q)).sum(axis=1)
    return divergence


def measure(
    reference: Predictor,
    variant: Predictor,
    windows: Sequence[Sequence[int]],
    *,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> Iterator[dict[str, Any]]:
    """One sample per window of token ids, in order; both engines walk through the windows in step, so that only
    one batch of distributions is in memory.

    `{"kind": "window", "index", "num_tokens", "num_scored", "kl_nats", "num_agreed"}`: `kl_nats` is summed over the
    window's `num_scored` = `num_tokens` - 1 predictions, and in `num_agreed` of them both find the same token the
    likeliest. `UserError` for a vocabulary of another size, a divergence that is not finite, or missing windows.
    """
    pairs = zip_longest(reference.log_probs(windows, batch_size), variant.log_probs(windows, batch_size))
    if progress is not None:
        progress(0, len(windows), "fidelity")
    returned = 0
    for index, (window, (expected, found)) in enumerate(zip(windows, pairs, strict=False)):
        if expected is None or found is None:
            break
        _check(expected, found, len(window), index)
        divergence = token_kl_nats(expected, found)
        if len(bad := np.flatnonzero(~np.isfinite(divergence))):
            raise UserError(
                f"Window {index} has a divergence of {divergence[bad[0]]} at position {int(bad[0])}.",
                "Run `harness verify`: a scale or weight of the checkpoint is broken.",
            )
        yield {
            "kind": "window",
            "index": index,
            "num_tokens": len(window),
            "num_scored": len(divergence),
            "kl_nats": float(divergence.sum()),
            "num_agreed": int((expected.argmax(axis=1) == found.argmax(axis=1)).sum()),
        }
        returned = index + 1
        if progress is not None:
            progress(returned, len(windows), "fidelity")
    if returned < len(windows):
        raise UserError(
            f"The engines predicted {returned} of {len(windows)} windows.", "The run is not usable: repeat it."
        )


def _check(expected: NDArray[np.float32], found: NDArray[np.float32], num_tokens: int, index: int) -> None:
    """Refuse what cannot be compared position by position."""
    if expected.shape[1] != found.shape[1]:
        raise UserError(
            f"The reference knows {expected.shape[1]:,} tokens and the variant {found.shape[1]:,}.",
            "Compare a variant with the source that it was made from.",
        )
    if len(expected) != num_tokens - 1 or len(found) != num_tokens - 1:
        raise UserError(
            f"Window {index} has {num_tokens} tokens, and the engines gave {len(expected)} and {len(found)} "
            "distributions.",
            "The run is not usable: repeat it.",
        )
