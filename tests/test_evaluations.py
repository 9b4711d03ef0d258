"""Evaluations: scores and differences are those of hand arithmetic, and a run that measures its limits says so."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from harness.record import stats
from harness.record.run import Record
from harness.record.schema import COMPARABLE
from harness.record.store import RunWriter, read
from harness.report import runs, tables, task_tables
from harness.report.tables import Table
from harness.suite.schema import Source, Suite, Task, Variant
from tests.records import AUDIT, ENGINE, TASK, answer, choice, make_run, mean_results, result, tasks_record

METRIC = "exact_match,number"
SUITE = Suite(
    name="demo",
    title="A demo",
    source=Source("demo:dense"),
    variants={"nvfp4": Variant("w4a4"), "a16": Variant("rtn-a16")},
    tasks={"sums": Task(task="demo:arithmetic"), "facts": Task(task="demo:agreement")},
)


def answered(scores: Sequence[float], **more: Any) -> list[dict[str, Any]]:
    """A document for each score."""
    return [answer(doc_id, score, **more) for doc_id, score in enumerate(scores)]


def pair(
    source: Sequence[dict[str, Any]], variant: Sequence[dict[str, Any]], **header: Any
) -> dict[str, dict[str, Record]]:
    """The two runs of the task `sums`; the variant's header may be another."""
    return {"sums": {"source": tasks_record("source", source), "nvfp4": tasks_record("nvfp4", variant, **header)}}


def row(frame: Table, **wanted: object) -> dict[str, Any]:
    found = [one for one in frame.rows if all(one[key] == value for key, value in wanted.items())]
    assert len(found) == 1
    return {str(key): value for key, value in found[0].items()}


def delta(by_task: Mapping[str, Mapping[str, Record]], variant: str = "nvfp4", **wanted: object) -> Any:
    return row(task_tables.score_table(by_task), variant=variant, **wanted)["delta_score"]


def link(record: Record) -> str:
    return f"../{record.path.name}"


def table_cells(text: str, heading: str) -> list[str]:
    """The column of a Markdown table; a bar inside a cell is escaped."""
    header, _, *body = (
        [cell.strip() for cell in line.replace(r"\|", "¦").strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    )
    assert {len(header)} == {len(cells) for cells in body}
    return [cells[header.index(heading)].replace("¦", r"\|") for cells in body]


# -- Scores ------------------------------------------------------------------------------------------------------


def test_a_score_is_lm_evals_own_with_its_standard_error() -> None:
    frame = task_tables.score_table({"sums": {"source": tasks_record("source", answered([1, 1, 1, 0]))}})
    source = row(frame, variant="source")
    assert (source["task"], source["metric"], source["num_items"], source["num_repetitions"]) == ("sums", METRIC, 4, 1)
    assert source["score"] == 0.75 and source["score_error"] == pytest.approx(scipy_stats.sem([1, 1, 1, 0]))
    assert source["delta_score"] is None and source["flips"] is None


def test_a_score_is_the_mean_over_repetitions_and_its_standard_error_that_of_one() -> None:
    repeated = answered([1, 1, 1, 0]) + answered([1, 0, 0, 0], repetition=1) + answered([1, 1, 0, 0], repetition=2)
    frame = task_tables.score_table({"sums": {"source": tasks_record("source", repeated)}})
    source = row(frame, variant="source")
    assert source["score"] == pytest.approx((0.75 + 0.25 + 0.5) / 3)
    errors = [scipy_stats.sem(ones) for ones in ([1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0])]
    assert source["score_error"] == pytest.approx(statistics.fmean(errors))
    assert (source["num_items"], source["num_repetitions"]) == (4, 3)


def test_a_metric_without_a_standard_error_has_a_dash() -> None:
    record = tasks_record("source", answered([1, 0]), [result(0.5)])
    assert row(task_tables.score_table({"sums": {"source": record}}), variant="source")["score_error"] is None


def test_every_metric_has_a_row_of_its_own() -> None:
    def judged(doc_id: int, strict: float, loose: float) -> dict[str, Any]:
        return answer(doc_id, outcomes={"exact_match,strict": strict, "exact_match,loose": loose})

    by_task = pair([judged(0, 1, 1), judged(1, 0, 1)], [judged(0, 0, 1), judged(1, 0, 1)])
    assert delta(by_task, metric="exact_match,strict").value == -0.5
    assert delta(by_task, metric="exact_match,loose").value == 0


def test_the_difference_is_the_mean_over_documents_with_a_bootstrap_over_them() -> None:
    rng = np.random.default_rng(1)
    before, after = rng.uniform(0, 1, 50), rng.uniform(0, 1, 50)
    found = delta(pair(answered(before.tolist()), answered(after.tolist())))
    assert found.value == pytest.approx(float((after - before).mean())) and found.num == 50
    reference = scipy_stats.bootstrap(
        (after - before,),
        np.mean,
        n_resamples=9999,
        method="percentile",
        rng=np.random.default_rng(3),  # another seed: equal up to the bootstrap's own noise
    ).confidence_interval
    width = reference.high - reference.low
    assert found.low == pytest.approx(reference.low, abs=0.05 * width)
    assert found.high == pytest.approx(reference.high, abs=0.05 * width)


def test_repetitions_of_a_document_are_one_observation() -> None:
    rng = np.random.default_rng(2)
    before, after = rng.integers(0, 2, (3, 12)), rng.integers(0, 2, (3, 12))  # [repetitions, documents]

    def items(scores: Any) -> list[dict[str, Any]]:
        return [item for turn, ones in enumerate(scores.tolist()) for item in answered(ones, repetition=turn)]

    found = delta(pair(items(before), items(after)))
    assert found == stats.paired_mean_difference(before.sum(axis=0).tolist(), after.sum(axis=0).tolist(), [3.0] * 12)
    assert found.value == pytest.approx(float(np.mean(after.mean(axis=0) - before.mean(axis=0))))
    assert found.num == 12


@settings(max_examples=25)  # each has a bootstrap
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=8), st.randoms())
def test_the_order_of_the_items_does_not_matter(scores: list[tuple[float, float]], random: Any) -> None:
    before, after = answered([a for a, _ in scores]), answered([b for _, b in scores])
    found = delta(pair(random.sample(before, len(before)), random.sample(after, len(after))))
    assert found.value == pytest.approx(statistics.fmean(b - a for a, b in scores), abs=1e-12)
    assert found.num == len(scores)


