"""What the figures of a suite show: the tables' numbers, each where there is a record, and words that have room."""

import dataclasses
import io
import itertools
import math
import re
import struct
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.image import AxesImage, imread
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from harness.record.run import Record
from harness.report import card, drawings, figure_data, plots, tables
from harness.report.evidence import Evidence, gather
from harness.suite.load import load
from harness.suite.schema import Suite
from tests.records import (
    BUILD,
    ENGINE,
    FIDELITY,
    SENSITIVITY,
    decodes,
    demo_records,
    fidelity_record,
    fidelity_windows,
    make_record,
    windows,
)

LONG = (
    "w4a4-gptq-weighted-search-deltanet-included",
    "w4a4-gptq-weighted-search",
    "nvfp4a16-absmax-and-something-very-long-that-nobody-should-ever-write-but-may",
    "short",
    "mixed-fp8.experts_only-v2",
    "m" * 50,
)
EFFECTIVE = {
    "weight_bytes_per_token": 10**9,
    "state_bytes": 10**7,
    "kv_bytes_per_token": 10**4,
    "bandwidth_bytes_per_second": 273 * 10**9,
}
GPU = {**ENGINE, "name": "vllm", "effective": EFFECTIVE}


def suite_of(folder: Path, variants: Sequence[str], setups: Sequence[str] = ()) -> Suite:
    tables = [f'[variants."{name}"]\nrecipe = "rtn-a16"' for name in variants]
    tables += [f"[setups.{name}]\nspeculative_tokens = 1" for name in setups]
    text = "\n".join(
        [
            'name = "demo"\ntitle = "A demo"\n[source]\nlocation = "./model"',
            *tables,
            '[ppl]\nprotocols = ["wikitext2-512"]\ntext = { demo = "heldout" }',
            '[fidelity]\ntext = { demo = "heldout" }',
        ]
    )
    (folder / "demo.toml").write_text(text)
    return load(folder / "demo.toml")


def expert_samples(routed: Sequence[Sequence[int]], num_tokens: int) -> list[dict[str, Any]]:
    calibration = {
        "kind": "calibration",
        "num_tokens": num_tokens,
        "planned_memory_bytes": 1,
        "peak_vram_bytes": None,
    }
    return [
        calibration,
        *(
            {"kind": "expert", "index": layer, "expert": expert, "num_tokens": num}
            for layer, row in enumerate(routed)
            for expert, num in enumerate(row)
        ),
    ]


def build(variant: str, num_bytes: int, more: Sequence[dict[str, Any]] = ()) -> Record:
    first = {**BUILD[0], "output_bytes": num_bytes - BUILD[1]["output_bytes"]}
    return make_record("build", variant, [first, *BUILD[1:], *more])


def many_records(variants: Sequence[str], *, alike: bool) -> list[Record]:
    """Every measure of every variant: a bandwidth, three depths, four batch sizes, experts; sizes and divergences the
    same or far apart."""
    noise = [0.1 * math.sin(place) for place in range(7)]
    records = [make_record("ppl", "source", windows(8.0, noise)), make_record("sensitivity", "source", SENSITIVITY)]
    for place, name in enumerate(("source", *variants)):
        kl = 0.004 * (1 + 0.001 * place) if alike else 0.05 * 0.5**place
        samples = [one for batch in (1, 2, 8, 64) for one in decodes((1 + place) / 200, batch=batch, num_steps=8)]
        for depth in (1, 4096, 8192):
            at_depth = decodes((1 + place) / 190, num_steps=4)
            samples += [{**one, "prompt_tokens": depth} for one in at_depth]
        records.append(make_record("bench", name, samples, engine=GPU))
        if name != "source":
            routed = [[5, 1 + place, 0], [2, 2, 2]]
            records += [
                build(name, 10**7 if alike else 10**7 + 10**6 * place, expert_samples(routed, 10)),
                make_record(
                    "ppl", name, windows(8.0 + kl, [one + kl * math.cos(3 * i) for i, one in enumerate(noise)])
                ),
                fidelity_record(name, fidelity_windows([kl, 1.2 * kl, 1.1 * kl], kl)),
            ]
    return records


