"""What people claim in prose: which words are a claim, of which kind, about what, and against what.

Read from the words, not understood. A claim is about the variants that its part of the sentence names in front of it or
next to it, else the sentence, else about every variant of the suite. It is held against what follows "than", or its
verb; where nothing follows, against the source.

Not taken for claims: what stands in quotation marks, code, block quotes, comments and addresses, which are somebody
else's words; questions; and what is denied by a word at most three words before it in the same part of the sentence
("not lossless", "no claim of being lossless", "nobody should call this near-lossless"; but not "not only"). Reported
speech without quotation marks and conditions ("would be faster if") are taken for claims. A boast that uses none of
these words is not seen.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from harness.suite import SOURCE, Suite


@dataclass(frozen=True)
class Mention:
    """A claim as it is found: the key of the suite file, the sentence, the words and where they begin in it, the part
    of the sentence that they are in, one of `KINDS`, and the rows that it is of and against.

    `unknown` is what it is compared with and is no row of the suite; `number` is the ratio that a claim of speed or
    recovery names, with what it may be rounded by: half a unit of its last digit, at most 0.05.
    """

    key: str
    sentence: str
    words: str
    start: int
    part: str
    kind: str
    of: tuple[str, ...]
    versus: tuple[str, ...]
    unknown: str | None
    number: tuple[float, float] | None

    def context(self, reach: int = 40) -> str:
        """The words with a little of their sentence around them."""
        end = self.start + len(self.words)
        first = self.sentence.rfind(" ", 0, self.start - reach) + 1 if self.start > reach else 0
        last = self.sentence.find(" ", end + reach)
        cut = self.sentence[first:last] if last >= 0 else self.sentence[first:].rstrip(".")
        return f"{'… ' if first else ''}{cut}{' …' if last >= 0 else ''}"

    @property
    def batches(self) -> tuple[int, ...]:
        """The batch sizes that are named."""
        named = _BATCH.findall(self.part)
        return tuple(int(digits) for found in named for digits in re.findall(r"\d+", found))

    def names(self, words: Sequence[str]) -> tuple[str, ...]:
        """Which of some names stand beside the claim, as words."""
        return tuple(word for word in words if re.search(rf"(?<![\w.+-]){re.escape(word)}(?![\w+-]|\.\w)", self.part))

    def speaks_of(self, topic: str) -> bool:
        """Whether a word of one of `_TOPICS` stands beside the claim."""
        return bool(_TOPICS[topic].search(self.part))


def mentions(suite: Suite) -> Iterator[Mention]:
    """Every claim in what people wrote into a suite for its card to say, in the order in which they are made."""
    for key, text in (("title", suite.title), ("description", suite.description or "")):
        for sentence in _sentences(text):
            yield from _mentions(key, sentence, suite)


# -- Markdown to sentences ---------------------------------------------------------------------------------------

_UNSEEN = re.compile("[\u00ad\u200b-\u200d\u2060\ufeff]")
_HYPHEN = re.compile("[\u2010-\u2013\u2212]")
_NO_PROSE = re.compile(r"^[ \t]*(```|~~~).*?^[ \t]*\1.*?$|^[ \t]*>[^\n]*$|<!--.*?-->", re.MULTILINE | re.DOTALL)
_PIECE = re.compile(r"\n\s*\n|\n(?=\s*(?:[-*+#|]|\d+[.)])\s)")  # paragraphs, items, headings
_SENTENCE = re.compile(r"(?<=[.!?])(?<!\bvs\.)(?<!\be\.g\.)(?<!\bi\.e\.)[\"'”’)*_]*\s+")
_ADDRESS = re.compile(r"(?<=\])\([^)]*\)|\bhttps?://\S+")
_CODE = re.compile(r"(`+).*?\1")
_QUOTED = re.compile(r"\"[^\"]*\"|“[^”]*”|„[^“”]*[“”]|«[^»]*»|‘[^’]*’(?!\w)|(?<!\w)'[^']*'(?!\w)")
_EMPHASIS = re.compile(r"[*~]|(?<!\w)_|_(?!\w)")


def _sentences(text: str) -> Iterator[str]:
    """The sentences of Markdown, one line each, with one kind of hyphens, letters and spaces, and nothing unseen."""
    text = _HYPHEN.sub("-", _UNSEEN.sub("", unicodedata.normalize("NFKC", text)))
    for piece in _PIECE.split(_NO_PROSE.sub(" ", text)):
        yield from filter(None, _SENTENCE.split(" ".join(piece.split())))


def _blanked(pattern: re.Pattern[str], text: str) -> str:
    return pattern.sub(lambda found: " " * len(found[0]), text)


# -- Words of claims ---------------------------------------------------------------------------------------------

_QUALITY = (
    "(?:quality|accurac(?:y|ies)|performance|scores?|perplexit(?:y|ies)|ppl|fidelity|capabilit(?:y|ies)|intelligence|"
    "outputs?|answers|results|benchmarks?|evals?)"
)
_LOST = "(?:loss(?:es)?|degradation|drops?|damage|decrease|differences?)"
_LOSS = (
    rf"(?:{_QUALITY} {_LOST}|{_LOST} (?:in|of) {_QUALITY}|"
    rf"(?:loss|degradation)(?! of generality)(?: (?:in|of) (?:the )?{_QUALITY})?)"
)
_NO_LOSS = rf"(?:no|zero|without)(?: any)? {_LOSS}"
_NEARLY = "(?:near|nearly|virtually|practically|almost|essentially|effectively|basically|quasi|close to)"
_FULL = "(?:bf16|bfloat16|fp16|float16|16-bit|full[- ]precision|unquanti[sz]ed|original|source|base(?:line| model)?)"
_PERCENT = r"(?<!\d\.)\d+(?:\.\d+)?\+? ?(?:%|percent|per cent)"
_TIMES = r"(?<!\d\.)\d+(?:\.\d+)?\+? ?(?:[x×]|times|-?fold)"


def _any(*patterns: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w)(?:{'|'.join(patterns)})(?!\w)", re.IGNORECASE)


# What stands between the words of a claim and what it is compared with.
_THAN = re.compile(r"\b(?:than|versus|vs|compared (?:to|with)|relative to)\b|\A\s*(?:as|over|to)\b", re.IGNORECASE)
_WITH = re.compile(r"\A\s*(?:with|to|from|as|of)\b|\b(?:compared (?:to|with)|relative to)\b", re.IGNORECASE)
_AT_ONCE = re.compile(r"\A")


@dataclass(frozen=True)
class _Pattern:
    """Words that make a claim of a kind. Common ones (`is_common`) do so only where a model of the suite follows."""

    kind: str
    words: re.Pattern[str]
    link: re.Pattern[str]
    is_common: bool = False


# The first of them that finds words has them.
_PATTERNS = (
    _Pattern(
        "near-lossless",
        _any(
            rf"{_NEARLY}[- ]*(?:loss[- ]?less(?:ly)?|loss-free|identical|indistinguishable|{_NO_LOSS})",
            "(?:negligible|minimal|imperceptible|insignificant|(?:little|next) to no|(?:hardly|barely) any)(?: \\w+)? "
            + _LOSS,
            rf"near[- ]{_FULL}[- ]{_QUALITY}",
            rf"(?:preserv|maintain|retain)(?:s|es|ed|ing)? (?:the |its |full |all )?(?:(?:model|{_FULL}) )?{_QUALITY}",
            rf"without (?:sacrificing|compromising|losing|hurting|degrading)(?: any)?(?: \w+)? {_QUALITY}",
        ),
        _THAN,
    ),
    _Pattern(
        "noise",
        _any(
            r"(?:within|below|under|inside) (?:(?:the|its|our|run|measurement|statistical|random|\w+-to-\w+) ){0,2}"
            "noise(?: floor| level)?",
            "within (?:the |its )?(?:margin of error|error bars?|measurement error|standard errors?)",
            "(?:statistically )?indistinguishable",
            "cannot be (?:told apart|told|distinguished)(?= from)",
            "statistically (?:identical|equivalent|equal|tied)",
            "no (?:measurable|significant|statistically significant|noticeable|detectable|perceptible|visible) "
            + _LOSS,
        ),
        _WITH,
    ),
    _Pattern(
        "lossless",
        _any(
            "loss[- ]?less(?:ly)?",
            "loss-free",
            _NO_LOSS,
            rf"los(?:es|ing) (?:nothing|no {_QUALITY})",
            "identical (?:outputs|answers|quality|accuracy|perplexity)",
        ),
        _THAN,
    ),
    _Pattern("lossless", _any("(?:bit[- ])?identical(?= (?:to|with))"), _WITH, is_common=True),
    _Pattern(
        "equal",
        _any(
            "on (?:a )?par(?= with)",
            rf"(?:same|equal|equivalent|comparable) {_QUALITY}(?= (?:as|to|with))",
            "as (?:good|accurate|capable|faithful)(?= as)",
        ),
        _WITH,
    ),
    _Pattern(
        "equal",
        _any("match(?:es|ed|ing)?", "equals?", "ties(?: with)?", "rivals?", "(?:is|are) equivalent to"),
        _AT_ONCE,
        is_common=True,
    ),
    _Pattern(
        "recovery",
        _any(
            rf"{_PERCENT} (?:{_QUALITY} )?(?:recovery|retention|recovered|retained|preserved)",
            rf"(?:full|complete) (?:{_QUALITY} )?recovery",
        ),
        _THAN,
    ),
    _Pattern(
        "recovery",
        _any(
            rf"recover(?:s|ed|y|ing)?(?: (?:of|is|at|least|about|over|more|than|up|to|>))* ?>?{_PERCENT}",
            rf"(?:retain|preserv|keep|kept|maintain|reach|achiev)\w*(?: \w+){{0,3}} >?{_PERCENT}"
            rf"(?= of (?:\S+ ){{0,4}}{_QUALITY})",
            rf"(?<!within )(?<!within  ){_PERCENT} of (?:the |its )?{_FULL}(?: model)?(?:['’]s)? {_QUALITY}",
            rf"recover(?:s|ed|ing)? (?:(?:all|most) )?(?:of )?(?:the |its )?(?:\w+ )?{_QUALITY}",
        ),
        re.compile(r"\A\s*of\b|\b(?:compared (?:to|with)|relative to)\b", re.IGNORECASE),
    ),
    _Pattern(
        "faster",
        _any(
            "fast(?:er|est)",
            "quick(?:er|est)",
            "speed-?ups?",
            "(?:speeds?|sped|speeding) up",
            r"accelerates?(?= (?:\w+ )?(?:decod|infer|generat|prefill))",
            "outpaces?",
            r"(?:higher|greater|better|increased|improved|superior|more) (?:\w+ ){0,2}"
            "(?:throughput|speeds?|tok/s|tokens per second)",
            rf"{_PERCENT} (?:throughput|tok/s)",
            rf"(?:twice|thrice|double|doubles|{_TIMES}) (?:as fast|the (?:\w+ )?(?:speed|throughput))",
        ),
        _THAN,
    ),
    _Pattern(
        "better",
        _any("(?:beat(?:s|ing)?|outperform(?:s|ed|ing)?|surpass(?:es|ed|ing)?|outclass(?:es|ed)?)(?! by)"),
        _AT_ONCE,
    ),
    _Pattern(
        "better",
        _any(
            rf"better(?: {_QUALITY}|(?: \w+){{0,3}}(?= than))",
            "superior",
            "more (?:accurate|capable|faithful)",
            "(?:higher|greater) (?:quality|accuracy|scores?|fidelity|performance)",
            r"lower (?:perplexity|ppl|kl\w*|divergence)",
            rf"best {_QUALITY}",
            "state[- ]of[- ]the[- ]art",
            "sota",
        ),
        _THAN,
    ),
)
KINDS = tuple(dict.fromkeys(one.kind for one in _PATTERNS))

_TOPICS = {
    "log_ppl": re.compile(r"perplexit|\bppl\b", re.IGNORECASE),
    "kl": re.compile(r"\bkl\w*|divergence|fidelity", re.IGNORECASE),
    "score": re.compile(r"\btasks?\b|accura|score|benchmark|\bevals?\b", re.IGNORECASE),
    "decode_speed": re.compile(r"speed|throughput|latency|decod|generat|tok/s|tokens per second", re.IGNORECASE),
    "prefill_speed": re.compile(r"prefill|prompt processing|first token|\bttft\b|\bpp\d", re.IGNORECASE),
    "depth": re.compile(r"\bdepths?\b|@ ?d ?\d|\bcontexts?\b", re.IGNORECASE),
    "assumption": re.compile(
        r"\b(?:published|reported|assumed|estimated|official|claimed|leaderboard)\b", re.IGNORECASE
    ),
}
_BATCH = re.compile(
    r"\b(?:batch(?:es)?(?:[- ]sizes?)?(?: of)?|bs|concurrency(?: of)?)[ =]*"
    r"(\d+(?:(?:,|and|or|to|-|\s)+\d+)*)(?!\.\d|\d|\s?[x×%])",
    re.IGNORECASE,
)

# -- Sentences to claims -----------------------------------------------------------------------------------------

_BREAK = re.compile(r";|—| - |\b(?:but|whereas|while|although|though|however|yet)\b", re.IGNORECASE)
_AND = re.compile(r"[\s,/]*(?:and|or)?\s*", re.IGNORECASE)
_SCOPE = re.compile(r"[,:()]|\band\b", re.IGNORECASE)
_DENIAL = re.compile(
    r"(?<!\w)(?:(?:not|\w+n['’]t)(?! (?:only|just|merely|simply)\b)|cannot|never|nobody|neither|nor|hardly|scarcely|"
    r"none of|without (?:being|claiming)|far from|anything but|no (?:claim|evidence|proof|reason|guarantee|sign|"
    r"variant|one|record|quant\w*|rounding))(?!\w)(?:\s+\S+){0,3}\s*$",
    re.IGNORECASE,
)
_END = re.compile(r"[,:()]|\b(?:because|since|and (?:it|they|is|are)|at|in|on|by|for|across)\b", re.IGNORECASE)
_OURS = re.compile(r"\b(?:nvfp4|fp4|4-bit|quantized|this quant\w*|(?:all|the) variants)\b", re.IGNORECASE)
_ALL_OTHERS = re.compile(r"\b(?:(?:the|all|any|every) others?|other variants?)\b", re.IGNORECASE)
_OTHER_MODEL = re.compile(
    r"(?<![\w.+-])(?:fp8|int[48]|w\d+a\d+|awq|gptq|gguf|exl\d|mxfp\d|nf4|bnb|bitsandbytes|i?q\d_\w+|gpt\S*|claude\S*|"
    r"[\w.-]+/[\w.-]+)(?![\w+-])",
    re.IGNORECASE,
)
_NO_MODEL = re.compile(rf"(?:the|its|their|all|any|every|mean|average|task|model|['’]s|{_QUALITY}|\s)*", re.IGNORECASE)
_BEST = re.compile(r"(?P<best>fastest|quickest|best)|sota|state", re.IGNORECASE)
_OF_THE_SUITE = re.compile(r"\b(?:variants?|suite|here|of these|of the (?:two|three|four|five|six))\b", re.IGNORECASE)
_NUMBER = re.compile(r"(\d+(?:\.(\d+))?)\+? ?(?:(%|percent|per cent)|[x×]|times|-?fold)(?!\w)", re.IGNORECASE)
_MULTIPLES = {"twice": 2.0, "double": 2.0, "doubles": 2.0, "thrice": 3.0}


def _mentions(key: str, sentence: str, suite: Suite) -> Iterator[Mention]:
    """The claims of a sentence in the order of their words."""
    if sentence.rstrip("\"'”’)*_ ").endswith("?"):
        return
    told = _blanked(_EMPHASIS, _blanked(_QUOTED, _blanked(_ADDRESS, sentence)))  # as long as the sentence
    plain = free = _blanked(_CODE, told)  # code may name a variant, and claims nothing
    found: list[tuple[int, int, _Pattern]] = []
    for pattern in _PATTERNS:
        found += [(*words.span(), pattern) for words in pattern.words.finditer(free)]
        free = _blanked(pattern.words, free)
    found.sort(key=lambda one: one[0])
    models = _models(suite)
    begin = 0  # of what may name the subject of the next claim
    for place, (start, end, pattern) in enumerate(found):
        left = max((one.end() for one in _BREAK.finditer(plain, 0, start)), default=0)
        right = next((one.start() for one in _BREAK.finditer(plain, end)), len(plain))
        if _DENIAL.search(_SCOPE.split(plain[left:start])[-1]):
            continue
        stop = _stop(plain, end, right, [(one[0], one[1]) for one in found[place + 1 :]])
        phrase_start, phrase = _phrase(pattern.link, plain[:stop], told[:stop], end)
        if pattern.is_common and not models.begin(phrase):
            continue
        after = told[end:phrase_start] + told[phrase_start + len(phrase) : right]
        of = models.subject(told[max(begin, left) : start], told[left:start], after)
        of = of or models.named(told[begin:start]) or models.all_but(phrase)
        versus, unknown = models.compared(phrase, of, plain[start:end], plain[left:right])
        if not versus:
            default = suite.bench.versus if pattern.kind == "faster" and suite.bench else SOURCE
            versus = models.variants if SOURCE in of else (SOURCE,) if default in of else (default,)
        number = _number(pattern.kind, plain, start, end)
        part = told[left:right]
        yield Mention(key, sentence, sentence[start:end], start, part, pattern.kind, of, versus, unknown, number)
        begin = phrase_start + len(phrase)


def _stop(plain: str, end: int, right: int, following: Sequence[tuple[int, int]]) -> int:
    """Where what belongs to a claim stops: at the next one, unless both are compared with what follows the last of
    them, as in "faster and better than the source"."""
    for start, until in following:
        if start >= right or not _AND.fullmatch(plain[end:start]):
            return min(start, right)
        end = until
    return right


def _phrase(link: re.Pattern[str], plain: str, told: str, end: int) -> tuple[int, str]:
    """What a claim that ends at `end` is compared with, and where in the sentence that stands; nothing if there is no
    link to it."""
    found = link.search(plain[end:])
    if found is None:
        return end, ""
    first = end + found.end()
    ends = _END.search(plain, first)
    words = told[first : ends.start() if ends else len(told)]
    return first + len(words) - len(words.lstrip()), words.strip().rstrip(" .!")


@dataclass(frozen=True)
class _Models:
    """What a suite's prose can name: its rows, by their names as words, and the source, in many ways."""

    variants: tuple[str, ...]
    rows: re.Pattern[str]
    source: re.Pattern[str]

    def named(self, text: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.rows.findall(text)))

    def all_but(self, phrase: str) -> tuple[str, ...]:
        """The variants, without those that they are compared with."""
        return tuple(name for name in self.variants if name not in self.named(phrase)) or self.variants

    def begin(self, phrase: str) -> bool:
        """Whether a phrase is a model of the suite, or its quality, and not something else of it."""
        row, source = self.rows.pattern, self.source.pattern
        model = rf"(?:the |its )?(?:{_QUALITY} of (?:the )?)?`?(?:{row}|{source})`?(?: model| checkpoint)?"
        return bool(re.fullmatch(rf"{model}(?:['’]s)?(?: {_QUALITY})?", phrase, re.IGNORECASE))

    def subject(self, near: str, before: str, after: str) -> tuple[str, ...]:
        """What a claim is of by its own part of the sentence: the rows named since the last claim, those before, the
        source ("BF16 is still slightly faster", and not "compared to BF16"), or rows after it ("a lossless w4a4")."""
        if rows := self.named(near) or self.named(before):
            return rows
        for found in self.source.finditer(before):
            led = re.search(
                r"\b(?:to|than|from|with|of|against|over|vs|versus|in|for) (?:the )?$", before[: found.start()]
            )
            verb = r"(?: model| checkpoint)?(?: (?:is|was|runs|decodes)(?: \w+){0,3})? *"
            if not led and re.fullmatch(verb, before[found.end() :]):
                return (SOURCE,)
        return self.named(after)

    def compared(self, phrase: str, of: tuple[str, ...], words: str, part: str) -> tuple[tuple[str, ...], str | None]:
        """The rows that a claim is held against, none where it names none, and what it names that is no row."""
        others = tuple(row for row in (SOURCE, *self.variants) if row not in of)
        if best := _BEST.match(words):
            return others, None if best["best"] and _OF_THE_SUITE.search(part) else "everything else"
        found = [row for row in self.named(phrase) if row not in of]
        rest = self.rows.sub(" ", phrase)
        if self.source.search(rest):
            found += [SOURCE] if SOURCE not in of else []
            rest = self.source.sub(" ", rest)
        if _ALL_OTHERS.search(rest):
            found += [row for row in others if row != SOURCE]
        is_known = found or _OURS.search(rest) or _NO_MODEL.fullmatch(rest)
        return tuple(dict.fromkeys(found)), phrase if _OTHER_MODEL.search(rest) or not is_known else None


