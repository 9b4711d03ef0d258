"""The auditor finds what was planted and says what it will do in vLLM; a sound artifact passes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from harness.audit.keys import expect, key_findings
from harness.audit.matching import Reader, engine_layers, idle_entries, matching_findings
from harness.audit.verify import Verification, verify
from harness.errors import UserError
from harness.formats import nvfp4
from harness.formats.config import QuantizationConfig, parse, quantization_config
from harness.model.families import parse_config
from harness.model.families.qwen35 import FAMILY
from harness.model.family import ModelConfig
from harness.quantize.build import build
from harness.quantize.recipes import RECIPES
from tests.artifacts import INPUT_SCALE, Tensors, change, quiet, write_artifact, write_source
from tests.conftest import published_config

GATE = "model.language_model.layers.0.mlp.gate_proj"
UP = "model.language_model.layers.0.mlp.up_proj"
QUERY = "model.language_model.layers.3.self_attn.q_proj"
EXPERTS = "model.language_model.layers.1.mlp.experts"
PUBLISHED = ("qwen3.5-9b", "qwen3.5-27b", "qwen3.6-35b-a3b")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One shard, so that a test can edit the artifact's."""
    return write_source(tmp_path_factory.mktemp("verify") / "source", "qwen3.5-9b")


@pytest.fixture(scope="module")
def sound(source: Path) -> Path:
    return build(source, RECIPES["rtn-a16"], source.parent / "artifact", quiet).folder


@pytest.fixture
def artifact(sound: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(sound, tmp_path / "artifact"))


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))


def found(outcome: Verification, tensor: str) -> str:
    """The one finding about a tensor, as a sentence."""
    (finding,) = [one for one in outcome.findings if one.tensor == tensor]
    return f"{finding.severity}: {finding.problem}: {finding.consequence}"


def test_a_sound_artifact_passes_with_its_source_and_alone(sound: Path, source: Path) -> None:
    assert verify(sound, source, quiet).findings == ()
    assert verify(sound, None, quiet).findings == ()


def test_round_trip_errors_are_those_of_the_decoded_weights(sound: Path, source: Path) -> None:
    (shard,), (original,) = sound.glob("*.safetensors"), source.glob("*.safetensors")
    stored, weights = load_file(shard), load_file(original)
    names = [name.removesuffix(".weight") for name in weights if name.endswith("layers.3.self_attn.k_proj.weight")]
    (name,) = [name for name in names if name.startswith("model.")]
    decoded = nvfp4.decode(
        stored[f"{name}.weight_packed"],
        stored[f"{name}.weight_scale"],
        stored[f"{name}.weight_global_scale"],
        torch.float64,
    )
    error = (decoded - weights[f"{name}.weight"].double()).abs()
    (trip,) = [trip for trip in verify(sound, source, quiet).round_trips if trip.role == "self_attn.k_proj"]
    assert trip.max_abs_error == pytest.approx(float(error.max()), rel=1e-5)
    assert trip.mean_abs_error == pytest.approx(float(error.mean()), rel=1e-5)
    norm = float(weights[f"{name}.weight"].double().norm())
    assert trip.relative_l2_error == pytest.approx(float(error.norm()) / norm, rel=1e-5)
    assert trip.snr_db == pytest.approx(20 * torch.log10(norm / error.norm()).item(), rel=1e-5)


def test_unequal_scales_of_fused_layers_are_found_with_their_ratio(artifact: Path) -> None:
    change(artifact, lambda tensors: tensors[f"{UP}.weight_global_scale"].mul_(4))
    fused = "model.language_model.layers.0.mlp.gate_up_proj.weight_global_scale"
    assert "4 times too small" in found(verify(artifact, None, quiet), fused)


def test_an_inverted_global_scale_is_found(artifact: Path) -> None:
    def invert(tensors: Tensors) -> None:
        for module in (GATE, UP):
            tensors[f"{module}.weight_global_scale"].reciprocal_()

    change(artifact, invert)
    assert "reciprocal" in found(verify(artifact, None, quiet), f"{GATE}.weight_global_scale")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_global_scale_that_is_no_positive_number_is_found(artifact: Path, value: float) -> None:
    change(artifact, lambda tensors: tensors[f"{QUERY}.weight_global_scale"].fill_(value))
    outcome = verify(artifact, None, quiet)
    assert f"is {value}" in found(outcome, f"{QUERY}.weight_global_scale")


