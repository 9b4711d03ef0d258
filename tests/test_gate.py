"""The gate: a rule passes or fails on evidence, says what would decide where there is none, and compares nothing that
is not comparable. The verdicts of hand-made records are those of arithmetic."""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from zlib import crc32

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from harness.cli import main
from harness.errors import UserError
from harness.record import baselines, stats
from harness.record.run import Record, Skipped
from harness.record.store import RunWriter
from harness.report import gate
from harness.report.gate import Judgement
from harness.suite.load import load
from harness.suite.rules import METRICS
from harness.suite.schema import Suite
from tests.records import (
    DATASET,
    ENGINE,
    FIDELITY,
    TASK,
    VERIFY,
    answer,
    choice,
    decodes,
    fidelity_record,
    fidelity_windows,
    make_record,
    mean_results,
    prefills,
    tasks_record,
    windows,
)

Rule = dict[str, Any]
Change = dict[str, Any]

SUITE = """
name = "demo"
title = "A demo"
{rules}
[source]
location = "demo:dense"
[variants.nvfp4]
recipe = "rtn-a16"
[variants.w4a4]
recipe = "w4a4"
[setups.kv-fp8]
kv_cache_dtype = "fp8"
[ppl]
protocols = ["wikitext2-512", "llamacpp-512"]
text = {{ demo = "heldout" }}
[fidelity]
text = {{ demo = "heldout" }}
[bench]
text = {{ demo = "heldout" }}
prompt_tokens = 128
new_tokens = 128
batch_sizes = [1, 4]
[tasks.sums]
task = "demo:arithmetic"
[tasks.words]
task = "demo:agreement"
"""
LOSS: Rule = {"metric": "log_ppl", "variant": "nvfp4", "margin": 0.01}
SCORE: Rule = {"metric": "score", "variant": "nvfp4", "task": "sums", "margin": 0.03}
SPEED: Rule = {"metric": "decode_speed", "variant": "nvfp4", "margin": 0.05}
KL: Rule = {"metric": "kl", "variant": "nvfp4", "margin": 0.01}


def text_of(*rules: Rule, without: str = "") -> str:
    """The suite file with these rules; `without` a table and everything after it up to an empty line."""
    written = ", ".join(
        "{" + ", ".join(f"{key} = {json.dumps(value)}" for key, value in rule.items()) + "}" for rule in rules
    )
    text = SUITE.format(rules=f"gate = [{written}]" if rules else "")
    return text.replace(without, "[audit]\n") if without else text


