"""From records to evidence: the runs that speak for a suite, every table of them, and what every figure shows.

It is gathered once, and cards, pages, figures and exports look at nothing else.
"""

import posixpath
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import itemgetter
from typing import Any

from harness.record.run import Record
from harness.record.stats import Estimate
from harness.report import build_tables, figure_data, quality_tables, runs, speed_tables, task_tables
from harness.report.tables import Table, cell_text, table_of
from harness.suite.names import NOISE, SOURCE, row_parts
from harness.suite.schema import Suite

_MEASURES = ("build", "verify", "fidelity", "bench", "sensitivity", "served")
"""Those of which a row has one run; perplexities and tasks have one by each protocol and in each task."""


@dataclass(frozen=True, eq=False)  # each evidence is gathered once
class Evidence:
    """A suite and the runs that speak for it, with every table and the data of every figure, computed once."""

    suite: Suite
    results_dir: str
    records: Mapping[str, runs.Records]  # measure -> variant -> record; all but perplexities and tasks
    perplexities: runs.ByProtocol  # protocol -> variant -> record
    tasks: runs.ByTask  # task -> variant -> record
    tables: Mapping[str, Table]
    repo: str | None = None  # the id on the hub, of a card that is published

    @property
    def chosen(self) -> list[Record]:
        """Every run that speaks on the card."""
        measured = (*self.records.values(), *self.perplexities.values(), *self.tasks.values())
        return [record for runs in measured for record in runs.values()]

    @property
    def protocol(self) -> str | None:
        """The protocol of the perplexity that stands where there is room for one: the suite's first."""
        return self.suite.ppl.protocols[0] if self.suite.ppl else None

    @cached_property
    def figures(self) -> dict[str, Any]:
        """What each figure shows that there is something for, as the dataclass of its drawing, by the figure's name."""
        found = {name: shows(self) for name, shows in _SHOWS.items()}
        return {name: what for name, what in found.items() if what is not None}

    def record_path(self, record: Record) -> str:
        """Where a record lies, as a POSIX path from the project's root."""
        return posixpath.join(self.results_dir, record.path.parent.name, record.path.name)


def gather(suite: Suite, records: Sequence[Record], results_dir: str, repo: str | None = None) -> Evidence:
    """The evidence of a suite among `records`, which lie under `results_dir` (a POSIX path from the project's root)."""
    variants = suite.rows()
    chosen = {measure: runs.newest_runs(records, suite.name, measure, (*variants, *NOISE)) for measure in _MEASURES}
    protocols = suite.ppl.protocols if suite.ppl else ()
    perplexities = runs.newest_by_protocol(records, suite.name, protocols, variants)
    tasks = task_tables.newest_by_task(records, suite, variants)
    versus = suite.bench.versus if suite.bench else SOURCE
    tables = {
        "totals": build_tables.total_table(chosen["build"]),
        "size": build_tables.role_table(chosen["build"]),
        "method": build_tables.method_table(chosen["build"]),
        "calibration": build_tables.calibration_table(chosen["build"]),
        "sizes": build_tables.sizing_table(chosen["build"]),
        "roundtrip": build_tables.samples_table(chosen["verify"], "roundtrip"),
        "findings": build_tables.samples_table(chosen["verify"], "finding"),
        "sensitivity": quality_tables.sensitivity_table(chosen["sensitivity"]),
        "perplexity": quality_tables.perplexity_table(
            perplexities, quality_tables.log_ppl_floor(chosen["fidelity"], perplexities)
        ),
        "fidelity": quality_tables.divergence_table(chosen["fidelity"]),
        "bands": quality_tables.band_table(chosen["fidelity"]),
        "decode": speed_tables.decode_table(chosen["bench"], versus),
        "prefill": speed_tables.prefill_table(chosen["bench"], versus),
        "kernels": speed_tables.kernel_table(chosen["bench"]),
        "memory": speed_tables.memory_table(chosen["bench"]),
        "served": speed_tables.served_table(chosen["served"]),
        "tasks": task_tables.score_table(tasks),
        "answers": task_tables.answer_table(tasks),
    }
    evidence = Evidence(suite, results_dir, chosen, perplexities, tasks, tables, repo)
    return replace(evidence, tables={**tables, "runs": run_table(evidence.chosen)})


def run_table(records: Sequence[Record]) -> Table:
    """Where every number comes from: the run, its engine, machine, versions and commit."""
    rows = []
    for record in records:
        run = record.run
        engine, machine, git = run.engine, run.machine, run.git
        gpu = machine.get("gpu")
        hardware = f"{gpu['count']} × {gpu['name']}, driver {gpu['driver']}" if gpu else machine.get("cpu")
        digest = run.variant.get("artifact_digest")
        rows.append(
            {
                "variant": run.variant["name"],
                "measure": run.measure,
                "recipe": run.variant.get("recipe"),
                "artifact": digest and digest[:12],
                "engine": f"{engine['name']} ({engine['version']}), {engine['dtype']} on {engine['device']}"
                if engine
                else None,
                "machine": f"{machine['name']}: {hardware}, {machine.get('cores')} cores, {machine.get('os')}",
                "packages": ", ".join(f"{name} {version}" for name, version in sorted(run.packages.items())),
                "commit": git["commit"][:12] + (" with changes" if git["dirty"] else "") if git else None,
                "started_utc": run.started_utc,
                "run": record,
            }
        )
    return table_of(rows)


# -- What each figure shows --------------------------------------------------------------------------------------


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
        loss = loss if isinstance(loss, Estimate) else None
        rows.append(figure_data.Row(variant, looks[variant], _num_bytes(evidence, variant), loss, tuple(steps)))
    is_something = any(row.num_bytes is not None or row.loss is not None or row.step_seconds for row in rows)
    return figure_data.Overview(tuple(rows)) if is_something else None


