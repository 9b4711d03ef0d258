"""The classes of Qwen3.5's text part alone in vLLM, with the names of either kind that their checkpoints have."""

from pathlib import Path

import numpy as np
import pytest

from harness.demo import checkpoint_path, corpus
from harness.engines.protocol import open_engine
from harness.measure.perplexity import tokenize
from harness.quantize.build import build
from harness.quantize.recipes import RECIPES
from tests.artifacts import quiet
from tests.text_only import TEXT, text_part
from tests.vllm.conftest import Engines


@pytest.mark.parametrize(
    ("model", "prefix", "served_by"),
    [("dense", "model.", "Qwen3_5ForCausalLM"), ("moe", TEXT, "Qwen3_5MoeForCausalLM")],
)
def test_an_artifact_of_the_text_part_loads_and_scores_as_in_torch(
    tmp_path: Path, engines: Engines, model: str, prefix: str, served_by: str
) -> None:
    source = text_part(checkpoint_path(model), tmp_path / "source", prefix)
    artifact = build(source, RECIPES["rtn-a16"], tmp_path / "a16", quiet).folder
    ids = tokenize(source, corpus.heldout_text()[:4000])
    windows = [ids[first : first + 128] for first in range(0, 512, 128)]
    of_source, expected = (
        np.stack(list(open_engine("torch", folder, dtype="bfloat16", device="cpu").score(windows, 2)))
        for folder in (source, artifact)
    )
    engine = engines.shared(artifact)
    found = np.stack(list(engine.score(windows, 2)))
    assert engine.info.effective["model_class"] == served_by
    assert "NvFp4" in str(engine.info.kernels)
    assert abs(found.mean() - expected.mean()) < 0.2 * abs(expected - of_source).mean()
