"""FP8_DYNAMIC, and activations through FP8 and NVFP4, against compressed-tensors' own rounding and by hand on ties."""

import math

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.naive_quantized import FloatQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize, quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from harness.formats import fp8, nvfp4
from harness.formats.fp8 import FP8_DYNAMIC
from harness.formats.nvfp4 import NVFP4

WEIGHTS = QuantizationArgs(**dict(FP8_DYNAMIC.weights))
SCHEME = QuantizationScheme(targets=["Linear"], weights=WEIGHTS)
ACTIVATIONS = {form: QuantizationArgs(**dict(form.input_activations or ())) for form in (FP8_DYNAMIC, NVFP4)}
# E4M3 by its definition: code = exponent << 3 | mantissa, bias 7; 127 is NaN.
E4M3 = [(c % 8 / 8) * 2.0**-6 if c < 8 else (1 + c % 8 / 8) * 2.0 ** (c // 8 - 7) for c in range(127)]
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_TIES = {0.25: 0.0, 0.75: 1.0, 1.25: 1.0, 1.75: 2.0, 2.5: 2.0, 3.5: 4.0, 5.0: 4.0}


NEAR_TIES = [sign * x for x in (*E2M1_TIES, 0.0, 6.0) for sign in (1, -1)]
matrices = st.tuples(st.integers(1, 5), st.integers(1, 40)).flatmap(
    lambda shape: (
        hnp.arrays(np.float32, shape, elements=st.floats(-1, 1, width=32))
        | hnp.arrays(np.float32, shape, elements=st.floats(-(2.0**127), 2.0**127, width=32))
        | hnp.arrays(np.float32, shape, elements=st.sampled_from([0.0, -0.0, 1e-45, 1e-38, -1e-30, 448.0, 0.3]))
    )
)
weights = matrices.map(torch.from_numpy)
activations = (
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3).map(lambda n: 16 * n))
    .flatmap(
        lambda shape: (
            hnp.arrays(np.float32, shape, elements=st.floats(-1, 1, width=32))
            | hnp.arrays(np.float32, shape, elements=st.floats(-(2.0**100), 2.0**100, width=32))
            | hnp.arrays(
                np.float32, shape, elements=st.sampled_from([*E2M1_TIES, *(-x for x in E2M1_TIES), 0.0, -0.0, 6.0])
            )
        )
    )
    .map(torch.from_numpy)
)


def code_of(x: float) -> int:
    """The E4M3 code of `x` in a row whose scale is 1."""
    return int(fp8.encode(torch.tensor([[x]]), torch.ones(1, 1)).view(torch.uint8).item())


# Weights.