def evidence_of(suite: Suite, records: Sequence[Record]) -> Evidence:
    return gather(suite, records, "results")


def digests(evidence: Evidence) -> dict[str, str | None]:
    """Of every figure that there is something for, without drawing it."""
    shown = evidence.figures
    blank = {name: plots.image_files(name, [one], lambda: plots.canvas(1, 1)) for name, one in shown.items()}
    return {name: figure_data.embedded_digest(blank[name][f"{name}.png"]) for name in shown}


def drawn(name: str, plotted: Any) -> Figure:
    with plots.style():
        return drawings.DRAWINGS[name](plotted)


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    return suite_of(tmp_path, ["nvfp4a16"])


# -- Which there are ---------------------------------------------------------------------------------------------

TWO_BATCHES = decodes(0.01) + decodes(0.02, batch=2)
OF_A_BUILD = [build("nvfp4a16", 10**7)]
OF_FIDELITY = [fidelity_record("nvfp4a16", fidelity_windows([0.01, 0.02, 0.03]))]
WITHIN_A_BAND = [
    {**one, "bands": one["bands"][:1]} for one in fidelity_windows([0.01, 0.02, 0.03])
]  # no window is longer than 512


@pytest.mark.parametrize(
    ("records", "names"),
    [
        ([], []),
        (OF_A_BUILD, ["overview"]),
        (OF_FIDELITY, ["losses", "depth"]),
        ([fidelity_record("nvfp4a16", WITHIN_A_BAND)], ["losses"]),
        ([*OF_A_BUILD, *OF_FIDELITY], ["overview", "divergence", "losses", "depth"]),
        ([fidelity_record("noise-batch", fidelity_windows([0.01])), *OF_A_BUILD], ["overview"]),
        ([make_record("ppl", "source", windows(8.0))], []),
        ([make_record("ppl", "nvfp4a16", windows(8.0))], []),
        ([make_record("ppl", name, windows(8.0)) for name in ("source", "nvfp4a16")], ["overview", "losses"]),
        ([make_record("bench", "source", decodes(0.01))], ["overview", "decode"]),
        ([make_record("bench", name, TWO_BATCHES) for name in ("source", "nvfp4a16")], ["overview", "decode", "batch"]),
        ([make_record("bench", "nvfp4a16", TWO_BATCHES)], ["decode", "batch"]),
        ([make_record("sensitivity", "source", SENSITIVITY)], ["sensitivity"]),
        ([build("nvfp4a16", 10**7, expert_samples([[1, 2]], 3))], ["overview", "experts"]),
    ],
)
def test_a_figure_is_there_exactly_if_something_was_measured_for_it(
    suite: Suite, records: list[Record], names: list[str]
) -> None:
    evidence = evidence_of(suite, records)
    assert list(evidence.figures) == names
    files = card.drawn_files(evidence)
    assert files.keys() == {f"{name}.{kind}" for name in names for kind in ("svg", "png")}
    for name, digest in digests(evidence).items():
        assert {figure_data.embedded_digest(files[f"{name}.{kind}"]) for kind in ("svg", "png")} == {digest}


def test_every_figure_has_words_for_who_cannot_see_it_and_they_keep_their_order(tmp_path: Path) -> None:
    everything = many_records(["a", "b"], alike=False)
    assert list(evidence_of(suite_of(tmp_path, ["a", "b"]), everything).figures) == list(figure_data.FIGURES)
    assert list(figure_data.FIGURES) == [
        *("overview", "divergence", "losses", "decode", "batch", "depth", "sensitivity", "experts")
    ]
    for words in figure_data.FIGURES.values():
        assert len(words) > 30 and not set(words) & set("[]\n")


