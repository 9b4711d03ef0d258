"""The command line: bad input is one sentence and a remedy, good input is a table or one JSON document."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.cli import main
from harness.model.checkpoint import INDEX
from tests.conftest import DATA, hear_interruptions

Situation = Callable[[Path], list[str]]
"""Prepares a folder that holds a copy of a tiny checkpoint as `source`, and says what to run in it."""

SUITE = """
name = "tiny"
title = "A suite"
[source]
location = "./source"
[variants.a16]
recipe = "rtn-a16"
"""
BUILD = ["build", "source", "--recipe", "rtn-a16", "--out", "out"]


@pytest.fixture
def place(tmp_path: Path, dense_source: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An own folder with a tiny checkpoint in it, as the working directory."""
    shutil.copytree(dense_source, tmp_path / "source")
    monkeypatch.chdir(tmp_path)
    yield tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def edit_weight(folder: Path, name: str, edit: Callable[[torch.Tensor], torch.Tensor]) -> None:
    shard = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    tensors = load_file(shard)
    tensors[name] = edit(tensors[name])
    save_file(tensors, shard, metadata={"format": "pt"})


def suite_with_a_misspelt_key(place: Path) -> list[str]:
    (place / "suite.toml").write_text(SUITE.replace("recipe =", "recepi ="))
    return ["build", "--suite", "suite.toml"]


def suite_with_an_unknown_recipe(place: Path) -> list[str]:
    (place / "suite.toml").write_text(SUITE.replace("rtn-a16", "rtn-a61"))
    return ["build", "--suite", "suite.toml"]


def unknown_variant(place: Path) -> list[str]:
    (place / "suite.toml").write_text(SUITE)
    return ["build", "--suite", "suite.toml", "--variant", "a61"]


def suite_without_the_table(place: Path) -> list[str]:
    (place / "suite.toml").write_text(SUITE)
    return ["ppl", "--suite", "suite.toml", "--variant", "source"]


def no_suite_file(place: Path) -> list[str]:
    return ["build", "--suite", "nowhere.toml"]


def unknown_recipe(place: Path) -> list[str]:
    return [*BUILD[:3], "rtn-a61", "--out", "out"]


def calibrated_recipe(place: Path) -> list[str]:
    return [*BUILD[:3], "w4a4", "--out", "out"]


def missing_shard(place: Path) -> list[str]:
    (place / "source/model-2.safetensors").unlink()
    return BUILD


def truncated_shard(place: Path) -> list[str]:
    shard = place / "source/model-2.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    return BUILD


def index_that_leaves_its_folder(place: Path) -> list[str]:
    edit_json(place / "source" / INDEX, lambda index: index["weight_map"].update(x="../../etc/passwd"))
    return BUILD


def not_a_number(place: Path) -> list[str]:
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    edit_weight(
        place / "source",
        name,
        lambda w: w.index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(torch.nan).bfloat16()),
    )
    return BUILD


def infinite(place: Path) -> list[str]:
    name = "model.language_model.layers.3.self_attn.k_proj.weight"
    edit_weight(
        place / "source",
        name,
        lambda w: w.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(torch.inf).bfloat16()),
    )
    return BUILD


def width_of_no_whole_blocks(place: Path) -> list[str]:
    name = "model.language_model.layers.1.mlp.down_proj.weight"
    edit_weight(place / "source", name, lambda w: w[:, :-8].contiguous())
    return BUILD


def folder_that_is_no_checkpoint(place: Path) -> list[str]:
    (place / "empty").mkdir()
    return ["build", "empty", "--recipe", "rtn-a16", "--out", "out"]


def source_that_is_nowhere(place: Path) -> list[str]:
    return ["build", "no/such/folder", "--recipe", "rtn-a16", "--out", "out"]


def unknown_architecture(place: Path) -> list[str]:
    edit_json(place / "source/config.json", lambda config: config.update(architectures=["LlamaForCausalLM"]))
    return BUILD


def pickled_weights(place: Path) -> list[str]:
    for path in [*(place / "source").glob("*.safetensors"), place / "source" / INDEX]:
        path.unlink()
    (place / "source/pytorch_model.bin").write_bytes(b"\x80\x04")
    return BUILD


def foreign_output_folder(place: Path) -> list[str]:
    (place / "out").mkdir()
    (place / "out/thesis.txt").write_text("three years")
    return BUILD


def source_without_recipe(place: Path) -> list[str]:
    return ["build", "source"]


def verify_of_a_source(place: Path) -> list[str]:
    return ["verify", "source"]


def page_that_is_nowhere(place: Path) -> list[str]:
    return ["report", "nowhere.md"]


