"""Plans of the published models against the sizes that their cards state."""

import os
from pathlib import Path

import pytest

from harness.cli import main
from harness.errors import UserError
from harness.model.census import source_tensors
from harness.model.families.qwen35 import FAMILY
from harness.quantize.plan import CalibrationMemory, calibration_memory, check_memory, plan, quantized
from harness.quantize.recipes import RECIPES, Recipe, recipe_named
from tests.conftest import census, published_config, tiny_config

PUBLISHED = [
    # model, recipe, tensors, quantized, BF16 GB, GB out
    ("qwen3.5-9b", "rtn-a16", 760, 128, "18.82", "11.20"),
    ("qwen3.5-27b", "w4a4", 1184, 256, "54.71", "27.70"),
    ("qwen3.5-27b", "w4a4-deltanet", 1184, 400, "54.71", "19.74"),
    ("qwen3.6-35b-a3b", "mixed-fp8", 1026, 40 * 2 + 10 * 4 + 40 * 3, "70.21", "23.5"),
]
MTP_BYTES = {
    "qwen3.5-9b": 2 * (2 * 4096**2 + 4096 * (2 * 4096 + 2 * 1024 + 4096) + 3 * 4096 * 12288 + 5 * 4096 + 2 * 256),
    "qwen3.5-27b": 2 * (2 * 5120**2 + 5120 * (2 * 6144 + 2 * 1024 + 6144) + 3 * 5120 * 17408 + 5 * 5120 + 2 * 256),
}


@pytest.mark.parametrize(("model", "recipe", "num_tensors", "num_quantized", "source", "output"), PUBLISHED)
def test_a_plan_from_the_configuration_alone_comes_to_the_published_sizes(
    model: str, recipe: str, num_tensors: int, num_quantized: int, source: str, output: str
) -> None:
    what = plan(*census(published_config(model)), RECIPES[recipe])
    assert (what.num_tensors, what.num_quantized) == (num_tensors, num_quantized)
    decimals = len(output.partition(".")[2])
    assert (f"{what.source_bytes / 1e9:.2f}", f"{what.output_bytes / 1e9:.{decimals}f}") == (source, output)


@pytest.mark.parametrize("model", MTP_BYTES)
def test_an_mtp_head_adds_its_bytes_to_both_sides_and_nothing_to_a_tokens(model: str) -> None:
    without = plan(*census(published_config(model)), RECIPES["rtn-a16"])
    with_mtp = plan(*census(published_config(model), with_mtp=True), RECIPES["rtn-a16"])
    assert with_mtp.num_tensors - without.num_tensors == 15
    assert with_mtp.num_quantized == without.num_quantized
    assert with_mtp.source_bytes - without.source_bytes == MTP_BYTES[model]
    assert with_mtp.output_bytes - without.output_bytes == MTP_BYTES[model]
    assert with_mtp.output_traffic == without.output_traffic


def test_without_a_recipe_everything_is_kept() -> None:
    config, tensors = census(tiny_config("qwen3.6-35b-a3b"))
    what = plan(config, tensors, None)
    assert what.num_quantized == 0
    assert {count.format for count in what.counts} == {"kept"}
    assert what.output_bytes == what.source_bytes
    assert what.output_traffic == what.source_traffic


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_a_plans_totals_are_those_of_the_tensors_that_a_build_would_quantize(
    recipe: Recipe,
) -> None:
    config, tensors = census(tiny_config("qwen3.6-35b-a3b"), with_mtp=True)
    what = plan(config, tensors, recipe)
    chosen = {tensor.name: form for tensor, form in quantized(tensors, recipe)}
    assert what.num_quantized == len(chosen)
    saved = sum(
        tensor.num_bytes - sum(form.num_bytes(linear.out_features, linear.in_features) for linear in tensor.linears)
        for tensor, form in quantized(tensors, recipe)
    )
    assert what.source_bytes - what.output_bytes == saved > 0


def test_a_width_that_is_no_multiple_of_16_is_a_user_error_that_names_the_tensor_and_a_remedy() -> None:
    config = tiny_config("qwen3.5-9b")
    config["text_config"]["intermediate_size"] = 88
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.down_proj\.weight has rows of 88 weights") as caught:
        plan(*census(config), RECIPES["rtn-a16"])
    assert "keeps mlp.down_proj" in caught.value.remedy


def test_an_fp8_weight_may_have_any_width() -> None:
    config = tiny_config("qwen3.6-35b-a3b")
    config["text_config"]["shared_expert_intermediate_size"] = 40
    what = plan(*census(config), RECIPES["mixed-fp8"])
    down = next(count for count in what.counts if count.role == "mlp.shared_expert.down_proj")
    assert down.output_bytes == 4 * (64 * 40 + 64 * 2)


