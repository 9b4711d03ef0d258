"""What a suite may ask of vLLM, which argument says it in which release (0.19 to 0.33), and what vLLM's log answers.

The arguments are one table. An option that a release has no argument for is refused by name: dropping it would measure
something else. The log is kept in a file, and read for the kernels that run and for the reason why vLLM ended.
"""

import contextlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.engines.protocol import Start
from harness.errors import UserError, first_line
from harness.model.census import kv_bytes_per_token, state_bytes
from harness.model.checkpoint import read_index, read_json
from harness.model.families import family_of, parse_config

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
    "max_cudagraph_capture_size": ("max_cudagraph_capture_size",),
    "limit_mm_per_prompt": ("limit_mm_per_prompt",),
    "attention_backend": ("attention_backend",),
    "linear_backend": ("linear_backend",),
    "moe_backend": ("moe_backend",),
}
"""Option of a suite's [engine.vllm] -> the fields of vLLM's `EngineArgs` that it becomes, all of them."""

_SINCE: dict[str, Release] = {"linear_backend": (0, 22), "moe_backend": (0, 22)}
"""The first release that has an argument; the others are as old as `OLDEST`."""

WORKER = "harness.engines.vllm_worker.HarnessWorker"
"""The class that vLLM mixes into its workers."""

_SMALLEST_CACHE_GB = 0.25

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
    both = [name for name in ("linear_backend", "moe_backend") if options.get("emulate") and options.get(name)]
    if both:
        raise UserError(f"emulate chooses {both[0]} too, and both are set.", "Leave one of them out.")
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
    if option == "max_model_len" and value == "auto":
        return -1  # as `--max-model-len auto` does (vllm/engine/arg_utils.py)
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


def cache_by_need(folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with a `kv_cache_gb` that twice the sequences of `max_num_seqs` and `max_model_len` fit into, where
    both are numbers and it was not set.

    For vLLM on the CPU, which otherwise reserves a share of all memory, and refuses to start where that is not free
    (vllm/v1/worker/cpu_worker.py).
    """
    longest, batch = options.get("max_model_len"), options.get("max_num_seqs")
    if options.get("kv_cache_gb") is not None or not isinstance(longest, int) or not isinstance(batch, int):
        return dict(options)
    config = parse_config(read_json(folder / "config.json"), str(folder))
    # An MTP head attends like one layer more.
    layers = len(config.full_attention_layers)
    kv = kv_bytes_per_token(config) * (layers + 1) / max(layers, 1)
    needed = batch * (state_bytes(config) + longest * kv)
    return {**options, "kv_cache_gb": round(max(2 * needed / 1e9, _SMALLEST_CACHE_GB), 2)}


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


# -- The log -----------------------------------------------------------------------------------------------------

_LOG_LINES = 40
_LOGGING = "VLLM_LOGGING_CONFIG_PATH"
KERNEL_LINES = re.compile(
    r"Using .* for NVFP4 GEMM|Using '.*' \w* ?MoE backend|Selected \S+ for \S+|Using \S+ GDN .* kernel"
)
MEMORY_LINES = re.compile(r"Model loading took .*|Available KV cache memory: .*|\S+ KV cache size: .*")
_ERROR_LINES = re.compile(r"error|exception|traceback|killed|out of memory|refus", re.IGNORECASE)


class Log:
    """vLLM's log in a file of its own: its processes write there, and nothing of it reaches the terminal."""

    def __init__(self) -> None:
        self._handle, name = tempfile.mkstemp(prefix="harness-vllm-", suffix=".log")
        self.path = Path(name)
        handler = {"class": "logging.FileHandler", "filename": name, "mode": "a", "formatter": "plain"}
        config = {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"plain": {"format": "%(levelname)s %(message)s"}},
            "handlers": {"file": handler},
            "loggers": {"vllm": {"handlers": ["file"], "level": "INFO", "propagate": False}},
        }
        self._config = self.path.with_suffix(".json")
        self._config.write_text(json.dumps(config), encoding="utf-8")
        self._environment = os.environ.get(_LOGGING)
        os.environ[_LOGGING] = str(self._config)  # read by every process as it imports vLLM
        if "vllm" in sys.modules:  # this process has done so already
            import logging.config

            logging.config.dictConfig(config)

    @contextlib.contextmanager
    def capturing(self) -> Iterator[None]:
        """Everything that is written to stdout and stderr meanwhile goes to the file, and from the processes that are
        started meanwhile for all of their lives."""
        sys.stdout.flush()
        sys.stderr.flush()
        saved = [(number, os.dup(number)) for number in (1, 2)]
        try:
            for number, _ in saved:
                os.dup2(self._handle, number)
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, copy in saved:
                os.dup2(copy, number)
                os.close(copy)

    def text(self) -> str:
        """All that was written so far."""
        return self.path.read_text(encoding="utf-8", errors="replace")

    def relevant(self) -> tuple[str, ...]:
        """The last lines that speak of an error; the last lines at all where none does."""
        lines = [line.strip() for line in self.text().splitlines() if line.strip()]
        return tuple([line for line in lines if _ERROR_LINES.search(line)][-_LOG_LINES:] or lines[-_LOG_LINES:])

    def close(self) -> None:
        """Removes the files, and what told other programs of them."""
        if os.environ.get(_LOGGING) == str(self._config):
            if self._environment is None:
                del os.environ[_LOGGING]
            else:
                os.environ[_LOGGING] = self._environment
        with contextlib.suppress(OSError):
            os.close(self._handle)
        self.path.unlink(missing_ok=True)
        self._config.unlink(missing_ok=True)


def kv_tokens(log: str) -> int | None:
    """The tokens that vLLM's KV cache holds, as its log says; None where it does not say."""
    found = re.findall(r"KV cache size: ([\d,]+) tokens", log)
    return int(found[-1].replace(",", "")) if found else None


def reason(error: BaseException, lines: Sequence[str]) -> str:
    """The most telling line: the last error that vLLM's processes logged and that does not only point to another, else
    what reached this one."""
    found = [match.group(0) for line in lines if (match := re.search(r"(?:\w+\.)*\w*(?:Error|Exception): .+", line))]
    telling = [line for line in found if not re.search("root cause|initialization failed|EngineDeadError", line)]
    return (telling or [first_line(error)])[-1].strip().rstrip(".")[:300]
