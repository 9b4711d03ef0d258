"""What the figures of a suite show, from the same evidence as the tables."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from harness.record.run import Record
from harness.record.stats import Estimate
from harness.report import (
    build_tables,
    fidelity_tables,
    figure_data,
    runs,
    speed_tables,
)
from harness.report.evidence import Evidence
from harness.report.tables import cell_text
from harness.suite.names import NOISE, SOURCE, row_parts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_Rows = list[dict[str, Any]]


def drawn_files(evidence: Evidence) -> dict[str, bytes]:
    """The files of every figure that there is something for: "NAME.svg" and "NAME.png" -> bytes."""
    from harness.report.plots import image_files

    made: dict[str, bytes] = {}
    for name, what in evidence.figures.items():
        made |= image_files(name, [what], partial(draw, name, what))
    return made


def undrawn_files(evidence: Evidence) -> dict[str, bytes]:
    """The same names, and in place of each drawing the mark that its file carries. It tells whether a file is stale, in
    a fraction of the time."""
    marks = {name: figure_data.mark_of([what]).encode() for name, what in evidence.figures.items()}
    return {f"{name}.{kind}": mark for name, mark in marks.items() for kind in ("svg", "png")}


def plotted_by_name(evidence: Evidence) -> dict[str, Any]:
    """What each figure shows that there is something for, as the dataclass of its drawing: name -> dataclass."""
    found = {name: shows(evidence) for name, shows in _SHOWS.items()}
    return {name: what for name, what in found.items() if what is not None}


def draw(name: str, what: Any) -> "Figure":
    """Draws one of `plotted_by_name`, inside `plots.style()`."""
    from harness.report.gallery import DRAWINGS

    return DRAWINGS[name](what)


# -- What each shows ---------------------------------------------------------------------------------------------


def _overview(evidence: Evidence) -> figure_data.Overview | None:
    looks = _looks(evidence)
    rows = []
    for variant in (SOURCE, *evidence.suite.variants):
        ppl = evidence.tables["perplexity"].row(variant=variant, protocol=evidence.protocol) or {}
        loss = ppl.get("delta_log_ppl")
        speed = evidence.tables["decode"].row(variant=variant, batch=1)
        steps: list[float] = []
        if speed and not isinstance(speed["speed_ratio"], str):
            shape = (1, int(str(speed["prompt_tokens"])), int(str(speed["new_tokens"])))
            for sample in speed_tables.by_shape(evidence.records["bench"][variant], "decode")[shape]:
                steps += speed_tables.token_seconds(sample)
        rows.append(
            figure_data.Row(
                variant,
                looks[variant],
                _num_bytes(evidence, variant),
                loss if isinstance(loss, Estimate) else None,
                tuple(steps),
            )
        )
    is_something = any(row.num_bytes is not None or row.loss is not None or row.step_seconds for row in rows)
    return figure_data.Overview(tuple(rows)) if is_something else None


def _divergence(evidence: Evidence) -> figure_data.Divergence | None:
    """Points of one text and engine: those that may stand beside the first."""
    looks, records = _looks(evidence), _of_rows(evidence, "fidelity")
    refused = _refused(records)
    points, floors = [], []
    for row in _rows(evidence, "fidelity", records):
        variant, kl = row["variant"], row["kl"]
        num_bytes = _num_bytes(evidence, row_parts(variant)[0])
        if variant in refused:
            continue
        if num_bytes is None:
            refused[variant] = "no record of its build"
            continue
        floor = fidelity_tables.noise_floor(evidence.records["fidelity"], records[variant])
        floors.append(floor.kl_nats if floor else 0.0)
        points.append(
            figure_data.SizePoint(variant, looks[variant], num_bytes, kl if isinstance(kl, Estimate) else None)
        )
    if not points:
        return None
    source_bytes = _num_bytes(evidence, SOURCE)
    source = figure_data.SizePoint(SOURCE, looks[SOURCE], source_bytes, None) if source_bytes is not None else None
    return figure_data.Divergence(source, tuple(points), max(floors) or None, _note(refused))


def _losses(evidence: Evidence) -> figure_data.Forest | None:
    looks = _looks(evidence)
    groups = []
    for protocol, records in evidence.perplexities.items():
        rows = [row for row in _rows(evidence, "perplexity", records) if row["protocol"] == protocol]
        unit = rows[0]["unit"] if rows else "token"
        marks = [
            figure_data.Mark(row["variant"], looks[row["variant"]], *_estimate(row, "delta_log_ppl"))
            for row in rows
            if row["variant"] != SOURCE
        ]
        groups.append(figure_data.MarkGroup(f"{protocol}, per {unit}", tuple(marks)))
    compared = [
        figure_data.Mark(row["variant"], looks[row["variant"]], *_estimate(row, "kl_log_ppl"))
        for row in _rows(evidence, "fidelity", _of_rows(evidence, "fidelity"))
    ]
    if compared:
        window = evidence.tables["fidelity"]["window"][0]
        told = f", windows of {window:,}" if window else ""
        groups.append(figure_data.MarkGroup(f"fidelity{told}, per token", tuple(compared)))
    groups = [group for group in groups if any(mark.value for mark in group.marks)]
    if not groups:
        return None
    floor = fidelity_tables.log_ppl_floor(evidence.records["fidelity"], evidence.perplexities)
    return figure_data.Forest(tuple(groups), floor or None)


def _decode(evidence: Evidence) -> figure_data.Forest | None:
    looks, records = _looks(evidence), _of_rows(evidence, "bench")
    refused = _refused(records)
    single = [row for row in _rows(evidence, "decode", records) if row["batch"] == 1]
    shapes = sorted({(row["prompt_tokens"], row["new_tokens"]) for row in single})
    groups = []
    for prompt_tokens, new_tokens in shapes:
        marks = []
        for row in single:
            if (row["prompt_tokens"], row["new_tokens"]) == (prompt_tokens, new_tokens):
                variant, speed, ceiling = (row[key] for key in ("variant", *_SPEEDS))
                if variant in refused:
                    marks.append(figure_data.Mark(variant, looks[variant], None, refused[variant]))
                    continue
                words, share, most = (cell_text(key, row[key]) for key in (_SPEEDS[0], "ceiling_share", _SPEEDS[1]))
                if ceiling is not None:
                    words += f", {share} of {most}"
                marks.append(figure_data.Mark(variant, looks[variant], speed, words, ceiling))
        heading = f"after {_counted(prompt_tokens, 'token')}, {new_tokens - 1:,} timed"
        groups.append(figure_data.MarkGroup(heading, tuple(marks)))
    return figure_data.Forest(tuple(groups)) if groups else None


_SPEEDS = ("tokens_per_second", "ceiling_tokens_per_second")


def _batch(evidence: Evidence) -> figure_data.Batches | None:
    """Of the prompts that most batch sizes were measured with."""
    looks, records = _looks(evidence), _of_rows(evidence, "bench")
    refused = _refused(records)
    rows = [row for row in _rows(evidence, "decode", records) if row["variant"] not in refused]
    sizes: dict[tuple[int, int], set[int]] = {}
    for row in rows:
        sizes.setdefault((row["prompt_tokens"], row["new_tokens"]), set()).add(row["batch"])
    shape = max(sizes, key=lambda one: len(sizes[one]), default=None)
    if shape is None or len(sizes[shape]) < 2:
        return None
    chosen = [row for row in rows if (row["prompt_tokens"], row["new_tokens"]) == shape]
    total, per_user = (
        _curves(looks, [(row["variant"], row["batch"], row[key]) for row in chosen])
        for key in ("tokens_per_second", "user_tokens_per_second")
    )
    told = f"after {_counted(shape[0], 'token')}, {shape[1] - 1:,} timed"
    return figure_data.Batches(total, per_user, told, _note(refused))


def _depth(evidence: Evidence) -> figure_data.Bands | None:
    records = _of_rows(evidence, "fidelity")
    refused = _refused(records)
    rows = [row for row in _rows(evidence, "bands", records) if row["variant"] not in refused]
    names = sorted(dict.fromkeys(row["before"] for row in rows), key=_first_number)
    if len(names) < 2:
        return None
    places = [(row["variant"], names.index(row["before"]), row["kl"]) for row in rows]
    return figure_data.Bands(tuple(names), _curves(_looks(evidence), places), _note(refused))


def _sensitivity(evidence: Evidence) -> figure_data.Sensitivity | None:
    """Groups in the order of the table."""
    order = {role: place for place, role in enumerate(evidence.tables["sensitivity"]["role"])}
    samples = [one for record in evidence.records["sensitivity"].values() for one in record.kind("sensitivity")]
    cells = [figure_data.Cell(one["index"], one["role"], one["format"], one["layer_error"]) for one in samples]
    cells.sort(key=lambda cell: (order[cell.role], cell.layer))
    return figure_data.Sensitivity(tuple(cells)) if cells else None


def _experts(evidence: Evidence) -> figure_data.Coverages | None:
    builds = []
    for variant, record in evidence.records["build"].items():
        routed: dict[int, dict[int, int]] = {}
        for one in record.kind("expert"):
            routed.setdefault(one["index"], {})[one["expert"]] = one["num_tokens"]
        calibrated = record.kind("calibration")
        if routed and calibrated:
            layers = sorted(routed)
            rows = tuple(tuple(num for _, num in sorted(routed[layer].items())) for layer in layers)
            builds.append(figure_data.Coverage((variant,), calibrated[0]["num_tokens"], tuple(layers), rows))
    return figure_data.joined_coverages(builds) if builds else None


# -- Common ------------------------------------------------------------------------------------------------------


def _looks(evidence: Evidence) -> dict[str, figure_data.Look]:
    return figure_data.looks(tuple(evidence.suite.variants), tuple(evidence.suite.setups))


def _num_bytes(evidence: Evidence, variant: str) -> int | None:
    found = build_tables.bytes_and_params(evidence.records["build"], variant)
    return found[0] if found else None


def _of_rows(evidence: Evidence, measure: str) -> dict[str, Record]:
    """The records of a measure without the source's noise, in the order of the tables."""
    return {name: record for name, record in evidence.records[measure].items() if name not in NOISE}


