"""Exports: what a suite's records say, in the formats that other tools read.

A variant's files come with those of the setups that it was measured in, and with the source's, whose numbers are the
baseline:

    <variant>/.eval_results/*.yaml      scores in registered benchmarks: the Hub shows them on the model's page
    <variant>/model-index.yaml          scores and perplexities, for the front matter of the variant's card
    csv/*.csv                           every table of the report, for spreadsheets and pandas

A run that the audit calls invalid, and a run whose engine computed another model than the checkpoint says, is in the
tables and in no format that is made to be published. Documentation of the formats:
https://huggingface.co/docs/hub/eval-results, https://github.com/huggingface/hub-docs/blob/main/modelcard.md.
"""

import csv
import hashlib
import io
import re
from collections.abc import Sequence
from typing import Any

import yaml

from harness.errors import UserError, did_you_mean
from harness.record.run import Record
from harness.record.stats import Estimate
from harness.report.columns import Spread
from harness.report.evidence import Evidence
from harness.report.hub_scores import eval_results, model_index
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
    files = csv_files(evidence, rows)
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


def _yaml(document: Any) -> bytes:
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True).encode()


def path_part(name: str) -> str:
    """A name as one part of a path that every file system takes. A name that must change for that gets its digest in
    front, so that two names stay two."""
    safe = re.sub(r"[^A-Za-z0-9_.+=@-]+", "_", name).strip(".")[:80]
    is_device = re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?", safe)
    return safe if safe == name and not is_device else f"{hashlib.sha256(name.encode()).hexdigest()[:8]}-{safe}"


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


_PARTS: dict[type, dict[str, str]] = {
    Estimate: {"": "value", "_low": "low", "_high": "high"},
    Spread: {"": "median", "_largest": "largest", "_layer": "layer"},
}


def _plain(value: object) -> object:
    """A cell: runs by their ids, several with spaces between."""
    if isinstance(value, tuple):
        return " ".join(str(_plain(one)) for one in value)
    if isinstance(value, float):
        return float(f"{value:.8g}")  # the digits after these depend on the order in which a machine adds
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
