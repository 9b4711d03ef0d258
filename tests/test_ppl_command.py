"""`harness ppl`: one engine's answers for every protocol, under the same identity alone, of the expected text alone."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness import job
from harness.cli import main
from harness.demo import checkpoint_path, corpus
from harness.engines.protocol import ENGINES, EngineDied
from harness.engines.torch_engine import TorchEngine
from harness.measure import perplexity
from harness.measure.perplexity import tokenize
from harness.record import store
from harness.record.run import Record

SUITE = """
name = "small"
title = "x"
source.location = "{source}"
variants.a16.recipe = "rtn-a16"
engine = {{ dtype = "float32", device = "cpu" }}
[ppl]
text = {{ path = "text.txt" }}
protocols = {protocols}
batch_size = 2
{more}
"""
TEXT = corpus.heldout_text()[:3700]
NUM_TOKENS = len(tokenize(checkpoint_path("dense"), TEXT))
BOTH = ("wikitext2-512", "llamacpp-512")

Run = Callable[..., dict[str, Record]]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every engine start, by its folder."""
    found: list[str] = []

    def counting(name: str, folder: Path, **options: Any) -> Any:
        found.append(folder.name)
        return open_engine(name, folder, **options)

    open_engine = job.open_engine
    monkeypatch.setattr(job, "open_engine", counting)
    return found


