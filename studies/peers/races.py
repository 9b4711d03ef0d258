"""Races: contestants take turns at the same work, each time in a process of its own under one stopwatch.

The turn is reversed every time (A B C, C B A, ...), so that a machine that slows down slows all contestants alike. The
work is done in a folder in memory where there is room for it, so that no disk is measured. A contestant that fails is a
finding, not an error: the reason is recorded, and the others go on.

A process is told what to do by a job, and what it says of its work is its result. `answerer` and `scorer` are the
programs that run there.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from harness.progress import Progress
from harness.record import store
from harness.record.run import Record
from harness.record.store import RunWriter
from studies.peers.contest import Answerer, Contestant, Scorer
from studies.peers.session import Session, failure_reason, header
from studies.peers.stopwatch import Timed, timed

LAYERS, VOCABULARY = 4, 32_000
"""What the 9B configuration is cut down to for speed; its widths stay."""
_MEMORY_FOLDER = Path("/dev/shm")
_SCRATCH_BYTES = {
    "speed-a16": 9 * 10**9,
    "speed-w4a4": 10**9,
    "speed-scoring-synthetic": 11 * 10**9,
    "speed-scoring-dense": 10**9,
}


@dataclass(frozen=True)
class Turn:
    """One turn of a contestant. With a `failure` there are no samples."""

    samples: Sequence[Mapping[str, Any]] = ()
    failure: str | None = None
    artifact_digest: str | None = None
    packages: Mapping[str, str] = field(default_factory=dict)


def race(
    session: Session,
    part: str,
    about: Mapping[str, Any],
    contestants: Mapping[str, Contestant | Answerer | Scorer | None],
    source_digest: str,
    take: Callable[[str, int], Turn],
) -> list[Record]:
    """Every contestant in its turn, as often as the session says; a record of each.

    `take` is given the name of a contestant and the number of the repetition. `about` says what all contestants are
    given; a contestant that is None is a plain copy.
    """
    with ExitStack() as stack:
        writers: dict[str, RunWriter] = {}
        failed: set[str] = set()
        for repetition in range(session.repetitions):
            for name in list(contestants)[:: 1 if repetition % 2 == 0 else -1]:
                if name in failed:
                    continue
                what = f"{part}, repetition {repetition + 1} of {session.repetitions}: {name}"
                session.progress(0, 1, what)
                turn = take(name, repetition)
                session.progress(1, 1, what)
                if name not in writers:
                    run = header(
                        *(session, part, about, name, contestants[name], source_digest),
                        *(turn.artifact_digest, turn.packages),
                    )
                    writers[name] = stack.enter_context(RunWriter(session.results, run))
                if turn.failure:
                    failed.add(name)
                    writers[name].sample({"kind": "failure", "reason": turn.failure})
                for sample in turn.samples:
                    writers[name].sample(dict(sample))
        return [store.read(writer.finish()) for writer in writers.values()]


@contextmanager
def scratch(part: str, progress: Progress) -> Iterator[tuple[Path, bool]]:
    """A folder that is removed afterwards, and whether it is in memory: it is where twice its size is free there."""
    needed = _SCRATCH_BYTES[part]
    in_memory = (
        os.access(_MEMORY_FOLDER, os.W_OK)
        and shutil.disk_usage(_MEMORY_FOLDER).free > needed
        and psutil.virtual_memory().available > 1.6 * needed
    )
    with tempfile.TemporaryDirectory(prefix="harness-peers-", dir=_MEMORY_FOLDER if in_memory else None) as folder:
        progress(1, 1, f"{part}: working in {'memory' if in_memory else 'a folder on disk (too little free memory)'}")
        yield Path(folder), in_memory


def warm(folder: Path, num_bytes: int) -> None:
    """Writes and removes so many bytes, so that every run finds memory that the machine really has.

    A virtual machine gives free memory back to its host after seconds, and pays several times the cost of a write to
    get it again.
    """
    path, piece = folder / "warm", bytes(16 << 20)
    with path.open("wb") as file:
        for _ in range(num_bytes // len(piece)):
            file.write(piece)
    path.unlink()


@dataclass(frozen=True)
class JobRun:
    """One run of a job: its process, and the result that it wrote. With a `failure` there is no result."""

    run: Timed
    result: dict[str, Any] = field(default_factory=dict)
    failure: str | None = None

    def turn(self, repetition: int) -> Turn:
        """The turn of a contestant that did this job."""
        return Turn(
            samples=() if self.failure else (self.sample(repetition),),
            failure=self.failure,
            packages=self.result.get("packages", {}),
        )

    def sample(self, repetition: int) -> dict[str, Any]:
        """The raw observation that is kept. Its kind is the word of the first records."""
        return {
            "kind": "evaluation",
            "repetition": repetition,
            "wall_seconds": self.run.wall_seconds,
            "call_seconds": self.result["seconds"],
            "num_items": self.result["num_items"],
            "num_requests": self.result["num_requests"],
            # An engine counts its peak from its own start and makes the kernel forget what was before.
            "peak_rss_bytes": max(self.run.peak_rss_bytes, self.result.get("peak_rss_bytes", 0)),
            "scores": self.result["scores"],
        }


def run_job(module: str, job: Mapping[str, Any], python: Path, logs: Path) -> JobRun:
    """Runs `module` of this room on a job to its end. The job, its result and its output are files beside each other,
    whose names begin like `logs`."""
    result, file = (logs.with_name(logs.name + suffix) for suffix in (".result.json", ".job.json"))
    result.unlink(missing_ok=True)
    file.write_text(json.dumps({**job, "result": str(result)}, indent=2), encoding="utf-8")
    run = timed([str(python), "-m", f"studies.peers.{module}", str(file)], logs, env={"HF_HUB_OFFLINE": "1"})
    if run.exit_code or not result.exists():
        return JobRun(run, failure=failure_reason(run.exit_code, run.complaint))
    return JobRun(run, json.loads(result.read_text(encoding="utf-8")))
