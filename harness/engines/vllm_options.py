"""What a suite may ask of vLLM, and which argument says it in which release (0.19 to 0.33).

One table. An option that a release has no argument for is refused by name: dropping it would measure something else.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.engines.protocol import Start
from harness.errors import UserError
from harness.model.checkpoint import read_index, read_json
from harness.model.families import family_of

Release = tuple[int, int]
OLDEST: Release = (0, 19)
NEWEST: Release = (0, 33)

ARGUMENTS: dict[str, tuple[str, ...]] = {
    "tensor_parallel": ("tensor_parallel_size",),
    "pipeline_parallel": ("pipeline_parallel_size",),
    "data_parallel": ("data_parallel_size",),
    "executor": ("distributed_executor_backend",),
    "max_model_len": ("max_model_len",),
    "max_num_seqs": ("max_num_seqs",),
    "max_num_batched_tokens": ("max_num_batched_tokens",),
    "gpu_memory_utilization": ("gpu_memory_utilization",),
    "kv_cache_gb": ("kv_cache_memory_bytes",),
    "kv_cache_dtype": ("kv_cache_dtype",),
    "enforce_eager": ("enforce_eager",),
    "prefix_caching": ("enable_prefix_caching",),
    "text_only": ("language_model_only",),
    "speculative_tokens": ("speculative_config",),
    "emulate": ("linear_backend", "moe_backend"),
}
"""Option of a suite's [engine.vllm] -> the fields of vLLM's `EngineArgs` that it becomes, all of them."""

_SINCE: dict[str, Release] = {"linear_backend": (0, 22), "moe_backend": (0, 22)}
"""The first release that has an argument; the others are as old as `OLDEST`."""

WORKER = "harness.engines.vllm_worker.HarnessWorker"
"""The class that vLLM mixes into its workers."""

_SCORED_TOKENS = 2048
"""Tokens in one forward pass while scoring: vLLM keeps the logits of all of them."""

HEAD_DTYPE_SINCE: Release = (0, 26)
"""From here `hf_overrides={"head_dtype": "float32"}` computes logits in float32; before, they step by 1/8 near 20."""

STALE_ENVIRONMENT = ("VLLM_USE_NVFP4_CT_EMULATIONS", "VLLM_NVFP4_GEMM_BACKEND", "VLLM_USE_FLASHINFER_MOE_FP4")
STALE_SINCE: Release = (0, 24)
"""Variables that older guides set, and the first release that ignores them."""

WEIGHT_ONLY_KERNELS = ("marlin", "humming", "w4a16")
"""Parts of the names of kernels that leave activations in 16 bits, whatever the checkpoint says."""


def release_of(version: str) -> Release:
    """`0.32.0` -> (0, 32)."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def arguments(options: Mapping[str, Any], release: Release) -> dict[str, Any]:
    """The arguments of vLLM's `EngineArgs` for a suite's options; those that are None are left to vLLM. `UserError` for
    an option that this release cannot be asked for."""
    found: dict[str, Any] = {}
    for option, value in options.items():
        if value is None or (option in ("emulate", "speculative_tokens") and not value):
            continue
        for argument in ARGUMENTS[option]:
            since = _SINCE.get(argument, OLDEST)
            if release < since:
                raise UserError(
                    f"vLLM {release[0]}.{release[1]} has no {argument}, which option '{option}' needs.",
                    f"Leave the option out, or use vLLM {since[0]}.{since[1]} or newer.",
                )
            found[argument] = _value(option, value)
    return found


def _value(option: str, value: Any) -> Any:
    if option == "kv_cache_gb":
        return round(value * 1e9)
    if option == "emulate":
        return "emulation"
    if option == "speculative_tokens":
        return {"method": "mtp", "num_speculative_tokens": value}
    return value


def warnings(options: Mapping[str, Any], release: Release, environment: Mapping[str, str] = os.environ) -> list[str]:
    """What these settings cost or fail to do, a sentence each."""
    found = []
    if options.get("enforce_eager"):
        found.append("enforce_eager runs without CUDA graphs: on a GPU a decode step takes about four times as long.")
    if options.get("prefix_caching") and options.get("speculative_tokens"):
        found.append(
            "Prefix caching together with MTP corrupts the state of hybrid models (vLLM issue 53912): answers may be "
            "wrong."
        )
    elif options.get("prefix_caching"):
        found.append(
            "Prefix caching is on: a prompt that was seen before costs nothing, and its prefill is not measured."
        )
    since = f"{STALE_SINCE[0]}.{STALE_SINCE[1]}"
    for variable in STALE_ENVIRONMENT:
        if variable in environment and release >= STALE_SINCE:
            found.append(
                f"{variable} is set and vLLM {release[0]}.{release[1]} ignores it since {since}: "
                "ask for emulation in the suite instead."
            )
    return found


def is_weight_only(kernel: str) -> bool:
    """Whether a kernel of this name multiplies 16-bit activations."""
    return any(part in kernel.lower() for part in WEIGHT_ONLY_KERNELS)


def engine_arguments(folder: Path, start: Start, release: Release) -> dict[str, Any]:
    """The arguments of vLLM's `AsyncEngineArgs`: what was asked for, and what every measurement needs."""
    found = {
        "model": str(folder),
        "dtype": start.dtype,
        "seed": 0,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
        "worker_extension_cls": WORKER,
        **arguments(start.options, release),
    }
    if start.purpose == "score":
        found.setdefault("max_num_batched_tokens", _SCORED_TOKENS)
        found["max_logprobs"] = -1
        if release >= HEAD_DTYPE_SINCE:
            found["hf_overrides"] = {"head_dtype": "float32"}
    return found


def check_heads(folder: Path, options: Mapping[str, Any]) -> None:
    """MTP needs its head: vLLM would speculate with uninitialised memory, or fail with a traceback."""
    if not options.get("speculative_tokens"):
        return
    family = family_of(read_json(folder / "config.json"), str(folder))
    if not family.has_part(read_index(folder) or (), "mtp"):
        raise UserError(
            f"{folder} has no MTP head, and speculative_tokens asks for one.",
            "Keep the source's MTP tensors, or leave speculative_tokens at 0.",
        )
