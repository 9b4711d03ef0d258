"""Artifacts of every recipe, written tensor by tensor from the formats' equations and not by the builder.

For what checks artifacts: those that need calibration get activation scales of a plausible size, and chosen shards a
global scale of their own, as tools leave them that do not know what vLLM fuses.
"""

import json
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from harness.demo.synthesize import synthesize
from harness.formats import fp8, nvfp4
from harness.formats.config import quantization_config
from harness.model.families.qwen35 import FAMILY
from harness.model.family import Linear
from harness.quantize.recipes import Recipe
from tests.conftest import tiny_config

Tensors = dict[str, torch.Tensor]
SHARD = "model-00001-of-00001.safetensors"
INPUT_SCALE = 96.0


def quiet(done: int, total: int, description: str) -> None:
    """A progress bar nobody looks at."""


def write_source(folder: Path, name: str) -> Path:
    """A tiny checkpoint in the shape of a published one, of one shard, with a tokenizer and a template."""
    synthesize(tiny_config(name), folder, num_layers=None, vocab_size=None, seed=1, progress=quiet)
    (folder / "tokenizer.json").write_text('{"model": {}}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def load(folder: Path) -> Tensors:
    tensors: Tensors = {}
    for shard in folder.glob("*.safetensors"):
        tensors |= load_file(shard)
    return tensors


def save(folder: Path, tensors: Tensors) -> None:
    """The tensors as the folder's only shard, and an index that is true to it."""
    (shard,) = list(folder.glob("*.safetensors")) or [folder / SHARD]
    save_file(tensors, shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, shard.name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def change(folder: Path, edit: Callable[[Tensors], object]) -> None:
    tensors = load(folder)
    edit(tensors)
    save(folder, tensors)


def weight_of(weights: Tensors, name: str, linear: Linear) -> torch.Tensor:
    """The float32 weight `[out, in]` of one linear layer in source tensor `name`."""
    matrix = weights[name].view(-1, linear.in_features)
    return matrix[linear.first_row : linear.first_row + linear.out_features].float()


def write_artifact(source: Path, folder: Path, recipe: Recipe, own: Collection[str] = ()) -> Path:
    """`recipe` of the checkpoint in `source`; modules in `own` get the global scale of their own largest weight."""
    weights, tensors, formats = load(source), {}, recipe.formats(FAMILY)
    plan = [
        (name, linear, formats.get(role.name) if (role := FAMILY.role_of(name)) else None)
        for name, weight in weights.items()
        for linear in FAMILY.linears_of(name, tuple(weight.shape))
    ]
    amax: dict[str, torch.Tensor] = {}
    for name, linear, form in plan:
        if form is not None:
            for key in (linear.fused_into, f"own {linear.module}"):
                largest = weight_of(weights, name, linear).abs().max()
                amax[key] = torch.maximum(amax.get(key, largest), largest)
    quantized = {name for name, _, form in plan if form is not None}
    tensors |= {name: weight for name, weight in weights.items() if name not in quantized}
    for name, linear, form in plan:
        if form is None:
            continue
        weight, module = weight_of(weights, name, linear), linear.module
        if form.compressor == "float-quantized":
            tensors[f"{module}.weight_scale"] = fp8.channel_decode_scales(weight)
            tensors[f"{module}.weight"] = fp8.encode(weight, tensors[f"{module}.weight_scale"])
            continue
        scale = nvfp4.global_encode_scale(amax[f"own {module}" if module in own else linear.fused_into])
        blocks = nvfp4.absmax_block_scales(weight, scale)
        tensors[f"{module}.weight_packed"] = nvfp4.pack(nvfp4.encode(weight, blocks, scale))
        tensors[f"{module}.weight_scale"], tensors[f"{module}.weight_global_scale"] = blocks, scale
        if form.needs_calibration:
            tensors[f"{module}.input_global_scale"] = torch.tensor([INPUT_SCALE])
    folder.mkdir()
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, folder)
    save(folder, tensors)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = quantization_config(recipe.targets(FAMILY), recipe.ignored(FAMILY))
    (folder / "config.json").write_text(json.dumps(config))
    return folder
