"""quantization_config against compressed-tensors: its own parser and its own matching are the oracle."""

from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, preset_name_to_scheme
from compressed_tensors.utils.match import is_match, match_name, match_targets

from harness.errors import UserError
from harness.formats.config import FORMATS, parse, quantization_config
from harness.formats.format import Format, num_bytes
from harness.model.families import parse_config
from harness.model.families.qwen35 import FAMILY
from harness.model.family import expected_tensors
from harness.quantize.recipes import RECIPES
from tests.conftest import published_config, tiny_config

LINEAR = torch.nn.Linear(1, 1)
ATTENTION, MLP, EXPERTS, SHARED, DELTANET = "attention", "mlp", "experts", "shared expert", "deltanet"
KEPT = "kept"

# Every linear layer of vLLM's models by its own name, fused forms included, and of MTP and vision.
LAYER = "language_model.model.layers.3."
VLLM_NAMES = {
    **dict.fromkeys((f"{LAYER}self_attn.{x}_proj" for x in ("qkv", "q", "k", "v", "o")), ATTENTION),
    **dict.fromkeys((f"{LAYER}mlp.{x}_proj" for x in ("gate_up", "gate", "up", "down")), MLP),
    **dict.fromkeys((f"{LAYER}mlp.experts.{e}.{x}_proj" for e in (0, 255) for x in ("gate", "up", "down")), EXPERTS),
    **dict.fromkeys((f"{LAYER}mlp.shared_expert.{x}_proj" for x in ("gate_up", "gate", "up", "down")), SHARED),
    **dict.fromkeys((f"{LAYER}linear_attn.{x}" for x in ("in_proj_qkvz", "in_proj_qkv", "in_proj_z")), DELTANET),
    f"{LAYER}linear_attn.out_proj": DELTANET,
    **dict.fromkeys((f"{LAYER}linear_attn.in_proj_{x}" for x in ("ba", "b", "a")), KEPT),
    **dict.fromkeys((f"{LAYER}mlp.gate", f"{LAYER}mlp.shared_expert_gate", "language_model.lm_head", "lm_head"), KEPT),
    **dict.fromkeys(("mtp.fc", "mtp.layers.0.self_attn.qkv_proj", "mtp.layers.0.mlp.gate_up_proj"), KEPT),
    **dict.fromkeys(("mtp.layers.0.mlp.gate", "mtp.layers.0.mlp.experts.7.up_proj"), KEPT),
    **dict.fromkeys(("visual.blocks.0.attn.qkv", "visual.blocks.0.mlp.linear_fc1", "visual.merger.linear_fc2"), KEPT),
    "model.visual.blocks.26.attn.proj": KEPT,
}
# What each recipe promises, written down a second time.
PROMISED = {
    "rtn-a16": dict.fromkeys((ATTENTION, MLP, EXPERTS, SHARED), "NVFP4A16"),
    "a16": dict.fromkeys((ATTENTION, MLP, EXPERTS, SHARED), "NVFP4A16"),
    "w4a4": dict.fromkeys((ATTENTION, MLP, EXPERTS, SHARED), "NVFP4"),
    "w4a4-experts": dict.fromkeys((ATTENTION, MLP, EXPERTS), "NVFP4"),
    "w4a4-deltanet": dict.fromkeys((ATTENTION, MLP, EXPERTS, SHARED, DELTANET), "NVFP4"),
    "mixed-fp8": dict.fromkeys((MLP, EXPERTS), "NVFP4") | dict.fromkeys((ATTENTION, SHARED), "FP8_DYNAMIC"),
}
FUSED = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
    "in_proj_qkvz": ["in_proj_qkv", "in_proj_z"],
    "in_proj_ba": ["in_proj_b", "in_proj_a"],
}


def recipe_config(name: str) -> dict[str, Any]:
    return quantization_config(RECIPES[name].targets(FAMILY), RECIPES[name].ignored(FAMILY))


