"""From the last hidden states to log-probabilities, for the engines that run transformers' models.

Logits are computed in float32: BF16 logits step by 1/8 between 16 and 32, as much as the effects measured here. Another
number of rows in one product may sum in another order, so the torch and the streamed engine take the same.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from harness.engines.decoding import formats_of
from harness.engines.protocol import Top
from harness.engines.torch_answers import LOGITS_BYTES


def batches_of_equals(windows: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[Sequence[int]]]:
    """Neighbouring windows of one length, at most `batch_size` of them."""
    for _, run in groupby(windows, key=len):
        equal = list(run)
        for start in range(0, len(equal), batch_size):
            yield equal[start : start + batch_size]


def wide_head(head: Any) -> torch.Tensor | None:
    """The head's weight in float32; None for a quantized head, which keeps its own forward: that also quantizes its
    activations."""
    if getattr(head, "quantization_scheme", None) is not None or formats_of(head):
        return None
    wide: torch.Tensor = head.weight.float()
    return wide


def rows_at_once(head: Any) -> int:
    """The positions whose float32 logits are computed together."""
    vocabulary: int = head.weight.shape[0]
    return max(1, LOGITS_BYTES // (4 * vocabulary))


def wide_logits(hidden: torch.Tensor, head: Any, weight: torch.Tensor | None) -> torch.Tensor:
    """Float32 logits [rows, vocabulary] of hidden states [rows, width]; `weight` as `wide_head` gives it."""
    found: torch.Tensor
    found = head(hidden).float() if weight is None else nn.functional.linear(hidden.float(), weight)
    return found


def top_of(window: Sequence[int], table: NDArray[np.float32], num: int) -> Top:
    """The most probable tokens at each place of a window of n tokens with the log-distributions [n - 1, vocabulary]; of
    equal ones the lowest id first."""
    num = min(num, table.shape[1])
    found = np.sort(np.argpartition(-table, num - 1, axis=1)[:, :num], axis=1)
    values = np.take_along_axis(table, found, axis=1)
    order = np.argsort(-values, axis=1, kind="stable")
    ids = np.take_along_axis(found, order, axis=1).astype(np.int32)
    return Top(ids, np.take_along_axis(values, order, axis=1), table[np.arange(len(table)), window[1:]])
