"""Checks a finished compressed-tensors checkpoint, ours or not, without loading it into an engine.

vLLM trusts what it is given: a tensor that is missing stays uninitialised, unequal scales of fused layers decode
one shard too small, a scale stored as its reciprocal turns weights into noise, and none of it stops the loading.
So the auditor compares the files with what `config.json` and its `quantization_config` call for and, where it is given,
with the source. Nothing comes from the builder: the keys are worked out again from the configuration, and the weights
are decoded by the format's equation.

    findings.py   what is said about a fault               scales.py   scales and codes on their own
    matching.py   which format vLLM takes for which layer  source.py   kept tensors, round-trip errors
    keys.py       which tensors there should be            repair.py   mends what can be
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.audit.findings import REFUSED, Finding, condensed
from harness.audit.keys import expect, is_complete, key_findings
from harness.audit.matching import idle_entries, matching_findings
from harness.audit.scales import expert_findings, fused_findings, scale_findings
from harness.audit.source import RoundTrip, open_original, round_trips, source_findings
from harness.formats.config import QuantizationConfig, parse
from harness.model.checkpoint import inspect_checkpoint
from harness.model.families import parse_config
from harness.progress import Progress

VERSION = 2
"""Bumped when the same checkpoint gets other findings."""

_MIXED = "mixed-precision"


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
    expectation = expect(config, quantization, checkpoint.tensors, with_mtp=with_mtp)
    findings = [Finding("error", "(files)", problem, REFUSED) for problem in problems]
    findings += _configuration_findings(quantization, checkpoint.config["quantization_config"])
    if not expectation.is_text_only:
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
            yield Finding("warning", "config.json", problem, "its tensors are not checked")
    formats = sorted({form for form in own.values() if form is not None})
    if formats and overall not in (formats[0] if len(formats) == 1 else _MIXED, _MIXED):
        problem = f"the format is {overall!r}, and that of the groups {' and '.join(formats)}"
        why = "readers that go by the checkpoint's format decode some layers by the wrong one"
        yield Finding("error", "config.json", problem, why)
