"""Races of scorers: both really score a source and its variants, and the tables of what they say."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from harness.demo import checkpoint_path
from harness.demo.synthesize import synthesize
from harness.errors import UserError
from harness.record.run import Record
from studies.peers import contest, page, races, scoring, tables
from studies.peers.__main__ import PARTS, main
from studies.peers.contest import SEPARATE, STREAMED, Ours, Scorer
from studies.peers.session import Session
from studies.peers.stopwatch import Timed
from tests.conftest import DATA, tiny_config

from .records import make_record

SOURCE_NATS = 10.25
NEITHER = Scorer("neither")  # type: ignore[arg-type]


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session(
        their_python=tmp_path / "none",
        their_packages={},
        artifacts=tmp_path / "artifacts",
        results=tmp_path / "results",
        repetitions=1,
        limit=1,
        progress=lambda *_: None,
        command=("python", "-m", "studies.peers"),
        session_id="5e551011",
    )


def scored(one: Scorer, call: float, rss: int, about: dict[str, Any] | None = None, num: int = 6) -> Record:
    """A record of repetitions that differ by a thousandth, of 3 models and 3,066 scored tokens each."""
    samples: list[dict[str, Any]] = [
        {
            "kind": "evaluation",
            "repetition": turn,
            "wall_seconds": (call + 8) * (1 + turn / 1000),
            "call_seconds": call * (1 + turn / 1000),
            "num_items": 6,
            "num_requests": 3066,
            "peak_rss_bytes": rss,
            "scores": {"source": SOURCE_NATS, "rtn-a16": 10.5, "rtn-a16-search": 10.375},
        }
        for turn in range(num)
    ]
    whole = {
        "name": "speed-scoring-synthetic",
        "source": "9b",
        "layers": 4,
        "num_windows": 2,
        "num_window_tokens": 512,
        "models": dict.fromkeys(("source", "rtn-a16", "rtn-a16-search"), "0"),
        **(about or {}),
    }
    return make_record("peers", one.name, samples, suite=whole)


# -- Races ---------------------------------------------------------------------------------------------------------


def test_one_pass_and_separate_runs_agree_to_the_last_bit_and_with_transformers(
    session: Session, dense_source: Path, tmp_path: Path
) -> None:
    contestants = (STREAMED, NEITHER, SEPARATE)
    about = {"source": "tiny"}
    records = scoring.scorer_race(session, "speed-scoring-tiny", about, dense_source, tmp_path, contestants=contestants)
    named = tables.by_name(records)
    assert list(named) == [one.name for one in contestants]
    (streamed,), (separate,) = (named[one.name].kind("evaluation") for one in (STREAMED, SEPARATE))
    for key in ("scores", "num_items", "num_requests"):
        assert streamed[key] == separate[key]
    assert list(streamed["scores"]) == ["source", *(one.name for one in contest.SCORED)]
    assert len(set(streamed["scores"].values())) == 3
    assert (streamed["num_items"], streamed["num_requests"]) == (3, 3 * (contest.SCORED_TOKENS - 1))
    assert all(0 < one["call_seconds"] < one["wall_seconds"] for one in (streamed, separate))
    assert "KeyError: 'neither'" in named["neither"].kind("failure")[0]["reason"]
    assert not (tmp_path / "hidden").exists()

    ids = torch.tensor(scoring.drawn_windows(dense_source, 1))
    model = AutoModelForImageTextToText.from_pretrained(dense_source, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(input_ids=ids).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits.double(), ids[0, 1:])
    assert streamed["scores"]["source"] == pytest.approx(expected.item(), rel=1e-6)

    times, ratios = tables.tables_of(records)
    assert times.title == "Perplexity of 3 models in float32, demo:tiny, 1 × 512 tokens"
    assert times.rows[0][6:] == times.rows[2][6:] != (tables.NONE,) * 3 == times.rows[1][6:]
    assert [row[:2] for row in ratios.rows] == [
        ("streamed / separate", what) for what in ("whole process", "call alone", "peak RSS")
    ]


def test_the_peak_of_separate_runs_is_that_of_the_largest_model_though_it_was_not_the_last(
    dense_source: Path, tmp_path: Path
) -> None:
    """What the kernel says at the end is the last model's: every start of an engine begins to count anew."""
    large = tmp_path / "large"
    # Two tables of 2²⁴ weights: 128 MiB in float32.
    synthesize(tiny_config("qwen3.5-9b"), large, num_layers=None, vocab_size=1 << 18, seed=0, progress=lambda *_: None)
    job = {**SEPARATE.job(), "windows": [[1, 2, 3]], "batch_size": 1}
    peaks = {}
    for name, models in (
        ("small", {"last": dense_source}),
        ("both", {"first": large, "last": dense_source}),
    ):
        paths = {key: str(folder) for key, folder in models.items()}
        answered = races.run_job("scorer", {**job, "models": paths}, Path(sys.executable), tmp_path / name)
        assert answered.failure is None
        peaks[name] = answered.sample(0)["peak_rss_bytes"]
    assert peaks["both"] > peaks["small"] + (96 << 20)


def test_the_peak_of_a_process_is_the_larger_of_what_it_and_the_kernel_say() -> None:
    told = {"seconds": 1.0, "num_items": 1, "num_requests": 1, "scores": {"source": 1.0}}
    run = Timed(0, 2.0, 200, "", "")
    for said, peak in (({}, 200), ({"peak_rss_bytes": 100}, 200), ({"peak_rss_bytes": 300}, 300)):
        assert races.JobRun(run, {**told, **said}).sample(0)["peak_rss_bytes"] == peak


