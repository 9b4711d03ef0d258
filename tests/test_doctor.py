"""What is found out about a machine before anything is downloaded or built, and how it is told."""

import json
import os
import re
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.task import ConfigurableTask
from lm_eval.config.task import TaskConfig
from lm_eval.tasks import TaskManager

from harness import demo
from harness.cli import main
from harness.doctor.box import Box, Gpu, this_box
from harness.doctor.checks import Diagnosis, checks, does_not_fit, multiply_rate, require
from harness.doctor.kernels import kernel_for
from harness.errors import UserError
from harness.formats.fp8 import FP8_DYNAMIC
from harness.formats.nvfp4 import NVFP4, NVFP4A16
from harness.measure.tasks import datasets_of
from harness.model.checkpoint import free_disk
from harness.resolve import plan_source
from harness.suite.load import load
from harness.suite.schema import EngineOptions, Suite, Task, VllmOptions

RTX_5090 = Gpu("NVIDIA GeForce RTX 5090", "580.95.05", 32_607 * 2**20, 32_000 * 2**20, (12, 0))
SPARK = Gpu("NVIDIA GB10", "580.95.05", None, None, (12, 1))
H200 = Gpu("NVIDIA H200", "580.95.05", 143_771 * 2**20, 143_000 * 2**20, (9, 0))
BOX = Box((RTX_5090,), False, 64 * 10**9, 60 * 10**9, "2.13.0", "13.0", "0.32.0", False)
CPU = Box((), False, 64 * 10**9, 60 * 10**9, "2.13.0+cpu", None, None, False)


def suite_of(**engine: Any) -> Suite:
    """The demo's suite on another engine."""
    return replace(load(demo.SUITE), engine=EngineOptions(**engine))


def found(suite: Suite, box: Box, tmp_path: Path, state: str) -> list[Diagnosis]:
    """The checks that came to `state`, but for the one that says where a variant is calibrated."""
    told = [check for check in checks(suite, box, tmp_path) if check.state == state]
    return [check for check in told if check.state == "problem" or check.subject != "calibration"]


