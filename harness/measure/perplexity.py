"""Perplexity: under a named protocol, the negative log-likelihood of each window of a text.

Perplexity is exp of the mean negative log-likelihood per scored token. A protocol (`PROTOCOLS`) decides how the text is
cut and which tokens of a window count: a token at the start of its window is predicted from nothing and costs much
more. So its name and the numbers of tokens, windows and scored tokens belong to every number.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from harness.engines.protocol import Engine
from harness.errors import UserError, did_you_mean
from harness.measure.kept import LogProbs
from harness.progress import Progress, silent

VERSION = 1

ScoredRule = Literal["all but the first", "second half", "new tokens"]
Unit = Literal["token", "word"]


@dataclass(frozen=True)
class Protocol:
    """How a text of token ids is cut into windows, and which tokens of each are scored."""

    name: str
    window: int | None
    """Tokens per window. None: the text is read document by document, in windows as long as the model takes
    (`wikitext`)."""
    stride: int | None
    """Tokens from one window's start to the next one's; None with `window`."""
    scored: ScoredRule
    """`all but the first`: whatever has at least one token before it in the window. `second half`: the tokens
    whose context is longer than half a window. `new tokens`: those that no earlier window has seen."""
    keep_tail: bool
    """Whether a last, shorter window counts, or is dropped."""
    unit: Unit = "token"
    """What the mean is taken over."""


@dataclass(frozen=True)
class Window:
    """Tokens first_token … first_token + num_tokens - 1 of the text, of which those from `first_scored` (counted
    within the window, never 0) to its end are scored."""

    first_token: int
    num_tokens: int
    first_scored: int
    document: int | None = None
    """The number of its document, where the text is read document by document."""

    @property
    def num_scored(self) -> int:
        """How many tokens count."""
        return self.num_tokens - self.first_scored


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        # vLLM-measured NVFP4 cards: 297,053 tokens, 581 windows, 296,472 scored.
        Protocol("wikitext2-512", 512, 512, "all but the first", keep_tail=True),
        # llama.cpp, tools/perplexity (no BOS for models that add none): 255 tokens of each of 580 chunks.
        Protocol("llamacpp-512", 512, 512, "second half", keep_tail=False),
        # The evaluation of the GPTQ paper's code, followed by most quantization papers.
        Protocol("gptq-2048", 2048, 2048, "all but the first", keep_tail=False),
        # transformers' guide 'Perplexity of fixed-length models', its loss weighted by its true tokens.
        Protocol("hf-1024-s512", 1024, 512, "new tokens", keep_tail=True),
        # lm-eval's task `wikitext` (version 2) on EleutherAI/wikitext_document_level: pages, each after an end-of-text
        # token; every token of a page, over the words that it had before it was detokenized.
        Protocol("lmeval-word", None, None, "new tokens", keep_tail=True, unit="word"),
    )
}


def get_protocol(name: str) -> Protocol:
    """The protocol called `name`."""
    if name not in PROTOCOLS:
        raise UserError(f"There is no perplexity protocol '{name}'.", did_you_mean(name, PROTOCOLS))
    return PROTOCOLS[name]


def windows(protocol: Protocol, num_tokens: int) -> list[Window]:
    """The windows of a text of `num_tokens` tokens, by a protocol that cuts one text. A tail of one token has nothing
    to score and is left out."""
    if protocol.window is None or protocol.stride is None:
        raise ValueError(f"{protocol.name} cuts documents and no text")
    if num_tokens < protocol.window:
        raise UserError(
            f"The text has {num_tokens:,} tokens, fewer than one window of {protocol.name} ({protocol.window:,}).",
            "Use a longer text or a protocol with a shorter window.",
        )
    cut: list[Window] = []
    seen = 0  # tokens that the windows so far cover
    for first in range(0, num_tokens, protocol.stride):
        length = min(protocol.window, num_tokens - first)
        if length < protocol.window and not protocol.keep_tail:
            break
        match protocol.scored:
            case "all but the first":
                first_scored = 1
            case "second half":
                # llama-perplexity scores the predictions made at positions window/2 … window - 2.
                first_scored = protocol.window // 2 + 1
            case "new tokens":
                first_scored = max(1, seen - first)
        if first_scored < length:
            cut.append(Window(first, length, first_scored))
        seen = first + length
        if seen == num_tokens:
            break  # a sliding window that reaches the end is the last one
    return cut


def tokenize(folder: Path, text: str) -> list[int]:
    """The token ids of a text, without special tokens, by the checkpoint's `tokenizer.json`.

    By the tokenizers library itself, not by `AutoTokenizer`: which class transformers picks, and with it the ids,
    has changed between releases for one and the same folder.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"{folder} has no tokenizer.json.", "Copy the one of the source checkpoint into it.")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for every parse error
        raise UserError(f"{file} is not a tokenizer: {error}.", "Copy the source checkpoint's again.") from None
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def token_ids_digest(ids: Sequence[int]) -> str:
    """SHA-256 of the ids as little-endian 32-bit integers: two runs with the same digest saw the same tokens."""
    return hashlib.sha256(np.asarray(ids, dtype="<u4").tobytes()).hexdigest()


