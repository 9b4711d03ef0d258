"""`python -m studies.demo_model`: train an embedded model, or print what a written checkpoint has learnt."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from studies.demo_model import network
from studies.demo_model.figures import figures_of
from studies.demo_model.train import Training, train


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains if `--out` is given, and prints figures of a checkpoint if `--evaluate` is."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.demo_model",
        description="Train an embedded model, or print what a written checkpoint has learnt.",
    )
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--out", type=Path, metavar="DIR", help="train, and write the checkpoint into this folder")
    action.add_argument(
        "--evaluate", type=Path, metavar="DIR", help="print what a written checkpoint has learnt, as JSON"
    )
    parser.add_argument("--model", choices=network.CONFIGS, default="dense", help="the model to train (dense)")
    parser.add_argument(
        "--steps", type=int, nargs="+", metavar="N", help="steps of each stage of the trunk, instead of the stage's own"
    )
    parser.add_argument("--mtp-steps", type=int, metavar="N", help="steps of the MTP head, instead of the stage's own")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the first weights (0)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes that share every batch (2)")
    parser.add_argument(
        "--state",
        type=Path,
        default=Path("state"),
        metavar="DIR",
        help="folder of finished stages, to continue after them (state)",
    )
    options = parser.parse_args(arguments)
    if options.evaluate:
        json.dump(asdict(figures_of(options.evaluate)), sys.stdout, indent=2)
    else:
        train(
            Training(
                model=options.model,
                out=options.out,
                state=options.state,
                seed=options.seed,
                workers=options.workers,
                steps=tuple(options.steps) if options.steps else None,
                mtp_steps=options.mtp_steps,
            )
        )


if __name__ == "__main__":
    main()
