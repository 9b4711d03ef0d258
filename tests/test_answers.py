"""The journal of answers: what was put is found again, whatever became of the file or of the process that wrote it."""

import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from harness.errors import UserError
from harness.measure.kept import Journal, digest

IDENTITY: dict[str, Any] = {"artifact_digest": "3" * 64, "engine": {"name": "torch", "version": "2.13.0"}, "seeds": [1]}

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=8
)
ANSWERS = st.dictionaries(st.text(), st.dictionaries(st.text(), VALUES, max_size=4), max_size=6)
SOME: dict[str, dict[str, Any]] = {
    "a": {"text": "4", "token_ids": [1, 2]},
    "b": {"text": "ü\n", "seconds": 0.25},
    "c": {},
}


def fill(folder: Path, answers: Mapping[str, dict[str, Any]], **more: Any) -> Path:
    """The file of a journal that the answers were put into."""
    with Journal(folder, "source-sums", IDENTITY, **more) as journal:
        for key, value in answers.items():
            journal.put(key, value)
    return journal.path


def found(folder: Path, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Which of the keys a journal knows when it is opened, and their answers."""
    with Journal(folder, "source-sums", IDENTITY) as journal:
        return known(journal, keys)


def known(journal: Journal, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
    return {key: value for key in keys if (value := journal.get(key)) is not None}


def written(value: object) -> str:
    """As JSON: tells true from 1 from 1.0, and finds NaN equal to itself."""
    return json.dumps(value)


def line_ends(data: bytes) -> list[int]:
    return [end for end, byte in enumerate(data, start=1) if byte == ord("\n")]


# -- What is put is found ----------------------------------------------------------------------------------------


@given(ANSWERS)
def test_what_was_put_is_found_at_once_and_after_a_reopening(
    tmp_path_factory: pytest.TempPathFactory, answers: dict[str, dict[str, Any]]
) -> None:
    folder = tmp_path_factory.mktemp("answers")
    with Journal(folder, "source-sums", IDENTITY) as journal:
        for key, value in answers.items():
            assert journal.get(key) is None
            journal.put(key, value)
            assert journal.get(key) == value or written(journal.get(key)) == written(value)
    assert written(found(folder, answers)) == written(answers)
    assert written(found(folder, answers)) == written(answers)


@given(ANSWERS, ANSWERS)
def test_a_journal_that_is_opened_again_goes_on_where_it_was(
    tmp_path_factory: pytest.TempPathFactory, first: dict[str, dict[str, Any]], second: dict[str, dict[str, Any]]
) -> None:
    folder = tmp_path_factory.mktemp("answers")
    before = fill(folder, first).read_bytes()
    assert fill(folder, second).read_bytes().startswith(before)
    both = {**first, **second}  # an answer that is put twice is the later one
    assert written(found(folder, both)) == written(both)


def test_a_key_that_was_never_put_is_not_known(tmp_path: Path) -> None:
    fill(tmp_path, SOME)
    assert found(tmp_path, ["d", "", "A", "identity", "key"]) == {}


def test_an_answer_is_in_the_file_when_put_returns(tmp_path: Path) -> None:
    with Journal(tmp_path, "source-sums", IDENTITY) as journal:
        for number, (key, value) in enumerate(SOME.items(), start=1):
            journal.put(key, value)
            lines = [json.loads(line) for line in journal.path.read_bytes().splitlines()]
            assert lines[0] == {"identity": IDENTITY}
            assert len(lines) == 1 + number and lines[-1] == {"key": key, "value": value}


@pytest.mark.parametrize(
    "text",
    ["Größe 温度 🙂", "e\u0301 \u202e\u200d", "a\u2028b\u2029c\u0085d\x0be\x1cf", '\x00\t\r\n\\"', "\ufffd\ufeff"],
)
def test_any_character_survives_as_utf_8(tmp_path: Path, text: str) -> None:
    answers = {text: {text: text, "text": [text]}}
    path = fill(tmp_path, answers)
    assert found(tmp_path, answers) == answers
    assert len(path.read_bytes().decode().removesuffix("\n").split("\n")) == 2


def test_letters_stand_in_the_file_as_themselves(tmp_path: Path) -> None:
    assert "Größe 温度 🙂" in fill(tmp_path, {"a": {"text": "Größe 温度 🙂"}}).read_text(encoding="utf-8")


def test_what_was_put_is_a_copy(tmp_path: Path) -> None:
    value = {"text": "4"}
    with Journal(tmp_path, "source-sums", IDENTITY) as journal:
        journal.put("a", value)
        value["text"] = "5"
        assert journal.get("a") == {"text": "4"}


# -- Whose answers they are --------------------------------------------------------------------------------------


def test_a_digest_is_that_of_canonical_json() -> None:
    text = '{"a":[1,2.5,null,true],"ö":"ü"}'
    assert digest({"ö": "ü", "a": (1, 2.5, None, True)}) == hashlib.sha256(text.encode()).hexdigest()


def test_the_file_is_named_after_the_run_and_the_digest_of_the_identity(tmp_path: Path) -> None:
    path = fill(tmp_path / "new" / "folder", SOME)
    assert path == tmp_path / "new" / "folder" / f"source-sums-{digest(IDENTITY)[:16]}.jsonl"


@pytest.mark.parametrize(
    "change",
    [
        {"artifact_digest": "4" * 64},
        {"engine": {"name": "vllm", "version": "2.13.0"}},
        {"seeds": [1.0]},
        {"seeds": [True]},
        {"more": None},
    ],
)
def test_another_identity_has_another_file_and_sees_nothing(tmp_path: Path, change: dict[str, Any]) -> None:
    path = fill(tmp_path, SOME)
    with Journal(tmp_path, "source-sums", {**IDENTITY, **change}) as other:
        assert other.path != path and known(other, SOME) == {}
        other.put("a", {"text": "of another"})
    assert found(tmp_path, SOME) == SOME


def test_another_name_has_another_file_and_sees_nothing(tmp_path: Path) -> None:
    path = fill(tmp_path, SOME)
    with Journal(tmp_path, "nvfp4-sums", IDENTITY) as other:
        assert other.path != path and known(other, SOME) == {}


def test_the_order_of_an_identitys_keys_and_the_kind_of_its_lists_do_not_matter(tmp_path: Path) -> None:
    fill(tmp_path, SOME)
    turned = {**dict(reversed(IDENTITY.items())), "seeds": (1,)}
    with Journal(tmp_path, "source-sums", turned) as journal:
        assert known(journal, SOME) == SOME


@pytest.mark.parametrize(
    "first",
    [
        {"identity": {**IDENTITY, "artifact_digest": "4" * 64}},
        {"identity": {}},
        {"identity": IDENTITY, "more": 1},
        {"key": "a", "value": {"text": "no identity at all"}},
        None,
        [],
    ],
)
def test_a_file_that_begins_with_another_identity_is_begun_anew(tmp_path: Path, first: object) -> None:
    path = fill(tmp_path, SOME)
    _, *entries = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join([json.dumps(first) + "\n", *entries]), encoding="utf-8")
    assert found(tmp_path, SOME) == {}
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"identity": IDENTITY}]
    fill(tmp_path, {"d": {"text": "new"}})
    assert found(tmp_path, [*SOME, "d"]) == {"d": {"text": "new"}}


def test_fresh_forgets_and_what_comes_after_stays(tmp_path: Path) -> None:
    fill(tmp_path, SOME)
    with Journal(tmp_path, "source-sums", IDENTITY, fresh=True) as journal:
        assert known(journal, SOME) == {}
        journal.put("d", {"text": "new"})
    assert found(tmp_path, [*SOME, "d"]) == {"d": {"text": "new"}}


def test_a_fresh_journal_that_is_opened_twice_forgets_twice(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "source-sums", IDENTITY, fresh=True)
    for _ in range(2):
        with journal:
            assert known(journal, SOME) == {}
            journal.put("a", SOME["a"])


# -- Damage ------------------------------------------------------------------------------------------------------


@given(ANSWERS, st.integers(0), ANSWERS)
@example(SOME, 0, SOME)  # everything is gone
@example(SOME, -1, {"d": {}})  # a whole last line without its newline
def test_a_cut_at_any_byte_loses_what_lies_behind_it_and_invents_nothing(
    tmp_path_factory: pytest.TempPathFactory,
    answers: dict[str, dict[str, Any]],
    cut: int,
    more: dict[str, dict[str, Any]],
) -> None:
    folder = tmp_path_factory.mktemp("answers")
    sizes = []  # of the file, when each answer had been put
    with Journal(folder, "source-sums", IDENTITY) as journal:
        begun = journal.path.stat().st_size
        for key, value in answers.items():
            journal.put(key, value)
            sizes.append(journal.path.stat().st_size)
    whole = journal.path.read_bytes()
    assert line_ends(whole) == [begun, *sizes]
    cut %= len(whole)
    journal.path.write_bytes(whole[:cut])
    kept = {key: value for (key, value), size in zip(answers.items(), sizes, strict=True) if size <= cut}

    with Journal(folder, "source-sums", IDENTITY) as journal:
        assert written(known(journal, [*answers, *more])) == written(kept)
        assert journal.path.read_bytes() == whole[: max([begun, *(size for size in sizes if size <= cut)])]
        for key, value in more.items():
            journal.put(key, value)
    assert written(found(folder, [*kept, *more, *answers])) == written({**kept, **more})


@given(st.binary(max_size=60))
@example(b"[" * 100_000 + b"\n")
@example(b"\x00" * 512)
@example(b"null\n")
@example(b"3\n")
@example(b'{"key":"d"}\n')
@example(b'{"key":[],"value":{}}\n')
@example(b'{"identity":{}}\n')
def test_whatever_a_crash_left_at_the_end_takes_no_answer_with_it(
    tmp_path_factory: pytest.TempPathFactory, rest: bytes
) -> None:
    folder = tmp_path_factory.mktemp("answers")
    path = fill(folder, SOME)
    whole = path.read_bytes()
    path.write_bytes(whole + rest)
    assert found(folder, [*SOME, "d"]) == SOME
    assert path.read_bytes() == whole
    fill(folder, {"d": {"text": "new"}})
    assert found(folder, [*SOME, "d"]) == {**SOME, "d": {"text": "new"}}


@given(st.binary(max_size=200))
@example(b"[" * 100_000 + b"\n")
def test_a_file_of_anything_else_is_begun_anew(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.mktemp("answers")
    fill(folder, {}).write_bytes(data)
    assert found(folder, SOME) == {}
    fill(folder, SOME)
    assert found(folder, SOME) == SOME


def test_an_answer_that_is_no_json_is_an_error_and_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    with Journal(tmp_path, "source-sums", IDENTITY) as journal:
        journal.put("a", SOME["a"])
        whole = journal.path.read_bytes()
        with pytest.raises(TypeError):
            journal.put("b", {"text": {1, 2}})
        assert journal.path.read_bytes() == whole and journal.get("b") is None
        journal.put("c", SOME["c"])
    assert found(tmp_path, SOME) == {"a": SOME["a"], "c": SOME["c"]}


# -- One writer at a time, and none that was killed --------------------------------------------------------------

WRITER = """
import itertools, json, pathlib, sys
from harness.measure.kept import Journal

with Journal(pathlib.Path(sys.argv[1]), "source-sums", json.loads(sys.argv[2])) as journal:
    print("open", flush=True)
    for number in itertools.count() if sys.argv[3] == "write" else ():
        journal.put(str(number), {"text": "温" * 200, "number": number})
        print(number, flush=True)
    sys.stdin.read()
"""
"""Holds a journal until its input ends, or writes answers until it is killed and says which it has put."""


@contextmanager
def writer(folder: Path, what: str) -> Iterator["subprocess.Popen[str]"]:
    """Another process that has the journal open."""
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), json.dumps(IDENTITY), what],
        cwd=Path(__file__).parent.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "open\n"
            yield process
        finally:
            process.kill()


def test_a_second_holder_in_this_process_is_refused_until_the_first_lets_go(tmp_path: Path) -> None:
    second = Journal(tmp_path, "source-sums", IDENTITY, fresh=True)
    with Journal(tmp_path, "source-sums", IDENTITY) as first:
        first.put("a", SOME["a"])
        with pytest.raises(UserError) as caught, second:
            pass
        assert str(first.path) in caught.value.problem and "another run" in caught.value.problem
        assert caught.value.remedy
        first.put("b", SOME["b"])
    assert found(tmp_path, SOME) == {"a": SOME["a"], "b": SOME["b"]}  # the refused one has forgotten nothing
    with second:
        assert known(second, SOME) == {}


def test_the_holder_of_another_journal_is_in_nobodys_way(tmp_path: Path) -> None:
    with Journal(tmp_path, "source-sums", IDENTITY), Journal(tmp_path, "nvfp4-sums", IDENTITY) as other:
        other.put("a", SOME["a"])


def test_a_journal_is_let_go_by_an_exception(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Journal(tmp_path, "source-sums", IDENTITY) as journal:
        journal.put("a", SOME["a"])
        raise KeyboardInterrupt
    assert found(tmp_path, SOME) == {"a": SOME["a"]}


def test_a_second_process_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    fill(tmp_path, SOME)
    with writer(tmp_path, "hold") as process:
        with pytest.raises(UserError, match="is being written by another run"):
            found(tmp_path, SOME)
        process.communicate("", timeout=60)
        assert process.returncode == 0
        assert found(tmp_path, SOME) == SOME


def test_answers_outlive_the_killed_process_that_put_them(tmp_path: Path) -> None:
    with writer(tmp_path, "write") as process:
        assert process.stdout is not None
        put = [int(process.stdout.readline()) for _ in range(50)]
        process.send_signal(signal.SIGKILL)
        put += [int(line) for line in process.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
        assert process.wait(timeout=60) == -signal.SIGKILL
    assert put == list(range(len(put)))
    # One more than it said may have been put when it was killed, and none that is half an answer.
    answers = found(tmp_path, map(str, range(len(put) + 10)))
    assert len(put) <= len(answers) <= len(put) + 1
    assert answers == {str(number): {"text": "温" * 200, "number": number} for number in range(len(answers))}
    fill(tmp_path, {"a": SOME["a"]})
    assert len(found(tmp_path, [*answers, "a"])) == len(answers) + 1
