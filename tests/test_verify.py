"""The auditor finds what was planted and says what it will do in vLLM; a sound artifact passes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.audit.verify import Verification, verify
from harness.demo.synthesize import synthesize
from harness.errors import UserError
from harness.formats import nvfp4
from harness.quantize.build import build
from harness.quantize.recipes import RECIPES
from tests.conftest import tiny_config

Tensors = dict[str, torch.Tensor]
GATE = "model.language_model.layers.0.mlp.gate_proj"
UP = "model.language_model.layers.0.mlp.up_proj"
QUERY = "model.language_model.layers.3.self_attn.q_proj"


def quiet(done: int, total: int, description: str) -> None:
    """A progress bar nobody looks at."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One shard, so that a test can edit the artifact's."""
    folder = tmp_path_factory.mktemp("verify") / "source"
    synthesize(tiny_config("qwen3.5-9b"), folder, num_layers=None, vocab_size=None, seed=1, progress=quiet)
    (folder / "tokenizer.json").write_text('{"model": {}}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture(scope="module")
def sound(source: Path) -> Path:
    return build(source, RECIPES["rtn-a16"], source.parent / "artifact", quiet).folder


@pytest.fixture
def artifact(sound: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(sound, tmp_path / "artifact"))


def change(folder: Path, edit: Callable[[Tensors], object]) -> None:
    """Edits the tensors of the only shard and keeps the index true to it."""
    (shard,) = folder.glob("*.safetensors")
    tensors = load_file(shard)
    edit(tensors)
    save_file(tensors, shard, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, shard.name)}))


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
