"""Calibration: what the inputs of a layer are like, and the layer's scales and codes from that.

One decoder layer is in memory, taken as its two halves (engines/layers.py). The hidden states that go in have passed
through everything quantized so far, activations rounded as the kernels will round them, so every scale is chosen for
the inputs that the layer will really see.

The layers that vLLM fuses read the same input, so they are one *site*: one set of statistics, one input scale. In a
half, the sites that read the normed hidden states come first, the projections behind them second. For each:

    amax      the largest input, from which input_global_scale follows          every W4A4 site
    moments   H = X̂ᵀX̂ [in, in] of the rounded inputs, its diagonal where that is enough    gptq, weighted-search
    shift     X̂ᵀ(X - X̂) [in, in] against the inputs X that the unquantized model sees     gptq

GPTQ needs a second stream of hidden states, those of the unquantized model; plain rounding gets by with one stream,
one pass over each half, and no moments.

Every expert of a mixture of experts sees every calibration token, whatever the router says, so that all have finite
and comparable statistics; what the router did is counted beside it.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.engines.emulation import ExpertRounding, Rounding, input_rounding, round_expert_inputs, round_inputs
from harness.engines.layers import Batch, Half, HiddenStates, TextModel, captured
from harness.errors import UserError
from harness.formats import fp8, nvfp4
from harness.formats.config import Format
from harness.model.qwen35 import Linear
from harness.quantize import gptq
from harness.quantize.encode import BadWeightError, by_rows
from harness.quantize.plan import EXPERTS_TOGETHER
from harness.quantize.recipes import Method
from harness.quantize.search import block_scales


@dataclass
class Site:
    """One input that several linear layers read, and what calibration found out about it.

    With `num` experts the statistics have a leading dimension of it; otherwise it is 1. `rounding` is the one that
    the kernel will apply, with the largest input seen so far.
    """

    form: Format
    num: int = 1
    amax: Tensor | None = None
    moments: Tensor | None = None
    shift: Tensor | None = None
    settled: bool = False
    """Whether amax is final: the inputs have been seen once."""

    def observe(self, x: Tensor, index: int = 0) -> None:
        """Takes inputs `[tokens, in]` (of expert `index`) into account for the scale."""
        if self.settled or not self.form.needs_calibration or not x.numel():
            return
        if self.amax is None:
            self.amax = torch.zeros(self.num, device=x.device)
        self.amax[index] = torch.maximum(self.amax[index], x.abs().amax().float())

    def global_scales(self) -> Tensor:
        """`input_global_scale` of every expert, `[num]`; `UserError` where no input was ever seen, or one that is NaN
        or infinite and has no scale."""
        if self.amax is None:
            raise UserError("No calibration token reached a layer whose inputs are quantized.", "Give more samples.")
        _check_finite(self.amax)
        return torch.cat([nvfp4.global_encode_scale(amax) for amax in self.amax])

    def rounding(self, index: int = 0) -> Rounding | None:
        """What happens to an input now; the identity for a format that leaves inputs alone."""
        if not self.form.needs_calibration:
            return input_rounding(self.form)

        def rounded(x: Tensor) -> Tensor:
            assert self.amax is not None
            return nvfp4.fake_quantize(x, nvfp4.global_encode_scale(self.amax[index]))

        return rounded

    def accumulate(self, x: Tensor, reference: Tensor | None, index: int = 0) -> None:
        """Adds inputs `x [tokens, in]` to the moments, as the kernel rounds them, and their distance from
        `reference [tokens, in]` to the shift; without a reference only the moments' diagonal is kept."""
        self.observe(x, index)
        rounding = self.rounding(index)
        rounded = (x if rounding is None else rounding(x)).float()
        width = x.shape[-1]
        if reference is None:
            if self.moments is None:
                self.moments = torch.zeros(self.num, width, device=x.device)
            self.moments[index] += rounded.square().sum(0)
            return
        if self.moments is None or self.shift is None:
            self.moments = torch.zeros(self.num, width, width, device=x.device)
            self.shift = torch.zeros_like(self.moments)
        self.moments[index].addmm_(rounded.T, rounded)
        self.shift[index].addmm_(rounded.T, reference.float() - rounded)

    def part(self, first: int, last: int) -> "Site":
        """The site of some of the experts; itself where all share one input."""
        if self.num == 1:
            return self
        moments = None if self.moments is None else self.moments[first:last]
        shift = None if self.shift is None else self.shift[first:last]
        return Site(self.form, last - first, moments=moments, shift=shift)

    def importance(self) -> Tensor | None:
        """The second moment of every input, `[num, in]`."""
        if self.moments is None or self.moments.dim() == 2:
            return self.moments
        return self.moments.diagonal(dim1=1, dim2=2)

    def forget(self) -> None:
        """Frees what is only needed to choose codes."""
        self.moments = self.shift = None
        self.settled = self.amax is not None