def test_a_model_against_itself_differs_by_zero_and_its_interval_says_what_so_few_items_leave_open() -> None:
    found = delta(pair(answered([1, 0, 1, 1]), answered([1, 0, 1, 1])))
    # Tango's score interval without a flip: z² / (n + z²).
    assert found.value == 0
    assert found.high == pytest.approx(1.959964**2 / (4 + 1.959964**2), abs=1e-4)
    assert found.low == pytest.approx(-found.high)


def test_equal_scores_that_are_no_shares_have_no_interval() -> None:
    found = delta(pair(answered([7.0, 2.5]), answered([7.0, 2.5])))
    assert (found.value, found.low, found.high) == (0, None, None)


def test_right_or_wrong_items_have_mcnemars_p_value_and_others_that_of_a_permutation() -> None:
    flipped = row(task_tables.score_table(pair(answered([1] * 8 + [0]), answered([0] * 7 + [1, 1]))), variant="nvfp4")
    assert flipped["p_holm"] == pytest.approx(scipy_stats.binomtest(7, 8).pvalue)
    graded = row(task_tables.score_table(pair(answered([0.9, 0.8, 0.7]), answered([0.5, 0.5, 0.5]))), variant="nvfp4")
    assert graded["p_holm"] == 2 / 2**3, "all three fell: one exchange of eight is as far, and one as far the other way"


def test_several_tasks_are_adjusted_by_holm_and_pooled_in_a_row_of_their_own() -> None:
    lost, same = (
        pair(answered([1] * 9), answered([0] * 8 + [1]))["sums"],
        pair(answered([1, 0]), answered([1, 0]))["sums"],
    )
    frame = task_tables.score_table({"sums": lost, "facts": same})
    p_value = scipy_stats.binomtest(8, 8).pvalue
    assert row(frame, variant="nvfp4", task="sums")["p_holm"] == pytest.approx(2 * p_value)
    assert row(frame, variant="nvfp4", task="facts")["p_holm"] == 1
    together = row(frame, variant="nvfp4", task="all tasks")
    assert together["delta_score"].value == pytest.approx((-8 / 9 + 0) / 2)
    assert (together["num_items"], together["metric"]) == (11, "mean of 2")


