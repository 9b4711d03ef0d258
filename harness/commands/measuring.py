"""What `tasks`, `ppl`, `fidelity` and `bench` share: options, the job, and how they print what they measured."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from harness.commands.options import add_job, add_variants, open_job, whole_number
from harness.commands.output import print_json

if TYPE_CHECKING:
    from harness.job import Job, Model
    from harness.record.run import Record
    from harness.report.tables import Table


def add_measuring(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of every measure."""
    add = parser.add_argument
    add_variants(parser)
    add_job(parser)
    add("--engine", metavar="NAME", help="the engine (default: the suite's)")
    add("--dtype", metavar="TYPE", help="the type of activations (default: the suite's)")
    add("--limit", type=whole_number, metavar="N", help="measure only the first N windows, repetitions or documents")


def add_fresh(parser: argparse.ArgumentParser) -> None:
    """Adds `--fresh`, for a measure that keeps what it computes."""
    parser.add_argument(
        "--fresh", action="store_true", help="compute everything again, also what earlier runs have kept"
    )


@contextmanager
def measuring_job(options: argparse.Namespace, given: Sequence[str]) -> Iterator[Job]:
    """The job of a measure, on the engine that the command names."""
    from harness.resolve import with_engine

    with open_job(options, given) as job:
        yield replace(job, suite=with_engine(job.suite, options.engine, options.dtype))


def stored_noise(job: Job) -> dict[str, Record]:
    """The newest stored runs of the source beside itself, by row."""
    from harness.report import runs
    from harness.suite.names import NOISE

    return runs.newest_runs(job.stored(), job.suite.name, "fidelity", NOISE)


def print_models(options: argparse.Namespace, models: Sequence[Model]) -> None:
    """Prints which artifacts a measure is about, before it starts."""
    if not options.json:
        for model in models:
            if model.reused is not None and model.digest and model.setup is None:
                print(f"{model.folder}: {'reused' if model.reused else 'built'}, digest {model.digest[:12]}")


def print_measured(
    options: argparse.Namespace,
    records: Mapping[str, Record] | Mapping[str, Mapping[str, Record]],
    frames: Sequence[Table],
    failures: Mapping[str, str],
    *,
    notes: Iterable[str] = (),
    invalid: Sequence[str] | None = None,
) -> int:
    """Prints the tables of a measure, the files of its records (by row, or by protocol or task and row), what must be
    said of them and what failed; returns the exit code. `invalid` is None for a measure that has no audit."""
    from harness.report import runs, tables

    by_name = {name: one if isinstance(one, Mapping) else {name: one} for name, one in records.items()}
    flat = [(row, record) for rows in by_name.values() for row, record in rows.items()]
    filled = [frame for frame in frames if frame]
    warnings = runs.engine_warnings([record for _, record in flat])
    code = 1 if failures or invalid else 0
    if options.json:
        files = {
            name: {row: str(record.path) for row, record in one.items()} if isinstance(one, Mapping) else str(one.path)
            for name, one in records.items()
        }
        shown = [tables.json_rows(frame) for frame in filled]
        found = {"records": files, "tables": shown, "warnings": warnings, "failures": dict(failures)}
        print_json(found if invalid is None else {**found, "invalid": list(invalid)})
        return code
    for frame in filled:
        print(f"\n{tables.terminal_table(frame)}")
    for line in notes:
        print(line)
    if flat:
        print("\nRecords:", *(f"  {record.path}" for _, record in flat), sep="\n")
    for line in (*warnings, *(invalid or ()), *(f"{row} failed: {reason}" for row, reason in failures.items())):
        print(f"harness: {line}", file=sys.stderr)
    return code
