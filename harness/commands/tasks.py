"""`harness tasks`: every model through all of the suite's tasks while it is in memory.

A run is one task on one model, so a task that is added later needs only its own runs. Answers lie in journals beside
the artifacts; a command that was interrupted finds them there and goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness import demo
from harness.commands.shared import MEASURING, add_shared, measuring_job, print_measured, print_models
from harness.errors import UserError, did_you_mean
from harness.resolve import DEMO, chosen_setups, chosen_variants, max_length
from harness.suite.names import SOURCE

if TYPE_CHECKING:
    from pathlib import Path

    from harness.job import Job, MeasuredByName, Model
    from harness.measure.tasks import ReadyTask
    from harness.suite.schema import Suite, Task

_JOURNALS = ".answers"  # no variant can be called so


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of a measure, and the tasks."""
    add = parser.add_argument
    add("--task", action="append", metavar="NAME", help="only this task of the suite (may be repeated)")
    add_shared(parser, *MEASURING, "--fresh")


def run(options: argparse.Namespace, given: Sequence[str]) -> int:
    """Puts the suite's models to its tasks and prints their scores, beside stored ones of a source not run now."""
    with measuring_job(options, given) as job:
        work = _prepared(job, options.variant, options.task)
        print_models(options, work.models)
        found = _answered(job, work, limit=options.limit, fresh=options.fresh)

        from harness.report import runs, task_tables

        stored = task_tables.newest_by_task(job.stored(), job.suite, (SOURCE,))
        shown = {label: {**stored.get(label, {}), **rows} for label, rows in found.records.items()}
    invalid = [
        f"{row}, {label} is invalid: {reason}."
        for label, rows in found.records.items()
        for row, record in rows.items()
        for reason in task_tables.invalid(record, shown[label].get(SOURCE))
    ]
    frames = (task_tables.score_table(shown), task_tables.answer_table(shown))
    notes = runs.reused(found.records, "answers")
    return print_measured(options, found.records, frames, found.failures, notes=notes, invalid=invalid)


@dataclass(frozen=True)
class _Work:
    """The models to run, and the tasks by their names in the suite."""

    models: list[Model]
    loaded: Mapping[str, ReadyTask]

    def of(self, model: Model) -> list[ReadyTask]:
        """The tasks that a model is put to: in a setup only those that name it."""
        return [one for one in self.loaded.values() if model.setup is None or model.setup in (one.wanted.setups or ())]


def _prepared(job: Job, variants: Sequence[str] | None, named_tasks: Sequence[str] | None) -> _Work:
    """The chosen tasks, ready to run, and the models, built where missing; before that `UserError` for a wrong task."""
    suite = job.suite
    if not suite.tasks:
        raise UserError(f"Suite '{suite.name}' has no [tasks.NAME] table.", "Add one, or measure another suite.")
    for name in named_tasks or ():
        if name not in suite.tasks:
            raise UserError(f"Suite '{suite.name}' has no task '{name}'.", did_you_mean(name, suite.tasks))
    names = chosen_variants(suite, variants, with_source=True)
    wanted = {name: task for name, task in suite.tasks.items() if not named_tasks or name in named_tasks}

    from harness.measure import tasks
    from harness.measure.lm import Texts

    # All of them before the source, which may be a download of many gigabytes.
    taken = [tasks.take_task(name, task, _place(suite, task)) for name, task in wanted.items()]
    texts = Texts(job.source)
    loaded = {}
    for done, one in enumerate(taken):
        job.progress(done, len(taken), "prompts", one.label)
        longest = max_length(suite, one.wanted.max_length, one.wanted.setups)
        loaded[one.label] = tasks.ready_task(one, texts, longest, suite.engine.name)
    job.progress(len(taken), len(taken), "prompts")
    setups = dict.fromkeys(setup for task in wanted.values() for setup in chosen_setups(suite, task.setups))
    return _Work(job.models(names, list(setups)), loaded)


def _place(suite: Suite, task: Task) -> str | Path:
    """lm-eval's name of a task, or its file; as with sources, what is a file is told by how it is written."""
    if task.task.startswith(DEMO):
        return demo.task_file(task.task.removeprefix(DEMO))
    return suite.path(task.task) if task.task.startswith((".", "/", "~")) else task.task


def _answered(job: Job, work: _Work, *, limit: int | None, fresh: bool) -> MeasuredByName:
    """One run a task and row. An engine that dies takes its own row with it, and what it answered stays."""
    from harness.job import MeasuredByName, failure_in
    from harness.measure import tasks
    from harness.measure.kept import Journal
    from harness.record.store import RunWriter, read
    from harness.suite.values import as_json

    found = MeasuredByName()
    for model in work.models:
        with (
            job.noted_failures("tasks", tasks.VERSION, model, None, found.failures),
            job.engine(model, "score") as engine,
        ):
            for loaded in work.of(model):
                settings = {**as_json(loaded.wanted), "setups": None}
                about = {"name": loaded.label, "num_docs": loaded.num_docs, "settings": settings, **loaded.identity}
                run = job.new_run("tasks", tasks.VERSION, model, engine=engine, dataset=about)
                assert run.engine is not None
                identity = _identity(model, run.engine, loaded)
                with (
                    RunWriter(job.results, run) as writer,
                    failure_in(writer),
                    Journal(job.artifact(_JOURNALS), f"{model.row}-{loaded.label}", identity, fresh=fresh) as journal,
                ):
                    samples = tasks.task_samples(
                        loaded,
                        engine,
                        journal,
                        limit=limit,
                        progress=job.named_progress(f"{model.row}, {loaded.label}"),
                    )
                    num_items = 0
                    for sample in samples:
                        writer.sample(sample)
                        num_items += sample["kind"] == "item"
                    missing = loaded.num_docs * loaded.wanted.repeats - num_items
                    record = read(writer.finish(num_missing=missing))
                found.records.setdefault(loaded.label, {})[model.row] = record
    return found


def _identity(model: Model, engine: Mapping[str, Any], loaded: ReadyTask) -> dict[str, Any]:
    """Whose answers a journal holds: this checkpoint's, by this engine, to this version of a task."""
    from harness.engines.protocol import ENGINES
    from harness.measure.tasks import VERSION

    return {
        "measure_version": VERSION,
        "artifact_digest": model.digest,
        "engine": {key: engine[key] for key in ("name", "version", "device", "dtype", "served_as")},
        "engine_version": ENGINES[engine["name"]].version,
        "options": {key: value for key, value in engine["requested"].items() if key != "folder"},
        "task": loaded.identity,
    }
