"""The distributions of several models, each in an engine of its own, as `measure.fidelity` takes them."""

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from harness.engines.protocol import Chunk


class Predictor(Protocol):
    """What gives distributions: an `Engine`, or what remembers an engine's."""

    def log_probs(self, windows: Sequence[Sequence[int]], batch_size: int) -> Iterator[NDArray[np.float32]]:
        """For each window of n token ids, in order, the natural-log probabilities [n - 1, vocabulary] of what
        follows its tokens 0 … n - 2."""


def chunks_of(predictors: Sequence[Predictor], windows: Sequence[Sequence[int]], batch_size: int) -> Iterator[Chunk]:
    """The distributions of several models, the reference first, window by window. The models go through the windows in
    step, so that only one batch of each is in memory."""
    walks = zip_longest(*(one.log_probs(windows, batch_size) for one in predictors))
    for index, found in enumerate(walks):
        if any(one is None for one in found):
            return
        yield Chunk(index, 0, tuple(found))
