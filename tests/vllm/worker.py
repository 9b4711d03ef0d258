"""What tests ask inside vLLM's worker processes beside what the harness asks there."""

import hashlib
from typing import Any

import torch

from harness.engines.vllm_worker import HarnessWorker


class AskedWorker(HarnessWorker):
    """A worker whose parameters and linear layers can be looked at."""

    def harness_tensor(self, name: str) -> dict[str, Any]:
        """A parameter as this worker holds it: `shape`, `dtype`, and the SHA-256 of its bytes."""
        tensor = self.harness_model().get_parameter(name).detach().contiguous().cpu()
        digest = hashlib.sha256(tensor.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
        return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch."), "sha256": digest}

    def harness_linear(self, name: str, x: list[list[float]]) -> list[list[float]]:
        """What the linear layer `name` makes of inputs `x [rows, in]`: a weight that a kernel has moved into a layout
        of its own can be looked at in no other way."""
        module = self.harness_model().get_submodule(name)
        dtype = self.model_runner.model_config.dtype
        with torch.inference_mode():
            out = module(torch.tensor(x, dtype=dtype, device=self.model_runner.device))
        found: list[list[float]] = (out[0] if isinstance(out, tuple) else out).float().tolist()
        return found

    def harness_parameters(self) -> list[str]:
        """The names of all parameters."""
        return [name for name, _ in self.harness_model().named_parameters()]
