"""Races of task evals: lm-eval's own model classes and our engines answer the same files, each in a process of its own.

What a process is told to do and what it times is in `evaluator`.
"""

import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from harness.demo import task_file
from harness.errors import UserError
from harness.model.checkpoint import open_checkpoint
from harness.record.store import Record
from studies.peers import contest
from studies.peers.bench import Bench
from studies.peers.contest import Evaluator
from studies.peers.races import Answered, race, run_job


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
    return tasks(bench, "speed-tasks", contest.SPEED_TASKS, source, python)


def speed_tasks_vllm(bench: Bench, source: Path, python: Path) -> list[Record]:
    """lm-eval's vllm model and our vLLM engine on an embedded model; `python` has both."""
    return tasks(bench, "speed-tasks-vllm", contest.SPEED_TASKS_VLLM, source, python)


def tasks(bench: Bench, part: str, contestants: Sequence[Evaluator], source: Path, python: Path) -> list[Record]:
    """Every contestant through all tasks; a record of each."""
    job = {
        "source": str(source),
        "tasks": [str(task_file(name)) for name in contest.EVALUATIONS],
        "limit": bench.limit,
    }
    with tempfile.TemporaryDirectory(prefix="harness-peers-") as folder:

        def answer(one: Evaluator) -> Answered:
            return run_job("evaluator", {**job, **one.job()}, python, Path(folder) / one.name)

        about = {"source": source.name, "tasks": list(contest.EVALUATIONS)}
        return race(bench, part, about, contestants, open_checkpoint(source).fingerprint(), answer)
