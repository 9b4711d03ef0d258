"""Tasks as `lm_eval --output_path` writes them, for lm-eval's own tables and for the converters that read its files."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import datetime

from harness.record.run import UTC_FORMAT, Record
from harness.report.evidence import Evidence
from harness.report.exchange import (
    HARNESS,
    Json,
    about_task,
    epoch_of,
    json_file,
    json_lines_file,
    model_id,
    path_part,
    settings_of,
    without_none,
)
from harness.sampling import PRESETS


def lm_eval_files(evidence: Evidence, rows: Sequence[str]) -> dict[str, bytes]:
    """The tasks of some rows: for each repetition of a run its `results_<date>.json`, and for each task in it
    `samples_<task>_<date>.jsonl`. The date is that of the run's start; the place of the microseconds counts the
    repetitions.

    Records keep no texts, so the samples have no `doc`, `target`, `arguments`, `resps` and `filtered_resps`, and in
    place of `prompt_hash` the digest of the prompt's token ids. `doc_hash` and `target_hash` are lm-eval's. The results
    lack `task_hashes`, which are made of these, the tasks' whole configurations, and what lm-eval knows of the
    tokenizer and the environment.
    """
    files: dict[str, bytes] = {}
    for row in rows:
        for label, records in evidence.tasks.items():
            if row in records:
                files |= _files_of_run(evidence, row, f"lm-eval/{path_part(row)}/{path_part(label)}", records[row])
    return files


def _files_of_run(evidence: Evidence, row: str, folder: str, record: Record) -> dict[str, bytes]:
    """The files of one run, in a folder of their own."""
    files = {}
    date = datetime.strptime(record.run.started_utc, UTC_FORMAT).strftime("%Y-%m-%dT%H-%M-%S")
    for repetition in sorted({result["repetition"] for result in record.kind("result")}):
        stamp = f"{date}.{repetition:06d}"
        files[f"{folder}/results_{stamp}.json"] = json_file(_results(evidence, row, record, repetition))
        items = [item for item in record.kind("item") if item["repetition"] == repetition]
        for task in dict.fromkeys(item["task"] for item in items):
            lines = [line for item in items if item["task"] == task for line in _samples(item)]
            files[f"{folder}/samples_{path_part(task)}_{stamp}.jsonl"] = json_lines_file(lines)
    return files


def _results(evidence: Evidence, row: str, record: Record, repetition: int) -> Json:
    results: dict[str, Json] = {}
    higher: dict[str, Json] = {}
    samples: dict[str, Json] = {}
    for result in record.kind("result"):
        if result["repetition"] != repetition:
            continue
        task = result["task"]
        metric, _, filtered = result["metric"].partition(",")
        error = result["standard_error"]
        figures = results.setdefault(task, {"alias": task})
        figures[result["metric"]] = result["value"]
        figures[f"{metric}_stderr,{filtered}"] = "N/A" if error is None else error
        higher.setdefault(task, {})[metric] = result.get("higher_is_better")
        about = about_task(record, task)
        if about:
            samples[task] = {"original": about.get("num_docs"), "effective": result["num_items"]}
    leaves = {task: about for task in results if (about := about_task(record, task))}
    groups = {task: figures for task, figures in results.items() if task not in leaves}
    run, settings, engine = record.run, settings_of(record), record.run.engine or {}
    model = model_id(evidence, row)
    return {
        "results": results,
        **({"groups": groups} if groups else {}),
        "group_subtasks": {task: [] for task in leaves},
        "configs": {task: _config(task, about, settings) for task, about in leaves.items()},
        "versions": {task: about.get("version") for task, about in leaves.items()},
        "n-shot": {task: about.get("num_fewshot") for task, about in leaves.items()},
        "higher_is_better": higher,
        "n-samples": samples,
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
        "date": float(epoch_of(run.started_utc)),
        "transformers_version": run.packages.get("transformers"),
        "lm_eval_version": (run.dataset or {}).get("lm_eval"),
        "model_source": HARNESS,
        "model_name": model,
        "model_name_sanitized": re.sub(r'["<>:/|\\?*\[\]]+', "__", model),
        "system_instruction": settings.get("system"),
        "fewshot_as_multiturn": bool(settings.get("chat")),
        "total_evaluation_time_seconds": str(epoch_of(record.end.ended_utc) - epoch_of(run.started_utc)),
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
