"""The store: one JSON Lines file per run, written once and never changed.

    results/<machine>/<utc>-<measure>-<suite>-<variant>-<run_id>.jsonl

Only raw observations are stored (`record/schema.py` lists them). Means, intervals and ratios are computed when a file
is read, so a better statistic needs no new measurement. The file is written under a temporary name and renamed after
its last line has reached the disk: a killed process leaves no `.jsonl` behind, and a file that was cut by anything else
lacks its end line (or the newline after it) and is skipped by name, never averaged.
"""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import NoneType, TracebackType
from typing import IO, Any, NoReturn, Self

from harness.errors import UserError
from harness.record.schema import (
    SAMPLES,
    SCHEMA,
    UTC_FORMAT,
    End,
    Json,
    Run,
    Status,
    lookup,
    sample_problem,
    utc_now,
)

# The times that a run's samples took of the run itself, one after the other. (Answers that are used again bring their
# own seconds with them, and a build is over when its run begins.)
_CLOCKED = {"bench": ("prefill_seconds", "step_seconds")}
_CLOCK_TOLERANCE_SECONDS = 2.0  # a run begins and ends at whole seconds


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
        if wrong := sample_problem(self._run.measure, sample):
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
    nameless = [key for key in ("suite", "variant", "machine") if not isinstance(lookup(run, f"{key}.name"), str)]
    if nameless:
        raise _UnusableError(f"line 1 does not name its {nameless[0]}")
    if not samples or samples[-1].get("type") != "end":
        raise _UnusableError("it has no end line")
    end = End(**_fields(End, len(lines), samples.pop(), "end"))
    for number, sample in enumerate(samples, start=2):
        wrong = sample_problem(run.measure, sample) if sample.pop("type", None) == "sample" else "it is no sample"
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
