"""The page and the figure of the simulation, made of its counts alone: reports/statistics/simulation.json."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, NullFormatter
from scipy import stats
from tabulate import tabulate

from harness.report import figure_data, plots
from harness.report.blocks import filled
from harness.report.numbers import format_percent
from harness.report.tables import escape
from studies.simulation import scenarios
from studies.simulation.scenarios import Result

SUITE = "statistics"
"""The name of the simulation in the page's markers."""
TOLERANCE = 0.01
"""How far a coverage may be from its level."""
BLOCKS = {
    "losses": scenarios.LOSSES,
    "divergences": scenarios.DIVERGENCES,
    "text": scenarios.TEXT,
    "items": scenarios.ITEMS,
    "repetitions": scenarios.REPETITIONS,
    "starts": scenarios.STARTS,
    "decisions": scenarios.DECISIONS,
    "power": scenarios.POWERS,
}
"""By block of the page, the group of scenarios that it shows."""
_PANELS = tuple(BLOCKS.values())[:6]


@dataclass(frozen=True)
class DrawnShare:
    """A point of the figure: a share of draws, with the interval that the number of draws leaves open."""

    panel: str
    line: str
    x: float
    share: float
    low: float
    high: float


def results_of(document: Mapping[str, Any]) -> list[Result]:
    """The results in the stored document."""
    return [Result(**one) for one in document["results"]]


def statistics_page(document: Mapping[str, Any], page: str, text: bytes) -> bytes:
    """The page `text`, whose path is `page`, with its blocks filled from the stored document."""
    results = results_of(document)
    blocks = {name: partial(_group, results, group) for name, group in BLOCKS.items()}
    return filled(
        page,
        text,
        SUITE,
        {**blocks, "setup": partial(_setup, document), "populations": partial(_populations, document)},
    )


