"""What several subcommands print: tables and findings or one JSON document on stdout, progress bars on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import UserError

if TYPE_CHECKING:
    import rich.progress

    from harness.audit.findings import Finding
    from harness.progress import Progress
    from harness.record.run import Record, Skipped

_MOST_FINDINGS = 20


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """Draws one bar per description on stderr, from the first progress on; nothing where stderr is no terminal."""
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

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    return Progress(*columns, console=console, disable=not console.is_terminal)


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
