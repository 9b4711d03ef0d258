"""The store: one JSON Lines file per run, written once and never changed.

    results/<machine>/<utc>-<measure>-<suite>-<variant>-<run_id>.jsonl

    {"type": "run", "schema": 1, "measure": "ppl", ...}         what was measured, with what, on what
    {"type": "sample", "kind": "window", ...}                   raw observations, in the order they came
    {"type": "end", "status": "complete", "num_samples": ...}   proof that nothing is missing

Only raw observations are stored. Means, intervals and ratios are computed when a file is read, so a better
statistic needs no new measurement. The file is written under a temporary name and renamed after its last line has
reached the disk: a killed process leaves no `.jsonl` behind, and a file that was cut by anything else lacks its
end line (or the newline after it) and is skipped by name, never averaged.

The samples that each measure may give are listed in `SAMPLES`, and both writer and reader hold them to it.
"""

import contextlib
import dataclasses
import json
import math
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import NoneType, TracebackType
from typing import IO, Any, Literal, NoReturn, Self

from harness.errors import UserError

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

# What must be equal in the headers of two runs of a measure before their numbers may be compared. Speed belongs to
# one session on one machine; a loss in quality belongs to the same tokens through the same arithmetic.
COMPARABLE: dict[str, tuple[str, ...]] = {
    "ppl": (
        "measure_version",
        "variant.source_digest",
        "dataset.protocol",
        "dataset.token_ids_sha256",
        "dataset.documents",
        "suite.ppl.batch_size",
        "engine.name",
        "engine.version",
        "engine.dtype",
        "engine.device",
        "engine.effective.cpu_capability",
        "engine.effective.attention_implementation",
        "engine.effective.deltanet_implementation",
    ),
    "fidelity": (
        "measure_version",
        "variant.source_digest",
        "dataset.token_ids_sha256",
        "dataset.window",
        "dataset.distribution",
        "suite.fidelity.batch_size",
        "engine.name",
        "engine.version",
        "engine.dtype",
        "engine.device",
        "engine.effective.cpu_capability",
    ),
    "bench": (
        "measure_version",
        "variant.source_digest",
        "session_id",
        "machine.name",
        "dataset.token_ids_sha256",
        "engine.name",
        "engine.version",
        "engine.dtype",
        "engine.device",
        "engine.effective.threads",
    ),
    "tasks": (
        "measure_version",
        "variant.source_digest",
        "dataset.name",
        "dataset.task_digest",
        "dataset.settings",
        "dataset.tokenizer_digest",
        "packages.lm_eval",
        "engine.name",
        "engine.version",
        "engine.dtype",
        "engine.device",
        "engine.effective.end_tokens",
    ),
    "peers": ("measure_version", "session_id", "suite_digest", "machine.name", "variant.source_digest"),
    "sensitivity": (
        "measure_version",
        "variant.source_digest",
        "dataset.token_ids_sha256",
        "engine.name",
        "engine.version",
        "engine.dtype",
    ),
    "served": ("measure_version", "variant.source_digest", "machine.name", "engine.name", "engine.version"),
    "build": ("measure_version",),
    "verify": ("measure_version",),
}

# Of those, what may differ between a run and an older one that it is watched against: a new release of the engine, a
# new driver or another machine is what a regression comes from, so it must not hide one.
WATCHED = ("session_id", "machine", "engine.version", "engine.device", "engine.effective")

# The times that a run's samples took of the run itself, one after the other. (Answers that are used again bring their
# own seconds with them, and a build is over when its run begins.)
_CLOCKED = {"bench": ("prefill_seconds", "step_seconds")}
_CLOCK_TOLERANCE_SECONDS = 2.0  # a run begins and ends at whole seconds
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


@dataclass(frozen=True)
class Record:
    """One run as it was stored; samples are the raw dicts, each with its `kind`."""

    path: Path
    run: Run
    samples: tuple[Json, ...]
    end: End

    def kind(self, kind: str) -> list[Json]:
        """The samples of one kind, in the order they were taken."""
        return [sample for sample in self.samples if sample["kind"] == kind]

    @property
    def whole(self) -> bool:
        """Complete, and over everything there was to measure (no `--limit`)."""
        return self.end.status == "complete" and self.end.coverage["done"] == self.end.coverage["expected"]


@dataclass(frozen=True)
class Skipped:
    """A file that is not used, and why; `record` is what it holds where it can be read."""

    path: Path
    reason: str
    record: Record | None = None


