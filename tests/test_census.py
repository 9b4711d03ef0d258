"""Sizes and traffic of the published models, by arithmetic done by hand and against published speeds."""

from math import prod
from typing import Any

import pytest
import torch

from harness.formats.format import DTYPES, num_bytes
from harness.formats.fp8 import FP8_DYNAMIC
from harness.formats.nvfp4 import NVFP4, NVFP4A16
from harness.model.census import count_roles, output_bytes, source_tensors, token_traffic
from harness.model.checkpoint import torch_dtype
from harness.model.families.qwen35 import FAMILY
from harness.quantize.plan import plan
from harness.quantize.recipes import RECIPES
from tests.conftest import census, published_config, tiny_config


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_of_a_dtype_are_torchs(dtype: str) -> None:
    tensor = torch.empty((3, 5), dtype=torch_dtype(dtype), device="meta")
    assert num_bytes(dtype, tensor.shape) == tensor.nbytes


@pytest.mark.parametrize("form", [NVFP4A16, NVFP4, FP8_DYNAMIC], ids=lambda form: form.name)
def test_a_stored_tensor_weighs_what_its_format_leaves_on_disk(form: Any) -> None:
    (tensor,) = source_tensors(FAMILY, [("model.language_model.layers.0.mlp.experts.gate_up_proj", (2, 8, 32), 1024)])
    packed, scales, per_tensor = 2 * 8 * 32 // 2, 2 * 8 * 32 // 16, 4 * 4
    expected = {
        "NVFP4A16": packed + scales + per_tensor,
        "NVFP4": packed + scales + 2 * per_tensor,
        "FP8_DYNAMIC": 2 * 8 * 32 + 2 * 8 * 2,
    }
    assert output_bytes(tensor, form) == expected[form.name]
    assert output_bytes(tensor, None) == 1024


def test_the_rows_of_a_census_add_up_to_the_model() -> None:
    _, tensors = census(published_config("qwen3.6-35b-a3b"), with_mtp=True)
    rows = count_roles(tensors, RECIPES["mixed-fp8"].formats(FAMILY))
    assert sum(row.num_tensors for row in rows) == len(tensors) == 1045
    assert sum(row.num_params for row in rows) == sum(prod(tensor.shape) for tensor in tensors)
    assert sum(row.source_bytes for row in rows) == 2 * sum(row.num_params for row in rows)
    assert all(row.source_bytes == row.output_bytes for row in rows if row.format == "kept")
    assert {row.role: row.num_tensors for row in rows if row.role in ("visual", "mtp", "lm_head", "mlp.router")} == {
        "visual": 333,
        "mtp": 19,
        "lm_head": 1,
        "mlp.router": 40,
    }
    assert {row.format for row in rows if "experts." in row.role} == {"NVFP4"}
    assert {row.format for row in rows if "self_attn" in row.role} == {"FP8_DYNAMIC"}


def test_a_tensor_of_no_role_is_counted_and_kept_and_read_by_no_token() -> None:
    config, tensors = census(tiny_config("qwen3.5-9b"))
    rows = count_roles(tensors, {})
    more = count_roles((*tensors, *source_tensors(FAMILY, [("model.odd.weight", (4, 16), 128)])), {})
    assert next(row for row in more if row not in rows).role == "unknown"
    assert sum(row.output_bytes for row in more) == sum(row.output_bytes for row in rows) + 128
    assert token_traffic(config, more) == token_traffic(config, rows)