@pytest.mark.parametrize(("code", "word"), [(0x7F, "NaN"), (0x00, "zeros"), (0x81, "negative")])
def test_a_bad_block_scale_is_found_and_counted(artifact: Path, code: int, word: str) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors[f"{GATE}.weight_scale"].view(torch.uint8)[:2, 0] = code

    change(artifact, spoil)
    sentence = found(verify(artifact, None, quiet), f"{GATE}.weight_scale")
    assert word in sentence
    assert "in 2 of" in sentence


def test_a_missing_tensor_is_found(artifact: Path) -> None:
    change(artifact, lambda tensors: tensors.pop(f"{GATE}.weight_scale"))
    assert "uninitialised" in found(verify(artifact, None, quiet), f"{GATE}.weight_scale")


def test_a_tensor_that_nothing_calls_for_is_found(artifact: Path) -> None:
    change(artifact, lambda tensors: tensors.update(stray=torch.zeros(1)))
    assert found(verify(artifact, None, quiet), "stray").startswith("warning")


def test_a_wrong_shape_and_a_wrong_dtype_are_found(artifact: Path) -> None:
    norm = "model.language_model.norm.weight"

    def spoil(tensors: Tensors) -> None:
        tensors[norm] = torch.zeros(3, dtype=torch.bfloat16)
        tensors[f"{GATE}.weight_packed"] = tensors[f"{GATE}.weight_packed"].view(torch.int8)

    change(artifact, spoil)
    outcome = verify(artifact, None, quiet)
    assert "shape [3]" in found(outcome, norm)
    assert "stored as I8" in found(outcome, f"{GATE}.weight_packed")


def test_a_head_of_another_width_stops_vllm_only_where_it_speculates(artifact: Path) -> None:
    name = "mtp.layers.0.mlp.down_proj.weight"
    change(artifact, lambda tensors: tensors.update({name: tensors[name][:, :32].contiguous()}))
    outcome = verify(artifact, None, quiet)
    assert outcome.passed
    assert "vLLM stops while loading where it speculates" in found(outcome, name)


def test_a_lost_mtp_head_is_an_error_where_the_source_has_one(artifact: Path, source: Path) -> None:
    def drop(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith("mtp.")]:
            del tensors[name]

    change(artifact, drop)
    assert "error" in found(verify(artifact, source, quiet), "mtp.*")
    assert "warning" in found(verify(artifact, None, quiet), "mtp.*")


def test_parts_that_the_configuration_lost_too_are_missed_by_the_source(artifact: Path, source: Path) -> None:
    def drop(tensors: Tensors) -> None:
        for name in [name for name in tensors if "visual" in name or name.startswith("mtp.")]:
            del tensors[name]

    def forget(config: dict[str, Any]) -> None:
        del config["vision_config"]
        config["text_config"]["mtp_num_hidden_layers"] = 0

    change(artifact, drop)
    edit_config(artifact, forget)
    errors = [one.tensor for one in verify(artifact, source, quiet).findings if one.severity == "error"]
    assert "mtp.fc.weight" in errors
    assert "model.visual.pos_embed.weight" in errors


def test_codes_in_the_wrong_order_are_found_by_the_source(artifact: Path, source: Path) -> None:
    def swap_nibbles(tensors: Tensors) -> None:
        packed = tensors[f"{QUERY}.weight_packed"]
        tensors[f"{QUERY}.weight_packed"] = (packed << 4) | (packed >> 4)

    change(artifact, swap_nibbles)
    assert "times its own norm" in found(verify(artifact, source, quiet), QUERY)