def test_flips_count_what_was_lost_and_what_was_won() -> None:
    by_task = pair(answered([1, 1, 1, 0, 0, 1]), answered([0, 0, 1, 1, 0, 1]))
    cells = row(task_tables.score_table(by_task), variant="nvfp4")
    assert cells["flips"] == "2 / 1" and cells["delta_score"].value == pytest.approx(-1 / 6)
    source, variant = by_task["sums"].values()
    back = row(task_tables.score_table({"sums": {"source": variant, "nvfp4": source}}), variant="nvfp4")
    assert back["flips"] == "1 / 2" and back["delta_score"].value == pytest.approx(1 / 6)


def test_a_metric_of_more_than_right_or_wrong_has_no_flips() -> None:
    cells = row(task_tables.score_table(pair(answered([1, 0.5]), answered([0, 0.5]))), variant="nvfp4")
    assert cells["flips"] is None and cells["delta_score"].value == -0.5


@pytest.mark.parametrize(
    ("metric", "outcomes", "values"),
    [
        # As lm-eval has them: (log-likelihood, number of words) of wikitext, (gold, guess) of F1.
        ("word_perplexity,none", [[-20.5, 10.0], [-31.0, 14.0]], (8.0, 9.0)),
        # The log-likelihood of lambada, a plain number whose exponential's mean is the score.
        ("perplexity,none", [-1.0, -3.0], (math.exp(2), math.exp(2.5))),
    ],
)
def test_what_is_no_mean_of_its_items_is_shown_and_not_compared(
    metric: str, outcomes: list[Any], values: tuple[float, float]
) -> None:
    items = [choice(doc_id, 0, outcomes={metric: one}) for doc_id, one in enumerate(outcomes)]
    by_task = {
        "sums": {
            name: tasks_record(name, items, [result(value, metric=metric)])
            for name, value in zip(("source", "nvfp4"), values, strict=True)
        }
    }
    frame = task_tables.score_table(by_task)
    assert [one["score"] for one in frame.rows] == list(values)
    cells = row(frame, variant="nvfp4")
    assert cells["delta_score"] is None and cells["flips"] is None


def test_a_metric_that_one_side_lacks_for_an_item_is_not_compared() -> None:
    whole, lacking = answered([1, 0, 1]), [*answered([1, 0]), answer(2)]
    figures = mean_results(whole)
    for source, variant in ((whole, lacking), (lacking, whole)):
        by_task = {
            "sums": {
                "source": tasks_record("source", source, figures),
                "nvfp4": tasks_record("nvfp4", variant, figures),
            }
        }
        assert delta(by_task) is None


def test_a_group_shows_its_tasks_by_name_and_its_own_figure_without_a_difference() -> None:
    def items(scores: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
        return [choice(doc_id, score, task=task) for task, ones in scores.items() for doc_id, score in enumerate(ones)]

    def group(variant: str, scores: Mapping[str, Sequence[float]], score: float) -> Record:
        figures = mean_results(items(scores))
        return tasks_record(variant, items(scores), [*figures, result(score, task="all", metric="acc,none")])

    records = {
        "source": group("source", {"easy": [1, 1], "hard": [1, 0, 1, 1]}, 5 / 6),
        "nvfp4": group("nvfp4", {"easy": [1, 0], "hard": [0, 1, 0, 0]}, 2 / 6),
    }
    frame = task_tables.score_table({"facts": records})
    variant = [one for one in frame.rows if one["variant"] == "nvfp4"]
    assert [one["task"] for one in variant] == ["facts: easy", "facts: hard", "facts: all", "all tasks"]
    assert [one["score"] for one in variant] == [0.5, 0.25, pytest.approx(1 / 3), None]
    assert [one["num_items"] for one in variant] == [2, 4, 4, 6]
    # Documents of two tasks are different ones, whatever their numbers.
    assert delta({"facts": records}, task="facts: easy").value == -0.5
    assert delta({"facts": records}, task="facts: hard").value == -0.5
    assert row(frame, variant="nvfp4", task="facts: hard")["flips"] == "3 / 1"
    assert variant[2]["delta_score"] is None and variant[2]["flips"] is None


def test_every_setup_of_the_source_is_compared_with_the_source() -> None:
    by_task = pair(answered([1, 1]), answered([1, 0]))
    by_task["sums"]["source+mtp1"] = tasks_record("source+mtp1", answered([1, 1]))
    assert delta(by_task, "source+mtp1").value == 0


# -- What is not compared ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("dataset.task_digest", {"dataset": {**TASK, "task_digest": "f" * 64}}),
        ("dataset.tokenizer_digest", {"dataset": {**TASK, "tokenizer_digest": "f" * 64}}),
        ("dataset.settings", {"dataset": {**TASK, "settings": {**TASK["settings"], "seed": 1}}}),
        ("engine.name", {"engine": {**ENGINE, "name": "vllm"}}),
        ("engine.version", {"engine": {**ENGINE, "version": "other"}}),
        ("engine.dtype", {"engine": {**ENGINE, "dtype": "float32"}}),
        ("engine.device", {"engine": {**ENGINE, "device": "cuda"}}),
        ("packages.lm_eval", {"packages": {"lm_eval": "0.4.14"}}),
        ("measure_version", {"measure_version": 2}),
        ("variant.source_digest", {"variant": {"name": "nvfp4", "source_digest": "f" * 64}}),
    ],
)
def test_another_header_refuses_by_its_key(key: str, change: dict[str, Any]) -> None:
    assert key in COMPARABLE["tasks"]
    by_task = pair(answered([1, 0]), answered([1, 1]))
    record = by_task["sums"]["nvfp4"]
    by_task["sums"]["nvfp4"] = replace(record, run=replace(record.run, **change))
    cells = row(task_tables.score_table(by_task), variant="nvfp4")
    assert cells["delta_score"] == f"incomparable: {key}" and cells["flips"] is None and cells["score"] == 1
    assert row(task_tables.answer_table(by_task), variant="nvfp4")["token_inflation_ratio"] is None


