"""Quality of both sides' artifacts, measured by one engine, ours, on every artifact alike.

Quality is the divergence from the source's predictions on held-out text, in float32.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from harness.demo import corpus
from harness.demo.language import NEAR
from harness.engines.protocol import open_engine
from harness.errors import UserError
from harness.measure import fidelity, perplexity
from harness.model.checkpoint import open_checkpoint
from harness.progress import named
from harness.record import store
from harness.record.run import Record
from harness.record.store import RunWriter
from studies.languages import FAR
from studies.peers import contest
from studies.peers.chunks import chunks_of
from studies.peers.contest import Contestant
from studies.peers.quantizers import Data, quantize_once, remarks_on, write_calibration
from studies.peers.session import Session, header

WINDOW = 512
NUM_TOKENS = 30_720
"""Tokens of each held-out text: 60 windows."""

_BATCH = 4
_STORED = ("kind", "index", "num_tokens", "num_scored", "kl_nats", "num_agreed")
"""The keys of a window's sample that are kept; the divergence of every token is not."""

Texts = dict[str, list[list[int]]]
"""Windows of token ids by the name of their text."""


class _Remembered:
    """A predictor that has answered before: the source's distributions, computed once for all variants."""

    def __init__(self, answers: Sequence[NDArray[np.float32]]) -> None:
        self._answers = answers

    def log_probs(self, windows: Sequence[Sequence[int]], batch_size: int) -> Iterator[NDArray[np.float32]]:
        """The remembered answers, whatever is asked."""
        yield from self._answers


def measure_quality(
    session: Session, source: Path, groups: Sequence[contest.QualityGroup] = contest.QUALITY
) -> list[Record]:
    """Every contestant of the groups on an embedded model: built if it is not there yet, checked, measured."""
    part = f"quality-{source.name}"
    folder = session.artifacts / source.name
    data = write_calibration(source, folder, contest.QUALITY_SAMPLES, session.progress)
    texts = heldout_windows(source, session.limit)
    about = {
        "source": source.name,
        "calibration_digest": data.digest,
        "dtype": "float32",
        "texts": {
            text: {
                "num_windows": len(windows),
                "token_ids_sha256": perplexity.token_ids_digest([i for window in windows for i in window]),
            }
            for text, windows in texts.items()
        },
    }
    with closing(open_engine("torch", source, dtype="float32")) as engine:
        reference = {text: _Remembered(list(engine.log_probs(windows, _BATCH))) for text, windows in texts.items()}
        session.progress(1, 1, f"{part}: the source's predictions")
    contestants = {one.name: one for group in groups for one in group.contestants}
    records = []
    for number, (name, contestant) in enumerate(contestants.items(), 1):
        told = replace(session, progress=named(session.progress, f"{part}, {number} of {len(contestants)}: {name}"))
        records.append(_measured(told, part, about, contestant, source, folder, data, texts, reference))
    return records


def _measured(
    session: Session,
    part: str,
    about: Mapping[str, object],
    contestant: Contestant,
    source: Path,
    folder: Path,
    data: Data,
    texts: Texts,
    reference: dict[str, _Remembered],
) -> Record:
    """The record of one contestant."""
    name, source_digest = contestant.name, open_checkpoint(source).fingerprint()
    made = quantize_once(session, contestant, source, folder / name, data, source_digest)
    run = header(session, part, about, name, contestant, source_digest, made.digest, made.packages)
    with ExitStack() as stack:
        failure, variant = made.failure, None
        if not failure:
            try:
                variant = stack.enter_context(closing(open_engine("torch", folder / name, dtype="float32")))
                run = replace(run, engine=variant.info.as_dict())
            except UserError as error:
                failure = error.problem
        writer = stack.enter_context(RunWriter(session.results, run))
        if not made.failure:
            writer.sample(made.sample(0))
            for remark in remarks_on(made, folder / name, source, session.progress):
                writer.sample(remark)
        if failure or variant is None:
            writer.sample({"kind": "failure", "reason": failure or "it was not opened"})
        else:
            for text, windows in texts.items():
                chunks = chunks_of([reference[text], variant], windows, _BATCH)
                progress = named(session.progress, text)
                for _, sample in fidelity.fidelity_samples(chunks, windows, [name], progress=progress):
                    writer.sample({**{key: sample[key] for key in _STORED}, "text": text})
        return store.read(writer.finish())


def heldout_windows(source: Path, limit: int | None) -> Texts:
    """Windows of held-out text: `near`, in the language that the calibration is in, and `far`."""
    texts = {"near": corpus.heldout_text(NEAR), "far": corpus.heldout_text(FAR)}
    ids = {text: perplexity.tokenize(source, content)[:NUM_TOKENS] for text, content in texts.items()}
    return {
        text: [one[first : first + WINDOW] for first in range(0, len(one) - WINDOW + 1, WINDOW)][:limit]
        for text, one in ids.items()
    }
