"""The figures of a suite, each from one dataclass that holds what it shows: sizes, losses, divergences and speeds.

Drawn inside `plots.style()`. Heat maps are in `heatmaps`, what goes into a figure is in `figures`.
"""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator
from matplotlib.transforms import Bbox

from harness.record.stats import Estimate
from harness.report import columns, labels
from harness.report.numbers import byte_unit, format_bytes
from harness.report.plots import INK, SOURCE_COLOUR, Look, canvas

_NUM_DOTS = 200
_NAME_WIDTH = 24  # characters
_WORDS_WIDTH = 40
_LINE = 0.17  # inches, of text
_ROW = 0.33  # inches, of a forest at least
_BESIDE = 9.0  # points, between markers that would cover each other
_WIDE = 8.0  # the largest number over the smallest from which on a scale is logarithmic
_ZERO = (0, (4, 3))
_NATS = "KL divergence to the source,\nnats per token, 95 % interval"


@dataclass(frozen=True)
class Row:
    """One variant in the overview. What has no record, or may not be compared with the source's, is None or empty."""

    variant: str
    look: Look
    num_bytes: int | None
    loss: Estimate | None  # difference of log-perplexity to the source, nats
    step_seconds: tuple[float, ...]  # every kept decode step at batch 1


@dataclass(frozen=True)
class Overview:
    """The first row is the source's."""

    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Point:
    """What a variant weighs and how far it is from the source, in nats per token; `kl` is None where that is not above
    the noise."""

    variant: str
    look: Look
    num_bytes: int
    kl: Estimate | None


@dataclass(frozen=True)
class Divergence:
    """`source` is at 0 nats, `floor` what it came to beside itself. `note` says what is not drawn, and why."""

    source: Point | None
    points: tuple[Point, ...]
    floor: float | None
    note: str


@dataclass(frozen=True)
class Mark:
    """One row of a forest: a value, its ceiling where there is one, and what is written beside it; without a value the
    words say why."""

    variant: str
    look: Look
    value: Estimate | None
    words: str
    ceiling: float | None = None


@dataclass(frozen=True)
class Group:
    """Rows under one heading; no heading where there is only one group."""

    heading: str
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class Forest:
    """`floor` is what the source differs from itself by, None where that is unknown or nothing."""

    groups: tuple[Group, ...]
    floor: float | None = None


@dataclass(frozen=True)
class Curve:
    """A variant's values over `xs`: batch sizes, or places in `Bands.names`."""

    variant: str
    look: Look
    xs: tuple[int, ...]
    values: tuple[Estimate, ...]


@dataclass(frozen=True)
class Batches:
    """Tokens per second over batch sizes, in total and for each user; `shape` says of what prompts."""

    total: tuple[Curve, ...]
    per_user: tuple[Curve, ...]
    shape: str
    note: str


@dataclass(frozen=True)
class Bands:
    """Divergences over bands of positions, which `names` names."""

    names: tuple[str, ...]
    curves: tuple[Curve, ...]
    note: str


# -- Overview ----------------------------------------------------------------------------------------------------


def overview(plotted: Overview) -> Figure:
    """What every variant weighs, what it loses, and how long a decode step takes."""
    rows = plotted.rows
    figure = canvas(10, 1.3 + 0.65 * len(rows))
    size, loss, speed = figure.subplots(1, 3, sharey=True, width_ratios=(1, 1.15, 1.25))
    for axes in (size, loss, speed):
        axes.grid(axis="x")
        axes.set_axisbelow(True)
    _name_rows(size, [(float(y), labels.wrapped(row.variant, 18), row.look.colour) for y, row in enumerate(rows)], 11)
    size.set_ylim(len(rows) - 0.4, -0.6)  # the source on top
    _draw_sizes(size, rows)
    _draw_losses(loss, rows)
    _draw_steps(speed, rows)
    return figure


def _name_rows(axes: Axes, names: Sequence[tuple[float, str, str]], size: float) -> None:
    """Names (y, words, colour) on the left of the axes."""
    axes.set_yticks([y for y, _, _ in names], [words for _, words, _ in names], fontsize=size)
    for label, (_, _, colour) in zip(axes.get_yticklabels(), names, strict=True):
        label.set_color(colour)
        label.set_fontweight("bold")


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
            _write(axes, format_bytes(row.num_bytes), row.num_bytes / scale, y)
    axes.set_xlim(0, 1.5 * max(known) / scale)
    axes.set_xlabel(unit)
    axes.locator_params(axis="x", nbins=4)
    return None


