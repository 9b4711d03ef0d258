"""Batches of unequal texts on a transformers model: continuations scored, prompts answered.

Padding on the left is exact, because transformers zeroes the hidden states of masked positions before every DeltaNet
layer. Padding on the right would change the states, so only tails of continuations, after which nothing is read, are
padded there. The context of a choice is read once, and its cache and states are copied for each option.
"""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicCache

from harness.engines.protocol import Answer, Choice, Prompt, Scored
from harness.sampling import Sampling

Logits = Callable[[torch.Tensor], torch.Tensor]
"""Hidden states [rows, width] to float32 logits [rows, vocabulary]."""
Text = Callable[[Sequence[int]], str]
"""Token ids to their text."""

LOGITS_BYTES = 2**27
"""Logits alive at once while scoring. A vocabulary of 248,320 takes 1 MB of float32 per token."""
_PAD = 0  # any token: it is masked, or nothing after it is read
_STEPPED_TOKENS = 8
"""So few more tokens are read one by one: DeltaNet's chunked form computes 64 whatever their number."""
_TAIL_TOKENS = 8
"""How many more tokens than a stop text has characters are looked at: one may stand for no character at all."""


@torch.inference_mode()
def choices(
    trunk: Any, logits: Logits, wanted: Sequence[Choice], batch_size: int
) -> Iterator[tuple[int, tuple[Scored, ...]]]:
    """See `protocol.Engine.choices`; the longest contexts come first, so that what does not fit fails at once."""
    order = sorted(range(len(wanted)), key=lambda place: -len(wanted[place].context))
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        yield from zip(places, _scored(trunk, logits, [wanted[place] for place in places], batch_size), strict=True)