def test_runs_of_two_sessions_and_machines_may_be_compared() -> None:
    found = delta(pair(answered([1, 0]), answered([1, 1]), session_id="ffffffff", machine={"name": "other"}))
    assert found.value == 0.5


def test_other_prompts_are_refused() -> None:
    changed = [answer(0, 1.0), answer(1, 1.0, prompt_sha256="f" * 64)]
    assert delta(pair(answered([1, 1]), changed)) == "incomparable: prompts"


@pytest.mark.parametrize(
    ("source", "variant"),
    [
        (answered([1, 1, 1]), answered([1, 1])),
        (answered([1, 1]), answered([1, 1, 1])),
        (answered([1, 1, 1]), [answer(0, 1.0), answer(1, 1.0), answer(3, 1.0)]),
        (answered([1, 1]), [answer(0, 1.0), answer(1, 1.0, doc_sha256="f" * 64)]),
        (answered([1, 1]) + answered([1, 1], repetition=1), answered([1, 1])),
        (answered([1, 1]), answered([1, 1], task="another")),
    ],
)
def test_other_items_are_refused(source: list[dict[str, Any]], variant: list[dict[str, Any]]) -> None:
    assert delta(pair(source, variant)) == "incomparable: items"


@pytest.mark.parametrize("twice", [0, 2])
@pytest.mark.parametrize("side", ["source", "nvfp4"])
def test_an_item_that_is_there_twice_is_refused_and_named(side: str, twice: int) -> None:
    items = answered([1, 0, 1])
    sides = {"source": items, "nvfp4": items}
    sides[side] = [*items, items[twice]]
    assert delta(pair(*sides.values())) == f"incomparable: item {twice} twice"


def test_a_variant_without_a_source_is_compared_with_nothing() -> None:
    by_task = pair(answered([1, 1]), answered([1, 0]))
    del by_task["sums"]["source"]
    assert delta(by_task) == "no record of the source"
    cells = row(task_tables.answer_table(by_task), variant="nvfp4")
    assert cells["token_inflation_ratio"] is None and cells["verdict"] == "valid"


# -- The audit of answers ----------------------------------------------------------------------------------------

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "cap_hit_share": ({"finish_reasons": ["length"]}, "cut off at the most new tokens"),
    "unclosed_share": ({"unclosed": True}, "thoughts were never closed"),
    "empty_share": ({"empty": True}, "answers are empty"),
    "extraction_failure_share": ({"extracted": False}, "have none that the task's filters find"),
}


def partly(num_bad: int, num: int, bad: Mapping[str, Any]) -> list[dict[str, Any]]:
    """So many answers of which so many are none; all are right."""
    return [answer(doc_id, 1.0, **(bad if doc_id < num_bad else {})) for doc_id in range(num)]


