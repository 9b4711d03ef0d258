"""Exports: what a suite's records say, in the formats that other tools read.

`export` is a pure function from evidence to files. A variant's files come with those of the setups it was measured in,
and with the source's, whose numbers are the baseline:

    <variant>/.eval_results/*.yaml      scores in registered benchmarks of the Hub, for the variant's repository
    <variant>/model-index.yaml          scores and perplexities, for the front matter of its card
    every_eval_ever/data/...            Every Eval Ever 0.3: a JSON for each run, and for tasks a JSONL of its items
    lm-eval/<row>/<task>/...            what `lm_eval --output_path` writes
    csv/*.csv                           every table of the report
    llama-bench.json, llama-bench.md    speeds as llama-bench prints them

A run that the audit calls invalid, and one whose engine computed another model than the checkpoint says, is in the raw
formats (lm-eval, CSV, llama-bench) and in none that is made to be published. Documentation of the formats:
https://huggingface.co/docs/hub/eval-results,
https://github.com/huggingface/hub-docs/blob/main/modelcard.md,
https://github.com/evaleval/every_eval_ever (version 0.3.0 of the package `every-eval-ever` on PyPI),
https://github.com/EleutherAI/lm-evaluation-harness/blob/main/lm_eval/loggers/evaluation_tracker.py,
https://github.com/ggml-org/llama.cpp/blob/master/tools/llama-bench/README.md.
"""

import csv
import io
import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import yaml

from harness.errors import UserError, did_you_mean
from harness.record.schema import UTC_FORMAT
from harness.record.stats import Estimate
from harness.record.store import Record
from harness.report import builds, columns, every_eval_ever, tables
from harness.report.columns import Spread
from harness.report.evidence import Evidence
from harness.report.exchange import (
    HARNESS,
    Dataset,
    Json,
    Score,
    about_task,
    dataset_of_task,
    dataset_of_text,
    epoch_of,
    first_metric,
    json_bytes,
    json_lines_bytes,
    model_id,
    path_part,
    perplexities_of,
    scores_of,
    settings_of,
    steady,
    tasks_of,
    url_of,
    without_none,
)
from harness.sampling import PRESETS
from harness.suite.names import NOISE, SOURCE, row_parts


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
"""lm-eval's name of a task -> the registered benchmark that it puts in full.

The Hub's documentation (https://huggingface.co/docs/hub/eval-results) names four benchmarks, these and cais/hle, which
lm-eval does not have. Their task ids are those of Every Eval Ever 0.3.0 (`tools/hf_community_evals.py`) and of the
results that Hugging Face's own staff has entered, for example
https://huggingface.co/Zyphra/ZAYA1-8B/commit/6186b0866e84fc168b3409510ff6e7e8a03d6f72; the documentation's example says
`gpqa_diamond` instead. A value on these leaderboards is a percentage from 0 to 100, as both of them have it: the
example of 0.412 in the documentation is alone with its fraction.
"""


