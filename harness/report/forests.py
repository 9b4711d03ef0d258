"""Figures with a row or a curve for each variant: losses, decode speeds, speeds over batch sizes, divergence by
position.
"""

import textwrap
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

from harness.report import columns, labels
from harness.report.figure_data import SOURCE_COLOUR, Bands, Batches, Curve, Forest, Mark, MarkGroup
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
)

_WORDS_WIDTH = 40
_LINE = 0.17  # inches, of text
_ROW = 0.33  # inches, of a forest at least


def draw_losses(plotted: Forest) -> Figure:
    """What every variant loses, with its interval, by one protocol after the other."""
    figure, axes, rows = _forest(plotted.groups, "Loss against the source: Δ log-perplexity", "Δ [95 % interval]")
    axes.axvline(0, color=SOURCE_COLOUR, linewidth=1.2, linestyle=ZERO_LINE)
    if plotted.floor:
        axes.axvspan(-plotted.floor, plotted.floor, color=INK, alpha=0.18, linewidth=0)
    for y, mark in rows:
        if mark.value is not None:
            draw_estimate(axes, mark.value, y, mark.look)
    low, high = reach([mark.value for _, mark in rows if mark.value is not None])
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
        if group.heading:
            heading_lines = textwrap.fill(group.heading, _WORDS_WIDTH)
            height = 0.12 * (number > 0) + 0.12 + _LINE * labels.num_lines(heading_lines)
            names.append((y + height - 0.06 - _LINE / 2, heading_lines, INK))
            y += height
        for mark in group.marks:
            name, said = labels.wrapped(mark.variant, NAME_WIDTH), textwrap.fill(mark.words, _WORDS_WIDTH)
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
    name_rows(axes, names, 9.5)
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
    add_footnote(figure, columns.NO_INTERVAL if any(columns.lacks_interval(mark.value) for _, mark in rows) else "")
    return figure, axes, rows


def draw_batches(plotted: Batches) -> Figure:
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
        axes.set_ylim(0, 1.08 * max(end for curve in curves for one in curve.values for end in interval_ends(one)))
        ends = [
            _draw_curve(axes, curve, [x * 2 ** (0.05 * _aside(place, len(curves))) for x in curve.xs])
            for place, curve in enumerate(curves)
        ]
    panels[0].set_ylabel(f"tokens per second, 95 % interval\n({plotted.shape})")
    _name_curves(panels[1], plotted.per_user, ends)
    add_footnote(figure, plotted.note)
    return figure


def draw_bands(plotted: Bands) -> Figure:
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
    scale_words = set_nats_axis(axes, [one for curve in curves for one in curve.values], with_zero=False)
    axes.set_ylabel(f"{NATS_LABEL}{scale_words}")
    ends = [
        _draw_curve(axes, curve, [x + 0.025 * _aside(place, len(curves)) for x in curve.xs])
        for place, curve in enumerate(curves)
    ]
    _name_curves(axes, curves, ends)
    add_footnote(figure, plotted.note)
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
        draw_marker(axes, x, value, look)
    return xs[-1], values[-1]


def _name_curves(axes: Axes, curves: Sequence[Curve], ends: Sequence[tuple[float, float]]) -> None:
    names = [labels.wrapped(curve.variant, NAME_WIDTH) for curve in curves]
    labels.at_the_right(axes, names, ends, [curve.look for curve in curves], led=True)
