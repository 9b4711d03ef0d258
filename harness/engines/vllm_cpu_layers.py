"""compressed-tensors layers for vLLM's CPU backend: weights decoded once, activations rounded on every call.

Loading stays vLLM's, so a checkpoint that would go wrong on a GPU goes wrong here in the same way. Only the last step
differs: the weights become plain matrices by the formats' equations. Written against vLLM 0.32.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter, functional
from vllm.logger import init_logger
from vllm.model_executor.kernels.linear import NvFp4LinearLayerConfig
from vllm.model_executor.kernels.linear.nvfp4.base import NvFp4LinearKernel
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_w4a4_nvfp4 as nvfp4_moe,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_w8a8_fp8 as fp8_moe,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe import (
    CompressedTensorsMoEMethod,
)
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsScheme,
    CompressedTensorsW4A4Fp4,
)
from vllm.model_executor.parameter import ChannelQuantScaleParameter, ModelWeightParameter

from harness.engines.emulation import ExpertRounding, routed_outputs
from harness.formats import fp8, nvfp4

Layer = Any
"""A torch module of vLLM's, which carries tensors under names that no class declares."""

logger = init_logger("vllm.nvfp4_harness")  # below the logger that vLLM configures


class CpuCompressedTensorsConfig(CompressedTensorsConfig):
    """vLLM's own reading of a `quantization_config`, with other classes for the formats that its CPU backend lacks."""

    def _get_scheme_from_parts(
        self, weight_quant: Any, input_quant: Any, *rest: Any, **named: Any
    ) -> CompressedTensorsScheme:
        if self._is_nvfp4_format(weight_quant) and (input_quant is None or self._is_nvfp4_format(input_quant)):
            return CpuNvFp4Scheme(use_a16=input_quant is None)
        if _is_fp8_dynamic(weight_quant, input_quant):
            return CpuFp8Scheme()
        return super()._get_scheme_from_parts(weight_quant, input_quant, *rest, **named)

    def get_quant_method(self, layer: Layer, prefix: str) -> Any:
        """vLLM asks here what computes a layer."""
        if isinstance(layer, RoutedExperts):
            self._add_fused_moe_to_target_scheme_map()
            names = (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name)
            schemes = [self.get_scheme_dict(layer, f"{prefix}.0.{name}") for name in names]
            # Mixed ones are refused by vLLM itself.
            if schemes[0] is not None and all(scheme == schemes[0] for scheme in schemes):
                weights, inputs = schemes[0].get("weights"), schemes[0].get("input_activations")
                if self._is_nvfp4_format(weights) and (inputs is None or self._is_nvfp4_format(inputs)):
                    return CpuNvFp4Experts(layer.moe_config, use_a16=inputs is None)
                if _is_fp8_dynamic(weights, inputs):
                    return CpuFp8Experts(weights, inputs, layer.moe_config)
        return super().get_quant_method(layer, prefix)


def _is_fp8_dynamic(weights: Any, inputs: Any) -> bool:
    """Whether these compressed-tensors arguments are the format FP8_DYNAMIC: a scale a channel, and a token."""

    def is_float8(one: Any, strategy: str) -> bool:
        return one is not None and (one.type, one.num_bits, one.strategy) == ("float", 8, strategy)

    return is_float8(weights, "channel") and is_float8(inputs, "token") and bool(inputs.dynamic)


# -- Linear layers -----------------------------------------------------------------------------------------------
# Activations are rounded by operators that torch.compile does not look into: its generated code for a CPU fails over
# the float8 types in them (torch 2.13, "Promotion for Float8 Types is not supported").


@torch.library.custom_op("harness::round_nvfp4", mutates_args=())
def _round_nvfp4(x: Tensor, scale: Tensor) -> Tensor:
    return nvfp4.round_trip(x, nvfp4.activation_block_scales(x, scale), scale)


@torch.library.custom_op("harness::round_fp8_tokens", mutates_args=())
def _round_fp8_tokens(x: Tensor) -> Tensor:
    return fp8.fake_quantize_tokens(x)


