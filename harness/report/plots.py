"""How figures look and how they are saved: ink, colours, markers, and the digest of what a file shows.

Colours and text are mid-tones on a transparent ground, so one file serves light pages and dark ones. Text in the
SVG is drawn as outlines: no reader needs the fonts.

A picture is not a reproducible text: FreeType and libpng differ between builds of matplotlib, and the same points
may come out as other bytes. So each file carries, in its metadata, a digest of the data that was plotted and of
this module's `VERSION`, and a figure is stale if that digest differs, not if its pixels do. On one machine the
bytes are equal as well: the salt of SVG ids is fixed and no date is written.
"""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from harness.report.figure_data import mark_of

INK = "#7b7f86"  # text and axes: contrast 4:1 against white and against GitHub's dark page alike
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
