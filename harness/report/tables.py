"""Tables: rows of values, and how a table is written as Markdown, for a terminal, and as JSON.

How a value of a column looks is written once, in `columns.COLUMNS`. Columns that describe the measurement (protocol,
number of tokens ...) move into the caption where all rows agree. The row that all others are divided by is named in the
headings. An estimate without an interval carries a mark, which a line below the table explains.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tabulate import tabulate

from harness.record.run import Record
from harness.record.stats import Estimate
from harness.report.columns import COLUMNS, NO_INTERVAL, NO_INTERVAL_MARK, Spread, escape, lacks_interval


@dataclass(frozen=True)
class Table:
    """Rows of values by column: numbers, texts, `Estimate`s with their interval, and in the column `run` the `Record`,
    or several, that the row comes from. Every row has every column, with None where it has no value. A table without
    rows is false."""

    columns: tuple[str, ...]
    rows: tuple[dict[str, Any], ...]

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.rows)

    def __getitem__(self, column: str) -> list[Any]:
        """The values of a column, row by row."""
        return [row[column] for row in self.rows]

    def row(self, **wanted: object) -> dict[str, Any] | None:
        """The first row that has these values; None if there is no such row."""
        return next((row for row in self.rows if all(row[key] == value for key, value in wanted.items())), None)

    def without(self, *columns: str) -> "Table":
        """The same rows without some columns."""
        kept = tuple(column for column in self.columns if column not in columns)
        return Table(kept, tuple({column: row[column] for column in kept} for row in self.rows))


def table_of(rows: Iterable[Mapping[str, Any]]) -> Table:
    """A table of rows that may lack some values, with the columns of all of them in the order of `COLUMNS`. Other keys
    are left out."""
    given = list(rows)
    columns = tuple(column for column in COLUMNS if any(column in row for row in given))
    return Table(columns, tuple({column: row.get(column) for column in columns} for row in given))


def markdown_table(table: Table, link: Callable[[Record], str]) -> str:
    """A caption and a Markdown table, runs as links. `link` gives a record's URL from where the text will stand."""

    def cell(column: str, value: object) -> str:
        if runs := runs_of(value):
            return " ".join(f"[{record.run.run_id}]({link(record)})" for record in runs)
        return escape(value) if isinstance(value, str) else cell_text(column, value)

    return _laid_out(table, cell, "pipe")


def terminal_table(table: Table) -> str:
    """The same caption and table for a terminal, runs by their ids."""
    return _laid_out(table, cell_text, "simple")


def json_rows(table: Table) -> list[dict[str, Any]]:
    """The rows as JSON values: estimates as objects, runs by their ids."""

    def plain(value: object) -> object:
        if isinstance(value, Estimate | Spread):
            return asdict(value)
        if isinstance(value, tuple):
            return [record.run.run_id for record in runs_of(value)]
        return value.run.run_id if isinstance(value, Record) else value

    return [{column: plain(value) for column, value in row.items()} for row in table.rows]


def runs_of(value: object) -> tuple[Record, ...]:
    """The runs in a cell of the column `run`; none in a cell of another column."""
    if isinstance(value, Record):
        return (value,)
    return value if isinstance(value, tuple) else ()


def cell_text(column: str, value: object) -> str:
    """The text of a cell: a dash for what is unknown or does not apply, a refusal in its own words, runs by their ids,
    any other value as its column shows it, with a mark if it is an estimate without an interval."""
    if runs := runs_of(value):
        return " ".join(record.run.run_id for record in runs)
    if value is None or isinstance(value, str):
        return value or "—"
    text = COLUMNS[column].show(value)
    return f"{text} {NO_INTERVAL_MARK}" if lacks_interval(value) else text


def headings_of(table: Table) -> dict[str, str]:
    """The heading of each column that stands in the table or in its caption, by column."""
    named = {column: next(iter(table[column]), "") for column in table.columns if COLUMNS[column].named_in_headings}
    return {column: COLUMNS[column].heading.format_map(named) for column in table.columns if column not in named}


def _laid_out(table: Table, cell: Callable[[str, object], str], table_format: str) -> str:
    headings = headings_of(table)
    cells = {column: [cell(column, value) for value in table[column]] for column in headings}
    constant = [column for column in cells if COLUMNS[column].describes and len(set(cells[column])) == 1]
    caption = " · ".join(f"{headings[column]} {cells[column][0]}" for column in constant)
    columns = [column for column in cells if column not in constant]
    text = tabulate(
        list(zip(*(cells[column] for column in columns), strict=True)),
        headers=[headings[column] for column in columns],
        colalign=["right" if COLUMNS[column].numeric else "left" for column in columns],
        disable_numparse=True,
        tablefmt=table_format,
    )
    is_marked = any(lacks_interval(value) for row in table.rows for value in row.values())
    return "\n\n".join(part for part in (caption, text, NO_INTERVAL if is_marked else None) if part)