def suite_of(place: Path, *rules: Rule) -> Suite:
    path = place / "suite.toml"
    path.write_text(text_of(*rules))
    return load(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gate")


def judged(place: Path, rule: Rule, *records: Record, baseline: Sequence[Record] = ()) -> Judgement:
    """The verdict on one rule."""
    slots: dict[str, dict[str, Record]] = {}
    for record in baseline:
        slots.setdefault(baselines.slot(record), {})[record.run.variant["name"]] = record
    (judgement,) = gate.judge(suite_of(place, rule), records, slots)
    return judgement


def ppl(variant: str, loss: float = 0.0, noise: float = 0.0, num_windows: int = 20, **header: Any) -> Record:
    """Windows that lose `loss` nats per token on average, half of them `noise` more and half `noise` less, in an order
    without a pattern."""
    signs = random.Random(0).sample([-1, 1], k=num_windows, counts=[num_windows // 2, num_windows - num_windows // 2])
    spread = [loss + noise * sign for sign in signs]
    return make_record("ppl", variant, windows(8.0, spread, num_tokens=512 * num_windows), **header)


def scored(variant: str, scores: Sequence[float], label: str = "sums", **header: Any) -> Record:
    items = [choice(doc_id, score) for doc_id, score in enumerate(scores)]
    run_id = f"{crc32(f'{variant} {label}'.encode()):08x}"
    return tasks_record(variant, items, **{"dataset": {**TASK, "name": label}, "run_id": run_id, **header})


def pair_of_scores(num: int, num_lost: int, num_won: int = 0, label: str = "sums") -> list[Record]:
    """The source solves all but `num_won` of the items, the variant all but the `num_lost` first."""
    before = [1.0] * (num - num_won) + [0.0] * num_won
    after = [0.0] * num_lost + [1.0] * (num - num_lost)
    return [scored("source", before, label), scored("nvfp4", after, label)]


def headed(record: Record, **header: Any) -> Record:
    """The record with other fields in its header."""
    return replace(record, run=replace(record.run, **header))


def in_starts(samples: list[dict[str, Any]], num: int = 4) -> list[dict[str, Any]]:
    """The repetitions shared out to several starts of the engine."""
    return [{**sample, "start": sample["repetition"] % num} for sample in samples]


def timed(variant: str, seconds: float, spread: float = 0.01, prefill: float = 0.25, **header: Any) -> Record:
    times = in_starts(decodes(seconds, repetitions=8, spread=spread)) + in_starts(prefills(prefill, 8))
    for sample in times:
        sample["prefill_seconds"] *= 1 + 0.001 * sample["start"]
    return make_record("bench", variant, times, **header)


# -- Rules in a suite --------------------------------------------------------------------------------------------


def test_a_rule_is_read_with_what_it_leaves_open_filled_in(place: Path) -> None:
    rules = suite_of(place, LOSS, {**SCORE, "versus": "w4a4"}, SPEED, {"metric": "verify", "variant": "w4a4"}).gate
    assert [(rule.versus, rule.protocol, rule.task, rule.batch) for rule in rules] == [
        ("source", "wikitext2-512", None, None),
        ("w4a4", None, "sums", None),
        ("source", None, None, 1),
        (None, None, None, None),
    ]
    assert rules[0].margin == 0.01 and rules[3].margin is None


def test_rules_are_part_of_the_resolved_suite_and_its_digest(place: Path) -> None:
    one, other = suite_of(place, LOSS), suite_of(place, {**LOSS, "margin": 0.02})
    assert one.resolved()["gate"][0]["margin"] == 0.01 and one.digest != other.digest


@pytest.mark.parametrize(
    ("rule", "problem", "remedy"),
    [
        ({**LOSS, "metric": "log_pl"}, "'gate[0].metric' must be one of log_ppl, kl,", ""),
        ({**LOSS, "variant": "nvpf4"}, "'gate[0].variant' names 'nvpf4'", "Did you mean 'nvfp4'?"),
        ({**LOSS, "versus": "w4a5"}, "'gate[0].versus' is 'w4a5'", "Did you mean 'w4a4'?"),
        ({**LOSS, "versus": "nvfp4"}, "'gate[0].versus' is 'nvfp4'", "Known: baseline"),
        ({**LOSS, "variant": "source"}, "'gate[0].versus' is 'source'", "Known: baseline."),
        ({**LOSS, "variant": "source", "versus": "w4a4"}, "'gate[0].versus' is 'w4a4'", "Known: baseline."),
        ({**KL, "variant": "source", "versus": "baseline"}, "'gate[0].versus' is 'baseline'", "Name a variant."),
        ({**SPEED, "versus": "baseline"}, "'gate[0].versus' is 'baseline'", "Known: nvfp4"),
        ({"metric": "log_ppl", "variant": "nvfp4"}, "'gate[0].margin' is missing", "0.01 (nats)"),
        ({**LOSS, "margin": -0.01}, "'gate[0].margin' is -0.01", "at least 0"),
        ({**SCORE, "margin": 3.0}, "'gate[0].margin' is 3, and a share is below 1", "0.03 for three points"),
        ({**LOSS, "protocol": "wikitext2-51"}, "'gate[0].protocol' is wikitext2-51", "'wikitext2-512'"),
        ({**LOSS, "task": "sums"}, "'gate[0].task' is set, and log_ppl has none", "Leave it out"),
        ({**SCORE, "task": "sum"}, "'gate[0].task' is sum", "'sums'"),
        ({**SPEED, "batch": 2}, "'gate[0].batch' is 2", "Known: 1, 4."),
        ({**SPEED, "batch": 0}, "'gate[0].batch' must be at least 1", ""),
        ({"metric": "verify", "variant": "nvfp4", "margin": 0.1}, "'gate[0].margin' is set", "Leave it out"),
        ({"metric": "arithmetic", "variant": "nvfp4", "versus": "w4a4"}, "'gate[0].versus' is set", "Leave it out"),
        ({"metric": "verify", "variant": "source"}, "'gate[0].variant' names 'source'", "Known: nvfp4, w4a4."),
        ({**LOSS, "magrin": 0.1}, "unknown key 'gate[0].magrin'", "'margin'"),
    ],
)
def test_a_rule_that_means_nothing_is_refused_when_the_suite_is_read(
    place: Path, rule: Rule, problem: str, remedy: str
) -> None:
    with pytest.raises(UserError) as refused:
        suite_of(place, rule)
    assert problem in refused.value.problem and "suite.toml" in refused.value.problem
    assert remedy in refused.value.remedy


@pytest.mark.parametrize(
    ("rule", "table"),
    [
        (LOSS, '[ppl]\nprotocols = ["wikitext2-512", "llamacpp-512"]\ntext = { demo = "heldout" }\n'),
        (KL, '[fidelity]\ntext = { demo = "heldout" }\n'),
    ],
)
def test_a_rule_about_what_the_suite_does_not_measure_is_refused(tmp_path: Path, rule: Rule, table: str) -> None:
    path = tmp_path / "suite.toml"
    path.write_text(text_of(rule, without=table))
    with pytest.raises(UserError, match=rf"the suite has no {table.split(']')[0]}\] table".replace("[", r"\[")):
        load(path)


def test_a_gain_may_be_asked_for_against_another_variant_and_in_speed(place: Path) -> None:
    rules = suite_of(place, {**LOSS, "versus": "w4a4", "margin": -0.01}, {**SPEED, "margin": -0.5}).gate
    assert [rule.margin for rule in rules] == [-0.01, -0.5]


def test_no_variant_may_be_called_baseline(tmp_path: Path) -> None:
    path = tmp_path / "suite.toml"
    path.write_text(text_of().replace("[variants.w4a4]", "[variants.baseline]"))
    with pytest.raises(UserError, match="must not use 'baseline'"):
        load(path)


def test_every_metric_has_a_judge() -> None:
    assert set(gate._JUDGES) == set(METRICS)


def test_a_suite_without_rules_is_told_so(place: Path) -> None:
    with pytest.raises(UserError, match=r"has no \[\[gate\]\] rules"):
        gate.judge(suite_of(place), [], {})


# -- Verdicts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "noise", "verdict"),
    [
        (0.0, 0.001, "pass"),
        (0.008, 0.001, "pass"),
        (0.012, 0.001, "fail"),
        (0.012, 0.1, "inconclusive"),
        (0.008, 0.1, "inconclusive"),
        (-0.05, 0.001, "pass"),
    ],
)
def test_a_loss_is_judged_by_its_interval_and_the_margin(place: Path, loss: float, noise: float, verdict: str) -> None:
    judgement = judged(place, LOSS, ppl("source"), ppl("nvfp4", loss, noise))
    assert judgement.verdict == verdict and judgement.units == "windows"
    assert judgement.loss is not None and judgement.loss.value == pytest.approx(loss, abs=1e-9)
    reach = scipy_stats.t.isf(0.025, 19) * noise / math.sqrt(19)
    assert judgement.loss.high == pytest.approx(loss + reach, rel=0.05, abs=1e-9)


def test_a_loss_that_is_certain_and_small_is_no_failure(place: Path) -> None:
    judgement = judged(place, LOSS, ppl("source"), ppl("nvfp4", 0.005, 0.0001))
    assert judgement.loss is not None and judgement.loss.low is not None and judgement.loss.low > 0.004
    assert judgement.verdict == "pass"


@settings(max_examples=20)
@given(
    st.lists(st.floats(-0.1, 0.1), min_size=2, max_size=12),
    st.lists(st.floats(0, 0.2), min_size=2, max_size=4).map(sorted),
)
def test_who_passes_at_a_margin_passes_at_every_larger_one(
    place: Path, losses: list[float], margins: list[float]
) -> None:
    records = [
        make_record("ppl", "source", windows(8.0, num_tokens=512 * len(losses))),
        make_record("ppl", "nvfp4", windows(8.0, losses, num_tokens=512 * len(losses))),
    ]
    rank = {"fail": 0, "inconclusive": 1, "pass": 2}
    ranks = [rank[judged(place, {**LOSS, "margin": margin}, *records).verdict] for margin in margins]
    assert ranks == sorted(ranks)


@pytest.mark.parametrize("loss", [0.008, 0.013])
def test_the_n_that_would_decide_decides(place: Path, loss: float) -> None:
    judgement = judged(place, LOSS, ppl("source"), ppl("nvfp4", loss, 0.05))
    assert judgement.verdict == "inconclusive" and judgement.num_needed is not None
    assert f"{judgement.num_needed:,} windows would decide" in judgement.reason
    more = 2 * math.ceil(0.75 * judgement.num_needed)
    decided = judged(place, LOSS, ppl("source", num_windows=more), ppl("nvfp4", loss, 0.05, num_windows=more))
    assert decided.verdict == ("pass" if loss < 0.01 else "fail")
    fewer = 2 * (judgement.num_needed // 4)
    undecided = judged(place, LOSS, ppl("source", num_windows=fewer), ppl("nvfp4", loss, 0.05, num_windows=fewer))
    assert undecided.verdict == "inconclusive"


def test_neighbouring_windows_of_one_article_are_not_so_many_pieces_of_evidence(place: Path) -> None:
    articles = [0.0, 0.004, 0.016, 0.001, 0.015, 0.002, 0.014, 0.003, 0.013, 0.001, 0.012, 0.003]
    losses = [loss for loss in articles for _ in range(10)]
    records = [
        make_record("ppl", variant, windows(8.0, noise, num_tokens=512 * 120))
        for variant, noise in (("source", [0.0]), ("nvfp4", losses))
    ]
    judgement = judged(place, {**LOSS, "margin": 0.009}, *records)
    assert judgement.loss is not None and judgement.loss.num == 120
    interval = scipy_stats.ttest_1samp(articles, 0).confidence_interval(0.95)
    assert judgement.loss.high == pytest.approx(interval.high, rel=0.05)
    assert scipy_stats.ttest_1samp(losses, 0).confidence_interval(0.95).high < 0.009
    assert judgement.verdict == "inconclusive"


def test_an_older_run_does_not_speak_for_one_that_failed_or_was_cut_since(place: Path) -> None:
    old = [ppl("source"), ppl("nvfp4", 0.001, 0.001)]
    newer = ppl("nvfp4", started_utc="2026-03-02T12:00:00Z")
    for skipped, verdict in (
        (Skipped(newer.path, "line 3 is cut"), "incomparable"),
        (Skipped(newer.path, "it failed", replace(newer, end=replace(newer.end, status="failed"))), "incomparable"),
        (Skipped(newer.path, "stopped", replace(newer, end=replace(newer.end, status="interrupted"))), "pass"),
        (Skipped(ppl("w4a4", started_utc="2026-03-02T12:00:00Z").path, "it is another variant's"), "pass"),
        (Skipped(ppl("nvfp4", started_utc="2026-02-28T12:00:00Z").path, "it is older"), "pass"),
    ):
        (judgement,) = gate.judge(suite_of(place, LOSS), old, {}, [skipped])
        assert judgement.verdict == verdict, skipped.reason


def test_runs_of_two_checkpoints_are_not_taken_for_one(place: Path) -> None:
    rebuilt = {"name": "nvfp4", "recipe": "rtn-a16", "artifact_digest": "9" * 64}
    verified = make_record("verify", "nvfp4", VERIFY, started_utc="2026-03-02T12:00:00Z")
    verified = replace(verified, run=replace(verified.run, variant=rebuilt))
    judgement = judged(place, LOSS, ppl("source"), ppl("nvfp4", 0.001, 0.001), verified)
    assert judgement.verdict == "incomparable"
    assert "is of another checkpoint (33333333) than run" in judgement.reason


def test_one_window_has_no_interval(place: Path) -> None:
    judgement = judged(place, LOSS, ppl("source", num_windows=1), ppl("nvfp4", 0.001, num_windows=1))
    assert (judgement.verdict, judgement.num_needed) == ("inconclusive", 2)
    assert judgement.reason == "there is no interval from 1 of the windows; 2 would give one"


@pytest.mark.parametrize("num_windows", [1, 3])
def test_identical_numbers_pass_without_an_interval_and_say_so(place: Path, num_windows: int) -> None:
    rule = {**LOSS, "margin": 0.0}
    judgement = judged(place, rule, *(ppl(name, num_windows=num_windows) for name in ("source", "nvfp4")))
    assert (judgement.verdict, judgement.reason) == ("pass", "the same numbers in all windows")


def test_the_newest_whole_run_of_each_variant_is_judged(place: Path) -> None:
    bad = ppl("nvfp4", 0.5, 0.001, started_utc="2026-03-01T10:00:00Z", run_id="11111111")
    part = ppl("nvfp4", 0.5, 0.001, started_utc="2026-03-01T13:00:00Z", run_id="22222222")
    part = replace(part, end=replace(part.end, coverage={"expected": 99, "done": 20}))
    good = ppl("nvfp4", 0.001, 0.001)
    judgement = judged(place, LOSS, ppl("source"), bad, good, part)
    assert judgement.verdict == "pass" and judgement.runs == (good.run.run_id, ppl("source").run.run_id)


def test_another_protocol_is_another_number(place: Path) -> None:
    other = {**DATASET, "protocol": "llamacpp-512"}
    records = [ppl("source"), ppl("nvfp4", 0.001, 0.0005)]
    records += [
        ppl("source", dataset=other, run_id="11111111"),
        ppl("nvfp4", 0.5, 0.001, dataset=other, run_id="22222222"),
    ]
    assert judged(place, LOSS, *records).verdict == "pass"
    assert judged(place, {**LOSS, "protocol": "llamacpp-512"}, *records).verdict == "fail"


def test_words_are_the_unit_of_a_protocol_over_documents(place: Path) -> None:
    documents = {"num_words": [300] * 6, "num_tokens": [511] * 6}
    dataset = {**DATASET, "documents": documents, "unit": "word"}

    def record(variant: str, loss: float) -> Record:
        losses = [loss + 0.0001 * index for index in range(6)]
        pieces = [{**one, "document": one["index"]} for one in windows(8.0, losses, num_tokens=512 * 6)]
        return make_record("ppl", variant, pieces, dataset=dataset)

    judgement = judged(place, {**LOSS, "margin": 0.1}, record("source", 0.0), record("nvfp4", 0.01))
    assert judgement.loss is not None and (judgement.units, judgement.loss.num) == ("documents", 6)
    shift = sum(0.01 + 0.0001 * index for index in range(6)) - sum(0.0001 * index for index in range(6))
    assert judgement.loss.value == pytest.approx(shift / 6 * 511 / 300)


# -- Fidelity ----------------------------------------------------------------------------------------------------


def test_divergence_from_the_source_is_the_mean_over_tokens(place: Path) -> None:
    record = fidelity_record("nvfp4", fidelity_windows([0.004, 0.006] * 10))
    judgement = judged(place, KL, record)
    assert judgement.loss is not None and judgement.loss.value == pytest.approx(0.005)
    assert judgement.verdict == "pass" and judgement.runs == (record.run.run_id,)
    assert judged(place, {**KL, "margin": 0.004}, record).verdict == "fail"


def test_divergence_against_another_variant_is_the_paired_difference(place: Path) -> None:
    mine = fidelity_record("nvfp4", fidelity_windows([0.0141, 0.1059] * 10))
    other = fidelity_record("w4a4", fidelity_windows([0.004, 0.096] * 10))
    judgement = judged(place, {**KL, "versus": "w4a4", "margin": 0.011}, mine, other)
    assert judgement.loss is not None and judgement.loss.value == pytest.approx(0.01)
    assert judgement.verdict == "pass"  # what is hard in both windows cancels
    assert judged(place, {**KL, "margin": 0.06}, mine).verdict == "inconclusive"


def test_other_top_tokens_are_a_share_of_all_places(place: Path) -> None:
    rule = {"metric": "top1", "variant": "nvfp4", "margin": 0.02}
    samples = fidelity_windows([0.001] * 8, agreed=0.95)
    samples[0]["num_agreed"] -= 4  # windows that are all alike leave nothing to draw from
    record = fidelity_record("nvfp4", samples)
    judgement = judged(place, rule, record)
    assert judgement.loss is not None and judgement.loss.value == pytest.approx(0.05, abs=0.002)
    assert judgement.verdict == "fail"


def test_no_divergence_at_all_passes(place: Path) -> None:
    judgement = judged(place, {**KL, "margin": 0.0}, fidelity_record("nvfp4", fidelity_windows([0.0])))
    assert (judgement.verdict, judgement.reason) == ("pass", "the same numbers in all windows")


# -- Scores ------------------------------------------------------------------------------------------------------


def test_flips_of_right_and_wrong_are_judged_by_the_interval_of_paired_shares(place: Path) -> None:
    judgement = judged(place, SCORE, *pair_of_scores(1000, num_lost=80, num_won=10))
    assert judgement.loss == stats.paired_share_difference(10, 80, 1000)
    assert judgement.loss.value == pytest.approx(0.07) and judgement.verdict == "fail"
    assert "acc,none" in judgement.reason and judgement.units == "documents"


@pytest.mark.parametrize(("num", "verdict"), [(20, "inconclusive"), (1000, "pass")])
def test_answers_that_are_all_alike_pass_only_where_there_are_enough(place: Path, num: int, verdict: str) -> None:
    judgement = judged(place, SCORE, *pair_of_scores(num, 0))
    assert judgement.verdict == verdict and judgement.loss is not None and judgement.loss.value == 0
    if verdict == "inconclusive":
        assert judgement.num_needed is not None and 20 < judgement.num_needed < 1000


def test_scores_between_right_and_wrong_are_drawn_by_document(place: Path) -> None:
    before = [0.5 + 0.01 * (index % 7) for index in range(60)]
    after = [score - 0.1 + 0.001 * (index % 5) for index, score in enumerate(before)]
    judgement = judged(place, SCORE, scored("source", before), scored("nvfp4", after))
    assert judgement.loss is not None and judgement.loss.value == pytest.approx(0.098)
    assert judgement.loss.method.startswith("paired percentile bootstrap") and judgement.verdict == "fail"
    same = judged(place, SCORE, scored("source", before), scored("nvfp4", before))
    assert same.verdict == "inconclusive" and same.loss == stats.paired_share_difference(0, 0, 60)


def test_repetitions_of_a_document_are_one_piece_of_evidence(place: Path) -> None:
    def record(variant: str, lost: int) -> Record:
        items = [
            choice(doc_id, float(doc_id >= lost), repetition=repetition)
            for repetition in range(10)
            for doc_id in range(20)
        ]
        return tasks_record(variant, items)

    judgement = judged(place, SCORE, record("source", 0), record("nvfp4", 2))
    assert judgement.loss is not None and judgement.loss.num == 20 and judgement.loss.value == pytest.approx(0.1)
    assert judgement.verdict == "inconclusive"


def test_of_a_metric_that_is_better_low_more_is_a_loss(place: Path) -> None:
    records = []
    for variant, wrong in (("source", 0), ("nvfp4", 100)):
        items = [choice(doc_id, float(doc_id < wrong)) for doc_id in range(1000)]
        results = [{**one, "higher_is_better": False} for one in mean_results(items)]
        records.append(tasks_record(variant, items, results))
    judgement = judged(place, SCORE, *records)
    assert judgement.verdict == "fail" and judgement.loss is not None and judgement.loss.value == pytest.approx(0.1)


def test_an_unknown_direction_is_said(place: Path) -> None:
    records = []
    for variant in ("source", "nvfp4"):
        items = [choice(doc_id, 1.0) for doc_id in range(300)]
        results = [{**one, "higher_is_better": None} for one in mean_results(items)]
        records.append(tasks_record(variant, items, results))
    assert "taken to be better high" in judged(place, SCORE, *records).reason


def test_only_a_mean_over_items_is_judged(place: Path) -> None:
    records = []
    for variant in ("source", "nvfp4"):
        items = [choice(doc_id, 1.0) for doc_id in range(4)]
        records.append(tasks_record(variant, items, [{**one, "value": 0.3} for one in mean_results(items)]))
    judgement = judged(place, SCORE, *records)
    assert (judgement.verdict, judgement.reason) == ("incomparable", "acc,none is no mean over items")


ALL = {key: value for key, value in SCORE.items() if key != "task"}


def test_all_tasks_together_are_their_mean(place: Path) -> None:
    records = [*pair_of_scores(1000, 20, label="sums"), *pair_of_scores(4000, 40, label="words")]
    judgement = judged(place, ALL, *records)
    assert judgement.loss is not None and judgement.loss.value == pytest.approx((0.02 + 0.01) / 2)
    # Two independent means: the root of the sum of squared standard errors, by half.
    errors = [math.sqrt(p * (1 - p) / n) for p, n in ((0.02, 1000), (0.01, 4000))]
    assert judgement.loss.high == pytest.approx(0.015 + 1.96 * math.hypot(*errors) / 2, abs=0.002)
    assert judgement.verdict == "pass" and len(judgement.runs) == 4


def test_one_task_beyond_the_margin_fails_all_of_them_and_is_named(place: Path) -> None:
    records = [*pair_of_scores(1000, 70, label="sums"), *pair_of_scores(1000, 0, 60, label="words")]
    judgement = judged(place, ALL, *records)
    assert judgement.loss is not None and judgement.loss.value < 0.01
    assert judgement.verdict == "fail" and "sums loses 0.07" in judgement.reason and "words" not in judgement.reason


def test_a_task_that_is_beyond_by_itself_may_be_chance_among_several(place: Path) -> None:
    label = pair_of_scores(1000, 44, label="sums"), pair_of_scores(1000, 0, label="words")
    alone = judged(place, {**SCORE, "margin": 0.032}, *label[0])
    assert alone.verdict == "fail" and alone.loss is not None
    p = stats.p_above(alone.loss, 0.032)
    assert p is not None and 0.0125 < p < 0.025
    assert judged(place, {**ALL, "margin": 0.032}, *label[0], *label[1]).verdict == "pass"


def test_a_missing_task_is_not_averaged_over_and_hides_no_failure(place: Path) -> None:
    missing = judged(place, ALL, *pair_of_scores(1000, 0))
    assert missing.verdict == "incomparable" and missing.loss is None
    assert missing.reason == "words: no whole run of nvfp4 (tasks/words): run `harness tasks`"
    failing = judged(place, ALL, *pair_of_scores(1000, 90))
    assert failing.verdict == "fail" and "sums loses" in failing.reason and "words: no whole run" in failing.reason


def test_a_run_of_cut_off_answers_is_no_measurement(place: Path) -> None:
    cut = [answer(doc_id, 1.0, finish_reasons=["length" if doc_id < 30 else "stop"]) for doc_id in range(100)]
    good = [answer(doc_id, 1.0) for doc_id in range(100)]
    judgement = judged(place, SCORE, tasks_record("source", good), tasks_record("nvfp4", cut))
    assert judgement.verdict == "incomparable"
    assert "is invalid: 30.0 % of the answers were cut off" in judgement.reason


# -- Speed -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("slower", "verdict"), [(1.0, "pass"), (1.2, "fail"), (0.7, "pass")])
def test_speed_lost_is_one_less_the_ratio(place: Path, slower: float, verdict: str) -> None:
    judgement = judged(place, SPEED, timed("source", 0.01), timed("nvfp4", 0.01 * slower))
    assert judgement.loss is not None and judgement.loss.value == pytest.approx(1 - 1 / slower, abs=1e-9)
    assert judgement.loss.low is not None and judgement.loss.high is not None
    assert judgement.loss.low <= judgement.loss.value <= judgement.loss.high
    assert (judgement.verdict, judgement.units) == (verdict, "starts")


def test_prefill_is_gated_by_itself(place: Path) -> None:
    records = [timed("source", 0.01), timed("nvfp4", 0.01, prefill=0.5)]
    assert judged(place, SPEED, *records).verdict == "pass"
    judgement = judged(place, {**SPEED, "metric": "prefill_speed"}, *records)
    assert judgement.verdict == "fail" and judgement.loss is not None and judgement.loss.value == pytest.approx(0.5)


def test_a_single_start_is_inconclusive_however_often_it_was_timed(place: Path) -> None:
    records = [make_record("bench", name, decodes(0.01, repetitions=20)) for name in ("source", "nvfp4")]
    judgement = judged(place, SPEED, *records)
    assert (judgement.verdict, judgement.num_needed) == ("inconclusive", 2)
    assert judgement.reason == "there is no interval from 1 of the starts; 2 would give one"


def test_starts_that_differ_are_the_noise_of_a_speed(place: Path) -> None:
    def record(variant: str, *starts: float) -> Record:
        samples = [
            {**sample, "start": start}
            for start, seconds in enumerate(starts)
            for sample in decodes(seconds, repetitions=8, spread=0.001)
        ]
        return make_record("bench", variant, samples)

    # Repetitions agree to a tenth of a percent; the second start of both is 20 % slower for one and 10 % for the other.
    judgement = judged(place, SPEED, record("source", 0.0100, 0.0120), record("nvfp4", 0.0115, 0.0125))
    assert (judgement.verdict, judgement.units) == ("inconclusive", "starts")
    assert judgement.loss is not None and judgement.loss.num == 2
    logs = [[math.log(one) for one in side] for side in ((1 / 0.0115, 1 / 0.0125), (1 / 0.0100, 1 / 0.0120))]
    interval = scipy_stats.ttest_ind(*logs).confidence_interval(0.95)
    assert judgement.loss.low == pytest.approx(1 - math.exp(interval.high), rel=0.01)
    assert judgement.loss.high == pytest.approx(1 - math.exp(interval.low), rel=0.01)


def test_a_batch_that_was_not_measured_is_named(place: Path) -> None:
    judgement = judged(place, {**SPEED, "batch": 4}, timed("source", 0.01), timed("nvfp4", 0.01))
    assert judgement.verdict == "incomparable"
    assert "has no decode of batch 4 with 128 prompt tokens and 128 new ones" in judgement.reason


def test_an_engine_that_made_fewer_tokens_than_the_suite_asks_for_is_not_compared(place: Path) -> None:
    short = make_record("bench", "nvfp4", decodes(0.01, repetitions=8, num_steps=60))
    judgement = judged(place, SPEED, timed("source", 0.01), short)
    assert judgement.verdict == "incomparable" and "and 128 new ones" in judgement.reason


# -- The checkpoint and the arithmetic ---------------------------------------------------------------------------


def finding(severity: str) -> dict[str, Any]:
    return {
        "kind": "finding",
        "severity": severity,
        "tensor": "layers.0.gate_up_proj",
        "problem": "has two scales",
        "consequence": "noise",
    }


@pytest.mark.parametrize(
    ("found", "verdict", "reason"),
    [
        ([], "pass", "nothing is found"),
        (["warning"], "pass", "no error, 1 warnings"),
        (["warning", "error", "error"], "fail", "layers.0.gate_up_proj has two scales, and 1 more"),
    ],
)
def test_a_checkpoint_with_an_error_fails(place: Path, found: list[str], verdict: str, reason: str) -> None:
    record = make_record("verify", "nvfp4", [*VERIFY, *map(finding, found)])
    judgement = judged(place, {"metric": "verify", "variant": "nvfp4"}, record)
    assert (judgement.verdict, judgement.reason, judgement.loss) == (verdict, reason, None)


SERVED = {**ENGINE, "name": "vllm", "served_as": "W4A16 by MarlinNvFp4LinearKernel"}


def test_a_weight_only_kernel_in_place_of_w4a4_fails_and_nothing_is_compared_with_it(place: Path) -> None:
    records = [
        ppl("source"),
        ppl("w4a4", engine=SERVED),
        timed("w4a4", 0.01),
        timed("source", 0.01),
        *(scored(name, [1.0] * 300, engine=SERVED if name == "w4a4" else ENGINE) for name in ("source", "w4a4")),
        fidelity_record("w4a4", fidelity_windows([0.001] * 4), engine=SERVED),
    ]
    arithmetic = judged(place, {"metric": "arithmetic", "variant": "w4a4"}, *records)
    assert arithmetic.verdict == "fail"
    for where in ("ppl/wikitext2-512", "tasks/sums", "fidelity"):
        assert f"the vllm engine served it as W4A16 by MarlinNvFp4LinearKernel ({where})" in arithmetic.reason
    assert "bench" not in arithmetic.reason
    for rule in (LOSS, KL, SCORE):
        judgement = judged(place, {**rule, "variant": "w4a4"}, *records)
        assert judgement.verdict == "incomparable"
        assert "served w4a4 as W4A16 by MarlinNvFp4LinearKernel, which is another model" in judgement.reason
    against = judged(place, {**LOSS, "versus": "w4a4"}, *records, ppl("nvfp4"))
    assert against.verdict == "incomparable" and "served w4a4" in against.reason


def test_runs_that_computed_what_the_checkpoint_says_pass(place: Path) -> None:
    rule = {"metric": "arithmetic", "variant": "w4a4"}
    assert judged(place, rule, ppl("w4a4"), timed("w4a4", 0.01)).reason == "computed as the checkpoint says in 2 runs"
    old = ppl("w4a4", engine=SERVED, started_utc="2026-03-01T10:00:00Z", run_id="11111111")
    assert judged(place, rule, old, ppl("w4a4")).verdict == "pass"
    assert judged(place, rule, ppl("nvfp4")).verdict == "incomparable"


# -- Not comparable ----------------------------------------------------------------------------------------------


def other(key: str, of: dict[str, Any] = DATASET) -> Change:
    return {"dataset": {**of, key: "f" * 64}}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (other("token_ids_sha256"), "dataset.token_ids_sha256"),
        ({"measure_version": 2}, "measure_version"),
        ({"engine": {**ENGINE, "dtype": "float32"}}, "engine.dtype"),
        ({"engine": {**ENGINE, "version": "older"}}, "engine.version"),
        ({"variant": {"name": "nvfp4", "source_digest": "0"}}, "variant.source_digest"),
    ],
)
def test_two_runs_of_different_things_are_named_and_not_compared(place: Path, change: Change, named: str) -> None:
    judgement = judged(place, LOSS, ppl("source"), headed(ppl("nvfp4"), **change))
    assert (judgement.verdict, judgement.reason) == ("incomparable", f"differing: {named}")
    assert judgement.loss is None and len(judgement.runs) == 2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (other("task_digest", TASK), "dataset.task_digest"),
        (other("tokenizer_digest", TASK), "dataset.tokenizer_digest"),
        ({"packages": {"lm_eval": "0.5"}}, "packages.lm_eval"),
    ],
)
def test_two_runs_of_different_tasks_are_named_and_not_compared(place: Path, change: Change, named: str) -> None:
    judgement = judged(place, SCORE, scored("source", [1.0] * 9), scored("nvfp4", [1.0] * 9, **change))
    assert (judgement.verdict, judgement.reason) == ("incomparable", f"differing: {named}")