# -- When they are stale -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("index", "other", "names"),
    [
        (0, build("a", 10**7 + 1, expert_samples([[1, 2]], 3)), {"overview", "divergence"}),
        (0, build("a", 10**7, expert_samples([[2, 1]], 3)), {"experts"}),
        (1, fidelity_record("a", fidelity_windows([0.02, 0.03])), {"divergence", "depth"}),
        (2, make_record("ppl", "a", windows(8.2)), {"overview", "losses"}),
        (3, make_record("bench", "a", [*decodes(0.01), *decodes(0.03, batch=2)]), {"batch"}),
        (3, make_record("bench", "a", [*decodes(0.02), *decodes(0.02, batch=2)]), {"overview", "decode", "batch"}),
        (4, make_record("sensitivity", "source", SENSITIVITY[:-3]), {"sensitivity"}),
    ],
)
def test_a_new_record_changes_the_digests_of_the_figures_that_show_it_alone(
    tmp_path: Path, index: int, other: Record, names: set[str]
) -> None:
    records = [
        build("a", 10**7, expert_samples([[1, 2]], 3)),
        fidelity_record("a", fidelity_windows([0.01, 0.02])),
        make_record("ppl", "a", windows(8.1)),
        make_record("bench", "a", TWO_BATCHES),
        make_record("sensitivity", "source", SENSITIVITY),
        make_record("ppl", "source", windows(8.0)),
        make_record("bench", "source", TWO_BATCHES),
    ]
    suite = suite_of(tmp_path, ["a"])
    before = digests(evidence_of(suite, records))
    after = digests(evidence_of(suite, [*records[:index], other, *records[index + 1 :]]))
    assert before.keys() == after.keys() == set(figure_data.FIGURES)
    assert {name for name in before if before[name] != after[name]} == names


def test_another_commit_and_another_order_of_the_records_change_nothing(suite: Suite) -> None:
    records = demo_records()
    renamed = [
        dataclasses.replace(one, run=dataclasses.replace(one.run, git=None, run_id=f"{place:08x}"))
        for place, one in enumerate(records)
    ]
    assert digests(evidence_of(suite, records)) == digests(evidence_of(suite, renamed[::-1]))


# -- What is drawn -----------------------------------------------------------------------------------------------


def markers(axes: Axes) -> list[tuple[float, float]]:
    """Where single markers stand, in data coordinates."""
    return [
        (float(line.get_xdata()[0]), float(line.get_ydata()[0]))
        for line in axes.lines
        if len(line.get_xdata()) == 1 and line.get_transform() == axes.transData
    ]


def intervals(axes: Axes, *, upright: bool = False) -> list[tuple[float, float]]:
    """The ends of the lines that lead from one value to another."""
    found = []
    for line in axes.lines:
        xs, ys = line.get_xdata(), line.get_ydata()
        along, across = (ys, xs) if upright else (xs, ys)
        if len(along) == 2 and across[0] == across[1] and line.get_transform() == axes.transData:
            found.append((float(along[0]), float(along[1])))
    return found


