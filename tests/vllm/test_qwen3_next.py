"""Qwen3-Next in vLLM: projections that are stored fused, interleaved by key head, and experts that lie one by one."""

from pathlib import Path

import numpy as np

from harness.engines.protocol import open_engine
from harness.formats.nvfp4 import NVFP4A16
from harness.quantize.build import build
from harness.quantize.recipes import Recipe
from tests.artifacts import quiet
from tests.qwen3_next import WINDOWS, save_source
from tests.vllm.conftest import Engines

EVERYTHING = Recipe("everything", ((NVFP4A16, ("attention", "deltanet", "mlp", "experts", "shared-expert")),))
"""Weights alone: rounded activations of random weights send tokens to other experts in bfloat16."""


def test_an_artifact_with_quantized_deltanet_loads_and_scores_as_in_torch(tmp_path: Path, engines: Engines) -> None:
    # The widths of heads that vLLM's attention on a CPU knows.
    source = save_source(tmp_path / "source", head_dim=64, linear_key_head_dim=64, linear_value_head_dim=64)
    artifact = build(source, EVERYTHING, tmp_path / "a16", quiet).folder
    of_source, expected = (
        np.stack(list(open_engine("torch", folder, dtype="bfloat16", device="cpu").score(WINDOWS, 2)))
        for folder in (source, artifact)
    )
    engine = engines.shared(artifact)
    found = np.stack(list(engine.score(WINDOWS, 2)))
    assert engine.info.effective["model_class"] == "Qwen3NextForCausalLM"
    assert "NvFp4" in str(engine.info.kernels)
    # 0.03 and 0.45 nats: the noise of bfloat16, and what quantization does to random weights.
    assert abs(found - expected).mean() < 0.2 * abs(expected - of_source).mean()
