"""Whether both sides mean the same by rounding to nearest: their artifact beside ours, tensor by tensor.

llm-compressor computes its scales in bfloat16, so its files differ from ours in their last digits. What can be held
against each other exactly is the rest: our codes, chosen under *their* scales, must be theirs, bit for bit; and our
block scales under their global scale, but for those that bfloat16 moved to the next E4M3 value.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.formats import nvfp4
from harness.model.checkpoint import Checkpoint, open_checkpoint


def compare(source: Path, ours: Path, theirs: Path) -> dict[str, Any]:
    """One sample: how many packed bytes and block scales are equal as above, and the least and the greatest ratio of
    their global scales and input scales to ours (None where there are no input scales)."""
    origin, mine, other = (open_checkpoint(folder) for folder in (source, ours, theirs))
    counts = dict.fromkeys(("num_bytes", "num_bytes_equal", "num_scales", "num_scales_equal"), 0)
    ratios: dict[str, list[float]] = {"weight_global_scale": [], "input_global_scale": []}
    for name in mine.tensors:
        module, _, suffix = name.rpartition(".")
        if suffix in ratios:
            ratios[suffix].append(_number(other, name) / _number(mine, name))
        if suffix != "weight_packed":
            continue
        global_scale = other.tensor(f"{module}.weight_global_scale").float().view(1)
        scales, packed = other.tensor(f"{module}.weight_scale"), other.tensor(name)
        weight = origin.tensor(f"{module}.weight").float()
        chosen = nvfp4.absmax_block_scales(weight, global_scale)
        codes = nvfp4.pack(nvfp4.encode(weight, scales, global_scale))
        for key, found, wanted in (("scales", chosen, scales), ("bytes", codes, packed)):
            counts[f"num_{key}"] += wanted.numel()
            counts[f"num_{key}_equal"] += int((_bits(found) == _bits(wanted)).sum())
    sample: dict[str, Any] = {"kind": "agreement", "against": ours.name, **counts}
    for suffix, values in ratios.items():
        sample |= {f"{suffix}_low": min(values, default=None), f"{suffix}_high": max(values, default=None)}
    return sample


def _number(checkpoint: Checkpoint, name: str) -> float:
    return float(checkpoint.tensor(name).float())


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)
