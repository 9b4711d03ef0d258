"""What several subcommands share: the suite or job that they are about, and what they print.

Tables and findings or one JSON document go to stdout, progress bars to stderr.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from harness.errors import UserError
from harness.progress import duration

if TYPE_CHECKING:
    import rich.progress

    from harness.audit.findings import Finding
    from harness.doctor.checks import Need
    from harness.job import Job, Model
    from harness.progress import Progress
    from harness.record.run import Record, Skipped
    from harness.report.tables import Table
    from harness.suite.schema import Suite

DEFAULT_SUITE = Path("suites/demo.toml")
_MOST_FINDINGS = 20


# -- Arguments -----------------------------------------------------------------------------------------------------


def path_or_none(text: str) -> Path | None:
    """A path; None for the empty text that an unset shell variable leaves."""
    return Path(text) if text else None


def positive_number(text: str) -> float:
    """A finite number above zero."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def whole_number(text: str) -> int:
    """An integer from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return value


def _folder(name: str, holds: str) -> dict[str, Any]:
    words = f"the folder of {holds} (default: {name})"
    return {"type": Path, "default": Path(name), "metavar": "DIR", "help": words}


_SHARED: dict[str, dict[str, Any]] = {
    "--json": {"action": "store_true", "help": "print one JSON document on stdout, and nothing else there"},
    "--suite": {
        "metavar": "FILE",
        "help": "the suite's TOML file (default: suites/demo.toml, or the embedded suite where that file is missing)",
    },
    "--variant": {"action": "append", "metavar": "NAME", "help": "only this variant of the suite (may be repeated)"},
    "--artifacts": _folder("artifacts", "the built variants"),
    "--results": _folder("results", "the records"),
    "--scales": {
        "metavar": "METHOD",
        "help": "choose scales by absmax, search or weighted-search, not as the recipe says",
    },
    "--codes": {"metavar": "METHOD", "help": "choose codes by rtn or gptq, not as the recipe says"},
    "--engine": {"metavar": "NAME", "help": "the engine (default: the suite's)"},
    "--dtype": {"metavar": "TYPE", "help": "the type of activations (default: the suite's)"},
    "--limit": {
        "type": whole_number,
        "metavar": "N",
        "help": "measure only the first N windows, repetitions or documents",
    },
    "--fresh": {"action": "store_true", "help": "compute everything again, also what earlier runs have kept"},
}
JOB = ("--suite", "--artifacts", "--results", "--json")
"""The arguments that `open_job` needs, and `--json`."""
MEASURING = ("--variant", *JOB, "--engine", "--dtype", "--limit")
"""The arguments of every measure."""


def add_shared(parser: argparse.ArgumentParser, *names: str) -> None:
    """Adds arguments that several subcommands have."""
    for name in names:
        parser.add_argument(name, **_SHARED[name])


# -- The suite and its job -----------------------------------------------------------------------------------------


def suite_file(options: argparse.Namespace) -> Path:
    """The suite's file: the named one, else `suites/demo.toml`, else the embedded one."""
    if options.suite or DEFAULT_SUITE.exists():
        return Path(options.suite or DEFAULT_SUITE)
    from harness import demo

    return demo.SUITE


def load_suite(options: argparse.Namespace) -> Suite:
    """The suite that a command is about."""
    from harness.suite.load import load

    return load(suite_file(options))


_COMMAND = re.compile(r"`((?:python -m )?nox -s|harness) ([a-z-]+)([^`]*)`")
_WITHOUT_SUITE = {"plan", "repair", "demo", "suite"}


def naming_suite(text: str, suite: str | None) -> str:
    """A text for the user, in which every command is about the suite that the user has named."""
    if suite is None:
        return text

    def named(found: re.Match[str]) -> str:
        program, what, rest = found.groups()
        if what in _WITHOUT_SUITE or "--suite" in rest:
            return found[0]
        dashes = " --" if "nox" in program and " -- " not in rest else ""
        return f"`{program} {what}{rest}{dashes} --suite {suite}`"

    return _COMMAND.sub(named, text)


def check_machine(job: Job, needs: Sequence[Need], variants: Sequence[str] | None) -> None:
    """`UserError` where this machine lacks what the suite needs, before anything is downloaded or built; what the user
    would want to know before hours are spent goes to stderr."""
    from harness.doctor.box import this_box
    from harness.doctor.checks import require
    from harness.resolve import check_engine, chosen_variants

    check_engine(job.suite)
    chosen_variants(job.suite, variants, with_source=True)
    for note in require(job.suite, this_box(), job.artifacts, needs, variants, job.device):
        print(f"harness: {note.text} {note.remedy}".rstrip(), file=sys.stderr)


def with_engine(suite: Suite, options: argparse.Namespace) -> Suite:
    """The suite on the engine, and with the type of activations, that a command names."""
    engine = suite.engine
    engine = replace(engine, name=options.engine or engine.name, dtype=options.dtype or engine.dtype)
    return replace(suite, engine=engine)


