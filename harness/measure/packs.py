"""Reference packs: what a source predicts, kept on the disk to compare a variant with it when the source is not loaded.

An engine that serves needs all memory for one model, so the source is gone when the variant is measured. A pack belongs
to one source, one engine and one text, which are its `identity`. Its file gets its name when it is whole:

    {"identity": {...}, "num": 64}                  a line of JSON; num is k
    ids, log_probs, actual of window 0              little-endian int32 [n - 1, k], float32 [n - 1, k], float32 [n - 1]
    ids, log_probs, actual of window 1 ...
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.engines.protocol import Top
from harness.errors import UserError
from harness.measure.answers import digest

_ITEM = 4  # bytes of an id, and of a log-probability


@dataclass(frozen=True)
class Pack:
    """A pack on the disk, which names `num` tokens at each place. `reused`: it was there before this command."""

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
