"""How figures look, what several of them draw in the same way, where their words go, and how they are saved.

Colours and text are mid-tones on a transparent ground, so one file serves light pages and dark ones. Text in the SVG
is drawn as outlines: no reader needs the fonts.

The same points may come out as other bytes, because FreeType and libpng differ between builds of matplotlib. So each
file carries a digest of the data that was plotted and of the drawing's version in its metadata, and a figure is stale
if that digest differs. On one machine the bytes are equal as well: the salt of SVG ids is fixed and no date is written.
"""

import io
import math
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, NullLocator
from matplotlib.transforms import Bbox
from scipy.optimize import isotonic_regression

from harness.record.stats import Estimate
from harness.report.figure_data import Look, mark_of

INK = "#7b7f86"  # text and axes: contrast 4:1 against white and against GitHub's dark page alike
NAME_WIDTH = 24  # characters
_WIDE = 8.0  # the largest number over the smallest from which on a scale is logarithmic
ZERO_LINE = (0, (4, 3))
NATS_LABEL = "KL divergence to the source,\nnats per token, 95 % interval"
_MOST_LINES = 3
_LEADER = 16.0  # points, from the axes to a name at their right
_APART = 2.0  # pixels around a label: what it covers depends a little on the resolution
_DISTANCE = 9.0  # points, from what is named to its name
# To the right first, then to the left, above and below, then between them.
_DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))
_SIDES = {-1: "right", 0: "center", 1: "left"}
_ENDS = {-1: "top", 0: "center", 1: "bottom"}
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "harness",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "ytick.major.size": 0,
    "grid.color": INK,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
}


@contextmanager
def style() -> Iterator[None]:
    """The common style while it is open, whatever the user's own matplotlibrc says."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        yield


def canvas(width: float, height: float) -> Figure:
    """An empty figure, in inches, whose parts find room beside each other."""
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08, wspace=0.02))
    FigureCanvasAgg(figure)
    return figure


def image_files(name: str, plotted: Sequence[Any], draw: Callable[[], Figure]) -> dict[str, bytes]:
    """What `draw` draws in the common style as {"NAME.svg": ..., "NAME.png": ...}, both with the digest of `plotted`,
    the dataclass instances that it draws."""
    mark = mark_of(plotted)
    with style():
        figure = draw()
        return {
            f"{name}.svg": _saved(figure, "svg", {"Date": None, "Creator": None, "Description": mark}),
            f"{name}.png": _saved(figure, "png", {"Software": None, "Description": mark}),
        }


def _saved(figure: Figure, file_format: str, metadata: Mapping[str, str | None]) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=file_format, dpi=160, transparent=True, metadata=dict(metadata))
    return buffer.getvalue()


# -- Strokes -----------------------------------------------------------------------------------------------------


def set_up(axes: Axes, title: str, grid: Literal["x", "both"]) -> None:
    """A title, and lines across along these axes, behind what is drawn."""
    axes.set_title(title)
    axes.grid(axis=grid)
    axes.set_axisbelow(True)


def draw_estimate(axes: Axes, one: Estimate, y: float, look: Look) -> None:
    """A value on the horizontal axis and its interval."""
    if one.low is not None and one.high is not None:
        axes.plot([one.low, one.high], [y, y], color=look.colour, linewidth=3, solid_capstyle="butt")
    draw_marker(axes, one.value, y, look)


def draw_interval(axes: Axes, x: float, one: Estimate, look: Look, width: float) -> None:
    """The interval of a value on the vertical axis, if it has one, `width` points wide."""
    if one.low is not None and one.high is not None:
        axes.plot([x, x], [one.low, one.high], color=look.colour, linewidth=width, solid_capstyle="butt")


def draw_marker(axes: Axes, x: float, y: float, look: Look, alpha: float = 1.0) -> None:
    """A variant's marker at a point in data coordinates."""
    axes.plot(x, y, look.marker, color=look.colour, fillstyle=look.fill, markersize=7, alpha=alpha, zorder=3)


def write_beside(axes: Axes, words: str, x: float, y: float) -> None:
    """Words to the right of a point in data coordinates."""
    axes.annotate(words, (x, y), (8, 0), textcoords="offset points", va="center")


def add_footnote(figure: Figure, note: str) -> None:
    """A note below the axes, in lines of at most 110 characters; nothing without words."""
    if note:
        lines = "\n".join(textwrap.fill(line, 110) for line in note.splitlines())
        figure.supxlabel(lines, x=0.01, ha="left", fontsize=8, color=INK)


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
        told = f";\nlinear up to {first:.10g}, logarithmic above"
    else:
        axes.set_ylim(-0.04 * top, 1.15 * top)
        axes.locator_params(axis="y", nbins=6)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda nats, _: f"{nats:.10g}"))
    return told


