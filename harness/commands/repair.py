"""`harness repair`: mends in a quantized checkpoint what needs no quantizing again."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from harness.commands.shared import add_shared, format_table, positive_number, print_findings, print_json, progress_bars
from harness.resolve import find_source


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the checkpoint, the new folder, and what repairing may cost."""
    add = parser.add_argument
    add("folder", metavar="DIR", type=Path, help="the checkpoint to mend, which is only read")
    add("out", metavar="OUT", type=Path, help="the new folder")
    add("--source", metavar="SOURCE", help="the 16-bit checkpoint that missing tensors and tokenizer files come from")
    add(
        "--max-error",
        type=positive_number,
        metavar="X",
        help="refuse to write where a shared scale costs a layer more than this share of its norm (default: 0.05)",
    )
    add_shared(parser, "--json")


def run(options: argparse.Namespace, given: Sequence[str]) -> int:
    """Prints what was mended or refused and the verdict on the new folder; returns 1 where it fails."""
    from harness.audit.repair import MAX_RELATIVE_ERROR, repair

    source = find_source(options.source) if options.source else None
    largest = options.max_error or MAX_RELATIVE_ERROR
    with progress_bars() as progress:
        outcome = repair(options.folder, options.out, source, max_relative_error=largest, progress=progress)
    if options.json:
        print_json({"passed": outcome.passed, **asdict(outcome), "out": str(outcome.out)})
        return 0 if outcome.passed else 1
    if outcome.scales:
        rows = [
            (one.fused, one.suffix, " ".join(f"{g:.5g}" for g in one.before), f"{one.shared:.5g}", error)
            for one in outcome.scales
            for error in [f"{one.relative_error:.4f}" + (" refused" if one in outcome.refused else "")]
        ]
        print(f"{format_table(('layer that vLLM fuses', 'scale', 'before', 'shared', 'error added'), rows)}\n")
    for kind, names in (("tensors", outcome.tensors), ("files", outcome.files)):
        if names:
            print(f"{len(names):,} {kind} from the source: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}")
    if outcome.refused:
        print(f"{len(outcome.refused):,} layers would lose more than {largest:g} of their norm: nothing is written.")
    else:
        print(f"{outcome.out}: written" if outcome.written else "There is nothing to mend, and nothing is written.")
    print_findings(outcome.verification.findings)
    print("passed" if outcome.passed else "FAILED")
    return 0 if outcome.passed else 1