def _check_finite(statistics: Tensor) -> None:
    if not bool(torch.isfinite(statistics).all()):
        raise BadWeightError(
            "The inputs of a layer overflow on the calibration samples: they hold NaN or infinity.",
            "Run the 16-bit source on these samples; if it gives NaN too, it cannot be quantized.",
        )


@dataclass(frozen=True)
class GroupReport:
    """What became of one fused group (of all experts' together): its error on the calibration inputs, with these codes
    and rounded to nearest, and its output, in the output's own unit squared; None where no moments were taken."""

    group: str
    format: str
    num_weights: int
    error: float | None = None
    rtn_error: float | None = None
    output: float | None = None
    num_rows_rtn: int = 0
    damping: float | None = None


@dataclass
class LayerReport:
    """What one layer took and gave. `routed` counts the tokens that the router sent to each expert."""

    index: int
    groups: list[GroupReport] = field(default_factory=list)
    routed: list[int] | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def spend(self, name: str, since: float) -> None:
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


Emit = Callable[[str, Tensor], None]
"""Takes a finished tensor of the artifact by its full name."""


def quantize_layer(
    model: TextModel,
    index: int,
    linears: Sequence[Linear],
    formats: Mapping[str, Format],
    method: Method,
    batches: Sequence[Batch],
    before: Streams,
    after: Streams,
    emit: Emit,
    advance: Callable[[int], None],
) -> LayerReport:
    """Quantizes decoder layer `index` and carries the hidden states through it.

    `linears` are the layer's linear layers to be quantized, `formats` their formats by role. Finished tensors go to
    `emit`; `advance` is told the tokens done, twice each in all. Reads `before`, fills `after`.
    """
    report = LayerReport(index)
    start = time.perf_counter()
    halves = model.layer(index)
    references = model.layer(index) if method.two_streams else halves
    report.spend("read", start)
    source = before
    for half, reference in zip(halves, references, strict=True):
        _HalfPass(half, reference, linears, formats, method, batches, source, after, emit, report).run(advance)
        source = after
    return report


@dataclass
class _HalfPass:
    """One half of one layer on its way through calibration."""

    half: Half
    reference: Half
    linears: Sequence[Linear]
    formats: Mapping[str, Format]
    method: Method
    batches: Sequence[Batch]
    before: Streams
    after: Streams
    emit: Emit
    report: LayerReport

    def run(self, advance: Callable[[int], None]) -> None:
        groups = self._groups()
        sites = {name: Site(self.formats[members[0].role.name]) for name, members in groups.items()}
        experts = self._experts()
        stages = [
            [name for name, members in groups.items() if _reads_hidden(members[0]) == first] for first in (True, False)
        ]
        reference_done = self.before.reference is None
        for first, stage in zip((True, False), stages, strict=True):
            wanted = [name for name in stage if sites[name].form.compressor == "nvfp4-pack-quantized"]
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
                    self.emit(f"{linear.module}.input_global_scale", sites[name].global_scales())
        if experts is not None:
            experts.emit_input_scales(self.emit)

    def _groups(self) -> dict[str, list[Linear]]:
        """The half's 2-D linear layers to be quantized, by the matrix that vLLM fuses them into."""
        groups: dict[str, list[Linear]] = {}
        for linear in self.linears:
            if linear.module in self.half.linears:
                groups.setdefault(linear.fused_into, []).append(linear)
        return groups

    def _experts(self) -> "_Experts | None":
        if self.half.experts is None:
            return None
        prefix, module = self.half.experts
        mine = [linear for linear in self.linears if linear.module.startswith(f"{prefix}.")]
        reference = self.reference.experts
        assert reference is not None
        form = self.formats[mine[0].role.name] if mine else None
        return _Experts(prefix, module, reference[1], form, self.half.body.gate)

    def _take_moments(
        self,
        first: bool,
        sites: Mapping[str, Site],
        groups: Mapping[str, list[Linear]],
        experts: "_Experts | None",
        keep_reference: bool,
    ) -> None:
        """Statistics of one stage's inputs, over all batches. `keep_reference` runs the unquantized half to its end
        and stores what comes out."""
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
                site.accumulate(_tokens(inputs[name], valid), None if reference is None else _tokens(reference, valid))
            if experts is not None:
                experts.take_moments(
                    first, _tokens(normed, valid), _tokens(other_normed, valid) if other_normed is not None else None
                )

    def _quantize_group(self, name: str, members: Sequence[Linear], site: Site) -> None:
        weights = [self.half.linears[linear.module].weight for linear in members]
        emitted, decoded, report = _quantize(
            name, torch.cat([weight.float() for weight in weights]).unsqueeze(0), site, self.method
        )
        self.report.groups.append(report)
        first = 0
        for linear, weight in zip(members, weights, strict=True):
            last = first + linear.out_features
            for suffix, tensor in emitted.items():
                rows = tensor[0] if suffix.endswith("global_scale") else tensor[0, first:last]
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
        experts: "_Experts | None",
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
                experts.see(_tokens(normed, current[0]))
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
        site.observe(_tokens(x, current[0]))
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


