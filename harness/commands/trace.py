"""`harness trace`"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from harness.commands.options import add_json
from harness.commands.output import print_json

HELP = "Follow every number of a card to its record, and compute it again."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the subcommand is asked."""
    parser.add_argument("card", metavar="CARD", type=Path, help="a Markdown file, for example reports/demo/README.md")
    parser.add_argument(
        "--suite", metavar="F", help="that the card was written for (what its newest record was made with)"
    )
    add_json(parser)


def run(options: argparse.Namespace, given: Sequence[str]) -> int:
    from harness.report.trace import trace
    from harness.suite.load import load

    found = trace(options.card, load(Path(options.suite)) if options.suite else None)
    if options.json:
        print_json(asdict(found))
    else:
        print(f"{found.num_references} references to {found.num_records} records.")
        print(*found.findings or (f"All {found.num_lines} lines come out of them again.",), sep="\n")
    return 1 if found.findings else 0
