"""Exports: what a suite's records say, in the formats that other tools read.

`export` is a pure function from evidence to files. A variant's files come with those of the setups it was measured in,
and with the source's, whose numbers are the baseline:

    <variant>/.eval_results/*.yaml      scores in registered benchmarks of the Hub, for the variant's repository
    <variant>/model-index.yaml          scores and perplexities, for the front matter of its card
    every_eval_ever/data/...            Every Eval Ever 0.3: a JSON for each run, and for tasks a JSONL of its items
    lm-eval/<row>/<task>/...            what `lm_eval --output_path` writes
    csv/*.csv                           every table of the report
    llama-bench.json, llama-bench.md    speeds as llama-bench prints them

A run that the audit calls invalid, and one whose engine computed another model than the checkpoint says, is in the raw
formats (lm-eval, CSV, llama-bench) and in none that is made to be published. Documentation of the formats:
https://huggingface.co/docs/hub/eval-results,
https://github.com/huggingface/hub-docs/blob/main/modelcard.md,
https://github.com/evaleval/every_eval_ever (version 0.3.0 of the package `every-eval-ever` on PyPI),
https://github.com/EleutherAI/lm-evaluation-harness/blob/main/lm_eval/loggers/evaluation_tracker.py,
https://github.com/ggml-org/llama.cpp/blob/master/tools/llama-bench/README.md.
"""

import csv
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import yaml

from harness.errors import UserError, did_you_mean
from harness.record.stats import Estimate
from harness.record.store import Record
from harness.report import build_tables, columns, every_eval_ever, speed_tables
from harness.report.columns import Spread
from harness.report.evidence import Evidence
from harness.report.exchange import (
    json_bytes,
    model_id,
    path_part,
    steady,
)
from harness.report.hub import eval_results, model_index
from harness.report.lm_eval_files import lm_eval_files
from harness.report.tables import Table
from harness.suite.names import NOISE, SOURCE, row_parts


def export(evidence: Evidence, variants: Sequence[str]) -> dict[str, bytes]:
    """Every exported file: path from the folder of the exports -> bytes.

    Of evidence with a repository on the Hub, the variant is called by it and its records are linked to; else no format
    names a source. `UserError` for a variant that the suite does not have, and where there is no record of any of them
    or the source.
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
    """What is of a variant alone, for its repository: `.eval_results/*.yaml` and `model-index.yaml`, those of them that
    something was measured for."""
    files = {f".eval_results/{name}.yaml": _yaml(entries) for name, entries in eval_results(evidence, variant).items()}
    if index := model_index(evidence, variant):
        files["model-index.yaml"] = _yaml({"model-index": index})
    return files


def shared_files(evidence: Evidence, rows: Sequence[str]) -> dict[str, bytes]:
    """What rows of the suite have in common: the formats that tell rows apart themselves."""
    files: dict[str, bytes] = {}
    for row in rows:
        files |= every_eval_ever.files_of(evidence, row)
        files |= lm_eval_files(evidence, row)
    files |= _tables(evidence, rows)
    if speeds := llama_bench(evidence, rows):
        files["llama-bench.json"] = json_bytes([asdict(speed) for speed in speeds])
        files["llama-bench.md"] = llama_bench_markdown(speeds).encode()
    return files


def _yaml(document: Any) -> bytes:
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True).encode()


def _tables(evidence: Evidence, rows: Sequence[str]) -> dict[str, bytes]:
    """A CSV (RFC 4180, UTF-8) for every frame that has a row of those, or of the noise floor.

    Columns are called as in `columns.COLUMNS`. Numbers have eight significant digits, on which every machine agrees;
    unknown ones are empty, runs are there by their id (eight hexadecimal digits, of which pandas takes some for numbers
    without `dtype={"run": str}`). An estimate has three columns, `<key>`, `<key>_low` and `<key>_high`, the last two
    empty without an interval, and `<key>_reason` where words stand in place of one. A spread over layers has `<key>`,
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
        return steady(value)
    return value.run.run_id if isinstance(value, Record) else value


def _spread_out(key: str, values: Sequence[Any]) -> dict[str, list[Any]]:
    """The columns that one column of a frame becomes."""
    kind = next((type(value) for value in values if type(value) in _PARTS), None)
    if kind is None:
        return {key: [_plain(value) for value in values]}
    found = {
        f"{key}{suffix}": [_plain(getattr(value, part)) if isinstance(value, kind) else None for value in values]
        for suffix, part in _PARTS[kind].items()
    }
    if any(isinstance(value, str) for value in values):
        found[f"{key}_reason"] = [value if isinstance(value, str) else None for value in values]
    return found


