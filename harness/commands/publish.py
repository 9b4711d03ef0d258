"""`harness publish`: assembles the upload folder of a variant, checks it, and uploads it."""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from harness.commands.shared import JOB, add_shared, format_table, open_job, print_json, stored_records, suite_file
from harness.report.numbers import format_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the variant, the repository, and how far to go."""
    add = parser.add_argument
    add("--variant", metavar="NAME", required=True, help="the variant to publish")
    add("--repo", metavar="OWNER/NAME", required=True, help="the repository; a missing one is made, and made private")
    add("--out", type=Path, metavar="DIR", help="the folder to assemble (default: publish/SUITE/VARIANT)")
    add("--dry-run", action="store_true", help="upload nothing (an upload needs HF_TOKEN)")
    add("--public", action="store_true", help="make a missing repository public, or upload to a public one")
    add("--allow-inconclusive", action="store_true", help="publish although the gate cannot tell or cannot compare")
    add("--suite", metavar="FILE", required=True, help="the suite's TOML file")
    add_shared(parser, *JOB[1:])


def run(options: argparse.Namespace, given: Sequence[str]) -> int:
    """Assembles, tells and uploads the folder; returns 1 for findings, 3 where the gate cannot tell."""
    from harness.publication import upload

    upload.check_repo(options.repo)
    token = None if options.dry_run else upload.token_of(os.environ)

    from harness.publication.folder import assemble

    with open_job(options, given) as job:
        suite, variant = job.suite.name, options.variant
        out = options.out or Path("publish") / suite / variant
        made = assemble(
            job,
            suite_file(options),
            variant,
            options.repo,
            out,
            *stored_records(options.results),
            allow_undecided=options.allow_inconclusive,
        )
    told = (*made.findings, *made.undecided)
    if not options.json:
        rows = [(name, format_bytes(size)) for name, size in made.files.items()]
        if rows:
            print(format_table(("file", "size"), [*rows, ("total", format_bytes(sum(made.files.values())))]))
        print(*(f"  {one}" for one in told), f"{out}: {'assembled' if rows else 'REFUSED'}", sep="\n")
        if made.exit_code == 3:
            print("Measure what the gate asks for, or give --allow-inconclusive.")
    uploaded = None
    if token is not None and made.exit_code == 0:
        message = f"{suite} {variant}, artifact {made.artifact_digest[:12]}"
        uploaded = upload.upload_folder(
            made.folder,
            made.files,
            options.repo,
            message,
            token,
            public=options.public,
            bars=sys.stderr.isatty() and not options.json,
        )
    if options.json:
        about = {"suite": suite, "variant": variant, "repo": options.repo}
        print_json({**about, **asdict(made), "folder": str(out), "uploaded": uploaded and asdict(uploaded)})
    elif uploaded:
        print(f"{uploaded.url}  {'private' if uploaded.private else 'public'}")
        if uploaded.others:
            print(f"  not of this upload, and left there: {', '.join(uploaded.others)}")
    return made.exit_code
