"""Every Eval Ever, schema version 0.3.0: a JSON for each run, and for tasks a JSONL of its items.

The schemas are `schemas/eval.schema.json` and `schemas/instance_level_eval.schema.json` of the package
`every-eval-ever` 0.3.0 (https://github.com/evaleval/every_eval_ever); names of files and folders are as its validator
wants them (`validator/validation_core.py`).
"""

import hashlib
import math
import shlex
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from harness.record import stats
from harness.record.stats import Estimate
from harness.record.store import Record
from harness.report import runs
from harness.report.evidence import Evidence
from harness.report.exchange import (
    HARNESS,
    Dataset,
    Json,
    Score,
    about_task,
    base_model_of,
    dataset_of_task,
    dataset_of_text,
    epoch_of,
    json_bytes,
    json_lines_bytes,
    model_id,
    path_part,
    perplexities_of,
    scores_of,
    settings_of,
    steady,
    strings,
    tasks_of,
    url_of,
    without_none,
)
from harness.sampling import PRESETS
from harness.suite.names import SOURCE, row_parts

VERSION = "0.3.0"


def files_of(evidence: Evidence, row: str) -> dict[str, bytes]:
    """The aggregate of each of a row's runs, and of tasks the companion with a line for each item and metric, in the
    folders of the datastore.

    What an item says is what its record has: digests of prompt and target in place of their texts, no answer, and so no
    attribution of one. A window of a text is no item that could be right or wrong: perplexities have no companion. The
    same records give the same names: the version 4 UUIDs are made of a digest instead of chance.
    """
    files: dict[str, bytes] = {}
    for label, record in tasks_of(evidence, row):
        scores = scores_of(record)
        results = [_scored_result(record, score) for score in scores]
        library = {"name": "lm_eval", "version": (record.run.dataset or {}).get("lm_eval") or "unknown"}
        lines = [_instance(item, score) for score in scores for item in _items_of(record, score)]
        if results:
            files |= _log(evidence, row, label, record, library, results, lines)
    for protocol, record, nats in perplexities_of(evidence, row):
        library = {"name": HARNESS, "version": record.run.packages.get("harness") or "unknown"}
        results = [_perplexity_result(record, protocol, nats)]
        files |= _log(evidence, row, f"perplexity-{protocol}", record, library, results, [])
    return files


def _items_of(record: Record, score: Score) -> Iterator[Json]:
    return (item for item in record.kind("item") if item["task"] == score.task and score.outcomes)


def _log(
    evidence: Evidence,
    row: str,
    collection: str,
    record: Record,
    library: Json,
    results: Sequence[Json],
    lines: Sequence[Json],
) -> dict[str, bytes]:
    """The files of one run."""
    run, suite = record.run, evidence.suite
    model, (variant, setup) = model_id(evidence, row), row_parts(row)
    evaluation_id = "/".join((collection, model, str(epoch_of(run.started_utc)), *([setup] if setup else ())))
    digest = hashlib.sha256(f"{evaluation_id}/{run.run_id}".encode()).digest()
    parts = (collection, *model.split("/", 1))
    path = "/".join(("data", *map(path_part, parts), str(uuid.UUID(bytes=digest[:16], version=4))))
    document: Json = {
        "schema_version": VERSION,
        "evaluation_id": evaluation_id,
        "evaluation_timestamp": run.started_utc,
        "retrieved_timestamp": str(epoch_of(record.end.ended_utc)),
        "source_metadata": {
            "source_name": HARNESS,
            "source_type": "evaluation_run",
            "source_organization_name": "unknown",
            # A variant is measured by those who made it.
            "evaluator_relationship": "third_party" if variant == SOURCE else "first_party",
            "additional_details": strings(
                {
                    "run": run.run_id,
                    "suite": suite.name,
                    "suite_digest": run.suite_digest,
                    "url": url_of(evidence, record),
                }
            ),
        },
        "eval_library": library,
        "model_info": _model_info(evidence, row, record),
        "evaluation_results": list(results),
    }
    files = {}
    if lines:
        same = {"schema_version": VERSION, "evaluation_id": evaluation_id, "model_id": model}
        data = json_lines_bytes([{**same, **line} for line in lines])
        files[f"every_eval_ever/{path}_samples.jsonl"] = data
        document["detailed_evaluation_results"] = {
            "format": "jsonl",
            "file_path": f"{path}_samples.jsonl",
            "hash_algorithm": "sha256",
            "checksum": hashlib.sha256(data).hexdigest(),
            "total_rows": len(lines),
        }
    return {f"every_eval_ever/{path}.json": json_bytes(document), **files}


