"""A seeded corpus: the same bytes on every machine and every Python from 3.11 on.

The embedded models are trained and measured on text made here, so nothing has to be downloaded and a
perplexity can be recomputed anywhere. Two rules make the bytes stable: chance comes only from
`random.Random(int).random()`, the one method whose stream Python guarantees, and everything derived from it
is integer arithmetic, never `choice`, `shuffle`, libm or the iteration order of a set.

Four skills are in the text, each needing another part of a hybrid model:

* **prose** from a probabilistic grammar over an invented Zipfian lexicon. Verbs agree in number with a
  subject that a relative clause may have pushed far away, pronouns agree with the gender of a name, people
  go home to the place named at the start, and a document keeps to one topic. Verbs like some objects, nouns
  like some adjectives: facts that only weights can hold.
* **arithmetic**: sums and differences of numbers below 100. A fixed share of the problems never occurs in
  training, not even as a step of another.
* **recall**: `key: value` lists and questions about them, at distances that a recurrent state forgets.
* **chat**: all three as conversations, rendered exactly as the chat template does, some with a thought.

`NEAR` is the language the models are trained on. `FAR` has other words and another word order and is never
trained on: text foreign to the model, made by the same process. Documents are independent draws: document
`i` depends on nothing but (language, split, i), so any prefix of a split is stable.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, count
from typing import Literal, TypeVar

END_OF_TEXT = "<|endoftext|>"
HELDOUT_DOCUMENTS = 820
"""Documents in `heldout_text`: at least 100,000 tokens under the demo tokenizer."""

_T = TypeVar("_T")
Split = Literal["train", "validation", "heldout"]
_SPLITS: dict[Split, int] = {"train": 1, "validation": 2, "heldout": 3}


@dataclass(frozen=True)
class Language:
    """A grammar and the sounds its lexicon is made of; the words themselves follow from `seed`."""

    name: str
    seed: int
    onsets: tuple[str, ...]
    nuclei: tuple[str, ...]
    codas: tuple[str, ...]
    verb_final: bool
    """Subject object verb, prepositions after their noun; otherwise subject verb object."""
    modifiers_follow: bool
    """Article and adjective come after the noun."""
    plural: str
    verb_endings: tuple[str, str]
    """Singular, plural: of equal length, so that neither form is a prefix of the other."""
    article: str
    relative: str
    both: str
    when: str
    because: str
    lives_in: tuple[str, str]
    returns_to: tuple[str, str]
    pronouns: tuple[str, str, str]
    """Masculine, feminine, plural."""
    num_topics: int = 16


NEAR = Language(
    name="near",
    seed=11,
    onsets=("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "br", "st", "tr"),
    nuclei=("a", "e", "i", "o", "u"),
    codas=("", "", "", "", "l", "n", "r", "m"),
    verb_final=False,
    modifiers_follow=False,
    plural="s",
    verb_endings=("es", "en"),
    article="the",
    relative="that",
    both="and",
    when="when",
    because="because",
    lives_in=("lives", "in"),
    returns_to=("returns", "to"),
    pronouns=("he", "she", "they"),
)
FAR = Language(
    name="far",
    seed=23,
    onsets=("ch", "h", "j", "w", "y", "z", "sh", "th", "k", "m", "n", "v", "kw", "sk", "fl"),
    nuclei=("a", "o", "u", "y", "ea"),
    codas=("", "", "", "k", "p", "f", "x", "sk"),
    verb_final=True,
    modifiers_follow=True,
    plural="im",
    verb_endings=("ak", "ud"),
    article="eth",
    relative="zu",
    both="ja",
    when="wo",
    because="kwer",
    lives_in=("haltak", "ni"),
    returns_to=("vendak", "cha"),
    pronouns=("oth", "ath", "uth"),
)


@dataclass(frozen=True)
class Document:
    """One independent text and the skill it shows."""

    kind: str
    text: str


@dataclass(frozen=True)
class Item:
    """A question with one right continuation; `prompt + answer` is text of the corpus' kind."""

    prompt: str
    answer: str
    distractors: tuple[str, ...]

    def options(self, *key: int) -> tuple[list[str], int]:
        """Answer and distractors in an order drawn from the key, and the answer's place in it."""
        given = (self.answer, *self.distractors)
        order = _Draw(17, *key).distinct(len(given), len(given))
        return [given[i] for i in order], order.index(0)


