"""A seeded corpus, on which the embedded models are trained and measured: the same bytes on every machine (`language`).

* **prose**: stories in an invented language.
* **arithmetic**: sums and differences of numbers below 100. A fixed share of the problems never occurs in training,
  not even as a step of another problem.
* **recall**: `key: value` lists and questions about them, at distances that a recurrent state forgets.
* **chat**: all three as conversations, rendered exactly as the chat template does, some with a thought.

Document `i` depends on nothing but (language, split, i). Items are questions with one right answer, for the embedded
tasks.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, count
from typing import Literal

from harness.demo.language import NEAR, Draw, Language, Story, lexicon, sentence

END_OF_TEXT = "<|endoftext|>"
HELDOUT_DOCUMENTS = 820
"""Number of documents in `heldout_text`: at least 100,000 tokens under the embedded tokenizer."""

Split = Literal["train", "validation", "heldout"]
_SPLITS: dict[Split, int] = {"train": 1, "validation": 2, "heldout": 3}


@dataclass(frozen=True)
class Document:
    """One independent text and the skill it shows."""

    kind: str
    text: str


_RESIDUES: dict[Split, range] = {"validation": range(1), "heldout": range(1, 3), "train": range(3, 16)}
_STEP_BOUND = 20
"""A problem of two smaller numbers is a step of other problems' thoughts, so it cannot be held out."""


def belongs(a: int, b: int, sign: str, split: Split) -> bool:
    """Whether the split has the problem `a sign b`: by a residue that scatters problems, and is the same for b+a."""
    if split != "train" and max(a, b) < _STEP_BOUND:
        return False
    low, high = sorted((a, b)) if sign == "+" else (a, b)
    mixed = low * low * 31 + high * high * 17 + low * high * 7 + low * 3 + high + (sign == "-")
    return mixed % 97 % 16 in _RESIDUES[split]


def problem(draw: Draw, split: Split) -> tuple[int, int, str, int]:
    """Draws a problem of the split: first operand, second operand, sign, result."""
    while True:
        sign = "+-"[draw.below(2)]
        bound = 10 if draw.chance(15) else 100
        a, b = draw.below(bound), draw.below(bound)
        if sign == "-" and a < b:
            a, b = b, a
        if belongs(a, b, sign, split):
            return a, b, sign, a + b if sign == "+" else a - b


def thought_of(a: int, b: int, sign: str) -> str:
    """The thought that solves `a sign b` as in school: units with a carry or a borrow, then tens."""
    (tens, units), (other_tens, other_units) = divmod(a, 10), divmod(b, 10)
    if sign == "+":
        low = units + other_units
        carry = low // 10
        return f"{units}+{other_units}={low}, {tens}+{other_tens}+{carry}={tens + other_tens + carry}"
    borrow = int(units < other_units)
    units += 10 * borrow
    low, high = units - other_units, tens - other_tens - borrow
    return f"{units}-{other_units}={low}, {tens}-{other_tens}-{borrow}={high}"


class PairList:
    """A recall list: distinct nouns as keys, and values that are all numbers below 90 or all nouns."""

    def __init__(self, draw: Draw, language: Language, num_pairs: int) -> None:
        keys = lexicon(language).nouns
        self.keys = [keys[i] for i in draw.distinct(len(keys), num_pairs)]
        if draw.chance(50):
            self.values = [str(value) for value in draw.distinct(90, num_pairs)]
        else:
            self.values = [keys[i] for i in draw.distinct(len(keys), num_pairs)]

    def lines(self) -> str:
        """The list as text, `key: value` on each line."""
        return "\n".join(f"{key}: {value}" for key, value in zip(self.keys, self.values, strict=True))


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; only an assistant's turn has a thought."""

    role: Literal["user", "assistant"]
    content: str
    thought: str = ""


def render_chat(messages: Sequence[Message]) -> str:
    """The messages as the chat template renders them: it shows thoughts only after the last question."""
    last_question = max(i for i, message in enumerate(messages) if message.role == "user")
    turns = []
    for i, message in enumerate(messages):
        think = f"<think>\n{message.thought}\n</think>\n\n" if message.role == "assistant" and i > last_question else ""
        turns.append(f"<|im_start|>{message.role}\n{think}{message.content}<|im_end|>\n")
    return "".join(turns)


