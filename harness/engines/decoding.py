"""A quantized checkpoint as a 16-bit model, decoded by the harness.

transformers 5.19 has no place for the `weight_global_scale` of experts, which it keeps in two 3-D parameters a layer.
So its model class is built empty and filled piece by piece: a *place* is a parameter, or a slice of one, together with
the module on the disk that it is decoded from. The arithmetic is that of transformers on a dense checkpoint.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization

from harness.engines.emulation import ExpertRounding, round_expert_inputs, round_inputs
from harness.errors import UserError
from harness.formats.config import QuantizationConfig
from harness.formats.format import Format, Rounding
from harness.formats.table import FORMATS
from harness.model.checkpoint import Checkpoint, NewTensor, TensorEntry
from harness.model.families import family_of
from harness.model.family import Family

_FLOATS = ("BF16", "F16", "F32")
_CHUNK_ELEMENTS = 1 << 22
"""Weights read and decoded at a time: their float32 temporaries stay small beside the model."""


def empty_model(auto_class: Any, config: Any, dtype: torch.dtype) -> Any:
    """The model of a configuration, of class `auto_class`, tied as it says, whose weights have no values yet."""
    with initialization.no_init_weights():
        model = auto_class.from_config(config, dtype=dtype, trust_remote_code=False)
    model.tie_weights()
    return model


@dataclass(frozen=True)
class Stored:
    """The weights of a checkpoint, and the formats that they are in: what a model of transformers is filled from."""

    checkpoint: Checkpoint
    quantization: QuantizationConfig | None

    def prepare(self, model: nn.Module) -> dict[str, list[Any]]:
        """Notes in each module of a whole `model`, which may be on the meta device, what its weights will be decoded
        from (`formats_of`), and returns what of the checkpoint does not fit the model, as transformers' own loading
        reports it. `UserError` for a module in a format that the harness does not know."""
        places = self._places(model)
        formats: dict[str, dict[Format | None, None]] = {}
        for place in places:
            if place.form is not None or place.expert is not None:
                formats.setdefault(place.owner, {})[place.form] = None
        for owner, found in formats.items():
            module: Any = model.get_submodule(owner)
            module.decoded_from = tuple(found)
        aliases = set(model.state_dict()) - set(_tensors(model))  # a tied head may be stored though it is not needed
        return _check(places, self.checkpoint.tensors, aliases)

    @torch.no_grad()
    def fill(self, module: nn.Module, prefix: str = "") -> None:
        """Gives every parameter of `module`, which is on the CPU, its values; from now on it rounds its inputs as its
        formats do. On the disk its names begin with `prefix`. To be called once, and after `prepare` found no fault;
        `UserError` for an expert whose gate and up projections round their common input differently."""
        entries = self.checkpoint.tensors
        places = self._places(module, prefix)
        places.sort(key=lambda place: (entries[place.needs[0].name].shard, entries[place.needs[0].name].offset))
        for place in places:
            _fill(place, self.checkpoint)
        self._round(module, places)

    @cached_property
    def family(self) -> Family:
        """The family that the checkpoint's model is of."""
        return family_of(self.checkpoint.config, str(self.checkpoint.folder))

    @cached_property
    def _modules(self) -> set[str]:
        return {name.rpartition(".")[0] for name in self.checkpoint.tensors}

    def _format_of(self, module: str) -> Format | None:
        group = None if self.quantization is None else self.quantization.group_of(module)
        if group is not None and group.format is None:
            raise UserError(
                f"{self.checkpoint.folder} stores {module} in the format of '{group.name}', which the harness does not "
                "decode.",
                f"It decodes {', '.join(FORMATS)}.",
            )
        return None if group is None else group.format

    def _places(self, module: nn.Module, prefix: str = "") -> list["_Place"]:
        """Every place of `module`, whose names on the disk begin with `prefix`."""
        places: list[_Place] = []
        for name, tensor in _tensors(module).items():
            owner, _, last = name.rpartition(".")
            on_disk = (prefix + name).rpartition(".")[0]
            linear = last == "weight" and isinstance(module.get_submodule(owner), nn.Linear)
            if tensor.ndim == 3 and last in self.family.experts.shards:
                places.extend(self._expert_places(tensor, owner, on_disk, last))
            elif linear and (form := self._format_of(on_disk)) is not None:
                places.append(_decoded(tensor, owner, on_disk, form))
            else:
                places.append(_copied(tensor, owner, prefix + name))
        return places

    def _expert_places(self, fused: Tensor, owner: str, on_disk: str, last: str) -> Iterator["_Place"]:
        """Those of a parameter of fused experts; they lie on the disk as it does, or one by one."""
        shards = self.family.experts.shards[last]
        whole, first = f"{on_disk}.{last}", f"{on_disk}.0.{shards[0]}"
        if whole in self.checkpoint.tensors or (first not in self._modules and self._format_of(first) is None):
            yield _copied(fused, owner, whole)
            return
        for expert in range(len(fused)):
            for shard, target in zip(shards, fused[expert].chunk(len(shards)), strict=True):
                module = f"{on_disk}.{expert}.{shard}"
                form = self._format_of(module)
                if form is None:
                    yield _copied(target, owner, f"{module}.weight", (expert, shard))
                else:
                    yield _decoded(target, owner, module, form, (expert, shard))

    def _round(self, model: nn.Module, places: Iterable["_Place"]) -> None:
        """Lets every module round its inputs as its format does."""
        names = self.family.experts
        slices: dict[str, dict[tuple[int, str], _Place]] = {}
        for place in places:
            if place.expert is not None:
                slices.setdefault(place.owner, {})[place.expert] = place
            elif place.form is not None:
                linear: Any = model.get_submodule(place.owner)
                round_inputs(linear, self._rounding(place))
        for owner, of_expert in slices.items():
            experts: Any = model.get_submodule(owner)
            roundings = []
            for number in range(len(experts.down_proj)):
                gate, up, down = (of_expert.get((number, shard)) for shard in (names.gate, names.up, names.down))
                roundings.append(ExpertRounding(self._shared_rounding(gate, up), self._rounding(down)))
            if any(rounding.gate_up or rounding.down for rounding in roundings):
                round_expert_inputs(experts, roundings)

    def _rounding(self, place: "_Place | None") -> Rounding | None:
        return None if place is None or place.form is None else place.form.rounding(self._input_scale(place))

    def _input_scale(self, place: "_Place") -> Tensor | None:
        if place.form is None or not place.form.needs_calibration:
            return None
        return self.checkpoint.tensor(f"{place.module}.{place.form.input_scale_name}")

    def _shared_rounding(self, gate: "_Place | None", up: "_Place | None") -> Rounding | None:
        """The rounding of an input that gate and up projection read alike."""
        if gate is None or up is None:
            return None
        activations = [place.form and place.form.input_activations for place in (gate, up)]
        if activations[0] != activations[1] or self._input_scale(gate) != self._input_scale(up):
            raise UserError(
                f"{self.checkpoint.folder} rounds the input of {gate.module} and of {up.module} differently, and they "
                "share it.",
                "Run `harness verify` on it.",
            )
        return self._rounding(gate)


