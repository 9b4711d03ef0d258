"""The figures of the published cards, as hand-made records: the tables say what the cards say, and where a figure of a
card has no interval they say that too.

A card gives one number where a run gives many: a perplexity is one window of all scored tokens, a speed one repetition.
Sizes are not retyped but follow from the published configurations, so that bytes, shares and counts are checked against
each other. Records go through the store, which holds them to its schema, and through `card.render`.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import harness
from harness.quantize.plan import Plan, plan
from harness.quantize.recipes import recipe_named
from harness.record.run import Record
from harness.report import build_tables, card, quality_tables, speed_tables, tables
from harness.report.trace import trace
from harness.suite.load import load
from harness.suite.schema import Suite
from tests.conftest import census, published_config
from tests.records import DATASET, ENGINE, MACHINE, VERIFY, make_record, stored, windows

pytestmark = pytest.mark.usefixtures("drawn_once")

SUITES = Path(harness.__file__).parent.parent / "suites"
GIB = 2**30
GB10 = {"gpu": "NVIDIA GB10", "bandwidth": 273 * 10**9}
RTX_PRO_6000 = {"gpu": "NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "bandwidth": 1792 * 10**9}
RTX_PRO_6000_MAX_Q = {"gpu": "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "bandwidth": 1792 * 10**9}
RTX_5090 = {"gpu": "NVIDIA GeForce RTX 5090", "bandwidth": 1792 * 10**9}

A16, W4A4_9B, W27B = "qwen3.5-9b-heretic-a16", "qwen3.5-9b-w4a4", "qwen3.5-27b"
W4A4_35B, MIXED = "qwen3.6-35b-a3b-heretic-w4a4", "qwen3.6-35b-a3b-mixed"
CONFIGS = {
    A16: "qwen3.5-9b",
    W4A4_9B: "qwen3.5-9b",
    W27B: "qwen3.5-27b",
    W4A4_35B: "qwen3.6-35b-a3b",
    MIXED: "qwen3.6-35b-a3b",
}


def suite_of(name: str) -> Suite:
    return load(SUITES / f"{name}.toml")


def planned(name: str, variant: str, *, with_mtp: bool) -> Plan:
    recipe = recipe_named(suite_of(name).variants[variant].recipe)
    return plan(*census(published_config(CONFIGS[name]), with_mtp=with_mtp), recipe)


def made(name: str, measure: str, variant: str, samples: list[dict[str, Any]], **header: Any) -> Record:
    suite = suite_of(name)
    run_id = hashlib.sha256(f"{name} {measure} {variant}".encode()).hexdigest()[:8]
    about = {"suite": suite.resolved(), "suite_digest": suite.digest, "run_id": run_id}
    return make_record(measure, variant, samples, **about, **header)


def build(name: str, variant: str, *, with_mtp: bool, calibration_tokens: int | None = None) -> Record:
    """A build with the tensors and bytes of the published configuration."""
    what = planned(name, variant, with_mtp=with_mtp)
    samples = [{"kind": "role", **vars(count)} for count in what.counts]
    samples.append({"kind": "totals", "peak_rss_bytes": None, "output_bytes": what.output_bytes})
    if calibration_tokens is not None:
        taken = {"num_tokens": calibration_tokens, "planned_memory_bytes": 10**9, "peak_vram_bytes": None}
        samples.append({"kind": "calibration", **taken})
    return made(name, "build", variant, samples)


def timed(kind: str, tokens_per_second: float, prompt_tokens: int, new_tokens: int = 1, **more: int) -> dict[str, Any]:
    """One repetition at batch 1 of the speed that a card gives."""
    common = {"kind": kind, "start": 0, "repetition": 0, "warmup": False, "batch": 1, "prompt_tokens": prompt_tokens}
    if kind == "prefill":
        return {**common, "prefill_seconds": prompt_tokens / tokens_per_second}
    seconds = (new_tokens - 1) / tokens_per_second
    return {**common, "new_tokens": new_tokens, "prefill_seconds": 0.1, "step_seconds": [seconds], **more}


def bench(
    name: str, row: str, samples: list[dict[str, Any]], gpu: dict[str, Any], traffic: Any, kernel: str, **requested: Any
) -> Record:
    engine = {
        "name": "vllm",
        "version": "as on the card",
        "device": gpu["gpu"],
        "dtype": "bfloat16",
        "requested": requested,
        "effective": {
            "weight_bytes_per_token": traffic.weight_bytes,
            "state_bytes": traffic.state_bytes,
            "kv_bytes_per_token": traffic.kv_bytes_per_token,
            "bandwidth_bytes_per_second": gpu["bandwidth"],
        },
        "kernels": {"mlp": kernel},
    }
    about = {"name": gpu["gpu"], "count": 1, "memory_bytes": 96 * GIB, "driver": "unknown"}
    return made(name, "bench", row, samples, engine=engine, machine={**MACHINE, "gpu": about})


def memory(weight_bytes: int, **more: int) -> dict[str, Any]:
    return {"kind": "memory", "start": 0, "weight_bytes": weight_bytes, "peak_rss_bytes": None, **more}


# -- The records -------------------------------------------------------------------------------------------------


def a16() -> Iterator[Record]:
    """nivvis/Qwen3.5-9B-heretic-NVFP4A16: no MTP head, since the fine-tune has none."""
    yield build(A16, "nvfp4a16", with_mtp=False)
    # The card's maximum and mean absolute error; its relative error and signal to noise are not given.
    trip = {**VERIFY[0], "num_tensors": 128, "max_abs_error": 0.058, "mean_abs_error": 0.0008}
    yield made(A16, "verify", "nvfp4a16", [trip])
    what = planned(A16, "nvfp4a16", with_mtp=False)
    samples = [
        timed("decode", 140, 128, 129),  # "~140 t/s", a single request; the lengths are the suite's
        memory(what.output_bytes, peak_vram_bytes=round(10.58 * GIB)),  # "VRAM 10.58 GiB"
    ]
    yield bench(A16, "nvfp4a16", samples, RTX_PRO_6000_MAX_Q, what.output_traffic, "Marlin FP4")


def w4a4_9b() -> Iterator[Record]:
    """ig1/Qwen3.5-9B-NVFP4: what its cache takes on an RTX 5090, and 4 x 256 samples of at most 8192 tokens."""
    yield build(W4A4_9B, "w4a4-rtn", with_mtp=True, calibration_tokens=4 * 256 * 8192)  # at most: the card counts none
    what = planned(W4A4_9B, "w4a4-rtn", with_mtp=True)
    for setup, share, tokens in (("headless", 0.95, 110_880), ("desktop", 0.8, 77_088)):
        taken = [memory(what.output_bytes, kv_cache_tokens=tokens)]
        asked = {"gpu_memory_utilization": share, "max_num_seqs": 64}
        yield bench(W4A4_9B, f"w4a4-rtn+{setup}", taken, RTX_5090, what.output_traffic, "not on the card", **asked)


def w27b() -> Iterator[Record]:
    """rdtand/Qwen3.5-27B-NVFP4-DeltaNet-Included: tg32 at three depths and pp2048, beside the usual checkpoint."""
    speeds = {"w4a4-rtn": (7.93, 7.66, 7.92, 1855), "w4a4-deltanet-rtn": (11.98, 11.90, 11.80, 2383)}
    for variant, (*decodes, prefill) in speeds.items():
        yield build(W27B, variant, with_mtp=True)
        samples = [
            timed("prefill", prefill, 2048),
            *(timed("decode", speed, depth, 33) for speed, depth in zip(decodes, (1, 4096, 8192), strict=True)),
        ]
        traffic = planned(W27B, variant, with_mtp=True).output_traffic
        yield bench(W27B, variant, samples, GB10, traffic, "CUTLASS W4A4")


def w4a4_35b() -> Iterator[Record]:
    """AEON-7/Qwen3.6-35B-A3B-heretic-NVFP4, version 2: its tool leaves the MTP head out."""
    yield build(W4A4_35B, "w4a4-rtn", with_mtp=False, calibration_tokens=256 * 2048)


PPL = {"source": 8.0481, "mixed-fp8-rtn": 8.1939, "w4a4-rtn": 8.1853}
NUM_TOKENS, NUM_SCORED = 297_053, 296_472


def mixed() -> Iterator[Record]:
    """Infatoshi/Qwen3.6-35B-A3B-NVFP4-FP8: perplexities (all three with an FP8 cache), and single-stream decoding."""
    for variant in ("mixed-fp8-rtn", "w4a4-rtn"):
        yield build(MIXED, variant, with_mtp=True)
    engine = {**ENGINE, "requested": {"kv_cache_dtype": "fp8"}}
    for row, ppl in PPL.items():
        span = {"index": 0, "first_token": 0, "num_tokens": NUM_TOKENS, "num_scored": NUM_SCORED}
        one = {"kind": "window", **span, "nll_nats": NUM_SCORED * math.log(ppl)}
        yield made(MIXED, "ppl", row, [one], engine=engine)
    what = planned(MIXED, "mixed-fp8-rtn", with_mtp=True)
    length = 128, 1 + 1908  # not on the card; 1,000 drafts of which 90.8 % are accepted give 1,908 tokens
    drafts = {"num_drafts": 1000, "num_draft_tokens": 1000, "num_accepted_tokens": 908}
    for row, speed, traffic, more in (
        ("source", 170.3, what.source_traffic, {}),
        ("mixed-fp8-rtn", 163.4, what.output_traffic, {}),
        ("mixed-fp8-rtn+mtp1", 156.9, what.output_traffic, drafts),
    ):
        kernel = "BF16" if row == "source" else "FLASHINFER_CUTLASS"
        yield bench(MIXED, row, [timed("decode", speed, *length, **more)], RTX_PRO_6000, traffic, kernel)


RECORDS: dict[str, Callable[[], Iterator[Record]]] = {
    A16: a16,
    W4A4_9B: w4a4_9b,
    W27B: w27b,
    W4A4_35B: w4a4_35b,
    MIXED: mixed,
}


# -- What a card says --------------------------------------------------------------------------------------------


class Table(NamedTuple):
    """A table of a card: the line before it, its rows by heading, and the line after it."""

    caption: str
    rows: list[dict[str, str]]
    after: str


class Published(NamedTuple):
    """A card as it was rendered, and what was measured for it: measure -> row -> record, in a folder of its own."""

    folder: Path
    text: str
    measured: dict[str, dict[str, Record]]

    @property
    def tables(self) -> list[Table]:
        found = []
        lines = self.text.splitlines()
        starts = [at for at, line in enumerate(lines) if re.fullmatch(r"\|[:|-]+\|", line)]
        for at in starts:
            heads = cells(lines[at - 1])
            end = next(end for end in range(at + 1, len(lines) + 1) if end == len(lines) or lines[end][:1] != "|")
            rows = [dict(zip(heads, cells(line), strict=True)) for line in lines[at + 1 : end]]
            after = lines[end + 1] if end + 1 < len(lines) else ""
            found.append(Table(lines[at - 3] if at >= 3 else "", rows, after))
        return found

    def with_heading(self, heading: str) -> list[Table]:
        return [table for table in self.tables if heading in table.rows[0]]

    def row(self, heading: str, **wanted: str) -> dict[str, str]:
        """The only row of the tables with a heading that has the wanted cells."""
        rows = [row for table in self.with_heading(heading) for row in table.rows]
        (found,) = [row for row in rows if wanted.items() <= row.items()]
        return found


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Published]:
    """The card of a suite, of records that went through the store."""
    cards: dict[str, Published] = {}

    def published_card(name: str) -> Published:
        if name not in cards:
            folder = tmp_path_factory.mktemp(name)
            records = stored(folder / "results", RECORDS[name]())
            files = card.generated_files(suite_of(name), records, results_dir="results", pages={})
            measured: dict[str, dict[str, Record]] = {}
            for record in records:
                measured.setdefault(record.run.measure, {})[record.run.variant["name"]] = record
            cards[name] = Published(folder, files[f"reports/{name}/README.md"].decode(), measured)
        return cards[name]

    return published_card


CardOf = Callable[[str], Published]


@pytest.mark.parametrize("name", RECORDS)
def test_every_number_of_a_card_and_of_its_variants_cards_comes_out_of_its_records_again(
    name: str, published: CardOf
) -> None:
    mine, suite = published(name), suite_of(name)
    records = [record for runs in mine.measured.values() for record in runs.values()]
    pages = {f"reports/{name}/README.md": mine.text.encode()}
    for variant in mine.measured["build"]:
        files = card.variant_card(suite, records, variant, results_dir="results", repo=f"someone/{variant}")
        pages[f"{variant}/README.md"] = files["README.md"]
        (mine.folder / variant).mkdir(exist_ok=True)
        (mine.folder / variant / "results").symlink_to(mine.folder / "results")
    for page, data in pages.items():
        (mine.folder / page).parent.mkdir(parents=True, exist_ok=True)
        (mine.folder / page).write_bytes(data)
        assert trace(mine.folder / page).findings == (), page


def cell(frame: Any, key: str, **wanted: object) -> str:
    (row,) = [one for one in frame.rows if all(one[name] == value for name, value in wanted.items())]
    return tables.cell_text(key, row[key])


def test_the_mixed_cards_perplexities_are_reproduced_and_their_differences_have_no_interval(published: CardOf) -> None:
    mine = published(MIXED)
    losses = [("mixed-fp8-rtn", "8.1939", "+0.1458", "+1.81 %"), ("w4a4-rtn", "8.1853", "+0.1372", "+1.70 %")]
    for variant, ppl, difference, change in losses:
        row = mine.row("PPL", variant=variant)
        assert (row["PPL"], row["Δ PPL"], row["change"]) == (ppl, difference, change)
        assert row["Δ log-PPL, nats [95 %]"] == f"{math.log(PPL[variant] / PPL['source']):+.4f} †"
    assert mine.row("PPL", variant="source")["PPL"] == "8.0481"
    (table,) = mine.with_heading("PPL")
    assert table.after == tables.NO_INTERVAL
    for words in ("wikitext2-512", "tokens 297,053", "scored tokens 296,472"):
        assert words in table.caption


def test_a_perplexity_that_is_spread_evenly_over_its_581_windows_has_no_interval_either() -> None:
    records = {
        row: make_record("ppl", row, windows(ppl), dataset={**DATASET, "num_tokens": NUM_TOKENS})
        for row, ppl in PPL.items()
    }
    text = tables.terminal_table(quality_tables.perplexity_table({"wikitext2-512": records}))
    assert "windows 581 · scored tokens 296,472" in text and "+0.0180 †" in text and tables.NO_INTERVAL in text


def test_the_mixed_cards_speeds_are_reproduced_below_their_ceilings(published: CardOf) -> None:
    mine = published(MIXED)
    for row, speed in (("source", "170.3 †"), ("mixed-fp8-rtn", "163.4 †")):
        found = mine.row("of ceiling", variant=row)
        assert found["tok/s [95 %]"] == speed
        assert 0 < float(found["of ceiling"].removesuffix(" %")) < 100
    quantized = mine.row("of ceiling", variant="mixed-fp8-rtn")
    assert (quantized["÷ source [95 %]"], quantized["change"]) == (f"{163.4 / 170.3:.3f} †", "-4 %")
    kernels = speed_tables.kernel_table(mine.measured["bench"])
    assert cell(kernels, "kernel", variant="mixed-fp8-rtn") == "FLASHINFER_CUTLASS"
    assert all(table.after == tables.NO_INTERVAL for table in mine.with_heading("tok/s [95 %]"))


def test_the_mixed_cards_mtp_row_has_its_acceptance_and_its_speed_beside_that_without_drafts(published: CardOf) -> None:
    frame = speed_tables.in_setups(speed_tables.decode_table(published(MIXED).measured["bench"]))
    (row,) = frame.rows
    shown = {str(key): tables.cell_text(str(key), value) for key, value in row.items()}
    assert (shown["variant"], shown["tokens_per_second"]) == ("mixed-fp8-rtn+mtp1", "156.9 †")
    assert (shown["acceptance_share"], shown["mean_accepted_length"]) == ("90.8 %", "1.91")
    assert (shown["speed_ratio"], shown["setup_ratio"]) == (f"{156.9 / 170.3:.3f} †", f"{156.9 / 163.4:.3f} †")
    assert shown["ceiling_tokens_per_second"] == "—"  # bytes bound the steps, and a step gives up to two tokens


DEPTHS = [("tg32", "7.93", "11.98", "+51 %"), ("tg32 @ d4096", "7.66", "11.90", "+55 %")]
DEPTHS += [("tg32 @ d8192", "7.92", "11.80", "+49 %")]


@pytest.mark.parametrize(("test", "usual", "included", "change"), DEPTHS)
def test_the_27b_cards_speeds_by_depth_are_reproduced_beside_the_usual_checkpoint(
    published: CardOf, test: str, usual: str, included: str, change: str
) -> None:
    suite = suite_of(W27B)
    assert suite.bench is not None and suite.bench.versus == "w4a4-rtn"
    frame = speed_tables.by_depth(speed_tables.decode_table(published(W27B).measured["bench"], suite.bench.versus))
    assert list(dict.fromkeys(frame["test"])) == [name for name, *_ in DEPTHS]
    for variant, speed in (("w4a4-rtn", usual), ("w4a4-deltanet-rtn", included)):
        where = {"variant": variant, "test": test}
        assert cell(frame, "tokens_per_second", **where) == f"{speed} †"
        assert 0 < float(cell(frame, "ceiling_share", **where).removesuffix(" %")) < 100
    where = {"variant": "w4a4-deltanet-rtn", "test": test}
    assert cell(frame, "speed_change_ratio", **where) == change
    assert cell(frame, "speed_ratio", **where) == f"{float(included) / float(usual):.3f} †"
    assert cell(frame, "speed_ratio", variant="w4a4-rtn", test=test) == "—"
    assert tables.headings_of(frame)["speed_ratio"] == "÷ w4a4-rtn [95 %]"


def test_the_27b_cards_speeds_stand_on_its_own_card_under_the_name_of_what_they_are_divided_by(
    published: CardOf,
) -> None:
    mine = published(W27B)
    speeds = {row["tok/s [95 %]"] for table in mine.with_heading("÷ w4a4-rtn [95 %]") for row in table.rows}
    assert {f"{speed} †" for _, usual, included, _ in DEPTHS for speed in (usual, included)} <= speeds
    changes = {row["change"] for table in mine.with_heading("÷ w4a4-rtn [95 %]") for row in table.rows}
    assert {change for *_, change in DEPTHS} <= changes
    assert not mine.with_heading("÷ source [95 %]")
    prefill = [table for table in mine.with_heading("÷ w4a4-rtn [95 %]") if "prompt tokens 2,048" in table.caption]
    ((usual, included),) = [table.rows for table in prefill]
    assert (usual["tok/s [95 %]"], included["tok/s [95 %]"], included["change"]) == ("1855 †", "2383 †", "+28 %")


def test_the_27b_ceilings_differ_by_as_much_as_the_card_measured() -> None:
    usual, included = (
        planned(W27B, variant, with_mtp=True).output_traffic.weight_bytes
        for variant in ("w4a4-rtn", "w4a4-deltanet-rtn")
    )
    assert 273e9 / usual > 7.93 and 273e9 / included > 11.98
    assert 1.48 < usual / included < 1.56  # what was measured at three depths is from +49 to +55 %


def test_the_16_bit_activations_cards_sizes_counts_and_errors_are_reproduced(published: CardOf) -> None:
    records = published(A16).measured
    totals = build_tables.total_table(records["build"])
    shown = {key: cell(totals, key, variant="nvfp4a16") for key in totals.columns}
    assert (shown["num_quantized"], shown["num_kept"]) == ("128", "632")
    assert (shown["source_bytes"], shown["output_bytes"], shown["bytes_share"]) == ("18.82 GB", "11.20 GB", "59.5 %")
    trips = build_tables.samples_table(records["verify"], "roundtrip")
    assert cell(trips, "max_abs_error", variant="nvfp4a16") == "0.058"
    assert cell(trips, "mean_abs_error", variant="nvfp4a16") == "0.0008"
    text = published(A16).text
    assert all(words in text for words in ("11.20 GB of 18.82 GB (59.5 %)", " 0.058 |", " 0.0008 |"))


def test_the_16_bit_activations_cards_speed_and_memory_are_reproduced(published: CardOf) -> None:
    records = published(A16).measured["bench"]
    frame = speed_tables.single_user(speed_tables.decode_table(records))
    assert cell(frame, "tokens_per_second", variant="nvfp4a16") == "140.0 †"
    assert cell(frame, "speed_ratio", variant="nvfp4a16") == "no record of the source"
    assert cell(speed_tables.kernel_table(records), "kernel", variant="nvfp4a16") == "Marlin FP4"
    assert 0 < float(cell(frame, "ceiling_share", variant="nvfp4a16").removesuffix(" %")) < 100
    # 10.58 GiB = 10.58 x 1.073741824 GB = 11.36 GB: this harness counts 10^9 bytes everywhere.
    assert cell(speed_tables.memory_table(records), "peak_vram_bytes", variant="nvfp4a16") == "11.36 GB"
    assert round(11.36 / 1.073741824, 2) == 10.58
    assert "140.0 †" in published(A16).text and "11.36 GB" in published(A16).text


def test_the_9b_cards_caches_are_reproduced_under_the_setups_that_they_are_of(published: CardOf) -> None:
    mine = published(W4A4_9B)
    for setup, share, tokens in (("headless", 0.95, "110,880"), ("desktop", 0.8, "77,088")):
        assert mine.row("KV cache, tokens", variant=f"w4a4-rtn+{setup}")["KV cache, tokens"] == tokens
        assert suite_of(W4A4_9B).vllm_options(setup) == {"gpu_memory_utilization": share, "max_num_seqs": 64}


def test_the_calibration_sets_of_the_cards_are_reproduced(published: CardOf) -> None:
    sources = build_tables.calibration_table(published(W4A4_9B).measured["build"])
    shown = [[tables.cell_text(key, row[key]) for key in ("num_samples", "max_tokens")] for row in sources.rows]
    assert shown == [["256", "8,192"]] * 4
    method = build_tables.method_table(published(W4A4_35B).measured["build"])
    assert cell(method, "num_tokens", variant="w4a4-rtn") == "524,288" == f"{256 * 2048:,}"


def test_the_experts_and_the_vision_tower_of_the_35b_heretic_card_are_reproduced(published: CardOf) -> None:
    frame = build_tables.role_table(published(W4A4_35B).measured["build"])
    rows = {row["role"]: row for row in frame.rows}
    assert (rows["visual"]["num_tensors"], rows["visual"]["format"]) == (333, "kept")
    experts = [row for role, row in rows.items() if role.startswith("mlp.experts.")]
    assert {row["format"] for row in experts} == {"NVFP4"}
    # A record counts the source's tensors, which hold all experts of a layer. One projection of an expert is 512 x 2048
    # weights, and an artifact has four tensors of it: codes, scales of blocks, and two of the tensor.
    assert sum(row["num_tensors"] for row in experts) == 40 * 2
    assert sum(row["num_params"] for row in experts) // (512 * 2048) * 4 == 40 * 256 * 3 * 4 == 122_880


@pytest.mark.parametrize(
    ("name", "variant", "before", "after"),
    [
        (MIXED, "mixed-fp8-rtn", 67, 24),
        (MIXED, "w4a4-rtn", 67, 24),
        (W4A4_35B, "w4a4-rtn", None, 22),
        (W27B, "w4a4-rtn", None, 27),
        (W27B, "w4a4-deltanet-rtn", None, 20),
    ],
)
def test_rounded_sizes_of_cards_are_whole_gib_rounded_up_as_du_counts(
    published: CardOf, name: str, variant: str, before: int | None, after: int
) -> None:
    totals = build_tables.total_table({variant: published(name).measured["build"][variant]})
    (row,) = totals.rows
    assert math.ceil(row["output_bytes"] / GIB) == after
    assert before is None or math.ceil(row["source_bytes"] / GIB) == before
    # The tables count 10^9 bytes, to a hundredth.
    assert tables.cell_text("output_bytes", row["output_bytes"]) == f"{row['output_bytes'] / 1e9:.2f} GB"
    assert f"{row['output_bytes'] / 1e9:.2f} GB" in published(name).text


@pytest.mark.parametrize("name", RECORDS)
def test_every_mark_on_a_card_is_explained_below_its_table(published: CardOf, name: str) -> None:
    marked = [
        table for table in published(name).tables if any("†" in one for row in table.rows for one in row.values())
    ]
    assert all(table.after == tables.NO_INTERVAL for table in marked)
    assert bool(marked) == (name in (A16, W27B, MIXED))  # the others publish no estimate