@pytest.mark.parametrize("code", range(127))
def test_every_e4m3_value_has_its_own_code_and_ties_go_to_the_even_one(code: int) -> None:
    assert code_of(E4M3[code]) == code
    assert code_of(-E4M3[code]) == code | 128
    if code < 126:
        middle = np.float32((E4M3[code] + E4M3[code + 1]) / 2)
        assert code_of(float(middle)) == code + code % 2
        assert code_of(float(np.nextafter(middle, np.float32(0)))) == code
        assert code_of(float(np.nextafter(middle, np.float32(500)))) == code + 1
    stored = torch.tensor([[code]], dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert fp8.decode(stored, torch.full((1, 1), 2.0), torch.float32).item() == 2 * E4M3[code]


@pytest.mark.parametrize("x", [448.1, 464.0, 1e30])
def test_weights_beyond_the_last_value_are_clamped_and_never_nan(x: float) -> None:
    assert (code_of(x), code_of(-x)) == (126, 254)


@given(weights)
def test_channel_scales_are_the_row_maxima_over_448_in_bf16(w: Tensor) -> None:
    scales = fp8.channel_decode_scales(w)
    assert (scales.dtype, scales.shape) == (torch.bfloat16, (len(w), 1))
    for row, scale in zip(w.double(), scales.flatten().double(), strict=True):
        exact = row.abs().max() / 448
        # Half a last place of a BF16 number, which is 2**-133 where it is subnormal.
        assert abs(scale - exact) <= max(exact * 2.0**-8, 2.0**-133) or (scale == 1 and exact <= 2.0**-133)
        assert scale > 0


@given(weights)
def test_encode_gives_the_codes_of_the_reference_under_the_same_scales(w: Tensor) -> None:
    scales = fp8.channel_decode_scales(w)
    expected = quantize(w, scales.float(), torch.zeros_like(scales.float()), WEIGHTS, dtype=torch.float8_e4m3fn)
    assert torch.equal(fp8.encode(w, scales).float(), expected.float())


@given(st.tuples(st.integers(1, 4), st.integers(1, 20)), st.data())
def test_decode_equals_the_references_decompressor_bit_for_bit(shape: tuple[int, int], data: st.DataObject) -> None:
    codes = data.draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, 255).filter(lambda code: code % 128 != 127)))
    scales = data.draw(hnp.arrays(np.float32, (shape[0], 1), elements=st.floats(2.0**-100, 2.0**100, width=32)))
    stored, decode_scales = torch.from_numpy(codes).view(torch.float8_e4m3fn), torch.from_numpy(scales).bfloat16()
    for dtype in (torch.bfloat16, torch.float32):
        parts = {"weight": stored, "weight_scale": decode_scales.to(dtype)}
        expected = FloatQuantizationCompressor.decompress(parts, SCHEME)["weight"]
        found = fp8.decode(stored, decode_scales, dtype)
        assert found.dtype == expected.dtype == dtype
        assert torch.equal(found, expected)


@given(weights)
def test_what_is_written_decodes_to_the_weights_within_half_a_step(w: Tensor) -> None:
    scales = fp8.channel_decode_scales(w)
    decoded = fp8.decode(fp8.encode(w, scales), scales, torch.float32)
    # Three bits of mantissa; half a subnormal step; and what BF16 takes from the scale of the largest weight.
    bound = w.abs() * (2.0**-4 + 2.0**-8) + scales.float() * 2.0**-10
    tiny = scales.float() < 2.0**-120  # the scale itself is subnormal, and rounds as it can
    assert bool(((decoded - w).abs() <= bound)[~tiny.expand_as(w)].all())
    assert bool(decoded.isfinite().all())


def test_a_row_of_zeros_gets_scale_one_and_decodes_to_zeros() -> None:
    w = torch.tensor([[0.0, -0.0], [1.0, 2.0]])
    scales = fp8.channel_decode_scales(w)
    assert scales[0].item() == 1
    assert fp8.decode(fp8.encode(w, scales), scales)[0].tolist() == [0, 0]


# Activations.


@given(activations)
def test_fp8_activations_are_those_of_the_reference_bit_for_bit(x: Tensor) -> None:
    args = ACTIVATIONS[FP8_DYNAMIC]
    scales, zero_points = compute_dynamic_scales_and_zp(x, args, nn.Module())
    rounded = fp8.fake_quantize_tokens(x)
    # Where a token's maximum is so small that its scale is 0, either gives zeros or what is as good.
    tiny = scales < 1e-38
    expected = fake_quantize(x, scales, zero_points, args)
    assert torch.equal(rounded.masked_fill(tiny, 0), expected.masked_fill(tiny, 0))
    assert bool(rounded.isfinite().all())


def test_each_token_has_its_own_fp8_scale_whatever_the_shape() -> None:
    x = torch.tensor([[448.0, 17.0], [448e-3, 17e-3]])
    for shaped in (x, x.view(1, 2, 2), x.view(2, 1, 2)):
        rounded = fp8.fake_quantize_tokens(shaped).view(2, 2)
        assert rounded[0].tolist() == [448, 16]  # between 16 and 18, a tie
        torch.testing.assert_close(rounded[1], torch.tensor([448e-3, 16e-3]))


