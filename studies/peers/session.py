"""One session of the comparison: where things are, how often a time is taken, and how a record begins."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import harness
from harness.progress import Progress
from harness.record import provenance
from harness.record.run import Run
from studies.peers.contest import Answerer, Contestant, Scorer

VERSION = 1


@dataclass(frozen=True)
class Session:
    """The options of the command line, and what follows from them."""

    their_python: Path
    """The interpreter of llm-compressor's environment."""
    their_packages: Mapping[str, str]
    artifacts: Path
    results: Path
    repetitions: int
    limit: int | None
    """The largest number of windows of a text, or documents of a task; None for all."""
    progress: Progress
    command: tuple[str, ...]
    session_id: str


def header(
    session: Session,
    part: str,
    about: Mapping[str, Any],
    name: str,
    contestant: Contestant | Answerer | Scorer | None,
    source_digest: str,
    artifact_digest: str | None,
    packages: Mapping[str, str],
) -> Run:
    """The header of a contestant's record in a part of the comparison. `about` says what all contestants are given; the
    contestant is None for a plain copy."""
    suite = {"name": part, **about}
    canonical = json.dumps(suite, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return Run(
        measure="peers",
        measure_version=VERSION,
        session_id=session.session_id,
        suite=suite,
        suite_digest=hashlib.sha256(canonical.encode()).hexdigest(),
        variant={
            "name": name,
            "recipe": getattr(contestant, "recipe", None),
            "contestant": asdict(contestant) if contestant else None,
            "artifact_digest": artifact_digest,
            "source_digest": source_digest,
        },
        engine=None,
        dataset=None,
        machine={**provenance.machine(), "omp_num_threads": os.environ.get("OMP_NUM_THREADS")},
        packages=dict(packages),
        git=provenance.git(Path(harness.__file__).parent),
        command=session.command,
    )


def failure_reason(exit_code: int, complaint: str) -> str:
    """Why a process failed: the exception of its traceback or the sentence of its user error, whichever is last."""
    killed = f"killed by signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
    lines = [line for line in complaint.splitlines() if not line.startswith((" ", "\t"))]
    return f"{killed}: {lines[-1] if lines else 'no message'}"
