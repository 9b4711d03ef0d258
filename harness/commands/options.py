"""Arguments that several subcommands take, and what their values are."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from harness.commands.output import progress_bars
from harness.errors import UserError

if TYPE_CHECKING:
    from harness.job import Job
    from harness.suite.schema import Suite

DEFAULT_SUITE = "suites/demo.toml"


def add_json(parser: argparse.ArgumentParser) -> None:
    """Adds `--json`."""
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout and nothing else")


def add_places(parser: argparse.ArgumentParser) -> None:
    """Adds the suite, the folders of artifacts and records, and `--json`."""
    parser.add_argument("--suite", metavar="F", help=f"({DEFAULT_SUITE}, or the embedded one where there is none)")
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"), metavar="DIR", help="(artifacts)")
    parser.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="(results)")
    add_json(parser)


def add_variants_and_places(parser: argparse.ArgumentParser) -> None:
    """Adds `--variant`, as often as wanted, and the places."""
    parser.add_argument("--variant", action="append", metavar="V", help="only this variant (may be repeated)")
    add_places(parser)


def add_suite_and_results(parser: argparse.ArgumentParser) -> None:
    """Adds the suite and the folder of records, for a command that reads records only."""
    parser.add_argument("--suite", metavar="F", help=f"({DEFAULT_SUITE})")
    parser.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="(results)")


def add_method(parser: argparse.ArgumentParser) -> None:
    """Adds how scales and codes are chosen."""
    parser.add_argument("--scales", metavar="METHOD", help="absmax, search or weighted-search instead of the recipe's")
    parser.add_argument("--codes", metavar="METHOD", help="rtn or gptq instead of the recipe's")


def path_or_none(text: str) -> Path | None:
    """None where a shell variable that holds no path was given."""
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


def suite_file(options: argparse.Namespace) -> Path:
    """The suite's file: the named one, `suites/demo.toml`, or the embedded one where that does not exist."""
    path = Path(options.suite or DEFAULT_SUITE)
    if options.suite is None and not path.exists():
        from harness import demo

        path = demo.SUITE
    return path


def load_suite(options: argparse.Namespace) -> Suite:
    """The suite that a command is about."""
    from harness.suite.load import load

    return load(suite_file(options))


@contextmanager
def open_job(options: argparse.Namespace, given: Sequence[str]) -> Iterator[Job]:
    """The job of a command over its suite, with progress bars while it runs."""
    from harness.job import Job
    from harness.record.schema import new_id

    suite = load_suite(options)
    # Found out before a model is loaded, not after it was measured.
    if options.results.exists() and not options.results.is_dir():
        raise UserError(f"{options.results} is not a folder.", "Give another --results.")
    with progress_bars() as progress:
        yield Job(suite, options.artifacts, options.results, progress, ("harness", *given), new_id())
