"""Checks a finished compressed-tensors checkpoint, ours or not, without loading it into an engine.

vLLM trusts what it is given: a tensor that is missing stays uninitialised, unequal scales of fused layers decode
one shard too small, a scale stored as its reciprocal turns weights into noise, and none of it stops the loading.
So the files are held against what `config.json` and its `quantization_config` call for, and, where the source is
at hand, against the source itself. Nothing here comes from the builder: the keys are worked out again from the
configuration, and the weights are decoded by the format's equation.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from harness.errors import UserError
from harness.formats import nvfp4
from harness.formats.config import Format, QuantizationConfig, parse
from harness.model.checkpoint import (
    INDEX,
    PIECE_BYTES,
    Checkpoint,
    inspect_checkpoint,
    open_checkpoint,
    read_json,
)
from harness.model.qwen35 import Linear, ModelConfig, expected_tensors, linears_of, parse_config, role_of
from harness.progress import Progress

VERSION = 1

_KEPT_DTYPES = ("BF16", "F16", "F32")
_MULTIMODAL, _TEXT_ONLY = "model.language_model.", "model."
_MOST_RELATIVE_ERROR = 0.5
"""Round-to-nearest NVFP4 is at about 0.1 and FP8 at 0.03 of a weight's norm; half of it is not rounding."""
_UNINITIALISED = "vLLM leaves the parameter uninitialised without a word, and the model answers with noise"
_REFUSED = "vLLM stops while loading"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: an `error` breaks or degrades the model, a `warning` may in some release."""

    severity: str
    tensor: str
    problem: str
    consequence: str


@dataclass(frozen=True)
class RoundTrip:
    """How far the stored weights of one role are from the source's, over all its weights.

    `relative_l2_error` is |q - w| / |w| in the 2-norm, `snr_db` is -20 log10 of it.
    """

    role: str
    format: str
    num_tensors: int
    max_abs_error: float
    mean_abs_error: float
    relative_l2_error: float

    @property
    def snr_db(self) -> float:
        return -20 * math.log10(self.relative_l2_error) if self.relative_l2_error > 0 else math.inf


@dataclass(frozen=True)
class Verification:
    """The outcome: every finding, and the round-trip errors where a source was given."""

    findings: tuple[Finding, ...]
    round_trips: tuple[RoundTrip, ...]
    num_tensors: int
    num_quantized_modules: int
    compared_with_source: bool

    @property
    def passed(self) -> bool:
        return not any(finding.severity == "error" for finding in self.findings)


@dataclass(frozen=True)
class _Module:
    """A linear layer that the quantization_config stores in `form`, under source tensor `tensor`."""

    linear: Linear
    form: Format
    tensor: str


@dataclass
class _Expectation:
    """What the folder should hold: (dtype, shape) by tensor name; dtype None for a kept tensor of any float."""

    tensors: dict[str, tuple[str | None, tuple[int, ...]]] = field(default_factory=dict)
    modules: list[_Module] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


def verify(folder: Path, source: Path | None, progress: Progress) -> Verification:
    """Checks the checkpoint in `folder`, against the one in `source` if given.

    `UserError` where there is nothing to check: no checkpoint, an architecture that the harness does not know,
    no compressed-tensors configuration, or a source that is damaged or quantized itself.
    """
    checkpoint, problems = inspect_checkpoint(folder)
    config = parse_config(checkpoint.config, str(folder / "config.json"))
    quantization = parse(checkpoint.config.get("quantization_config"), str(folder / "config.json"))
    original = None if source is None else _open_source(source)
    findings = [Finding("error", "(files)", problem, _REFUSED) for problem in problems]
    findings += _configuration_findings(quantization)
    expectation = _expect(config, quantization, checkpoint, original)
    findings += expectation.findings
    findings += _key_findings(checkpoint, expectation, original)
    present = [module for module in expectation.modules if _is_complete(checkpoint, module)]
    sound = []
    for done, module in enumerate(present, 1):
        bad_scales = list(_scale_findings(checkpoint, module))
        findings += bad_scales
        if not bad_scales:
            sound.append(module)
        progress(done, len(present), "verify scales")
    findings += _fused_findings(checkpoint, expectation.modules)
    round_trips: tuple[RoundTrip, ...] = ()
    if original is not None:
        findings += _source_findings(checkpoint, original, expectation, progress)
        round_trips, far = _round_trips(checkpoint, original, sound, progress)
        findings += far
    return Verification(
        findings=tuple(findings),
        round_trips=round_trips,
        num_tensors=len(checkpoint.tensors),
        num_quantized_modules=len(expectation.modules),
        compared_with_source=original is not None,
    )


def _open_source(source: Path) -> Checkpoint:
    original = open_checkpoint(source)
    if "quantization_config" in original.config:
        raise UserError(f"{source} is quantized itself.", "Give the 16-bit checkpoint that it was made from.")
    return original


def _configuration_findings(quantization: QuantizationConfig) -> Iterator[Finding]:
    if quantization.kv_cache_scheme:
        yield Finding(
            "error",
            "config.json",
            "kv_cache_scheme is set",
            "vLLM switches the KV cache to FP8 under --kv-cache-dtype auto, which these hybrids do not survive",
        )
    for group in quantization.groups:
        if group.format is None:
            yield Finding(
                "warning",
                "config.json",
                f"{group.name} has a format that this harness does not know",
                "its tensors are not checked",
            )
    named = [group.name for group in quantization.groups if "Linear" not in group.targets]
    if named and len(named) < len(quantization.groups):
        yield Finding(
            "warning",
            "config.json",
            "a group targets 'Linear' beside groups that name modules",
            "vLLM 0.17 to 0.26 tests the class name before fused shards and may take the wrong group",
        )


def _expect(
    config: ModelConfig, quantization: QuantizationConfig, checkpoint: Checkpoint, original: Checkpoint | None
) -> _Expectation:
    """Works out from the configuration what the folder should hold."""
    expectation = _Expectation()
    prefix = _MULTIMODAL
    if any(name.startswith("model.layers.") for name in checkpoint.tensors):
        prefix = _TEXT_ONLY
        expectation.findings.append(
            Finding(
                "error",
                "model.layers.…",
                "the text-only key layout, where the architecture has the multimodal one",
                "releases of vLLM that load the multimodal class find no text weights",
            )
        )
    names = checkpoint.tensors if original is None else original.tensors
    with_mtp = config.num_mtp_layers > 0 and (original is None or any(name.startswith("mtp.") for name in names))
    for published, shape in expected_tensors(config, with_mtp=with_mtp):
        name = published.replace(_MULTIMODAL, prefix, 1)
        stored = [
            (linear, group) for linear in linears_of(name, shape) if (group := quantization.group_of(linear.module))
        ]
        if not stored:
            expectation.tensors[name] = (None, shape)
        for linear, group in stored:
            if group.format is None:
                continue
            expectation.modules.append(_Module(linear, group.format, name))
            for tensor in group.format.stored(linear.out_features, linear.in_features):
                expectation.tensors[f"{linear.module}.{tensor.suffix}"] = (tensor.dtype, tensor.shape)
    return expectation


def _key_findings(checkpoint: Checkpoint, expectation: _Expectation, original: Checkpoint | None) -> Iterator[Finding]:
    """Missing, surplus and misshapen tensors."""
    missing_mtp = [name for name in expectation.tensors if name.startswith("mtp.") and name not in checkpoint.tensors]
    if missing_mtp and not any(name.startswith("mtp.") for name in checkpoint.tensors):
        yield Finding(
            "error" if original is not None else "warning",
            "mtp.*",
            f"none of the MTP head's {len(missing_mtp)} tensors is there, though config.json counts its layers"
            + (" and the source has them" if original is not None else ""),
            "speculative decoding with method mtp runs on uninitialised weights: no draft is ever accepted",
        )
    for name, (dtype, shape) in expectation.tensors.items():
        entry = checkpoint.tensors.get(name)
        if entry is None:
            if name not in missing_mtp:
                yield Finding("error", name, "missing", _UNINITIALISED)
            continue
        if entry.shape != shape:
            yield Finding("error", name, f"has shape {list(entry.shape)} instead of {list(shape)}", _REFUSED)
        if entry.dtype != dtype and not (dtype is None and entry.dtype in _KEPT_DTYPES):
            wanted = dtype or "a 16- or 32-bit float"
            yield Finding(
                "error", name, f"is stored as {entry.dtype} instead of {wanted}", "vLLM casts it and loses its meaning"
            )
    for name in checkpoint.tensors:
        if name not in expectation.tensors:
            known = "" if role_of(name) or name.endswith(("_scale", "_packed")) else ", which this architecture has not"
            yield Finding(
                "warning",
                name,
                f"is not called for by config.json and quantization_config{known}",
                "vLLM ignores it or stops at an unexpected key, by release",
            )


def _is_complete(checkpoint: Checkpoint, module: _Module) -> bool:
    return all(
        (entry := checkpoint.tensors.get(f"{module.linear.module}.{tensor.suffix}")) is not None
        and (entry.dtype, entry.shape) == (tensor.dtype, tensor.shape)
        for tensor in module.form.stored(module.linear.out_features, module.linear.in_features)
    )


def _scale_findings(checkpoint: Checkpoint, module: _Module) -> Iterator[Finding]:
    """Scales that are not finite, not positive, or stored the wrong way round."""
    name = module.linear.module
    if module.form.compressor == "float-quantized":
        scales = checkpoint.tensor(f"{name}.weight_scale").float()
        if count := int((~(scales.isfinite() & (scales > 0))).sum()):
            yield Finding(
                "error",
                f"{name}.weight_scale",
                f"is no positive number in {count} of {scales.numel()} rows",
                "those outputs become NaN, infinite, zero or of the wrong sign",
            )
        return
    codes = checkpoint.tensor(f"{name}.weight_scale").view(torch.uint8)
    for problem, bad in (
        ("holds NaN", (codes & 0x7F) == 0x7F),
        ("holds zeros", (codes & 0x7F) == 0),
        ("holds negative scales", (codes & 0x80) != 0),
    ):
        if count := int(bad.sum()):
            yield Finding(
                "error",
                f"{name}.weight_scale",
                f"{problem} in {count} of {codes.numel()} blocks",
                "the FP4 kernels take block scales as positive: those blocks decode to NaN, zero or garbage",
            )
    limits = {"weight_global_scale": (1.0, math.inf), "input_global_scale": (1.0, 1e4)}
    for suffix, (low, high) in limits.items():
        if f"{name}.{suffix}" not in checkpoint.tensors:
            continue
        value = float(checkpoint.tensor(f"{name}.{suffix}"))
        if not math.isfinite(value) or value <= 0:
            yield Finding(
                "error", f"{name}.{suffix}", f"is {value}", "every output of the layer becomes NaN, infinite or zero"
            )
        elif not low <= value <= high:
            yield Finding(
                "error",
                f"{name}.{suffix}",
                f"is {value:.4g}, outside {low:g} to {high:g}: stored as its reciprocal, as Model Optimizer does?",
                "compressed-tensors divides by it: the layer's numbers come out larger or smaller by its square",
            )


def _fused_findings(checkpoint: Checkpoint, modules: list[_Module]) -> Iterator[Finding]:
    """Shards of one fused matrix with unequal global scales, or with unequal formats."""
    groups: dict[str, list[_Module]] = {}
    for module in modules:
        groups.setdefault(module.linear.fused_into, []).append(module)
    for fused, members in groups.items():
        if len({module.form.name for module in members}) > 1:
            yield Finding(
                "error",
                fused,
                "its shards are stored as " + ", ".join(f"{m.linear.module}: {m.form.name}" for m in members),
                "vLLM refuses a fused layer of several formats, or silently takes the first shard's",
            )
        for suffix in ("weight_global_scale", "input_global_scale"):
            values = {
                module.linear.module: float(checkpoint.tensor(f"{module.linear.module}.{suffix}"))
                for module in members
                if (entry := checkpoint.tensors.get(f"{module.linear.module}.{suffix}")) and entry.shape == (1,)
            }
            # A scale that is no positive number has a finding of its own and no ratio.
            if len(set(values.values())) > 1 and all(0 < value < math.inf for value in values.values()):
                ratio = max(values.values()) / min(values.values())
                listed = ", ".join(f"{name.rpartition('.')[2]} {value:.5g}" for name, value in values.items())
                yield Finding(
                    "error",
                    f"{fused}.{suffix}",
                    f"differs between the shards that vLLM fuses ({listed})",
                    f"vLLM takes the largest and does not rescale: one shard decodes {ratio:.3g} times too small",
                )


def _source_findings(
    checkpoint: Checkpoint, original: Checkpoint, expectation: _Expectation, progress: Progress
) -> Iterator[Finding]:
    """Kept tensors, tokenizer files and configuration that are not the source's."""
    quantized = {module.tensor for module in expectation.modules}
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
            yield Finding(
                "error", name, "is kept but not identical to the source's", "the variant differs where it must not"
            )
    for path in sorted(original.folder.iterdir()):
        is_text = path.suffix in (".json", ".txt", ".jinja", ".model") and path.name not in ("config.json", INDEX)
        if not path.is_file() or not is_text:
            continue
        copy = checkpoint.folder / path.name
        if not copy.is_file():
            yield Finding("error", path.name, "is missing", "the tokenizer or processor falls back to another or fails")
        elif copy.read_bytes() != path.read_bytes():
            yield Finding(
                "error",
                path.name,
                "is not identical to the source's",
                "other token ids or another prompt reach the model",
            )
    ours = read_json(checkpoint.folder / "config.json")
    ours.pop("quantization_config", None)
    theirs = read_json(original.folder / "config.json")
    changed = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    if changed:
        yield Finding(
            "warning",
            "config.json",
            f"differs from the source's in {', '.join(changed)}",
            "an engine may build another model than the source's",
        )


