"""The torch engine: transformers' own model class on a CPU or one accelerator, slow and readable.

Quantized weights are decoded once, at the end of loading, since compressed-tensors has no 4-bit matrix product; the
activations of a W4A4 checkpoint are quantized on every call. So this engine shows what NVFP4 loses, and not what it
gains in speed. `score` and `log_probs` compute logits in float32, `decode` with the model's own head.
"""

import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer
from transformers.cache_utils import DynamicCache

from harness.engines import torch_answers
from harness.engines.describing import describe, weight_bytes
from harness.engines.loading import load_model
from harness.engines.protocol import Answer, Choice, Chunk, Decoded, Memory, Prompt, Scored, Start
from harness.engines.torch_common import (
    ChunkedEngine,
    Head,
    batches_of_equals,
    out_of_memory,
    peak_memory,
    predictions,
    prepare_process,
    scoring,
)
from harness.errors import UserError


class TorchEngine(ChunkedEngine):
    """A checkpoint folder as a transformers model; see `protocol.Engine` for what its methods promise."""

    def __init__(self, folder: Path, start: Start) -> None:
        if start.options:
            raise UserError(f"The torch engine has no option '{next(iter(start.options))}'.", "Leave it out.")
        self._device = prepare_process(start.dtype, start.device)
        model = load_model(folder, start.dtype, self._device)
        self._folder = folder
        self._model: Any = model
        self._trunk: Any = model.get_decoder()
        self._head: Any = model.get_output_embeddings()
        info = describe("torch", model, folder, start.dtype, start.device, self._device)
        own = {
            "use_cache": {"score": False, "decode": True},
            "cache": "DynamicCache",
            "weight_bytes_resident": weight_bytes(model),
            "end_tokens": sorted(self._end_tokens),
        }
        self.info = replace(info, effective={**info.effective, **own})

    @torch.inference_mode()
    def score(self, windows: Sequence[Sequence[int]], batch_size: int) -> Iterator[NDArray[np.float64]]:
        """Log-probabilities, in nats, of tokens 1 … n - 1 of each window of n tokens, in order."""
        head = Head(self._head)
        for batch in batches_of_equals(windows, batch_size):
            with scoring(len(batch), len(batch[0])):
                targets = torch.tensor(batch, device=self._device)[:, 1:].flatten()
                hidden = self._hidden(batch)[:, :-1].flatten(0, 1)
                found = []
                step = head.rows_at_once
                for part, wanted in zip(torch.split(hidden, step), torch.split(targets, step), strict=True):
                    logits = head.logits(part)
                    found.append(logits.gather(1, wanted[:, None]).squeeze(1) - logits.logsumexp(dim=1))
                rows: NDArray[np.float64] = torch.cat(found).double().reshape(len(batch), -1).cpu().numpy()
            yield from rows

    @torch.inference_mode()
    def _chunks(self, windows: Sequence[Sequence[int]], batch_size: int) -> Iterator[Chunk]:
        head, done = Head(self._head), 0
        for batch in batches_of_equals(windows, batch_size):
            with scoring(len(batch), len(batch[0])):
                hidden = self._hidden(batch)
            for window, first, tables in predictions([hidden], [head]):
                yield Chunk(done + window, first, tables)
            done += len(batch)

    def _hidden(self, batch: list[Sequence[int]]) -> torch.Tensor:
        """The last hidden states [batch, n, width] of windows of n tokens."""
        ids = torch.tensor(batch, device=self._device)
        found: torch.Tensor = self._trunk(input_ids=ids, use_cache=False).last_hidden_state
        return found

    def decode(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Decoded:
        """Greedy continuation; the prefill gives the first new token, each step one more."""
        if num_tokens < 1 or len({len(prompt) for prompt in prompts}) != 1:
            raise ValueError("decode needs num_tokens >= 1 and prompts of one length")
        with (
            torch.inference_mode(),
            out_of_memory(
                f"Decoding {len(prompts)} × {len(prompts[0])} + {num_tokens} tokens", "Lower the batch or the prompt."
            ),
        ):
            ids = torch.tensor(prompts, device=self._device)  # [batch, prompt]
            cache = DynamicCache(config=self._trunk.config)
            tokens, seconds = [], []
            for _ in range(num_tokens):
                start = self._clock()
                hidden = self._trunk(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state
                # Only the last position's logits: the prompt's are never looked at.
                ids = self._head(hidden[:, -1:]).argmax(dim=-1)  # [batch, 1]
                seconds.append(self._clock() - start)
                tokens.append(ids)
            rows = torch.cat(tokens, dim=1).tolist()
        return Decoded(tuple(tuple(row) for row in rows), seconds[0], tuple(seconds[1:]))

    def choices(self, choices: Sequence[Choice], batch_size: int) -> Iterator[tuple[int, tuple[Scored, ...]]]:
        """See `torch_answers`; with float32 logits, as in `score`."""
        with out_of_memory(f"Scoring {batch_size} contexts at a time", "Lower the batch size."):
            yield from torch_answers.choices(self._trunk, Head(self._head).logits, choices, batch_size)

    def generate(self, prompts: Sequence[Prompt], batch_size: int) -> Iterator[tuple[int, Answer]]:
        """See `torch_answers`; with the model's own head, as in `decode`."""
        text = self._tokenizer.decode if any(prompt.stop for prompt in prompts) else str
        with out_of_memory(f"Answering {batch_size} prompts at a time", "Lower the batch size."):
            yield from torch_answers.generate(
                self._trunk, lambda hidden: self._head(hidden).float(), text, self._end_tokens, prompts, batch_size
            )

    @cached_property
    def _tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self._folder, local_files_only=True, trust_remote_code=False)

    @cached_property
    def _end_tokens(self) -> frozenset[int]:
        """What ends an answer: the tokens that the model's generation configuration names."""
        named = self._model.generation_config.eos_token_id
        return frozenset([named] if isinstance(named, int) else named or ())

    def _clock(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def memory(self) -> Memory:
        """The peaks since this engine began to load."""
        return peak_memory(self._device)

    def close(self) -> None:
        """Drop the model and hand its memory back."""
        self._model = self._trunk = self._head = None
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
