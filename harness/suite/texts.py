"""Keys that name text: what perplexity and speed are measured on, and what a calibration runs through the model.

Each of `Text` and `Samples` is one of three tables, told by its first key: `demo`, `path` or `dataset`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import with_config

from harness.suite.values import (
    STRICT,
    AtLeast0,
    AtLeast1,
    AtLeast2,
    Check,
    Distinct,
    NonEmpty,
    ToldByFirstKey,
    at_least,
)

TEXT_FILE = ".txt"
ROW_FILES = (".jsonl", ".json", ".parquet", ".csv")


@dataclass(frozen=True)
class DemoText:
    """A split of the embedded corpus, generated on the spot."""

    demo: NonEmpty
    """The split: "train" or "heldout"."""


@dataclass(frozen=True)
class FileText:
    """A text file."""

    path: NonEmpty
    """A UTF-8 file; a relative path starts at the suite's folder."""


@dataclass(frozen=True)
class DatasetText:
    """One column of a hub dataset; the protocol says how its rows are joined."""

    dataset: NonEmpty
    """The dataset's hub id."""
    config: NonEmpty | None = None
    """The dataset's configuration."""
    split: NonEmpty = "test"
    """The dataset's split."""
    column: NonEmpty = "text"
    """The column that holds the text."""
    revision: NonEmpty | None = None
    """Branch, tag or commit of the dataset."""


Text = Annotated[DemoText | FileText | DatasetText, ToldByFirstKey()]


@dataclass(frozen=True, kw_only=True)
class DemoSamples:
    """Windows of `max_tokens` tokens, cut from the embedded corpus."""

    demo: NonEmpty
    """The split: "train" or "heldout"."""
    samples: AtLeast1
    """How many windows."""
    max_tokens: AtLeast2
    """Tokens in a window."""
    seed: AtLeast0 = 0
    """Which windows are drawn."""


@dataclass(frozen=True, kw_only=True)
class FileSamples:
    """Rows of a local file (JSON, JSON lines, Parquet, CSV), or windows of a text file.

    A row becomes a sample in exactly one of three ways: `column`, or `messages`, or `user` with `assistant`. Chats go
    through the model's own chat template.
    """

    path: NonEmpty
    """The file; a relative path starts at the suite's folder."""
    samples: AtLeast1
    """How many rows, or windows of a text file."""
    max_tokens: AtLeast2
    """Tokens in a sample; a longer one is cut."""
    seed: AtLeast0 = 0
    """Which rows are drawn."""
    column: NonEmpty | None = None
    """A column of plain text, taken as it stands."""
    messages: NonEmpty | None = None
    """A column that holds a chat: a list of {role, content}."""
    user: Distinct[NonEmpty] | None = None
    """Columns that make up the user's message; those that are not empty are joined by an empty line."""
    assistant: NonEmpty | None = None
    """The column with the answer to `user`."""


@dataclass(frozen=True, kw_only=True)
class DatasetSamples:
    """Rows of a hub dataset; `column`, `messages`, `user` and `assistant` as for a file."""

    dataset: NonEmpty
    """The dataset's hub id."""
    config: NonEmpty | None = None
    """The dataset's configuration."""
    split: NonEmpty = "train"
    """The dataset's split."""
    revision: NonEmpty | None = None
    """Branch, tag or commit of the dataset."""
    samples: AtLeast1
    """How many rows."""
    max_tokens: AtLeast2
    """Tokens in a sample; a longer one is cut."""
    seed: AtLeast0 = 0
    """Which rows are drawn."""
    column: NonEmpty | None = None
    """A column of plain text, taken as it stands."""
    messages: NonEmpty | None = None
    """A column that holds a chat: a list of {role, content}."""
    user: Distinct[NonEmpty] | None = None
    """Columns that make up the user's message; those that are not empty are joined by an empty line."""
    assistant: NonEmpty | None = None
    """The column with the answer to `user`."""


Samples = Annotated[DemoSamples | FileSamples | DatasetSamples, ToldByFirstKey()]


def _unclear_samples(value: tuple[Any, ...]) -> str | None:
    for position, source in enumerate(value):
        if isinstance(source, DemoSamples):
            continue
        given = [key for key in ("column", "messages", "user", "assistant") if getattr(source, key) is not None]
        has = " and ".join(given) or "none of them"
        suffix = Path(source.path).suffix.lower() if isinstance(source, FileSamples) else None
        if suffix == TEXT_FILE and given:
            return f"has at [{position}] a {TEXT_FILE} file, which has no columns, and names {has}"
        if suffix is not None and suffix not in (TEXT_FILE, *ROW_FILES):
            return f"has at [{position}] a file whose name ends in none of {', '.join((TEXT_FILE, *ROW_FILES))}"
        if suffix != TEXT_FILE and given not in (["column"], ["messages"], ["user", "assistant"]):
            return f"needs at [{position}] exactly one of column, messages, or user with assistant, and has {has}"
    return None


@with_config(STRICT)
@dataclass(frozen=True)
class Calibration:
    """What a calibrated build runs through the model, and how much of it at once."""

    sources: Annotated[Distinct[Samples], Check(_unclear_samples)]
    """Where samples come from; the samples of all sources count alike."""
    batch_tokens: AtLeast1 = 8192
    """Tokens in a forward pass."""
    hidden_memory_gb: Annotated[float, at_least(0)] = 4.0
    """Hidden states that are kept in memory, in units of 10⁹ bytes; the rest goes to disk."""
