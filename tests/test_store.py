"""The store: what is written is read back exactly, and a damaged file is named and never used."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import harness
from harness.errors import UserError
from harness.record import provenance
from harness.record.run import new_id, utc_now
from harness.record.samples import SAMPLES
from harness.record.schema import COMPARABLE, WATCHED, incomparable
from harness.record.store import RunWriter, read, read_all
from tests.records import ENGINE, answer, choice, decodes, make_record, make_run, result, windows

WINDOWS = windows(8.0, num_tokens=1500)


def store(folder: Path, samples: list[dict[str, Any]] = WINDOWS, **header: Any) -> Path:
    with RunWriter(folder, make_run(**header)) as writer:
        for sample in samples:
            writer.sample(sample)
        return writer.finish()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def rewrite(path: Path, entries: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def only_skipped(folder: Path) -> str:
    records, skipped = read_all(folder)
    assert records == [] and len(skipped) == 1
    return skipped[0].reason


def test_a_run_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    record = read(store(tmp_path))
    assert record.run == make_run()
    assert list(record.samples) == WINDOWS
    assert record.end.status == "complete" and record.end.num_samples == 3
    assert record.end.coverage == {"expected": 3, "done": 3} and record.whole
    assert read_all(tmp_path) == ([record], [])


def test_the_file_is_named_by_machine_time_measure_suite_variant_and_run(tmp_path: Path) -> None:
    path = store(tmp_path, run_id="0123abcd")
    assert path == tmp_path / "test-cpu-2c" / "20260301T120000Z-ppl-demo-source-0123abcd.jsonl"


def test_the_lines_are_run_samples_and_end(tmp_path: Path) -> None:
    assert [line["type"] for line in lines(store(tmp_path))] == ["run", "sample", "sample", "sample", "end"]


def test_a_run_over_a_part_is_complete_but_not_whole(tmp_path: Path) -> None:
    with RunWriter(tmp_path, make_run(), expected=581) as writer:
        writer.sample(WINDOWS[0])
        record = read(writer.finish())
    assert record.end.status == "complete" and not record.whole
    assert record.end.coverage == {"expected": 581, "done": 1}


def test_samples_that_are_told_to_be_missing_make_a_run_not_whole(tmp_path: Path) -> None:
    with RunWriter(tmp_path, make_run("tasks")) as writer:
        writer.sample(answer(0, 1.0))
        writer.sample(result(1.0))
        record = read(writer.finish(num_missing=3))
    assert record.end.status == "complete" and not record.whole
    assert record.end.coverage == {"expected": 5, "done": 2}
    assert read_all(tmp_path) == ([record], [])


@pytest.mark.parametrize("expected", [None, 1])
def test_a_run_that_misses_nothing_is_whole(tmp_path: Path, expected: int | None) -> None:
    with RunWriter(tmp_path, make_run("tasks"), expected=expected) as writer:
        writer.sample(answer(0, 1.0))
        assert read(writer.finish(num_missing=0)).whole


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, "interrupted"), (OSError, "failed")])
def test_a_run_left_by_an_exception_keeps_its_samples_and_is_not_used(
    tmp_path: Path, error: type[BaseException], status: str
) -> None:
    with pytest.raises(error), RunWriter(tmp_path, make_run(), expected=3) as writer:
        writer.sample(WINDOWS[0])
        raise error
    record = read(writer.path)
    assert (record.end.status, record.samples) == (status, (WINDOWS[0],))
    assert status in only_skipped(tmp_path)


def test_a_run_that_is_never_finished_is_a_bug_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="without finish"), RunWriter(tmp_path, make_run()) as writer:
        writer.sample(WINDOWS[0])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_killed_process_leaves_no_results_file(tmp_path: Path) -> None:
    program = (
        "import os, sys, pathlib; from harness.record.store import RunWriter;"
        "from tests.records import make_run, windows\n"
        "with RunWriter(pathlib.Path(sys.argv[1]), make_run()) as writer:\n"
        "    writer.sample(windows(8.0)[0])\n"
        "    os._exit(9)"
    )
    root = Path(__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=root, check=False).returncode == 9
    assert list(tmp_path.rglob("*.jsonl")) == []
    assert read_all(tmp_path) == ([], [])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused_with_the_samples_number(tmp_path: Path, value: float) -> None:
    with (
        pytest.raises(UserError, match=r"sample 1 \(window\) holds NaN or an infinity"),
        RunWriter(tmp_path, make_run()) as writer,
    ):
        writer.sample(WINDOWS[0])
        writer.sample({**WINDOWS[1], "nll_nats": value})
    assert "failed" in only_skipped(tmp_path)


@pytest.mark.parametrize("value", [1e16, -1.0])
def test_a_number_out_of_bounds_is_the_users_error_and_names_measure_variant_and_key(
    tmp_path: Path, value: float
) -> None:
    with pytest.raises(UserError) as error, RunWriter(tmp_path, make_run()) as writer:
        writer.sample(WINDOWS[0])
        writer.sample({**WINDOWS[1], "nll_nats": value})
    assert str(error.value.problem) == (
        "ppl of variant 'source': sample 1 (window) holds a number out of bounds in 'nll_nats'."
    )
    assert "look at the model" in error.value.remedy
    assert "failed" in only_skipped(tmp_path)


def test_a_number_out_of_bounds_beside_a_bug_of_the_harness_is_a_bug(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nll_nats"), RunWriter(tmp_path, make_run()) as writer:
        writer.sample({**WINDOWS[0], "nll_nats": 1e16, "unknown": 1})


@pytest.mark.parametrize(
    "sample",
    [
        {"kind": "window", "index": 0},
        {"kind": "decode"},
        {},
        {**WINDOWS[0], "num_scored": 0},
        {**WINDOWS[0], "index": True},
        {**WINDOWS[0], "nll_nats": None},
    ],
)
def test_a_sample_that_is_none_of_the_schema_is_not_written(tmp_path: Path, sample: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="sample"), RunWriter(tmp_path, make_run()) as writer:
        writer.sample(sample)


REUSED = {"kind": "reused", "num_answers": 3, "num_reused": 0}


@pytest.mark.parametrize(
    ("sample", "keys"),
    [
        (
            answer(0, 1.0),
            "task repetition doc_id doc_sha256 prompt_sha256 target_sha256 "
            "outcomes num_prompt_tokens num_tokens seconds",
        ),
        (result(0.5, 0.1), "task repetition metric value standard_error num_items"),
        (REUSED, "num_answers num_reused"),
        ({"kind": "failure", "reason": "it died", "log": ["line"]}, "reason log"),
    ],
)
def test_a_sample_of_a_task_that_lacks_a_field_is_not_written(
    tmp_path: Path, sample: dict[str, Any], keys: str
) -> None:
    assert {name for name, key in SAMPLES["tasks"][sample["kind"]].items() if not key.optional} == set(keys.split())
    for key in keys.split():
        lacking = {name: value for name, value in sample.items() if name != key}
        with pytest.raises(ValueError, match=f"no good '{key}'"), RunWriter(tmp_path, make_run("tasks")) as writer:
            writer.sample(lacking)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("outcomes", {"acc,none": None}),
        ("outcomes", {"acc,none": True}),
        ("outcomes", {"acc,none": "1.0"}),
        ("outcomes", {"acc,none": []}),
        ("outcomes", {"acc,none": [1.0, None]}),
        ("outcomes", [1.0]),
        ("doc_id", "0"),
        ("doc_id", -1),
        ("repetition", 0.0),
        ("prompt_sha256", None),
        ("num_tokens", True),
        ("seconds", None),
    ],
)
def test_an_item_of_another_shape_is_refused_by_its_key(tmp_path: Path, key: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"no good '{key}'"), RunWriter(tmp_path, make_run("tasks")) as writer:
        writer.sample({**answer(0, 1.0), key: value})


def test_the_samples_of_a_task_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    pairs = choice(2, 0.0, outcomes={"word_perplexity,none": [-20.5, 10.0]})
    samples = [answer(0, 1.0), answer(1), pairs, result(0.5), result(0.5, 0.1), REUSED]
    assert list(read(store(tmp_path, samples, measure="tasks")).samples) == samples


@pytest.mark.parametrize(
    ("steps", "error", "words"),
    [
        ([], ValueError, "no good 'step_seconds'"),
        ([0.1, None], ValueError, "no good 'step_seconds'"),
        (0.1, ValueError, "no good 'step_seconds'"),
        ([0.1, 0.0], UserError, "out of bounds in 'step_seconds'"),
        ([0.1, -0.1], UserError, "out of bounds in 'step_seconds'"),
    ],
)
def test_a_clock_that_jumps_is_refused(tmp_path: Path, steps: object, error: type[Exception], words: str) -> None:
    sample = {**decodes(0.01)[0], "step_seconds": steps}
    with pytest.raises(error, match=words), RunWriter(tmp_path, make_run("bench")) as writer:
        writer.sample(sample)


@given(cut=st.integers(0))
def test_a_file_cut_at_any_byte_is_skipped_and_named(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    folder = tmp_path_factory.mktemp("results")
    path = store(folder)
    whole = path.read_bytes()
    path.write_bytes(whole[: cut % len(whole)])
    records, skipped = read_all(folder)
    assert records == [] and [one.path for one in skipped] == [path] and skipped[0].reason


def test_the_line_that_was_cut_is_named(tmp_path: Path) -> None:
    path = store(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    assert only_skipped(tmp_path) == "line 5 is cut"


def test_a_file_cut_at_the_end_of_any_line_is_skipped(tmp_path: Path) -> None:
    path = store(tmp_path)
    entries = lines(path)
    for kept in range(len(entries)):
        rewrite(path, entries[:kept])
        assert only_skipped(tmp_path)


def test_a_text_that_is_more_probable_than_certain_is_refused(tmp_path: Path) -> None:
    path = store(tmp_path, WINDOWS[:1])
    path.write_text(re.sub(r'"nll_nats":[^,}]+', '"nll_nats":-1000.0', path.read_text()))
    assert "no good 'nll_nats'" in only_skipped(tmp_path)


def test_half_a_character_is_refused(tmp_path: Path) -> None:
    path = store(tmp_path, measure="ppl", command=("harness", "abc"))
    path.write_text(path.read_text().replace("abc", "\\ud800"))
    assert "is not a JSON object" in only_skipped(tmp_path)


SAMPLE = st.fixed_dictionaries(
    {
        "kind": st.just("window"),
        "index": st.integers(0, 10**6),
        "first_token": st.integers(0, 10**9),
        "num_tokens": st.integers(1, 10**6),
        "num_scored": st.integers(1, 10**6),
        "nll_nats": st.floats(0, 1e15),
    },
    optional={"document": st.integers(0, 2**63 - 1)},
)


@given(st.lists(SAMPLE, min_size=1, max_size=5))
def test_any_samples_survive_the_store_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, samples: list[dict[str, Any]]
) -> None:
    assert list(read(store(tmp_path_factory.mktemp("results"), samples)).samples) == samples


@given(st.binary(max_size=200))
def test_any_bytes_are_skipped_and_never_a_crash(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.mktemp("results") / "machine"
    folder.mkdir()
    (folder / "x.jsonl").write_bytes(data)
    assert only_skipped(folder.parent)


@pytest.mark.parametrize(
    ("line", "change", "says"),
    [
        (0, {"schema": 2}, "its schema is 2"),
        (0, {"measure": "plan"}, "measure 'plan' is unknown"),
        (0, {"suite": {}}, "does not name its suite"),
        (0, {"machine": []}, "line 1 has no good 'machine'"),
        (0, {"surprise": 1}, "'surprise'"),
        (0, {"type": "sample"}, "line 1 is not the 'run' line"),
        (1, {"kind": "decode"}, "line 2: a sample of ppl cannot be of the kind 'decode'"),
        (2, {"nll_nats": "many"}, "line 3: a window sample has no good 'nll_nats'"),
        (2, {"type": "end"}, "line 3: it is no sample"),
        (-1, {"num_samples": 4}, "it has 3 samples, and its end line counts 4"),
        (-1, {"status": "failed"}, "status is 'failed'"),
        (-1, {"coverage": {}}, "line 5 has no good 'coverage.expected'"),
        (-1, {"type": "sample"}, "no end line"),
    ],
)
def test_a_malformed_file_is_skipped_with_its_reason(
    tmp_path: Path, line: int, change: dict[str, Any], says: str
) -> None:
    path = store(tmp_path)
    entries = lines(path)
    entries[line] |= change
    rewrite(path, entries)
    assert says in only_skipped(tmp_path)


def test_a_missing_header_key_is_named(tmp_path: Path) -> None:
    path = store(tmp_path)
    entries = lines(path)
    del entries[0]["git"]
    rewrite(path, entries)
    assert "'git'" in only_skipped(tmp_path)
    with pytest.raises(UserError, match="'git'"):
        read(path)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_a_number_that_is_not_finite_is_not_read(tmp_path: Path, number: str) -> None:
    path = store(tmp_path)
    text = path.read_text()
    value = json.dumps(WINDOWS[1]["nll_nats"])
    path.write_text(text.replace(f'"nll_nats":{value}', f'"nll_nats":{number}', 1))
    assert "finite" in only_skipped(tmp_path)


def test_a_complete_run_without_samples_is_not_used(tmp_path: Path) -> None:
    store(tmp_path, [])
    assert "no samples" in only_skipped(tmp_path)


def test_runs_of_one_session_on_the_same_tokens_are_comparable() -> None:
    for measure in SAMPLES:
        assert incomparable(make_record(measure, "source", []), make_record(measure, "a", [])) == []


@pytest.mark.parametrize(
    ("measure", "change", "key"),
    [
        ("ppl", {"measure_version": 2}, "measure_version"),
        ("ppl", {"dataset": {"token_ids_sha256": "f"}}, "dataset.token_ids_sha256"),
        ("ppl", {"engine": {**ENGINE, "dtype": "float32"}}, "engine.dtype"),
        ("bench", {"session_id": "ffffffff"}, "session_id"),
        ("bench", {"machine": {"name": "other"}}, "machine.name"),
        ("bench", {"engine": {**ENGINE, "effective": {"threads": 1}}}, "engine.effective.threads"),
    ],
)
def test_what_forbids_a_comparison_is_named(measure: str, change: dict[str, Any], key: str) -> None:
    record = make_record(measure, "source", [])
    assert key in COMPARABLE[measure]
    assert key in incomparable(record, replace(record, run=replace(record.run, **change)))


def test_perplexity_of_two_sessions_may_be_compared() -> None:
    record = make_record("ppl", "source", [])
    assert incomparable(record, replace(record, run=replace(record.run, session_id="ffffffff"))) == []


def test_different_measures_are_never_comparable() -> None:
    assert incomparable(make_record("ppl", "a", []), make_record("bench", "a", [])) == ["measure"]


def test_ids_are_eight_hex_digits_and_time_is_utc() -> None:
    assert int(new_id(), 16) >= 0 and len(new_id()) == 8
    assert utc_now().endswith("Z") and len(utc_now()) == 20


# -- Provenance --------------------------------------------------------------------------------------------------


def test_the_machine_is_named_by_a_slug_of_what_computes() -> None:
    machine = provenance.machine()
    assert set(machine) == {"name", "cpu", "cores", "memory_bytes", "gpu", "os", "python"}
    assert machine["name"] == machine["name"].lower() and " " not in machine["name"]
    assert machine["cores"] >= 1 and machine["memory_bytes"] > 10**8


@pytest.mark.parametrize(
    ("model", "slug"),
    [
        ("AMD EPYC", "amd-epyc"),
        ("AMD EPYC 7763 64-Core Processor", "amd-epyc-7763"),
        ("Intel(R) Xeon(R) CPU @ 2.20GHz", "intel-xeon"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "nvidia-rtx-pro-6000-blackwell-workstation-edition"),
    ],
)
def test_a_model_name_becomes_a_folder_name(model: str, slug: str) -> None:
    assert provenance._slug(model) == slug


def test_gpus_are_read_from_nvidia_smi() -> None:
    assert provenance._gpu("NVIDIA H200, 143771, 570.86\nNVIDIA H200, 143771, 570.86\n") == {
        "name": "NVIDIA H200",
        "count": 2,
        "memory_bytes": 143771 * 2**20,
        "driver": "570.86",
    }
    assert provenance._gpu("NVIDIA GB10, [N/A], 580.1\n") == {
        "name": "NVIDIA GB10",
        "count": 1,
        "memory_bytes": None,
        "driver": "580.1",
    }
    assert provenance._gpu(None) is None and provenance._gpu("") is None


def test_the_bandwidth_of_unknown_hardware_is_unknown() -> None:
    assert provenance.bandwidth_bytes_per_second("NVIDIA H200") == 4800 * 10**9
    assert provenance.bandwidth_bytes_per_second("NVIDIA H200 MIG 1g.18gb") is None


def test_packages_lists_the_installed_ones_and_the_harness() -> None:
    versions = provenance.packages(["pytest", "surely-not-installed"])
    assert versions == {"harness": harness.__version__, "pytest": pytest.__version__}


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run(["git", *identity, "-C", str(folder), *arguments], check=True, capture_output=True)


def test_git_knows_the_commit_of_a_tracked_folder_and_its_changes(tmp_path: Path) -> None:
    assert provenance.git(tmp_path) is None
    package = tmp_path / "package"
    package.mkdir()
    (package / "code.py").write_text("1")
    (tmp_path / "README.md").write_text("1")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    assert provenance.git(package) is None  # nothing committed yet
    git(tmp_path, "commit", "-m", "x")
    found = provenance.git(package)
    assert found is not None and len(found["commit"]) == 40 and found["dirty"] is False
    (tmp_path / "README.md").write_text("2")
    (package / "fresh.jsonl").write_text("")
    assert provenance.git(package) == found
    (package / "code.py").write_text("2")
    assert provenance.git(package) == {**found, "dirty": True}


def test_a_package_installed_inside_an_unrelated_checkout_has_no_commit(tmp_path: Path) -> None:
    git(tmp_path, "init")
    git(tmp_path, "commit", "--allow-empty", "-m", "x")
    installed = tmp_path / "venv" / "site-packages" / "harness"
    installed.mkdir(parents=True)
    (installed / "code.py").write_text("1")
    assert provenance.git(installed) is None


def test_peak_memory_is_at_least_what_this_test_holds() -> None:
    held = bytearray(50 * 10**6)
    peak = provenance.peak_rss_bytes()
    assert peak is not None and peak > len(held)


def test_provenance_does_not_import_torch() -> None:
    program = (
        "import sys; from harness.record import provenance; provenance.machine(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent.parent, check=True)


# -- Clocks ------------------------------------------------------------------------------------------------------


def retimed(path: Path, started: str, ended: str) -> None:
    """The file with other times in its header and at its end."""
    head, *samples, end = lines(path)
    rewrite(path, [{**head, "started_utc": started}, *samples, {**end, "ended_utc": ended}])


@pytest.mark.parametrize("measure", ["ppl", "bench"])
def test_a_run_that_ended_before_it_began_is_not_used(tmp_path: Path, measure: str) -> None:
    path = store(tmp_path, WINDOWS if measure == "ppl" else decodes(0.01), measure=measure)
    retimed(path, "2026-03-01T12:00:00Z", "2026-03-01T11:59:59Z")
    jump = "its clock jumped: it began at 2026-03-01T12:00:00Z and ended at 2026-03-01T11:59:59Z"
    assert only_skipped(tmp_path) == jump
    with pytest.raises(UserError, match="its clock jumped"):
        read(path)


@pytest.mark.parametrize(("seconds", "is_used"), [(7.0, True), (6.0, True), (3.0, False)])
def test_a_run_cannot_have_timed_more_than_it_lasted(tmp_path: Path, seconds: float, is_used: bool) -> None:
    samples = decodes(0.05, repetitions=2, num_steps=10)  # 5 s of warm-up, 1 s of steps, 0.1 s of prefill each
    timed = sum(sum(sample["step_seconds"]) + sample["prefill_seconds"] for sample in samples)
    assert timed == pytest.approx(6.3)
    path = store(tmp_path, samples, measure="bench")
    retimed(path, "2026-03-01T12:00:00Z", f"2026-03-01T12:00:0{seconds:.0f}Z")
    if is_used:  # a run that lasted 6.9 s may begin and end at seconds that are 6 s apart
        assert read(path).kind("decode") == samples
    else:
        assert only_skipped(tmp_path).startswith("its clock jumped: it timed 6.3 s within 3 s")


def test_answers_of_earlier_runs_bring_their_own_seconds(tmp_path: Path) -> None:
    path = store(tmp_path, [answer(0, 1.0, seconds=900.0)], measure="tasks")
    retimed(path, "2026-03-01T12:00:00Z", "2026-03-01T12:00:01Z")
    assert read(path).kind("item")[0]["seconds"] == 900.0


@pytest.mark.parametrize("ended", ["", "yesterday", "2026-13-01T12:00:00Z", "2026-03-01 12:00:00"])
def test_a_run_whose_times_are_none_is_not_used(tmp_path: Path, ended: str) -> None:
    retimed(store(tmp_path), "2026-03-01T12:00:00Z", ended)
    assert only_skipped(tmp_path) == f"its start '2026-03-01T12:00:00Z' or its end '{ended}' is no time"


def test_every_committed_run_can_still_be_read() -> None:
    records, skipped = read_all(Path(harness.__file__).parent.parent / "results")
    assert records and skipped == []


# -- Runs that are watched against older ones --------------------------------------------------------------------


def test_over_time_only_what_a_regression_comes_from_may_differ() -> None:
    one = make_record("ppl", "source", WINDOWS)
    moved = {"session_id": "f" * 8, "machine": {"name": "other"}}
    engine = {**ENGINE, "version": "newer", "device": "cuda:0", "effective": {"cpu_capability": "AVX2"}}
    other = make_record("ppl", "source", WINDOWS, engine=engine, **moved)
    assert incomparable(one, other) == ["engine.version", "engine.device", "engine.effective.cpu_capability"]
    assert incomparable(one, other, over_time=True) == []
    for change in ({"engine": {**engine, "dtype": "float32"}}, {"measure_version": 9}):
        assert len(incomparable(one, make_record("ppl", "source", WINDOWS, **{**moved, **change}), over_time=True)) == 1


@pytest.mark.parametrize("measure", COMPARABLE)
def test_every_watched_key_is_of_the_session_the_machine_or_the_engine(measure: str) -> None:
    kept = [key for key in COMPARABLE[measure] if not key.startswith(WATCHED)]
    assert "measure_version" in kept
    assert not [key for key in kept if key.startswith(("machine", "session", "engine.effective", "engine.version"))]
    assert {key for key in COMPARABLE[measure] if key in ("engine.name", "engine.dtype")} <= set(kept)
