"""Calibration samples: from the sources that a suite names to lists of token ids, the same on every machine.

A *row* of a table makes one sample, cut after `max_tokens`; empty rows are passed over. A *text* (a .txt file, or a
part of the embedded corpus) is tokenized as a whole and cut into windows of `max_tokens`, which are chosen like rows.
A chat becomes text by the model's own template, without special tokens beside those that the template writes. A
source that cannot give what is asked of it is refused before any weight is read.
"""

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from harness.errors import UserError, first_line
from harness.progress import Progress
from harness.quantize.rows import Content, Row, open_samples
from harness.suite.texts import Calibration, DatasetSamples, DemoSamples, FileSamples, Samples
from harness.suite.values import as_json

_MIN_TOKENS = 2  # of a sample: a single token has no context, and its attention nothing to attend to
_HALF_PAIR = re.compile("[\ud800-\udfff]")

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class CalibrationSet:
    """Token ids of every sample, in the order of the sources, and where they come from.

    `manifest` is JSON: `digest`, `num_samples`, `num_tokens`, and `sources`, each with what the suite says of it
    (`source`), its `name`, the `revision` of a dataset and the `file_sha256` of a file where there is one, `num_rows`,
    the `row_indexes` chosen (of windows, for a text; from 0), `num_tokens`, and `sample_sha256`.
    """

    samples: tuple[tuple[int, ...], ...]
    manifest: dict[str, Any]

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples together."""
        return sum(map(len, self.samples))

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) over all samples in order, each as its length and its ids, little-endian 32-bit integers."""
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(_as_bytes([len(sample), *sample]))
        return digest.hexdigest()


def read_samples(
    calibration: Calibration,
    tokenizer_folder: Path,
    base_folder: Path,
    demo_texts: Mapping[str, Callable[[], str]],
    progress: Progress,
) -> CalibrationSet:
    """The samples of a calibration set, by the tokenizer in `tokenizer_folder`. Relative paths start at `base_folder`.

    `demo_texts` has the text of each part of the embedded corpus. `UserError` for a file, column, row, template or
    dataset that is missing or wrong, and for too few usable rows.
    """
    encoder = _Encoder(tokenizer_folder)
    if any(isinstance(one, FileSamples | DatasetSamples) and (one.messages or one.user) for one in calibration.sources):
        encoder.require_template()
    # All sources are opened before the first is tokenized: a misspelt column is not found after minutes of work.
    opened = [open_samples(source, base_folder, demo_texts) for source in calibration.sources]
    total = sum(source.samples for source in calibration.sources)
    progress(0, total, "calibration samples")
    samples: list[tuple[int, ...]] = []
    manifests = []
    for source, content in zip(calibration.sources, opened, strict=True):
        num_rows, chosen = _choose(source, content, encoder, _within(progress, len(samples), total))
        samples += chosen.values()
        manifests.append(
            {
                "name": content.name,
                "source": as_json(source),
                "revision": content.revision,
                "file_sha256": content.file_sha256,
                "num_rows": num_rows,
                "row_indexes": list(chosen),
                "num_samples": len(chosen),
                "num_tokens": sum(map(len, chosen.values())),
                "sample_sha256": [hashlib.sha256(_as_bytes(sample)).hexdigest() for sample in chosen.values()],
            }
        )
    found = CalibrationSet(tuple(samples), {})
    about = {"digest": found.digest, "num_samples": len(samples), "num_tokens": found.num_tokens}
    # Through JSON, so that what is compared with a stored manifest has no tuples in it.
    return replace(found, manifest=json.loads(json.dumps({**about, "sources": manifests})))


def shuffled(count: int, seed: int) -> Iterator[int]:
    """0 … count - 1 in a random order that only the two arguments decide, each drawn when it is asked for."""
    below_one = random.Random(seed).random
    moved: dict[int, int] = {}  # Fisher-Yates over an array that is never written out: only what changed place
    for position in range(count):
        other = position + int(below_one() * (count - position))
        yield moved.get(other, other)
        moved[other] = moved.pop(position, position)


def _within(progress: Progress, before: int, total: int) -> Progress:
    def tell(done: int, _: int, name: str, note: str = "", /) -> None:
        progress(before + done, total, f"calibration samples: {name}", note)

    return tell


def _as_bytes(ids: Sequence[int]) -> bytes:
    return np.asarray(ids, dtype="<u4").tobytes()


