"""The side-by-side benchmark: its clock, its fairness, what it does with a tool that fails, and its arithmetic.

llm-compressor itself is not needed here; where it would run, an interpreter without it stands for a tool that fails.
"""

import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.utils import match_name
from safetensors.torch import load_file, save_file

from harness.cli import main as main_harness
from harness.demo import checkpoint_path
from harness.errors import UserError
from harness.measure import perplexity
from harness.quantize.recipes import recipe_named
from harness.record.run import Record
from studies.peers import contest, page, quality, quantizers, speed, tables
from studies.peers.__main__ import main
from studies.peers.agreement import agreement_of
from studies.peers.contest import COPY, QUALITY, Contestant, Ours, QualityGroup, Race, Theirs
from studies.peers.session import Session, failure_reason
from studies.peers.stopwatch import timed
from tests.conftest import census, hear_interruptions, tiny_config

from .records import make_record

FAILING = Theirs("model_free_ptq", "NVFP4A16", "rtn-a16")


@pytest.fixture
def session(tmp_path: Path) -> Session:
    """A session whose other environment has no llm-compressor."""
    return Session(
        their_python=Path(sys.executable),
        their_packages={"llmcompressor": "none"},
        artifacts=tmp_path / "artifacts",
        results=tmp_path / "results",
        repetitions=2,
        limit=1,
        progress=lambda *_: None,
        command=("python", "-m", "studies.peers"),
        session_id="5e551011",
    )


# -- The stopwatch -----------------------------------------------------------------------------------------------


def test_a_process_is_timed_from_its_start_to_its_end(tmp_path: Path) -> None:
    before = time.perf_counter()
    run = timed([sys.executable, "-S", "-c", "import time; time.sleep(0.5)"], tmp_path / "log")
    assert 0.5 <= run.wall_seconds <= time.perf_counter() - before
    assert run.exit_code == 0


def test_peak_memory_is_the_childs_and_not_its_large_parents(tmp_path: Path) -> None:
    weight = bytearray(160 << 20)
    weight[::4096] = b"x" * len(weight[::4096])  # this process holds it
    small = timed([sys.executable, "-S", "-c", "pass"], tmp_path / "small")
    large = timed([sys.executable, "-S", "-c", "x = b'x' * (100 << 20)"], tmp_path / "large")
    assert small.peak_rss_bytes < 48 << 20
    assert 100 << 20 <= large.peak_rss_bytes < 148 << 20


def test_what_a_process_says_is_kept_apart_and_progress_bars_are_cut_into_lines(tmp_path: Path) -> None:
    code = r"import sys; print('{}'); sys.stderr.write(' 10%\r 20%\rboom\n'); sys.exit(3)"
    run = timed([sys.executable, "-S", "-c", code], tmp_path / "log", env={"A": "b"})
    assert (run.exit_code, run.stdout, run.complaint) == (3, "{}\n", " 10%\n 20%\nboom")


def test_a_process_that_is_killed_says_so(tmp_path: Path) -> None:
    run = timed([sys.executable, "-S", "-c", "import os; os.kill(os.getpid(), 9)"], tmp_path / "log")
    assert run.exit_code == -9
    assert failure_reason(run.exit_code, run.complaint) == "killed by signal 9: no message"