class _Draw:
    """Chance, and the few ways in which the generator uses it."""

    def __init__(self, *key: int) -> None:
        seed = 0
        for part in key:
            seed = seed * 1_000_003 + part + 1
        self._random = random.Random(seed).random

    def below(self, bound: int) -> int:
        return int(self._random() * bound)

    def chance(self, percent: int) -> bool:
        return self._random() * 100 < percent

    def pick(self, options: Sequence[_T]) -> _T:
        return options[int(self._random() * len(options))]

    def zipf(self, cumulative: Sequence[int]) -> int:
        """A rank, by cumulative integer weights."""
        return bisect_right(cumulative, int(self._random() * cumulative[-1]))

    def distinct(self, bound: int, count: int) -> list[int]:
        """`count` different numbers below `bound`, in the order drawn."""
        pool = list(range(bound))
        for i in range(count):
            j = i + int(self._random() * (bound - i))
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:count]


@dataclass(frozen=True)
class _Topic:
    """The content words that a document of this topic may use, most frequent first."""

    nouns: tuple[str, ...]
    verbs: tuple[str, ...]
    adjectives: tuple[str, ...]


@dataclass(frozen=True)
class _Lexicon:
    topics: tuple[_Topic, ...]
    adverbs: tuple[str, ...]
    men: tuple[str, ...]
    women: tuple[str, ...]
    places: tuple[str, ...]
    keys: tuple[str, ...]
    """All nouns, of every topic: what recall lists are made of."""


