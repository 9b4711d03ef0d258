"""Which tensors a checkpoint should hold, worked out again from its configuration, and which it holds instead.

Where configuration and disk contradict each other about a layer, that is told once, and not as missing and surplus
tensors.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from harness.audit.findings import REFUSED, UNINITIALISED, Finding
from harness.audit.matching import Meant
from harness.formats.config import Group, QuantizationConfig, input_scale_names, matches, packed_names
from harness.formats.format import UNQUANTIZED_DTYPES, Format
from harness.model.checkpoint import Checkpoint, TensorEntry
from harness.model.family import Family, Linear, ModelConfig, Part, expected_tensors

_MODEL_OPTIMIZER = {"weight_scale_2": "weight_global_scale", "input_scale": "input_global_scale"}


@dataclass(frozen=True)
class Module:
    """A linear layer that the quantization_config stores in `form`, under source tensor `tensor`."""

    linear: Linear
    form: Format
    tensor: str

    @property
    def name(self) -> str:
        """Its name in the checkpoint."""
        return self.linear.module


@dataclass
class Expectation:
    """What a folder of `config` should hold: (dtype, shape) by tensor name; dtype None for a kept tensor of any float.

    `meant` is every linear layer with the group that the configuration gives it, `names` every module's name, and
    `told` the tensors about which `findings` has said all there is to say.
    """

    config: ModelConfig
    tensors: dict[str, tuple[str | None, tuple[int, ...]]] = field(default_factory=dict)
    modules: list[Module] = field(default_factory=list)
    meant: list[Meant] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    told: set[str] = field(default_factory=set)
    findings: list[Finding] = field(default_factory=list)
    has_other_prefix: bool = False


def expect(
    config: ModelConfig,
    quantization: QuantizationConfig,
    stored: Mapping[str, TensorEntry],
    source: Checkpoint | None = None,
    *,
    with_mtp: bool,
) -> Expectation:
    """Works out what a checkpoint of `config` should hold. `stored` decides only between two ways to write the same:
    the published prefix of the text part or another, and kept experts fused or apart; it may be empty. A module's
    tensor is that of `source`, which may have its experts fused or apart too."""
    family = config.family
    prefix = family.text_prefix(stored)
    written = family.published if source is None else family.layout_of(source.tensors)
    layout = replace(written, text_prefix=prefix)
    expectation = Expectation(config, has_other_prefix=not family.is_loaded(prefix))
    if expectation.has_other_prefix:
        problem = "the text-only key layout, where the architecture has the multimodal one"
        why = "releases of vLLM that load the multimodal class find no text weights"
        expectation.findings.append(Finding("error", f"{prefix}layers.…", problem, why))
    tensors_of: dict[str, list[str]] = {}
    for name in stored:
        tensors_of.setdefault(name.rpartition(".")[0], []).append(name)
    for name, shape in expected_tensors(config, with_mtp=with_mtp, layout=layout):
        linears = family.linears_of(name, shape)
        meant = [(linear, quantization.group_of(linear.module)) for linear in linears]
        expectation.meant += meant
        expectation.names += (name.removesuffix(".weight").removesuffix(".bias"), *(one.module for one in linears))
        if not any(group for _, group in meant):
            apart = len(shape) == 3 and name not in stored and any(f"{one.module}.weight" in stored for one in linears)
            if not apart and not any(_is_quantized(stored, one.module) for one in linears):
                expectation.tensors[name] = (None, shape)
                continue
        elif len(shape) == 3 and name in stored:
            expectation.told.add(name)
            expectation.findings.append(_fused_experts(name, meant, tensors_of))
            if not any(linear.module in tensors_of for linear in linears):
                continue
        for linear, group in meant:
            _expect_linear(expectation, linear, group, name, stored, tensors_of.get(linear.module, []), quantization)
    return expectation


def _fused_experts(name: str, meant: list[Meant], tensors_of: Mapping[str, list[str]]) -> Finding:
    group = next(group for _, group in meant if group)
    if any(linear.module in tensors_of for linear, _ in meant):
        problem = f"is the fused tensor of all experts, left over beside the experts that {group.name} stores apart"
        return Finding("error", name, problem, "vLLM loads one over the other or stops at it, by release")
    problem = f"is stored as one 16-bit weight of all experts, but {group.name} targets each expert"
    return Finding("error", name, problem, UNINITIALISED)


def _is_quantized(stored: Mapping[str, TensorEntry], module: str) -> bool:
    weight = stored.get(f"{module}.weight")
    return any(f"{module}.{suffix}" in stored for suffix in packed_names()) or (
        weight is not None and weight.dtype not in UNQUANTIZED_DTYPES
    )


def _expect_linear(
    expectation: Expectation,
    linear: Linear,
    group: Group | None,
    tensor: str,
    stored: Mapping[str, TensorEntry],
    found: list[str],
    quantization: QuantizationConfig,
) -> None:
    """One linear layer of source tensor `tensor`; `found` are the tensors that are stored under its name."""
    name, shape = linear.module, (linear.out_features, linear.in_features)
    is_quantized = _is_quantized(stored, name)
    if group is None and not is_quantized:
        expectation.tensors[f"{name}.weight"] = (None, shape)
    elif group is None:
        ignored = next((entry for entry in quantization.ignore if matches(name, entry)), None)
        why = "no group targets it" if ignored is None else f"ignore lists it ({ignored})"
        expectation.told.update(found)
        consequence = f"it is loaded as a 16-bit layer: {UNINITIALISED}"
        expectation.findings.append(Finding("error", name, f"is stored quantized, but {why}", consequence))
    elif group.format is None:
        expectation.told.update(found)
    elif f"{name}.weight" in stored and not is_quantized:
        expectation.told.update(found)
        problem = f"is stored as a 16-bit weight, but {group.name} ({group.format.name}) targets it"
        expectation.findings.append(Finding("error", f"{name}.weight", problem, UNINITIALISED))
    else:
        expectation.modules.append(Module(linear, group.format, tensor))
        for one in group.format.stored(linear.out_features, linear.in_features):
            expectation.tensors[f"{name}.{one.suffix}"] = (one.dtype, one.shape)


def is_complete(stored: Mapping[str, TensorEntry], module: Module) -> bool:
    """Whether every tensor of a quantized module is there, in its dtype and shape."""
    return all(
        (entry := stored.get(f"{module.name}.{tensor.suffix}")) is not None
        and (entry.dtype, entry.shape) == (tensor.dtype, tensor.shape)
        for tensor in module.form.stored(module.linear.out_features, module.linear.in_features)
    )


def key_findings(
    stored: Mapping[str, TensorEntry], expectation: Expectation, *, source_has_mtp: bool | None
) -> Iterator[Finding]:
    """Missing, surplus and misshapen tensors; `source_has_mtp` is None where there is no source."""
    gone = set()
    family = expectation.config.family
    for part, prefix in family.parts.items():
        called_for = [name for name in expectation.tensors if name.startswith(prefix)]
        if called_for and not family.has_part(stored, part):
            gone.update(called_for)
            yield _lost_part(expectation.config, part, len(called_for), source_has_mtp)
    for name, (dtype, shape) in expectation.tensors.items():
        entry = stored.get(name)
        if entry is None:
            if name not in gone and name.rpartition(".")[2] in input_scale_names():
                problem = "is missing, the calibrated scale of the activations, which its group (W4A4) calls for"
                why = "vLLM divides activations by whatever memory holds: NaN or noise"
                yield Finding("error", name, problem, why)
            elif name not in gone:
                yield Finding("error", name, "is missing", UNINITIALISED)
            continue
        if entry.shape != shape:
            problem = f"has shape {list(entry.shape)} instead of {list(shape)}"
            if family.part_of(name) == "mtp":  # vLLM loads the head for speculation alone
                yield Finding("warning", name, problem, f"{REFUSED} where it speculates with the MTP head")
            else:
                yield Finding("error", name, problem, REFUSED)
        if entry.dtype != dtype and not (dtype is None and entry.dtype in UNQUANTIZED_DTYPES):
            wanted = dtype or "a 16- or 32-bit float"
            problem = f"is stored as {entry.dtype} instead of {wanted}"
            yield Finding("error", name, problem, "vLLM casts it and loses its meaning")
    for name in stored:
        if name not in expectation.tensors and name not in expectation.told:
            yield _surplus(family, name, stored)


def _lost_part(config: ModelConfig, part: Part, count: int, source_has_mtp: bool | None) -> Finding:
    prefix = config.family.parts[part]
    if part == "visual":
        problem = f"none of the vision tower's {count} tensors is there, though config.json describes it"
        return Finding("error", f"{prefix}*", problem, "the model answers about images that it does not see")
    told = [*["config.json counts its layers"] * config.states_mtp, *["the source has them"] * bool(source_has_mtp)]
    problem = f"none of the MTP head's {count} tensors is there, though {' and '.join(told)}"
    why = "speculative decoding with method mtp runs on uninitialised weights: no draft is ever accepted"
    return Finding("error" if source_has_mtp else "warning", f"{prefix}*", problem, why)


def _surplus(family: Family, name: str, stored: Mapping[str, TensorEntry]) -> Finding:
    module, _, suffix = name.rpartition(".")
    ours = _MODEL_OPTIMIZER.get(suffix)
    if ours is not None and f"{module}.{ours}" not in stored:
        why = f"loaders of compressed-tensors look for {ours}, find none and leave it uninitialised"
        return Finding("error", name, f"is Model Optimizer's name for the reciprocal of {ours}", why)
    known = "" if family.role_of(name) or name.endswith(("_scale", "_packed")) else ", which this architecture has not"
    problem = f"is not called for by config.json and quantization_config{known}"
    return Finding("warning", name, problem, "vLLM ignores it or stops at an unexpected key, by release")
