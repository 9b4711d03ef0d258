"""What the Hub reads of a variant: scores in registered benchmarks, and the `model-index` of a card's front matter."""

from collections.abc import Mapping
from dataclasses import dataclass

from harness.record.run import Record
from harness.report.evidence import Evidence
from harness.report.exchange import (
    HARNESS,
    Dataset,
    Json,
    Score,
    about_task,
    dataset_of_task,
    dataset_of_text,
    first_metric,
    model_id,
    scores_of,
    settings_of,
    tasks_of,
    url_of,
    without_none,
)


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
    """What the reader of a leaderboard must know of a value in per cent."""
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
    for row in evidence.tables["perplexity"].rows:
        if row["variant"] == variant and row["ppl"] is not None and not row.get("served_as"):
            protocol, record = row["protocol"], row["run"]
            metric = {"type": "perplexity", "value": row["ppl"], "name": f"perplexity per {row['unit']}, {protocol}"}
            source = _source(evidence, record)
            results.append(_indexed(f"perplexity by {protocol}", dataset_of_text(record), metric, source))
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
