"""`harness suite schema`: prints what a suite file may say, for editors."""

import argparse
from collections.abc import Sequence

from harness.commands.shared import print_json
from harness.suite.json_schema import json_schema
from harness.suite.schema import SuiteFile
from harness.suite.texts import Calibration


def run(options: argparse.Namespace, given: Sequence[str]) -> int:
    """Prints the schema."""
    print_json(json_schema(Calibration if options.calibration else SuiteFile))
    return 0
