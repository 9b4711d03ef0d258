"""The simulation: that its data are what it says, that it would see a wrong interval, and that the committed page and
figure follow from the committed counts."""

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from harness.errors import UserError
from harness.record import stats, store
from harness.record.stats import Estimate
from studies.simulation import page, populations, scenarios
from studies.simulation.__main__ import COUNTS, FOLDER, PAGE, main
from studies.simulation.populations import Populations, Windows
from studies.simulation.scenarios import Result, Scenario

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def drawn_from() -> Populations:
    records, _ = store.read_all(ROOT / "results")
    return populations.populations_in(records)


def untold(done: int, total: int, description: str, note: str = "", /) -> None:
    pass


def counted(**counts: int) -> Result:
    return Result("Power", "data", "function", 10, "coverage", 0.95, None, counts)


def always(estimate: Estimate, truth: float) -> Scenario:
    return Scenario("group", "data", "function", 1, "coverage", 0.95, lambda rng: estimate, truth)


# -- What is drawn from ------------------------------------------------------------------------------------------


def test_the_losses_are_those_of_the_committed_records(drawn_from: Populations) -> None:
    # README.md: Δ log-PPL of demo w4a4 is +0.0019, of nvfp4a16 +0.0022.
    assert [round(windows.truth, 4) for windows in drawn_from.losses[:2]] == [0.0019, 0.0022]
    assert all(len(windows.above) == 215 for windows in drawn_from.losses)


def test_every_file_that_is_drawn_from_is_committed(drawn_from: Populations) -> None:
    assert all((ROOT / "results" / file).is_file() for file in drawn_from.files)


def test_missing_records_are_named() -> None:
    with pytest.raises(UserError, match=r"no whole peers record of \S+ in quality-dense"):
        populations.populations_in([])


def test_autocorrelation_is_that_of_neighbours() -> None:
    alternating = Windows("alternating", np.array([1.0, 3.0] * 500), np.ones(1000))
    assert alternating.facts()["autocorrelation"] == pytest.approx([-1, 1, -1, 1, -1], abs=1e-9)


def test_starts_and_repetitions_are_told_apart() -> None:
    rng = np.random.default_rng(2)
    samples = [
        {"kind": "decode", "warmup": False, "batch": shape, "prompt_tokens": 1, "start": start, "step_seconds": [time]}
        for shape in range(400)
        for start in range(2)
        for time in math.exp(rng.normal(0, 0.2)) * np.exp(rng.normal(0, 0.1, 5))
    ]
    record = next(record for record in store.read_all(ROOT / "results")[0] if record.run.measure == "bench")
    speeds = populations._speeds([dataclasses.replace(record, samples=tuple(samples))])
    assert speeds.within == pytest.approx(0.1, rel=0.05) and speeds.between == pytest.approx(0.2, rel=0.1)
    assert speeds.noise.std() == pytest.approx(0.1, rel=0.05)


@pytest.mark.parametrize(
    ("share", "times"),
    # The variance of a mean of 16 neighbours over that of 16 independent windows, as scenarios.py states it.
    [(0.0, 1.0), (scenarios.LOSS_SHARE, 1.4), (scenarios.DIVERGENCE_SHARE, 2.0)],
)
def test_articles_are_correlated_as_stated_and_keep_the_mean_and_spread(
    drawn_from: Populations, share: float, times: float
) -> None:
    windows = drawn_from.losses[0]
    above, below = scenarios.articles(windows, share, 160_000, np.random.default_rng(1))
    rates = above / below
    blocks = rates.reshape(-1, 16).mean(axis=1)
    assert 16 * blocks.var() / rates.var() == pytest.approx(times, abs=0.07)
    assert above.sum() / below.sum() == pytest.approx(windows.truth, abs=4 * rates.std() / 200)
    assert rates.std() == pytest.approx((windows.above / windows.below).std(), rel=0.03)


