"""Calibration sets of a few samples for the embedded models, and builds from them."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

from harness.demo import checkpoint_path, corpus
from harness.measure.perplexity import tokenize
from harness.quantize.artifact import Artifact
from harness.quantize.build import build
from harness.quantize.layerwise import CalibrationInput
from harness.quantize.recipes import RECIPES, Recipe
from harness.quantize.samples import CalibrationSet

LENGTHS = (128, 100, 128, 77)
"""Two of the samples are padded in batches of 256 tokens."""


@cache
def demo_ids(model: str) -> list[int]:
    text = "".join(document.text for document in corpus.documents("validation", num_documents=40))
    return tokenize(checkpoint_path(model), text)


def demo_calibration(
    model: str = "dense", *, lengths: tuple[int, ...] = LENGTHS, batch_tokens: int = 256, start: int = 0
) -> CalibrationInput:
    """Consecutive pieces of the corpus's validation text, the first at token `start`."""
    samples = []
    for length in lengths:
        samples.append(tuple(demo_ids(model)[start : start + length]))
        start += length
    read = CalibrationSet(tuple(samples), {"num_samples": len(samples)})
    return CalibrationInput(read, batch_tokens, hidden_bytes=10**8, device="cpu")


def recipe(name: str, scales: str | None = None, codes: str | None = None) -> Recipe:
    return RECIPES[name].with_method(scales, codes)


def build_demo(
    out: Path,
    what: Recipe,
    model: str = "dense",
    calibration: CalibrationInput | None = None,
    progress: Callable[[int, int, str], None] = lambda *_: None,
) -> Artifact:
    """`what` of an embedded model, calibrated where it needs that."""
    return build(checkpoint_path(model), what, out, progress, calibration or demo_calibration(model))