def test_a_layer_of_bad_scales_has_no_round_trip_error_but_the_others_have(artifact: Path, source: Path) -> None:
    change(artifact, lambda tensors: tensors[f"{QUERY}.weight_global_scale"].zero_())
    outcome = verify(artifact, source, quiet)
    assert not outcome.passed
    roles = {trip.role for trip in outcome.round_trips}
    assert "self_attn.q_proj" not in roles
    assert "self_attn.k_proj" in roles
    assert all(torch.isfinite(torch.tensor(trip.relative_l2_error)) for trip in outcome.round_trips)


def to_fp8(folder: Path) -> None:
    """Stores every down_proj as FP8 per channel, as a mixed checkpoint of another tool would be."""

    def convert(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("mlp.down_proj.weight_packed") and "mtp" not in name]:
            module = name.removesuffix(".weight_packed")
            scale = tensors.pop(f"{module}.weight_global_scale")
            weight = nvfp4.decode(tensors.pop(name), tensors.pop(f"{module}.weight_scale"), scale, torch.float32)
            channel = (weight.abs().amax(1, keepdim=True) / 448).bfloat16()
            tensors[f"{module}.weight"] = (weight / channel.float()).to(torch.float8_e4m3fn)
            tensors[f"{module}.weight_scale"] = channel

    def regroup(config: dict[str, Any]) -> None:
        quantization = config["quantization_config"]
        groups = quantization["config_groups"]
        quantization["format"] = "mixed-precision"
        groups["group_0"]["targets"].remove(r"re:.*mlp\.down_proj$")
        eight = {"num_bits": 8, "type": "float", "symmetric": True}
        groups["group_1"] = {
            "targets": [r"re:.*mlp\.down_proj$"],
            "format": "float-quantized",
            "weights": {**eight, "strategy": "channel", "dynamic": False},
            "input_activations": {**eight, "strategy": "token", "dynamic": True},
        }

    change(folder, convert)
    edit_config(folder, regroup)


def test_a_sound_fp8_group_passes_with_its_source_and_its_bad_scales_are_found(artifact: Path, source: Path) -> None:
    to_fp8(artifact)
    outcome = verify(artifact, source, quiet)
    assert outcome.findings == ()
    assert {trip.format for trip in outcome.round_trips if trip.role == "mlp.down_proj"} == {"FP8_DYNAMIC"}
    name = "model.language_model.layers.1.mlp.down_proj.weight_scale"
    change(artifact, lambda tensors: tensors[name][3].fill_(torch.nan))
    assert "in 1 of" in found(verify(artifact, source, quiet), name)


def test_one_changed_bit_in_a_kept_tensor_is_found_by_the_source(artifact: Path, source: Path) -> None:
    name = "model.visual.merger.linear_fc1.weight"
    change(artifact, lambda tensors: tensors[name].view(torch.int16)[0, 0].bitwise_xor_(1))
    assert "not identical" in found(verify(artifact, source, quiet), name)
    assert verify(artifact, None, quiet).passed


def test_changed_and_missing_tokenizer_files_are_found(artifact: Path, source: Path) -> None:
    (artifact / "tokenizer.json").write_text("{}")
    (artifact / "chat_template.jinja").unlink()
    outcome = verify(artifact, source, quiet)
    assert "not identical" in found(outcome, "tokenizer.json")
    assert "missing" in found(outcome, "chat_template.jinja")


def test_a_changed_configuration_is_found(artifact: Path, source: Path) -> None:
    edit_config(artifact, lambda config: config.update(image_token_id=7))
    assert "image_token_id" in found(verify(artifact, source, quiet), "config.json")


def test_a_kv_cache_scheme_is_found(artifact: Path) -> None:
    edit_config(artifact, lambda config: config["quantization_config"].update(kv_cache_scheme={"num_bits": 8}))
    assert "FP8" in found(verify(artifact, None, quiet), "config.json")