def _draw_losses(axes: Axes, rows: Sequence[Row]) -> None:
    axes.set_title("Loss: Δ log-perplexity")
    known = [row.loss for row in rows if row.loss is not None]
    if not known:
        return _nothing_yet(axes, "ppl")
    axes.axvline(0, color=SOURCE_COLOUR, linewidth=1.2, linestyle=_ZERO)
    axes.plot(0, 0, "o", color=SOURCE_COLOUR, markersize=7)
    for y, row in enumerate(rows):
        if row.loss is not None:
            _draw_estimate(axes, row.loss, y, row.look)
            _write(axes, f"{row.loss.value:+.4f}", max(_ends(row.loss)), y)
    low, high = _reach(known)
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


# -- Bytes against divergence ------------------------------------------------------------------------------------


def divergence(plotted: Divergence) -> Figure:
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
    scale_words = _nats_axis(axes, measured, with_zero=True, least=floor)
    sizes = [point.num_bytes / scale for point in points]
    margin = 0.14 * (max(sizes) - min(sizes)) or 0.1 * max(sizes)
    axes.set_xlim(min(sizes) - margin, max(sizes) + 1.6 * margin)
    axes.set_xlabel(f"checkpoint size, {unit}  (farther left: smaller)")
    axes.set_ylabel(f"{_NATS}\n(farther down: closer{scale_words})")
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
    _footnote(figure, "\n".join(notes))
    sizes = beside
    for x, y, point in zip(sizes, heights, points, strict=True):
        look = point.look
        if point.kl is not None and point.kl.low is not None and point.kl.high is not None:
            axes.plot([x, x], [point.kl.low, point.kl.high], color=look.colour, linewidth=2, solid_capstyle="butt")
        _draw_marker(axes, x, y, look, alpha=0.75)  # an interval that is shorter shows
    figure.draw_without_rendering()
    taken = [_around(axes, x, y, point) for x, y, point in zip(sizes, heights, points, strict=True)]
    inside, zero = axes.get_window_extent(), float(axes.transData.transform((0, 0))[1])
    taken.append(Bbox.from_extents(inside.x0, zero - 1, inside.x1, zero + 1))  # the line that the source lies on
    names = [
        labels.wrapped(point.variant, _NAME_WIDTH) + ("" if point.kl or point is plotted.source else " (≤ noise)")
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


def _around(axes: Axes, x: float, y: float, point: Point) -> Bbox:
    """What a point and its interval cover, in pixels."""
    ends = [y] if point.kl is None else [y, *_ends(point.kl)]
    corners = axes.transData.transform([(x, min(ends)), (x, max(ends))])
    return Bbox.from_extents(*(corners[0] - 7), *(corners[1] + 7))


def _nats_axis(axes: Axes, values: Sequence[Estimate], *, with_zero: bool, least: float = 0.0) -> str:
    """A scale for divergences, from 0 on; where they are far apart, logarithmic from the smallest on, as the words say
    that it returns for the axis's label."""
    told = ""
    ends = [end for one in values for end in _ends(one)] + [least]
    positive = [one.value for one in values if one.value > 0] + [least] * (least > 0)
    top = max(ends) or 1e-6
    if positive and max(positive) > _WIDE * min(positive):
        decades = range(math.floor(math.log10(min(positive))) - 1, math.ceil(math.log10(top)) + 1)
        ticks = [step * 10.0**decade for decade in decades for step in (1, 2, 5)]
        first = max(tick for tick in ticks if tick <= min(positive))
        axes.set_yscale("symlog", linthresh=first, linscale=0.4)
        axes.set_yticks([0.0, *(tick for tick in ticks if tick >= first)])
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_ylim(-0.2 * first if with_zero else min(0.9 * end for end in ends if end > 0), 1.4 * top)
        told = f";\nlinear up to {_plain(first)}, logarithmic above"
    else:
        axes.set_ylim(-0.04 * top, 1.15 * top)
        axes.locator_params(axis="y", nbins=6)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda nats, _: _plain(nats)))
    return told