def reference_scheme(config: QuantizationConfig, module: str) -> QuantizationScheme | None:
    """The scheme that compressed-tensors applies to linear layer `module`, as `apply_quantization_config` does."""
    schemes = {target: scheme for scheme in config.config_groups.values() for target in scheme.targets}
    if not is_match(module, LINEAR, schemes, config.ignore or ()):
        return None
    return schemes[match_targets(module, LINEAR, schemes)[0]]


def our_targets(config: dict[str, Any], module: str) -> list[str] | None:
    group = parse(config, "here").group_of(module)
    return None if group is None else list(group.targets)


def source_modules() -> list[str]:
    """Every linear layer of the tiny dense and MoE models by its name in the checkpoint."""
    return [
        linear.module
        for name in ("qwen3.5-9b", "qwen3.6-35b-a3b")
        for tensor, shape in expected_tensors(parse_config(tiny_config(name), name), with_mtp=True)
        for linear in FAMILY.linears_of(tensor, shape)
    ]


def test_every_recipe_is_promised_here() -> None:
    assert set(RECIPES) == set(PROMISED)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_configuration_of_a_recipe_is_one_of_compressed_tensors(recipe: str) -> None:
    written = recipe_config(recipe)
    config = QuantizationConfig.model_validate(written)
    assert config.quantization_status.value == "compressed"
    assert config.kv_cache_scheme is None
    assert config.format == ("mixed-precision" if recipe == "mixed-fp8" else "nvfp4-pack-quantized")
    assert not parse(written, "here").kv_cache_scheme


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_module_has_the_format_that_its_recipe_promises_under_every_name_and_for_every_reader(
    recipe: str,
) -> None:
    written = recipe_config(recipe)
    ours, reference = parse(written, "here"), QuantizationConfig.model_validate(written)
    for module, kind in VLLM_NAMES.items():
        group = ours.group_of(module)
        promised = PROMISED[recipe].get(kind, KEPT)
        assert (group.format.name if group and group.format else KEPT) == promised, module
    for module in [*VLLM_NAMES, *source_modules()]:
        scheme = reference_scheme(reference, module)
        assert our_targets(written, module) == (scheme.targets if scheme else None), module


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_layer_that_is_kept_is_ignored_by_name_since_vllm_up_to_0_20_stops_at_one_that_nothing_matches(
    recipe: str,
) -> None:
    ignore = recipe_config(recipe)["ignore"]
    for module, kind in VLLM_NAMES.items():
        assert any(match_name(module, pattern) for pattern in ignore) == (kind not in PROMISED[recipe]), module


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_fused_layer_and_its_shards_are_stored_alike(recipe: str) -> None:
    written = recipe_config(recipe)
    reference = QuantizationConfig.model_validate(written)
    for module in VLLM_NAMES:
        for fused, shards in FUSED.items():
            if module.endswith(f".{fused}"):
                names = [module, *(module.removesuffix(fused) + shard for shard in shards)]
                assert len({id(reference_scheme(reference, name)) for name in names}) == 1, module
                groups = {group.name if (group := parse(written, "").group_of(name)) else None for name in names}
                assert len(groups) == 1, module


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("model", ["qwen3.5-9b", "qwen3.5-27b", "qwen3.6-35b-a3b"])
def test_what_the_configuration_names_is_what_the_recipes_roles_quantize(model: str, recipe: str) -> None:
    ours = parse(recipe_config(recipe), "here")
    formats = RECIPES[recipe].formats(FAMILY)
    config = published_config(model)
    if "num_experts" in config["text_config"]:
        config["text_config"]["num_experts"] = 2
    for tensor, shape in expected_tensors(parse_config(config, model), with_mtp=True):
        for linear in FAMILY.linears_of(tensor, shape):
            group = ours.group_of(linear.module)
            assert (group.format if group else None) == formats.get(linear.role.name), linear.module