def test_shards_of_one_fused_layer_in_two_formats_are_found(artifact: Path) -> None:
    def split(config: dict[str, Any]) -> None:
        groups = config["quantization_config"]["config_groups"]
        groups["group_1"] = {
            **groups["group_0"],
            "targets": [r"re:.*mlp\.up_proj$"],
            "input_activations": {**groups["group_0"]["weights"], "dynamic": "local"},
        }
        groups["group_0"]["targets"] = [r"re:.*mlp\.gate_proj$"]

    edit_config(artifact, split)
    sentence = found(verify(artifact, None, quiet), "model.language_model.layers.0.mlp.gate_up_proj")
    assert "NVFP4A16" in sentence
    assert "refuses" in sentence


def test_a_text_only_key_layout_is_one_finding_and_not_thousands(artifact: Path) -> None:
    def strip(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[name.replace("model.language_model.", "model.")] = tensors.pop(name)

    change(artifact, strip)
    errors = [one for one in verify(artifact, None, quiet).findings if one.severity == "error"]
    assert [one.tensor for one in errors] == ["model.layers.…"]


def test_an_index_that_disagrees_with_its_shard_is_found(artifact: Path) -> None:
    index = artifact / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["ghost"] = next(iter(content["weight_map"].values()))
    index.write_text(json.dumps(content))
    assert any("ghost" in one.problem for one in verify(artifact, None, quiet).findings)


def test_what_cannot_be_checked_is_refused_in_one_sentence(source: Path, sound: Path) -> None:
    with pytest.raises(UserError, match="no compressed-tensors quantization_config"):
        verify(source, None, quiet)
    with pytest.raises(UserError, match="quantized itself"):
        verify(sound, sound, quiet)


@pytest.fixture(scope="module")
def moe_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("moe") / "source", "qwen3.6-35b-a3b")


@pytest.fixture(scope="module")
def sound_moe(moe_source: Path) -> Path:
    """Experts in W4A4, attention and the shared expert in FP8."""
    return write_artifact(moe_source, moe_source.parent / "artifact", RECIPES["mixed-fp8"])


