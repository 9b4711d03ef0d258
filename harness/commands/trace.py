"""`harness trace`: follows every number of a card to its record."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from harness.commands.shared import add_shared, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the card and its suite."""
    add = parser.add_argument
    add("card", metavar="CARD", type=Path, help="the card, for example reports/demo/README.md")
    add("--suite", metavar="FILE", help="the card's suite (default: the suite that the card's newest record keeps)")
    add_shared(parser, "--json")


def run(options: argparse.Namespace, given: Sequence[str]) -> int:
    """Prints how many references were followed, and every line that does not come out of its records again."""
    from harness.report.trace import trace
    from harness.suite.load import load

    found = trace(options.card, load(Path(options.suite)) if options.suite else None)
    if options.json:
        print_json(asdict(found))
    else:
        print(f"{found.num_references} references to {found.num_records} records.")
        print(*found.findings or (f"All {found.num_lines} lines come out of them again.",), sep="\n")
    return 1 if found.findings else 0
