"""Invented languages: chance, words, and the grammar that makes stories of them.

The same seed gives the same story on every machine and every Python from 3.11 on: chance comes only from
`random.Random(int).random()`, whose stream Python guarantees, and everything derived from it is integer arithmetic.

Words have Zipf's frequencies. Verbs agree in number with a subject that a relative clause may have pushed far away,
pronouns agree with the gender of a name, people go home to the place that the story names at its start, and a story
keeps to one topic. Verbs like some objects and nouns like some adjectives: facts that only weights can hold.
"""

import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import TypeVar

_T = TypeVar("_T")


@dataclass(frozen=True)
class Language:
    """A grammar and the sounds of its words; the words themselves follow from `seed`."""

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


class Draw:
    """A stream of chance, named by a key of whole numbers, and the ways in which the corpus uses it."""

    def __init__(self, *key: int) -> None:
        seed = 0
        for part in key:
            seed = seed * 1_000_003 + part + 1
        self._random = random.Random(seed).random

    def below(self, bound: int) -> int:
        """A number from 0 to `bound` - 1."""
        return int(self._random() * bound)

    def chance(self, percent: int) -> bool:
        """True in `percent` of 100 cases."""
        return self._random() * 100 < percent

    def pick(self, options: Sequence[_T]) -> _T:
        """One of the options."""
        return options[int(self._random() * len(options))]

    def weighted(self, cumulative: Sequence[int]) -> int:
        """An index, by the running sums of whole weights."""
        return bisect_right(cumulative, int(self._random() * cumulative[-1]))

    def distinct(self, bound: int, count: int) -> list[int]:
        """`count` different numbers below `bound`, in the order drawn."""
        pool = list(range(bound))
        for i in range(count):
            j = i + int(self._random() * (bound - i))
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:count]


@dataclass(frozen=True)
class Topic:
    """The content words that a story about this topic may use, most frequent first."""

    nouns: tuple[str, ...]
    verbs: tuple[str, ...]
    adjectives: tuple[str, ...]


@dataclass(frozen=True)
class Lexicon:
    """All words of a language, each word class in order of falling frequency."""

    topics: tuple[Topic, ...]
    adverbs: tuple[str, ...]
    men: tuple[str, ...]
    women: tuple[str, ...]
    places: tuple[str, ...]
    nouns: tuple[str, ...]
    """The nouns of all topics."""


_NUM_TOPICS, _NUM_NOUNS, _NUM_VERBS, _NUM_ADJECTIVES, _NUM_ADVERBS = 16, 40, 24, 16, 16


