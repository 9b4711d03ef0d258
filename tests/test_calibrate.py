"""Calibrated artifacts of the embedded models, against transformers' model holding the same quantized weights.

The oracle decodes weights by the format's equation, rounds inputs by hooks of its own and looks at what really goes
into each module; experts, which transformers computes in one piece, are computed here from their weights.
"""

import gc
import json
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForImageTextToText

from harness.audit.verify import verify
from harness.cli import main
from harness.demo import checkpoint_path
from harness.engines.emulation import ExpertRounding, round_expert_inputs
from harness.engines.layers import Half, TextModel
from harness.engines.protocol import open_engine
from harness.errors import UserError
from harness.formats import nvfp4
from harness.formats.format import ABSMAX
from harness.quantize import calibrate
from harness.quantize.artifact import Artifact
from harness.quantize.build import build
from harness.quantize.recipes import RECIPES, ROUND_TO_NEAREST
from tests.artifacts import load, quiet
from tests.calibrated import build_demo, demo_calibration, demo_ids, recipe

Builder = Callable[..., Artifact]
ONE = (192,)
"""A calibration of one sample: the rounding of activations is final from the first layer's pass on."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    """Builds a demo variant, each one once: `built(model, recipe, rtn=…, one=…)`."""
    made: dict[Any, Artifact] = {}

    def get(model: str, name: str, *, rtn: bool = True, one: bool = False) -> Artifact:
        key = (model, name, rtn, one)
        if key not in made:
            what = recipe(name, ABSMAX, ROUND_TO_NEAREST) if rtn else RECIPES[name]
            calibration = demo_calibration(model, lengths=ONE) if one else demo_calibration(model)
            made[key] = build_demo(tmp_path_factory.mktemp("calibrated") / "out", what, model, calibration)
        return made[key]

    return get


def fused_with(module: str) -> list[str]:
    """The modules that vLLM fuses with `module`, itself included; written down apart from the table under test."""
    parent, _, last = module.rpartition(".")
    for shards in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("in_proj_qkv", "in_proj_z")):
        if last in shards:
            return [f"{parent}.{shard}" for shard in shards]
    return [module]


def decoded(stored: dict[str, Tensor], module: str) -> Tensor:
    """Float32 weights by the equation of the format."""
    codes = nvfp4.unpack(stored[f"{module}.weight_packed"]).long()
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    scales = stored[f"{module}.weight_scale"].float() / stored[f"{module}.weight_global_scale"]
    return torch.cat((table, -table))[codes] * scales.repeat_interleave(16, 1)


def expert_weight(stored: dict[str, Tensor], module: str) -> Tensor:
    """As `decoded`, rounded to the 16 bits in which experts are stored and held."""
    return decoded(stored, module).bfloat16().float()


@dataclass
class Seen:
    """What went through a quantized model on one sample: largest inputs by module, the experts' inputs by their
    prefix, the experts that every token chose by layer, and the logits."""

    largest: dict[str, float]
    expert_inputs: dict[str, Tensor]
    chosen: dict[int, Tensor]
    logits: Tensor


def look_into(source: Path, stored: dict[str, Tensor], ids: Any) -> Seen:
    """Runs transformers' model of `source`, with the artifact's weights and input scales in it, in float32."""
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32, experts_implementation="eager")
    seen = Seen({}, {}, {}, torch.empty(0))
    packed = {name.removesuffix(".weight_packed") for name in stored if name.endswith(".weight_packed")}

    def rounded(name: str, x: Tensor) -> Tensor:
        seen.largest[name] = float(x.abs().max())
        scale = stored.get(f"{name}.input_global_scale")
        return x if scale is None else nvfp4.fake_quantize(x, scale)

    def watch(name: str) -> Callable[[Any, Any], Tensor]:
        return lambda _module, arguments: rounded(name, arguments[0])

    for name, module in model.named_modules():
        if name in packed:
            module.weight.data = decoded(stored, name)
            module.register_forward_pre_hook(watch(name))
        elif name.endswith("mlp.gate"):
            index = int(name.split(".")[3])
            module.register_forward_hook(lambda _m, _i, output, index=index: seen.chosen.update({index: output[2]}))
        elif name.endswith("mlp.experts") and f"{name}.0.down_proj" in packed:
            roundings = []
            for expert in range(module.gate_up_proj.shape[0]):
                gate, up, down = (f"{name}.{expert}.{shard}_proj" for shard in ("gate", "up", "down"))
                module.gate_up_proj.data[expert] = torch.cat([expert_weight(stored, one) for one in (gate, up)])
                module.down_proj.data[expert] = expert_weight(stored, down)
                scales = [stored.get(f"{one}.input_global_scale") for one in (gate, down)]
                roundings.append(ExpertRounding(*[_rounding(scale) for scale in scales]))
            round_expert_inputs(module, roundings)
            module.register_forward_pre_hook(
                lambda _m, arguments, name=name: seen.expert_inputs.update({name: arguments[0].view(-1, 256)})
            )
    with torch.inference_mode():
        seen.logits = model(input_ids=torch.tensor([ids])).logits[0]
    return seen


def _rounding(scale: Tensor | None) -> Callable[[Tensor], Tensor] | None:
    return None if scale is None else lambda x: nvfp4.fake_quantize(x, scale)


# What is stored.


@cache
def nats_of(model: str, folder: Path) -> float:
    """The mean loss of a checkpoint, in nats, over text that calibration has not seen."""
    ids = [demo_ids(model)[start : start + 128] for start in range(1000, 1000 + 4 * 128, 128)]
    engine = open_engine("torch", folder, dtype="float32", device="cpu")
    nats = -float(sum(values.mean() for values in engine.score(ids, 4))) / 4
    engine.close()
    return nats


@pytest.mark.parametrize("model", ["dense", "moe"])
@pytest.mark.parametrize("name", [*RECIPES, "w4a4 by default"])
def test_an_artifact_is_sound_and_scores_nearly_like_its_source(built: Builder, model: str, name: str) -> None:
    artifact = built(model, name.split()[0], rtn="default" not in name)
    verification = verify(artifact.folder, checkpoint_path(model), quiet)
    assert verification.passed, verification.findings
    nats = [nats_of(model, folder) for folder in (checkpoint_path(model), artifact.folder)]
    assert nats[1] < nats[0] + 0.1
    assert nats[1] != nats[0]


@pytest.mark.parametrize("model", ["dense", "moe"])
@pytest.mark.parametrize("name", [*RECIPES, "w4a4 by default"])
def test_every_layer_that_rounds_its_input_has_a_scale_and_what_vllm_fuses_has_one(
    built: Builder, model: str, name: str
) -> None:
    stored = load(built(model, name.split()[0], rtn="default" not in name).folder)
    modules = [key.removesuffix(".weight_packed") for key in stored if key.endswith(".weight_packed")]
    with_scale = {key.removesuffix(".input_global_scale") for key in stored if key.endswith(".input_global_scale")}
    assert with_scale == (set() if "a16" in name else set(modules))
    for module in modules:
        suffixes = ["weight_global_scale"] if "a16" in name else ["weight_global_scale", "input_global_scale"]
        for suffix in suffixes:
            values = {float(stored[f"{one}.{suffix}"]) for one in fused_with(module)}
            assert len(values) == 1
            assert 0 < values.pop() < 1e6


@pytest.mark.parametrize("model", ["dense", "moe"])
def test_rounding_to_nearest_is_the_same_from_the_layers_as_from_the_shards(built: Builder, model: str) -> None:
    streamed = load(built(model, "rtn-a16").folder)
    for name in ("w4a4", "w4a4-experts", "w4a4-deltanet"):
        calibrated = load(built(model, name).folder)
        common = [key for key in streamed.keys() & calibrated.keys() if ".weight_" in key]
        assert len(common) > 50
        for key in common:
            assert torch.equal(streamed[key].view(torch.uint8), calibrated[key].view(torch.uint8)), key


def test_experts_quantized_a_few_at_a_time_have_the_same_bytes(
    built: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "EXPERTS_TOGETHER", 3 * 32 * 256)  # three down projections of eight
    whole = built("moe", "w4a4-experts")
    few = build_demo(tmp_path / "out", recipe("w4a4-experts", ABSMAX, ROUND_TO_NEAREST), "moe")
    assert few.digest == whole.digest


# Scales of activations.


CASES = [("dense", "w4a4", True), ("dense", "w4a4-deltanet", False), ("moe", "w4a4", True), ("moe", "w4a4", False)]


@pytest.mark.parametrize(("model", "name", "rtn"), CASES)
def test_an_input_scale_is_2688_over_the_largest_input_in_the_quantized_model(
    built: Builder, model: str, name: str, rtn: bool
) -> None:
    artifact = built(model, name, rtn=rtn, one=True)
    stored = load(artifact.folder)
    seen = look_into(checkpoint_path(model), stored, demo_ids(model)[: ONE[0]])
    largest = dict(seen.largest)
    for prefix, x in seen.expert_inputs.items():
        for expert in range(8):
            gate, up, down = (f"{prefix}.{expert}.{shard}_proj" for shard in ("gate", "up", "down"))
            largest[gate] = largest[up] = float(x.abs().max())
            inner = nvfp4.fake_quantize(x, stored[f"{gate}.input_global_scale"])
            inner = functional.silu(inner @ expert_weight(stored, gate).T) * (inner @ expert_weight(stored, up).T)
            largest[down] = float(inner.abs().max())
    scales = {key.removesuffix(".input_global_scale"): v for key, v in stored.items() if "input_global" in key}
    assert scales.keys() == largest.keys()
    off = {module: abs(float(scale) * largest[module] / 2688 - 1) for module, scale in scales.items()}
    # The same arithmetic in another order: here and there an input falls on the other side of a rounding boundary.
    assert max(off.values()) < 0.05, max(off.items(), key=lambda one: one[1])
    assert sorted(off.values())[len(off) // 2] < 1e-3
    first = min(int(module.split(".")[3]) for module in scales)
    reads_hidden = ("q_proj", "in_proj_qkv", "mlp.gate_proj") if name == "w4a4-deltanet" else ("mlp.gate_proj",)
    early = [m for m in scales if f"layers.{first}." in m and m.endswith(reads_hidden)]
    assert all(off[module] < 1e-5 for module in early)
    if model == "moe":
        for layer in artifact.layers:
            counts = torch.bincount(seen.chosen[layer["index"]].view(-1), minlength=8).tolist()
            assert sum(layer["routed"]) == 2 * ONE[0] == sum(counts)
            assert sum(abs(a - b) for a, b in zip(layer["routed"], counts, strict=True)) <= 8
        assert artifact.layers[0]["routed"] == torch.bincount(seen.chosen[0].view(-1), minlength=8).tolist()


def test_the_first_layers_scale_is_the_largest_over_all_samples_and_no_padding(built: Builder) -> None:
    """Layer 0 sees what the source sees: embeddings, normed."""
    source = load(checkpoint_path("dense"))
    embedding = source["model.language_model.embed_tokens.weight"].float()
    norm = 1 + source["model.language_model.layers.0.input_layernorm.weight"].float()
    tokens = torch.tensor([id for sample in demo_calibration().samples.samples for id in sample])
    hidden = embedding[tokens]
    normed = hidden * torch.rsqrt(hidden.square().mean(1, keepdim=True) + 1e-6) * norm
    stored = load(built("dense", "w4a4-deltanet").folder)
    scale = stored["model.language_model.layers.0.linear_attn.in_proj_qkv.input_global_scale"]
    assert float(scale) == pytest.approx(2688 / float(normed.abs().max()), rel=1e-5)


# GPTQ on whole models.


@pytest.mark.parametrize("model", ["dense", "moe"])
def test_no_group_comes_out_worse_than_rounded_to_nearest_and_all_together_much_better(
    built: Builder, model: str
) -> None:
    artifact = built(model, "w4a4", rtn=False)
    groups = [group for layer in artifact.layers for group in layer["groups"]]
    assert len(groups) == 8 * 2 + 2 * 2 if model == "dense" else len(groups) == 8 * 4 + 2 * 2
    for group in groups:
        assert 0 < group["error"] <= group["rtn_error"] < group["output"], group["group"]
        assert group["damping"] == RECIPES["w4a4"].method.damping
    assert sum(group["error"] for group in groups) < 0.7 * sum(group["rtn_error"] for group in groups)


def test_calibrated_codes_bring_the_logits_nearer_to_the_sources(built: Builder) -> None:
    source, ids = checkpoint_path("dense"), demo_ids("dense")[: ONE[0]]
    exact = look_into(source, {}, ids).logits
    errors = []
    for rtn in (True, False):
        stored = load(built("dense", "w4a4-deltanet", rtn=rtn, one=True).folder)
        errors.append(float((look_into(source, stored, ids).logits - exact).square().mean()))
    assert errors[1] < 0.7 * errors[0]


# Experts that the router never chooses.


@pytest.fixture(scope="module")
def lonely(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """demo:moe with a router in layer 2 that can never choose expert 5: its logit is 0, and of the pairs v·x and
    -v·x one is above that, twice."""
    folder = Path(shutil.copytree(checkpoint_path("moe"), tmp_path_factory.mktemp("lonely") / "source"))
    name = "model.language_model.layers.2.mlp.gate.weight"
    shard = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(folder / shard)
    router = tensors[name].clone()
    first = router[0].clone()
    router[[0, 1]], router[[2, 3]], router[5] = first, -first, 0
    save_file(tensors | {name: router}, folder / shard, metadata={"format": "pt"})
    return folder


CALIBRATION = """
batch_tokens = 256
hidden_memory_gb = 0.1
[[sources]]
demo = "train"
samples = 2
max_tokens = 96
seed = 0
"""


@pytest.mark.parametrize("codes", ["rtn", "gptq"])
def test_an_expert_that_no_token_reached_is_named_and_has_finite_scales(
    lonely: Path, tmp_path: Path, codes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "set.toml").write_text(CALIBRATION)
    out = tmp_path / "out"
    command = ["build", str(lonely), "--recipe", "w4a4-experts", "--out", str(out), "--codes", codes]
    assert main([*command, "--calibration", str(tmp_path / "set.toml")]) == 0
    printed = capsys.readouterr().out
    assert "layer 2: no token was routed to experts 5" in printed
    layers = json.loads((out / "harness-calibration.json").read_text())["layers"]
    assert layers[2]["routed"][5] == 0
    assert sum(layers[2]["routed"]) == 2 * 2 * 96
    stored = load(out)
    for shard in ("gate_proj", "up_proj", "down_proj"):
        module = f"model.language_model.layers.2.mlp.experts.5.{shard}"
        for suffix in ("input_global_scale", "weight_global_scale", "weight_scale"):
            values = stored[f"{module}.{suffix}"].float()
            assert torch.isfinite(values).all()
            assert (values > 0).all()
        neighbours = [float(stored[f"{module.replace('.5.', f'.{e}.')}.input_global_scale"]) for e in (4, 6)]
        assert 0.01 < float(stored[f"{module}.input_global_scale"]) / neighbours[0] < 100
    assert verify(out, lonely, quiet).passed


def test_inputs_that_overflow_are_a_user_error_that_leaves_nothing(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint_path("dense"), tmp_path / "source"))
    name = "model.language_model.layers.1.post_attention_layernorm.weight"
    shard = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(folder / shard)
    save_file(tensors | {name: torch.full_like(tensors[name], 3e38)}, folder / shard, metadata={"format": "pt"})
    calibration = demo_calibration(lengths=(32,))
    for what in (recipe("w4a4", ABSMAX, ROUND_TO_NEAREST), RECIPES["w4a4"], RECIPES["a16"]):
        with pytest.raises(UserError, match="inputs of a layer overflow"):
            build(folder, what, tmp_path / "out", quiet, calibration)
        assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("model", ["dense", "moe"])
def test_a_layer_leaves_memory_before_the_next_one_is_read(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its last reference alone: the garbage collector may come gigabytes too late."""
    taken: dict[int, list[weakref.ref[torch.nn.Module]]] = {}
    original = TextModel.layer

    def layer(self: TextModel, index: int) -> tuple[Half, Half]:
        assert not [module for module in taken.get(index - 1, []) if module() is not None]
        halves = original(self, index)
        taken.setdefault(index, []).extend(weakref.ref(module) for half in halves for module in half.body.modules())
        return halves

    monkeypatch.setattr(TextModel, "layer", layer)
    gc.disable()
    try:
        build_demo(tmp_path / "out", RECIPES["w4a4"], model)
    finally:
        gc.enable()
    assert list(taken) == list(range(8)) and all(taken.values())


THREADS = """
import sys
from pathlib import Path
import torch
from tests.calibrated import build_demo, recipe

assert torch.get_num_threads() == int(sys.argv[2])
sys.stdout.write(build_demo(Path(sys.argv[1]), recipe("w4a4")).digest)
"""


def test_an_artifact_is_the_same_for_any_number_of_threads(built: Builder, tmp_path: Path) -> None:
    threads = "1" if torch.get_num_threads() > 1 else "2"
    done = subprocess.run(
        [sys.executable, "-c", THREADS, str(tmp_path / "out"), threads],
        env={**os.environ, "OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "passive"},  # others may use the cores
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == built("dense", "w4a4", rtn=False).digest
