"""What it costs to start: CPU time of commands that measure nothing, beside another checkout of the harness.

    python -m studies.startup --before ../harness-before

Every command runs in a process of its own, in the checkout that it belongs to. CPU time is what the kernel charged that
process and its children (user and system, `os.wait4`), so that a busy machine changes it little. Rounds alternate
between the checkouts, and the one that goes first changes with every round. Of seven rounds the table shows the median
and, as its interval, the smallest and the largest value, which hold the true median with 98.4 % (1 - 2 / 2**7). The
ratio is taken within each round. Both checkouts must give the same exit code, which is shown too.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.commands.shared import format_table, print_json, whole_number
from harness.errors import UserError

ROUNDS = 7
COMMANDS = (
    "--help",
    "ppl --bogus",
    "ppl --engine bogus",
    "build demo:dense --recipe bogus --out bogus",
    "gate --update-baseline",
    "plan demo:dense --recipe rtn-a16",
    "gate",
    "report --check",
)
"""Listed, refused by the grammar, refused by what an option's value means, planned, judged, checked."""
TOLERATED = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
"""One thread, so that idle threads of a library cost nothing; and no network."""


@dataclass(frozen=True)
class Timed:
    """A command in one checkout: CPU seconds of every round, and the exit code of them all."""

    command: str
    cpu_seconds: tuple[float, ...]
    exit_code: int


@dataclass(frozen=True)
class Compared:
    """A command now, and before where another checkout was named."""

    now: Timed
    before: Timed | None

    @property
    def ratios(self) -> tuple[float, ...]:
        """CPU time now over CPU time before, round by round."""
        if self.before is None:
            return ()
        return tuple(now / before for now, before in zip(self.now.cpu_seconds, self.before.cpu_seconds, strict=True))


def main(arguments: Sequence[str] | None = None) -> int:
    """Times the commands and prints a table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m studies.startup", description=__doc__.split("\n\n")[0])
    parser.add_argument("--before", type=Path, metavar="DIR", help="another checkout, to compare this one with")
    parser.add_argument(
        "--rounds", type=whole_number, default=ROUNDS, metavar="N", help=f"runs of each command (default: {ROUNDS})"
    )
    parser.add_argument("--command", action="append", metavar="WORDS", help="only this command (may be repeated)")
    parser.add_argument("--json", action="store_true", help="print one JSON document, and nothing else on stdout")
    options = parser.parse_args(arguments)
    try:
        here = _checkout(Path.cwd())
        before = options.before and _checkout(options.before)
        found = [compare(command, here, before, options.rounds) for command in options.command or COMMANDS]
    except UserError as error:
        print(f"studies.startup: {error.problem}\n  {error.remedy}", file=sys.stderr)
        return 2
    if options.json:
        print_json(document(found))
    else:
        print(format_table(("command", "exit code", "CPU s before", "CPU s now", "now / before"), rows(found)))
        print(f"\nMedians of {options.rounds} [smallest, largest]; {_machine()}")
    return 0


def compare(command: str, here: Path, before: Path | None, rounds: int) -> Compared:
    """Times one command in one or two checkouts, in turns. `UserError` where an exit code is not always the same."""
    places = [here] if before is None else [here, before]
    seconds: dict[Path, list[float]] = {place: [] for place in places}
    codes: set[int] = set()
    for number in range(rounds):
        for place in places[:: 1 if number % 2 else -1]:
            spent, code = cpu_seconds(command.split(), place)
            seconds[place].append(spent)
            codes.add(code)
    if len(codes) > 1:
        raise UserError(
            f"`harness {command}` ended with exit codes {', '.join(map(str, sorted(codes)))}.",
            "Compare checkouts that say the same: times of other work mean nothing.",
        )
    (code,) = codes
    now, *then = (Timed(command, tuple(seconds[place]), code) for place in places)
    return Compared(now, then[0] if then else None)


def cpu_seconds(words: Sequence[str], checkout: Path) -> tuple[float, int]:
    """User and system seconds of `harness WORDS` and its children in a checkout, and the exit code."""
    environment = {**os.environ, **TOLERATED, "PYTHONPATH": str(checkout)}
    with subprocess.Popen(
        [sys.executable, "-m", "harness", *words],
        cwd=checkout,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_utime + usage.ru_stime, process.returncode


def rows(found: Sequence[Compared]) -> list[tuple[str, str, str, str, str]]:
    """The table's rows: command, exit code, before, now, ratio."""
    return [
        (
            one.now.command,
            str(one.now.exit_code),
            _median(one.before.cpu_seconds if one.before else ()),
            _median(one.now.cpu_seconds),
            _median(one.ratios),
        )
        for one in found
    ]


def document(found: Sequence[Compared]) -> dict[str, object]:
    """Everything that was timed, for `--json`."""
    return {
        "machine": _machine(),
        "commands": [
            {
                "command": one.now.command,
                "exit_code": one.now.exit_code,
                "cpu_seconds": one.now.cpu_seconds,
                "before_cpu_seconds": one.before and one.before.cpu_seconds,
            }
            for one in found
        ],
    }


def _median(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} [{min(values):.3f}, {max(values):.3f}]" if values else "—"


def _machine() -> str:
    from harness.record.provenance import machine

    about = machine()
    return f"{about['cpu']}, {about['cores']} cores, Python {platform.python_version()}"


def _checkout(folder: Path) -> Path:
    if not (folder / "harness" / "__main__.py").is_file():
        raise UserError(f"{folder} is no checkout of the harness.", "Run this from the repository's root.")
    return folder.resolve()


if __name__ == "__main__":
    raise SystemExit(main())