@dataclass
class _Error:
    """Sums over the weights of one role."""

    format: str
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


def _round_trips(
    checkpoint: Checkpoint, original: Checkpoint, modules: list[_Module], progress: Progress
) -> tuple[tuple[RoundTrip, ...], list[Finding]]:
    """The errors by role, and a finding for every module whose weights are not the source's at all."""
    sums: dict[str, _Error] = {}
    far = []
    for done, module in enumerate(modules, 1):
        progress(done, len(modules), "verify round trip")
        if module.tensor not in original.tensors:
            continue
        error = _Error(module.form.name, {module.tensor})
        for ours, theirs in _decoded_pieces(checkpoint, original, module):
            difference = (ours - theirs).abs()
            error.num += difference.numel()
            error.largest = max(error.largest, float(difference.max()))
            error.absolute += float(difference.sum(dtype=torch.float64))
            error.squared += float(difference.square().sum(dtype=torch.float64))
            error.source_squared += float(theirs.square().sum(dtype=torch.float64))
        if error.relative_l2 > _MOST_RELATIVE_ERROR:
            far.append(
                Finding(
                    "error",
                    module.linear.module,
                    f"decodes {error.relative_l2:.2f} times its own norm away from the source's weights",
                    "the layer computes something else: codes swapped, another layer's scales, or another source",
                )
            )
        sums.setdefault(module.linear.role.name, _Error(module.form.name)).add(error)
    trips = tuple(
        RoundTrip(
            role=role,
            format=total.format,
            num_tensors=len(total.tensors),
            max_abs_error=total.largest,
            mean_abs_error=total.absolute / total.num,
            relative_l2_error=total.relative_l2,
        )
        for role, total in sums.items()
    )
    return trips, far


def _decoded_pieces(checkpoint: Checkpoint, original: Checkpoint, module: _Module) -> Iterator[tuple[Any, Any]]:
    """The decoded and the source weights of a module as float32 `[rows, in]` pairs."""
    linear = module.linear
    step = max(1, PIECE_BYTES // (8 * linear.in_features))
    for first in range(0, linear.out_features, step):
        count = min(step, linear.out_features - first)
        scales = checkpoint.rows(f"{linear.module}.weight_scale", first, count)
        if module.form.compressor == "float-quantized":
            decoded = checkpoint.rows(f"{linear.module}.weight", first, count).float() * scales.float()
        else:
            packed = checkpoint.rows(f"{linear.module}.weight_packed", first, count)
            global_scale = checkpoint.tensor(f"{linear.module}.weight_global_scale")
            decoded = nvfp4.decode(packed, scales, global_scale, torch.float32)
        yield decoded, original.rows(module.tensor, linear.first_row + first, count).float()