# -- What is counted ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [(0.0, 2.0, "covered"), (1.0, 1.0, "covered"), (1.1, 2.0, "truth_below"), (0.0, 0.9, "truth_above")],
)
def test_an_interval_covers_or_misses_to_a_side(low: float, high: float, outcome: str) -> None:
    (result,) = scenarios.simulate([always(Estimate(1.0, low, high, 5, "any"), 1.0)], 3, 0, untold)
    assert result.counts == {outcome: 3}


def test_no_interval_covers_nothing() -> None:
    (result,) = scenarios.simulate([always(Estimate(1.0, None, None, 5, "any"), 1.0)], 4, 0, untold)
    assert result.counts == {"without": 4} and result.num_right == 0


def test_the_same_seed_counts_the_same_alone_and_among_others(drawn_from: Populations) -> None:
    chosen = [one for one in scenarios.all_scenarios(drawn_from) if one.group == scenarios.STARTS]
    assert scenarios.simulate(chosen, 20, 1, untold)[3:5] == scenarios.simulate(chosen[3:5], 20, 1, untold)
    assert scenarios.simulate(chosen, 20, 1, untold) != scenarios.simulate(chosen, 20, 2, untold)


@pytest.mark.parametrize(
    ("counts", "verdict"),
    [
        ({"covered": 950, "truth_above": 50}, "kept"),
        ({"covered": 935, "truth_above": 65}, "unsure"),  # 91.8 to 94.9 %: 94 % may be true
        ({"covered": 900, "truth_above": 100}, "short"),
        ({"covered": 990, "truth_above": 10}, "more than asked"),
    ],
)
def test_coverage_is_judged_with_its_own_uncertainty(counts: dict[str, int], verdict: str) -> None:
    assert page.verdict_on(counted(**counts)) == verdict


def test_alarms_and_power_are_judged_to_their_side() -> None:
    alarms = dataclasses.replace(counted(yes=80, no=920), goal="false alarms", level=0.05)
    power = dataclasses.replace(counted(yes=700, no=300), goal="power", level=0.8)
    assert (page.verdict_on(alarms), page.verdict_on(power)) == ("too many", "short")
    assert page.verdict_on(dataclasses.replace(alarms, counts={"no": 1000})) == "kept"
    assert page.verdict_on(dataclasses.replace(power, counts={"yes": 1000})) == "kept"


# -- A quick simulation ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick(drawn_from: Populations) -> list[Result]:
    """100 draws of what is quick: a share of 95 % is known to 2.2 % (one standard error)."""
    chosen = [
        one
        for one in scenarios.all_scenarios(drawn_from)
        if one.num in (10, 20, 30, 60) or (one.group == scenarios.TEXT and one.num == 215)
    ]
    patch = pytest.MonkeyPatch()
    patch.setattr(stats, "RESAMPLES", 499)
    found = scenarios.simulate(chosen, 100, 0, untold)
    patch.undo()
    return found


@pytest.mark.parametrize("group", [scenarios.LOSSES, scenarios.DIVERGENCES, scenarios.REPETITIONS])
def test_intervals_over_twenty_and_more_units_cover_their_truth(quick: list[Result], group: str) -> None:
    shares = {(one.data, one.num): page.share_of(one)[0] for one in quick if one.group == group and one.num >= 20}
    assert shares and all(share >= 0.95 - 0.11 for share in shares.values()), shares


def test_false_alarms_are_rare(quick: list[Result]) -> None:
    shares = {(one.function, one.num): page.share_of(one)[0] for one in quick if one.goal == "false alarms"}
    assert shares and all(share <= 0.05 + 0.06 for share in shares.values()), shares


def test_the_simulation_sees_where_repetitions_are_taken_for_independent(quick: list[Result]) -> None:
    starts = [one for one in quick if one.group == scenarios.STARTS and one.spread == 3.0]
    covered = {one.function: page.share_of(one)[0] for one in starts}
    assert covered["hodges_lehmann_ratio"] < 0.75 < 0.86 <= covered["ratio_of_groups"]


