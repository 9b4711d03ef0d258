"""The results of `vllm bench` as raw samples: speeds measured on another machine get the harness's own intervals.

    vllm bench serve --save-result --save-detailed      a sample per request
    vllm bench latency --output-json                    a sample per generation of a whole batch
    vllm bench throughput --output-json                 one sample in all

A summary of `serve` without its requests is refused: medians leave nothing to make an interval from.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import UserError

VERSION = 1


@dataclass(frozen=True)
class Imported:
    """A benchmark's name, the model's name in it, its settings, and its raw samples."""

    benchmark: str
    model: str
    settings: dict[str, Any]
    samples: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class BatchShape:
    """The batch of a latency run, which its file does not say."""

    batch: int
    prompt_tokens: int
    new_tokens: int


def read_vllm_bench(path: Path, shape: BatchShape | None = None) -> Imported:
    """The runs in a JSON file of `vllm bench`; `UserError` for any other file. Samples of `serve` are a `request` or a
    `failed_request` each, of `latency` a `generation`, of `throughput` one `throughput`."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).", "Name a JSON file of `vllm bench`.") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON.", "Name a JSON file of `vllm bench`.") from error
    keys = set(found) if isinstance(found, dict) else set[str]()
    if {"latencies", "avg_latency"} <= keys:
        return _latency(path, found, shape)
    if {"elapsed_time", "total_num_tokens"} <= keys:
        return _throughput(path, found)
    if "total_output_tokens" in keys:
        return _serve(path, found)
    raise UserError(
        f"{path} is no result of `vllm bench` latency, throughput or serve.", "Name a file that one of them wrote."
    )


def _serve(path: Path, found: Mapping[str, Any]) -> Imported:
    detailed = ("input_lens", "output_lens", "ttfts", "itls")
    if missing := [key for key in detailed if key not in found]:
        raise UserError(
            f"{path} has only the summary of `vllm bench serve`: no {', '.join(missing)}.",
            "Run it again with --save-detailed.",
        )
    columns = [_list(path, found[key]) for key in detailed]
    errors = _list(path, found.get("errors") or [""] * len(columns[0]))
    if len({len(column) for column in (*columns, errors)}) != 1:
        raise UserError(f"{path}: its lists of requests differ in length.", "Run the benchmark again.")
    samples: list[dict[str, Any]] = []
    for number, (prompt, new, first, gaps) in enumerate(zip(*columns, strict=True)):
        if errors[number]:
            samples.append({"kind": "failed_request", "reason": str(errors[number])[:300]})
            continue
        samples.append(
            {
                "kind": "request",
                "prompt_tokens": _count(path, number, prompt),
                "new_tokens": _count(path, number, new),
                "first_token_seconds": _seconds(path, number, first),
                "decode_seconds": math.fsum(_seconds(path, number, gap) for gap in _list(path, gaps)),
            }
        )
    keys = ("backend", "num_prompts", "request_rate", "burstiness", "max_concurrency", "duration", "date")
    settings = {key: found[key] for key in keys if key in found}
    return Imported("serve", str(found.get("model_id", "unknown")), settings, tuple(samples))


def _latency(path: Path, found: Mapping[str, Any], shape: BatchShape | None) -> Imported:
    if shape is None:
        raise UserError(
            f"{path} is of `vllm bench latency`, which does not write down its batch.",
            "Give --batch, --prompt-tokens and --new-tokens as it was run.",
        )
    times = [_seconds(path, number, value) for number, value in enumerate(_list(path, found["latencies"]))]
    samples = [{"kind": "generation", **vars(shape), "seconds": seconds} for seconds in times]
    return Imported("latency", str(found.get("model_id", "unknown")), {}, tuple(samples))


def _throughput(path: Path, found: Mapping[str, Any]) -> Imported:
    sample = {
        "kind": "throughput",
        "num_requests": _count(path, 0, found.get("num_requests")),
        "num_tokens": _count(path, 0, found["total_num_tokens"]),
        "seconds": _seconds(path, 0, found["elapsed_time"]),
    }
    return Imported("throughput", str(found.get("model_id", "unknown")), {}, (sample,))


def _list(path: Path, value: object) -> list[Any]:
    if not isinstance(value, list):
        raise UserError(f"{path} has {value!r:.60} in place of a list.", "Run the benchmark again.")
    return value


def _seconds(path: Path, number: int, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(f"{path}: run {number} has the time {value!r}.", "Run the benchmark again.")
    return float(value)


def _count(path: Path, number: int, value: object) -> int:
    if type(value) is not int or value < 1:
        raise UserError(f"{path}: run {number} has {value!r} tokens or requests.", "Run the benchmark again.")
    return value
