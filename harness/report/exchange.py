"""What the formats of `export` have in common: what a run says, apart from any format, and how files are written."""

import hashlib
import json
import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from harness.record import stats
from harness.record.schema import UTC_FORMAT
from harness.record.stats import Estimate
from harness.record.store import Record
from harness.report import runs, task_tables
from harness.report.evidence import Evidence
from harness.suite.names import SOURCE, is_hub_id, row_parts
from harness.suite.schema import Suite

HARNESS = "nvfp4-harness"
Json = dict[str, Any]


@dataclass(frozen=True)
class Score:
    """One figure of a task: the mean over repetitions of what lm-eval says."""

    task: str
    metric: str  # "metric,filter", as lm-eval names it
    value: float
    standard_error: float | None  # lm-eval's own, of a single run
    num_items: int  # of each repetition
    num_repetitions: int
    higher_is_better: bool | None
    outcomes: tuple[float, ...]  # of the items, where each has a number
    estimate: Estimate | None  # over documents, where the figure is their mean


def scores_of(record: Record) -> list[Score]:
    """Every figure of a run, a group's too, in lm-eval's order."""
    found: dict[tuple[str, str], list[Json]] = {}
    for result in record.kind("result"):
        found.setdefault((result["task"], result["metric"]), []).append(result)
    return [_score(record, task, metric, results) for (task, metric), results in found.items()]


def _score(record: Record, task: str, metric: str, results: Sequence[Json]) -> Score:
    items = record.kind("item")
    own = [(item["doc_id"], item["outcomes"].get(metric)) for item in items if item["task"] == task]
    if not all(isinstance(outcome, int | float) for _, outcome in own):
        own = []
    value = statistics.fmean(result["value"] for result in results)
    return Score(
        task=task,
        metric=metric,
        value=value,
        standard_error=results[0]["standard_error"] if len(results) == 1 else None,
        # lm-eval does not say it of every group.
        num_items=results[0]["num_items"] or sum(item["repetition"] == 0 for item in items),
        num_repetitions=len(results),
        higher_is_better=results[0].get("higher_is_better"),
        outcomes=tuple(float(outcome) for _, outcome in own),
        estimate=_mean_over_documents(own, value),
    )


def _mean_over_documents(outcomes: Sequence[tuple[int, float]], value: float) -> Estimate | None:
    """The mean of (document, outcome), repetitions of a document together; None where `value` is something else."""
    by_doc: dict[int, list[float]] = {}
    for doc_id, outcome in outcomes:
        by_doc.setdefault(doc_id, []).append(outcome)
    if not by_doc:
        return None
    estimate = stats.weighted_mean([math.fsum(one) for one in by_doc.values()], [len(one) for one in by_doc.values()])
    return estimate if math.isclose(estimate.value, value, rel_tol=1e-6, abs_tol=1e-9) else None


def first_metric(record: Record, task: str) -> str | None:
    """The metric that a task names first; a group's is that of its members."""
    items = record.kind("item")
    own = [item for item in items if item["task"] == task] or items
    return next(iter(own[0]["outcomes"]), None) if own else None


def tasks_of(evidence: Evidence, row: str) -> Iterator[tuple[str, Record]]:
    """A row's runs of tasks that measure the model, by the name that the suite gives the task."""
    for label, records in evidence.tasks.items():
        record = records.get(row)
        if record and not task_tables.invalid(record, records.get(SOURCE)) and not runs.served_as(record):
            yield label, record


def perplexities_of(evidence: Evidence, row: str) -> Iterator[tuple[str, Record, Estimate]]:
    """A row's perplexities that are of the model: protocol, run, and the mean in nats per token or word."""
    for protocol, records in evidence.perplexities.items():
        record = records.get(row)
        clusters = runs.clusters_of(record) if record and not runs.served_as(record) else []
        if record and clusters:
            nats, weights = zip(*clusters, strict=True)
            yield protocol, record, stats.weighted_mean(nats, weights, runs.clustering(record)[1])


