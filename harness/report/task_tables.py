"""Records of tasks to tables: what was scored beside the source, item by item, and whether the answers can be believed.

Two runs are compared over the same items and prompts, or not at all. A run of which too many answers were cut off,
empty or without an answer in them measures its limits and not the model: above the bounds of its suite's [audit] table
it is invalid, says why, and is compared with nothing.
"""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from harness.record import stats
from harness.record.run import Record
from harness.record.schema import incomparable
from harness.report import runs
from harness.report.numbers import format_percent
from harness.report.tables import Table, table_of
from harness.suite.names import SOURCE
from harness.suite.schema import Audit, Suite

ALL_TASKS = "all tasks"
"""The name of the row that takes all tasks of a variant together."""

Item = tuple[str, int, str, int]
"""What is the same item in two runs: task, document and its digest, repetition."""

_BAD_ANSWERS: Mapping[str, tuple[str, Callable[[Mapping[str, Any]], bool]]] = {
    "cap_hit_share": (
        "of the answers were cut off at the most new tokens",
        lambda item: "length" in item["finish_reasons"],
    ),
    "unclosed_share": ("of the thoughts were never closed", lambda item: item["unclosed"]),
    "empty_share": ("of the answers are empty", lambda item: item["empty"]),
    "extraction_failure_share": (
        "of the answers have none that the task's filters find",
        lambda item: not item["extracted"],
    ),
}
"""A share of answers -> its words, and what tells such an answer by the sample of its item."""


def newest_by_task(records: Sequence[Record], suite: Suite, rows: Sequence[str]) -> dict[str, dict[str, Record]]:
    """The latest whole run of each row in each task of a suite, in the suite's order."""
    found = {}
    for label in suite.tasks:
        of_task = [record for record in records if (record.run.dataset or {}).get("name") == label]
        if chosen := runs.newest_runs(of_task, suite.name, "tasks", rows):
            found[label] = chosen
    return found


def score_table(by_task: runs.ByTask) -> Table:
    """One row a task, metric and variant: lm-eval's own figure with its standard error, and the paired difference.

    `score` is the mean over repetitions of what lm-eval says; its standard error is that of one repetition. The
    difference is the mean over documents of the variant's score less the source's, for metrics that are means (see
    `_difference`). `recovery_ratio` is the variant's score over the source's, where more is better. `flips` are the
    items that only the source, and only the variant, gets right. `p_holm` is of the hypothesis that nothing differs
    (McNemar's exact test, or a permutation of documents), of the first metric of each task, adjusted over all tasks of
    a variant. Where it has several, a last row of the variant takes them together.
    """
    rows: list[dict[str, Any]] = []
    compared: dict[str, list[dict[str, Any]]] = {}
    for label, records in by_task.items():
        for row, record in records.items():
            refusal = _refusal(records, row)
            for (task, metric), results in by_metric(record).items():
                errors = [one["standard_error"] for one in results if one["standard_error"] is not None]
                first = metric == _first_metrics(_of_task(record, task)).get(task)
                found: dict[str, Any] = {
                    "task": label if task == _only_task(record) else f"{label}: {task}",
                    "metric": metric,
                    "variant": row,
                    "num_items": results[0]["num_items"],
                    "num_repetitions": len(results),
                    "score": statistics.fmean(one["value"] for one in results),
                    "score_error": statistics.fmean(errors) if errors else None,
                    "delta_score": refusal,
                    "recovery_ratio": None,
                    "flips": None,
                    "run": record,
                    **runs.served_as(record),
                }
                if (
                    row != SOURCE
                    and refusal is None
                    and all(_is_mean(one, task, metric) for one in (record, records[SOURCE]))
                ):
                    found |= _compared(record, records[SOURCE], task, metric)
                    compared.setdefault(row, []).extend([found] if first else [])
                rows.append(found)
    for those in compared.values():
        for one, p_value in zip(those, stats.holm([one["p_value"] for one in those]), strict=True):
            one["p_holm"] = p_value
    return table_of([*rows, *(_together(row, those) for row, those in compared.items() if len(those) > 1)])


