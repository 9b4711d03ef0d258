"""The torch engine: transformers' own model class on a CPU or one accelerator. It is the reference, slow and readable.

compressed-tensors has no 4-bit matrix product: packed weights are decompressed to BF16, by default at the first forward
pass. This engine asks for `dequantize=True`, the same arithmetic at the end of loading: no first measurement pays for
it, the resident bytes can be counted, and the weights can be widened to float32 afterwards. The quantization scheme
stays on the module, so the *activations* of a W4A4 checkpoint are still quantized and decoded on every call. NVFP4
here shows what quantization loses, never what it gains in speed: a decode step reads the decompressed weights.

`score` and `log_probs` compute logits in float32 (see `heads`); `decode` uses the model's own head.
"""

import contextlib
import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer
from transformers.cache_utils import DynamicCache

from harness.engines import torch_answers
from harness.engines.describing import describe, weight_bytes
from harness.engines.heads import batches_of_equals, rows_at_once, top_of, wide_head, wide_logits
from harness.engines.loading import load_model
from harness.engines.process import out_of_memory, peak_memory, prepare_process
from harness.engines.protocol import Answer, Choice, Decoded, Engine, EngineInfo, Memory, Prompt, Scored, Start, Top
from harness.errors import UserError


class TorchEngine(Engine):
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
        self._info = replace(info, effective={**info.effective, **own})

    @property
    def info(self) -> EngineInfo:
        """What runs, and how."""
        return self._info

    def score(self, windows: Sequence[Sequence[int]], batch_size: int) -> Iterator[NDArray[np.float64]]:
        """Log-probabilities, in nats, of tokens 1 … n - 1 of each window of n tokens, in order."""
        weight = wide_head(self._head)
        for batch in batches_of_equals(windows, batch_size):
            with self._scoring(batch):
                targets = torch.tensor(batch, device=self._device)[:, 1:].flatten()
                found = torch.empty(len(targets), dtype=torch.float32, device=self._device)
                start = 0
                for logits in self._logits(batch, weight):
                    part = slice(start, start + len(logits))
                    target = logits.gather(1, targets[part, None]).squeeze(1)
                    found[part] = target - logits.logsumexp(dim=1)
                    start += len(logits)
                rows: NDArray[np.float64] = found.double().reshape(len(batch), -1).cpu().numpy()
            yield from rows

    def log_probs(self, windows: Sequence[Sequence[int]], batch_size: int) -> Iterator[NDArray[np.float32]]:
        """Log-distributions [n - 1, vocabulary], in nats, after the first n - 1 tokens of each window, in order."""
        weight = wide_head(self._head)
        for batch in batches_of_equals(windows, batch_size):
            shape = (len(batch[0]) - 1, self._head.weight.shape[0])
            chunks = self._logits(batch, weight)
            left = np.empty((0, shape[1]), np.float32)  # of the last chunk, rows of the next window
            for _ in batch:
                with self._scoring(batch):
                    table, filled = np.empty(shape, np.float32), 0
                    while filled < len(table):
                        if not len(left):
                            logits = next(chunks)
                            left = (logits - logits.logsumexp(dim=1, keepdim=True)).cpu().numpy()
                        taken = left[: len(table) - filled]
                        table[filled : filled + len(taken)] = taken
                        filled, left = filled + len(taken), left[len(taken) :]
                yield table

    def top_log_probs(self, windows: Sequence[Sequence[int]], batch_size: int, num: int) -> Iterator[Top]:
        """The most probable tokens at each place of each window, in order; of equal ones the lowest id first."""
        for window, table in zip(windows, self.log_probs(windows, batch_size), strict=True):
            yield top_of(window, table, num)

    def _logits(self, batch: list[Sequence[int]], weight: torch.Tensor | None) -> Iterator[torch.Tensor]:
        """Float32 logits [rows, vocabulary] after each token but the last of each window of equal length, windows one
        after another, some rows at a time."""
        ids = torch.tensor(batch, device=self._device)  # [batch, n]
        hidden = self._trunk(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]  # [batch, n - 1, width]
        hidden = hidden.flatten(0, 1)
        for part in hidden.split(rows_at_once(self._head)) if len(hidden) else ():
            yield wide_logits(part, self._head, weight)

    @contextlib.contextmanager
    def _scoring(self, batch: list[Sequence[int]]) -> Iterator[None]:
        with (
            torch.inference_mode(),
            out_of_memory(f"Scoring {len(batch)} windows of {len(batch[0])} tokens", "Lower the batch size."),
        ):
            yield

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
        logits = partial(wide_logits, head=self._head, weight=wide_head(self._head))
        with out_of_memory(f"Scoring {batch_size} contexts at a time", "Lower the batch size."):
            yield from torch_answers.choices(self._trunk, logits, choices, batch_size)

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
