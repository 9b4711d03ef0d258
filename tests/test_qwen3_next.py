"""Qwen3-Next from `plan` to `ppl`, on a tiny checkpoint that transformers' own class makes and saves.

The oracles are transformers: its state dict for names and shapes, its forward for probabilities, of the source and of
the source with what compressed-tensors decodes from an artifact.
"""

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM

from harness.audit.verify import Verification, verify
from harness.cli import main
from harness.engines.protocol import open_engine
from harness.errors import UserError
from harness.formats.config import parse
from harness.model.families import parse_config
from harness.model.families.qwen3_next import FAMILY
from harness.model.family import expected_tensors
from harness.model.sources import census_at
from harness.quantize.build import build
from harness.quantize.recipes import RECIPES
from tests.artifacts import quiet
from tests.oracles import oracle_model
from tests.qwen3_next import TINY, WINDOWS, calibration, config_json, save_source

LAYER = "model.layers."


@pytest.fixture(scope="module", autouse=True)
def uncompiled() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_source(tmp_path_factory.mktemp("next") / "source")


@pytest.fixture(scope="module", params=["rtn-a16", "w4a4", "w4a4-deltanet"])
def artifact(request: pytest.FixtureRequest, source: Path) -> tuple[str, Path]:
    """(recipe, folder) of a build."""
    out = source.parent / request.param
    build(source, RECIPES[request.param], out, quiet, calibration())
    return request.param, out


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=torch.tensor(WINDOWS)).logits.float()
    return found


def scores(table: torch.Tensor) -> np.ndarray[Any, Any]:
    """Log-probabilities [window, n - 1] of the windows' own tokens."""
    targets = torch.tensor(WINDOWS)[:, 1:, None]
    found: np.ndarray[Any, Any] = table.log_softmax(-1)[:, :-1].gather(2, targets)[..., 0].numpy()
    return found


def by_engine(name: str, folder: Path) -> np.ndarray[Any, Any]:
    engine = open_engine(name, folder, dtype="float32", device="cpu")
    return np.stack(list(engine.score(WINDOWS, 2)))


# -- Names and shapes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{}, {"decoder_sparse_step": 2, "mlp_only_layers": []}, {"tie_word_embeddings": True}, {"num_experts": 0}],
    ids=["mlp_only_layers", "decoder_sparse_step", "tied", "dense"],
)
def test_expected_tensors_are_the_state_dict_of_transformers_own_class(changes: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = Qwen3NextForCausalLM(Qwen3NextConfig(**TINY | changes))
    in_memory = replace(FAMILY.published, fused_experts=True)
    config = parse_config(config_json(**changes), "here")
    expected = dict(expected_tensors(config, with_mtp=False, layout=in_memory))
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if changes.get("tie_word_embeddings"):
        del state["lm_head.weight"]
    assert expected == state


def test_the_published_layout_is_what_transformers_saves(source: Path) -> None:
    saved = {name: tuple(one.shape) for name, one in load_file(source / "model.safetensors").items()}
    assert f"{LAYER}0.mlp.experts.3.gate_proj.weight" in saved
    assert f"{LAYER}1.mlp.gate_proj.weight" in saved
    assert dict(expected_tensors(parse_config(config_json(), "here"), with_mtp=False)) == saved
    assert len(census_at(source).tensors) == len(saved)


def test_a_model_of_the_published_size_has_a_role_for_each_of_its_74_000_tensors() -> None:
    """transformers' defaults are those of Qwen3-Next-80B-A3B."""
    config = parse_config(Qwen3NextConfig().to_dict() | {"architectures": ["Qwen3NextForCausalLM"]}, "here")
    names = [name for name, _ in expected_tensors(config, with_mtp=True)]
    assert sum("experts." in name and "mtp." not in name for name in names) == 48 * 512 * 3
    assert {FAMILY.part_of(name) for name in names} == {"trunk", "embedding", "head", "mtp"}
    assert None not in {FAMILY.role_of(name) for name in names}


def test_fused_projections_are_one_linear_layer_each_and_only_the_large_one_is_quantized() -> None:
    for name, quantizable in (("in_proj_qkvz", True), ("in_proj_ba", False)):
        (linear,) = FAMILY.linears_of(f"{LAYER}0.linear_attn.{name}.weight", (192, 64))
        assert (linear.module, linear.fused_into) == (f"{LAYER}0.linear_attn.{name}",) * 2
        assert linear.role.quantizable == quantizable


def test_experts_one_by_one_are_fused_as_vllm_fuses_them() -> None:
    found = {}
    for shard, shape in (("gate_proj", (32, 64)), ("up_proj", (32, 64)), ("down_proj", (64, 32))):
        (found[shard],) = FAMILY.linears_of(f"{LAYER}2.mlp.experts.3.{shard}.weight", shape)
    expert = f"{LAYER}2.mlp.experts.3"
    assert {shard: linear.fused_into for shard, linear in found.items()} == {
        "gate_proj": f"{expert}.w13",
        "up_proj": f"{expert}.w13",
        "down_proj": f"{expert}.down_proj",
    }
    assert {linear.expert for linear in found.values()} == {(f"{LAYER}2.mlp.experts", 3)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": None}, r"here: num_experts is None, not a whole number from 1"),
        ({"hidden_size": "64"}, r"here: hidden_size is '64', not a whole number"),
        ({"mlp_only_layers": "all"}, r"mlp_only_layers is 'all', not a list of layers"),
        ({"decoder_sparse_step": 0}, r"decoder_sparse_step is 0, not a whole number from 1"),
    ],
)
def test_a_configuration_that_is_not_complete_is_a_user_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_config(config_json() | changes, "here")


