"""Exports: what a suite's records say, in the formats that other tools read.

A variant's files come with those of the setups that it was measured in, and with the source's, whose numbers are the
baseline:

    <variant>/.eval_results/*.yaml      scores in registered benchmarks: the Hub shows them on the model's page
    <variant>/model-index.yaml          scores and perplexities, for the front matter of the variant's card
    csv/*.csv                           every table of the report, for spreadsheets and pandas

A run that the audit calls invalid, and a run whose engine computed another model than the checkpoint says, is in the
tables and in no format that is made to be published. Documentation of the formats:
https://huggingface.co/docs/hub/eval-results, https://github.com/huggingface/hub-docs/blob/main/modelcard.md.
"""

import csv
import hashlib
import io
import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import yaml

from harness.errors import UserError, did_you_mean
from harness.record import stats
from harness.record.run import Record
from harness.record.stats import Estimate
from harness.report import runs, task_tables
from harness.report.evidence import Evidence
from harness.report.tables import Spread, Table
from harness.suite.names import NOISE, SOURCE, is_hub_id, row_parts
from harness.suite.schema import Suite

Json = dict[str, Any]


def export(evidence: Evidence, variants: Sequence[str]) -> dict[str, bytes]:
    """Every exported file: path from the folder of the exports -> bytes.

    Evidence with a repository on the Hub names the variant after it and links to its records; no other evidence names a
    URL. `UserError` for a variant that the suite does not have, and where there is no record of any of the variants or
    of the source.
    """
    suite = evidence.suite
    for name in variants:
        if name not in suite.variants:
            raise UserError(f"Suite '{suite.name}' has no variant '{name}'.", did_you_mean(name, suite.variants))
    rows = tuple(row for row in suite.rows() if row_parts(row)[0] in (SOURCE, *variants))
    if not any(record.run.variant["name"] in rows for record in evidence.chosen):
        raise UserError(
            f"There is no whole run of suite '{suite.name}' in {evidence.results_dir}, so there is nothing to export.",
            "Measure something first, for example with `harness ppl`, or give the folder of the records as --results.",
        )
    files = csv_files(evidence, rows)
    for variant in variants:
        files |= {f"{path_part(variant)}/{name}": data for name, data in variant_files(evidence, variant).items()}
    return files


def variant_files(evidence: Evidence, variant: str) -> dict[str, bytes]:
    """The files of a variant alone, for its repository: `.eval_results/*.yaml` and `model-index.yaml`, each where
    something was measured for it."""
    files = {f".eval_results/{name}.yaml": _yaml(entries) for name, entries in eval_results(evidence, variant).items()}
    if index := model_index(evidence, variant):
        files["model-index.yaml"] = _yaml({"model-index": index})
    return files


def _yaml(document: Any) -> bytes:
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
    if "\x85" in text:  # which PyYAML 6 writes as it is, and reads as the end of a line
        text = yaml.safe_dump(document, sort_keys=False)
    return text.encode()


def path_part(name: str) -> str:
    """A name as one part of a path that every file system takes. A name that must change for that gets its digest in
    front, so that two names stay two."""
    safe = re.sub(r"[^A-Za-z0-9_.+=@-]+", "_", name).strip(".")[:80]
    is_device = re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?", safe)
    return safe if safe == name and not is_device else f"{hashlib.sha256(name.encode()).hexdigest()[:8]}-{safe}"


# -- Tables ------------------------------------------------------------------------------------------------------


def csv_files(evidence: Evidence, rows: Sequence[str]) -> dict[str, bytes]:
    """A CSV (RFC 4180, UTF-8) for every table, with its rows that are among `rows` or of the noise floor.

    Columns are called as in `tables.COLUMNS`. Numbers have eight significant digits, on which every machine agrees.
    Unknown numbers are empty. Runs are there by their ids: eight hexadecimal digits, some of which pandas takes for
    numbers without `dtype={"run": str}`. An estimate has three columns, `<key>`, `<key>_low` and `<key>_high`, the last
    two empty without an interval, and `<key>_reason` where words stand in its place. A spread over layers has `<key>`,
    its median, `<key>_largest` and `<key>_layer`.
    """
    files = {}
    for name, table in evidence.tables.items():
        if "variant" in table.columns:
            table = Table(table.columns, tuple(row for row in table.rows if row["variant"] in (*rows, *NOISE)))
        if not table:
            continue
        cells = [part for column in table.columns for part in _spread_out(column, table[column]).items()]
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow([key for key, _ in cells])
        writer.writerows(zip(*(values for _, values in cells), strict=True))
        files[f"csv/{name}.csv"] = text.getvalue().encode()
    return files