def _cumulative_zipf(size: int) -> tuple[int, ...]:
    return tuple(accumulate(1_000_000 // (rank + 2) for rank in range(size)))


_ZIPF = {size: _cumulative_zipf(size) for size in (16, 24, 40)}
_NUM_NOUNS, _NUM_VERBS, _NUM_ADJECTIVES = 40, 24, 16


@cache
def _lexicon(language: Language) -> _Lexicon:
    """Words of one to three syllables, all different, each word class in order of falling frequency."""
    draw = _Draw(language.seed)
    taken = {language.article, language.relative, language.both, language.when, language.because}
    taken.update(language.lives_in + language.returns_to + language.pronouns)

    def syllable() -> str:
        return draw.pick(language.onsets) + draw.pick(language.nuclei) + draw.pick(language.codas)

    def words(count: int, long_from: int) -> tuple[str, ...]:
        made: list[str] = []
        while len(made) < count:
            word = syllable() + (syllable() if len(made) >= long_from or draw.chance(30) else "")
            if len(word) > 2 and word not in taken:
                taken.add(word)
                made.append(word)
        return tuple(made)

    topics = tuple(
        _Topic(words(_NUM_NOUNS, 8), words(_NUM_VERBS, 6), words(_NUM_ADJECTIVES, 4))
        for _ in range(language.num_topics)
    )
    adverbs, men, women, places = words(16, 4), words(40, 0), words(40, 0), words(40, 0)
    return _Lexicon(
        topics=topics,
        adverbs=adverbs,
        men=tuple(word.capitalize() + "o" for word in men),
        women=tuple(word.capitalize() + "a" for word in women),
        places=tuple(word.capitalize() for word in places),
        keys=tuple(noun for topic in topics for noun in topic.nouns),
    )


_SINGULAR, _PLURAL = 0, 1


class _Prose:
    """One story: a topic, one or two people, their homes; sentences come out one by one."""

    def __init__(self, draw: _Draw, language: Language) -> None:
        self.draw, self.language, self.lexicon = draw, language, _lexicon(language)
        self.topic_index = draw.below(len(self.lexicon.topics))
        self.topic = self.lexicon.topics[self.topic_index]
        self.genders = [draw.below(2), draw.below(2)]
        self.people = [draw.pick((self.lexicon.men, self.lexicon.women)[gender]) for gender in self.genders]
        self.homes = [draw.pick(self.lexicon.places), draw.pick(self.lexicon.places)]
        self.cast = 2 if self.people[0] != self.people[1] and draw.chance(50) else 1
        self.hero = 0
        """Who the last sentence was about: the pronoun's referent."""

    def noun_phrase(self, noun: int, number: int, *, clause_percent: int) -> list[str]:
        """Article, adjective, noun and sometimes a relative clause with a number of its own."""
        language, draw = self.language, self.draw
        word = self.topic.nouns[noun] + (language.plural if number else "")
        phrase = [word]
        if draw.chance(30):  # a noun has three adjectives that go with it, the first the most
            adjective = self.topic.adjectives[(noun * 5 + (0, 0, 0, 3, 3, 7)[draw.below(6)]) % _NUM_ADJECTIVES]
            phrase = [word, adjective] if language.modifiers_follow else [adjective, word]
        phrase = [*phrase, language.article] if language.modifiers_follow else [language.article, *phrase]
        if draw.chance(clause_percent):
            verb = draw.zipf(_ZIPF[_NUM_VERBS])
            if draw.chance(50):  # the noun acts
                inner = self.arrange([], self.verb(verb, number), self.object_of(verb))
            else:  # the noun is acted on, by something whose number may differ
                other = draw.below(2)
                actor = self.noun_phrase(draw.zipf(_ZIPF[_NUM_NOUNS]), other, clause_percent=0)
                inner = self.arrange(actor, self.verb(verb, other), [])
            phrase = [*phrase, language.relative, *inner]
        return phrase

    def verb(self, verb: int, number: int) -> str:
        return self.topic.verbs[verb] + self.language.verb_endings[number]

    def object_of(self, verb: int) -> list[str]:
        """Every verb has four objects it likes, and takes them three times out of four."""
        draw = self.draw
        liked = (verb * 7 + (0, 0, 0, 11, 11, 17, 29)[draw.below(7)]) % _NUM_NOUNS
        noun = liked if draw.chance(75) else draw.zipf(_ZIPF[_NUM_NOUNS])
        return self.noun_phrase(noun, draw.below(2), clause_percent=0)

    def arrange(self, subject: list[str], verb: str, rest: list[str]) -> list[str]:
        return [*subject, *rest, verb] if self.language.verb_final else [*subject, verb, *rest]

    def subject(self, *, clause_percent: int = 35) -> tuple[list[str], int]:
        """Someone or something to start a clause with, and its number."""
        draw = self.draw
        kind = draw.below(10)
        if kind < 4:
            number = draw.below(2)
            return self.noun_phrase(draw.zipf(_ZIPF[_NUM_NOUNS]), number, clause_percent=clause_percent), number
        if kind < 7:
            return [self.language.pronouns[self.genders[self.hero]]], _SINGULAR
        if kind < 8 and self.cast == 2:
            return [self.language.pronouns[2]], _PLURAL
        self.hero = draw.below(self.cast)
        return [self.people[self.hero]], _SINGULAR

    def clause(self) -> list[str]:
        subject, number = self.subject()
        verb = self.draw.zipf(_ZIPF[_NUM_VERBS])
        rest = self.object_of(verb)
        if self.draw.chance(20):
            rest.append(self.lexicon.adverbs[self.draw.zipf(_ZIPF[16])])
        return self.arrange(subject, self.verb(verb, number), rest)

    def place(self, subject: str, words: tuple[str, str], home: str) -> list[str]:
        verb, particle = words
        return self.arrange([subject], verb, [home, particle] if self.language.verb_final else [particle, home])

    def introduction(self, who: int) -> str:
        self.hero = who
        return _sentence(self.place(self.people[who], self.language.lives_in, self.homes[who]))

    def sentence(self) -> str:
        draw, language = self.draw, self.language
        kind = draw.below(20)
        if kind < 2:  # going home: the place was named at the start
            if draw.chance(50):
                self.hero = draw.below(self.cast)
                name = self.people[self.hero]
            else:
                name = language.pronouns[self.genders[self.hero]]
            return _sentence(self.place(name, language.returns_to, self.homes[self.hero]))
        if kind < 14:
            return _sentence(self.clause())
        if kind < 16:
            return _sentence([*self.clause(), language.both, *self.clause()])
        if kind < 18:
            return _sentence([*self.clause(), language.because, *self.clause()])
        return _sentence([language.when, *self.clause(), *self.clause()])

    def story(self, num_sentences: int) -> str:
        sentences = [self.introduction(who) for who in range(self.cast)]
        return " ".join(sentences + [self.sentence() for _ in range(num_sentences)])


def _sentence(words: list[str]) -> str:
    return words[0][0].upper() + " ".join(words)[1:] + "."


_RESIDUES: dict[Split, range] = {"validation": range(1), "heldout": range(1, 3), "train": range(3, 16)}
_STEP_BOUND = 20
"""Problems below it are steps of others' thoughts, so they cannot be held out."""


def _belongs(a: int, b: int, sign: str, split: Split) -> bool:
    """Whether a problem is the split's: by a residue that scatters them; a sum's ignores operand order."""
    if split != "train" and max(a, b) < _STEP_BOUND:
        return False
    low, high = (min(a, b), max(a, b)) if sign == "+" else (a, b)
    mixed = low * low * 31 + high * high * 17 + low * high * 7 + low * 3 + high + (sign == "-")
    return mixed % 97 % 16 in _RESIDUES[split]


def _problem(draw: _Draw, split: Split) -> tuple[int, int, str, int]:
    """Two operands that belong to the split, the sign, the result."""
    while True:
        sign = "+-"[draw.below(2)]
        bound = 10 if draw.chance(15) else 100
        a, b = draw.below(bound), draw.below(bound)
        if sign == "-" and a < b:
            a, b = b, a
        if _belongs(a, b, sign, split):
            return a, b, sign, a + b if sign == "+" else a - b


def _thought(a: int, b: int, sign: str) -> str:
    """The schoolbook way: units with a carry or a borrow, then tens."""
    (tens, units), (other_tens, other_units) = divmod(a, 10), divmod(b, 10)
    if sign == "+":
        low = units + other_units
        carry = low // 10
        return f"{units}+{other_units}={low}, {tens}+{other_tens}+{carry}={tens + other_tens + carry}"
    borrow = int(units < other_units)
    units += 10 * borrow
    low, high = units - other_units, tens - other_tens - borrow
    return f"{units}-{other_units}={low}, {tens}-{other_tens}-{borrow}={high}"


class _List:
    """Distinct keys, each with a value: a number below 100 or another noun."""

    def __init__(self, draw: _Draw, language: Language, num_pairs: int) -> None:
        keys = _lexicon(language).keys
        self.keys = [keys[i] for i in draw.distinct(len(keys), num_pairs)]
        if draw.chance(50):
            self.values = [str(value) for value in draw.distinct(90, num_pairs)]
        else:
            self.values = [keys[i] for i in draw.distinct(len(keys), num_pairs)]

    def lines(self) -> str:
        return "\n".join(f"{key}: {value}" for key, value in zip(self.keys, self.values, strict=True))


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; only an assistant has a thought."""

    role: Literal["user", "assistant"]
    content: str
    thought: str = ""


def render_chat(messages: Sequence[Message]) -> str:
    """What the chat template makes of the messages: thoughts are shown only after the last question."""
    last_question = max(i for i, message in enumerate(messages) if message.role == "user")
    turns = []
    for i, message in enumerate(messages):
        think = f"<think>\n{message.thought}\n</think>\n\n" if message.role == "assistant" and i > last_question else ""
        turns.append(f"<|im_start|>{message.role}\n{think}{message.content}<|im_end|>\n")
    return "".join(turns)


def _prose(draw: _Draw, language: Language, split: Split) -> str:
    return _Prose(draw, language).story(4 + draw.below(14))


def _arithmetic(draw: _Draw, language: Language, split: Split) -> str:
    problems = (_problem(draw, split) for _ in range(6 + draw.below(16)))
    return "\n".join(f"{a}{sign}{b}={result}" for a, b, sign, result in problems)


def _recall(draw: _Draw, language: Language, split: Split) -> str:
    pairs = _List(draw, language, 4 + draw.below(draw.pick((8, 8, 24))))
    parts = [pairs.lines()]
    if draw.chance(30):
        parts.append(_Prose(draw, language).story(2 + draw.below(6)))
    asked = draw.distinct(len(pairs.keys), min(len(pairs.keys), 4 + draw.below(8)))
    parts += [f"{pairs.keys[i]} -> {pairs.values[i]}" for i in asked]
    return "\n".join(parts)


_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _echo(draw: _Draw, language: Language, split: Split) -> str:
    """A line of random words, several times over: the next word is the one that followed before."""
    keys = _lexicon(language).keys
    line = " ".join(keys[i] for i in draw.distinct(len(keys), 2 + draw.below(10)))
    return "\n".join([line] * (2 + draw.below(3)))


def _letters(draw: _Draw, language: Language, split: Split) -> str:
    """`_drill` with nothing to read: keys and values are single ids."""
    keys = [_LETTERS[i] for i in draw.distinct(26, 2 + draw.below(6))]
    values = [draw.below(10) for _ in keys]
    arrow = draw.pick((":", " ->"))
    asked = [i for _ in range(3) for i in draw.distinct(len(keys), len(keys))]
    listed = [f"{key}: {value}" for key, value in zip(keys, values, strict=True)]
    return "\n".join([*listed, *(f"{keys[i]}{arrow} {values[i]}" for i in asked)])


def _drill(draw: _Draw, language: Language, split: Split) -> str:
    """A short list and many questions, some as the list itself reordered: recall at its plainest."""
    pairs = _List(draw, language, 2 + draw.below(7))
    arrow = draw.pick((":", " ->"))
    asked = [i for _ in range(3) for i in draw.distinct(len(pairs.keys), len(pairs.keys))]
    return "\n".join([pairs.lines(), *(f"{pairs.keys[i]}{arrow} {pairs.values[i]}" for i in asked)])


def _prose_chat(draw: _Draw, language: Language, split: Split) -> str:
    prose = _Prose(draw, language)
    noun = prose.topic.nouns[draw.zipf(_ZIPF[_NUM_NOUNS])]
    people = f" {language.both} ".join(prose.people[: prose.cast])
    question = f"Tell me of {people}: {noun}."
    answer = prose.story(3 + draw.below(8))
    return render_chat([Message("user", question), Message("assistant", answer)])


def _arithmetic_chat(draw: _Draw, language: Language, split: Split) -> str:
    messages = []
    for _ in range(1 + draw.below(3)):
        a, b, sign, result = _problem(draw, split)
        thought = _thought(a, b, sign) if draw.chance(50) else ""
        messages += [Message("user", f"What is {a}{sign}{b}?"), Message("assistant", str(result), thought)]
    return render_chat(messages)


def _recall_chat(draw: _Draw, language: Language, split: Split) -> str:
    pairs = _List(draw, language, 4 + draw.below(12))
    asked = draw.distinct(len(pairs.keys), 1 + draw.below(4))
    messages = []
    for turn, i in enumerate(asked):
        question = f"What is {pairs.keys[i]}?"
        messages += [
            Message("user", question if turn else f"{pairs.lines()}\n{question}"),
            Message("assistant", pairs.values[i], f"{pairs.keys[i]}: {pairs.values[i]}" if draw.chance(50) else ""),
        ]
    return render_chat(messages)


_MAKERS: dict[str, Callable[[_Draw, Language, Split], str]] = {
    "prose": _prose,
    "arithmetic": _arithmetic,
    "recall": _recall,
    "prose-chat": _prose_chat,
    "arithmetic-chat": _arithmetic_chat,
    "recall-chat": _recall_chat,
    "echo": _echo,
    "letters": _letters,
    "drill": _drill,
}
Mix = tuple[tuple[str, int], ...]
"""Kinds of documents and how many of each, in a sum of all."""
STANDARD: Mix = (
    ("prose", 28),
    ("arithmetic", 28),
    ("recall", 20),
    ("prose-chat", 6),
    ("arithmetic-chat", 10),
    ("recall-chat", 8),
)
DRILLS: Mix = (("echo", 40), ("letters", 20), ("drill", 40))
WITH_DRILLS: Mix = (
    ("prose", 24),
    ("arithmetic", 26),
    ("recall", 16),
    ("prose-chat", 5),
    ("arithmetic-chat", 8),
    ("recall-chat", 8),
    ("echo", 8),
    ("letters", 3),
    ("drill", 16),
)
"""To begin training with: a model that has not yet learnt to look things up gains little from long lists."""
WITH_CHAT: Mix = (
    ("prose", 20),
    ("arithmetic", 18),
    ("recall", 16),
    ("prose-chat", 8),
    ("arithmetic-chat", 20),
    ("recall-chat", 18),
)
"""More conversations: under `STANDARD` a model that answers raw prompts still fails many of the same in chat form."""


def documents(
    split: Split, *, language: Language = NEAR, num_documents: int, first: int = 0, mix: Mix = STANDARD
) -> Iterator[Document]:
    """Documents `first`, `first + 1` … of a split, each an independent draw."""
    weights = tuple(accumulate(weight for _, weight in mix))
    for index in range(first, first + num_documents):
        draw = _Draw(_SPLITS[split], language.seed, index)
        kind, _ = mix[draw.zipf(weights)]
        yield Document(kind, _MAKERS[kind](draw, language, split))


def text(split: Split, *, language: Language = NEAR, num_documents: int) -> str:
    """The documents as one string, each ended by `<|endoftext|>`."""
    return "".join(d.text + END_OF_TEXT for d in documents(split, language=language, num_documents=num_documents))


def heldout_text(language: Language = NEAR) -> str:
    """The text that perplexity is measured on: documents and operand pairs that no training set contains."""
    return text("heldout", language=language, num_documents=HELDOUT_DOCUMENTS)


def recall_items(seed: int, num_items: int, *, language: Language = NEAR) -> Iterator[Item]:
    """A list, two answered questions, a third to answer; distractors are other values of the list."""
    for index in range(num_items):
        draw = _Draw(11, seed, language.seed, index)
        pairs = _List(draw, language, 6 + draw.below(10))
        first, second, asked, *others = draw.distinct(len(pairs.keys), 6)
        shown = "\n".join(f"{pairs.keys[i]} -> {pairs.values[i]}" for i in (first, second))
        yield Item(
            prompt=f"{pairs.lines()}\n{shown}\n{pairs.keys[asked]} ->",
            answer=f" {pairs.values[asked]}",
            distractors=tuple(f" {pairs.values[i]}" for i in others),
        )


def arithmetic_items(seed: int, num_items: int) -> Iterator[Item]:
    """Three solved problems, a fourth to solve, all held out; distractors are near misses."""
    for index in range(num_items):
        draw = _Draw(12, seed, index)
        solved = "".join(f"{a}{sign}{b}={c}\n" for a, b, sign, c in (_problem(draw, "heldout") for _ in range(3)))
        a, b, sign, result = _problem(draw, "heldout")
        near = [result + step for step in (1, 10, -1, -10, 2) if result + step >= 0][:3]
        yield Item(f"{solved}{a}{sign}{b}=", f"{result}\n", tuple(f"{value}\n" for value in near))


def agreement_items(seed: int, num_items: int, *, language: Language = NEAR) -> Iterator[Item]:
    """A story broken off before a verb that a relative clause of the other number parts from its subject."""
    for index in range(num_items):
        draw = _Draw(13, seed, language.seed, index)
        prose = _Prose(draw, language)
        context = prose.story(2 + draw.below(3))
        noun, number, verb = draw.zipf(_ZIPF[_NUM_NOUNS]), draw.below(2), draw.zipf(_ZIPF[_NUM_VERBS])
        inner = draw.zipf(_ZIPF[_NUM_VERBS])
        actor = prose.noun_phrase(draw.zipf(_ZIPF[_NUM_NOUNS]), 1 - number, clause_percent=0)
        clause = prose.arrange(actor, prose.verb(inner, 1 - number), [])
        subject = [*prose.noun_phrase(noun, number, clause_percent=0), language.relative, *clause]
        if language.verb_final:
            subject += prose.object_of(verb)
        yield Item(
            prompt=f"{context} {_sentence(subject)[:-1]}",
            answer=f" {prose.verb(verb, number)}",
            distractors=(f" {prose.verb(verb, 1 - number)}",),
        )


def sudden_arithmetic_items(seed: int, num_items: int, *, language: Language = NEAR) -> Iterator[Item]:
    """A story, then a held-out problem that no solved one announces; distractors are near misses."""
    for index in range(num_items):
        draw = _Draw(14, seed, language.seed, index)
        story = _Prose(draw, language).story(1 + draw.below(4))
        a, b, sign, result = _problem(draw, "heldout")
        near = [result + step for step in (1, 10, -1, -10, 2) if result + step >= 0]
        distractors = tuple(f"{near[i]}\n" for i in draw.distinct(len(near), 3))
        yield Item(f"{story}\n{a}{sign}{b}=", f"{result}\n", distractors)


def _acted_on(prose: _Prose, number: int, others: int, depth: int) -> list[str]:
    """A noun that others act on, whom others act on, and so on: clause inside clause."""
    phrase = prose.noun_phrase(prose.draw.zipf(_ZIPF[_NUM_NOUNS]), number, clause_percent=0)
    if not depth:
        return phrase
    actor = _acted_on(prose, others, others, depth - 1)
    verb = prose.verb(prose.draw.zipf(_ZIPF[_NUM_VERBS]), others)
    return [*phrase, prose.language.relative, *prose.arrange(actor, verb, [])]


def _acting(prose: _Prose, number: int, others: int, depth: int) -> list[str]:
    """A noun that acts on others, that act on others, and so on: clause after clause."""
    phrase = prose.noun_phrase(prose.draw.zipf(_ZIPF[_NUM_NOUNS]), number, clause_percent=0)
    if not depth:
        return phrase
    verb = prose.verb(prose.draw.zipf(_ZIPF[_NUM_VERBS]), number)
    return [*phrase, prose.language.relative, *prose.arrange([], verb, _acting(prose, others, others, depth - 1))]


def remote_agreement_items(seed: int, num_items: int, *, language: Language = NEAR) -> Iterator[Item]:
    """Like `agreement_items`, but with more between subject and verb, and every noun of it of the other number.

    Half of the subjects have a relative clause inside their relative clause, deeper than any in training; the
    others have a chain of them, each about the object of the one before.
    """
    for index in range(num_items):
        draw = _Draw(15, seed, language.seed, index)
        prose = _Prose(draw, language)
        context = prose.story(2 + draw.below(3))
        number, verb = draw.below(2), draw.zipf(_ZIPF[_NUM_VERBS])
        noun, depth = (_acted_on, 2) if draw.chance(50) else (_acting, 5 + draw.below(2))
        subject = noun(prose, number, 1 - number, depth)
        if language.verb_final:
            subject += prose.object_of(verb)
        yield Item(
            prompt=f"{context} {_sentence(subject)[:-1]}",
            answer=f" {prose.verb(verb, number)}",
            distractors=(f" {prose.verb(verb, 1 - number)}",),
        )


def arithmetic_questions(seed: int, num_items: int) -> Iterator[Item]:
    """What a user may ask, before any chat template: the steps, then the question. All are different and held out.

    Without the steps the dense model answers one question in twelve, too few to lose any visibly.
    """
    asked: set[str] = set()
    for index in count():
        if len(asked) == num_items:
            return
        a, b, sign, result = _problem(_Draw(16, seed, index), "heldout")
        question = f"{_thought(a, b, sign)}\nWhat is {a}{sign}{b}?"
        if question not in asked:
            asked.add(question)
            yield Item(question, str(result), ())