def coverage_figure(document: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of the figure, coverage.svg and coverage.png, with a panel for each group of intervals."""
    points = points_of(results_of(document))
    return plots.image_files("coverage", points, lambda: _draw(points))


def points_of(results: Sequence[Result]) -> list[DrawnShare]:
    """The points of the figure."""
    points = []
    for one in results:
        if one.group in _PANELS:
            alike = [other for other in results if other.group == one.group]
            functions = {other.function for other in alike}
            data = {other.data for other in alike}
            words = [one.data] * (len(data) > 1) + [one.function] * (len(functions) > 1)
            x = float(one.num) if one.spread is None else one.spread
            points.append(DrawnShare(one.group, ", ".join(words), x, *share_of(one)))
    return points


def share_of(result: Result) -> tuple[float, float, float]:
    """The share of draws that were right, and its own 95 % interval (Wilson's)."""
    interval = stats.binomtest(result.num_right, result.num_draws).proportion_ci(0.95, "wilson")
    return result.num_right / result.num_draws, float(interval.low), float(interval.high)


def verdict_on(result: Result) -> str:
    """Whether the goal is kept, as far as the number of draws can tell: coverage within 1 % of its level, false alarms
    no more often than their level, power no less."""
    found, low, high = share_of(result)
    if result.goal == "false alarms":
        return "kept" if low <= result.level else "too many"
    if result.goal == "power":
        return "kept" if high >= result.level else "short"
    if high < result.level - TOLERANCE:
        return "short"
    if low > result.level + TOLERANCE:
        return "more than asked"
    return "kept" if abs(found - result.level) <= TOLERANCE else "unsure"


def cells_of(results: Sequence[Result]) -> list[dict[str, str]]:
    """The rows of a table of results: the text of each cell by its heading."""
    shown = []
    for one in results:
        value, low, high = share_of(one)
        cells = {"data": one.data, "function": one.function, "n": f"{one.num:,}"}
        if one.spread is not None:
            cells["spread of starts"] = f"{one.spread:.2f}"
        cells[one.goal] = f"{format_percent(value)} [{100 * low:.1f}, {100 * high:.1f}]"
        if one.goal == "coverage":
            for heading, key in (("truth below it", "truth_below"), ("above it", "truth_above"), ("none", "without")):
                cells[heading] = format_percent(one.counts.get(key, 0) / one.num_draws)
        cells["goal"] = format_percent(one.level, "g") + (" ± 1 %" if one.goal == "coverage" else "")
        cells["verdict"] = verdict_on(one)
        shown.append(cells)
    return shown


def table_text(cells: Sequence[Mapping[str, str]], form: str) -> str:
    """The rows as a table in one of tabulate's forms, words to the left and numbers to the right."""
    left = ("data", "function", "verdict")
    align = ["left" if heading in left else "right" for heading in cells[0]]
    values = [list(row.values()) for row in cells]
    return tabulate(values, headers=list(cells[0]), tablefmt=form, colalign=align, disable_numparse=True)


def _group(results: Sequence[Result], group: str) -> str:
    shown = cells_of([one for one in results if one.group == group])
    return table_text([{heading: escape(cell) for heading, cell in row.items()} for row in shown], "pipe")


def _setup(document: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in document["packages"].items())
    command = " ".join(document["command"])
    return (
        f"`{command}`: {document['num_draws']:,} draws of each scenario, seed {document['seed']}, "
        f"{document['num_resamples']:,} resamples of each bootstrap; {versions}. Drawn from {len(document['records'])} "
        "records, which are named in [simulation.json](simulation.json)."
    )


def _populations(document: Mapping[str, Any]) -> str:
    lags = range(len(document["populations"][0]["autocorrelation"]))
    shown = [
        {
            "data": escape(one["name"]),
            "windows": f"{one['num']:,}",
            "mean": f"{one['mean']:.5f}",
            "standard deviation": f"{one['standard_deviation']:.5f}",
            "skewness": f"{one['skewness']:+.1f}",
            **{f"lag {lag + 1}": f"{one['autocorrelation'][lag]:+.2f}" for lag in lags},
        }
        for one in document["populations"]
    ]
    speeds = document["speeds"]
    return (
        f"{table_text(shown, 'pipe')}\n\nLogarithms of times, over all variants and shapes: standard deviation "
        f"{speeds['within']:.3f} within starts and {speeds['between']:.3f} between them."
    )


# -- The figure --------------------------------------------------------------------------------------------------


def _draw(points: Sequence[DrawnShare]) -> Figure:
    figure = Figure(figsize=(11, 9.5), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    FigureCanvasAgg(figure)
    panels = figure.subplots(3, 2)
    for axes, name in zip(panels.flat, _PANELS, strict=True):
        _draw_panel(axes, name, [point for point in points if point.panel == name])
    return figure


def _draw_panel(axes: Axes, name: str, points: Sequence[DrawnShare]) -> None:
    """Draws lines over the number of units or over the spread of starts, and a band of 95 ± 1 %."""
    axes.set_title(name)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.axhspan(0.95 - TOLERANCE, 0.95 + TOLERANCE, color=plots.INK, alpha=0.2, linewidth=0)
    lines = list(dict.fromkeys(point.line for point in points))
    for line, colour, marker in zip(lines, figure_data.COLOURS, "osD^vP", strict=False):
        own = [point for point in points if point.line == line]
        xs, shares = [point.x for point in own], [point.share for point in own]
        reach = [[p.share - p.low for p in own], [p.high - p.share for p in own]]
        axes.errorbar(xs, shares, reach, color=colour, marker=marker, markersize=5, linewidth=1.4, label=line)
    if name == scenarios.STARTS:
        axes.set_xlabel("spread of starts over that of repetitions")
    else:
        ticks = sorted({point.x for point in points})
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.minorticks_off()
        axes.set_xlabel("units of a data set")
    lowest = min(point.low for point in points)
    # Room for the legend beneath the lines.
    axes.set_ylim(lowest - (0.03 + 0.09 * len(lines)) * (1.05 - lowest), 1.005)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_percent(value, ".0f")))
    axes.tick_params(labelsize=8)
    axes.legend(loc="lower left", fontsize=7.5, frameon=False, labelcolor=plots.INK, borderaxespad=0.2)


def as_document(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Results as JSON holds them."""
    return [asdict(one) for one in results]
