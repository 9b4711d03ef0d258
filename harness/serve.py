"""How to serve a variant: the commands, and the sizing that model cards do by hand.

    budget   = GPU memory x utilization - weights - overhead
    KV cache = budget, of which every running sequence takes its DeltaNet states and, token by token, keys and values

The overhead is what vLLM keeps for activations, CUDA graphs and its own context. vLLM measures it as it starts, so
the figure here is a guess that can be given: two published settings of one 9B checkpoint on a 32 GiB GPU leave it 6.3
and 6.8 GB with images, far less without. Arguments with dots (`--speculative-config.method`) are vLLM's way around
quoting JSON in a shell.
"""

import json
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from harness.errors import UserError
from harness.suite.names import is_hub_id

IMAGE = "vllm/vllm-openai:v0.32.0"
GIB = 2**30
UTILIZATION = 0.9
USERS = 64
OVERHEAD_GB = {True: 6.5, False: 3.0}
"""By whether images are served, 10⁹ bytes."""

_PORT = 8000
_MOUNT = "/model"
_CACHE = ".cache/huggingface"
CONTAINER_CACHE = f"/root/{_CACHE}"
"""Where the image keeps its downloads."""
_BLOCK = 16
"""vLLM rounds what a sequence may take to blocks; a length is rounded down to the same."""


@dataclass(frozen=True)
class Footprint:
    """What a variant takes of a GPU, in bytes: all its tensors, those of its vision tower among them, the DeltaNet
    states of a sequence, and keys and values of a token. `max_positions`: the longest sequence that the model was made
    for, None where its configuration does not say."""

    weight_bytes: int
    visual_bytes: int
    state_bytes: int
    kv_bytes_per_token: int
    max_positions: int | None


@dataclass(frozen=True)
class Sizing:
    """What a GPU leaves to sequences, in bytes and tokens. `max_model_len` is the longest single sequence, and no more
    than the model was made for; `shared_tokens` is what all `users` together can hold at full use."""

    gpu_bytes: int
    weight_bytes: int
    overhead_bytes: int
    cache_bytes: int
    state_bytes: int
    kv_bytes_per_token: int
    users: int
    max_model_len: int
    shared_tokens: int


