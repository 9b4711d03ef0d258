"""An FP8 cache, which is measured where it is asked for and never a default."""

import numpy as np

from harness.demo import checkpoint_path, corpus
from harness.engines.protocol import open_engine
from harness.measure import decode, perplexity

OPTIONS = {"max_model_len": 1024, "max_num_seqs": 4, "kv_cache_gb": 0.5, "enforce_eager": True, "text_only": True}


def test_an_fp8_cache_holds_more_tokens_and_stays_coherent_as_the_context_grows() -> None:
    ids = perplexity.tokenize(checkpoint_path("dense"), corpus.heldout_text())
    windows = [ids[start : start + 512] for start in range(0, 4 * 512, 512)]
    tokens, scores = [], []
    for dtype in ("auto", "fp8"):
        options = {**OPTIONS, "kv_cache_dtype": dtype}
        engine = open_engine("vllm", checkpoint_path("dense"), dtype="bfloat16", options=options)
        assert engine.info.effective["kv_cache_dtype"] == dtype
        tokens.append(engine.info.effective["kv_cache_tokens"])
        scores.append(np.concatenate(list(engine.score(windows, 4))))
        for depth in (64, 256, 900):
            assert decode.coherence(engine, ids, 1024, depth)["coherent"], f"{dtype} after {depth} tokens"
        engine.close()
    assert tokens[1] > 1.3 * tokens[0]
    assert not np.array_equal(*scores), "the cache is really another one"
    assert abs(float((scores[1] - scores[0]).mean())) < 0.01