def test_a_missing_run_comes_with_the_command_that_makes_it(place: Path) -> None:
    reason = "no whole run of {} ({}): run `harness {}`"
    assert judged(place, LOSS, ppl("source")).reason == reason.format("nvfp4", "ppl/wikitext2-512", "ppl")
    assert judged(place, LOSS, ppl("nvfp4")).reason == reason.format("source", "ppl/wikitext2-512", "ppl")
    assert judged(place, KL).reason == reason.format("nvfp4", "fidelity", "fidelity")
    assert judged(place, SCORE).reason == reason.format("nvfp4", "tasks/sums", "tasks")
    assert judged(place, SPEED).reason == reason.format("nvfp4", "bench", "bench")
    verify = judged(place, {"metric": "verify", "variant": "nvfp4"})
    assert (verify.verdict, verify.reason) == ("incomparable", reason.format("nvfp4", "verify", "verify"))


def test_a_run_by_another_protocol_alone_is_a_missing_one(place: Path) -> None:
    source = ppl("source", dataset={**DATASET, "protocol": "llamacpp-512"})
    assert "no whole run of source (ppl/wikitext2-512)" in judged(place, LOSS, source, ppl("nvfp4")).reason


def test_speeds_of_two_sessions_are_never_compared(place: Path) -> None:
    judgement = judged(place, SPEED, timed("source", 0.01), timed("nvfp4", 0.01, session_id="ffffffff"))
    assert (judgement.verdict, judgement.reason) == ("incomparable", "differing: session_id")


