"""What a user sees when vLLM does not start, dies, or is asked for what it does not have."""

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import psutil
import pytest
from vllm.engine.arg_utils import AsyncEngineArgs

from harness.cli import main
from harness.demo import checkpoint_path
from harness.engines.protocol import EngineDied, open_engine
from harness.engines.vllm_options import ARGUMENTS
from harness.errors import UserError
from harness.record import store
from tests.vllm.conftest import Engines

OPTIONS = {"max_model_len": 256, "max_num_seqs": 4, "kv_cache_gb": 0.25, "enforce_eager": True, "text_only": True}
SUITE = """
name = "small"
title = "Two variants"
[source]
location = "{source}"
[variants.nvfp4a16]
recipe = "rtn-a16"
[engine]
name = "vllm"
dtype = "bfloat16"
[engine.vllm]
max_model_len = {max_model_len}
max_num_seqs = 4
kv_cache_gb = 0.25
enforce_eager = true
text_only = true
[setups.tiny]
max_model_len = 128
[ppl]
text = {{ demo = "heldout" }}
protocols = ["wikitext2-512"]
setups = ["tiny"]
"""


def test_this_release_has_every_argument_of_the_table() -> None:
    fields = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    assert {argument for arguments in ARGUMENTS.values() for argument in arguments} <= fields


@pytest.mark.usefixtures("alone")
def test_a_checkpoint_that_vllm_refuses_is_one_sentence_with_its_own_words(tmp_path: Path) -> None:
    shutil.copytree(checkpoint_path("dense"), tmp_path / "model")
    config = tmp_path / "model/config.json"
    raw = json.loads(config.read_text())
    raw["text_config"]["hidden_size"] = 320
    config.write_text(json.dumps(raw))
    with pytest.raises(EngineDied, match=f"vLLM does not start on {tmp_path}/model: .*Error: .*") as caught:
        open_engine("vllm", tmp_path / "model", options=OPTIONS)
    assert "\n" not in caught.value.problem
    assert "root cause" not in caught.value.problem
    assert any("Error" in line for line in caught.value.log)


@pytest.mark.usefixtures("alone")
def test_a_dtype_that_vllms_cpu_kernels_refuse_is_told_at_the_start() -> None:
    with pytest.raises(UserError, match="in bfloat16 only, not in float32"):
        open_engine("vllm", checkpoint_path("dense"), dtype="float32", options=OPTIONS)


@pytest.mark.parametrize("source", [pytest.param("dense", id="demo-source")])
def test_a_prompt_longer_than_the_model_takes_is_the_users_error(source: str, engines: Engines) -> None:
    engine = engines.shared(checkpoint_path(source), text_only=True)
    with pytest.raises(UserError, match="refuses a prompt of 1,100 tokens"):
        engine.decode([[5] * 1100], 2)
    assert len(engine.decode([[5] * 30], 2).token_ids[0]) == 2, "it goes on"


@pytest.mark.usefixtures("alone")
def test_an_engine_that_is_killed_says_so_and_leaves_no_process() -> None:
    variables = dict(os.environ)
    before = set(psutil.Process().children(recursive=True))  # what is left of engines that other tests killed
    engine = open_engine("vllm", checkpoint_path("dense"), options=OPTIONS)
    children = [child for child in psutil.Process().children(recursive=True) if child not in before]
    (core,) = [child for child in children if "EngineCore" in child.name() or "EngineCore" in " ".join(child.cmdline())]
    os.kill(core.pid, signal.SIGKILL)
    with pytest.raises(EngineDied, match="engine died"):
        engine.decode([[5] * 30], 64)
    engine.close()
    left = {name for name in os.environ if name.startswith("VLLM_LOGGING") and name not in variables}
    assert not left, "other programs that start vLLM would look for a log that is gone"
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not [child for child in alive if "resource_tracker" not in " ".join(child.cmdline())]


@pytest.mark.usefixtures("in_one_process")
def test_a_setup_that_fails_leaves_the_others_their_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    suite = tmp_path / "small.toml"
    text = SUITE.format(source="demo:dense", max_model_len=600)
    suite.write_text(text.replace("max_model_len = 128", "kv_cache_gb = 0.000001"))
    assert main(["ppl", "--suite", str(suite), "--variant", "source", "--limit", "2"]) == 1
    shown = capsys.readouterr()
    assert "source+tiny failed: vLLM does not start on" in shown.err
    assert "wikitext2-512" in shown.out
    records = [store.read(path) for path in (tmp_path / "results").rglob("*.jsonl")]
    status = {record.run.variant["name"]: record.end.status for record in records}
    assert status == {"source": "complete", "source+tiny": "failed"}
    (failure,) = [one for record in records for one in record.kind("failure")]
    assert failure["log"]


def test_a_model_length_that_is_too_short_is_told_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    suite = tmp_path / "small.toml"
    suite.write_text(SUITE.format(source="demo:dense", max_model_len=600))
    assert main(["ppl", "--suite", str(suite)]) == 2
    assert "max_model_len = 128 in [setups.tiny], and ppl needs 513." in capsys.readouterr().err
    assert not (tmp_path / "artifacts").exists()
