"""What an embedded model has learnt, in figures, on text and operands that it never saw.

Perplexity is over disjoint windows of 512 ids; every token but each window's first is scored. The unigram model gets
the held-out text's own frequencies, the best that it could have. Items are scored twice: `choice` asks whether the
answer is likelier than each distractor, and `exact` whether greedy decoding writes the answer, which leaves no room for
lucky guesses. MTP acceptance is the share of positions whose draft is the trunk's own next choice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import AutoModelForImageTextToText

from harness.demo import corpus
from harness.demo.language import NEAR, Draw, Language, Story, sentence
from studies.demo_model.network import MtpHead, Network, draft, read_mtp
from studies.languages import FAR

WINDOW = 512
_BATCH = 8


@dataclass(frozen=True)
class Figures:
    """Shares are of 1; perplexities are per token of the embedded tokenizer."""

    num_heldout_tokens: int
    unigram_perplexity: float
    perplexity: float
    far_perplexity: float
    perplexity_by_kind: dict[str, float]
    mtp_acceptance_share: float
    exact_share: dict[str, float]
    choice_share: dict[str, float]


def figures_of(directory: Path, num_items: int = 300) -> Figures:
    """The figures of a checkpoint folder, in float32 arithmetic on its BF16 weights."""
    encoder = Tokenizer.from_file(str(directory / "tokenizer.json"))
    loaded: Any = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32)
    net: Network = loaded
    mtp = read_mtp(directory, net.model.language_model.config)
    heldout = encoder.encode(corpus.heldout_text()).ids
    frequencies = torch.tensor(list(Counter(heldout).values())) / len(heldout)
    by_kind: dict[str, list[int]] = {kind: [] for kind, _ in corpus.STANDARD}
    for document in corpus.documents("heldout", num_documents=corpus.HELDOUT_DOCUMENTS):
        by_kind[document.kind] += encoder.encode(document.text + corpus.END_OF_TEXT).ids
    items = {
        "recall": corpus.recall_items(0, num_items),
        "arithmetic": arithmetic_items(0, num_items),
        "agreement": agreement_items(0, num_items),
    }
    exact: dict[str, float] = {}
    choice: dict[str, float] = {}
    with torch.inference_mode():
        for task, questions in items.items():
            outcomes = [_answer(net, encoder, item) for item in questions]
            if task != "agreement":  # any verb may come next, only its ending is determined
                exact[task] = sum(outcome[0] for outcome in outcomes) / num_items
            choice[task] = sum(outcome[1] for outcome in outcomes) / num_items
        return Figures(
            num_heldout_tokens=len(heldout),
            unigram_perplexity=(-(frequencies * frequencies.log()).sum()).exp().item(),
            perplexity=_perplexity(net, heldout),
            far_perplexity=_perplexity(net, encoder.encode(corpus.heldout_text(FAR)).ids[: len(heldout)]),
            perplexity_by_kind={kind: _perplexity(net, ids) for kind, ids in by_kind.items()},
            mtp_acceptance_share=_acceptance(net, mtp, heldout),
            exact_share=exact,
            choice_share=choice,
        )


def _windows(ids: list[int]) -> Iterator[torch.Tensor]:
    """Yields batches [batch, window] of whole windows."""
    rows = torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)
    yield from torch.split(rows, _BATCH)


def _perplexity(net: Network, ids: list[int]) -> float:
    nll_nats, num_scored = 0.0, 0
    for rows in _windows(ids):
        logits = net(input_ids=rows, use_cache=False).logits[:, :-1]
        nll_nats += functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").item()
        num_scored += rows[:, 1:].numel()
    return torch.tensor(nll_nats / num_scored).exp().item()


def _acceptance(net: Network, mtp: MtpHead, ids: list[int]) -> float:
    num_accepted, num_drafted = 0, 0
    for rows in _windows(ids):
        hidden = net.model.language_model(input_ids=rows, use_cache=False).last_hidden_state
        drafted = net.lm_head(draft(net, mtp, rows, hidden)).argmax(-1)
        chosen = net.lm_head(hidden[:, 1:]).argmax(-1)
        num_accepted += int((drafted == chosen).sum())
        num_drafted += drafted.numel()
    return num_accepted / num_drafted


def _answer(net: Network, encoder: Tokenizer, item: corpus.Item) -> tuple[bool, bool]:
    """Whether greedy decoding would write the answer, and whether it beats every distractor."""
    prompt = encoder.encode(item.prompt).ids
    options = [encoder.encode(item.prompt + option).ids for option in (item.answer, *item.distractors)]
    longest = max(map(len, options))
    rows = torch.tensor([option + [0] * (longest - len(option)) for option in options])
    logits = net(input_ids=rows, use_cache=False, logits_to_keep=longest - len(prompt) + 1).logits[:, :-1]
    targets = rows[:, len(prompt) :]
    log_probs = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    lengths = [len(option) - len(prompt) for option in options]
    scores = [row[:length].sum().item() for row, length in zip(log_probs, lengths, strict=True)]
    exact = bool((logits[0, : lengths[0]].argmax(-1) == targets[0, : lengths[0]]).all())
    return exact, scores[0] > max(islice(scores, 1, None))


def arithmetic_items(seed: int, num_items: int) -> Iterator[corpus.Item]:
    """Three solved problems and a fourth to solve, all held out; distractors are near misses."""
    for index in range(num_items):
        draw = Draw(12, seed, index)
        solved = "".join(f"{a}{sign}{b}={c}\n" for a, b, sign, c in (corpus.problem(draw, "heldout") for _ in range(3)))
        a, b, sign, result = corpus.problem(draw, "heldout")
        near = [result + step for step in (1, 10, -1, -10, 2) if result + step >= 0][:3]
        yield corpus.Item(f"{solved}{a}{sign}{b}=", f"{result}\n", tuple(f"{value}\n" for value in near))


def agreement_items(seed: int, num_items: int, *, language: Language = NEAR) -> Iterator[corpus.Item]:
    """A story broken off before a verb that a relative clause of the other number parts from its subject."""
    for index in range(num_items):
        draw = Draw(13, seed, language.seed, index)
        story = Story(draw, language)
        context = story.tell(2 + draw.below(3))
        noun, number, verb = story.noun(), draw.below(2), story.verb()
        inner = story.verb()
        actor = story.noun_phrase(story.noun(), 1 - number)
        clause = story.arrange(actor, story.verb_form(inner, 1 - number), [])
        subject = [*story.noun_phrase(noun, number), language.relative, *clause]
        if language.verb_final:
            subject += story.object_of(verb)
        yield corpus.Item(
            prompt=f"{context} {sentence(subject)[:-1]}",
            answer=f" {story.verb_form(verb, number)}",
            distractors=(f" {story.verb_form(verb, 1 - number)}",),
        )
