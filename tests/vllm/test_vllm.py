"""Every variant of both embedded models in unmodified vLLM, on the CPU by the harness's plugin (`nox -s vllm`).

One engine start a variant and class: everything is observed in it, and the tests look at what was seen. The reference
is the torch engine on the same folder and the same token ids. All tests of a variant run in one worker of xdist.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness.demo import checkpoint_path, corpus
from harness.engines.protocol import Decoded, Engine, EngineInfo, open_engine
from harness.engines.vllm_engine import VllmEngine
from harness.formats import fp8
from harness.formats.config import QuantizationConfig, parse, quantization_config
from harness.formats.format import Format
from harness.formats.fp8 import FP8_DYNAMIC
from harness.job import Job
from harness.measure import perplexity
from harness.resolve import find_source
from harness.suite.load import load
from harness.suite.names import SOURCE
from tests.vllm.conftest import Engines
from tests.vllm.ties import parted

ROOT = Path(__file__).parents[2]
SUITES = {"demo": ROOT / "suites/demo.toml", "demo-moe": ROOT / "suites/demo-moe.toml"}
WINDOWS, LENGTH, COMPARED, NEW_TOKENS = 12, 512, 2, 64
ROWS = 4


@cache
def folder_of(suite: str, variant: str) -> Path:
    """The artifact, built by the harness if it is not there; the source's own folder for the source."""
    loaded = load(SUITES[suite])
    if variant == SOURCE:
        return find_source(loaded.source_location())
    job = Job(loaded, ROOT / "artifacts", ROOT / ".nox/vllm-records", lambda *_: None, ("test",), "0" * 8)
    return job.build(variant).folder


@cache
def windows() -> list[list[int]]:
    ids = perplexity.tokenize(checkpoint_path("dense"), corpus.heldout_text())
    return [ids[start : start + LENGTH] for start in range(0, WINDOWS * LENGTH, LENGTH)]


@dataclass(frozen=True)
class Seen:
    """What one engine start showed."""

    folder: Path
    info: EngineInfo
    scores: NDArray[np.float64]
    log_probs: list[NDArray[np.float32]]
    decoded: Decoded
    outputs: dict[str, list[list[float]]]
    tensors: dict[str, dict[str, Any]]
    log: str


def observe(engine: Engine, folder: Path) -> Seen:
    scores = np.concatenate(list(engine.score(windows(), 4)))
    log_probs = list(engine.log_probs(windows()[:COMPARED], COMPARED))
    decoded = engine.decode([window[:128] for window in windows()[:4]], NEW_TOKENS)
    outputs: dict[str, list[list[float]]] = {}
    tensors: dict[str, dict[str, Any]] = {}
    log = ""
    if isinstance(engine, VllmEngine):
        (names,) = engine.ask("harness_parameters")
        for name, places in linears(names).items():
            (outputs[name],) = engine.ask("harness_linear", name, inputs(folder, places[0]).tolist())
        for name in names:
            if name.endswith(("norm.weight", "A_log", "dt_bias", "w13_weight", "w2_weight", "embed_tokens.weight")):
                (tensors[name],) = engine.ask("harness_tensor", name)
        log = engine._log.text()
    return Seen(folder, engine.info, scores, log_probs, decoded, outputs, tensors, log)


VARIANTS = [(name, variant) for name, path in SUITES.items() for variant in (SOURCE, *load(path).variants)]
IDS = ["-".join(one) for one in VARIANTS]
WITH_VISION = [("demo", SOURCE), ("demo", "w4a4"), ("demo-moe", "mixed-fp8")]
"""The vision tower is kept by every recipe: one of each way to compute what is beside it."""


@cache
def in_torch(suite: str, variant: str) -> Seen:
    folder = folder_of(suite, variant)
    engine = open_engine("torch", folder, dtype="bfloat16", device="cpu")
    try:
        return observe(engine, folder)
    finally:
        engine.close()


