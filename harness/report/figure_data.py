"""What each figure shows, as dataclasses of plain numbers: a figure is stale if these changed. Nothing here draws."""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from harness.record.stats import Estimate
from harness.suite.names import SOURCE, row_name

VERSION = 3  # of the drawing: raise it when the same data should look different
SOURCE_COLOUR = "#8d929a"
# Found by search: a contrast of at least 3:1 against both pages, and any two (the source's too) at least 0.09 apart in
# OKLab, to all eyes and, after Machado, Oliveira and Fernandes (2009), to those that lack one kind of cone. Markers
# tell apart what is left.
COLOURS = ("#258ef0", "#c57d1b", "#05806a", "#9760ae", "#d63052", "#fc1ce5")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "p")
_FILLS = ("full", "none", "left", "right", "bottom", "top")  # of a variant's marker: plain, and in each setup
_SAME_SHARE = 0.01  # what two builds may differ by in one panel: of the calibration tokens,
_SAME_COLOUR = 0.05  # and of the scale of colours
_MARK = re.compile(rb"harness-figure-sha256:([0-9a-f]{64})")

FIGURES: dict[str, str] = {
    "overview": "Checkpoint size, loss of log-perplexity and decode step times of every variant beside the source",
    "divergence": "KL divergence from the source over checkpoint size, a point with its interval for every variant and "
    "the source at zero",
    "losses": "Change of log-perplexity against the source with its interval, for every variant by every protocol",
    "decode": "Decode speed at batch 1 with its interval for every variant, beside the ceiling that memory bandwidth "
    "sets where it is known",
    "batch": "Decode speed over batch size, in total and for each user, a curve for every variant",
    "depth": "KL divergence from the source by the number of tokens before the predicted one, a curve for every "
    "variant",
    "sensitivity": "Layer error by layer, projection and format",
    "experts": "Share of the calibration tokens that every expert of every layer got, for each calibrated build; "
    "builds that look the same share a panel",
}
"""The alternative text of each figure by its name, in the order in which a page shows the figures."""


@dataclass(frozen=True)
class Look:
    """How a variant is drawn, the same in every figure of a suite."""

    colour: str
    marker: str
    fill: str  # matplotlib's fillstyle

    @property
    def line(self) -> str:
        """Matplotlib's style of a curve: dashed in a setup."""
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


def embedded_digest(image: bytes) -> str | None:
    """The digest that a figure file carries; None for any other file."""
    found = _MARK.search(image)
    return found[1].decode() if found else None


def mark_of(plotted: Sequence[Any]) -> str:
    """The words in a figure file's metadata that say what it shows: a digest of the dataclass instances that are
    plotted and of `VERSION`. Numbers count to ten digits: the last bits of a sum may differ between processors."""

    def rounded(value: object) -> object:
        if isinstance(value, float):
            return f"{value:.10g}"
        if isinstance(value, Mapping):
            return {key: rounded(item) for key, item in value.items()}
        return [rounded(item) for item in value] if isinstance(value, list | tuple) else value

    document = {"version": VERSION, "rows": [rounded(asdict(one)) for one in plotted]}
    return f"harness-figure-sha256:{hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()}"


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
class SizePoint:
    """What a variant weighs and how far it is from the source, in nats per token; `kl` is None where that is not above
    the noise."""

    variant: str
    look: Look
    num_bytes: int
    kl: Estimate | None


@dataclass(frozen=True)
class Divergence:
    """`source` is at 0 nats, `floor` what it came to beside itself. `note` says what is not drawn, and why."""

    source: SizePoint | None
    points: tuple[SizePoint, ...]
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
class MarkGroup:
    """Rows under one heading."""

    heading: str
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class Forest:
    """`floor` is what the source differs from itself by, None where that is unknown or nothing."""

    groups: tuple[MarkGroup, ...]
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


@dataclass(frozen=True)
class Cell:
    """One square of the sensitivities. `layer_error` is a share of energy, None where there is nothing to compare
    with."""

    layer: int
    role: str
    format: str
    layer_error: float | None


@dataclass(frozen=True)
class Sensitivity:
    """Roles in the order in which they first occur."""

    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Coverage:
    """How many of a build's `num_tokens` calibration tokens each expert got: `routed` [layers, experts], of the decoder
    layers that `layers` names. The numbers are those of the first of `variants`; no share of another differs from its
    by more than `differing`."""

    variants: tuple[str, ...]
    num_tokens: int
    layers: tuple[int, ...]
    routed: tuple[tuple[int, ...], ...]
    differing: float = 0.0


@dataclass(frozen=True)
class Coverages:
    """Of the calibrated builds of a mixture of experts, those that look the same in one."""

    builds: tuple[Coverage, ...]


def joined_coverages(builds: Sequence[Coverage]) -> Coverages:
    """The coverages of single builds, those joined whose panels nobody could tell apart: the same experts got nothing,
    and every share is the same within a percentage point and within a twentieth of the scale of colours."""
    limits = colour_range(reached_shares(builds))
    found: list[Coverage] = []
    for build in builds:
        for place, first in enumerate(found):
            differing = _differing(first, build, limits)
            if differing is not None:
                variants = (*first.variants, *build.variants)
                found[place] = replace(first, variants=variants, differing=max(first.differing, differing))
                break
        else:
            found.append(build)
    return Coverages(tuple(found))


def reached_shares(builds: Sequence[Coverage]) -> list[float]:
    """The shares of the calibration tokens that experts got, without the experts that got nothing."""
    return [num / build.num_tokens for build in builds for row in build.routed for num in row if num]


def colour_range(values: Sequence[float]) -> tuple[float, float]:
    """The ends of a logarithmic scale of colours for positive values: a decade at least, so that it has a number."""
    low, high = (min(values), max(values)) if values else (0.1, 1.0)
    return min(low, high / 10), high


def _differing(one: Coverage, other: Coverage, limits: tuple[float, float]) -> float | None:
    """By how much shares of two builds differ at most; None where that can be seen."""
    if (one.layers, [len(row) for row in one.routed]) != (other.layers, [len(row) for row in other.routed]):
        return None
    first, second = (
        np.array([num for row in build.routed for num in row]) / build.num_tokens for build in (one, other)
    )
    reached = first > 0
    if (reached != (second > 0)).any():
        return None
    differing = float(np.abs(first - second).max())
    colours = np.abs(np.log(first[reached] / second[reached])) / math.log(limits[1] / limits[0])
    return differing if differing <= _SAME_SHARE and (colours <= _SAME_COLOUR).all() else None
