"""A real `vllm serve` on the embedded model: measured over loopback, and `vllm bench` against it imported."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from harness.demo import checkpoint_path, corpus
from harness.engines.protocol import open_engine
from harness.measure import decode, perplexity, vllm_bench
from tests.vllm.ties import parted

SERVE = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")
# What the program `vllm bench NAME` runs. The program itself fails in vLLM's CPU build, whose package has another name
# than the one that it asks for its version.
BENCH = """
import sys
from importlib import import_module
from vllm.utils.argparse_utils import FlexibleArgumentParser

benchmark = import_module(f"vllm.benchmarks.{sys.argv.pop(1)}")
parser = FlexibleArgumentParser()
benchmark.add_cli_args(parser)
benchmark.main(parser.parse_args())
"""
START_SECONDS = 240


def run_bench(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BENCH, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server on a free port, ended with the tests."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ("--max-model-len", "1024", "--max-num-seqs", "8", "--kv-cache-memory-bytes", "500000000")
    command = [*SERVE, "--model", str(checkpoint_path("dense")), "--served-model-name", "demo", "--port", str(port)]
    process = subprocess.Popen(
        [*command, *options, "--enforce-eager", "--dtype", "bfloat16", "--language-model-only"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + START_SECONDS
        while True:
            assert process.poll() is None, "the server ended by itself"
            assert time.monotonic() < deadline, "the server does not start"
            try:
                if httpx2.get(f"{address}/health").status_code == 200:
                    break
            except httpx2.HTTPError:
                time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=60)


def heldout() -> list[int]:
    return perplexity.tokenize(checkpoint_path("dense"), corpus.heldout_text())


def test_a_server_writes_and_judges_as_the_torch_engine_does(url: str) -> None:
    served = open_engine("server", Path(), options={"url": url})
    torch = open_engine("torch", checkpoint_path("dense"), dtype="bfloat16", device="cpu")
    assert served.info.version == "vllm 0.32.0" and served.info.can_score
    prompts = decode.prompts(heldout(), 3, 64)
    ours, theirs = (engine.decode(prompts, 17) for engine in (served, torch))
    assert parted(checkpoint_path("dense"), prompts, ours.token_ids, theirs.token_ids) == []
    assert any(one == other for one, other in zip(ours.token_ids, theirs.token_ids, strict=True))
    assert decode.coherence(served, heldout(), 1024)["coherent"]
    window = heldout()[:256]
    (ours_scores,), (theirs_scores,) = (list(engine.score([window], 1)) for engine in (served, torch))
    assert abs(ours_scores.mean() - theirs_scores.mean()) < 0.01
    served.close()
    torch.close()


def test_what_vllm_bench_serve_writes_is_imported(url: str, tmp_path: Path) -> None:
    run_bench(
        *("serve", "--base-url", url, "--model", "demo", "--tokenizer", str(checkpoint_path("dense"))),
        *("--dataset-name", "random", "--random-input-len", "64", "--random-output-len", "9", "--ignore-eos"),
        *("--num-prompts", "4", "--max-concurrency", "1", "--save-result", "--save-detailed"),
        *("--result-dir", str(tmp_path), "--result-filename", "serve.json"),
    )
    found = vllm_bench.read_vllm_bench(tmp_path / "serve.json")
    assert (found.benchmark, found.settings["max_concurrency"]) == ("serve", 1)
    assert [one["kind"] for one in found.samples] == ["request"] * 4
    assert {one["new_tokens"] for one in found.samples} == {9}
    assert all(one["first_token_seconds"] > 0 and one["decode_seconds"] > 0 for one in found.samples)


def test_what_vllm_bench_throughput_writes_is_imported(tmp_path: Path) -> None:
    """Its latency benchmark sends token ids up to 10,000, which the embedded model does not have."""
    run_bench(
        *("throughput", "--model", str(checkpoint_path("dense")), "--enforce-eager", "--dataset-name", "random"),
        *("--random-input-len", "32", "--random-output-len", "5", "--num-prompts", "3", "--max-model-len", "512"),
        *("--kv-cache-memory-bytes", "250000000", "--output-json", str(tmp_path / "throughput.json")),
    )
    (sample,) = vllm_bench.read_vllm_bench(tmp_path / "throughput.json").samples
    assert (sample["num_requests"], sample["num_tokens"]) == (3, 3 * (32 + 5))
    assert sample["seconds"] > 0
