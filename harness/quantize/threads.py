"""Work on the rows of a weight, piece by piece, on all processors. What comes out does not depend on their number."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")

_PIECE_CPU, _PIECE_GPU = 1 << 18, 1 << 26
"""Weights encoded at a time: the float32 temporaries of a piece stay in a processor's second-level cache, and fill a
GPU."""


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
