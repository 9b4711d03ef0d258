"""Hand-made records with known arithmetic, for the tests of everything that reads records."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness.record.packed import pack_numbers
from harness.record.run import End, Record, Run
from harness.record.store import read

ENGINE: dict[str, Any] = {
    "name": "torch",
    "version": "transformers 5.17.0, torch 2.13.0",
    "device": "cpu",
    "dtype": "bfloat16",
    "requested": {"device": "auto"},
    "effective": {"threads": 2, "weight_bytes_per_token": 10_000_000, "bandwidth_bytes_per_second": None},
    "kernels": {"linear_attn": "reference", "self_attn": "sdpa"},
}
TEXT: dict[str, Any] = {
    "name": "demo:heldout",
    "text_sha256": "0" * 64,
    "token_ids_sha256": "1" * 64,
    "num_tokens": 297_053,
}
DATASET: dict[str, Any] = {**TEXT, "protocol": "wikitext2-512"}
TASK: dict[str, Any] = {
    "name": "sums",
    "num_docs": 4,
    "settings": {"task": "demo:arithmetic", "chat": False, "seed": 0, "setups": None},
    "lm_eval": "0.4.13",
    "task_digest": "4" * 64,
    "tokenizer_digest": "5" * 64,
    "tasks": {"demo_arithmetic": {"version": 1.0, "num_docs": 4}},
}
AUDIT: dict[str, float] = {
    "cap_hit_share": 0.25,
    "unclosed_share": 0.25,
    "empty_share": 0.25,
    "extraction_failure_share": 0.25,
    "token_inflation_ratio": 2.0,
}
MACHINE: dict[str, Any] = {
    "name": "test-cpu-2c",
    "cpu": "Test CPU",
    "cores": 2,
    "memory_bytes": 8 * 10**9,
    "gpu": None,
    "os": "Linux",
    "python": "3.11.7",
}


def make_run(measure: str = "ppl", variant: str = "source", **header: Any) -> Run:
    """A plausible header; any field can be given."""
    fields: dict[str, Any] = {
        "measure": measure,
        "measure_version": 1,
        "session_id": "5e551011",
        "suite": {"name": "demo"},
        "suite_digest": "2" * 64,
        "variant": {
            "name": variant,
            "recipe": None if variant == "source" else "rtn-a16",
            "artifact_digest": "3" * 64,
        },
        "engine": ENGINE if measure in ("ppl", "bench") else None,
        "dataset": {"ppl": DATASET, "bench": TEXT}.get(measure),
        "machine": MACHINE,
        "packages": {"torch": "2.13.0", "harness": "0.1.0"},
        "git": {"commit": "c0ffee" + "0" * 34, "dirty": False},
        "command": ("harness", measure, "--suite", "suites/demo.toml"),
        "run_id": f"{measure}{variant}".encode().hex()[-8:],
        "started_utc": "2026-03-01T12:00:00Z",
    }
    return Run(**{**fields, **header})


def make_record(measure: str, variant: str, samples: Iterable[dict[str, Any]], **header: Any) -> Record:
    """A complete run in memory, with the path that the store would give it."""
    run, samples = make_run(measure, variant, **header), tuple(samples)
    coverage = {"expected": len(samples), "done": len(samples)}
    end = End(status="complete", num_samples=len(samples), coverage=coverage, ended_utc="2026-03-01T12:05:00Z")
    return Record(Path("results") / run.machine["name"] / run.file_name, run, samples, end)


def windows(ppl: float, noise: Sequence[float] = (0.0,), num_tokens: int = 297_053) -> list[dict[str, Any]]:
    """Windows of 512 tokens whose perplexity is `ppl` exactly where the noise (nats per token, cycled) is zero."""
    samples = []
    for index, first in enumerate(range(0, num_tokens, 512)):
        length = min(512, num_tokens - first)
        nats = (math.log(ppl) + noise[index % len(noise)]) * (length - 1)
        samples.append(
            {
                "kind": "window",
                "index": index,
                "first_token": first,
                "num_tokens": length,
                "num_scored": length - 1,
                "nll_nats": nats,
            }
        )
    return samples


def decodes(
    step_seconds: float, batch: int = 1, repetitions: int = 6, spread: float = 0.01, num_steps: int = 127
) -> list[dict[str, Any]]:
    """A ten times slower warm-up, then repetitions of equal steps, spread evenly around `step_seconds`."""
    offsets = [(repetition - (repetitions - 1) / 2) / repetitions for repetition in range(repetitions)]
    times = [10 * step_seconds, *(step_seconds * (1 + spread * offset) for offset in offsets)]
    return [
        {
            "kind": "decode",
            "start": 0,
            "repetition": max(0, turn - 1),
            "warmup": turn == 0,
            "batch": batch,
            "prompt_tokens": 128,
            "prefill_seconds": 0.1,
            "step_seconds": [seconds] * num_steps,
        }
        for turn, seconds in enumerate(times)
    ]


def prefills(seconds: float, repetitions: int = 6) -> list[dict[str, Any]]:
    """A ten times slower warm-up, then equal prefills of 512 tokens."""
    return [
        {
            "kind": "prefill",
            "start": 0,
            "repetition": max(0, turn - 1),
            "warmup": turn == 0,
            "batch": 1,
            "prompt_tokens": 512,
            "prefill_seconds": seconds * (10 if turn == 0 else 1),
        }
        for turn in range(repetitions + 1)
    ]


def answer(doc_id: int, score: float | None = None, *, num_tokens: int = 10, **more: Any) -> dict[str, Any]:
    """A generated answer of ten tokens that came to its end; any key can be given."""
    return {
        "kind": "item",
        "task": "demo_arithmetic",
        "repetition": 0,
        "doc_id": doc_id,
        "doc_sha256": f"{doc_id:064x}",
        "prompt_sha256": f"{doc_id:064x}",
        "target_sha256": f"{doc_id:064x}",
        "outcomes": {} if score is None else {"exact_match,number": score},
        "num_prompt_tokens": 20,
        "num_tokens": num_tokens,
        "seconds": 0.5,
        "finish_reasons": ["stop"],
        "unclosed": False,
        "empty": False,
        "extracted": True,
        **more,
    }


def choice(doc_id: int, score: float, **more: Any) -> dict[str, Any]:
    """An item of a task that compares the probabilities of two given answers."""
    generated = ("finish_reasons", "unclosed", "empty", "extracted")
    item = {key: value for key, value in answer(doc_id).items() if key not in generated}
    return {**item, "outcomes": {"acc,none": score}, "num_tokens": 2, "log_probs": [-1.0, -2.0], **more}


def result(value: float, error: float | None = None, **more: Any) -> dict[str, Any]:
    """A figure of lm-eval's own; any key can be given."""
    return {
        "kind": "result",
        "task": "demo_arithmetic",
        "repetition": 0,
        "metric": "exact_match,number",
        "value": value,
        "standard_error": error,
        "higher_is_better": True,
        "num_items": 4,
        **more,
    }


