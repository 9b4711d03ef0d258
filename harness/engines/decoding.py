"""A quantized checkpoint as a 16-bit model, decoded by the harness.

transformers reads compressed-tensors checkpoints itself, but not every one: release 5.19 has no place for the
`weight_global_scale` of experts, whose layers on disk (`experts.3.gate_proj`, one matrix each) are slices of two 3-D
parameters in its model class (`experts.gate_up_proj [E, 2I, H]`, `experts.down_proj [E, H, I]`). Here the model class
is built empty from its configuration, and filled piece by piece: a **place** is a parameter, or a slice of one,
together with the module on disk that it is decoded from. All names, shapes and dtypes are checked before the first
weight is read. Nothing is held twice but the piece in hand, so loading takes the memory of the finished model and a
shard's mapped pages, which the system may take back.

The arithmetic is that of transformers on a dense checkpoint, so that the numbers of dense and MoE models mean the
same: NVFP4 is decoded to BF16, and widened where the model computes in float32; FP8 is decoded into the model's dtype.
Where a format quantizes activations too, `emulation` rounds them on every call.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import initialization

from harness.engines.emulation import ExpertRounding, Rounding, input_rounding, round_expert_inputs, round_inputs
from harness.errors import UserError
from harness.formats import fp8, nvfp4
from harness.formats.config import FORMATS, Format, QuantizationConfig

_FLOATS = ("BF16", "F16", "F32")
_OPEN_SHARDS = 2
_CHUNK_ELEMENTS = 1 << 22
"""Weights decoded at a time: their float32 temporaries stay small beside the model."""


@dataclass
class Report:
    """What does not fit, by name; the fields are those of transformers' own loading report."""

    missing_keys: list[str] = field(default_factory=list)
    mismatched_keys: list[tuple[str, ...]] = field(default_factory=list)
    unexpected_keys: list[str] = field(default_factory=list)
    error_msgs: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return any(vars(self).values())


def load(
    auto_class: Any, config: Any, quantization: QuantizationConfig, folder: Path, dtype: torch.dtype
) -> tuple[Any, Report]:
    """The model of transformers configuration `config` with the weights of `folder`, decoded, and what does not fit.

    `auto_class` is transformers' `AutoModelFor…`. Where the report is not empty, no weight was read. Raises
    `UserError` for a module in a format that the harness does not know, and for an expert whose gate and up
    projections round their common input differently.
    """
    with initialization.no_init_weights():
        model = auto_class.from_config(config, dtype=dtype, trust_remote_code=False)
    model.tie_weights()
    shards = _Shards(folder)
    places = _places(model, quantization, shards.entries, folder)
    aliases = set(model.state_dict()) - set(_tensors(model))  # a tied head may be stored though it is not needed
    report = _check(places, shards.entries, aliases)
    if not report:
        places.sort(key=lambda place: shards.entries[place.needs[0].name].file)
        scales: dict[str, Tensor] = {}
        with torch.no_grad():
            for place in places:
                parts = {part.suffix: shards.tensor(part.name) for part in place.needs}
                _fill(place, parts)
                if "input_global_scale" in parts:
                    scales[place.module] = parts["input_global_scale"].clone()
        _round(model, places, scales, folder)
    return model, report


def formats_of(module: nn.Module) -> tuple[Format | None, ...]:
    """The formats that `load` decoded the weights of `module` from, None among them for weights that were stored as
    they are; empty for a module without any such weight."""
    found: tuple[Format | None, ...] = getattr(module, "decoded_from", ())
    return found if any(found) else ()


@dataclass(frozen=True)
class _Entry:
    """A tensor on disk."""

    file: str
    dtype: str
    shape: tuple[int, ...]


class _Shards:
    """The tensors of a checkpoint folder by name. Reading maps a file; only the last few stay mapped."""

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        files: Iterable[str] = ["model.safetensors"]
        if index.is_file():
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        self._folder = folder
        self._open: dict[str, Any] = {}
        self.entries: dict[str, _Entry] = {}
        for file in files:
            handle = self._handle(file)
            names = handle.keys()
            for name in names:
                part = handle.get_slice(name)
                self.entries[name] = _Entry(file, part.get_dtype(), tuple(part.get_shape()))

    def _handle(self, file: str) -> Any:
        handle = self._open.pop(file, None) or safe_open(self._folder / file, framework="pt")
        self._open[file] = handle  # the last one read is the last to go
        if len(self._open) > _OPEN_SHARDS:
            del self._open[next(iter(self._open))]
        return handle

    def tensor(self, name: str) -> Tensor:
        found: Tensor = self._handle(self.entries[name].file).get_tensor(name)
        return found


