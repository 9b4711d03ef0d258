"""Tables: the numbers are those of hand arithmetic and of published cards, and refusals are said out loud."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from harness.record import stats
from harness.record.run import Record
from harness.report import build_tables, evidence, numbers, quality_tables, runs, speed_tables, tables
from tests.records import (
    BUILD,
    DATASET,
    ENGINE,
    MEMORY,
    SENSITIVITY,
    VERIFY,
    decodes,
    make_record,
    prefills,
    sensitivities,
    windows,
)

WEIGHT_BYTES = 20 * 10**9
KNOWN = {**ENGINE, "effective": {"weight_bytes_per_token": WEIGHT_BYTES, "bandwidth_bytes_per_second": 273 * 10**9}}


def ppl_pair(source: float, variant: float, **header: Any) -> dict[str, Record]:
    return {
        "source": make_record("ppl", "source", windows(source)),
        "nvfp4": make_record("ppl", "nvfp4", windows(variant), **header),
    }


def bench_pair(source: list[dict[str, Any]], variant: list[dict[str, Any]], **header: Any) -> dict[str, Record]:
    return {
        "source": make_record("bench", "source", source, **header),
        "nvfp4": make_record("bench", "nvfp4", variant, **header),
    }


def perplexity(records: dict[str, Record], floor: float | None = None) -> Any:
    """The frame of one protocol."""
    return quality_tables.perplexity_table({"wikitext2-512": records}, floor)


def link(record: Record) -> str:
    return f"../{record.path.name}"


def row(frame: Any, **wanted: object) -> dict[str, Any]:
    found = [one for one in frame.rows if all(one[key] == value for key, value in wanted.items())]
    assert len(found) == 1
    return dict(found[0])


# -- Perplexity --------------------------------------------------------------------------------------------------


def test_the_published_perplexities_give_the_published_loss() -> None:
    frame = perplexity(ppl_pair(8.0481, 8.1939))
    assert row(frame, variant="source")["ppl"] == pytest.approx(8.0481)
    loss = row(frame, variant="nvfp4")
    assert loss["delta_ppl"] == pytest.approx(0.1458)
    assert loss["relative_change_ratio"] == pytest.approx(8.1939 / 8.0481 - 1)
    assert loss["delta_log_ppl"].value == pytest.approx(math.log(8.1939 / 8.0481))
    text = tables.terminal_table(frame)
    for figure in ("8.0481", "8.1939", "+0.1458", "+1.81 %", "+0.0180", "297,053", "581", "296,472"):
        assert figure in text


def test_the_paired_interval_is_over_blocks_of_neighbouring_windows() -> None:
    noise = [0.3 * math.sin(i) for i in range(13)]
    loss = [one + 0.01 + 0.002 * math.cos(i) for i, one in enumerate(noise)]
    pair = {
        "source": make_record("ppl", "source", windows(8.0, noise)),
        "nvfp4": make_record("ppl", "nvfp4", windows(8.0, loss)),
    }
    cells = row(perplexity(pair), variant="nvfp4")
    samples = {name: record.kind("window") for name, record in pair.items()}
    expected = stats.paired_mean_difference(
        [one["nll_nats"] for one in samples["source"]],
        [one["nll_nats"] for one in samples["nvfp4"]],
        [one["num_scored"] for one in samples["source"]],
        block=48,
    )
    assert cells["delta_log_ppl"] == expected and expected.num == 581
    assert cells["standard_errors"] == expected.standard_errors_from_zero


def test_other_tokens_are_refused_by_name() -> None:
    pair = ppl_pair(8.0, 8.1, dataset={**DATASET, "token_ids_sha256": "f" * 64})
    cells = row(perplexity(pair), variant="nvfp4")
    assert cells["delta_log_ppl"] == "incomparable: dataset.token_ids_sha256"
    assert cells["delta_ppl"] is None and cells["relative_change_ratio"] is None
    assert cells["ppl"] == pytest.approx(8.1)


def test_other_windows_are_refused() -> None:
    pair = ppl_pair(8.0, 8.1)
    pair["nvfp4"] = make_record("ppl", "nvfp4", windows(8.1)[:580])
    assert row(perplexity(pair), variant="nvfp4")["delta_log_ppl"] == "incomparable: windows"


@pytest.mark.parametrize("key", ["first_token", "num_tokens", "num_scored"])
def test_a_window_of_another_span_is_refused_and_its_number_does_not_matter(key: str) -> None:
    moved = windows(8.1)
    moved[3] = {**moved[3], key: moved[3][key] + 1}
    renumbered = [{**one, "index": one["index"] + 1} for one in windows(8.1)]
    for samples, refused in ((moved, True), (renumbered, False)):
        pair = ppl_pair(8.0, 8.1) | {"nvfp4": make_record("ppl", "nvfp4", samples)}
        assert (row(perplexity(pair), variant="nvfp4")["delta_log_ppl"] == "incomparable: windows") is refused


def test_a_window_that_appears_twice_is_refused_even_where_both_have_it_twice() -> None:
    twice = {name: make_record("ppl", name, [*windows(8.0), windows(8.0)[7]]) for name in ("source", "nvfp4")}
    assert row(perplexity(twice), variant="nvfp4")["delta_log_ppl"] == "incomparable: a window twice"
    once = {**ppl_pair(8.0, 8.0), "nvfp4": twice["nvfp4"]}
    assert row(perplexity(once), variant="nvfp4")["delta_log_ppl"] == "incomparable: windows"


def test_every_protocol_has_a_row_of_its_own_beside_its_own_source() -> None:
    halves = [{**one, "num_scored": 255, "nll_nats": 255 * math.log(5)} for one in windows(8.0, num_tokens=297_000)]
    llamacpp = {**DATASET, "protocol": "llamacpp-512"}
    frame = quality_tables.perplexity_table(
        {
            "wikitext2-512": ppl_pair(8.0, 8.1),
            "llamacpp-512": {name: make_record("ppl", name, halves, dataset=llamacpp) for name in ("source", "nvfp4")},
        }
    )
    assert list(zip(frame["protocol"], frame["variant"], strict=True)) == [
        ("wikitext2-512", "source"),
        ("wikitext2-512", "nvfp4"),
        ("llamacpp-512", "source"),
        ("llamacpp-512", "nvfp4"),
    ]
    assert row(frame, variant="nvfp4", protocol="llamacpp-512")["ppl"] == pytest.approx(5)
    assert row(frame, variant="nvfp4", protocol="llamacpp-512")["delta_log_ppl"].value == 0
    assert row(frame, variant="nvfp4", protocol="wikitext2-512")["delta_log_ppl"].value == pytest.approx(
        math.log(8.1 / 8)
    )


def test_a_loss_of_at_most_the_floor_is_said_to_be_noise() -> None:
    loss = math.log(8.1 / 8.0)
    below = row(perplexity(ppl_pair(8.0, 8.1), floor=loss * 0.999), variant="nvfp4")
    assert below["delta_log_ppl"].value == pytest.approx(loss)
    for pair in (ppl_pair(8.0, 8.1), ppl_pair(8.1, 8.0)):
        frame = perplexity(pair, floor=loss * 1.001)
        cells = row(frame, variant="nvfp4")
        assert cells["delta_log_ppl"] == "≤ noise"
        assert cells["delta_ppl"] is cells["relative_change_ratio"] is cells["standard_errors"] is None
        assert cells["ppl"] is not None and "≤ noise" in tables.terminal_table(frame)
    refused = ppl_pair(8.0, 8.1, dataset={**DATASET, "token_ids_sha256": "f" * 64})
    assert row(perplexity(refused, floor=1.0), variant="nvfp4")["delta_log_ppl"].startswith("incomparable")


PAGES = {"num_words": [10, 20, 40], "num_tokens": [15, 25, 50]}
WORDS = {**DATASET, "protocol": "lmeval-word", "unit": "word", "num_tokens": 90, "documents": PAGES}


def pages(*nats: float) -> list[dict[str, Any]]:
    """Three documents, the last one in two windows."""
    spans = [(0, 16, 15, 0), (16, 26, 25, 1), (42, 41, 40, 2), (82, 51, 10, 2)]
    return [
        {
            "kind": "window",
            "index": index,
            "first_token": first,
            "num_tokens": num_tokens,
            "num_scored": num_scored,
            "document": document,
            "nll_nats": nll,
        }
        for index, ((first, num_tokens, num_scored, document), nll) in enumerate(zip(spans, nats, strict=False))
    ]


def test_by_words_everything_is_per_word_and_paired_by_document() -> None:
    found = {
        "source": make_record("ppl", "source", pages(20, 40, 50, 30), dataset=WORDS),
        "nvfp4": make_record("ppl", "nvfp4", pages(21, 42, 52, 32), dataset=WORDS),
    }
    frame = quality_tables.perplexity_table({"lmeval-word": found})
    assert row(frame, variant="source")["ppl"] == pytest.approx(math.exp(140 / 70))
    cells = row(frame, variant="nvfp4")
    assert cells["delta_log_ppl"] == stats.paired_mean_difference([20, 40, 80], [21, 42, 84], [10, 20, 40])
    assert (cells["num_words"], cells["num_documents"], cells["num_windows"], cells["num_scored"]) == (70, 3, 4, 90)
    caption = tables.terminal_table(frame).splitlines()[0]
    assert "PPL per word" in caption and "words 70 · documents 3" in caption
    other = {**WORDS, "documents": {**PAGES, "num_words": [10, 20, 41]}}
    found["nvfp4"] = make_record("ppl", "nvfp4", pages(21, 42, 52, 32), dataset=other)
    cells = row(quality_tables.perplexity_table({"lmeval-word": found}), variant="nvfp4")
    assert cells["delta_log_ppl"] == "incomparable: dataset.documents"


def test_the_floor_is_per_token_where_the_loss_is_per_word() -> None:
    found = {
        "source": make_record("ppl", "source", pages(20, 40, 50, 30), dataset=WORDS),
        "nvfp4": make_record("ppl", "nvfp4", pages(21, 42, 52, 32), dataset=WORDS),
    }
    for floor, is_noise in ((7 / 90 * 1.001, True), (7 / 90 * 0.999, False)):  # 7 nats on 90 tokens, which are 70 words
        cells = row(quality_tables.perplexity_table({"lmeval-word": found}, floor), variant="nvfp4")
        assert (cells["delta_log_ppl"] == "≤ noise") is is_noise


def test_a_document_that_was_not_read_to_its_end_does_not_count() -> None:
    for num, ppl, num_documents in ((3, math.exp(60 / 30), 2), (1, math.exp(2), 1)):
        found = {"source": make_record("ppl", "source", pages(20, 40, 50)[:num], dataset=WORDS)}
        cells = row(quality_tables.perplexity_table({"lmeval-word": found}), variant="source")
        assert (cells["ppl"], cells["num_documents"]) == (pytest.approx(ppl), num_documents)
    cut = [{**pages(20)[0], "num_scored": 14}]
    found = {name: make_record("ppl", name, cut, dataset=WORDS) for name in ("source", "nvfp4")}
    cells = row(quality_tables.perplexity_table({"lmeval-word": found}), variant="nvfp4")
    assert cells["ppl"] is cells["delta_log_ppl"] is None


def test_windows_of_earlier_runs_are_counted_out_loud() -> None:
    told = [{"kind": "reused", "num_windows": 581, "num_reused": 300}]
    records = {
        "source": make_record("ppl", "source", windows(8.0) + told),
        "a16": make_record("ppl", "a16", [*windows(8.0), {**told[0], "num_reused": 0}]),
        "w4a4": make_record("ppl", "w4a4", windows(8.0)),
    }
    assert list(runs.reused({"wikitext2-512": records}, "windows")) == [
        "source, wikitext2-512: 300 of 581 windows are of earlier runs."
    ]


def test_a_variant_without_a_source_is_compared_with_nothing() -> None:
    pair = ppl_pair(8.0, 8.1)
    del pair["source"]
    assert row(perplexity(pair), variant="nvfp4")["delta_log_ppl"] == "no record of the source"


# -- Speed -------------------------------------------------------------------------------------------------------


def test_speed_is_the_median_over_repetitions_without_warm_ups() -> None:
    frame = speed_tables.decode_table(bench_pair(decodes(1 / 170.3, repetitions=7), decodes(1 / 163.4, repetitions=7)))
    source, variant = row(frame, variant="source"), row(frame, variant="nvfp4")
    assert source["tokens_per_second"].value == pytest.approx(170.3)
    assert variant["tokens_per_second"].value == pytest.approx(163.4)
    assert variant["speed_ratio"].value == pytest.approx(163.4 / 170.3)
    assert source["num_repetitions"] == 7 and source["new_tokens"] == 128
    assert "170.3" in tables.terminal_table(frame) and "163.4" in tables.terminal_table(frame)


def test_the_published_speed_up_is_reproduced() -> None:
    frame = speed_tables.decode_table(bench_pair(decodes(1 / 7.93, repetitions=7), decodes(1 / 11.98, repetitions=7)))
    assert tables.cell_text("speed_ratio", row(frame, variant="nvfp4")["speed_ratio"]).startswith("1.511")


def test_a_batch_makes_tokens_for_every_user() -> None:
    frame = speed_tables.decode_table(
        bench_pair(decodes(0.01, batch=4, repetitions=7), decodes(0.02, batch=4, repetitions=7))
    )
    source = row(frame, variant="source")
    assert source["tokens_per_second"].value == pytest.approx(400)
    assert source["user_tokens_per_second"].value == pytest.approx(100)
    assert source["user_tokens_per_second"].low == pytest.approx(source["tokens_per_second"].low / 4)


def test_the_ceiling_is_bandwidth_over_bytes_per_token_at_batch_one() -> None:
    samples = decodes(1 / 7.93, repetitions=7) + decodes(1 / 7.93, batch=2)
    frame = speed_tables.decode_table(bench_pair(samples, samples, engine=KNOWN))
    single = row(frame, variant="source", batch=1)
    assert single["ceiling_tokens_per_second"] == pytest.approx(273 / 20)
    assert single["ceiling_share"] == pytest.approx(7.93 / 13.65)
    assert row(frame, variant="source", batch=2)["ceiling_tokens_per_second"] is None
    effective = {**KNOWN["effective"], "state_bytes": 50_000_000, "kv_bytes_per_token": 30_000}
    deeper = speed_tables.decode_table(bench_pair(samples, samples, engine={**KNOWN, "effective": effective}))
    step = 20e9 + 2 * 50e6 + row(deeper, variant="source", batch=1)["prompt_tokens"] * 30e3
    assert row(deeper, variant="source", batch=1)["ceiling_tokens_per_second"] == pytest.approx(273e9 / step)


def test_an_unknown_bandwidth_gives_a_dash_and_no_guess() -> None:
    frame = speed_tables.decode_table(bench_pair(decodes(0.01), decodes(0.01)))
    assert row(frame, variant="source")["ceiling_tokens_per_second"] is None
    header, _, source = tables.markdown_table(frame, link).splitlines()[2:5]
    column = header.split("|").index(next(cell for cell in header.split("|") if "ceiling, tok/s" in cell))
    assert source.split("|")[column].strip() == "—"


def test_speeds_of_two_sessions_are_refused() -> None:
    pair = bench_pair(decodes(0.01), decodes(0.01))
    pair["nvfp4"] = make_record("bench", "nvfp4", decodes(0.01) + prefills(0.1), session_id="ffffffff")
    assert row(speed_tables.decode_table(pair), variant="nvfp4")["speed_ratio"] == "incomparable: session_id"
    assert row(speed_tables.prefill_table(pair), variant="nvfp4")["speed_ratio"] == "incomparable: session_id"


def test_a_batch_size_that_the_source_lacks_has_no_ratio() -> None:
    frame = speed_tables.decode_table(bench_pair(decodes(0.01), decodes(0.01) + decodes(0.01, batch=8)))
    assert row(frame, variant="nvfp4", batch=8)["speed_ratio"] is None


def test_few_repetitions_give_a_value_that_is_marked_as_one_without_an_interval() -> None:
    frame = speed_tables.decode_table(bench_pair(decodes(0.01, repetitions=3), decodes(0.02, repetitions=3)))
    cells = row(frame, variant="nvfp4")
    assert tables.cell_text("tokens_per_second", cells["tokens_per_second"]) == "50.00 †"
    assert tables.cell_text("speed_ratio", cells["speed_ratio"]) == "0.500 †"
    assert tables.json_rows(frame)[1]["speed_ratio"]["low"] is None and "†" not in json.dumps(tables.json_rows(frame))
    for text in (tables.terminal_table(frame), tables.markdown_table(frame, link)):
        assert text.endswith(f"\n\n{tables.NO_INTERVAL}") and text.count(tables.NO_INTERVAL) == 1


def test_what_has_an_interval_or_is_no_estimate_has_no_mark() -> None:
    spread = bench_pair(decodes(0.01, repetitions=7), decodes(0.02, repetitions=7), engine=KNOWN)
    assert "†" not in tables.terminal_table(speed_tables.decode_table(spread))  # ceilings, shares and counts among them
    for frame in (
        perplexity(ppl_pair(8.0, 8.1), floor=1.0),  # below the floor
        perplexity(ppl_pair(8.0, 8.1, dataset={**DATASET, "token_ids_sha256": "f" * 64})),  # refused
        build_tables.samples_table({"nvfp4": make_record("verify", "nvfp4", VERIFY)}, "roundtrip"),
        build_tables.role_table({"nvfp4": make_record("build", "nvfp4", BUILD)}),
        quality_tables.sensitivity_table({"source": make_record("sensitivity", "source", SENSITIVITY)}),
    ):
        assert "†" not in tables.terminal_table(frame)


@pytest.mark.parametrize(
    ("value", "low", "high", "shown"),
    [
        (99.994, None, None, "99.99 †"),
        (99.996, 98, 100.5, "100.00 [98.00, 100.50]"),
        (1855, 99, 2e3, "1855 [99, 2000]"),
    ],
)
def test_a_speed_and_its_interval_have_the_same_decimals(
    value: float, low: float | None, high: float | None, shown: str
) -> None:
    assert tables.cell_text("tokens_per_second", stats.Estimate(value, low, high, 6, "by hand")) == shown


@pytest.mark.parametrize(
    ("value", "shown"), [(7.93, "7.93"), (11.9, "11.90"), (170.3, "170.3"), (156.94, "156.9"), (2383.0, "2383")]
)
def test_speeds_are_printed_as_cards_print_them(value: float, shown: str) -> None:
    assert tables.cell_text("ceiling_tokens_per_second", value) == shown


@pytest.mark.parametrize(("before", "after", "change"), [(7.93, 11.98, "+51 %"), (100, 99.9, "+0 %"), (10, 5, "-50 %")])
def test_a_ratio_of_speeds_is_also_a_change(before: float, after: float, change: str) -> None:
    cells = row(speed_tables.decode_table(bench_pair(decodes(1 / before), decodes(1 / after))), variant="nvfp4")
    assert cells["speed_change_ratio"] == cells["speed_ratio"].value - 1
    assert tables.cell_text("speed_change_ratio", cells["speed_change_ratio"]) == change


def test_speeds_can_be_divided_by_those_of_another_row_and_the_heading_names_it() -> None:
    records = {
        name: make_record("bench", name, decodes(1 / speed, repetitions=7) + prefills(0.1))
        for name, speed in (("source", 100), ("w4a4", 120), ("w4a4-deltanet", 180))
    }
    frame = speed_tables.decode_table(records, "w4a4")
    assert [
        row(frame, variant=name)["speed_ratio"] and row(frame, variant=name)["speed_ratio"].value for name in records
    ] == [
        pytest.approx(100 / 120),
        None,
        pytest.approx(1.5),
    ]
    for text in (
        tables.terminal_table(frame),
        tables.markdown_table(speed_tables.prefill_table(records, "w4a4"), link),
    ):
        assert "÷ w4a4 [95 %]" in text and "source [95 %]" not in text and "versus" not in text
    assert {one["versus"] for one in tables.json_rows(frame)} == {"w4a4"}
    del records["w4a4"]
    assert set(speed_tables.decode_table(records, "w4a4")["speed_ratio"]) == {"no record of w4a4"}
    assert "÷ source [95 %]" in tables.terminal_table(speed_tables.decode_table(records))
    decoded, prefilled = speed_tables.bench_tables(records, "w4a4-deltanet")
    assert row(decoded, variant="source")["speed_ratio"].value == pytest.approx(100 / 180)
    assert row(prefilled, variant="source")["versus"] == "w4a4-deltanet"


def shaped(
    prompt_tokens: int, new_tokens: int, batch: int = 1, speed: float = 100.0, **more: int
) -> list[dict[str, Any]]:
    """Repetitions of one shape."""
    made = decodes(1 / speed, batch, num_steps=new_tokens - 1)
    return [{**one, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, **more} for one in made]


BENCH = {"prompt_tokens": 128, "new_tokens": 129, "batch_sizes": [1, 4], "depths": [0, 4096], "depth_tokens": 33}
DRAFTS = {"num_drafts": 10, "num_draft_tokens": 10, "num_accepted_tokens": 8}


def measured_everywhere(bench: dict[str, Any] | None = BENCH) -> Any:
    """The decode frame of a source, a variant and the variant with MTP, at every length and batch size."""
    suite = {"name": "demo", "bench": bench}
    shapes = shaped(1, 33) + shaped(4096, 33) + shaped(128, 129) + shaped(128, 129, 4)
    drafting = shaped(4096, 33, speed=150, **DRAFTS) + shaped(128, 129, speed=125, **DRAFTS)
    return speed_tables.decode_table(
        {
            "source": make_record("bench", "source", shapes, suite=suite),
            "w4a4": make_record("bench", "w4a4", shapes, suite=suite),
            "w4a4+mtp1": make_record("bench", "w4a4+mtp1", drafting, suite=suite),
        }
    )


def test_a_decode_frame_is_told_apart_into_one_user_depths_batches_and_setups() -> None:
    frame = measured_everywhere()
    single, depths, curve, setups = (
        part(frame)
        for part in (speed_tables.single_user, speed_tables.by_depth, speed_tables.batch_curve, speed_tables.in_setups)
    )
    assert list(zip(single["variant"], single["prompt_tokens"], strict=True)) == [("source", 128), ("w4a4", 128)]
    assert list(zip(depths["variant"], depths["test"], strict=True)) == [
        ("source", "tg32"),
        ("w4a4", "tg32"),
        ("source", "tg32 @ d4096"),
        ("w4a4", "tg32 @ d4096"),
    ]
    assert list(zip(curve["variant"], curve["batch"], strict=True)) == [
        ("source", 1),
        ("w4a4", 1),
        ("source", 4),
        ("w4a4", 4),
    ]
    assert list(zip(setups["variant"], setups["test"], strict=True)) == [
        ("w4a4+mtp1", "tg128 @ d128"),
        ("w4a4+mtp1", "tg32 @ d4096"),
    ]
    assert [one.value for one in setups["setup_ratio"]] == pytest.approx([1.25, 1.5])
    assert set(setups["acceptance_share"]) == {0.8}
    for one in (single, depths, curve):
        assert not {"setup_ratio", "acceptance_share", "mean_accepted_length"} & set(one.columns)
    assert "user_tokens_per_second" in curve.columns and "user_tokens_per_second" not in single.columns


def test_every_row_of_a_decode_frame_is_in_one_of_its_parts_whatever_the_suite_asked_for() -> None:
    parts = (speed_tables.single_user, speed_tables.by_depth, speed_tables.batch_curve, speed_tables.in_setups)
    for bench in (
        BENCH,
        None,  # records of before suites had this
        {**BENCH, "depths": None},
        {**BENCH, "depths": [128], "depth_tokens": 129},  # the suite's own length again
        {**BENCH, "prompt_tokens": 5, "depths": [4096]},
    ):
        frame = measured_everywhere(bench)
        assert frame
        seen = [id(one) for part in parts for one in part(frame)["tokens_per_second"]]
        assert set(seen) == {id(one) for one in frame["tokens_per_second"]} and len(frame) == 10
    own = measured_everywhere({**BENCH, "depths": [128], "depth_tokens": 129})
    assert list(speed_tables.by_depth(own)["test"]) == ["tg128 @ d128"] * 2
    assert list(speed_tables.single_user(own)["prompt_tokens"]).count(128) == 2


def test_a_suite_of_batch_one_has_no_batch_curve_and_drafts_without_a_setup_are_shown() -> None:
    frame = speed_tables.decode_table({"source": make_record("bench", "source", shaped(128, 129, **DRAFTS))})
    assert not (speed_tables.batch_curve(frame) or speed_tables.by_depth(frame) or speed_tables.in_setups(frame))
    assert list(speed_tables.single_user(frame)["mean_accepted_length"]) == [1.8]


def test_kernels_stand_beside_the_layers_that_they_computed() -> None:
    told = {"mlp.down_proj": "Marlin", "self_attn.attn": "FLASH_ATTN", "mlp.up_proj": "Marlin", "log": ""}
    records = {
        "w4a4": make_record("bench", "w4a4", decodes(0.01), engine={**ENGINE, "kernels": told}),
        "silent": make_record("bench", "silent", decodes(0.01), engine={**ENGINE, "kernels": {}}),
    }
    frame = speed_tables.kernel_table(records)
    found = [(one["variant"], one["kernel"], one["computes"]) for one in tables.json_rows(frame)]
    assert found == [("w4a4", "Marlin", "mlp.down_proj, mlp.up_proj"), ("w4a4", "FLASH_ATTN", "self_attn.attn")]


def test_prefill_is_the_prompts_tokens_over_the_time_to_the_first_new_one() -> None:
    frame = speed_tables.prefill_table(bench_pair(prefills(0.25), prefills(0.5)))
    assert row(frame, variant="source")["tokens_per_second"].value == 2048
    assert row(frame, variant="nvfp4")["speed_ratio"].value == 0.5


def test_memory_is_the_most_of_all_starts() -> None:
    starts = [
        *MEMORY,
        {"kind": "memory", "start": 1, "weight_bytes": 18 * 10**6, "peak_rss_bytes": 2 * 10**9},
        {"kind": "memory", "start": 2, "weight_bytes": 18 * 10**6, "peak_rss_bytes": None},
    ]
    cells = row(speed_tables.memory_table({"source": make_record("bench", "source", starts)}), variant="source")
    assert (cells["weight_bytes"], cells["peak_rss_bytes"], cells["peak_vram_bytes"]) == (18 * 10**6, 2 * 10**9, None)


# -- Size and round trip -----------------------------------------------------------------------------------------


def test_sizes_add_up() -> None:
    total = row(build_tables.role_table({"nvfp4": make_record("build", "nvfp4", BUILD)}), role="total")
    assert (total["num_tensors"], total["source_bytes"], total["output_bytes"]) == (25, 18 * 10**6, 65 * 10**5)
    assert total["bytes_share"] == pytest.approx(6.5 / 18)


def test_the_published_sizes_give_the_published_share() -> None:
    role = {**BUILD[0], "source_bytes": 18_820_000_000, "output_bytes": 11_200_000_000}
    text = tables.terminal_table(build_tables.role_table({"nvfp4": make_record("build", "nvfp4", [role])}))
    for figure in ("18.82 GB", "11.20 GB", "59.5 %"):
        assert figure in text


def test_an_exact_round_trip_has_no_signal_to_noise_ratio() -> None:
    exact = {**VERIFY[0], "role": "norm", "max_abs_error": 0.0, "snr_db": None}
    frame = build_tables.samples_table({"nvfp4": make_record("verify", "nvfp4", [*VERIFY, exact])}, "roundtrip")
    assert tables.cell_text("snr_db", row(frame, role="mlp.up_proj")["snr_db"]) == "20.6"
    assert tables.cell_text("snr_db", row(frame, role="norm")["snr_db"]) == "—"


# -- Sensitivity -------------------------------------------------------------------------------------------------


def test_sensitivities_are_medians_over_layers_the_worst_group_first() -> None:
    frame = quality_tables.sensitivity_table({"source": make_record("sensitivity", "source", SENSITIVITY)})
    assert list(frame["role"]) == ["self_attn.o_proj", "linear_attn.out_proj", "mlp.down_proj"]
    deltanet = row(frame, role="linear_attn.out_proj")
    assert deltanet["NVFP4"] == tables.Spread(median=0.03, largest=0.04, layer=1)
    assert (deltanet["num_layers"], deltanet["fp8_extra_bytes"]) == (3, 3000)
    assert deltanet["fp8_gain_per_gb"] == pytest.approx((0.02 + 0.04 + 0.03 - 3 * 0.001) / 3000 * 1e9)
    assert "3 % (layer 1: 4 %)" in tables.terminal_table(frame)
    assert json.loads(json.dumps(tables.json_rows(frame)))[0]["NVFP4"] == {"median": 0.05, "largest": 0.05, "layer": 3}


def test_sentences_say_where_fp8_pays_and_how_deltanet_compares() -> None:
    first, second = quality_tables.sensitivity_words(
        quality_tables.sensitivity_table({"source": make_record("sensitivity", "source", SENSITIVITY)})
    )
    assert "FP8 gains most for its bytes in self_attn.o_proj: median layer error 5 % in NVFP4 and 0.2 % in FP8" in first
    assert "1.00 kB more in 1 layer." in first
    assert second == (
        "NVFP4 costs most in self_attn.o_proj (median layer error 5 %), and in DeltaNet in linear_attn.out_proj (3 %)."
    )


def test_a_group_without_outputs_is_a_dash_and_last() -> None:
    samples = [*sensitivities("mlp.gate_up_proj", {0: (None, None, None)}), *SENSITIVITY]
    frame = quality_tables.sensitivity_table({"source": make_record("sensitivity", "source", samples)})
    assert list(frame["role"])[-1] == "mlp.gate_up_proj"
    assert tables.cell_text("NVFP4", frame["NVFP4"][-1]) == "—"
    assert len(quality_tables.sensitivity_words(frame)) == 2
    nothing = quality_tables.sensitivity_table({"source": make_record("sensitivity", "source", samples[:3])})
    assert quality_tables.sensitivity_words(nothing) == []


# -- Selection and layout ----------------------------------------------------------------------------------------


def test_the_newest_whole_run_speaks_for_a_variant() -> None:
    old = make_record("ppl", "source", windows(8.0), started_utc="2026-01-01T00:00:00Z", run_id="00000001")
    new = make_record("ppl", "source", windows(9.0), started_utc="2026-01-02T00:00:00Z", run_id="00000002")
    limited = make_record("ppl", "source", windows(7.0)[:3], started_utc="2026-01-03T00:00:00Z")
    limited.end.coverage["expected"] = 581
    other_suite = make_record("ppl", "source", windows(7.0), suite={"name": "x"}, started_utc="2026-01-04T00:00:00Z")
    other_measure = make_record("bench", "source", decodes(1.0), started_utc="2026-01-05T00:00:00Z")
    records = [new, limited, other_suite, other_measure, old]
    assert runs.newest_runs(records, "demo", "ppl", ("source", "nvfp4")) == {"source": new}


def test_the_newest_run_by_one_protocol_does_not_hide_another_protocols() -> None:
    by = {
        name: make_record(
            "ppl",
            "source",
            windows(8.0),
            dataset={**DATASET, "protocol": name},
            started_utc=f"2026-01-0{day}T00:00:00Z",
        )
        for day, name in enumerate(("wikitext2-512", "llamacpp-512", "gptq-2048"), start=1)
    }
    found = runs.newest_by_protocol(list(by.values()), "demo", ("llamacpp-512", "wikitext2-512", "x"), ("source",))
    assert found == {name: {"source": by[name]} for name in ("llamacpp-512", "wikitext2-512")}
    assert list(found) == ["llamacpp-512", "wikitext2-512"]


def test_variants_come_in_the_order_asked_for() -> None:
    records = [make_record("ppl", name, windows(8.0)) for name in ("a", "source", "b", "unasked")]
    assert list(runs.newest_runs(records, "demo", "ppl", ("source", "b", "a"))) == ["source", "b", "a"]


def test_what_all_rows_share_stands_in_the_caption_and_what_differs_in_columns() -> None:
    pair = ppl_pair(8.0, 8.1)
    caption, _, header = tables.terminal_table(perplexity(pair)).splitlines()[:3]
    assert caption == (
        "protocol wikitext2-512 · PPL per token · dataset demo:heldout · tokens 297,053 · windows 581 · "
        "scored tokens 296,472"
    )
    assert "protocol" not in header
    both = quality_tables.perplexity_table({"wikitext2-512": pair, "gptq-2048": pair})
    caption, _, header = tables.terminal_table(both).splitlines()[:3]
    assert "protocol" not in caption and "protocol" in header


def test_markdown_links_every_row_to_its_run() -> None:
    pair = ppl_pair(8.0, 8.1)
    text = tables.markdown_table(perplexity(pair), link)
    for record in pair.values():
        assert f"[{record.run.run_id}](../{record.path.name})" in text


def test_text_that_would_break_a_table_is_escaped() -> None:
    hostile = "a|b\n*c* <d> [e](f) _g_ h_i `j`"
    finding = {"kind": "finding", "severity": "error", "tensor": hostile, "problem": "p", "consequence": "c"}
    text = tables.markdown_table(
        build_tables.samples_table({"nvfp4": make_record("verify", "nvfp4", [finding])}, "finding"), link
    )
    assert r"a\|b \*c\* \<d\> \[e\](f) \_g\_ h_i \`j\`" in text
    assert len(text.splitlines()) == 2 + 3


def test_rows_are_json_with_estimates_as_objects() -> None:
    rows = tables.json_rows(perplexity(ppl_pair(8.0, 8.1)))
    assert json.loads(json.dumps(rows)) == rows
    assert rows[0]["delta_log_ppl"] is None
    assert set(rows[1]["delta_log_ppl"]) == {"value", "low", "high", "num", "method", "standard_error", "degrees"}
    assert rows[1]["run"] == ppl_pair(8.0, 8.1)["nvfp4"].run.run_id


@pytest.mark.parametrize(("samples", "count"), [(decodes(0.1) + prefills(0.1) + MEMORY, 3), (decodes(0.1), 1)])
def test_bench_runs_give_their_tables_and_no_empty_one(samples: list[dict[str, Any]], count: int) -> None:
    made = speed_tables.bench_tables({"source": make_record("bench", "source", samples)})
    assert len(made) == count
    assert all(tables.terminal_table(table) for table in made)


def test_the_runs_table_names_engine_machine_versions_and_commit() -> None:
    gpu = {"name": "NVIDIA H200", "count": 1, "memory_bytes": 1, "driver": "570.86"}
    machine = {"name": "nvidia-h200-1x", "cpu": "x", "cores": 16, "gpu": gpu, "os": "Linux"}
    text = tables.terminal_table(
        evidence.run_table([make_record("ppl", "source", windows(8.0), machine=machine, git=None)])
    )
    for words in ("torch (transformers 5.17.0, torch 2.13.0), bfloat16 on cpu", "1 × NVIDIA H200, driver 570.86"):
        assert words in text
    assert "commit —" in text and "harness 0.1.0, torch 2.13.0" in text


@pytest.mark.parametrize(
    ("num_bytes", "words"), [(0, "0.00 B"), (999, "999.00 B"), (11_034_000, "11.03 MB"), (18.82e9, "18.82 GB")]
)
def test_bytes_are_decimal(num_bytes: float, words: str) -> None:
    assert numbers.format_bytes(num_bytes) == words


def test_paths_in_records_do_not_matter_to_a_frame() -> None:
    record = make_record("ppl", "source", windows(8.0))
    moved = Record(Path("/elsewhere/m") / record.path.name, record.run, record.samples, record.end)
    assert tables.terminal_table(perplexity({"source": record})) == tables.terminal_table(perplexity({"source": moved}))
