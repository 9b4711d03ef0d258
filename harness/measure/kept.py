"""What engines answered, kept on the disk beside the artifacts until a record is made of it: nothing is asked twice.

Every file belongs to one `identity`: everything that the answers depend on and that is known before an engine is
started, such as a checkpoint's content, an engine and the version of a measure. An interrupted run goes on where it
was: what a killed process left half written is dropped.
"""

import fcntl
import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from harness.engines.protocol import Top
from harness.errors import UserError

_FLOAT = np.dtype("<f4")
_ENGINE = ("name", "version", "device", "dtype", "served_as")
_ITEM = 4  # bytes of an id in a pack, and of a log-probability


def digest(value: object) -> str:
    """SHA-256 (hex) of a value as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def open_alone(path: Path) -> BinaryIO:
    """Opens a file to read and append, for this process alone; `UserError` where another process has it open so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = path.open("a+b")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.close()
        raise UserError(f"{path} is being written by another run.", "Wait for its end, or stop it.") from None
    return stream


class Journal:
    """The answers in a file of `folder` that is named after `name` and the digest of `identity`, and held by `with`
    (`open_alone`). `fresh` forgets the answers in it. The key of a request is the digest of everything that the answer
    depends on: token ids, stop texts, sampling, seed.

        {"identity": {...}}                                     the first line
        {"key": "<sha256>", "value": {...}}                     an answer, written as soon as it is known
    """

    def __init__(self, folder: Path, name: str, identity: Mapping[str, Any], *, fresh: bool = False) -> None:
        self.path = folder / f"{name}-{digest(identity)[:16]}.jsonl"
        self._identity = identity
        self._fresh = fresh
        self._known: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Self:
        self._stream = open_alone(self.path)
        kept = self._read()
        self._stream.truncate(kept)
        if not kept:
            self._write({"identity": dict(self._identity)})
        return self

    def _read(self) -> int:
        """Reads every whole line and returns where they end; 0 for a file of another identity."""
        self._known.clear()
        if self._fresh:
            return 0
        self._stream.seek(0)
        end = 0
        for number, line in enumerate(self._stream):
            try:
                entry = json.loads(line) if line.endswith(b"\n") else None
                if number == 0:
                    if entry != {"identity": json.loads(json.dumps(dict(self._identity)))}:
                        return 0
                elif entry is None:
                    return end
                else:
                    self._known[entry["key"]] = entry["value"]
            except (ValueError, KeyError, TypeError, RecursionError):
                return end
            end += len(line)
        return end

    def get(self, key: str) -> dict[str, Any] | None:
        """The answer to a request; None where it is not known."""
        return self._known.get(key)

    def put(self, key: str, value: Mapping[str, Any]) -> None:
        """Keeps an answer, which the operating system has when this returns: it outlives the process."""
        self._write({"key": key, "value": value})
        self._known[key] = dict(value)

    def _write(self, entry: Mapping[str, Any]) -> None:
        self._stream.write(json.dumps(entry, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
        self._stream.flush()

    def __exit__(self, *_: object) -> None:
        self._stream.close()


class LogProbs:
    """The log-probabilities of windows of `lengths` tokens, in a file of `folder` that is named after `name` and the
    digest of `identity`, and held by `with` (`open_alone`). `fresh` forgets the numbers in it. A run whose windows are
    all there is recorded without starting an engine.

        {"identity": {...}, "engine": {...}}        the engine that computed them, as a run's header describes it
        <float32, little-endian>                    ln P of tokens 1 … n - 1 of window 0, then of window 1 …
    """

    def __init__(
        self, folder: Path, name: str, identity: Mapping[str, Any], lengths: Sequence[int], *, fresh: bool = False
    ) -> None:
        self.path = folder / f"{name}-{digest(identity)[:16]}"
        self.engine: dict[str, Any] | None = None
        """The engine that computed the stored windows; None where no window is stored."""
        self._identity = json.loads(json.dumps(dict(identity)))
        self._ends = list(accumulate((length - 1 for length in lengths), initial=0))  # numbers before each window
        self._fresh = fresh
        self._num_windows = 0
        self._head_bytes = 0

    def __enter__(self) -> Self:
        self._stream = open_alone(self.path)
        self.engine = None if self._fresh else self._read_head()
        if self.engine is not None:
            num_numbers = (self.path.stat().st_size - self._head_bytes) // _FLOAT.itemsize
            self._num_windows = bisect_right(self._ends, num_numbers) - 1
        self._keep(self._num_windows)
        return self

    def _read_head(self) -> dict[str, Any] | None:
        """The engine that the first line names; None where the line is of another identity."""
        self._stream.seek(0)
        line = self._stream.readline()
        try:
            head = json.loads(line) if line.endswith(b"\n") else None
        except (ValueError, RecursionError):
            return None
        if not isinstance(head, dict) or head.get("identity") != self._identity:
            return None
        self._head_bytes = len(line)
        return dict(head["engine"])

    def __len__(self) -> int:
        """How many windows are stored, counted from the first one."""
        return self._num_windows

    def go_on(self, engine: Mapping[str, Any], num_windows: int) -> int:
        """Keeps the first `num_windows` if this engine (its part of a run's header) computed them, none if another one
        did; returns how many are kept. What is appended from now on is this engine's."""
        if self.engine is None or _of(self.engine) != _of(engine):
            num_windows = 0
            self._head_bytes = 0
        self._keep(num_windows)
        if not num_windows:
            self.engine = json.loads(json.dumps(dict(engine)))
            head = json.dumps({"identity": self._identity, "engine": self.engine}, separators=(",", ":")) + "\n"
            self._stream.truncate(0)
            self._stream.write(head.encode())
            self._stream.flush()
            self._head_bytes = len(head.encode())
        return num_windows

    def _keep(self, num_windows: int) -> None:
        self._num_windows = num_windows
        self._stream.truncate(self._head_bytes + self._ends[num_windows] * _FLOAT.itemsize)

    def append(self, log_probs: NDArray[np.float32]) -> None:
        """Keeps the next window, which the operating system has when this returns: it outlives the process."""
        num = self._ends[self._num_windows + 1] - self._ends[self._num_windows]
        if log_probs.shape != (num,):
            raise ValueError(f"log-probabilities of shape {log_probs.shape} for a window that has {num}")
        self._stream.write(log_probs.astype(_FLOAT, copy=False).tobytes())
        self._stream.flush()
        self._num_windows += 1

    def rows(self, num_windows: int) -> Iterator[NDArray[np.float32]]:
        """The log-probabilities [n - 1] of the first `num_windows` windows of n tokens, in nats, in order."""
        if num_windows > self._num_windows:
            raise ValueError(f"{num_windows} windows of {self._num_windows}")
        for first, end in pairwise(self._ends[: num_windows + 1]):
            place = self._head_bytes + first * _FLOAT.itemsize
            yield np.fromfile(self.path, dtype=_FLOAT, count=end - first, offset=place)

    def sha256(self, num_windows: int) -> str:
        """The digest of the first `num_windows` windows, as they lie in the file."""
        found = hashlib.sha256()
        for row in self.rows(num_windows):
            found.update(row.tobytes())
        return found.hexdigest()

    def __exit__(self, *_: object) -> None:
        self._stream.close()


def _of(engine: Mapping[str, Any]) -> dict[str, Any]:
    """What two engines must have in common for their numbers to stand in one file, beyond what was asked of them."""
    effective = engine.get("effective") or {}
    return {**{key: engine.get(key) for key in _ENGINE}, "cpu_capability": effective.get("cpu_capability")}


@dataclass(frozen=True)
class Pack:
    """What a source predicts, to compare a variant with it when the source is not loaded: an engine that serves needs
    all memory for one model. The pack names `num` tokens at each place; `reused`: it was there before this command. Its
    file gets its name when it is whole:

        {"identity": {...}, "num": 64}              a line of JSON; num is k
        ids, log_probs, actual of window 0          little-endian int32 [n - 1, k], float32 [n - 1, k], float32 [n - 1]
        ids, log_probs, actual of window 1 ...
    """

    path: Path
    num: int
    reused: bool

    def tops(self, windows: Sequence[Sequence[int]]) -> Iterator[Top]:
        """The predictions for each of `windows`, which must be the windows that the pack was built from, in order."""
        with self.path.open("rb") as stream:
            start = len(stream.readline())
            num_rows = sum(len(window) - 1 for window in windows)
            if self.path.stat().st_size != start + _ITEM * num_rows * (2 * self.num + 1):
                raise UserError(f"{self.path} is cut.", "Delete it: it is built again.")
            for window in windows:
                rows = len(window) - 1
                yield Top(
                    np.frombuffer(stream.read(_ITEM * rows * self.num), "<i4").reshape(rows, self.num),
                    np.frombuffer(stream.read(_ITEM * rows * self.num), "<f4").reshape(rows, self.num),
                    np.frombuffer(stream.read(_ITEM * rows), "<f4"),
                )


def pack_of(folder: Path, identity: Mapping[str, Any], predict: Callable[[], Iterable[Top]]) -> Pack:
    """The pack of `identity` in `folder`. Where there is none, it is built from what `predict` gives."""
    path = folder / f"{digest(identity)[:16]}.pack"
    if (num := _num_named(path, identity)) is not None:
        return Pack(path, num, reused=True)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    num = 0
    with temporary.open("wb") as stream:
        for top in predict():
            if not num:
                num = top.ids.shape[1]
                header = {"identity": dict(identity), "num": num}
                stream.write(json.dumps(header, separators=(",", ":")).encode() + b"\n")
            for array, kind in ((top.ids, "<i4"), (top.log_probs, "<f4"), (top.actual, "<f4")):
                if np.isnan(array).any():
                    raise UserError(
                        "The source predicts NaN: there is nothing to compare a variant with.",
                        "Look at its weights, or measure in another --dtype.",
                    )
                stream.write(array.astype(kind).tobytes())
    temporary.replace(path)
    return Pack(path, num, reused=False)


def _num_named(path: Path, identity: Mapping[str, Any]) -> int | None:
    """How many tokens the pack at `path` names at each place; None where no pack of this identity lies there."""
    try:
        with path.open("rb") as stream:
            header = json.loads(stream.readline())
        return int(header["num"]) if header["identity"] == json.loads(json.dumps(dict(identity))) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
