"""What computes a transformers model: its kernels by kind of layer, and the bytes of its weights."""

import importlib.metadata
import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from harness.engines.emulation import formats_of
from harness.engines.protocol import EngineInfo
from harness.model.checkpoint import read_json
from harness.model.families import family_of
from harness.model.family import Family


def describe(name: str, model: Any, folder: Path, dtype: str, requested: str, device: torch.device) -> EngineInfo:
    """What computes the transformers model `model` of `folder`, whose device may be another now, on `device`; without
    what the engines of this room do differently."""
    trunk, head = model.get_decoder(), model.get_output_embeddings()
    family = family_of(read_json(folder / "config.json"), str(folder))
    config = trunk.config
    cuda = device.type == "cuda"
    return EngineInfo(
        name=name,
        version=f"transformers {transformers.__version__}, torch {torch.__version__}",
        device=torch.cuda.get_device_name(device) if cuda else "cpu",
        dtype=dtype,
        requested={"folder": folder.name, "dtype": dtype, "device": requested},
        effective={
            "model_class": type(model).__name__,
            "threads": torch.get_num_threads(),
            # Waiting threads spin by default: the fastest way on a quiet machine, several times slower on a busy one.
            "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "attention_implementation": config._attn_implementation,
            "deltanet_implementation": _deltanet_kernels(config, device),
            "experts_implementation": _experts_implementation(family, trunk),
            "weight_decoder": _weight_decoder(model),
            "score_logits_dtype": "float32",
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "weight_bytes_per_token": _bytes_per_token(family, trunk, head),
        },
        kernels=_kernels(family, trunk, head, device),
    )


def _deltanet_kernels(config: Any, device: torch.device) -> str:
    """flash-linear-attention if transformers can import it, else transformers' readable reference."""
    if "linear_attention" not in getattr(config, "layer_types", ()):
        return "none"
    if device.type == "cuda" and importlib.util.find_spec("fla") is not None:
        return "flash-linear-attention"
    return "transformers reference"


def _kernels(family: Family, trunk: Any, head: Any, device: torch.device) -> dict[str, str]:
    """Kind of layer -> what computes it. The kind of a linear layer is the end of its name, `mlp.down_proj`."""
    found: dict[str, set[str]] = {}
    for name, module in [*trunk.named_modules(), (family.head, head)]:
        kind = ".".join(name.split(".")[-2:])
        if isinstance(module, nn.Linear):
            found.setdefault(kind, set()).add(_linear_kernel(module))
        elif _is_experts(family, module):
            how = f"{_dtype_name(module.down_proj)} {_experts_way(module)}"
            found.setdefault(kind, set()).add(_decoded_kernel(module, how))
    kernels = {kind: " | ".join(sorted(ways)) for kind, ways in sorted(found.items())}
    kernels["full_attention"] = trunk.config._attn_implementation
    deltanet = _deltanet_kernels(trunk.config, device)
    if deltanet != "none":
        kernels["linear_attention"] = f"{deltanet}: chunked in prefill, recurrent in decode"
    return kernels


def _linear_kernel(module: nn.Linear) -> str:
    product = f"{_dtype_name(module.weight)} F.linear"
    scheme = getattr(module, "quantization_scheme", None)
    if scheme is None:
        return _decoded_kernel(module, product)
    activations = scheme.input_activations
    inputs = "" if activations is None else f", {activations.num_bits}-bit {activations.type} activations emulated"
    weights = scheme.weights
    return f"{weights.num_bits}-bit {weights.type} weights, compressed-tensors decompress → {product}{inputs}"


def _is_experts(family: Family, module: nn.Module) -> bool:
    """Whether `module` is transformers' fused experts: all of a layer's in two 3-D parameters."""
    return isinstance(getattr(module, family.experts.down, None), nn.Parameter)


def _experts_way(module: Any) -> str:
    """The forward that runs: emulation sets one where inputs are rounded, else transformers dispatches by the
    configuration."""
    if any(form and form.input_activations for form in formats_of(module)):
        return "F.linear, one expert after another"
    implementation = module.config._experts_implementation
    return "eager experts, one after another" if implementation == "eager" else f"{implementation} experts"


def _experts_implementation(family: Family, trunk: Any) -> str | None:
    """How routed experts are computed; None in a dense model."""
    ways = {_experts_way(module) for module in trunk.modules() if _is_experts(family, module)}
    return " | ".join(sorted(ways)) or None


def _decoded_kernel(module: nn.Module, product: str) -> str:
    """What runs for weights that the harness decoded, format by format; `product` alone for any others."""

    def kind(arguments: Any) -> str:
        of = dict(arguments)
        return f"{of['num_bits']}-bit {of['type']}"

    ways = []
    for form in formats_of(module):
        weights = "weights as stored" if form is None else f"{kind(form.weights)} weights, decoded by the harness"
        activations = form and form.input_activations
        ways.append(f"{weights} → {product}" + (f", {kind(activations)} activations emulated" if activations else ""))
    return " | ".join(ways) or product


def _weight_decoder(model: nn.Module) -> str | None:
    """Who decoded the quantized weights; None where there are none."""
    if any(formats_of(module) for module in model.modules()):
        return "harness"
    if any(getattr(module, "quantization_scheme", None) is not None for module in model.modules()):
        return f"compressed-tensors {importlib.metadata.version('compressed-tensors')}"
    return None


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights and buffers; tied tensors count once."""
    distinct = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in distinct.values())


def _bytes_per_token(family: Family, trunk: Any, head: Any) -> int:
    """Weight bytes that one decode step reads at batch 1: the text trunk and the head, but of the embedding table one
    row and of the routed experts only those that a token is sent to. Scales that decompression left behind
    are resident but not read. KV cache and DeltaNet state come on top and grow with the prompt."""
    config = trunk.config
    experts_share = getattr(config, "num_experts_per_tok", 1) / getattr(config, "num_experts", 1)
    total: int = head.weight.numel() * head.weight.element_size()
    for name, tensor in trunk.named_parameters():
        size = tensor.numel() * tensor.element_size()
        if family.part_of(name) == "embedding":
            size //= tensor.shape[0]
        elif family.is_routed(name):
            size = round(size * experts_share)
        elif name.endswith(("_scale", "_zero_point")):
            size = 0
        total += size
    return total
