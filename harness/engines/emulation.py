"""Quantized activations in transformers' modules: what a W4A4 or W8A8 kernel does to a layer's input.

A linear layer rounds its input in a hook before its forward. The routed experts of a layer get a forward of their own,
which rounds the input of each expert and of its down projection, as vLLM's fused kernels do.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.formats.format import Format, Rounding


def formats_of(module: nn.Module) -> tuple[Format | None, ...]:
    """The formats that the weights of `module` were decoded from (`loading.Stored`), None among them for weights that
    are stored as they are; empty for a module without any such weight."""
    found: tuple[Format | None, ...] = getattr(module, "decoded_from", ())
    return found if any(found) else ()


def round_inputs(linear: nn.Linear, rounding: Rounding | None) -> None:
    """Makes `linear` round its input first, on every call from now on."""
    if rounding is not None:
        linear.register_forward_pre_hook(lambda _, inputs: (rounding(inputs[0]), *inputs[1:]))


@dataclass(frozen=True)
class ExpertRounding:
    """The roundings of one expert: of its input, which gate and up share, and of its down projection's. None leaves
    the input alone."""

    gate_up: Rounding | None
    down: Rounding | None


def routed_outputs(
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    activation: Callable[[Tensor], Tensor],
    roundings: Sequence[ExpertRounding],
) -> Tensor:
    """What routed experts make of `hidden [tokens, H]`: `[tokens, H]`.

    `top_k_index` and `top_k_weights` are `[tokens, k]`, `gate_up_proj` is `[E, 2I, H]` and `down_proj` `[E, H, I]`;
    `roundings` has one entry an expert. The order is that of transformers' own loop: without a rounding the
    results are equal to the last bit. Weights of another dtype are converted one expert at a time, never as a whole.
    """
    output = torch.zeros_like(hidden)
    for expert in torch.unique(top_k_index).tolist():
        if expert >= len(roundings):  # how transformers marks a place that another device computes
            continue
        place, tokens = torch.where(torch.eq(top_k_index.T, expert))
        rounding = roundings[expert]
        x = _rounded(hidden[tokens], rounding.gate_up)
        gate, up = functional.linear(x, gate_up_proj[expert].to(x.dtype)).chunk(2, dim=-1)
        x = _rounded(activation(gate) * up, rounding.down)
        answer = functional.linear(x, down_proj[expert].to(x.dtype)) * top_k_weights[tokens, place, None]
        output.index_add_(0, tokens, answer.to(output.dtype))
    return output


def round_expert_inputs(experts: nn.Module, roundings: Sequence[ExpertRounding]) -> None:
    """Makes transformers' fused experts module (`gate_up_proj`, `down_proj`, `act_fn`) compute `routed_outputs` with
    `roundings`."""

    def forward(module: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        weights = (module.gate_up_proj, module.down_proj)
        return routed_outputs(hidden, top_k_index, top_k_weights, *weights, module.act_fn, roundings)

    # By a weak reference: a module that held itself would keep gigabytes until the garbage collector came by.
    experts.forward = MethodType(forward, weakref.proxy(experts))


def _rounded(x: Tensor, rounding: Rounding | None) -> Tensor:
    return x if rounding is None else rounding(x)
