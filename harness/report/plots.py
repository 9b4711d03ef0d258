"""Figures: for every variant what it weighs, what it loses, and how long a decode step takes; and, where it was
measured, a heat map of what each format costs each projection of each layer.

Colours and text are mid-tones on a transparent ground, so one file serves light pages and dark ones. Text in the
SVG is drawn as outlines: no reader needs the fonts.

A picture is not a reproducible text: FreeType and libpng differ between builds of matplotlib, and the same points
may come out as other bytes. So each file carries, in its metadata, a digest of the data that was plotted and of
this module's `VERSION`, and a figure is stale if that digest differs, not if its pixels do. On one machine the
bytes are equal as well: the salt of SVG ids is fixed and no date is written.
"""

import hashlib
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PatchCollection
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from harness.record.stats import Estimate
from harness.report.numbers import byte_unit, format_bytes, format_percent

VERSION = 1  # of the drawing: raise it when the same data should look different

INK = "#7b7f86"  # text and axes: contrast 4:1 against white and against GitHub's dark page alike
_SOURCE_COLOUR = "#8d929a"
COLOURS = ("#2f81f7", "#d9730d", "#2da160", "#a855f7", "#d6457b", "#0f9aa8")
_NUM_DOTS = 200
_MOST_WRITTEN = 12  # layers of a heat map whose squares have room for their number
_MARK = re.compile(rb"harness-figure-sha256:([0-9a-f]{64})")
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


@dataclass(frozen=True)
class Row:
    """One variant in the figure. What has no record, or may not be compared with the source's, is None or empty."""

    variant: str
    num_bytes: int | None
    loss: Estimate | None  # difference of log-perplexity to the source, nats
    step_seconds: tuple[float, ...]  # every kept decode step at batch 1


@dataclass(frozen=True)
class Cell:
    """One square of the heat map. `layer_error` is a share of energy, None where there is nothing to compare with."""

    layer: int
    role: str
    format: str
    layer_error: float | None


def overview(rows: Sequence[Row]) -> dict[str, bytes]:
    """The figure as {"overview.svg": ..., "overview.png": ...}; the first row is the source's."""
    return figure_files("overview", rows, lambda: _draw(rows))


def heat_map(cells: Sequence[Cell]) -> dict[str, bytes]:
    """The figure as {"sensitivity.svg": ..., "sensitivity.png": ...}: one panel a format, layers across, roles down
    in the order in which they first occur."""
    return figure_files("sensitivity", cells, lambda: _draw_heat_map(cells))


def figure_files(name: str, plotted: Sequence[Any], draw: Callable[[], Figure]) -> dict[str, bytes]:
    """What `draw` draws in the common style as {"NAME.svg": ..., "NAME.png": ...}, both with the digest of `plotted`,
    the dataclass instances that it draws."""
    description = f"harness-figure-sha256:{_digest(plotted)}"
    with mpl.rc_context():
        mpl.rcdefaults()  # whatever the user's own matplotlibrc says
        mpl.rcParams.update(_STYLE)
        figure = draw()
        return {
            f"{name}.svg": _saved(figure, "svg", {"Date": None, "Creator": None, "Description": description}),
            f"{name}.png": _saved(figure, "png", {"Software": None, "Description": description}),
        }


def embedded_digest(image: bytes) -> str | None:
    """The digest that a figure file carries; None for any other file."""
    found = _MARK.search(image)
    return found[1].decode() if found else None


def _digest(rows: Sequence[Any]) -> str:
    """SHA-256 of what is plotted, to ten digits: the last bits of a sum may differ between processors."""

    def rounded(value: object) -> object:
        if isinstance(value, float):
            return f"{value:.10g}"
        if isinstance(value, Mapping):
            return {key: rounded(item) for key, item in value.items()}
        return [rounded(item) for item in value] if isinstance(value, list | tuple) else value

    plotted = {"version": VERSION, "rows": [rounded(asdict(row)) for row in rows]}
    return hashlib.sha256(json.dumps(plotted, sort_keys=True).encode()).hexdigest()


