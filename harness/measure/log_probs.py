"""Log-probabilities of a text's tokens, kept on the disk window by window, so that no window is scored twice.

A file belongs to one `identity`: everything that the numbers depend on and that is known before an engine is started.
A run whose windows are all there is recorded without starting an engine, and an interrupted run goes on where it was.
A window that a killed process left half written is dropped.

    {"identity": {...}, "engine": {...}}        the engine that computed them, as a run's header describes it
    <float32, little-endian>                    ln P of tokens 1 … n - 1 of window 0, then of window 1 …
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from harness.measure.answers import digest, open_alone

_FLOAT = np.dtype("<f4")
_ENGINE = ("name", "version", "device", "dtype", "served_as")


class LogProbs:
    """The log-probabilities of windows of `lengths` tokens, in a file of `folder` that is named after `name` and the
    digest of `identity`, and held by `with` (`open_alone`). `fresh` forgets the numbers in it."""

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