_PARTS: dict[type, dict[str, str]] = {
    Estimate: {"": "value", "_low": "low", "_high": "high"},
    Spread: {"": "median", "_largest": "largest", "_layer": "layer"},
}


def _plain(value: object) -> object:
    """A cell: runs by their ids, several with spaces between."""
    if isinstance(value, tuple):
        return " ".join(str(_plain(one)) for one in value)
    if isinstance(value, float):
        return float(f"{value:.8g}")  # the digits after these depend on the order in which a machine adds
    return value.run.run_id if isinstance(value, Record) else value


def _spread_out(column: str, values: Sequence[Any]) -> dict[str, list[Any]]:
    """The columns of a CSV that one column of a table becomes."""
    kind = next((type(value) for value in values if type(value) in _PARTS), None)
    if kind is None:
        return {column: [_plain(value) for value in values]}
    found = {
        f"{column}{suffix}": [_plain(getattr(value, part)) if isinstance(value, kind) else None for value in values]
        for suffix, part in _PARTS[kind].items()
    }
    if any(isinstance(value, str) for value in values):
        found[f"{column}_reason"] = [value if isinstance(value, str) else None for value in values]
    return found


# -- Scores ------------------------------------------------------------------------------------------------------


def base_model_of(suite: Suite) -> str | None:
    """The source's name on the Hub; None if it has none."""
    return next((name for name in (suite.source.base_model, suite.source.location) if is_hub_id(name)), None)


def _about_task(record: Record, task: str) -> Json:
    """What the header says of one of lm-eval's tasks: version, dataset, examples; nothing for a group."""
    about: Json = ((record.run.dataset or {}).get("tasks") or {}).get(task) or {}
    return about


def _settings_of(record: Record) -> Json:
    """The suite's settings of a task: the keys of `suite.schema.Task`."""
    settings: Json = (record.run.dataset or {}).get("settings") or {}
    return settings


def _without_none(values: Mapping[str, Any]) -> Json:
    """The values that are not None, by key."""
    return {key: value for key, value in values.items() if value is not None}


@dataclass(frozen=True)
class _Score:
    """One figure of a task, which lm-eval states once for each repetition."""

    record: Record
    task: str
    metric: str  # "metric,filter", as lm-eval names it
    results: tuple[Json, ...]  # of the repetitions

    @property
    def value(self) -> float:
        """The mean over repetitions."""
        return statistics.fmean(result["value"] for result in self.results)

    @property
    def items(self) -> list[Json]:
        """Those of the task itself: a group has none."""
        return [item for item in self.record.kind("item") if item["task"] == self.task]

    @property
    def is_first(self) -> bool:
        """Whether the task names this metric first; a group has the first metric of its members."""
        items = self.items or self.record.kind("item")
        return bool(items) and self.metric == next(iter(items[0]["outcomes"]), None)

    @property
    def count(self) -> str:
        """What the value is the mean of."""
        # lm-eval gives no number of items for some groups.
        num = self.results[0]["num_items"] or sum(item["repetition"] == 0 for item in self.record.kind("item"))
        return f"n = {num}" if len(self.results) == 1 else f"{num} items × {len(self.results)} repetitions"

    def over_documents(self) -> Estimate | None:
        """The mean over documents, whose repetitions belong together; None where the value is not this mean."""
        by_doc: dict[int, list[float]] = {}
        for item in self.items:
            outcome = item["outcomes"].get(self.metric)
            if not isinstance(outcome, int | float):
                return None
            by_doc.setdefault(item["doc_id"], []).append(outcome)
        if not by_doc:
            return None
        own = by_doc.values()
        estimate = stats.weighted_mean([math.fsum(one) for one in own], [len(one) for one in own])
        return estimate if math.isclose(estimate.value, self.value, rel_tol=1e-6, abs_tol=1e-9) else None