def _saved(figure: Figure, file_format: str, metadata: Mapping[str, str | None]) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=file_format, dpi=160, transparent=True, metadata=dict(metadata))
    return buffer.getvalue()


def _draw(rows: Sequence[Row]) -> Figure:
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.06, wspace=0.02)
    figure = Figure(figsize=(10, 1.3 + 0.65 * len(rows)), layout=layout)
    FigureCanvasAgg(figure)
    size, loss, speed = figure.subplots(1, 3, sharey=True, width_ratios=(1, 1.1, 1.25))
    for axes in (size, loss, speed):
        axes.grid(axis="x")
        axes.set_axisbelow(True)
    colours = [_SOURCE_COLOUR, *(COLOURS[i % len(COLOURS)] for i in range(len(rows) - 1))]
    size.set_yticks(range(len(rows)), [row.variant for row in rows], fontsize=11)
    for label, colour in zip(size.get_yticklabels(), colours, strict=True):
        label.set_color(colour)
        label.set_fontweight("bold")
    size.set_ylim(len(rows) - 0.4, -0.6)  # the source on top
    _draw_sizes(size, rows, colours)
    _draw_losses(loss, rows, colours)
    _draw_steps(speed, rows, colours)
    return figure


def _nothing_yet(axes: Axes, session: str) -> None:
    axes.set_xticks([])
    axes.text(0.5, 0.5, f"nothing to compare yet: nox -s {session}", transform=axes.transAxes, ha="center", va="center")


def _draw_sizes(axes: Axes, rows: Sequence[Row], colours: Sequence[str]) -> None:
    axes.set_title("Checkpoint size")
    known = [row.num_bytes for row in rows if row.num_bytes is not None]
    if not known:
        return _nothing_yet(axes, "build")
    unit, scale = byte_unit(max(known))
    for y, (row, colour) in enumerate(zip(rows, colours, strict=True)):
        if row.num_bytes is not None:
            axes.barh(y, row.num_bytes / scale, height=0.5, color=colour, alpha=0.85)
            axes.annotate(
                format_bytes(row.num_bytes),
                (row.num_bytes / scale, y),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
            )
    axes.set_xlim(0, 1.35 * max(known) / scale)
    axes.set_xlabel(unit)
    axes.locator_params(axis="x", nbins=4)
    return None