@pytest.mark.parametrize("share", BAD)
def test_a_run_is_valid_at_a_bound_and_says_why_it_is_not_above(share: str) -> None:
    bad, words = BAD[share]
    for bound, num_bad, num in ((0.25, 1, 4), (0.05, 1, 20), (0.05, 5, 100), (0.2, 7, 35), (0.0, 0, 4), (1.0, 4, 4)):
        at = tasks_record("source", partly(num_bad, num, bad), audit={**AUDIT, share: bound})
        assert task_tables.invalid(at, at) == []
        cells = row(task_tables.answer_table({"sums": {"source": at}}), variant="source")
        assert cells[share] == num_bad / num and cells["verdict"] == "valid"
        assert {cells[other] for other in BAD if other != share} == {0}
        if num_bad == num:
            continue
        above = tasks_record("source", partly(num_bad + 1, num, bad), audit={**AUDIT, share: bound})
        (reason,) = task_tables.invalid(above, above)
        assert words in reason
        assert reason.startswith(f"{100 * (num_bad + 1) / num:.1f} % ")
        assert reason.endswith(f"the bound is {100 * bound:.1f} %")
        cells = row(task_tables.answer_table({"sums": {"source": above}}), variant="source")
        assert cells["verdict"] == f"invalid: {reason}"


@pytest.mark.parametrize("share", BAD)
def test_an_invalid_run_and_an_invalid_source_are_compared_with_nothing(share: str) -> None:
    good, bad = answered([1, 1, 1, 1]), partly(2, 4, BAD[share][0])
    cells = row(task_tables.score_table(pair(good, bad)), variant="nvfp4")
    assert (cells["score"], cells["delta_score"], cells["flips"]) == (1, "invalid", None)
    frame = task_tables.score_table(pair(bad, good))
    assert row(frame, variant="source")["delta_score"] == "invalid"
    assert row(frame, variant="nvfp4")["delta_score"] == "the source is invalid"
    assert row(task_tables.score_table(pair(good, good)), variant="nvfp4")["delta_score"].value == 0


def test_an_answer_of_several_texts_is_cut_off_if_any_of_them_is() -> None:
    record = tasks_record("source", [answer(0, 1.0, finish_reasons=["stop", "length"]), answer(1, 1.0)])
    assert row(task_tables.answer_table({"sums": {"source": record}}), variant="source")["cap_hit_share"] == 0.5


def test_all_reasons_are_given_at_once() -> None:
    everything = {key: value for bad, _ in BAD.values() for key, value in bad.items()}
    source = tasks_record("source", answered([1, 1]))
    record = tasks_record("nvfp4", partly(2, 2, {**everything, "num_tokens": 50}))
    reasons = task_tables.invalid(record, source)
    assert len(reasons) == 5
    assert task_tables.answer_table({"sums": {"source": source, "nvfp4": record}})["verdict"][1] == (
        "invalid: 100.0 % of the answers were cut off at the most new tokens, and the bound is 25.0 %; "
        "100.0 % of the thoughts were never closed, and the bound is 25.0 %; "
        "100.0 % of the answers are empty, and the bound is 25.0 %; "
        "100.0 % of the answers have none that the task's filters find, and the bound is 25.0 %; "
        "its answers take 5.00 times the source's tokens, and the bound is 2"
    )


def test_a_run_of_twice_the_sources_tokens_is_valid_and_one_of_more_is_not() -> None:
    source = answered([1, 1, 1, 1], num_tokens=100)
    by_task = pair(source, [answer(doc_id, 1.0, num_tokens=count) for doc_id, count in enumerate((50, 150, 300, 300))])
    assert task_tables.invalid(by_task["sums"]["nvfp4"], by_task["sums"]["source"]) == []
    assert row(task_tables.answer_table(by_task), variant="nvfp4")["token_inflation_ratio"].value == 2
    assert delta(by_task).value == 0
    by_task = pair(source, [answer(doc_id, 1.0, num_tokens=count) for doc_id, count in enumerate((50, 150, 310, 300))])
    (reason,) = task_tables.invalid(by_task["sums"]["nvfp4"], by_task["sums"]["source"])
    assert reason == "its answers take 2.02 times the source's tokens, and the bound is 2"
    assert row(task_tables.answer_table(by_task), variant="nvfp4")["verdict"] == f"invalid: {reason}"
    assert delta(by_task) == "invalid"
    assert task_tables.invalid(by_task["sums"]["nvfp4"], None) == []


