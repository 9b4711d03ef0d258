"""NVFP4: 4-bit floats in blocks of 16, one E4M3 scale a block, one float32 scale a tensor.

A weight `w [out, in]` is stored as three tensors (compressed-tensors `nvfp4-pack-quantized`):

    weight_packed        uint8          [out, in/2]    two codes a byte, even column in the low nibble
    weight_scale         float8_e4m3fn  [out, in/16]   a multiplier, one per block of 16 columns
    weight_global_scale  float32        [1]            a divisor, 448 * 6 / max|w|

and means, for column j:

    w[i, j] = E2M1[code[i, j]] * weight_scale[i, j // 16] / weight_global_scale

All arithmetic is float32. In NVFP4 (W4A4) a layer's inputs are rounded in the same way when the model runs, with block
scales of their own and a stored divisor, `input_global_scale [1]`, from the largest input that calibration saw. In
NVFP4A16 they keep their 16 bits.

Block scales are chosen by the largest magnitude, or searched for the least squared error, which may be weighted by the
second moments of the inputs. The search is exact: under a fixed global scale, the E4M3 codes from 3 below to 7 above
that of the largest magnitude contain the best one (ScaleSweep, arXiv 2606.07618).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from harness.formats import names
from harness.formats.format import ABSMAX, E4M3_MAX, WEIGHTED_SEARCH, Arguments, Format, Rounding, StoredTensor

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BLOCK = 16
"""Columns that share one block scale."""

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes by code (2 exponent bits, 1 mantissa bit); bit 3 of a code is the sign, so code 8 is -0."""

E2M1_MAX = 6.0

ZERO_BLOCK_SCALE = 0.125
"""Stored where a block scale would round to 0: the reference's epsilon. Such a block decodes to zeros."""

_SMALLEST_SCALE = 2.0**-9
"""The smallest positive E4M3 number: a block scale that would round to nothing."""
_OFFSETS = range(-3, 8)
"""E4M3 codes that a search tries, counted from the code of the scale by largest magnitude."""
_LOWEST_CODE, _HIGHEST_CODE = 1, 126
"""Codes of the least and the greatest positive E4M3 value."""


def global_encode_scale(amax: Tensor) -> Tensor:
    """The divisor `[1]` float32 that puts the largest block scale at E4M3's maximum: 2688 / `amax []`, the largest
    magnitude over every tensor that shares the scale; 1.0 where that overflows, which decodes to zeros."""
    import torch

    scale = E4M3_MAX * E2M1_MAX / amax.float().reshape(1)
    return torch.where(torch.isfinite(scale), scale, torch.ones_like(scale))


def _blocks(x: Tensor) -> Tensor:
    """`x [..., in]` as `[..., in/16, 16]`."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // BLOCK, BLOCK)


def absmax_block_scales(w: Tensor, global_scale: Tensor) -> Tensor:
    """Block scales `[out, in/16]` float8_e4m3fn that map each block's largest magnitude of `w [out, in]` to 6."""
    return _block_scales(_block_amax(w) * (global_scale / E2M1_MAX))


def activation_block_scales(x: Tensor, global_scale: Tensor) -> Tensor:
    """The same of activations `x [..., in]`, with the product in compressed-tensors' order: the other one rounds one
    scale in two million to the other side, and a model is then no longer the same to the last bit."""
    return _block_scales(global_scale * (_block_amax(x) / E2M1_MAX))