@dataclass(frozen=True, kw_only=True)
class LlamaBench:
    """One object of llama-bench's JSON; what only llama.cpp knows (its build, its cache types, its offloading) is not
    there, or null."""

    build_commit: str | None  # the harness's
    build_number: int | None = None
    cpu_info: str | None
    gpu_info: str
    backends: str
    model_filename: str
    model_type: str
    model_size: int | None  # bytes of all tensors
    model_n_params: int | None
    n_threads: int | None
    n_prompt: int
    n_gen: int
    n_depth: int
    test_time: str
    avg_ns: int
    stddev_ns: int
    avg_ts: float
    stddev_ts: float
    samples_ns: list[int]
    samples_ts: list[float]

    @property
    def test(self) -> str:
        """`pp512`, `tg32`, `tg32 @ d4096`, as on the card."""
        return speed_tables.test_name(self.n_gen + 1, self.n_depth) if self.n_gen else f"pp{self.n_prompt}"


def llama_bench(evidence: Evidence, rows: Sequence[str]) -> list[LlamaBench]:
    """Decodes and prefills of one sequence, as llama-bench's `tg` and `pp`. It decodes one sequence always, so a decode
    of several is no row of it; those are in the CSV.

    `n_gen` are the timed tokens: the first new one belongs to the prefill. `n_depth` are the prompt's tokens, which are
    in the cache when decoding begins, and 0 of a prompt of one. Speeds are means with standard deviations over
    repetitions, as llama-bench has them, where the report has medians with intervals.
    """
    found = []
    for row in rows:
        record = evidence.records["bench"].get(row)
        if record is None:
            continue
        for (batch, prompt_tokens, _), samples in speed_tables.by_shape(record, "prefill").items():
            if batch == 1:
                seconds = [sample["prefill_seconds"] for sample in samples]
                found.append(_timed(evidence, row, record, seconds, n_prompt=prompt_tokens, n_gen=0, n_depth=0))
        for (batch, prompt_tokens, new_tokens), samples in speed_tables.by_shape(record, "decode").items():
            if batch == 1:
                seconds = [math.fsum(sample["step_seconds"]) for sample in samples]
                steps = new_tokens - 1
                depth = speed_tables.test_depth(prompt_tokens)
                found.append(_timed(evidence, row, record, seconds, n_prompt=0, n_gen=steps, n_depth=depth))
    return found


def _timed(
    evidence: Evidence, row: str, record: Record, seconds: Sequence[float], *, n_prompt: int, n_gen: int, n_depth: int
) -> LlamaBench:
    run, engine = record.run, record.run.engine or {}
    gpu = run.machine.get("gpu")
    variant, setup = row_parts(row)
    size, params = build_tables.bytes_and_params(evidence.records["build"], variant) or (None, None)
    nanoseconds = [round(one * 1e9) for one in seconds]
    speeds = [(n_prompt + n_gen) / one for one in seconds]
    return LlamaBench(
        build_commit=run.git["commit"][:8] if run.git else None,
        cpu_info=run.machine.get("cpu"),
        gpu_info=gpu["name"] if gpu else "",
        backends=f"{engine.get('name')} {engine.get('device')}",
        model_filename=row,
        model_type=" + ".join((model_id(evidence, row), *([setup] if setup else ()))),
        model_size=size,
        model_n_params=params,
        n_threads=engine.get("effective", {}).get("threads"),
        n_prompt=n_prompt,
        n_gen=n_gen,
        n_depth=n_depth,
        test_time=run.started_utc,
        avg_ns=round(statistics.fmean(nanoseconds)),
        stddev_ns=round(_deviation(nanoseconds)),
        avg_ts=statistics.fmean(speeds),
        stddev_ts=_deviation(speeds),
        samples_ns=nanoseconds,
        samples_ts=speeds,
    )


def _deviation(values: Sequence[float]) -> float:
    """Zero of a single value, as llama-bench has it."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


_MEANS = (
    "t/s: mean ± standard deviation over repetitions, as llama-bench prints it; the card has medians with intervals."
)


def llama_bench_markdown(rows: Sequence[LlamaBench]) -> str:
    """The table that llama-bench prints: sizes in powers of 1,024, speeds as mean ± standard deviation, which a line
    below says, since the card has medians. (llama-bench's own line there is that of its build.)"""
    lines = ["| model | size | params | backend | test | t/s |", "| --- | ---: | ---: | --- | ---: | ---: |"]
    for row in rows:
        size, params = row.model_size, row.model_n_params
        unit, scale = ("GiB", 2**30) if size is not None and size >= 2**30 else ("MiB", 2**20)
        letter, many = ("B", 10**9) if params is not None and params >= 10**9 else ("M", 10**6)
        cells = (
            columns.escape(row.model_type),
            "" if size is None else f"{size / scale:.2f} {unit}",
            "" if params is None else f"{params / many:.2f} {letter}",
            columns.escape(row.backends),
            row.test,
            f"{row.avg_ts:.2f} ± {row.stddev_ts:.2f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join((*lines, "", _MEANS)) + "\n"