def test_other_windows_and_a_window_that_is_there_twice_are_refused(place: Path) -> None:
    assert judged(place, LOSS, ppl("source"), ppl("nvfp4", num_windows=19)).reason == "differing: windows"
    twice = [*(ones := ppl("source").samples), ones[3]]
    records = [make_record("ppl", variant, twice) for variant in ("source", "nvfp4")]
    judgement = judged(place, LOSS, *records)
    assert (judgement.verdict, judgement.reason) == ("incomparable", "differing: a window twice")
    ones = fidelity_windows([0.001] * 4)
    judgement = judged(place, KL, fidelity_record("nvfp4", [*ones, ones[3]]))
    assert (judgement.verdict, judgement.reason) == ("incomparable", "differing: a window twice")


def test_items_that_are_there_twice_and_other_prompts_are_refused(place: Path) -> None:
    items = [choice(doc_id, 1.0) for doc_id in range(4)]
    source = tasks_record("source", items)
    assert judged(place, SCORE, source, tasks_record("nvfp4", [*items, items[2]])).reason == "differing: item 2 twice"
    assert judged(place, SCORE, source, tasks_record("nvfp4", items[:3])).reason == "differing: items"
    asked_otherwise = [{**item, "prompt_sha256": "0" * 64} for item in items]
    assert judged(place, SCORE, source, tasks_record("nvfp4", asked_otherwise)).reason == "differing: prompts"


