"""The table of tensors against transformers' own model classes, built on the meta device."""

import re
from collections import Counter
from typing import Any

import pytest
import torch
import transformers

from harness.errors import UserError
from harness.model.families import parse_config
from harness.model.families.qwen35 import FAMILY
from harness.model.family import expected_tensors
from harness.quantize.recipes import RECIPES
from tests.conftest import published_config, tiny_config

MODELS = ("qwen3.5-9b", "qwen3.5-27b", "qwen3.6-35b-a3b")
NUM_MTP_TENSORS = {"qwen3.5-9b": 15, "qwen3.5-27b": 15, "qwen3.6-35b-a3b": 19}


def meta_model(config: dict[str, Any]) -> torch.nn.Module:
    with torch.device("meta"):
        return getattr(transformers, config["architectures"][0])(transformers.AutoConfig.for_model(**config))


def tensors(model: str, *, with_mtp: bool = False) -> dict[str, tuple[int, ...]]:
    return dict(expected_tensors(parse_config(published_config(model), model), with_mtp=with_mtp))


@pytest.mark.parametrize(
    "config",
    [*(published_config(model) for model in MODELS), tiny_config("qwen3.5-9b"), tiny_config("qwen3.6-35b-a3b")],
    ids=[*MODELS, "tiny dense", "tiny moe"],
)
def test_expected_tensors_are_the_state_dict_of_transformers_own_class(config: dict[str, Any]) -> None:
    expected = list(expected_tensors(parse_config(config, "here"), with_mtp=False))
    state = {name: tuple(tensor.shape) for name, tensor in meta_model(config).state_dict().items()}
    assert dict(expected) == state
    assert len(expected) == len(state)


def test_tied_embeddings_and_a_missing_vision_tower_take_their_tensors_away() -> None:
    config = tiny_config("qwen3.5-9b")
    whole = dict(expected_tensors(parse_config(config, "here"), with_mtp=False))
    config["tie_word_embeddings"] = True
    tied = dict(expected_tensors(parse_config(config, "here"), with_mtp=False))
    assert set(whole) - set(tied) == {"lm_head.weight"}
    del config["vision_config"]
    text = dict(expected_tensors(parse_config(config, "here"), with_mtp=False))
    assert set(tied) - set(text) == {name for name in whole if "visual" in name}


def test_full_attention_layers_follow_layer_types_and_else_the_interval() -> None:
    config = tiny_config("qwen3.5-9b")
    assert parse_config(config, "here").full_attention_layers == (3,)
    config["text_config"]["layer_types"] = ["full_attention", *["linear_attention"] * 3]
    assert parse_config(config, "here").full_attention_layers == (0,)
    state = {name: tuple(tensor.shape) for name, tensor in meta_model(config).state_dict().items()}
    assert dict(expected_tensors(parse_config(config, "here"), with_mtp=False)) == state


@pytest.mark.parametrize("model", MODELS)
def test_the_mtp_head_is_a_decoder_layer_a_projection_and_three_norms(model: str) -> None:
    mtp = {name: shape for name, shape in tensors(model, with_mtp=True).items() if name.startswith("mtp.")}
    hidden = published_config(model)["text_config"]["hidden_size"]
    assert len(mtp) == NUM_MTP_TENSORS[model]
    assert mtp.pop("mtp.fc.weight") == (hidden, 2 * hidden)
    for norm in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        assert mtp.pop(f"mtp.{norm}.weight") == (hidden,)
    full = published_config(model)["text_config"]["full_attention_interval"] - 1
    layer = f"model.language_model.layers.{full}."
    trunk = {name.removeprefix(layer): shape for name, shape in tensors(model).items() if name.startswith(layer)}
    assert {name.removeprefix("mtp.layers.0."): shape for name, shape in mtp.items()} == trunk


def test_the_35b_model_has_the_tensors_that_its_published_card_counts() -> None:
    names = list(tensors("qwen3.6-35b-a3b"))
    assert len(names) == 1026
    assert sum("visual" in name for name in names) == 333
    assert sum("linear_attn" in name for name in names) == 270
    assert sum("norm" in name for name in names) == 241


def test_the_35b_models_experts_are_122880_nvfp4_keys_under_each_experts_own_name() -> None:
    keys = [
        f"{linear.module}.{stored.suffix}"
        for name, shape in tensors("qwen3.6-35b-a3b").items()
        if "mlp.experts" in name
        for linear in FAMILY.linears_of(name, shape)
        for stored in RECIPES["w4a4"].formats(FAMILY)[linear.role.name].stored(linear.out_features, linear.in_features)
    ]
    assert len(keys) == len(set(keys)) == 40 * 256 * 3 * 4 == 122_880
    pattern = re.compile(
        r"model\.language_model\.layers\.\d+\.mlp\.experts\.\d+\.(gate|up|down)_proj"
        r"\.(weight_packed|weight_scale|weight_global_scale|input_global_scale)"
    )
    assert all(pattern.fullmatch(key) for key in keys)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("prefix", ["model.language_model.", "model."])
def test_every_tensor_has_exactly_one_role_in_either_layout(model: str, prefix: str) -> None:
    for name in tensors(model, with_mtp=True):
        role = FAMILY.role_of(name.replace("model.language_model.", prefix))
        assert role is not None, name
        assert role is FAMILY.role_of(name)
        assert (
            len([r for r in FAMILY.roles if re.fullmatch(rf"(model\.(language_model\.)?)?({r.pattern})", name)]) == 1
        ), name


