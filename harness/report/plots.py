"""How figures look and how they are saved: ink, colours, markers, and the digest of what a file shows.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from harness.suite.names import SOURCE, row_name

VERSION = 3  # of the drawing: raise it when the same data should look different

INK = "#7b7f86"  # text and axes: contrast 4:1 against white and against GitHub's dark page alike
SOURCE_COLOUR = "#8d929a"
# Found by search: a contrast of at least 3:1 against both pages, and any two (the source's too) at least 0.09 apart in
# OKLab, to all eyes and, after Machado, Oliveira and Fernandes (2009), to those that lack one kind of cone. Markers
# tell apart what is left.
COLOURS = ("#258ef0", "#c57d1b", "#05806a", "#9760ae", "#d63052", "#fc1ce5")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "p")
_FILLS = ("full", "none", "left", "right", "bottom", "top")  # of a variant's marker: plain, and in each setup
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
class Look:
    """How a variant is drawn, the same in every figure of a suite."""

    colour: str
    marker: str
    fill: str  # matplotlib's fillstyle

    @property
    def line(self) -> str:
        return "-" if self.fill == _FILLS[0] else "--"


def looks(variants: Sequence[str], setups: Sequence[str]) -> dict[str, Look]:
    """By the name of a row: the source grey, every variant a colour and a marker of its own (24 pairs of them), and in
    a setup the same colour with a marker that is filled otherwise."""
    plain = {SOURCE: Look(SOURCE_COLOUR, MARKERS[0], _FILLS[0])}
    for place, name in enumerate(variants):
        plain[name] = Look(COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)], _FILLS[0])
    in_setups = {
        row_name(name, setup): Look(look.colour, look.marker, _FILLS[1 + place % (len(_FILLS) - 1)])
        for place, setup in enumerate(setups)
        for name, look in plain.items()
    }
    return {**plain, **in_setups}


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


def figure_files(name: str, plotted: Sequence[Any], draw: Callable[[], Figure]) -> dict[str, bytes]:
    """What `draw` draws in the common style as {"NAME.svg": ..., "NAME.png": ...}, both with the digest of `plotted`,
    the dataclass instances that it draws."""
    description = f"harness-figure-sha256:{_digest(plotted)}"
    with style():
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