def size(
    footprint: Footprint,
    *,
    gpu_gib: float,
    utilization: float = UTILIZATION,
    overhead_gb: float | None = None,
    users: int = USERS,
    images: bool = True,
    num_gpus: int = 1,
) -> Sizing:
    """The sizing on `num_gpus` GPUs of `gpu_gib` GiB that share every layer; `UserError` where it does not fit."""
    weights = footprint.weight_bytes - (0 if images else footprint.visual_bytes)
    overhead = round((OVERHEAD_GB[images] if overhead_gb is None else overhead_gb) * 1e9) * num_gpus
    total = round(gpu_gib * GIB * utilization) * num_gpus
    cache = total - weights - overhead
    state, kv = footprint.state_bytes, footprint.kv_bytes_per_token
    longest = (cache - state) // kv // _BLOCK * _BLOCK
    if footprint.max_positions is not None:
        longest = min(longest, footprint.max_positions)
    if longest < _BLOCK:
        raise UserError(
            f"{weights / 1e9:.1f} GB of weights and {overhead / 1e9:.1f} GB of overhead leave no room for a sequence "
            f"in {total / 1e9:.1f} GB, {utilization:.0%} of {num_gpus} × {gpu_gib:g} GiB.",
            "Use a larger GPU, more of them, or a smaller recipe.",
        )
    return Sizing(
        gpu_bytes=total,
        weight_bytes=weights,
        overhead_bytes=overhead,
        cache_bytes=cache,
        state_bytes=state,
        kv_bytes_per_token=kv,
        users=users,
        max_model_len=longest,
        shared_tokens=max(0, (cache - users * state) // kv),
    )


def vllm_arguments(
    sizing: Sizing,
    *,
    name: str,
    utilization: float = UTILIZATION,
    images: bool = True,
    speculative_tokens: int = 0,
    num_gpus: int = 1,
) -> list[str]:
    """The arguments of `vllm serve` after the model: an option and its value are neighbours."""
    found = ["--served-model-name", name, "--max-model-len", str(sizing.max_model_len)]
    found += ["--max-num-seqs", str(sizing.users), "--max-cudagraph-capture-size", str(sizing.users)]
    found += ["--gpu-memory-utilization", f"{utilization:g}"]
    if num_gpus > 1:
        found += ["--tensor-parallel-size", str(num_gpus)]
    found += ["--reasoning-parser", "qwen3", "--enable-auto-tool-choice", "--tool-call-parser", "qwen3_coder"]
    if not images:
        found += ["--language-model-only"]
    if speculative_tokens:
        found += ["--speculative-config.method", "mtp"]
        found += ["--speculative-config.num_speculative_tokens", str(speculative_tokens)]
        found += ["--no-enable-prefix-caching"]  # together they corrupt the state of hybrid models
    return found


def vllm_line(model: str, given: Sequence[str]) -> str:
    """`vllm serve MODEL …` for a POSIX shell."""
    return _broken([shlex.join(["vllm", "serve", model]), *_options(given, shlex.quote)], " \\")


def docker_bash(model: str, given: Sequence[str]) -> str:
    """`docker run …` for bash. Mounts a checkpoint's folder, read-only, or for a hub id the cache of downloads."""
    if is_hub_id(model):
        return _broken(_docker(f"~/{_CACHE}:{CONTAINER_CACHE}", model, given, shlex.quote), " \\")
    return _broken(_docker(f'"$(realpath {shlex.quote(model)})":{_MOUNT}:ro', _MOUNT, given, shlex.quote), " \\")


def docker_powershell(model: str, given: Sequence[str]) -> str:
    """The same for PowerShell, whose lines go on after a backtick."""
    if is_hub_id(model):
        return _broken(_docker(f'"$HOME/{_CACHE}:{CONTAINER_CACHE}"', model, given, _powershell), " `")
    folder = f'"$(Resolve-Path {_powershell(model)}):{_MOUNT}:ro"'
    return _broken(_docker(folder, _MOUNT, given, _powershell), " `")


def _powershell(word: str) -> str:
    """A word that PowerShell takes literally."""
    return word if re.fullmatch(r"[A-Za-z0-9_./:-]+", word) else "'" + word.replace("'", "''") + "'"


def _docker(volume: str, model: str, given: Sequence[str], quoted: Callable[[str], str]) -> list[str]:
    return [
        "docker run --rm --gpus all --ipc host",
        f"-p 127.0.0.1:{_PORT}:{_PORT}",
        f"-v {volume}",
        f"{IMAGE} {model}",
        *_options(given, quoted),
    ]


def _options(given: Sequence[str], quoted: Callable[[str], str]) -> list[str]:
    """Each option with its value on one line."""
    lines: list[str] = []
    for word in given:
        if word.startswith("--"):
            lines.append(word)
        else:
            lines[-1] += f" {quoted(word)}"
    return lines


def _broken(lines: Sequence[str], end: str) -> str:
    return f"{end}\n  ".join(lines)


def compose(model: str, given: Sequence[str]) -> str:
    """A compose file. Every string is quoted as JSON, which is YAML."""
    on_the_hub = is_hub_id(model)
    volume = f"~/{_CACHE}:{CONTAINER_CACHE}" if on_the_hub else f"{model}:{_MOUNT}:ro"
    command = "\n".join(f"      - {json.dumps(word)}" for word in [model if on_the_hub else _MOUNT, *given])
    return f"""services:
  vllm:
    image: {json.dumps(IMAGE)}
    ipc: host
    ports:
      - "127.0.0.1:{_PORT}:{_PORT}"
    volumes:
      - {json.dumps(volume)}
    command:
{command}
    deploy:
      resources:
        reservations:
          devices:
            - driver: nvidia
              count: all
              capabilities: [gpu]
"""