@contextmanager
def open_job(options: argparse.Namespace, given: Sequence[str]) -> Iterator[Job]:
    """The job of a command over its suite, with progress bars while it runs. `given`: the words of the command line."""
    suite = load_suite(options)
    # Found out before a model is loaded, not after it was measured.
    if options.results.exists() and not options.results.is_dir():
        raise UserError(f"{options.results} is not a folder.", "Give another --results.")

    from harness.job import Job
    from harness.record.run import new_id

    with progress_bars() as progress:
        yield Job(suite, options.artifacts, options.results, progress, ("harness", *given), new_id())


@contextmanager
def measuring_job(options: argparse.Namespace, given: Sequence[str]) -> Iterator[Job]:
    """The job of a measure, on the engine that the command names."""
    with open_job(options, given) as job:
        job = replace(job, suite=with_engine(job.suite, options))
        if getattr(options, "server", None) is None:
            check_machine(job, (options.command,), options.variant)
        yield job


# -- What is printed -----------------------------------------------------------------------------------------------


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """Draws one bar per description on stderr, from the first progress on; where stderr is no terminal, tells in plain
    lines, one a minute."""
    with _bars() if sys.stderr.isatty() else plain_lines(sys.stderr) as progress:
        yield progress


@contextmanager
def _bars() -> Iterator[Progress]:
    with ExitStack() as stack:
        bars: list[Any] = []
        tasks: dict[str, Any] = {}

        def advance(done: int, total: int, description: str, note: str = "", /) -> None:
            if not bars:
                bars.append(stack.enter_context(_empty_bars()))
            if description not in tasks:
                for task in tasks.values():
                    bars[0].stop_task(task)
                tasks[description] = bars[0].add_task(description, total=total, note="")
            bars[0].update(tasks[description], completed=done, total=total, note=note)

        yield advance


def _empty_bars() -> rich.progress.Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    return Progress(*columns, console=Console(stderr=True))


@contextmanager
def plain_lines(stream: TextIO, seconds: float = 60.0) -> Iterator[Progress]:
    """Tells on `stream` every so many `seconds` how far the work is, also while nothing advances: what it is, done of
    all, the rate since it began, and the time that is left. Work that is over sooner is silent."""
    now: dict[str, Any] = {}
    began = 0.0
    over = threading.Event()

    def advance(done: int, total: int, description: str, note: str = "", /) -> None:
        nonlocal began
        if description != now.get("description"):
            began = time.monotonic()
            now.update(description=description, first=done)
        now.update(done=done, total=total, note=note)

    def tell() -> None:
        while not over.wait(seconds):
            if now:
                print(progress_line(**now, seconds=time.monotonic() - began), file=stream, flush=True)

    teller = threading.Thread(target=tell, daemon=True, name="progress")
    teller.start()
    try:
        yield advance
    finally:
        over.set()
        teller.join()


def progress_line(description: str, *, first: int, done: int, total: int, note: str, seconds: float) -> str:
    """A line on work that has gone from `first` to `done` of `total` in `seconds`."""
    share = f" ({done / total:.0%})" if total else ""
    line = f"{time.strftime('%H:%M:%S')}  {description}: {done:,} of {total:,}{share}"
    if done > first and seconds > 0:
        rate = (done - first) / seconds
        line += f", {rate:,.4g} a second, {duration((total - done) / rate)} left"
    return f"{line}, {note}" if note else line


def print_json(document: Any) -> None:
    """Prints the document of a command with `--json`."""
    print(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))


def format_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for a terminal: the first column to the left, the others to the right."""
    from tabulate import tabulate

    align = ("left", *("right" for _ in headers[1:]))
    return tabulate(rows, headers=headers, tablefmt="simple", colalign=align, disable_numparse=True)


def print_findings(findings: Sequence[Finding]) -> None:
    """Prints the first findings of an audit, and how many more there are."""
    for finding in findings[:_MOST_FINDINGS]:
        print(f"  {finding.severity}: {finding.tensor} {finding.problem}.\n    In vLLM: {finding.consequence}.")
    if (more := len(findings) - _MOST_FINDINGS) > 0:
        print(f"  … and {more:,} more findings (--json lists them all)")


def stored_records(folder: Path) -> tuple[list[Record], list[Skipped]]:
    """Every complete run of a results folder, and the files that are not used, which are named on stderr."""
    from harness.record.store import read_all

    if not folder.is_dir() and (folder.exists() or folder != Path("results")):
        raise UserError(f"{folder} is not a folder.", "Give the folder of the records as --results.")
    records, skipped = read_all(folder)
    for file in skipped:
        print(f"harness: {file.path} is not used: {file.reason}", file=sys.stderr)
    return records, skipped


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
