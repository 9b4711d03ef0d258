"""Tables of fidelity from hand-made records: sums by hand, numpy's percentiles, and what counts as noise."""

import numpy as np
import pytest

from harness.record import stats
from harness.record.run import Record
from harness.report import quality_tables, tables
from harness.report.tables import Table
from tests.records import ENGINE, FIDELITY, fidelity_record, fidelity_windows, make_record, windows

SPREAD = [0.8, 1.0, 1.2, 0.9, 1.1, 1.0]


def of_mean(nats: float) -> list[float]:
    return [nats * one for one in SPREAD]


def noise(nats: float, name: str = "noise-batch", loss: float = 0.0, **header: object) -> dict[str, Record]:
    return {name: fidelity_record(name, fidelity_windows([nats] * 3, loss), **header)}


def row(frame: Table, variant: str) -> dict[str, object]:
    (found,) = [one for one in frame.rows if one["variant"] == variant]
    return found


def test_a_divergence_is_the_mean_over_tokens_with_an_interval_over_windows() -> None:
    found = row(
        quality_tables.divergence_table({"w4a4": fidelity_record("w4a4", fidelity_windows(of_mean(0.01)))}), "w4a4"
    )
    kl = found["kl"]
    assert isinstance(kl, stats.Estimate)
    assert kl.value == pytest.approx(0.01)
    assert kl.low is not None
    assert kl.high is not None
    assert 0.008 < kl.low < 0.0098
    assert 0.0102 < kl.high < 0.012
    assert (found["num_windows"], found["num_scored"]) == (6, 6 * 1024)


def test_percentiles_are_numpys_over_all_tokens() -> None:
    samples = fidelity_windows(of_mean(0.01))
    found = row(quality_tables.divergence_table({"w4a4": fidelity_record("w4a4", samples)}), "w4a4")
    tokens = np.concatenate(
        [
            np.repeat([band["kl_nats"] / band["num_scored"]], band["num_scored"])
            for sample in samples
            for band in sample["bands"]
        ]
    )
    for name, level in quality_tables.PERCENTILES.items():
        assert found[name] == pytest.approx(np.percentile(tokens, level), rel=1e-3)


def test_what_changed_of_the_probability_that_came_is_a_root_mean_square() -> None:
    found = row(quality_tables.divergence_table({"w4a4": fidelity_record("w4a4", fidelity_windows([0.01]))}), "w4a4")
    assert found["rms_dp"] == pytest.approx(0.01)
    assert "1 %" in tables.cell_text("rms_dp", found["rms_dp"])


def test_agreement_is_a_share_of_predictions() -> None:
    records = {"w4a4": fidelity_record("w4a4", fidelity_windows(of_mean(0.01), agreed=0.5))}
    agreement = row(quality_tables.divergence_table(records), "w4a4")["agreement"]
    assert isinstance(agreement, stats.Estimate)
    assert agreement.value == pytest.approx(0.5, abs=1e-3)
    assert tables.cell_text("agreement", agreement).startswith("50.0")


def test_bands_tell_whether_the_divergence_grows_with_the_window() -> None:
    frame = quality_tables.band_table({"w4a4": fidelity_record("w4a4", fidelity_windows(of_mean(0.01)))})
    assert frame["before"] == ["1 – 511", "512 – 1,024"]  # of 1,025 tokens
    first, second = frame["kl"]
    assert second.value == pytest.approx(2 * first.value)


@pytest.mark.parametrize(("num_tokens", "last"), [(513, "512"), (514, "512 – 513"), (4096, "512 – 4,095")])
def test_the_last_band_ends_where_the_longest_window_does(num_tokens: int, last: str) -> None:
    samples = fidelity_windows([0.01, 0.02], num_tokens=num_tokens)
    shorter = {**samples[1], "num_tokens": 7, "num_scored": 6, "bands": [{**samples[1]["bands"][0], "num_scored": 6}]}
    frame = quality_tables.band_table({"w4a4": fidelity_record("w4a4", [samples[0], shorter])})
    assert frame["before"] == ["1 – 511", last]


def test_windows_of_one_band_have_no_table_of_bands() -> None:
    samples = [{**one, "bands": one["bands"][:1]} for one in fidelity_windows([0.01])]
    assert not quality_tables.band_table({"w4a4": fidelity_record("w4a4", samples)})


def test_a_divergence_within_the_noise_is_printed_so_and_one_above_it_is_not() -> None:
    records = {
        "w4a4": fidelity_record("w4a4", fidelity_windows(of_mean(0.01))),
        "a16": fidelity_record("a16", fidelity_windows(of_mean(0.001))),
        **noise(0.002),
    }
    frame = quality_tables.divergence_table(records)
    assert row(frame, "a16")["kl"] == "≤ noise"
    assert isinstance(row(frame, "w4a4")["kl"], stats.Estimate)
    assert isinstance(row(frame, "noise-batch")["kl"], stats.Estimate)


def test_the_floor_is_the_worst_row_of_noise_at_the_end_of_its_interval() -> None:
    record = fidelity_record("w4a4", fidelity_windows(of_mean(0.01)))
    one, other = fidelity_windows(of_mean(0.002), 0.0005), fidelity_windows([0.001] * 6, -0.0015)
    floor = quality_tables.noise_floor(
        {
            "w4a4": record,
            "noise-batch": fidelity_record("noise-batch", one),
            "noise-restart": fidelity_record("noise-restart", other),
        },
        record,
    )
    assert floor is not None
    high = quality_tables.mean_kl(fidelity_record("x", one)).high
    assert high is not None
    assert floor.kl_nats == high > 0.002
    assert floor.log_ppl_nats == pytest.approx(0.0015)


@pytest.mark.parametrize(
    "header",
    [
        {"engine": {**ENGINE, "version": "transformers 5.18.0, torch 2.13.0"}},
        {"dataset": {**FIDELITY, "token_ids_sha256": "9" * 64}},
        {"dataset": {**FIDELITY, "window": 512}},
    ],
)
def test_noise_of_another_engine_or_text_is_no_floor(header: dict[str, object]) -> None:
    records = {
        "a16": fidelity_record("a16", fidelity_windows(of_mean(0.001))),
        **noise(0.002, **header),
    }
    assert isinstance(row(quality_tables.divergence_table(records), "a16")["kl"], stats.Estimate)


def test_the_source_on_another_engine_is_a_floor_though_its_engine_differs() -> None:
    header = {
        "engine": {**ENGINE, "name": "vllm", "version": "0.32.0"},
        "dataset": {**FIDELITY, "distribution": "64 named tokens"},
    }
    records = {
        "a16": fidelity_record("a16", fidelity_windows(of_mean(0.001))),
        **noise(0.002, "noise-engine", **header),
    }
    assert row(quality_tables.divergence_table(records), "a16")["kl"] == "≤ noise"


def test_without_a_row_of_noise_there_is_no_floor() -> None:
    record = fidelity_record("a16", fidelity_windows(of_mean(0.001)))
    assert quality_tables.noise_floor({"a16": record}, record) is None


def test_the_floor_serves_perplexity_on_the_same_engine_and_source_only() -> None:
    records = noise(0.002, loss=0.0004, engine={**ENGINE, "name": "streamed"})
    floor = quality_tables.noise_floor(records, make_record("ppl", "source", windows(8.0)))
    assert floor is not None
    assert floor.log_ppl_nats == pytest.approx(0.0004)
    other = make_record("ppl", "source", windows(8.0), engine={**ENGINE, "dtype": "float32"})
    assert quality_tables.noise_floor(records, other) is None
