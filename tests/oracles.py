"""An oracle of quantized checkpoints that is not ours: transformers' model with what compressed-tensors decodes.

compressed-tensors compiles its packing and rounding when it first runs them, which takes most of a minute: callers
turn that off by `torch.compiler.set_stance("force_eager")`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.naive_quantized import FloatQuantizationCompressor
from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from harness.formats.config import FORMATS
from harness.formats.format import Format
from harness.model.families import family_of
from harness.model.family import Linear
from harness.quantize.recipes import Recipe

SCHEMES = {
    form: QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(**dict(form.weights)),
        input_activations=QuantizationArgs(**dict(form.input_activations)) if form.input_activations else None,
    )
    for form in FORMATS.values()
}


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint."""
    return {name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}


def quantized_linears(source: Path, recipe: Recipe) -> dict[str, tuple[Linear, Format, Tensor]]:
    """Module -> its place in the source, format and 16-bit weight, for all that `recipe` quantizes."""
    family, found = family_of(json.loads((source / "config.json").read_text()), "here"), {}
    for name, tensor in stored_tensors(source).items():
        form = recipe.format_of(family.role_of(name))
        if form is not None:
            for linear in family.linears_of(name, tuple(tensor.shape)):
                rows = tensor.view(-1, linear.in_features)[linear.first_row :][: linear.out_features]
                found[linear.module] = (linear, form, rows)
    return found


def reference_weight(stored: dict[str, Tensor], module: str, form: Format, dtype: torch.dtype) -> Tensor:
    """A module's weight by compressed-tensors' decompressor."""
    parts = {part.suffix: stored[f"{module}.{part.suffix}"] for part in form.stored(16, 16)}
    if form.compressor == "float-quantized":
        # transformers loads the scale in the model's dtype, and that decides the product's.
        parts["weight_scale"] = parts["weight_scale"].to(dtype)
        return FloatQuantizationCompressor.decompress(parts, SCHEMES[form])["weight"]
    return NVFP4PackedCompressor.decompress(parts, SCHEMES[form])["weight"]


def _rounding(stored: dict[str, Tensor], module: str, form: Format | None) -> Callable[[Tensor], Tensor]:
    """What compressed-tensors does to a module's input, for inputs [tokens, in]."""
    scheme = SCHEMES[form].input_activations if form else None
    if scheme is None:
        return lambda x: x
    divisor = stored.get(f"{module}.input_global_scale")

    def rounding(x: Tensor) -> Tensor:
        x = x.unsqueeze(0)  # of a matrix it would take one scale for all tokens
        scale, zero_point = compute_dynamic_scales_and_zp(x, scheme, nn.Module(), global_scale=divisor)
        return fake_quantize(x, scale, zero_point, scheme, global_scale=divisor).squeeze(0)

    return rounding


def oracle_model(source: Path, artifact: Path, recipe: Recipe, dtype: torch.dtype) -> Any:
    """transformers' model of the 16-bit source with what compressed-tensors makes of the artifact set into it: weights
    module by module, roundings as hooks, and routed experts with roundings computed token by token."""
    multimodal = "vision_config" in json.loads((source / "config.json").read_text())
    auto: Any = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
    model = auto.from_pretrained(source, dtype=dtype).eval()
    stored = stored_tensors(artifact)
    parts = quantized_linears(source, recipe)
    rounding = {module: _rounding(stored, module, form) for module, (_, form, _) in parts.items()}
    layers: dict[str, Any] = {}
    for module, (linear, form, _) in parts.items():
        weight = reference_weight(stored, module, form, dtype).to(dtype)
        if ".experts." not in module:
            target = model.get_submodule(module)
            target.weight.data.copy_(weight)
            target.register_forward_pre_hook(
                lambda _, inputs, f=rounding[module]: (f(inputs[0].flatten(0, -2)).view(inputs[0].shape),)
            )
            continue
        layer, _, rest = module.partition(".experts.")
        layers[f"{layer}.experts"] = form
        number, _, projection = rest.partition(".")
        experts = model.get_submodule(f"{layer}.experts")
        fused = experts.down_proj if projection == "down_proj" else experts.gate_up_proj
        width = linear.out_features
        start = width if projection == "up_proj" else 0
        fused.data[int(number), start : start + width] = weight

    def token_by_token(layer: str, experts: Any) -> Callable[..., Tensor]:
        def forward(hidden: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
            rows = []
            for token in range(len(hidden)):
                total = torch.zeros_like(hidden[token])
                for expert, share in zip(chosen[token].tolist(), shares[token], strict=True):
                    x = rounding[f"{layer}.{expert}.gate_proj"](hidden[token, None])
                    gate, up = (experts.gate_up_proj[expert] @ x[0]).chunk(2)
                    x = rounding[f"{layer}.{expert}.down_proj"]((experts.act_fn(gate) * up)[None])
                    total += share * (experts.down_proj[expert] @ x[0])
                rows.append(total)
            return torch.stack(rows)

        return forward

    for layer, form in layers.items():
        if form.input_activations:
            experts = model.get_submodule(layer)
            experts.forward = token_by_token(layer, experts)
    return model