def _divergence(evidence: Evidence) -> figure_data.Divergence | None:
    """Points of one text and engine: those that may stand beside the first."""
    looks, records = _looks(evidence), _of_rows(evidence, "fidelity")
    refused = _refused(records)
    points, floors = [], []
    for row in _rows(evidence, "fidelity", records):
        variant, kl = row["variant"], row["kl"] if isinstance(row["kl"], Estimate) else None
        num_bytes = _num_bytes(evidence, row_parts(variant)[0])
        if variant in refused:
            continue
        if num_bytes is None:
            refused[variant] = "no record of its build"
            continue
        floor = quality_tables.noise_floor(evidence.records["fidelity"], records[variant])
        floors.append(floor.kl_nats if floor else 0.0)
        points.append(figure_data.SizePoint(variant, looks[variant], num_bytes, kl))
    if not points:
        return None
    source_bytes = _num_bytes(evidence, SOURCE)
    source = figure_data.SizePoint(SOURCE, looks[SOURCE], source_bytes, None) if source_bytes is not None else None
    return figure_data.Divergence(source, tuple(points), max(floors) or None, _note(refused))


def _losses(evidence: Evidence) -> figure_data.Forest | None:
    looks = _looks(evidence)

    def mark(row: Mapping[str, Any], key: str) -> figure_data.Mark:
        value = row[key] if isinstance(row[key], Estimate) else None
        return figure_data.Mark(row["variant"], looks[row["variant"]], value, cell_text(key, row[key]))

    groups = []
    for protocol, records in evidence.perplexities.items():
        rows = [row for row in _rows(evidence, "perplexity", records) if row["protocol"] == protocol]
        unit = rows[0]["unit"] if rows else "token"
        marks = tuple(mark(row, "delta_log_ppl") for row in rows if row["variant"] != SOURCE)
        groups.append(figure_data.MarkGroup(f"{protocol}, per {unit}", marks))
    if rows := _rows(evidence, "fidelity", _of_rows(evidence, "fidelity")):
        window = evidence.tables["fidelity"]["window"][0]
        told = f", windows of {window:,}" if window else ""
        marks = tuple(mark(row, "kl_log_ppl") for row in rows)
        groups.append(figure_data.MarkGroup(f"fidelity{told}, per token", marks))
    groups = [group for group in groups if any(mark.value for mark in group.marks)]
    floor = quality_tables.log_ppl_floor(evidence.records["fidelity"], evidence.perplexities)
    return figure_data.Forest(tuple(groups), floor or None) if groups else None


def _decode(evidence: Evidence) -> figure_data.Forest | None:
    looks, records = _looks(evidence), _of_rows(evidence, "bench")
    refused = _refused(records)
    groups: dict[tuple[int, int], list[figure_data.Mark]] = {}
    for row in _rows(evidence, "decode", records):
        if row["batch"] != 1:
            continue
        variant, speed, ceiling = (row[key] for key in ("variant", "tokens_per_second", "ceiling_tokens_per_second"))
        words = cell_text("tokens_per_second", speed)
        if variant in refused:
            speed, words, ceiling = None, refused[variant], None
        elif ceiling is not None:
            share = cell_text("ceiling_share", row["ceiling_share"])
            words += f", {share} of {cell_text('ceiling_tokens_per_second', ceiling)}"
        mark = figure_data.Mark(variant, looks[variant], speed, words, ceiling)
        groups.setdefault((row["prompt_tokens"], row["new_tokens"]), []).append(mark)
    found = [figure_data.MarkGroup(_shape_words(*shape), tuple(marks)) for shape, marks in sorted(groups.items())]
    return figure_data.Forest(tuple(found)) if found else None


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
    return figure_data.Batches(total, per_user, _shape_words(*shape), _note(refused))


def _depth(evidence: Evidence) -> figure_data.Bands | None:
    records = _of_rows(evidence, "fidelity")
    refused = _refused(records)
    rows = [row for row in _rows(evidence, "bands", records) if row["variant"] not in refused]
    # By the first number of "1,024 to 2,047".
    names = sorted(
        dict.fromkeys(row["before"] for row in rows), key=lambda before: int(before.split()[0].replace(",", ""))
    )
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
    """Of all tensors of a variant; of the source by any build of it, since all read the same. None without a build."""
    totals, key = evidence.tables["totals"], "source_bytes" if variant == SOURCE else "output_bytes"
    found: list[int] = [row[key] for row in totals.rows if variant in (SOURCE, row["variant"])]
    return next(iter(found), None)


def _of_rows(evidence: Evidence, measure: str) -> dict[str, Record]:
    """The records of a measure without the source's noise, in the order of the tables."""
    return {name: record for name, record in evidence.records[measure].items() if name not in NOISE}


def _rows(evidence: Evidence, table: str, records: Mapping[str, Record]) -> list[dict[str, Any]]:
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


def _curves(
    looks: Mapping[str, figure_data.Look], places: list[tuple[str, int, Estimate]]
) -> tuple[figure_data.Curve, ...]:
    """A curve for each variant from (variant, x, value)."""
    curves = []
    for variant in dict.fromkeys(variant for variant, _, _ in places):
        own = sorted(((x, value) for name, x, value in places if name == variant), key=itemgetter(0))
        xs, values = zip(*own, strict=True)
        curves.append(figure_data.Curve(variant, looks[variant], xs, values))
    return tuple(curves)


def _shape_words(prompt_tokens: int, new_tokens: int) -> str:
    return f"after {prompt_tokens:,} token{'' if prompt_tokens == 1 else 's'}, {new_tokens - 1:,} timed"


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