def _rows(evidence: Evidence, table: str, records: Mapping[str, Record]) -> _Rows:
    """The rows of a table that are of these records."""
    return [row for row in evidence.tables[table].rows if row["variant"] in records]


def _refused(records: Mapping[str, Record]) -> dict[str, str]:
    """Which rows may not stand beside the first, the source's where it was measured, and why: variant -> reason."""
    first = next(iter(records.values()), None)
    refused = {}
    for variant, record in records.items():
        if first is not None and (found := runs.differences(record, first)):
            refused[variant] = f"incomparable: {', '.join(found)}"
    return refused


def _note(refused: Mapping[str, str]) -> str:
    return f"Not drawn: {'; '.join(f'{name} ({why})' for name, why in refused.items())}" if refused else ""


def _estimate(row: Mapping[str, Any], key: str) -> tuple[Estimate | None, str]:
    """A cell as a forest shows it: the estimate if it is one, and how tables print it."""
    value = row[key]
    return (value if isinstance(value, Estimate) else None), cell_text(key, value)


def _curves(
    looks: Mapping[str, figure_data.Look], places: list[tuple[str, int, Estimate]]
) -> tuple[figure_data.Curve, ...]:
    """A curve for each variant from (variant, x, value)."""
    curves = []
    for variant in dict.fromkeys(variant for variant, _, _ in places):
        own = sorted(((x, value) for name, x, value in places if name == variant), key=lambda pair: pair[0])
        curves.append(
            figure_data.Curve(variant, looks[variant], tuple(x for x, _ in own), tuple(value for _, value in own))
        )
    return tuple(curves)


def _first_number(words: str) -> int:
    return int(words.split()[0].replace(",", ""))


def _counted(num: int, noun: str) -> str:
    return f"{num:,} {noun}" if num == 1 else f"{num:,} {noun}s"


_SHOWS: dict[str, Callable[[Evidence], Any]] = {
    "overview": _overview,
    "divergence": _divergence,
    "losses": _losses,
    "decode": _decode,
    "batch": _batch,
    "depth": _depth,
    "sensitivity": _sensitivity,
    "experts": _experts,
}
"""By the names of `figure_data.FIGURES`, what a figure shows: None where no record has anything for it."""
