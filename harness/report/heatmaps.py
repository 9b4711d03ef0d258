"""Figures of squares: what each format costs each projection of each layer, and which experts calibration reached."""

import math
import textwrap
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PatchCollection
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from harness.report.figure_data import COLOURS, Coverage, Coverages, Sensitivity, colour_range, reached_shares
from harness.report.numbers import format_percent
from harness.report.plots import canvas, num_lines

_MOST_WRITTEN = 12  # columns of a heat map whose squares have room for their number
_MOST_SQUARES = 2000  # that are drawn one by one
_ROW = 0.28  # inches, where rows have names or numbers
_DENSE_ROW = 0.09
_TITLE_WIDTH = 84  # characters
_NAMES_WIDTH = 56  # of names, whose letters may be wide
_MISSED = COLOURS[5]


def draw_sensitivity(plotted: Sensitivity) -> Figure:
    """A panel for each format, layers across, roles down. A projection that a layer lacks is simply not there."""
    cells = plotted.cells
    roles, formats = (list(dict.fromkeys(getattr(cell, key) for cell in cells)) for key in ("role", "format"))
    num_layers = 1 + max(cell.layer for cell in cells)
    norm = LogNorm(*colour_range([cell.layer_error for cell in cells if cell.layer_error]), clip=True)
    figure = canvas(10, 0.6 + len(formats) * (_ROW * len(roles) + 0.45))
    panels = list(figure.subplots(len(formats), 1, sharex=True, squeeze=False)[:, 0])
    for axes, form in zip(panels, formats, strict=True):
        squares = [
            (cell.layer, roles.index(cell.role), cell.layer_error)
            for cell in cells
            if cell.format == form and cell.layer_error is not None
        ]
        _draw_squares(axes, squares, norm, is_written=num_layers <= _MOST_WRITTEN)
        axes.set_title(form)
        _set_limits(axes, num_layers, len(roles))
        axes.set_yticks(range(len(roles)), roles, fontsize=8)
    panels[-1].set_xlabel("layer")
    _bar(figure, panels, norm, "layer error: share of the energy\nthat the half layer adds")
    return figure


def draw_experts(plotted: Coverages) -> Figure:
    """A panel for each build, or for several that look the same, experts across, layers down; a cross for an expert
    that no calibration token reached."""
    builds = plotted.builds
    norm = LogNorm(*colour_range(reached_shares(builds)), clip=True)
    num_experts = max(len(row) for build in builds for row in build.routed)
    is_written = num_experts <= _MOST_WRITTEN
    heights = [len(build.layers) * (_ROW if is_written else _DENSE_ROW) for build in builds]
    titles = [_title(build) for build in builds]
    figure = canvas(10, 0.7 + sum(heights) + sum(0.45 + 0.17 * num_lines(title) for title in titles))
    panels = list(figure.subplots(len(builds), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0])
    for axes, build, title in zip(panels, builds, titles, strict=True):
        squares = [
            (expert, y, num / build.num_tokens) for y, row in enumerate(build.routed) for expert, num in enumerate(row)
        ]
        _draw_squares(axes, [square for square in squares if square[2]], norm, is_written=is_written)
        missed = [(x, y) for x, y, share in squares if not share]
        size = 7.0 if is_written else 4.5
        axes.plot([x for x, _ in missed], [y for _, y in missed], "x", color=_MISSED, markersize=size)
        axes.set_title(title)
        _set_limits(axes, num_experts, len(build.layers))
        step = 1 if is_written else -(-len(build.layers) // 10)
        axes.set_yticks(range(0, len(build.layers), step), [str(layer) for layer in build.layers[::step]], fontsize=8)
        axes.set_ylabel("layer")
    panels[-1].set_xlabel("expert")
    _bar(figure, panels, norm, "share of the\ncalibration tokens")
    return figure


def _title(build: Coverage) -> str:
    names, told = f"{', '.join(build.variants)}:", _told(build)
    if build.differing:
        points = math.ceil(round(1000 * build.differing, 6)) / 10
        told += f"; drawn: the first, from which no share of the others differs by more than {points:.1f} points"
    if len(names) + 1 + len(told) <= _TITLE_WIDTH:
        return f"{names} {told}"
    return f"{textwrap.fill(names, _NAMES_WIDTH)}\n{textwrap.fill(told, _TITLE_WIDTH)}"


def _told(build: Coverage) -> str:
    """What a panel shows, in words: how many experts got nothing, or which one got least."""
    everyone = [
        (num, layer, expert)
        for layer, row in zip(build.layers, build.routed, strict=True)
        for expert, num in enumerate(row)
    ]
    missed = sum(not num for num, _, _ in everyone)
    if missed:
        return f"{missed:,} of {len(everyone):,} experts got none of {build.num_tokens:,} tokens (×)"
    least, layer, expert = min(everyone)
    return f"every expert got tokens, the fewest {least:,} of {build.num_tokens:,} (layer {layer}, expert {expert})"


def _colours() -> ListedColormap:
    """The ends are cut off: the darkest and the brightest would vanish on a dark page or a light one."""
    return ListedColormap(mpl.colormaps["viridis"](np.linspace(0.15, 0.92, 256)))


def _draw_squares(axes: Axes, squares: Sequence[tuple[int, int, float]], norm: LogNorm, *, is_written: bool) -> None:
    """Squares (x, y, value) on the page's own ground, with their values where there is room."""
    colours = _colours()
    if len(squares) > _MOST_SQUARES:  # an image, which an SVG holds in a hundredth of the space
        pixels = np.zeros((1 + max(y for _, y, _ in squares), 1 + max(x for x, _, _ in squares), 4))
        for x, y, value in squares:
            pixels[y, x] = colours(norm(value))
        axes.imshow(pixels, interpolation="none", aspect="auto")
        return
    drawn = PatchCollection(
        [Rectangle((x - 0.47, y - 0.44), 0.94, 0.88) for x, y, _ in squares], cmap=colours, norm=norm, linewidth=0
    )
    drawn.set_array(np.array([value for _, _, value in squares]))
    axes.add_collection(drawn)
    for x, y, value in squares if is_written else ():
        red, green, blue, _ = colours(norm(value))
        ink = "#101418" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "#f4f6f8"
        axes.text(x, y, format_percent(value, ".2g"), color=ink, ha="center", va="center", fontsize=8)


def _set_limits(axes: Axes, num_columns: int, num_rows: int) -> None:
    axes.set_xlim(-0.5, num_columns - 0.5)
    axes.set_ylim(num_rows - 0.5, -0.5)
    axes.spines["bottom"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True))
    axes.tick_params(axis="x", length=0, labelsize=8)


def _bar(figure: Figure, panels: Sequence[Axes], norm: LogNorm, label: str) -> None:
    low, high = norm.inverse(0.0), norm.inverse(1.0)
    bar = figure.colorbar(ScalarMappable(norm, _colours()), ax=panels, shrink=0.8, aspect=30, pad=0.015)
    assert bar.solids is not None
    bar.solids.set_edgecolor("face")  # or viewers of the SVG show seams between its steps
    bar.outline.set_visible(False)
    steps = (1,) if high > 50 * low else (1, 2, 5)
    bar.ax.yaxis.set_major_locator(LogLocator(subs=steps))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda share, _: format_percent(share, "g")))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    bar.ax.tick_params(labelsize=8)
    bar.set_label(label)
