"""Sensitivity: what storing one group of layers in a format does to what its half of a decoder layer adds.

    output_error    |Δy|² / |y|²              at the group's own output y, over all calibration tokens
    layer_error     |Δf(x)|² / |f(x)|²        at what the half adds to the residual stream, hidden + f(x)

A *group* is what vLLM fuses or a projection that stands alone; all routed experts of a layer are one. Everything else
keeps its 16 bits. Weights are rounded to nearest under absolute-maximum scales, and so are the inputs where the
format rounds them: with one scale from all calibration tokens in NVFP4, token by token in FP8. Both errors are shares
of energy, so 0.01 is a tenth of the norm. On an accelerator the half computes in bfloat16, whose own noise is about
4e-6.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.engines.emulation import ExpertRounding, round_expert_inputs
from harness.engines.layers import (
    Batch,
    Half,
    HiddenStates,
    batches_of,
    captured,
    compute_dtype,
    device_named,
    unpadded,
)
from harness.engines.protocol import EngineInfo
from harness.formats.config import FORMATS
from harness.formats.format import Format
from harness.formats.nvfp4 import NVFP4
from harness.model.census import SourceTensor
from harness.model.checkpoint import Checkpoint
from harness.model.family import Family, Linear
from harness.model.sources import census_of
from harness.progress import Meter, Progress
from harness.quantize.calibrate import down_input
from harness.quantize.layerwise import CalibrationInput, text_model
from harness.quantize.plan import check_widths
from harness.quantize.sites import Site

VERSION = 1
"""Of the measure: raise it when the same model and samples should give other numbers."""


@dataclass(frozen=True)
class FusedLayers:
    """Linear layers of one decoder layer that share a format because vLLM fuses them, or because they are experts, and
    what they are together: `self_attn.qkv_proj`, `mlp.down_proj`, `mlp.experts.w13`."""

    role: str
    linears: tuple[Linear, ...]

    @property
    def is_experts(self) -> bool:
        """Whether these are projections of the routed experts."""
        return self.linears[0].expert is not None

    def num_bytes(self, form: Format) -> int:
        """What the group takes on the disk, scales included."""
        return sum(form.num_bytes(linear.out_features, linear.in_features) for linear in self.linears)


def groups_by_layer(family: Family, tensors: Sequence[SourceTensor]) -> dict[int, list[FusedLayers]]:
    """The groups of every decoder layer that a recipe may quantize, in the order of the checkpoint. `UserError` for a
    weight whose rows are no multiple of a format's block."""
    found: dict[int, dict[str, list[Linear]]] = {}
    for tensor in tensors:
        layer = family.layer_of(tensor.name)
        if tensor.role is None or not tensor.role.quantizable or layer is None:
            continue
        for form in FORMATS.values():
            check_widths(tensor, form)
        found.setdefault(layer, {}).setdefault(tensor.role.group, []).extend(tensor.linears)
    return {
        layer: [FusedLayers(role, tuple(linears)) for role, linears in groups.items()]
        for layer, groups in sorted(found.items())
    }


def computed_by(calibration: CalibrationInput) -> EngineInfo:
    """What runs the layers, for the record."""
    device = device_named(calibration.device)
    return EngineInfo(
        name="layers",
        version=f"transformers {metadata.version('transformers')}, torch {torch.__version__}",
        device="cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
        dtype=str(compute_dtype(device)).removeprefix("torch."),
        requested={"device": calibration.device, "batch_tokens": calibration.batch_tokens},
    )


