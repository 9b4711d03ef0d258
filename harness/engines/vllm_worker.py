"""Questions that the harness asks inside vLLM's worker processes (`worker_extension_cls`, called by `collective_rpc`).

vLLM mixes this class into its own worker. Answers are plain values, since they cross a process boundary.
"""

import resource
import sys
from typing import Any

from harness.model.families import family_of


class HarnessWorker:
    """Methods of a worker that holds a part of the model; names carry the prefix `harness_` against clashes."""

    model_runner: Any

    def harness_layers(self) -> dict[str, str]:
        """Kind of layer (the last two parts of its name) -> the scheme and the kernel that compute it."""
        found: dict[str, set[str]] = {}
        for name, module in self.harness_model().named_modules():
            kind = ".".join(name.split(".")[-2:])
            if (backend := getattr(module, "attn_backend", None)) is not None:
                found.setdefault(kind, set()).add(str(getattr(backend, "__name__", backend)))
            elif getattr(module, "quant_method", None) is not None:
                found.setdefault(kind, set()).add(_computed_by(module))
        return {kind: " | ".join(sorted(ways)) for kind, ways in sorted(found.items())}

    def harness_weights(self) -> dict[str, int]:
        """`resident`: bytes of all parameters and buffers of this worker; `per_token`: of those that one decoded token
        reads at batch 1, the text model's without the embedding table, routed experts by the share that a token
        visits."""
        model_config = self.model_runner.model_config
        config = model_config.hf_text_config
        family = family_of({"architectures": model_config.hf_config.architectures}, "The model")
        share = getattr(config, "num_experts_per_tok", 1) / (getattr(config, "num_experts", 0) or 1)
        resident, read = 0, 0
        for name, module in self.harness_model().named_modules():
            tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            size = sum(_num_bytes(module, tensor) for _, tensor in tensors)
            resident += size
            if family.part_of(name) in ("visual", "embedding"):
                continue
            read += round(size * share) if family.is_routed(name) else size
        return {"resident": resident, "per_token": read}

    def harness_memory(self) -> dict[str, int | None]:
        """Peaks of this process in bytes: `rss`, and `vram` as torch's allocator counts it, None without a GPU."""
        import torch

        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        vram = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        return {"rss": rss, "vram": vram}

    def harness_model(self) -> Any:
        """The part of the model that this worker holds."""
        return self.model_runner.get_model()


def _num_bytes(module: Any, tensor: Any) -> int:
    """Bytes of a tensor of `module`. On a CPU vLLM moves weights into a product's own layout and leaves an empty tensor
    behind; its bytes follow from the layer's shape then."""
    count = tensor.numel()
    if count == 0 and hasattr(module, "output_size_per_partition"):
        count = module.output_size_per_partition * module.input_size_per_partition
    elif count == 0 and hasattr(module, "num_embeddings_per_partition"):
        count = module.num_embeddings_per_partition * module.embedding_dim
    return int(count * tensor.element_size())


def _computed_by(module: Any) -> str:
    """Scheme and kernel of a layer, by the names of their classes."""
    method = module.quant_method
    scheme = getattr(module, "scheme", None)
    parts = [type(method if scheme is None else scheme).__name__]
    for owner in (scheme, method):
        for attribute in ("kernel", "fp8_linear", "experts_cls", "nvfp4_backend", "fp8_backend"):
            kernel = getattr(owner, attribute, None)
            if kernel is not None:
                kind = kernel if isinstance(kernel, type) else type(kernel)
                parts.append(str(getattr(kernel, "value", None) or kind.__name__))
    return " → ".join(dict.fromkeys(parts))
