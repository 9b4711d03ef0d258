"""WikiText as lm-eval measures it: page by page, detokenized, as perplexity per word of the original page.

A page is written back into ordinary English, made into tokens, and read after one end-of-text token in windows as long
as the model takes; the mean is over the words that the page had *before* that. Detokenizer and windows are lm-eval's
own functions. Its dataset (EleutherAI/wikitext_document_level) is WikiText's files cut at their headings, as here.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

from harness.errors import UserError
from harness.measure.lm import EngineLM, Settings, Texts
from harness.measure.perplexity import Window


@dataclass(frozen=True)
class Documents:
    """Pages as token ids, one after the other, each with the token that stands before it."""

    ids: list[int]
    windows: list[Window]
    """The windows of all pages, in order; every token of a page is scored once."""
    num_words: list[int]
    """Words of each page before it was detokenized, as lm-eval counts them."""
    num_tokens: list[int]
    """Tokens of each page, without the token that stands before it."""


def pages(text: str) -> list[str]:
    """The pages of WikiText in the form of its files (`wiki.test.raw`), where a page begins with ` = Title = `, lines
    end with a line feed, and every other line is blank. `UserError` for a text without a title.

    A line is a title if it still begins with `= ` and ends with ` =` when the signs of deeper headings (`= =`,
    `= = =`) have been drawn together.
    """
    found: list[str] = []
    lines: list[str] = []
    num_titles = 0
    for line in text.split("\n"):
        joined = line.replace("= = =", "===").replace("= =", "==").strip()
        if joined.startswith("= ") and joined.endswith(" ="):
            num_titles += 1
            found.append("\n".join(lines))
            lines = []
        lines.append(line)
    if not num_titles:
        raise UserError(
            "The text has no page titles (' = Title = '), and lmeval-word measures WikiText page by page.",
            "Use a file or dataset of WikiText in its raw form.",
        )
    found.append("\n".join(lines))
    return [page for page in found if page.strip()]


def tokenize_pages(pages: Sequence[str], texts: Texts, window: int) -> Documents:
    """The pages as token ids and windows, as `lm_eval --model hf` makes them. `window` is the most tokens that are
    predicted together (`lm.rolling_window`)."""
    model = EngineLM(texts, Settings(thinking=None, seed=0, batch_size=1, window=window))
    ids: list[int] = []
    windows: list[Window] = []
    num_tokens = []
    for number, page in enumerate(pages):
        end = 1  # tokens of the page so far, and the one before it
        first = len(ids)
        ids.append(model.prefix_token_id)
        for before, after in model.rolling(wikitext_detokenizer({"page": page})):
            windows.append(Window(first + end - len(before), len(before) + len(after), len(before), number))
            ids += after
            end += len(after)
        num_tokens.append(end - 1)
    # Blanks at either end of a page count as a word each: lm-eval splits and does not strip.
    return Documents(ids, windows, [len(re.split(r"\s+", page)) for page in pages], num_tokens)
