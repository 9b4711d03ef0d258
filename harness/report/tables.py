"""Tables: rows of values, how a value of each column looks, and how a table is written as Markdown, for a terminal, and
as JSON.

Columns that describe the measurement (protocol, number of tokens ...) move into the caption where all rows agree. The
row that all others are divided by is named in the headings. An estimate without an interval carries a mark, which a
line below the table explains.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from tabulate import tabulate

from harness.formats.names import FP8_DYNAMIC, NVFP4, NVFP4A16
from harness.record.run import Record
from harness.record.stats import Estimate
from harness.report.numbers import format_bytes, format_estimate, format_percent

AT_NOISE = "≤ noise"
NO_INTERVAL_MARK = "†"
NO_INTERVAL = (
    f"{NO_INTERVAL_MARK} no interval: there are too few windows, repetitions, starts or items to draw one from, or all "
    "of them are the same."
)


@dataclass(frozen=True)
class Spread:
    """Errors over layers: the median, the largest, and the layer of the largest."""

    median: float
    largest: float
    layer: int


def scaled(estimate: Estimate, factor: float) -> Estimate:
    """The estimate of factor x value."""
    low, high = (None if bound is None else bound * factor for bound in (estimate.low, estimate.high))
    return replace(estimate, value=estimate.value * factor, low=low, high=high)


def lacks_interval(value: object) -> bool:
    """Whether a value is an estimate of which nothing says how far off it may be."""
    return isinstance(value, Estimate) and (value.low is None or value.high is None)


def _show_spread(spread: Spread) -> str:
    return f"{format_percent(spread.median, '.2g')} (layer {spread.layer}: {format_percent(spread.largest, '.2g')})"


def _as(spec: str) -> Callable[[Any], str]:
    """A number or an `Estimate` under one format specification."""
    return lambda value: format_estimate(value, spec) if isinstance(value, Estimate) else f"{value:{spec}}"


def _show_speed(speed: Estimate | float) -> str:
    """Tokens per second to a hundredth where they are few, as cards print them: 7.93, 170.3, 2383."""
    value = speed.value if isinstance(speed, Estimate) else speed
    return _as(next((spec for bound, spec in ((100, ".2f"), (1000, ".1f")) if value < bound), ".0f"))(speed)


@dataclass(frozen=True)
class Column:
    """How one kind of value looks. A column that `describes` moves into the caption where all rows agree on it; one
    that is `named_in_headings` stands where a heading has its key in braces."""

    heading: str
    show: Callable[[Any], str] = str
    numeric: bool = True
    describes: bool = False
    named_in_headings: bool = False


def _described(heading: str, show: Callable[[Any], str] = str, numeric: bool = False) -> Column:
    return Column(heading, show, numeric, describes=True)


COLUMNS: dict[str, Column] = {
    "rule": Column("rule", numeric=False),
    "loss": Column("loss [95 %]", _as("+.3g")),
    "margin": Column("margin", _as("+g")),
    "num_units": Column("n"),
    "judged": Column("verdict", numeric=False),
    "reason": Column("reason", numeric=False),
    "variant": _described("variant"),
    "measure": Column("measure", numeric=False),
    "recipe": Column("recipe", numeric=False),
    "scales": Column("scales", numeric=False),
    "codes": Column("codes", numeric=False),
    "formats": Column("formats", numeric=False),
    "artifact": Column("artifact", numeric=False),
    "source_digest": _described("source"),
    "source_revision": _described("revision"),
    "calibration_digest": _described("calibration set"),
    "role": Column("role", numeric=False),
    "format": Column("format", numeric=False),
    "severity": Column("severity", numeric=False),
    "tensor": Column("tensor", numeric=False),
    "problem": Column("problem", numeric=False),
    "consequence": Column("consequence", numeric=False),
    "served_as": Column("served as", numeric=False),
    "protocol": _described("protocol"),
    "unit": _described("PPL per"),
    "dataset": _described("dataset"),
    "task": _described("task"),
    "metric": Column("metric", numeric=False),
    "num_items": _described("items", _as(","), numeric=True),
    "score": Column("score", _as(".4f")),
    "score_error": Column("± (lm-eval)", _as(".4f")),
    "delta_score": Column("Δ to source [95 %]", _as("+.4f")),
    "recovery_ratio": Column("recovery [95 %]", lambda ratio: format_estimate(scaled(ratio, 100), ".1f") + " %"),
    "flips": Column("lost / won"),
    "p_holm": Column("p (Holm)", _as(".2g")),
    "cap_hit_share": Column("cut off", format_percent),
    "unclosed_share": Column("unclosed", format_percent),
    "empty_share": Column("empty", format_percent),
    "extraction_failure_share": Column("not found", format_percent),
    "completed_score": Column("score if ended", _as(".4f")),
    "tokens_per_answer": Column("tok / answer", _as(".1f")),
    "token_inflation_ratio": Column("tok ÷ source [95 %]", _as(".3f")),
    "tokens_per_correct": Column("tok / correct", _as(".1f")),
    "seconds_per_correct": Column("s / correct", _as(".3g")),
    "verdict": Column("valid", numeric=False),
    "num_tokens": _described("tokens", _as(","), numeric=True),
    "num_windows": _described("windows", _as(","), numeric=True),
    "num_scored": _described("scored tokens", _as(","), numeric=True),
    "num_words": _described("words", _as(","), numeric=True),
    "num_documents": _described("documents", _as(","), numeric=True),
    "num_samples": Column("samples", _as(",")),
    "max_tokens": Column("most tokens each", _as(",")),
    "seed": Column("seed", _as("d")),
    "num_tensors": Column("tensors", _as(",")),
    "num_quantized": Column("tensors quantized", _as(",")),
    "num_kept": Column("tensors kept", _as(",")),
    "num_params": Column("parameters", _as(",")),
    "source_bytes": Column("before", format_bytes),
    "output_bytes": Column("after", format_bytes),
    "bytes_share": Column("after / before", format_percent),
    "max_abs_error": Column("max abs error", _as(".3g")),
    "mean_abs_error": Column("mean abs error", _as(".3g")),
    "relative_l2_error": Column("relative L2 error", _as(".4f")),
    "snr_db": Column("SNR (dB)", _as(".1f")),
    "num_layers": Column("layers", _as("d")),
    **{form: Column(f"layer error in {form}", _show_spread) for form in (NVFP4A16, NVFP4, FP8_DYNAMIC)},
    "fp8_extra_bytes": Column("FP8 takes more", format_bytes),
    "fp8_gain_per_gb": Column("error less, per GB", lambda gain: f"{gain:,.0f}" if gain >= 1000 else f"{gain:.3g}"),
    "ppl": Column("PPL", _as(".4f")),
    "delta_ppl": Column("Δ PPL", _as("+.4f")),
    "relative_change_ratio": Column("change", lambda ratio: format_percent(ratio, "+.2f")),
    "delta_log_ppl": Column("Δ log-PPL, nats [95 %]", _as("+.4f")),
    "standard_errors": Column("standard errors from 0", _as(".1f")),
    "window": _described("window", _as(","), numeric=True),
    "distribution": _described("compared over"),
    "before": Column("tokens before"),
    "kl": Column("KL, nats [95 %]", _as("#.3g")),
    "kl_median": Column("median", _as(".2g")),
    "kl_p90": Column("90 %", _as(".2g")),
    "kl_p95": Column("95 %", _as(".2g")),
    "kl_p99": Column("99 %", _as(".2g")),
    "kl_p999": Column("99.9 %", _as(".2g")),
    "kl_max": Column("max", _as(".2g")),
    "agreement": Column("same top token [95 %]", lambda share: format_estimate(scaled(share, 100), ".2f") + " %"),
    "rms_dp": Column("RMS Δp", lambda share: format_percent(share, ".2g")),
    "kl_log_ppl": Column("Δ log-PPL, nats [95 %]", _as("+.4f")),
    "benchmark": _described("vllm bench"),
    "concurrency": _described("concurrency", _as("d"), numeric=True),
    "num_requests": Column("requests", _as("d")),
    "num_failed": Column("failed", _as("d")),
    "first_token_seconds": Column("first token, s [95 %]", _as(".3f")),
    "batch": _described("batch", _as("d"), numeric=True),
    "prompt_tokens": _described("prompt tokens", _as(","), numeric=True),
    "new_tokens": _described("new tokens", _as(","), numeric=True),
    "num_starts": _described("starts", _as("d"), numeric=True),
    "num_repetitions": _described("repetitions", _as("d"), numeric=True),
    "test": _described("test"),
    "tokens_per_second": Column("tok/s [95 %]", _show_speed),
    "acceptance_share": Column("drafts accepted", format_percent),
    "mean_accepted_length": Column("mean accepted length", _as(".2f")),
    "user_tokens_per_second": Column("tok/s per user", _show_speed),
    "versus": Column("÷", named_in_headings=True),
    "speed_ratio": Column("÷ {versus} [95 %]", _as(".3f")),
    "speed_change_ratio": Column("change", lambda ratio: format_percent(ratio, "+z.0f")),
    "setup_ratio": Column("÷ without the setup [95 %]", _as(".3f")),
    "ceiling_tokens_per_second": Column("ceiling, tok/s", _show_speed),
    "ceiling_share": Column("of ceiling", format_percent),
    "weight_bytes": Column("weights", format_bytes),
    "kv_cache_tokens": Column("KV cache, tokens", _as(",")),
    "peak_rss_bytes": Column("peak RSS", format_bytes),
    "peak_vram_bytes": Column("peak VRAM", format_bytes),
    "gpu_gib": Column("GPU, GiB", _as("g")),
    "max_model_len": Column("longest sequence, tokens", _as(",")),
    "shared_tokens": Column("tokens of all users", _as(",")),
    "users": _described("users", _as("d"), numeric=True),
    "kernel": Column("kernel", numeric=False),
    "computes": Column("computes", numeric=False),
    "engine": _described("engine"),
    "machine": _described("machine"),
    "packages": _described("packages"),
    "commit": _described("commit"),
    "started_utc": Column("started", numeric=False),
    "run": _described("run"),
}
"""Every kind of value, in the order in which columns stand in a table."""


def escape(words: str) -> str:
    """Text that Markdown would read as markup or as the end of a table cell, made literal.

    An underscore inside a word is literal already, and tensor names are full of them.
    """
    return re.sub(r"([\\`*|<>&\[\]~]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(words.split()))


# -- Tables ------------------------------------------------------------------------------------------------------


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
