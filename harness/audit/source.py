"""The checkpoint against the one it was made from: what is kept is identical, what is quantized decodes nearby."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from harness.audit.findings import Finding
from harness.audit.keys import Expectation, Module
from harness.errors import UserError
from harness.model.checkpoint import INDEX, PIECE_BYTES, Checkpoint, open_checkpoint, read_json
from harness.progress import Progress

_MOST_RELATIVE_ERROR = 0.5
"""Round-to-nearest NVFP4 is at about 0.1 and FP8 at 0.03 of a weight's norm; half of it is not rounding."""


@dataclass(frozen=True)
class RoundTrip:
    """How far the stored weights of one role are from the source's: `relative_l2_error` is |q - w| / |w| in the 2-norm
    over all weights of the role, `snr_db` is -20 log10 of it."""

    role: str
    format: str
    num_tensors: int
    max_abs_error: float
    mean_abs_error: float
    relative_l2_error: float

    @property
    def snr_db(self) -> float:
        """The signal-to-noise ratio in decibels; infinite where nothing was rounded."""
        return -20 * math.log10(self.relative_l2_error) if self.relative_l2_error > 0 else math.inf


def open_original(folder: Path) -> Checkpoint:
    """The 16-bit checkpoint in `folder`; `UserError` for one that is damaged or quantized itself."""
    original = open_checkpoint(folder)
    if "quantization_config" in original.config:
        raise UserError(f"{folder} is quantized itself.", "Give the 16-bit checkpoint that it was made from.")
    return original


def texts(folder: Path) -> list[Path]:
    """The files beside the weights that an artifact carries unchanged: tokenizer, template, processor, generation."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file()
        and path.suffix in (".json", ".txt", ".jinja", ".model")
        and path.name not in ("config.json", INDEX)
    )


def source_findings(
    checkpoint: Checkpoint, original: Checkpoint, expectation: Expectation, progress: Progress
) -> Iterator[Finding]:
    """Kept tensors, tokenizer files and configuration that are not the source's."""
    quantized = {module.tensor for module in expectation.modules} | {
        name for name in expectation.told if name in original.tensors
    }
    for done, (name, entry) in enumerate(original.tensors.items(), 1):
        progress(done, len(original.tensors), "verify kept tensors")
        if name in quantized:
            continue
        kept = checkpoint.tensors.get(name)
        if kept is None:
            # What the configuration calls for has its finding already; this is what the configuration lost too.
            if name not in expectation.tensors:
                yield Finding("error", name, "is in the source and missing here", "that part of the model is gone")
            continue
        if (kept.dtype, kept.shape) != (entry.dtype, entry.shape) or any(
            ours != theirs for ours, theirs in zip(checkpoint.pieces(name), original.pieces(name), strict=True)
        ):
            problem = "is kept but not identical to the source's"
            yield Finding("error", name, problem, "the variant differs where it must not")
    for path in texts(original.folder):
        copy = checkpoint.folder / path.name
        if not copy.is_file():
            yield Finding("error", path.name, "is missing", "the tokenizer or processor falls back to another or fails")
        elif copy.read_bytes() != path.read_bytes():
            why = "other token ids or another prompt reach the model"
            yield Finding("error", path.name, "is not identical to the source's", why)
    ours = read_json(checkpoint.folder / "config.json")
    ours.pop("quantization_config", None)
    theirs = read_json(original.folder / "config.json")
    changed = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    if changed:
        problem = f"differs from the source's in {', '.join(changed)}"
        yield Finding("warning", "config.json", problem, "an engine may build another model than the source's")


@dataclass
class _Error:
    """Sums over the weights of one role."""

    tensors: set[str] = field(default_factory=set)
    num: int = 0
    largest: float = 0.0
    absolute: float = 0.0
    squared: float = 0.0
    source_squared: float = 0.0

    def add(self, other: "_Error") -> None:
        self.tensors |= other.tensors
        self.num += other.num
        self.largest = max(self.largest, other.largest)
        self.absolute += other.absolute
        self.squared += other.squared
        self.source_squared += other.source_squared

    @property
    def relative_l2(self) -> float:
        return math.sqrt(self.squared / self.source_squared) if self.source_squared else 0.0


def round_trips(
    checkpoint: Checkpoint, original: Checkpoint, modules: list[Module], progress: Progress
) -> tuple[tuple[RoundTrip, ...], list[Finding]]:
    """The errors by role, and a finding for every module whose weights are not the source's at all."""
    sums: dict[tuple[str, str], _Error] = {}
    far = []
    for done, module in enumerate(modules, 1):
        progress(done, len(modules), "verify round trip")
        if module.tensor not in original.tensors:
            continue
        error = _Error({module.tensor})
        for ours, theirs in _decoded_pieces(checkpoint, original, module):
            difference = (ours - theirs).abs()
            error.num += difference.numel()
            error.largest = max(error.largest, float(difference.max()))
            error.absolute += float(difference.sum(dtype=torch.float64))
            error.squared += float(difference.square().sum(dtype=torch.float64))
            error.source_squared += float(theirs.square().sum(dtype=torch.float64))
        if error.relative_l2 > _MOST_RELATIVE_ERROR:
            problem = f"decodes {error.relative_l2:.2f} times its own norm away from the source's weights"
            why = "the layer computes something else: codes swapped, another layer's scales, or another source"
            far.append(Finding("error", module.name, problem, why))
        sums.setdefault((module.linear.role.name, module.form.name), _Error()).add(error)
    trips = tuple(
        RoundTrip(
            role=role,
            format=form,
            num_tensors=len(total.tensors),
            max_abs_error=total.largest,
            mean_abs_error=total.absolute / total.num,
            relative_l2_error=total.relative_l2,
        )
        for (role, form), total in sums.items()
    )
    return trips, far


def _decoded_pieces(checkpoint: Checkpoint, original: Checkpoint, module: Module) -> Iterator[tuple[Any, Any]]:
    """The decoded and the source weights of a module as float32 `[rows, in]` pairs."""
    linear = module.linear
    step = max(1, PIECE_BYTES // (8 * linear.in_features))
    for first in range(0, linear.out_features, step):
        count = min(step, linear.out_features - first)
        theirs = original.rows(module.tensor, linear.first_row + first, count).float()
        yield module.form.decode_rows(checkpoint, module.name, first, count, torch.float32), theirs
