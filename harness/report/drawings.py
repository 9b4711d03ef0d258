"""The figures that are no heat maps: the overview, bytes against divergence, losses, decode speeds, speeds over batch
sizes, divergence by position.
"""

import math
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator
from matplotlib.transforms import Bbox

from harness.report import heatmaps, plots
from harness.report.figure_data import (
    SOURCE_COLOUR,
    Bands,
    Batches,
    Curve,
    Divergence,
    Forest,
    Mark,
    MarkGroup,
    Overview,
    Row,
    SizePoint,
)
from harness.report.numbers import byte_unit, format_bytes
from harness.report.plots import INK, NAME_WIDTH, canvas, draw_estimate, draw_interval, draw_marker, interval_ends
from harness.report.tables import NO_INTERVAL, lacks_interval

_NUM_DOTS = 200
_BESIDE = 9.0  # points, between markers that would cover each other
_WORDS_WIDTH = 40
_LINE = 0.17  # inches, of text
_ROW = 0.33  # inches, of a forest at least


# -- Sizes, losses and divergences -------------------------------------------------------------------------------


def draw_overview(plotted: Overview) -> Figure:
    """What every variant weighs, what it loses, and how long a decode step takes."""
    rows = plotted.rows
    figure = canvas(10, 1.3 + 0.65 * len(rows))
    size, loss, speed = figure.subplots(1, 3, sharey=True, width_ratios=(1, 1.15, 1.25))
    plots.name_rows(
        size, [(float(y), plots.wrapped(row.variant, 18), row.look.colour) for y, row in enumerate(rows)], 11
    )
    size.set_ylim(len(rows) - 0.4, -0.6)  # the source on top
    for axes, title, session, draw_rows, is_known in (
        (size, "Checkpoint size", "build", _draw_sizes, any(row.num_bytes is not None for row in rows)),
        (loss, "Loss: Δ log-perplexity", "ppl", _draw_losses, any(row.loss is not None for row in rows)),
        (speed, "Decode step, batch 1", "bench", _draw_steps, any(row.step_seconds for row in rows)),
    ):
        plots.set_up(axes, title, "x")
        if is_known:
            draw_rows(axes, rows)
        else:
            axes.set_xticks([])
            words = f"nothing to compare yet:\nnox -s {session}"
            axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", va="center")
    return figure


def _draw_sizes(axes: Axes, rows: Sequence[Row]) -> None:
    largest = max(row.num_bytes for row in rows if row.num_bytes is not None)
    unit, scale = byte_unit(largest)
    for y, row in enumerate(rows):
        if row.num_bytes is not None:
            axes.barh(y, row.num_bytes / scale, height=0.5, color=row.look.colour)
            plots.write_beside(axes, format_bytes(row.num_bytes), row.num_bytes / scale, y)
    axes.set_xlim(0, 1.5 * largest / scale)
    axes.set_xlabel(unit)
    axes.locator_params(axis="x", nbins=4)


def _draw_losses(axes: Axes, rows: Sequence[Row]) -> None:
    axes.axvline(0, color=SOURCE_COLOUR, linewidth=1.2, linestyle=plots.ZERO_LINE)
    axes.plot(0, 0, "o", color=SOURCE_COLOUR, markersize=7)
    for y, row in enumerate(rows):
        if row.loss is not None:
            draw_estimate(axes, row.loss, y, row.look)
            plots.write_beside(axes, f"{row.loss.value:+.4f}", max(interval_ends(row.loss)), y)
    low, high = plots.reach([row.loss for row in rows if row.loss is not None])
    axes.set_xlim(low - 0.1 * (high - low), high + 0.6 * (high - low))
    axes.set_xlabel("nats per token, 95 % interval")
    axes.locator_params(axis="x", nbins=4)