def whole(protocol: Protocol) -> Protocol:
    """The protocol of the same window and stride that leaves out nothing. An engine's answers are kept for its windows:
    those of `protocol` are the first of them, with perhaps fewer tokens that count."""
    return replace(protocol, scored="all but the first", keep_tail=True)


def windows_digest(cut: Iterable[Window]) -> str:
    """SHA-256 of where windows begin and how long they are, as little-endian 64-bit integers. Which tokens count does
    not matter."""
    spans = [(window.first_token, window.num_tokens) for window in cut]
    return hashlib.sha256(np.asarray(spans, dtype="<i8").tobytes()).hexdigest()


def window_samples(cut: Sequence[Window], rows: Iterable[NDArray[np.float32]]) -> Iterator[dict[str, Any]]:
    """One sample per window, in order, from the log-probabilities [num_tokens - 1] of each window's tokens but the
    first: the summed negative log-likelihood of the scored tokens; with `document` where there are several."""
    for index, (window, log_probs) in enumerate(zip(cut, rows, strict=True)):
        yield {
            "kind": "window",
            "index": index,
            "first_token": window.first_token,
            "num_tokens": window.num_tokens,
            "num_scored": window.num_scored,
            # log_probs[i] belongs to token i + 1 of the window
            "nll_nats": -float(np.sum(log_probs[window.first_scored - 1 :].astype(np.float64))),
            **({} if window.document is None else {"document": window.document}),
        }


def extend(
    stored: LogProbs,
    engine: Engine,
    described: dict[str, Any],
    ids: Sequence[int],
    cut: Sequence[Window],
    num_windows: int,
    *,
    batch_size: int,
    name: str,
    progress: Progress = silent,
) -> int:
    """Scores those of the first `num_windows` windows of `cut` that `stored` lacks, and returns how many it had.

    `described` is the engine as a run's header describes it. Only whole batches are kept and asked for, if need be a
    few windows more than `num_windows`: the last bits of an answer may depend on what is computed with it, and so the
    answer is the same however often a run was interrupted.
    """
    ends = [0, *_batch_ends([window.num_tokens for window in cut], batch_size)]
    first = stored.go_on(described, max(end for end in ends if end <= len(stored)))
    last = min(end for end in ends if end >= num_windows)
    for row in score(engine, ids, cut[:last], batch_size, first=first, name=name, progress=progress):
        stored.append(row)
    return min(first, num_windows)


def _batch_ends(lengths: Iterable[int], batch_size: int) -> Iterator[int]:
    """Where the batches end that an engine makes of windows of these lengths: see `Engine.score`."""
    end = 0
    for _, run in groupby(lengths):
        num = sum(1 for _ in run)
        yield from (end + min(start + batch_size, num) for start in range(0, num, batch_size))
        end += num


def score(
    engine: Engine,
    ids: Sequence[int],
    cut: Sequence[Window],
    batch_size: int,
    *,
    first: int = 0,
    name: str,
    progress: Progress = silent,
) -> Iterator[NDArray[np.float32]]:
    """The log-probabilities [num_tokens - 1], in nats, of every token but the first of each window, from window `first`
    on. `UserError` where the engine gives too few of them, or a value that is not finite."""
    rows = engine.score([ids[w.first_token : w.first_token + w.num_tokens] for w in cut[first:]], batch_size)
    done = first
    progress(done, len(cut), name)
    for window, row in zip(cut[first:], rows, strict=False):
        log_probs = row.astype(np.float32)
        if len(log_probs) != window.num_tokens - 1:
            raise UserError(
                f"Window {done} has {window.num_tokens} tokens, and the engine gave {len(log_probs)} "
                "log-probabilities.",
                "The run is not usable: repeat it.",
            )
        bad = np.flatnonzero(~np.isfinite(log_probs))
        if len(bad):
            position = int(bad[0]) + 1
            raise UserError(
                f"Window {done} has a log-probability of {log_probs[bad[0]]} at position {position} "
                f"(token {window.first_token + position} of the text).",
                "Run `harness verify`: a scale or weight of the checkpoint is broken.",
            )
        yield log_probs
        done += 1
        progress(done, len(cut), name)
    if done < len(cut):
        raise UserError(
            f"The {engine.info.name} engine scored {done} of {len(cut)} windows.",
            "The run is not usable: repeat it.",
        )
