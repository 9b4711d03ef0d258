"""Decode speed and prefill time of one engine start, and the memory that it took.

Prompts are real text, a different piece for each row of a batch: random tokens mislead speculative decoding and expert
routing. Warm-ups and every step time are kept. Starts differ (memory layout, clocks), so each variant is measured in
several, in the order A B B A, and compared by ratio. Before anything is timed the model must be coherent (`coherence`).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from harness.engines.protocol import Decoded, Engine
from harness.errors import UserError
from harness.progress import Progress, silent

VERSION = 2

COHERENCE_TOKENS = 64
_WORSE_NATS = 0.5
"""How much more than real text greedy text may cost per token: the two are different texts, and one is easier."""
LEAST_ACCEPTANCE = 0.1
"""The share of accepted drafts below which an MTP head was not loaded, or not trained."""
_CHANCE_SHARE = 0.75
"""Real text that costs more than this share of ln(vocabulary) is no text to the model."""


@dataclass(frozen=True)
class Shape:
    """What is timed together: `batch` prompts of `prompt_tokens`, and the `new_tokens` that follow each; a prefill ends
    with the first of them."""

    kind: Literal["prefill", "decode"]
    batch: int
    prompt_tokens: int
    new_tokens: int

    def __str__(self) -> str:
        if self.kind == "prefill":
            return f"prefill of {self.prompt_tokens}"
        return f"decode, batch {self.batch}, after {self.prompt_tokens}"


def prompts(ids: Sequence[int], batch: int, prompt_tokens: int) -> list[list[int]]:
    """`batch` different pieces of the text, [batch][prompt_tokens], one after another from its beginning, so that batch
    1 has the same prompt in every run. Pieces overlap only where the text is too short for all of them."""
    if len(ids) < prompt_tokens + batch - 1:
        raise UserError(
            f"The text has {len(ids):,} tokens: too few for {batch} different prompts of {prompt_tokens:,}.",
            "Use a longer text, or a smaller batch or prompt.",
        )
    stride = min(prompt_tokens, (len(ids) - prompt_tokens) // max(1, batch - 1))
    return [list(ids[row * stride : row * stride + prompt_tokens]) for row in range(batch)]


def coherence(
    engine: Engine, ids: Sequence[int], vocabulary: int, prompt_tokens: int = COHERENCE_TOKENS
) -> dict[str, Any]:
    """The `coherence` sample: mean negative log-likelihoods of `COHERENCE_TOKENS` tokens of real text after a prompt
    and of as many that the engine decodes in their place, and the share of its drafts that were accepted, if any.

    A state that decoding corrupts costs no time, so speed alone does not show it. Where decoding and prefill agree,
    greedy text is about as probable as real text, or more. A model is not coherent if it is far less probable, if real
    text is hardly more probable than chance, or if hardly any draft of an MTP head is accepted.
    """
    prompt, real = list(ids[:prompt_tokens]), list(ids[prompt_tokens : prompt_tokens + COHERENCE_TOKENS])
    decoded = engine.decode([prompt], len(real))
    text, generated = (
        -float(scores[-len(real) :].mean())
        for scores in engine.score([prompt + real, prompt + list(decoded.token_ids[0])], batch_size=1)
    )
    limit = _CHANCE_SHARE * math.log(vocabulary)
    drafts = decoded.drafts
    accepted = None if drafts is None else drafts.num_accepted_tokens / max(1, drafts.num_draft_tokens)
    return {
        "kind": "coherence",
        "prompt_tokens": prompt_tokens,
        "num_tokens": len(real),
        "text_nll_nats": text,
        "generated_nll_nats": generated,
        "limit_nats": limit,
        "acceptance_share": accepted,
        "coherent": text <= limit
        and generated <= text + _WORSE_NATS
        and (accepted is None or accepted >= LEAST_ACCEPTANCE),
    }


def speed_samples(
    engine: Engine,
    ids: Sequence[int],
    shapes: Sequence[Shape],
    *,
    start: int,
    repetitions: int,
    warmups: int,
    progress: Progress = silent,
) -> Iterator[dict[str, Any]]:
    """Samples of engine start number `start` (keys: `record/samples.py`): `prefill` and `decode`, and `memory`, last.

    `step_seconds` covers `new_tokens` - 1 tokens a row, since the first new token comes from the prefill, in one time
    for each token of the whole batch or in one for all. Warm-ups have repetition numbers of their own. All shapes take
    turns within a repetition, so that a machine that slows down slows all of them.
    """
    for name, value, least in (("repetitions", repetitions, 1), ("warmups", warmups, 0)):
        if value < least:
            raise UserError(f"The decode measure got {name} = {value}.", f"It must be at least {least}.")
    texts = {shape: prompts(ids, shape.batch, shape.prompt_tokens) for shape in shapes}
    total = (warmups + repetitions) * len(texts)
    done = 0
    for turn in range(warmups + repetitions):
        warmup = turn < warmups
        head = {"start": start, "repetition": turn if warmup else turn - warmups, "warmup": warmup}
        for shape, rows in texts.items():
            progress(done, total, str(shape))
            size = {"batch": shape.batch, "prompt_tokens": shape.prompt_tokens}
            decoded = _decode(engine, rows, 1 if shape.kind == "prefill" else shape.new_tokens)
            prefill = {"prefill_seconds": decoded.prefill_seconds}
            if shape.kind == "prefill":
                yield {"kind": "prefill", **head, **size, **prefill}
            else:
                drafts = vars(decoded.drafts) if decoded.drafts is not None else {}
                steps = {"step_seconds": list(decoded.step_seconds), **drafts}
                yield {"kind": "decode", **head, **size, "new_tokens": shape.new_tokens, **prefill, **steps}
            done += 1
    progress(done, total, "done")
    memory = engine.memory()
    yield {
        "kind": "memory",
        "start": start,
        "weight_bytes": engine.info.effective["weight_bytes_resident"],
        "weight_bytes_per_token": engine.info.effective["weight_bytes_per_token"],
        "kv_cache_tokens": engine.info.effective.get("kv_cache_tokens"),
        "peak_rss_bytes": memory.peak_rss_bytes,
        "peak_vram_bytes": memory.peak_vram_bytes,
    }


def _decode(engine: Engine, rows: list[list[int]], num_tokens: int) -> Decoded:
    """What the engine decodes; `UserError` unless its length and times are those that were asked for."""
    decoded = engine.decode(rows, num_tokens)
    lengths = sorted({len(row) for row in decoded.token_ids})
    times = sorted({1, num_tokens - 1}) if num_tokens > 1 else [0]
    if len(decoded.token_ids) != len(rows) or lengths != [num_tokens] or len(decoded.step_seconds) not in times:
        raise UserError(
            f"The {engine.info.name} engine returned {len(decoded.token_ids)} rows of {lengths} tokens and "
            f"{len(decoded.step_seconds)} step times; {len(rows)} rows of {num_tokens} tokens were asked for.",
            "Check that it ignores the end-of-text token; nothing of this run is usable.",
        )
    if min((decoded.prefill_seconds, *decoded.step_seconds)) <= 0:
        raise UserError(
            f"The {engine.info.name} engine reported a time of zero or less.",
            "The clock of this machine jumps; nothing of this run is usable.",
        )
    return decoded
