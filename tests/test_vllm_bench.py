"""Files of `vllm bench`, in the shape that release 0.32 writes (vllm/benchmarks/{serve,latency,throughput}.py)."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import demo
from harness.cli import main
from harness.errors import UserError
from harness.measure.vllm_bench import BatchShape, read_vllm_bench
from harness.record import store

SERVE: dict[str, Any] = {
    "date": "20260301-120000",
    "backend": "openai",
    "model_id": "my/model",
    "num_prompts": 3,
    "request_rate": "inf",
    "max_concurrency": 1,
    "duration": 3.0,
    "completed": 2,
    "total_input_tokens": 200,
    "total_output_tokens": 12,
    "input_lens": [100, 100, 100],
    "output_lens": [6, 6, 0],
    "ttfts": [0.5, 0.7, 0.0],
    "itls": [[0.1, 0.1, 0.3], [0.2, 0.2, 0.1], []],
    "errors": ["", "", "connection reset"],
}
LATENCY = {"model_id": "my/model", "avg_latency": 2.0, "latencies": [1.9, 2.1], "percentiles": {"50": 2.0}}
THROUGHPUT = {"elapsed_time": 4.0, "num_requests": 8, "total_num_tokens": 2000, "tokens_per_second": 500.0}


def written(folder: Path, document: Any) -> Path:
    path = folder / "result.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def test_a_request_keeps_its_own_times_and_tokens(tmp_path: Path) -> None:
    found = read_vllm_bench(written(tmp_path, SERVE))
    assert (found.benchmark, found.model, found.settings["max_concurrency"]) == ("serve", "my/model", 1)
    assert found.samples == (
        {"kind": "request", "prompt_tokens": 100, "new_tokens": 6, "first_token_seconds": 0.5, "decode_seconds": 0.5},
        {"kind": "request", "prompt_tokens": 100, "new_tokens": 6, "first_token_seconds": 0.7, "decode_seconds": 0.5},
        {"kind": "failed_request", "reason": "connection reset"},
    )


def test_latency_and_throughput(tmp_path: Path) -> None:
    found = read_vllm_bench(written(tmp_path, LATENCY), BatchShape(4, 32, 129))
    assert [one["seconds"] for one in found.samples] == [1.9, 2.1]
    assert found.samples[0] | {"seconds": 0} == {
        "kind": "generation",
        "batch": 4,
        "prompt_tokens": 32,
        "new_tokens": 129,
        "seconds": 0,
    }
    (sample,) = read_vllm_bench(written(tmp_path, THROUGHPUT)).samples
    assert sample == {"kind": "throughput", "num_requests": 8, "num_tokens": 2000, "seconds": 4.0}


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ("{", "is not JSON"),
        ([1], "no result of `vllm bench`"),
        ({"model_id": "x"}, "no result of `vllm bench`"),
        (LATENCY, "does not write down its batch"),
        ({key: value for key, value in SERVE.items() if key not in ("ttfts", "itls")}, "only the summary.*ttfts, itls"),
        ({**SERVE, "ttfts": [0.5]}, "differ in length"),
        ({**SERVE, "ttfts": [-1, 0.7, 0.0]}, "run 0 has the time -1"),
        ({**THROUGHPUT, "elapsed_time": None}, "run 0 has the time None"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(tmp_path: Path, document: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        read_vllm_bench(written(tmp_path, document))


@settings(max_examples=150)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from([*SERVE, *LATENCY, *THROUGHPUT]), inner, max_size=8)
        ),
        max_leaves=12,
    )
)
def test_any_json_is_either_read_or_refused_in_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, document: Any
) -> None:
    path = written(tmp_path_factory.mktemp("import"), document)
    try:
        read_vllm_bench(path, BatchShape(1, 1, 2))
    except UserError as error:
        assert str(path) in error.problem


def test_the_command_keeps_the_samples_and_the_other_machines_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    suite = ["--suite", str(demo.SUITE)]
    asked = ["import", str(written(tmp_path, SERVE)), *suite, "--variant", "nvfp4a16", "--machine", "dgx-spark"]
    assert main([*asked, "--vllm-version", "0.32.0"]) == 0
    shown = capsys.readouterr().out
    assert "first token" in shown and "0.600" in shown, "the median of 0.5 and 0.7"
    (record,) = [store.read(path) for path in (tmp_path / "results/dgx-spark").glob("*.jsonl")]
    assert len(record.kind("request")) == 2
    assert record.run.engine is not None and record.run.engine["version"] == "0.32.0"
    assert main(["import", str(tmp_path / "none"), *suite, "--variant", "nvfp4a16", "--machine", "x"]) == 2
    assert main([*asked[:-1], "My Machine"]) == 2