def nvidia_smi(folder: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts a program of that name, which does what the shell lines `body` say, first on the path."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_the_demo_runs_on_a_cpu(tmp_path: Path) -> None:
    assert found(suite_of(), CPU, tmp_path, "problem") == []


def test_a_box_with_all_that_a_suite_of_vllm_needs_has_no_problem(tmp_path: Path) -> None:
    assert found(suite_of(name="vllm"), BOX, tmp_path, "problem") == []


@pytest.mark.parametrize(
    ("engine", "box", "problem", "remedy"),
    [
        ({"name": "vllm"}, replace(BOX, vllm=None), "vLLM, which is not installed", "nox -s ppl bench"),
        ({"name": "vllm"}, replace(BOX, vllm="0.18.1"), "vLLM 0.18.1 is not known", "constraints-vllm"),
        ({"name": "vllm"}, replace(BOX, gpus=()), "built for CUDA, and no GPU answers", "nvidia-smi"),
        (
            {"name": "vllm"},
            replace(BOX, gpus=(replace(RTX_5090, driver="535.104.05"),)),
            "driver 535.104.05 is too old for torch 2.13.0, which is built for CUDA 13.0",
            "driver 580 or newer",
        ),
        (
            {"name": "vllm", "vllm": VllmOptions(tensor_parallel=2)},
            BOX,
            "over 2 GPUs, and this machine has 1",
            "tensor_parallel",
        ),
        (
            {"name": "vllm", "dtype": "float32"},
            replace(CPU, vllm="0.32.0", vllm_on_cpu=True),
            "bfloat16 only",
            "--dtype bfloat16",
        ),
        (
            {"name": "vllm"},
            replace(BOX, gpus=(replace(RTX_5090, capability=(7, 0)),)),
            "No kernel of vLLM serves",
            "7.5 or newer",
        ),
        ({"device": "cuda"}, replace(BOX, torch_cuda=None), "is a CPU build", "pip install"),
        ({"device": "cuda"}, replace(CPU, torch_cuda="13.0"), "no GPU answers", "device to auto"),
    ],
)
def test_what_keeps_a_suite_from_running_is_told_with_its_remedy(
    tmp_path: Path, engine: dict[str, Any], box: Box, problem: str, remedy: str
) -> None:
    told = found(suite_of(**engine), box, tmp_path, "problem")
    assert any(problem in check.text and remedy in check.remedy for check in told), told


def test_a_gpu_that_torch_will_not_use_is_noted(tmp_path: Path) -> None:
    (note,) = found(suite_of(), replace(BOX, torch="2.13.0+cpu", torch_cuda=None), tmp_path, "note")
    assert "CPU build" in note.text and "will not be used" in note.text


def test_a_model_that_does_not_fit_is_a_problem_and_its_source_only_a_note(tmp_path: Path) -> None:
    small = replace(BOX, gpus=(replace(RTX_5090, total_bytes=10**9),))
    told = list(checks(suite_of(name="vllm"), small, tmp_path))
    assert {check.state for check in told if "'w4a4' does not fit" in check.text} == {"problem"}
    (source,) = (check for check in told if "The source does not fit" in check.text)
    assert source.state == "note" and "tables of tasks and bench will lack it" in source.remedy


def test_shared_memory_is_measured_by_the_machine_s() -> None:
    plan = plan_source("demo:dense", None)[1]
    spark = replace(BOX, gpus=(SPARK,))
    assert does_not_fit(suite_of(name="vllm"), spark, plan) is None
    needed = plan.output_bytes + 1_200_000_000
    assert does_not_fit(suite_of(name="vllm"), replace(spark, total_memory=round(needed / 0.85) - 10**7), plan)
    assert does_not_fit(suite_of(name="vllm"), replace(spark, total_memory=round(needed / 0.85) + 10**7), plan) is None


def test_calibration_that_takes_more_than_the_gpu_has_free_is_a_problem(tmp_path: Path) -> None:
    busy = replace(BOX, gpus=(replace(RTX_5090, free_bytes=10**8),))
    (problem,) = found(suite_of(), busy, tmp_path, "problem")
    assert "GB of the GPU" in problem.text and "0.1 GB are free" in problem.text
    assert "--device cpu" in problem.remedy
    assert [check for check in checks(suite_of(), busy, tmp_path, device="cpu") if check.state == "problem"] == []


def test_where_a_variant_is_calibrated_is_told_with_what_it_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And how long it takes, where the device can be asked."""
    monkeypatch.setattr("harness.doctor.checks.multiply_rate", {"cuda": None, "cpu": 1e11}.__getitem__)
    for box, device, told in (
        (BOX, "auto", r"'w4a4' is calibrated on NVIDIA GeForce RTX 5090, with \d\.\d GB of memory\."),
        (BOX, "cpu", r"'w4a4' is calibrated on the CPU, with \d\.\d GB of memory, in about \d+ (s|min)\."),
        (replace(BOX, torch_cuda=None), "auto", r"'w4a4' is calibrated on the CPU, .*"),
    ):
        (note,) = (
            check
            for check in checks(suite_of(), box, tmp_path, ("build",), device=device)
            if "is calibrated" in check.text
        )
        assert note.state == "note" and re.fullmatch(told, note.text)


@pytest.mark.parametrize(
    ("box", "device", "asked"),
    [(BOX, "auto", "cuda"), (BOX, "cuda:1", "cuda:1"), (BOX, "cpu", "cpu"), (CPU, "auto", "cpu")],
)
def test_a_calibration_takes_four_passes_at_two_fifths_of_its_device_s_rate(
    tmp_path: Path, box: Box, device: str, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = suite_of()
    assert suite.calibration is not None
    num_tokens = sum(source.samples * source.max_tokens for source in suite.calibration.sources)
    num_weights = plan_source("demo:dense", None)[1].source_traffic.weight_bytes / 2  # bfloat16
    operations = 4 * 2 * num_weights * num_tokens  # a product and a sum for each weight and token
    rates = {asked: operations / 0.4 / 5400}  # that it takes an hour and a half
    monkeypatch.setattr("harness.doctor.checks.multiply_rate", rates.__getitem__)
    told = [check.text for check in checks(suite, box, tmp_path, ("build",), device=device)]
    assert sum(text.endswith("in about 1 h 30 min.") for text in told) == 1, told


def test_a_device_s_rate_is_measured_where_torch_has_the_device() -> None:
    rate = multiply_rate("cpu")
    assert rate is not None and 1e8 < rate < 1e15  # of a slow core, and of no machine yet
    assert multiply_rate("cuda:99") is None


def test_memory_that_is_too_small_is_a_problem_only_for_what_is_built(tmp_path: Path) -> None:
    full = replace(CPU, free_memory=10**8)
    assert [check.subject for check in found(suite_of(), full, tmp_path, "problem")] == ["calibration"]
    (tmp_path / "demo" / "w4a4").mkdir(parents=True)
    assert found(suite_of(), full, tmp_path, "problem") == []
    assert require(suite_of(), full, tmp_path / "new", ("ppl",), ["nvfp4a16"]) == []


def test_the_datasets_of_texts_calibration_and_tasks_are_looked_for(tmp_path: Path) -> None:
    suite = load(Path("suites/qwen3.5-9b-w4a4.toml"))
    suite = replace(suite, source=replace(suite.source, location="demo:dense"), engine=EngineOptions())
    told = [check for check in checks(suite, CPU, tmp_path) if check.subject == "dataset"]
    assert {check.state for check in told} == {"problem"} and len(told) >= 5
    said = " ".join(check.text for check in told)
    assert "HuggingFaceH4/ultrachat_200k" in said and "openai/gsm8k" in said


@pytest.fixture(scope="module")
def index() -> TaskManager:
    """lm-eval's index of its tasks, which takes it seconds to read."""
    return TaskManager()


@pytest.mark.parametrize(
    ("name", "at_least"),
    [
        ("gsm8k", {"openai/gsm8k"}),
        ("mmlu", {"cais/mmlu"}),  # a group of groups of tags
        ("gpqa", {"Idavidrein/gpqa"}),  # a tag
        ("agieval", {"hails/agieval-sat-en", "hails/agieval-lsat-ar"}),
        ("mmlu_generative", {"cais/mmlu"}),  # a group that writes its groups out
    ],
)
def test_a_group_needs_the_datasets_of_all_tasks_that_lm_eval_takes_for_it(
    name: str, at_least: set[str], index: TaskManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = set()

    class Recorded(ConfigurableTask):
        def __init__(self, config: dict[str, Any]) -> None:
            self._config = TaskConfig(**{key: config[key] for key in ("task", "dataset_path")})
            loaded.add(config["dataset_path"])

    monkeypatch.setattr("lm_eval.tasks._factory.ConfigurableTask", Recorded)
    index.load([name])
    assert datasets_of(name) == loaded >= at_least


def test_a_name_that_lm_eval_does_not_have_needs_no_dataset() -> None:
    assert datasets_of("gsm9k") == set()


def test_the_dataset_of_a_group_is_told_once(tmp_path: Path) -> None:
    suite = replace(suite_of(), tasks={name: Task(task=name) for name in ("mmlu", "mmlu_stem", "gpqa")})
    told = [check for check in checks(suite, CPU, tmp_path, ("tasks",)) if check.subject == "dataset"]
    assert ["cais/mmlu" in check.text for check in told] == [False, True]
    assert "Idavidrein/gpqa" in told[0].text


def test_a_dataset_that_the_library_has_cached_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library writes the name, not the owner, in lower case with underscores."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    (tmp_path / "sahil2801___code_alpaca-20k").mkdir()
    suite = load(Path("suites/qwen3.5-9b-w4a4.toml"))
    suite = replace(suite, source=replace(suite.source, location="demo:dense"), engine=EngineOptions())
    told = {check.text: check.state for check in checks(suite, CPU, tmp_path, ("build",)) if check.subject == "dataset"}
    assert told["sahil2801/CodeAlpaca-20k is here."] == "good"


def test_a_disk_that_is_too_small_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.doctor.checks.free_disk", lambda folder: (folder, 1000))
    (problem,) = found(suite_of(), CPU, tmp_path, "problem")
    assert problem.subject == "disk" and "--artifacts" in problem.remedy


@pytest.mark.parametrize(
    ("form", "gpu", "release", "name", "weight_only"),
    [
        (NVFP4, H200, (0, 31), "Marlin", True),
        (NVFP4, H200, (0, 32), "Humming", True),
        (NVFP4, RTX_5090, (0, 32), "FlashInfer CUTLASS", False),
        (NVFP4A16, RTX_5090, (0, 32), "Marlin", True),
        (NVFP4, SPARK, (0, 33), "FlashInfer CUTLASS", False),
        (FP8_DYNAMIC, H200, (0, 32), "CUTLASS FP8", False),
    ],
)
def test_kernels_are_those_that_were_seen(form: Any, gpu: Gpu, release: Any, name: str, weight_only: bool) -> None:
    """By the tables of vLLM's releases 0.19 to 0.33 (docs/gpu.md)."""
    assert gpu.capability is not None
    kernel = kernel_for(form, gpu.capability, release)
    assert kernel is not None and (kernel.name, kernel.weight_only) == (name, weight_only)


def test_four_bits_on_hopper_are_noted_as_weight_only(tmp_path: Path) -> None:
    notes = found(suite_of(name="vllm"), replace(BOX, gpus=(H200,)), tmp_path, "note")
    assert any("NVFP4 (w4a4) is served by Humming" in note.text for note in notes)


def test_gpus_are_read_of_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "NVIDIA GB10, 580.95.05, [N/A], [N/A], 12.1"
    lines = f"NVIDIA GeForce RTX 5090, 580.95.05, 32607, 32000, 12.0\\n{line}"
    nvidia_smi(tmp_path, f"printf '{lines}\\n'", monkeypatch)
    assert this_box().gpus == (RTX_5090, SPARK)


def test_a_driver_that_does_not_answer_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(tmp_path, "echo 'NVIDIA-SMI has failed'; exit 9", monkeypatch)
    box = this_box()
    assert box.silent_gpu and box.gpus == ()
    assert any("does not answer" in note.text for note in found(suite_of(), box, tmp_path, "note"))


def test_the_disk_of_a_folder_that_is_not_there_yet_is_its_parents(tmp_path: Path) -> None:
    assert free_disk(tmp_path / "a" / "b")[0] == tmp_path


def test_the_doctor_tells_a_line_a_check_and_a_problem_is_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["doctor", "--suite", str(demo.SUITE), "--artifacts", str(tmp_path)]
    assert main(asked) == 0
    assert "Suite 'demo' can run here." in capsys.readouterr().out
    assert main([*asked, "--engine", "vllm"]) == 2
    out = capsys.readouterr().out
    assert "PROBLEM  vLLM: Suite 'demo' runs on vLLM, which is not installed here." in out
    assert "cannot run here: 1 problem" in out
    assert main([*asked, "--engine", "vllm", "--json"]) == 2
    told = json.loads(capsys.readouterr().out)
    assert [check["subject"] for check in told["checks"] if check["state"] == "problem"] == ["vLLM"]


@pytest.mark.parametrize("command", ["ppl", "fidelity", "tasks", "bench"])
def test_a_measure_without_its_engine_is_refused_before_anything_is_built(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--suite", str(demo.SUITE), "--engine", "vllm", "--artifacts", str(tmp_path / "artifacts")]
    assert main([command, *asked, "--results", str(tmp_path / "results")]) == 2
    told = capsys.readouterr().err
    assert "vLLM, which is not installed here" in told and f"--suite {demo.SUITE}`" in told
    assert list(tmp_path.iterdir()) == []


def test_the_first_problem_is_what_is_raised(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not installed"):
        require(suite_of(name="vllm"), replace(BOX, vllm=None, gpus=()), tmp_path, ("ppl",))
