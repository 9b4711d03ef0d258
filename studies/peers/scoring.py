"""Races of scorers: a source and its variants in one streamed pass, or one after the other in the torch engine.

The variants are built first, and models lie in memory where there is room, so that no disk is measured. `scorer` says
what a process is told to do and what it times.
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
from harness.record.run import Record
from studies.peers import contest
from studies.peers.contest import Ours, Scorer
from studies.peers.quantizers import Data, quantize
from studies.peers.races import LAYERS, VOCABULARY, Turn, race, run_job, scratch, warm
from studies.peers.session import Session


def synthetic(session: Session, config: Path) -> list[Record]:
    """Both scorers on a few layers of true width with random weights."""
    part, raw = "speed-scoring-synthetic", read_json(config)
    with scratch(part, session.progress) as (folder, in_memory):
        source = folder / "source"
        synthesize(raw, source, num_layers=LAYERS, vocab_size=VOCABULARY, seed=0, progress=session.progress)
        about = {"source": config.stem, "layers": LAYERS, "vocabulary": VOCABULARY, "in_memory": in_memory}
        return scorer_race(session, part, about, source, folder)


def embedded(session: Session, original: Path) -> list[Record]:
    """Both scorers on an embedded model."""
    part = f"speed-scoring-{original.name}"
    with scratch(part, session.progress) as (folder, in_memory):
        source = Path(shutil.copytree(original, folder / "source"))
        about = {"source": original.name, "in_memory": in_memory}
        return scorer_race(session, part, about, source, folder)


def scorer_race(
    session: Session,
    part: str,
    about: Mapping[str, Any],
    source: Path,
    folder: Path,
    variants: Sequence[Ours] = contest.SCORED,
    contestants: Sequence[Scorer] = contest.SPEED_SCORING,
) -> list[Record]:
    """Builds the variants of `source` into `folder`, which must hold none of them, and races the scorers; a record of
    each scorer. `UserError` for a variant that cannot be built."""
    models, digests = {"source": source}, {"source": open_checkpoint(source).fingerprint()}
    for variant in variants:
        what = f"{part}: build {variant.name}"
        session.progress(0, 1, what)
        models[variant.name] = folder / variant.name
        made = quantize(session, variant, source, models[variant.name], Data.none(folder))
        session.progress(1, 1, what)
        if made.digest is None:
            raise UserError(
                f"{variant.name} of {about['source']} was not built ({made.failure}).",
                f"Run `harness build` with {' '.join(variant.arguments())} to see why.",
            )
        digests[variant.name] = made.digest
    windows = drawn_windows(source, session.limit)
    job = {
        "models": {name: str(one) for name, one in models.items()},
        "windows": windows,
        "batch_size": len(windows),
        "scratch": str(folder / "hidden"),
    }
    # The torch engine holds all weights in float32, which is twice their size in BF16.
    num_bytes = 2 * open_checkpoint(source).num_bytes

    entrants: dict[str, Scorer] = {one.name: one for one in contestants}

    def take(name: str, repetition: int) -> Turn:
        warm(folder, num_bytes)
        return run_job("scorer", {**job, **entrants[name].job()}, Path(sys.executable), folder / name).turn(repetition)

    about = {
        **about,
        "models": digests,
        "dtype": "float32",
        "num_windows": len(windows),
        "num_window_tokens": contest.SCORED_TOKENS,
        "token_ids_sha256": perplexity.token_ids_digest([token for window in windows for token in window]),
        "limit": session.limit,
        "repetitions": session.repetitions,
    }
    return race(session, part, about, entrants, digests["source"], take)


def drawn_windows(source: Path, limit: int | None) -> list[list[int]]:
    """The same windows of token ids every time, all known to the model in `source`; `limit` is their largest number."""
    vocabulary = parse_config(read_json(source / "config.json"), str(source)).vocab_size
    drawn = np.random.default_rng(0).integers(vocabulary, size=(contest.SCORED_WINDOWS, contest.SCORED_TOKENS))
    windows: list[list[int]] = drawn[:limit].tolist()
    return windows
