"""How vLLM finds a layer's format, held against what the configuration means.

`quantization_config` names modules as the checkpoint does. vLLM has module names of its own and fuses layers before it
asks for their format, so the same configuration can mean two things. Its rules (compressed_tensors.py and utils.py of
its quantization layer, qwen3_5.py, qwen3_next.py and qwen3_vl.py of its models, release 0.32; the older order of the
tests is that of 0.17 to 0.26):

* Names map by prefix (`Family.engine_prefixes`): in Qwen3.5 `model.language_model.` is `language_model.model.` inside.
  Exact names with a dot in `targets` and `ignore` are mapped likewise, `re:` patterns are not: they are matched from
  the start of vLLM's own name, so an anchored pattern misses it.
* A fused layer (`qkv_proj`) is ignored if an entry matches its own name or entries match all its shards'; where
  they match some, loading stops. Up to 0.26 only the shards' names are tried.
* Targets are tried in the order of the file: on the layer's name, then on its shards (all must match, the first
  decides), then on the class name, of which `Linear` is a part. Up to 0.26 the class name comes before the shards.
* All experts of a layer take the format of expert 0, whose three projections must have one.
* Routers and shared-expert gates are 16-bit whatever the configuration says (`Role.always_16_bit`).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from harness.audit.findings import REFUSED, Finding
from harness.formats.config import Group, QuantizationConfig, matches
from harness.model.family import Family, Linear, ModelConfig, expected_tensors

Meant = tuple[Linear, Group | None]
"""A linear layer and the group that the configuration gives it by the checkpoint's own names, None for 16-bit."""

_16_BIT = "16-bit"


@dataclass
class EngineLayer:
    """A layer as vLLM builds it, by its name there, with the linear layers of the checkpoint that are its `members`."""

    name: str
    family: Family
    members: list[Meant] = field(default_factory=list)

    @property
    def is_experts(self) -> bool:
        """Whether the layer is all routed experts of one decoder layer."""
        return self.members[0][0].expert is not None

    @property
    def asked(self) -> list[str]:
        """vLLM's names that it looks up: the shards' of a fused layer, expert 0's of a layer of experts, or the
        layer's own."""
        linears = [linear for linear, _ in self.members if linear.expert is None or linear.expert.number == 0]
        return [self.family.engine_name(linear.module) for linear in linears]


def engine_layers(family: Family, meant: Iterable[Meant]) -> dict[str, EngineLayer]:
    """vLLM's layers by the checkpoint's name of the fused layer, or of all experts of one layer."""
    layers: dict[str, EngineLayer] = {}
    for linear, group in meant:
        key = linear.expert.experts if linear.expert else linear.fused_into
        layers.setdefault(key, EngineLayer(family.engine_name(key), family)).members.append((linear, group))
    return layers


@dataclass(frozen=True)
class Reading:
    """What vLLM takes a layer for: `outcome` is matched, ignored, unmatched or raises; `group` only where matched."""

    outcome: str
    group: Group | None = None

    @property
    def form(self) -> str:
        """The name of the format that vLLM takes the layer for."""
        return _form(self.group)


def _form(group: Group | None) -> str:
    if group is None:
        return _16_BIT
    return group.format.name if group.format else group.name


class Reader:
    """vLLM's reading of one configuration; `up_to_026` for the older order of its tests."""

    def __init__(self, family: Family, config: QuantizationConfig, *, up_to_026: bool) -> None:
        def path(entry: str) -> str:
            return family.engine_name(entry) if "." in entry and not entry.startswith("re:") else entry

        self._ignore = [path(entry) for entry in config.ignore]
        self._groups = {path(target): group for group in config.groups for target in group.targets}
        self._up_to_026 = up_to_026

    def read(self, layer: EngineLayer) -> Reading:
        """The format of one layer."""
        if not layer.is_experts:
            kind = "ParallelLMHead" if layer.members[0][0].role.part == "head" else "ParallelLinear"
            return self._read(layer.name, layer.asked, kind)
        readings = [self._read(name, [name], "Linear") for name in layer.asked]
        if len({reading.form for reading in readings}) > 1:
            return Reading("raises")
        return readings[0] if readings else Reading("unmatched")

    def _read(self, name: str, shards: Sequence[str], kind: str) -> Reading:
        ignored = [any(matches(shard, entry) for entry in self._ignore) for shard in shards]
        by_name = name in self._ignore or (
            not (self._up_to_026 and shards != [name]) and any(matches(name, entry) for entry in self._ignore)
        )
        if by_name or all(ignored):
            return Reading("ignored")
        if any(ignored):
            return Reading("raises")
        found = [self._first(shard) for shard in shards]
        of_class = (
            group
            for target, group in self._groups.items()
            if matches(kind, target) or (not target.startswith("re:") and target.lower() in kind.lower())
        )
        tests = [self._first(name), found[0] if all(found) else None, next(of_class, None)]
        if self._up_to_026:
            tests[1], tests[2] = tests[2], tests[1]
        group = next((group for group in tests if group is not None), None)
        return Reading("unmatched") if group is None else Reading("matched", group)

    def _first(self, name: str) -> Group | None:
        return next((group for target, group in self._groups.items() if matches(name, target)), None)