def _zipf(size: int) -> tuple[int, ...]:
    """Running sums of the weights of `size` ranks."""
    return tuple(accumulate(1_000_000 // (rank + 2) for rank in range(size)))


_NOUN_RANKS, _VERB_RANKS, _ADVERB_RANKS = _zipf(_NUM_NOUNS), _zipf(_NUM_VERBS), _zipf(_NUM_ADVERBS)


@cache
def lexicon(language: Language) -> Lexicon:
    """The words of a language: of one or two syllables, all different."""
    draw = Draw(language.seed)
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
        Topic(words(_NUM_NOUNS, 8), words(_NUM_VERBS, 6), words(_NUM_ADJECTIVES, 4)) for _ in range(_NUM_TOPICS)
    )
    adverbs, men, women, places = words(_NUM_ADVERBS, 4), words(40, 0), words(40, 0), words(40, 0)
    return Lexicon(
        topics=topics,
        adverbs=adverbs,
        men=tuple(word.capitalize() + "o" for word in men),
        women=tuple(word.capitalize() + "a" for word in women),
        places=tuple(word.capitalize() for word in places),
        nouns=tuple(noun for topic in topics for noun in topic.nouns),
    )


_SINGULAR, _PLURAL = 0, 1


class Story:
    """One story: a topic, one or two people, their homes. Nouns and verbs are ranks in the topic's words."""

    def __init__(self, draw: Draw, language: Language) -> None:
        self.draw, self.language = draw, language
        self._lexicon = lexicon(language)
        self.topic = draw.pick(self._lexicon.topics)
        self._genders = [draw.below(2), draw.below(2)]
        names = [draw.pick((self._lexicon.men, self._lexicon.women)[gender]) for gender in self._genders]
        self._homes = [draw.pick(self._lexicon.places), draw.pick(self._lexicon.places)]
        self.people = names if names[0] != names[1] and draw.chance(50) else names[:1]
        self._hero = 0
        """The person of the last sentence, whom a pronoun means."""

    def tell(self, num_sentences: int) -> str:
        """A text that says where the people live, then `num_sentences` more sentences."""
        homes = [self._introduction(who) for who in range(len(self.people))]
        return " ".join(homes + [self._sentence() for _ in range(num_sentences)])

    def noun(self) -> int:
        """Draws a noun of the topic."""
        return self.draw.weighted(_NOUN_RANKS)

    def verb(self) -> int:
        """Draws a verb of the topic."""
        return self.draw.weighted(_VERB_RANKS)

    def verb_form(self, verb: int, number: int) -> str:
        """The verb with the ending of a number: 0 for singular, 1 for plural."""
        return self.topic.verbs[verb] + self.language.verb_endings[number]

    def noun_phrase(self, noun: int, number: int, *, clause_percent: int = 0) -> list[str]:
        """Article, adjective, noun and sometimes a relative clause with a number of its own."""
        language, draw = self.language, self.draw
        word = self.topic.nouns[noun] + (language.plural if number else "")
        phrase = [word]
        if draw.chance(30):  # a noun has three adjectives that go with it, the first the most
            adjective = self.topic.adjectives[(noun * 5 + (0, 0, 0, 3, 3, 7)[draw.below(6)]) % _NUM_ADJECTIVES]
            phrase = [word, adjective] if language.modifiers_follow else [adjective, word]
        phrase = [*phrase, language.article] if language.modifiers_follow else [language.article, *phrase]
        if draw.chance(clause_percent):
            verb = self.verb()
            if draw.chance(50):  # the noun acts
                inner = self.arrange([], self.verb_form(verb, number), self.object_of(verb))
            else:  # the noun is acted on, by something whose number may differ
                other = draw.below(2)
                inner = self.arrange(self.noun_phrase(self.noun(), other), self.verb_form(verb, other), [])
            phrase = [*phrase, language.relative, *inner]
        return phrase

    def object_of(self, verb: int) -> list[str]:
        """An object for the verb. Every verb likes four objects, and takes one of them three times out of four."""
        draw = self.draw
        liked = (verb * 7 + (0, 0, 0, 11, 11, 17, 29)[draw.below(7)]) % _NUM_NOUNS
        noun = liked if draw.chance(75) else self.noun()
        return self.noun_phrase(noun, draw.below(2))

    def arrange(self, subject: list[str], verb: str, rest: list[str]) -> list[str]:
        """The parts of a clause in the language's order."""
        return [*subject, *rest, verb] if self.language.verb_final else [*subject, verb, *rest]

    def _subject(self) -> tuple[list[str], int]:
        """Someone or something to start a clause with, and its number."""
        draw = self.draw
        kind = draw.below(10)
        if kind < 4:
            number = draw.below(2)
            return self.noun_phrase(self.noun(), number, clause_percent=35), number
        if kind < 7:
            return [self.language.pronouns[self._genders[self._hero]]], _SINGULAR
        if kind < 8 and len(self.people) == 2:
            return [self.language.pronouns[2]], _PLURAL
        self._hero = draw.below(len(self.people))
        return [self.people[self._hero]], _SINGULAR

    def _clause(self) -> list[str]:
        subject, number = self._subject()
        verb = self.verb()
        rest = self.object_of(verb)
        if self.draw.chance(20):
            rest.append(self._lexicon.adverbs[self.draw.weighted(_ADVERB_RANKS)])
        return self.arrange(subject, self.verb_form(verb, number), rest)

    def _at_home(self, subject: str, words: tuple[str, str]) -> str:
        """The sentence that the hero lives at home, or returns home."""
        (verb, particle), home = words, self._homes[self._hero]
        place = [home, particle] if self.language.verb_final else [particle, home]
        return sentence(self.arrange([subject], verb, place))

    def _introduction(self, who: int) -> str:
        self._hero = who
        return self._at_home(self.people[who], self.language.lives_in)

    def _sentence(self) -> str:
        draw, language = self.draw, self.language
        kind = draw.below(20)
        if kind < 2:  # going home: the place was named at the start
            if draw.chance(50):
                self._hero = draw.below(len(self.people))
                name = self.people[self._hero]
            else:
                name = language.pronouns[self._genders[self._hero]]
            return self._at_home(name, language.returns_to)
        if kind < 14:
            return sentence(self._clause())
        if kind < 16:
            return sentence([*self._clause(), language.both, *self._clause()])
        if kind < 18:
            return sentence([*self._clause(), language.because, *self._clause()])
        return sentence([language.when, *self._clause(), *self._clause()])


def sentence(words: list[str]) -> str:
    """The words as a sentence: a capital letter first, a full stop last."""
    return words[0][0].upper() + " ".join(words)[1:] + "."
