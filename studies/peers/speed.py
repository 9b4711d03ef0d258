"""Races of quantizers: ours, llm-compressor's, and a plain copy as a floor for whatever writes those bytes."""

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.demo.synthesize import synthesize
from harness.model.checkpoint import open_checkpoint, read_json
from harness.record.run import Record
from studies.peers import contest
from studies.peers.contest import COPY, Contestant
from studies.peers.quantizers import Data, Made, folder_bytes, quantize, remarks_on, write_calibration
from studies.peers.races import LAYERS, VOCABULARY, Turn, race, scratch, warm
from studies.peers.session import Session


def speed_a16(session: Session, config: Path) -> list[Record]:
    """Round-to-nearest without data on a few layers of true width with random weights."""
    with scratch("speed-a16", session.progress) as (folder, in_memory):
        source = folder / "source"
        synthesize(
            *(read_json(config), source),
            num_layers=LAYERS,
            vocab_size=VOCABULARY,
            seed=0,
            progress=session.progress,
        )
        about = {"source": config.stem, "layers": LAYERS, "vocabulary": VOCABULARY, "in_memory": in_memory}
        data = Data.none(folder)
        return quantizer_race(session, "speed-a16", about, contest.SPEED_A16, source, folder, data, with_copy=True)


def speed_w4a4(session: Session, original: Path) -> list[Record]:
    """Weights and activations, with calibration, on an embedded model."""
    with scratch("speed-w4a4", session.progress) as (folder, in_memory):
        source = Path(shutil.copytree(original, folder / "source"))
        data = write_calibration(source, folder, contest.SPEED_SAMPLES, session.progress)
        about = {"source": original.name, "calibration_digest": data.digest, "in_memory": in_memory}
        return quantizer_race(session, "speed-w4a4", about, contest.SPEED_W4A4, source, folder, data)


def quantizer_race(
    session: Session,
    part: str,
    about: Mapping[str, Any],
    contestants: Sequence[Contestant],
    source: Path,
    folder: Path,
    data: Data,
    *,
    with_copy: bool = False,
) -> list[Record]:
    """Every quantizer in its turn on `source`, into `folder`; a record of each. A plain copy, if wanted, copies the
    output of the first quantizer, which stays; the output of the others is removed."""
    checkpoint = open_checkpoint(source)
    entrants: dict[str, Contestant | None] = {one.name: one for one in contestants}
    original = folder / contestants[0].name
    if with_copy:
        entrants[COPY] = None  # last: the first round makes what it copies

    def take(name: str, repetition: int) -> Turn:
        out, contestant = folder / name, entrants[name]
        shutil.rmtree(out, ignore_errors=True)
        warm(folder, checkpoint.num_bytes)
        made = quantize(session, contestant, source, out, data) if contestant else _copy(original, out)
        if made.failure:
            return Turn(failure=made.failure, artifact_digest=made.digest, packages=made.packages)
        samples = [made.sample(repetition)]
        if contestant and repetition == session.repetitions - 1:
            samples += remarks_on(made, out, source, session.progress)
        if out != original:
            shutil.rmtree(out)
        return Turn(samples, None, made.digest, made.packages)

    about = {**about, "repetitions": session.repetitions}
    return race(session, part, about, entrants, checkpoint.fingerprint(), take)


def _copy(original: Path, out: Path) -> Made:
    """A plain copy of a folder's bytes; Python's own copy is in this process already and loads nothing."""
    if not original.is_dir():
        return Made(failure="there is nothing to copy")
    start = time.perf_counter()
    shutil.copytree(original, out)
    seconds = time.perf_counter() - start
    return Made(wall_seconds=seconds, call_seconds=seconds, output_bytes=folder_bytes(out))
