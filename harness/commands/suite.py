"""`harness suite schema`: prints what a suite file may say, for editors."""

import argparse
from collections.abc import Sequence

from harness.commands.shared import print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `schema`, and which file it is about."""
    kinds = parser.add_subparsers(required=True, metavar="WHAT")
    text = "Print what a suite file may say as a JSON Schema, by which editors complete, explain and check its keys."
    add = kinds.add_parser("schema", help=text, description=text).add_argument
    add("--calibration", action="store_true", help="print that of the files that `harness build --calibration` takes")


def run(options: argparse.Namespace, given: Sequence[str]) -> int:
    """Prints the schema."""
    from harness.suite.json_schema import json_schema
    from harness.suite.schema import SuiteFile
    from harness.suite.texts import Calibration

    print_json(json_schema(Calibration if options.calibration else SuiteFile))
    return 0