def _scored(trunk: Any, logits: Logits, batch: list[Choice], batch_size: int) -> list[tuple[Scored, ...]]:
    """The probabilities of all options of a batch of contexts."""
    read = _Read.of(trunk, [choice.context for choice in batch])
    first = torch.log_softmax(logits(read.hidden), dim=1)  # [batch, vocabulary]
    best = first.argmax(dim=1).tolist()
    found = [
        [Scored(first[row, option[0]].item(), best[row] == option[0]) for option in choice.options]
        for row, choice in enumerate(batch)
    ]
    tails = [
        (row, place, option)
        for row, choice in enumerate(batch)
        for place, option in enumerate(choice.options)
        if len(option) > 1
    ]
    tails.sort(key=lambda tail: -len(tail[2]))
    rows_at_once = max(1, LOGITS_BYTES // (4 * first.shape[1]))
    for start in range(0, len(tails), batch_size):
        part = tails[start : start + batch_size]
        hidden = read.rows([row for row, _, _ in part]).extended([option[:-1] for _, _, option in part])
        for (row, place, option), states in zip(part, hidden, strict=True):
            before = found[row][place]
            after = _tail(logits, states[: len(option) - 1], option[1:], rows_at_once)
            found[row][place] = Scored(before.log_prob + after.log_prob, before.greedy and after.greedy)
    return [tuple(one) for one in found]


def _tail(logits: Logits, states: torch.Tensor, tokens: Sequence[int], rows_at_once: int) -> Scored:
    """The probability of each token after its hidden state [tokens, width], some rows of logits at a time."""
    targets = torch.tensor(tokens, device=states.device)
    log_prob, greedy = 0.0, True
    for start in range(0, len(tokens), rows_at_once):
        wanted = targets[start : start + rows_at_once]
        table = torch.log_softmax(logits(states[start : start + rows_at_once]), dim=1)  # [rows, vocabulary]
        log_prob += table.gather(1, wanted[:, None]).double().sum().item()
        greedy = greedy and bool((table.argmax(dim=1) == wanted).all())
    return Scored(log_prob, greedy)


@dataclass
class _Read:
    """A batch of texts that the model has read: the last hidden states [batch, width], the cache, and what of it is no
    padding [batch, length]."""

    trunk: Any
    hidden: torch.Tensor
    cache: Any
    mask: torch.Tensor

    @classmethod
    def of(cls, trunk: Any, texts: Sequence[Sequence[int]]) -> "_Read":
        """Reads texts from their beginning, padded on the left."""
        device = next(trunk.parameters()).device
        longest = max(map(len, texts))
        ids = torch.tensor([[_PAD] * (longest - len(text)) + list(text) for text in texts], device=device)
        lengths = torch.tensor([len(text) for text in texts], device=device)
        mask = (torch.arange(longest, device=device) >= longest - lengths[:, None]).long()
        read = cls(trunk, torch.empty(0), DynamicCache(config=trunk.config), mask[:, :0])
        read._read(ids, mask)
        return read

    def rows(self, rows: Sequence[int]) -> "_Read":
        """The same texts in other rows: some left out, some several times. Nothing is shared with this batch."""
        index = torch.tensor(rows, device=self.mask.device)
        cache = copy.copy(self.cache)
        cache.layers = []
        for layer in self.cache.layers:
            mine = copy.copy(layer)
            for name, value in vars(layer).items():
                if isinstance(value, dict):  # the states of a linear layer, by number
                    setattr(mine, name, dict(value))
            mine.reorder_cache(index)  # makes new tensors of the rows that it selects
            cache.layers.append(mine)
        return _Read(self.trunk, self.hidden[index], cache, self.mask[index])

    def extended(self, texts: Sequence[Sequence[int]]) -> torch.Tensor:
        """The hidden states [batch, longest text, width] of texts that go on, padded on the right: the cache is of no
        use afterwards unless all are equally long."""
        longest = max(map(len, texts))
        device = self.mask.device
        ids = torch.tensor([list(text) + [_PAD] * (longest - len(text)) for text in texts], device=device)
        at_once = 1 if longest <= _STEPPED_TOKENS else longest
        parts = torch.split(ids, at_once, dim=1)
        return torch.cat([self._read(part, torch.ones_like(part)) for part in parts], dim=1)

    def _read(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The hidden states [batch, tokens, width] of more tokens [batch, tokens] of every text, those that `mask` has
        no padding."""
        self.mask = torch.cat([self.mask, mask], dim=1)
        positions = (self.mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        states: torch.Tensor = self.trunk(
            input_ids=ids, attention_mask=self.mask, position_ids=positions, past_key_values=self.cache, use_cache=True
        ).last_hidden_state
        self.hidden = states[:, -1]
        return states


@dataclass
class _Row:
    """An answer that is being written."""

    place: int
    prompt: Prompt
    generator: torch.Generator
    written: list[int] = field(default_factory=list)
    seconds: float = 0.0


@torch.inference_mode()
def generate(
    trunk: Any, logits: Logits, text: Text, end_tokens: frozenset[int], prompts: Sequence[Prompt], batch_size: int
) -> Iterator[tuple[int, Answer]]:
    """See `protocol.Engine.generate`. Prompts of about one length are answered together, the longest first; an answer
    that ends leaves the batch."""
    order = sorted(range(len(prompts)), key=lambda place: (-len(prompts[place].token_ids), place))
    for start in range(0, len(order), batch_size):
        yield from _answers(trunk, logits, text, end_tokens, prompts, order[start : start + batch_size])


def _answers(
    trunk: Any, logits: Logits, text: Text, end_tokens: frozenset[int], prompts: Sequence[Prompt], places: list[int]
) -> Iterator[tuple[int, Answer]]:
    rows = [_Row(place, prompts[place], torch.Generator().manual_seed(prompts[place].seed)) for place in places]
    began = time.perf_counter()
    read = _Read.of(trunk, [row.prompt.token_ids for row in rows])
    while rows:
        for row, scores in zip(rows, logits(read.hidden), strict=True):
            row.written.append(_chosen(row, scores))
        now = time.perf_counter()
        for row in rows:
            row.seconds += (now - began) / len(rows)
        reasons = [_over(row, text, end_tokens) for row in rows]
        for row, reason in zip(rows, reasons, strict=True):
            if reason is not None:
                yield row.place, Answer(tuple(row.written), reason, row.seconds)
        going_on = [number for number, reason in enumerate(reasons) if reason is None]
        if not going_on:
            return
        if len(going_on) < len(rows):
            read, rows = read.rows(going_on), [rows[number] for number in going_on]
        began = time.perf_counter()  # what the caller did with the answers is not theirs
        read.extended([row.written[-1:] for row in rows])


def _over(row: _Row, text: Text, end_tokens: frozenset[int]) -> Any:
    """Why an answer is over; None while it is not."""
    if row.written[-1] in end_tokens:
        return "stop"
    if row.prompt.stop:
        tail = text(row.written[-(max(map(len, row.prompt.stop)) + _TAIL_TOKENS) :])
        if any(stop in tail for stop in row.prompt.stop):
            return "stop"
    return "length" if len(row.written) == row.prompt.max_new_tokens else None


def _chosen(row: _Row, logits: torch.Tensor) -> int:
    """The next token of an answer, from its logits [vocabulary]."""
    sampling = row.prompt.sampling
    scores = _penalized(row, logits)
    if sampling.temperature == 0:
        return int(scores.argmax())
    ids = torch.tensor([row.written], dtype=torch.long, device=scores.device)
    warpers: Any = LogitsProcessorList(_warpers(sampling))  # typed for classes of tensors that torch has no more
    warped: torch.Tensor = warpers(ids, scores[None])[0]
    return int(torch.multinomial(warped.softmax(dim=0).cpu(), 1, generator=row.generator))


def _penalized(row: _Row, logits: torch.Tensor) -> torch.Tensor:
    sampling = row.prompt.sampling
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor([[*row.prompt.token_ids, *row.written]], device=logits.device)
        penalty: Any = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)
        logits = penalty(seen, logits[None])[0]
    if sampling.presence_penalty and row.written:
        logits = logits.clone()
        logits[list(set(row.written))] -= sampling.presence_penalty
    return logits


def _warpers(sampling: Sampling) -> list[Any]:
    """transformers' own, in its order."""
    warpers: list[Any] = [TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    return warpers
