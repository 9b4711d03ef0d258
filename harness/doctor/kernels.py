"""Which kernel of vLLM serves a format on a GPU (vllm/model_executor/kernels/linear/__init__.py)."""

from dataclasses import dataclass

from harness.formats.format import Format
from harness.formats.names import FP8_DYNAMIC, NVFP4

Capability = tuple[int, int]
_HOPPER, _ADA, _OLDEST = (9, 0), (8, 9), (7, 5)
_HUMMING_SINCE = (0, 32)


@dataclass(frozen=True)
class Kernel:
    """A kernel by vLLM's name; `weight_only` where activations stay in 16 bits, whatever the checkpoint says."""

    name: str
    weight_only: bool


def kernel_for(form: Format, capability: Capability, release: tuple[int, int]) -> Kernel | None:
    """The kernel that vLLM of `release` chooses for layers of a format; None for a GPU that none of them runs on."""
    if capability < _OLDEST:
        return None
    if form.name == FP8_DYNAMIC:
        return Kernel("CUTLASS FP8", False) if capability >= _ADA else Kernel("Marlin", True)
    four_bits = form.name == NVFP4
    if capability[0] == 10:
        return Kernel("FlashInfer or CuTe-DSL", False) if four_bits else Kernel("CuTe-DSL", True)
    if capability[0] >= 12:
        return Kernel("FlashInfer CUTLASS", False) if four_bits else Kernel("Marlin", True)
    if capability == _HOPPER and release >= _HUMMING_SINCE:
        return Kernel("Humming", True)
    return Kernel("Marlin", True)
