"""What a measure may ask of an engine, and what an engine says of itself.

An engine holds one checkpoint in memory and answers questions about token ids. It gets no text, because a tokenizer's
version changes perplexity more than a quantization does. It reports its own times, which a batching engine knows best.
"""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from harness.errors import UserError, did_you_mean
from harness.sampling import GREEDY, Sampling


@dataclass(frozen=True)
class Registered:
    """An engine that can be opened by name. Its module is imported only then, since it may not be installed."""

    module: str
    class_name: str
    version: int
    """Raise it when the engine's code, or code that it computes with, gives other numbers than before: what is stored
    of an older version (log-probabilities, answers, reference packs, hidden states) is then computed anew."""


ENGINES = {
    "torch": Registered("harness.engines.torch_engine", "TorchEngine", version=1),
    "streamed": Registered("harness.engines.streamed", "StreamedEngine", version=1),
    "vllm": Registered("harness.engines.vllm_engine", "VllmEngine", version=1),
    "server": Registered("harness.engines.server_engine", "ServerEngine", version=1),
}

Purpose = Literal["score", "decode"]
"""What an engine start is for: probabilities want float32 logits, speeds the model as it is served."""


@dataclass(frozen=True)
class Start:
    """How an engine is to start on a checkpoint."""

    dtype: str = "bfloat16"
    """Of activations and of weights that are not quantized."""
    device: str = "auto"
    """`cpu`, `cuda` (or `cuda:1` …), or `auto`: the accelerator if there is one."""
    purpose: Purpose = "score"
    options: Mapping[str, Any] = field(default_factory=dict)
    """The engine's own, by name; the torch engine has none."""


class EngineDied(UserError):  # noqa: N818 - it is what happened
    """An engine that did not start, did not survive, or writes gibberish; `log` are the lines of its own that say why.
    `recorded`: its run's record says so already."""

    recorded = False

    def __init__(self, problem: str, remedy: str, log: Sequence[str] = ()) -> None:
        super().__init__(problem, remedy)
        self.log = tuple(log)


@dataclass(frozen=True)
class EngineInfo:
    """One engine start, as the results record it."""

    name: str
    version: str
    """The release of the library that computes, e.g. transformers' and torch's."""
    device: str
    """`cpu`, or the accelerator's own name."""
    dtype: str
    """Of activations and of weights that are not quantized: `bfloat16` or `float32`."""
    requested: Mapping[str, Any] = field(default_factory=dict)
    effective: Mapping[str, Any] = field(default_factory=dict)
    """What is really in force. Every engine states `weight_bytes_resident` (all weights in memory) and
    `weight_bytes_per_token` (those that one decoded token reads at batch 1), both in bytes."""
    kernels: Mapping[str, str] = field(default_factory=dict)
    """Layer kind -> what computed it."""
    served_as: str | None = None
    """The arithmetic that really runs, where the checkpoint says another: every table shows it beside the variant."""
    can_score: bool = True
    """Whether it tells how probable a text is; some servers do not."""
    warnings: tuple[str, ...] = ()
    """What these settings cost or fail to do, a sentence each."""

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts, for the results file; without `can_score`, which the measures ask."""
        found = asdict(self) | {"warnings": list(self.warnings)}
        del found["can_score"]
        return found


@dataclass(frozen=True)
class Drafts:
    """What speculative decoding proposed and kept. Mean accepted length is 1 + accepted / drafts."""

    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int


@dataclass(frozen=True)
class Decoded:
    """One greedy generation of a batch, with its times."""

    token_ids: tuple[tuple[int, ...], ...]
    """[batch][num_tokens]: new tokens only."""
    prefill_seconds: float
    """From the start until the first new token of the whole batch is known."""
    step_seconds: tuple[float, ...]
    """What came after the prefill: one for each further token of the whole batch, or one for all of them."""
    drafts: Drafts | None = None
    """None where nothing was speculated."""


@dataclass(frozen=True)
class Choice:
    """A context of at least one token, and continuations of it, each of at least one."""

    context: tuple[int, ...]
    options: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Scored:
    """How probable a continuation is."""

    log_prob: float
    """In nats, of all its tokens together."""
    greedy: bool
    """Whether the most probable token is the continuation's at every place."""