# -- Against a baseline ------------------------------------------------------------------------------------------

WATCHED: Rule = {**LOSS, "versus": "baseline"}


def test_without_a_baseline_nothing_is_passed(place: Path) -> None:
    judgement = judged(place, WATCHED, ppl("nvfp4"))
    assert judgement.verdict == "incomparable" and "--update-baseline --reason" in judgement.reason


@pytest.mark.parametrize(("loss", "verdict"), [(0.0, "pass"), (0.005, "pass"), (0.02, "fail")])
def test_a_variant_is_held_against_its_older_self(place: Path, loss: float, verdict: str) -> None:
    old = ppl("nvfp4", 0.1, started_utc="2026-01-01T12:00:00Z", run_id="0a0a0a0a")
    judgement = judged(place, WATCHED, ppl("source"), ppl("nvfp4", 0.1 + loss, 0.001), baseline=[old])
    assert judgement.verdict == verdict and judgement.runs[1] == "0a0a0a0a"
    assert "nothing was measured" not in judgement.reason


def test_the_source_is_watched_too(place: Path) -> None:
    rule = {**WATCHED, "variant": "source"}
    assert judged(place, rule, ppl("source", 0.1, 0.001), baseline=[ppl("source")]).verdict == "fail"


@pytest.mark.parametrize(
    "change",
    [
        {"engine": {**ENGINE, "version": "newer"}},
        {"engine": {**ENGINE, "device": "cuda:0"}},
        {"engine": {**ENGINE, "effective": {"cpu_capability": "AVX2", "attention_implementation": "eager"}}},
        {"machine": {"name": "another"}},
        {"session_id": "ffffffff"},
    ],
)
def test_what_a_regression_comes_from_does_not_hide_it(place: Path, change: Change) -> None:
    assert judged(place, WATCHED, ppl("nvfp4", 0.2, 0.001, **change), baseline=[ppl("nvfp4")]).verdict == "fail"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (other("token_ids_sha256"), "dataset.token_ids_sha256"),
        ({"engine": {**ENGINE, "name": "vllm"}}, "engine.name"),
        ({"engine": {**ENGINE, "dtype": "float32"}}, "engine.dtype"),
        ({"measure_version": 2}, "measure_version"),
        ({"variant": {"name": "nvfp4", "source_digest": "0"}}, "variant.source_digest"),
    ],
)
def test_a_baseline_of_something_else_is_refused(place: Path, change: Change, named: str) -> None:
    judgement = judged(place, WATCHED, headed(ppl("nvfp4"), **change), baseline=[ppl("nvfp4")])
    assert (judgement.verdict, judgement.reason) == ("incomparable", f"differing: {named}")