def unknown_engine(place: Path) -> list[str]:
    return ["ppl", "--engine", "torhc", "--variant", "source"]


def unknown_scales(place: Path) -> list[str]:
    return [*BUILD, "--scales", "serch"]


def unknown_codes(place: Path) -> list[str]:
    return [*BUILD, "--codes", "gtpq"]


def method_without_a_source(place: Path) -> list[str]:
    return ["build", "--codes", "rtn"]


def method_without_a_recipe(place: Path) -> list[str]:
    return ["plan", "source", "--codes", "rtn"]


def calibration_that_is_nowhere(place: Path) -> list[str]:
    return ["build", "source", "--recipe", "w4a4", "--out", "out", "--calibration", "nowhere.toml"]


def calibration_with_a_misspelt_key(place: Path) -> list[str]:
    (place / "set.toml").write_text('batch_tokns = 1\n[[sources]]\ndemo = "train"\nsamples = 1\nmax_tokens = 9\n')
    return ["build", "source", "--recipe", "w4a4", "--out", "out", "--calibration", "set.toml"]


def plan_of_too_little_memory(place: Path) -> list[str]:
    return ["plan", "source", "--recipe", "w4a4", "--memory-gb", "0.1"]


@pytest.mark.parametrize(
    ("situation", "sentence"),
    [
        (unknown_scales, "Did you mean 'search'?"),
        (unknown_codes, "Did you mean 'gptq'?"),
        (method_without_a_source, "go with a SOURCE"),
        (method_without_a_recipe, "go with a --recipe"),
        (calibration_that_is_nowhere, "nowhere.toml"),
        (calibration_with_a_misspelt_key, "Did you mean 'batch_tokens'?"),
        (plan_of_too_little_memory, "and 0.1 GB are free"),
        (suite_with_a_misspelt_key, "Did you mean 'recipe'?"),
        (suite_with_an_unknown_recipe, "Did you mean 'rtn-a16'?"),
        (unknown_variant, "Did you mean 'a16'?"),
        (suite_without_the_table, "has no [ppl] table"),
        (no_suite_file, "nowhere.toml"),
        (unknown_recipe, "Did you mean 'rtn-a16'?"),
        (calibrated_recipe, "no calibration"),
        (missing_shard, "model-2.safetensors is missing"),
        (truncated_shard, "model-2.safetensors is"),
        (index_that_leaves_its_folder, "outside its folder: '../../etc/passwd'"),
        (not_a_number, "layers.1.mlp.up_proj.weight in model-"),
        (infinite, "layers.3.self_attn.k_proj.weight in model-"),
        (width_of_no_whole_blocks, "layers.1.mlp.down_proj.weight in shape [64, 88]"),
        (folder_that_is_no_checkpoint, "config.json does not exist"),
        (source_that_is_nowhere, "neither a folder nor a model id"),
        (unknown_architecture, "LlamaForCausalLM"),
        (pickled_weights, "pickled weights (pytorch_model.bin)"),
        (foreign_output_folder, "out exists and was not made by this harness"),
        (source_without_recipe, "--recipe and --out"),
        (verify_of_a_source, "no compressed-tensors quantization_config"),
        (page_that_is_nowhere, "nowhere.md cannot be read"),
        (unknown_engine, "Did you mean 'torch'?"),
    ],
)
def test_bad_input_is_one_sentence_a_remedy_exit_2_and_nothing_written(
    situation: Situation, sentence: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = situation(place)
    before = contents(place)
    assert main(arguments) == 2
    printed = capsys.readouterr()
    problem, remedy = printed.err.rstrip("\n").split("\n")
    assert sentence in printed.err
    assert problem.startswith("harness: ")
    assert problem.endswith(".")
    assert remedy.strip()
    assert contents(place) == before


def test_a_full_disk_is_found_before_anything_is_written(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))
    assert main(BUILD) == 2
    assert "free" in capsys.readouterr().err
    assert not list(place.glob("out*"))


def test_build_says_whether_it_built_or_reused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(BUILD) == 0
    assert "built in" in capsys.readouterr().out
    assert main(BUILD) == 0
    assert "reused" in capsys.readouterr().out


