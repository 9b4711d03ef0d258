"""Whether both sides mean the same by rounding to nearest: their artifact beside ours, tensor by tensor.

llm-compressor computes its scales in bfloat16, so its files differ from ours in their last digits. The rest can be
compared exactly. Our codes, chosen under *their* scales, must be their codes, bit for bit. Our block scales, under
their global scale, must be their block scales, but for those that bfloat16 moved to the next E4M3 value.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.formats import nvfp4
from harness.model.checkpoint import Checkpoint, open_checkpoint
from harness.progress import named
from harness.record import store
from harness.record.run import Record
from harness.record.store import RunWriter
from studies.peers import contest
from studies.peers.quantizers import quantize_once, write_calibration
from studies.peers.session import Session, header


def measure_agreement(session: Session, source: Path) -> list[Record]:
    """Our rounding to nearest beside theirs on an embedded model; a record of each pair."""
    part = f"agreement-{source.name}"
    folder = session.artifacts / source.name
    data = write_calibration(source, folder, contest.QUALITY_SAMPLES, session.progress)
    digest = open_checkpoint(source).fingerprint()
    about = {"source": source.name, "calibration_digest": data.digest}
    records = []
    for ours, theirs in contest.AGREEMENTS:
        told = replace(session, progress=named(session.progress, f"{part}: {theirs.name}"))
        mine, made = (quantize_once(told, one, source, folder / one.name, data, digest) for one in (ours, theirs))
        run = header(session, part, about, theirs.name, theirs, digest, made.digest, made.packages)
        with RunWriter(session.results, run) as writer:
            if failure := mine.failure or made.failure:
                writer.sample({"kind": "failure", "reason": failure})
            else:
                writer.sample(agreement_of(source, folder / ours.name, folder / theirs.name))
            records.append(store.read(writer.finish()))
    return records


def agreement_of(source: Path, ours: Path, theirs: Path) -> dict[str, Any]:
    """The sample of two artifacts of `source`: how many packed bytes and block scales are equal, and the least and the
    greatest ratio of their global scales and input scales to ours (None where there are no input scales)."""
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