def _models(suite: Suite) -> _Models:
    longest_first = sorted(suite.rows()[1:], key=len, reverse=True)
    ids = [name for name in (suite.source.location, suite.source.base_model) if name]
    own = [re.escape(name) for one in ids for name in (one, one.rpartition("/")[2]) if name]
    return _Models(
        tuple(suite.variants),
        re.compile(rf"(?<![\w.+-])(?:{'|'.join(map(re.escape, longest_first))})(?![\w+-]|\.\w)"),
        re.compile(rf"(?<![\w-])(?:{'|'.join((*own, _FULL))})(?![\w-])", re.IGNORECASE),
    )


def _number(kind: str, plain: str, start: int, end: int) -> tuple[float, float] | None:
    """How many times as fast, or what share of the source's score, a claim says, and how far it may be rounded."""
    words = plain[start:end]
    if kind not in ("faster", "recovery"):
        return None
    if times := _MULTIPLES.get(words.split()[0].lower()):
        return times, 0.0
    found = _NUMBER.search(words)
    if kind == "faster" and found is None:
        found = re.search(rf"{_NUMBER.pattern}\)? (?:[\w-]+ ){{0,2}}$", plain[:start], re.IGNORECASE)
        after = rf"[^.,;]{{0,40}}?(?:of|by|\() ?(?:[a-z]+ ){{0,2}}\+?(?:[\d.]+ ?(?:-|to) ?)?{_NUMBER.pattern}"
        found = found or re.match(after, plain[end:], re.IGNORECASE)
    if found is None:
        return (1.0, 0.0) if kind == "recovery" else None  # all of it, where no share is named
    digits, decimals, percent = found.groups()
    unit = 0.01 if percent else 1.0
    more = 1.0 if percent and kind == "faster" else 0.0
    return more + unit * float(digits), min(0.05, unit * 0.5 * 10 ** -len(decimals or ""))