def test_the_bounds_are_those_of_the_suite_that_a_run_was_made_with() -> None:
    strict = {**AUDIT, "empty_share": 0.0}
    items = partly(1, 4, {"empty": True})
    assert task_tables.invalid(tasks_record("source", items), None) == []
    assert len(task_tables.invalid(tasks_record("source", items, audit=strict), None)) == 1


def test_token_inflation_is_a_ratio_of_sums_over_documents() -> None:
    rng = np.random.default_rng(4)
    before, after = rng.integers(1, 200, (2, 15)), rng.integers(1, 200, (2, 15))  # [repetitions, documents]

    def items(counts: Any) -> list[dict[str, Any]]:
        return [
            answer(doc_id, 1.0, num_tokens=count, repetition=turn)
            for turn, ones in enumerate(counts.tolist())
            for doc_id, count in enumerate(ones)
        ]

    frame = task_tables.answer_table(pair(items(before), items(after)))
    assert row(frame, variant="source")["token_inflation_ratio"] is None
    found = row(frame, variant="nvfp4")["token_inflation_ratio"]
    assert found.value == pytest.approx(after.sum() / before.sum())
    assert found == stats.paired_sum_ratio(after.sum(axis=0).tolist(), before.sum(axis=0).tolist())


def test_tokens_are_compared_over_the_items_that_both_have() -> None:
    source = [answer(0, 1.0, num_tokens=10), answer(1, 1.0, num_tokens=1000)]
    variant = [answer(0, 1.0, num_tokens=15), answer(2, 1.0, num_tokens=1)]
    found = row(task_tables.answer_table(pair(source, variant)), variant="nvfp4")["token_inflation_ratio"]
    assert (found.value, found.num) == (1.5, 1)
    apart = pair([answer(0, 1.0)], [answer(1, 1.0)])
    assert row(task_tables.answer_table(apart), variant="nvfp4")["token_inflation_ratio"] is None


def test_tokens_of_choices_do_not_thin_out_those_of_answers() -> None:
    def mixed(num_tokens: int) -> list[dict[str, Any]]:
        return [answer(0, 1.0, num_tokens=num_tokens), choice(0, 1, task="facts", num_tokens=1000)]

    found = row(task_tables.answer_table(pair(mixed(10), mixed(30))), variant="nvfp4")
    assert found["token_inflation_ratio"].value == 3 and found["tokens_per_answer"] == 30
    assert found["verdict"].startswith("invalid") and found["num_items"] == 1


def test_documents_of_two_tasks_are_two_observations_of_tokens() -> None:
    def group(num_tokens: int) -> list[dict[str, Any]]:
        return [answer(0, 1.0, num_tokens=num_tokens, task=task) for task in ("easy", "hard")]

    found = row(task_tables.answer_table(pair(group(10), group(15))), variant="nvfp4")["token_inflation_ratio"]
    assert (found.value, found.num) == (1.5, 2)


def test_a_source_that_said_nothing_gives_no_ratio() -> None:
    by_task = pair(answered([0, 0], num_tokens=0), answered([1, 1]))
    assert row(task_tables.answer_table(by_task), variant="nvfp4")["token_inflation_ratio"] is None


def test_an_answer_costs_its_tokens_and_seconds_per_correct_one() -> None:
    items = [
        answer(0, 1.0, num_tokens=10, seconds=1.0),
        answer(1, 0.0, num_tokens=30, seconds=2.5),
        answer(2, 0.5, num_tokens=20, seconds=0.25),
    ]
    cells = row(task_tables.answer_table({"sums": {"source": tasks_record("source", items)}}), variant="source")
    assert cells["tokens_per_answer"] == 20
    assert cells["tokens_per_correct"] == pytest.approx(60 / 1.5)
    assert cells["seconds_per_correct"] == pytest.approx(3.75 / 1.5)
    assert cells["num_items"] == 3