def measure_sensitivity(
    checkpoint: Checkpoint, calibration: CalibrationInput, folder: Path, progress: Progress
) -> Iterator[dict[str, Any]]:
    """One sample for every layer, group and format: `index` of the layer, `role`, `format`, `output_error`,
    `layer_error` (None where there is no output to compare with), `num_weights`, and `extra_bytes`, what the group
    takes more than in NVFP4. Hidden states go through two files in `folder`, which the caller removes."""
    source = census_of(checkpoint)
    model = text_model(checkpoint, source.config, calibration)
    groups = groups_by_layer(model.family, source.tensors)
    batches = batches_of(calibration.samples.samples, calibration.batch_tokens)
    passes = 2 * model.num_layers + len(FORMATS) * sum(map(len, groups.values()))
    meter = Meter(progress, passes * calibration.samples.num_tokens, "sensitivity")
    meter.advance(0)
    with contextlib.ExitStack() as stack:
        memory = calibration.hidden_bytes // 2
        hidden, added = (
            HiddenStates(folder / name, batches, model.width, model.dtype, model.device, memory)
            for name in ("hidden", "added")
        )
        for stream in (hidden, added):
            stack.callback(stream.close)
        for number, batch in enumerate(batches):
            hidden[number] = model.embed(batch.ids)
        for index in range(model.num_layers):
            samples: list[dict[str, Any]] = []
            with torch.inference_mode():  # never around a yield: it would hold for the caller as well
                for half in model.layer(index):
                    samples += measure_half(half, groups.get(index, ()), batches, hidden, added, meter.advance)
            for sample in samples:
                yield {"kind": "sensitivity", "index": index, **sample}


def measure_half(
    half: Half,
    groups: Sequence[FusedLayers],
    batches: Sequence[Batch],
    hidden: HiddenStates,
    added: HiddenStates,
    advance: Callable[[int], None],
) -> list[dict[str, Any]]:
    """The samples (without layer and kind) of those `groups` that are in this half, which is left as it was.

    `hidden` is what comes into the half and, afterwards, what comes out of the unquantized one; `added` is scratch.
    """
    mine: list[_Linears | _Experts] = []
    for group in groups:
        if group.is_experts and half.experts is not None:
            mine.append(_Experts(half, group))
        elif group.linears[0].module in half.linears:
            mine.append(_Linears(half, group))
    energy = 0.0
    for number, batch in enumerate(batches):
        normed = half.norm(hidden[number])
        valid = batch.valid.to(normed.device)
        with captured({stand.group.role: stand.reader for stand in mine}) as inputs:
            exact = half.forward(normed)
        for stand in mine:
            stand.observe(unpadded(inputs[stand.group.role], valid))
        energy += _energy(unpadded(exact, valid))
        added[number] = exact
        advance(batch.num_tokens)
    samples = []
    for stand in mine:
        for form in FORMATS.values():
            error, own = 0.0, _Share()
            with stand.stored_in(form) as compare:
                for number, batch in enumerate(batches):
                    normed = half.norm(hidden[number])
                    valid = batch.valid.to(normed.device)
                    with captured({"input": stand.reader}) as inputs:
                        changed = half.forward(normed)
                    error += _energy(unpadded(changed.float() - added[number].float(), valid))
                    compare(unpadded(inputs["input"], valid), own)
                    advance(batch.num_tokens)
            samples.append(
                {
                    "role": stand.group.role,
                    "format": form.name,
                    "output_error": own.ratio,
                    "layer_error": _Share(error, energy).ratio,
                    "num_weights": sum(one.out_features * one.in_features for one in stand.group.linears),
                    "extra_bytes": stand.group.num_bytes(form) - stand.group.num_bytes(NVFP4),
                }
            )
    for number in range(len(batches)):
        hidden[number] = hidden[number] + added[number]
    return samples


@dataclass
class _Share:
    """The energy of an error, and the energy of the output that has it."""

    error: float = 0.0
    energy: float = 0.0

    def add(self, changed: Tensor, exact: Tensor) -> None:
        self.error += _energy(changed.float() - exact.float())
        self.energy += _energy(exact)

    @property
    def ratio(self) -> float | None:
        """None for an error of nothing: an output of zeros has no relative error."""
        return self.error / self.energy if self.energy else None


def _energy(x: Tensor) -> float:
    """|x|², summed in float64: a float32 sum over millions of tokens would lose the small ones."""
    return float(x.float().square().sum(dtype=torch.float64))


def _sites(num: int = 1) -> dict[str, Site]:
    """By format, what is known of an input; with `num` experts, of the inputs of each."""
    return {form.name: Site(form, num) for form in FORMATS.values()}


_Compare = Callable[[Tensor, _Share], None]
"""Adds to a share what a format changes at a group's own output, for inputs `[tokens, in]`."""


