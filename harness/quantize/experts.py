"""The routed experts of a layer on their way through calibration.

Every expert sees every calibration token, whatever the router says, so that all have finite and comparable statistics;
what the router did is counted beside it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from harness.engines.emulation import ExpertRounding, round_expert_inputs
from harness.engines.layers import RoutedExperts
from harness.formats.format import Format
from harness.quantize.method import Method
from harness.quantize.pieces import EXPERTS_TOGETHER
from harness.quantize.sites import GroupReport, Site, merged, quantize_matrices

Emit = Callable[[str, Tensor], None]
"""Takes a finished tensor of the artifact by its full name."""


class Experts:
    """The routed experts of a half: one site for the input that all read, one for each inside. Their `gate_up_proj`
    `[E, 2I, H]` and `down_proj [E, H, I]` stay where they are; a few experts at a time are widened."""

    def __init__(self, routed: RoutedExperts, reference: Any, form: Format | None) -> None:
        self._routed, self._reference = routed, reference
        self._module, self._names = routed.module, routed.names
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

    @property
    def _gate_up(self) -> tuple[str, str]:
        return self._names.gate, self._names.up

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
