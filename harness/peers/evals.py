"""Races of task evals: lm-eval's own model classes and our engines answer the same files, each in a process of its own.

As with quantizers, contestants take turns and the turn is reversed every time, and a contestant that fails is recorded
while the others go on. What a process is told to do and what it times is in `evaluator`.
"""

import json
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from harness.demo import task_file
from harness.errors import UserError
from harness.model.checkpoint import open_checkpoint
from harness.peers import contest
from harness.peers.bench import Bench, header, reason
from harness.peers.contest import Evaluator
from harness.peers.stopwatch import Timed, timed
from harness.record import results
from harness.record.results import Record, RunWriter


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
            "peak_rss_bytes": self.run.peak_rss_bytes,
            "scores": self.told["scores"],
        }


def check_environment(python: Path, option: str, modules: Sequence[str]) -> None:
    """`UserError` where the interpreter is missing or does not have what a part imports."""
    remedy = f"Run `nox -s peers`, which makes it, or name another interpreter with {option}."
    if not python.exists():
        raise UserError(f"There is no environment for task evals at {python}.", remedy)
    code = "import importlib.util as u, sys; print(*(name for name in sys.argv[1:] if u.find_spec(name) is None))"
    done = subprocess.run([python, "-I", "-c", code, "harness", *modules], capture_output=True, text=True)
    if done.returncode or done.stdout.strip():
        lacking = ", ".join(done.stdout.split()) or "working interpreter"
        raise UserError(f"{python} has no {lacking}.", remedy)


def speed_tasks(bench: Bench, source: Path, python: Path) -> list[Record]:
    """lm-eval's hf model and our torch engine on an embedded model; `python` has both."""
    return race(bench, "speed-tasks", contest.SPEED_TASKS, source, python)


def speed_tasks_vllm(bench: Bench, source: Path, python: Path) -> list[Record]:
    """lm-eval's vllm model and our vLLM engine on an embedded model; `python` has both."""
    return race(bench, "speed-tasks-vllm", contest.SPEED_TASKS_VLLM, source, python)


def race(bench: Bench, part: str, contestants: Sequence[Evaluator], source: Path, python: Path) -> list[Record]:
    """Every contestant in its turn, as often as the session says; a record of each."""
    about = {
        "source": source.name,
        "tasks": list(contest.EVALUATIONS),
        "limit": bench.limit,
        "repetitions": bench.repetitions,
    }
    source_digest = open_checkpoint(source).fingerprint()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="harness-peers-")))
        writers: dict[str, RunWriter] = {}
        failed: set[str] = set()
        for repetition in range(bench.repetitions):
            for one in contestants[:: 1 if repetition % 2 == 0 else -1]:
                if one.name in failed:
                    continue
                what = f"{part}, repetition {repetition + 1} of {bench.repetitions}: {one.name}"
                bench.progress(0, 1, what)
                answered = answer(one, source, folder, python, bench.limit)
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
        return [results.read(writer.finish()) for writer in writers.values()]


def answer(contestant: Evaluator, source: Path, folder: Path, python: Path, limit: int | None) -> Answered:
    """One contestant through all tasks, to its end; its job and its logs go into `folder`."""
    result, file, logs = (folder / f"{contestant.name}{suffix}" for suffix in (".result.json", ".job.json", ".log"))
    result.unlink(missing_ok=True)
    job = {
        **contestant.job(),
        "source": str(source),
        "tasks": [str(task_file(name)) for name in contest.EVALUATIONS],
        "limit": limit,
        "result": str(result),
    }
    file.write_text(json.dumps(job, indent=2), encoding="utf-8")
    run = timed([str(python), "-m", "harness.peers.evaluator", str(file)], logs, env={"HF_HUB_OFFLINE": "1"})
    if run.exit_code or not result.exists():
        return Answered(run, failure=reason(run.exit_code, run.complaint))
    return Answered(run, json.loads(result.read_text(encoding="utf-8")))
