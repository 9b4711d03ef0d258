"""What an engine asks of this process: its types and threads, and how much memory it took."""

import contextlib
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from harness.engines.layers import device_named, silence_transformers
from harness.engines.protocol import Memory
from harness.errors import UserError, did_you_mean

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def prepare_process(dtype: str, device: str) -> torch.device:
    """Readies this process to compute in `dtype` on `device`, with peaks of memory counted from now on. `UserError` for
    a type or a device that there is not."""
    if dtype not in DTYPES:
        raise UserError(f"The torch engine does not compute in '{dtype}'.", did_you_mean(dtype, DTYPES))
    found = device_named(device)
    _set_threads()
    _reset_peak_memory(found)
    silence_transformers()
    return found


def _set_threads() -> None:
    """All the cores this process may use, unless the user decided: torch's own default counts physical ones."""
    if "OMP_NUM_THREADS" not in os.environ:
        has_affinity = hasattr(os, "sched_getaffinity")  # not on macOS
        torch.set_num_threads(len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1)


@contextlib.contextmanager
def out_of_memory(doing: str, remedy: str) -> Iterator[None]:
    """Turn every way of running out of memory into a sentence."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise UserError(f"{doing} ran out of memory.", remedy) from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # what torch's CPU allocator says
            raise
        raise UserError(f"{doing} ran out of memory.", remedy) from error


def _reset_peak_memory(device: torch.device) -> None:
    """Start the peaks anew, so that each engine start has its own. Linux resets the resident peak on `5`."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> Memory:
    """The peaks since `prepare_process`."""
    vram = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    unit = 1 if sys.platform == "darwin" else 1024
    return Memory(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, vram)
