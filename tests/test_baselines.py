"""Baselines: they name whole runs that are still what they were, and nothing is ever forgotten."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.errors import UserError
from harness.record import baselines
from harness.record.run import Record
from harness.record.store import RunWriter, read
from tests.records import TASK, answer, make_record, tasks_record, windows

Change = Callable[[Path, Path], object]
"""Spoils a baseline; gets its file and the run's."""


def stored(folder: Path, record: Record) -> Record:
    """A hand-made record in a folder, as a command leaves it."""
    with RunWriter(folder, record.run, expected=record.end.coverage["expected"]) as writer:
        for sample in record.samples:
            writer.sample(sample)
        return read(writer.finish())


def ppl(folder: Path, variant: str = "nvfp4", value: float = 8.0, **header: Any) -> Record:
    return stored(folder, make_record("ppl", variant, windows(value, num_tokens=1500), **header))


def update(folder: Path, record: Record, reason: str = "the first") -> Path:
    slots = {baselines.slot(record): {record.run.variant["name"]: record}}
    return baselines.update(folder, "demo", slots, reason=reason, commit="c0ffee")


def document(folder: Path) -> Any:
    return json.loads((folder / "baselines/demo.json").read_text())


def test_a_baseline_is_read_back_with_its_runs(tmp_path: Path) -> None:
    first, second = ppl(tmp_path), ppl(tmp_path, "source", run_id="11111111")
    slots = {"ppl/wikitext2-512": {"nvfp4": first, "source": second}}
    assert baselines.update(tmp_path, "demo", slots, reason="why", commit=None) == tmp_path / "baselines/demo.json"
    assert baselines.baseline_in_force(tmp_path, "demo") == slots


def test_a_suite_without_a_baseline_has_none(tmp_path: Path) -> None:
    assert baselines.baseline_in_force(tmp_path, "demo") == {}


def test_what_was_measured_is_told_by_protocol_and_task() -> None:
    assert baselines.slot(make_record("ppl", "source", windows(8.0))) == "ppl/wikitext2-512"
    assert baselines.slot(tasks_record("source", [answer(0, 1.0)], dataset={**TASK, "name": "gsm8k"})) == "tasks/gsm8k"
    assert baselines.slot(make_record("bench", "source", [])) == "bench"


def test_the_last_entry_is_in_force_and_those_before_it_stay_with_their_reasons(tmp_path: Path) -> None:
    old, new = ppl(tmp_path, run_id="11111111"), ppl(tmp_path, value=8.1, run_id="22222222")
    update(tmp_path, old)
    before = document(tmp_path)["history"]
    update(tmp_path, new, "  vLLM 0.33 rounds otherwise\n")
    assert baselines.baseline_in_force(tmp_path, "demo") == {"ppl/wikitext2-512": {"nvfp4": new}}
    history = document(tmp_path)["history"]
    assert history[:1] == before and len(history) == 2
    assert [entry["reason"] for entry in history] == ["the first", "vLLM 0.33 rounds otherwise"]
    assert history[1]["commit"] == "c0ffee" and history[1]["utc"].endswith("Z")


def test_a_baseline_holds_paths_and_digests_and_no_numbers(tmp_path: Path) -> None:
    record = ppl(tmp_path)
    update(tmp_path, record)
    (entry,) = document(tmp_path)["history"]
    named = entry["records"]["ppl/wikitext2-512"]["nvfp4"]
    assert named.keys() == {"file", "sha256"}
    assert named["file"] == f"test-cpu-2c/{record.path.name}" and len(named["sha256"]) == 64


def test_a_run_from_another_folder_is_refused(tmp_path: Path) -> None:
    record = ppl(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"nvfp4-\w+\.jsonl is not in .*/here") as refused:
        update(tmp_path / "here", record)
    assert "Copy the record there" in refused.value.remedy
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize("reason", ["", " \n"])
def test_a_baseline_without_a_reason_is_refused_and_nothing_is_written(tmp_path: Path, reason: str) -> None:
    with pytest.raises(UserError, match="changed for a reason"):
        update(tmp_path, ppl(tmp_path), reason)
    assert not (tmp_path / "baselines").exists()


def test_nothing_is_left_beside_the_file(tmp_path: Path) -> None:
    update(tmp_path, ppl(tmp_path))
    assert [path.name for path in (tmp_path / "baselines").iterdir()] == ["demo.json"]


def cut(_: Path, run: Path) -> None:
    run.write_bytes(run.read_bytes()[:-40])


def one_digit_changed(_: Path, run: Path) -> None:
    run.write_text(run.read_text().replace('"index":1', '"index":7'))


def gone(_: Path, run: Path) -> None:
    run.unlink()


def edited(edit: Callable[[Any], object]) -> Change:
    def change(file: Path, _: Path) -> None:
        value = json.loads(file.read_text())
        edit(value)
        file.write_text(json.dumps(value))

    return change


def rows(value: Any) -> Any:
    return value["history"][0]["records"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (cut, r"names test-cpu-2c/\S+\.jsonl, which has changed since"),
        (one_digit_changed, "which has changed since"),
        (gone, r"names test-cpu-2c/\S+\.jsonl, which is not there"),
        (edited(lambda v: rows(v)["ppl/wikitext2-512"]["nvfp4"].update(file="../x.jsonl")), "is not in"),
        (edited(lambda v: rows(v).update({"ppl/x": rows(v).pop("ppl/wikitext2-512")})), "'ppl/x' of 'nvfp4'"),
        (
            edited(lambda v: rows(v)["ppl/wikitext2-512"].update(w4a4=rows(v)["ppl/wikitext2-512"].pop("nvfp4"))),
            "'ppl/wikitext2-512' of 'w4a4', and it is no whole run of it",
        ),
        (edited(lambda v: v.update(schema=2)), "no list of baselines of suite 'demo'"),
        (edited(lambda v: v.update(suite="other")), "no list of baselines of suite 'demo'"),
        (edited(lambda v: v["history"][0].pop("reason")), "entry 0 has no good 'reason'"),
        (edited(lambda v: v["history"].append(3)), "entry 1 has no good 'utc'"),
        (edited(lambda v: rows(v).update(x=[1])), "entry 0 has no good 'records'"),
        (lambda file, _: file.write_text(file.read_text()[:-9]), "cannot be read as JSON"),
        (lambda file, _: file.write_bytes(b"\xff"), "cannot be read as JSON"),
        (lambda file, _: file.write_text("[]"), "no list of baselines"),
    ],
)
def test_a_baseline_that_is_not_what_it_was_is_an_error_that_names_it(
    tmp_path: Path, change: Change, problem: str
) -> None:
    record = ppl(tmp_path)
    file = update(tmp_path, record)
    change(file, record.path)
    with pytest.raises(UserError, match=problem) as refused:
        baselines.baseline_in_force(tmp_path, "demo")
    assert "demo.json" in refused.value.problem and refused.value.remedy


def test_a_damaged_history_is_not_written_over(tmp_path: Path) -> None:
    record = ppl(tmp_path)
    file = update(tmp_path, record)
    file.write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        update(tmp_path, record)
    assert file.read_text() == "{"


def test_a_run_over_a_part_is_no_baseline(tmp_path: Path) -> None:
    made = make_record("ppl", "nvfp4", windows(8.0, num_tokens=1500))
    with RunWriter(tmp_path, made.run, expected=581) as writer:
        writer.sample(made.samples[0])
        record = read(writer.finish())
    update(tmp_path, record)
    with pytest.raises(UserError, match="no whole run"):
        baselines.baseline_in_force(tmp_path, "demo")