def is_running(pid: int) -> bool:
    try:
        return "(zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_an_interruption_ends_what_is_being_timed(tmp_path: Path) -> None:
    sleeper = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(600)"
    code = f"from studies.peers.stopwatch import timed; from pathlib import Path; import sys; \
timed([sys.executable, '-S', '-c', {sleeper!r}], Path('log'))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.DEVNULL, preexec_fn=hear_interruptions
    )
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)
    child = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 20
    while is_running(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_reason_of_a_failure_is_the_exception_at_its_end() -> None:
    complaint = 'Traceback (most recent call last):\n  File "x", line 1\nValueError: expected 2D\n    ^^^^'
    assert failure_reason(1, complaint) == "exit code 1: ValueError: expected 2D"


# -- Fairness ----------------------------------------------------------------------------------------------------

THEIRS = {one.name: one for group in QUALITY for one in group.others if isinstance(one, Theirs)}


@pytest.mark.parametrize("model", ["qwen3.5-9b", "qwen3.6-35b-a3b"])
@pytest.mark.parametrize("name", THEIRS)
def test_both_sides_keep_the_same_modules(name: str, model: str) -> None:
    config, tensors = census(tiny_config(model), with_mtp=True)
    formats = recipe_named(THEIRS[name].recipe).formats(config.family)
    ignore = THEIRS[name].job()["ignore"]
    quantized = {tensor.name for tensor in tensors if tensor.role is not None and tensor.role.name in formats}
    matrices = {tensor.name for tensor in tensors if len(tensor.shape) >= 2}
    reached = {one for one in matrices if not any(match_name(one.removesuffix(".weight"), p) for p in ignore)}
    assert quantized
    assert reached == quantized


@pytest.mark.parametrize(
    ("ours", "needs_data"),
    [
        (Ours("rtn-a16"), False),
        (Ours("a16", "search", "rtn"), False),
        (Ours("a16", "weighted-search", "rtn"), True),
        (Ours("a16", "absmax", "gptq"), True),
        (Ours("w4a4", "absmax", "rtn"), True),
    ],
)
def test_data_is_given_to_what_needs_data(ours: Ours, needs_data: bool) -> None:
    assert ours.needs_data is needs_data


def test_no_two_contestants_of_a_model_share_a_folder() -> None:
    named: dict[str, Contestant] = {}
    for group in QUALITY:
        for one in group.contestants:
            assert re.fullmatch(r"[a-z0-9-]+", one.name)
            assert named.setdefault(one.name, one) == one


def test_every_race_is_between_contestants_of_its_part() -> None:
    for contestants, races in (
        (contest.SPEED_A16, contest.RACES_A16),
        (contest.SPEED_W4A4, contest.RACES_W4A4),
        (contest.SPEED_TASKS, contest.RACES_TASKS),
        (contest.SPEED_TASKS_VLLM, contest.RACES_TASKS_VLLM),
    ):
        names = {one.name for one in contestants} | {COPY}
        assert {race.winner for race in races} | {race.loser for race in races} <= names


def test_both_sides_are_given_the_same_calibration_tokens(tmp_path: Path) -> None:
    source = checkpoint_path("dense")
    data = quantizers.write_calibration(source, tmp_path, 32, lambda *_: None)
    samples = json.loads(data.token_ids.read_text())
    assert [len(sample) for sample in samples] == [contest.CALIBRATION_TOKENS] * 32
    # Every sample is a piece of the text that our side is told to read.
    ids = perplexity.tokenize(source, (tmp_path / "calibration.txt").read_text())
    windows = {tuple(ids[first : first + 512]) for first in range(0, len(ids), 512)}
    assert {tuple(sample) for sample in samples} <= windows
    assert 'path = "calibration.txt"' in data.toml.read_text()


def test_the_measured_text_is_not_the_calibrations(tmp_path: Path) -> None:
    source = checkpoint_path("dense")
    data = quantizers.write_calibration(source, tmp_path, 32, lambda *_: None)
    seen = {tuple(sample[i : i + 64]) for sample in json.loads(data.token_ids.read_text()) for i in range(449)}
    windows = quality.heldout_windows(source, None)
    assert [(text, len(cut)) for text, cut in windows.items()] == [("near", 60), ("far", 60)]
    assert not seen & {tuple(cut[i : i + 64]) for one in windows.values() for cut in one for i in range(449)}


# -- Sessions ----------------------------------------------------------------------------------------------------


def test_a_missing_environment_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["speed-a16", "--peers-python", str(tmp_path / "python"), "--results", str(tmp_path)]) == 2
    assert "There is no environment of llm-compressor at" in capsys.readouterr().err


