"""The streamed scorer as an engine: one checkpoint, which only scores texts."""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from harness.engines.heads import top_of
from harness.engines.protocol import (
    Answer,
    Choice,
    Chunk,
    Decoded,
    Engine,
    EngineInfo,
    Memory,
    Prompt,
    Scored,
    Start,
    Top,
)
from harness.engines.streamed import Streamed
from harness.errors import UserError


class StreamedEngine(Engine):
    """One checkpoint that only scores, larger than memory if need be. Its hidden states lie in the system's folder for
    temporary files (`TMPDIR` names another) and are gone after each call."""

    def __init__(self, folder: Path, start: Start) -> None:
        if start.options:
            raise UserError(f"The streamed engine has no option '{next(iter(start.options))}'.", "Leave it out.")
        self._streamed = Streamed([folder], dtype=start.dtype, device=start.device)

    @property
    def info(self) -> EngineInfo:
        """What runs, and how."""
        return self._streamed.infos[0]

    def score(self, windows: Sequence[Sequence[int]], batch_size: int) -> Iterator[NDArray[np.float64]]:
        """Log-probabilities, in nats, of tokens 1 … n - 1 of each window of n tokens, in order; the first after all
        windows went through all layers."""
        found: list[NDArray[np.float32]] = []
        for chunk in self._chunks(windows, batch_size):
            (table,), first = chunk.log_probs, chunk.first + 1
            found.append(table[np.arange(len(table)), windows[chunk.window][first : first + len(table)]])
            if chunk.first + len(table) == len(windows[chunk.window]) - 1:
                yield np.concatenate(found).astype(np.float64)
                found.clear()

    def log_probs(self, windows: Sequence[Sequence[int]], batch_size: int) -> Iterator[NDArray[np.float32]]:
        """Log-distributions [n - 1, vocabulary], in nats, after the first n - 1 tokens of each window, in order."""
        table = np.empty((0, 0), np.float32)
        for chunk in self._chunks(windows, batch_size):
            if chunk.first == 0:
                table = np.empty((len(windows[chunk.window]) - 1, self._streamed.vocabulary), np.float32)
            (rows,) = chunk.log_probs
            table[chunk.first : chunk.first + len(rows)] = rows
            if chunk.first + len(rows) == len(table):
                yield table

    def top_log_probs(self, windows: Sequence[Sequence[int]], batch_size: int, num: int) -> Iterator[Top]:
        """The most probable tokens at each place of each window, in order; of equal ones the lowest id first."""
        for window, table in zip(windows, self.log_probs(windows, batch_size), strict=True):
            yield top_of(window, table, num)

    def _chunks(self, windows: Sequence[Sequence[int]], batch_size: int) -> Iterator[Chunk]:
        with tempfile.TemporaryDirectory(prefix="harness-streamed-", ignore_cleanup_errors=True) as scratch:
            yield from self._streamed.log_probs(windows, batch_size, scratch=Path(scratch) / "states")

    def decode(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Decoded:
        """Not to be had: each new token would read the whole checkpoint."""
        raise _only_scores()

    def choices(self, choices: Sequence[Choice], batch_size: int) -> Iterator[tuple[int, tuple[Scored, ...]]]:
        """Not to be had."""
        raise _only_scores()

    def generate(self, prompts: Sequence[Prompt], batch_size: int) -> Iterator[tuple[int, Answer]]:
        """Not to be had."""
        raise _only_scores()

    def memory(self) -> Memory:
        """The peaks since this engine began to load."""
        return self._streamed.memory()

    def close(self) -> None:
        """Nothing is in memory, or on the disk, but during a call."""


def _only_scores() -> UserError:
    return UserError("The streamed engine only scores texts.", "Use the torch or the vLLM engine.")
