"""Wall time and peak memory of a whole process: ours and theirs on the same clock.

A launcher, which is nothing but a bare interpreter, starts the command and reports what the kernel says of its child.
The detour matters: Linux hands the parent's peak on to a child until the child executes the new program, so a child of
a large process would seem as large as its parent. The launcher itself takes about 10 MB.

The wall time covers everything from the start of the process to its end, imports included. Peak memory is the largest
peak among the processes of the command; mapped file pages count as they do in `top`.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_LAST_LINES = 12


@dataclass(frozen=True)
class Timed:
    """One run of a command. `complaint` is the end of what it wrote to stderr."""

    exit_code: int
    wall_seconds: float
    peak_rss_bytes: int
    stdout: str
    complaint: str


def timed(command: Sequence[str], logs: Path, env: Mapping[str, str] | None = None) -> Timed:
    """Runs a command to its end; its output goes into the files `logs`.out and `logs`.err."""
    logs.parent.mkdir(parents=True, exist_ok=True)
    report, out, err = (logs.with_name(logs.name + suffix) for suffix in (".time", ".out", ".err"))
    launcher = [sys.executable, "-I", "-S", __file__, str(report), str(out), str(err)]
    report.unlink(missing_ok=True)
    # A session of its own, so that an interruption can end the launcher together with what it launched.
    process = subprocess.Popen([*launcher, *command], env={**os.environ, **(env or {})}, start_new_session=True)
    try:
        process.wait()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    if process.returncode:
        raise RuntimeError(f"the launcher of {command[0]} ended with exit code {process.returncode}")
    measured = json.loads(report.read_text(encoding="utf-8"))
    # Progress bars overwrite their line with carriage returns.
    lines = err.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").split("\n")
    complaint = "\n".join([line for line in lines if line.strip()][-_LAST_LINES:])
    return Timed(**measured, stdout=out.read_text(encoding="utf-8", errors="replace"), complaint=complaint)


def _launch(report: str, out: str, err: str, *command: str) -> None:
    with Path(out).open("wb") as stdout, Path(err).open("wb") as stderr:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
    measured = {
        "exit_code": os.waitstatus_to_exitcode(status),
        "wall_seconds": wall,
        "peak_rss_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    }
    Path(report).write_text(json.dumps(measured), encoding="utf-8")


if __name__ == "__main__":
    _launch(*sys.argv[1:])