def _plain(nats: float) -> str:
    return f"{nats:.10g}"


# -- Forests -----------------------------------------------------------------------------------------------------


def losses(plotted: Forest) -> Figure:
    """What every variant loses, with its interval, by one protocol after the other."""
    figure, axes, rows = _forest(plotted.groups, "Loss against the source: Δ log-perplexity", "Δ [95 % interval]")
    axes.axvline(0, color=SOURCE_COLOUR, linewidth=1.2, linestyle=_ZERO)
    if plotted.floor:
        axes.axvspan(-plotted.floor, plotted.floor, color=INK, alpha=0.18, linewidth=0)
    for y, mark in rows:
        if mark.value is not None:
            _draw_estimate(axes, mark.value, y, mark.look)
    low, high = _reach([mark.value for _, mark in rows if mark.value is not None])
    margin = 0.08 * (high - low)
    axes.set_xlim(low - margin, high + margin)
    axes.locator_params(axis="x", nbins=6)
    told = ", grey: what it differs from itself by" if plotted.floor else ""
    axes.set_xlabel(f"nats (farther right is worse)\ndashed line: the source{told}")
    return figure


def decode(plotted: Forest) -> Figure:
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
        _draw_estimate(axes, mark.value, y, mark.look)
    ends = [end for mark in marks if mark.value for end in (*_ends(mark.value), mark.ceiling or 0.0)]
    axes.set_xlim(0, 1.04 * max(ends))
    told = "\noutline: the ceiling, the most that memory bandwidth allows" if has_ceiling else ""
    axes.set_xlabel(f"tokens per second (farther right is faster){told}")
    return figure


def _forest(groups: Sequence[Group], title: str, heading: str) -> tuple[Figure, Axes, list[tuple[float, Mark]]]:
    """A figure with a row for each mark, names on the left and words on the right. Heights are in inches."""
    rows: list[tuple[float, Mark]] = []
    names: list[tuple[float, str, str]] = []
    words: list[tuple[float, str]] = []
    y = 0.0
    for number, group in enumerate(groups):
        if group.heading:
            heading_lines = textwrap.fill(group.heading, _WORDS_WIDTH)
            height = 0.12 * (number > 0) + 0.12 + _LINE * labels.num_lines(heading_lines)
            names.append((y + height - 0.06 - _LINE / 2, heading_lines, INK))
            y += height
        for mark in group.marks:
            name, said = labels.wrapped(mark.variant, _NAME_WIDTH), textwrap.fill(mark.words, _WORDS_WIDTH)
            height = max(_ROW, 0.1 + _LINE * max(labels.num_lines(name), labels.num_lines(said)))
            y += height / 2
            rows.append((y, mark))
            names.append((y, name, mark.look.colour))
            words.append((y, said))
            y += height / 2
    figure = canvas(10, y + 1.4)
    axes = figure.subplots()
    axes.set_title(title)
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    axes.set_ylim(y + 0.04, -0.04)
    _name_rows(axes, names, 9.5)
    across = axes.get_yaxis_transform()
    for place, said in [(place, said) for place, said in words] + [(-0.04, heading)]:
        is_heading = place < 0
        axes.annotate(
            said,
            (1, place),
            (10, 10 if is_heading else 0),
            xycoords=across,
            textcoords="offset points",
            va="bottom" if is_heading else "center",
            fontsize=9,
        )
    _footnote(figure, columns.NO_INTERVAL if any(columns.lacks_interval(mark.value) for _, mark in rows) else "")
    return figure, axes, rows


# -- Curves ------------------------------------------------------------------------------------------------------


def batch(plotted: Batches) -> Figure:
    """Tokens per second over the batch size: of all users together, and of each."""
    figure = canvas(10, 4.0 + 0.16 * max(0, len(plotted.total) - 8))
    panels = figure.subplots(1, 2)
    sizes = sorted({size for curve in plotted.total for size in curve.xs})
    titles = ("Decode speed, all users together", "Decode speed of each user")
    for axes, title, curves in zip(panels, titles, (plotted.total, plotted.per_user), strict=True):
        axes.set_title(title)
        axes.grid()
        axes.set_axisbelow(True)
        axes.set_xscale("log", base=2)
        axes.set_xlim(sizes[0] / 1.25, sizes[-1] * 1.25)
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("batch size: users at once")
        axes.set_ylim(0, 1.08 * max(end for curve in curves for one in curve.values for end in _ends(one)))
        ends = [
            _draw_curve(axes, curve, [x * 2 ** (0.05 * _aside(place, len(curves))) for x in curve.xs])
            for place, curve in enumerate(curves)
        ]
    panels[0].set_ylabel(f"tokens per second, 95 % interval\n({plotted.shape})")
    _name_curves(panels[1], plotted.per_user, ends)
    _footnote(figure, plotted.note)
    return figure


