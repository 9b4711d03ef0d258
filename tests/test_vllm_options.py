"""The table of vLLM's options against what is known of its releases. That 0.32 has them is tested beside vLLM."""

import dataclasses

import pytest

from harness.demo import checkpoint_path
from harness.engines.vllm_options import (
    ARGUMENTS,
    NEWEST,
    OLDEST,
    arguments,
    cache_by_need,
    is_weight_only,
    release_of,
    warnings,
)
from harness.errors import UserError
from harness.suite.schema import VllmOptions


def test_a_suite_can_ask_for_exactly_what_the_table_knows() -> None:
    assert {field.name for field in dataclasses.fields(VllmOptions)} == set(ARGUMENTS)


@pytest.mark.parametrize(("version", "release"), [("0.32.0", (0, 32)), ("0.19.1rc1", (0, 19)), ("1.2.3+cpu", (1, 2))])
def test_a_version_is_a_release(version: str, release: tuple[int, int]) -> None:
    assert release_of(version) == release


@pytest.mark.parametrize("release", [(0, minor) for minor in range(OLDEST[1], NEWEST[1] + 1)])
def test_what_every_release_has_is_handed_over_under_vllms_own_names(release: tuple[int, int]) -> None:
    asked = {
        "tensor_parallel": 4,
        "pipeline_parallel": 2,
        "data_parallel": 2,
        "executor": "ray",
        "kv_cache_gb": 1.5,
        "kv_cache_dtype": "fp8",
        "speculative_tokens": 2,
        "max_model_len": None,
    }
    assert arguments(asked, release) == {
        "tensor_parallel_size": 4,
        "pipeline_parallel_size": 2,
        "data_parallel_size": 2,
        "distributed_executor_backend": "ray",
        "kv_cache_memory_bytes": 1_500_000_000,
        "kv_cache_dtype": "fp8",
        "speculative_config": {"method": "mtp", "num_speculative_tokens": 2},
    }


def test_a_cache_on_the_cpu_holds_twice_what_was_asked_for() -> None:
    folder = checkpoint_path("dense")
    few = cache_by_need(folder, {"max_model_len": 1024, "max_num_seqs": 2})
    assert few == {"max_model_len": 1024, "max_num_seqs": 2, "kv_cache_gb": 0.25}
    many = cache_by_need(folder, {"max_model_len": 8192, "max_num_seqs": 64})
    # 2 attention layers and the MTP head: 2 heads of 64 in 16 bits, keys and values; 6 DeltaNet layers' states.
    sequence = 3 * 8192 * 2 * 2 * 64 * 2 + 6 * (4 * 64 * 64 * 4 + (2 * 128 + 256) * 3 * 2)
    assert many["kv_cache_gb"] == pytest.approx(2 * 64 * sequence / 1e9, abs=0.01)


@pytest.mark.parametrize("options", [{"kv_cache_gb": 1.0, "max_model_len": 9, "max_num_seqs": 9}, {"max_num_seqs": 9}])
def test_a_cache_that_was_set_or_cannot_be_known_is_left_alone(options: dict[str, object]) -> None:
    assert cache_by_need(checkpoint_path("dense"), options) == options


def test_emulation_is_a_backend_of_linear_layers_and_of_experts_and_older_releases_cannot_be_asked() -> None:
    assert arguments({"emulate": True}, (0, 22)) == {"linear_backend": "emulation", "moe_backend": "emulation"}
    assert arguments({"emulate": False}, (0, 19)) == {}
    with pytest.raises(
        UserError, match=r"vLLM 0.21 has no linear_backend, which option 'emulate' needs.*0.22 or newer"
    ):
        arguments({"emulate": True}, (0, 21))


def test_settings_that_cost_something_are_told() -> None:
    assert warnings({}, (0, 32), {}) == []
    (eager,) = warnings({"enforce_eager": True}, (0, 32), {})
    assert "four times" in eager
    (both,) = warnings({"prefix_caching": True, "speculative_tokens": 1}, (0, 32), {})
    assert "53912" in both
    (cached,) = warnings({"prefix_caching": True}, (0, 32), {})
    assert "prefill is not measured" in cached


def test_a_variable_that_a_release_ignores_is_told_and_one_that_it_heeds_is_not() -> None:
    environment = {"VLLM_USE_NVFP4_CT_EMULATIONS": "1"}
    assert warnings({}, (0, 23), environment) == []
    (stale,) = warnings({}, (0, 24), environment)
    assert stale.startswith("VLLM_USE_NVFP4_CT_EMULATIONS is set and vLLM 0.24 ignores it since 0.24")


@pytest.mark.parametrize(
    ("kernel", "weight_only"),
    [
        ("CompressedTensorsW4A4Fp4 → MarlinNvFp4LinearKernel", True),
        ("CompressedTensorsW4A4Fp4 → HummingNvFp4LinearKernel", True),
        ("CompressedTensorsW4A4Fp4 → FlashInferCuteDslNvFp4W4A16LinearKernel", True),
        ("CompressedTensorsW4A4Fp4 → FlashInferCutlassNvFp4LinearKernel", False),
        ("CompressedTensorsW4A4Fp4 → EmulationNvFp4LinearKernel", False),
        ("CpuNvFp4Scheme → CpuNvFp4LinearKernel", False),
    ],
)
def test_kernels_that_leave_activations_alone_are_known_by_name(kernel: str, weight_only: bool) -> None:
    assert is_weight_only(kernel) is weight_only
