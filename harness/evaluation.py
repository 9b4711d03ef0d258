"""What `harness tasks` does, without a word printed: the suite's tasks, checked before any model is loaded, then every
model through all of them while it is in memory.

One run is one task on one model, so a task that is added later needs only its own runs. Answers lie in journals beside
the artifacts; a command that was interrupted finds them there and goes on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from harness import demo
from harness.errors import UserError, did_you_mean
from harness.measure import tasks
from harness.measure.answers import Journal
from harness.measure.lm import Texts
from harness.progress import named
from harness.record import provenance, store
from harness.record.store import Record, RunWriter
from harness.stages import (
    Job,
    Model,
    built_models,
    check_engine,
    chosen_setups,
    chosen_variants,
    max_length,
    new_run,
    noted_failures,
    running_engine,
    said_in,
    suite_source,
)
from harness.suite.names import SOURCE
from harness.suite.schema import Suite, Task

_DEMO = "demo:"
_JOURNALS = ".answers"  # no variant can be called so


@dataclass(frozen=True)
class Evaluation:
    """The models to run, and the tasks of each row by their names in the suite."""

    models: list[Model]
    loaded: Mapping[str, tasks.Loaded]

    def of(self, model: Model) -> list[tasks.Loaded]:
        """The tasks that a model is put to: in a setup only those that name it."""
        return [one for one in self.loaded.values() if model.setup is None or model.setup in (one.wanted.setups or ())]


@dataclass(frozen=True)
class Evaluated:
    """Records by task and row, and the reasons of the rows that failed."""

    records: dict[str, dict[str, Record]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def prepare(job: Job, variants: Sequence[str] | None, named_tasks: Sequence[str] | None) -> Evaluation:
    """The tasks of the suite, or the named ones, ready to run, and the models, built where missing. `UserError` for
    anything wrong with a task, before a variant is built for it."""
    suite = job.suite
    if not suite.tasks:
        raise UserError(f"Suite '{suite.name}' has no [tasks.NAME] table.", "Add one, or evaluate another suite.")
    for name in named_tasks or ():
        if name not in suite.tasks:
            raise UserError(f"Suite '{suite.name}' has no task '{name}'.", did_you_mean(name, suite.tasks))
    names = chosen_variants(suite, variants, with_source=True)
    check_engine(suite)
    wanted = {name: task for name, task in suite.tasks.items() if not named_tasks or name in named_tasks}
    # All of them before the source, which may be a download of many gigabytes.
    taken = [tasks.take(name, task, _place(suite, task)) for name, task in wanted.items()]
    texts = Texts(suite_source(suite))
    loaded = {}
    for done, one in enumerate(taken):
        job.progress(done, len(taken), "prompts", one.label)
        longest = max_length(suite, one.wanted.max_length, one.wanted.setups)
        loaded[one.label] = tasks.load(one, texts, longest, suite.engine.name)
    job.progress(len(taken), len(taken), "prompts")
    setups = dict.fromkeys(setup for task in wanted.values() for setup in chosen_setups(suite, task.setups))
    return Evaluation(built_models(job, names, list(setups)), loaded)


def _place(suite: Suite, task: Task) -> str | Path:
    """lm-eval's name of a task, or its file; as with sources, what is a file is told by how it is written."""
    if task.task.startswith(_DEMO):
        return demo.task_file(task.task.removeprefix(_DEMO))
    return suite.path(task.task) if task.task.startswith((".", "/", "~")) else task.task


def evaluate(job: Job, work: Evaluation, *, limit: int | None = None, fresh: bool = False) -> Evaluated:
    """One run a task and row. An engine that dies takes its own row with it, and what it answered stays."""
    found = Evaluated()
    for model in work.models:
        with (
            noted_failures(job, "tasks", tasks.VERSION, model, None, found.failures),
            running_engine(job, model, "score") as engine,
        ):
            for loaded in work.of(model):
                run = new_run(job, "tasks", tasks.VERSION, model, engine=engine, dataset=_dataset(loaded))
                assert run.engine is not None
                identity = _identity(model, run.engine, loaded)
                folder = job.artifacts / job.suite.name / _JOURNALS
                with (
                    RunWriter(job.results, run) as writer,
                    said_in(writer),
                    Journal(folder, f"{model.row}-{loaded.label}", identity, fresh=fresh) as journal,
                ):
                    samples = tasks.measure(
                        loaded,
                        engine,
                        journal,
                        limit=limit,
                        progress=named(job.progress, f"{model.row}, {loaded.label}"),
                    )
                    num_items = 0
                    for sample in samples:
                        writer.sample(sample)
                        num_items += sample["kind"] == "item"
                    missing = loaded.num_docs * loaded.wanted.repeats - num_items
                    record = store.read(writer.finish(num_missing=missing))
                found.records.setdefault(loaded.label, {})[model.row] = record
    return found


def _dataset(loaded: tasks.Loaded) -> dict[str, Any]:
    """What a run's header says of the task."""
    return {
        "name": loaded.label,
        "num_docs": loaded.num_docs,
        "settings": {**asdict(loaded.wanted), "setups": None},
        **loaded.identity,
    }


def _identity(model: Model, engine: Mapping[str, Any], loaded: tasks.Loaded) -> dict[str, Any]:
    """Whose answers a journal holds: this checkpoint's, by this engine, to this version of a task."""
    return {
        "measure_version": tasks.VERSION,
        "artifact_digest": model.digest,
        "engine": {key: engine[key] for key in ("name", "version", "device", "dtype", "served_as")},
        "options": {key: value for key, value in engine["requested"].items() if key != "folder"},
        "code": provenance.code_digest(),
        "task": loaded.identity,
    }


def with_stored_source(job: Job, found: Evaluated) -> dict[str, dict[str, Record]]:
    """The runs of each task beside the newest stored one of the source, where this command ran none."""
    from harness.report import task_tables

    stored, _ = store.read_all(job.results)
    source = task_tables.newest_by_task(stored, job.suite, (SOURCE,))
    return {label: {**source.get(label, {}), **rows} for label, rows in found.records.items()}