def group(form: Format, *targets: str) -> dict[str, Any]:
    return quantization_config({form: targets}, ())["config_groups"]["group_0"]


A16, W4A4, FP8 = FORMATS.values()
FOREIGN = {
    "a class name and an ignore list": {"g": group(W4A4, "Linear")},
    "patterns before the class name": {"a": group(W4A4, "Linear"), "b": group(FP8, r"re:.*self_attn\..*")},
    "an exact name before patterns": {"a": group(W4A4, "re:.*down_proj$"), "b": group(FP8, f"{LAYER}mlp.down_proj")},
    "two patterns for one module": {"a": group(W4A4, "re:.*proj$"), "b": group(FP8, r"re:.*mlp\.down_proj$")},
    "one target in two groups": {"a": group(W4A4, "re:.*o_proj$"), "b": group(FP8, "re:.*o_proj$")},
    "an anchored pattern": {"a": group(A16, r"re:^model\.language_model\..*q_proj$")},
}


@pytest.mark.parametrize("groups", FOREIGN.values(), ids=list(FOREIGN))
@pytest.mark.parametrize("ignore", [[], ["lm_head", r"re:.*visual\..*", f"{LAYER}self_attn.q_proj"]], ids=["", "some"])
def test_configurations_of_other_tools_resolve_as_compressed_tensors_resolves_them(
    groups: dict[str, Any], ignore: list[str]
) -> None:
    config = {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "config_groups": groups,
        "ignore": ignore,
    }
    reference = QuantizationConfig.model_validate(config)
    resolved = 0
    for module in [*VLLM_NAMES, *source_modules()]:
        scheme = reference_scheme(reference, module)
        assert our_targets(config, module) == (scheme.targets if scheme else None), module
        resolved += scheme is not None
    assert resolved


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
def test_a_format_has_the_arguments_of_the_preset_of_its_name(form: Format) -> None:
    scheme = QuantizationConfig.model_validate(quantization_config({form: ["Linear"]}, [])).config_groups["group_0"]
    preset = preset_name_to_scheme(form.name, ["Linear"])
    for ours, theirs in ((scheme.weights, preset.weights), (scheme.input_activations, preset.input_activations)):
        # How a quantizer observes data is no part of the format.
        observer = {"observer", "observer_kwargs"}
        assert (ours and ours.model_dump(exclude=observer)) == (theirs and theirs.model_dump(exclude=observer))


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
def test_a_format_is_recognised_from_its_configuration_and_only_from_it(form: Format) -> None:
    config = quantization_config({form: ["Linear"]}, [])
    assert parse(config, "here").groups[0].format is form
    config["config_groups"]["group_0"]["weights"]["group_size"] = 32
    assert parse(config, "here").groups[0].format is None


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
def test_a_format_stores_the_parameters_that_its_compressor_names(form: Format) -> None:
    scheme = QuantizationConfig.model_validate(quantization_config({form: ["Linear"]}, [])).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(form.compressor)
    stored = form.stored(128, 64)
    assert [tensor.suffix for tensor in stored] == list(compressor.compression_param_names(scheme))
    assert (
        form.num_bytes(128, 64)
        == {
            "NVFP4A16": 128 * 32 + 128 * 4 + 4,
            "NVFP4": 128 * 32 + 128 * 4 + 8,
            "FP8_DYNAMIC": 128 * 64 + 128 * 2,
        }[form.name]
    )


@pytest.mark.parametrize("config", [{}, {"quant_method": "modelopt"}, {"quant_method": "compressed-tensors"}], ids=str)
def test_another_tools_quantization_config_is_a_user_error_that_names_its_place(config: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"the/place.* quantization_config"):
        parse(config, "the/place")


def test_a_dtype_of_less_than_a_byte_has_no_size() -> None:
    with pytest.raises(KeyError):
        num_bytes("F4", (2,))
