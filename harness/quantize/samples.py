"""Calibration samples: from the sources that a suite names to lists of token ids.

Calibration watches what flows through a model, so what is run through it belongs to the artifact as much as the
weights do. Three habits of calibration scripts make it impossible to repeat, and are avoided here:

* Rows are chosen by `shuffled`, integer arithmetic over the one stream that Python guarantees for a seed, not by a
  shuffle whose result depends on a library's version.
* A chat becomes text by the model's own template and ids by its `tokenizer.json`, without special tokens beside those
  that the template writes: no second <bos>, no class of tokenizer that another release picks differently.
* The manifest says of every source which rows were taken, and of every sample the SHA-256 of its ids. Two artifacts
  with the same digest were calibrated on the same tokens, in the same order.

A *row* of a table makes one sample, cut after `max_tokens`; empty rows are passed over. A *text* (a .txt file, or a
part of the embedded corpus) is tokenized as a whole and cut into windows of `max_tokens`, which are chosen like rows.

Nothing is skipped quietly: a source that cannot give what is asked of it is refused before any weight is read.
"""

import csv
import dataclasses
import hashlib
import io
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tokenizers import Tokenizer

from harness.errors import UserError, did_you_mean
from harness.progress import Progress
from harness.suite import TEXT_FILE, Calibration, DatasetSamples, DemoSamples, FileSamples, Samples

_MIN_TOKENS = 2  # of a sample: a single token has no context, and its attention nothing to attend to
_HALF_PAIR = re.compile("[\ud800-\udfff]")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LONGEST_CSV_FIELD = 2**31 - 1  # the module's own limit is 128 KiB, less than a long chat

Row = Mapping[str, Any]
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


def read(
    calibration: Calibration,
    tokenizer_folder: Path,
    base_folder: Path,
    demo_texts: Mapping[str, Callable[[], Iterator[str]]],
    progress: Progress,
) -> CalibrationSet:
    """The samples of a calibration set, by the tokenizer in `tokenizer_folder`.

    Relative paths start at `base_folder`. `demo_texts` has, by the name of a part of the embedded corpus, the texts
    that it consists of; they are joined with nothing in between, so each should end as the model's training texts do.

    `UserError` for a file, column, row, template or dataset that is missing or wrong, and for too few usable rows.
    """
    encoder = _Encoder(tokenizer_folder)
    if any(isinstance(one, FileSamples | DatasetSamples) and (one.messages or one.user) for one in calibration.sources):
        encoder.require_template()
    # All sources are opened before the first is tokenized: a misspelt column is not found after minutes of work.
    opened = [_open(source, base_folder, demo_texts) for source in calibration.sources]
    total = sum(source.samples for source in calibration.sources)
    progress(0, total, "calibration samples")
    samples: list[tuple[int, ...]] = []
    manifests = []
    for source, content in zip(calibration.sources, opened, strict=True):
        chosen = _choose(source, content, encoder, _within(progress, len(samples), total))
        samples += chosen.samples
        manifests.append(
            {
                "name": content.name,
                "source": dataclasses.asdict(source),
                "revision": content.revision,
                "file_sha256": content.file_sha256,
                "num_rows": chosen.count,
                "row_indexes": chosen.indexes,
                "num_samples": len(chosen.samples),
                "num_tokens": sum(map(len, chosen.samples)),
                "sample_sha256": [hashlib.sha256(_as_bytes(sample)).hexdigest() for sample in chosen.samples],
            }
        )
    found = CalibrationSet(tuple(samples), {})
    manifest = {
        "digest": found.digest,
        "num_samples": len(samples),
        "num_tokens": found.num_tokens,
        "sources": manifests,
    }
    # Through JSON, so that what is compared with a stored manifest has no tuples in it.
    return CalibrationSet(found.samples, json.loads(json.dumps(manifest)))


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


@dataclass(frozen=True)
class _Content:
    """An opened source: either the rows of a table or one text."""

    name: str
    rows: Sequence[Row] | None = None
    first_row: str = "row 0"  # how messages call the first row: what people count in the file from
    text: str | None = None
    revision: str | None = None
    file_sha256: str | None = None

    def where(self, index: int) -> str:
        """A row's place, in words."""
        unit, first = self.first_row.split()
        return f"{self.name}, {unit} {int(first) + index}"


