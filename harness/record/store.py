"""The store: one JSON Lines file per run, written once and never changed.

    results/<machine>/<utc>-<measure>-<suite>-<variant>-<run_id>.jsonl

Only raw observations are stored (`record/schema.py`). A file is renamed from a temporary name when its last line has
reached the disk. A file that was cut lacks its end line, or the newline after it; it is named, and never averaged.
"""

import contextlib
import dataclasses
import gc
import json
import math
import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NoReturn, Self

from harness.errors import UserError
from harness.record.keys import Keys
from harness.record.run import SCHEMA, UTC_FORMAT, End, Json, Record, Run, Skipped, Status, utc_now
from harness.record.samples import SAMPLES, sample_problem
from harness.record.schema import END, header_of

# The times in a measure's samples that passed during the run, one after the other. (Answers that are used again bring
# the seconds of an earlier run with them, and a build is over when its run begins.)
_CLOCKED = {"bench": ("prefill_seconds", "step_seconds")}
_CLOCK_TOLERANCE_SECONDS = 2.0  # a run begins and ends at whole seconds


class RunWriter:
    """Writes one run: `with RunWriter(results_dir, run, expected=581) as writer: writer.sample({...})`.

    `expected` is how many samples the measure would give without a limit (None: as many as come). The file appears when
    `finish` is called. If the block ends before that, Ctrl-C keeps what was done as "interrupted", and any other
    exception as "failed"; neither is ever reported.
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
        values = dataclasses.asdict(self._run)
        header = self._line("the header", {"type": "run", **values})
        keys = header_of(self._run.measure)
        if wrong := keys.problem(values) or keys.unknown(values):
            raise ValueError(f"the header of {self._run.measure} has no good '{wrong}' by record/schema.py")
        self._stream = self._temporary.open("x", encoding="utf-8", newline="\n")
        self._stream.write(header)
        return self

    def sample(self, sample: Mapping[str, Any]) -> None:
        """Adds a raw observation of a kind in `SAMPLES`, with the keys of that kind and no others. `UserError` for a
        number that is not finite or out of its bounds, `ValueError` for any other fault."""
        measure, what = self._run.measure, f"sample {self._num_samples} ({sample.get('kind')})"
        line = self._line(what, {"type": "sample", **sample})
        if wrong := sample_problem(measure, sample, exact=True):
            if sample_problem(measure, sample, exact=True, bounded=False) is None:
                key = SAMPLES[measure][sample["kind"]].problem(sample)
                raise self._bad_number(f"{what} holds a number out of bounds in '{key}'")
            raise ValueError(wrong)
        assert self._stream is not None, "a run is written inside its `with` and before finish()"
        self._stream.write(line)
        self._num_samples += 1

    def finish(self, status: Status = "complete", num_missing: int = 0) -> Path:
        """Writes the end line, flushes the file to the disk, and gives it its name. `num_missing`: how many samples a
        limit left out, where their number was not known from the start."""
        expected = self._num_samples + num_missing if self._expected is None else self._expected
        coverage = {"expected": expected, "done": self._num_samples}
        end = End(status=status, num_samples=self._num_samples, coverage=coverage, ended_utc=utc_now())
        assert self._stream is not None, "a run is finished once, inside its `with`"
        self._stream.write(self._line("the end", {"type": "end", **dataclasses.asdict(end)}))
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
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

    def _line(self, what: str, values: Json) -> str:
        try:
            return json.dumps(values, allow_nan=False, separators=(",", ":")) + "\n"
        except ValueError as error:
            raise self._bad_number(f"{what} holds NaN or an infinity") from error

    def _bad_number(self, fault: str) -> UserError:
        return UserError(
            f"{self._run.measure} of variant '{self._run.variant['name']}': {fault}.",
            "The run is not stored as complete; look at the model or the engine that made the number.",
        )


class _UnusableError(Exception):
    """Why a file cannot be read as a run."""


def read(path: Path) -> Record:
    """The run in a file, whatever its status. `UserError` for a file that is not a whole run."""
    try:
        return _parse(path)
    except _UnusableError as error:
        raise UserError(f"{path}: {error}.", "Delete the file, or measure again.") from error


def read_all(results_dir: Path) -> tuple[list[Record], list[Skipped]]:
    """Every complete run under a folder of results, in the order of file names, and every file that is not used."""
    collects = gc.isenabled()
    gc.disable()  # it would walk what was read again and again, a fifth of the time, and find no cycle
    try:
        return _read_all(results_dir)
    finally:
        if collects:
            gc.enable()


def _read_all(results_dir: Path) -> tuple[list[Record], list[Skipped]]:
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
    has_escapes = _HALF_A_CHARACTER in text.lower()
    head, *samples = (_object(number, line, has_escapes) for number, line in enumerate(lines, start=1))
    run = _run(head)
    if not samples or samples[-1].get("type") != "end":
        raise _UnusableError("it has no end line")
    end = _end(len(lines), samples.pop())
    for number, sample in enumerate(samples, start=2):
        is_sample = sample.pop("type", None) == "sample"
        wrong = sample_problem(run.measure, sample, exact=False) if is_sample else "it is no sample"
        if wrong:
            raise _UnusableError(f"line {number}: {wrong}")
    if end.num_samples != len(samples):
        raise _UnusableError(f"it has {len(samples)} samples, and its end line counts {end.num_samples}")
    if end.status == "complete" and not samples:
        raise _UnusableError("it is complete and has no samples")
    record = Record(path, run, tuple(samples), end)
    if jump := _clock_jump(record):
        raise _UnusableError(f"its clock jumped: {jump}")
    return record


def _run(head: Json) -> Run:
    """The header, held to `header_of` its measure."""
    if head.pop("type", None) != "run":
        raise _UnusableError("line 1 is not the 'run' line")
    if head.get("schema") != SCHEMA:
        raise _UnusableError(f"its schema is {head.get('schema')!r}, and this version reads {SCHEMA}")
    measure = head.get("measure")
    if not isinstance(measure, str) or measure not in SAMPLES:
        raise _UnusableError(f"its measure {measure!r} is unknown")
    _check_top(1, header_of(measure), head)
    if not isinstance(head["suite"].get("name"), str):
        raise _UnusableError("line 1 does not name its suite")
    return Run(**{**head, "command": tuple(head["command"])})


def _end(number: int, values: Json) -> End:
    """The last line, held to `END`."""
    del values["type"]
    _check_top(number, END, values)
    return End(**values)


def _check_top(number: int, keys: Keys, values: Json) -> None:
    """Holds the first or the last line to its keys: all of them, and at the top no others."""
    if differing := sorted(keys.keys() ^ values.keys()):
        raise _UnusableError(f"line {number} lacks or should not have '{differing[0]}'")
    if wrong := keys.problem(values):
        raise _UnusableError(f"line {number} has no good '{wrong}'")


def _clock_jump(record: Record) -> str | None:
    """What is impossible about the times of a run; None for times that can be."""
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


def _object(number: int, line: str, has_escapes: bool) -> Json:
    """The JSON object of a line, in which every number is finite; `has_escapes`: it may hold half a character."""
    with contextlib.suppress(ValueError, RecursionError):
        value = _DECODER.decode(line)
        if has_escapes:  # half a character is what nothing can print
            json.dumps(value, ensure_ascii=False).encode()
        if isinstance(value, dict):
            return value
    raise _UnusableError(f"line {number} is not a JSON object of finite numbers")


def _not_a_number(word: str) -> NoReturn:
    raise ValueError(word)


def _finite(digits: str) -> float:
    value = float(digits)
    return value if math.isfinite(value) else _not_a_number(digits)  # 1e999 is an infinity in disguise


_HALF_A_CHARACTER = "\\ud"
_DECODER = json.JSONDecoder(parse_constant=_not_a_number, parse_float=_finite)