def _scores(evidence: Evidence, row: str) -> Iterator[tuple[str, _Score]]:
    """The figures of a row's runs of tasks that measure the model, with the suite's names of the tasks. Runs that the
    audit calls invalid are left out, and runs whose engine computed another model than the checkpoint says."""
    for label, records in evidence.tasks.items():
        record = records.get(row)
        if record and not task_tables.invalid(record, records.get(SOURCE)) and not runs.served_as(record):
            for (task, metric), results in task_tables.by_metric(record).items():
                yield label, _Score(record, task, metric, tuple(results))


def _source(evidence: Evidence, record: Record) -> Json | None:
    """The record's page on the Hub, once the repository is there; None for evidence without a repository."""
    if evidence.repo is None:
        return None
    url = f"https://huggingface.co/{evidence.repo}/blob/main/{quote(evidence.record_path(record))}"
    return {"url": url, "name": f"nvfp4-harness, run {record.run.run_id}"}


# -- Leaderboards ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Benchmark:
    """A leaderboard of the Hub: the dataset that it belongs to, and its task there."""

    name: str
    dataset: str
    task_id: str


_GSM8K = Benchmark("gsm8k", "openai/gsm8k", "gsm8k")
_GPQA = Benchmark("gpqa", "Idavidrein/gpqa", "diamond")
_MMLU_PRO = Benchmark("mmlu_pro", "TIGER-Lab/MMLU-Pro", "mmlu_pro")
BENCHMARKS: Mapping[str, Benchmark] = {
    **dict.fromkeys(("gsm8k", "gsm8k_cot", "gsm8k_cot_llama", "gsm8k_cot_zeroshot"), _GSM8K),
    **{
        f"gpqa_diamond_{kind}": _GPQA
        for kind in ("zeroshot", "n_shot", "generative_n_shot", "cot_zeroshot", "cot_n_shot")
    },
    "mmlu_pro": _MMLU_PRO,
}
"""lm-eval's name of a task -> the registered benchmark that the task asks in full.

The Hub's documentation (https://huggingface.co/docs/hub/eval-results) names four benchmarks: these, and cais/hle, which
lm-eval does not have. The task ids are those of Every Eval Ever 0.3.0 (`tools/hf_community_evals.py`) and of results
that Hugging Face's own staff has entered, for example
https://huggingface.co/Zyphra/ZAYA1-8B/commit/6186b0866e84fc168b3409510ff6e7e8a03d6f72; the documentation's example has
`gpqa_diamond` instead. A value on these leaderboards is a percentage from 0 to 100, as both of these sources have it;
only the documentation's example is a fraction, 0.412.
"""


def eval_results(evidence: Evidence, variant: str) -> dict[str, list[Json]]:
    """The entries of `.eval_results/<benchmark>.yaml`, by benchmark: {dataset {id, task_id, revision}, value, date,
    source {url, name}, notes}, the value in per cent.

    Only whole runs without a limit count, of the tasks in `BENCHMARKS` on the benchmark's own dataset. The score is the
    metric that the task names first. A leaderboard has one place for a model: of several runs of one benchmark (with
    and without a chat, for example) it gets the first in the suite's order. Perplexities and speeds have no
    leaderboard.
    """
    found: dict[str, list[Json]] = {}
    for _, score in _scores(evidence, variant):
        benchmark, record = BENCHMARKS.get(score.task), score.record
        about = ((record.run.dataset or {}).get("tasks") or {}).values()
        if (
            benchmark is None
            or benchmark.name in found
            or _settings_of(record).get("limit") is not None
            or not score.is_first
            or benchmark.dataset not in {one.get("dataset") for one in about}
        ):
            continue
        revisions = {one.get("dataset_revision") for one in about}
        dataset = {
            "id": benchmark.dataset,
            "task_id": benchmark.task_id,
            "revision": revisions.pop() if len(revisions) == 1 else None,
        }
        entry = {
            "dataset": _without_none(dataset),
            "value": round(100 * score.value, 6),
            "date": record.run.started_utc,
            "source": _source(evidence, record),
            "notes": _notes(score),
        }
        found[benchmark.name] = [_without_none(entry)]
    return found


