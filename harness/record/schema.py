"""What a record holds: its header, its samples by measure and kind, its last line.

    {"type": "run", "schema": 1, "measure": "ppl", ...}         what was measured, with what, on what
    {"type": "sample", "kind": "window", ...}                   raw observations, in the order they came
    {"type": "end", "status": "complete", "num_samples": ...}   proof that nothing is missing

The samples that each measure may give are listed in `SAMPLES`; `record/store.py` checks every sample against it, when
it writes and when it reads.
"""

import math
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

SCHEMA = 1
Status = Literal["complete", "interrupted", "failed"]
Json = dict[str, Any]

# What a value in a sample must be. True is no number, and a time of zero or less is a clock that jumped.


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_positive_count(value: object) -> bool:
    return type(value) is int and value > 0


def _is_count_or_null(value: object) -> bool:
    return value is None or _is_count(value)


def _is_number_or_null(value: object) -> bool:
    return value is None or _is_number(value)


def _is_cost(value: object) -> bool:
    """A sum that is not negative but for rounding: of -ln p, of a divergence, of squares."""
    return isinstance(value, int | float) and not isinstance(value, bool) and not -math.inf < value < -1e-3


def _is_score(value: object) -> bool:
    return _is_number(value) or (isinstance(value, list) and value != [] and all(map(_is_number, value)))


def _are_scores(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_score, value.values()))


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _is_time_or_null(value: object) -> bool:
    return value is None or _is_time(value)


def _are_named_times(value: object) -> bool:
    return isinstance(value, dict) and value != {} and all(map(_is_number, value.values()))


def _are_times(value: object) -> bool:
    return isinstance(value, list) and value != [] and all(map(_is_time, value))


def _are_bands(value: object) -> bool:
    return isinstance(value, list) and value != [] and all(isinstance(band, dict) for band in value)


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