@pytest.mark.parametrize(("tie", "even"), E2M1_TIES.items(), ids=[f"{x} rounds to {y}" for x, y in E2M1_TIES.items()])
def test_magnitudes_round_to_the_nearest_e2m1_value_and_ties_to_even(tie: float, even: float) -> None:
    below, above = max(v for v in E2M1 if v < tie), min(v for v in E2M1 if v > tie)
    beside = [float(np.nextafter(np.float32(tie), np.float32(end))) for end in (0, 9)]
    assert nvfp4.round_magnitudes(torch.tensor([tie, *beside])).tolist() == [even, below, above]


@given(hnp.arrays(np.float32, 50, elements=st.floats(0, 6, width=32)).map(torch.from_numpy))
def test_rounded_magnitudes_are_those_that_encode_gives_codes_for(magnitude: Tensor) -> None:
    blocks = torch.cat((magnitude, torch.zeros(14))).view(-1, 16)
    codes = nvfp4.encode(blocks, torch.ones(4, 1, dtype=torch.float8_e4m3fn), torch.ones(1))
    assert torch.equal(nvfp4.round_magnitudes(blocks), torch.tensor(E2M1)[codes.int()])


@given(activations, st.floats(2.0**-20, 2.0**20, width=32))
def test_nvfp4_activations_are_those_of_the_reference_under_the_same_block_scales(x: Tensor, divisor: float) -> None:
    global_scale = torch.tensor([divisor])
    scales = nvfp4.absmax_block_scales(x, global_scale).float()
    expected = fake_quantize(x, scales, None, ACTIVATIONS[NVFP4], global_scale=global_scale)
    assert torch.equal(nvfp4.fake_quantize(x, global_scale), expected)


def test_the_block_scales_of_activations_are_those_of_the_reference() -> None:
    x = torch.randn(3, 50, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 50)[:, None]
    for divisor in (0.01, 1.0, 100.0, 1e4):  # from every block beyond the range to most of them below it
        global_scale = torch.tensor([divisor])
        scales, zero_points = compute_dynamic_scales_and_zp(
            x, ACTIVATIONS[NVFP4], nn.Module(), global_scale=global_scale
        )
        expected = fake_quantize(x, scales, zero_points, ACTIVATIONS[NVFP4], global_scale=global_scale)
        found = nvfp4.fake_quantize(x, global_scale)
        # The two orders of the scale's three factors round to other sides of a tie once in a million.
        assert (found != expected).float().mean() <= 1e-3
        torch.testing.assert_close(found, expected, rtol=0.5, atol=0)


@given(activations)
def test_rounding_activations_twice_changes_nothing_more(x: Tensor) -> None:
    global_scale = nvfp4.global_encode_scale(x.abs().max())
    once = nvfp4.fake_quantize(x, global_scale)
    amax = once.unflatten(-1, (-1, 16)).abs().amax(-1)
    again = nvfp4.fake_quantize(once, global_scale)
    # Only where the largest of a block kept its code 6 does the block keep its scale.
    scales = nvfp4.absmax_block_scales(x, global_scale).float() / global_scale
    kept = torch.isclose(amax, 6 * scales, rtol=1e-6, atol=0).repeat_interleave(16, -1)
    torch.testing.assert_close(again[kept], once[kept], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rounding_keeps_dtype_shape_and_sign(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    for rounded in (fp8.fake_quantize_tokens(x), nvfp4.fake_quantize(x, torch.tensor([300.0]))):
        assert (rounded.dtype, rounded.shape) == (dtype, x.shape)
        assert torch.equal(torch.signbit(rounded), torch.signbit(x))
        assert not torch.equal(rounded, x)


def test_a_bf16_activation_is_rounded_in_float32() -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    scale = torch.tensor([257.3])
    assert torch.equal(nvfp4.fake_quantize(x, scale), nvfp4.fake_quantize(x.float(), scale).bfloat16())
    assert torch.equal(fp8.fake_quantize_tokens(x), fp8.fake_quantize_tokens(x.float()).bfloat16())


def test_zeros_stay_zeros_and_nothing_becomes_nan() -> None:
    zeros = torch.zeros(2, 32)
    assert torch.equal(fp8.fake_quantize_tokens(zeros), zeros)
    assert torch.equal(nvfp4.fake_quantize(zeros, torch.tensor([math.pi])), zeros)
