"""Arguments that several subcommands take, the values they accept, and the suite or job that they name."""

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


# -- Arguments -----------------------------------------------------------------------------------------------------


def add_json(parser: argparse.ArgumentParser) -> None:
    """Adds `--json`."""
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout, and nothing else there")


def add_suite(parser: argparse.ArgumentParser) -> None:
    """Adds `--suite`."""
    parser.add_argument(
        "--suite",
        metavar="FILE",
        help=f"the suite's TOML file (default: {DEFAULT_SUITE}, or the embedded suite where that file is missing)",
    )


def add_variants(parser: argparse.ArgumentParser) -> None:
    """Adds `--variant`, which may be repeated."""
    parser.add_argument(
        "--variant", action="append", metavar="NAME", help="only this variant of the suite (may be repeated)"
    )


def add_artifacts(parser: argparse.ArgumentParser) -> None:
    """Adds `--artifacts`, the folder of everything that is built."""
    _add_folder(parser, "artifacts", "the built variants")


def add_results(parser: argparse.ArgumentParser) -> None:
    """Adds `--results`, the folder of the records."""
    _add_folder(parser, "results", "the records")


def _add_folder(parser: argparse.ArgumentParser, name: str, what: str) -> None:
    text = f"the folder of {what} (default: {name})"
    parser.add_argument(f"--{name}", type=Path, default=Path(name), metavar="DIR", help=text)


def add_job(parser: argparse.ArgumentParser) -> None:
    """Adds what `open_job` needs: the suite and the folders of artifacts and records; and `--json`."""
    add_suite(parser)
    add_artifacts(parser)
    add_results(parser)
    add_json(parser)


def add_method(parser: argparse.ArgumentParser) -> None:
    """Adds how scales and codes are chosen."""
    add = parser.add_argument
    add("--scales", metavar="METHOD", help="choose scales by absmax, search or weighted-search, not as the recipe says")
    add("--codes", metavar="METHOD", help="choose codes by rtn or gptq, not as the recipe says")


# -- Values --------------------------------------------------------------------------------------------------------


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


# -- What the arguments name ---------------------------------------------------------------------------------------


def suite_file(options: argparse.Namespace) -> Path:
    """The suite's file: the named one, else `suites/demo.toml`, else the embedded one."""
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
    """The job of a command over its suite, with progress bars while it runs. `given`: the words of the command line."""
    suite = load_suite(options)
    # Found out before a model is loaded, not after it was measured.
    if options.results.exists() and not options.results.is_dir():
        raise UserError(f"{options.results} is not a folder.", "Give another --results.")

    from harness.job import Job
    from harness.record.run import new_id

    with progress_bars() as progress:
        yield Job(suite, options.artifacts, options.results, progress, ("harness", *given), new_id())
