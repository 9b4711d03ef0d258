"""What people claim in prose: which words are a claim, of which kind, about what, and against what.

Read from the words, not understood. A claim is about the variants that its part of the sentence names in front of it or
next to it, else the sentence, else about every variant of the suite. It is held against what follows "than", or its
verb; where nothing follows, against the source.

Not taken for claims: what stands in quotation marks, code, block quotes, comments and addresses, which are somebody
else's words; questions; what is denied or only aimed at by a word at most three words before it in the same part of the
sentence ("not lossless", "no claim of being lossless", "we aim to be lossless"; but not "not only"), or denied by its
verb ("a lossless codec is not used"); the speed of a chore around the model ("the download is faster"); and what is
said of a part that a quantization keeps or copies ("the vision tower is identical to the source's"), whose bytes
`harness verify` compares whatever the prose says. Reported speech without quotation marks and conditions ("would be
faster if") are taken for claims. A boast that uses none of these words is not seen.
"""

import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from harness.suite.names import SOURCE
from harness.suite.schema import Suite


@dataclass(frozen=True)
class Mention:
    """A claim as it is found: the key of the suite file, the sentence, the words and where they begin in it, the part
    of the sentence that they are in, one of `KINDS`, and the rows that it is of and against.

    `unknown` is what it is compared with and is no row of the suite. `number` is what the claim names, with what it may
    be rounded by: the ratio of speeds (`faster`, `no-slower`) or the share of the source's score (`recovery`), or the
    share that is lost at most (`within`).
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
_EMPHASIS = re.compile(r"[*~](?!\d)|(?<!\d)[*~]|(?<!\w)_|_(?!\w)")


def _sentences(text: str) -> Iterator[str]:
    """The sentences of Markdown, one line each, with one kind of hyphens, letters and spaces, and nothing unseen."""
    text = _HYPHEN.sub("-", _UNSEEN.sub("", unicodedata.normalize("NFKC", text)))
    for piece in _PIECE.split(_NO_PROSE.sub(" ", text)):
        yield from filter(None, _SENTENCE.split(" ".join(piece.split())))


def _told(sentence: str) -> tuple[str, list[int]]:
    """A sentence without quotations, addresses and marks of emphasis, which may stand inside a word, and for each of
    its letters where in the sentence that is."""
    told = _blanked(_QUOTED, _blanked(_ADDRESS, sentence))
    marks = {found.start() for found in _EMPHASIS.finditer(told)}
    places = [place for place in range(len(told)) if place not in marks]
    return "".join(told[place] for place in places), places


def _blanked(pattern: re.Pattern[str], text: str) -> str:
    return pattern.sub(lambda found: " " * len(found[0]), text)


# -- Words of claims ---------------------------------------------------------------------------------------------

_QUALITY = (
    "(?:quality|accurac(?:y|ies)|performance|scores?|perplexit(?:y|ies)|ppl|fidelity|capabilit(?:y|ies)|intelligence|"
    "outputs?|answers|results|benchmarks?|evals?)"
)
_WORTH = "(?:quality|accurac(?:y|ies)|performance|perplexity|ppl|fidelity|capabilit(?:y|ies)|intelligence)"
_SPEED = r"(?:(?:\w+ )?(?:speeds?|throughput|latency))"
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
# "At least 5 % worse" is no boast; "no more than 5 % worse" is.
_AT_MOST = "(?<!(?<!no )(?<!not )more than )(?<!at least )(?<!over )"

_GAINED = "(?:decod(?:e|ing)|prefill|generation|inference|throughput|speed)(?: (?:speed|throughput))?"


def _any(*patterns: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w)(?:{'|'.join(patterns)})(?!\w)", re.IGNORECASE)


# What stands between the words of a claim and what it is compared with.
_THAN = re.compile(
    r"\b(?:than|versus|vs|against|compared (?:to|with)|relative to)\b|\A\s*(?:as|over|to)\b", re.IGNORECASE
)
_OF = re.compile(rf"\A\s*of\b|{_THAN.pattern}", re.IGNORECASE)
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
    _Pattern("within", _any(rf"within (?:about |roughly |around )?{_PERCENT}(?= of)"), _OF, is_common=True),
    _Pattern(
        "within",
        _any(
            rf"{_AT_MOST}{_PERCENT} (?:worse|lower {_WORTH}|higher (?:perplexity|ppl))",
            rf"{_AT_MOST}{_PERCENT} (?:{_QUALITY} )?(?:loss|degradation|drop)(?! (?:in|of) (?!(?:\S+ )?{_QUALITY}))",
            rf"los(?:es|ing) (?:only |just |at most |less than |about )?{_PERCENT}"
            rf"(?! of (?!(?:\S+ ){{0,4}}{_QUALITY}))",
        ),
        _THAN,
    ),
    _Pattern(
        "no-slower",
        _any(
            rf"{_AT_MOST}{_PERCENT} slower",
            "(?:no|not) slower",
            rf"(?:same|equal|equivalent|comparable) {_SPEED}(?= (?:as|to|with))",
        ),
        re.compile(rf"{_THAN.pattern}|\A\s*with\b", re.IGNORECASE),
    ),
    _Pattern(
        "no-slower",
        _any(
            r"(?<!half )(?<!twice )(?<!thrice )(?<!% )(?<!\dx )(?<!× )(?<!times )(?<!percent )as (?:fast|quick)(?= as)"
        ),
        _WITH,
        is_common=True,
    ),
    _Pattern(
        "no-slower",
        _any(rf"(?:match(?:es|ed|ing)?|equals?|rivals?)(?=(?: (?!at\b|in\b|with\b|and\b)\S+){{1,3}} {_SPEED})"),
        _AT_ONCE,
        is_common=True,
    ),
    # Before what is preserved, of which a share may be.
    _Pattern(
        "recovery",
        _any(
            rf"{_PERCENT} (?:{_QUALITY} )?(?:recovery|retention|recovered|retained|preserved)",
            rf"(?:full|complete) (?:{_QUALITY} )?recovery",
            rf"{_PERCENT} of (?:\S+ ){{0,3}}{_QUALITY} (?:is|are) (?:kept|retained|preserved|maintained|recovered)",
        ),
        _THAN,
    ),
    _Pattern(
        "near-lossless",
        _any(
            rf"{_NEARLY}[- ]*(?:loss[- ]?less(?:ly)?|loss-free|identical|indistinguishable|{_NO_LOSS})",
            "(?:negligible|minimal|imperceptible|insignificant|(?:little|next) to no|(?:hardly|barely) any)(?: \\w+)? "
            + _LOSS,
            rf"near[- ]{_FULL}[- ]{_QUALITY}",
            rf"(?:preserv|maintain|retain)(?:s|es|ed|ing)? (?:the |its |full |all )?(?:(?:model|{_FULL}) )?{_QUALITY}",
            rf"without (?:sacrificing|compromising|losing|hurting|degrading)(?: any)?(?: \w+)? {_QUALITY}",
            rf"{_WORTH} (?:is|are|remains?|stays?)(?: \w+ly)? (?:preserved|maintained|retained|unchanged|intact|"
            "unaffected)",
        ),
        _THAN,
    ),
    _Pattern(
        "near-lossless",
        _any(rf"{_NEARLY} (?:the same|equal|equivalent|as (?:good|accurate|capable|faithful))(?= (?:as|to))"),
        _WITH,
        is_common=True,
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
            rf"full {_FULL}(?:['’]s)? {_WORTH}",
            "full (?:quality|accuracy|fidelity)",
            rf"{_FULL}-(?:level|grade) {_WORTH}",
        ),
        _WITH,
    ),
    _Pattern(
        "equal",
        _any(
            "match(?:es|ed|ing)?",
            "equals?",
            "ties(?: with)?",
            "rivals?",
            "(?:is|are) equivalent to",
            "(?:is|are|exactly) the same as",
        ),
        _AT_ONCE,
        is_common=True,
    ),
    _Pattern(
        "recovery",
        _any(
            rf"recover(?:s|ed|y|ing)?(?: (?:of|is|at|least|about|over|more|than|up|to|>))* ?>?{_PERCENT}",
            rf"(?:retain|preserv|keep|kept|maintain|reach|achiev)\w*(?: \w+){{0,3}} >?{_PERCENT}"
            rf"(?= of (?:\S+ ){{0,4}}{_QUALITY})",
            rf"(?:retain|preserv|keep|kept|maintain)\w*(?: \w+){{0,3}} >?{_PERCENT}"
            rf"(?= of (?:the )?{_FULL}(?!\w)(?! \w)|\s*(?:[.,;:)!]|$|(?:and|or|on|across)\b))",
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
            "speed(?:ier|iest)",
            "speed-?ups?",
            "(?:speeds?|sped|speeding) up",
            r"accelerates?(?= (?:\w+ )?(?:decod|infer|generat|prefill))",
            "outpaces?",
            r"(?:higher|highest|greater|better|increased|improved|superior|more) (?:\w+ ){0,2}"
            "(?:throughput|speeds?|tok/s|tokens per second)",
            rf"{_PERCENT} (?:throughput|tok/s)",
            rf"\+{_PERCENT} (?:decod|prefill|generat|infer|speed|throughput)\w*",
            rf"{_GAINED}:? \+{_PERCENT}",
            rf"{_GAINED} (?:gains? {_PERCENT}|(?:improves?|improved|increases?|increased|rises?|rose|grows?|grew)"
            rf"(?: {_PERCENT})?)",
            rf"(?:throughput|speed) is (?:{_PERCENT} |{_TIMES} |\w+ )?(?:higher|greater)",
        ),
        _THAN,
    ),
    _Pattern(
        "faster",
        _any(
            rf"(?:twice|thrice|double|{_TIMES}) as (?:fast|quick)",
            rf"(?:twice|thrice|doubl(?:e|es|ed|ing)|tripl(?:e|es|ed|ing)|quadrupl(?:e|es|ed|ing)|{_TIMES}) "
            r"(?:the |its )?(?:[\w.+'’-]+ ){0,2}(?:speed|throughput)",
            r"(?:halv(?:e|es|ed|ing)|half) (?:the |its )?(?:[\w.+'’-]+ ){0,2}latency",
            rf"(?:{_PERCENT} |{_TIMES} )?(?:less|lower|lowest|shorter|reduced) (?:\w+ )?latency",
            r"(?:cuts?|cutting|reduces?|reducing|lowers?|lowering) (?:the |its )?(?:\w+ )?latency",
        ),
        _OF,
    ),
    _Pattern(
        "better",
        _any("(?:beat(?:s|ing)?|outperform(?:s|ed|ing)?|surpass(?:es|ed|ing)?|outclass(?:es|ed)?)(?! by)"),
        _AT_ONCE,
    ),
    _Pattern(
        "better",
        _any("exceed(?:s|ed|ing)?", "improv(?:e|es|ed|ing) (?:on|upon|over)"),
        _AT_ONCE,
        is_common=True,
    ),
    _Pattern(
        "better",
        _any(
            "(?:wins?|won)(?= (?:over|against))",
            "(?:wins?|won) (?:(?:on|in|at|across) )?(?:every|each|all|most)",
            rf"better(?: {_QUALITY}|(?: \w+){{0,3}}(?= than))",
            "superior",
            "(?:more|most) (?:accurate|capable|faithful)",
            "(?:higher|highest|greater|greatest) (?:quality|accuracy|scores?|fidelity|performance)",
            r"(?:lower|lowest) (?:perplexity|ppl|kl\w*|divergence)",
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
    "every_task": re.compile(
        r"\b(?:every|each|all)(?: of)?(?: (?:the|its))? (?:tasks?|benchmarks?|evals?)\b", re.IGNORECASE
    ),
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
_AIM = re.compile(
    r"\b(?:(?:aim|hope|intend|strive|plan)(?:s|ed)?|try|tries|tried|aiming|hoping|trying|striving|"
    r"(?:goal|aim|hope) (?:is|was)) (?:to|for|at)\b(?:\s+\S+){0,3}\s*$",
    re.IGNORECASE,
)
_DENIED_AFTER = re.compile(
    r"\A(?:\s+\S+){0,4}?\s+(?:(?:is|are|was|were|can|will be) ?(?:not|n['’]t|never)|cannot|can['’]t)(?: be)? "
    r"(?:used|needed|claimed|promised|guaranteed|possible|meant|attempted|applied|achieved|reached|expected|available|"
    r"(?:the|our) (?:aim|goal)|what)\b",
    re.IGNORECASE,
)
_MUCH = r"(?: (?:much|far|also|even|still|all|a (?:bit|lot|little)|\w+ly))*"
# Work around the model, whose speed is none of the model's.
_CHORE = (
    r"(?:(?:down|up)?load(?:s|ing)?|install(?:s|ing|ation)?|compil(?:es|ing|ation)|start-?ups?|calibrat(?:es|ing|ion)|"
    r"builds?|building|conver(?:ts|ting|sion)|tokeni[sz](?:es|ing|ation))"
)
_CHORE_BEFORE = re.compile(
    rf"\b{_CHORE}(?: (?:of|from) (?:\S+ ){{0,2}}\S+)?(?: (?:is|are|was|gets?|becomes?|runs?|goes))?{_MUCH}\s*$",
    re.IGNORECASE,
)
_CHORE_AFTER = re.compile(rf"\A(?: to)?(?: (?:file|model|weight|checkpoint)s?)? {_CHORE}\b", re.IGNORECASE)
# Parts that keep their precision, or are no weights at all.
_KEPT = (
    r"(?:vision (?:tower|encoder|part)|mtp(?: (?:heads?|module|layers?))?|(?:input |output )?embeddings?|lm_head|"
    r"norms?|routers?|tokeni[sz]er|vocabulary|chat template|config\w*|layout|architecture)"
)
_KEPT_BEFORE = re.compile(
    rf"\A\s*(?:(?:the|its|all|both|every|each|our|an?) )?(?:\w+ )?{_KEPT}(?: (?:of|in) (?:\S+ ){{0,2}}\S+)?"
    rf"(?: (?:is|are|was|were|stays?|remains?))?{_MUCH}\s*$",
    re.IGNORECASE,
)
_KEPT_AFTER = re.compile(rf"\A {_KEPT}\b", re.IGNORECASE)
_END = re.compile(r"[,:()]|\b(?:because|since|and (?:it|they|is|are)|at|in|on|by|for|across)\b", re.IGNORECASE)
_OURS = re.compile(r"\b(?:nvfp4|fp4|4-bit|quantized|this quant\w*|(?:all|the) variants)\b", re.IGNORECASE)
_ALL_OTHERS = re.compile(r"\b(?:(?:the|all|any|every) others?|other variants?)\b", re.IGNORECASE)
_OTHER_MODEL = re.compile(
    r"(?<![\w.+-])(?:fp8|int[48]|w\d+a\d+|awq|gptq|gguf|exl\d|mxfp\d|nf4|bnb|bitsandbytes|i?q\d_\w+|gpt\S*|claude\S*|"
    r"[\w.-]+/[\w.-]+)(?![\w+-])",
    re.IGNORECASE,
)
_NO_MODEL = re.compile(rf"(?:the|its|their|all|any|every|mean|average|task|model|['’]s|{_QUALITY}|\s)*", re.IGNORECASE)
_BEST = re.compile(
    r"(?P<best>fastest|quickest|speediest|best|most|lowest|highest|greatest)\b|sota|state", re.IGNORECASE
)
_OF_VARIANTS = re.compile(r"\bvariants?\b", re.IGNORECASE)
_OF_THE_SUITE = re.compile(r"\b(?:variants?|suite|here|of these|of the (?:two|three|four|five|six))\b", re.IGNORECASE)
_NUMBER = re.compile(r"(\d+(?:\.(\d+))?)\+? ?(?:(%|percent|per cent)|[x×]|times|-?fold)(?!\w)", re.IGNORECASE)
_MULTIPLES = {"twice": 2.0, "doubl": 2.0, "halv": 2.0, "half": 2.0, "thrice": 3.0, "tripl": 3.0, "quadrupl": 4.0}


def _mentions(key: str, sentence: str, suite: Suite) -> Iterator[Mention]:
    """The claims of a sentence in the order of their words."""
    if sentence.rstrip("\"'”’)*_ ").endswith("?"):
        return
    told, places = _told(sentence)
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
        before, behind = _SCOPE.split(plain[left:start])[-1], _SCOPE.split(plain[end:right])[0]
        if _is_none(pattern.kind, before, behind):
            continue
        stop = _stop(plain, end, right, [(one[0], one[1]) for one in found[place + 1 :]])
        phrase_start, phrase = _phrase(pattern.link, plain[:stop], told[:stop], end)
        if pattern.is_common and not models.begin(phrase):
            continue
        until = phrase_start + len(phrase)
        after = told[end:phrase_start] + told[until:right]
        phrase = phrase or models.first(plain[start:end])  # "twice BF16 speed"
        of = models.subject(told[max(begin, left) : start], told[left:start], after)
        of = of or models.named(told[begin:start]) or models.all_but(phrase)
        versus, unknown = models.compared(phrase, of, plain[start:end], plain[left:right])
        if not versus:
            default = suite.bench.versus if pattern.kind == "faster" and suite.bench else SOURCE
            versus = models.variants if SOURCE in of else (SOURCE,) if default in of else (default,)
        number = _number(pattern.kind, plain, start, end)
        first, words = places[start], sentence[places[start] : places[end - 1] + 1]
        yield Mention(key, sentence, words, first, told[left:right], pattern.kind, of, versus, unknown, number)
        begin = until


def _is_none(kind: str, before: str, after: str) -> bool:
    """Whether words of a claim make none, by what stands before and after them in their part of the sentence."""
    if _DENIAL.search(before) or _AIM.search(before) or _DENIED_AFTER.search(after):
        return True
    if kind in ("faster", "no-slower"):
        return bool(_CHORE_BEFORE.search(before) or _CHORE_AFTER.search(after))
    return bool(_KEPT_BEFORE.search(before) or _KEPT_AFTER.search(after))


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
        """Whether a phrase is a model, or its quality or speed, and not something else of it."""
        row, source = self.rows.pattern, self.source.pattern
        measured = rf"(?:{_QUALITY}|{_SPEED})"
        model = (
            rf"(?:the |its )?(?:(?:{measured}|that|those) of (?:the )?)?`?(?:{row}|{source})`?(?: model| checkpoint)?"
        )
        is_ours = re.fullmatch(rf"{model}(?:['’]s)?(?: {measured})?", phrase, re.IGNORECASE)
        return bool(is_ours or _OTHER_MODEL.fullmatch(phrase))

    def first(self, words: str) -> str:
        """The model that the words of a claim name themselves; nothing if they name none."""
        found = next(filter(None, (one.search(words) for one in (self.rows, self.source, _OTHER_MODEL))), None)
        return found[0] if found else ""

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
            if _OF_VARIANTS.search(part):
                others = tuple(row for row in others if row != SOURCE)
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
    """What a claim says in a number, as `Mention.number`: what may be rounded is half a unit of its last digit, at most
    0.05, and of what is lost at most, nothing."""
    words = plain[start:end]
    if kind not in ("faster", "no-slower", "recovery", "within"):
        return None
    first = words.split()[0].lower()
    if kind == "faster" and (times := next((ratio for word, ratio in _MULTIPLES.items() if first.startswith(word)), 0)):
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
    value, half = unit * float(digits), min(0.05, unit * 0.5 * 10 ** -len(decimals or ""))
    if kind in ("within", "no-slower"):
        return (value if kind == "within" else 1 - value), 0.0
    if kind == "faster" and percent and "latency" in words.lower():  # half the time is twice the speed
        ratio, least = (1 / (1 - share) if share < 1 else math.inf for share in (value, value - half))
        return ratio, ratio - least if math.isfinite(ratio) else 0.0
    return (value + 1.0 if percent and kind == "faster" else value), half
