"""Kills calibrated builds of the embedded model at random moments and looks whether they still end with the same bytes.

    python -m tests.kill_builds --points 30 --seed 0

Each point starts a build in a fresh folder, kills its process (SIGKILL) after a random share of the time that an
uninterrupted build takes, runs the same command again until it ends, and compares every file. Exit code 1 if one
differs.
The test suite does a few points, this program as many as it is told.
"""

import argparse
import contextlib
import io
import multiprocessing
import random
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from harness.cli import main as harness
from harness.errors import UserError
from harness.model.checkpoint import open_checkpoint

CALIBRATION = """
batch_tokens = 128
hidden_memory_gb = 0.0001
[[sources]]
demo = "train"
samples = 3
max_tokens = 64
seed = 0
"""
"""Few enough samples that a build takes seconds; too little memory for their hidden states, so that files are read."""


@dataclass(frozen=True)
class Point:
    """One killed build. `layers` were finished on the disk when it was killed; `shards` of the output too."""

    after_seconds: float
    layers: int
    shards: int
    committed: bool
    identical: bool


def _build(folder: Path, name: str, codes: str) -> None:
    command = ["build", "demo:dense", "--recipe", "w4a4", "--codes", codes, "--calibration", str(folder / "set.toml")]
    with contextlib.redirect_stdout(io.StringIO()):
        code = harness([*command, "--out", str(folder / name)])
    sys.exit(code)


def _run(folder: Path, name: str, codes: str, kill_after: float | None = None) -> tuple[int | None, float]:
    """Builds in a process of its own; returns its exit code and the seconds it took."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__, "harness.job"])
    process = processes.Process(target=_build, args=(folder, name, codes))
    started = time.perf_counter()
    process.start()
    process.join(kill_after)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode, time.perf_counter() - started


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _is_checkpoint(folder: Path) -> bool:
    try:
        open_checkpoint(folder)
    except UserError:
        return False
    return True


def kill_builds(folder: Path, points: int, seed: int, codes: str) -> list[Point]:
    """Kills `points` builds in `folder`, each at its own moment, and finishes them."""
    (folder / "set.toml").write_text(CALIBRATION)
    _run(folder, "warm", codes)  # starts the server that has the libraries loaded, which would count as building
    shutil.rmtree(folder / "warm")
    code, seconds = _run(folder, "whole", codes)
    if code != 0:
        raise RuntimeError(f"the uninterrupted build ended with {code}")
    whole, moments = _files(folder / "whole"), random.Random(seed)
    outcome = []
    out, partial = folder / "out", folder / "out.partial"
    while len(outcome) < points:
        code, took = _run(folder, "out", codes, moments.uniform(0, seconds))
        if code == 0:  # it was done before its moment: the machine is quicker by now
            seconds = min(seconds, took)
            shutil.rmtree(out)
            continue
        sound = not _is_checkpoint(partial)
        layers, shards = (
            len(list(partial.glob(pattern))) for pattern in ("layer-*.safetensors", "model-*.safetensors")
        )
        committed = _is_checkpoint(out)
        code, _ = _run(folder, "out", codes)
        same = sound and code == 0 and not partial.exists() and _files(out) == whole
        outcome.append(Point(took, layers, shards, committed, same))
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--points", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--codes", default="gptq", help="rtn is quicker (gptq)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outcome = kill_builds(Path(folder), options.points, options.seed, options.codes)
    for number, point in enumerate(outcome, 1):
        where = f"{point.layers} layers and {point.shards} shards finished{', committed' * point.committed}"
        verdict = "identical" if point.identical else "DIFFERENT"
        sys.stdout.write(f"{number:3}  killed after {point.after_seconds:6.2f} s: {where}; {verdict}\n")
    num_same = sum(point.identical for point in outcome)
    sys.stdout.write(f"{num_same} of {len(outcome)} ended with the bytes of the uninterrupted build\n")
    return 0 if num_same == len(outcome) else 1


if __name__ == "__main__":
    sys.exit(main())
