"""FP8_DYNAMIC: 8-bit floats (E4M3) with one scale an output channel, and activations quantized token by token.

A weight `w [out, in]` is stored as two tensors (compressed-tensors `float-quantized`), `weight` float8_e4m3fn
`[out, in]` and `weight_scale` bfloat16 `[out, 1]`, and means w[i, j] = weight[i, j] * weight_scale[i]. Of activations
nothing is stored: every token is divided by its own max|x| / 448 when the model runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from harness.formats import names
from harness.formats.format import ABSMAX, E4M3_MAX, Arguments, Format, Rounding, StoredTensor

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def channel_decode_scales(w: Tensor) -> Tensor:
    """One bfloat16 multiplier `[out, 1]` a row of `w [out, in]`; 1.0 for a row of zeros. It is rounded before any
    weight is divided by it; where that is down, the row's largest weight is beyond the last value and is clamped."""
    import torch

    scales = (w.float().abs().amax(-1, keepdim=True) / E4M3_MAX).bfloat16()
    return torch.where(scales > 0, scales, torch.ones_like(scales))


def encode(w: Tensor, scales: Tensor) -> Tensor:
    """Codes `[out, in]` float8_e4m3fn: `w [out, in]` over its row's scale, rounded to nearest, ties to even."""
    import torch

    return (w.float() / scales.float()).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def decode(codes: Tensor, scales: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Weights `[out, in]` in `dtype` (None: bfloat16): codes times scales in float32, rounded once."""
    import torch

    return (codes.float() * scales.float()).to(dtype or torch.bfloat16)


def fake_quantize_tokens(x: Tensor) -> Tensor:
    """Activations `x [..., in]` after the round trip through FP8 with a scale of their own per token, in x's dtype."""
    import torch

    scales = x.float().abs().amax(-1, keepdim=True) / E4M3_MAX
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    return ((x.float() / scales).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float() * scales).to(x.dtype)


def _arguments(strategy: str, *, dynamic: bool) -> Arguments:
    return (("num_bits", 8), ("type", "float"), ("strategy", strategy), ("symmetric", True), ("dynamic", dynamic))


@dataclass(frozen=True)
class Fp8Channel(Format):
    """FP8 with a scale an output channel, with inputs as `input_activations` says."""

    weight_tensors: ClassVar[Mapping[str, int]] = {"weight": 1, "weight_scale": 1}

    def stored(self, out_features: int, in_features: int) -> tuple[StoredTensor, ...]:
        """See `Format`."""
        return (
            StoredTensor("weight", "F8_E4M3", (out_features, in_features)),
            StoredTensor("weight_scale", "BF16", (out_features, 1)),
        )

    def choose_scales(
        self, w: Tensor, shared: Tensor, method: str = ABSMAX, importance: Tensor | None = None
    ) -> Tensor:
        """Multipliers `[rows, 1]`, by the largest magnitude whatever the method."""
        return channel_decode_scales(w)

    def encode(self, w: Tensor, scales: Tensor, shared: Tensor) -> Tensor:
        """E4M3 codes, float8_e4m3fn."""
        return encode(w, scales)

    def pack(self, codes: Tensor, scales: Tensor) -> dict[str, Tensor]:
        """See `Format`."""
        return {"weight": codes, "weight_scale": scales}

    def decode(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """See `Format`."""
        return decode(tensors["weight"], tensors["weight_scale"], dtype)

    def rounding(self, input_scale: Tensor | None = None) -> Rounding | None:
        """With a scale of its own per token."""
        return None if self.input_activations is None else fake_quantize_tokens


FP8_DYNAMIC = Fp8Channel(
    names.FP8_DYNAMIC, "float-quantized", _arguments("channel", dynamic=False), _arguments("token", dynamic=True)
)