def _choose(
    source: Samples, content: Content, encoder: "_Encoder", progress: Progress
) -> tuple[int, dict[int, tuple[int, ...]]]:
    """How many rows (or windows) the source has, and as many samples as it asks for, by the row that each is of.
    `progress` counts those of this source."""
    length = source.max_tokens
    if content.text is not None:
        ids = encoder.encode(content.text)
        what, candidates = f"windows of {length:,} tokens", -(-len(ids) // length)
    else:
        assert content.rows is not None
        what, candidates = "rows", len(content.rows)
    chosen: dict[int, tuple[int, ...]] = {}
    for index in shuffled(candidates, source.seed):
        if content.text is not None:
            sample = ids[index * length : (index + 1) * length]
        else:
            text = _text_of(source, content, index, encoder)
            if _HALF_PAIR.search(text):
                raise UserError(
                    f"{content.where(index)}: the text holds half of a UTF-16 pair, which is no character.",
                    "Mend the row: its writer cut a text in the middle of a character.",
                )
            sample = encoder.encode(text)[:length] if text else []
        if len(sample) < _MIN_TOKENS:
            continue
        chosen[index] = tuple(sample)
        progress(len(chosen), source.samples, content.name)
        if len(chosen) == source.samples:
            return candidates, chosen
    raise UserError(
        f"{content.name} has {len(chosen):,} usable samples in {candidates:,} {what}, "
        f"and the calibration asks for {source.samples:,}.",
        "Ask for fewer samples or give more text: empty rows do not count.",
    )


def _text_of(source: Samples, content: Content, index: int, encoder: "_Encoder") -> str:
    """A row as the text that is tokenized; "" for an empty row."""
    assert content.rows is not None and not isinstance(source, DemoSamples)
    row, where = content.rows[index], content.where(index)
    if source.column is not None:
        text = _words(row, source.column, where)
        return text if text.strip() else ""
    if source.messages is not None:
        messages = _messages(row.get(source.messages), source.messages, where)
    else:
        assert source.user is not None and source.assistant is not None
        asked = "\n\n".join(words for name in source.user if (words := _words(row, name, where)).strip())
        answer = _words(row, source.assistant, where)
        if not asked or not answer.strip():
            return ""
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    if not any(message["content"].strip() for message in messages):
        return ""
    return encoder.render(messages, where)


def _words(row: Row, column: str, where: str) -> str:
    value = row.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(
            f"{where}: column '{column}' holds {type(value).__name__} {_short(value)}, not text.",
            "Name a column of text, or a column of chats as messages.",
        )
    return value


def _messages(value: Any, column: str, where: str) -> Messages:
    """A chat as templates take it; [] for none. Fields that a table only fills up with nulls are left out."""
    if value is None:
        return []
    remedy = "Each message must be {role, content}, both text; for questions and answers, name user and assistant."
    if not isinstance(value, list):
        raise UserError(f"{where}: column '{column}' holds no list of messages but {_short(value)}.", remedy)
    for number, message in enumerate(value):
        if not isinstance(message, dict):
            raise UserError(f"{where}: {column}[{number}] is no message but {_short(message)}.", remedy)
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                has = f"the {key} {_short(message[key])}" if key in message else f"no {key}"
                raise UserError(f"{where}: {column}[{number}] has {has}.", remedy)
    return [{key: part for key, part in message.items() if part is not None} for message in value]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


class _Encoder:
    """The tokenizer of a checkpoint's folder and, once it is needed, its chat template."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise UserError(
                f"{folder} has no tokenizer.json, which calibration text is tokenized with.",
                "Copy the one of the model that it was made from into it.",
            )
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception for every parse error
            raise UserError(f"{file} is not a tokenizer: {error}.", "Copy the model's own again.") from None
        # Some files carry the settings of their last training run, which would cut or fill up silently.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def require_template(self) -> None:
        """`UserError` if chats cannot be rendered."""
        if not self._template.chat_template:
            raise UserError(
                f"The tokenizer in {self._folder} has no chat template, and the calibration has chats.",
                "Add the model's chat_template.jinja to the folder, or name a column of plain text.",
            )

    def render(self, messages: Messages, where: str) -> str:
        """A chat as the text that the model was trained on, without an opened answer at its end."""
        try:
            text: str = self._template.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # whatever a template raises: its own refusals, jinja's errors, Python's
            raise UserError(
                f"{where}: the chat template refuses the messages: {first_line(error)}.",
                "Mend the row, or leave it out of the file.",
            ) from error
        return text

    @cached_property
    def _template(self) -> Any:
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self._folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # the files of a tokenizer can be wrong in as many ways as there are classes
            raise UserError(
                f"transformers cannot load the tokenizer in {self._folder}: {first_line(error)}.",
                "Copy the model's tokenizer files again.",
            ) from error