# The raw samples: measure -> kind -> key -> what its value must be. Units last (seconds, bytes, nats); more keys than
# these are welcome. `first_token` counts from the start of the text, `nll_nats` is the sum over a window's scored
# tokens, `step_seconds` has one time per decode step of the whole batch, `snr_db` is null for an exact round trip.
_Checks = dict[str, Callable[[object], bool]]
_TIMED: _Checks = {
    "start": _is_count,
    "repetition": _is_count,
    "warmup": _is_flag,
    "batch": _is_positive_count,
    "prompt_tokens": _is_positive_count,
    "prefill_seconds": _is_time,
}
# Why an engine did not start or did not survive, and what it said itself.
_FAILURE: _Checks = {"reason": _is_text, "log": _are_texts}
SAMPLES: dict[str, dict[str, _Checks]] = {
    "ppl": {
        "window": {
            "index": _is_count,
            "first_token": _is_count,
            "num_tokens": _is_positive_count,
            "num_scored": _is_positive_count,
            "nll_nats": _is_cost,
        },
        "reused": {"num_windows": _is_count, "num_reused": _is_count},
        "failure": _FAILURE,
    },
    # A variant beside its source, in sums over a window: `squared_dp` of the probability of the token that came,
    # `bands` by the number of tokens before, `kl_codes` the divergence of each prediction (record/packed.py). A source
    # beside itself is in rows of its own, whose names begin with `noise-`.
    "fidelity": {
        "window": {
            "index": _is_count,
            "first_token": _is_count,
            "num_tokens": _is_positive_count,
            "num_scored": _is_positive_count,
            "kl_nats": _is_cost,
            "num_agreed": _is_count,
            "squared_dp": _is_cost,
            "nll_nats": _is_cost,
            "source_nll_nats": _is_cost,
            "bands": _are_bands,
            "kl_codes": _is_text,
        },
        "failure": _FAILURE,
    },
    "bench": {
        "coherence": {
            "prompt_tokens": _is_positive_count,
            "num_tokens": _is_positive_count,
            "text_nll_nats": _is_number,
            "generated_nll_nats": _is_number,
            "limit_nats": _is_number,
            "coherent": _is_flag,
        },
        "decode": {**_TIMED, "step_seconds": _are_times},
        "prefill": _TIMED,
        "memory": {"start": _is_count, "weight_bytes": _is_count, "peak_rss_bytes": _is_count_or_null},
        "failure": _FAILURE,
    },
    # One run per task. `outcomes` are an item's scores by "metric,filter", a list where lm-eval aggregates pairs (a
    # log-likelihood with a number of words). `result` is what lm-eval makes of them, in its own words: its aggregations
    # and standard errors cannot be had without it.
    "tasks": {
        "item": {
            "task": _is_text,
            "repetition": _is_count,
            "doc_id": _is_count,
            "doc_sha256": _is_text,
            "prompt_sha256": _is_text,
            "target_sha256": _is_text,
            "outcomes": _are_scores,
            "num_prompt_tokens": _is_count,
            "num_tokens": _is_count,
            "seconds": _is_number,
        },
        "result": {
            "task": _is_text,
            "repetition": _is_count,
            "metric": _is_text,
            "value": _is_number,
            "standard_error": _is_number_or_null,
            "num_items": _is_count,
        },
        "reused": {"num_answers": _is_count, "num_reused": _is_count},
        "failure": _FAILURE,
    },
    # By `vllm bench`, elsewhere: times of single requests, of whole batches, or of everything.
    "served": {
        "request": {
            "prompt_tokens": _is_positive_count,
            "new_tokens": _is_positive_count,
            "first_token_seconds": _is_time,
            "decode_seconds": _is_number,
        },
        "failed_request": {"reason": _is_text},
        "generation": {
            "batch": _is_positive_count,
            "prompt_tokens": _is_positive_count,
            "new_tokens": _is_positive_count,
            "seconds": _is_time,
        },
        "throughput": {"num_requests": _is_positive_count, "num_tokens": _is_positive_count, "seconds": _is_time},
    },
    "build": {
        "role": {
            "role": _is_text,
            "format": _is_text,
            "num_tensors": _is_count,
            "num_params": _is_count,
            "source_bytes": _is_count,
            "output_bytes": _is_count,
        },
        "stage": {"name": _is_text, "seconds": _is_number},
        "totals": {"peak_rss_bytes": _is_count_or_null, "output_bytes": _is_count},
        "method": {"scales": _is_text, "codes": _is_text},
        # What sizes a server (serve.py).
        "footprint": {
            "weight_bytes": _is_count,
            "visual_bytes": _is_count,
            "state_bytes": _is_count,
            "kv_bytes_per_token": _is_count,
            "max_positions": _is_count_or_null,
        },
        "calibration": {
            "num_tokens": _is_positive_count,
            "planned_memory_bytes": _is_positive_count,
            "peak_vram_bytes": _is_count_or_null,
        },
        "layer": {"index": _is_count, "seconds": _are_named_times},
        "group": {
            "index": _is_count,
            "group": _is_text,
            "format": _is_text,
            "num_weights": _is_count,
            "error": _is_number_or_null,
            "rtn_error": _is_number_or_null,
            "output": _is_number_or_null,
            "num_rows_rtn": _is_count,
            "damping": _is_number_or_null,
        },
        "expert": {"index": _is_count, "expert": _is_count, "num_tokens": _is_count},
    },
    "verify": {
        "roundtrip": {
            "role": _is_text,
            "num_tensors": _is_count,
            "max_abs_error": _is_number,
            "mean_abs_error": _is_number,
            "relative_l2_error": _is_number,
            "snr_db": _is_number_or_null,
        },
        "finding": {"severity": _is_text, "tensor": _is_text, "problem": _is_text, "consequence": _is_text},
    },
    # A sample for each layer, fused group and format; null for an error of an output of zeros. `extra_bytes` is more
    # than NVFP4 takes, or less.
    "sensitivity": {
        "sensitivity": {
            "index": _is_count,
            "role": _is_text,
            "format": _is_text,
            "output_error": _is_number_or_null,
            "layer_error": _is_number_or_null,
            "num_weights": _is_positive_count,
            "extra_bytes": _is_number,
        },
    },
    # One run per quantizer, or per way to answer task evals (`evaluation`: `call_seconds` loads no model, and `scores`
    # are accuracies by task) or to score several models (`evaluation`: it loads them, and `scores` are mean negative
    # log-likelihoods in nats by model). `call_seconds` leaves the imports out, where the tool tells; a `failure` has no
    # times.
    "peers": {
        "repetition": {
            "repetition": _is_count,
            "wall_seconds": _is_time,
            "call_seconds": _is_time_or_null,
            "peak_rss_bytes": _is_count_or_null,
            "output_bytes": _is_positive_count,
        },
        "evaluation": {
            "repetition": _is_count,
            "wall_seconds": _is_time,
            "call_seconds": _is_time,
            "num_items": _is_positive_count,
            "num_requests": _is_positive_count,
            "peak_rss_bytes": _is_count_or_null,
            "scores": _are_scores,
        },
        "verdict": {"passed": _is_flag, "num_errors": _is_count, "num_warnings": _is_count},
        "warning": {"text": _is_text},
        "failure": {"reason": _is_text},
        "agreement": {
            "against": _is_text,
            "num_bytes": _is_positive_count,
            "num_bytes_equal": _is_count,
            "num_scales": _is_positive_count,
            "num_scales_equal": _is_count,
            "weight_global_scale_low": _is_time,
            "weight_global_scale_high": _is_time,
            "input_global_scale_low": _is_time_or_null,
            "input_global_scale_high": _is_time_or_null,
        },
        "window": {
            "text": _is_text,
            "index": _is_count,
            "num_tokens": _is_positive_count,
            "num_scored": _is_positive_count,
            "kl_nats": _is_number,
            "num_agreed": _is_count,
        },
    },
}

