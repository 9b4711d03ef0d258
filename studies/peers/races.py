"""Races: contestants take turns at the same work, each time in a process of its own under one stopwatch.

As with quantizers, the turn is reversed every time, and a contestant that fails is recorded while the others go on.
What a process is told to do is its job, what it says of it its result; `evaluator` and `scorer` are what runs there.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from harness.record import store
from harness.record.store import Record, RunWriter
from studies.peers.bench import Bench, header, reason
from studies.peers.contest import Evaluator, Scorer
from studies.peers.stopwatch import Timed, timed

Entrant = TypeVar("Entrant", Evaluator, Scorer)


@dataclass(frozen=True)
class Answered:
    """One run of a contestant: its process, and what it says itself. With a `failure` there is nothing else."""

    run: Timed
    told: dict[str, Any] = field(default_factory=dict)
    failure: str | None = None

    def sample(self, repetition: int) -> dict[str, Any]:
        """The raw observation that is kept."""
        return {
            "kind": "evaluation",
            "repetition": repetition,
            "wall_seconds": self.run.wall_seconds,
            "call_seconds": self.told["seconds"],
            "num_items": self.told["num_items"],
            "num_requests": self.told["num_requests"],
            # An engine counts its peak from its own start on and makes the kernel forget what was before.
            "peak_rss_bytes": max(self.run.peak_rss_bytes, self.told.get("peak_rss_bytes", 0)),
            "scores": self.told["scores"],
        }


def race(
    bench: Bench,
    part: str,
    about: Mapping[str, Any],
    contestants: Sequence[Entrant],
    source_digest: str,
    answer: Callable[[Entrant], Answered],
) -> list[Record]:
    """Every contestant in its turn, as often as the session says, by `answer`; a record of each. `about` is what all of
    them are asked."""
    about = {**about, "limit": bench.limit, "repetitions": bench.repetitions}
    with ExitStack() as stack:
        writers: dict[str, RunWriter] = {}
        failed: set[str] = set()
        for repetition in range(bench.repetitions):
            for one in contestants[:: 1 if repetition % 2 == 0 else -1]:
                if one.name in failed:
                    continue
                what = f"{part}, repetition {repetition + 1} of {bench.repetitions}: {one.name}"
                bench.progress(0, 1, what)
                answered = answer(one)
                bench.progress(1, 1, what)
                if one.name not in writers:
                    variant = {
                        "name": one.name,
                        "recipe": None,
                        "contestant": asdict(one),
                        "artifact_digest": None,
                        "source_digest": source_digest,
                    }
                    run = header(bench, part, about, variant, answered.told.get("packages", {}))
                    writers[one.name] = stack.enter_context(RunWriter(bench.results, run))
                if answered.failure:
                    failed.add(one.name)
                    writers[one.name].sample({"kind": "failure", "reason": answered.failure})
                else:
                    writers[one.name].sample(answered.sample(repetition))
        return [store.read(writer.finish()) for writer in writers.values()]


def run_job(module: str, job: Mapping[str, Any], python: Path, logs: Path) -> Answered:
    """Runs `module` of this room on a job to its end; the job, its result and its output lie beside each other, in
    files that begin like `logs`."""
    result, file = (logs.with_name(logs.name + suffix) for suffix in (".result.json", ".job.json"))
    result.unlink(missing_ok=True)
    file.write_text(json.dumps({**job, "result": str(result)}, indent=2), encoding="utf-8")
    run = timed([str(python), "-m", f"studies.peers.{module}", str(file)], logs, env={"HF_HUB_OFFLINE": "1"})
    if run.exit_code or not result.exists():
        return Answered(run, failure=reason(run.exit_code, run.complaint))
    return Answered(run, json.loads(result.read_text(encoding="utf-8")))