def test_the_score_of_completed_answers_leaves_out_those_that_were_cut_off() -> None:
    cut: dict[str, Any] = {"finish_reasons": ["length"]}
    items = [answer(0, 1.0), answer(1, 0.0), answer(2, 0.0, **cut), answer(3, 1.0, **cut), answer(4, 1.0)]
    cells = row(task_tables.answer_table({"sums": {"source": tasks_record("source", items)}}), variant="source")
    assert cells["completed_score"] == pytest.approx(2 / 3)
    none = tasks_record("source", partly(2, 2, cut))
    cells = row(task_tables.answer_table({"sums": {"source": none}}), variant="source")
    assert cells["completed_score"] is None and cells["cap_hit_share"] == 1


def test_without_a_correct_answer_nothing_has_a_price() -> None:
    cells = row(
        task_tables.answer_table({"sums": {"source": tasks_record("source", answered([0, 0]))}}), variant="source"
    )
    assert cells["tokens_per_correct"] is None and cells["seconds_per_correct"] is None
    assert cells["completed_score"] == 0 and cells["tokens_per_answer"] == 10


def test_correct_is_what_the_first_metric_of_each_task_counts() -> None:
    items = [
        answer(0, outcomes={"exact_match,a": 1.0, "other,a": 0.0}, task="a"),
        answer(0, outcomes={"f1,b": 0.5, "exact_match,a": 0.0}, task="b"),
    ]
    cells = row(task_tables.answer_table({"sums": {"source": tasks_record("source", items)}}), variant="source")
    assert cells["completed_score"] == 0.75 and cells["tokens_per_correct"] == pytest.approx(20 / 1.5)


@pytest.mark.parametrize("outcomes", [{}, {"bleu,none": [1.0, 2.0]}])
def test_answers_that_have_no_score_of_their_own_are_neither_right_nor_wrong(outcomes: dict[str, Any]) -> None:
    items = [answer(doc_id, outcomes=outcomes) for doc_id in range(2)]
    record = tasks_record("source", items, [result(12.5, metric="bleu,none")])
    cells = row(task_tables.answer_table({"sums": {"source": record}}), variant="source")
    assert (cells["completed_score"], cells["tokens_per_correct"], cells["seconds_per_correct"]) == (None, None, None)
    assert cells["tokens_per_answer"] == 10


def test_a_run_of_choices_has_no_audit() -> None:
    facts = {name: tasks_record(name, [choice(0, 1), choice(1, 0)]) for name in ("source", "nvfp4")}
    assert not task_tables.answer_table({"facts": facts})
    assert task_tables.invalid(facts["nvfp4"], facts["source"]) == []
    both = task_tables.answer_table({"facts": facts, **pair(answered([1]), answered([1]))})
    assert set(both["task"]) == {"sums"} and list(both["variant"]) == ["source", "nvfp4"]


# -- Which runs speak, and how it is laid out --------------------------------------------------------------------


def test_the_newest_whole_run_speaks_for_each_task_and_row() -> None:
    def run(variant: str, task: str, day: int, **header: Any) -> Record:
        started = f"2026-01-{day:02}T00:00:00Z"
        fields = {"dataset": {**TASK, "name": task}, "started_utc": started, "run_id": f"{day:08}"}
        return tasks_record(variant, answered([1, 0]), **{**fields, **header})

    def limited(record: Record) -> Record:
        coverage = {"expected": 100, "done": record.end.num_samples}
        return replace(record, end=replace(record.end, coverage=coverage))

    old, new = run("source", "sums", 1), run("source", "sums", 2)
    facts, variant, setup = run("source", "facts", 1), run("nvfp4", "sums", 1), run("nvfp4+mtp1", "sums", 1)
    records = [
        setup,
        new,
        limited(run("source", "sums", 3)),
        run("source", "sums", 4, suite={"name": "other", "audit": AUDIT}),
        run("source", "unknown", 5),
        run("source", "sums", 6, dataset=None),
        run("gone", "sums", 7),
        facts,
        variant,
        old,
    ]
    found = task_tables.newest_by_task(records, SUITE, ("source", "nvfp4", "a16", "nvfp4+mtp1"))
    assert found == {"sums": {"source": new, "nvfp4": variant, "nvfp4+mtp1": setup}, "facts": {"source": facts}}
    assert list(found) == ["sums", "facts"] and list(found["sums"]) == ["source", "nvfp4", "nvfp4+mtp1"]
    assert task_tables.newest_by_task(records, SUITE, ("a16",)) == {}


