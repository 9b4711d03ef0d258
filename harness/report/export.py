"""Exports: what a suite's records say, in the formats that other tools read.

`export` is a pure function from evidence to files. A variant's files come with those of the setups it was measured in,
and with the source's, whose numbers are the baseline:

    <variant>/.eval_results/*.yaml      scores in registered benchmarks: the Hub shows them on the model's page
    <variant>/model-index.yaml          scores and perplexities, for the front matter of the variant's card
    lm-eval/<row>/<task>/...            what `lm_eval --output_path` writes, read by lm-eval's own tables and by
                                        converters, for example Every Eval Ever's
    csv/*.csv                           every table of the report, for spreadsheets and pandas

A run that the audit calls invalid, and a run whose engine computed another model than the checkpoint says, is in the
raw formats (lm-eval, CSV) and in no format that is made to be published. Documentation of the formats:
https://huggingface.co/docs/hub/eval-results,
https://github.com/huggingface/hub-docs/blob/main/modelcard.md,
https://github.com/EleutherAI/lm-evaluation-harness/blob/main/lm_eval/loggers/evaluation_tracker.py.

A new format of files is a function like those in `FORMATS`. What is no file, for example a run of an experiment
tracker, takes the same `Evidence`: its tables by name, and `tables.json_rows` for their values.
"""

import csv
import io
from collections.abc import Callable, Sequence
from typing import Any

import yaml

from harness.errors import UserError, did_you_mean
from harness.record.run import Record
from harness.record.stats import Estimate
from harness.report.columns import Spread
from harness.report.evidence import Evidence
from harness.report.exchange import path_part, steady
from harness.report.hub_scores import eval_results, model_index
from harness.report.lm_eval_files import lm_eval_files
from harness.report.tables import Table
from harness.suite.names import NOISE, SOURCE, row_parts


def export(evidence: Evidence, variants: Sequence[str]) -> dict[str, bytes]:
    """Every exported file: path from the folder of the exports -> bytes.

    Evidence with a repository on the Hub names the variant after it and links to its records; no other evidence names a
    URL. `UserError` for a variant that the suite does not have, and where there is no record of any of the variants or
    of the source.
    """
    suite = evidence.suite
    for name in variants:
        if name not in suite.variants:
            raise UserError(f"Suite '{suite.name}' has no variant '{name}'.", did_you_mean(name, suite.variants))
    rows = tuple(row for row in suite.rows() if row_parts(row)[0] in (SOURCE, *variants))
    if not any(record.run.variant["name"] in rows for record in evidence.chosen):
        raise UserError(
            f"There is no whole run of suite '{suite.name}' in {evidence.results_dir}, so there is nothing to export.",
            "Measure something first, for example with `harness ppl`, or give the folder of the records as --results.",
        )
    files = shared_files(evidence, rows)
    for variant in variants:
        files |= {f"{path_part(variant)}/{name}": data for name, data in variant_files(evidence, variant).items()}
    return files


def variant_files(evidence: Evidence, variant: str) -> dict[str, bytes]:
    """The files of a variant alone, for its repository: `.eval_results/*.yaml` and `model-index.yaml`, each where
    something was measured for it."""
    files = {f".eval_results/{name}.yaml": _yaml(entries) for name, entries in eval_results(evidence, variant).items()}
    if index := model_index(evidence, variant):
        files["model-index.yaml"] = _yaml({"model-index": index})
    return files


def shared_files(evidence: Evidence, rows: Sequence[str]) -> dict[str, bytes]:
    """The files that rows of the suite have in common, in every format that tells rows apart itself."""
    files: dict[str, bytes] = {}
    for files_of in FORMATS:
        files |= files_of(evidence, rows)
    return files


def _yaml(document: Any) -> bytes:
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True).encode()


def csv_files(evidence: Evidence, rows: Sequence[str]) -> dict[str, bytes]:
    """A CSV (RFC 4180, UTF-8) for every table, with its rows that are among `rows` or of the noise floor.

    Columns are called as in `columns.COLUMNS`. Numbers have eight significant digits, on which every machine agrees.
    Unknown numbers are empty. Runs are there by their ids: eight hexadecimal digits, some of which pandas takes for
    numbers without `dtype={"run": str}`. An estimate has three columns, `<key>`, `<key>_low` and `<key>_high`, the last
    two empty without an interval, and `<key>_reason` where words stand in its place. A spread over layers has `<key>`,
    its median, `<key>_largest` and `<key>_layer`.
    """
    files = {}
    for name, table in evidence.tables.items():
        if "variant" in table.columns:
            table = Table(table.columns, tuple(row for row in table.rows if row["variant"] in (*rows, *NOISE)))
        if not table:
            continue
        cells = [part for column in table.columns for part in _spread_out(column, table[column]).items()]
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow([key for key, _ in cells])
        writer.writerows(zip(*(values for _, values in cells), strict=True))
        files[f"csv/{name}.csv"] = text.getvalue().encode()
    return files


FORMATS: tuple[Callable[[Evidence, Sequence[str]], dict[str, bytes]], ...] = (lm_eval_files, csv_files)
"""The formats that tell rows apart: each makes the files of some rows of the suite, by path."""

_PARTS: dict[type, dict[str, str]] = {
    Estimate: {"": "value", "_low": "low", "_high": "high"},
    Spread: {"": "median", "_largest": "largest", "_layer": "layer"},
}


def _plain(value: object) -> object:
    """A cell: runs by their ids, several with spaces between."""
    if isinstance(value, tuple):
        return " ".join(str(_plain(one)) for one in value)
    if isinstance(value, float):
        return steady(value)
    return value.run.run_id if isinstance(value, Record) else value


def _spread_out(column: str, values: Sequence[Any]) -> dict[str, list[Any]]:
    """The columns of a CSV that one column of a table becomes."""
    kind = next((type(value) for value in values if type(value) in _PARTS), None)
    if kind is None:
        return {column: [_plain(value) for value in values]}
    found = {
        f"{column}{suffix}": [_plain(getattr(value, part)) if isinstance(value, kind) else None for value in values]
        for suffix, part in _PARTS[kind].items()
    }
    if any(isinstance(value, str) for value in values):
        found[f"{column}_reason"] = [value if isinstance(value, str) else None for value in values]
    return found
