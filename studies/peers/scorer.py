"""One run in a race of scorers: a job in, a result out.

    python -m studies.peers.scorer JOB.json

The time begins with the loading of the first model and ends with the last score. The libraries are imported before it,
but for what transformers imports only once it knows the class of a model. Both ways compute in float32 on the CPU. The
job is a JSON object:

    way             "streamed" for one pass over all models, "separate" for the torch engine on one after the other
    models          {name: checkpoint folder}, the source's first
    windows         lists of token ids
    batch_size      windows in a forward pass
    scratch         the folder for the hidden states of a streamed pass
    result          the file for what was measured, written last: without it the job has failed

and the result {"seconds", "num_items", "num_requests", "scores", "peak_rss_bytes", "packages": {name: version}}: items
are windows × models, requests scored tokens of all models, and scores {model: mean negative log-likelihood of a token,
in nats}.
"""

import json
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.engines.protocol import Memory, Start
from harness.engines.streamed import Streamed
from harness.engines.torch_engine import TorchEngine
from harness.record import provenance

Rows = dict[str, list[NDArray[np.floating[Any]]]]
"""By model: pieces of the log-probabilities, in nats, of all tokens but each window's first, in order."""

_DTYPE, _DEVICE = "float32", "cpu"


def main(arguments: list[str]) -> None:
    """Runs the job in the file that the only argument names."""
    job = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    score = {"streamed": _streamed, "separate": _separate}[job["way"]]
    start = time.perf_counter()
    rows, peaks = score(job)
    seconds = time.perf_counter() - start
    log_probs = {name: np.concatenate(pieces).astype(np.float64) for name, pieces in rows.items()}
    result = {
        "seconds": seconds,
        "num_items": len(job["windows"]) * len(log_probs),
        "num_requests": sum(len(one) for one in log_probs.values()),
        "scores": {name: -float(one.mean()) for name, one in log_probs.items()},
        "peak_rss_bytes": max(peak.peak_rss_bytes or 0 for peak in peaks),
        "packages": provenance.packages(),
    }
    Path(job["result"]).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _streamed(job: dict[str, Any]) -> tuple[Rows, list[Memory]]:
    windows = job["windows"]
    streamed = Streamed([Path(folder) for folder in job["models"].values()], dtype=_DTYPE, device=_DEVICE)
    rows: Rows = {name: [] for name in job["models"]}
    for chunk in streamed.log_probs(windows, job["batch_size"], scratch=Path(job["scratch"])):
        first = chunk.first + 1
        for pieces, table in zip(rows.values(), chunk.log_probs, strict=True):
            pieces.append(table[np.arange(len(table)), windows[chunk.window][first : first + len(table)]])
    return rows, [streamed.memory()]


def _separate(job: dict[str, Any]) -> tuple[Rows, list[Memory]]:
    rows: Rows = {}
    peaks = []
    for name, folder in job["models"].items():
        with closing(TorchEngine(Path(folder), Start(_DTYPE, _DEVICE))) as engine:
            rows[name] = list(engine.score(job["windows"], job["batch_size"]))
            peaks.append(engine.memory())
    return rows, peaks


if __name__ == "__main__":
    main(sys.argv[1:])
