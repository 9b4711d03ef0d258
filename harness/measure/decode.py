"""Decode speed and prefill time of one engine start, and the memory it took.

Decoding one token at batch 1 reads every weight once and computes little, so its speed is bound by memory bandwidth;
what the bytes alone allow stands beside each measured speed. On the torch engine those bytes are the *decompressed*
weights: there a 4-bit checkpoint decodes no faster than its source, and any difference between the two is overhead or
noise. A smaller file pays off only in an engine with 4-bit kernels.

What keeps the numbers honest: prompts are real text, a different piece for each row of a batch (random tokens mislead
speculative decoding and expert routing); every repetition decodes the same number of tokens, and the length that came
back is checked; prefill is apart from the steps; warm-ups are marked and kept; every step time is
kept, because the median of many hides what one slow step shows. One call measures one engine start. Starts differ
(memory layout, clocks), so measure each variant in at least two, in the order A B B A, and compare by ratio.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from harness.engines.protocol import Decoded, Engine
from harness.errors import UserError
from harness.progress import Progress

VERSION = 1


def prompts(ids: Sequence[int], batch: int, prompt_tokens: int) -> list[list[int]]:
    """`batch` different pieces of the text, [batch][prompt_tokens], one after another from its beginning.

    So batch 1 is the same prompt in every run. Pieces overlap only where the text is too short for all of them.
    """
    if len(ids) < prompt_tokens + batch - 1:
        raise UserError(
            f"The text has {len(ids):,} tokens: too few for {batch} different prompts of {prompt_tokens:,}.",
            "Use a longer text, or a smaller batch or prompt.",
        )
    stride = min(prompt_tokens, (len(ids) - prompt_tokens) // max(1, batch - 1))
    return [list(ids[row * stride : row * stride + prompt_tokens]) for row in range(batch)]


def measure(
    engine: Engine,
    ids: Sequence[int],
    *,
    start: int,
    prompt_tokens: int,
    new_tokens: int,
    batch_sizes: Sequence[int],
    prefill_tokens: int,
    repetitions: int,
    warmups: int,
    progress: Progress | None = None,
) -> Iterator[dict[str, Any]]:
    """Samples of engine start number `start`, every one with its `kind`:

    `prefill`: {start, repetition, warmup, batch: 1, prompt_tokens, prefill_seconds}, a prompt of `prefill_tokens` and
    the one token that follows it. `decode`: {start, repetition, warmup, batch, prompt_tokens, prefill_seconds,
    step_seconds} for every batch size; `step_seconds` has `new_tokens` - 1 times, since the first new token comes from
    the prefill, and each is the time of one token for the whole batch. `memory`, last: {start, weight_bytes,
    weight_bytes_per_token, peak_rss_bytes, peak_vram_bytes}, a peak None where there is no such memory.

    Warm-ups have repetition numbers of their own. All batch sizes take turns within a repetition, so that a machine
    that slows down slows all of them. `prefill_tokens` 0 leaves prefill out.
    """
    for name, value, least in (
        ("prompt_tokens", prompt_tokens, 1),
        ("new_tokens", new_tokens, 2),
        ("batch_sizes", min(batch_sizes, default=0), 1),
        ("prefill_tokens", prefill_tokens, 0),
        ("repetitions", repetitions, 1),
        ("warmups", warmups, 0),
    ):
        if value < least:
            raise UserError(f"The decode measure got {name} = {value}.", f"It must be at least {least}.")
    short = {batch: prompts(ids, batch, prompt_tokens) for batch in batch_sizes}
    long = prompts(ids, 1, prefill_tokens) if prefill_tokens else None
    total = (warmups + repetitions) * (len(short) + (long is not None))
    done = 0
    for turn in range(warmups + repetitions):
        warmup = turn < warmups
        head = {"start": start, "repetition": turn if warmup else turn - warmups, "warmup": warmup}
        if long is not None:
            _tick(progress, done, total, f"prefill {prefill_tokens}")
            decoded = _decode(engine, long, 1)
            times: dict[str, Any] = {"prefill_seconds": decoded.prefill_seconds}
            yield {"kind": "prefill", **head, "batch": 1, "prompt_tokens": prefill_tokens, **times}
            done += 1
        for batch, rows in short.items():
            _tick(progress, done, total, f"decode, batch {batch}")
            decoded = _decode(engine, rows, new_tokens)
            times = {"prefill_seconds": decoded.prefill_seconds, "step_seconds": list(decoded.step_seconds)}
            yield {"kind": "decode", **head, "batch": batch, "prompt_tokens": prompt_tokens, **times}
            done += 1
    _tick(progress, done, total, "done")
    memory = engine.memory()
    yield {
        "kind": "memory",
        "start": start,
        "weight_bytes": engine.info.effective["weight_bytes_resident"],
        "weight_bytes_per_token": engine.info.effective["weight_bytes_per_token"],
        "peak_rss_bytes": memory.peak_rss_bytes,
        "peak_vram_bytes": memory.peak_vram_bytes,
    }


def _decode(engine: Engine, rows: list[list[int]], num_tokens: int) -> Decoded:
    """A generation whose length and times are what was asked for."""
    decoded = engine.decode(rows, num_tokens)
    lengths = sorted({len(row) for row in decoded.token_ids})
    if len(decoded.token_ids) != len(rows) or lengths != [num_tokens] or len(decoded.step_seconds) != num_tokens - 1:
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


def _tick(progress: Progress | None, done: int, total: int, description: str) -> None:
    if progress is not None:
        progress(done, total, description)
