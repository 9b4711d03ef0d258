"""The command line: finds the subcommand, runs it, and turns errors into exit codes.

Exit codes: 0 good, 1 findings, a failed gate or a stale report, 2 the user's error (one sentence and a remedy), 3 a
gate that cannot tell, 130 interrupted.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from harness import __version__, commands
from harness.allocator import keep_freed_memory
from harness.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns its exit code."""
    keep_freed_memory()
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser(given).parse_args(given)
    try:
        code = commands.command_named(options.command).run(options, given)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"harness: {error.problem}\n  {error.remedy}", file=sys.stderr)
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
    """The grammar of `harness`, as far as the words of a command line need it: of the subcommand that they begin with,
    or else of all."""
    top = argparse.ArgumentParser(
        prog="harness", description="Build, verify, measure and report NVFP4 variants of hybrid DeltaNet models."
    )
    top.add_argument("--version", action="version", version=f"harness {__version__}")
    subcommands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in commands.NAMES if not given or given[0] not in commands.NAMES else given[:1]:
        command = commands.command_named(name)
        command.add_arguments(subcommands.add_parser(name, help=command.HELP, description=command.HELP))
    return top
