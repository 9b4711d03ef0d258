"""Where the words of a figure go, so that none covers another or leaves the picture."""

import re
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from harness.report.figure_data import Look

_MOST_LINES = 3
_LEADER = 16.0  # points, from the axes to a name at their right
_APART = 2.0  # pixels around a label: what it covers depends a little on the resolution
_DISTANCE = 9.0  # points, from what is named to its name
# To the right first, then to the left, above and below, then between them.
_DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))
_SIDES = {-1: "right", 0: "center", 1: "left"}
_ENDS = {-1: "top", 0: "center", 1: "bottom"}


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


def spread(wanted: Sequence[float], sizes: Sequence[float], low: float, high: float) -> list[float]:
    """Centres for things of these sizes, in the order of the wanted ones and as near to them as can be without overlap
    (least squares, by pooling neighbours that are in the wrong order); between `low` and `high` where there is room."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    offsets, edge = [], 0.0  # of each centre in a row without gaps
    for index in order:
        offsets.append(edge + sizes[index] / 2)
        edge += sizes[index]
    pools: list[tuple[float, int]] = []  # sum and number of where the row would begin
    for index, offset in zip(order, offsets, strict=True):
        pools.append((wanted[index] - offset, 1))
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] >= pools[-1][0] / pools[-1][1]:
            total, num = pools.pop()
            pools[-1] = (pools[-1][0] + total, pools[-1][1] + num)
    begins = [total / num for total, num in pools for _ in range(num)]
    places = [0.0] * len(wanted)
    for index, offset, begin in zip(order, offsets, begins, strict=True):
        places[index] = max(low, min(begin, high - edge)) + offset
    return places


def _box(artist: Annotation) -> Bbox:
    """What a text covers, in pixels."""
    return artist.get_window_extent()


def beside(
    axes: Axes, names: Sequence[str], points: Sequence[tuple[float, float]], colours: Sequence[str], taken: list[Bbox]
) -> bool:
    """A name right beside each point (in data coordinates), within the axes and apart from each other and from what is
    `taken` (in pixels); nothing, and False, where there is no room for one of them. Draws the figure's layout first,
    which the names do not change."""
    figure = axes.figure
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()
    inside, distance = axes.get_window_extent(), _DISTANCE * figure.dpi / 72
    made = []
    for name, point, colour in zip(names, points, colours, strict=True):
        label = axes.annotate(name, point, (0, 0), textcoords="offset points", color=colour, fontweight="bold")
        label.set_in_layout(False)
        made.append(label)
        size = _box(label)
        x, y = axes.transData.transform(point)
        for right, up in _DIRECTIONS:
            left = x + distance * right + (right - 1) / 2 * size.width
            bottom = y + distance * up + (up - 1) / 2 * size.height
            area = Bbox.from_bounds(left, bottom, size.width, size.height).padded(_APART)
            if not any(area.overlaps(other) for other in taken) and _holds(inside, area):
                label.set(ha=_SIDES[right], va=_ENDS[up])
                label.xyann = (_DISTANCE * right, _DISTANCE * up)
                taken.append(area)
                break
        else:
            for each in made:
                each.remove()
            return False
    return True


def _holds(outer: Bbox, inner: Bbox) -> bool:
    return bool(outer.x0 <= inner.x0 and inner.x1 <= outer.x1 and outer.y0 <= inner.y0 and inner.y1 <= outer.y1)


def at_the_right(
    axes: Axes, names: Sequence[str], ends: Sequence[tuple[float, float]], looks: Sequence[Look], *, led: bool
) -> None:
    """Names with their markers in a column on the right of the axes, each as level with its point (in data coordinates)
    as the others allow; `led`: joined to it by a line."""
    figure = axes.figure
    assert isinstance(figure, Figure)
    labels = [
        axes.annotate(
            name,
            (1, 0.5),
            (_LEADER + 7, 0),
            xycoords="axes fraction",
            textcoords="offset points",
            color=look.colour,
            fontweight="bold",
            va="center",
        )
        for name, look in zip(names, looks, strict=True)
    ]
    figure.draw_without_rendering()  # gives the column its room; where in it a name stands does not change that
    inside = axes.get_window_extent()
    heights = [(_box(label).height + 2 * _APART) / inside.height for label in labels]
    fractions = [axes.transAxes.inverted().transform(axes.transData.transform(end)) for end in ends]
    places = spread([float(y) for _, y in fractions], heights, 0, 1)
    outside = _LEADER * figure.dpi / 72 / inside.width
    for label, (x, y), place, look in zip(labels, fractions, places, looks, strict=True):
        label.xy = (1, place)
        if led:
            axes.plot(
                [x, 1, 1 + outside],
                [y, y, place],
                transform=axes.transAxes,
                clip_on=False,
                color=look.colour,
                linewidth=0.8,
                alpha=0.6,
            )
        axes.plot(
            1 + outside,
            place,
            look.marker,
            transform=axes.transAxes,
            clip_on=False,
            color=look.colour,
            fillstyle=look.fill,
            markersize=6,
        )