def _draw_steps(axes: Axes, rows: Sequence[Row]) -> None:
    """Every row's step times as 200 dots, each a quantile: the same amount of ink for ten steps and for a million."""
    limit = 1.08 * max(float(np.quantile(row.step_seconds, 0.985)) for row in rows if row.step_seconds) * 1e3
    shares = (np.arange(_NUM_DOTS) + 0.5) / _NUM_DOTS
    # Multiples of the golden ratio, modulo 1, spread any number of dots evenly without a random generator.
    heights = (np.arange(_NUM_DOTS) * 0.6180339887 % 1 - 0.5) * 0.44
    lowest = limit
    for y, row in enumerate(rows):
        if row.step_seconds:
            colour = row.look.colour
            dots = np.quantile(row.step_seconds, shares) * 1e3
            inside = dots <= limit
            axes.scatter(dots[inside], y + heights[inside], s=9, color=colour, alpha=0.6, linewidths=0)
            outside = y + heights[~inside]
            axes.scatter(np.full(len(outside), limit), outside, s=18, marker=">", color=colour, clip_on=False)
            middle = float(np.median(row.step_seconds)) * 1e3
            axes.plot([middle, middle], [y - 0.3, y + 0.3], color=colour, linewidth=2.5)
            axes.annotate(f"{middle:.3g} ms", (middle, y - 0.3), (0, 3), textcoords="offset points", ha="center")
            lowest = min(lowest, float(dots[0]))
    axes.set_xlim(max(0.0, lowest - 0.15 * (limit - lowest)), limit)
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel("ms (dot: 0.5 % of steps,\nbar: median, ▸: slower)")


def draw_divergence(plotted: Divergence) -> Figure:
    """A point for each variant: farther left is smaller, farther down is closer to the source."""
    points = [*([plotted.source] if plotted.source else []), *plotted.points]
    figure = canvas(9, 4.6 + 0.1 * max(0, len(points) - 7))
    axes = figure.subplots()
    plots.set_up(axes, "Checkpoint size and divergence from the source", "both")
    unit, scale = byte_unit(max(point.num_bytes for point in points))
    floor = plotted.floor or 0.0
    measured = [point.kl for point in plotted.points if point.kl is not None]
    scale_words = plots.set_nats_axis(axes, measured, with_zero=True, least=floor)
    sizes = [point.num_bytes / scale for point in points]
    margin = 0.14 * (max(sizes) - min(sizes)) or 0.1 * max(sizes)
    axes.set_xlim(min(sizes) - margin, max(sizes) + 1.6 * margin)
    axes.set_xlabel(f"checkpoint size, {unit}  (farther left: smaller)")
    axes.set_ylabel(f"{plots.NATS_LABEL}\n(farther down: closer{scale_words})")
    if floor:
        axes.axhspan(0, floor, color=INK, alpha=0.18, linewidth=0)
        axes.annotate(
            "noise: the source beside itself",
            (1, floor),
            (-4, 2),
            xycoords=axes.get_yaxis_transform(),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=8,
        )
    heights = [0.0 if point is plotted.source else point.kl.value if point.kl else floor for point in points]
    xs = _side_by_side(axes, sizes, heights)
    notes = [plotted.note] if plotted.note else []
    if xs != sizes:
        notes.append("Variants of nearly the same size and divergence stand side by side, around that size.")
    plots.add_footnote(figure, "\n".join(notes))
    places = list(zip(xs, heights, strict=True))
    for (x, y), point in zip(places, points, strict=True):
        if point.kl is not None:
            draw_interval(axes, x, point.kl, point.look, 2)
        draw_marker(axes, x, y, point.look, alpha=0.75)  # an interval that is shorter shows
    figure.draw_without_rendering()
    taken = [_around(axes, x, y, point) for (x, y), point in zip(places, points, strict=True)]
    inside, zero = axes.get_window_extent(), float(axes.transData.transform((0, 0))[1])
    taken.append(Bbox.from_extents(inside.x0, zero - 1, inside.x1, zero + 1))  # the line that the source lies on
    names = [
        plots.wrapped(point.variant, NAME_WIDTH) + ("" if point.kl or point is plotted.source else " (≤ noise)")
        for point in points
    ]
    if not plots.beside(axes, names, places, [point.look.colour for point in points], taken):
        plots.at_the_right(axes, names, places, [point.look for point in points], led=False)
    return figure


def _side_by_side(axes: Axes, xs: Sequence[float], ys: Sequence[float]) -> list[float]:
    """Where on the horizontal axis markers stand so that none covers another: those that overlap side by side, in
    their order and as near to their places as can be; all others where they are."""
    figure = plots.laid_out(axes)
    spots = axes.transData.transform(list(zip(xs, ys, strict=True)))
    apart = _BESIDE * figure.dpi / 72
    piles: list[list[int]] = []  # of markers each of which overlaps another
    for index, spot in enumerate(spots):
        touched = [pile for pile in piles if any((abs(spots[other] - spot) < apart).all() for other in pile)]
        piles = [pile for pile in piles if pile not in touched] + [[*(one for pile in touched for one in pile), index]]
    places = list(xs)
    for pile in piles:
        if len(pile) > 1:
            wanted = [float(spots[index][0]) for index in pile]
            for index, x in zip(pile, plots.spread(wanted, [apart] * len(pile), -math.inf, math.inf), strict=True):
                places[index] = float(axes.transData.inverted().transform((x, spots[index][1]))[0])
    return places


