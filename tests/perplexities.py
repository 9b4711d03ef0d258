"""The samples of a protocol straight from an engine, with nothing kept."""

from collections.abc import Iterator, Sequence
from typing import Any

from harness.engines.protocol import Engine
from harness.measure.perplexity import Protocol, score, window_samples, windows
from harness.progress import Progress, silent


def protocol_samples(
    engine: Engine,
    ids: Sequence[int],
    protocol: Protocol,
    *,
    batch_size: int = 4,
    limit: int | None = None,
    progress: Progress = silent,
) -> Iterator[dict[str, Any]]:
    """A sample per window; `limit` scores the first windows only."""
    cut = windows(protocol, len(ids))[:limit]
    yield from window_samples(cut, score(engine, ids, cut, batch_size, name=protocol.name, progress=progress))
