"""Fidelity: how far a variant's predictions are from its source's, token by token.

A quantized model may by luck find a text more probable than its source does, and then perplexity says that it is
better. The Kullback-Leibler divergence KL(P || Q) asks instead how much of the source's distribution P over the next
token the variant's Q has lost. It is never negative, and zero only where the two agree on the whole vocabulary.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.engines.protocol import Chunk, Top
from harness.errors import UserError
from harness.progress import Progress, silent
from harness.record.packed import pack_numbers

VERSION = 2

BAND_ENDS = (512, 4096, 32_768, 1 << 20)
"""Predictions are also summed in bands, by how many tokens stand before them: fewer than 512, fewer than 4,096 … An
error that a recurrent state gathers grows from band to band."""

_ROWS_ELEMENTS = 1 << 20  # log-probabilities widened at a time: 8 MB of float64 per temporary
_REPEAT = "The run is not usable: repeat it."
_LEAST_TAIL = 1e-6
"""Below this, what is left of 1 after a float32 sum is rounding."""


@dataclass(frozen=True)
class Compared:
    """A variant beside its reference: arrays [n] with a value for every prediction."""

    kl_nats: NDArray[np.float64]
    agreed: NDArray[np.bool_]
    """Whether both find the same token the likeliest."""
    log_prob: NDArray[np.float64]
    """The variant's ln p of the token that came, in nats."""
    reference_log_prob: NDArray[np.float64]
    """The reference's."""


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
    for rows in (slice(start, start + step) for start in range(0, num, step)):
        log_p, log_q = reference[rows].astype(np.float64), variant[rows].astype(np.float64)
        divergence[rows] = _terms(log_p, log_q).sum(axis=1)
    return divergence


def _terms(log_p: NDArray[np.float64], log_q: NDArray[np.float64]) -> NDArray[np.float64]:
    """What each event contributes to a divergence, of the shape of both arguments: p (ln p - ln q) - p + q >= 0.

    Probabilities of float32 log-probabilities miss a sum of 1 by about 1e-6, while a good variant's divergence is 1e-3.
    In Σ p (ln p - ln q) that miss enters at first order; with the two further terms, which add up to zero for exact
    distributions, at second order only.
    """
    p = np.exp(log_p)
    with np.errstate(invalid="ignore"):  # 0 · (-inf - x), replaced by its limit 0
        lost = np.where(p > 0, p * (log_p - log_q), 0.0)
    terms: NDArray[np.float64] = lost - p + np.exp(log_q)
    return terms


def compare_whole(reference: NDArray[np.float32], variant: NDArray[np.float32], actual: Sequence[int]) -> Compared:
    """The comparison of two arrays of log-probabilities [n, vocabulary], where the n tokens `actual` came."""
    rows = np.arange(len(reference))
    return Compared(
        token_kl_nats(reference, variant),
        reference.argmax(axis=1) == variant.argmax(axis=1),
        variant[rows, actual].astype(np.float64),
        reference[rows, actual].astype(np.float64),
    )


def compare_top(reference: Top, variant: Top, actual: Sequence[int]) -> Compared:
    """The comparison of what two engines name at n places, where the n tokens `actual` came.

    Its events are the tokens that both name, the token that came, and all others together. A sum over coarser events
    never exceeds the sum over finer ones (the log-sum inequality: Cover and Thomas, Elements of Information Theory,
    theorem 2.7.1), so its divergence is a lower bound.
    """
    both, log_q = _found(reference.ids, variant)
    is_actual = (reference.ids == np.asarray(actual)[:, None]) & both
    named_p, named_q = (np.where(both, one, -np.inf) for one in (reference.log_probs.astype(np.float64), log_q))
    # The token that came is an event of its own, whether it is among the named ones or not.
    alone_p, alone_q = (
        np.where(is_actual.any(axis=1), -np.inf, one.actual.astype(np.float64)) for one in (reference, variant)
    )
    events_p = np.concatenate([named_p, alone_p[:, None]], axis=1)
    events_q = np.concatenate([named_q, alone_q[:, None]], axis=1)
    tails = [np.maximum(1 - np.exp(one).sum(axis=1), 0) for one in (events_p, events_q)]
    tail_p, tail_q = (np.where(tail < _LEAST_TAIL, _LEAST_TAIL, tail) for tail in tails)
    return Compared(
        _terms(events_p, events_q).sum(axis=1) + _terms(np.log(tail_p), np.log(tail_q)),
        reference.ids[:, 0] == variant.ids[:, 0],
        variant.actual.astype(np.float64),
        reference.actual.astype(np.float64),
    )