@dataclass(frozen=True)
class _Need:
    """A tensor that a place is filled from; `dtypes` are those it may have."""

    name: str
    suffix: str
    dtypes: tuple[str, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Place:
    """`target`, a parameter or a slice of one, is decoded from module `module`, or copied where `form` is None.

    `owner` is the model's module that computes with it. `expert` is the expert and the projection that a slice is of.
    """

    target: Tensor
    owner: str
    module: str
    form: Format | None
    needs: tuple[_Need, ...]
    expert: tuple[int, str] | None = None


def _decoded(target: Tensor, owner: str, module: str, form: Format, expert: tuple[int, str] | None = None) -> _Place:
    needs = tuple(
        _Need(f"{module}.{part.suffix}", part.suffix, _FLOATS if part.dtype in _FLOATS else (part.dtype,), part.shape)
        for part in form.stored(*target.shape)
    )
    return _Place(target, owner, module, form, needs, expert)


def _copied(target: Tensor, owner: str, name: str, expert: tuple[int, str] | None = None) -> _Place:
    module, _, suffix = name.rpartition(".")
    return _Place(target, owner, module, None, (_Need(name, suffix, _FLOATS, tuple(target.shape)),), expert)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and stored buffers by name; of several names of one tensor the first."""
    first: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        first.setdefault(id(tensor), (name, tensor.detach()))
    return dict(first.values())


def _places(
    model: nn.Module, quantization: QuantizationConfig, on_disk: Mapping[str, _Entry], folder: Path
) -> list[_Place]:
    """Every place of the model."""
    modules_on_disk = {name.rpartition(".")[0] for name in on_disk}

    def form_of(module: str) -> Format | None:
        group = quantization.group_of(module)
        if group is not None and group.format is None:
            raise UserError(
                f"{folder} stores {module} in the format of '{group.name}', which the harness does not decode.",
                f"It decodes {', '.join(form.name for form in FORMATS)}.",
            )
        return None if group is None else group.format

    def expert_places(name: str, fused: Tensor) -> Iterator[_Place]:
        owner, _, last = name.rpartition(".")
        shards = ("gate_proj", "up_proj") if last == "gate_up_proj" else ("down_proj",)
        first = f"{owner}.0.{shards[0]}"
        if name in on_disk or (first not in modules_on_disk and form_of(first) is None):
            yield _copied(fused, owner, name)
            return
        for expert in range(len(fused)):
            for shard, target in zip(shards, fused[expert].chunk(len(shards)), strict=True):
                module = f"{owner}.{expert}.{shard}"
                form = form_of(module)
                if form is None:
                    yield _copied(target, owner, f"{module}.weight", (expert, shard))
                else:
                    yield _decoded(target, owner, module, form, (expert, shard))

    places: list[_Place] = []
    for name, tensor in _tensors(model).items():
        owner, _, last = name.rpartition(".")
        linear = last == "weight" and isinstance(model.get_submodule(owner), nn.Linear)
        if tensor.ndim == 3 and last in ("gate_up_proj", "down_proj"):
            places.extend(expert_places(name, tensor))
        elif linear and (form := form_of(owner)) is not None:
            places.append(_decoded(tensor, owner, owner, form))
        else:
            places.append(_copied(tensor, owner, name))
    return places


def _check(places: Iterable[_Place], on_disk: Mapping[str, _Entry], aliases: set[str]) -> Report:
    """Names, shapes and dtypes of what the places need against what there is."""
    report, needed = Report(), set()
    for need in (need for place in places for need in place.needs):
        needed.add(need.name)
        found = on_disk.get(need.name)
        if found is None:
            report.missing_keys.append(need.name)
        elif found.shape != need.shape:
            report.mismatched_keys.append((need.name,))
        elif found.dtype not in need.dtypes:
            report.error_msgs.append(f"{need.name} is {found.dtype}, not {' or '.join(need.dtypes)}")
    surplus = on_disk.keys() - needed - aliases
    report.unexpected_keys.extend(name for name in surplus if not name.startswith("mtp."))
    return report


def _fill(place: _Place, parts: Mapping[str, Tensor]) -> None:
    """Decodes `parts`, tensors by suffix, into the place; some rows at a time."""
    if place.form is None:
        (stored,) = parts.values()
        place.target.copy_(stored)
        return
    step = max(1, _CHUNK_ELEMENTS // place.target.shape[1])
    for start in range(0, len(place.target), step):
        rows = slice(start, start + step)
        scales = parts["weight_scale"][rows]
        if place.form.compressor == "float-quantized":
            weights = fp8.decode(parts["weight"][rows], scales, place.target.dtype)
        else:
            weights = nvfp4.decode(parts["weight_packed"][rows], scales, parts["weight_global_scale"].float())
        place.target[rows].copy_(weights)


def _round(model: nn.Module, places: Iterable[_Place], scales: Mapping[str, Tensor], folder: Path) -> None:
    """Lets every module round its inputs as its format does, and note its formats."""
    slices: dict[str, dict[tuple[int, str], _Place]] = {}
    for place in places:
        if place.expert is not None:
            slices.setdefault(place.owner, {})[place.expert] = place
        elif place.form is not None:
            linear: Any = model.get_submodule(place.owner)
            linear.decoded_from = (place.form,)
            round_inputs(linear, input_rounding(place.form, scales.get(place.module)))
    for owner, of_expert in slices.items():
        experts: Any = model.get_submodule(owner)
        experts.decoded_from = tuple(dict.fromkeys(place.form for place in of_expert.values()))
        roundings = []
        for number in range(len(experts.down_proj)):
            gate, up, down = (of_expert.get((number, f"{shard}_proj")) for shard in ("gate", "up", "down"))
            gate_up = _shared_rounding(gate, up, scales, folder)
            roundings.append(ExpertRounding(gate_up=gate_up, down=_rounding(down, scales)))
        if any(rounding.gate_up or rounding.down for rounding in roundings):
            round_expert_inputs(experts, roundings)


def _rounding(place: _Place | None, scales: Mapping[str, Tensor]) -> Rounding | None:
    return None if place is None else input_rounding(place.form, scales.get(place.module))


def _shared_rounding(
    gate: _Place | None, up: _Place | None, scales: Mapping[str, Tensor], folder: Path
) -> Rounding | None:
    """The rounding of an input that gate and up projection read alike."""
    if gate is None or up is None:
        return None
    of_input = [
        (place.form and place.form.input_activations, scales[place.module].item() if place.module in scales else None)
        for place in (gate, up)
    ]
    if of_input[0] != of_input[1]:
        raise UserError(
            f"{folder} rounds the input of {gate.module} and of {up.module} differently, and they share it.",
            "Run `harness verify` on it.",
        )
    return _rounding(gate, scales)