def test_a_run_says_how_many_of_its_answers_are_of_earlier_ones() -> None:
    by_task = {
        "sums": {
            "source": tasks_record("source", answered([1] * 1200), num_reused=1100),
            "nvfp4": tasks_record("nvfp4", answered([1])),
        },
        "facts": {"nvfp4": tasks_record("nvfp4", [choice(0, 1), choice(1, 1)], num_reused=2)},
    }
    assert list(runs.reused(by_task, "answers")) == [
        "source, sums: 1,100 of 1,200 answers are of earlier runs.",
        "nvfp4, facts: 2 of 2 answers are of earlier runs.",
    ]


def test_the_store_takes_these_records_as_they_are(tmp_path: Path) -> None:
    record = tasks_record("source", [*answered([1, 0]), choice(2, 1)])
    run = make_run("tasks", engine=ENGINE, dataset=TASK, suite=record.run.suite)
    with RunWriter(tmp_path, run) as writer:
        for sample in record.samples:
            writer.sample(sample)
        stored = read(writer.finish())
    assert stored.samples == record.samples
    frames = [task_tables.score_table({"sums": {"source": one}}) for one in (record, stored)]
    assert tables.json_rows(frames[0].without("run")) == tables.json_rows(frames[1].without("run"))


def test_tables_say_what_was_measured_in_words_and_figures() -> None:
    by_task = pair(answered([1, 1, 1, 0]), answered([1, 0, 1, 0], num_tokens=15))
    scores, audit = (
        tables.terminal_table(task_tables.score_table(by_task)),
        tables.terminal_table(task_tables.answer_table(by_task)),
    )
    assert scores.splitlines()[0] == "task sums · items 4 · repetitions 1"
    for figure in ("0.7500", "0.5000", "-0.2500 [", "1 / 0", "0.2500", METRIC):
        assert figure in scores
    for figure in ("1.500", "0.0 %", "10.0", "15.0", "30.0", "13.3", "valid"):
        assert figure in audit


def test_a_refusal_stands_in_the_table_in_its_own_words() -> None:
    by_task = pair(answered([1, 1]), answered([1]))
    assert "incomparable: items" in tables.terminal_table(task_tables.score_table(by_task))
    assert table_cells(tables.markdown_table(task_tables.score_table(by_task), link), "Δ to source [95 %]") == [
        "—",
        "incomparable: items",
    ]


def test_names_that_would_break_a_table_are_escaped() -> None:
    hostile = "a|b\n*c* <d> [e](f) _g_ h_i `j`"
    literal = r"a\|b \*c\* \<d\> \[e\](f) \_g\_ h_i \`j\`"
    items = [
        answer(doc_id, outcomes={f"{hostile},none": score}, task=task)
        for task in (hostile, "plain")
        for doc_id, score in enumerate([1.0, 0.0])
    ]
    records = {name: tasks_record(name, items, engine={**ENGINE, "served_as": hostile}) for name in ("source", "nvfp4")}
    frame = task_tables.score_table({hostile: records})
    text = tables.markdown_table(frame, link)
    assert table_cells(text, "task") == [*[f"{literal}: {literal}", f"{literal}: plain"] * 2, "all tasks"]
    assert table_cells(text, "metric") == [*[f"{literal},none"] * 4, "mean of 2"]
    assert table_cells(text, "served as") == [*[literal] * 4, "—"]
    assert sum(line.startswith("|") for line in text.splitlines()) == 2 + 4 + 1  # heading, rule, rows
    alone = tables.markdown_table(task_tables.answer_table({hostile: records}), link)
    assert alone.splitlines()[0] == f"task {literal} · items 4"
    for record in records.values():
        assert f"[{record.run.run_id}](../{record.path.name})" in text and f"({link(record)})" in alone
    for one in (frame, task_tables.answer_table({hostile: records})):
        assert hostile.split("\n")[0] in tables.terminal_table(one)


def test_rows_are_json_with_estimates_as_objects() -> None:
    by_task = pair(answered([1, 1]), answered([1, 0]))
    for frame in (task_tables.score_table(by_task), task_tables.answer_table(by_task)):
        rows = tables.json_rows(frame)
        assert json.loads(json.dumps(rows)) == rows
    assert set(tables.json_rows(task_tables.score_table(by_task))[1]["delta_score"]) >= {"value", "low", "high", "num"}


def test_no_records_give_empty_tables() -> None:
    assert not task_tables.score_table({}) and not task_tables.answer_table({})
    assert list(runs.reused({}, "answers")) == []
