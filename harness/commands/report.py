"""`harness report`: writes the card, its figures and the marked tables of Markdown pages, or checks them."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.commands.shared import add_shared, load_suite, print_json, stored_records
from harness.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the pages, and what may be replaced."""
    add = parser.add_argument
    add("pages", nargs="*", metavar="PAGE", help="Markdown files with marked tables (default: README.md if it exists)")
    add("--check", action="store_true", help="write nothing; exit 1 if a file is stale")
    add("--overwrite", action="store_true", help="also replace marked tables that were edited by hand")
    add_shared(parser, "--suite", "--results", "--json")


def run(options: argparse.Namespace, given: Sequence[str]) -> int:
    """Writes the files that changed, or names those that are stale; returns 1 for stale files, for tables edited by
    hand and for claims without support."""
    from harness.report import blocks, card, claims

    suite = load_suite(options)
    claims.check_words(suite)
    records, skipped = stored_records(options.results)
    named = [Path(page) for page in options.pages] or [page for page in (Path("README.md"),) if page.exists()]
    pages = {}
    for page in named:
        try:
            pages[page.as_posix()] = page.read_bytes()
        except OSError as error:
            raise UserError(f"{page} cannot be read ({error.strerror}).", "Name a Markdown file.") from error
    edits = [
        f"{page}, line {block.line}: the block '{block.name}' was edited by hand."
        for page, data in pages.items()
        for block in blocks.edited(page, data, suite.name)
    ]
    if edits and not options.check and not options.overwrite:
        raise UserError(" ".join(edits), "Move your words out of it, or lose them by --overwrite.")
    word = "stale" if options.check else "written"
    judged = claims.judged_claims(suite, records, skipped)
    if unsupported := [claim for claim in judged if not claim.supported]:
        print(*(f"harness: {claim.reason}." for claim in unsupported), f"  {claims.REMEDY}", sep="\n", file=sys.stderr)
        if options.json:
            print_json({"files": [], word: [], "edited": edits, "claims": claims.claim_rows(judged)})
        return 1
    rendered = card.generated_files(
        suite, records, results_dir=options.results.as_posix(), pages=pages, is_drawn=not options.check
    )
    root = Path.cwd()
    changed = card.stale_files(rendered, root) if options.check else card.write_files(rendered, root)
    if options.json:
        print_json({"files": sorted(rendered), word: changed, "edited": edits, "claims": claims.claim_rows(judged)})
    else:
        if options.check:
            print(*edits, sep="\n", end="\n" if edits else "")
        print("\n".join(f"{word}: {path}" for path in changed) or f"up to date: {', '.join(sorted(rendered))}")
    if options.check and changed and not options.json:
        print("Run `nox -s report` and commit what it writes.")
    return 1 if options.check and (changed or edits) else 0
