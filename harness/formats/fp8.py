"""FP8_DYNAMIC: 8-bit floats (E4M3) with one scale an output channel, and activations quantized token by token.

A weight `w [out, in]` is stored as two tensors (compressed-tensors `float-quantized`):

    weight        float8_e4m3fn  [out, in]
    weight_scale  bfloat16       [out, 1]     a multiplier, max|w| of the row / 448

and means w[i, j] = weight[i, j] * weight_scale[i]. Activations store nothing: every token is divided by its own
max|x| / 448 when the model runs.
"""

import torch
from torch import Tensor

E4M3_MAX = 448.0


def channel_decode_scales(w: Tensor) -> Tensor:
    """One bfloat16 multiplier `[out, 1]` a row of `w [out, in]`; 1.0 for a row of zeros, which decodes to zeros.

    Rounded to bfloat16 before any weight is divided by it, so that codes and scale fit each other. Where that rounds
    the scale down, the row's largest weight lies beyond the format's last value by at most 1/256 and is clamped.
    """
    scales = (w.float().abs().amax(-1, keepdim=True) / E4M3_MAX).bfloat16()
    return torch.where(scales > 0, scales, torch.ones_like(scales))


def encode(w: Tensor, scales: Tensor) -> Tensor:
    """Codes `[out, in]` float8_e4m3fn: `w [out, in]` over its row's scale, rounded to nearest, ties to even."""
    return (w.float() / scales.float()).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def decode(codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Weights `[out, in]` in `dtype`: codes times scales in float32, rounded once."""
    return (codes.float() * scales.float()).to(dtype)


def fake_quantize_tokens(x: Tensor) -> Tensor:
    """Activations `x [..., in]` after the round trip through FP8 with a scale of their own per token, in x's dtype."""
    scales = x.float().abs().amax(-1, keepdim=True) / E4M3_MAX
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    return ((x.float() / scales).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float() * scales).to(x.dtype)
