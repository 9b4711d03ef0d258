"""Stored log-probabilities: what every protocol reads from them, what an interruption leaves, and whose they are."""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.engines.protocol import EngineInfo
from harness.errors import UserError
from harness.measure.kept import LogProbs
from harness.measure.perplexity import PROTOCOLS, Protocol, Window, extend, whole, window_samples, windows
from tests.perplexities import protocol_samples
from tests.test_perplexity import CUTTING, PositionEngine

INFO = EngineInfo("company", "1", "cpu", "float32", effective={"cpu_capability": "AVX2", "threads": 2})
SHORT = 40  # tokens that the protocols of these tests have in place of 512


def scaled(protocol: Protocol) -> Protocol:
    """The protocol with short windows."""
    assert protocol.window is not None and protocol.stride is not None
    return replace(protocol, window=SHORT, stride=SHORT * protocol.stride // protocol.window)


class CompanyEngine(PositionEngine):
    """Its answers depend on the windows that are computed together, as the last bits of a real engine's may."""

    info = INFO

    def __init__(self, lives: int = 10**9) -> None:
        super().__init__()
        self.lives = lives

    def score(self, windows: Sequence[Sequence[int]], batch_size: int) -> Iterator[Any]:
        for _, run in groupby(windows, key=len):
            equal = list(run)
            for start in range(0, len(equal), batch_size):
                batch = equal[start : start + batch_size]
                company = sum(sum(one) for one in batch)
                for place, window in enumerate(batch):
                    if len(self.seen) == self.lives:
                        raise KeyboardInterrupt
                    self.seen.append(list(window))
                    yield -np.asarray(window[1:], dtype=np.float64) / 7 - place / 3 - company / 1e3


def lengths(cut: Sequence[Window]) -> list[int]:
    return [window.num_tokens for window in cut]


def stored_in(folder: Path, cut: Sequence[Window], identity: str = "one", **options: Any) -> LogProbs:
    return LogProbs(folder, "source", {"of": identity}, lengths(cut), **options)


def fill(
    stored: LogProbs, engine: Any, ids: Sequence[int], cut: Sequence[Window], num_windows: int, batch_size: int
) -> int:
    return extend(stored, engine, INFO.as_dict(), ids, cut, num_windows, batch_size=batch_size, name="x")


@given(
    st.lists(st.sampled_from(sorted(CUTTING)), min_size=1, max_size=5),
    st.integers(2 * SHORT, 600),
    st.integers(1, 7),
)
def test_every_protocol_from_one_array_is_what_it_measures_by_itself_bit_for_bit(
    names: list[str], num_tokens: int, batch_size: int
) -> None:
    ids = range(1000, 1000 + num_tokens)
    with tempfile.TemporaryDirectory() as folder:
        for protocol in (scaled(PROTOCOLS[name]) for name in names):
            cut, mine = windows(whole(protocol), num_tokens), windows(protocol, num_tokens)
            with stored_in(Path(folder), cut, f"{protocol.window} {protocol.stride}") as stored:
                if len(stored) < len(mine):
                    fill(stored, CompanyEngine(), ids, cut, len(mine), batch_size)
                found = list(window_samples(mine, stored.rows(len(mine))))
            assert found == list(protocol_samples(CompanyEngine(), ids, protocol, batch_size=batch_size))


@given(st.data(), st.integers(2 * SHORT, 600), st.integers(1, 7))
def test_a_run_that_was_interrupted_anywhere_ends_with_the_same_bytes(
    data: st.DataObject, num_tokens: int, batch_size: int
) -> None:
    cut = windows(scaled(PROTOCOLS["wikitext2-512"]), num_tokens)
    ids = range(1000, 1000 + num_tokens)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as apart:
        with stored_in(Path(apart), cut) as stored:
            fill(stored, CompanyEngine(), ids, cut, len(cut), batch_size)
            expected = stored.sha256(len(cut))
        done = 0
        while done < len(cut):
            lives = data.draw(st.integers(0, 2 * batch_size + 1))
            with stored_in(Path(folder), cut) as stored:
                assert len(stored) == done
                engine = CompanyEngine(lives or 10**9)
                try:
                    num_reused = fill(stored, engine, ids, cut, len(cut), batch_size)
                    assert num_reused == len(cut) - len(engine.seen) <= done
                except KeyboardInterrupt:
                    pass
                done = len(stored)
            size = stored.path.stat().st_size
            if done < len(cut) and data.draw(st.booleans()):
                with stored.path.open("ab") as stream:  # a window that was being written as the process died
                    stream.write(b"\x00" * data.draw(st.integers(1, 4 * (cut[done].num_tokens - 1) - 1)))
        with stored_in(Path(folder), cut) as stored:
            assert stored.sha256(len(cut)) == expected
        assert stored.path.stat().st_size == size


def test_the_file_is_a_line_of_json_and_then_float32_numbers(tmp_path: Path) -> None:
    cut = [Window(0, 3, 1), Window(3, 4, 1)]
    with stored_in(tmp_path, cut) as stored:
        fill(stored, PositionEngine(), [1000, 2000, 3000, 4000, 5000, 6000, 7000], cut, 2, 4)
        digests = [stored.sha256(num) for num in (1, 2)]
    head, _, numbers = stored.path.read_bytes().partition(b"\n")
    assert json.loads(head) == {"identity": {"of": "one"}, "engine": INFO.as_dict()}
    assert np.frombuffer(numbers, "<f4").tolist() == [-2, -3, -5, -6, -7]
    assert digests == [hashlib.sha256(numbers[:8]).hexdigest(), hashlib.sha256(numbers).hexdigest()]


CUT = windows(PROTOCOLS["wikitext2-512"], 3000)  # five of 512, one of 440


def test_a_limited_run_computes_whole_batches_and_leaves_them_to_the_next(tmp_path: Path) -> None:
    with stored_in(tmp_path, CUT) as stored:
        engine = CompanyEngine()
        assert fill(stored, engine, range(3000), CUT, 2, 3) == 0
        assert len(stored) == len(engine.seen) == 3
    with stored_in(tmp_path, CUT) as stored:
        assert fill(stored, engine, range(3000), CUT, 6, 3) == 3
        assert engine.seen == [list(range(w.first_token, w.first_token + w.num_tokens)) for w in CUT]
        rows = list(stored.rows(2))
    direct = list(protocol_samples(CompanyEngine(), range(3000), PROTOCOLS["wikitext2-512"], batch_size=3))
    assert list(window_samples(CUT[:2], rows)) == direct[:2]


def filled(folder: Path, **options: Any) -> LogProbs:
    with stored_in(folder, CUT, **options) as stored:
        fill(stored, CompanyEngine(), range(3000), CUT, len(CUT), 4)
    return stored


@pytest.mark.parametrize(
    "change",
    [
        {"name": "vllm"},
        {"version": "2"},
        {"device": "NVIDIA H200"},
        {"dtype": "bfloat16"},
        {"served_as": "weight-only"},
        {"effective": {"cpu_capability": "AVX512"}},
    ],
)
def test_what_another_engine_computed_is_not_gone_on_with(change: dict[str, Any], tmp_path: Path) -> None:
    filled(tmp_path)
    with stored_in(tmp_path, CUT) as stored:
        assert stored.go_on({**INFO.as_dict(), "effective": {"cpu_capability": "AVX2", "threads": 64}}, 4) == 4
        assert len(stored) == 4
        assert stored.go_on({**INFO.as_dict(), **change}, 4) == len(stored) == 0
        assert stored.engine == {**INFO.as_dict(), **change}
    with stored_in(tmp_path, CUT) as stored:
        assert len(stored) == 0


def test_another_identity_has_another_file_and_a_fresh_one_forgets(tmp_path: Path) -> None:
    path = filled(tmp_path).path
    with stored_in(tmp_path, CUT, "another") as other:
        assert other.path != path and len(other) == 0 and other.engine is None
    with stored_in(tmp_path, CUT) as same:
        assert len(same) == len(CUT) and same.engine == INFO.as_dict()
    with stored_in(tmp_path, CUT, fresh=True) as fresh:
        assert fresh.path == path and len(fresh) == 0 and fresh.engine is None


@pytest.mark.parametrize("head", [b"", b"{", b"null\n", b'{"identity": {"of": "another"}, "engine": {}}\n', b"\xff\n"])
def test_a_file_with_another_first_line_says_nothing(head: bytes, tmp_path: Path) -> None:
    path = filled(tmp_path).path
    path.write_bytes(head + path.read_bytes().partition(b"\n")[2])
    with stored_in(tmp_path, CUT) as stored:
        assert len(stored) == 0 and stored.engine is None


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda row: np.where(np.arange(len(row)) == 9, np.nan, row), "Window 2 has a log-probability of nan"),
        (lambda row: np.where(np.arange(len(row)) == 9, -np.inf, row), "log-probability of -inf at position 10"),
        (lambda row: row[:-1], "Window 2 has 512 tokens, and the engine gave 510"),
        (lambda row: None, "scored 2 of 6 windows"),
    ],
    ids=["nan", "infinity", "too short", "too few"],
)
def test_nothing_of_a_spoilt_answer_is_kept(spoil: Any, says: str, tmp_path: Path) -> None:
    class Spoilt(CompanyEngine):
        def score(self, windows: Sequence[Sequence[int]], batch_size: int) -> Iterator[Any]:
            for number, row in enumerate(super().score(windows, batch_size)):
                answer = spoil(row) if number == 2 else row
                if answer is None:
                    return
                yield answer

    with stored_in(tmp_path, CUT) as stored:
        with pytest.raises(UserError, match=says):
            fill(stored, Spoilt(), range(3000), CUT, len(CUT), 3)
        assert len(stored) == 2
    expected = filled(tmp_path / "apart")
    with stored_in(tmp_path, CUT) as stored:
        assert len(stored) == 2
        fill(stored, CompanyEngine(), range(3000), CUT, len(CUT), 4)
        with stored_in(tmp_path / "apart", CUT) as apart:
            assert apart.path == expected.path and stored.sha256(6) == apart.sha256(6)


def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    with (
        stored_in(tmp_path, CUT),
        pytest.raises(UserError, match="is being written by another run"),
        stored_in(tmp_path, CUT),
    ):
        pass


def test_a_row_of_another_length_and_a_window_that_is_not_there_are_errors(tmp_path: Path) -> None:
    with stored_in(tmp_path, CUT) as stored:
        stored.go_on(INFO.as_dict(), 0)
        with pytest.raises(ValueError, match=r"shape \(510,\)"):
            stored.append(np.zeros(510, np.float32))
        with pytest.raises(ValueError, match="1 windows of 0"):
            list(stored.rows(1))