class _Linears:
    """A group of 2-D linear layers, which all read the same input."""

    def __init__(self, half: Half, group: FusedLayers) -> None:
        self.group = group
        self._modules = [half.linears[linear.module] for linear in group.linears]
        self.reader: nn.Module = self._modules[0]
        """A module that is called with the group's input."""
        self._sites = _sites()

    def observe(self, x: Tensor) -> None:
        """Takes inputs `[tokens, in]` into account for the scales of the formats that store one."""
        for site in self._sites.values():
            site.observe(x)

    @contextlib.contextmanager
    def stored_in(self, form: Format) -> Iterator[_Compare]:
        """While this runs, the layers compute as if they were stored in `form`."""
        weights = [module.weight for module in self._modules]
        decoded = form.round_trip(torch.cat([weight.float() for weight in weights])).to(weights[0].dtype)
        parts = torch.split(decoded, [weight.shape[0] for weight in weights])
        rounding = self._sites[form.name].rounding()

        def forward_with(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
            return lambda x: functional.linear(x if rounding is None else rounding(x), weight, bias)

        def compare(x: Tensor, share: _Share) -> None:
            rounded = x if rounding is None else rounding(x)
            for weight, part in zip(weights, parts, strict=True):
                share.add(functional.linear(rounded, part), functional.linear(x, weight))

        with contextlib.ExitStack() as stack:
            for module, part in zip(self._modules, parts, strict=True):
                stack.enter_context(_attributes(module, {"forward": forward_with(part, module.bias)}))
            yield compare


class _Experts:
    """Gate and up projections, or down projections, of all routed experts of a layer. Every expert sees every token for
    the scale of its inputs; errors are those of the tokens that are routed to it."""

    def __init__(self, half: Half, group: FusedLayers) -> None:
        assert half.experts is not None
        self.group = group
        self._module, self._router, self._names = half.experts.module, half.experts.router, half.experts.names
        self._first = group.linears[0].role.reads_hidden
        self._num: int = self._module.gate_up_proj.shape[0]
        self.reader: nn.Module = self._module
        self._sites = _sites(1 if self._first else self._num)

    def observe(self, x: Tensor) -> None:
        """Takes inputs `[tokens, H]` of all experts into account for the scales of the formats that store one."""
        for expert in range(1 if self._first else self._num):
            inner = x if self._first else down_input(self._module, expert, x)
            for site in self._sites.values():
                site.observe(inner, expert)

    @contextlib.contextmanager
    def stored_in(self, form: Format) -> Iterator[_Compare]:
        """While this runs, the experts compute as if their half of the weights were stored in `form`."""
        name = self._names.gate_up if self._first else self._names.down
        weight: Tensor = getattr(self._module, name)
        decoded = torch.empty_like(weight)
        for expert in range(self._num):  # one at a time: experts are most of a layer, and float32 is twice their size
            decoded[expert] = form.round_trip(weight[expert]).to(weight.dtype)
        roundings = [self._sites[form.name].rounding(0 if self._first else expert) for expert in range(self._num)]

        def compare(x: Tensor, share: _Share) -> None:
            chosen = self._router(x)[2]
            for expert in torch.unique(chosen).tolist():
                read = x[(chosen == expert).any(-1)]
                if not self._first:
                    read = down_input(self._module, expert, read)
                rounding = roundings[expert]
                rounded = read if rounding is None else rounding(read)
                share.add(
                    functional.linear(rounded, decoded[expert].to(read.dtype)),
                    functional.linear(read, weight[expert].to(read.dtype)),
                )

        stored = nn.Parameter(decoded, requires_grad=False)
        with _attributes(self._module, {name: stored, "forward": self._module.forward}):
            pairs = [ExpertRounding(one, None) if self._first else ExpertRounding(None, one) for one in roundings]
            round_expert_inputs(self._module, pairs)
            yield compare


@contextlib.contextmanager
def _attributes(module: nn.Module, values: Mapping[str, Any]) -> Iterator[None]:
    """Attributes that a module has while this runs; afterwards its own are back, and those it had from its class."""
    own = {name: vars(module)[name] for name in values if name in vars(module)}
    own |= {name: module._parameters[name] for name in values if name in module._parameters}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name in values:
            if name in own:
                setattr(module, name, own[name])
            else:
                delattr(module, name)