def test_the_simulation_sees_where_windows_are_taken_for_independent(quick: list[Result]) -> None:
    covered = {
        one.function: page.share_of(one)[0]
        for one in quick
        if one.group == scenarios.TEXT and one.num == 215 and "KL" in one.data
    }
    assert covered["weighted_mean"] < 0.87 and covered["weighted_mean"] < covered["weighted_mean, blocks"]


# -- The page ----------------------------------------------------------------------------------------------------


def test_the_committed_page_and_figure_follow_from_the_committed_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["--check"]) == 0


def test_the_committed_counts_are_of_every_scenario(drawn_from: Populations) -> None:
    document = json.loads((ROOT / COUNTS).read_text())
    stored = [(one.group, one.data, one.function, one.num) for one in page.results_of(document)]
    assert stored == [(one.group, one.data, one.function, one.num) for one in scenarios.all_scenarios(drawn_from)]
    assert {one.num_draws for one in page.results_of(document)} == {document["num_draws"]}
    assert document["num_resamples"] == stats.RESAMPLES
    assert all((ROOT / "results" / file).is_file() for file in document["records"])


def test_the_figure_shows_every_interval(drawn_from: Populations) -> None:
    document = json.loads((ROOT / COUNTS).read_text())
    coverages = [one for one in page.results_of(document) if one.goal == "coverage"]
    points = page.points_of(coverages)
    assert [point.share for point in points] == [one.num_right / one.num_draws for one in coverages]
    # Of one line, no two points in one place.
    assert len({(point.panel, point.line, point.x) for point in points}) == len(points)


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(ROOT / FOLDER, tmp_path / FOLDER)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_changed_count_makes_page_and_figure_stale_until_they_are_written(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = json.loads((copied / COUNTS).read_text())
    counts = document["results"][0]["counts"]
    counts["covered"] -= 100
    counts["without"] = counts.get("without", 0) + 100
    (copied / COUNTS).write_text(json.dumps(document))
    assert main(["--check"]) == 1
    assert capsys.readouterr().out.count("stale: ") == 3
    assert main(["--page"]) == 0
    assert capsys.readouterr().out.count("written: ") == 3
    (first,) = re.findall(
        r"\| Δ log-PPL, demo, w4a4 +\| paired_mean_difference \| +5 \| (\S+) %", (copied / PAGE).read_text()
    )
    assert float(first) == pytest.approx(100 * counts["covered"] / document["num_draws"], abs=0.05)


def test_no_counts_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--check"]) == 2
    assert "simulation.json cannot be read (No such file or directory)" in capsys.readouterr().err


def test_a_group_is_shown_and_nothing_is_written(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (copied / COUNTS).read_bytes()
    assert main(["--group", "starts", "--draws", "5", "--results", str(ROOT / "results")]) == 0
    shown = capsys.readouterr()
    assert shown.out.count("ratio_of_groups") == 8 and "weighted_mean" not in shown.out
    assert "simulating 16/16" in shown.err
    assert (copied / COUNTS).read_bytes() == before


def test_a_misspelt_group_is_corrected(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--group", "start"]) == 2
    assert "There is no group 'start'." in capsys.readouterr().err


def test_records_that_are_missing_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--results", str(tmp_path), "--draws", "1"]) == 2
    assert "There is no whole peers record of a16-absmax-gptq in quality-dense." in capsys.readouterr().err


def test_a_polite_kill_is_an_interruption(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    before = (copied / COUNTS).read_bytes()
    monkeypatch.setattr(stats, "paired_mean_difference", interrupted)
    assert main(["--draws", "1", "--results", str(ROOT / "results")]) == 130
    assert "Nothing was written" in capsys.readouterr().err
    assert (copied / COUNTS).read_bytes() == before
