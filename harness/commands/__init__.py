"""The subcommands of `harness`, one module each: what a subcommand does and what it prints.

A module has `run(options, given)`, which returns the exit code; `given` are the words of the command line, which
records keep. `grammar.toml` says what a subcommand asks, and `shared.py` holds what several of them share. What takes
long to import is imported after all refusals that can do without it.
"""

import argparse
import importlib
from collections.abc import Callable, Sequence


def command_named(name: str) -> Callable[[argparse.Namespace, Sequence[str]], int]:
    """What runs a subcommand: `run` of `serve_command.py` for `serve-command`, and of `import_.py` for `import`."""
    module = importlib.import_module(f"{__name__}.{'import_' if name == 'import' else name.replace('-', '_')}")
    run: Callable[[argparse.Namespace, Sequence[str]], int] = module.run
    return run
