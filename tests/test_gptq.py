"""GPTQ against a plain loop written from the paper's equations, against least squares, and against rounding."""

from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from harness.formats import nvfp4
from harness.formats.nvfp4 import NVFP4
from harness.quantize.gptq import Rounded, aimed, gptq

DAMPING = 0.01
GRID = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)


def problem(
    seed: int, *, num: int = 1, rows: int = 8, width: int = 64, tokens: int = 200, spread: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights `[n, rows, in]`, decode scales `[n, rows, in/16]` and inputs `[n, tokens, in]` of unequal channels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num, tokens, width, generator=generator)
    x = x @ torch.linalg.qr(torch.randn(num, width, width, generator=generator))[0]
    x = x * torch.exp(spread * torch.randn(num, 1, width, generator=generator))
    # Channels that go together: without them no column can answer for another.
    x = x + torch.randn(num, tokens, 1, generator=generator) * x.square().mean(1, keepdim=True).sqrt()
    w = torch.randn(num, rows, width, generator=generator) * 0.02
    return w, scales_of(w), x


def scales_of(w: Tensor) -> Tensor:
    flat = w.view(-1, w.shape[-1])
    global_scale = nvfp4.global_encode_scale(flat.abs().max())
    return (nvfp4.absmax_block_scales(flat, global_scale).float() / global_scale).view(*w.shape[:2], -1)


def decoded(rounded: Rounded, scales: Tensor) -> Tensor:
    """Float64 weights `[n, rows, in]` of the codes, by the table of the format."""
    codes = rounded.codes.int()
    return torch.cat((GRID, -GRID))[codes] * scales.double().repeat_interleave(16, -1)


def nearest(w: Tensor, scales: Tensor) -> Tensor:
    """Float64 weights on the nearest points of the grid; of two equally near ones the lower, which occurs in no
    random matrix."""
    spread = scales.double().repeat_interleave(16, -1)
    return GRID[((w.double() / spread).abs().unsqueeze(-1) - GRID).abs().argmin(-1)] * spread * w.double().sign()


def output_error(difference: Tensor, x: Tensor) -> Tensor:
    """Squared output error of every row on inputs `x`, `[n, rows]`."""
    return (difference.double() @ x.double().mT).square().sum(-1)


def plain_gptq(w: Tensor, scales: Tensor, h: Tensor, damping: float) -> Tensor:
    """Algorithm 1 of arXiv 2210.17323 in float64 for one matrix `w [rows, in]`, one column after another, by falling
    diagonal; rows that rounding to nearest serves better are rounded so."""
    h = h.double()
    dead = h.diagonal() == 0
    damped = h + torch.diag(torch.where(dead, 1.0, damping * h.diagonal().mean()))
    order = sorted(range(len(h)), key=lambda column: -float(h[column, column]))
    inverse = torch.linalg.inv(damped[order][:, order])
    upper = torch.linalg.cholesky(inverse).T
    spread = scales.double().repeat_interleave(16, -1)
    left, result = w.double()[:, order].clone(), torch.zeros_like(w, dtype=torch.float64)
    for place, column in enumerate(order):
        scale = spread[:, column]
        value = left[:, place].clone()
        chosen = GRID[((value / scale).abs().unsqueeze(-1) - GRID).abs().argmin(-1)] * scale * value.sign()
        result[:, column] = chosen
        error = (value - chosen) / upper[place, place]
        left[:, place:] -= error[:, None] * upper[place, place:]
    simple = nearest(w, scales)
    worse = ((result - w.double()) @ h * (result - w.double())).sum(1) > (
        (simple - w.double()) @ h * (simple - w.double())
    ).sum(1)
    return torch.where(worse[:, None], simple, result)


def moments_of(x: Tensor) -> Tensor:
    return x.mT @ x


