"""Documents that only training reads: drills, in which looking things up is all there is to learn, and their mixes."""

from __future__ import annotations

from harness.demo import corpus
from harness.demo.language import Draw, Language, lexicon

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _echo(draw: Draw, language: Language, split: corpus.Split) -> str:
    """A line of random words, several times over: the next word is the word that followed before."""
    keys = lexicon(language).nouns
    line = " ".join(keys[i] for i in draw.distinct(len(keys), 2 + draw.below(10)))
    return "\n".join([line] * (2 + draw.below(3)))


def _letters(draw: Draw, language: Language, split: corpus.Split) -> str:
    """A drill with nothing to read: keys and values are single ids."""
    keys = [_LETTERS[i] for i in draw.distinct(26, 2 + draw.below(6))]
    values = [draw.below(10) for _ in keys]
    arrow = draw.pick((":", " ->"))
    asked = [i for _ in range(3) for i in draw.distinct(len(keys), len(keys))]
    listed = [f"{key}: {value}" for key, value in zip(keys, values, strict=True)]
    return "\n".join([*listed, *(f"{keys[i]}{arrow} {values[i]}" for i in asked)])


def _drill(draw: Draw, language: Language, split: corpus.Split) -> str:
    """A short list and many questions, some written like the list: recall at its plainest."""
    pairs = corpus.PairList(draw, language, 2 + draw.below(7))
    arrow = draw.pick((":", " ->"))
    asked = [i for _ in range(3) for i in draw.distinct(len(pairs.keys), len(pairs.keys))]
    return "\n".join([pairs.lines(), *(f"{pairs.keys[i]}{arrow} {pairs.values[i]}" for i in asked)])


MAKERS: dict[str, corpus.Maker] = {**corpus.MAKERS, "echo": _echo, "letters": _letters, "drill": _drill}
DRILLS: corpus.Mix = (("echo", 40), ("letters", 20), ("drill", 40))
WITH_DRILLS: corpus.Mix = (
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
"""For the beginning: a model that has not yet learnt to look things up gains little from long lists."""
WITH_CHAT: corpus.Mix = (
    ("prose", 20),
    ("arithmetic", 18),
    ("recall", 16),
    ("prose-chat", 8),
    ("arithmetic-chat", 20),
    ("recall-chat", 18),
)
"""More conversations: a model trained on the standard mix answers raw prompts and still fails many of them as chat."""