# layers of full attention × (keys and values) × heads × head dimension × bytes
KV_BYTES = {
    "qwen3.5-9b": 8 * 2 * 4 * 256 * 2,
    "qwen3.5-27b": 16 * 2 * 4 * 256 * 2,
    "qwen3.6-35b-a3b": 10 * 2 * 2 * 256 * 2,
}
# DeltaNet layers × (value heads × key dimension × value dimension in float32
#                    + (2 × 16 key heads × 128 + value heads × 128) channels × 3 past inputs in BF16)
STATE_BYTES = {
    "qwen3.5-9b": 24 * (32 * 128 * 128 * 4 + (4096 + 4096) * 3 * 2),
    "qwen3.5-27b": 48 * (48 * 128 * 128 * 4 + (4096 + 6144) * 3 * 2),
    "qwen3.6-35b-a3b": 30 * (32 * 128 * 128 * 4 + (4096 + 4096) * 3 * 2),
}


@pytest.mark.parametrize("model", KV_BYTES)
def test_cache_and_state_sizes_are_those_computed_by_hand(model: str) -> None:
    config, tensors = census(published_config(model))
    traffic = token_traffic(config, count_roles(tensors, {}))
    assert traffic.kv_bytes_per_token == KV_BYTES[model]
    assert traffic.state_bytes == STATE_BYTES[model]
    assert traffic.bytes_per_step(1000) == traffic.weight_bytes + 2 * STATE_BYTES[model] + 1000 * KV_BYTES[model]
    assert traffic.ceiling(1e12, 1000) == pytest.approx(1e12 / traffic.bytes_per_step(1000))


def test_a_token_reads_one_row_of_the_embeddings_and_its_own_experts_and_neither_vision_nor_mtp() -> None:
    config, tensors = census(tiny_config("qwen3.6-35b-a3b"), with_mtp=True)
    read = 0
    for tensor in tensors:
        if tensor.name.startswith(("mtp.", "model.visual.")):
            continue
        if "embed_tokens" in tensor.name:
            read += 64 * 2
        elif "mlp.experts." in tensor.name:
            read += tensor.num_bytes * 2 // 4
        else:
            read += tensor.num_bytes
    assert token_traffic(config, count_roles(tensors, {})).weight_bytes == read


def test_tied_embeddings_are_read_whole_as_the_output_matrix() -> None:
    config = tiny_config("qwen3.5-9b")
    untied = token_traffic(parsed := census(config)[0], count_roles(census(config)[1], {}))
    config["tie_word_embeddings"] = True
    tied = token_traffic(census(config)[0], count_roles(census(config)[1], {}))
    assert untied.weight_bytes - tied.weight_bytes == parsed.hidden_size * 2


@pytest.mark.parametrize(
    ("model", "recipe", "tokens_per_second", "bandwidth"),
    [
        pytest.param("qwen3.5-27b", "w4a4", 7.93, 273e9, id="27B on a DGX Spark"),
        pytest.param("qwen3.5-27b", "w4a4-deltanet", 11.98, 273e9, id="27B with DeltaNet on a DGX Spark"),
        pytest.param("qwen3.5-9b", "rtn-a16", 140.0, 1792e9, id="9B A16"),
        pytest.param("qwen3.6-35b-a3b", None, 170.3, 1792e9, id="35B BF16 on an RTX PRO 6000"),
        pytest.param("qwen3.6-35b-a3b", "mixed-fp8", 163.4, 1792e9, id="35B mixed on an RTX PRO 6000"),
    ],
)
def test_published_speeds_stay_below_the_ceiling_and_within_a_factor_of_three_of_it(
    model: str, recipe: str | None, tokens_per_second: float, bandwidth: float
) -> None:
    config, tensors = census(published_config(model))
    traffic = plan(config, tensors, RECIPES[recipe] if recipe else None).output_traffic
    assert 1 / 3 < tokens_per_second / traffic.ceiling(bandwidth) < 1


def test_a_half_precision_state_is_half_as_large_and_the_convolutions_is_not() -> None:
    config = tiny_config("qwen3.5-9b")
    full = token_traffic(census(config)[0], ()).state_bytes
    config["text_config"]["mamba_ssm_dtype"] = "bfloat16"
    assert full - token_traffic(census(config)[0], ()).state_bytes == 3 * 4 * 16 * 16 * 2
