"""How figures look and are saved: colours that everyone can tell apart, digests, and words that find their place."""

import itertools
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import isotonic_regression

from harness.report import figure_data, heatmaps, plots

PAGES = ("#ffffff", "#0d1117")
# Machado, Oliveira and Fernandes, A Physiologically-based Model for Simulation of Color Vision Deficiency (2009),
# severity 1.0, on linear RGB.
EYES = {
    "all cones": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def linear(colour: str) -> np.ndarray:
    """An sRGB colour as linear RGB."""
    srgb = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)]) / 255
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def oklab(rgb: np.ndarray) -> np.ndarray:
    """Ottosson, A perceptual color space for image processing (2020)."""
    to_cones = [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
    to_lab = [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
    return np.array(to_lab) @ np.cbrt(np.array(to_cones) @ np.clip(rgb, 0, 1))


def contrast(one: str, other: str) -> float:
    """WCAG 2.2's ratio of relative luminances."""
    low, high = sorted(float(linear(colour) @ [0.2126, 0.7152, 0.0722]) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("page", PAGES)
def test_every_colour_can_be_seen_on_a_light_page_and_on_a_dark_one(page: str) -> None:
    assert all(contrast(colour, page) >= 3 for colour in (*figure_data.COLOURS, figure_data.SOURCE_COLOUR))
    assert contrast(plots.INK, page) >= 3.9


@pytest.mark.parametrize("eyes", EYES)
def test_no_two_colours_look_alike_to_any_eyes(eyes: str) -> None:
    seen = [
        oklab(np.array(EYES[eyes]) @ linear(colour)) for colour in (*figure_data.COLOURS, figure_data.SOURCE_COLOUR)
    ]
    assert min(float(np.linalg.norm(one - other)) for one, other in itertools.combinations(seen, 2)) >= 0.09


def test_two_dozen_variants_look_different_and_each_keeps_its_colour_in_a_setup() -> None:
    variants = [f"v{number}" for number in range(24)]
    looks = figure_data.looks(variants, ("mtp1", "kv-fp8"))
    assert len(looks) == 25 * 3
    assert len(set(looks.values())) == len(looks)
    for name in ("source", *variants):
        rows = [looks[row] for row in (name, f"{name}+mtp1", f"{name}+kv-fp8")]
        assert len({(row.colour, row.marker) for row in rows}) == 1
        assert [row.line for row in rows] == ["-", "--", "--"]


# -- Files -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    values: tuple[float, ...]


def files_of(*values: float) -> dict[str, bytes]:
    return plots.image_files("x", [Shown(values)], lambda: plots.canvas(1, 1))


def test_the_digest_is_the_datas_alone_and_rounding_does_not_change_it() -> None:
    assert figure_data.embedded_digest(files_of(0.1 + 0.2)["x.svg"]) == figure_data.embedded_digest(
        files_of(0.3)["x.png"]
    )
    digests = {
        figure_data.embedded_digest(files_of(*values)["x.png"]) for values in ((), (0.3,), (0.3000001,), (0.3, 0.3))
    }
    assert len(digests) == 4 and None not in digests
    assert figure_data.embedded_digest(b"no figure") is None


def test_the_users_own_style_changes_nothing() -> None:
    before = files_of(1.0)
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.hashsalt": None}):
        assert files_of(1.0) == before


# -- Heat maps ---------------------------------------------------------------------------------------------------


def heat_map(cells: list[figure_data.Cell]) -> dict[str, bytes]:
    plotted = figure_data.Sensitivity(tuple(cells))
    return plots.image_files("sensitivity", [plotted], lambda: heatmaps.draw_sensitivity(plotted))


def test_the_heat_map_is_stale_only_if_an_error_changed() -> None:
    cells = [figure_data.Cell(layer, "mlp.down_proj", "NVFP4", 0.01 * (layer + 1)) for layer in range(3)]
    figure = heat_map([*cells, figure_data.Cell(3, "mlp.down_proj", "NVFP4", None)])
    assert figure == heat_map([*cells, figure_data.Cell(3, "mlp.down_proj", "NVFP4", None)])
    other = heat_map([*cells, figure_data.Cell(3, "mlp.down_proj", "NVFP4", 0.02)])
    name = "sensitivity.svg"
    assert figure_data.embedded_digest(figure[name]) != figure_data.embedded_digest(other[name])


@pytest.mark.parametrize("errors", [[None], [None] * 64, [0.0, 0.01], [0.01], [0.01] * 64, [0.01] * 3000])
def test_a_heat_map_can_be_drawn_of_anything(errors: list[float | None]) -> None:
    made = heat_map([figure_data.Cell(layer, "mlp.down_proj", "NVFP4", error) for layer, error in enumerate(errors)])
    assert made["sensitivity.png"].startswith(b"\x89PNG")


# -- Words -------------------------------------------------------------------------------------------------------


@given(st.text("abc019-_.+", min_size=1, max_size=120), st.integers(6, 30))
def test_a_long_name_takes_three_short_lines_and_keeps_its_ends(name: str, width: int) -> None:
    lines = plots.wrapped(name, width).split("\n")
    assert len(lines) <= 3 and all(0 < len(line) <= width for line in lines)
    whole = "".join(lines)
    if "…" not in whole:
        assert whole == name
    else:
        start, end = whole.split("…")
        assert name.startswith(start) and name.endswith(end) and len(start) + len(end) < len(name)


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("w4a4", ["w4a4"]),
        ("w4a4-gptq-deltanet", ["w4a4-gptq-", "deltanet"]),
        ("a" * 25, ["a" * 11, "a" * 11, "a" * 3]),
    ],
)
def test_a_name_breaks_after_its_hyphens_where_it_can(name: str, lines: list[str]) -> None:
    assert plots.wrapped(name, 12).split("\n") == lines


PLACES = st.lists(st.tuples(st.floats(0, 100), st.floats(0.5, 5)), min_size=1, max_size=15)


@given(PLACES)
def test_labels_are_spread_as_little_as_can_be(items: list[tuple[float, float]]) -> None:
    wanted, sizes = (list(column) for column in zip(*items, strict=True))
    places = plots.spread(wanted, sizes, -1e9, 1e9)
    order = np.argsort(wanted, kind="stable")
    size = np.array(sizes)[order]
    offsets = np.cumsum(size) - size / 2
    best = isotonic_regression(np.array(wanted)[order] - offsets).x + offsets
    assert np.array(places)[order] == pytest.approx(best, abs=1e-6)


@given(PLACES)
def test_labels_stay_apart_in_order_and_within_bounds(items: list[tuple[float, float]]) -> None:
    wanted, sizes = (list(column) for column in zip(*items, strict=True))
    places = plots.spread(wanted, sizes, 0, 100)  # room for 15 of size 5
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    for one, next_one in itertools.pairwise(order):
        assert places[next_one] - places[one] >= (sizes[one] + sizes[next_one]) / 2 - 1e-6
    for place, size in zip(places, sizes, strict=True):
        assert size / 2 - 1e-6 <= place <= 100 - size / 2 + 1e-6
