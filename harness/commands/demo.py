"""`harness demo synthesize`: writes a checkpoint of random weights."""

import argparse
from collections.abc import Sequence

from harness.commands.shared import progress_bars
from harness.model.checkpoint import read_json
from harness.report.numbers import format_bytes


def run(options: argparse.Namespace, given: Sequence[str]) -> int:
    """Writes the checkpoint, and prints its size."""
    from harness.demo.synthesize import synthesize

    with progress_bars() as progress:
        total = synthesize(
            read_json(options.config),
            options.out,
            num_layers=options.layers,
            vocab_size=options.vocabulary,
            seed=options.seed,
            progress=progress,
        )
    print(f"{options.out}  {format_bytes(total)} of random weights")
    return 0