@pytest.fixture
def run(place: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """The source's record by protocol."""

    def command(
        *arguments: str, protocols: Sequence[str] = BOTH, more: str = "", source: str = "demo:dense"
    ) -> dict[str, Record]:
        text = SUITE.format(protocols=json.dumps(list(protocols)), more=more, source=source)
        (place / "suite.toml").write_text(text)
        assert main(["ppl", "--suite", "suite.toml", "--variant", "source", "--json", *arguments]) == 0
        written = json.loads(capsys.readouterr().out)["records"]
        return {name: store.read(place / rows["source"]) for name, rows in written.items()}

    return command


def reused(record: Record) -> tuple[int, int]:
    (told,) = record.kind("reused")
    return told["num_reused"], told["num_windows"]


def test_the_text_of_these_tests_has_three_windows_and_a_tail() -> None:
    assert 3 * 512 + 1 < NUM_TOKENS < 4 * 512


def test_one_pass_serves_every_protocol_and_a_later_one_needs_no_engine(run: Run, started: list[str]) -> None:
    first = run()
    assert (started, list(first)) == (["dense"], list(BOTH))
    assert [reused(record) for record in first.values()] == [(0, 4), (0, 3)]
    assert all(record.whole and record.run.dataset is not None for record in first.values())
    again = run(protocols=("llamacpp-512", "wikitext2-512"))
    assert started == ["dense"]
    for name, record in again.items():
        assert reused(record) == (len(record.kind("window")),) * 2
        assert record.kind("window") == first[name].kind("window")
        assert record.run.engine == first[name].run.engine
        assert record.run.dataset == first[name].run.dataset
        assert record.run.run_id != first[name].run.run_id
    datasets = {name: record.run.dataset or {} for name, record in first.items()}
    assert {name: (one["num_windows"], one["num_scored"]) for name, one in datasets.items()} == {
        "wikitext2-512": (4, NUM_TOKENS - 4),
        "llamacpp-512": (3, 3 * 255),
    }
    digests = [one["log_probs_sha256"] for one in datasets.values()]
    assert len(set(digests)) == 2, "llamacpp-512 does not read the tail"


def test_a_run_alone_gives_the_same_as_one_that_was_limited_before(run: Run, started: list[str]) -> None:
    limited = run("--limit", "1")
    assert [(reused(record), record.whole) for record in limited.values()] == [((0, 1), False)] * 2
    whole = run()
    assert [reused(record) for record in whole.values()] == [(2, 4), (2, 3)], "whole batches were kept"
    fresh = run("--fresh")
    assert [reused(record) for record in fresh.values()] == [(0, 4), (0, 3)]
    for name in BOTH:
        assert whole[name].kind("window") == fresh[name].kind("window")
        assert limited[name].kind("window") == whole[name].kind("window")[:1]
    assert len(started) == 3


def test_what_differs_is_computed_anew(
    run: Run, started: list[str], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fresh_start(*arguments: str, **options: Any) -> None:
        num_starts = len(started)
        (record,) = run(*arguments, "--limit", "1", protocols=["wikitext2-512"], **options).values()
        assert (reused(record), len(started)) == ((0, 1), num_starts + 1)

    fresh_start()
    fresh_start("--dtype", "bfloat16")
    # The same weights but for one bit, under the same configuration.
    copied = shutil.copytree(checkpoint_path("dense"), place / "copied")
    shard = next(copied.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    fresh_start(source="./copied")
    (place / "text.txt").write_text(TEXT.replace("a", "e", 1))
    fresh_start()
    (place / "text.txt").write_text(TEXT)
    monkeypatch.setenv("OMP_NUM_THREADS", str(int(os.environ.get("OMP_NUM_THREADS", "1")) + 1))
    fresh_start()
    monkeypatch.setitem(ENGINES, "torch", replace(ENGINES["torch"], version=ENGINES["torch"].version + 1))
    fresh_start()
    monkeypatch.setattr(perplexity, "VERSION", perplexity.VERSION + 1)
    fresh_start()
    num_files = len(list((place / "artifacts/small/.log-probs").iterdir()))
    assert num_files == len(started) == 7


def test_an_engine_that_dies_is_recorded_and_the_next_run_goes_on_where_it_was(
    place: Path, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    score = TorchEngine.score

    def dying(self: TorchEngine, windows: Sequence[Sequence[int]], batch_size: int) -> Iterator[Any]:
        for number, row in enumerate(score(self, windows, batch_size)):
            if number == 3:
                raise EngineDied("The engine died.", "Look at its log.", ["killed"])
            yield row

    with monkeypatch.context() as patched:
        patched.setattr(TorchEngine, "score", dying)
        (place / "suite.toml").write_text(SUITE.format(protocols=json.dumps(BOTH), more="", source="demo:dense"))
        assert main(["ppl", "--suite", "suite.toml", "--variant", "source"]) == 1
    assert "source failed: The engine died." in capsys.readouterr().err
    (path,) = place.glob("results/*/*.jsonl")
    failed = store.read(path)
    assert (failed.end.status, failed.kind("failure")[0]["log"]) == ("failed", ["killed"])
    assert failed.run.engine is not None and failed.run.dataset is not None
    assert {name: reused(record) for name, record in run().items()} == {BOTH[0]: (3, 4), BOTH[1]: (3, 3)}


def test_the_table_says_how_much_is_of_earlier_runs(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run("--limit", "2")
    assert main(["ppl", "--suite", "suite.toml", "--variant", "source"]) == 0
    out = capsys.readouterr().out
    assert "source, wikitext2-512: 2 of 4 windows are of earlier runs." in out
    assert "source, llamacpp-512: 2 of 3 windows are of earlier runs." in out
    assert f"tokens {NUM_TOKENS:,}" in out and "765" in out


@pytest.mark.parametrize(
    ("protocols", "more", "says"),
    [
        (BOTH, "expected.wikitext2-512.num_tokens = 297_053", f"num_tokens = {NUM_TOKENS:,} by wikitext2-512, and the"),
        (BOTH, "expected.llamacpp-512 = { num_windows = 3, num_scored = 766 }", "suite expects 766."),
        (["wikitext2-521"], "", "Did you mean 'wikitext2-512'?"),
        (["wikitext2-512", "gptq-2048"], "", "fewer than one window of gptq-2048"),
        (["lmeval-word"], "", "no page titles"),
    ],
)
def test_a_suite_that_cannot_be_measured_is_refused_before_an_engine_starts(
    protocols: Sequence[str],
    more: str,
    says: str,
    place: Path,
    started: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    (place / "suite.toml").write_text(SUITE.format(protocols=json.dumps(protocols), more=more, source="demo:dense"))
    assert main(["ppl", "--suite", "suite.toml"]) == 2
    err = capsys.readouterr().err
    assert says in err and len(err.strip().splitlines()) == 2
    assert not started and {path.name for path in place.iterdir()} == {"suite.toml", "text.txt"}


def test_the_right_text_meets_what_is_expected_of_it(run: Run) -> None:
    expected = f"num_tokens = {NUM_TOKENS}, num_windows = 4, num_scored = {NUM_TOKENS - 4}"
    assert run("--limit", "1", protocols=["wikitext2-512"], more=f"expected.wikitext2-512 = {{ {expected} }}")