def mean_results(items: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What lm-eval makes of items whose metrics it averages: the mean, and the standard error of a mean."""
    scores: dict[tuple[str, int, str], list[float]] = {}
    for item in items:
        for metric, score in item["outcomes"].items():
            scores.setdefault((item["task"], item["repetition"], metric), []).append(score)
    return [
        result(
            statistics.fmean(ones),
            statistics.stdev(ones) / math.sqrt(len(ones)) if len(ones) > 1 else None,
            task=task,
            repetition=repetition,
            metric=metric,
            num_items=len(ones),
        )
        for (task, repetition, metric), ones in scores.items()
    ]


def tasks_record(
    variant: str,
    items: Sequence[dict[str, Any]],
    results: Sequence[dict[str, Any]] | None = None,
    *,
    num_reused: int = 0,
    audit: Mapping[str, float] = AUDIT,
    **header: Any,
) -> Record:
    """A run of one task: its items, lm-eval's figures (means where none are given), and what was reused."""
    samples = [
        *items,
        *(mean_results(items) if results is None else results),
        {"kind": "reused", "num_answers": len(items), "num_reused": num_reused},
    ]
    fields = {"suite": {"name": "demo", "audit": dict(audit)}, "engine": ENGINE, "dataset": TASK}
    return make_record("tasks", variant, samples, **{**fields, **header})


MEMORY: list[dict[str, Any]] = [{"kind": "memory", "start": 0, "weight_bytes": 18 * 10**6, "peak_rss_bytes": 10**9}]

BUILD: list[dict[str, Any]] = [
    {
        "kind": "role",
        "role": "mlp.up_proj",
        "format": "NVFP4A16",
        "num_tensors": 8,
        "num_params": 8 * 10**6,
        "source_bytes": 16 * 10**6,
        "output_bytes": 45 * 10**5,
    },
    {
        "kind": "role",
        "role": "norm",
        "format": "BF16",
        "num_tensors": 17,
        "num_params": 10**6,
        "source_bytes": 2 * 10**6,
        "output_bytes": 2 * 10**6,
    },
    {"kind": "stage", "name": "write", "seconds": 1.5},
    {"kind": "totals", "peak_rss_bytes": 10**9, "output_bytes": 6_500_000},
]

VERIFY: list[dict[str, Any]] = [
    {
        "kind": "roundtrip",
        "role": "mlp.up_proj",
        "num_tensors": 8,
        "max_abs_error": 0.0123,
        "mean_abs_error": 0.00123,
        "relative_l2_error": 0.0931,
        "snr_db": 20.62,
    }
]


def sensitivities(
    role: str, errors: dict[int, tuple[float | None, float | None, float | None]]
) -> list[dict[str, Any]]:
    """Samples of one group: by layer its layer errors in NVFP4A16, NVFP4 and FP8, which takes 1,000 bytes more."""
    return [
        {
            "kind": "sensitivity",
            "index": layer,
            "role": role,
            "format": form,
            "output_error": error,
            "layer_error": error,
            "num_weights": 2048,
            "extra_bytes": 1000 if form == "FP8_DYNAMIC" else 0,
        }
        for layer, row in errors.items()
        for form, error in zip(("NVFP4A16", "NVFP4", "FP8_DYNAMIC"), row, strict=True)
    ]


SENSITIVITY: list[dict[str, Any]] = [
    *sensitivities("linear_attn.out_proj", {0: (0.01, 0.02, 0.001), 1: (0.02, 0.04, 0.001), 2: (0.03, 0.03, 0.001)}),
    *sensitivities("self_attn.o_proj", {3: (0.02, 0.05, 0.002)}),
    *sensitivities("mlp.down_proj", dict.fromkeys(range(4), (0.001, 0.002, 0.0001))),
]


def demo_records() -> list[Record]:
    """A whole set for the suite 'demo': the source and the variant nvfp4a16."""
    noise = [0.1 * math.sin(i) for i in range(7)]
    loss = [one + 0.002 * math.cos(3 * i) for i, one in enumerate(noise)]
    return [
        make_record("build", "nvfp4a16", BUILD),
        make_record("verify", "nvfp4a16", VERIFY),
        make_record("ppl", "source", windows(8.0481, noise)),
        make_record("ppl", "nvfp4a16", windows(8.1939, loss)),
        make_record("bench", "source", decodes(1 / 170.3) + decodes(1 / 150, batch=4) + prefills(0.25) + MEMORY),
        make_record("bench", "nvfp4a16", decodes(1 / 163.4) + decodes(1 / 140, batch=4) + prefills(0.3) + MEMORY),
    ]


FIDELITY: dict[str, Any] = {
    "name": "demo:heldout",
    "token_ids_sha256": "1" * 64,
    "num_tokens": 8_000,
    "window": 1024,
    "distribution": "whole vocabulary",
}


def fidelity_windows(
    kl_nats: Sequence[float], loss_nats: float = 0.0, agreed: float = 1.0, num_tokens: int = 1025
) -> list[dict[str, Any]]:
    """One window for each mean divergence, in nats per token; after 512 tokens it is twice that before. All lose
    `loss_nats` of log-perplexity, and find the same token the likeliest in the share `agreed`."""
    samples = []
    for index, mean in enumerate(kl_nats):
        nums = (511, num_tokens - 512)
        unit = mean * sum(nums) / (nums[0] + 2 * nums[1])
        per_band = [unit * nums[0], 2 * unit * nums[1]]
        bands = [
            {
                "end": end,
                "num_scored": num,
                "kl_nats": nats,
                "num_agreed": round(agreed * num),
                "squared_dp": 0.0001 * num,
            }
            for end, num, nats in zip((512, 4096), nums, per_band, strict=True)
        ]
        samples.append(
            {
                "kind": "window",
                "index": index,
                "first_token": index * (num_tokens - 1),
                "num_tokens": num_tokens,
                "num_scored": num_tokens - 1,
                **{key: sum(band[key] for band in bands) for key in ("kl_nats", "num_agreed", "squared_dp")},
                "nll_nats": (2.0 + loss_nats) * (num_tokens - 1),
                "source_nll_nats": 2.0 * (num_tokens - 1),
                "bands": bands,
                "kl_codes": pack_numbers([unit] * nums[0] + [2 * unit] * nums[1]),
            }
        )
    return samples


def fidelity_record(variant: str, samples: Iterable[dict[str, Any]], **header: Any) -> Record:
    """A run of fidelity; any field of the header can be given."""
    fields = {"suite": {"name": "demo", "fidelity": {"batch_size": 4}}, "engine": ENGINE, "dataset": FIDELITY}
    return make_record("fidelity", variant, samples, **{**fields, **header})


def stored(folder: Path, records: Iterable[Record]) -> list[Record]:
    """The records as files under a results folder, as the store writes them."""
    found = []
    for record in records:
        path = folder / record.path.parent.name / record.path.name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [{"type": "run", **asdict(record.run)}, *({"type": "sample", **one} for one in record.samples)]
        text = "".join(json.dumps(line) + "\n" for line in (*lines, {"type": "end", **asdict(record.end)}))
        path.write_text(text, encoding="utf-8")
        found.append(read(path))
    return found
