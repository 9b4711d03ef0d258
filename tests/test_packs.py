"""Reference packs: what was put in comes out, once, and nothing of another identity."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from harness.engines.protocol import Top
from harness.errors import UserError
from harness.measure.kept import pack_of

WINDOWS = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
IDENTITY = {"artifact_digest": "a", "options": {"max_model_len": 8}}


def tops(seed: int = 0, num: int = 2) -> Iterator[Top]:
    random = np.random.default_rng(seed)
    for window in WINDOWS:
        rows = len(window) - 1
        yield Top(
            random.integers(0, 9, (rows, num)).astype(np.int32),
            -random.random((rows, num)).astype(np.float32),
            -random.random(rows).astype(np.float32),
        )


def never() -> Iterator[Top]:
    raise AssertionError("the source was asked again")
    yield


def test_a_pack_gives_back_what_was_put_in_to_the_last_bit(tmp_path: Path) -> None:
    pack = pack_of(tmp_path, IDENTITY, tops)
    assert (pack.num, pack.reused) == (2, False)
    for found, wanted in zip(pack.tops(WINDOWS), tops(), strict=True):
        assert found.ids.tolist() == wanted.ids.tolist()
        assert found.log_probs.tolist() == wanted.log_probs.tolist()
        assert found.actual.tolist() == wanted.actual.tolist()


def test_a_pack_is_built_once_and_read_as_often_as_one_likes(tmp_path: Path) -> None:
    pack_of(tmp_path, IDENTITY, tops)
    pack = pack_of(tmp_path, IDENTITY, never)
    assert (pack.num, pack.reused) == (2, True)
    assert len(list(pack.tops(WINDOWS))) == len(list(pack.tops(WINDOWS))) == 3


def test_a_pack_of_another_source_or_of_other_options_is_not_used(tmp_path: Path) -> None:
    pack_of(tmp_path, IDENTITY, tops)
    for other in ({**IDENTITY, "artifact_digest": "b"}, {**IDENTITY, "options": {}}):
        assert not pack_of(tmp_path, other, lambda: tops(seed=1)).reused


def test_a_pack_that_a_crash_interrupted_is_built_again(tmp_path: Path) -> None:
    def dying() -> Iterator[Top]:
        yield next(tops())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_of(tmp_path, IDENTITY, dying)
    assert not pack_of(tmp_path, IDENTITY, tops).reused


def test_a_pack_that_was_cut_or_lacks_windows_is_named(tmp_path: Path) -> None:
    pack = pack_of(tmp_path, IDENTITY, tops)
    with pytest.raises(UserError, match=r"\.pack is cut"):
        list(pack.tops(WINDOWS[:2]))
    pack.path.write_bytes(pack.path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"\.pack is cut"):
        list(pack.tops(WINDOWS))


def test_a_pack_whose_first_line_is_damaged_is_built_again(tmp_path: Path) -> None:
    pack = pack_of(tmp_path, IDENTITY, tops)
    pack.path.write_bytes(b"{" + pack.path.read_bytes())
    assert not pack_of(tmp_path, IDENTITY, tops).reused


def test_a_source_that_predicts_nan_makes_no_pack(tmp_path: Path) -> None:
    broken = Top(np.zeros((2, 1), np.int32), np.full((2, 1), np.nan, np.float32), np.zeros(2, np.float32))
    with pytest.raises(UserError, match="predicts NaN"):
        pack_of(tmp_path, IDENTITY, lambda: [broken])
    assert not list(tmp_path.glob("*.pack"))