@pytest.mark.parametrize(
    "name",
    ["model.language_model.layers.0.self_attn.q_proj.bias", "transformer.h.0.attn.weight", "lm_head.bias", "xmtp.fc"],
)
def test_a_tensor_that_these_models_do_not_have_has_no_role(name: str) -> None:
    assert FAMILY.role_of(name) is None
    assert FAMILY.linears_of(name, (16, 16)) == ()


def test_modules_of_linears_are_the_linear_modules_of_transformers() -> None:
    """In the dense model; transformers keeps the experts of the other in one tensor."""
    model = meta_model(tiny_config("qwen3.5-9b"))
    modules = {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    expected = expected_tensors(parse_config(tiny_config("qwen3.5-9b"), "here"), with_mtp=False)
    ours = {
        linear.module: (linear.out_features, linear.in_features)
        for name, shape in expected
        if "visual.pos_embed" not in name
        for linear in FAMILY.linears_of(name, shape)
    }
    assert ours == modules


def test_fused_experts_are_sliced_into_gate_up_and_down_of_each_expert() -> None:
    gate_up = torch.arange(3 * 8 * 5).view(3, 8, 5)
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    linears = {linear.module: linear for linear in FAMILY.linears_of(name, tuple(gate_up.shape))}
    assert len(linears) == 6
    for expert in range(3):
        for shard, rows in (("gate_proj", gate_up[expert, :4]), ("up_proj", gate_up[expert, 4:])):
            linear = linears[f"model.language_model.layers.0.mlp.experts.{expert}.{shard}"]
            last = linear.first_row + linear.out_features
            assert torch.equal(gate_up.view(-1, linear.in_features)[linear.first_row : last], rows)
            assert linear.fused_into == f"model.language_model.layers.0.mlp.experts.{expert}.w13"


def test_layers_are_fused_as_vllm_fuses_them_and_never_across_layers() -> None:
    config = parse_config(tiny_config("qwen3.6-35b-a3b"), "here")
    sizes = Counter(
        linear.fused_into
        for name, shape in expected_tensors(config, with_mtp=False)
        for linear in FAMILY.linears_of(name, shape)
    )
    layer = "model.language_model.layers."
    several = {name for name, size in sizes.items() if size > 1}
    assert several == {
        f"{layer}3.self_attn.qkv_proj",
        *(f"{layer}{i}.linear_attn.in_proj_{fused}" for i in range(3) for fused in ("qkvz", "ba")),
        *(f"{layer}{i}.mlp.shared_expert.gate_up_proj" for i in range(4)),
        *(f"{layer}{i}.mlp.experts.{e}.w13" for i in range(4) for e in range(4)),
    }
    assert sizes[f"{layer}3.self_attn.qkv_proj"] == 3


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_a_recipe_gives_all_roles_of_a_fused_matrix_one_format(recipe: Any) -> None:
    assert set(recipe.formats(FAMILY)) <= {role.name for role in FAMILY.roles}
    matrices: dict[str, set[Any]] = {}
    for role in FAMILY.roles:
        if role.fused:
            matrices.setdefault((role.name.rpartition(".")[0], role.fused), set()).add(
                recipe.formats(FAMILY).get(role.name)
            )
    assert all(len(formats) == 1 for formats in matrices.values())


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "no architecture": ({"architectures": None}, "architecture None, which this harness does not know"),
    "another architecture": (
        {"architectures": ["LlamaForCausalLM"]},
        "'LlamaForCausalLM', which this harness does not",
    ),
    "text only": ({"text_config": None}, "has no text_config"),
    "no width": ({"text_config": {"hidden_size": None}}, r"text_config\.hidden_size is None, not a whole number"),
    "a fraction": ({"text_config": {"num_hidden_layers": 2.5}}, r"text_config\.num_hidden_layers is 2\.5, not a whole"),
    "true": ({"text_config": {"head_dim": True}}, r"text_config\.head_dim is True, not a whole number"),
    "vision": ({"vision_config": {"depth": "27"}}, r"vision_config\.depth is '27', not a whole number"),
}


@pytest.mark.parametrize(("change", "message"), BAD_CONFIGS.values(), ids=list(BAD_CONFIGS))
def test_a_configuration_of_something_else_is_a_user_error_that_names_it(change: dict[str, Any], message: str) -> None:
    config = tiny_config("qwen3.5-9b")
    for key, value in change.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    with pytest.raises(UserError, match=message) as caught:
        parse_config(config, "some/config.json")
    assert caught.value.problem.startswith("some/config.json")


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "KimiLinearForCausalLM", "Qwen4ExpForConditionalGeneration"])
def test_another_models_class_is_not_taken_for_one_of_these(name: str) -> None:
    with pytest.raises(
        UserError, match="Known: Qwen3NextForCausalLM, Qwen3_5ForCausalLM, Qwen3_5ForConditionalGeneration"
    ) as caught:
        parse_config({"architectures": [name]}, "here")
    assert "Did you mean" not in caught.value.remedy


def test_a_misspelt_architecture_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match="Did you mean 'Qwen3_5ForConditionalGeneration'"):
        parse_config({"architectures": ["Qwen3_5ForConditionalGenerations"]}, "here")
