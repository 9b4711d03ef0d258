"""Calibration: what the inputs of a layer are like, and the layer's scales and codes from that.

One decoder layer is in memory, as two halves (engines/layers.py). The hidden states that go in have passed through
everything quantized so far. Layers that vLLM fuses read the same input, one *site*; those that read the normed hidden
states come first, the projections behind them second. For each:

    amax      the largest input, from which input_global_scale follows          every W4A4 site
    moments   H = X̂ᵀX̂ [in, in] of the rounded inputs, its diagonal where that is enough    gptq, weighted-search
    shift     X̂ᵀ(X - X̂) [in, in] against the inputs X that the unquantized model sees     gptq
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.engines.emulation import ExpertRounding, round_expert_inputs, round_inputs
from harness.engines.layers import Batch, Half, HiddenStates, RoutedExperts, TextModel, captured, unpadded
from harness.formats.format import Format, Rounding
from harness.model.family import Linear
from harness.quantize.plan import EXPERTS_TOGETHER
from harness.quantize.recipes import Method
from harness.quantize.sites import GroupReport, Site, merged, quantize_matrices

Emit = Callable[[str, Tensor], None]
"""Takes a finished tensor of the artifact by its full name."""


@dataclass
class LayerReport:
    """What one layer took and gave. `routed` counts the tokens that the router sent to each expert."""

    index: int
    groups: list[GroupReport] = field(default_factory=list)
    routed: list[int] | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def spend(self, name: str, since: float) -> None:
        """Adds the time that stage `name` took."""
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - since


@dataclass(frozen=True)
class Streams:
    """The hidden states of the quantized model and, where needed, of the unquantized one, at one layer boundary."""

    quantized: HiddenStates
    reference: HiddenStates | None

    def __iter__(self) -> Iterator[HiddenStates]:
        yield self.quantized
        if self.reference is not None:
            yield self.reference


def quantize_layer(
    model: TextModel,
    index: int,
    linears: Sequence[tuple[Linear, Format]],
    method: Method,
    batches: Sequence[Batch],
    before: Streams,
    after: Streams,
    emit: Emit,
    advance: Callable[[int], None],
) -> LayerReport:
    """Quantizes the `linears` of decoder layer `index`, and carries the hidden states from `before` through it to
    `after`. Finished tensors go to `emit`; `advance` is told the tokens done, twice each in all."""
    report = LayerReport(index)
    start = time.perf_counter()
    halves = model.layer(index)
    references = model.layer(index) if method.two_streams else halves
    report.spend("read", start)
    source = before
    for half, reference in zip(halves, references, strict=True):
        _HalfPass(half, reference, linears, method, batches, source, after, emit, report).run(advance)
        source = after
    return report


class Experts:
    """The routed experts of a half: one site for the input that all read, one for each inside. Their `gate_up_proj`
    `[E, 2I, H]` and `down_proj [E, H, I]` stay where they are; a few experts at a time are widened."""

    def __init__(self, routed: RoutedExperts, reference: RoutedExperts | None, form: Format | None) -> None:
        self._routed, self._reference = routed, reference and reference.module
        self._module, self._names = routed.module, routed.names
        self._gate_up = (routed.names.gate, routed.names.up)
        self._num: int = self._module.gate_up_proj.shape[0]
        self._input = None if form is None else Site(form)
        self._inner = None if form is None else Site(form, self._num)
        self.routed = torch.zeros(self._num, dtype=torch.int64)

    def take_moments(self, first: bool, x: Tensor, reference: Tensor | None) -> None:
        """Statistics of every expert's input (`first`) or of every down projection's, for tokens `x [tokens, H]` and
        the same tokens in the unquantized model."""
        if self._input is None or self._inner is None:
            return
        if first:
            self._input.accumulate(x, reference)
            return
        rounding = self._input.rounding()
        x = x if rounding is None else rounding(x)
        for expert in range(self._num):
            other = None if reference is None else down_input(self._reference, expert, reference)
            self._inner.accumulate(down_input(self._module, expert, x), other, expert)

    def quantize(self, first: bool, method: Method, emit: Emit) -> GroupReport | None:
        """Quantizes gate and up projections (`first`) or down projections of all experts."""
        if self._input is None or self._inner is None:
            return None
        weight = self._module.gate_up_proj if first else self._module.down_proj
        site, shards = (self._input, self._gate_up) if first else (self._inner, (self._names.down,))
        name = f"{self._routed.name}.{self._names.fused if first else self._names.down}"
        step = max(1, EXPERTS_TOGETHER // weight[0].numel())
        reports = []
        for start in range(0, self._num, step):
            part = weight[start : start + step]
            tensors, decoded, report = quantize_matrices(
                name, part.float(), site.part(start, start + len(part)), method
            )
            reports.append(report)
            part.copy_(decoded)
            height = part.shape[1] // len(shards)
            for expert in range(len(part)):
                for place, shard in enumerate(shards):
                    for suffix, tensor in tensors.items():
                        one = tensor[expert]
                        rows = one if one.dim() == 1 else one[place * height : (place + 1) * height]
                        emit(f"{self._routed.name}.{start + expert}.{shard}.{suffix}", rows)
        site.forget()
        return merged(reports)

    def round_inputs(self) -> None:
        """From now on the experts round what they read."""
        if self._input is not None and self._inner is not None:
            outer, inner = self._input.rounding(), self._inner
            round_expert_inputs(self._module, [ExpertRounding(outer, inner.rounding(e)) for e in range(self._num)])

    def see(self, x: Tensor) -> None:
        """Counts where the router sends tokens `x [tokens, H]`, and shows all of them to every expert."""
        chosen = self._routed.router(x)[2]
        self.routed += torch.bincount(chosen.reshape(-1), minlength=self._num).cpu()
        if self._input is None or self._inner is None or not self._input.form.needs_calibration:
            return
        self._input.observe(x)
        if self._inner.settled:
            return
        rounding = self._input.rounding()
        x = x if rounding is None else rounding(x)
        for expert in range(self._num):
            self._inner.observe(down_input(self._module, expert, x), expert)

    def emit_input_scales(self, emit: Emit) -> None:
        """Emits every expert's scales of activations, where the format has them."""
        if self._input is None or self._inner is None or not self._input.form.needs_calibration:
            return
        outer, inner = self._input.input_scales(), self._inner.input_scales()
        for expert in range(self._num):
            scales = dict.fromkeys(self._gate_up, outer) | {self._names.down: inner[expert : expert + 1]}
            for shard, scale in scales.items():
                emit(f"{self._routed.name}.{expert}.{shard}.{self._input.form.input_scale_name}", scale)