@pytest.fixture
def moe(sound_moe: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(sound_moe, tmp_path / "moe"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_sound_artifacts_of_every_recipe_pass_without_findings(
    recipe: str, source: Path, moe_source: Path, tmp_path: Path
) -> None:
    for original in (source, moe_source):
        folder = write_artifact(original, tmp_path / original.parent.name, RECIPES[recipe])
        for outcome in (verify(folder, original, quiet), verify(folder, None, quiet)):
            assert outcome.findings == ()
            assert outcome.num_quantized_modules > 0


def test_the_experts_of_the_35b_shape_have_122880_keys() -> None:
    config = parse_config(published_config("qwen3.6-35b-a3b"), "here")
    recipe = RECIPES["w4a4"]
    quantization = parse(quantization_config(recipe.targets(FAMILY), recipe.ignored(FAMILY)), "here")
    expectation = expect(config, quantization, {}, with_mtp=True)
    keys = [name for name in expectation.tensors if ".experts." in name and not name.startswith("mtp.")]
    assert len(keys) == 256 * 40 * 3 * 4 == 122_880
    assert f"{EXPERTS}.255.up_proj.input_global_scale" in keys
    (vision,) = [one for one in key_findings({}, expectation, source_has_mtp=None) if one.tensor == "model.visual.*"]
    assert "333 tensors" in vision.problem


def test_a_lost_vision_tower_is_one_finding(artifact: Path) -> None:
    def drop(tensors: Tensors) -> None:
        for name in [name for name in tensors if "visual" in name]:
            del tensors[name]

    change(artifact, drop)
    outcome = verify(artifact, None, quiet)
    assert "does not see" in found(outcome, "model.visual.*")
    assert not [one for one in outcome.findings if one.tensor.startswith("model.visual.") and one.tensor[-1] != "*"]


def test_experts_missing_from_a_layer_are_one_finding_with_their_number(moe: Path) -> None:
    def drop(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith((f"{EXPERTS}.1.", f"{EXPERTS}.3."))]:
            del tensors[name]

    change(moe, drop)
    errors = [one for one in verify(moe, None, quiet).findings if one.severity == "error"]
    # Two experts of three projections of three tensors; the missing scales of activations are told apart.
    assert [one.problem for one in errors] == [
        "is missing, and so 17 more of this layer, in 2 experts",
        "is missing, the calibrated scale of the activations, which its group (W4A4) calls for, "
        "and so 5 more of this layer, in 2 experts",
    ]
    assert errors[0].tensor == f"{EXPERTS}.1.gate_proj.weight_packed"


def test_fused_experts_under_a_group_of_single_ones_are_found(moe: Path, moe_source: Path) -> None:
    name, fused = f"{EXPERTS}.down_proj", load_file(next(moe_source.glob("*.safetensors")))
    change(moe, lambda tensors: tensors.update({name: fused[name]}))
    assert "left over" in found(verify(moe, None, quiet), name)

    def undo_experts(tensors: Tensors) -> None:
        for one in [one for one in tensors if one.startswith(f"{EXPERTS}.") and ".down_proj." in one]:
            del tensors[one]

    change(moe, undo_experts)
    for outcome in (verify(moe, None, quiet), verify(moe, moe_source, quiet)):
        errors = [one for one in outcome.findings if one.severity == "error"]
        assert [one.tensor for one in errors] == [name]
        assert "16-bit weight of all experts, but group_0 targets each" in errors[0].problem


def test_kept_experts_may_be_stored_apart(moe: Path, moe_source: Path) -> None:
    weights = load_file(next(moe_source.glob("*.safetensors")))

    def split(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(f"{EXPERTS}.")]:
            del tensors[name]
        for expert in range(4):
            gate, up = weights[f"{EXPERTS}.gate_up_proj"][expert].chunk(2)
            down = weights[f"{EXPERTS}.down_proj"][expert]
            for shard, weight in (("gate", gate), ("up", up), ("down", down)):
                tensors[f"{EXPERTS}.{expert}.{shard}_proj.weight"] = weight.clone()

    change(moe, split)
    edit_config(moe, lambda config: config["quantization_config"]["ignore"].append(r"re:.*layers\.1\.mlp\.experts\..*"))
    assert verify(moe, None, quiet).findings == ()


def test_bad_block_scales_of_many_experts_are_one_finding(moe: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        for expert in range(3):
            tensors[f"{EXPERTS}.{expert}.down_proj.weight_scale"].view(torch.uint8)[: expert + 1, 0] = 0x7F

    change(moe, spoil)
    sentence = found(verify(moe, None, quiet), f"{EXPERTS}.0.down_proj.weight_scale")
    assert "NaN in 1 of" in sentence
    assert "and so 2 more of this layer, in 3 experts" in sentence


def test_unequal_scales_of_one_expert_are_found(moe: Path) -> None:
    change(moe, lambda tensors: tensors[f"{EXPERTS}.2.up_proj.weight_global_scale"].mul_(2))
    assert "2 times too small" in found(verify(moe, None, quiet), f"{EXPERTS}.2.w13.weight_global_scale")


@pytest.mark.parametrize("value", [INPUT_SCALE * 1001, INPUT_SCALE / 1001, 1.0])
def test_an_expert_that_no_token_reached_is_found(moe: Path, value: float) -> None:
    name = f"{EXPERTS}.3.down_proj.input_global_scale"
    change(moe, lambda tensors: tensors[name].fill_(value))
    outcome = verify(moe, None, quiet)
    sentences = [f"{one.problem}: {one.consequence}" for one in outcome.findings if one.tensor == name]
    assert any("median of the layer's experts is 96" in sentence for sentence in sentences)
    assert not any(one.tensor.startswith(EXPERTS) and one.tensor != name for one in outcome.findings)


def test_experts_within_the_bound_are_not_found(moe: Path) -> None:
    name = f"{EXPERTS}.3.down_proj.input_global_scale"
    change(moe, lambda tensors: tensors[name].fill_(INPUT_SCALE * 90))
    assert verify(moe, None, quiet).findings == ()


def test_a_missing_scale_of_activations_is_named_as_such(moe: Path, artifact: Path) -> None:
    name = f"{EXPERTS}.0.down_proj.input_global_scale"
    change(moe, lambda tensors: tensors.pop(name))
    assert "calibrated scale of the activations" in found(verify(moe, None, quiet), name)


def test_the_names_of_model_optimizer_are_told_with_their_meaning(artifact: Path) -> None:
    def rename(tensors: Tensors) -> None:
        scale = tensors.pop(f"{QUERY}.weight_global_scale")
        tensors[f"{QUERY}.weight_scale_2"] = 1 / scale

    change(artifact, rename)
    outcome = verify(artifact, None, quiet)
    assert "reciprocal of weight_global_scale" in found(outcome, f"{QUERY}.weight_scale_2")
    assert "is missing" in found(outcome, f"{QUERY}.weight_global_scale")


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_nan_codes_in_fp8_weights_are_found_and_counted(moe: Path, code: int) -> None:
    name = "model.language_model.layers.3.self_attn.o_proj.weight"
    change(moe, lambda tensors: tensors[name].view(torch.uint8)[2:4, 5].fill_(code))
    assert "holds NaN in 2 of" in found(verify(moe, None, quiet), name)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda scale: scale.reciprocal_(), "reciprocal"),
        (lambda scale: scale[1].neg_(), "no positive number in 1 of"),
        (lambda scale: scale[0].fill_(torch.inf), "no positive number in 1 of"),
    ],
)
def test_bad_fp8_scales_are_found(moe: Path, spoil: Callable[[torch.Tensor], object], words: str) -> None:
    name = "model.language_model.layers.3.self_attn.o_proj.weight_scale"
    change(moe, lambda tensors: spoil(tensors[name]))
    assert words in found(verify(moe, None, quiet), name)


