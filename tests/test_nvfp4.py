"""NVFP4 against compressed-tensors: the reader that vLLM and transformers use is the oracle for every bit."""

import math

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor, pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import generate_gparam
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from harness.formats import nvfp4
from harness.formats.nvfp4 import NVFP4A16

ARGS = QuantizationArgs(**dict(NVFP4A16.weights))
SCHEME = QuantizationScheme(targets=["Linear"], weights=ARGS)
GRID = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
TIES = {0.25: 0.0, 0.75: 1.0, 1.25: 1.0, 1.75: 2.0, 2.5: 2.0, 3.5: 4.0, 5.0: 4.0}
FLOAT32 = torch.finfo(torch.float32)
BFLOAT16_MAX = torch.finfo(torch.bfloat16).max
# E4M3 by its definition: code = exponent << 3 | mantissa, bias 7; 127 is NaN.
E4M3 = [(c % 8 / 8) * 2.0**-6 if c < 8 else (1 + c % 8 / 8) * 2.0 ** (c // 8 - 7) for c in range(127)]


def code_of(x: float) -> int:
    """The code of `x` in a block whose scales are 1."""
    block = torch.full((1, nvfp4.BLOCK), x)
    codes = nvfp4.encode(block, torch.ones(1, 1, dtype=torch.float8_e4m3fn), torch.ones(1))
    assert codes.shape == block.shape
    assert codes.dtype == torch.uint8
    return int(codes.unique().item())


def block_scale(amax: float) -> Tensor:
    """The block scale, as its E4M3 code, of a block with that maximum under a global scale that divides out."""
    block = torch.zeros(1, nvfp4.BLOCK)
    block[0, 5] = -amax
    return nvfp4.absmax_block_scales(block, torch.tensor([6.0])).view(torch.uint8)


def reference_decode(packed: Tensor, scales: Tensor, global_scale: Tensor) -> Tensor:
    state = {"weight_packed": packed, "weight_scale": scales, "weight_global_scale": global_scale}
    # A single block a row makes the reference take another path, which leaves the last rounding to the caller.
    return NVFP4PackedCompressor.decompress(state, SCHEME)["weight"].to(torch.bfloat16)


def reference_codes(w: Tensor, scales: Tensor, global_scale: Tensor) -> Tensor:
    """Packed codes by the reference's own arithmetic, in float32.

    It drops the sign of a quotient that is -0, where the format keeps one, so signs are taken from the weights.
    """
    values = quantize(w, scales.float(), None, ARGS, global_scale=global_scale)
    return pack_fp4_to_uint8(values.copysign(w))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Bitwise equality of two bfloat16 tensors; any NaN equals any other."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(
        a.nan_to_num(nan=0.0).view(torch.int16), b.nan_to_num(nan=0.0).view(torch.int16)
    )


shapes = st.tuples(st.integers(1, 4), st.integers(1, 3).map(lambda blocks: blocks * nvfp4.BLOCK))
adversarial = st.sampled_from(
    [sign * x for x in (*GRID, *TIES, 5.9999, 6.0001, 1e-45, 1e-38, 1e-30, 448.0, 3e38) for sign in (1, -1)]
)
weights = shapes.flatmap(
    lambda shape: (
        hnp.arrays(np.float32, shape, elements=adversarial.map(np.float32))
        | hnp.arrays(np.float32, shape, elements=st.floats(width=32, allow_nan=False, allow_infinity=False))
        | hnp.arrays(np.float32, shape, elements=st.floats(-1, 1, width=32))
    )
).map(torch.from_numpy)


@pytest.mark.parametrize("code", range(8))
@pytest.mark.parametrize("sign", [1, -1], ids=["positive", "negative"])
def test_every_value_of_the_grid_has_its_own_code_and_decodes_to_itself(code: int, sign: int) -> None:
    expected = code | (8 if sign < 0 else 0)
    assert code_of(sign * GRID[code]) == expected
    packed = torch.full((1, 8), expected | expected << 4, dtype=torch.uint8)
    decoded = nvfp4.decode(packed, torch.ones(1, 1, dtype=torch.float8_e4m3fn), torch.ones(1))
    assert same_bits(decoded, torch.full((1, nvfp4.BLOCK), sign * GRID[code], dtype=torch.bfloat16))


@pytest.mark.parametrize(("tie", "even"), TIES.items(), ids=[f"{x} rounds to {y}" for x, y in TIES.items()])
@pytest.mark.parametrize("sign", [1, -1], ids=["positive", "negative"])
def test_ties_go_to_the_even_code_and_everything_beside_them_to_the_nearest(tie: float, even: float, sign: int) -> None:
    bit = 8 if sign < 0 else 0
    below, above = (GRID.index(max(v for v in GRID if v < tie)), GRID.index(min(v for v in GRID if v > tie)))
    assert code_of(sign * tie) == GRID.index(even) | bit
    assert code_of(sign * float(np.nextafter(np.float32(tie), np.float32(0)))) == below | bit
    assert code_of(sign * float(np.nextafter(np.float32(tie), np.float32(9)))) == above | bit


@pytest.mark.parametrize("x", [6.0001, 7.0, 448.0, 3e38, math.inf])
def test_magnitudes_above_six_are_clamped_to_six(x: float) -> None:
    assert (code_of(x), code_of(-x)) == (7, 15)


@pytest.mark.parametrize("x", [-0.0, -1e-45, -0.25])
def test_negative_zero_is_code_8_and_survives_packing_and_decoding(x: float) -> None:
    assert code_of(x) == 8
    codes = torch.tensor([[8, 0] * 8], dtype=torch.uint8)
    assert torch.equal(nvfp4.unpack(nvfp4.pack(codes)), codes)
    decoded = nvfp4.decode(nvfp4.pack(codes), torch.ones(1, 1, dtype=torch.float8_e4m3fn), torch.ones(1))
    assert torch.signbit(decoded).tolist() == [[True, False] * 8]


def test_an_all_zero_block_is_stored_with_scale_one_eighth_and_decodes_to_zeros() -> None:
    w = torch.zeros(2, 32)
    w[0, 20] = 3.0
    global_scale = nvfp4.global_encode_scale(w.abs().max())
    scales = nvfp4.absmax_block_scales(w, global_scale)
    assert scales.float().tolist() == [[0.125, 448.0], [0.125, 0.125]]
    packed = nvfp4.pack(nvfp4.encode(w, scales, global_scale))
    assert torch.equal(nvfp4.decode(packed, scales, global_scale, torch.float32), w)


@pytest.mark.parametrize("amax", [0.0, 1e-45, FLOAT32.tiny, 7e-36, 1e-30, 1.0, 2688.0, 1e30, BFLOAT16_MAX])
def test_any_finite_maximum_gives_a_finite_positive_global_scale_and_finite_weights(amax: float) -> None:
    w = torch.tensor([amax, -amax, amax / 3, 0.0]).repeat(1, 8)
    global_scale = nvfp4.global_encode_scale(w.abs().max())
    assert global_scale.shape == (1,)
    assert global_scale.dtype == torch.float32
    assert 0 < float(global_scale) < math.inf
    scales = nvfp4.absmax_block_scales(w, global_scale)
    decoded = nvfp4.decode(nvfp4.pack(nvfp4.encode(w, scales, global_scale)), scales, global_scale, torch.float32)
    # Below 2688 / float32's maximum the quotient overflows and the weights decode to zeros, which are as good.
    torch.testing.assert_close(decoded, w, rtol=0.17, atol=8e-36)


def test_the_global_scale_is_the_divisor_that_puts_the_largest_block_scale_at_448() -> None:
    assert float(nvfp4.global_encode_scale(torch.tensor(2688.0))) == 1.0
    assert float(nvfp4.global_encode_scale(torch.tensor(0.5))) == 5376.0


@given(st.floats(0, FLOAT32.max, width=32))
def test_the_global_scale_is_the_references_in_float32_to_the_last_bit(amax: float) -> None:
    largest = torch.tensor(amax)
    assert torch.equal(nvfp4.global_encode_scale(largest), generate_gparam(-largest, torch.zeros(())))


@pytest.mark.parametrize("code", range(1, 127))
def test_block_scales_round_to_the_nearest_e4m3_and_ties_to_even(code: int) -> None:
    assert block_scale(E4M3[code]).item() == code
    if code < 126:
        middle = np.float32((E4M3[code] + E4M3[code + 1]) / 2)
        assert block_scale(float(middle)).item() == code + code % 2
        assert block_scale(float(np.nextafter(middle, np.float32(0)))).item() == code
        assert block_scale(float(np.nextafter(middle, np.float32(500)))).item() == code + 1


def test_a_block_scale_that_rounds_to_zero_is_one_eighth_and_one_above_the_range_is_448() -> None:
    assert E4M3[block_scale(E4M3[1] / 2).item()] == 0.125
    assert E4M3[block_scale(500.0).item()] == 448.0


@given(weights)
def test_block_scales_are_e4m3_of_the_blocks_maximum_over_six(w: Tensor) -> None:
    global_scale = nvfp4.global_encode_scale(w.abs().max())
    scales = nvfp4.absmax_block_scales(w, global_scale)
    assert scales.dtype == torch.float8_e4m3fn
    exact = w.double().unflatten(1, (-1, 16)).abs().amax(-1) * global_scale.double() / 6
    # float32 arithmetic may fall to either side of a tie: two roundings of 2**-24 each.
    low, high = ((exact * (1 + e)).clamp(max=448).to(torch.float8_e4m3fn).double() for e in (-(2.0**-22), 2.0**-22))
    stored = scales.double()
    assert bool((((low <= stored) & (stored <= high)) | ((low == 0) & (stored == 0.125))).all())


@given(weights)
def test_encode_gives_the_codes_of_the_reference_under_the_same_scales(w: Tensor) -> None:
    global_scale = nvfp4.global_encode_scale(w.abs().max())
    scales = nvfp4.absmax_block_scales(w, global_scale)
    packed = nvfp4.pack(nvfp4.encode(w, scales, global_scale))
    assert torch.equal(packed, reference_codes(w, scales, global_scale))


@given(shapes.flatmap(lambda shape: hnp.arrays(np.uint8, shape, elements=st.integers(0, 15))).map(torch.from_numpy))
def test_pack_and_unpack_agree_with_the_reference_bit_for_bit(codes: Tensor) -> None:
    packed = nvfp4.pack(codes)
    values = unpack_fp4_from_uint8(packed, *codes.shape)
    assert torch.equal(pack_fp4_to_uint8(values), packed)
    assert torch.equal(nvfp4.unpack(packed), codes)
    table = torch.tensor([*GRID, *(-v for v in GRID)], dtype=torch.bfloat16)
    assert same_bits(values, table[codes.int()])


@given(shapes, st.data())
def test_decode_equals_the_references_decompressor_bit_for_bit_on_any_bytes(
    shape: tuple[int, int], data: st.DataObject
) -> None:
    rows, columns = shape
    scale_codes = st.integers(0, 255).filter(lambda code: code % 128 != 127)
    scales = torch.from_numpy(data.draw(hnp.arrays(np.uint8, (rows, columns // 16), elements=scale_codes)))
    packed = torch.from_numpy(data.draw(hnp.arrays(np.uint8, (rows, columns // 2))))
    global_scale = torch.tensor([data.draw(st.floats(FLOAT32.tiny, FLOAT32.max, width=32))])
    scales = scales.view(torch.float8_e4m3fn)
    assert same_bits(nvfp4.decode(packed, scales, global_scale), reference_decode(packed, scales, global_scale))


@given(weights)
def test_what_we_write_the_reference_reads_as_we_do(w: Tensor) -> None:
    global_scale = nvfp4.global_encode_scale(w.abs().max())
    scales = nvfp4.absmax_block_scales(w, global_scale)
    packed = nvfp4.pack(nvfp4.encode(w, scales, global_scale))
    decoded = nvfp4.decode(packed, scales, global_scale)
    assert same_bits(decoded, reference_decode(packed, scales, global_scale))
    assert not decoded.isnan().any()


def test_no_tokens_at_all_are_rounded_to_no_tokens() -> None:
    for shape in ((0, 32), (2, 0, 32)):
        assert nvfp4.fake_quantize(torch.empty(shape), torch.ones(1)).shape == shape