def test_a_tensor_of_a_linear_role_that_is_no_matrix_is_a_user_error() -> None:
    config, _ = census(tiny_config("qwen3.5-9b"))
    tensors = source_tensors(FAMILY, [("model.language_model.layers.0.mlp.up_proj.weight", (16,), 32)])
    with pytest.raises(UserError, match=r"up_proj\.weight has shape \[16\], which is no linear layer's"):
        plan(config, tensors, RECIPES["rtn-a16"])


def test_an_unknown_recipe_is_answered_with_the_nearest() -> None:
    assert recipe_named("w4a4") is RECIPES["w4a4"]
    with pytest.raises(UserError, match="There is no recipe 'rtn-a17'") as caught:
        recipe_named("rtn-a17")
    assert caught.value.remedy.startswith("Did you mean 'rtn-a16'?")


# What calibration holds in memory, by hand for a model of hidden width 64.


def memory(name: str, codes: str, scales: str = "absmax", model: str = "qwen3.5-9b") -> CalibrationMemory:
    config, _ = census(tiny_config(model))
    recipe = RECIPES[name].with_method(scales, codes)
    return calibration_memory(config, recipe, batch_tokens=100, hidden_bytes=5000, item_bytes=4)


def test_one_layer_is_the_largest_once_or_twice_where_the_unquantized_one_goes_along() -> None:
    mlp, norms = 3 * 96 * 64, 2 * 64
    attention = 64 * (2 * 128 + 2 * 64 + 128) + 2 * 32  # q with its gate, k, v, o; the norms of q and k
    deltanet = (
        64 * (128 + 64 + 2 * 4 + 64) + 128 * 4 + 2 * 4 + 16
    )  # qkv, z, a and b, out; conv1d, A_log and dt_bias, norm
    layer = 4 * (mlp + norms + max(attention, deltanet))
    assert memory("w4a4", "rtn").layer == layer
    assert memory("w4a4", "gptq").layer == 2 * layer


def test_experts_stay_in_the_16_bits_they_are_stored_in() -> None:
    """Of 4 experts of width 32, 3 x 4 x 32 x 64 weights are 2 bytes smaller each than in float32."""
    wide = memory("w4a4", "rtn", model="qwen3.6-35b-a3b").layer
    router, shared, gate = 4 * 64, 3 * 48 * 64, 64
    attention = 64 * (2 * 128 + 2 * 64 + 128) + 2 * 32
    assert wide == 4 * (router + shared + gate + attention + 2 * 64) + 2 * 3 * 4 * 32 * 64


def test_statistics_are_two_matrices_an_input_for_gptq_a_row_for_the_weighted_search_and_else_nothing() -> None:
    widths = (64, 128, 64, 96)  # into qkv, o, gate and up, down
    assert memory("w4a4", "gptq").statistics == 2 * 4 * sum(width**2 for width in widths)
    assert memory("w4a4", "rtn", "weighted-search").statistics == 4 * sum(widths)
    assert memory("w4a4", "rtn").statistics == 0
    # Every expert has statistics of its own for its down projection, and all of them one for their input.
    widths = (64, 128, 64, 64, 48, *[32] * 4)  # qkv, o; experts, shared gate and up, shared down; experts' down
    assert memory("w4a4", "gptq", model="qwen3.6-35b-a3b").statistics == 2 * 4 * sum(width**2 for width in widths)


def test_a_calibration_larger_than_memory_is_refused_and_one_that_fits_is_not() -> None:
    needed = memory("w4a4", "gptq")
    assert needed.hidden == 5000
    parts = needed.layer + needed.statistics + needed.work + needed.activations + needed.hidden + needed.interpreter
    assert needed.total == parts
    check_memory(needed, needed.total)
    with pytest.raises(UserError, match=r"Calibrating takes about 1\.1 GB of memory") as caught:
        check_memory(needed, needed.total - 1)
    assert "hidden_memory_gb" in caught.value.remedy


def test_on_an_accelerator_only_what_it_holds_counts_against_its_memory() -> None:
    needed = CalibrationMemory(layer=5, statistics=4, work=3, activations=2, hidden=10, interpreter=6)
    assert (needed.on_accelerator, needed.total) == (14, 30)
    check_memory(needed, available=16, on_accelerator=14)
    with pytest.raises(UserError, match="of the GPU") as refused:
        check_memory(needed, available=10**9, on_accelerator=13)
    assert "--device cpu" in refused.value.remedy
    with pytest.raises(UserError, match="GB of memory"):
        check_memory(needed, available=15, on_accelerator=10**9)


def test_a_plan_says_what_the_gpu_of_this_machine_would_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA GeForce RTX 5090, 580.95.05, 32607, 32, 12.0'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert main(["plan", "demo:dense", "--recipe", "w4a4"]) == 0
    told = capsys.readouterr().out
    assert "NVIDIA GeForce RTX 5090 holds" in told and "has 33.55 MB free: lower --batch-tokens" in told
