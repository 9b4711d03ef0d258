"""What a newcomer does: measure the embedded model, measure again, write the card."""

import itertools
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from harness.cli import main
from harness.demo import checkpoint_path, corpus
from harness.measure.perplexity import tokenize
from harness.record import store

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demo suite over a fifth of its text, and two starts of its engines: CI measures the whole."""
    folder = tmp_path_factory.mktemp("place")
    suite = (ROOT / "suites/demo.toml").read_text()
    for whole, part in (
        ('[ppl]\ntext = { demo = "heldout" }', '[ppl]\ntext = { path = "heldout.txt" }'),
        ("starts = 4", "starts = 2"),
    ):
        assert suite.count(whole) == 1
        suite = suite.replace(whole, part)
    (folder / "suites").mkdir()
    (folder / "suites/demo.toml").write_text(suite)
    text = corpus.heldout_text()
    (folder / "suites/heldout.txt").write_text(text[: len(text) // 5])
    return folder


def run(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """The JSON document that a command prints in `place`."""
    monkeypatch.chdir(place)
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_in_an_empty_folder_the_suite_is_found_and_its_text_has_100_000_tokens_and_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    document = run(tmp_path, monkeypatch, capsys, "ppl", "--variant", "source", "--limit", "2")
    ids = tokenize(checkpoint_path("dense"), corpus.heldout_text())
    rows = document["tables"][0]
    assert [(row["protocol"], row["num_windows"]) for row in rows] == [("wikitext2-512", 2), ("llamacpp-512", 2)]
    assert {row["num_tokens"] for row in rows} == {len(ids)}
    assert len(ids) >= 100_000


def test_the_embedded_model_has_learnt_and_nvfp4_visibly_costs_something(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The variants are built, and all of them score the same tokens."""
    document = run(place, monkeypatch, capsys, "ppl")
    rows = {(row["protocol"], row["variant"]): row for row in document["tables"][0]}
    protocols, variants = ("wikitext2-512", "llamacpp-512"), ("source", "nvfp4a16", "w4a4")
    assert list(rows) == list(itertools.product(protocols, variants))
    source, variant = (rows[protocols[0], name] for name in variants[:2])
    ids = tokenize(checkpoint_path("dense"), (place / "suites/heldout.txt").read_text())
    assert source["num_tokens"] == variant["num_tokens"] == len(ids) >= 20_000
    assert source["num_windows"] == math.ceil(len(ids) / 512)
    assert source["num_scored"] == len(ids) - source["num_windows"]
    counts = Counter(ids)
    unigram = math.exp(-sum(count / len(ids) * math.log(count / len(ids)) for count in counts.values()))
    assert source["ppl"] * 5 < unigram, "the best unigram model is given the text's own frequencies"
    assert variant["standard_errors"] > 3
    assert variant["delta_log_ppl"]["low"] > 0


def test_a_second_command_reuses_the_artifact_and_says_so(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    assert main(["bench", "--limit", "1"]) == 0
    printed = capsys.readouterr().out
    assert "artifacts/demo/nvfp4a16: reused" in printed
    assert "tok/s" in printed
    records, skipped = store.read_all(place / "results")
    bench = [record for record in records if record.run.measure == "bench"]
    assert not skipped
    assert {record.run.variant["name"] for record in bench} == {"source", "nvfp4a16"}
    assert len({record.run.session_id for record in bench}) == 1
    for record in bench:
        steps = record.kind("decode")
        assert {sample["batch"] for sample in steps} == {1, 2, 4}
        assert {sample["start"] for sample in steps} == {0, 1}
        assert {sample["warmup"] for sample in steps} == {True, False}
        assert all(len(sample["step_seconds"]) == 32 for sample in steps)


def test_the_artifact_is_sound_and_the_card_says_what_was_measured(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verified = run(place, monkeypatch, capsys, "verify")
    assert verified["artifacts/demo/nvfp4a16"]["findings"] == []
    run(place, monkeypatch, capsys, "report")
    card = (place / "reports/demo/README.md").read_text()
    assert "against" in card, "perplexity of the variant against the source's"
    assert "No record yet" in card, "a bench with --limit is never reported"
    assert run(place, monkeypatch, capsys, "report", "--check")["stale"] == []
    (place / "reports/demo/README.md").write_text(card.replace("mlp.up_proj", "mlp.pu_proj"))
    assert main(["report", "--check"]) == 1