def test_an_environment_without_llm_compressor_is_named() -> None:
    with pytest.raises(UserError, match=r"has no llm-compressor \(importlib.metadata.PackageNotFoundError: .*llmcomp"):
        quantizers.their_packages(Path(sys.executable))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [(["qualty"], "Did you mean 'quality'"), (["quality", "--only", "w8"], "No group is called 'w8'")],
)
def test_a_misspelt_argument_is_named(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert complaint in capsys.readouterr().err


def test_a_failing_tool_is_recorded_and_the_others_go_on(session: Session, dense_source: Path, tmp_path: Path) -> None:
    ours = Ours("rtn-a16")
    data = quantizers.Data(tmp_path, tmp_path, "")
    records = speed.quantizer_race(
        session, "speed-test", {}, (ours, FAILING), dense_source, tmp_path, data, with_copy=True
    )
    named = tables.by_name(records)
    assert list(named) == [ours.name, FAILING.name, COPY]
    takes = named[ours.name].kind("repetition")
    assert [take["repetition"] for take in takes] == [0, 1]
    size = sum(file.stat().st_size for file in (tmp_path / ours.name).iterdir())
    assert {take["output_bytes"] for take in takes} == {size}
    assert [take["output_bytes"] for take in named[COPY].kind("repetition")] == [size, size]
    assert named[ours.name].kind("verdict")[0]["passed"] is True
    assert "No module named 'llmcompressor'" in named[FAILING.name].kind("failure")[0]["reason"]
    times, _ = tables.speed_tables("test", records, ())
    assert [row[-1] for row in times.rows] == ["passed", "failed", tables.NONE]


def test_quality_is_measured_once_built_and_reused_the_next_time(session: Session) -> None:
    group = QualityGroup("A16", Ours("rtn-a16"), (FAILING,))
    source = checkpoint_path("dense")
    steps: list[str] = []

    def noting(done: int, total: int, what: str, note: str = "", /) -> None:
        steps.append(what)

    first = quality.measure_quality(dataclasses.replace(session, progress=noting), source, [group])
    assert [one.run.variant["name"] for one in first] == [group.baseline.name, FAILING.name]
    windows = first[0].kind("window")
    assert [(one["text"], one["num_scored"]) for one in windows] == [("near", 511), ("far", 511)]
    assert all(0 < one["kl_nats"] / one["num_scored"] < 0.2 for one in windows)
    assert first[1].kind("failure") and not first[1].kind("window")
    assert not any("reused" in step for step in steps)
    again = quality.measure_quality(dataclasses.replace(session, progress=noting), source, [group])
    assert any(step.endswith("rtn-a16: reused") for step in steps)
    assert again[0].samples == first[0].samples
    assert [row[1] for row in tables.quality_table("test", first, group).rows] == ["passed", "failed"]


def test_agreement_counts_every_byte_and_scale_that_differs(dense_source: Path, tmp_path: Path) -> None:
    ours = tmp_path / "ours"
    assert main_harness(["build", str(dense_source), "--recipe", "rtn-a16", "--out", str(ours)]) == 0
    theirs = Path(shutil.copytree(ours, tmp_path / "theirs"))
    same = agreement_of(dense_source, ours, theirs)
    assert same["num_bytes_equal"] == same["num_bytes"] > 0
    assert same["num_scales_equal"] == same["num_scales"] == same["num_bytes"] // 8
    assert same["weight_global_scale_low"] == same["weight_global_scale_high"] == 1.0
    assert same["input_global_scale_low"] is None
    shard = min(path for path in theirs.glob("*.safetensors") if any("down_proj" in name for name in load_file(path)))
    tensors = load_file(shard)
    module = next(name for name in tensors if name.endswith("down_proj.weight_packed")).removesuffix(".weight_packed")
    tensors[f"{module}.weight_packed"][0, 0] ^= 0x11
    scales = tensors[f"{module}.weight_scale"].view(torch.uint8)
    row = scales[1, 0].item()
    scales[1, 0] = row - 1 if row > 1 else row + 1
    save_file(tensors, shard, metadata={"format": "pt"})
    other = agreement_of(dense_source, ours, theirs)
    assert other["num_scales"] - other["num_scales_equal"] == 1
    # One byte was changed; those of the block whose scale was changed may now be others.
    assert 1 <= other["num_bytes"] - other["num_bytes_equal"] <= 9


def test_the_committed_page_follows_from_the_committed_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    assert main(["report", "--check"]) == 0


def test_a_missing_page_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report"]) == 2
    assert "reports/peers/README.md cannot be read (No such file or directory)" in capsys.readouterr().err


def test_a_page_is_written_from_the_newest_records_of_each_part(tmp_path: Path) -> None:
    old, new = taken("rtn-a16", 4.0, 2.0, 10**8), taken("rtn-a16", 6.0, 3.0, 10**8)
    text = b"before\n<!-- harness:begin speed-a16 suite=peers -->\nstale\n<!-- harness:end speed-a16 -->\nafter"
    about = {"name": "speed-a16", "layers": 4, "source": "9b"}
    records = [
        dataclasses.replace(one, run=dataclasses.replace(one.run, suite=about, session_id=session))
        for one, session in ((old, "0"), (new, "1"))
    ]
    filled = page.peers_page(records, "results", "reports/peers/README.md", text).decode()
    assert filled.startswith("before\n") and filled.endswith("after") and "stale" not in filled
    assert "6.01" in filled and "4.01" not in filled
    assert "](../../results/" in filled
    assert page.peers_page(records, "results", "reports/peers/README.md", filled.encode()).decode() == filled


# -- Arithmetic of the tables ------------------------------------------------------------------------------------


def taken(name: str, wall: float, call: float, rss: int, num: int = 6) -> Record:
    """A record of repetitions that differ by a thousandth."""
    samples: list[dict[str, Any]] = [
        {
            "kind": "repetition",
            "repetition": turn,
            "wall_seconds": wall * (1 + turn / 1000),
            "call_seconds": call * (1 + turn / 1000),
            "peak_rss_bytes": rss,
            "output_bytes": 10**6,
        }
        for turn in range(num)
    ]
    return make_record("peers", name, samples)


def diverging(name: str, near: list[float], far: list[float]) -> Record:
    samples = [
        {
            "kind": "window",
            "text": text,
            "index": index,
            "num_tokens": 101,
            "num_scored": 100,
            "kl_nats": nats,
            "num_agreed": 90,
        }
        for text, totals in (("near", near), ("far", far))
        for index, nats in enumerate(totals)
    ]
    verdict = {"kind": "verdict", "passed": True, "num_errors": 0, "num_warnings": 0}
    return make_record("peers", name, [verdict, *samples])


def test_a_race_is_a_ratio_and_says_whether_it_is_won() -> None:
    records = [taken("fast", 2.0, 1.0, 10**8), taken("slow", 24.0, 9.0, 5 * 10**8)]
    _, standings = tables.speed_tables("test", records, [Race("fast", "slow", 10, memory_share=1 / 4)])
    by_what = {row[1]: row[2:] for row in standings.rows}
    assert by_what["whole process"][0].startswith("12.00 [") and by_what["whole process"][2] == "yes"
    assert by_what["call alone"][0].startswith("9.00 [") and by_what["call alone"][2] == "no"
    assert by_what["peak RSS"] == ("0.200 [0.200, 0.200]", "≤ 0.25", "yes")


def test_a_race_that_its_interval_does_not_decide_is_unsure() -> None:
    records = [taken("fast", 1.0, 1.0, 10**8), taken("slow", 10.0, 10.0, 10**8)]
    _, standings = tables.speed_tables("test", records, [Race("fast", "slow", 10)])
    assert [row[-1] for row in standings.rows] == ["unsure", "unsure"]


def test_a_copy_races_the_call_alone() -> None:
    records = [taken("fast", 4.0, 2.0, 10**8), taken(COPY, 1.0, 1.0, 10**8)]
    _, standings = tables.speed_tables("test", records, [Race("fast", COPY, 1 / 4)])
    assert [row[1] for row in standings.rows] == ["call alone"]
    assert standings.rows[0][2].startswith("0.50 [") and standings.rows[0][-1] == "yes"


def test_a_share_is_of_the_baseline_and_of_the_best_peer() -> None:
    near, far = [1.0, 2.0, 3.0, 4.0] * 5, [2.0, 4.0, 6.0, 8.0] * 5
    peers = (Theirs("GPTQModifier", "NVFP4", "w4a4"), Theirs("QuantizationModifier", "NVFP4", "w4a4"))
    ours = Ours("w4a4", "search", "gptq")
    group = QualityGroup("W4A4", Ours("w4a4"), (ours, *peers), targets=(0.7, 0.3))
    records = [
        diverging("w4a4", near, far),
        diverging(ours.name, [0.5 * one for one in near], [0.5 * one for one in far]),
        diverging(peers[0].name, [0.8 * one for one in near], [2 * one for one in far]),
        diverging(peers[1].name, near, far),
    ]
    table = tables.quality_table("test", records, group)
    column = {head: index for index, head in enumerate(table.headers)}
    rows = {row[0]: row for row in table.rows}
    # 50 nats over 2,000 predictions. Divergences in proportion leave a share no spread to draw an interval from.
    assert rows["w4a4"][column["KLD near, nats/token"]].startswith("0.02500 [")
    assert rows["w4a4"][column["KLD far, nats/token"]].startswith("0.05000 [")
    first_share, far_share = (i for i, head in enumerate(table.headers) if head == "/ RTN")
    assert rows[ours.name][first_share] == "0.500 yes"
    assert rows[ours.name][far_share] == "0.500 no"
    first_peer, far_peer = (i for i, head in enumerate(table.headers) if head == "/ best peer")
    assert rows[ours.name][first_peer] == "0.625"
    assert rows[ours.name][far_peer] == "0.500"
    assert rows[peers[0].name][far_share] == "2.000"


def test_remarks_count_each_warning_once_and_name_what_failed() -> None:
    warned = make_record("peers", "a", [{"kind": "warning", "text": "no subgraph\nmore"}] * 3)
    broken = make_record("peers", "b", [{"kind": "failure", "reason": "exit code 1: boom"}])
    found = {"kind": "verdict", "passed": False, "num_errors": 7, "num_warnings": 0, "first_error": "x missing"}
    assert tables.remarks([warned, broken, make_record("peers", "c", [found])]) == [
        "b failed: exit code 1: boom",
        "c: verify finds 7 errors, first: x missing",
        "llm-compressor warned in 1 of 3 runs: no subgraph",
    ]