def depth(plotted: Bands) -> Figure:
    """How far every variant predicts from the source, by how many tokens the model has read before."""
    curves = plotted.curves
    figure = canvas(9, 4.0 + 0.16 * max(0, len(curves) - 8))
    axes = figure.subplots()
    axes.set_title("Divergence from the source by position in the window")
    axes.grid()
    axes.set_axisbelow(True)
    axes.set_xticks(range(len(plotted.names)), plotted.names)
    axes.set_xlim(-0.3, len(plotted.names) - 0.7)
    axes.set_xlabel("tokens before the predicted one")
    scale_words = _nats_axis(axes, [one for curve in curves for one in curve.values], with_zero=False)
    axes.set_ylabel(f"{_NATS}{scale_words}")
    ends = [
        _draw_curve(axes, curve, [x + 0.025 * _aside(place, len(curves)) for x in curve.xs])
        for place, curve in enumerate(curves)
    ]
    _name_curves(axes, curves, ends)
    _footnote(figure, plotted.note)
    return figure


def _aside(place: int, num: int) -> float:
    """How far a curve is moved so that intervals at one place stand beside each other: evenly around 0, by at most 2.5
    each way."""
    return (place - (num - 1) / 2) * min(1.0, 5 / num)


def _draw_curve(axes: Axes, curve: Curve, xs: Sequence[float]) -> tuple[float, float]:
    """Draws a curve over `xs`, and returns where it ends."""
    look, values = curve.look, [one.value for one in curve.values]
    for x, one in zip(xs, curve.values, strict=True):
        if one.low is not None and one.high is not None:
            axes.plot([x, x], [one.low, one.high], color=look.colour, linewidth=1.6, solid_capstyle="butt")
    axes.plot(xs, values, color=look.colour, linewidth=1.2, linestyle=look.line, alpha=0.8)
    for x, value in zip(xs, values, strict=True):
        _draw_marker(axes, x, value, look)
    return xs[-1], values[-1]


def _name_curves(axes: Axes, curves: Sequence[Curve], ends: Sequence[tuple[float, float]]) -> None:
    names = [labels.wrapped(curve.variant, _NAME_WIDTH) for curve in curves]
    labels.at_the_right(axes, names, ends, [curve.look for curve in curves], led=True)


# -- Common ------------------------------------------------------------------------------------------------------


def _draw_estimate(axes: Axes, one: Estimate, y: float, look: Look) -> None:
    """A value on the horizontal axis and its interval."""
    if one.low is not None and one.high is not None:
        axes.plot([one.low, one.high], [y, y], color=look.colour, linewidth=3, solid_capstyle="butt")
    _draw_marker(axes, one.value, y, look)


def _draw_marker(axes: Axes, x: float, y: float, look: Look, alpha: float = 1.0) -> None:
    axes.plot(x, y, look.marker, color=look.colour, fillstyle=look.fill, markersize=7, alpha=alpha, zorder=3)


def _write(axes: Axes, words: str, x: float, y: float) -> None:
    axes.annotate(words, (x, y), (8, 0), textcoords="offset points", va="center")


def _footnote(figure: Figure, note: str) -> None:
    if note:
        lines = [textwrap.fill(line, 110) for line in note.splitlines()]
        figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=8, color=INK)


def _ends(one: Estimate) -> list[float]:
    return [end for end in (one.value, one.low, one.high) if end is not None]


def _reach(values: Sequence[Estimate]) -> tuple[float, float]:
    """From the lowest to the highest end of any interval, 0 among them; never nothing."""
    ends = [0.0, *(end for one in values for end in _ends(one))]
    return min(ends), max(ends) if max(ends) > min(ends) else min(ends) + 0.01