@dataclass(frozen=True)
class Dataset:
    """What a run was on; `repo` is a dataset of the Hub."""

    name: str
    repo: str | None = None
    config: str | None = None
    split: str | None = None
    revision: str | None = None


def dataset_of_task(record: Record, task: str) -> Dataset:
    about = about_task(record, task)
    repo, revision = about.get("dataset"), about.get("dataset_revision")
    if not is_hub_id(repo):
        return Dataset(task)
    # Parts of different revisions have none in common.
    return Dataset(task, repo, about.get("dataset_config"), revision=revision if " " not in (revision or "") else None)


def dataset_of_text(record: Record) -> Dataset:
    """What a perplexity is of, by the suite that it was run with."""
    name = (record.run.dataset or {}).get("name") or "text"
    text = (record.run.suite.get("ppl") or {}).get("text") or {}
    if not is_hub_id(text.get("dataset")):
        return Dataset(name)
    return Dataset(name, *(text.get(key) for key in ("dataset", "config", "split", "revision")))


def about_task(record: Record, task: str) -> Json:
    """What the header knows of one of lm-eval's tasks: version, dataset, examples; nothing of a group."""
    about: Json = ((record.run.dataset or {}).get("tasks") or {}).get(task) or {}
    return about


def settings_of(record: Record) -> Json:
    """How the suite puts a task: the keys of `suite.Task`."""
    settings: Json = (record.run.dataset or {}).get("settings") or {}
    return settings


def base_model_of(suite: Suite) -> str | None:
    """The source's name on the Hub, if it has one."""
    return next((name for name in (suite.source.base_model, suite.source.location) if is_hub_id(name)), None)


def model_id(evidence: Evidence, row: str) -> str:
    """`owner/name`: the source's on the Hub, or the variant's where it is published; else `<suite>/<variant>`. In a
    setup the model is the same."""
    variant, _ = row_parts(row)
    on_the_hub = base_model_of(evidence.suite) if variant == SOURCE else evidence.repo
    return on_the_hub or f"{evidence.suite.name}/{variant}"


def url_of(evidence: Evidence, record: Record) -> str | None:
    """Where a record can be looked at, once the repository is there."""
    if evidence.repo is None:
        return None
    return f"https://huggingface.co/{evidence.repo}/blob/main/{quote(evidence.record_path(record))}"


def path_part(name: str) -> str:
    """A name as one part of a path that every file system takes; a name that must change for that gets its digest, so
    that two of them stay two."""
    safe = re.sub(r"[^A-Za-z0-9_.+=@-]+", "_", name).strip(".")[:80]
    is_device = re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d|data)(\..*)?", safe)
    return safe if safe == name and not is_device else f"{hashlib.sha256(name.encode()).hexdigest()[:8]}-{safe}"


def epoch_of(utc: str) -> int:
    """Seconds since 1970 of a time as results write it."""
    return round(datetime.strptime(utc, UTC_FORMAT).replace(tzinfo=UTC).timestamp())


def steady(value: float) -> float:
    """A figure to eight significant digits: those after them may depend on the order in which a machine adds, which is
    true of every sum, and most of a bootstrap's."""
    return float(f"{value:.8g}")


def without_none(values: Mapping[str, Any]) -> Json:
    return {key: value for key, value in values.items() if value is not None}


def strings(values: Mapping[str, Any]) -> dict[str, str]:
    """Values for a format that takes strings only."""
    return {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in values.items()
        if value is not None
    }


# ASCII alone, so that no reader takes a character of a name for the end of a line.


def json_bytes(document: Any) -> bytes:
    return (json.dumps(document, indent=2, allow_nan=False) + "\n").encode()


def json_lines_bytes(documents: Sequence[Any]) -> bytes:
    return "".join(json.dumps(one, allow_nan=False) + "\n" for one in documents).encode()
