"""What a calibration source holds: the rows of a file or dataset, or one text."""

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from harness.errors import UserError, did_you_mean, first_line
from harness.model.hub import load_rows
from harness.suite.texts import TEXT_FILE, DatasetSamples, DemoSamples, FileSamples, Samples

_COMMIT = re.compile(r"[0-9a-f]{40}")
_LONGEST_CSV_FIELD = 2**31 - 1  # the module's own limit is 128 KiB, less than a long chat

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Content:
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


def open_samples(source: Samples, base_folder: Path, demo_texts: Mapping[str, Callable[[], str]]) -> Content:
    """Opens a source, and checks that it has the columns that the calibration reads."""
    match source:
        case DemoSamples(demo=demo):
            if demo not in demo_texts:
                raise UserError(f"The embedded corpus has no text '{demo}'.", did_you_mean(demo, demo_texts))
            return Content(f"demo:{demo}", text=demo_texts[demo]())
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


def _open_file(source: FileSamples, path: Path) -> Content:
    name, suffix, wanted = source.path, path.suffix.lower(), _columns(source)
    first_row = "row 0"
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            if suffix == ".parquet":
                return Content(name, rows=_parquet_rows(file, name, wanted), file_sha256=digest)
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
            return Content(name, text=_decoded(data, name), file_sha256=digest)
    _check_columns(name, wanted, sorted({key for row in rows for key in row}))
    return Content(name, rows=rows, first_row=first_row, file_sha256=digest)


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
        raise UserError(f"{where} cannot be read as JSON: {first_line(error)}.", "Mend it.") from None


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
        raise UserError(f"{name} is no sound Parquet file: {first_line(error)}.", "Write or fetch it again.") from None
    _check_columns(name, wanted, names)
    return _ArrowRows(table)


def _open_dataset(source: DatasetSamples) -> Content:
    name = "/".join(part for part in (source.dataset, source.config, source.split) if part)
    rows = load_rows(source.dataset, source.config, source.split, source.revision)
    revision = _commit(rows)
    if source.revision is not None and _COMMIT.fullmatch(source.revision) and revision not in (None, source.revision):
        # Offline, the library takes whatever commit its cache holds.
        raise UserError(
            f"The dataset {source.dataset} is in the cache at commit {revision}, not {source.revision}.",
            "Fetch the other one on a machine with the network, or name the one that is there.",
        )
    wanted = _columns(source)
    _check_columns(f"The dataset {name}", wanted, rows.column_names)
    return Content(name, rows=rows.select_columns(list(dict.fromkeys(wanted))), revision=revision)


def _commit(rows: Any) -> str | None:
    """The commit of the hub that a dataset was fetched at: the name of its folder in the library's cache."""
    commits = {Path(one["filename"]).parent.name for one in rows.cache_files}
    commit = commits.pop() if len(commits) == 1 else ""
    return commit if _COMMIT.fullmatch(commit) else None