# -- Words, none of which covers another or leaves the picture ---------------------------------------------------


def wrapped(name: str, width: int) -> str:
    """A name in lines of at most `width` characters, broken after its hyphens, dots and the like where it can be. What
    would take more than three lines loses its middle: names differ at their ends."""
    most = min(_MOST_LINES * width, len(name))
    while True:
        lines = [""]
        for piece in re.findall(rf"[^-_.+ ]{{1,{width - 1}}}[-_.+ ]?|[-_.+ ]", name):
            if len(lines[-1]) + len(piece) > width:
                lines.append("")
            lines[-1] += piece
        if len(lines) <= _MOST_LINES:
            return "\n".join(line.strip() for line in lines)
        most -= 2
        half = most // 2
        name = f"{name[:half]}…{name[-half:]}"


def num_lines(words: str) -> int:
    """The number of lines of a text."""
    return words.count("\n") + 1


def laid_out(axes: Axes) -> Figure:
    """The figure of these axes, after their places on it are found."""
    figure = axes.figure
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()
    return figure


def spread(wanted: Sequence[float], sizes: Sequence[float], low: float, high: float) -> list[float]:
    """Centres for things of these sizes, in the order of the wanted ones and as near to them as can be without overlap
    (least squares); between `low` and `high` where there is room."""
    order = np.argsort(wanted, kind="stable")
    widths = np.array(sizes)[order]
    offsets = np.cumsum(widths) - widths / 2  # of each centre in a row without gaps
    begins = isotonic_regression(np.array(wanted)[order] - offsets).x  # where the row of each would begin
    places = np.empty(len(order))
    places[order] = np.maximum(low, np.minimum(begins, high - widths.sum())) + offsets
    return [float(place) for place in places]


def beside(
    axes: Axes, names: Sequence[str], points: Sequence[tuple[float, float]], colours: Sequence[str], taken: list[Bbox]
) -> bool:
    """A name right beside each point (in data coordinates), within the axes and apart from each other and from what is
    `taken` (in pixels); nothing, and False, where there is no room for one of them. Draws the figure's layout first,
    which the names do not change."""
    figure = laid_out(axes)
    inside, distance = axes.get_window_extent(), _DISTANCE * figure.dpi / 72
    made = []
    for name, point, colour in zip(names, points, colours, strict=True):
        label = axes.annotate(name, point, (0, 0), textcoords="offset points", color=colour, fontweight="bold")
        label.set_in_layout(False)
        made.append(label)
        size = label.get_window_extent()
        x, y = axes.transData.transform(point)
        for right, up in _DIRECTIONS:
            left = x + distance * right + (right - 1) / 2 * size.width
            bottom = y + distance * up + (up - 1) / 2 * size.height
            area = Bbox.from_bounds(left, bottom, size.width, size.height).padded(_APART)
            is_inside = inside.contains(*area.min) and inside.contains(*area.max)
            if is_inside and not any(area.overlaps(other) for other in taken):
                label.set(ha=_SIDES[right], va=_ENDS[up])
                label.xyann = (_DISTANCE * right, _DISTANCE * up)
                taken.append(area)
                break
        else:
            for each in made:
                each.remove()
            return False
    return True


def at_the_right(
    axes: Axes, names: Sequence[str], ends: Sequence[tuple[float, float]], looks: Sequence[Look], *, led: bool
) -> None:
    """Names with their markers in a column on the right of the axes, each as level with its point (in data coordinates)
    as the others allow; `led`: joined to it by a line."""
    labels = []
    for name, look in zip(names, looks, strict=True):
        label = axes.annotate(name, (1, 0.5), (_LEADER + 7, 0), xycoords="axes fraction", textcoords="offset points")
        label.set(color=look.colour, fontweight="bold", va="center")
        labels.append(label)
    figure = laid_out(axes)  # gives the column its room; where in it a name stands does not change that
    inside = axes.get_window_extent()
    heights = [(label.get_window_extent().height + 2 * _APART) / inside.height for label in labels]
    fractions = [axes.transAxes.inverted().transform(axes.transData.transform(end)) for end in ends]
    places = spread([float(y) for _, y in fractions], heights, 0, 1)
    outside = _LEADER * figure.dpi / 72 / inside.width
    for label, (x, y), place, look in zip(labels, fractions, places, looks, strict=True):
        label.xy = (1, place)
        drawn: dict[str, Any] = {"transform": axes.transAxes, "clip_on": False, "color": look.colour}
        if led:
            axes.plot([x, 1, 1 + outside], [y, y, place], linewidth=0.8, alpha=0.6, **drawn)
        axes.plot(1 + outside, place, look.marker, fillstyle=look.fill, markersize=6, **drawn)