def _together(variant: str, compared: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row of all compared tasks of a variant."""
    return {
        "task": ALL_TASKS,
        "metric": f"mean of {len(compared)}",
        "variant": variant,
        "num_items": sum(one["num_items"] for one in compared),
        "delta_score": stats.pooled([one["delta_score"] for one in compared]),
        "run": tuple({one["run"].run.run_id: one["run"] for one in compared}.values()),
    }


def answer_table(by_task: runs.ByTask) -> Table:
    """The audit of generated answers, one row a task and variant: shares of answers that are no answers, the score of
    those that came to an end, and what an answer costs. Correct is what the first metric of an item's task counts;
    seconds are of the whole run, all answers in a batch together."""
    rows = []
    for label, records in by_task.items():
        for row, record in records.items():
            items = _generated(record)
            if not items:
                continue
            source = records.get(SOURCE)
            first = _first_metrics(items)
            scored = [
                (item, score) for item in items if _is_number(score := item["outcomes"].get(first.get(item["task"])))
            ]
            correct = math.fsum(score for _, score in scored)
            ended = [score for item, score in scored if "length" not in item["finish_reasons"]]
            reasons, tokens = invalid(record, source), _token_totals(record, source)
            rows.append(
                {
                    "task": label,
                    "variant": row,
                    "num_items": len(items),
                    **_shares(items),
                    "completed_score": statistics.fmean(ended) if ended else None,
                    "tokens_per_answer": statistics.fmean(item["num_tokens"] for item in items),
                    "token_inflation_ratio": stats.paired_sum_ratio(*tokens) if tokens else None,
                    "tokens_per_correct": sum(item["num_tokens"] for item in items) / correct if correct else None,
                    "seconds_per_correct": math.fsum(item["seconds"] for item in items) / correct if correct else None,
                    "verdict": f"invalid: {'; '.join(reasons)}" if reasons else "valid",
                    "run": record,
                }
            )
    return table_of(rows)


def invalid(record: Record, source: Record | None) -> list[str]:
    """Why a run's answers are no measurement, by the bounds of the suite that it was run with; empty if they are."""
    items = _generated(record)
    if not items:
        return []
    bounds: Mapping[str, float] = asdict(Audit()) | record.run.suite.get("audit", {})
    reasons = [
        f"{format_percent(share)} {_BAD_ANSWERS[name][0]}, and the bound is {format_percent(bounds[name])}"
        for name, share in _shares(items).items()
        if share > bounds[name]
    ]
    tokens = _token_totals(record, source)
    if tokens and (ratio := math.fsum(tokens[0]) / math.fsum(tokens[1])) > bounds["token_inflation_ratio"]:
        reasons.append(
            f"its answers take {ratio:.2f} times the source's tokens, and the bound is "
            f"{bounds['token_inflation_ratio']:g}"
        )
    return reasons


def _generated(record: Record) -> list[dict[str, Any]]:
    return [item for item in record.kind("item") if "finish_reasons" in item]


def _shares(items: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {name: sum(map(is_bad, items)) / len(items) for name, (_, is_bad) in _BAD_ANSWERS.items()}


def _first_metrics(items: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The metric that each task names first."""
    found: dict[str, str] = {}
    for item in items:
        for metric in item["outcomes"]:
            found.setdefault(item["task"], metric)
    return found


def _token_totals(record: Record, source: Record | None) -> tuple[list[float], list[float]] | None:
    """By document, the tokens of a run's answers and of the source's answers to the same items; None where there is no
    such source."""
    if source is None or source is record or incomparable(source, record):
        return None
    pairs = [(theirs, mine) for theirs, mine in _joined(record, source) if "finish_reasons" in mine]
    before, after, _ = _totals(pairs, lambda item: item["num_tokens"])
    return (after, before) if any(before) else None


def by_metric(record: Record) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """What lm-eval says of a run, a sample for each repetition: (task, metric) -> results, in lm-eval's order."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in record.kind("result"):
        found.setdefault((result["task"], result["metric"]), []).append(result)
    return found


def _only_task(record: Record) -> str | None:
    """lm-eval's name of the task of a run that has one; None for a group."""
    named = {result["task"] for result in record.kind("result")}
    return next(iter(named)) if len(named) == 1 else None


def _refusal(records: Mapping[str, Record], row: str) -> str | None:
    """Why a row cannot be compared with the source; None if it can, or is the source."""
    record, source = records[row], records.get(SOURCE)
    if invalid(record, source):
        return "invalid"
    if row == SOURCE:
        return None
    if source is None:
        return "no record of the source"
    if invalid(source, None):
        return "the source is invalid"
    found = item_differences(record, source)
    return f"incomparable: {', '.join(found)}" if found else None


def item_differences(record: Record, other: Record, *, over_time: bool = False) -> list[str]:
    """What forbids comparing two runs of a task item by item, `over_time` as for `schema.incomparable`; empty if
    nothing does."""
    if keys := incomparable(other, record, over_time=over_time):
        return keys
    for one in (record, other):
        counts = Counter(map(_item, one.kind("item")))
        if twice := [doc_id for (_, doc_id, _, _), count in counts.items() if count > 1]:
            return [f"item {twice[0]} twice"]
    if any(mine["prompt_sha256"] != theirs["prompt_sha256"] for theirs, mine in _joined(record, other)):
        return ["prompts"]
    return ["items"] if _by_item(record).keys() != _by_item(other).keys() else []


def _item(sample: Mapping[str, Any]) -> Item:
    return sample["task"], sample["doc_id"], sample["doc_sha256"], sample["repetition"]


def _by_item(record: Record) -> dict[Item, dict[str, Any]]:
    return {_item(sample): sample for sample in record.kind("item")}


def _joined(record: Record, source: Record) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(The source's sample, the record's) of every item that both have."""
    theirs = _by_item(source)
    return [(theirs[item], sample) for item, sample in _by_item(record).items() if item in theirs]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _is_mean(record: Record, task: str, metric: str) -> bool:
    """Whether lm-eval's score is the mean of its items', as it is not of pairs, of a perplexity or of a group."""
    results = by_metric(record).get((task, metric), [])
    for result in results:
        own = [item for item in _of_task(record, task) if item["repetition"] == result["repetition"]]
        scores = [item["outcomes"].get(metric) for item in own]
        if not scores or not all(map(_is_number, scores)):
            return False
        if not math.isclose(statistics.fmean(scores), result["value"], rel_tol=1e-6, abs_tol=1e-9):
            return False
    return bool(results)


def _of_task(record: Record, task: str) -> list[dict[str, Any]]:
    return [item for item in record.kind("item") if item["task"] == task]


def _totals(
    pairs: Iterable[tuple[Mapping[str, Any], Mapping[str, Any]]], value: Callable[[Mapping[str, Any]], float]
) -> tuple[list[float], list[float], list[float]]:
    """By document, whose repetitions belong together: sums of a value on both sides, and the number of its pairs."""
    by_doc: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for before, after in pairs:
        by_doc.setdefault((after["task"], after["doc_id"]), []).append((value(before), value(after)))
    return (
        [math.fsum(before for before, _ in values) for values in by_doc.values()],
        [math.fsum(after for _, after in values) for values in by_doc.values()],
        [float(len(values)) for values in by_doc.values()],
    )


def _compared(record: Record, source: Record, task: str, metric: str) -> dict[str, Any]:
    """{delta_score, recovery_ratio, flips, p_value} of a variant's items against the source's."""

    def score(item: Mapping[str, Any]) -> float:
        return float(item["outcomes"][metric])

    pairs = [pair for pair in _joined(record, source) if pair[1]["task"] == task]
    every = [(score(before), score(after)) for before, after in pairs]
    flips = None
    if all(value in (0.0, 1.0) for pair in every for value in pair):
        flips = f"{sum(a > b for a, b in every)} / {sum(a < b for a, b in every)}"
    before, after, weights = _totals(pairs, score)
    lost_won = _flips(before, after, weights)
    is_better_low = any(one.get("higher_is_better") is False for one in by_metric(record).get((task, metric), ()))
    is_share = any(before) and min(*before, *after) >= 0 and not is_better_low
    return {
        "delta_score": _difference(before, after, weights),
        "recovery_ratio": stats.paired_sum_ratio(after, before) if is_share else None,
        "flips": flips,
        "p_value": stats.mcnemar(*lost_won) if lost_won else stats.paired_permutation(before, after),
    }


def _flips(before: Sequence[float], after: Sequence[float], weights: Sequence[float]) -> tuple[int, int] | None:
    """How many documents were lost and won, where each is right or wrong and was asked once; else None."""
    if any(weight != 1 for weight in weights) or any(score not in (0.0, 1.0) for score in (*before, *after)):
        return None
    pairs = list(zip(before, after, strict=True))
    return sum(old > new for old, new in pairs), sum(old < new for old, new in pairs)


def _difference(before: Sequence[float], after: Sequence[float], weights: Sequence[float]) -> stats.Estimate:
    """The mean of what documents score more than before.

    Where each is right or wrong and was asked once, the interval is that of two paired shares, which there is also
    where nothing flipped. Else it is a bootstrap over documents. Scores that are all equal leave nothing to draw from:
    they are taken as that many items of which none flipped, which is more cautious for scores from 0 to 1, and others
    have no interval.
    """
    if lost_won := _flips(before, after, weights):
        return stats.paired_share_difference(*lost_won, len(before))
    if before == after and all(0 <= score <= weight for score, weight in zip(before, weights, strict=True)):
        return stats.paired_share_difference(0, 0, len(before))
    return stats.paired_mean_difference(before, after, weights)


def same_outcomes(record: Record, other: Record) -> bool:
    """Whether two runs of the same items came to the same scores in each of them."""
    return all(mine["outcomes"] == theirs["outcomes"] for theirs, mine in _joined(record, other))


def score_loss(record: Record, other: Record) -> tuple[stats.Estimate, str] | str:
    """How much worse a run scores than another one of the same items, and in what: the metric that its tasks name
    first. Positive is worse, whichever way lm-eval says that the metric goes (up, where it does not say). Instead of
    those, why there is no such number: tasks of several metrics, or one that is no mean over items. Its interval is
    that of `_difference`.
    """
    items = record.kind("item")
    first = _first_metrics(items)
    named = sorted(set(first.values()))
    if len(named) != 1:
        return f"its tasks are scored by several metrics ({', '.join(named)})" if named else "it has no scores"
    metric = named[0]
    if not all(_is_mean(one, task, metric) for task in first for one in (record, other)):
        return f"{metric} is no mean over items"
    ups = {result.get("higher_is_better") for result in record.kind("result") if result["metric"] == metric}
    if {True, False} <= ups:
        return f"{metric} is better high in one of its tasks and low in another"
    before, after, weights = _totals(_joined(record, other), lambda item: float(item["outcomes"][metric]))
    if False in ups:
        before, after = after, before
    told = metric if ups <= {True, False} else f"{metric}, taken to be better high"
    return _difference(after, before, weights), told
