"""Loads a checkpoint folder as transformers' model: every weight from the file, decoded where it is quantized.

Dense checkpoints are loaded by transformers' compressed-tensors integration. transformers 5.19 has no place for the
`weight_global_scale` of experts, which it keeps in two 3-D parameters a layer, so quantized mixture-of-experts
checkpoints are decoded here, and so is everything on the meta device: the model class is built empty and filled piece
by piece. A *place* is a parameter, or a slice of one, together with the module on the disk that it is decoded from. The
arithmetic is that of transformers on a dense checkpoint.
"""

import contextlib
import importlib.util
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, GenerationConfig, initialization

from harness.engines.emulation import ExpertRounding, round_expert_inputs, round_inputs
from harness.engines.torch_common import DTYPES, out_of_memory
from harness.errors import UserError, first_line
from harness.formats.config import FORMATS, QuantizationConfig, parse
from harness.formats.format import Format, Rounding
from harness.model.checkpoint import Checkpoint, NewTensor, TensorEntry, open_checkpoint
from harness.model.families import family_of
from harness.model.family import Family

_FLOATS = ("BF16", "F16", "F32")
_CHUNK_ELEMENTS = 1 << 22
"""Weights read and decoded at a time: their float32 temporaries stay small beside the model."""


def load_model(folder: Path, dtype: str = "bfloat16", device: torch.device | str = "cpu") -> Any:
    """The transformers model of `folder` on `device`, every one of its weights read from the file and decoded where it
    is quantized, computing in `dtype` (a key of `DTYPES`). `UserError` for a folder that is not a whole checkpoint."""
    auto, config, quantization, family = _configuration(folder)
    is_moe = bool(getattr(config.get_text_config(), "num_experts", 0))
    with _loading(folder):
        if quantization is not None and is_moe:
            model, stored = _empty(folder, auto, config, quantization, family, dtype)
            stored.fill(model)
            # What `from_pretrained` reads too: without it an answer would not end where the source's does.
            if (folder / "generation_config.json").is_file():
                model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        else:
            model, report = _load_by_transformers(auto, config, quantization, folder, DTYPES[dtype])
            _refuse_partial(folder, family, report)
    with out_of_memory(f"Loading {folder}", "Use a machine with more memory."):
        model = model.eval().to(device)
        if dtype == "float32":
            # Widens what the decompressor wrote as BF16. Never the other way: the rotary frequencies and the
            # global scales are float32 in a BF16 model too, and must stay so.
            model = model.to(torch.float32)
    return model


def load_empty(folder: Path, dtype: str) -> tuple[Any, "Stored"]:
    """The transformers model of `folder` on the meta device, where its weights take no memory, and what its modules are
    filled from. `UserError` as in `load_model`, as far as names, shapes and types of tensors show it."""
    configuration = _configuration(folder)
    with _loading(folder), torch.device("meta"):
        model, stored = _empty(folder, *configuration, dtype)
    return model.eval(), stored


