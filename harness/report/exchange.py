"""What the exports have in common: what a run of a task or of perplexity says, apart from any format, and how files are
written."""

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
from harness.record.run import UTC_FORMAT, Record
from harness.record.stats import Estimate
from harness.report import runs, task_tables
from harness.report.evidence import Evidence
from harness.suite.names import SOURCE, is_hub_id, row_parts
from harness.suite.schema import Suite

HARNESS = "nvfp4-harness"
"""The name that exports give the harness."""

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
    estimate: Estimate | None  # over documents, where the figure is their mean


def scores_of(record: Record) -> list[Score]:
    """Every figure of a run, those of groups too, in lm-eval's order."""
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
        # lm-eval gives no number of items for some groups.
        num_items=results[0]["num_items"] or sum(item["repetition"] == 0 for item in items),
        num_repetitions=len(results),
        estimate=_mean_over_documents(own, value),
    )


def _mean_over_documents(outcomes: Sequence[tuple[int, float]], value: float) -> Estimate | None:
    """The mean of (document, outcome), repetitions of a document together; None where `value` is not this mean."""
    by_doc: dict[int, list[float]] = {}
    for doc_id, outcome in outcomes:
        by_doc.setdefault(doc_id, []).append(outcome)
    if not by_doc:
        return None
    estimate = stats.weighted_mean([math.fsum(one) for one in by_doc.values()], [len(one) for one in by_doc.values()])
    return estimate if math.isclose(estimate.value, value, rel_tol=1e-6, abs_tol=1e-9) else None


def first_metric(record: Record, task: str) -> str | None:
    """The metric that a task names first; for a group, the first metric of its members."""
    items = record.kind("item")
    own = [item for item in items if item["task"] == task] or items
    return next(iter(own[0]["outcomes"]), None) if own else None


def tasks_of(evidence: Evidence, row: str) -> Iterator[tuple[str, Record]]:
    """A row's runs of tasks that measure the model, with the suite's names of the tasks. Runs that the audit calls
    invalid are left out, and runs whose engine computed another model than the checkpoint says."""
    for label, records in evidence.tasks.items():
        record = records.get(row)
        if record and not task_tables.invalid(record, records.get(SOURCE)) and not runs.served_as(record):
            yield label, record


@dataclass(frozen=True)
class Dataset:
    """What a run was on; `repo` is a dataset of the Hub."""

    name: str
    repo: str | None = None
    config: str | None = None
    split: str | None = None
    revision: str | None = None


def dataset_of_task(record: Record, task: str) -> Dataset:
    """The dataset of one of lm-eval's tasks, as the header names it."""
    about = about_task(record, task)
    repo, revision = about.get("dataset"), about.get("dataset_revision")
    if not is_hub_id(repo):
        return Dataset(task)
    # A revision with a space lists those of several parts, which have none in common.
    return Dataset(task, repo, about.get("dataset_config"), revision=revision if " " not in (revision or "") else None)


def dataset_of_text(record: Record) -> Dataset:
    """The text of a perplexity, as the suite of the run names it."""
    name = (record.run.dataset or {}).get("name") or "text"
    text = (record.run.suite.get("ppl") or {}).get("text") or {}
    if not is_hub_id(text.get("dataset")):
        return Dataset(name)
    return Dataset(name, *(text.get(key) for key in ("dataset", "config", "split", "revision")))


def about_task(record: Record, task: str) -> Json:
    """What the header says of one of lm-eval's tasks: version, dataset, examples; nothing for a group."""
    about: Json = ((record.run.dataset or {}).get("tasks") or {}).get(task) or {}
    return about


def settings_of(record: Record) -> Json:
    """The suite's settings of a task: the keys of `suite.schema.Task`."""
    settings: Json = (record.run.dataset or {}).get("settings") or {}
    return settings


def base_model_of(suite: Suite) -> str | None:
    """The source's name on the Hub; None if it has none."""
    return next((name for name in (suite.source.base_model, suite.source.location) if is_hub_id(name)), None)


def model_id(evidence: Evidence, row: str) -> str:
    """`owner/name` on the Hub of the source or of a published variant, else `<suite>/<variant>`; the same in every
    setup."""
    variant, _ = row_parts(row)
    on_the_hub = base_model_of(evidence.suite) if variant == SOURCE else evidence.repo
    return on_the_hub or f"{evidence.suite.name}/{variant}"


def url_of(evidence: Evidence, record: Record) -> str | None:
    """The record's page on the Hub, once the repository is there; None for evidence without a repository."""
    if evidence.repo is None:
        return None
    return f"https://huggingface.co/{evidence.repo}/blob/main/{quote(evidence.record_path(record))}"


def path_part(name: str) -> str:
    """A name as one part of a path that every file system takes. A name that must change for that gets its digest in
    front, so that two names stay two."""
    safe = re.sub(r"[^A-Za-z0-9_.+=@-]+", "_", name).strip(".")[:80]
    is_device = re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?", safe)
    return safe if safe == name and not is_device else f"{hashlib.sha256(name.encode()).hexdigest()[:8]}-{safe}"


def epoch_of(utc: str) -> int:
    """Seconds since 1970 of a time as records write it."""
    return round(datetime.strptime(utc, UTC_FORMAT).replace(tzinfo=UTC).timestamp())


def steady(value: float) -> float:
    """A figure to eight significant digits. The digits after them depend on the order in which a machine adds."""
    return float(f"{value:.8g}")


def without_none(values: Mapping[str, Any]) -> Json:
    """The values that are not None, by key."""
    return {key: value for key, value in values.items() if value is not None}


# JSON is written in ASCII alone, so that no reader takes a character of a name for the end of a line.


def json_file(document: Any) -> bytes:
    """A JSON file with one document."""
    return (json.dumps(document, indent=2, allow_nan=False) + "\n").encode()


def json_lines_file(documents: Sequence[Any]) -> bytes:
    """A JSON Lines file, a document a line."""
    return "".join(json.dumps(one, allow_nan=False) + "\n" for one in documents).encode()
