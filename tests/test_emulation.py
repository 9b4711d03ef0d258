"""Emulated activations: without a rounding experts compute what transformers computes, with one what is asked for."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeTextConfig
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeExperts

from harness.engines.emulation import ExpertRounding, round_expert_inputs, round_inputs
from harness.formats import fp8, nvfp4
from harness.formats.fp8 import FP8_DYNAMIC
from harness.formats.nvfp4 import NVFP4, NVFP4A16

NUM_EXPERTS, HIDDEN, INNER = 6, 48, 32
UNROUNDED = [ExpertRounding(None, None)] * NUM_EXPERTS
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")


def identity(x: Tensor) -> Tensor:
    return x


def experts_module(implementation: str = "eager") -> Any:
    config = Qwen3_5MoeTextConfig(hidden_size=HIDDEN, moe_intermediate_size=INNER, num_experts=NUM_EXPERTS)
    config._experts_implementation = implementation
    module = Qwen3_5MoeExperts(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.2, generator=generator)
    return module.requires_grad_(False)


def routed(num_tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, chosen experts and their shares; expert 5 is never chosen."""
    generator = torch.Generator().manual_seed(num_tokens)
    hidden = torch.randn(num_tokens, HIDDEN, generator=generator)
    shares, chosen = torch.randn(num_tokens, NUM_EXPERTS - 1, generator=generator).softmax(-1).topk(2)
    return hidden.to(dtype), chosen, shares.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 2, 37])
@pytest.mark.parametrize("roundings", [UNROUNDED, [ExpertRounding(identity, identity)] * NUM_EXPERTS])
def test_experts_without_rounding_are_transformers_own_loop_to_the_last_bit(
    dtype: torch.dtype, num_tokens: int, roundings: list[ExpertRounding]
) -> None:
    theirs, ours = experts_module().to(dtype), experts_module().to(dtype)
    round_expert_inputs(ours, roundings)
    batch = routed(num_tokens, dtype)
    assert torch.equal(ours(*batch), theirs(*batch))


def test_a_place_that_another_device_computes_adds_nothing() -> None:
    module = experts_module()
    round_expert_inputs(module, UNROUNDED)
    hidden, chosen, shares = routed(9)
    unshared = shares.clone()
    unshared[::2, 0] = 0
    expected = module(hidden, chosen, unshared)
    chosen[::2, 0] = NUM_EXPERTS  # the number that transformers' expert parallelism puts there
    torch.testing.assert_close(module(hidden, chosen, shares), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_roundings_run_whatever_implementation_transformers_would_choose(implementation: str) -> None:
    reference, module = experts_module(), experts_module(implementation)
    batch = routed(20)
    torch.testing.assert_close(module(*batch), reference(*batch))  # so far transformers' own
    zeros = [ExpertRounding(torch.zeros_like, identity)] * NUM_EXPERTS
    round_expert_inputs(module, zeros)
    assert torch.equal(module(*batch), torch.zeros(20, HIDDEN))


def test_each_expert_rounds_its_own_two_inputs_and_each_kernel_would_see_them() -> None:
    module = experts_module()
    scales = [(torch.tensor([50.0 + 10 * n]), torch.tensor([500.0 - 40 * n])) for n in range(NUM_EXPERTS)]
    roundings = [ExpertRounding(NVFP4.rounding(a), NVFP4.rounding(b)) for a, b in scales]
    round_expert_inputs(module, roundings)
    hidden, chosen, shares = routed(12)
    expected = torch.zeros_like(hidden)
    for token in range(len(hidden)):
        for expert, share in zip(chosen[token].tolist(), shares[token], strict=True):
            x = nvfp4.fake_quantize(hidden[token], scales[expert][0])
            gate, up = (module.gate_up_proj[expert] @ x).chunk(2)
            x = nvfp4.fake_quantize(nn.functional.silu(gate) * up, scales[expert][1])
            expected[token] += share * (module.down_proj[expert] @ x)
    found = module(hidden, chosen, shares)
    torch.testing.assert_close(found, expected)
    assert (found - experts_module()(hidden, chosen, shares)).abs().max() > 0.01


def test_weights_stored_in_bf16_serve_float32_states_one_expert_at_a_time() -> None:
    module, wide = experts_module().bfloat16(), experts_module().bfloat16().float()
    for target in (module, wide):
        round_expert_inputs(target, UNROUNDED)
    batch = routed(30)
    with Widened() as widened:
        found = module(*batch)
    assert found.dtype == torch.float32
    assert torch.equal(found, wide(*batch))
    assert widened.largest == 2 * INNER * HIDDEN
    assert module.gate_up_proj.dtype == torch.bfloat16


class Widened(TorchDispatchMode):
    """Within this, `largest` is the most elements that one operation turned from BF16 into float32."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        dtypes = [getattr(tensor, "dtype", None) for tensor in (args[0], out)]
        if dtypes == [torch.bfloat16, torch.float32]:
            self.largest = max(self.largest, out.numel())
        return out


@pytest.fixture
def linear() -> Iterator[nn.Linear]:
    torch.manual_seed(0)
    yield nn.Linear(32, 8, bias=False).requires_grad_(False)


def test_a_linear_layer_rounds_its_input_on_every_call(linear: nn.Linear) -> None:
    scale = torch.tensor([300.0])
    round_inputs(linear, NVFP4.rounding(scale))
    for x in (torch.randn(5, 32), torch.randn(2, 3, 32)):
        expected = nn.functional.linear(nvfp4.fake_quantize(x, scale), linear.weight)
        assert torch.equal(linear(x), expected)
        assert not torch.equal(expected, nn.functional.linear(x, linear.weight))


def test_a_format_with_16_bit_activations_leaves_a_layer_alone(linear: nn.Linear) -> None:
    assert NVFP4A16.rounding() is None
    round_inputs(linear, None)
    x = torch.randn(5, 32)
    assert torch.equal(linear(x), nn.functional.linear(x, linear.weight))


def test_fp8_needs_no_scale_and_nvfp4_does(linear: nn.Linear) -> None:
    x = torch.randn(5, 32)
    rounding = FP8_DYNAMIC.rounding()
    assert rounding is not None
    assert torch.equal(rounding(x), fp8.fake_quantize_tokens(x))
    with pytest.raises(ValueError, match="NVFP4 needs an input_global_scale"):
        NVFP4.rounding()


def test_a_rounding_follows_its_layer_to_another_device_and_back() -> None:
    rounding = NVFP4.rounding(torch.tensor([300.0]))
    assert rounding is not None
    x = torch.randn(4, 32)
    before = rounding(x)
    assert rounding(x.to("meta")).device.type == "meta"
    assert torch.equal(rounding(x), before)