def test_a_variant_that_is_not_built_is_one_sentence(session: Session, dense_source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"w4a4-absmax-rtn of tiny was not built \(exit code 2: .+\)"):
        scoring.scorer_race(
            *(session, "speed-scoring-tiny", {"source": "tiny"}, dense_source, tmp_path),
            variants=[Ours("w4a4", "absmax", "rtn")],
        )


def test_the_same_tokens_are_drawn_every_time_and_a_limit_takes_the_first(dense_source: Path) -> None:
    windows = scoring.drawn_windows(dense_source, None)
    assert [len(window) for window in windows] == [contest.SCORED_TOKENS] * contest.SCORED_WINDOWS
    assert scoring.drawn_windows(dense_source, 1) == windows[:1]
    vocabulary = tiny_config("qwen3.5-9b")["text_config"]["vocab_size"]
    drawn = {token for window in windows for token in window}
    assert drawn <= set(range(vocabulary)) and len(drawn) > vocabulary / 2


# -- Sessions ------------------------------------------------------------------------------------------------------


def test_scoring_needs_no_other_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scoring, "synthetic", lambda *_: [scored(STREAMED, 2.0, 10**9), scored(SEPARATE, 4.0, 10**9)])
    monkeypatch.setattr(scoring, "embedded", lambda *_: [scored(STREAMED, 1.0, 10**9)])
    nowhere = str(tmp_path / "none")
    others = ("--peers-python", nowhere, "--tasks-python", nowhere, "--vllm-python", nowhere)
    assert main(["speed-scoring", "--json", *others, "--results", str(tmp_path)]) == 0
    shown = json.loads(capsys.readouterr().out)["tables"]
    assert [len(table["rows"]) for table in shown] == [2, 3, 1, 0]


def test_a_page_names_the_word_that_measures_each_block() -> None:
    assert set(page.PARTS.values()) <= set(PARTS)
    blocks = "".join(f"<!-- harness:begin {one} suite=peers -->\n<!-- harness:end {one} -->\n" for one in page.PARTS)
    empty = page.peers_page([], "results", "reports/peers/README.md", blocks.encode()).decode()
    for part, word in (("speed-scoring-synthetic", "speed-scoring"), ("quality-moe", "quality")):
        block = empty.partition(f"harness:begin {part} ")[2].partition("harness:end")[0]
        assert f"No record yet: run `nox -s peers -- {word}`." in block


def test_both_races_have_a_block_on_the_page(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[str] = []
    monkeypatch.setattr(scoring, "synthesize", lambda *_, **__: 0)
    monkeypatch.setattr(scoring, "scorer_race", lambda _, part, *__: parts.append(part))
    scoring.synthetic(session, DATA / "qwen3.5-9b.json")
    scoring.embedded(session, checkpoint_path("dense"))
    assert parts == [part for part, word in page.PARTS.items() if word == "speed-scoring"]


def test_a_page_shows_the_newest_session_of_each_race() -> None:
    text = "".join(
        f"<!-- harness:begin {one} suite=peers -->\n<!-- harness:end {one} -->\n"
        for one in ("speed-scoring-synthetic", "speed-scoring-dense")
    )
    old, new = scored(STREAMED, 3.0, 10**9), scored(STREAMED, 7.0, 10**9)
    new = dataclasses.replace(new, run=dataclasses.replace(new.run, session_id="1"))
    filled = page.peers_page([old, new], "results", "reports/peers/README.md", text.encode()).decode()
    assert "7.02" in filled and "3.01" not in filled
    assert filled.count("No record yet: run `nox -s peers -- speed-scoring`.") == 1


# -- Tables --------------------------------------------------------------------------------------------------------


def test_what_one_pass_takes_is_a_share_of_what_separate_runs_take() -> None:
    times, ratios = tables.scoring_tables("test", [scored(STREAMED, 2.0, 10**9), scored(SEPARATE, 4.0, 4 * 10**9)])
    column = {head: index for index, head in enumerate(times.headers)}
    rows = {row[0]: row for row in times.rows}
    # 3,066 tokens in 4.01 seconds, the median of six.
    assert rows["separate"][column["tokens/s"]].startswith("764.59 [")
    assert rows["separate"][column["whole process, s"]].startswith("12.03 [")
    assert rows["separate"][column["peak RSS"]] == "4.00 GB"
    assert {row[1]: row[2].partition(" ")[0] for row in ratios.rows} == {
        "whole process": "0.833",
        "call alone": "0.500",
        "peak RSS": "0.250",
    }


def test_scores_that_differ_in_their_last_bit_are_seen() -> None:
    other = scored(SEPARATE, 4.0, 10**9, num=2)
    for sample in other.samples:
        sample["scores"] = {**sample["scores"], "source": 10.250000000000002}
    other.samples[1]["scores"]["rtn-a16"] = 10.75
    times, _ = tables.scoring_tables("test", [scored(STREAMED, 2.0, 10**9), other])
    assert times.headers[-3:] == ("source", "rtn-a16", "rtn-a16-search")
    assert times.rows[0][-3:] == ("10.25", "10.5", "10.375")
    assert times.rows[1][-3:] == ("10.250000000000002", "10.5 … 10.75", "10.375")


def test_one_scorer_alone_has_no_ratio() -> None:
    failed = make_record("peers", SEPARATE.name, [{"kind": "failure", "reason": "boom"}])
    for records in ([scored(STREAMED, 2.0, 10**9)], [scored(STREAMED, 2.0, 10**9), failed]):
        _, ratios = tables.scoring_tables("test", records)
        assert ratios.rows == ()
