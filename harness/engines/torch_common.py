"""What the engines that run transformers' models have in common.

They ready this process and watch its memory, and they come from the last hidden states to log-probabilities. Logits are
computed in float32: BF16 logits step by 1/8 between 16 and 32, as much as the effects measured here. Another number of
rows in one product may sum in another order, so the torch and the streamed engine take the same.
"""

import os
import resource
import sys
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from harness.engines.emulation import formats_of
from harness.engines.layers import device_named, silence_transformers
from harness.engines.protocol import Chunk, Engine, Memory, Top
from harness.engines.torch_answers import LOGITS_BYTES
from harness.errors import UserError, did_you_mean

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def prepare_process(dtype: str, device: str) -> torch.device:
    """Readies this process to compute in `dtype` on `device`, with peaks of memory counted from now on. `UserError` for
    a type or a device that there is not."""
    if dtype not in DTYPES:
        raise UserError(f"The torch engine does not compute in '{dtype}'.", did_you_mean(dtype, DTYPES))
    found = device_named(device)
    # All the cores this process may use, unless the user decided: torch's own default counts physical ones.
    if "OMP_NUM_THREADS" not in os.environ:
        has_affinity = hasattr(os, "sched_getaffinity")  # not on macOS
        torch.set_num_threads(len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux then counts the peak anew
    if found.type == "cuda":
        torch.cuda.reset_peak_memory_stats(found)
    silence_transformers()
    return found


@contextmanager
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


def peak_memory(device: torch.device) -> Memory:
    """The peaks since `prepare_process`."""
    vram = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    unit = 1 if sys.platform == "darwin" else 1024
    return Memory(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, vram)


@contextmanager
def scoring(num_windows: int, num_tokens: int) -> Iterator[None]:
    """Around what scores a batch: running out of memory becomes a sentence."""
    with out_of_memory(f"Scoring {num_windows} windows of {num_tokens} tokens", "Lower the batch size."):
        yield


def batches_of_equals(windows: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[Sequence[int]]]:
    """Neighbouring windows of one length, at most `batch_size` of them."""
    for _, run in groupby(windows, key=len):
        equal = list(run)
        for start in range(0, len(equal), batch_size):
            yield equal[start : start + batch_size]


class Head:
    """A model's head with its weight in float32. A quantized one keeps its own forward, which also quantizes its
    activations."""

    def __init__(self, module: Any) -> None:
        is_quantized = getattr(module, "quantization_scheme", None) is not None or bool(formats_of(module))
        self._module = module
        self._weight: torch.Tensor | None = None if is_quantized else module.weight.float()
        self.vocabulary: int = module.weight.shape[0]
        self.rows_at_once = max(1, LOGITS_BYTES // (4 * self.vocabulary))
        """The positions whose logits are computed together."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Float32 logits [rows, vocabulary] of hidden states [rows, width]."""
        if self._weight is not None:
            return nn.functional.linear(hidden.float(), self._weight)
        found: torch.Tensor = self._module(hidden).float()
        return found


def predictions(
    hidden: Sequence[torch.Tensor], heads: Sequence[Head]
) -> Iterator[tuple[int, int, tuple[NDArray[np.float32], ...]]]:
    """(Window of the batch, first position, log-distributions by model) from `hidden` [batch, time, width] by model."""
    num_windows, num_tokens = hidden[0].shape[:2]
    num_rows = num_tokens - 1
    flat = [states[:, :-1].flatten(0, 1) for states in hidden]
    if not num_rows:
        empty = tuple(np.empty((0, head.vocabulary), np.float32) for head in heads)
        yield from ((window, 0, empty) for window in range(num_windows))
        return
    step = heads[0].rows_at_once
    for start in range(0, num_windows * num_rows, step):
        with scoring(num_windows, num_tokens):
            tables = tuple(
                _distributions(states[start : start + step], head) for states, head in zip(flat, heads, strict=True)
            )
        done = 0
        while done < len(tables[0]):
            window, first = divmod(start + done, num_rows)
            part = slice(done, min(len(tables[0]), done + num_rows - first))
            yield window, first, tuple(table[part] for table in tables)
            done = part.stop
        del tables  # before the next are made


def _distributions(hidden: torch.Tensor, head: Head) -> NDArray[np.float32]:
    """Log-distributions [rows, vocabulary] from hidden states [rows, width]."""
    logits = head.logits(hidden)
    found: NDArray[np.float32] = logits.sub_(logits.logsumexp(dim=1, keepdim=True)).cpu().numpy()
    return found


class ChunkedEngine(Engine):
    """An engine that has its model's predictions chunk by chunk, in order."""

    @abstractmethod
    def _chunks(self, windows: Sequence[Sequence[int]], batch_size: int) -> Iterator[Chunk]:
        """The predictions of the one model."""

    def log_probs(self, windows: Sequence[Sequence[int]], batch_size: int) -> Iterator[NDArray[np.float32]]:
        """Log-distributions [n - 1, vocabulary], in nats, after the first n - 1 tokens of each window, in order."""
        table = np.empty((0, 0), np.float32)
        for chunk in self._chunks(windows, batch_size):
            (rows,) = chunk.log_probs
            if chunk.first == 0:
                table = np.empty((len(windows[chunk.window]) - 1, rows.shape[1]), np.float32)
            table[chunk.first : chunk.first + len(rows)] = rows
            if chunk.first + len(rows) == len(table):
                yield table

    def top_log_probs(self, windows: Sequence[Sequence[int]], batch_size: int, num: int) -> Iterator[Top]:
        """The most probable tokens at each place of each window, in order; of equal ones the lowest id first."""
        for window, table in zip(windows, self.log_probs(windows, batch_size), strict=True):
            k = min(num, table.shape[1])
            found = np.sort(np.argpartition(-table, k - 1, axis=1)[:, :k], axis=1)
            values = np.take_along_axis(table, found, axis=1)
            order = np.argsort(-values, axis=1, kind="stable")
            ids = np.take_along_axis(found, order, axis=1).astype(np.int32)
            yield Top(ids, np.take_along_axis(values, order, axis=1), table[np.arange(len(table)), window[1:]])