# -- Engines -----------------------------------------------------------------------------------------------------


def test_both_engines_give_the_sources_log_probabilities_as_transformers_does(source: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    expected = scores(logits(model))
    np.testing.assert_allclose(by_engine("torch", source), expected, atol=1e-5)
    np.testing.assert_array_equal(by_engine("streamed", source), by_engine("torch", source).astype(np.float32))


def test_an_artifact_scores_as_the_source_with_what_compressed_tensors_decodes(
    artifact: tuple[str, Path], source: Path
) -> None:
    recipe, folder = artifact
    expected = scores(logits(oracle_model(source, folder, RECIPES[recipe], torch.float32)))
    found = by_engine("torch", folder)
    assert abs(found - by_engine("torch", source)).mean() > 1e-3, "nothing is quantized"
    if recipe == "rtn-a16":
        np.testing.assert_allclose(found, expected, atol=1e-5)
    else:
        # Sums in another order differ in the last bit, and that bit may round an activation to the other side.
        assert np.median(abs(found - expected)) < 1e-4
        assert abs(found.mean() - expected.mean()) < 0.02 * abs(found - by_engine("torch", source)).mean()
    np.testing.assert_allclose(by_engine("streamed", folder), found, atol=1e-6)


def test_calibration_lowers_the_error_of_what_rounding_to_nearest_would_give(artifact: tuple[str, Path]) -> None:
    recipe, folder = artifact
    if recipe == "rtn-a16":
        return
    report = json.loads((folder / "harness-calibration.json").read_text())
    groups = [group for layer in report["layers"] for group in layer["groups"]]
    assert sum(group["error"] for group in groups) < sum(group["rtn_error"] for group in groups)
    assert [layer["routed"] is None for layer in report["layers"]] == [False, True, False, False]


# -- The artifact ------------------------------------------------------------------------------------------------


def checked(folder: Path, source: Path | None) -> Verification:
    return verify(folder, source, quiet)


def test_verify_finds_nothing_with_and_without_the_source(artifact: tuple[str, Path], source: Path) -> None:
    _, folder = artifact
    assert checked(folder, None).findings == checked(folder, source).findings == ()
    roles = {trip.role for trip in checked(folder, source).round_trips}
    assert {"self_attn.q_proj", "mlp.experts.gate_up_proj", "mlp.down_proj"} <= roles


def test_verify_finds_what_is_lost(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    build(source, RECIPES["rtn-a16"], folder, quiet)
    (shard,) = folder.glob("*.safetensors")
    tensors = load_file(shard)
    gone = [f"{LAYER}0.mlp.experts.{n}.gate_proj.weight_packed" for n in (1, 3)]
    save_file({name: tensor for name, tensor in tensors.items() if name not in gone}, shard, metadata={"format": "pt"})
    (finding,) = checked(folder, None).findings
    assert (finding.severity, finding.tensor) == ("error", gone[0])
    assert "1 more of this layer, in 2 experts" in finding.problem


def test_the_layout_is_what_vllm_loads(artifact: tuple[str, Path]) -> None:
    """vLLM 0.32, qwen3_next.py: modules keep the checkpoint's names, `in_proj_qkvz` and `in_proj_ba` are linear layers
    of one shard (packed_modules_mapping), experts load one by one, routers are 16-bit."""
    recipe, folder = artifact
    stored = {name for shard in folder.glob("*.safetensors") for name in load_file(shard)}
    quantized = {name.removesuffix(".weight_packed") for name in stored if name.endswith(".weight_packed")}
    attention = {f"{LAYER}3.self_attn.{shard}_proj" for shard in "qkvo"}
    deltanet = {f"{LAYER}{n}.linear_attn.{part}" for n in range(3) for part in ("in_proj_qkvz", "out_proj")}
    shards = ("gate_proj", "up_proj", "down_proj")
    experts = {f"{LAYER}{n}.mlp.experts.{e}.{shard}" for n in (0, 2, 3) for e in range(4) for shard in shards}
    shared = {f"{LAYER}{n}.mlp.shared_expert.{shard}" for n in (0, 2, 3) for shard in shards}
    dense = {f"{LAYER}1.mlp.{shard}" for shard in shards}
    assert quantized == attention | experts | shared | dense | (deltanet if recipe == "w4a4-deltanet" else set())
    kept = {name for name in stored if name.endswith(".weight")}
    assert {f"{LAYER}0.linear_attn.in_proj_ba.weight", f"{LAYER}0.mlp.gate.weight"} <= kept
    config = json.loads((folder / "config.json").read_text())
    read = parse(config["quantization_config"], "here")
    assert all(read.group_of(module) for module in quantized)
    assert not any(read.group_of(f"{LAYER}0.{kept}") for kept in ("linear_attn.in_proj_ba", "mlp.gate"))
    assert not any(pattern.startswith("re:.*visual") for pattern in read.ignore)


def test_an_mtp_head_is_kept_and_asked_for_only_where_somebody_tells_of_it(source: Path, tmp_path: Path) -> None:
    with_head = shutil.copytree(source, tmp_path / "source")
    expected = expected_tensors(parse_config(config_json(), "here"), with_mtp=True)
    head = {name: torch.zeros(shape).bfloat16() for name, shape in expected if name.startswith("mtp.")}
    assert "mtp.layers.0.mlp.experts.0.gate_proj.weight" in head
    tensors = load_file(source / "model.safetensors")
    save_file(tensors | head, with_head / "model.safetensors", metadata={"format": "pt"})
    build(with_head, RECIPES["rtn-a16"], tmp_path / "built", quiet)
    assert checked(tmp_path / "built", None).findings == checked(tmp_path / "built", with_head).findings == ()
    build(source, RECIPES["rtn-a16"], tmp_path / "lost", quiet)
    (lost,) = [one for one in checked(tmp_path / "lost", with_head).findings if one.tensor == "mtp.*"]
    assert "config.json" not in lost.problem
    assert (lost.severity, len(head)) == ("error", 29)
    np.testing.assert_array_equal(by_engine("torch", tmp_path / "built"), by_engine("torch", tmp_path / "lost"))


# -- The commands ------------------------------------------------------------------------------------------------


def test_the_commands_take_it_from_plan_to_ppl(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("The boat is on the river. " * 60)
    (tmp_path / "suite.toml").write_text(f"""
name = "next"
title = "x"
source.location = "{source}"
variants.a16.recipe = "rtn-a16"
engine = {{ dtype = "float32", device = "cpu" }}
[ppl]
text = {{ path = "text.txt" }}
protocols = ["wikitext2-512"]
batch_size = 2
""")

    def answer(*arguments: str) -> Any:
        assert main([*arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    plan = answer("plan", str(source), "--recipe", "rtn-a16")
    formats = {role["role"]: role["format"] for role in plan["roles"]}
    assert plan["architecture"] == "Qwen3NextForCausalLM"
    assert formats["mlp.experts.gate_up_proj"] == "NVFP4A16"
    assert formats["linear_attn.in_proj_qkvz"] == formats["linear_attn.in_proj_ba"] == "kept"
    answer("build", "--suite", "suite.toml")
    assert main(["verify", "artifacts/next/a16", "--source", str(source)]) == 0
    capsys.readouterr()
    (rows,) = answer("ppl", "--suite", "suite.toml")["tables"]
    found = {row["variant"]: row["ppl"] for row in rows}
    assert 1 < found["source"] < math.inf
    assert found["a16"] != found["source"]
    engine = open_engine("streamed", Path("artifacts/next/a16"), dtype="float32", device="cpu")
    assert engine.info.effective["model_class"] == "Qwen3NextForCausalLM"
