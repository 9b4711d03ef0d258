"""`harness fidelity` on vLLM: a reference pack of the source, variants beside it, and the noise between the engines."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from harness.commands.fidelity import compare_with_source, disjoint_windows, fidelity_work
from harness.demo import checkpoint_path
from harness.engines.protocol import open_engine
from harness.job import Job
from harness.measure import fidelity as divergence
from harness.report import quality_tables
from harness.resolve import suite_source
from harness.suite.load import load
from harness.suite.schema import Suite
from studies.peers.chunks import chunks_of
from tests.vllm.conftest import Engines

ROOT = Path(__file__).parents[2]
LIMIT = 3


@pytest.fixture(scope="module")
def suite() -> Suite:
    """The demo suite on vLLM, in short windows, with torch as the engine that noise is measured by."""
    loaded = load(ROOT / "suites/demo.toml")
    assert loaded.fidelity is not None
    measured = replace(loaded.fidelity, window=256, named_tokens=32, noise_engine="torch")
    return replace(
        loaded,
        variants={"w4a4": loaded.variants["w4a4"]},
        fidelity=measured,
        engine=replace(loaded.engine, name="vllm", dtype="bfloat16"),
    )


@pytest.mark.usefixtures("in_one_process")
def test_a_variant_in_vllm_is_compared_with_a_pack_and_its_divergence_is_above_the_noise(
    suite: Suite, tmp_path: Path
) -> None:
    job = Job(suite, ROOT / "artifacts", tmp_path, lambda *_: None, ("test",), "0" * 8)
    measured = compare_with_source(job, fidelity_work(job, None), LIMIT)
    assert measured.failures == {}
    assert list(measured.records) == ["w4a4", "noise-restart", "noise-batch", "noise-engine"]
    kl = {row: quality_tables.mean_kl(record).value for row, record in measured.records.items()}
    assert kl["noise-restart"] < 1e-6, "vLLM computes the same after a restart"
    assert kl["noise-batch"] < kl["w4a4"]
    assert 0 < kl["noise-engine"] < kl["w4a4"]
    for row, record in measured.records.items():
        engine = record.run.engine
        assert engine is not None
        assert engine["name"] == ("torch" if row == "noise-engine" else "vllm")
        assert record.run.dataset is not None
        assert record.run.dataset["distribution"] == "32 named tokens"
        assert [window["num_scored"] for window in record.kind("window")] == [255] * LIMIT

    source, folder = suite_source(suite), job.artifact("w4a4")
    windows = disjoint_windows(fidelity_work(job, ["w4a4"]).ids, 256)[:LIMIT]
    engines = [open_engine("torch", one, dtype="bfloat16") for one in (source, folder)]
    chunks = chunks_of(engines, windows, 4)
    whole = sum(sample["kl_nats"] for _, sample in divergence.fidelity_samples(chunks, windows, ["w4a4"])) / (
        255 * LIMIT
    )
    assert kl["w4a4"] == pytest.approx(whole, rel=0.15), "32 named tokens and the rest tell most of it"


@pytest.mark.parametrize("source", [pytest.param("dense", id="demo-source")])
def test_vllm_names_the_tokens_that_its_whole_distributions_do(source: str, engines: Engines) -> None:
    engine = engines.shared(checkpoint_path(source), text_only=True)
    windows = [list(range(10, 40)), list(range(50, 70))]
    for window, table, top in zip(
        windows, engine.log_probs(windows, 2), engine.top_log_probs(windows, 2, 5), strict=True
    ):
        assert top.ids.shape == (len(window) - 1, 5)
        assert np.allclose(np.sort(table, axis=1)[:, :-6:-1], top.log_probs, atol=1e-3)
        assert np.allclose(table[np.arange(len(table)), window[1:]], top.actual, atol=1e-3)
