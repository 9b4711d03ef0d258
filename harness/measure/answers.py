"""Journals of an engine's answers, written to the disk as they come, so that no request is answered twice.

A journal belongs to one checkpoint's content, one engine and one version of a task, which are its `identity`. The key
of a request is the digest of everything that the answer depends on: token ids, stop texts, sampling, seed. A last line
that a killed process left half written is dropped.

    {"identity": {...}}                                     the first line
    {"key": "<sha256>", "value": {...}}                     an answer, written as soon as it is known
"""

import fcntl
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Self

from harness.errors import UserError


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
    (`open_alone`). `fresh` forgets the answers in it."""

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
