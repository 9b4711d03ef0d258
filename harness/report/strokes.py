"""What several figures draw in the same way: estimates with their intervals, names of rows, a scale of nats, a
footnote.
"""

import math
import textwrap
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from harness.record.stats import Estimate
from harness.report.figure_data import Look
from harness.report.plots import INK

NAME_WIDTH = 24  # characters
_WIDE = 8.0  # the largest number over the smallest from which on a scale is logarithmic
ZERO_LINE = (0, (4, 3))
NATS_LABEL = "KL divergence to the source,\nnats per token, 95 % interval"


def draw_estimate(axes: Axes, one: Estimate, y: float, look: Look) -> None:
    """A value on the horizontal axis and its interval."""
    if one.low is not None and one.high is not None:
        axes.plot([one.low, one.high], [y, y], color=look.colour, linewidth=3, solid_capstyle="butt")
    draw_marker(axes, one.value, y, look)


def draw_marker(axes: Axes, x: float, y: float, look: Look, alpha: float = 1.0) -> None:
    """A variant's marker at a point in data coordinates."""
    axes.plot(x, y, look.marker, color=look.colour, fillstyle=look.fill, markersize=7, alpha=alpha, zorder=3)


def write_beside(axes: Axes, words: str, x: float, y: float) -> None:
    """Words to the right of a point in data coordinates."""
    axes.annotate(words, (x, y), (8, 0), textcoords="offset points", va="center")


def add_footnote(figure: Figure, note: str) -> None:
    """A note below the axes, in lines of at most 110 characters; nothing without words."""
    if note:
        lines = [textwrap.fill(line, 110) for line in note.splitlines()]
        figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=8, color=INK)


def interval_ends(one: Estimate) -> list[float]:
    """The value of an estimate and the ends of its interval, if it has one."""
    return [end for end in (one.value, one.low, one.high) if end is not None]


def reach(values: Sequence[Estimate]) -> tuple[float, float]:
    """From the lowest to the highest end of any interval, 0 among them; never nothing."""
    ends = [0.0, *(end for one in values for end in interval_ends(one))]
    return min(ends), max(ends) if max(ends) > min(ends) else min(ends) + 0.01


def name_rows(axes: Axes, names: Sequence[tuple[float, str, str]], size: float) -> None:
    """Names (y, words, colour) on the left of the axes."""
    axes.set_yticks([y for y, _, _ in names], [words for _, words, _ in names], fontsize=size)
    for label, (_, _, colour) in zip(axes.get_yticklabels(), names, strict=True):
        label.set_color(colour)
        label.set_fontweight("bold")


def set_nats_axis(axes: Axes, values: Sequence[Estimate], *, with_zero: bool, least: float = 0.0) -> str:
    """A scale for divergences, from 0 on; where they are far apart, logarithmic from the smallest on, as the words say
    that it returns for the axis's label."""
    told = ""
    ends = [end for one in values for end in interval_ends(one)] + [least]
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