@_round_nvfp4.register_fake
def _like_nvfp4(x: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(x)


@_round_fp8_tokens.register_fake
def _like_fp8_tokens(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class CpuNvFp4LinearKernel(NvFp4LinearKernel):
    """The product of an NVFP4 layer whose weight is decoded: `x [..., in]` rounded where the format says so."""

    def __init__(self, rounds_inputs: bool) -> None:
        super().__init__(NvFp4LinearLayerConfig())
        self._rounds_inputs = rounds_inputs
        logger.info_once("Using %s for NVFP4 GEMM", f"{type(self).__name__}{'' if rounds_inputs else ' (weight-only)'}")

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        """On every CPU."""
        return True, None

    @classmethod
    def can_implement(cls, config: NvFp4LinearLayerConfig) -> tuple[bool, str | None]:
        """Every layer."""
        return True, None

    def process_weights_after_loading(self, layer: Layer) -> None:
        """Nothing: the scheme has the scales as they were stored, and decodes."""

    def apply_weights(self, layer: Layer, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The layer's output `[..., out]` for inputs `x [..., in]`."""
        if self._rounds_inputs:
            x = _round_nvfp4(x, layer.stored_input_scale)
        return functional.linear(x, layer.weight, bias)


class CpuNvFp4Scheme(CompressedTensorsW4A4Fp4):
    """vLLM's NVFP4 scheme with a CPU kernel."""

    def __init__(self, use_a16: bool) -> None:
        # Not the parent's own, which looks for a GPU kernel.
        self.use_a16 = use_a16
        self.group_size = nvfp4.BLOCK
        self.kernel = CpuNvFp4LinearKernel(rounds_inputs=not use_a16)

    def create_weights(self, layer: Layer, *args: Any, params_dtype: torch.dtype, **named: Any) -> None:
        """Declares vLLM's own parameters, and notes the type that the layer computes in."""
        layer.computed_in = params_dtype
        super().create_weights(layer, *args, params_dtype=params_dtype, **named)

    def process_weights_after_loading(self, layer: Layer) -> None:
        # Of several shards' scales vLLM takes the largest, warns, and stores the reciprocal.
        global_scale = layer.weight_global_scale.max().reshape(1).float()
        if not self.use_a16:
            layer.stored_input_scale = layer.input_global_scale.max().reshape(1).float()
        super().process_weights_after_loading(layer)
        decoded = nvfp4.decode(layer.weight.data, layer.weight_scale.data, global_scale)
        layer.weight = Parameter(decoded.to(layer.computed_in), requires_grad=False)
        del layer.weight_scale


class CpuFp8Scheme(CompressedTensorsScheme):
    """FP8 with a scale a channel and a scale a token."""

    @classmethod
    def get_min_capability(cls) -> int:
        """Of a GPU; a CPU has none."""
        return 0

    def __init__(self) -> None:
        logger.info_once("Selected %s for CompressedTensorsW8A8Fp8", type(self).__name__)

    def create_weights(
        self,
        layer: Layer,
        output_partition_sizes: list[int],
        input_size_per_partition: int,
        params_dtype: torch.dtype,
        weight_loader: Callable[..., Any],
        **_: Any,
    ) -> None:
        rows = sum(output_partition_sizes)
        layer.logical_widths = output_partition_sizes
        layer.computed_in = params_dtype
        codes = torch.empty(rows, input_size_per_partition, dtype=torch.float8_e4m3fn)
        weight = ModelWeightParameter(data=codes, input_dim=1, output_dim=0, weight_loader=weight_loader)
        layer.register_parameter("weight", weight)
        scales = torch.empty(rows, 1, dtype=torch.float32)
        weight_scale = ChannelQuantScaleParameter(data=scales, output_dim=0, weight_loader=weight_loader)
        layer.register_parameter("weight_scale", weight_scale)

    def process_weights_after_loading(self, layer: Layer) -> None:
        decoded = fp8.decode(layer.weight.data, layer.weight_scale.data, layer.computed_in)
        layer.weight = Parameter(decoded, requires_grad=False)
        del layer.weight_scale

    def apply_weights(self, layer: Layer, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The layer's output `[..., out]` for inputs `x [..., in]`."""
        return functional.linear(_round_fp8_tokens(x), layer.weight, bias)


# -- Routed experts ----------------------------------------------------------------------------------------------


class _CpuExperts(CompressedTensorsMoEMethod):
    """The routed experts of a layer, decoded, one after another. Routing and the shared expert are vLLM's."""

    precision: str
    roundings: list[ExpertRounding]

    def get_fused_moe_quant_config(self, layer: Layer) -> None:
        """None: the weights carry no scales any more."""

    def apply(
        self,
        layer: Layer,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        weights = (layer.w13_weight, layer.w2_weight)
        return routed_outputs(x, topk_ids, topk_weights.to(x.dtype), *weights, functional.silu, self.roundings)

    def _finish(self, layer: Layer, w13: list[Tensor], w2: list[Tensor], roundings: list[ExpertRounding]) -> None:
        # At loading, where it is a refusal; at the first request it would be a crash.
        if layer.activation != MoEActivation.SILU or layer.apply_router_weight_on_input:
            raise NotImplementedError("experts with another activation than SiLU, or weighted on their input")
        layer.w13_weight = Parameter(torch.stack(w13), requires_grad=False)
        layer.w2_weight = Parameter(torch.stack(w2), requires_grad=False)
        self.roundings = roundings
        logger.info_once("Using '%s' %s MoE backend", type(self).__name__, self.precision)


class CpuNvFp4Experts(_CpuExperts, nvfp4_moe.CompressedTensorsW4A4Nvfp4MoEMethod):
    """vLLM's NVFP4 parameters for experts, decoded."""

    precision = "NvFp4"

    def __init__(self, moe: Any, use_a16: bool) -> None:
        # Not the parent's own, which looks for a GPU backend.
        CompressedTensorsMoEMethod.__init__(self, moe)
        self.group_size = nvfp4.BLOCK
        self.use_a16 = use_a16
        self.nvfp4_backend = None

    def process_weights_after_loading(self, layer: Layer) -> None:
        if not torch.equal(layer.w13_weight_global_scale[:, 0], layer.w13_weight_global_scale[:, 1]):
            logger.warning_once(
                "w1_weight_global_scale must match w3_weight_global_scale: vLLM decodes up projections by the gate's."
            )

        def decoded(name: str, scales: Tensor) -> list[Tensor]:
            packed, blocks = layer.get_parameter(f"{name}_weight_packed"), layer.get_parameter(f"{name}_weight_scale")
            experts = zip(packed.data, blocks.data, scales.data, strict=True)
            return [nvfp4.decode(p, b, s.reshape(1)).to(layer.params_dtype) for p, b, s in experts]

        w13 = decoded("w13", layer.w13_weight_global_scale[:, 0])
        w2 = decoded("w2", layer.w2_weight_global_scale)
        roundings = [ExpertRounding(None, None)] * len(w13)
        if not self.use_a16:
            # Gate and up read one input; vLLM's own methods take the larger scale where they differ.
            gate_up, down = layer.w13_input_global_scale.amax(1), layer.w2_input_global_scale
            scales = ((a.reshape(1).clone(), b.reshape(1).clone()) for a, b in zip(gate_up, down, strict=True))
            roundings = [ExpertRounding(nvfp4.NVFP4.rounding(a), nvfp4.NVFP4.rounding(b)) for a, b in scales]
        for part in ("w13", "w2"):
            for suffix in ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"):
                delattr(layer, f"{part}_{suffix}")
        self._finish(layer, w13, w2, roundings)


class CpuFp8Experts(_CpuExperts, fp8_moe.CompressedTensorsW8A8Fp8MoEMethod):
    """vLLM's FP8 parameters for experts, decoded."""

    precision = "Fp8"

    def __init__(self, weights: Any, inputs: Any, moe: Any) -> None:
        CompressedTensorsMoEMethod.__init__(self, moe)
        self.weight_quant, self.input_quant = weights, inputs
        self.weight_block_size, self.block_quant, self.static_input_scales = None, False, False
        self.fp8_backend = None

    def process_weights_after_loading(self, layer: Layer) -> None:
        def decoded(part: str) -> list[Tensor]:
            codes, scales = (layer.get_parameter(f"{part}_{name}").data for name in ("weight", "weight_scale"))
            return [fp8.decode(c, s, layer.orig_dtype) for c, s in zip(codes, scales, strict=True)]

        rounding, w13, w2 = fp8.FP8_DYNAMIC.rounding(), decoded("w13"), decoded("w2")
        del layer.w13_weight_scale, layer.w2_weight_scale
        self._finish(layer, w13, w2, [ExpertRounding(rounding, rounding)] * len(w13))
