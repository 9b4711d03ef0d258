"""Round-to-nearest from the shards: no model class, no data, a piece of a tensor at a time.

Shared scales are chosen from all the layers that share one before any other scale. Each piece is encoded by one thread;
memory is that of the pieces under way.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from harness.errors import BadWeightError
from harness.formats.format import Format
from harness.model.census import SourceTensor
from harness.model.checkpoint import Checkpoint, TensorEntry, row_pieces
from harness.model.family import Linear

_PIECE_CPU, _PIECE_GPU = 1 << 18, 1 << 26
"""Weights encoded at a time: the float32 temporaries of a piece stay in a processor's second-level cache, and fill a
GPU."""

T = TypeVar("T")
R = TypeVar("R")
_Rows = tuple[int, int]
"""Consecutive rows of a source tensor: the first and their number."""


@dataclass
class Encoder:
    """Encodes linear layers of a checkpoint piece by piece, by method `scales`; `formats` is by source tensor."""

    checkpoint: Checkpoint
    formats: Mapping[str, Format]
    groups: Mapping[str, Sequence[tuple[str, Linear]]]
    """The layers that share a scale, as (source tensor, layer), by the name of their fused matrix."""
    scales: str
    pool: ThreadPoolExecutor
    _shared_scales: dict[str, Tensor] = field(default_factory=dict)

    def shared_scale(self, name: str, linear: Linear) -> Tensor:
        """The shared scale `[1]` of the group of the layer in source tensor `name`; `UserError` for a weight that is
        NaN or infinite."""
        if linear.fused_into not in self._shared_scales:
            largest = torch.zeros(())
            for source, member in self.groups[linear.fused_into]:
                pieces = _row_pieces(self.checkpoint, source, member)
                for amax in in_order(self.pool, partial(_amax, self.checkpoint, source), pieces):
                    largest = torch.maximum(largest, amax)
            self._shared_scales[linear.fused_into] = self.formats[name].shared_scale(largest)
        return self._shared_scales[linear.fused_into]

    def pieces(self, name: str, linear: Linear) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """The layer in source tensor `name`: a number of rows with their stored tensors by suffix, again and again."""
        encode = partial(
            _encode,
            self.checkpoint,
            self.formats[name],
            name,
            shared=self.shared_scale(name, linear),
            scales=self.scales,
        )
        yield from in_order(self.pool, encode, _row_pieces(self.checkpoint, name, linear))


def layers_that_share(
    tensors: Sequence[SourceTensor], formats: Mapping[str, Format]
) -> dict[str, list[tuple[str, Linear]]]:
    """The linear layers that share a scale, by the name of the matrix that vLLM fuses them into."""
    groups: dict[str, list[tuple[str, Linear]]] = {}
    for tensor in tensors:
        if tensor.name in formats:
            for linear in tensor.linears:
                groups.setdefault(linear.fused_into, []).append((tensor.name, linear))
    return groups


def _row_pieces(checkpoint: Checkpoint, name: str, linear: Linear) -> Iterator[_Rows]:
    """The rows of `linear` in source tensor `name`, in pieces of about `PIECE_BYTES`."""
    entry = checkpoint.tensors[name]
    row_bytes = entry.num_bytes // entry.num_elements * linear.in_features
    for first, count in row_pieces(linear.out_features, row_bytes):
        yield linear.first_row + first, count


def _amax(checkpoint: Checkpoint, name: str, rows: _Rows) -> Tensor:
    return finite_amax(checkpoint.tensors[name], checkpoint.rows(name, *rows))


def finite_amax(entry: TensorEntry, values: Tensor) -> Tensor:
    """The largest magnitude `[]` of some of a tensor's values; an error for NaN and infinity among them."""
    low, high = torch.aminmax(values)
    amax = torch.maximum(-low, high).float()
    if not torch.isfinite(amax):
        raise BadWeightError(
            f"{entry.name} in {entry.shard} holds NaN or infinite weights.",
            "Download the source again; if they are in it, it cannot be quantized.",
        )
    return amax


def _encode(
    checkpoint: Checkpoint, form: Format, name: str, rows: _Rows, *, shared: Tensor, scales: str
) -> tuple[int, dict[str, Tensor]]:
    """Some rows of a source tensor: how many, and their stored tensors by suffix."""
    weights = checkpoint.rows(name, *rows)

    def encode(part: slice) -> dict[str, Tensor]:
        chunk = weights[part].float()
        chosen = form.choose_scales(chunk, shared, scales)
        return form.pack(form.encode(chunk, chosen, shared), chosen)

    parts = [encode(part) for part in row_slices(weights)]
    return len(weights), {suffix: torch.cat([part[suffix] for part in parts]) for suffix in parts[0]}


# -- On all processors: what comes out does not depend on their number -----------------------------------------------


def in_order(pool: ThreadPoolExecutor, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`map` over a pool with a few items under way at a time, so that memory does not grow with their number."""
    pending: deque[Future[R]] = deque()
    for item in items:
        pending.append(pool.submit(work, item))
        if len(pending) > 2 * num_threads():
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def num_threads() -> int:
    """Processors to encode on: all that this process may use, up to where reading becomes the limit and memory,
    which grows with the pieces under way, would not pay."""
    return min(len(os.sched_getaffinity(0)), 8)


@contextmanager
def workers() -> Iterator[ThreadPoolExecutor]:
    """Threads that each run torch on one processor. Torch's own threads meet at a barrier after every operation, which
    on small operations beside the thread that writes costs ten times the work itself."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(num_threads(), thread_name_prefix="encode") as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def row_slices(w: Tensor) -> list[slice]:
    """The rows of `w [rows, in]` in pieces of a size that suits its device."""
    step = max(1, (_PIECE_CPU if w.device.type == "cpu" else _PIECE_GPU) // w.shape[1])
    return [slice(first, first + step) for first in range(0, w.shape[0], step)]


def by_rows(work: Callable[[slice], Tensor], w: Tensor) -> Tensor:
    """What `work` makes of the rows of `w [rows, in]`, piece by piece, on all processors where there are many."""
    slices = row_slices(w)
    if w.device.type != "cpu" or len(slices) <= num_threads():
        return torch.cat([work(rows) for rows in slices])
    with workers() as pool:
        return torch.cat(list(in_order(pool, work, slices)))
