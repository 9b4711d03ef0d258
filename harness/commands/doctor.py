"""`harness doctor`: whether this machine has what a suite needs, found out before anything is downloaded or built."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict

from harness.commands.shared import add_shared, load_suite, print_json, with_engine

_MARKS = {"good": "ok", "note": "note", "problem": "PROBLEM"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the suite, the folder of artifacts, and what to check for."""
    add_shared(parser, "--suite", "--engine", "--dtype", "--artifacts", "--json")


def run(options: argparse.Namespace, given: Sequence[str]) -> int:
    """Prints a line a check; returns 2 if the suite cannot run here."""
    from harness.doctor.box import this_box
    from harness.doctor.checks import checks
    from harness.resolve import check_engine

    suite = with_engine(load_suite(options), options)
    check_engine(suite)
    box = this_box()
    found = []
    for check in checks(suite, box, options.artifacts):
        found.append(check)
        if not options.json:
            print(f"{_MARKS[check.state]:8} {check.subject}: {check.text}", flush=True)
            if check.state != "good" and check.remedy:
                print(f"{'':8} {check.remedy}")
    problems = sum(check.state == "problem" for check in found)
    if options.json:
        print_json({"suite": suite.name, "box": asdict(box), "checks": [asdict(check) for check in found]})
    else:
        many = f"{problems} problem{'s' if problems > 1 else ''} to mend first."
        print(f"\nSuite '{suite.name}' {'can run here.' if not problems else f'cannot run here: {many}'}")
    return 2 if problems else 0
