"""What the vLLM engine makes of vLLM's words; vLLM itself is not needed for it. With vLLM: tests/vllm."""

import json
from pathlib import Path

import pytest

from harness.engines import vllm_engine, vllm_options
from harness.engines.protocol import Start
from harness.errors import UserError

MARLIN = "CompressedTensorsW4A4Fp4 → MarlinNvFp4LinearKernel"
CUTLASS = "CompressedTensorsW4A4Fp4 → FlashInferCutlassNvFp4LinearKernel"
MARLIN_EXPERTS = "CompressedTensorsW4A4Nvfp4MoEMethod → MarlinExperts → MARLIN"


def checkpoint(folder: Path, activations: bool) -> Path:
    arguments = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**arguments, "dynamic": False},
        "input_activations": {**arguments, "dynamic": "local"} if activations else None,
        "format": "nvfp4-pack-quantized",
    }
    config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": []}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return folder


@pytest.mark.parametrize("kernel", [MARLIN, MARLIN_EXPERTS])
def test_w4a4_that_a_weight_only_kernel_serves_is_called_so(tmp_path: Path, kernel: str) -> None:
    layers = {"mlp.down_proj": kernel, "self_attn.qkv_proj": CUTLASS}
    found = vllm_engine._served_as(checkpoint(tmp_path, activations=True), layers)
    assert found == f"16-bit activations ({kernel})"


def test_weight_only_kernels_are_what_a_weight_only_checkpoint_needs(tmp_path: Path) -> None:
    assert vllm_engine._served_as(checkpoint(tmp_path, activations=False), {"mlp.down_proj": MARLIN}) is None
    assert vllm_engine._served_as(checkpoint(tmp_path, activations=True), {"mlp.down_proj": CUTLASS}) is None
    (tmp_path / "config.json").write_text("{}")
    assert vllm_engine._served_as(tmp_path, {"mlp.down_proj": "UnquantizedLinearMethod"}) is None


def test_cache_tokens_are_those_of_the_last_start_in_the_log() -> None:
    log = "INFO GPU KV cache size: 1,024 tokens\nINFO GPU KV cache size: 110,880 tokens, Maximum concurrency"
    assert vllm_options.kv_tokens(log) == 110_880
    assert vllm_options.kv_tokens("nothing") is None


def test_the_reason_is_the_error_that_does_not_point_to_another() -> None:
    lines = [
        "ValueError: There is no module or parameter named 'visual'.",
        "Exception: WorkerProc initialization failed. See stack trace for root cause.",
        "RuntimeError: Engine core initialization failed. See root cause above.",
    ]
    error = RuntimeError("Engine core initialization failed")
    assert vllm_options.reason(error, lines) == "ValueError: There is no module or parameter named 'visual'"
    assert vllm_options.reason(error, []) == "Engine core initialization failed"


def test_without_vllm_the_engine_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"vLLM cannot be imported.*nox -s vllm"):
        vllm_engine.VllmEngine(checkpoint(tmp_path, activations=False), Start())