def test_scores_and_divergences_have_baselines_too(place: Path) -> None:
    before, after = pair_of_scores(1000, 90)
    before = scored("nvfp4", [1.0] * 1000, engine={**ENGINE, "version": "older"})
    assert judged(place, {**SCORE, "versus": "baseline"}, after, baseline=[before]).verdict == "fail"
    old = fidelity_record("nvfp4", fidelity_windows([0.001, 0.002] * 4), dataset=FIDELITY)
    new = fidelity_record("nvfp4", fidelity_windows([0.1012, 0.1018] * 4))
    judgement = judged(place, {**KL, "versus": "baseline"}, new, baseline=[old])
    assert judgement.verdict == "fail" and judgement.loss is not None
    assert judgement.loss.value == pytest.approx(0.1)


def test_a_new_baseline_takes_what_the_rules_need_and_no_more(place: Path) -> None:
    suite = suite_of(place, WATCHED, {**ALL, "versus": "baseline"}, SPEED)
    records = [ppl("source"), ppl("nvfp4"), timed("nvfp4", 0.01)]
    records += [scored("nvfp4", [1.0] * 9, label) for label in ("sums", "words")]
    chosen = gate.for_baseline(suite, records)
    assert chosen == {
        "ppl/wikitext2-512": {"nvfp4": records[1]},
        "tasks/sums": {"nvfp4": records[3]},
        "tasks/words": {"nvfp4": records[4]},
    }
    with pytest.raises(UserError, match="no baseline of nvfp4 in tasks/words to be had: no whole run of nvfp4"):
        gate.for_baseline(suite, records[:-1])
    with pytest.raises(UserError, match="No rule of suite 'demo' is against a baseline"):
        gate.for_baseline(suite_of(place, LOSS), records)


