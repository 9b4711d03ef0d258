"""`harness verify`: checks the variants of a suite against their source, or one checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from harness.commands.shared import JOB, add_shared, format_table, open_job, print_findings, print_json, progress_bars
from harness.errors import UserError
from harness.resolve import chosen_variants, find_source

if TYPE_CHECKING:
    from harness.audit.verify import Verification
    from harness.job import Job


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the checkpoint and its source, or a suite and its variants."""
    add = parser.add_argument
    add("folder", metavar="DIR", nargs="?", type=Path, help="the checkpoint to check (default: the suite's variants)")
    add("--source", metavar="SOURCE", help="with DIR: the 16-bit checkpoint that it was made from, to compare with")
    add_shared(parser, "--variant", *JOB)


def run(options: argparse.Namespace, given: Sequence[str]) -> int:
    """Prints the findings, a table of round trips and a verdict for each checkpoint; returns 1 where one failed."""
    outcomes = _checked_variants(options, given) if options.folder is None else _checked_folder(options)
    passed = all(outcome.passed for outcome in outcomes.values())
    if options.json:
        print_json({folder: {"passed": one.passed, **asdict(one)} for folder, one in outcomes.items()})
        return 0 if passed else 1
    for folder, outcome in outcomes.items():
        print(f"{folder}: {outcome.num_tensors:,} tensors, {outcome.num_quantized_modules:,} quantized layers")
        print_findings(outcome.findings)
        if outcome.round_trips:
            rows = [
                (
                    trip.role,
                    trip.format,
                    f"{trip.num_tensors:,}",
                    f"{trip.max_abs_error:.3g}",
                    f"{trip.mean_abs_error:.3g}",
                    f"{trip.relative_l2_error:.4f}",
                    f"{trip.snr_db:.2f}",
                )
                for trip in outcome.round_trips
            ]
            heads = ("role", "format", "tensors", "max |error|", "mean |error|", "relative L2", "SNR dB")
            print(f"\n{format_table(heads, rows)}\n")
        unsure = "" if outcome.compared_with_source else " (not compared with a source: give --source)"
        print(f"{'passed' if outcome.passed else 'FAILED'}{unsure}")
    return 0 if passed else 1


def _checked_variants(options: argparse.Namespace, given: Sequence[str]) -> dict[str, Verification]:
    """What the check of each variant of the suite found, by the folder of its artifact."""
    if options.source:
        raise UserError("--source goes with a DIR.", "Name the folder; a suite knows its own source.")

    with open_job(options, given) as job:
        names = chosen_variants(job.suite, options.variant, with_source=False)
        return {str(job.artifact(name)): _checked_variant(job, name) for name in names}


def _checked_folder(options: argparse.Namespace) -> dict[str, Verification]:
    """What the check of a checkpoint found, by its folder."""
    if options.suite or options.variant:
        raise UserError("--suite and --variant do not go with a DIR.", "Leave them out, or leave DIR out.")

    from harness.audit.verify import verify

    source = find_source(options.source) if options.source else None
    with progress_bars() as progress:
        return {str(options.folder): verify(options.folder, source, progress)}


def _checked_variant(job: Job, variant: str) -> Verification:
    """Checks a variant of the suite, built where missing, against its source, and records what the check found."""
    from harness.audit.verify import VERSION, verify
    from harness.job import Model

    artifact = job.build(variant)
    verification = verify(artifact.folder, job.source, job.progress)
    run = job.new_run("verify", VERSION, Model(variant, artifact.folder, artifact.digest))
    round_trips = (
        {"kind": "roundtrip", **vars(trip), "snr_db": trip.snr_db if trip.relative_l2_error > 0 else None}
        for trip in verification.round_trips
    )
    findings = ({"kind": "finding", **vars(finding)} for finding in verification.findings)
    job.store(run, (*round_trips, *findings))
    return verification
