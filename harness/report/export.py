"""Exports: what a suite's records say, in the formats that other tools read.

A variant's files come with those of the setups that it was measured in, and with the source's, whose numbers are the
baseline:

    <variant>/.eval_results/*.yaml      scores in registered benchmarks: the Hub shows them on the model's page
    <variant>/model-index.yaml          scores and perplexities, for the front matter of the variant's card
    lm-eval/<row>/<task>/...            what `lm_eval --output_path` writes, read by lm-eval's own tables and by
                                        converters, for example Every Eval Ever's
    csv/*.csv                           every table of the report, for spreadsheets and pandas

A run that the audit calls invalid, and a run whose engine computed another model than the checkpoint says, is in the
raw formats (lm-eval, CSV) and in no format that is made to be published. Documentation of the formats:
https://huggingface.co/docs/hub/eval-results,
https://github.com/huggingface/hub-docs/blob/main/modelcard.md,
https://github.com/EleutherAI/lm-evaluation-harness/blob/main/lm_eval/loggers/evaluation_tracker.py.
"""

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import yaml

from harness.errors import UserError, did_you_mean
from harness.record.run import UTC_FORMAT, Record
from harness.record.stats import Estimate
from harness.report.columns import Spread
from harness.report.evidence import Evidence
from harness.report.hub_scores import (
    HARNESS,
    Json,
    about_task,
    eval_results,
    model_id,
    model_index,
    settings_of,
    without_none,
)
from harness.report.tables import Table
from harness.sampling import PRESETS
from harness.suite.names import NOISE, SOURCE, row_parts


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
    files = shared_files(evidence, rows)
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


def shared_files(evidence: Evidence, rows: Sequence[str]) -> dict[str, bytes]:
    """The files that rows of the suite have in common, in the formats that tell rows apart themselves."""
    return _lm_eval_files(evidence, rows) | _csv_files(evidence, rows)


def _yaml(document: Any) -> bytes:
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True).encode()


def path_part(name: str) -> str:
    """A name as one part of a path that every file system takes. A name that must change for that gets its digest in
    front, so that two names stay two."""
    safe = re.sub(r"[^A-Za-z0-9_.+=@-]+", "_", name).strip(".")[:80]
    is_device = re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?", safe)
    return safe if safe == name and not is_device else f"{hashlib.sha256(name.encode()).hexdigest()[:8]}-{safe}"


# -- lm-eval -----------------------------------------------------------------------------------------------------


def _lm_eval_files(evidence: Evidence, rows: Sequence[str]) -> dict[str, bytes]:
    """For each repetition of the rows' runs of tasks its `results_<date>.json`, and for each task in it
    `samples_<task>_<date>.jsonl`. The date is that of the run's start; the place of the microseconds counts the
    repetitions.

    Records keep no texts, so the samples have no `doc`, `target`, `arguments`, `resps` and `filtered_resps`, and in
    place of `prompt_hash` the digest of the prompt's token ids. `doc_hash` and `target_hash` are lm-eval's. The results
    lack `task_hashes`, which are made of these, the tasks' whole configurations, and what lm-eval knows of the
    tokenizer and the environment.
    """
    files: dict[str, bytes] = {}
    runs = [(row, label, records[row]) for row in rows for label, records in evidence.tasks.items() if row in records]
    for row, label, record in runs:
        folder, date = f"lm-eval/{path_part(row)}/{path_part(label)}", _time(record.run.started_utc)
        for repetition in sorted({result["repetition"] for result in record.kind("result")}):
            stamp = f"{date:%Y-%m-%dT%H-%M-%S}.{repetition:06d}"
            # In ASCII alone, so that no reader takes a character of a name for the end of a line.
            document = json.dumps(_results(evidence, row, record, repetition), indent=2, allow_nan=False)
            files[f"{folder}/results_{stamp}.json"] = f"{document}\n".encode()
            items = [item for item in record.kind("item") if item["repetition"] == repetition]
            for task in dict.fromkeys(item["task"] for item in items):
                lines = [line for item in items if item["task"] == task for line in _samples(item)]
                text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
                files[f"{folder}/samples_{path_part(task)}_{stamp}.jsonl"] = text.encode()
    return files