def _prose(draw: Draw, language: Language, split: Split) -> str:
    return Story(draw, language).tell(4 + draw.below(14))


def _arithmetic(draw: Draw, language: Language, split: Split) -> str:
    problems = (problem(draw, split) for _ in range(6 + draw.below(16)))
    return "\n".join(f"{a}{sign}{b}={result}" for a, b, sign, result in problems)


def _recall(draw: Draw, language: Language, split: Split) -> str:
    pairs = PairList(draw, language, 4 + draw.below(draw.pick((8, 8, 24))))
    parts = [pairs.lines()]
    if draw.chance(30):
        parts.append(Story(draw, language).tell(2 + draw.below(6)))
    asked = draw.distinct(len(pairs.keys), min(len(pairs.keys), 4 + draw.below(8)))
    parts += [f"{pairs.keys[i]} -> {pairs.values[i]}" for i in asked]
    return "\n".join(parts)


def _prose_chat(draw: Draw, language: Language, split: Split) -> str:
    story = Story(draw, language)
    noun = story.topic.nouns[story.noun()]
    people = f" {language.both} ".join(story.people)
    question = f"Tell me of {people}: {noun}."
    answer = story.tell(3 + draw.below(8))
    return render_chat([Message("user", question), Message("assistant", answer)])


def _arithmetic_chat(draw: Draw, language: Language, split: Split) -> str:
    messages = []
    for _ in range(1 + draw.below(3)):
        a, b, sign, result = problem(draw, split)
        thought = thought_of(a, b, sign) if draw.chance(50) else ""
        messages += [Message("user", f"What is {a}{sign}{b}?"), Message("assistant", str(result), thought)]
    return render_chat(messages)


def _recall_chat(draw: Draw, language: Language, split: Split) -> str:
    pairs = PairList(draw, language, 4 + draw.below(12))
    asked = draw.distinct(len(pairs.keys), 1 + draw.below(4))
    messages = []
    for turn, i in enumerate(asked):
        question = f"What is {pairs.keys[i]}?"
        messages += [
            Message("user", question if turn else f"{pairs.lines()}\n{question}"),
            Message("assistant", pairs.values[i], f"{pairs.keys[i]}: {pairs.values[i]}" if draw.chance(50) else ""),
        ]
    return render_chat(messages)


Maker = Callable[[Draw, Language, Split], str]
"""Makes the text of one document."""
MAKERS: dict[str, Maker] = {
    "prose": _prose,
    "arithmetic": _arithmetic,
    "recall": _recall,
    "prose-chat": _prose_chat,
    "arithmetic-chat": _arithmetic_chat,
    "recall-chat": _recall_chat,
}
Mix = tuple[tuple[str, int], ...]
"""Kinds of documents, each with its weight."""
STANDARD: Mix = (
    ("prose", 28),
    ("arithmetic", 28),
    ("recall", 20),
    ("prose-chat", 6),
    ("arithmetic-chat", 10),
    ("recall-chat", 8),
)


def documents(
    split: Split,
    *,
    language: Language = NEAR,
    num_documents: int,
    first: int = 0,
    mix: Mix = STANDARD,
    makers: Mapping[str, Maker] = MAKERS,
) -> Iterator[Document]:
    """Documents `first`, `first + 1` … of a split, each an independent draw; `makers` make the kinds of the `mix`."""
    weights = tuple(accumulate(weight for _, weight in mix))
    for index in range(first, first + num_documents):
        draw = Draw(_SPLITS[split], language.seed, index)
        kind, _ = mix[draw.weighted(weights)]
        yield Document(kind, makers[kind](draw, language, split))


def split_text(split: Split, *, language: Language = NEAR, num_documents: int) -> str:
    """The first documents of a split as one string, each ended by `<|endoftext|>`."""
    return "".join(d.text + END_OF_TEXT for d in documents(split, language=language, num_documents=num_documents))


def heldout_text(language: Language = NEAR) -> str:
    """The text that perplexity is measured on: documents and operand pairs that no training set contains."""
    return split_text("heldout", language=language, num_documents=HELDOUT_DOCUMENTS)