def test_fp8_scales_of_another_type_or_shape_are_found(moe: Path) -> None:
    name = "model.language_model.layers.3.self_attn.o_proj.weight_scale"
    change(moe, lambda tensors: tensors.update({name: tensors[name].float()}))
    assert "F32 instead of BF16" in found(verify(moe, None, quiet), name)
    change(moe, lambda tensors: tensors.update({name: tensors[name].bfloat16()[:1]}))
    assert "has shape [1, 1]" in found(verify(moe, None, quiet), name)


def test_a_format_that_contradicts_its_groups_is_found(moe: Path) -> None:
    edit_config(moe, lambda config: config["quantization_config"].update(format="nvfp4-pack-quantized"))
    assert "float-quantized and nvfp4-pack-quantized" in found(verify(moe, None, quiet), "config.json")


def test_a_mixed_checkpoint_whose_group_names_no_format_is_found(moe: Path) -> None:
    edit_config(moe, lambda config: config["quantization_config"]["config_groups"]["group_1"].pop("format"))
    outcome = verify(moe, None, quiet)
    assert "group_1 has no format of its own" in found(outcome, "config.json")
    # What its layers hold is not checked, and not called surplus either.
    assert len(outcome.findings) == 1


def test_sixteen_bit_weights_under_a_group_are_one_finding(artifact: Path, source: Path) -> None:
    weights = load_file(next(source.glob("*.safetensors")))
    down = "model.language_model.layers.0.mlp.down_proj"

    def undo(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(f"{down}.")]:
            del tensors[name]
        tensors[f"{down}.weight"] = weights[f"{down}.weight"]

    change(artifact, undo)
    for outcome in (verify(artifact, None, quiet), verify(artifact, source, quiet)):
        assert len(outcome.findings) == 1
        sentence = found(outcome, f"{down}.weight")
        assert "is stored as a 16-bit weight, but group_0 (NVFP4A16) targets it" in sentence


def test_quantized_weights_that_the_configuration_ignores_are_one_finding(artifact: Path) -> None:
    down = "model.language_model.layers.0.mlp.down_proj"
    edit_config(artifact, lambda config: config["quantization_config"]["ignore"].append(down))
    outcome = verify(artifact, None, quiet)
    assert len(outcome.findings) == 1
    assert f"is stored quantized, but ignore lists it ({down})" in found(outcome, down)


