"""Races of scorers: a source and its variants in one pass of the streamed scorer, or one after the other in the torch
engine.

The variants are built first, and models lie in memory where there is room, so that no disk is measured. What a process
is told to do and what it times is in `scorer`.
"""

import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from harness.demo.synthesize import synthesize
from harness.errors import UserError
from harness.measure import perplexity
from harness.model.checkpoint import open_checkpoint, read_json
from harness.model.families import parse_config
from harness.record.store import Record
from studies.peers import contest
from studies.peers.bench import LAYERS, VOCABULARY, Bench, Data, quantize, scratch, warm
from studies.peers.contest import Ours, Scorer
from studies.peers.races import Answered, race, run_job


def synthetic(bench: Bench, config: Path) -> list[Record]:
    """Both scorers on a few layers of true width, random weights."""
    part, raw = "speed-scoring-synthetic", read_json(config)
    with scratch(part, bench.progress) as (folder, in_memory):
        source = folder / "source"
        synthesize(raw, source, num_layers=LAYERS, vocab_size=VOCABULARY, seed=0, progress=bench.progress)
        about = {"source": config.stem, "layers": LAYERS, "vocabulary": VOCABULARY, "in_memory": in_memory}
        return scored(bench, part, about, source, folder)


def embedded(bench: Bench, original: Path) -> list[Record]:
    """Both scorers on an embedded model."""
    part = f"speed-scoring-{original.name}"
    with scratch(part, bench.progress) as (folder, in_memory):
        source = Path(shutil.copytree(original, folder / "source"))
        about = {"source": original.name, "in_memory": in_memory}
        return scored(bench, part, about, source, folder)


def scored(
    bench: Bench,
    part: str,
    about: Mapping[str, Any],
    source: Path,
    folder: Path,
    variants: Sequence[Ours] = contest.SCORED,
    contestants: Sequence[Scorer] = contest.SPEED_SCORING,
) -> list[Record]:
    """Builds the variants of `source` into `folder`, which must hold none of them, and races; a record of each
    contestant. `UserError` for a variant that cannot be built."""
    models, digests = {"source": source}, {"source": open_checkpoint(source).fingerprint()}
    for variant in variants:
        what = f"{part}: build {variant.name}"
        bench.progress(0, 1, what)
        models[variant.name] = folder / variant.name
        made = quantize(bench, variant, source, models[variant.name], Data(folder / "none", folder / "none", ""))
        bench.progress(1, 1, what)
        if made.digest is None:
            raise UserError(
                f"{variant.name} of {about['source']} was not built ({made.failure}).",
                f"Run `harness build` with {' '.join(variant.arguments())} to see why.",
            )
        digests[variant.name] = made.digest
    windows = drawn_windows(source, bench.limit)
    job = {
        "models": {name: str(one) for name, one in models.items()},
        "windows": windows,
        "batch_size": len(windows),
        "scratch": str(folder / "hidden"),
    }
    # Twice what BF16 takes: the torch engine has all weights in float32.
    num_bytes = 2 * open_checkpoint(source).num_bytes

    def answer(one: Scorer) -> Answered:
        warm(folder, num_bytes)
        return run_job("scorer", {**job, **one.job()}, Path(sys.executable), folder / one.name)

    about = {
        **about,
        "models": digests,
        "dtype": "float32",
        "num_windows": len(windows),
        "num_window_tokens": contest.SCORED_TOKENS,
        "token_ids_sha256": perplexity.token_ids_digest([token for window in windows for token in window]),
    }
    return race(bench, part, about, contestants, digests["source"], answer)


def drawn_windows(source: Path, limit: int | None) -> list[list[int]]:
    """Windows of token ids that the model in `source` knows, always the same; `limit` gives the first of them."""
    vocabulary = parse_config(read_json(source / "config.json"), str(source)).vocab_size
    drawn = np.random.default_rng(0).integers(vocabulary, size=(contest.SCORED_WINDOWS, contest.SCORED_TOKENS))
    windows: list[list[int]] = drawn[:limit].tolist()
    return windows