def down_input(experts: Any, expert: int, x: Tensor) -> Tensor:
    """What expert number `expert` gives its down projection for `x [tokens, H]`: `[tokens, I]`."""
    gate, up = functional.linear(x, experts.gate_up_proj[expert].to(x.dtype)).chunk(2, dim=-1)
    inner: Tensor = experts.act_fn(gate) * up
    return inner


@dataclass
class _HalfPass:
    """One half of one layer on its way through calibration."""

    half: Half
    reference: Half
    linears: Sequence[tuple[Linear, Format]]
    method: Method
    batches: Sequence[Batch]
    before: Streams
    after: Streams
    emit: Emit
    report: LayerReport

    def run(self, advance: Callable[[int], None]) -> None:
        groups, sites = self._groups()
        routed, form = self.half.experts, next((form for linear, form in self.linears if linear.expert), None)
        experts = None if routed is None else Experts(routed, self.reference.experts, form)
        stages = [
            [name for name, members in groups.items() if members[0].role.reads_hidden == first]
            for first in (True, False)
        ]
        reference_done = self.before.reference is None
        for first, stage in zip((True, False), stages, strict=True):
            wanted = [name for name in stage if sites[name].form.has_grid]
            if self.method.needs_moments and (wanted or experts is not None):
                start = time.perf_counter()
                self._take_moments(first, {name: sites[name] for name in wanted}, groups, experts, not first)
                reference_done |= not first
                self.report.spend("statistics", start)
            start = time.perf_counter()
            for name in stage:
                self._quantize_group(name, groups[name], sites[name])
            if experts is not None and (done := experts.quantize(first, self.method, self.emit)) is not None:
                self.report.groups.append(done)
            if self.method.needs_moments:  # their inputs are known, and what lies behind them is looked at next
                for name in stage:
                    self._round_inputs(groups[name], sites[name].rounding())
            self.report.spend("quantize", start)
        start = time.perf_counter()
        self._propagate(groups, sites, experts, reference_done, advance)
        self.report.spend("propagate", start)
        for name, members in groups.items():
            if sites[name].form.needs_calibration:
                for linear in members:
                    self.emit(f"{linear.module}.{sites[name].form.input_scale_name}", sites[name].input_scales())
        if experts is not None:
            experts.emit_input_scales(self.emit)

    def _groups(self) -> tuple[dict[str, list[Linear]], dict[str, Site]]:
        """The half's 2-D linear layers to be quantized, by the matrix that vLLM fuses them into, and their inputs."""
        groups: dict[str, list[Linear]] = {}
        sites: dict[str, Site] = {}
        for linear, form in self.linears:
            if linear.module in self.half.linears:
                groups.setdefault(linear.fused_into, []).append(linear)
                sites.setdefault(linear.fused_into, Site(form))
        return groups, sites

    def _take_moments(
        self,
        first: bool,
        sites: Mapping[str, Site],
        groups: Mapping[str, list[Linear]],
        experts: Experts | None,
        keep_reference: bool,
    ) -> None:
        """Statistics of one stage's inputs; `keep_reference` also stores what the unquantized half gives."""
        watched = {name: groups[name][0].module for name in sites}
        for number, batch in enumerate(self.batches):
            hidden = self.before.quantized[number]
            valid = batch.valid.to(hidden.device)
            normed = self.half.norm(hidden)
            other = self.before.reference[number] if self.before.reference is not None else None
            other_normed = None if other is None else self.reference.norm(other)
            if first:
                inputs = dict.fromkeys(sites, normed)
                others = dict.fromkeys(sites, other_normed)
            else:
                with captured({name: self.half.linears[module] for name, module in watched.items()}) as inputs:
                    self.half.forward(normed)
                others = dict.fromkeys(sites)
                if other is not None and other_normed is not None:
                    with captured({n: self.reference.linears[module] for n, module in watched.items()}) as seen:
                        output = other + self.reference.forward(other_normed)
                    others = {name: seen[name] for name in sites}
                    if keep_reference and self.after.reference is not None:
                        self.after.reference[number] = output
            for name, site in sites.items():
                reference = others[name]
                site.accumulate(
                    unpadded(inputs[name], valid), None if reference is None else unpadded(reference, valid)
                )
            if experts is not None:
                experts.take_moments(
                    first, unpadded(normed, valid), unpadded(other_normed, valid) if other_normed is not None else None
                )

    def _quantize_group(self, name: str, members: Sequence[Linear], site: Site) -> None:
        weights = [self.half.linears[linear.module].weight for linear in members]
        emitted, decoded, report = quantize_matrices(
            name, torch.cat([weight.float() for weight in weights]).unsqueeze(0), site, self.method
        )
        self.report.groups.append(report)
        first = 0
        for linear, weight in zip(members, weights, strict=True):
            last = first + linear.out_features
            for suffix, tensor in emitted.items():
                rows = tensor[0] if suffix == site.form.shared_scale_name else tensor[0, first:last]
                self.emit(f"{linear.module}.{suffix}", rows)
            self.half.linears[linear.module].weight = nn.Parameter(
                decoded[0, first:last].to(weight.dtype), requires_grad=False
            )
            first = last
        site.forget()

    def _round_inputs(self, members: Sequence[Linear], rounding: Rounding | None) -> None:
        shared = None if rounding is None else _once(rounding)
        for linear in members:
            round_inputs(self.half.linears[linear.module], shared)

    def _propagate(
        self,
        groups: Mapping[str, list[Linear]],
        sites: Mapping[str, Site],
        experts: Experts | None,
        reference_done: bool,
        advance: Callable[[int], None],
    ) -> None:
        """Carries the hidden states through the half, which is quantized by now, its inputs rounded."""
        current: list[Tensor] = []
        if not self.method.needs_moments:
            for name, members in groups.items():
                self._round_inputs(members, _observed(sites[name], current))
        if experts is not None:
            experts.round_inputs()
        for number, batch in enumerate(self.batches):
            hidden = self.before.quantized[number]
            current[:] = [batch.valid.to(hidden.device)]
            normed = self.half.norm(hidden)
            if experts is not None:
                experts.see(unpadded(normed, current[0]))
            self.after.quantized[number] = hidden + self.half.forward(normed)
            if not reference_done and self.before.reference is not None and self.after.reference is not None:
                self.after.reference[number] = self.reference(self.before.reference[number])
            advance(batch.num_tokens)
        if experts is not None:
            self.report.routed = experts.routed.tolist()


def _observed(site: Site, current: list[Tensor]) -> Rounding | None:
    """The site's rounding, which also observes the inputs at the tokens that are not padding."""
    rounding = site.rounding()
    if rounding is None:
        return None

    def rounded(x: Tensor) -> Tensor:
        site.observe(unpadded(x, current[0]))
        return rounding(x)

    return rounded


def _once(rounding: Rounding) -> Rounding:
    """The same rounding for layers that are called with the same tensor one after another: done once."""
    last: list[Tensor] = []

    def rounded(x: Tensor) -> Tensor:
        if not last or last[0] is not x:
            last[:] = [x, rounding(x)]
        return last[1]

    return rounded