def export(evidence: Evidence, variants: Sequence[str]) -> dict[str, bytes]:
    """Every exported file: path from the folder of the exports -> bytes.

    Of evidence with a repository on the Hub, the variant is called by it and its records are linked to; else no format
    names a source. `UserError` for a variant that the suite does not have, and where there is no record of any of them
    or the source.
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
    """What is of a variant alone, for its repository: `.eval_results/*.yaml` and `model-index.yaml`, those of them that
    something was measured for."""
    files = {f".eval_results/{name}.yaml": _yaml(entries) for name, entries in eval_results(evidence, variant).items()}
    if index := model_index(evidence, variant):
        files["model-index.yaml"] = _yaml({"model-index": index})
    return files


def shared_files(evidence: Evidence, rows: Sequence[str]) -> dict[str, bytes]:
    """What rows of the suite have in common: the formats that tell rows apart themselves."""
    files: dict[str, bytes] = {}
    for row in rows:
        files |= every_eval_ever.files_of(evidence, row)
        files |= _lm_eval(evidence, row)
    files |= _tables(evidence, rows)
    if speeds := llama_bench(evidence, rows):
        files["llama-bench.json"] = json_bytes([asdict(speed) for speed in speeds])
        files["llama-bench.md"] = llama_bench_markdown(speeds).encode()
    return files


def _yaml(document: Any) -> bytes:
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True).encode()


# -- The Hub ----------------------------------------------------------------------------------------------------------


def eval_results(evidence: Evidence, variant: str) -> dict[str, list[Json]]:
    """The entries of `.eval_results/<benchmark>.yaml`, by benchmark: {dataset {id, task_id, revision}, value, date,
    source {url, name}, notes}, the value in per cent.

    Only whole runs of the tasks in `BENCHMARKS` on the dataset itself count, without a limit; the score is the metric
    that the task names first. Of several runs of one benchmark (with and without a chat, for example) the suite's first
    speaks, since a leaderboard has one place for a model. Perplexities and speeds have no leaderboard.
    """
    found: dict[str, list[Json]] = {}
    for _, record in tasks_of(evidence, variant):
        about = ((record.run.dataset or {}).get("tasks") or {}).values()
        for score in scores_of(record):
            benchmark = BENCHMARKS.get(score.task)
            if (
                benchmark is None
                or benchmark.name in found
                or settings_of(record).get("limit") is not None
                or score.metric != first_metric(record, score.task)
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
                "dataset": without_none(dataset),
                "value": round(100 * score.value, 6),
                "date": record.run.started_utc,
                "source": _source(evidence, record),
                "notes": _notes(record, score),
            }
            found[benchmark.name] = [without_none(entry)]
    return found


def _source(evidence: Evidence, record: Record) -> Json | None:
    url = url_of(evidence, record)
    return {"url": url, "name": f"{HARNESS}, run {record.run.run_id}"} if url else None


def _notes(record: Record, score: Score) -> str:
    """What a leaderboard's reader must know of a value in per cent."""
    settings, about = settings_of(record), about_task(record, score.task)
    said = [
        f"{score.metric} of {score.task}, lm-eval {(record.run.dataset or {}).get('lm_eval')}",
        f"{about['num_fewshot']}-shot" if about.get("num_fewshot") is not None else None,
        "chat template" if settings.get("chat") else None,
        "thinking" if settings.get("thinking") else None,
        f"sampling {settings['preset']}" if settings.get("preset") else None,
        _count(score),
    ]
    estimate = score.estimate
    if estimate and estimate.low is not None and estimate.high is not None:
        said.append(f"95 % interval {100 * estimate.low:.2f} to {100 * estimate.high:.2f}")
    elif score.standard_error is not None:
        said.append(f"standard error {100 * score.standard_error:.2f}")
    return ", ".join(part for part in said if part)


def _count(score: Score) -> str:
    """What a score is the mean of."""
    if score.num_repetitions == 1:
        return f"n = {score.num_items}"
    return f"{score.num_items} items × {score.num_repetitions} repetitions"


def model_index(evidence: Evidence, variant: str) -> list[Json]:
    """The value of `model-index` in the front matter of a variant's card: its scores, each on the metric's own scale,
    and its perplexities; empty where there are none. The format has no place for an interval."""
    results = []
    for label, record in tasks_of(evidence, variant):
        for score in scores_of(record):
            name = "accuracy" if score.metric.startswith("acc,") else score.metric.partition(",")[0]
            metric = {"type": name, "value": score.value, "name": f"{score.metric} ({_count(score)})"}
            named = label if label == score.task else f"{label}: {score.task}"
            results.append(_indexed(named, dataset_of_task(record, score.task), metric, _source(evidence, record)))
    for protocol, record, nats in perplexities_of(evidence, variant):
        unit = (record.run.dataset or {}).get("unit", "token")
        metric = {"type": "perplexity", "value": math.exp(nats.value), "name": f"perplexity per {unit}, {protocol}"}
        results.append(
            _indexed(f"perplexity by {protocol}", dataset_of_text(record), metric, _source(evidence, record))
        )
    return [{"name": model_id(evidence, variant).rpartition("/")[2], "results": results}] if results else []


def _indexed(task: str, dataset: Dataset, metric: Json, source: Json | None) -> Json:
    described = {
        "type": dataset.repo or dataset.name,
        "name": dataset.name,
        "config": dataset.config,
        "split": dataset.split,
        "revision": dataset.revision,
    }
    result = {
        "task": {"type": "text-generation", "name": task},
        "dataset": without_none(described),
        "metrics": [metric],
        "source": source,
    }
    return without_none(result)


# -- lm-eval ----------------------------------------------------------------------------------------------------------