UTC_FORMAT = "%Y-%m-%dT%H:%M:%SZ"


def new_id() -> str:
    """Eight random hex digits: names a run, or the session that one command's runs share."""
    return secrets.token_hex(4)


def utc_now() -> str:
    """The time as results write it: `2026-03-01T12:00:00Z`."""
    return datetime.now(UTC).strftime(UTC_FORMAT)


@dataclass(frozen=True, kw_only=True)
class Run:
    """The header: everything that must be known to repeat a run or to refuse a comparison.

    The open tables hold JSON values only: `variant` {name, recipe, artifact_digest, source_digest, source_revision},
    `engine` {name, version, device, dtype, requested, effective, kernels: layer kind -> what computed it}, `dataset`
    {name, protocol, text_sha256, token_ids_sha256, num_tokens, …}, `machine` as `provenance.machine` gives it. `engine`
    and `dataset` are None where a measure has none. `engine.effective` carries what a decode ceiling is computed
    from: `weight_bytes_per_token`, `state_bytes`, `kv_bytes_per_token`, and `bandwidth_bytes_per_second`, None when
    unknown.
    """

    measure: str
    measure_version: int
    session_id: str
    suite: Json
    suite_digest: str
    variant: Json
    engine: Json | None
    dataset: Json | None
    machine: Json
    packages: Json
    git: Json | None
    command: tuple[str, ...]
    schema: int = SCHEMA
    run_id: str = field(default_factory=new_id)
    started_utc: str = field(default_factory=utc_now)

    @property
    def file_name(self) -> str:
        """Sorts by time; every part can be read without opening the file."""
        utc = self.started_utc.replace("-", "").replace(":", "")
        return f"{utc}-{self.measure}-{self.suite['name']}-{self.variant['name']}-{self.run_id}.jsonl"


@dataclass(frozen=True, kw_only=True)
class End:
    """The last line. `coverage` {expected, done} counts samples; expected is what the whole text or plan has."""

    status: Status
    num_samples: int
    coverage: Json
    ended_utc: str


_MISSING = object()  # of no JSON type, where None is one


def sample_problem(measure: str, sample: Mapping[str, Any]) -> str | None:
    """What keeps a sample from being one of `SAMPLES`, or None."""
    kinds = SAMPLES[measure]
    kind = sample.get("kind")
    if kind not in kinds:
        return f"a sample of {measure} cannot be of the kind {kind!r}"
    wrong = [key for key, is_good in kinds[kind].items() if not is_good(sample.get(key, _MISSING))]
    return f"a {kind} sample has no good '{wrong[0]}'" if wrong else None


def lookup(run: Run, dotted: str) -> object:
    """The header value at a dotted key; None where a table on the way is missing."""
    first, *rest = dotted.split(".")
    value = getattr(run, first)
    for key in rest:
        value = value.get(key) if isinstance(value, dict) else None
    return value