def _found(ids: NDArray[np.int32], top: Top) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Which of `ids` [n, k] `top` names at the same place, and their log-probabilities by `top`, both [n, k]."""
    # One sorted list for all places: an id beyond those of the places before.
    base = np.arange(len(ids))[:, None] * (1 + int(max(ids.max(initial=0), top.ids.max(initial=0))))
    order = np.argsort(top.ids, axis=1)
    keys = (np.take_along_axis(top.ids, order, axis=1) + base).ravel()
    at = np.searchsorted(keys, ids + base).clip(max=len(keys) - 1)
    log_probs = np.take_along_axis(top.log_probs.astype(np.float64), order, axis=1).ravel()
    return keys[at] == ids + base, log_probs[at]


def side_by_side(*streams: Iterable[Chunk]) -> Iterator[Chunk]:
    """The chunks of several passes over the same windows, put together as if one pass had all their models. A chunk
    ends where a chunk of any pass ends."""
    walks = [iter(stream) for stream in streams]
    left: list[Chunk | None] = [None] * len(walks)
    while True:
        for number, walk in enumerate(walks):
            left[number] = left[number] or next(walk, None)
        if any(one is None for one in left):
            return
        now = [one for one in left if one is not None]
        place = (now[0].window, now[0].first)
        if any((one.window, one.first) != place for one in now):
            raise ValueError(f"passes that differ at window {place[0]}, place {place[1]}")
        num = min(len(one.log_probs[0]) for one in now)
        yield Chunk(*place, tuple(table[:num] for one in now for table in one.log_probs))
        left = [
            Chunk(one.window, one.first + num, rest)
            if len((rest := tuple(table[num:] for table in one.log_probs))[0])
            else None
            for one in now
        ]


def fidelity_samples(
    chunks: Iterable[Chunk],
    windows: Sequence[Sequence[int]],
    names: Sequence[str],
    *,
    progress: Progress = silent,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(Name, sample) of each window and variant, in order. The first model of a chunk is the reference, the others are
    called `names`; see `sample`. `UserError` for a vocabulary of another size, a divergence that is not finite, or
    missing windows."""
    progress(0, len(windows), "fidelity")
    done: dict[str, list[Compared]] = {name: [] for name in names}
    index = place = 0
    for chunk in chunks:
        reference, *variants = chunk.log_probs
        if (chunk.window, chunk.first) != (index, place) or index >= len(windows):
            break
        window = windows[index]
        actual = window[place + 1 : place + 1 + len(reference)]
        for name, variant in zip(names, variants, strict=True):
            if reference.shape[1] != variant.shape[1]:
                raise UserError(
                    f"The reference knows {reference.shape[1]:,} tokens and {name} {variant.shape[1]:,}.",
                    "Compare a variant with the source that it was made from.",
                )
            if not len(reference) == len(variant) == len(actual):
                raise UserError(
                    f"Window {index} has {len(window)} tokens, and the engines gave {len(reference)} and "
                    f"{len(variant)} distributions where {len(actual)} were left.",
                    _REPEAT,
                )
            compared = compare_whole(reference, variant, actual)
            _check_finite(name, compared, index, place)
            done[name].append(compared)
        place += len(reference)
        if place == len(window) - 1:
            for name, pieces in done.items():
                joined = (np.concatenate([getattr(one, key.name) for one in pieces]) for key in fields(Compared))
                yield name, sample(index, len(window), Compared(*joined))
                pieces.clear()
            index, place = index + 1, 0
            progress(index, len(windows), "fidelity")
    if place:
        raise _cut_window(index, len(windows[index]), "the engines", place)
    _check_number(index, len(windows))


def top_fidelity_samples(
    reference: Iterable[Top],
    variant: Iterable[Top],
    windows: Sequence[Sequence[int]],
    name: str,
    *,
    progress: Progress = silent,
) -> Iterator[dict[str, Any]]:
    """One sample per window, in order, of a variant called `name`, from the most probable tokens on both sides; see
    `sample`. `UserError` for probabilities that are not finite or missing windows."""
    progress(0, len(windows), "fidelity")
    num_compared = 0
    for index, (window, expected, found) in enumerate(zip(windows, reference, variant, strict=False)):
        if not len(expected.ids) == len(found.ids) == len(window) - 1:
            raise _cut_window(index, len(window), name, len(found.ids))
        compared = compare_top(expected, found, window[1:])
        _check_finite(name, compared, index, 0)
        yield sample(index, len(window), compared)
        num_compared = index + 1
        progress(num_compared, len(windows), "fidelity")
    _check_number(num_compared, len(windows))


def _cut_window(index: int, num_tokens: int, who: str, num_predicted: int) -> UserError:
    problem = (
        f"Window {index} has {num_tokens} tokens, and {who} predicted {num_predicted} of its {num_tokens - 1} last."
    )
    return UserError(problem, _REPEAT)


def _check_number(num_compared: int, num_windows: int) -> None:
    if num_compared < num_windows:
        raise UserError(f"The engines predicted {num_compared} of {num_windows} windows.", _REPEAT)


def _check_finite(name: str, compared: Compared, index: int, place: int) -> None:
    if len(bad := np.flatnonzero(~np.isfinite(compared.kl_nats))):
        raise UserError(
            f"Window {index} of {name} has a divergence of {compared.kl_nats[bad[0]]} at position "
            f"{place + int(bad[0])}.",
            "Run `harness verify`: a scale or weight of the checkpoint is broken.",
        )


def sample(index: int, num_tokens: int, compared: Compared) -> dict[str, Any]:
    """The `window` sample of `num_tokens` tokens: sums over its n - 1 predictions, and by the number of tokens before
    them (`bands`); `kl_codes` has the divergence of every prediction (record/packed.py), for percentiles."""
    before = np.arange(1, num_tokens)
    band = np.searchsorted(BAND_ENDS, before, side="right")
    squared = (np.exp(compared.log_prob) - np.exp(compared.reference_log_prob)) ** 2
    return {
        "kind": "window",
        "index": index,
        "num_tokens": num_tokens,
        "num_scored": len(before),
        **_sums(compared, squared, np.full(len(before), True)),
        "nll_nats": -float(compared.log_prob.sum()),
        "source_nll_nats": -float(compared.reference_log_prob.sum()),
        "bands": [
            {"end": end, "num_scored": int((band == number).sum()), **_sums(compared, squared, band == number)}
            for number, end in enumerate(BAND_ENDS)
            if (band == number).any()
        ],
        "kl_codes": pack_numbers(compared.kl_nats),
    }


def _sums(compared: Compared, squared: NDArray[np.float64], of: NDArray[np.bool_]) -> dict[str, float | int]:
    return {
        "kl_nats": float(compared.kl_nats[of].sum()),
        "num_agreed": int(compared.agreed[of].sum()),
        "squared_dp": float(squared[of].sum()),
    }
