"""Scales and codes on their own: finite, positive, the right way round, equal where vLLM fuses, alike among experts.

vLLM checks none of it: such a layer's outputs become NaN or noise, or too small.
"""

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping

import torch

from harness.audit.findings import Finding
from harness.audit.keys import Module
from harness.formats.config import input_scale_names
from harness.model.checkpoint import Checkpoint, row_pieces

OUTLIER_RATIO = 1e3
"""How far an expert's global scale may be from the median of its layer, whose experts all read the same hidden states.
A scale that is too small by r leaves the block scales r below E4M3's maximum; the format keeps its precision over
448 * 2^6 = 28,672, and ordinary blocks need some 30 of it. A scale too large by r clips activations to 1/r."""

_E4M3 = "F8_E4M3"
_DEFAULT_SCALE = 1.0
_DEFAULT_RATIO = 10.0


def scale_findings(checkpoint: Checkpoint, module: Module) -> Iterator[Finding]:
    """What is wrong with the scales and, where codes can be wrong on their own, the codes of one complete module."""
    stored = {part.suffix: part for part in module.form.stored(module.linear.out_features, module.linear.in_features)}
    if stored["weight_scale"].dtype == _E4M3:
        yield from _block_scale_findings(checkpoint, module)
    else:
        yield from _row_scale_findings(checkpoint, module)
    for suffix, (low, high) in module.form.healthy_scales.items():
        yield from _shared_scale_findings(checkpoint, f"{module.name}.{suffix}", low, high)
    if "weight" in stored and stored["weight"].dtype == _E4M3:
        yield from _code_findings(checkpoint, module)


def _block_scale_findings(checkpoint: Checkpoint, module: Module) -> Iterator[Finding]:
    codes = checkpoint.tensor(f"{module.name}.weight_scale").view(torch.uint8)
    for problem, bad in (
        ("holds NaN", (codes & 0x7F) == 0x7F),
        ("holds zeros", (codes & 0x7F) == 0),
        ("holds negative scales", (codes & 0x80) != 0),
    ):
        if count := int(bad.sum()):
            where = f"{problem} in {count} of {codes.numel()} blocks"
            why = "the FP4 kernels take block scales as positive: those blocks decode to NaN, zero or garbage"
            yield Finding("error", f"{module.name}.weight_scale", where, why)


def _shared_scale_findings(checkpoint: Checkpoint, name: str, low: float, high: float) -> Iterator[Finding]:
    if name not in checkpoint.tensors:
        return
    value = float(checkpoint.tensor(name))
    if not math.isfinite(value) or value <= 0:
        yield Finding("error", name, f"is {value}", "every output of the layer becomes NaN, infinite or zero")
    elif not low <= value <= high:
        problem = f"is {value:.4g}, outside {low:g} to {high:g}: stored as its reciprocal, as Model Optimizer does?"
        why = "compressed-tensors divides by it: the layer's numbers come out larger or smaller by its square"
        yield Finding("error", name, problem, why)


def _row_scale_findings(checkpoint: Checkpoint, module: Module) -> Iterator[Finding]:
    name = f"{module.name}.weight_scale"
    scales = checkpoint.tensor(name).float()
    if count := int((~(scales.isfinite() & (scales > 0))).sum()):
        problem = f"is no positive number in {count} of {scales.numel()} rows"
        yield Finding("error", name, problem, "those outputs become NaN, infinite, zero or of the wrong sign")
    elif (middle := float(scales.median())) > 1:
        problem = f"is {middle:.4g} in the median, which makes weights of {448 * middle:.4g}: stored as its reciprocal?"
        why = "compressed-tensors multiplies by it: the layer's outputs come out larger by its square"
        yield Finding("error", name, problem, why)


