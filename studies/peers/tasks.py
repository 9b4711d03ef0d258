"""Races of tasks: lm-eval's own model classes and our engines answer the same task files, each in its own process.

`answerer` says what a process is told to do and what it times.
"""

import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from harness.demo import task_file
from harness.errors import UserError
from harness.model.checkpoint import open_checkpoint
from harness.record.run import Record
from studies.peers import contest
from studies.peers.contest import Answerer
from studies.peers.races import Turn, race, run_job
from studies.peers.session import Session


def check_environment(python: Path, option: str, modules: Sequence[str]) -> None:
    """`UserError` where the interpreter is missing or lacks a module that a part imports."""
    remedy = f"Run `nox -s peers`, which makes it, or name another interpreter with {option}."
    if not python.exists():
        raise UserError(f"There is no environment for tasks at {python}.", remedy)
    code = "import importlib.util as u, sys; print(*(name for name in sys.argv[1:] if u.find_spec(name) is None))"
    done = subprocess.run([python, "-I", "-c", code, "harness", *modules], capture_output=True, text=True)
    if done.returncode or done.stdout.strip():
        lacking = ", ".join(done.stdout.split()) or "working interpreter"
        raise UserError(f"{python} has no {lacking}.", remedy)


def speed_tasks(session: Session, source: Path, python: Path) -> list[Record]:
    """lm-eval's hf model and our torch engine on an embedded model; `python` has both."""
    return task_race(session, "speed-tasks", contest.SPEED_TASKS, source, python)


def speed_tasks_vllm(session: Session, source: Path, python: Path) -> list[Record]:
    """lm-eval's vllm model and our vLLM engine on an embedded model; `python` has both."""
    return task_race(session, "speed-tasks-vllm", contest.SPEED_TASKS_VLLM, source, python)


def task_race(session: Session, part: str, contestants: Sequence[Answerer], source: Path, python: Path) -> list[Record]:
    """Every contestant through all tasks in its turn; a record of each."""
    job = {
        "source": str(source),
        "tasks": [str(task_file(name)) for name in contest.TASKS],
        "limit": session.limit,
    }
    entrants = {one.name: one for one in contestants}
    about = {
        "source": source.name,
        "tasks": list(contest.TASKS),
        "limit": session.limit,
        "repetitions": session.repetitions,
    }
    with tempfile.TemporaryDirectory(prefix="harness-peers-") as folder:

        def take(name: str, repetition: int) -> Turn:
            return run_job("answerer", {**job, **entrants[name].job()}, python, Path(folder) / name).turn(repetition)

        return race(session, part, about, entrants, open_checkpoint(source).fingerprint(), take)