def formats_of(module: nn.Module) -> tuple[Format | None, ...]:
    """The formats that `Stored` decodes the weights of `module` from, None among them for weights that are stored as
    they are; empty for a module without any such weight."""
    found: tuple[Format | None, ...] = getattr(module, "decoded_from", ())
    return found if any(found) else ()


@dataclass(frozen=True)
class _Place:
    """`target`, a parameter or a slice of one (`expert`: which expert's which projection), is decoded from `module` on
    the disk, or copied where `form` is None. `owner` is the model's module that computes with it. Of what it `needs`, a
    float of 16 or 32 bits stands for any of them."""

    target: Tensor
    owner: str
    module: str
    form: Format | None
    needs: tuple[NewTensor, ...]
    expert: tuple[int, str] | None = None


def _decoded(target: Tensor, owner: str, module: str, form: Format, expert: tuple[int, str] | None = None) -> _Place:
    stored = form.stored(*target.shape)
    needs = tuple(NewTensor(f"{module}.{part.suffix}", part.dtype, part.shape) for part in stored)
    return _Place(target, owner, module, form, needs, expert)


def _copied(target: Tensor, owner: str, name: str, expert: tuple[int, str] | None = None) -> _Place:
    need = NewTensor(name, _FLOATS[0], tuple(target.shape))
    return _Place(target, owner, name.rpartition(".")[0], None, (need,), expert)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and stored buffers by name; of several names of one tensor the first."""
    first: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        first.setdefault(id(tensor), (name, tensor.detach()))
    return dict(first.values())


def _check(places: Iterable[_Place], on_disk: Mapping[str, TensorEntry], aliases: set[str]) -> dict[str, list[Any]]:
    """Names, shapes and dtypes of what the places need against what there is."""
    missing, mismatched, errors, needed = [], [], [], set()
    for need in (need for place in places for need in place.needs):
        needed.add(need.name)
        dtypes = _FLOATS if need.dtype in _FLOATS else (need.dtype,)
        found = on_disk.get(need.name)
        if found is None:
            missing.append(need.name)
        elif found.shape != need.shape:
            mismatched.append((need.name,))
        elif found.dtype not in dtypes:
            errors.append(f"{need.name} is {found.dtype}, not {' or '.join(dtypes)}")
    unexpected = list(on_disk.keys() - needed - aliases)
    return {
        "missing_keys": missing,
        "mismatched_keys": mismatched,
        "unexpected_keys": unexpected,
        "error_msgs": errors,
    }


def _fill(place: _Place, checkpoint: Checkpoint) -> None:
    """Reads what the place needs and decodes it into it; some rows at a time."""
    target = place.target.view(-1, place.target.shape[-1] if place.target.ndim else 1)
    step = max(1, _CHUNK_ELEMENTS // target.shape[1])
    for start in range(0, len(target), step):
        into = target[start : start + step]
        if place.form is None:
            into.copy_(checkpoint.rows(place.needs[0].name, start, len(into)))
        else:
            dtype = place.form.loaded_dtype(into.dtype)
            into.copy_(place.form.decode_rows(checkpoint, place.module, start, len(into), dtype))