def _around(axes: Axes, x: float, y: float, point: SizePoint) -> Bbox:
    """What a point and its interval cover, in pixels."""
    ends = [y] if point.kl is None else [y, *interval_ends(point.kl)]
    corners = axes.transData.transform([(x, min(ends)), (x, max(ends))])
    return Bbox.from_extents(*(corners[0] - 7), *(corners[1] + 7))


# -- A row or a curve for each variant ---------------------------------------------------------------------------


def draw_losses(plotted: Forest) -> Figure:
    """What every variant loses, with its interval, by one protocol after the other."""
    figure, axes, rows = _forest(plotted.groups, "Loss against the source: Δ log-perplexity", "Δ [95 % interval]")
    axes.axvline(0, color=SOURCE_COLOUR, linewidth=1.2, linestyle=plots.ZERO_LINE)
    if plotted.floor:
        axes.axvspan(-plotted.floor, plotted.floor, color=INK, alpha=0.18, linewidth=0)
    for y, mark in rows:
        if mark.value is not None:
            draw_estimate(axes, mark.value, y, mark.look)
    low, high = plots.reach([mark.value for _, mark in rows if mark.value is not None])
    margin = 0.08 * (high - low)
    axes.set_xlim(low - margin, high + margin)
    axes.locator_params(axis="x", nbins=6)
    told = ", grey: what it differs from itself by" if plotted.floor else ""
    axes.set_xlabel(f"nats (farther right is worse)\ndashed line: the source{told}")
    return figure


def draw_decode_speeds(plotted: Forest) -> Figure:
    """How fast every variant decodes for one user, and how fast memory would allow, by one prompt after the other."""
    marks = [mark for group in plotted.groups for mark in group.marks]
    has_ceiling = any(mark.ceiling for mark in marks)
    heading = "tok/s [95 % interval]" + (", share of the ceiling" if has_ceiling else "")
    figure, axes, rows = _forest(plotted.groups, "Decode speed, one user (batch 1)", heading)
    for y, mark in rows:
        if mark.value is None:
            continue
        height = 0.5 * _ROW
        axes.barh(y, mark.value.value, height=height, color=mark.look.colour, alpha=0.3, linewidth=0)
        if mark.ceiling is not None:
            axes.barh(y, mark.ceiling, height=height, fill=False, edgecolor=mark.look.colour, linewidth=1.2)
        draw_estimate(axes, mark.value, y, mark.look)
    ends = [end for mark in marks if mark.value for end in (*interval_ends(mark.value), mark.ceiling or 0.0)]
    axes.set_xlim(0, 1.04 * max(ends))
    told = "\noutline: the ceiling, the most that memory bandwidth allows" if has_ceiling else ""
    axes.set_xlabel(f"tokens per second (farther right is faster){told}")
    return figure


def _forest(groups: Sequence[MarkGroup], title: str, heading: str) -> tuple[Figure, Axes, list[tuple[float, Mark]]]:
    """A figure with a row for each mark, names on the left and words on the right. Heights are in inches."""
    rows: list[tuple[float, Mark]] = []
    names: list[tuple[float, str, str]] = []
    words: list[tuple[float, str]] = []
    y = 0.0
    for number, group in enumerate(groups):
        heading_lines = textwrap.fill(group.heading, _WORDS_WIDTH)
        height = 0.12 * (number > 0) + 0.12 + _LINE * plots.num_lines(heading_lines)
        names.append((y + height - 0.06 - _LINE / 2, heading_lines, INK))
        y += height
        for mark in group.marks:
            name, said = plots.wrapped(mark.variant, NAME_WIDTH), textwrap.fill(mark.words, _WORDS_WIDTH)
            height = max(_ROW, 0.1 + _LINE * max(plots.num_lines(name), plots.num_lines(said)))
            y += height / 2
            rows.append((y, mark))
            names.append((y, name, mark.look.colour))
            words.append((y, said))
            y += height / 2
    figure = canvas(10, y + 1.4)
    axes = figure.subplots()
    plots.set_up(axes, title, "x")
    axes.set_ylim(y + 0.04, -0.04)
    plots.name_rows(axes, names, 9.5)
    written: dict[str, Any] = {
        "xycoords": axes.get_yaxis_transform(),
        "textcoords": "offset points",
        "fontsize": 9,
    }
    for place, said in words:
        axes.annotate(said, (1, place), (10, 0), va="center", **written)
    axes.annotate(heading, (1, -0.04), (10, 10), va="bottom", **written)
    plots.add_footnote(figure, NO_INTERVAL if any(lacks_interval(mark.value) for _, mark in rows) else "")
    return figure, axes, rows