def _lm_eval(evidence: Evidence, row: str) -> dict[str, bytes]:
    """A row's tasks as `lm_eval --output_path` writes them: for each repetition of a run its `results_<date>.json`, and
    for each task in it `samples_<task>_<date>.jsonl`. The date is that of the run's start; where lm-eval has
    microseconds, it counts the repetitions.

    Not kept in records, and so not in the samples: `doc`, `target`, `arguments`, `resps`, `filtered_resps` (the texts)
    and `prompt_hash`, in whose place is the digest of the prompt's token ids. `doc_hash` and `target_hash` are
    lm-eval's. Of the results, `task_hashes`, which are made of them, the tasks' whole configurations, and
    what lm-eval knows of the tokenizer and the environment are left out.
    """
    files = {}
    for label, records in evidence.tasks.items():
        if row not in records:
            continue
        record = records[row]
        folder = f"lm-eval/{path_part(row)}/{path_part(label)}"
        date = datetime.strptime(record.run.started_utc, UTC_FORMAT).strftime("%Y-%m-%dT%H-%M-%S")
        for repetition in sorted({result["repetition"] for result in record.kind("result")}):
            stamp = f"{date}.{repetition:06d}"
            files[f"{folder}/results_{stamp}.json"] = json_bytes(_lm_eval_results(evidence, row, record, repetition))
            items = [item for item in record.kind("item") if item["repetition"] == repetition]
            for task in dict.fromkeys(item["task"] for item in items):
                lines = [line for item in items if item["task"] == task for line in _lm_eval_samples(item)]
                files[f"{folder}/samples_{path_part(task)}_{stamp}.jsonl"] = json_lines_bytes(lines)
    return files


def _lm_eval_results(evidence: Evidence, row: str, record: Record, repetition: int) -> Json:
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
        "configs": {task: _lm_eval_config(task, about, settings) for task, about in leaves.items()},
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


def _lm_eval_config(task: str, about: Json, settings: Json) -> Json:
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


def _lm_eval_samples(item: Json) -> Iterator[Json]:
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


# -- CSV --------------------------------------------------------------------------------------------------------------


def _tables(evidence: Evidence, rows: Sequence[str]) -> dict[str, bytes]:
    """A CSV (RFC 4180, UTF-8) for every frame that has a row of those, or of the noise floor.

    Columns are called as in `columns.COLUMNS`. Numbers have eight significant digits, on which every machine agrees;
    unknown ones are empty, runs are there by their id (eight hexadecimal digits, of which pandas takes some for numbers
    without `dtype={"run": str}`). An estimate has three columns, `<key>`, `<key>_low` and `<key>_high`, the last two
    empty without an interval, and `<key>_reason` where words stand in place of one. A spread over layers has `<key>`,
    its median, `<key>_largest` and `<key>_layer`.
    """
    files = {}
    for name, frame in evidence.frames.items():
        if "variant" in frame.columns:
            frame = frame[frame["variant"].isin((*rows, *NOISE))]
        if frame.empty:
            continue
        cells = [part for key in frame.columns for part in _spread_out(str(key), list(frame[key])).items()]
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
        return steady(value)
    return value.run.run_id if isinstance(value, Record) else value


def _spread_out(key: str, values: Sequence[Any]) -> dict[str, list[Any]]:
    """The columns that one column of a frame becomes."""
    kind = next((type(value) for value in values if type(value) in _PARTS), None)
    if kind is None:
        return {key: [_plain(value) for value in values]}
    found = {
        f"{key}{suffix}": [_plain(getattr(value, part)) if isinstance(value, kind) else None for value in values]
        for suffix, part in _PARTS[kind].items()
    }
    if any(isinstance(value, str) for value in values):
        found[f"{key}_reason"] = [value if isinstance(value, str) else None for value in values]
    return found


# -- llama-bench ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LlamaBench:
    """One object of llama-bench's JSON; what only llama.cpp knows (its build, its cache types, its offloading) is not
    there, or null."""

    build_commit: str | None  # the harness's
    build_number: int | None = None
    cpu_info: str | None
    gpu_info: str
    backends: str
    model_filename: str
    model_type: str
    model_size: int | None  # bytes of all tensors
    model_n_params: int | None
    n_threads: int | None
    n_prompt: int
    n_gen: int
    n_depth: int
    test_time: str
    avg_ns: int
    stddev_ns: int
    avg_ts: float
    stddev_ts: float
    samples_ns: list[int]
    samples_ts: list[float]

    @property
    def test(self) -> str:
        """`pp512`, `tg32`, `tg32 @ d4096`, as on the card."""
        return tables.test_name(self.n_gen + 1, self.n_depth) if self.n_gen else f"pp{self.n_prompt}"