def _reads_hidden(linear: Linear) -> bool:
    """Whether a linear layer reads the normed hidden states, not what another one of its half made."""
    return not linear.role.name.endswith(("o_proj", "out_proj", "down_proj"))


def _tokens(x: Tensor, valid: Tensor) -> Tensor:
    """The rows `[tokens, in]` of `x [batch, time, in]` (or already flat) that are not padding."""
    return x.reshape(-1, x.shape[-1])[valid.view(-1)]


def _quantize(name: str, w: Tensor, site: Site, method: Method) -> tuple[dict[str, Tensor], Tensor, GroupReport]:
    """Stores `w [n, rows, in]` in the site's format: tensors `[n, …]` by suffix, the decoded weights and a report.

    Each of the n matrices is a fused group of its own and gets its own global scale. The site's statistics are one for
    all of them, or one for each.
    """
    num, rows, width = w.shape
    report = GroupReport(name, site.form.name, w.numel())
    if site.form.compressor == "float-quantized":
        scales = fp8.channel_decode_scales(w)
        codes = fp8.encode(w, scales)
        return {"weight": codes, "weight_scale": scales}, fp8.decode(codes, scales, torch.float32), report
    shared = w.reshape(site.num, -1, width)
    target = shared
    importance = site.importance()
    if importance is not None:
        _check_finite(importance)
    if site.moments is not None and site.shift is not None:
        target = gptq.aimed(shared, site.moments, site.shift, method.damping)
    amax = target.reshape(num, -1).abs().amax(1)
    global_scales = torch.cat([nvfp4.global_encode_scale(one) for one in amax])
    per_row = global_scales.repeat_interleave(rows).view(-1, 1)
    row_scales = per_row.view(site.num, -1, 1)

    def chosen(n: int, rows: slice) -> Tensor:
        weighted = None if importance is None else importance[n]
        return block_scales(target[n, rows], row_scales[n, rows], method.scales, weighted)

    scales = torch.cat([by_rows(partial(chosen, n), part) for n, part in enumerate(target)])
    if site.moments is not None and site.shift is not None:
        decode_scales = (scales.float() / per_row).view(*shared.shape[:2], -1)
        rounded = gptq.gptq(shared, target, decode_scales, site.moments, method.damping)
        codes = rounded.codes.view(-1, width)
        report = replace(
            report,
            error=rounded.error,
            rtn_error=rounded.rtn_error,
            output=rounded.output,
            num_rows_rtn=rounded.num_rows_rtn,
            damping=rounded.damping,
        )
    else:
        flat = w.view(-1, width)
        codes = by_rows(lambda rows: nvfp4.encode(flat[rows], scales[rows], per_row[rows]), flat)
    packed = nvfp4.pack(codes)
    decoded = by_rows(lambda rows: nvfp4.decode(packed[rows], scales[rows], per_row[rows], torch.float32), codes)
    tensors = {
        "weight_packed": packed.view(num, rows, -1),
        "weight_scale": scales.view(num, rows, -1),
        "weight_global_scale": global_scales.view(num, 1),
    }
    return tensors, decoded.view(w.shape), report


