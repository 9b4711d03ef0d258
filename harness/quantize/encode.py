"""Round-to-nearest from the shards: no model class, no data, a piece of a tensor at a time.

Shared scales are chosen from all the layers that share one before any other scale, even where they lie in different
shards. Each piece is encoded by one thread; memory is that of the pieces under way.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from harness.errors import BadWeightError
from harness.formats.format import Format
from harness.model.census import SourceTensor
from harness.model.checkpoint import PIECE_BYTES, Checkpoint, TensorEntry
from harness.model.family import Linear
from harness.quantize.threads import in_order, row_slices

WEIGHT_DTYPES = ("BF16", "F16", "F32")


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


@dataclass(frozen=True)
class _Rows:
    """Consecutive rows of a source tensor."""

    first: int
    count: int


def _row_pieces(checkpoint: Checkpoint, name: str, linear: Linear) -> Iterator[_Rows]:
    """The rows of `linear` in source tensor `name`, in pieces of about `PIECE_BYTES`."""
    entry = checkpoint.tensors[name]
    row_bytes = entry.num_bytes // entry.num_elements * linear.in_features
    step = max(1, PIECE_BYTES // row_bytes)
    for first in range(0, linear.out_features, step):
        yield _Rows(linear.first_row + first, min(step, linear.out_features - first))


def _amax(checkpoint: Checkpoint, name: str, rows: _Rows) -> Tensor:
    return finite_amax(checkpoint.tensors[name], checkpoint.rows(name, rows.first, rows.count))


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
    weights = checkpoint.rows(name, rows.first, rows.count)

    def encode(part: slice) -> dict[str, Tensor]:
        chunk = weights[part].float()
        chosen = form.choose_scales(chunk, shared, scales)
        return form.pack(form.encode(chunk, chosen, shared), chosen)

    parts = [encode(part) for part in row_slices(weights)]
    return rows.count, {suffix: torch.cat([part[suffix] for part in parts]) for suffix in parts[0]}