def words_of(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def test_the_divergence_has_each_variants_bytes_and_kl_and_the_source_at_zero(tmp_path: Path) -> None:
    evidence = evidence_of(suite_of(tmp_path, ["a", "b"]), many_records(["a", "b"], alike=False))
    axes = drawn("divergence", evidence.figures["divergence"]).axes[0]
    rows = evidence.tables["fidelity"].rows
    assert markers(axes) == [
        (18.0, 0.0),
        *((megabytes, row["kl"].value) for megabytes, row in zip((11.0, 12.0), rows, strict=True)),
    ]
    assert intervals(axes, upright=True) == [(row["kl"].low, row["kl"].high) for row in rows]
    # 0.025 and 0.0125 x 1.1: within a factor of eight, so that zero is on a linear scale
    assert axes.get_yscale() == "linear" and "log" not in axes.get_ylabel()


def test_variants_of_one_size_and_divergence_stand_side_by_side_with_their_intervals(tmp_path: Path) -> None:
    names = ["a", "b", "far"]
    means = {"a": 0.01, "b": 0.0101, "far": 0.03}
    records = [
        *(build(name, 10**7 + 10**3 * (name == "b")) for name in names),
        *(fidelity_record(name, fidelity_windows([0.9 * kl, kl, 1.1 * kl])) for name, kl in means.items()),
    ]
    figure = drawn("divergence", evidence_of(suite_of(tmp_path, names), records).figures["divergence"])
    axes = figure.axes[0]
    figure.draw_without_rendering()
    _, *points = axes.transData.transform(markers(axes)) * 72 / figure.dpi
    apart = points[1][0] - points[0][0]
    assert 7 <= apart <= 12  # points: a marker has 7
    assert markers(axes)[3] == (10.0, pytest.approx(0.03))
    assert np.mean([x for x, _ in markers(axes)[1:3]]) == pytest.approx(10.0005, abs=1e-6)
    assert len({line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 2}) == 3
    note = "Variants of nearly the same size and divergence stand side by side, around that size."
    assert note in words_of(figure)
    alone = evidence_of(suite_of(tmp_path, names), [records[0], *records[2:4], records[5]])
    assert note not in words_of(drawn("divergence", alone.figures["divergence"]))


def test_divergences_far_apart_are_on_a_logarithmic_scale_that_still_has_a_zero(tmp_path: Path) -> None:
    names = [f"v{place}" for place in range(6)]
    evidence = evidence_of(suite_of(tmp_path, names), many_records(names, alike=False))
    axes = drawn("divergence", evidence.figures["divergence"]).axes[0]
    assert axes.get_yscale() == "symlog"
    ticks = axes.get_yticks()
    assert f"linear up to {ticks[1]:g}, logarithmic above" in axes.get_ylabel()
    assert ticks[0] == 0 and all(
        re.fullmatch(r"0|0\.0*[125]", label.get_text()) for label in axes.get_yticklabels() if label.get_text()
    )
    low, high = axes.get_ylim()
    assert low <= 0 and all(low < y < high for _, y in markers(axes))


def test_a_divergence_within_the_noise_is_at_the_noise_and_says_so(tmp_path: Path) -> None:
    suite = suite_of(tmp_path, ["a", "b"])
    records = [
        *(build(name, 10**7) for name in ("a", "b")),
        fidelity_record("a", fidelity_windows([0.001, 0.001])),
        fidelity_record("b", fidelity_windows([0.1, 0.1])),
        fidelity_record("noise-batch", fidelity_windows([0.002, 0.002])),
    ]
    plotted = evidence_of(suite, records).figures["divergence"]
    floor = plotted.floor
    assert floor == pytest.approx(0.002, rel=1e-3)
    figure = drawn("divergence", plotted)
    assert markers(figure.axes[0])[1] == (10.0, floor)
    assert "a (≤ noise)" in words_of(figure) and "b" in words_of(figure)


def test_the_losses_are_those_of_the_tables_by_protocol_and_from_the_fidelity(tmp_path: Path) -> None:
    evidence = evidence_of(suite_of(tmp_path, ["a", "b"]), many_records(["a", "b"], alike=False))
    plotted = evidence.figures["losses"]
    figure = drawn("losses", plotted)
    wanted = [row["delta_log_ppl"] for row in evidence.tables["perplexity"].rows if row["variant"] != "source"] + list(
        evidence.tables["fidelity"]["kl_log_ppl"]
    )
    axes = figure.axes[0]
    assert [x for x, _ in markers(axes)] == [one.value for one in wanted]
    assert intervals(axes) == [(one.low, one.high) for one in wanted if one.low is not None]
    assert [group.heading for group in plotted.groups] == [
        "wikitext2-512, per token",
        "fidelity, windows of 1,024, per token",
    ]
    for one in wanted:
        assert any(words.startswith(f"{one.value:+.4f}") for words in words_of(figure))


def test_the_decode_figure_has_speeds_and_the_ceilings_that_arithmetic_gives(tmp_path: Path) -> None:
    evidence = evidence_of(suite_of(tmp_path, ["a"]), many_records(["a"], alike=False))
    plotted = evidence.figures["decode"]
    axes = drawn("decode", plotted).axes[0]
    bars = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    speeds = [bar.get_width() for bar in bars if bar.get_fill()]
    ceilings = [bar.get_width() for bar in bars if not bar.get_fill()]
    depths = (1, 128, 4096, 8192)
    assert [group.heading.split(",  ")[0] for group in plotted.groups] == [
        f"after {depth:,} token{'s' if depth > 1 else ''}, {8 if depth == 128 else 4} timed" for depth in depths
    ]
    exact = [speed / (1 + place) for depth in depths for place, speed in enumerate([200 if depth == 128 else 190] * 2)]
    assert speeds == pytest.approx(exact, rel=1e-3)  # the median of an even number of rates is between two
    steps = [10**9 + 2 * 10**7 + depth * 10**4 for depth in depths for _ in range(2)]
    assert ceilings == pytest.approx([273 * 10**9 / step for step in steps])
    first = plotted.groups[0].marks[0]
    assert first.words.endswith(f", {190 / ceilings[0] * 100:.1f} % of {ceilings[0]:.1f}")


def test_the_decode_figure_says_what_the_table_says_with_its_mark(tmp_path: Path) -> None:
    effective = {**EFFECTIVE, "bandwidth_bytes_per_second": 11.126 * (10**9 + 2 * 10**7 + 128 * 10**4)}
    slow = make_record("bench", "source", decodes(1 / 7.928, repetitions=1), engine={**GPU, "effective": effective})
    evidence = evidence_of(suite_of(tmp_path, ["a"]), [slow])
    plotted = evidence.figures["decode"]
    assert plotted.groups[0].marks[0].words == "7.93 †, 71.3 % of 11.13"
    cells = {cell.strip() for cell in tables.markdown_table(evidence.tables["decode"], lambda _: "").split("|")}
    assert {"7.93 †", "71.3 %", "11.13"} <= cells
    said = " ".join(" ".join(words_of(drawn("decode", plotted))).split())
    assert "† no interval" in said
    quick = evidence_of(suite_of(tmp_path, ["a"]), [make_record("bench", "source", decodes(0.01))])
    assert "†" not in " ".join(words_of(drawn("decode", quick.figures["decode"])))


def test_speeds_of_another_session_are_named_and_not_drawn(suite: Suite) -> None:
    source = make_record("bench", "source", TWO_BATCHES)
    apart = make_record("bench", "nvfp4a16", TWO_BATCHES, session_id="ffffffff")
    shown = evidence_of(suite, [source, apart]).figures
    assert [(mark.variant, mark.words) for mark in shown["decode"].groups[0].marks if mark.value is None] == [
        ("nvfp4a16", "incomparable: session_id")
    ]
    assert [curve.variant for curve in shown["batch"].total] == ["source"]
    note = "Not drawn: nvfp4a16 (incomparable: session_id)"
    assert note in words_of(drawn("batch", shown["batch"]))
    assert "incomparable: session_id" in words_of(drawn("decode", shown["decode"]))


def test_divergences_on_another_text_are_named_and_not_drawn(tmp_path: Path) -> None:
    records = [
        *(build(name, 10**7) for name in ("a", "b")),
        fidelity_record("a", fidelity_windows([0.01, 0.01])),
        fidelity_record("b", fidelity_windows([0.02, 0.02]), dataset={**FIDELITY, "token_ids_sha256": "9" * 64}),
    ]
    shown = evidence_of(suite_of(tmp_path, ["a", "b"]), records).figures
    assert [point.variant for point in shown["divergence"].points] == ["a"]
    assert [curve.variant for curve in shown["depth"].curves] == ["a"]
    for name in ("divergence", "depth"):
        assert "Not drawn: b (incomparable: dataset.token_ids_sha256)" in shown[name].note


def test_the_batch_curves_are_the_tables_speeds_in_total_and_for_each_user(tmp_path: Path) -> None:
    evidence = evidence_of(suite_of(tmp_path, ["a"]), many_records(["a"], alike=False))
    plotted = evidence.figures["batch"]
    panels = drawn("batch", plotted).axes
    for axes, key in zip(panels, ("tokens_per_second", "user_tokens_per_second"), strict=True):
        rows = [row for row in evidence.tables["decode"].rows if row["prompt_tokens"] == 128]
        assert [y for _, y in markers(axes)] == [row[key].value for row in rows]
        sizes = [x for x, _ in markers(axes)]
        assert np.log2(sizes) == pytest.approx([math.log2(row["batch"]) for row in rows], abs=0.06)
    assert plotted.shape == "after 128 tokens, 8 timed"


def test_the_depths_are_the_bands_of_the_table(tmp_path: Path) -> None:
    evidence = evidence_of(suite_of(tmp_path, ["a", "b"]), many_records(["a", "b"], alike=False))
    axes = drawn("depth", evidence.figures["depth"]).axes[0]
    rows = evidence.tables["bands"].rows
    assert [y for _, y in markers(axes)] == [row["kl"].value for row in rows]
    assert [round(x) for x, _ in markers(axes)] == [0, 1, 0, 1]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1 – 511", "512 – 1,024"]


def test_the_experts_are_shares_of_the_calibration_tokens_and_crosses(suite: Suite) -> None:
    routed = [[8, 0, 2], [4, 4, 2]]
    evidence = evidence_of(suite, [build("nvfp4a16", 10**7, expert_samples(routed, 10))])
    figure = drawn("experts", evidence.figures["experts"])
    axes = figure.axes[0]
    squares = next(one for one in axes.collections if isinstance(one, PatchCollection))
    assert sorted(squares.get_array()) == pytest.approx([0.2, 0.2, 0.4, 0.4, 0.8])
    crosses = next(line for line in axes.lines if line.get_marker() == "x")
    assert (list(crosses.get_xdata()), list(crosses.get_ydata())) == ([1], [0])
    assert axes.get_title(loc="left") == "nvfp4a16: 1 of 6 experts got none of 10 tokens (×)"
    assert [text for text in words_of(figure) if text.endswith(" %")].count("80 %") == 1


@pytest.mark.parametrize(
    ("other", "num_panels"),
    [
        ([[400, 300, 300], [500, 490, 10]], 1),
        ([[409, 291, 300], [500, 490, 10]], 1),  # 0.9 points
        ([[415, 285, 300], [500, 490, 10]], 2),  # 1.5 points
        ([[400, 300, 300], [500, 486, 14]], 2),  # 0.4 points, and a tenth of the scale of colours
        ([[400, 300, 300], [500, 500, 0]], 2),  # a cross
        ([[400, 300, 300]], 2),
    ],
)
def test_builds_whose_experts_look_the_same_share_a_panel(
    tmp_path: Path, other: list[list[int]], num_panels: int
) -> None:
    routed = [[400, 300, 300], [500, 490, 10]]
    records = [build(name, 10**7, expert_samples(counts, 1000)) for name, counts in (("a", routed), ("b", other))]
    plotted = evidence_of(suite_of(tmp_path, ["a", "b"]), records).figures["experts"]
    titles = [axes.get_title(loc="left") for axes in drawn("experts", plotted).axes[:-1]]
    assert len(titles) == num_panels
    if num_panels == 2:
        assert [title.partition(":")[0] for title in titles] == ["a", "b"]
    else:
        (title,) = (" ".join(title.split()) for title in titles)
        assert title.startswith("a, b: every expert got tokens, the fewest 10 of 1,000 (layer 1, expert 2)")
        told = "drawn: the first, from which no share of the others differs by more than 0.9 points"
        assert (told in title) == (other != routed)


@pytest.mark.parametrize("num", [1, 2, 12])
def test_the_names_of_many_builds_in_one_panel_stay_in_the_picture(tmp_path: Path, num: int) -> None:
    names = [*LONG, *(f"{place}-{'w' * 60}" for place in range(6))][:num]
    routed = [[400 + place % 2, 600] for place in range(num)]
    records = [build(name, 10**7, expert_samples([counts], 1000)) for name, counts in zip(names, routed, strict=True)]
    figure = drawn("experts", evidence_of(suite_of(tmp_path, names), records).figures["experts"])
    assert len(figure.axes) == 2  # a panel and the colours
    title = "".join(figure.axes[0].get_title(loc="left").split())
    assert title.startswith(",".join(names) + ":")
    for dpi in (100, 160):
        assert crowded(figure, dpi) == []


def test_a_large_mixture_is_an_image_with_a_cross_for_each_expert_that_got_nothing(suite: Suite) -> None:
    generator = np.random.default_rng(0)
    routed = generator.integers(1, 5000, size=(40, 256))
    routed[3, 7] = routed[39, 255] = 0
    records = [build("nvfp4a16", 10**7, expert_samples(routed.tolist(), 262_144))]
    evidence = evidence_of(suite, records)
    axes = drawn("experts", evidence.figures["experts"]).axes[0]
    image = next(one for one in axes.images if isinstance(one, AxesImage))
    pixels = np.asarray(image.get_array())
    assert pixels.shape == (40, 256, 4)
    assert (pixels[..., 3] > 0).tolist() == (routed > 0).tolist()
    crosses = next(line for line in axes.lines if line.get_marker() == "x")
    assert sorted(zip(crosses.get_ydata(), crosses.get_xdata(), strict=True)) == [(3, 7), (39, 255)]
    brightest, darkest = (np.unravel_index(place, routed.shape) for place in (routed.argmax(), (routed > 0).argmin()))
    assert pixels[brightest].tolist()[:3] != pixels[darkest].tolist()[:3]
    files = card.drawn_files(evidence)
    assert all(len(files[f"experts.{kind}"]) < 500_000 for kind in ("svg", "png"))


def test_a_variant_has_the_same_colour_and_marker_in_every_figure_and_in_its_setups(tmp_path: Path) -> None:
    records = many_records(["a", "b", "c"], alike=False)
    for name in ("b", "c"):
        records.append(fidelity_record(f"{name}+mtp1", fidelity_windows([0.2, 0.2, 0.2])))
    shown = evidence_of(suite_of(tmp_path, ["a", "b", "c"], ["mtp1"]), records).figures
    looks: dict[str, set[tuple[str, str]]] = {}
    everything = [
        *shown["overview"].rows,
        *shown["divergence"].points,
        *(mark for name in ("losses", "decode") for group in shown[name].groups for mark in group.marks),
        *(*shown["batch"].total, *shown["batch"].per_user, *shown["depth"].curves),
    ]
    for one in everything:
        looks.setdefault(one.variant.removesuffix("+mtp1"), set()).add((one.look.colour, one.look.marker))
    assert looks.keys() == {"source", "a", "b", "c"}
    assert all(len(found) == 1 for found in looks.values())
    assert len(set.union(*looks.values())) == 4
    weights = {point.variant: point.num_bytes for point in shown["divergence"].points}
    assert weights["b+mtp1"] == weights["b"]


# -- As pictures -------------------------------------------------------------------------------------------------


def texts_of(figure: Figure) -> list[Text]:
    """Every text that is drawn: the labels of ticks outside of an axis are not."""
    hidden: set[Text] = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
                if not low - 1e-9 <= tick.get_loc() <= high + 1e-9:
                    hidden |= {tick.label1, tick.label2}
    return [
        text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip() and text not in hidden
    ]


def crowded(figure: Figure, dpi: int) -> list[str]:
    """Which words leave the picture, and which lie on others."""
    figure.set_dpi(dpi)
    figure.draw_without_rendering()
    boxes = [(text.get_text(), Text.get_window_extent(text)) for text in texts_of(figure)]
    width, height = figure.bbox.width, figure.bbox.height
    wrong = [
        f"{words!r} leaves the picture"
        for words, box in boxes
        if box.x0 < 0 or box.y0 < 0 or box.x1 > width or box.y1 > height
    ]
    for (words, box), (others, other) in itertools.combinations(boxes, 2):
        across = min(box.x1, other.x1) - max(box.x0, other.x0)
        along = min(box.y1, other.y1) - max(box.y0, other.y0)
        if across > 0.5 and along > 0.5:
            wrong.append(f"{words!r} lies on {others!r}")
    return wrong


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize(
    "variants",
    [["a"], ["nvfp4a16", "w4a4"], list(LONG), [f"variant-{place}" for place in range(12)]],
    ids=["one", "two", "six with long names", "twelve"],
)
def test_no_words_cover_others_or_leave_the_picture(tmp_path: Path, variants: list[str], alike: bool) -> None:
    evidence = evidence_of(suite_of(tmp_path, variants), many_records(variants, alike=alike))
    for name, plotted in evidence.figures.items():
        for dpi in (100, 160):  # of a screen, and of the PNG
            assert crowded(drawn(name, plotted), dpi) == [], name


def test_the_test_of_crowding_finds_what_it_looks_for() -> None:
    with plots.style():
        figure = plots.canvas(4, 3)
        figure.text(0.5, 0.5, "one")
        figure.text(0.5, 0.51, "two")
        figure.text(0.99, 0.1, "too far")
    assert crowded(figure, 100) == ["'too far' leaves the picture", "'one' lies on 'two'"]


@pytest.mark.parametrize("num", [1, 6, 12])
def test_pictures_have_a_size_that_a_page_can_show_and_no_number_that_is_none(tmp_path: Path, num: int) -> None:
    names = [f"variant-{place}" for place in range(num)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        files = card.drawn_files(evidence_of(suite_of(tmp_path, names), many_records(names, alike=False)))
    for name, data in files.items():
        assert len(data) < 800_000, name
        if name.endswith(".png"):
            width, height = struct.unpack(">II", data[16:24])
            assert 1400 <= width <= 1600 and 250 <= height <= 4000, name
        else:
            assert not re.search(rb"\b(nan|inf)\b", data), name


def test_what_is_all_zero_or_all_the_same_can_be_drawn(tmp_path: Path) -> None:
    nothing = fidelity_windows([0.0, 0.0])
    records = [
        build("a", 18 * 10**6, expert_samples([[0, 0]], 5)),
        fidelity_record("a", nothing),
        *(make_record("ppl", name, windows(8.0)) for name in ("source", "a")),
        *(make_record("bench", name, decodes(0.01, spread=0) + decodes(0.01, 2, spread=0)) for name in ("source", "a")),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        files = card.drawn_files(evidence_of(suite_of(tmp_path, ["a"]), records))
    assert {name.partition(".")[0] for name in files} == set(figure_data.FIGURES) - {"sensitivity"}
    assert not any(re.search(rb"\b(nan|inf)\b", data) for name, data in files.items() if name.endswith("svg"))


def test_pictures_have_no_ground_of_their_own(suite: Suite) -> None:
    for name, data in card.drawn_files(evidence_of(suite, demo_records())).items():
        if name.endswith(".png"):
            pixels = imread(io.BytesIO(data))
            assert pixels.shape[2] == 4 and (pixels[0, :, 3] == 0).all() and (pixels[..., 3] == 0).mean() > 0.4, name
