"""Where two greedy generations part, and whether a tie explains it.

In bfloat16 the logits of two tokens may be equal or one step apart, and which of them an engine writes depends on the
order in which it adds. From there on the texts are different ones.
"""

from collections.abc import Sequence
from pathlib import Path

from harness.engines.protocol import open_engine

ROUNDING_NATS = 0.13
"""Logits of bfloat16 between 8 and 16 step by 1/16, and each of the two may be a step off."""


def parted(
    folder: Path, prompts: Sequence[Sequence[int]], one: Sequence[Sequence[int]], other: Sequence[Sequence[int]]
) -> list[str]:
    """Where generations from `prompts` part without a tie, in words: the torch engine says how far apart the two
    tokens are at the first place where they differ."""
    found = []
    for row, (prompt, left, right) in enumerate(zip(prompts, one, other, strict=True)):
        assert len(left) == len(right)
        place = next((place for place in range(len(left)) if left[place] != right[place]), None)
        if place is not None:
            gap = _gap(folder, [*prompt, *right[:place]], left[place], right[place])
            if gap > ROUNDING_NATS:
                found.append(f"row {row} parts at token {place}, where the two are {gap:.3f} nats apart")
    return found


def _gap(folder: Path, prompt: list[int], one: int, other: int) -> float:
    """How far apart two tokens are after `prompt`, in nats."""
    engine = open_engine("torch", folder, dtype="bfloat16", device="cpu")
    (table,) = engine.log_probs([[*prompt, 0]], 1)
    engine.close()
    return abs(float(table[-1, one] - table[-1, other]))