class _Experts:
    """The routed experts of a half: fused 3-D weights, one site for the input that all read, one for each inside.

    `gate_up_proj [E, 2I, H]` and `down_proj [E, H, I]` stay where they are; a few experts at a time are widened.
    """

    def __init__(self, prefix: str, module: Any, reference: Any, form: Format | None, router: Any) -> None:
        self._prefix, self._module, self._reference, self._router = prefix, module, reference, router
        self._num: int = module.gate_up_proj.shape[0]
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
            other = None if reference is None else _inner(self._reference, expert, reference)
            self._inner.accumulate(_inner(self._module, expert, x), other, expert)

    def quantize(self, first: bool, method: Method, emit: Emit) -> GroupReport | None:
        """Quantizes gate and up projections (`first`) or down projections of all experts."""
        if self._input is None or self._inner is None:
            return None
        weight = self._module.gate_up_proj if first else self._module.down_proj
        site, shards = (self._input, ("gate_proj", "up_proj")) if first else (self._inner, ("down_proj",))
        name = f"{self._prefix}.{'w13' if first else 'down_proj'}"
        step = max(1, EXPERTS_TOGETHER // weight[0].numel())
        reports = []
        for start in range(0, self._num, step):
            part = weight[start : start + step]
            tensors, decoded, report = _quantize(name, part.float(), site.part(start, start + len(part)), method)
            reports.append(report)
            part.copy_(decoded)
            height = part.shape[1] // len(shards)
            for expert in range(len(part)):
                for place, shard in enumerate(shards):
                    for suffix, tensor in tensors.items():
                        one = tensor[expert]
                        rows = one if one.dim() == 1 else one[place * height : (place + 1) * height]
                        emit(f"{self._prefix}.{start + expert}.{shard}.{suffix}", rows)
        site.forget()
        return _merged(reports)

    def round_inputs(self) -> None:
        """From now on the experts round what they read."""
        if self._input is not None and self._inner is not None:
            outer, inner = self._input.rounding(), self._inner
            round_expert_inputs(self._module, [ExpertRounding(outer, inner.rounding(e)) for e in range(self._num)])

    def see(self, x: Tensor) -> None:
        """Counts where the router sends tokens `x [tokens, H]`, and shows all of them to every expert."""
        chosen = self._router(x)[2]
        self.routed += torch.bincount(chosen.reshape(-1), minlength=self._num).cpu()
        if self._input is None or self._inner is None or not self._input.form.needs_calibration:
            return
        self._input.observe(x)
        if self._inner.settled:
            return
        rounding = self._input.rounding()
        x = x if rounding is None else rounding(x)
        for expert in range(self._num):
            self._inner.observe(_inner(self._module, expert, x), expert)

    def emit_input_scales(self, emit: Emit) -> None:
        if self._input is None or self._inner is None or not self._input.form.needs_calibration:
            return
        outer, inner = self._input.global_scales(), self._inner.global_scales()
        for expert in range(self._num):
            for shard, scale in (("gate_proj", outer), ("up_proj", outer), ("down_proj", inner[expert : expert + 1])):
                emit(f"{self._prefix}.{expert}.{shard}.input_global_scale", scale)


def _inner(experts: Any, expert: int, x: Tensor) -> Tensor:
    """What expert number `expert` gives its down projection for `x [tokens, H]`: `[tokens, I]`."""
    gate, up = functional.linear(x, experts.gate_up_proj[expert].to(x.dtype)).chunk(2, dim=-1)
    inner: Tensor = experts.act_fn(gate) * up
    return inner


def _merged(reports: Sequence[GroupReport]) -> GroupReport:
    """One report for the parts of a group."""

    def total(values: Iterable[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) if known else None

    return GroupReport(
        group=reports[0].group,
        format=reports[0].format,
        num_weights=sum(report.num_weights for report in reports),
        error=total(report.error for report in reports),
        rtn_error=total(report.rtn_error for report in reports),
        output=total(report.output for report in reports),
        num_rows_rtn=sum(report.num_rows_rtn for report in reports),
        damping=max((report.damping for report in reports if report.damping is not None), default=None),
    )