def _time(utc: str) -> datetime:
    return datetime.strptime(utc, UTC_FORMAT).replace(tzinfo=UTC)


def _results(evidence: Evidence, row: str, record: Record, repetition: int) -> Json:
    results: dict[str, Json] = {}
    higher: dict[str, Json] = {}
    own = [result for result in record.kind("result") if result["repetition"] == repetition]
    for result in own:
        task, error = result["task"], result["standard_error"]
        metric, _, filtered = result["metric"].partition(",")
        figures = results.setdefault(task, {"alias": task})
        figures[result["metric"]] = result["value"]
        figures[f"{metric}_stderr,{filtered}"] = "N/A" if error is None else error
        higher.setdefault(task, {})[metric] = result.get("higher_is_better")
    leaves = {task: about for task in results if (about := about_task(record, task))}
    groups = {task: figures for task, figures in results.items() if task not in leaves}
    num_items = {result["task"]: result["num_items"] for result in own}
    run, settings, engine = record.run, settings_of(record), record.run.engine or {}
    model, started = model_id(evidence, row), _time(run.started_utc)
    return {
        "results": results,
        **({"groups": groups} if groups else {}),
        "group_subtasks": {task: [] for task in leaves},
        "configs": {task: _config(task, about, settings) for task, about in leaves.items()},
        "versions": {task: about.get("version") for task, about in leaves.items()},
        "n-shot": {task: about.get("num_fewshot") for task, about in leaves.items()},
        "higher_is_better": higher,
        "n-samples": {
            task: {"original": about.get("num_docs"), "effective": num_items[task]} for task, about in leaves.items()
        },
        "config": {
            "model": engine.get("name"),
            "model_args": without_none({"pretrained": model, "dtype": engine.get("dtype")}),
            "model_dtype": engine.get("dtype"),
            "model_sha": run.variant.get("artifact_digest") or "",
            "batch_size": settings.get("batch_size"),
            "device": engine.get("device"),
            "limit": settings.get("limit"),
        },
        "git_hash": run.git["commit"] if run.git else None,
        "date": started.timestamp(),
        "transformers_version": run.packages.get("transformers"),
        "lm_eval_version": (run.dataset or {}).get("lm_eval"),
        "model_source": HARNESS,
        "model_name": model,
        "model_name_sanitized": re.sub(r'["<>:/|\\?*\[\]]+', "__", model),
        "system_instruction": settings.get("system"),
        "fewshot_as_multiturn": bool(settings.get("chat")),
        "total_evaluation_time_seconds": str(round((_time(record.end.ended_utc) - started).total_seconds())),
    }


def _config(task: str, about: Json, settings: Json) -> Json:
    sampling = asdict(PRESETS[settings["preset"]]) if settings.get("preset") in PRESETS else {}
    generation = {**sampling, "max_gen_toks": settings.get("max_new_tokens")}
    return without_none(
        {
            "task": task,
            "dataset_path": about.get("dataset"),
            "dataset_name": about.get("dataset_config"),
            "num_fewshot": about.get("num_fewshot"),
            "generation_kwargs": without_none(generation) or None,
            "metadata": {"version": about.get("version")},
        }
    )


def _samples(item: Json) -> Iterator[Json]:
    """A line for each filter, as lm-eval has them."""
    by_filter: dict[str, Json] = {}
    for metric, outcome in item["outcomes"].items():
        name, _, filtered = metric.partition(",")
        by_filter.setdefault(filtered, {})[name] = outcome
    for filtered, outcomes in by_filter.items():
        yield {
            "doc_id": item["doc_id"],
            "filter": filtered,
            "metrics": list(outcomes),
            "doc_hash": item["doc_sha256"],
            "target_hash": item["target_sha256"],
            "prompt_token_ids_sha256": item["prompt_sha256"],
            **outcomes,
        }


# -- CSV ---------------------------------------------------------------------------------------------------------


def _csv_files(evidence: Evidence, rows: Sequence[str]) -> dict[str, bytes]:
    """A CSV (RFC 4180, UTF-8) for every table, with its rows that are among `rows` or of the noise floor.

    Columns are called as in `columns.COLUMNS`. Numbers have eight significant digits, on which every machine agrees.
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