def _block_amax(w: Tensor) -> Tensor:
    """The largest magnitude `[..., in/16]` of each block of `w [..., in]`, float32."""
    from torch.nn import functional

    # A pooling with this window is a vectorized maximum over the blocks, four times as fast as `amax`.
    magnitudes = w.float().abs().reshape(-1, 1, w.shape[-1])
    return functional.max_pool1d(magnitudes, BLOCK).view(*w.shape[:-1], w.shape[-1] // BLOCK)


def _block_scales(exact: Tensor) -> Tensor:
    import torch

    scales = exact.clamp_(max=E4M3_MAX).to(torch.float8_e4m3fn)
    return torch.where(scales.view(torch.uint8) == 0, torch.full_like(scales, ZERO_BLOCK_SCALE), scales)


def encode(w: Tensor, scales: Tensor, global_scale: Tensor) -> Tensor:
    """Codes `[out, in]` uint8, each weight of `w [out, in]` rounded to the nearest E2M1 value, ties to even. The grid
    steps by 0.5 up to 2, by 1 up to 4 and by 2 up to 6, so the code of a magnitude is the least of round(2a),
    2 + round(a) and 4 + round(a/2)."""
    import torch

    decode_scale = scales.float() / global_scale
    x = _blocks(w.float()) / decode_scale.unsqueeze(-1)
    magnitude = x.abs().clamp_(max=E2M1_MAX)
    code = torch.round(magnitude * 0.5).add_(4)
    torch.minimum(code, torch.round(magnitude).add_(2), out=code)
    torch.minimum(code, magnitude.mul_(2).round_(), out=code)
    # To int8, since torch converts to uint8 five times slower.
    sign = x.view(torch.int32).bitwise_right_shift_(28).bitwise_and_(8).to(torch.int8)
    return code.to(torch.int8).bitwise_or_(sign).view(torch.uint8).flatten(-2)


def round_magnitudes(magnitude: Tensor, *, out: Tensor | None = None, scratch: Tensor | None = None) -> Tensor:
    """E2M1 values nearest to float32 `magnitude` in 0 ... 6, ties to even, without codes. The grid's step is half the
    largest power of two in the magnitude, and 0.5 below 1. A number whose own last place is that step is added and
    taken away, which rounds as the hardware does. `out` (which may be `magnitude`) and `scratch`, float32 of the same
    shape, save a loop its allocations."""
    import torch

    bits = None if scratch is None else scratch.view(torch.int32)
    power = torch.bitwise_and(magnitude.view(torch.int32), 0x7F800000, out=bits).view(torch.float32).clamp_(min=1.0)
    shift = power.mul_(0.75 * 2**23)
    return torch.add(magnitude, shift, out=out).sub_(shift)


def fake_quantize(x: Tensor, global_scale: Tensor) -> Tensor:
    """Activations `x [..., in]` after the round trip through NVFP4 with `global_scale` (the checkpoint's
    `input_global_scale`) and block scales of their own, in x's dtype: what a W4A4 kernel multiplies."""
    return round_trip(x, absmax_block_scales(x, global_scale), global_scale)


def round_trip(x: Tensor, scales: Tensor, global_scale: Tensor) -> Tensor:
    """What `x [..., in]` is after it was encoded with the block scales `[..., in/16]` and decoded, in x's dtype."""
    blocks = _blocks(x.float())
    decode_scale = (scales.float() / global_scale).unsqueeze(-1)
    magnitude = (blocks / decode_scale).abs_().clamp_(max=E2M1_MAX)
    return round_magnitudes(magnitude).copysign_(blocks).mul_(decode_scale).flatten(-2).to(x.dtype)


def pack(codes: Tensor) -> Tensor:
    """Two codes a byte: `codes [out, in]` uint8 to `[out, in/2]`, the even column in the low nibble."""
    import torch

    pairs = codes.contiguous().view(torch.int16)  # the even column is the low byte
    return pairs.bitwise_right_shift(4).bitwise_or_(pairs).to(torch.uint8)


def unpack(packed: Tensor) -> Tensor:
    """The inverse of `pack`: `packed [out, in/2]` uint8 to codes `[out, in]`."""
    import torch

    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def decode(packed: Tensor, scales: Tensor, global_scale: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Weights `[out, in]` in `dtype` (None: bfloat16): the equation of the module's docstring in float32, rounded
    once."""
    import torch

    magnitudes = torch.tensor(E2M1, device=packed.device)
    table = torch.cat((magnitudes, -magnitudes))
    values = _blocks(table[unpack(packed).int()])
    return (values * (scales.float() / global_scale).unsqueeze(-1)).flatten(-2).to(dtype or torch.bfloat16)


def _search(x: Tensor, global_scale: Tensor, weights: Tensor | None) -> Tensor:
    """The codes `[blocks]` uint8 of the best scales for magnitudes `x [16, blocks]`."""
    import torch

    nearest = (x.amax(0) * (global_scale / E2M1_MAX)).clamp_(max=E4M3_MAX).to(torch.float8_e4m3fn)
    middle = nearest.view(torch.uint8).to(torch.int16)
    best = torch.full_like(global_scale, torch.inf)
    chosen = middle.clamp(_LOWEST_CODE, _HIGHEST_CODE).to(torch.uint8)
    scaled, rounded, scratch = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
    for offset in _OFFSETS:
        code = (middle + offset).clamp_(_LOWEST_CODE, _HIGHEST_CODE).to(torch.uint8)
        scale = code.view(torch.float8_e4m3fn).float()
        torch.mul(x, global_scale / scale, out=scaled)
        torch.clamp(scaled, max=E2M1_MAX, out=rounded)
        error = round_magnitudes(rounded, out=rounded, scratch=scratch).sub_(scaled).square_()
        if weights is not None:
            error.mul_(weights)
        # In units of the global scale, which all candidates share: squared, its own would leave float32's range.
        total = error.sum(0).mul_(scale.square_())
        better = total < best
        best = torch.where(better, total, best)
        chosen = torch.where(better, code, chosen)
    # A block of zeros has no error under any scale: it takes the format's own.
    zero = torch.full_like(nearest, ZERO_BLOCK_SCALE).view(torch.uint8)
    return torch.where(x.amax(0) > 0, chosen, zero)


_ARGUMENTS: Arguments = (
    ("num_bits", 4),
    ("type", "float"),
    ("strategy", "tensor_group"),
    ("group_size", BLOCK),
    ("symmetric", True),
    ("dynamic", False),
    ("scale_dtype", "torch.float8_e4m3fn"),
    ("zp_dtype", "torch.float8_e4m3fn"),
)
_INPUT_ARGUMENTS = tuple((key, "local" if key == "dynamic" else value) for key, value in _ARGUMENTS)


@dataclass(frozen=True)
class Nvfp4(Format):
    """NVFP4 weights, with inputs as `input_activations` says."""

    block = BLOCK
    weight_tensors: ClassVar[Mapping[str, int]] = {"weight_packed": 1, "weight_scale": 1, "weight_global_scale": 0}
    shared_scale_name = "weight_global_scale"
    input_scale_name = "input_global_scale"
    # Healthy divisors are 2688 over a weight's or an activation's largest magnitude: thousands, and 50 to 150. Beyond
    # these bounds lie reciprocals.
    healthy_scales: ClassVar[Mapping[str, tuple[float, float]]] = {
        "weight_global_scale": (1.0, math.inf),
        "input_global_scale": (1.0, 1e4),
    }
    has_grid = True

    def stored(self, out_features: int, in_features: int) -> tuple[StoredTensor, ...]:
        """See `Format`."""
        tensors = (
            StoredTensor("weight_packed", "U8", (out_features, in_features // 2)),
            StoredTensor("weight_scale", "F8_E4M3", (out_features, in_features // BLOCK)),
            StoredTensor("weight_global_scale", "F32", (1,)),
        )
        return (*tensors, StoredTensor("input_global_scale", "F32", (1,))) if self.needs_calibration else tensors

    def shared_scale(self, amax: Tensor) -> Tensor:
        """The divisor `weight_global_scale`, or `input_global_scale`."""
        return global_encode_scale(amax)

    input_scale = shared_scale

    def choose_scales(
        self, w: Tensor, shared: Tensor, method: str = ABSMAX, importance: Tensor | None = None
    ) -> Tensor:
        """Block scales `[rows, in/16]` float8_e4m3fn. A block all of whose inputs have no second moment is searched
        unweighted, since otherwise any scale would do."""
        import torch

        rows, width = w.shape
        if method == ABSMAX:
            return absmax_block_scales(w, shared)
        weights = None
        if method == WEIGHTED_SEARCH and importance is not None:
            weights = importance.float().view(-1, BLOCK)
            weights = torch.where(weights.amax(1, keepdim=True) > 0, weights, torch.ones_like(weights)).T  # [16, in/16]
        x = w.float().abs().view(rows, -1, BLOCK).permute(2, 0, 1).reshape(BLOCK, -1)
        per_block = shared.view(-1, 1).expand(rows, width // BLOCK).reshape(-1)
        codes = _search(x, per_block, None if weights is None else weights.repeat(1, rows))
        return codes.view(torch.float8_e4m3fn).view(rows, -1)

    def encode(self, w: Tensor, scales: Tensor, shared: Tensor) -> Tensor:
        """E2M1 codes, uint8."""
        return encode(w, scales, shared)

    def pack(self, codes: Tensor, scales: Tensor) -> dict[str, Tensor]:
        """See `Format`."""
        return {"weight_packed": pack(codes), "weight_scale": scales}

    def nearest(self, x: Tensor, decode_scales: Tensor) -> Tensor:
        """See `Format`."""
        magnitude = (x / decode_scales).abs_().clamp_(max=E2M1_MAX)
        return round_magnitudes(magnitude).mul_(decode_scales).copysign_(x)

    def codes_on_grid(self, values: Tensor, decode_scales: Tensor) -> Tensor:
        """See `Format`."""
        import torch

        magnitude = (values / decode_scales).abs_()
        table = torch.tensor(E2M1, device=values.device)
        codes = torch.bucketize(magnitude, (table[1:] + table[:-1]) / 2).to(torch.uint8)
        return codes.bitwise_or_(torch.signbit(values).to(torch.uint8).bitwise_left_shift_(3))

    def decode_scales(self, scales: Tensor, shared: Tensor) -> Tensor:
        """Block scale over global scale."""
        return scales.float() / shared

    def rescaled(self, tensors: Mapping[str, Tensor], shared: Tensor) -> dict[str, Tensor]:
        """Block scales are multiplied by new over old divisor and rounded to E4M3 again; codes are chosen anew for the
        rounded scales from the decoded weights."""
        import torch

        weights = self.decode(tensors, torch.float32)
        scales = tensors["weight_scale"].float() * (shared / tensors["weight_global_scale"])
        scales = scales.clamp_(min=_SMALLEST_SCALE).to(torch.float8_e4m3fn)
        return self.pack(self.encode(weights, scales, shared), scales)

    def decode(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """See `Format`."""
        shared = tensors["weight_global_scale"].float()
        return decode(tensors["weight_packed"], tensors["weight_scale"], shared, dtype)

    def loaded_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """BF16, whatever the model computes in."""
        import torch

        return torch.bfloat16

    def round_trip(self, w: Tensor) -> Tensor:
        """See `Format`; without codes in between, which gives the same numbers sooner."""
        w = w.float()
        return fake_quantize(w, global_encode_scale(w.abs().amax()))

    def rounding(self, input_scale: Tensor | None = None) -> Rounding | None:
        """With block scales in compressed-tensors' order of operations."""
        if self.input_activations is None:
            return None
        if input_scale is None:
            raise ValueError(f"{self.name} needs an input_global_scale")
        scale, moved = input_scale, input_scale

        def rounded(x: Tensor) -> Tensor:
            nonlocal moved
            if moved.device != x.device:  # once: the layer has moved since
                moved = scale.to(x.device)
            return round_trip(x, activation_block_scales(x, moved), moved)

        return rounded

    def rounding_in_calibration(self, input_scale: Tensor | None = None) -> Rounding | None:
        """With block scales in the order of operations of weights. The other order rounds one scale in two million to
        the other side; every published artifact was calibrated with this one."""
        if self.input_activations is None or input_scale is None:
            return self.rounding(input_scale)
        scale = input_scale
        return lambda x: fake_quantize(x, scale)


NVFP4A16 = Nvfp4(names.NVFP4A16, "nvfp4-pack-quantized", _ARGUMENTS)
NVFP4 = Nvfp4(names.NVFP4, "nvfp4-pack-quantized", _ARGUMENTS, _INPUT_ARGUMENTS)