@pytest.mark.parametrize("width", [64, 144, 272])  # within a panel of columns, over one, over two
def test_it_is_the_papers_algorithm(width: int) -> None:
    w, scales, x = problem(width, rows=24, width=width, tokens=2 * width)
    expected = plain_gptq(w[0], scales[0], moments_of(x)[0], DAMPING)
    found = decoded(gptq(NVFP4, w, w, scales, moments_of(x), DAMPING), scales)[0]
    # A value that float32 puts on the other side of a rounding boundary moves all that follow in its row.
    same = (found - expected).abs().amax(1) <= 1e-6 * scales[0].amax()
    assert same.float().mean() > 0.8
    errors = [float(output_error(one - w[0], x[0]).sum()) for one in (found, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


def identity(width: int) -> Tensor:
    return torch.eye(width).unsqueeze(0)


def diagonal(width: int) -> Tensor:
    return torch.diag(torch.logspace(-6, 6, width)[torch.randperm(width)]).unsqueeze(0)


@pytest.mark.parametrize("moments", [identity, diagonal])
def test_independent_inputs_leave_nothing_to_take_back(moments: Callable[[int], Tensor]) -> None:
    w, scales, _ = problem(5, rows=16, width=160)
    rounded = gptq(NVFP4, w, w, scales, moments(160), DAMPING)
    torch.testing.assert_close(decoded(rounded, scales), nearest(w, scales))
    assert rounded.error == rounded.rtn_error
    flat = w.view(-1, 160)
    global_scale = nvfp4.global_encode_scale(flat.abs().max())
    codes = nvfp4.encode(flat, nvfp4.absmax_block_scales(flat, global_scale), global_scale)
    assert (rounded.codes.view(-1, 160) == codes).float().mean() > 0.999  # the scales' quotient is rounded twice


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(1, 20),
    blocks=st.integers(1, 12),
    tokens=st.sampled_from([1, 3, 40, 400]),  # fewer than columns: H is singular
    spread=st.sampled_from([0.0, 1.0, 4.0]),
    num_dead=st.integers(0, 20),
)
def test_the_layers_error_on_its_calibration_inputs_is_never_above_round_to_nearests(
    seed: int, rows: int, blocks: int, tokens: int, spread: float, num_dead: int
) -> None:
    w, scales, x = problem(seed, rows=rows, width=16 * blocks, tokens=tokens, spread=spread)
    x[:, :, torch.randperm(16 * blocks, generator=torch.Generator().manual_seed(seed))[:num_dead]] = 0
    rounded = gptq(NVFP4, w, w, scales, moments_of(x), DAMPING)
    error = output_error(decoded(rounded, scales) - w, x)
    rtn = output_error(nearest(w, scales) - w, x)
    slack = 1e-5 * output_error(w, x)
    assert (error <= rtn * (1 + 1e-4) + slack).all()
    assert rounded.error <= rounded.rtn_error
    assert rounded.error == pytest.approx(float(error.sum()), rel=1e-2, abs=float(slack.sum()) + 1e-9)
    assert rounded.rtn_error == pytest.approx(float(rtn.sum()), rel=1e-2, abs=float(slack.sum()) + 1e-9)
    assert rounded.output == pytest.approx(float(output_error(w, x).sum()), rel=1e-3, abs=1e-9)
    assert rounded.codes.max() < 16


def test_inputs_that_go_together_are_worth_more_than_half_of_the_error() -> None:
    w, scales, x = problem(7, rows=64, width=256, tokens=1000)
    rounded = gptq(NVFP4, w, w, scales, moments_of(x), DAMPING)
    assert rounded.error < 0.5 * rounded.rtn_error
    assert rounded.num_rows_rtn == 0


def test_a_dead_column_is_rounded_to_nearest() -> None:
    w, scales, x = problem(8, rows=16, width=96)
    x[:, :, 17] = 0
    found = decoded(gptq(NVFP4, w, w, scales, moments_of(x), DAMPING), scales)
    torch.testing.assert_close(found[:, :, 17], nearest(w, scales)[:, :, 17])


def test_several_matrices_at_once_are_each_of_them_alone() -> None:
    w, scales, x = problem(9, num=3, rows=10, width=144)
    together = gptq(NVFP4, w, w, scales, moments_of(x), DAMPING)
    alone = [
        gptq(NVFP4, w[n : n + 1], w[n : n + 1], scales[n : n + 1], moments_of(x)[n : n + 1], DAMPING) for n in range(3)
    ]
    # Batched and single matrix products may differ in a last bit, which can tip a tie.
    assert (together.codes == torch.cat([one.codes for one in alone])).float().mean() > 0.99
    for name in ("error", "rtn_error", "output"):
        assert getattr(together, name) == pytest.approx(sum(getattr(one, name) for one in alone), rel=1e-2)


def test_a_singular_matrix_takes_damping_and_says_how_much() -> None:
    w, scales, x = problem(10, rows=6, width=64, tokens=2)
    regular = gptq(NVFP4, w, w, scales, moments_of(problem(10, tokens=500)[2]), DAMPING)
    assert regular.damping == DAMPING
    singular = gptq(NVFP4, w, w, scales, moments_of(x), 0.0)
    assert 0 < singular.damping <= DAMPING
    assert singular.error <= singular.rtn_error


def test_a_matrix_that_is_not_positive_takes_more_than_was_asked_for() -> None:
    w, scales, x = problem(11, rows=6, width=64)
    moments = moments_of(x)
    moments = moments - 0.05 * torch.eye(64) * moments.diagonal(dim1=1, dim2=2).mean()  # as if rounded very coarsely
    rounded = gptq(NVFP4, w, w, scales, moments, 1e-4)
    assert rounded.damping > 1e-3


def test_the_aim_is_the_least_squares_solution_for_the_inputs_that_there_are() -> None:
    """W* X̂ nearest to W X: the rows of W* solve one least-squares problem each."""
    w, _, x = problem(12, rows=10, width=48, tokens=400)
    changed = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    solved = torch.linalg.lstsq(changed[0].double(), (x[0] @ w[0].mT).double(), driver="gelsd").solution.mT
    for rows in (slice(None), slice(0, 10)):
        found = aimed(w[:, rows], changed.mT @ changed, changed.mT @ (x - changed), 1e-9)[0]
        torch.testing.assert_close(found.double(), solved, rtol=1e-3, atol=1e-5)
    tall, _, _ = problem(13, rows=100, width=48)  # more rows than columns: solved the other way round
    solved = torch.linalg.lstsq(changed[0].double(), (x[0] @ tall[0].mT).double(), driver="gelsd").solution.mT
    found = aimed(tall, changed.mT @ changed, changed.mT @ (x - changed), 1e-9)[0]
    torch.testing.assert_close(found.double(), solved, rtol=1e-3, atol=1e-5)


def test_inputs_that_have_not_changed_leave_the_aim_where_it_is() -> None:
    w, _, x = problem(14)
    assert torch.equal(aimed(w, moments_of(x), torch.zeros(1, 64, 64), DAMPING), w)


def test_aiming_at_the_unquantized_output_repairs_what_came_before() -> None:
    w, _, x = problem(15, rows=48, width=96, tokens=800)
    changed = x + 0.3 * x.std(1, keepdim=True) * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    moments, shift = changed.mT @ changed, changed.mT @ (x - changed)
    errors = []
    for target in (w, aimed(w, moments, shift, DAMPING)):
        scales = scales_of(target)
        found = decoded(gptq(NVFP4, w, target, scales, moments, DAMPING), scales)
        errors.append((found @ changed.double().mT - w.double() @ x.double().mT).square().sum())
    assert errors[1] < 0.9 * errors[0]


def test_a_row_that_gptq_makes_worse_is_rounded_to_nearest_and_counted() -> None:
    counted = 0
    for seed in range(30):  # clipped hard, so that what is taken back has nowhere to go
        w, scales, x = problem(seed, rows=32, width=32, tokens=3, spread=3.0)
        scales = scales * 0.3
        rounded = gptq(NVFP4, w, w, scales, moments_of(x), DAMPING)
        counted += rounded.num_rows_rtn
        same = (decoded(rounded, scales) - nearest(w, scales)).abs().amax(2) < 1e-9
        assert same.sum() >= rounded.num_rows_rtn
    assert counted > 0


def damped_error(found: Tensor, w: Tensor, x: Tensor, damping: float) -> Tensor:
    """What GPTQ minimizes, `[n, rows]`, in float64: the output error and the damping's share of the weights'."""
    h = moments_of(x.double())
    h = h + damping * h.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(h.shape[1], dtype=torch.float64)
    difference = found - w.double()
    return ((difference @ h) * difference).sum(2)


@pytest.mark.parametrize("width", [64, 144, 272])
def test_visiting_the_columns_again_lowers_the_error_and_more_visits_never_raise_it(width: int) -> None:
    w, scales, x = problem(width + 1, num=2, rows=24, width=width, tokens=3 * width)
    errors = [
        damped_error(decoded(gptq(NVFP4, w, w, scales, moments_of(x), DAMPING, sweeps), scales), w, x, DAMPING)
        for sweeps in (0, 1, 2, 6)
    ]
    for fewer, more in pairwise(errors):
        assert (more <= fewer * (1 + 1e-5)).all()
    assert errors[1].sum() < errors[0].sum()


def test_inputs_that_are_mixed_at_random_leave_visits_something_to_gain() -> None:
    generator = torch.Generator().manual_seed(20)
    x = torch.randn(1, 600, 128, generator=generator) @ torch.randn(1, 128, 128, generator=generator)
    w, scales, _ = problem(20, rows=48, width=128)
    once, again = (gptq(NVFP4, w, w, scales, moments_of(x), DAMPING, sweeps).error for sweeps in (0, 2))
    assert again < 0.85 * once


def test_after_enough_visits_no_single_code_can_be_changed_for_the_better() -> None:
    w, scales, x = problem(21, rows=6, width=32, tokens=200)
    found = decoded(gptq(NVFP4, w, w, scales, moments_of(x), DAMPING, 50), scales)
    least = damped_error(found, w, x, DAMPING)
    for column in range(32):
        for value in torch.cat((GRID, -GRID)):
            changed = found.clone()
            changed[:, :, column] = value * scales.double()[:, :, column // 16]
            assert (damped_error(changed, w, x, DAMPING) >= least * (1 - 1e-5)).all()


def test_a_dead_column_stays_rounded_to_nearest_however_often_it_is_visited() -> None:
    w, scales, x = problem(22, rows=16, width=160)
    x[:, :, 17] = 0
    found = decoded(gptq(NVFP4, w, w, scales, moments_of(x), DAMPING, 2), scales)
    torch.testing.assert_close(found[:, :, 17], nearest(w, scales)[:, :, 17])


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of torch's threads; the old one is back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_targets_and_codes_do_not_depend_on_the_number_of_threads(threads: Callable[[int], None]) -> None:
    """LAPACK factors 256 columns and more in other blocks where it has other threads, with other last digits."""
    w, scales, x = problem(12, rows=16, width=512, tokens=600)
    shift = 0.01 * moments_of(x)
    found = []
    for num in (1, 2, 3):
        threads(num)
        target = aimed(w, moments_of(x), shift, DAMPING)
        found.append((target, gptq(NVFP4, w, target, scales, moments_of(x), DAMPING)))
        assert torch.get_num_threads() == num
    for target, rounded in found[1:]:
        assert torch.equal(target, found[0][0])
        assert torch.equal(rounded.codes, found[0][1].codes)
        assert rounded.error == found[0][1].error