# -- Output ------------------------------------------------------------------------------------------------------

FOUR = [
    ({**LOSS, "margin": 0.05}, "pass"),
    ({**LOSS, "margin": 0.001}, "fail"),
    ({**LOSS, "margin": 0.0119}, "inconclusive"),
    (SCORE, "incomparable"),
]


def four(place: Path) -> tuple[Judgement, ...]:
    """One judgement of each kind."""
    records = [ppl("source"), ppl("nvfp4", 0.012, 0.003)]
    judgements = gate.judge(suite_of(place, *(rule for rule, _ in FOUR)), records, {})
    assert [one.verdict for one in judgements] == [verdict for _, verdict in FOUR]
    return judgements


def test_a_failure_goes_before_what_could_not_be_judged(place: Path) -> None:
    good, bad, open_, none = four(place)
    assert [gate.exit_code(ones) for ones in ([good], [good, open_], [none], [good, bad, open_, none])] == [0, 3, 3, 1]


def test_junit_has_a_case_for_every_rule_and_hides_nothing(place: Path) -> None:
    root = ElementTree.fromstring(gate.junit("demo", four(place)))
    cases = root.findall("testsuite/testcase")
    assert [[child.tag for child in case] for case in cases] == [["system-out"], ["failure"], ["failure"], ["error"]]
    kinds = [child.get("type") for case in cases[1:] for child in case]
    assert kinds == ["fail", "inconclusive", "incomparable"]
    counts = {"tests": "4", "failures": "2", "errors": "1", "skipped": "0"}
    for element in (root, root[0]):
        assert counts.items() <= element.attrib.items()
    assert {case.get("classname") for case in cases} == {"harness.gate.demo"}
    assert cases[1].get("name") == "nvfp4: log_ppl wikitext2-512 against source, margin 0.001"
    assert "would decide" in (cases[2][0].get("message") or "")