def _code_findings(checkpoint: Checkpoint, module: Module) -> Iterator[Finding]:
    name, rows, width = f"{module.name}.weight", module.linear.out_features, module.linear.in_features
    count = 0
    for piece in row_pieces(rows, width):
        codes = checkpoint.rows(name, *piece)
        # E4M3 has no infinity: all exponent and mantissa bits set is its one NaN, of either sign.
        count += int(((codes.view(torch.uint8) & 0x7F) == 0x7F).sum())
    if count:
        problem = f"holds NaN in {count} of {rows * width} codes"
        yield Finding("error", name, problem, "every token's output of those rows becomes NaN")


def modules_by_matrix(modules: Iterable[Module]) -> dict[str, list[Module]]:
    """The quantized modules by the name of the matrix that vLLM fuses them into."""
    groups: dict[str, list[Module]] = {}
    for module in modules:
        groups.setdefault(module.linear.fused_into, []).append(module)
    return groups


def _shared_scales(members: Iterable[Module]) -> list[str]:
    """The suffixes of the scales that some modules must share where vLLM fuses them."""
    return list(dict.fromkeys(suffix for module in members for suffix in module.form.healthy_scales))


def global_scales(checkpoint: Checkpoint, members: Iterable[Module], suffix: str) -> dict[str, float]:
    """The stored global scales `suffix` of some modules, by module; absent and misshapen ones are left out."""
    return {
        module.name: float(checkpoint.tensor(f"{module.name}.{suffix}"))
        for module in members
        if (entry := checkpoint.tensors.get(f"{module.name}.{suffix}")) and entry.shape == (1,)
    }


def are_unequal(values: Mapping[str, float]) -> bool:
    """Whether positive scales differ. One that is no positive number has a finding of its own and no ratio."""
    return len(set(values.values())) > 1 and all(0 < value < math.inf for value in values.values())


def fused_findings(checkpoint: Checkpoint, modules: Iterable[Module]) -> Iterator[Finding]:
    """Shards of one fused matrix with unequal global scales, or with unequal formats."""
    for fused, members in modules_by_matrix(modules).items():
        if len({module.form.name for module in members}) > 1:
            problem = "its shards are stored as " + ", ".join(f"{one.name}: {one.form.name}" for one in members)
            why = "vLLM refuses a fused layer of several formats, or silently takes the first shard's"
            yield Finding("error", fused, problem, why)
        for suffix in _shared_scales(members) if len(members) > 1 else ():
            values = global_scales(checkpoint, members, suffix)
            if are_unequal(values):
                ratio = max(values.values()) / min(values.values())
                listed = ", ".join(f"{name.rpartition('.')[2]} {value:.5g}" for name, value in values.items())
                problem = f"differs between the shards that vLLM fuses ({listed})"
                why = f"vLLM takes the largest and does not rescale: one shard decodes {ratio:.3g} times too small"
                yield Finding("error", f"{fused}.{suffix}", problem, why)


def expert_findings(checkpoint: Checkpoint, modules: Iterable[Module]) -> Iterator[Finding]:
    """A warning for every expert whose global scale is far from those of the other experts of its layer."""
    layers: dict[str, list[Module]] = {}
    for module in modules:
        if expert := module.linear.expert:
            projection = module.name.rpartition(".")[2]
            layers.setdefault(f"{expert.experts}.{projection}", []).append(module)
    for members in layers.values():
        for suffix in _shared_scales(members):
            stored = global_scales(checkpoint, members, suffix)
            values = {name: value for name, value in stored.items() if 0 < value < math.inf}
            median = statistics.median(values.values()) if values else math.nan
            for name, value in values.items():
                is_default = value == _DEFAULT_SCALE and median > _DEFAULT_RATIO
                if is_default or max(value / median, median / value) > OUTLIER_RATIO:
                    yield _outlier(f"{name}.{suffix}", value, median)


def _outlier(tensor: str, value: float, median: float) -> Finding:
    problem = f"is {value:.4g}, where the median of the layer's experts is {median:.4g}"
    if tensor.rpartition(".")[2] in input_scale_names():
        why = ": a default, or the trace of an expert that no calibration token reached"
        return Finding("warning", tensor, problem + why, "a token routed there is clipped or rounded to nothing")
    return Finding("warning", tensor, problem, "the expert's weights are far smaller or larger than the others'")
