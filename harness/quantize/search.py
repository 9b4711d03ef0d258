"""Block scales: by the largest magnitude, or searched for the least error. Any of them is the same format on disk.

The largest magnitude of a block need not be represented exactly: a smaller scale clips it and rounds the other 15
finer, a larger one may put more of them near grid points. With the global scale fixed, the candidates for a block's
scale are the E4M3 codes around that of the largest magnitude, and those from 3 below to 7 above it contain the best
one (ScaleSweep, arXiv 2606.07618): the search is exact. The weighted search counts each column's squared error
times the second moment of its input, which is what the layer's output feels, and takes the best of the same codes: a
still smaller scale, which clips more of what these inputs weigh little, is left out.

All arithmetic is float32 on tensors laid out `[16, blocks]`, so that sums over a block are sums of whole rows.
"""

import torch
from torch import Tensor

from harness.formats import nvfp4
from harness.quantize.recipes import ABSMAX, WEIGHTED_SEARCH

_OFFSETS = range(-3, 8)
_SMALLEST, _LARGEST = 1, 126
"""Codes of the least and the greatest positive E4M3 value."""


def block_scales(w: Tensor, global_scale: Tensor, method: str, importance: Tensor | None = None) -> Tensor:
    """Block scales `[rows, in/16]` float8_e4m3fn of `w [rows, in]` under `global_scale` (`[1]`, or `[rows, 1]`).

    `importance [in]` is the second moment of every input (`weighted-search` only); a block all of whose inputs have
    none is searched unweighted, since otherwise any scale would do.
    """
    rows, width = w.shape
    if method == ABSMAX:
        return nvfp4.absmax_block_scales(w, global_scale)
    weights = None
    if method == WEIGHTED_SEARCH and importance is not None:
        weights = importance.float().view(-1, nvfp4.BLOCK)
        weights = torch.where(weights.amax(1, keepdim=True) > 0, weights, torch.ones_like(weights)).T  # [16, in/16]
    x = w.float().abs().view(rows, -1, nvfp4.BLOCK).permute(2, 0, 1).reshape(nvfp4.BLOCK, -1)
    per_block = global_scale.view(-1, 1).expand(rows, width // nvfp4.BLOCK).reshape(-1)
    codes = _search(x, per_block, None if weights is None else weights.repeat(1, rows))
    return codes.view(torch.float8_e4m3fn).view(rows, -1)


def _search(x: Tensor, global_scale: Tensor, weights: Tensor | None) -> Tensor:
    """The codes `[blocks]` uint8 of the best scales for magnitudes `x [16, blocks]`."""
    nearest = (x.amax(0) * (global_scale / nvfp4.E2M1_MAX)).clamp_(max=nvfp4.E4M3_MAX).to(torch.float8_e4m3fn)
    middle = nearest.view(torch.uint8).to(torch.int16)
    best = torch.full_like(global_scale, torch.inf)
    chosen = middle.clamp(_SMALLEST, _LARGEST).to(torch.uint8)
    scaled, rounded, scratch = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
    for offset in _OFFSETS:
        code = (middle + offset).clamp_(_SMALLEST, _LARGEST).to(torch.uint8)
        scale = code.view(torch.float8_e4m3fn).float()
        torch.mul(x, global_scale / scale, out=scaled)
        torch.clamp(scaled, max=nvfp4.E2M1_MAX, out=rounded)
        error = nvfp4.round_magnitudes(rounded, out=rounded, scratch=scratch).sub_(scaled).square_()
        if weights is not None:
            error.mul_(weights)
        # In units of the global scale, which all candidates share: squared, its own would leave float32's range.
        total = error.sum(0).mul_(scale.square_())
        better = total < best
        best = torch.where(better, total, best)
        chosen = torch.where(better, code, chosen)
    # A block of zeros has no error under any scale: it takes the format's own.
    zero = torch.full_like(nearest, nvfp4.ZERO_BLOCK_SCALE).view(torch.uint8)
    return torch.where(x.amax(0) > 0, chosen, zero)