def draw_batches(plotted: Batches) -> Figure:
    """Tokens per second over the batch size: of all users together, and of each."""
    figure = canvas(10, 4.0 + 0.16 * max(0, len(plotted.total) - 8))
    panels = figure.subplots(1, 2)
    sizes = sorted({size for curve in plotted.total for size in curve.xs})
    titles = ("Decode speed, all users together", "Decode speed of each user")
    for axes, title, curves in zip(panels, titles, (plotted.total, plotted.per_user), strict=True):
        plots.set_up(axes, title, "both")
        axes.set_xscale("log", base=2)
        axes.set_xlim(sizes[0] / 1.25, sizes[-1] * 1.25)
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("batch size: users at once")
        axes.set_ylim(0, 1.08 * max(end for curve in curves for one in curve.values for end in interval_ends(one)))
        ends = _draw_curves(axes, curves, lambda x, aside: x * 2 ** (0.05 * aside))
    panels[0].set_ylabel(f"tokens per second, 95 % interval\n({plotted.shape})")
    _name_curves(panels[1], plotted.per_user, ends)
    plots.add_footnote(figure, plotted.note)
    return figure


def draw_bands(plotted: Bands) -> Figure:
    """How far every variant predicts from the source, by how many tokens the model has read before."""
    curves = plotted.curves
    figure = canvas(9, 4.0 + 0.16 * max(0, len(curves) - 8))
    axes = figure.subplots()
    plots.set_up(axes, "Divergence from the source by position in the window", "both")
    axes.set_xticks(range(len(plotted.names)), plotted.names)
    axes.set_xlim(-0.3, len(plotted.names) - 0.7)
    axes.set_xlabel("tokens before the predicted one")
    scale_words = plots.set_nats_axis(axes, [one for curve in curves for one in curve.values], with_zero=False)
    axes.set_ylabel(f"{plots.NATS_LABEL}{scale_words}")
    ends = _draw_curves(axes, curves, lambda x, aside: x + 0.025 * aside)
    _name_curves(axes, curves, ends)
    plots.add_footnote(figure, plotted.note)
    return figure


def _draw_curves(
    axes: Axes, curves: Sequence[Curve], moved: Callable[[float, float], float]
) -> list[tuple[float, float]]:
    """Draws curves, and returns where each ends. `moved` takes an x and how far its curve stands aside, so that
    intervals at one place stand beside each other: evenly around 0, by at most 2.5 each way."""
    ends = []
    for place, curve in enumerate(curves):
        aside = (place - (len(curves) - 1) / 2) * min(1.0, 5 / len(curves))
        look, xs = curve.look, [moved(x, aside) for x in curve.xs]
        for x, one in zip(xs, curve.values, strict=True):
            draw_interval(axes, x, one, look, 1.6)
        values = [one.value for one in curve.values]
        axes.plot(xs, values, color=look.colour, linewidth=1.2, linestyle=look.line, alpha=0.8)
        for x, value in zip(xs, values, strict=True):
            draw_marker(axes, x, value, look)
        ends.append((xs[-1], values[-1]))
    return ends


def _name_curves(axes: Axes, curves: Sequence[Curve], ends: Sequence[tuple[float, float]]) -> None:
    names = [plots.wrapped(curve.variant, NAME_WIDTH) for curve in curves]
    plots.at_the_right(axes, names, ends, [curve.look for curve in curves], led=True)


DRAWINGS: dict[str, Callable[[Any], Figure]] = {
    "overview": draw_overview,
    "divergence": draw_divergence,
    "losses": draw_losses,
    "decode": draw_decode_speeds,
    "batch": draw_batches,
    "depth": draw_bands,
    "sensitivity": heatmaps.draw_sensitivity,
    "experts": heatmaps.draw_experts,
}
"""Each draws the dataclass that `Evidence.figures` has for its name, inside `plots.style()`."""