def _empty(folder: Path, auto: Any, config: Any, quantization: Any, family: Family, dtype: str) -> tuple[Any, "Stored"]:
    """The model without values, and what it is filled from. compressed-tensors' arguments are read, its code is not
    run."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    parsed = None if quantization is None else parse(quantization, str(folder / "config.json"))
    with initialization.no_init_weights():
        model = auto.from_config(config, dtype=DTYPES[dtype], trust_remote_code=False)
    model.tie_weights()
    stored = Stored(open_checkpoint(folder), parsed)
    _refuse_partial(folder, family, stored.prepare(model))
    return model, stored


def _configuration(folder: Path) -> tuple[Any, Any, Any, Family]:
    """transformers' class for the checkpoint in `folder`, its configuration, how it is quantized, None where it is not,
    and its family."""
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise UserError(f"{folder} is not a checkpoint: it has no config.json.", "Name a folder that has one.")
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{folder} has no safetensors weights.", "Convert other weights first; pickles are never loaded."
        )
    try:
        raw = json.loads(config_file.read_text(encoding="utf-8"))
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise UserError(
            f"{config_file} is no configuration that transformers {transformers.__version__} knows: "
            f"{first_line(error)}.",
            "Check its model_type.",
        ) from None
    quantization = getattr(config, "quantization_config", None) or raw.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method")
        if method != "compressed-tensors":
            raise UserError(
                f"{config_file} says quant_method '{method}'.", "The harness reads compressed-tensors checkpoints only."
            )
    # The class whose tensor names are the checkpoint's: the names and patterns in a quantization_config are
    # written for those, and a text-only class built from a multimodal checkpoint renames them.
    multimodal = getattr(config, "vision_config", None) is not None
    auto = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
    return auto, config, quantization, family_of(raw, str(config_file))


@contextlib.contextmanager
def _loading(folder: Path) -> Iterator[None]:
    try:
        with out_of_memory(f"Loading {folder}", "Use a machine with more memory."):
            yield
    except UserError:
        raise
    except Exception as error:
        # Loading raises many types for a damaged checkpoint; each is about this folder.
        raise UserError(
            f"The torch engine cannot load {folder}: {first_line(error)}.", "Run `harness verify` on it."
        ) from error


def _load_by_transformers(
    auto: Any, config: Any, quantization: Any, folder: Path, dtype: torch.dtype
) -> tuple[Any, dict[str, Any]]:
    """By `from_pretrained`, compressed-tensors included."""
    if quantization is not None:
        if importlib.util.find_spec("compressed_tensors") is None:
            raise UserError(f"{folder} needs compressed-tensors.", "Run `pip install compressed-tensors`.")
        config.quantization_config = {**quantization, "dequantize": True}
    # compressed-tensors draws a progress bar on stderr and takes no argument against it.
    with contextlib.redirect_stderr(io.StringIO()):
        model, report = auto.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they come back in the report, by name
        )
    return model, report


def _refuse_partial(folder: Path, family: Family, report: dict[str, Any]) -> None:
    """`UserError` for a tensor that is missing, which transformers fills with random numbers, or has no place. The MTP
    head (multi-token prediction), which is no part of the model class, is excused."""
    unexpected = [key for key in report["unexpected_keys"] if family.part_of(key) != "mtp"]
    for what, keys in (
        ("lacks", sorted(report["missing_keys"])),
        ("has the wrong shape for", sorted(key[0] for key in report["mismatched_keys"])),
        ("has tensors the model has no place for:", sorted(unexpected)),
        ("failed:", sorted(report["error_msgs"])),
    ):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise UserError(f"{folder} {what} {', '.join(keys[:3])}{more}.", "Run `harness verify` on it.")


# -- What a model is filled from ---------------------------------------------------------------------------------


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
        formats do. `prefix` stands before its names in the model. To be called once, and after `prepare` found
        no fault; `UserError` for an expert whose gate and up projections round their common input differently."""
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

    def stored_name(self, name: str) -> str:
        """The checkpoint's name of what transformers calls `name`: its text part may have another prefix."""
        published, used = self.family.published.text_prefix, self._text_prefix
        is_renamed = self.family.is_loaded(used) and name.startswith(published)
        return used + name.removeprefix(published) if is_renamed else name

    @cached_property
    def _text_prefix(self) -> str:
        return self.family.text_prefix(self.checkpoint.tensors)

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
        """Every place of `module`, before whose names stands `prefix` in the model."""
        places: list[_Place] = []
        for name, tensor in _tensors(module).items():
            owner, _, last = name.rpartition(".")
            stored = self.stored_name(prefix + name)
            on_disk = stored.rpartition(".")[0]
            linear = last == "weight" and isinstance(module.get_submodule(owner), nn.Linear)
            if tensor.ndim == 3 and last in self.family.experts.shards:
                places.extend(self._expert_places(tensor, owner, on_disk, last))
            elif linear and (form := self._format_of(on_disk)) is not None:
                places.append(_decoded(tensor, owner, on_disk, form))
            else:
                places.append(_copied(tensor, owner, stored))
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
    return {"missing_keys": missing, "mismatched_keys": mismatched, "unexpected_keys": unexpected, "error_msgs": errors}


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
