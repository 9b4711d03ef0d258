"""`quantization_config`: which modules of a checkpoint are stored in which format.

A `Format` is one way to store a linear layer: its compressed-tensors arguments and the tensors it leaves on
disk. `quantization_config` writes the JSON that vLLM and transformers read; `parse` reads any such JSON back,
ours or not, and answers which format a module has.

Two rules of vLLM's loader shape what is written (compressed_tensors.py and utils.py of its quantization layer,
releases 0.17 to 0.33): `re:` patterns are matched against vLLM's own module names, so they must not be anchored
to a prefix; and a layer that vLLM fuses is looked up by its fused name in some releases and by its shards' in
others, so a pattern names both. Only arguments that `QuantizationArgs` of compressed-tensors 0.17 knows are
written: it forbids any other key.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from harness.errors import UserError
from harness.formats import nvfp4


@dataclass(frozen=True)
class StoredTensor:
    """One tensor on disk: `suffix` follows the module's name, `dtype` is a safetensors dtype name."""

    suffix: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return num_bytes(self.dtype, self.shape)


@dataclass(frozen=True)
class Format:
    """One way to store a linear layer. `weights` and `input_activations` are `QuantizationArgs` keys."""

    name: str
    compressor: str
    weights: tuple[tuple[str, Any], ...]
    input_activations: tuple[tuple[str, Any], ...] | None = None

    @property
    def needs_calibration(self) -> bool:
        """Whether a scale of the activations is stored, which only data can choose."""
        return self.input_activations is not None and dict(self.input_activations)["dynamic"] is not True

    def stored(self, out_features: int, in_features: int) -> tuple[StoredTensor, ...]:
        """The tensors that replace `weight [out_features, in_features]`."""
        if self.compressor == "float-quantized":
            return (
                StoredTensor("weight", "F8_E4M3", (out_features, in_features)),
                StoredTensor("weight_scale", "BF16", (out_features, 1)),
            )
        tensors = (
            StoredTensor("weight_packed", "U8", (out_features, in_features // 2)),
            StoredTensor("weight_scale", "F8_E4M3", (out_features, in_features // nvfp4.BLOCK)),
            StoredTensor("weight_global_scale", "F32", (1,)),
        )
        return (*tensors, StoredTensor("input_global_scale", "F32", (1,))) if self.needs_calibration else tensors


_NVFP4_ARGS = (
    ("num_bits", 4),
    ("type", "float"),
    ("strategy", "tensor_group"),
    ("group_size", nvfp4.BLOCK),
    ("symmetric", True),
    ("dynamic", False),
    ("scale_dtype", "torch.float8_e4m3fn"),
    ("zp_dtype", "torch.float8_e4m3fn"),
)
_NVFP4_LOCAL_ARGS = tuple((key, "local" if key == "dynamic" else value) for key, value in _NVFP4_ARGS)


def _fp8_args(strategy: str, *, dynamic: bool) -> tuple[tuple[str, Any], ...]:
    return (("num_bits", 8), ("type", "float"), ("strategy", strategy), ("symmetric", True), ("dynamic", dynamic))


NVFP4A16 = Format("NVFP4A16", "nvfp4-pack-quantized", _NVFP4_ARGS)
NVFP4 = Format("NVFP4", "nvfp4-pack-quantized", _NVFP4_ARGS, _NVFP4_LOCAL_ARGS)
FP8_DYNAMIC = Format(
    "FP8_DYNAMIC", "float-quantized", _fp8_args("channel", dynamic=False), _fp8_args("token", dynamic=True)
)
FORMATS = (NVFP4A16, NVFP4, FP8_DYNAMIC)

_ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("BF16", "F16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"), 1),
}


def num_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor of a safetensors `dtype`; `KeyError` for a dtype that is not whole bytes."""
    total = _ITEM_BYTES[dtype]
    for size in shape:
        total *= size
    return total


@dataclass(frozen=True)
class Group:
    """One config group: the modules it targets and their format; None where this harness knows no such format."""

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
        """The group that stores linear `module`, or None where it is ignored or nothing targets it.

        Exact names win over patterns, patterns over the class name, and of several patterns the first in the
        alphabet, whatever the order of the groups: as in compressed-tensors' `match_targets`.
        """
        if any(_matches(module, pattern) for pattern in self.ignore):
            return None
        for target, group in self._by_target.items():
            if _matches(module, target):
                return group
        return self._by_target.get("Linear")

    @cached_property
    def _by_target(self) -> dict[str, Group]:
        """Groups by target, in the order in which targets are tried."""
        group_of = {target: group for group in self.groups for target in group.targets}
        return dict(sorted(group_of.items(), key=lambda item: (item[0].startswith("re:"), item[0])))


def _matches(module: str, pattern: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return module == pattern


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


_DEFINING_ARGS = ("num_bits", "type", "strategy", "group_size", "dynamic")


def _recognise(group: Mapping[str, Any], compressor: str) -> Format | None:
    def signature(args: Mapping[str, Any] | None) -> tuple[Any, ...] | None:
        return None if args is None else tuple(args.get(key) for key in _DEFINING_ARGS)

    for form in FORMATS:
        activations = dict(form.input_activations) if form.input_activations else None
        if (form.compressor, signature(dict(form.weights)), signature(activations)) == (
            compressor,
            signature(group.get("weights")),
            signature(group.get("input_activations")),
        ):
            return form
    return None