@dataclass(frozen=True)
class _Chosen:
    """Which rows (or windows) of how many, and what they came to."""

    indexes: list[int]
    count: int
    samples: list[tuple[int, ...]]


def _choose(source: Samples, content: _Content, encoder: "_Encoder", progress: Progress) -> _Chosen:
    """As many samples as the source asks for; `progress` counts those of this source."""
    length = source.max_tokens
    if content.text is not None:
        ids = encoder.encode(content.text)
        what, candidates = f"windows of {length:,} tokens", -(-len(ids) // length)
    else:
        assert content.rows is not None
        what, candidates = "rows", len(content.rows)
    chosen = _Chosen([], candidates, [])
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
        chosen.indexes.append(index)
        chosen.samples.append(tuple(sample))
        progress(len(chosen.samples), source.samples, content.name)
        if len(chosen.samples) == source.samples:
            return chosen
    raise UserError(
        f"{content.name} has {len(chosen.samples):,} usable samples in {candidates:,} {what}, "
        f"and the calibration asks for {source.samples:,}.",
        "Ask for fewer samples or give more text: empty rows do not count.",
    )


def _text_of(source: Samples, content: _Content, index: int, encoder: "_Encoder") -> str:
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
                f"{where}: the chat template refuses the messages: {_first_line(error)}.",
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
                f"transformers cannot load the tokenizer in {self._folder}: {_first_line(error)}.",
                "Copy the model's tokenizer files again.",
            ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _open(source: Samples, base_folder: Path, demo_texts: Mapping[str, Callable[[], Iterator[str]]]) -> _Content:
    """Finds a source, and checks that it has the columns it is to be read by."""
    match source:
        case DemoSamples(demo=demo):
            if demo not in demo_texts:
                raise UserError(f"The embedded corpus has no text '{demo}'.", did_you_mean(demo, demo_texts))
            return _Content(f"demo:{demo}", text="".join(demo_texts[demo]()))
        case FileSamples(path=path):
            return _open_file(source, base_folder / Path(path).expanduser())
        case DatasetSamples():
            return _open_dataset(source)


def _columns(source: FileSamples | DatasetSamples) -> list[str]:
    """The columns that a source is read by."""
    named = (source.column, source.messages, *(source.user or ()), source.assistant)
    return [name for name in named if name is not None]


def _check_columns(name: str, wanted: Sequence[str], known: Sequence[str]) -> None:
    if not known:
        raise UserError(f"{name} has no rows.", "Check that it is the file that is meant.")
    for column in wanted:
        if column not in known:
            raise UserError(f"{name} has no column '{column}'.", did_you_mean(column, known))


def _open_file(source: FileSamples, path: Path) -> _Content:
    name, suffix, wanted = source.path, path.suffix.lower(), _columns(source)
    first_row = "row 0"
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            if suffix == ".parquet":
                return _Content(name, rows=_parquet_rows(file, name, wanted), file_sha256=digest)
            data = file.read()
    except OSError as error:
        raise UserError(
            f"The calibration file {path} cannot be read: {error.strerror or error}.",
            "Check its path: a relative one starts at the folder of the file that names it.",
        ) from error
    match suffix:
        case ".jsonl":
            rows, first_row = _json_lines(data, name), "line 1"
        case ".json":
            rows = _json_rows(data, name)
        case ".csv":
            rows = _csv_rows(_decoded(data, name), name)
        case _:
            assert suffix == TEXT_FILE  # the suite lets no other by
            return _Content(name, text=_decoded(data, name), file_sha256=digest)
    _check_columns(name, wanted, sorted({key for row in rows for key in row}))
    return _Content(name, rows=rows, first_row=first_row, file_sha256=digest)


def _decoded(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 (byte {error.start:,}).", "Convert it, for example with iconv.") from None


def _json_lines(data: bytes, name: str) -> list[Row]:
    """One object a line; a blank line is an empty row, so that rows and lines are counted alike."""
    lines = data.removesuffix(b"\n").split(b"\n")  # not splitlines: JSON strings may hold other line ends
    rows: list[Row] = []
    for number, line in enumerate(lines, 1):
        row = _parsed(line, f"{name}, line {number},") if line.strip() else {}
        if not isinstance(row, dict):
            raise UserError(f"{name}, line {number}, is no JSON object.", "Write one {...} a line.")
        rows.append(row)
    return rows


def _json_rows(data: bytes, name: str) -> list[Row]:
    rows = _parsed(data, name)
    if not isinstance(rows, list):
        raise UserError(f"{name} is no list of objects.", "Write [{...}, ...], or name it .jsonl if it has one a line.")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{name}, row {number}, is no JSON object.", "Write [{...}, ...].")
    return rows


def _parsed(data: bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if b"\n" in data.rstrip() else f"column {error.colno}"
        hint = " A file with one object a line is to be named .jsonl." if error.msg == "Extra data" else ""
        raise UserError(f"{where} is not JSON: {error.msg} at {place}.", f"Mend it.{hint}") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8 (byte {error.start:,}).", "Convert it, for example with iconv."
        ) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
        raise UserError(f"{where} cannot be read as JSON: {_first_line(error)}.", "Mend it.") from None


def _csv_rows(text: str, name: str) -> list[Row]:
    """Every cell as text, under the names of the first line."""
    limit = csv.field_size_limit(_LONGEST_CSV_FIELD)
    reader = csv.reader(io.StringIO(text.removeprefix("\ufeff"), newline=""), strict=True)
    rows: list[Row] = []
    try:
        header = next(reader, [])
        for cells in reader:
            if cells and len(cells) != len(header):
                raise UserError(
                    f"{name}, line {reader.line_num}, has {len(cells)} cells under {len(header)} column names.",
                    "Quote cells that contain a comma.",
                )
            if cells:
                rows.append(dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise UserError(f"{name}, line {reader.line_num}, is not CSV: {error}.", "Mend that line.") from None
    finally:
        csv.field_size_limit(limit)
    return rows


class _ArrowRows(Sequence[Row]):
    """Rows of an Arrow table, made into Python values when they are asked for."""

    def __init__(self, table: Any) -> None:
        self._table = table

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, index: Any) -> Any:
        return {name: self._table.column(name)[index].as_py() for name in self._table.column_names}


def _parquet_rows(file: BinaryIO, name: str, wanted: Sequence[str]) -> Sequence[Row]:
    from pyarrow import parquet  # type: ignore[import-untyped]

    try:
        names = parquet.read_schema(file).names
        table = parquet.read_table(file, columns=[column for column in names if column in wanted])
        table.validate(full=True)
    except Exception as error:  # a damaged file gives Arrow's, the operating system's and Unicode's errors
        raise UserError(f"{name} is no sound Parquet file: {_first_line(error)}.", "Write or fetch it again.") from None
    _check_columns(name, wanted, names)
    return _ArrowRows(table)


def _open_dataset(source: DatasetSamples) -> _Content:
    name = "/".join(part for part in (source.dataset, source.config, source.split) if part)
    try:
        import datasets  # type: ignore[import-untyped]
    except ImportError:
        raise UserError("Reading from the hub needs `datasets`.", "Run `pip install datasets`.") from None
    try:
        rows = datasets.load_dataset(source.dataset, source.config, split=source.split, revision=source.revision)
    except Exception as error:
        # Its errors for "no network", "no such name" and "no such split" have no base class of their own.
        arguments = ", ".join(repr(part) for part in (source.dataset, source.config) if part is not None)
        arguments += f", revision={source.revision!r}" if source.revision is not None else ""
        raise UserError(
            f"The dataset {source.dataset} ({source.config or 'default'}, {source.split}) cannot be loaded: "
            f"{_first_line(error)}.",
            "On a machine with the network, fetch it once into the cache with "
            f'`python -c "import datasets; datasets.load_dataset({arguments})"`, or give a local file as path.',
        ) from error
    revision = _commit(rows)
    if source.revision is not None and _COMMIT.fullmatch(source.revision) and revision not in (None, source.revision):
        # Offline, the library takes whatever commit its cache holds.
        raise UserError(
            f"The dataset {source.dataset} is in the cache at commit {revision}, not {source.revision}.",
            "Fetch the other one on a machine with the network, or name the one that is there.",
        )
    wanted = _columns(source)
    _check_columns(f"The dataset {name}", wanted, rows.column_names)
    return _Content(name, rows=rows.select_columns(list(dict.fromkeys(wanted))), revision=revision)


def _commit(rows: Any) -> str | None:
    """The commit of the hub that a dataset was fetched at: the name of its folder in the library's cache."""
    commits = {Path(one["filename"]).parent.name for one in rows.cache_files}
    commit = commits.pop() if len(commits) == 1 else ""
    return commit if _COMMIT.fullmatch(commit) else None
