"""Documents of the embedded models' lm-eval tasks, the same on every machine.

lm-eval calls each public function with the task's metadata and dataset arguments, which change nothing: seeds and sizes
are fixed, so that two results of one version of a task are about the same documents. Every task has a seed of its own,
so no two tasks share a document.

A task's digest covers the source text of its function, docstring included: with other words here, new records of the
task cannot be compared with the committed records.
"""

from __future__ import annotations

from collections.abc import Iterable

from datasets import Dataset  # type: ignore[import-untyped]

from harness.demo import corpus

NUM_ITEMS = 300
NUM_QUESTIONS = 200
"""Fewer than items: in chat form, with a thought, an answer takes many steps of decoding."""


def recall_choice(**_: object) -> dict[str, Dataset]:
    """A list, two answered questions, a third: which of the list's values answers it."""
    items = corpus.recall_items(1, NUM_ITEMS)
    # Without the line's end, 3 would be likelier than 35 wherever 35 is right.
    ended = (
        corpus.Item(item.prompt, f"{item.answer}\n", tuple(f"{one}\n" for one in item.distractors)) for item in items
    )
    return _choices(1, ended)


def recall(**_: object) -> dict[str, Dataset]:
    """A list, two answered questions, a third to answer."""
    return _answers(corpus.recall_items(2, NUM_ITEMS))


def arithmetic_choice(**_: object) -> dict[str, Dataset]:
    """A story, then a problem: which of four near numbers is the result."""
    return _choices(3, corpus.sudden_arithmetic_items(3, NUM_ITEMS))


def arithmetic(**_: object) -> dict[str, Dataset]:
    """A story, then a problem to solve."""
    return _answers(corpus.sudden_arithmetic_items(4, NUM_ITEMS))


def agreement(**_: object) -> dict[str, Dataset]:
    """A story broken off before a verb far from its subject: singular or plural."""
    return _choices(5, corpus.remote_agreement_items(5, NUM_ITEMS))


def arithmetic_chat(**_: object) -> dict[str, Dataset]:
    """A user's question; the chat template makes the prompt of it."""
    return _answers(corpus.arithmetic_questions(6, NUM_QUESTIONS))


def _answers(items: Iterable[corpus.Item]) -> dict[str, Dataset]:
    return {"test": Dataset.from_list([{"prompt": item.prompt, "answer": item.answer.strip()} for item in items])}


def _choices(seed: int, items: Iterable[corpus.Item]) -> dict[str, Dataset]:
    documents = []
    for index, item in enumerate(items):
        choices, place = item.options(seed, index)
        documents.append({"prompt": item.prompt, "choices": choices, "answer": place})
    return {"test": Dataset.from_list(documents)}