def test_verify_exits_1_on_findings_and_names_tensor_problem_and_consequence(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(BUILD) == 0
    assert main(["verify", "out", "--source", "source"]) == 0
    (place / "out/tokenizer.json").write_text("{}")
    capsys.readouterr()
    assert main(["verify", "out", "--source", "source"]) == 1
    printed = capsys.readouterr().out
    assert "tokenizer.json is not identical" in printed
    assert "In vLLM:" in printed
    assert "FAILED" in printed


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "source", "--recipe", "rtn-a16", "--bandwidth-gbs", "100", "--json"],
        ["plan", str(DATA / "qwen3.6-35b-a3b.json"), "--json"],
        [*BUILD, "--json"],
        ["report", "--json"],
    ],
)
def test_json_is_one_document_and_nothing_else(
    place: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 0
    printed = capsys.readouterr()
    json.loads(printed.out)
    assert printed.err == ""


def test_plan_counts_the_mtp_head_only_where_the_checkpoint_has_one(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def roles(source: str) -> set[str]:
        assert main(["plan", source, "--json"]) == 0
        return {row["role"] for row in json.loads(capsys.readouterr().out)["roles"]}

    assert "mtp" in roles("source")
    assert "mtp" not in roles("source/config.json")
    for shard in (place / "source").glob("*.safetensors"):
        shard.unlink()
    assert "mtp" in roles("source"), "the index still names it"


def test_ceilings_are_bandwidth_over_the_bytes_of_a_step(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "source", "--bandwidth-gbs", "100", "--json"]) == 0
    traffic = json.loads(capsys.readouterr().out)["traffic"]["source"]
    step = traffic["weight_bytes"] + 2 * traffic["state_bytes"]
    assert traffic["ceiling_tokens_per_second"] == pytest.approx(100e9 / step)


def test_a_results_file_without_its_end_is_skipped_and_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut = place / "results/some-machine/cut.jsonl"
    cut.parent.mkdir(parents=True)
    cut.write_text('{"type": "run"}\n')
    assert main(["report"]) == 0
    assert "cut.jsonl is not used" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (
            ["build", "demo:dense", "--recipe", "rtn-a16", "--calibration", "set.toml", "--out", "out"],
            "looks at no data",
        ),
        (["plan", "demo:dense", "--recipe", "rtn-a16", "--memory-gb", "8"], "nothing is calibrated"),
    ],
)
def test_options_of_calibration_are_refused_where_nothing_is_calibrated(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], problem: str
) -> None:
    assert main(arguments) == 2
    assert problem in capsys.readouterr().err
    assert not (place / "out").exists()


def test_an_interrupted_command_exits_130_without_a_traceback(place: Path) -> None:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "harness", "ppl", "--variant", "source"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=hear_interruptions,
    )
    stored = place / "artifacts/demo/.log-probs"
    for _ in range(1800):
        if any(path.stat().st_size > 10_000 for path in stored.glob("*")):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=180)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "interrupted" in err


def test_progress_is_silent_where_stderr_is_no_terminal(place: Path) -> None:
    command = [sys.executable, "-m", "harness", *BUILD]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stderr == ""


SAMPLES = """
batch_tokens = 128
hidden_memory_gb = 0.01
[[sources]]
demo = "train"
samples = 2
max_tokens = 64
seed = 0
"""


def test_a_calibrated_build_from_the_command_line_says_what_went_through_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set.toml").write_text(SAMPLES)
    command = ["build", "demo:dense", "--recipe", "w4a4", "--scales", "search", "--codes", "rtn"]
    command += ["--calibration", "set.toml"]
    assert main([*command, "--out", "one"]) == 0
    assert "128 calibration tokens through 8 layers" in capsys.readouterr().out
    assert main([*command, "--out", "two", "--json"]) == 0
    (built,) = json.loads(capsys.readouterr().out)
    assert built["num_calibration_tokens"] == 128
    assert [layer["index"] for layer in built["layers"]] == list(range(8))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    identity = json.loads((tmp_path / "one/harness-build.json").read_text())["identity"]
    assert (identity["method"]["scales"], identity["method"]["codes"]) == ("search", "rtn")


def test_plan_says_what_a_calibration_will_hold(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def memory(*options: str) -> dict[str, int] | None:
        assert main(["plan", "source", *options, "--json"]) == 0
        found: dict[str, int] | None = json.loads(capsys.readouterr().out)["calibration_memory"]
        return found

    assert memory("--recipe", "rtn-a16") is None
    plain = memory("--recipe", "w4a4", "--scales", "absmax", "--codes", "rtn")
    both = memory("--recipe", "w4a4", "--codes", "gptq", "--hidden-gb", "2")
    assert plain is not None
    assert both is not None
    assert both["layer"] == 2 * plain["layer"]
    assert both["hidden"] == 2 * 10**9
    assert both["total"] == sum(size for name, size in both.items() if name != "total")
    assert main(["plan", "source", "--recipe", "w4a4"]) == 0
    assert "one layer at a time" in capsys.readouterr().out
