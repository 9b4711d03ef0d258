"""An FP8 cache, which is measured where it is asked for and never a default."""

from pathlib import Path

import numpy as np
import pytest

from harness.demo import checkpoint_path, corpus
from harness.engines.protocol import EngineDied
from harness.measure import decode, perplexity
from tests.vllm.conftest import Engines

CPU = Path("/proc/cpuinfo").read_text()
HAS_FP8_CACHE = "avx512f" in CPU or "amx_tile" in CPU
"""vLLM keeps an FP8 cache on no other CPU."""


@pytest.mark.parametrize("source", [pytest.param("dense", id="demo-source")])
def test_an_fp8_cache_holds_more_tokens_and_stays_coherent_as_the_context_grows(source: str, engines: Engines) -> None:
    if not HAS_FP8_CACHE:
        with pytest.raises(EngineDied, match="AVX-512"):
            engines.shared(checkpoint_path(source), text_only=True, kv_cache_dtype="fp8")
        return
    ids = perplexity.tokenize(checkpoint_path(source), corpus.heldout_text())
    windows = [ids[start : start + 512] for start in range(0, 4 * 512, 512)]
    tokens, scores = [], []
    for dtype in ("fp8", "auto"):
        options = {} if dtype == "auto" else {"kv_cache_dtype": dtype}
        engine = engines.shared(checkpoint_path(source), text_only=True, **options)
        assert engine.info.effective["kv_cache_dtype"] == dtype
        tokens.append(engine.info.effective["kv_cache_tokens"])
        scores.append(np.concatenate(list(engine.score(windows, 4))))
        for depth in (64, 256, 900):
            assert decode.coherence(engine, ids, 1024, depth)["coherent"], f"{dtype} after {depth} tokens"
    assert tokens[0] > 1.3 * tokens[1]
    assert not np.array_equal(*scores), "the cache is really another one"
    assert abs(float((scores[0] - scores[1]).mean())) < 0.01
