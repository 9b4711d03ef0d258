"""`harness gate`"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from harness.commands.options import DEFAULT_SUITE, add_json, load_suite, path_or_none
from harness.commands.output import print_json, stored_records
from harness.errors import UserError

HELP = "Judge the suite's rules by the records: pass, fail, inconclusive or incomparable."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the subcommand is asked."""
    parser.add_argument("--suite", metavar="F", help=f"({DEFAULT_SUITE})")
    parser.add_argument(
        "--results", type=Path, default=Path("results"), metavar="DIR", help="the new records (results)"
    )
    parser.add_argument(
        "--baselines", type=Path, metavar="DIR", help="records with baselines/, to compare with (results)"
    )
    parser.add_argument("--junit", type=path_or_none, metavar="FILE", help="write JUnit XML, a test case for each rule")
    parser.add_argument(
        "--step-summary",
        type=path_or_none,
        metavar="FILE",
        help='append Markdown, for example to "$GITHUB_STEP_SUMMARY"',
    )
    parser.add_argument("--update-baseline", action="store_true", help="make the newest records the baseline")
    parser.add_argument("--reason", metavar="TEXT", help="with --update-baseline: why; it is kept")
    add_json(parser)


def run(options: argparse.Namespace, given: Sequence[str]) -> int:
    from harness.record import baselines
    from harness.report import gate, gate_output, tables

    if options.update_baseline != (options.reason is not None):
        raise UserError("--update-baseline and --reason go together.", "A baseline is changed for a reason: give both.")
    suite = load_suite(options)
    folder = options.baselines or Path("results")
    if options.baselines is not None and not folder.is_dir():
        raise UserError(f"{folder} is not a folder.", "Give the folder that baselines/ lies in as --baselines.")
    for place in (options.junit, options.step_summary):
        if place is not None and (place.is_dir() or not place.absolute().parent.is_dir()):
            raise UserError(f"{place} cannot be written.", "Name a file in a folder that exists.")
    records, skipped = stored_records(options.results)
    if options.update_baseline:
        from harness.record.provenance import git

        checkout = git(Path(__file__).parent)
        chosen = gate.for_baseline(suite, records)
        commit = checkout["commit"] if checkout else None
        path = baselines.update(folder, suite.name, chosen, reason=options.reason, commit=commit)
        named = {where: {row: str(one.path) for row, one in rows.items()} for where, rows in chosen.items()}
        if options.json:
            print_json({"baseline": str(path), "records": named})
        else:
            print(f"{path}: updated", *(f"  {file}" for rows in named.values() for file in rows.values()), sep="\n")
        return 0
    judgements = gate.judge(suite, records, baselines.read(folder, suite.name), skipped)
    if options.json:
        print_json({"suite": suite.name, "judgements": gate_output.verdict_rows(judgements)})
    else:
        print(
            f"{tables.terminal_table(gate_output.verdict_table(judgements))}\n\n{gate_output.verdict_counts(judgements)}"
        )
    if options.junit:
        options.junit.write_text(gate_output.junit(suite.name, judgements), encoding="utf-8")
    if options.step_summary:
        with options.step_summary.open("a", encoding="utf-8") as page:
            page.write(gate_output.step_summary(suite.name, judgements))
    return gate.exit_code(judgements)