def _model_info(evidence: Evidence, row: str, record: Record) -> Json:
    run, base_model = record.run, base_model_of(evidence.suite)
    name = model_id(evidence, row)
    engine = run.engine or {}
    info: Json = {"name": name, "id": name}
    if engine:
        info["inference_engine"] = strings({key: engine.get(key) for key in ("name", "version")})
    info["additional_details"] = strings(
        {
            "deployment_type": "self_deployed",
            "model_availability": "open_weights" if base_model else "unknown",
            "base_model": base_model,
            **{key: run.variant.get(key) for key in ("recipe", "setup", "artifact_digest", "source_digest")},
            **{key: engine.get(key) for key in ("device", "dtype")},
            "machine": run.machine.get("name"),
        }
    )
    return info


def _scored_result(record: Record, score: Score) -> Json:
    is_share = bool(score.outcomes) and all(0 <= one <= 1 for one in (*score.outcomes, score.value))
    name, _, filtered = score.metric.partition(",")
    named = "accuracy" if name == "acc" else name
    metric = {
        "evaluation_description": f"{name}, filter {filtered}, of lm-eval's task {score.task}",
        "metric_id": named,
        "metric_name": score.metric,
        "metric_kind": named,
        "metric_unit": "proportion" if is_share else None,
        "lower_is_better": score.higher_is_better is False,
        "score_type": "continuous",
        "min_score": 0 if is_share else "-Infinity",
        "max_score": 1 if is_share else "Infinity",
    }
    estimate, error = score.estimate, score.standard_error
    standard_error: Json | None = None
    if error is not None:
        standard_error = {"value": error, "method": "lm-eval's own"}
    elif estimate and estimate.standard_error is not None:
        standard_error = {"value": steady(estimate.standard_error), "method": "bootstrap over documents"}
    about = about_task(record, score.task)
    details = {
        "repetitions": settings_of(record).get("repeats") or 1,
        "task_version": about.get("version"),
        "task_digest": (record.run.dataset or {}).get("task_digest"),
    }
    return {
        "evaluation_result_id": _result_id(score),
        "evaluation_name": score.task,
        "source_data": _source_data(dataset_of_task(record, score.task), about.get("num_docs")),
        "evaluation_timestamp": record.run.started_utc,
        "metric_config": without_none(metric),
        "score_details": {
            "score": score.value,
            "details": strings(details),
            "uncertainty": _uncertainty(standard_error, estimate, score.num_items, over="documents"),
        },
        "generation_config": _generation(record, score.task),
    }