class RunWriter:
    """Write one run: `with RunWriter(results_dir, run, expected=581) as writer: writer.sample({...})`.

    `expected` is how many samples the measure would give without a limit (None: as many as come). `finish` makes
    the file appear. Without it, Ctrl-C keeps what was done as "interrupted", any other exception as "failed";
    both are kept for the curious and never reported.
    """

    def __init__(self, results_dir: Path, run: Run, expected: int | None = None) -> None:
        self.path = results_dir / str(run.machine["name"]) / run.file_name
        self._run = run
        self._expected = expected
        self._num_samples = 0
        self._temporary = self.path.with_name(f".{run.file_name}.tmp")
        self._stream: IO[str] | None = None

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        header = self._line("the header", {"type": "run", **dataclasses.asdict(self._run)})
        self._stream = self._temporary.open("x", encoding="utf-8", newline="\n")
        self._stream.write(header)
        return self

    def sample(self, sample: Mapping[str, Any]) -> None:
        """Add one raw observation of a kind in `SAMPLES`, every number finite."""
        if wrong := _sample_problem(self._run.measure, sample):
            raise ValueError(wrong)
        what = f"sample {self._num_samples} ({sample['kind']})"
        self._open_stream().write(self._line(what, {"type": "sample", **sample}))
        self._num_samples += 1

    def finish(self, status: Status = "complete", num_missing: int = 0) -> Path:
        """Write the end line, flush it to the disk, and give the file its name. `num_missing`: samples that a limit
        left out, where their number was not known from the start."""
        expected = self._num_samples + num_missing if self._expected is None else self._expected
        coverage = {"expected": expected, "done": self._num_samples}
        end = End(status=status, num_samples=self._num_samples, coverage=coverage, ended_utc=utc_now())
        stream = self._open_stream()
        stream.write(self._line("the end", {"type": "end", **dataclasses.asdict(end)}))
        stream.flush()
        os.fsync(stream.fileno())
        stream.close()
        self._stream = None
        self._temporary.replace(self.path)
        return self.path

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._stream is None:
            return
        if error is not None:
            self.finish("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
            return
        self._stream.close()
        self._temporary.unlink()
        raise RuntimeError("a run was left without finish()")

    def _open_stream(self) -> IO[str]:
        if self._stream is None:
            raise RuntimeError("a run is written inside its `with` and before finish()")
        return self._stream

    def _line(self, what: str, values: Json) -> str:
        try:
            return json.dumps(values, allow_nan=False, separators=(",", ":")) + "\n"
        except ValueError as error:
            run = self._run
            raise UserError(
                f"{run.measure} of variant '{run.variant['name']}': {what} holds NaN or an infinity.",
                "The run is not stored as complete; look at the model or the engine that made the number.",
            ) from error


_MISSING = object()  # of no JSON type, where None is one


class _UnusableError(Exception):
    """Why a file cannot be read as a run."""


def read(path: Path) -> Record:
    """Read one run, whatever its status. A file that is not a whole run is a `UserError`."""
    try:
        return _parse(path)
    except _UnusableError as error:
        raise UserError(f"{path}: {error}.", "Delete the file, or measure again.") from error


def read_all(results_dir: Path) -> tuple[list[Record], list[Skipped]]:
    """Every complete run under a results folder in the order of its file name, and what was skipped and why."""
    records: list[Record] = []
    skipped: list[Skipped] = []
    for path in sorted(results_dir.glob("*/*.jsonl"), key=lambda path: (path.name, path.parent.name)):
        try:
            record = _parse(path)
        except _UnusableError as error:
            skipped.append(Skipped(path, str(error)))
            continue
        if record.end.status == "complete":
            records.append(record)
        else:
            skipped.append(Skipped(path, f"the run's status is '{record.end.status}'", record))
    return records, skipped


def incomparable(a: Record, b: Record, *, over_time: bool = False) -> list[str]:
    """The header keys that forbid comparing two runs; empty if their numbers may stand side by side. `over_time`: one
    is the baseline of the other, and what is `WATCHED` may differ."""
    if a.run.measure != b.run.measure:
        return ["measure"]
    keys = [key for key in COMPARABLE[a.run.measure] if not (over_time and _is_watched(key))]
    return [key for key in keys if _lookup(a.run, key) != _lookup(b.run, key)]


def _is_watched(key: str) -> bool:
    return any(key == watched or key.startswith(f"{watched}.") for watched in WATCHED)


def _lookup(run: Run, dotted: str) -> object:
    """The header value at a dotted key; None where a table on the way is missing."""
    first, *rest = dotted.split(".")
    value = getattr(run, first)
    for key in rest:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _parse(path: Path) -> Record:
    try:
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise _UnusableError(f"it cannot be read ({error})") from error
    # Every line ends with a newline, the last one too: the last byte is the first that a cut takes.
    lines = text.split("\n")
    if lines.pop() != "":
        raise _UnusableError(f"line {len(lines) + 1} is cut")
    if not lines:
        raise _UnusableError("it is empty")
    head, *samples = (_object(number, line) for number, line in enumerate(lines, start=1))
    if head.get("schema") != SCHEMA:
        raise _UnusableError(f"its schema is {head.get('schema')!r}, and this version reads {SCHEMA}")
    run = Run(**_fields(Run, 1, head, "run"))
    if run.measure not in SAMPLES:
        raise _UnusableError(f"its measure '{run.measure}' is unknown")
    nameless = [key for key in ("suite", "variant", "machine") if not isinstance(_lookup(run, f"{key}.name"), str)]
    if nameless:
        raise _UnusableError(f"line 1 does not name its {nameless[0]}")
    if not samples or samples[-1].get("type") != "end":
        raise _UnusableError("it has no end line")
    end = End(**_fields(End, len(lines), samples.pop(), "end"))
    for number, sample in enumerate(samples, start=2):
        wrong = _sample_problem(run.measure, sample) if sample.pop("type", None) == "sample" else "it is no sample"
        if wrong:
            raise _UnusableError(f"line {number}: {wrong}")
    if end.num_samples != len(samples):
        raise _UnusableError(f"it has {len(samples)} samples, and its end line counts {end.num_samples}")
    if end.status == "complete" and not samples:
        raise _UnusableError("it is complete and has no samples")
    if not {"expected", "done"} <= end.coverage.keys():
        raise _UnusableError("its end line does not say what was covered")
    record = Record(path, run, tuple(samples), end)
    if jump := _clock_jump(record):
        raise _UnusableError(f"its clock jumped: {jump}")
    return record


def _clock_jump(record: Record) -> str | None:
    """What the times of a run say that cannot be; None for times that can."""
    started, ended = record.run.started_utc, record.end.ended_utc
    try:
        lasted = (datetime.strptime(ended, UTC_FORMAT) - datetime.strptime(started, UTC_FORMAT)).total_seconds()
    except ValueError as error:
        raise _UnusableError(f"its start '{started}' or its end '{ended}' is no time") from error
    if lasted < 0:
        return f"it began at {started} and ended at {ended}"
    keys = _CLOCKED.get(record.run.measure, ())
    times = [sample[key] for sample in record.samples for key in keys if key in sample]
    timed = math.fsum(math.fsum(one) if isinstance(one, list) else one for one in times)
    if timed > lasted + _CLOCK_TOLERANCE_SECONDS:
        return f"it timed {timed:.1f} s within {lasted:.0f} s, from {started} to {ended}"
    return None


def _object(number: int, line: str) -> Json:
    def not_a_number(word: str) -> NoReturn:
        raise ValueError(word)

    def finite(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):  # 1e999 is an infinity in disguise
            not_a_number(digits)
        return value

    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(line, parse_constant=not_a_number, parse_float=finite)
        if "\\ud" in line.lower():  # half a character, which nothing can print
            json.dumps(value, ensure_ascii=False).encode()
        if isinstance(value, dict):
            return value
    raise _UnusableError(f"line {number} is not a JSON object of finite numbers")


# How the annotations of `Run` and `End` look in JSON.
_JSON_TYPES: dict[Any, tuple[type, ...]] = {
    str: (str,),
    int: (int,),
    Json: (dict,),
    Json | None: (dict, NoneType),
    tuple[str, ...]: (list,),
    Status: (str,),
}


def _fields(kind: type[Run] | type[End], number: int, values: Json, line_type: str) -> Json:
    """The keyword arguments for a header or an end line: every field there, of its type, and nothing else."""
    if values.pop("type", None) != line_type:
        raise _UnusableError(f"line {number} is not the '{line_type}' line")
    types = {one.name: _JSON_TYPES[one.type] for one in dataclasses.fields(kind)}
    if differing := sorted(types.keys() ^ values.keys()):
        raise _UnusableError(f"line {number} lacks or should not have '{differing[0]}'")
    for key, accepted in types.items():
        if type(values[key]) not in accepted:
            raise _UnusableError(f"line {number} has a '{key}' of the wrong type")
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _sample_problem(measure: str, sample: Mapping[str, Any]) -> str | None:
    """What keeps a sample from being one of `SAMPLES`, or None."""
    kinds = SAMPLES[measure]
    kind = sample.get("kind")
    if kind not in kinds:
        return f"a sample of {measure} cannot be of the kind {kind!r}"
    wrong = [key for key, is_good in kinds[kind].items() if not is_good(sample.get(key, _MISSING))]
    return f"a {kind} sample has no good '{wrong[0]}'" if wrong else None
