"""`harness gate`: judges the rules of a suite by its records, and keeps the baselines that rules compare with."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from harness.commands.shared import (
    DEFAULT_SUITE,
    add_shared,
    load_suite,
    naming_suite,
    path_or_none,
    print_json,
    stored_records,
)
from harness.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the suite, the new records, the baselines, and where verdicts are written."""
    add = parser.add_argument
    add(
        "--baselines",
        type=Path,
        metavar="DIR",
        help="the folder whose baselines/ names the records to compare with (default: results)",
    )
    add("--junit", type=path_or_none, metavar="FILE", help="write the verdicts as JUnit XML, a test case for each rule")
    add(
        "--step-summary",
        type=path_or_none,
        metavar="FILE",
        help='append the verdicts as Markdown, for example to "$GITHUB_STEP_SUMMARY"',
    )
    add("--update-baseline", action="store_true", help="judge nothing; make the newest records the baseline")
    add("--reason", metavar="TEXT", help="with --update-baseline: why, which the baseline keeps")
    add_shared(parser, "--suite", "--results", "--json")


def run(options: argparse.Namespace, given: Sequence[str]) -> int:
    """Prints a verdict for each rule, or makes a baseline; returns the exit code of the worst verdict."""
    if options.update_baseline != (options.reason is not None):
        raise UserError("--update-baseline and --reason go together.", "A baseline is changed for a reason: give both.")
    if options.update_baseline and options.suite is None:
        raise UserError("--update-baseline needs --suite.", f"Name the suite's file; the demo's is {DEFAULT_SUITE}.")
    suite = load_suite(options)
    folder = options.baselines or Path("results")
    if options.baselines is not None and not folder.is_dir():
        raise UserError(f"{folder} is not a folder.", "Give the folder that baselines/ lies in as --baselines.")
    for place in (options.junit, options.step_summary):
        if place is not None and (place.is_dir() or not place.absolute().parent.is_dir()):
            raise UserError(f"{place} cannot be written.", "Name a file in a folder that exists.")
    records, skipped = stored_records(options.results)

    from harness.record import baselines
    from harness.record.provenance import git
    from harness.report import gate, tables

    if options.update_baseline:  # the newest records become it
        checkout = git(Path(__file__).parent)
        chosen = gate.for_baseline(suite, records)
        commit = checkout["commit"] if checkout else None
        path = baselines.update(folder, suite.name, chosen, reason=options.reason, commit=commit)
        named = {where: {row: str(record.path) for row, record in rows.items()} for where, rows in chosen.items()}
        if options.json:
            print_json({"baseline": str(path), "records": named})
        else:
            print(f"{path}: updated", *(f"  {file}" for rows in named.values() for file in rows.values()), sep="\n")
        return 0
    judgements = gate.judge(suite, records, baselines.baseline_in_force(folder, suite.name), skipped)
    if options.json:
        print_json({"suite": suite.name, "judgements": gate.verdict_rows(judgements)})
    else:
        table = tables.terminal_table(gate.verdict_table(judgements))
        print(f"{naming_suite(table, options.suite)}\n\n{gate.verdict_counts(judgements)}")
    if options.junit:
        options.junit.write_text(gate.junit(suite.name, judgements), encoding="utf-8")
    if options.step_summary:
        with options.step_summary.open("a", encoding="utf-8") as page:
            page.write(gate.step_summary(suite.name, judgements))
    return gate.exit_code(judgements)