def test_an_entry_that_names_nothing_is_found(artifact: Path) -> None:
    def add(config: dict[str, Any]) -> None:
        config["quantization_config"]["ignore"] += ["re:.*mpl.*", "model.language_model.layers.9.mlp.gate_proj"]
        config["quantization_config"]["config_groups"]["group_0"]["targets"].append("model.layers.0.mlp.up_proj")

    edit_config(artifact, add)
    outcome = verify(artifact, None, quiet)
    assert outcome.passed
    problems = [one.problem for one in outcome.findings]
    assert [problem.split("'")[1] for problem in problems] == [
        "re:.*mpl.*",
        "model.language_model.layers.9.mlp.gate_proj",
        "model.layers.0.mlp.up_proj",
    ]
    assert all("names no module" in problem for problem in problems)


def test_an_anchored_pattern_misses_the_names_inside_vllm(artifact: Path) -> None:
    def anchor(config: dict[str, Any]) -> None:
        targets = config["quantization_config"]["config_groups"]["group_0"]["targets"]
        targets[targets.index(r"re:.*mlp\.down_proj$")] = r"re:^model\.language_model\..*mlp\.down_proj$"

    edit_config(artifact, anchor)
    outcome = verify(artifact, None, quiet)
    assert not outcome.passed
    assert len(outcome.findings) == 1
    sentence = found(outcome, "model.language_model.layers.0.mlp.down_proj")
    assert "is NVFP4A16 by the checkpoint's names, and 16-bit by vLLM's own (and so 3 more layers)" in sentence


def test_half_of_a_fused_layer_ignored_stops_vllm(artifact: Path) -> None:
    edit_config(artifact, lambda config: config["quantization_config"]["ignore"].append(UP))
    outcome = verify(artifact, None, quiet)
    fused = found(outcome, "model.language_model.layers.0.mlp.gate_up_proj")
    assert "some shards ignored and others not" in fused
    assert "stops while loading" in fused
    assert "but ignore lists it" in found(outcome, UP)


def short_config(name: str) -> ModelConfig:
    """A published configuration with eight layers."""
    config = published_config(name)
    config["text_config"] |= {"num_hidden_layers": 8, "layer_types": None}
    return parse_config(config, "here")


def configured(groups: list[list[str]], ignore: list[str]) -> QuantizationConfig:
    """Groups of different formats with these targets: NVFP4A16, then NVFP4, then FP8."""
    forms = list(RECIPES["mixed-fp8"].targets(FAMILY))
    forms = [*RECIPES["rtn-a16"].targets(FAMILY), *forms][: len(groups)]
    return parse(quantization_config(dict(zip(forms, groups, strict=True)), ignore), "here")


REST = [r"re:.*mtp\..*", r"re:.*visual\..*", r"re:.*lm_head$", r"re:.*linear_attn\..*", r"re:.*self_attn\.o_proj$"]
NO_QKV = [*REST, r"re:.*self_attn\.(q|k|v|qkv)_proj$"]
MLP = r"re:.*mlp\.(gate|up|gate_up|down)_proj$"