@dataclass(frozen=True)
class Item:
    """A question with one right answer; `prompt + answer` is text like the corpus'."""

    prompt: str
    answer: str
    distractors: tuple[str, ...]

    def options(self, *key: int) -> tuple[list[str], int]:
        """The answer and the distractors in an order drawn from the key, and the answer's index."""
        given = (self.answer, *self.distractors)
        order = Draw(17, *key).distinct(len(given), len(given))
        return [given[i] for i in order], order.index(0)


def recall_items(seed: int, num_items: int, *, language: Language = NEAR) -> Iterator[Item]:
    """A list, two answered questions and a third to answer; distractors are other values of the list."""
    for index in range(num_items):
        draw = Draw(11, seed, language.seed, index)
        pairs = PairList(draw, language, 6 + draw.below(10))
        first, second, asked, *others = draw.distinct(len(pairs.keys), 6)
        shown = "\n".join(f"{pairs.keys[i]} -> {pairs.values[i]}" for i in (first, second))
        yield Item(
            prompt=f"{pairs.lines()}\n{shown}\n{pairs.keys[asked]} ->",
            answer=f" {pairs.values[asked]}",
            distractors=tuple(f" {pairs.values[i]}" for i in others),
        )


def sudden_arithmetic_items(seed: int, num_items: int, *, language: Language = NEAR) -> Iterator[Item]:
    """A story, then a held-out problem that no solved problem announces; distractors are near misses."""
    for index in range(num_items):
        draw = Draw(14, seed, language.seed, index)
        story = Story(draw, language).tell(1 + draw.below(4))
        a, b, sign, result = problem(draw, "heldout")
        near = [result + step for step in (1, 10, -1, -10, 2) if result + step >= 0]
        distractors = tuple(f"{near[i]}\n" for i in draw.distinct(len(near), 3))
        yield Item(f"{story}\n{a}{sign}{b}=", f"{result}\n", distractors)


def _acted_on(story: Story, number: int, others: int, depth: int) -> list[str]:
    """A noun that other nouns act on, on which other nouns act, and so on: clause inside clause."""
    phrase = story.noun_phrase(story.noun(), number)
    if not depth:
        return phrase
    actor = _acted_on(story, others, others, depth - 1)
    verb = story.verb_form(story.verb(), others)
    return [*phrase, story.language.relative, *story.arrange(actor, verb, [])]


def _acting(story: Story, number: int, others: int, depth: int) -> list[str]:
    """A noun that acts on another noun, which acts on another noun, and so on: clause after clause."""
    phrase = story.noun_phrase(story.noun(), number)
    if not depth:
        return phrase
    verb = story.verb_form(story.verb(), number)
    return [*phrase, story.language.relative, *story.arrange([], verb, _acting(story, others, others, depth - 1))]


def remote_agreement_items(seed: int, num_items: int, *, language: Language = NEAR) -> Iterator[Item]:
    """A story broken off before a verb far from its subject; every noun between the two has the other number.

    Half of the subjects have a relative clause inside their relative clause, deeper than any in training. The others
    have a chain of relative clauses, each about the object of the clause before it.
    """
    for index in range(num_items):
        draw = Draw(15, seed, language.seed, index)
        story = Story(draw, language)
        context = story.tell(2 + draw.below(3))
        number, verb = draw.below(2), story.verb()
        noun, depth = (_acted_on, 2) if draw.chance(50) else (_acting, 5 + draw.below(2))
        subject = noun(story, number, 1 - number, depth)
        if language.verb_final:
            subject += story.object_of(verb)
        yield Item(
            prompt=f"{context} {sentence(subject)[:-1]}",
            answer=f" {story.verb_form(verb, number)}",
            distractors=(f" {story.verb_form(verb, 1 - number)}",),
        )


def arithmetic_questions(seed: int, num_items: int) -> Iterator[Item]:
    """Questions of a user, before any chat template: the steps, then the question. All are different and held out.

    Without the steps the dense model answers one question in twelve, so few that a loss would not show.
    """
    asked: set[str] = set()
    for index in count():
        if len(asked) == num_items:
            return
        a, b, sign, result = problem(Draw(16, seed, index), "heldout")
        question = f"{thought_of(a, b, sign)}\nWhat is {a}{sign}{b}?"
        if question not in asked:
            asked.add(question)
            yield Item(question, str(result), ())