def _perplexity_result(record: Record, protocol: str, nats: Estimate) -> Json:
    dataset = record.run.dataset or {}
    unit, (pieces, _) = dataset.get("unit", "token"), runs.clustering(record)
    ppl = math.exp(nats.value)
    in_ppl = Estimate(
        ppl,
        None if nats.low is None else math.exp(nats.low),
        None if nats.high is None else math.exp(nats.high),
        nats.num,
        nats.method,
    )
    error = None
    if nats.standard_error is not None:
        method = f"bootstrap over {pieces} of the log-perplexity, times the perplexity"
        error = {"value": steady(ppl * nats.standard_error), "method": method}
    counts = ("num_tokens", "num_windows", "num_scored")
    return {
        "evaluation_result_id": f"perplexity/{protocol}",
        "evaluation_name": f"perplexity {protocol}",
        "source_data": _source_data(dataset_of_text(record), None),
        "evaluation_timestamp": record.run.started_utc,
        "metric_config": {
            "evaluation_description": f"exp of the mean negative log-likelihood per {unit}, by protocol {protocol}",
            "metric_id": "perplexity",
            "metric_name": f"perplexity per {unit}",
            "metric_kind": "perplexity",
            "metric_parameters": {"protocol": protocol, "unit": unit},
            "lower_is_better": True,
            "score_type": "continuous",
            "min_score": 0,
            "max_score": "Infinity",
        },
        "score_details": {
            "score": ppl,
            "details": strings({key: dataset.get(key) for key in (*counts, "token_ids_sha256")}),
            "uncertainty": _uncertainty(error, in_ppl, nats.num, over=pieces),
        },
        "generation_config": {"generation_args": {"execution_command": shlex.join(record.run.command)}},
    }


def _uncertainty(error: Json | None, estimate: Estimate | None, num_samples: int, *, over: str) -> Json:
    found: Json = {"standard_error": error, "num_samples": num_samples}
    if estimate and estimate.low is not None and estimate.high is not None:
        found["confidence_interval"] = {
            "lower": steady(estimate.low),
            "upper": steady(estimate.high),
            "confidence_level": stats.LEVEL,
            "method": f"{estimate.method}: {over}",
        }
        found["num_bootstrap_samples"] = stats.RESAMPLES
    return without_none(found)


def _source_data(dataset: Dataset, num_docs: int | None) -> Json:
    if dataset.repo is None:
        return {"dataset_name": dataset.name, "source_type": "other", "source_id": dataset.name}
    return without_none(
        {
            "dataset_name": dataset.name,
            "source_type": "hf_dataset",
            "hf_repo": dataset.repo,
            "hf_config": dataset.config,
            "hf_split": dataset.split,
            "hf_revision": dataset.revision,
            "samples_number": num_docs,
        }
    )


def _generation(record: Record, task: str) -> Json:
    """How answers were made, as far as the suite says it; what it leaves to the task is left out."""
    settings = settings_of(record)
    sampling = asdict(PRESETS[settings["preset"]]) if settings.get("preset") in PRESETS else {}
    arguments = {
        **{key: sampling.pop(key, None) for key in ("temperature", "top_p", "top_k")},
        "max_tokens": settings.get("max_new_tokens"),
        "reasoning": settings.get("thinking"),
        "execution_command": shlex.join(record.run.command),
    }
    told = ("chat", "system", "preset", "seed", "repeats", "limit", "batch_size")
    details = {
        **sampling,
        "num_fewshot": about_task(record, task).get("num_fewshot"),
        **{key: settings.get(key) for key in told},
    }
    return {"generation_args": without_none(arguments), "additional_details": strings(details)}


def _result_id(score: Score) -> str:
    return f"{score.task}/{score.metric}"


def _instance(item: Json, score: Score) -> Json:
    outcome = float(item["outcomes"][score.metric])
    line: Json = {
        "evaluation_name": score.task,
        "evaluation_result_id": _result_id(score),
        "sample_id": str(item["doc_id"]),
        "interaction_type": "single_turn",
        "input": {"raw": f"sha256:{item['prompt_sha256']}", "reference": [f"sha256:{item['target_sha256']}"]},
        "output": {"raw": []},
        "answer_attribution": [],
        "evaluation": {"score": outcome, "is_correct": outcome == 1},
    }
    told = ("repetition", "doc_sha256", "finish_reasons", "unclosed", "empty", "extracted", "log_probs", "seconds")
    line["metadata"] = strings({key: item.get(key) for key in told} | {"texts": "not kept, digests instead"})
    if "finish_reasons" in item:
        tokens = {"input_tokens": item["num_prompt_tokens"], "output_tokens": item["num_tokens"]}
        line["token_usage"] = {**tokens, "total_tokens": sum(tokens.values())}
    return line
