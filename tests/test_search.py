"""Block scales against brute force: every positive E4M3 value tried on every block, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from harness.formats import nvfp4
from harness.formats.format import ABSMAX, SEARCH, WEIGHTED_SEARCH
from harness.formats.nvfp4 import NVFP4A16

GRID = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
CODES = torch.arange(1, 127, dtype=torch.uint8)
"""All positive finite E4M3 values, as codes."""


def errors_of_all(w: Tensor, global_scale: Tensor, importance: Tensor | None = None) -> Tensor:
    """Squared error `[126, blocks]` of every block of `w [rows, in]` under every scale, each weight on its nearest
    grid point."""
    blocks = w.double().abs().view(-1, 16)
    weights = torch.ones(16) if importance is None else importance.view(-1, 16).repeat(len(w), 1)
    per_block = global_scale.double().view(-1, 1).expand(len(w), w.shape[1] // 16).reshape(-1)
    errors = []
    for value in CODES.view(torch.float8_e4m3fn).double():
        scale = (value / per_block).unsqueeze(1)
        distance = ((blocks / scale).unsqueeze(-1) - GRID).abs().amin(-1) * scale
        errors.append((distance.square() * weights.double()).sum(1))
    return torch.stack(errors)


def error_of(w: Tensor, global_scale: Tensor, scales: Tensor, importance: Tensor | None = None) -> Tensor:
    """Squared error `[blocks]` of what a reader of the checkpoint would decode."""
    per_row = global_scale.view(-1, 1)
    packed = nvfp4.pack(nvfp4.encode(w, scales, per_row))
    distance = nvfp4.decode(packed, scales, per_row, torch.float32).double() - w.double()
    weights = torch.ones(16) if importance is None else importance.view(-1, 16).repeat(len(w), 1)
    return (distance.square().view(-1, 16) * weights.double()).sum(1)


def not_above(error: Tensor, bound: Tensor, w: Tensor, importance: float = 1.0) -> bool:
    """Whether errors keep to their bounds, but for the last place of weights and scales in float32."""
    last_place = 1e-6 * float(w.abs().max()) * importance**0.5
    return bool((error.sqrt() <= bound.sqrt() * (1 + 1e-5) + last_place).all())


@st.composite
def matrices(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Weights `[rows, in]` of several shapes and spreads, some of them zero, and their global scale."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    rows, blocks = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    w = torch.randn(rows, blocks * 16, generator=generator) * 10.0 ** draw(st.integers(-6, 3))
    spread = draw(st.sampled_from([0.0, 0.5, 2.0]))
    w *= torch.exp(spread * torch.randn(rows, blocks, generator=generator)).repeat_interleave(16, 1)
    if draw(st.booleans()):  # heavy tails inside the blocks
        w *= torch.exp(torch.randn(w.shape, generator=generator))
    w[torch.rand(w.shape, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.9]))] = 0
    if draw(st.booleans()):
        w = w.bfloat16().float()
    return w, nvfp4.global_encode_scale(w.abs().max())


@settings(max_examples=50)
@given(matrices())
def test_the_search_finds_the_least_error_of_all_126_scales(matrix: tuple[Tensor, Tensor]) -> None:
    w, global_scale = matrix
    error = error_of(w, global_scale, NVFP4A16.choose_scales(w, global_scale, SEARCH))
    least = errors_of_all(w, global_scale).amin(0)
    assert not_above(error, least, w)


@settings(max_examples=50)
@given(matrices(), st.integers(0, 2**32), st.sampled_from([0.3, 1.0, 3.0]))
def test_the_weighted_search_finds_the_least_weighted_error_around_the_largest_magnitudes_scale(
    matrix: tuple[Tensor, Tensor], seed: int, spread: float
) -> None:
    w, global_scale = matrix
    generator = torch.Generator().manual_seed(seed)
    importance = torch.exp(spread * torch.randn(w.shape[1], generator=generator))
    error = error_of(w, global_scale, NVFP4A16.choose_scales(w, global_scale, WEIGHTED_SEARCH, importance), importance)
    largest = w.view(-1, 16).abs().amax(1) * global_scale / 6
    nearest = largest.clamp(max=448).to(torch.float8_e4m3fn).view(torch.uint8).int()
    candidate = (CODES[:, None] >= (nearest - 3).clamp(1, 126)) & (CODES[:, None] <= (nearest + 7).clamp(1, 126))
    least = errors_of_all(w, global_scale, importance).masked_fill(~candidate, torch.inf).amin(0)
    assert not_above(error, least, w, float(importance.max()))


@settings(max_examples=50)
@given(matrices())
def test_no_block_comes_out_worse_than_by_its_largest_magnitude(matrix: tuple[Tensor, Tensor]) -> None:
    w, global_scale = matrix
    searched = error_of(w, global_scale, NVFP4A16.choose_scales(w, global_scale, SEARCH))
    absmax = error_of(w, global_scale, NVFP4A16.choose_scales(w, global_scale, ABSMAX))
    assert not_above(searched, absmax, w)


def test_the_search_gains_about_a_quarter_on_gaussian_weights() -> None:
    """Published for an exact search (ScaleSweep, arXiv 2606.07618) and measured elsewhere: -27 %."""
    w = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    global_scale = nvfp4.global_encode_scale(w.abs().max())
    searched, absmax = (
        error_of(w, global_scale, NVFP4A16.choose_scales(w, global_scale, how)).sum() for how in (SEARCH, ABSMAX)
    )
    assert 0.70 < searched / absmax < 0.78


@pytest.mark.parametrize("method", [ABSMAX, SEARCH, WEIGHTED_SEARCH])
def test_a_block_of_zeros_takes_the_formats_own_scale(method: str) -> None:
    w = torch.zeros(2, 32)
    w[1, 20] = -3.0
    scales = NVFP4A16.choose_scales(w, torch.tensor([896.0]), method, torch.ones(32)).float()
    assert scales[0].tolist() == [0.125, 0.125]
    assert scales[1, 0] == 0.125
    assert scales[1, 1] > 1


def test_a_block_whose_inputs_have_no_importance_is_searched_unweighted() -> None:
    generator = torch.Generator().manual_seed(3)
    w, importance = torch.randn(40, 48, generator=generator), torch.rand(48, generator=generator)
    importance[16:32] = 0
    global_scale = nvfp4.global_encode_scale(w.abs().max())
    weighted = NVFP4A16.choose_scales(w, global_scale, WEIGHTED_SEARCH, importance).view(torch.uint8)
    plain = NVFP4A16.choose_scales(w, global_scale, SEARCH).view(torch.uint8)
    assert torch.equal(weighted[:, 1], plain[:, 1])
    assert not torch.equal(weighted[:, 0], plain[:, 0])


def test_a_global_scale_a_row_is_each_rows_own() -> None:
    w = torch.randn(9, 64, generator=torch.Generator().manual_seed(1)) * 10.0 ** torch.arange(-4, 5).view(-1, 1)
    scales = 2688 / w.abs().amax(1, keepdim=True)
    for method in (ABSMAX, SEARCH):
        together = NVFP4A16.choose_scales(w, scales, method)
        alone = torch.cat([NVFP4A16.choose_scales(w[row : row + 1], scales[row], method) for row in range(9)])
        assert torch.equal(together.view(torch.uint8), alone.view(torch.uint8))


def test_a_long_matrix_is_searched_in_pieces_with_the_same_result() -> None:
    w = torch.randn(300, 2048, generator=torch.Generator().manual_seed(2))  # more than two pieces of 2^18
    global_scale = nvfp4.global_encode_scale(w.abs().max())
    whole = NVFP4A16.choose_scales(w, global_scale, SEARCH)
    rows = torch.cat([NVFP4A16.choose_scales(row.unsqueeze(0), global_scale, SEARCH) for row in w[::37]])
    assert torch.equal(whole[::37].view(torch.uint8), rows.view(torch.uint8))


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_weights_at_the_ends_of_float32_are_searched_like_others(size: float) -> None:
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(4))
    expected = NVFP4A16.choose_scales(w, nvfp4.global_encode_scale(w.abs().max()), SEARCH)
    w = w * size
    error = error_of(w, global_scale := nvfp4.global_encode_scale(w.abs().max()), expected)
    found = error_of(w, global_scale, NVFP4A16.choose_scales(w, global_scale, SEARCH))
    assert (found <= error * (1 + 1e-3)).all()
