"""The command line: finds the subcommand, runs it, and turns errors into exit codes.

Exit codes: 0 good, 1 findings, a failed gate or a stale report, 2 the user's error (one sentence and a remedy), 3 a
gate that cannot tell, 130 interrupted.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from harness import __version__
from harness.commands import SUBCOMMANDS, command_named
from harness.errors import UserError

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""`mallopt`'s names for them (malloc.h of glibc)."""
_LARGEST_MMAP_THRESHOLD = 32 << 20
"""What glibc accepts at most (DEFAULT_MMAP_THRESHOLD_MAX); larger tensors go back to the system as before."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns its exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser(given).parse_args(given)
    try:
        _keep_freed_memory()
        code = command_named(options.command).run(options, given)
        sys.stdout.flush()
        return code
    except UserError as error:
        from harness.commands.shared import naming_suite

        remedy = naming_suite(error.remedy, getattr(options, "suite", None))
        print(f"harness: {error.problem}\n  {remedy}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "harness: interrupted. The same command starts again; builds, perplexities and task evals continue where "
            "they were.",
            file=sys.stderr,
        )
        return 130
    except BrokenPipeError:
        # The reader of the table has gone (`harness ppl | head`); what is left in the buffer must go nowhere too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(
            f"harness: {place}{error.strerror or error}.\n  Check the path, its rights and the disk.", file=sys.stderr
        )
        return 2


def parser(given: Sequence[str]) -> argparse.ArgumentParser:
    """The grammar of a command line: a sentence for every subcommand, and the arguments of the subcommand that the line
    begins with."""
    top = argparse.ArgumentParser(
        prog="harness", description="Build, verify, measure and report NVFP4 variants of hybrid DeltaNet models."
    )
    top.add_argument("--version", action="version", version=f"harness {__version__}")
    subcommands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, sentence in SUBCOMMANDS.items():
        subcommand = subcommands.add_parser(name, help=sentence, description=sentence)
        if name in given[:1]:
            command_named(name).add_arguments(subcommand)
    return top


def _keep_freed_memory() -> None:
    """From now on, memory up to 32 MB that is freed stays with the process, where the C library is glibc.

    glibc gives it back as soon as a fraction of a megabyte lies free at the end of a heap, and the system clears every
    page that it hands out again: loops over tensors of a megabyte, which is what a cache holds, then spend most of
    their time on that.
    """
    import ctypes  # not before the grammar is satisfied, which needs none of it

    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
    mallopt(_TRIM_THRESHOLD, 1 << 30)
