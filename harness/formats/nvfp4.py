"""NVFP4: 4-bit floats in blocks of 16, one E4M3 scale a block, one float32 scale a tensor.

A weight `w [out, in]` is stored as three tensors (compressed-tensors `nvfp4-pack-quantized`):

    weight_packed        uint8          [out, in/2]    two codes a byte, even column in the low nibble
    weight_scale         float8_e4m3fn  [out, in/16]   a multiplier, one per block of 16 columns
    weight_global_scale  float32        [1]            a divisor, 448 * 6 / max|w|

and means, for column j:

    w[i, j] = E2M1[code[i, j]] * weight_scale[i, j // 16] / weight_global_scale

That equation is the contract with every reader (vLLM, transformers, compressed-tensors). How the scales and
codes are chosen is the writer's business; here it is round-to-nearest with absolute-maximum scales. All
arithmetic is float32: the reference writer computes the global scale in bfloat16, so its files differ from
ours in that last digit and decode by the same equation.

Scales are named by direction: an *encode* scale multiplies weights on their way into the format (the stored
global scale is one), a *decode* scale multiplies codes on their way out (the block scale is one).
"""

import torch
from torch import Tensor
from torch.nn import functional

BLOCK = 16
"""Columns that share one block scale."""

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes by code (2 exponent bits, 1 mantissa bit); bit 3 of a code is the sign, so code 8 is -0."""

E2M1_MAX = 6.0
E4M3_MAX = 448.0

ZERO_BLOCK_SCALE = 0.125
"""Stored where a block scale would round to 0: the reference's epsilon. Such a block decodes to zeros."""


def global_encode_scale(amax: Tensor) -> Tensor:
    """The divisor `[1]` float32 that puts the largest block scale at E4M3's maximum: 2688 / `amax`.

    `amax []` is the largest magnitude over every tensor that shares the scale. A tensor of zeros, or one so
    small that the quotient overflows float32, gets 1.0, which is finite and decodes to zeros.
    """
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
    # A pooling with this window is a vectorized maximum over the blocks, four times as fast as `amax`.
    magnitudes = w.float().abs().reshape(-1, 1, w.shape[-1])
    return functional.max_pool1d(magnitudes, BLOCK).view(*w.shape[:-1], w.shape[-1] // BLOCK)


def _block_scales(exact: Tensor) -> Tensor:
    scales = exact.clamp_(max=E4M3_MAX).to(torch.float8_e4m3fn)
    return torch.where(scales.view(torch.uint8) == 0, torch.full_like(scales, ZERO_BLOCK_SCALE), scales)


def encode(w: Tensor, scales: Tensor, global_scale: Tensor) -> Tensor:
    """Codes `[out, in]` uint8, each weight of `w [out, in]` rounded to the nearest E2M1 value, ties to even.

    The grid steps by 0.5 up to 2, by 1 up to 4 and by 2 up to 6, so the code of a magnitude is the least of
    round(2a), 2 + round(a) and 4 + round(a/2): three roundings (ties to even) and no comparisons by case.
    """
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
    """E2M1 values nearest to float32 `magnitude` in 0 ... 6, ties to even, without going through codes.

    The grid's step is half the largest power of two in the magnitude, and 0.5 below 1. Adding a number whose own last
    place is that step, and taking it away, rounds to it as the hardware rounds: to nearest, ties to even. `out` (which
    may be `magnitude`) and `scratch`, float32 of the same shape, save a loop its allocations.
    """
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
    pairs = codes.contiguous().view(torch.int16)  # the even column is the low byte
    return pairs.bitwise_right_shift(4).bitwise_or_(pairs).to(torch.uint8)


def unpack(packed: Tensor) -> Tensor:
    """The inverse of `pack`: `packed [out, in/2]` uint8 to codes `[out, in]`."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def decode(packed: Tensor, scales: Tensor, global_scale: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Weights `[out, in]` in `dtype`: the equation of the module's docstring in float32, rounded once."""
    magnitudes = torch.tensor(E2M1, device=packed.device)
    table = torch.cat((magnitudes, -magnitudes))
    values = _blocks(table[unpack(packed).int()])
    return (values * (scales.float() / global_scale).unsqueeze(-1)).flatten(-2).to(dtype)