@pytest.mark.parametrize(
    ("groups", "ignore", "severity", "words"),
    [
        # One list for all: shards alone, fused and shards, exact names, the class name.
        ([[MLP]], NO_QKV, None, ""),
        ([[r"re:.*mlp\.(gate|up|down)_proj$"]], NO_QKV, None, ""),
        ([["Linear"]], NO_QKV, None, ""),
        ([["Linear"]], ["lm_head", *NO_QKV], None, ""),
        # Only the fused form: vLLM finds it, the checkpoint's readers do not.
        (
            [[r"re:.*mlp\.gate_up_proj$", r"re:.*mlp\.down_proj$"]],
            NO_QKV,
            "error",
            "is 16-bit by the checkpoint's names",
        ),
        # Shards of one layer, of which one is named.
        ([[r"re:.*mlp\.(gate|down)_proj$"]], NO_QKV, "error", "is NVFP4A16 and 16-bit by the checkpoint's"),
        # An anchored entry of ignore.
        ([["Linear"]], [*REST, r"re:model\.language_model\..*\.(q|k|v)_proj$"], "error", "and NVFP4A16 by vLLM's own"),
        # Up to 0.26 the class name wins over shards; later the shards do.
        ([["Linear"], [r"re:.*self_attn\.(q|k|v)_proj$"]], REST, "warning", "and NVFP4A16 by vLLM's own"),
        ([["Linear"], [r"re:.*self_attn\.(q|k|v|qkv)_proj$"]], REST, "warning", "beside groups that name"),
        # Up to 0.26 a fused name in ignore is not looked at.
        ([[MLP]], [*REST, r"re:.*self_attn\.qkv_proj$"], "warning", "in ignore by its fused name alone"),
        # Two patterns for one layer: the alphabet decides here, the order of the file there.
        (
            [[r"re:.*mlp\.down_proj$", MLP], [r"re:.*\.0\.mlp\.down_proj$"]],
            NO_QKV,
            "error",
            "and NVFP4A16 by vLLM's own",
        ),
        # Nobody says anything about attention.
        ([[MLP]], REST, "warning", "neither targeted"),
    ],
)
def test_what_vllm_reads_differently_is_found(
    groups: list[list[str]], ignore: list[str], severity: str | None, words: str
) -> None:
    quantization = configured(groups, ignore)
    config = short_config("qwen3.5-9b")
    findings = list(matching_findings(FAMILY, quantization, expect(config, quantization, {}, with_mtp=True).meant))
    if severity is None:
        assert findings == []
        return
    assert words in findings[-1].problem
    assert {severity} == {one.severity for one in findings}


@pytest.mark.parametrize(
    ("targets", "ignore", "words"),
    [
        (r"re:.*mlp\.(experts\.\d+\.(gate|up|down)_proj|gate)$", [], "vLLM always loads it as 16-bit"),
        (r"re:.*mlp\.experts\.\d+\.(gate|up|down)_proj$", [r"re:.*experts\.0\..*"], "and 16-bit by vLLM's own"),
        (r"re:.*mlp\.experts\.\d+\.(gate|up)_proj$", [], "some formats ignored and others not"),
    ],
)
def test_all_experts_of_a_layer_take_the_first_ones_format(targets: str, ignore: list[str], words: str) -> None:
    router = [] if "gate)" in targets else [r"re:.*mlp\.gate$"]
    quantization = configured([[targets]], [*ignore, *NO_QKV, r"re:.*shared_expert.*", *router])
    config = short_config("qwen3.6-35b-a3b")
    findings = list(matching_findings(FAMILY, quantization, expect(config, quantization, {}, with_mtp=True).meant))
    assert len(findings) == 1
    assert words in findings[0].problem
    assert "7 more layers" in findings[0].problem


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_means_the_same_to_vllm_on_the_published_shapes(name: str, recipe: str) -> None:
    config = short_config(name)
    quantization = parse(quantization_config(RECIPES[recipe].targets(FAMILY), RECIPES[recipe].ignored(FAMILY)), "here")
    expectation = expect(config, quantization, {}, with_mtp=True)
    assert list(matching_findings(FAMILY, quantization, expectation.meant)) == []
    assert list(idle_entries(config, quantization, expectation.names)) == []


def test_exact_names_are_mapped_to_those_inside_vllm() -> None:
    assert FAMILY.engine_name(GATE) == "language_model.model.layers.0.mlp.gate_proj"
    assert FAMILY.engine_name("model.visual.merger.linear_fc1") == "visual.merger.linear_fc1"
    assert FAMILY.engine_name("lm_head") == "language_model.lm_head"
    assert FAMILY.engine_name("mtp.fc") == "mtp.fc"
    quantization = configured([[GATE, UP]], [])
    config = short_config("qwen3.5-9b")
    layers = engine_layers(FAMILY, expect(config, quantization, {}, with_mtp=False).meant)
    for up_to_026 in (True, False):
        reader = Reader(FAMILY, quantization, up_to_026=up_to_026)
        assert reader.read(layers["model.language_model.layers.0.mlp.gate_up_proj"]).form == "NVFP4A16"
        assert reader.read(layers["model.language_model.layers.1.mlp.gate_up_proj"]).outcome == "unmatched"
