"""The figures of sizes, losses and divergences: the overview, and bytes against divergence."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from harness.report import labels
from harness.report.figure_data import SOURCE_COLOUR, Divergence, Overview, Row, SizePoint
from harness.report.numbers import byte_unit, format_bytes
from harness.report.plots import INK, canvas
from harness.report.strokes import (
    NAME_WIDTH,
    NATS_LABEL,
    ZERO_LINE,
    add_footnote,
    draw_estimate,
    draw_marker,
    interval_ends,
    name_rows,
    reach,
    set_nats_axis,
    write_beside,
)

_NUM_DOTS = 200
_BESIDE = 9.0  # points, between markers that would cover each other


def draw_overview(plotted: Overview) -> Figure:
    """What every variant weighs, what it loses, and how long a decode step takes."""
    rows = plotted.rows
    figure = canvas(10, 1.3 + 0.65 * len(rows))
    size, loss, speed = figure.subplots(1, 3, sharey=True, width_ratios=(1, 1.15, 1.25))
    for axes in (size, loss, speed):
        axes.grid(axis="x")
        axes.set_axisbelow(True)
    name_rows(size, [(float(y), labels.wrapped(row.variant, 18), row.look.colour) for y, row in enumerate(rows)], 11)
    size.set_ylim(len(rows) - 0.4, -0.6)  # the source on top
    _draw_sizes(size, rows)
    _draw_losses(loss, rows)
    _draw_steps(speed, rows)
    return figure


def _nothing_yet(axes: Axes, session: str) -> None:
    axes.set_xticks([])
    axes.text(
        0.5, 0.5, f"nothing to compare yet:\nnox -s {session}", transform=axes.transAxes, ha="center", va="center"
    )


def _draw_sizes(axes: Axes, rows: Sequence[Row]) -> None:
    axes.set_title("Checkpoint size")
    known = [row.num_bytes for row in rows if row.num_bytes is not None]
    if not known:
        return _nothing_yet(axes, "build")
    unit, scale = byte_unit(max(known))
    for y, row in enumerate(rows):
        if row.num_bytes is not None:
            axes.barh(y, row.num_bytes / scale, height=0.5, color=row.look.colour)
            write_beside(axes, format_bytes(row.num_bytes), row.num_bytes / scale, y)
    axes.set_xlim(0, 1.5 * max(known) / scale)
    axes.set_xlabel(unit)
    axes.locator_params(axis="x", nbins=4)
    return None


def _draw_losses(axes: Axes, rows: Sequence[Row]) -> None:
    axes.set_title("Loss: Δ log-perplexity")
    known = [row.loss for row in rows if row.loss is not None]
    if not known:
        return _nothing_yet(axes, "ppl")
    axes.axvline(0, color=SOURCE_COLOUR, linewidth=1.2, linestyle=ZERO_LINE)
    axes.plot(0, 0, "o", color=SOURCE_COLOUR, markersize=7)
    for y, row in enumerate(rows):
        if row.loss is not None:
            draw_estimate(axes, row.loss, y, row.look)
            write_beside(axes, f"{row.loss.value:+.4f}", max(interval_ends(row.loss)), y)
    low, high = reach(known)
    axes.set_xlim(low - 0.1 * (high - low), high + 0.6 * (high - low))
    axes.set_xlabel("nats per token, 95 % interval")
    axes.locator_params(axis="x", nbins=4)
    return None


def _draw_steps(axes: Axes, rows: Sequence[Row]) -> None:
    """Every row's step times as 200 dots, each a quantile: the same amount of ink for ten steps and for a million."""
    axes.set_title("Decode step, batch 1")
    known = [row.step_seconds for row in rows if row.step_seconds]
    if not known:
        return _nothing_yet(axes, "bench")
    limit = 1.08 * max(float(np.quantile(seconds, 0.985)) for seconds in known) * 1e3
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
    return None


def draw_divergence(plotted: Divergence) -> Figure:
    """A point for each variant: farther left is smaller, farther down is closer to the source."""
    points = [*([plotted.source] if plotted.source else []), *plotted.points]
    figure = canvas(9, 4.6 + 0.1 * max(0, len(points) - 7))
    axes = figure.subplots()
    axes.set_title("Checkpoint size and divergence from the source")
    axes.grid()
    axes.set_axisbelow(True)
    unit, scale = byte_unit(max(point.num_bytes for point in points))
    floor = plotted.floor or 0.0
    measured = [point.kl for point in plotted.points if point.kl is not None]
    scale_words = set_nats_axis(axes, measured, with_zero=True, least=floor)
    sizes = [point.num_bytes / scale for point in points]
    margin = 0.14 * (max(sizes) - min(sizes)) or 0.1 * max(sizes)
    axes.set_xlim(min(sizes) - margin, max(sizes) + 1.6 * margin)
    axes.set_xlabel(f"checkpoint size, {unit}  (farther left: smaller)")
    axes.set_ylabel(f"{NATS_LABEL}\n(farther down: closer{scale_words})")
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
    beside = _beside(axes, sizes, heights)
    notes = [plotted.note] if plotted.note else []
    if beside != sizes:
        notes.append("Variants of nearly the same size and divergence stand side by side, around that size.")
    add_footnote(figure, "\n".join(notes))
    sizes = beside
    for x, y, point in zip(sizes, heights, points, strict=True):
        look = point.look
        if point.kl is not None and point.kl.low is not None and point.kl.high is not None:
            axes.plot([x, x], [point.kl.low, point.kl.high], color=look.colour, linewidth=2, solid_capstyle="butt")
        draw_marker(axes, x, y, look, alpha=0.75)  # an interval that is shorter shows
    figure.draw_without_rendering()
    taken = [_around(axes, x, y, point) for x, y, point in zip(sizes, heights, points, strict=True)]
    inside, zero = axes.get_window_extent(), float(axes.transData.transform((0, 0))[1])
    taken.append(Bbox.from_extents(inside.x0, zero - 1, inside.x1, zero + 1))  # the line that the source lies on
    names = [
        labels.wrapped(point.variant, NAME_WIDTH) + ("" if point.kl or point is plotted.source else " (≤ noise)")
        for point in points
    ]
    places = list(zip(sizes, heights, strict=True))
    if not labels.beside(axes, names, places, [point.look.colour for point in points], taken):
        labels.at_the_right(axes, names, places, [point.look for point in points], led=False)
    return figure


def _beside(axes: Axes, xs: Sequence[float], ys: Sequence[float]) -> list[float]:
    """Where on the horizontal axis markers stand so that none covers another: those that overlap side by side, in
    their order and as near to their places as can be; all others where they are."""
    figure = axes.figure
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()
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
            for index, x in zip(pile, labels.spread(wanted, [apart] * len(pile), -math.inf, math.inf), strict=True):
                places[index] = float(axes.transData.inverted().transform((x, spots[index][1]))[0])
    return places


def _around(axes: Axes, x: float, y: float, point: SizePoint) -> Bbox:
    """What a point and its interval cover, in pixels."""
    ends = [y] if point.kl is None else [y, *interval_ends(point.kl)]
    corners = axes.transData.transform([(x, min(ends)), (x, max(ends))])
    return Bbox.from_extents(*(corners[0] - 7), *(corners[1] + 7))