def llama_bench(evidence: Evidence, rows: Sequence[str]) -> list[LlamaBench]:
    """Decodes and prefills of one sequence, as llama-bench's `tg` and `pp`. It decodes one sequence always, so a decode
    of several is no row of it; those are in the CSV.

    `n_gen` are the timed tokens: the first new one belongs to the prefill. `n_depth` are the prompt's tokens, which are
    in the cache when decoding begins, and 0 of a prompt of one. Speeds are means with standard deviations over
    repetitions, as llama-bench has them, where the report has medians with intervals.
    """
    found = []
    for row in rows:
        record = evidence.records["bench"].get(row)
        if record is None:
            continue
        for (batch, prompt_tokens, _), samples in tables.by_shape(record, "prefill").items():
            if batch == 1:
                seconds = [sample["prefill_seconds"] for sample in samples]
                found.append(_timed(evidence, row, record, seconds, n_prompt=prompt_tokens, n_gen=0, n_depth=0))
        for (batch, prompt_tokens, new_tokens), samples in tables.by_shape(record, "decode").items():
            if batch == 1:
                seconds = [math.fsum(sample["step_seconds"]) for sample in samples]
                steps = new_tokens - 1
                depth = tables.test_depth(prompt_tokens)
                found.append(_timed(evidence, row, record, seconds, n_prompt=0, n_gen=steps, n_depth=depth))
    return found


def _timed(
    evidence: Evidence, row: str, record: Record, seconds: Sequence[float], *, n_prompt: int, n_gen: int, n_depth: int
) -> LlamaBench:
    run, engine = record.run, record.run.engine or {}
    gpu = run.machine.get("gpu")
    variant, setup = row_parts(row)
    size, params = builds.weights(evidence.records["build"], variant) or (None, None)
    nanoseconds = [round(one * 1e9) for one in seconds]
    speeds = [(n_prompt + n_gen) / one for one in seconds]
    return LlamaBench(
        build_commit=run.git["commit"][:8] if run.git else None,
        cpu_info=run.machine.get("cpu"),
        gpu_info=gpu["name"] if gpu else "",
        backends=f"{engine.get('name')} {engine.get('device')}",
        model_filename=row,
        model_type=" + ".join((model_id(evidence, row), *([setup] if setup else ()))),
        model_size=size,
        model_n_params=params,
        n_threads=engine.get("effective", {}).get("threads"),
        n_prompt=n_prompt,
        n_gen=n_gen,
        n_depth=n_depth,
        test_time=run.started_utc,
        avg_ns=round(statistics.fmean(nanoseconds)),
        stddev_ns=round(_deviation(nanoseconds)),
        avg_ts=statistics.fmean(speeds),
        stddev_ts=_deviation(speeds),
        samples_ns=nanoseconds,
        samples_ts=speeds,
    )


def _deviation(values: Sequence[float]) -> float:
    """Zero of a single value, as llama-bench has it."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


_MEANS = (
    "t/s: mean ± standard deviation over repetitions, as llama-bench prints it; the card has medians with intervals."
)


def llama_bench_markdown(rows: Sequence[LlamaBench]) -> str:
    """The table that llama-bench prints: sizes in powers of 1,024, speeds as mean ± standard deviation, which a line
    below says, since the card has medians. (llama-bench's own line there is that of its build.)"""
    lines = ["| model | size | params | backend | test | t/s |", "| --- | ---: | ---: | --- | ---: | ---: |"]
    for row in rows:
        size, params = row.model_size, row.model_n_params
        unit, scale = ("GiB", 2**30) if size is not None and size >= 2**30 else ("MiB", 2**20)
        letter, many = ("B", 10**9) if params is not None and params >= 10**9 else ("M", 10**6)
        cells = (
            columns.escape(row.model_type),
            "" if size is None else f"{size / scale:.2f} {unit}",
            "" if params is None else f"{params / many:.2f} {letter}",
            columns.escape(row.backends),
            row.test,
            f"{row.avg_ts:.2f} ± {row.stddev_ts:.2f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join((*lines, "", _MEANS)) + "\n"
