"""Codes that answer for each other: GPTQ (arXiv 2210.17323) on block scales that are already fixed.

A layer's output error on its calibration inputs X is |(Q - W) X|², a quadratic form in each row with H = X Xᵀ.
Columns are rounded one after another, those that the inputs weigh most first, and what rounding a column does to the
output is taken back by moving the columns that are still free.

A layer deep in a quantized model sees inputs X̂ that earlier layers have changed, rounded as the kernel will round
them, and should still give W X. The best full-precision weights for that, which GPTQ then rounds under H = X̂ X̂ᵀ
(asymmetric calibration, arXiv 2504.02692), are

    W* = W + W D,   D = (X - X̂) X̂ᵀ (X̂ X̂ᵀ + λ)⁻¹

Afterwards the columns are visited again (coordinate descent): each moves to the grid point that is best while all
others stay. A row that would come out worse than rounded to nearest is rounded to nearest, and counted.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.formats.format import Format
from harness.quantize.plan import ROUNDED_TOGETHER

_PANEL = 128
"""Columns whose updates to the rest of the row are applied together."""
_LEAST_DAMPING, _MOST_DAMPING = 1e-6, 10.0
_FACTOR_THREADS = 2


@dataclass(frozen=True)
class Rounded:
    """`codes [n, rows, in]` uint8; the rows that GPTQ would have made worse; the damping that H needed; and the
    output error |Q X̂ - W* X̂|² of these codes, that of rounding W to nearest, and the output |W X̂|² itself."""

    codes: Tensor
    num_rows_rtn: int
    damping: float
    error: float
    rtn_error: float
    output: float


def aimed(w: Tensor, moments: Tensor, shift: Tensor, damping: float) -> Tensor:
    """W* `[n, rows, in]` of the module's docstring from `w [n, rows, in]`, `moments` X̂ X̂ᵀ and `shift` X̂ (X - X̂)ᵀ,
    both `[n, in, in]`."""
    factor, _ = _cholesky(moments, damping)
    if w.shape[1] < w.shape[2]:  # fewer rows than columns: solve for those
        return w + torch.cholesky_solve(shift @ w.mT, factor).mT
    return w + w @ torch.cholesky_solve(shift, factor).mT


def gptq(
    grid: Format, w: Tensor, target: Tensor, decode_scales: Tensor, moments: Tensor, damping: float, sweeps: int = 0
) -> Rounded:
    """Rounds `target [n, rows, in]` to the values of a format that has a grid, on `decode_scales [n, rows, in/block]`
    under `moments [n, in, in]`, and visits every column `sweeps` times again; rows that come out worse are
    `w [n, rows, in]` rounded to nearest. `damping`, a share of the mean of H's diagonal, is added to it; ten times as
    much where H has no Cholesky factor."""
    order = moments.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    upper, used = _inverse_factor(moments, order, damping)
    damped = _damped(moments, used)
    codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    num_rows_rtn, sums = 0, torch.zeros(3, dtype=torch.float64)
    step = max(1, ROUNDED_TOGETHER // (w.shape[0] * w.shape[2]))
    for first in range(0, w.shape[1], step):
        rows = slice(first, first + step)
        scales = decode_scales[:, rows].repeat_interleave(grid.block, dim=2)
        values = _compensated(grid, target[:, rows], scales, order, upper)
        for _ in range(sweeps):
            _descend(grid, values, target[:, rows], scales, damped)
        nearest = grid.nearest(w[:, rows], scales)
        error, rtn_error = (_row_errors(x - target[:, rows], moments) for x in (values, nearest))
        worse = error > rtn_error
        codes[:, rows] = grid.codes_on_grid(torch.where(worse[:, :, None], nearest, values), scales)
        num_rows_rtn += int(worse.sum())
        output = _row_errors(w[:, rows], moments)
        sums += torch.stack([x.double().sum().cpu() for x in (torch.minimum(error, rtn_error), rtn_error, output)])
    error_sum, rtn_sum, output_sum = sums.tolist()
    return Rounded(codes, num_rows_rtn, used, error_sum, rtn_sum, output_sum)


def _inverse_factor(moments: Tensor, order: Tensor, damping: float) -> tuple[Tensor, float]:
    """The upper factor U of H⁻¹ = Uᵀ U, columns in `order [n, in]`, and the damping it took. H = R Rᵀ is factored with
    R upper, and U = R⁻¹: an inverse of H itself may have lost its definiteness to rounding."""
    ordered = moments.gather(1, order[:, :, None].expand_as(moments))
    ordered = ordered.gather(2, order[:, None, :].expand_as(ordered))
    factor, used = _cholesky(ordered.flip(1, 2), damping)
    identity = torch.eye(moments.shape[-1], device=moments.device).expand_as(moments)
    return torch.linalg.solve_triangular(factor.flip(1, 2), identity, upper=True), used


def _compensated(grid: Format, target: Tensor, scales: Tensor, order: Tensor, upper: Tensor) -> Tensor:
    """The values on the grid of `scales` that GPTQ chooses for `target`, both `[n, rows, in]`."""

    def ordered(x: Tensor, places: Tensor) -> Tensor:
        return x.gather(2, places[:, None, :].expand_as(x))

    width = target.shape[2]
    remaining, column_scales = ordered(target, order), ordered(scales, order)
    rounded = torch.empty_like(remaining)
    for first in range(0, width, _PANEL):
        last = min(first + _PANEL, width)
        # Columns first: each is contiguous then, and the loop touches one at a time.
        panel = remaining[:, :, first:last].mT.contiguous()
        panel_scales = column_scales[:, :, first:last].mT.contiguous()
        errors = torch.empty_like(panel)
        for column in range(last - first):
            value = panel[:, column]
            quantized = grid.nearest(value, panel_scales[:, column])
            row = upper[:, first + column, first + column : last]
            error = errors[:, column] = (value - quantized) / row[:, :1]
            panel[:, column:] -= row[:, :, None] * error[:, None, :]
            rounded[:, :, first + column] = quantized
        remaining[:, :, last:].baddbmm_(errors.mT, upper[:, first:last, last:], alpha=-1)
    return ordered(rounded, order.argsort(dim=1))


def _descend(grid: Format, values: Tensor, target: Tensor, scales: Tensor, moments: Tensor) -> None:
    """Moves each column of `values` to the point on the grid of `scales` (all `[n, rows, in]`) that minimizes
    d H dᵀ, d = values - target, with H = `moments [n, in, in]` and the other columns as they are, one after another."""
    width = values.shape[2]
    gradient = (values - target) @ moments
    diagonal = moments.diagonal(dim1=1, dim2=2)
    for first in range(0, width, _PANEL):
        last = min(first + _PANEL, width)
        panel, panel_scales, slope = (x[:, :, first:last].mT.contiguous() for x in (values, scales, gradient))
        moved = torch.empty_like(panel)
        for column in range(last - first):
            best = panel[:, column] - slope[:, column] / diagonal[:, first + column, None]
            quantized = grid.nearest(best, panel_scales[:, column])
            step = moved[:, column] = quantized - panel[:, column]
            coupling = moments[:, first + column, first + column : last]
            slope[:, column:] += coupling[:, :, None] * step[:, None, :]
            panel[:, column] = quantized
        values[:, :, first:last] = panel.mT
        gradient[:, :, last:].baddbmm_(moved.mT, moments[:, first:last, last:])


def _row_errors(difference: Tensor, moments: Tensor) -> Tensor:
    """d H dᵀ for every row d of `difference [n, rows, in]`: `[n, rows]`."""
    return (difference @ moments).mul_(difference).sum(2)


def _cholesky(moments: Tensor, damping: float) -> tuple[Tensor, float]:
    """The lower factor of `moments [n, in, in]` with damping, and the damping that it took."""
    while True:
        with _two_threads(moments.device):
            factor, info = torch.linalg.cholesky_ex(_damped(moments, damping))
        if not info.any() and bool(torch.isfinite(factor).all()):
            return factor, damping
        if damping >= _MOST_DAMPING:
            raise ArithmeticError(f"the input moments have no Cholesky factor even with damping {damping:g}")
        damping = max(10 * damping, _LEAST_DAMPING)


@contextmanager
def _two_threads(device: torch.device) -> Iterator[None]:
    """Lets LAPACK factor on two threads, whatever their number else: how it cuts a matrix of 256 columns and more into
    blocks follows from that number, and the last digits of the factor from the blocks. It is the one operation of a
    build whose result depends on the number of threads."""
    before = torch.get_num_threads()
    if device.type != "cpu" or before == _FACTOR_THREADS:
        yield
        return
    torch.set_num_threads(_FACTOR_THREADS)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _damped(moments: Tensor, damping: float) -> Tensor:
    """`moments [n, in, in]` with `damping` times the mean of the diagonal added. An input that always was zero has no
    moment: its diagonal becomes 1, which rounds it to nearest."""
    diagonal = moments.diagonal(dim1=1, dim2=2)
    added = damping * diagonal.mean(1, keepdim=True)
    return moments + torch.diag_embed(torch.where(diagonal == 0, torch.ones_like(diagonal), added))
