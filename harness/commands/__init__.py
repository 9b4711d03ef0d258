"""The subcommands of `harness`, one module each: what a subcommand asks, what it does and what it prints.

A module has a sentence `HELP`, `add_arguments(parser)` and `run(options, given)`, which returns the exit code; `given`
are the words of the command line, which a record keeps. At its top a module imports only what its grammar needs:
whatever computes is imported by the function that needs it, so that `--help` and a refused option are quick.
`options.py`, `output.py` and `measuring.py` hold what several subcommands share.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from typing import Protocol

NAMES = (
    "plan",
    "build",
    "verify",
    "repair",
    "sensitivity",
    "tasks",
    "ppl",
    "fidelity",
    "bench",
    "import",
    "serve-command",
    "report",
    "trace",
    "export",
    "gate",
    "publish",
    "suite",
    "demo",
)
"""All subcommands, in the order of `harness --help`."""


class Command(Protocol):
    """What a module of this folder offers."""

    HELP: str
    """One sentence for `harness --help`."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Adds the subcommand's own arguments to its parser."""

    def run(self, options: argparse.Namespace, given: Sequence[str]) -> int:
        """Runs the subcommand and returns its exit code."""
        raise NotImplementedError


def command_named(name: str) -> Command:
    """The module of a subcommand: `serve-command` is in `serve_command.py`; `import`, a word of Python, in
    `import_.py`."""
    module = "import_" if name == "import" else name.replace("-", "_")
    command: Command = importlib.import_module(f"{__name__}.{module}")
    return command