@dataclass(frozen=True)
class Chunk:
    """What some models predict at neighbouring places of one window."""

    window: int
    """The window's index."""
    first: int
    """Row i is the distribution after token first + i of the window."""
    log_probs: tuple[NDArray[np.float32], ...]
    """A natural-log distribution [rows, vocabulary] by model."""


@dataclass(frozen=True)
class Top:
    """The k most probable tokens after each of the first n - 1 tokens of a window of n."""

    ids: NDArray[np.int32]
    """[n - 1, k], the most probable first."""
    log_probs: NDArray[np.float32]
    """Of those, in nats."""
    actual: NDArray[np.float32]
    """[n - 1]: of the token that really follows."""


@dataclass(frozen=True)
class Prompt:
    """What is to be answered, and when the answer is over: after the end-of-text token, after `max_new_tokens`, or as
    soon as one of the texts in `stop` has been written."""

    token_ids: tuple[int, ...]
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    sampling: Sampling = GREEDY
    seed: int = 0
    """The same prompt, sampling and seed draw the same numbers, in whatever company."""


@dataclass(frozen=True)
class Answer:
    """The new tokens, those that stopped the answer included; `seconds` is its share of the time that all took, so
    that the sum over answers is the time of the run."""

    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]
    """`length`: it was cut off at `max_new_tokens`."""
    seconds: float


@dataclass(frozen=True)
class Memory:
    """The most memory held at once since the engine started, in bytes; None where there is no such memory."""

    peak_rss_bytes: int | None
    """Of the process that loaded the model, everything in it included."""
    peak_vram_bytes: int | None
    """Of the accelerator, as the engine's allocator counts it."""


class Engine(Protocol):
    """A checkpoint in memory."""

    info: EngineInfo
    """What runs, and how."""

    def score(self, windows: Sequence[Sequence[int]], batch_size: int) -> Iterator[NDArray[np.float64]]:
        """For each window of n token ids, in order, the natural-log probabilities [n - 1] of its tokens 1 … n - 1,
        each given all tokens before it in the window. Windows are batched only with windows of their own length:
        padding a recurrent model would change its state."""

    def log_probs(self, windows: Sequence[Sequence[int]], batch_size: int) -> Iterator[NDArray[np.float32]]:
        """For each window of n token ids, in order, the natural-log distributions [n - 1, vocabulary] after each of
        its first n - 1 tokens. One window's are in memory: 1 MB a token for a vocabulary of 248,320."""

    def top_log_probs(self, windows: Sequence[Sequence[int]], batch_size: int, num: int) -> Iterator[Top]:
        """Of each window, in order, the `num` most probable tokens at each place; all of a smaller vocabulary."""

    def decode(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Decoded:
        """Greedy continuation of a batch of equally long prompts by `num_tokens` each, with a real KV and state
        cache. The end-of-text token does not stop it: a speed needs a known length."""

    def choices(self, choices: Sequence[Choice], batch_size: int) -> Iterator[tuple[int, tuple[Scored, ...]]]:
        """(Its place, its options' probabilities) of each choice, as they are known; `batch_size` contexts at once."""

    def generate(self, prompts: Sequence[Prompt], batch_size: int) -> Iterator[tuple[int, Answer]]:
        """(Its place, the answer) of each prompt, as they end; `batch_size` at once unless the engine decides that."""

    def memory(self) -> Memory:
        """The peaks since this engine started."""

    def close(self) -> None:
        """Free the memory. The engine answers nothing after that."""


def open_engine(
    name: str,
    folder: Path,
    *,
    dtype: str = "bfloat16",
    device: str = "auto",
    purpose: Purpose = "score",
    options: Mapping[str, Any] | None = None,
) -> Engine:
    """Start the engine `name` on the checkpoint in `folder`; the rest as in `Start`."""
    if name not in ENGINES:
        raise UserError(f"There is no engine '{name}'.", did_you_mean(name, ENGINES))
    registered = ENGINES[name]
    engine_class = getattr(importlib.import_module(registered.module), registered.class_name)
    engine: Engine = engine_class(folder, Start(dtype, device, purpose, options or {}))
    return engine
