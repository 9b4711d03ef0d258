"""`harness export`: writes the results of the records in the formats that other tools read."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from harness.commands.shared import add_shared, load_suite, print_json, stored_records
from harness.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the suite, its variants, and the new folder."""
    add = parser.add_argument
    add("--out", type=Path, metavar="DIR", required=True, help="the folder to write to; other files in it stay")
    add_shared(parser, "--suite", "--results", "--variant", "--json")


def run(options: argparse.Namespace, given: Sequence[str]) -> int:
    """Writes the files that changed, and names them."""
    suite = load_suite(options)
    if options.out.exists() and not options.out.is_dir():
        raise UserError(f"{options.out} is not a folder.", "Give another --out.")

    from harness.report import card
    from harness.report.evidence import gather
    from harness.report.export import export

    evidence = gather(suite, stored_records(options.results)[0], options.results.as_posix())
    files = export(evidence, options.variant or list(suite.variants))
    written = card.write_files(files, options.out)
    if options.json:
        print_json({"out": options.out.as_posix(), "files": sorted(files), "written": sorted(written)})
    else:
        lines = [f"written: {(options.out / path).as_posix()}" for path in sorted(written)]
        print("\n".join(lines) or f"up to date: {len(files):,} files in {options.out.as_posix()}")
    return 0
