"""Checks a finished compressed-tensors checkpoint, ours or not, without loading it into an engine.

vLLM trusts what it is given, and none of the faults that are looked for stops the loading. The auditor compares the
files with what `config.json` and its `quantization_config` call for and, where it is given, with the source: what is
kept is identical, what is quantized decodes nearby. It uses nothing of the builder.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from harness.audit.findings import REFUSED, Finding, condensed
from harness.audit.keys import Expectation, Module, expect, is_complete, key_findings
from harness.audit.matching import idle_entries, matching_findings
from harness.audit.scales import expert_findings, fused_findings, scale_findings
from harness.errors import UserError
from harness.formats.config import QuantizationConfig, parse
from harness.model.agreement import check_source
from harness.model.checkpoint import INDEX, Checkpoint, inspect_checkpoint, open_checkpoint, read_json, row_pieces
from harness.model.families import parse_config
from harness.progress import Progress

VERSION = 3
"""Bumped when the same checkpoint gets other findings."""

_MIXED = "mixed-precision"
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


@dataclass(frozen=True)
class Verification:
    """Every finding, and the round-trip errors where a source was given."""

    findings: tuple[Finding, ...]
    round_trips: tuple[RoundTrip, ...]
    num_tensors: int
    num_quantized_modules: int
    compared_with_source: bool

    @property
    def passed(self) -> bool:
        """Whether no finding is an error."""
        return not any(finding.severity == "error" for finding in self.findings)


def verify(folder: Path, source: Path | None, progress: Progress) -> Verification:
    """Checks the checkpoint in `folder`, against the one in `source` if given.

    `UserError` where there is nothing to check: no checkpoint, an architecture that the harness does not know,
    no compressed-tensors configuration, or a source that is damaged or quantized itself.
    """
    checkpoint, problems = inspect_checkpoint(folder)
    config = parse_config(checkpoint.config, str(folder / "config.json"))
    quantization = parse(checkpoint.config.get("quantization_config"), str(folder / "config.json"))
    original = None if source is None else open_original(source)
    family = config.family
    source_has_mtp = None if original is None else family.has_part(original.tensors, "mtp")
    is_told_of_mtp = config.states_mtp or source_has_mtp or family.has_part(checkpoint.tensors, "mtp")
    with_mtp = bool(config.num_mtp_layers and is_told_of_mtp and source_has_mtp is not False)
    expectation = expect(config, quantization, checkpoint.tensors, original, with_mtp=with_mtp)
    findings = [Finding("error", "(files)", problem, REFUSED) for problem in problems]
    findings += _configuration_findings(quantization, checkpoint.config["quantization_config"])
    if not expectation.has_other_prefix:
        findings += matching_findings(family, quantization, expectation.meant)
        findings += idle_entries(config, quantization, expectation.names)
    findings += expectation.findings
    findings += key_findings(checkpoint.tensors, expectation, source_has_mtp=source_has_mtp)
    present = [module for module in expectation.modules if is_complete(checkpoint.tensors, module)]
    sound = []
    for done, module in enumerate(present, 1):
        bad_scales = list(scale_findings(checkpoint, module))
        findings += bad_scales
        if not bad_scales:
            sound.append(module)
        progress(done, len(present), "verify scales")
    findings += fused_findings(checkpoint, expectation.modules)
    findings += expert_findings(checkpoint, present)
    trips: tuple[RoundTrip, ...] = ()
    if original is not None:
        findings += source_findings(checkpoint, original, expectation, progress)
        trips, far = round_trips(checkpoint, original, sound, progress)
        findings += far
    return Verification(
        findings=condensed(findings, family),
        round_trips=trips,
        num_tensors=len(checkpoint.tensors),
        num_quantized_modules=len(expectation.modules),
        compared_with_source=original is not None,
    )


def _configuration_findings(quantization: QuantizationConfig, raw: Mapping[str, Any]) -> Iterator[Finding]:
    if quantization.kv_cache_scheme:
        why = "vLLM switches the KV cache to FP8 under --kv-cache-dtype auto, which these hybrids do not survive"
        yield Finding("error", "config.json", "kv_cache_scheme is set", why)
    overall, own = raw.get("format"), {name: group.get("format") for name, group in raw["config_groups"].items()}
    for group in quantization.groups:
        if group.format is not None:
            continue
        if overall == _MIXED and own[group.name] is None:
            problem = f"{group.name} has no format of its own, and the checkpoint's is {_MIXED}"
            yield Finding("error", "config.json", problem, "vLLM finds no scheme for its layers and stops")
        else:
            problem = f"{group.name} has a format that this harness does not know"
            yield Finding("error", "config.json", problem, "nothing can be said of its layers, which are not checked")
    formats = sorted({form for form in own.values() if form is not None})
    if formats and overall not in (formats[0] if len(formats) == 1 else _MIXED, _MIXED):
        problem = f"the format is {overall!r}, and that of the groups {' and '.join(formats)}"
        why = "readers that go by the checkpoint's format decode some layers by the wrong one"
        yield Finding("error", "config.json", problem, why)


# -- Against the source ---------------------------------------------------------------------------------------------


def open_original(folder: Path) -> Checkpoint:
    """The 16-bit checkpoint in `folder`; `UserError` for one that is damaged, quantized itself, or as in
    `check_source`."""
    original = open_checkpoint(folder)
    if "quantization_config" in original.config:
        raise UserError(f"{folder} is quantized itself.", "Give the 16-bit checkpoint that it was made from.")
    check_source(parse_config(original.config, str(folder / "config.json")), original.tensors, str(folder))
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
        linear = module.linear
        for first, count in row_pieces(linear.out_features, 8 * linear.in_features):
            ours = module.form.decode_rows(checkpoint, module.name, first, count, torch.float32)
            theirs = original.rows(module.tensor, linear.first_row + first, count).float()
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
        sums.setdefault((linear.role.name, module.form.name), _Error()).add(error)
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
