"""The schema of records: it knows every key that a record holds, and refuses what no run can have said."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import harness
from harness.record.keys import LARGEST_COUNT, Key, Keys, optional
from harness.record.run import Run
from harness.record.samples import SAMPLES, sample_problem
from harness.record.schema import END, header_of
from harness.record.store import RunWriter, read, read_all
from tests.records import ENGINE, MACHINE, answer, decodes, make_run, windows

ROOT = Path(harness.__file__).parent.parent
WINDOW = windows(8.0, num_tokens=600)[0]


def tables(keys: Keys, place: str) -> Iterator[tuple[str, Key]]:
    """Every key of a table and of the tables within it, with its place."""
    for name, key in keys.items():
        yield f"{place} {name}", key
        if key.keys is not None:
            yield from tables(key.keys, f"{place} {name}")


EVERY_KEY = dict(
    entry
    for measure, kinds in SAMPLES.items()
    for place, keys in [(measure, header_of(measure)), *((f"{measure} {kind}", keys) for kind, keys in kinds.items())]
    for entry in tables(keys, place)
) | dict(tables(END, "end"))


def rewritten(path: Path, line: int, change: Mapping[str, Any]) -> str | None:
    """Why a stored run is not used after `change` of one of its lines; None where it still is."""
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    lines[line] |= change
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    _, skipped = read_all(path.parent.parent)
    return skipped[0].reason if skipped else None


def stored(folder: Path, *samples: dict[str, Any], measure: str = "ppl", **header: Any) -> Path:
    with RunWriter(folder, make_run(measure, **header)) as writer:
        for sample in samples or [WINDOW]:
            writer.sample(sample)
        return writer.finish()


def test_every_key_of_every_committed_record_is_in_the_schema() -> None:
    records, skipped = read_all(ROOT / "results")
    assert len(records) > 200 and not skipped
    for record in records:
        keys, header = header_of(record.run.measure), asdict(record.run)
        assert (keys.problem(header), keys.unknown(header)) == (None, None), record.path
        problems = {sample_problem(record.run.measure, sample, exact=True) for sample in record.samples}
        assert problems <= {None}, record.path


def test_every_key_says_what_it_means_in_a_sentence_and_bounds_its_numbers() -> None:
    assert len(EVERY_KEY) > 500
    for place, key in EVERY_KEY.items():
        assert key.meaning.endswith(".") and key.meaning[0] not in " ." and "\n" not in key.meaning, place
        assert (key.keys is not None) == (key.form in ("table", "tables", "named tables")), place
        assert key.bounds[0] < key.bounds[1] or place.endswith(" schema"), place


@pytest.mark.parametrize("end", ["_seconds", "_bytes", "_nats", "_db"])
def test_names_that_end_in_a_unit_have_that_unit(end: str) -> None:
    units = {"_seconds": {"seconds"}, "_bytes": {"bytes"}, "_nats": {"nats"}, "_db": {"dB"}}[end]
    assert {key.unit for place, key in EVERY_KEY.items() if place.endswith(end)} == units


def test_a_run_has_the_keys_of_the_header() -> None:
    for measure in SAMPLES:
        assert list(header_of(measure)) == list(Run.__dataclass_fields__)


@pytest.mark.parametrize(
    "sample", [{**WINDOW, "surprise": 1}, {**WINDOW, "documents": 1}, {"kind": "reused", "num_windows": 1}]
)
def test_a_sample_with_a_key_that_the_schema_does_not_know_or_without_one_is_not_written(
    tmp_path: Path, sample: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=r"a (window|reused) sample has"):
        stored(tmp_path, sample)


@pytest.mark.parametrize(
    ("header", "place"),
    [
        ({"engine": {**ENGINE, "surprise": 1}}, "engine.surprise"),
        ({"engine": {**ENGINE, "effective": {"thread": 2}}}, "engine.effective.thread"),
        ({"engine": {**ENGINE, "effective": {"threads": "2"}}}, "engine.effective.threads"),
        ({"machine": {**MACHINE, "gpu": {"name": "x"}}}, "machine.gpu.count"),
        ({"machine": {"name": "test-cpu-2c"}}, "machine.cpu"),
        ({"dataset": {"name": "x"}}, "dataset.token_ids_sha256"),
        ({"git": {"commit": None, "dirty": False}}, "git.commit"),
        ({"session_id": 1}, "session_id"),
    ],
)
def test_a_header_that_is_none_of_the_schema_is_not_written(tmp_path: Path, header: dict[str, Any], place: str) -> None:
    with pytest.raises(ValueError, match=f"the header of ppl has no good '{place}'"):
        stored(tmp_path, **header)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_record_of_a_later_version_that_says_more_is_read(tmp_path: Path) -> None:
    path = stored(tmp_path)
    assert rewritten(path, 1, {"surprise": {"more": [1]}}) is None
    assert rewritten(path, 0, {"engine": {**ENGINE, "effective": {"surprise": 1}, "more": 2}}) is None
    record = read(path)
    assert record.samples[0]["surprise"] == {"more": [1]}
    assert record.run.engine is not None and record.run.engine["more"] == 2


@pytest.mark.parametrize(
    ("line", "change", "says"),
    [
        (0, {"engine": {**ENGINE, "effective": {"threads": "two"}}}, "line 1 has no good 'engine.effective.threads'"),
        (0, {"engine": {"name": "torch"}}, "line 1 has no good 'engine.version'"),
        (0, {"engine": 3}, "line 1 has no good 'engine'"),
        (0, {"variant": {}}, "line 1 has no good 'variant.name'"),
        (0, {"packages": {"torch": 2}}, "line 1 has no good 'packages'"),
        (0, {"measure": ["ppl"]}, "its measure ['ppl'] is unknown"),
        (0, {"command": "harness"}, "line 1 has no good 'command'"),
        (1, {"kind": ["window"]}, "cannot be of the kind ['window']"),
        (1, {"num_tokens": 10**30}, "line 2: a window sample has no good 'num_tokens'"),
        (1, {"nll_nats": 1e308}, "line 2: a window sample has no good 'nll_nats'"),
        (1, {"document": "first"}, "line 2: a window sample has no good 'document'"),
        (1, {"document": None}, "line 2: a window sample has no good 'document'"),
        (2, {"num_samples": True}, "line 3 has no good 'num_samples'"),
        (2, {"coverage": {"expected": -1, "done": 1}}, "line 3 has no good 'coverage.expected'"),
    ],
)
def test_a_record_with_a_value_that_cannot_be_is_named_and_not_used(
    tmp_path: Path, line: int, change: dict[str, Any], says: str
) -> None:
    assert says in str(rewritten(stored(tmp_path), line, change))


def test_numbers_are_bounded_wherever_they_stand() -> None:
    keys = Keys(
        some=Key("numbers", "Times.", "seconds", low=0),
        named=Key("named numbers", "Times.", "seconds"),
        scores=Key("scores", "Scores."),
        below=Key("tables", "Tables.", keys=Keys(num=Key("count", "A count."))),
        **optional(far=Key("count", "A count.", high=5, nullable=True)),
    )
    good = {"some": [1.0], "named": {"a": 1}, "scores": {"a": [1, 2.5], "b": np.float64(3)}, "below": [{"num": 1}]}
    assert keys.problem(good) is None and keys.problem(good | {"far": None}) is None
    for name, value in [
        ("some", []),
        ("some", [1.0, -1.0]),
        ("some", [1e11]),
        ("some", [True]),
        ("named", {}),
        ("named", {"a": 1e11}),
        ("scores", {"a": float("inf")}),
        ("scores", {"a": [float("nan")]}),
        ("below", [{"num": LARGEST_COUNT + 1}]),
        ("below", [{}]),
        ("below", []),
        ("far", 6),
    ]:
        assert keys.problem(good | {name: value}) == name
    assert keys.unknown(good | {"below": [{"num": 1}, {"more": 2}]}) == "below.more"


def test_what_is_drafted_and_generated_may_be_left_out_and_is_checked_where_it_is_told() -> None:
    decode, item = decodes(0.1)[0], answer(0, 1.0)
    assert sample_problem("bench", decode, exact=True) is None
    assert sample_problem("bench", decode | {"num_drafts": 3, "num_draft_tokens": 9}, exact=True) is None
    assert (
        sample_problem("bench", decode | {"num_drafts": -3}, exact=True) == "a decode sample has no good 'num_drafts'"
    )
    assert sample_problem("tasks", item | {"finish_reasons": "stop"}, exact=True) is not None