def matching_findings(family: Family, config: QuantizationConfig, meant: Sequence[Meant]) -> Iterator[Finding]:
    """Every kind of layer that vLLM takes for something else than the configuration means, each told once."""
    named = [group.name for group in config.groups if "Linear" not in group.targets]
    if named and len(named) < len(config.groups):
        problem = "a group targets 'Linear' beside groups that name modules"
        why = "vLLM 0.17 to 0.26 tests the class name before fused shards and may take the wrong group"
        yield Finding("warning", "config.json", problem, why)
    readers = (Reader(family, config, up_to_026=False), Reader(family, config, up_to_026=True))
    alike: dict[tuple[str, str, str, str], list[str]] = {}
    for name, layer in engine_layers(family, meant).items():
        role = layer.members[0][0].role
        said = _disagreement(layer, *(reader.read(layer) for reader in readers))
        if said is not None:
            alike.setdefault((role.fused or role.name, *said), []).append(name)
    for (_, severity, problem, consequence), names in alike.items():
        more = f" (and so {len(names) - 1:,} more layers)" if len(names) > 1 else ""
        yield Finding(severity, names[0], problem + more, consequence)


def _disagreement(layer: EngineLayer, now: Reading, before: Reading) -> tuple[str, str, str] | None:
    """Severity, problem and consequence of a layer that vLLM takes for something else than the configuration means."""
    ours = list(dict.fromkeys(_form(group) for _, group in layer.members))
    role = layer.members[0][0].role
    if role.always_16_bit:
        if ours == [_16_BIT]:
            return None
        return "error", f"is meant to be {ours[0]}, but vLLM always loads it as 16-bit", REFUSED
    for reading, severity, when in ((now, "error", ""), (before, "warning", " (releases 0.17 to 0.26)")):
        if reading.outcome == "raises":
            what = "formats" if layer.is_experts else "shards"
            return severity, f"has some {what} ignored and others not, or of two formats", REFUSED + when
        if ours == [reading.form] or (len(ours) > 1 and _16_BIT not in ours and not layer.is_experts):
            continue  # agreed, or shards of several formats, which the scales' check names
        problem = f"is {' and '.join(ours)} by the checkpoint's names, and {reading.form} by vLLM's own"
        if reading.form == _16_BIT:
            return severity, problem, f"vLLM builds a 16-bit layer, in which quantized tensors have no place{when}"
        if _16_BIT in ours:
            return severity, problem, f"vLLM looks for quantized tensors and transformers for 16-bit ones{when}"
        return severity, problem, f"vLLM decodes it by the wrong format, or stops{when}"
    if role.always_16_bit or role.part == "head" or "unmatched" not in (now.outcome, before.outcome):
        return None
    if now.outcome == "unmatched":
        problem = "is neither targeted by a group nor listed in ignore"
        return "warning", problem, "vLLM up to 0.20 stops while loading, later releases load it as 16-bit unasked"
    return "warning", "is listed in ignore by its fused name alone", "vLLM up to 0.20 stops while loading"


def idle_entries(config: ModelConfig, quantization: QuantizationConfig, names: Iterable[str]) -> Iterator[Finding]:
    """Entries of `targets` and `ignore` that name nothing: neither a module of this model, whose `names` are given,
    nor one that another of its family has at the same place, so that one list may serve dense and MoE models."""
    present = _with_parents(config.family, names)
    family: set[str] = set()
    for kind, entry in [
        *(("ignore", entry) for entry in quantization.ignore),
        *((f"the targets of {group.name}", entry) for group in quantization.groups for entry in group.targets),
    ]:
        if entry == "Linear" or _names_any(present, entry):
            continue
        family = family or _with_parents(config.family, _family_modules(config))
        if not _names_any(family, entry):
            problem = f"{kind} has the entry {entry!r}, which names no module of this model"
            why = "what it was meant to name is loaded by the other entries' rules"
            yield Finding("warning", "config.json", problem, why)


def _names_any(names: set[str], entry: str) -> bool:
    return entry in names or (entry.startswith("re:") and any(matches(name, entry) for name in names))


def _with_parents(family: Family, modules: Iterable[str]) -> set[str]:
    """Modules and the modules that hold them, by the checkpoint's names and by vLLM's."""
    found: set[str] = set()
    for module in modules:
        for name in (module, family.engine_name(module)):
            while name and name not in found:
                found.add(name)
                name = name.rpartition(".")[0]
    return found


def _family_modules(config: ModelConfig) -> Iterator[str]:
    """Modules of a model of as many layers with everything that a model of its family may have."""
    family, width = config.family, max(16, config.intermediate_size)
    dense = replace(config, num_experts=0, intermediate_size=width, num_mtp_layers=1, tied_embeddings=False)
    experts = replace(dense, num_experts=1, moe_intermediate_size=width, shared_expert_intermediate_size=width)
    for one in (dense, experts):
        for name, shape in expected_tensors(one, with_mtp=True):
            yield name.removesuffix(".weight")
            for linear in family.linears_of(name, shape):
                yield from (linear.module, linear.fused_into)
    yield from family.optional_modules
