"""`harness demo synthesize`: writes a checkpoint of random weights."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from harness.commands.shared import progress_bars, whole_number
from harness.model.checkpoint import read_json
from harness.report.numbers import format_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `synthesize` and its configuration, folder and size."""
    kinds = parser.add_subparsers(required=True, metavar="WHAT")
    text = "Write a checkpoint of random weights in a configuration's true shapes."
    add = kinds.add_parser("synthesize", help=text, description=text).add_argument
    add("config", type=Path, metavar="CONFIG", help="the config.json of the model")
    add("out", type=Path, metavar="OUT", help="the new folder")
    add("--layers", type=whole_number, metavar="N", help="how many layers to write (default: as in CONFIG)")
    add(
        "--vocabulary",
        type=whole_number,
        metavar="N",
        help="how many tokens the vocabulary has (default: as in CONFIG)",
    )
    add("--seed", type=int, default=0, metavar="N", help="the seed of the random weights (default: 0)")


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
