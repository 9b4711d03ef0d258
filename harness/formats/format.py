"""What a number format is: how the weight of a linear layer is stored, chosen and read, and what becomes of its inputs.

A `Format` stores a weight `w [out, in]` as codes and scales, some rows at a time: `shared_scale(max|w|)`, then
`choose_scales(w)`, `encode(w)` and `pack`; `decode` reads them. A *shared scale* is one number for all layers that vLLM
fuses into one matrix. An *encode* scale multiplies weights on their way into the format, a *decode* scale multiplies
codes on their way out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Arguments = tuple[tuple[str, Any], ...]
"""Keys and values of compressed-tensors' `QuantizationArgs`, as a dictionary has them but hashable."""

Rounding = Callable[["Tensor"], "Tensor"]
"""Activations `[..., in]` to what remains of them after the round trip through a format, in the same dtype."""

ABSMAX, SEARCH, WEIGHTED_SEARCH = "absmax", "search", "weighted-search"
SCALE_METHODS = (ABSMAX, SEARCH, WEIGHTED_SEARCH)
"""How scales are chosen: by the largest magnitude, for the least squared error, for the least error of the output."""

E4M3_MAX = 448.0
"""The largest number of the 8-bit float E4M3, in which codes of FP8 and block scales of NVFP4 are written."""