@pytest.fixture(scope="module", params=VARIANTS, ids=IDS)
def seen(request: pytest.FixtureRequest, engines: Engines) -> tuple[Seen, Seen]:
    """The same checkpoint in vLLM, as the multimodal class without its vision tower, and in torch."""
    suite, variant = request.param
    folder = folder_of(suite, variant)
    return observe(engines.shared(folder, text_only=True), folder), in_torch(suite, variant)


# -- What vLLM holds ---------------------------------------------------------------------------------------------

# vLLM's fused layers and the modules on disk that they are made of, in order.
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}
LAYERS = ("layers.0.", "layers.3.", "layers.7.")


def linears(names: list[str]) -> dict[str, list[str]]:
    """vLLM's linear layers of a few decoder layers -> the modules on disk."""
    found = {}
    for name in names:
        module, _, last = name.rpartition(".")
        kind = module.rpartition(".")[2]
        if last != "weight" or not any(layer in name for layer in LAYERS) or "norm" in kind or "conv1d" in kind:
            continue
        on_disk = module.replace("language_model.model.", "model.language_model.")
        prefix = on_disk.rpartition(".")[0]
        found[module] = [f"{prefix}.{part}" for part in FUSED.get(kind, (kind,))]
    return found


@cache
def on_disk(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by the safetensors library."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@cache
def quantization_of(folder: Path) -> QuantizationConfig | None:
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    return None if raw is None else parse(raw, "config.json")


def stored(folder: Path, module: str) -> tuple[Tensor, Format | None, Tensor | None]:
    """A module's weight by the formats' equations, its format, and its input scale."""
    quantization = quantization_of(folder)
    group = None if quantization is None else quantization.group_of(module)

    def tensor(suffix: str) -> Tensor:
        return on_disk(folder)[f"{module}.{suffix}"]

    if group is None or group.format is None:
        return tensor("weight").float(), None, None
    form = group.format
    weight = form.decode({suffix: tensor(suffix) for suffix in form.weight_tensors}, torch.float32)
    return weight, form, tensor("input_global_scale") if form.needs_calibration else None


def inputs(folder: Path, module: str) -> Tensor:
    width = stored(folder, module)[0].shape[1]
    return torch.randn(ROWS, width, generator=torch.Generator().manual_seed(0)).bfloat16().float()


def test_every_linear_layer_computes_with_the_weights_of_the_file(seen: tuple[Seen, Seen]) -> None:
    """Each role's product on given inputs, against the file's tensors decoded by the formats' equations."""
    found, _ = seen
    assert len(found.outputs) >= 12
    for name, output in found.outputs.items():
        places = linears([f"{name}.weight"])[name]
        x = inputs(found.folder, places[0])
        expected = []
        for module in places:
            weight, form, scale = stored(found.folder, module)
            rounding = None if form is None else form.rounding(scale)
            rounded = x if rounding is None else rounding(x.bfloat16()).float()
            expected.append(rounded @ weight.bfloat16().float().T)
        reference = torch.cat(expected, dim=1)
        error = (torch.tensor(output) - reference).norm() / reference.norm()
        assert error < 0.01, f"{name}: relative error {error:.4f}"


def sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def test_every_other_tensor_is_the_files_bit_for_bit(seen: tuple[Seen, Seen]) -> None:
    """Norms, the embedding table, DeltaNet's vectors, and the experts as they are decoded."""
    found, _ = seen
    kinds = set()
    for name, held in found.tensors.items():
        stem = name.replace("language_model.model.", "model.language_model.")
        kinds.add(name.rpartition(".")[2] if "experts" in name else ".".join(name.split(".")[-2:]))
        if "routed_experts" in name:
            continue  # below
        tensor = on_disk(found.folder)[stem]
        assert held["shape"] == list(tensor.shape), name
        dtype = getattr(torch, held["dtype"])
        assert held["sha256"] == sha256(tensor.to(dtype)), name
    assert {"embed_tokens.weight", "input_layernorm.weight", "norm.weight"} <= kinds


def test_quantized_experts_are_the_files(seen: tuple[Seen, Seen]) -> None:
    """Unquantized ones vLLM packs for its own kernel; their perplexity speaks for them."""
    found, _ = seen
    held = {name: one for name, one in found.tensors.items() if "routed_experts" in name and "layers.3." in name}
    is_moe = "Moe" in found.info.effective["model_class"]
    assert bool(held) == is_moe
    if not is_moe or quantization_of(found.folder) is None:
        return
    prefix = "model.language_model.layers.3.mlp.experts"
    for name, parts in (("w13_weight", ("gate_proj", "up_proj")), ("w2_weight", ("down_proj",))):
        experts = [
            torch.cat([stored(found.folder, f"{prefix}.{expert}.{part}")[0] for part in parts]).bfloat16()
            for expert in range(8)
        ]
        (one,) = [one for key, one in held.items() if key.endswith(name)]
        assert one["shape"] == list(torch.stack(experts).shape)
        assert one["sha256"] == sha256(torch.stack(experts)), name


def test_nothing_in_the_log_speaks_of_unequal_scales_or_of_tensors_that_are_missing(seen: tuple[Seen, Seen]) -> None:
    found, _ = seen
    assert "Loading weights took" in found.log, "the log that is looked at is vLLM's"
    for wrong in (
        "scale is different",
        "must match",
        "not initialized",
        "not found in checkpoint",
        "Failed to load plugin",
    ):
        assert wrong not in found.log


def test_what_ran_is_what_the_variant_needs(seen: tuple[Seen, Seen]) -> None:
    found, _ = seen
    quantization = quantization_of(found.folder)
    kernels = " ".join(found.info.kernels.values())
    names = {group.format.name for group in quantization.groups if group.format} if quantization else set()
    assert ("CpuNvFp4" in kernels) == any(name.startswith("NVFP4") for name in names)
    assert ("CpuFp8Scheme" in kernels) == ("FP8_DYNAMIC" in names)
    assert found.info.served_as is None
    assert found.info.effective["prefix_caching"] is False
    assert found.info.effective["kv_cache_tokens"] > 1024
    resident = found.info.effective["weight_bytes_resident"]
    assert 0.8 < resident / sum(2 * p.numel() for p in language_model(found).parameters()) < 1.2


def language_model(found: Seen) -> torch.nn.Module:
    """The source's text model, to count its parameters."""
    from harness.engines.loading import load_model

    suite = "demo-moe" if "Moe" in found.info.effective["model_class"] else "demo"
    model: torch.nn.Module = load_model(folder_of(suite, SOURCE)).get_decoder()
    return model


# -- What vLLM computes ------------------------------------------------------------------------------------------


def test_perplexity_is_that_of_the_torch_engine(seen: tuple[Seen, Seen]) -> None:
    found, reference = seen
    difference = abs(float((found.scores - reference.scores).mean()))
    assert len(found.scores) == WINDOWS * (LENGTH - 1)
    assert difference <= (0.002 if quantization_of(found.folder) is None else 0.005), f"{difference:.5f} nats"


def divergence(reference: list[NDArray[np.float32]], other: list[NDArray[np.float32]]) -> float:
    """Mean KL divergence over the tokens of all windows, in nats."""
    return float(np.mean([(np.exp(p) * (p - q)).sum(1).mean() for p, q in zip(reference, other, strict=True)]))


def test_the_engines_differ_no_more_than_bfloat16_differs_from_float32(
    seen: tuple[Seen, Seen], record_property: Any
) -> None:
    """The divergence between the engines is the floor under every divergence that is measured across them. Rounded
    activations amplify what bfloat16 rounds away: torch's own two dtypes are as far apart."""
    found, reference = seen
    assert all(np.isfinite(table).all() for table in found.log_probs)
    between = divergence(reference.log_probs, found.log_probs)
    exact = open_engine("torch", found.folder, dtype="float32", device="cpu")
    own = divergence(list(exact.log_probs(windows()[:COMPARED], COMPARED)), reference.log_probs)
    exact.close()
    record_property("divergence", f"{between:.2e} between the engines, {own:.2e} between torch's dtypes")
    assert 0 <= between <= 3 * own + 1e-5


def test_greedy_text_is_that_of_the_torch_engine_up_to_ties(seen: tuple[Seen, Seen]) -> None:
    found, reference = seen
    if quantization_of(found.folder) is not None:
        return  # rounded activations tip more than ties; their distributions are compared above
    prompts = [window[:128] for window in windows()[:4]]
    assert {len(row) for row in found.decoded.token_ids} == {NEW_TOKENS}
    assert parted(found.folder, prompts, found.decoded.token_ids, reference.decoded.token_ids) == []


# -- With the vision tower -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suite", "variant"), WITH_VISION, ids=["-".join(one) for one in WITH_VISION])
def test_as_the_multimodal_class_it_holds_the_files_vision_tower_and_scores_the_same_text(
    suite: str, variant: str, engines: Engines
) -> None:
    folder = folder_of(suite, variant)
    engine = engines.shared(folder)
    (names,) = engine.ask("harness_parameters")
    norms = [name for name in names if name.startswith("visual.") and ".norm" in name]
    assert len(norms) >= 3
    for name in norms:
        (held,) = engine.ask("harness_tensor", name)
        assert held["sha256"] == sha256(on_disk(folder)[f"model.{name}"]), name
    scores = np.concatenate(list(engine.score(windows()[:COMPARED], COMPARED)))
    assert "ForConditionalGeneration" in engine.info.effective["model_class"]
    expected = np.concatenate([*in_torch(suite, variant).scores.reshape(WINDOWS, -1)[:COMPARED]])
    assert abs(float((scores - expected).mean())) < 0.02  # two windows only


def with_fp8_experts(folder: Path) -> Path:
    """The mixture of experts with its routed experts in FP8, one matrix each, as llm-compressor writes them."""
    shutil.copytree(checkpoint_path("moe"), folder)
    for file in sorted(folder.glob("*.safetensors")):
        tensors = {}
        for name, tensor in load_file(file).items():
            owner, _, last = name.rpartition(".")
            parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(last, ())
            if tensor.ndim != 3 or not parts:
                tensors[name] = tensor
                continue
            for expert, fused in enumerate(tensor):
                for part, weight in zip(parts, fused.chunk(len(parts)), strict=True):
                    scales = fp8.channel_decode_scales(weight)
                    tensors[f"{owner}.{expert}.{part}.weight"] = fp8.encode(weight, scales)
                    tensors[f"{owner}.{expert}.{part}.weight_scale"] = scales
        save_file(tensors, file, metadata={"format": "pt"})
    files = sorted(folder.glob("*.safetensors"))
    index = {"metadata": {}, "weight_map": {name: file.name for file in files for name in load_file(file)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    targets = {FP8_DYNAMIC: [r"re:.*layers\.\d+\.mlp\.experts\.\d+\.(gate|up|down|gate_up)_proj$"]}
    config["quantization_config"] = quantization_config(targets, ["re:.*mtp.*"])
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_fp8_experts_which_no_recipe_has_score_as_in_torch(tmp_path: Path, engines: Engines) -> None:
    folder = with_fp8_experts(tmp_path / "model")
    here = engines.shared(folder, text_only=True)
    assert here.info.kernels["experts.routed_experts"] == "CpuFp8Experts"
    there = open_engine("torch", folder, dtype="bfloat16", device="cpu")
    scores = [np.concatenate(list(engine.score(windows()[:COMPARED], COMPARED))) for engine in (here, there)]
    there.close()
    assert abs(float((scores[0] - scores[1]).mean())) <= 0.005