def _notes(score: _Score) -> str:
    """What the reader of a leaderboard must know of a value in per cent."""
    dataset, settings = score.record.run.dataset or {}, _settings_of(score.record)
    num_fewshot = _about_task(score.record, score.task).get("num_fewshot")
    said = [
        f"{score.metric} of {score.task}, lm-eval {dataset.get('lm_eval')}",
        f"{num_fewshot}-shot" if num_fewshot is not None else None,
        "chat template" if settings.get("chat") else None,
        "thinking" if settings.get("thinking") else None,
        f"sampling {settings['preset']}" if settings.get("preset") else None,
        score.count,
    ]
    estimate, error = score.over_documents(), score.results[0]["standard_error"]
    if estimate and estimate.low is not None and estimate.high is not None:
        said.append(f"95 % interval {100 * estimate.low:.2f} to {100 * estimate.high:.2f}")
    elif error is not None and len(score.results) == 1:
        said.append(f"standard error {100 * error:.2f}")
    return ", ".join(part for part in said if part)


# -- Model index -------------------------------------------------------------------------------------------------


def model_index(evidence: Evidence, variant: str) -> list[Json]:
    """The value of `model-index` in the front matter of a variant's card: its scores, each on the metric's own scale,
    and its perplexities; empty where there are none. The format has no place for an interval."""
    results = []
    for label, score in _scores(evidence, variant):
        name = "accuracy" if score.metric.startswith("acc,") else score.metric.partition(",")[0]
        metric = {"type": name, "value": score.value, "name": f"{score.metric} ({score.count})"}
        named = label if label == score.task else f"{label}: {score.task}"
        dataset = _dataset_of_task(score.record, score.task)
        results.append(_indexed(named, dataset, metric, _source(evidence, score.record)))
    for row in evidence.tables["perplexity"].rows:
        if row["variant"] == variant and row["ppl"] is not None and not row.get("served_as"):
            protocol, record = row["protocol"], row["run"]
            metric = {"type": "perplexity", "value": row["ppl"], "name": f"perplexity per {row['unit']}, {protocol}"}
            dataset = _dataset_of_text(record)
            results.append(_indexed(f"perplexity by {protocol}", dataset, metric, _source(evidence, record)))
    return [{"name": (evidence.repo or variant).rpartition("/")[2], "results": results}] if results else []


def _indexed(task: str, dataset: Json, metric: Json, source: Json | None) -> Json:
    result = {
        "task": {"type": "text-generation", "name": task},
        "dataset": _without_none(dataset),
        "metrics": [metric],
        "source": source,
    }
    return _without_none(result)


def _dataset_of_task(record: Record, task: str) -> Json:
    """The dataset of one of lm-eval's tasks, as the header names it."""
    about = _about_task(record, task)
    repo, revision = about.get("dataset"), about.get("dataset_revision") or ""
    if not is_hub_id(repo):
        return {"type": task, "name": task}
    # A revision with a space lists those of several parts, which have none in common.
    known = None if " " in revision else about.get("dataset_revision")
    return {"type": repo, "name": task, "config": about.get("dataset_config"), "revision": known}


def _dataset_of_text(record: Record) -> Json:
    """The text of a perplexity, as the suite of the run names it."""
    name = (record.run.dataset or {}).get("name") or "text"
    text = (record.run.suite.get("ppl") or {}).get("text") or {}
    if not is_hub_id(text.get("dataset")):
        return {"type": name, "name": name}
    return {"type": text["dataset"], "name": name, **{key: text.get(key) for key in ("config", "split", "revision")}}
