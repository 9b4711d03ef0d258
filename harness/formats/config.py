"""The formats that the harness knows, and `quantization_config`: which modules of a checkpoint are stored in which.

`quantization_config` writes the JSON that vLLM and transformers read; `parse` reads any such JSON. vLLM's loader (0.17
to 0.33) matches `re:` patterns against its own module names, so they must not be anchored to a prefix. Some releases
look a fused layer up by its fused name and others by its shards', so a pattern names both.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from harness.errors import UserError
from harness.formats.format import Arguments, Format
from harness.formats.fp8 import FP8_DYNAMIC
from harness.formats.nvfp4 import NVFP4, NVFP4A16

FORMATS: dict[str, Format] = {form.name: form for form in (NVFP4A16, NVFP4, FP8_DYNAMIC)}
"""The formats that the harness knows, by name: what it reads, decodes, checks and may build. In the order in which
sensitivities are measured and messages list them."""


def packed_names() -> set[str]:
    """The suffixes of tensors that only a quantized layer has in the place of its weight."""
    return {next(iter(form.weight_tensors)) for form in FORMATS.values()} - {"weight"}


def input_scale_names() -> set[str]:
    """The suffixes of stored scales of a layer's inputs."""
    return {form.input_scale_name for form in FORMATS.values() if form.input_scale_name is not None}


@dataclass(frozen=True)
class Group:
    """A group of the configuration: the modules that it targets and their format, None for a format that the harness
    does not know."""

    name: str
    targets: tuple[str, ...]
    format: Format | None


@dataclass(frozen=True)
class QuantizationConfig:
    """A parsed `quantization_config`."""

    groups: tuple[Group, ...]
    ignore: tuple[str, ...]
    kv_cache_scheme: bool

    def group_of(self, module: str) -> Group | None:
        """The group that stores linear `module`, or None where it is ignored or nothing targets it. As in
        compressed-tensors' `match_targets`, exact names win over patterns, patterns over the class name, and of several
        patterns the first in the alphabet."""
        if any(matches(module, pattern) for pattern in self.ignore):
            return None
        for target, group in self._by_target.items():
            if matches(module, target):
                return group
        return self._by_target.get("Linear")

    @cached_property
    def _by_target(self) -> dict[str, Group]:
        """Groups by target, in the order in which targets are tried."""
        group_of = {target: group for group in self.groups for target in group.targets}
        return dict(sorted(group_of.items(), key=lambda item: (item[0].startswith("re:"), item[0])))


def matches(module: str, pattern: str) -> bool:
    """Whether an entry of `targets` or `ignore` names `module`: exactly, or as `re:` from its start."""
    return re.match(pattern[3:], module) is not None if pattern.startswith("re:") else module == pattern


def quantization_config(targets: Mapping[Format, Sequence[str]], ignore: Sequence[str]) -> dict[str, Any]:
    """The JSON object for `config.json`: one group a format, patterns in `targets`, kept linears in `ignore`."""
    groups = {
        f"group_{index}": {
            "targets": list(patterns),
            "weights": dict(form.weights),
            "input_activations": dict(form.input_activations) if form.input_activations else None,
            "output_activations": None,
            "format": form.compressor,
        }
        for index, (form, patterns) in enumerate(targets.items())
    }
    formats = {form.compressor for form in targets}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": groups,
        "ignore": list(ignore),
        "kv_cache_scheme": None,
    }


def parse(config: Mapping[str, Any] | None, where: str) -> QuantizationConfig:
    """Reads a `quantization_config`; `UserError`, naming `where`, if it is not one of compressed-tensors."""
    if not isinstance(config, Mapping) or config.get("quant_method") != "compressed-tensors":
        method = config.get("quant_method") if isinstance(config, Mapping) else None
        raise UserError(
            f"{where} has no compressed-tensors quantization_config (its quant_method is {method!r}).",
            "Give the folder of a compressed-tensors checkpoint.",
        )

    def typed(value: object, kind: type, what: str) -> Any:
        if not isinstance(value, kind):
            raise UserError(f"{where}: {what} of quantization_config is {value!r}.", "Write the checkpoint anew.")
        return value

    def patterns(value: object, what: str) -> tuple[str, ...]:
        names = tuple(typed(name, str, what) for name in typed(value or [], list, what))
        for name in names:
            if name.startswith("re:"):
                try:
                    re.compile(name[3:])
                except re.error as error:
                    raise UserError(
                        f"{where}: {what} of quantization_config has the pattern {name!r} ({error}).",
                        "Write the checkpoint anew.",
                    ) from None
        return names

    groups = []
    for name, group in typed(config.get("config_groups"), dict, "config_groups").items():
        typed(group, dict, name)
        for key in ("weights", "input_activations"):
            typed(group.get(key) or {}, dict, f"{name}.{key}")
        form = _recognise(group, str(group.get("format") or config.get("format")))
        groups.append(Group(name, patterns(group.get("targets"), f"{name}.targets"), form))
    return QuantizationConfig(
        groups=tuple(groups),
        ignore=patterns(config.get("ignore"), "ignore"),
        kv_cache_scheme=config.get("kv_cache_scheme") is not None,
    )


_DEFINING = ("num_bits", "type", "strategy", "group_size", "dynamic")


def _recognise(group: Mapping[str, Any], compressor: str) -> Format | None:
    """The format that a group of the configuration describes."""

    def defining(arguments: Mapping[str, Any] | Arguments | None) -> list[Any] | None:
        return None if arguments is None else [dict(arguments).get(key) for key in _DEFINING]

    wanted = compressor, defining(group.get("weights")), defining(group.get("input_activations"))
    for form in FORMATS.values():
        if (form.compressor, defining(form.weights), defining(form.input_activations)) == wanted:
            return form
    return None