DTYPES = {
    "I64": ("int64", 8),
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "I32": ("int32", 4),
    "BF16": ("bfloat16", 2),
    "F16": ("float16", 2),
    "I16": ("int16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
"""The dtypes of safetensors, with torch's names and the bytes of an item, in the order in which the library lays
tensors out."""

UNQUANTIZED_DTYPES = ("BF16", "F16", "F32")
"""The dtypes of weights that no format has changed."""


def num_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor of a safetensors `dtype`; `KeyError` for one that is not in `DTYPES`."""
    return DTYPES[dtype][1] * prod(shape)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk: `suffix` follows the module's name, `dtype` is a safetensors dtype name."""

    suffix: str
    dtype: str
    shape: tuple[int, ...]


class TensorReader(Protocol):
    """A checkpoint, as far as decoding a weight needs it."""

    def tensor(self, name: str, /) -> Tensor:
        """The whole tensor `name`."""

    def rows(self, name: str, first: int, count: int, /) -> Tensor:
        """`count` rows of the tensor `name`, from row `first`."""


@dataclass(frozen=True)
class Format(ABC):
    """A way to store a linear layer and to compute with it. `compressor`, `weights` and `input_activations` are what
    `quantization_config` says of it, `input_activations` None where inputs keep their 16 bits."""

    name: str
    compressor: str
    weights: Arguments
    input_activations: Arguments | None = None

    block: ClassVar[int] = 1
    """Columns that share a scale: the width of a weight has to be a multiple of it."""
    weight_tensors: ClassVar[Mapping[str, int]]
    """The tensors that a weight is decoded from: suffix → how many rows of the weight share a row of the tensor; 0 for
    a tensor that all rows share."""
    shared_scale_name: ClassVar[str | None] = None
    """The suffix of the shared scale; None for a format without one."""
    input_scale_name: ClassVar[str | None] = None
    """The suffix of the scale of a layer's inputs, which is stored where `needs_calibration`."""
    healthy_scales: ClassVar[Mapping[str, tuple[float, float]]] = {}
    """The scales, by suffix, that layers which vLLM fuses must have in common, with the bounds of healthy ones."""
    has_grid: ClassVar[bool] = False
    """Whether codes may be chosen by what the layer's inputs are like (GPTQ): the format then has `nearest` and
    `codes_on_grid`."""

    @property
    def needs_calibration(self) -> bool:
        """Whether a scale of the inputs is stored, which only data can choose."""
        return self.input_activations is not None and dict(self.input_activations)["dynamic"] is not True

    @property
    def input_bits(self) -> int:
        """The bits of the numbers that a kernel multiplies weights with."""
        return 16 if self.input_activations is None else int(dict(self.input_activations)["num_bits"])

    # What lies on the disk.

    @abstractmethod
    def stored(self, out_features: int, in_features: int) -> tuple[StoredTensor, ...]:
        """The tensors that replace `weight [out_features, in_features]`, in the order of the file."""

    def num_bytes(self, out_features: int, in_features: int) -> int:
        """Bytes of a weight `[out_features, in_features]` on the disk, scales included."""
        return sum(num_bytes(tensor.dtype, tensor.shape) for tensor in self.stored(out_features, in_features))

    # From weights to codes.

    def shared_scale(self, amax: Tensor) -> Tensor:
        """The shared scale `[1]` of weights whose largest magnitude is `amax []`; 1 in a format without one."""
        import torch

        return torch.ones(1, device=amax.device)

    @abstractmethod
    def choose_scales(
        self, w: Tensor, shared: Tensor, method: str = ABSMAX, importance: Tensor | None = None
    ) -> Tensor:
        """The scales of `w [rows, in]` under the shared scale `shared` (`[1]`, or `[rows, 1]`), as they are stored.
        `importance [in]` is the second moment of every input, for `WEIGHTED_SEARCH`."""

    @abstractmethod
    def encode(self, w: Tensor, scales: Tensor, shared: Tensor) -> Tensor:
        """Codes `[rows, in]` of `w [rows, in]`, each weight rounded to the nearest."""

    @abstractmethod
    def pack(self, codes: Tensor, scales: Tensor) -> dict[str, Tensor]:
        """The stored tensors of some rows, by suffix, from their codes `[rows, in]` and scales."""

    def nearest(self, x: Tensor, decode_scales: Tensor) -> Tensor:
        """The decoded values nearest to `x` under decode scales of the same shape (`has_grid` only)."""
        raise NotImplementedError(f"{self.name} has no grid")

    def codes_on_grid(self, values: Tensor, decode_scales: Tensor) -> Tensor:
        """The codes of values that `nearest` gave (`has_grid` only)."""
        raise NotImplementedError(f"{self.name} has no grid")

    def decode_scales(self, scales: Tensor, shared: Tensor) -> Tensor:
        """What codes are multiplied with, float32, by block (`has_grid` only)."""
        raise NotImplementedError(f"{self.name} has no grid")

    def rescaled(self, tensors: Mapping[str, Tensor], shared: Tensor) -> dict[str, Tensor]:
        """Stored tensors of some rows written anew for another shared scale, by suffix; without the shared scale. Only
        for a format that has a shared scale."""
        raise NotImplementedError(f"{self.name} has no shared scale")

    # From codes to weights.

    @abstractmethod
    def decode(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Weights `[rows, in]` in `dtype` from the stored tensors of some rows, by suffix."""

    def decode_rows(self, source: TensorReader, module: str, first: int, count: int, dtype: torch.dtype) -> Tensor:
        """Rows `first` to `first + count` of the weight of `module`, in `dtype`. Where rows share a scale, `first` is a
        multiple of their number."""
        return self.decode(self.stored_rows(source, module, first, count), dtype)

    def stored_rows(self, source: TensorReader, module: str, first: int, count: int) -> dict[str, Tensor]:
        """The stored tensors, by suffix, that rows `first` to `first + count` of the weight of `module` are decoded
        from."""
        tensors = {}
        for suffix, rows in self.weight_tensors.items():
            name = f"{module}.{suffix}"
            tensors[suffix] = source.rows(name, first // rows, -(-count // rows)) if rows else source.tensor(name)
        return tensors

    def loaded_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The type that transformers' own decoding of this format gives weights of a model that computes in `dtype`."""
        return dtype

    def round_trip(self, w: Tensor) -> Tensor:
        """`w [out, in]` after it was stored and read again, float32: scales by largest magnitude, codes rounded to the
        nearest."""
        import torch

        w = w.float()
        shared = self.shared_scale(w.abs().amax())
        scales = self.choose_scales(w, shared)
        tensors = self.pack(self.encode(w, scales, shared), scales)
        if self.shared_scale_name is not None:
            tensors[self.shared_scale_name] = shared
        return self.decode(tensors, torch.float32)

    # The inputs of a layer.

    def input_scale(self, amax: Tensor) -> Tensor:
        """The stored scale `[1]` of inputs whose largest magnitude is `amax []` (`needs_calibration` only)."""
        raise NotImplementedError(f"{self.name} stores no scale of inputs")

    @abstractmethod
    def rounding(self, input_scale: Tensor | None = None) -> Rounding | None:
        """What a kernel does to a layer's inputs; None where it leaves them alone. `input_scale [1]` is the stored
        scale; `ValueError` without it where the format needs it."""

    def rounding_in_calibration(self, input_scale: Tensor | None = None) -> Rounding | None:
        """What the builder takes for `rounding` while it chooses scales and codes."""
        return self.rounding(input_scale)