@given(st.text(max_size=40))
def test_junit_is_well_formed_whatever_a_reason_says(place: Path, reason: str) -> None:
    judgement = Judgement(suite_of(place, LOSS).gate[0], "fail", reason)
    (told,) = ElementTree.fromstring(gate.junit("demo", [judgement])).iter("failure")
    message = told.get("message") or ""
    assert len(message) == len(reason)
    assert all(back in (char, "\ufffd", " ") for char, back in zip(reason, message, strict=True))
    assert all(back == char for char, back in zip(reason, message, strict=True) if char.isprintable())


def test_the_summary_is_one_markdown_table(place: Path) -> None:
    page = gate.step_summary("demo", four(place))
    assert page.startswith("### harness gate: demo\n\n1 pass, 1 inconclusive, 1 incomparable, 1 fail\n")
    lines = [line for line in page.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 4 and len({line.count(" | ") for line in lines[:1] + lines[2:]}) == 1
    assert "| +0.012 [+0.01" in lines[2] and "+0.05 |" in lines[2] and "20 windows" in lines[2]


# -- The command -------------------------------------------------------------------------------------------------


def keep(folder: Path, *records: Record) -> None:
    for record in records:
        with RunWriter(folder, record.run, expected=record.end.coverage["expected"]) as writer:
            for sample in record.samples:
                writer.sample(sample)
            writer.finish()


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own working directory, with records of the source and of a variant that loses 0.012 nats."""
    monkeypatch.chdir(tmp_path)
    keep(tmp_path / "results", ppl("source"), ppl("nvfp4", 0.012, 0.003))
    return tmp_path


def run(desk: Path, *arguments: str, rules: Sequence[Rule]) -> int:
    suite_of(desk, *rules)
    return main(["gate", "--suite", "suite.toml", *arguments])


@pytest.mark.parametrize(("place_of", "code"), [(0, 0), (1, 1), (2, 3), (3, 3)])
def test_the_exit_code_is_the_verdict(desk: Path, place_of: int, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    rule, verdict = FOUR[place_of]
    assert run(desk, rules=[rule]) == code
    out, err = capsys.readouterr()
    assert verdict in out and f"1 {verdict}" in out and err == ""


def test_junit_and_summary_are_written_where_asked_and_the_summary_is_appended(
    desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (desk / "page.md").write_text("before\n")
    rules = [rule for rule, _ in FOUR]
    assert run(desk, "--junit", "out.xml", "--step-summary", "page.md", "--json", rules=rules) == 1
    document = json.loads(capsys.readouterr().out)
    assert [one["verdict"] for one in document["judgements"]] == [verdict for _, verdict in FOUR]
    first = document["judgements"][0]
    assert (first["unit"], first["units"], first["rule"]["margin"]) == ("nats", "windows", 0.05)
    assert first["loss"]["value"] == pytest.approx(0.012)
    assert len(ElementTree.parse(desk / "out.xml").findall(".//testcase")) == 4
    page = (desk / "page.md").read_text()
    assert page.startswith("before\n### harness gate: demo") and page.count("|") > 20


def test_files_that_cannot_be_used_are_named_and_never_averaged_over(
    desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (desk / "new").mkdir()
    keep(desk / "new", ppl("source"))
    for run_id, spoil in (
        ("11111111", lambda text: text[: len(text) // 2]),  # cut in the middle
        ("22222222", lambda text: text.replace('"nll_nats":', '"nll_nats":NaN,"was":', 1)),
        ("33333333", lambda text: text.replace("2026-03-01T12:00:00Z", "2999-03-01T12:00:00Z")),
    ):
        record = ppl("nvfp4", 0.5, run_id=run_id)
        keep(desk / "new", record)
        path = desk / "new" / record.run.machine["name"] / record.run.file_name
        path.write_text(spoil(path.read_text()))
    assert run(desk, "--results", "new", rules=[LOSS]) == 3
    out, err = capsys.readouterr()
    assert "a newer run of nvfp4 cannot be used" in out
    assert err.count("is not used") == 3
    assert "is cut" in err and "is not a JSON object of finite numbers" in err and "its clock jumped" in err
    assert all(run_id in err for run_id in ("11111111", "22222222", "33333333"))


@pytest.mark.parametrize(
    "arguments", [["--update-baseline"], ["--reason", "it is better"], ["--update-baseline", "--reason", " "]]
)
def test_a_baseline_and_its_reason_go_together(
    desk: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(desk, *arguments, rules=[WATCHED]) == 2
    assert "reason" in capsys.readouterr().err and not (desk / "results/baselines").exists()


def test_a_baseline_is_made_judged_against_and_changed_for_a_reason(
    desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(desk, rules=[WATCHED]) == 3
    assert run(desk, "--update-baseline", "--reason", "first", rules=[WATCHED]) == 0
    assert run(desk, rules=[WATCHED]) == 0
    assert "the same numbers in all windows: nothing was measured since the baseline" in capsys.readouterr().out
    worse = ppl("nvfp4", 0.112, 0.004, started_utc="2026-03-02T12:00:00Z", run_id="22222222")
    keep(desk / "elsewhere", worse)
    assert run(desk, "--results", "elsewhere", rules=[WATCHED]) == 1
    capsys.readouterr()
    assert run(desk, "--results", "elsewhere", "--update-baseline", "--reason", "second", rules=[WATCHED]) == 2
    assert "is not in results" in capsys.readouterr().err
    keep(desk / "results", worse)
    assert run(desk, "--update-baseline", "--reason", "second", rules=[WATCHED]) == 0
    assert run(desk, "--results", "elsewhere", rules=[WATCHED]) == 0
    history = json.loads((desk / "results/baselines/demo.json").read_text())["history"]
    assert [entry["reason"] for entry in history] == ["first", "second"]


def test_a_baseline_whose_run_was_changed_is_an_error_that_names_it(
    desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(desk, "--update-baseline", "--reason", "first", rules=[WATCHED]) == 0
    (path,) = (desk / "results").glob("*/*nvfp4*")
    path.write_text(path.read_text().replace('"index":7', '"index":77'))
    assert run(desk, rules=[WATCHED]) == 2
    err = capsys.readouterr().err
    assert path.name in err and "has changed since" in err and "Traceback" not in err


def test_a_results_folder_that_is_none_is_refused(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(desk, "--results", "nowhere", rules=[LOSS]) == 2
    assert "nowhere is not a folder" in capsys.readouterr().err
