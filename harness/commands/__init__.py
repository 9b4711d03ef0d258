"""The subcommands of `harness`, one module each: what a subcommand asks, what it does and what it prints.

A module has `add_arguments(parser)` and `run(options, given)`, which returns the exit code; `given` are the words of
the command line, which records keep. `shared.py` holds what several of them share. What takes long to import is
imported after all refusals that can do without it.
"""

import argparse
import importlib
from collections.abc import Sequence
from typing import Protocol

SUBCOMMANDS = {
    "doctor": "Tell whether this machine has what a suite needs, before anything is downloaded or built.",
    "plan": "Show what a recipe makes of a model: tensors, bytes, memory traffic. No weights are read.",
    "build": "Build a suite's variants, or one checkpoint by one recipe, as compressed-tensors checkpoints.",
    "verify": "Check compressed-tensors checkpoints, whether the harness built them or not.",
    "repair": "Mend a quantized checkpoint where that needs no quantizing again, as a new folder.",
    "sensitivity": "Measure what each format would cost each projection of each layer.",
    "tasks": "Put the source and its variants to lm-eval's tasks, and keep every item.",
    "ppl": "Measure the perplexity of the source and its variants on the same tokens.",
    "fidelity": "Measure how far every variant's predictions are from its source's, token by token, beside the noise.",
    "bench": "Measure decode and prefill speed of the source and its variants, or of a running server.",
    "import": "Store what `vllm bench` measured on another machine as a record.",
    "serve-command": "Print commands that serve a variant with vLLM or Docker, and the memory that serving takes.",
    "report": "Write the card, its figures and the marked tables, if the records support every claim.",
    "trace": "Follow every number of a card to its record, and compute it again.",
    "export": "Write the results of the records in the formats that other tools read.",
    "gate": "Judge the suite's rules by the records: pass, fail, inconclusive or incomparable.",
    "publish": "Assemble a variant's upload folder, check it, and upload it to the model hub.",
    "suite": "Print the JSON Schema of suite files: `harness suite schema`.",
    "demo": "Write synthetic checkpoints: `harness demo synthesize`.",
}
"""The sentence of every subcommand, in the order of `harness --help`."""


class Command(Protocol):
    """What a module of this folder offers."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Adds the subcommand's own arguments to its parser."""

    def run(self, options: argparse.Namespace, given: Sequence[str]) -> int:
        """Runs the subcommand and returns its exit code."""
        ...


def command_named(name: str) -> Command:
    """The module of a subcommand: `serve_command.py` of `serve-command`, and `import_.py` of `import`."""
    module = "import_" if name == "import" else name.replace("-", "_")
    command: Command = importlib.import_module(f"{__name__}.{module}")
    return command