def _draw_losses(axes: Axes, rows: Sequence[Row], colours: Sequence[str]) -> None:
    axes.set_title("Loss: Δ log-perplexity")
    known = [row.loss for row in rows if row.loss is not None]
    if not known:
        return _nothing_yet(axes, "ppl")
    for y, (row, colour) in enumerate(zip(rows, colours, strict=True)):
        if row.loss is None:
            continue
        if row.loss.low is not None and row.loss.high is not None:
            axes.plot([row.loss.low, row.loss.high], [y, y], color=colour, linewidth=3.5, solid_capstyle="butt")
        axes.plot(row.loss.value, y, "o", color=colour, markersize=7)
        axes.annotate(
            f"{row.loss.value:+.4f}",
            (row.loss.value, y),
            xytext=(0, 10),
            textcoords="offset points",
            ha="center",
        )
    axes.axvline(0, color=_SOURCE_COLOUR, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.plot(0, 0, "o", color=_SOURCE_COLOUR, markersize=7)
    ends = [0.0, *(end for one in known for end in (one.value, one.low, one.high) if end is not None)]
    margin = 0.25 * (max(ends) - min(ends)) or 0.01
    axes.set_xlim(min(ends) - margin, max(ends) + margin)
    axes.set_xlabel("nats per token, 95 % interval")
    return None


def _draw_steps(axes: Axes, rows: Sequence[Row], colours: Sequence[str]) -> None:
    """Every row's step times as 200 dots, each a quantile: the same amount of ink for ten steps and for a million."""
    axes.set_title("Decode step time, batch 1")
    known = [row.step_seconds for row in rows if row.step_seconds]
    if not known:
        return _nothing_yet(axes, "bench")
    limit = 1.08 * max(float(np.quantile(seconds, 0.985)) for seconds in known) * 1e3
    shares = (np.arange(_NUM_DOTS) + 0.5) / _NUM_DOTS
    # Multiples of the golden ratio, modulo 1, spread any number of dots evenly without a random generator.
    heights = (np.arange(_NUM_DOTS) * 0.6180339887 % 1 - 0.5) * 0.44
    lowest = limit
    for y, (row, colour) in enumerate(zip(rows, colours, strict=True)):
        if row.step_seconds:
            dots = np.quantile(row.step_seconds, shares) * 1e3
            inside = dots <= limit
            axes.scatter(dots[inside], y + heights[inside], s=9, color=colour, alpha=0.6, linewidths=0)
            outside = y + heights[~inside]
            axes.scatter(np.full(len(outside), limit), outside, s=18, marker=">", color=colour, clip_on=False)
            middle = float(np.median(row.step_seconds)) * 1e3
            axes.plot([middle, middle], [y - 0.3, y + 0.3], color=colour, linewidth=2.5)
            axes.annotate(f"{middle:.3g} ms", (middle, y - 0.3), xytext=(0, 3), textcoords="offset points", ha="center")
            lowest = min(lowest, float(dots[0]))
    axes.set_xlim(max(0.0, lowest - 0.15 * (limit - lowest)), limit)
    axes.set_xlabel("ms (dot: 0.5 % of steps, bar: median, ▸: slower)")
    return None


def _draw_heat_map(cells: Sequence[Cell]) -> Figure:
    """Squares on the page's own ground, so that a projection that a layer lacks is simply not there. The ends of the
    colour map are cut off: its darkest and its brightest would vanish on a dark page or a light one."""
    roles, formats = (list(dict.fromkeys(getattr(cell, key) for cell in cells)) for key in ("role", "format"))
    num_layers = 1 + max(cell.layer for cell in cells)
    errors = [cell.layer_error for cell in cells if cell.layer_error]
    low, high = (min(errors), max(errors)) if errors else (0.1, 1.0)
    norm = LogNorm(min(low, high / 10), high, clip=True)  # a decade at least, so that the scale has a number
    colours = ListedColormap(mpl.colormaps["viridis"](np.linspace(0.15, 0.92, 256)))
    height = 0.28 * len(roles)
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08)
    figure = Figure(figsize=(10, 0.6 + len(formats) * (height + 0.45)), layout=layout)
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(formats), 1, sharex=True, squeeze=False)[:, 0]
    for axes, form in zip(panels, formats, strict=True):
        known = [cell for cell in cells if cell.format == form and cell.layer_error is not None]
        squares = [Rectangle((cell.layer - 0.47, roles.index(cell.role) - 0.44), 0.94, 0.88) for cell in known]
        drawn = PatchCollection(squares, cmap=colours, norm=norm, linewidth=0)
        drawn.set_array(np.array([cell.layer_error for cell in known]))
        axes.add_collection(drawn)
        if num_layers <= _MOST_WRITTEN:
            for cell in known:
                assert cell.layer_error is not None
                red, green, blue, _ = colours(norm(cell.layer_error))
                ink = "#101418" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "#f4f6f8"
                words = format_percent(cell.layer_error, ".2g")
                axes.text(cell.layer, roles.index(cell.role), words, color=ink, ha="center", va="center", fontsize=8)
        axes.set_title(form)
        axes.set_xlim(-0.5, num_layers - 0.5)
        axes.set_ylim(len(roles) - 0.5, -0.5)
        axes.set_yticks(range(len(roles)), roles, fontsize=8)
        axes.spines["bottom"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True))
        axes.tick_params(axis="x", length=0)
    panels[-1].set_xlabel("layer")
    bar = figure.colorbar(drawn, ax=list(panels), shrink=0.8, aspect=30, pad=0.015)
    assert bar.solids is not None
    bar.solids.set_edgecolor("face")  # or viewers of the SVG show seams between its steps
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda error, _: format_percent(error, "g")))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    bar.ax.tick_params(labelsize=8)
    bar.set_label("layer error: share of the energy that the half layer adds")
    return figure
