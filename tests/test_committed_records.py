"""The committed records of both demo suites: what their tables say, computed once more from the files, by arithmetic
that is not the harness's."""

import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import harness
from harness.record.stats import Estimate
from harness.record.store import read_all
from harness.report import evidence
from harness.suite.load import load
from harness.suite.schema import Suite

ROOT = Path(harness.__file__).parent.parent
SUITES = ("demo", "demo-moe")


@pytest.fixture(scope="module", params=SUITES)
def found(request: pytest.FixtureRequest) -> evidence.Evidence:
    records, skipped = read_all(ROOT / "results")
    assert not skipped
    return evidence.gather(suite(request.param), records, "results")


def suite(name: str) -> Suite:
    return load(ROOT / "suites" / f"{name}.toml")


def rows(gathered: evidence.Evidence, name: str) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Each row of a frame, and the samples of the file that its run is in."""
    frame = gathered.tables[name]
    assert frame
    for row in frame.rows:
        record = row["run"]
        lines = (ROOT / gathered.record_path(record)).read_text().splitlines()
        header, *samples, end = map(json.loads, lines)
        assert (header["run_id"], header["suite"]["name"]) == (record.run.run_id, gathered.suite.name)
        assert (end["status"], header["variant"]["name"]) == ("complete", row["variant"])
        yield {str(key): value for key, value in row.items()}, samples


def of_kind(samples: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [sample for sample in samples if sample["kind"] == kind]


def test_perplexities_are_those_of_the_files(found: evidence.Evidence) -> None:
    nats: dict[tuple[str, str], np.ndarray[Any, Any]] = {}
    counts: dict[tuple[str, str], np.ndarray[Any, Any]] = {}
    for row, samples in rows(found, "perplexity"):
        where = row["protocol"], row["variant"]
        units = of_kind(samples, "window")
        nats[where] = np.array([one["nll_nats"] for one in units])
        counts[where] = np.array([one["num_scored"] for one in units])
        if row["unit"] == "token":
            assert row["ppl"] == pytest.approx(np.exp(nats[where].sum() / counts[where].sum()), rel=1e-12)
        base = row["protocol"], "source"
        if row["unit"] == "token" and row["variant"] != "source" and not isinstance(row["delta_log_ppl"], str):
            loss = (nats[where] - nats[base]).sum() / counts[base].sum()
            assert row["delta_log_ppl"].value == pytest.approx(loss, rel=1e-9)
            assert row["delta_log_ppl"].low < loss < row["delta_log_ppl"].high
            assert row["relative_change_ratio"] == pytest.approx(math.exp(loss) - 1, rel=1e-9)
            assert row["num_scored"] == counts[base].sum()


def test_speeds_and_their_ratios_are_those_of_the_files(found: evidence.Evidence) -> None:
    logs: dict[tuple[str, int, int], dict[int, list[float]]] = {}
    num_ratios = 0
    for row, samples in rows(found, "decode"):
        shape = row["batch"], row["prompt_tokens"]
        kept = [
            one
            for one in of_kind(samples, "decode")
            if not one["warmup"] and (one["batch"], one["prompt_tokens"]) == shape
        ]
        speeds = [one["batch"] * (row["new_tokens"] - 1) / sum(one["step_seconds"]) for one in kept]
        assert row["tokens_per_second"].value == pytest.approx(statistics.median(speeds), rel=1e-9)
        assert row["num_repetitions"] == len(speeds)
        starts = logs.setdefault((row["variant"], *shape), {})
        for one, speed in zip(kept, speeds, strict=True):
            starts.setdefault(one["start"], []).append(math.log(speed))
        if isinstance(row["speed_ratio"], Estimate):
            num_ratios += 1
            sides = [logs[name, *shape] for name in (row["variant"], "source")]
            means = [statistics.fmean(map(statistics.fmean, side.values())) for side in sides]
            ratio = math.exp(means[0] - means[1])
            assert row["speed_ratio"].value == pytest.approx(ratio, rel=1e-9)
            assert row["speed_change_ratio"] == pytest.approx(ratio - 1, rel=1e-9)
    assert num_ratios > 0


def test_sizes_are_those_of_the_files(found: evidence.Evidence) -> None:
    for row, samples in rows(found, "totals"):
        roles = of_kind(samples, "role")
        kept = sum(role["num_tensors"] for role in roles if role["format"] == "kept")
        assert (row["num_kept"], row["num_quantized"] + kept) == (kept, sum(role["num_tensors"] for role in roles))
        assert row["output_bytes"] == of_kind(samples, "totals")[0]["output_bytes"]
        assert row["bytes_share"] == row["output_bytes"] / sum(role["source_bytes"] for role in roles)


def test_divergences_are_those_of_the_files(found: evidence.Evidence) -> None:
    for row, samples in rows(found, "fidelity"):
        windows = of_kind(samples, "window")
        scored = sum(one["num_scored"] for one in windows)
        if not isinstance(row["kl"], str):
            kl = math.fsum(one["kl_nats"] for one in windows) / scored
            assert row["kl"].value == pytest.approx(kl, rel=1e-9, abs=1e-15)
        assert row["agreement"].value == pytest.approx(sum(one["num_agreed"] for one in windows) / scored, rel=1e-12)
        assert row["num_scored"] == scored


def test_round_trips_and_errors_are_those_of_the_files(found: evidence.Evidence) -> None:
    for row, samples in rows(found, "roundtrip"):
        (trip,) = [one for one in of_kind(samples, "roundtrip") if one["role"] == row["role"]]
        del trip["type"], trip["kind"]
        assert {key: row[key] for key in trip} == trip


def test_scores_are_lm_evals_own(found: evidence.Evidence) -> None:
    frame = found.tables["tasks"]
    single = [row for row in frame.rows if row["task"] != "all tasks"]
    assert single
    for row in single:
        lines = (ROOT / found.record_path(row["run"])).read_text().splitlines()
        results = [one for one in map(json.loads, lines) if one.get("kind") == "result"]
        task = row["task"].partition(": ")[2]
        own = [one["value"] for one in results if one["metric"] == row["metric"] and task in ("", one["task"])]
        assert row["score"] == pytest.approx(statistics.fmean(own), rel=1e-12)


def test_the_newest_run_of_a_row_speaks_for_it(found: evidence.Evidence) -> None:
    for measure, records in found.records.items():
        for row, record in records.items():
            others = (ROOT / "results").glob(f"*/*-{measure}-{found.suite.name}-{row}-????????.jsonl")
            assert record.path.name == max(path.name for path in others)
