"""Plans of the published models against the sizes that their cards state."""

import pytest

from harness.errors import UserError
from harness.model.census import source_tensors
from harness.quantize.plan import plan, quantized
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
        tensor.num_bytes
        - sum(s.num_bytes for li in tensor.linears for s in form.stored(li.out_features, li.in_features))
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
    tensors = source_tensors([("model.language_model.layers.0.mlp.up_proj.weight", (16,), 32)])
    with pytest.raises(UserError, match=r"up_proj\.weight has shape \[16\], which is no linear layer's"):
        plan(config, tensors, RECIPES["rtn-a16"])


def test_an_unknown_recipe_is_answered_with_the_nearest() -> None:
    assert recipe_named("w4a4") is RECIPES["w4a4"]
    with pytest.raises(UserError, match="There is no recipe 'rtn-a17'") as caught:
        recipe_named("rtn-a17")
    assert caught.value.remedy.startswith("Did you mean 'rtn-a16'?")
