"""What subcommands share: progress without a terminal, and commands in sentences that name the user's suite."""

import io
import re
import time
from pathlib import Path

import pytest

from harness import demo
from harness.cli import main
from harness.commands.shared import naming_suite, plain_lines, progress_line


def test_a_line_says_what_is_done_of_all_how_fast_and_how_long_it_takes() -> None:
    line = progress_line("w4a4: calibrate", first=100, done=400, total=1000, note="", seconds=60.0)
    assert re.fullmatch(r"\d\d:\d\d:\d\d  w4a4: calibrate: 400 of 1,000 \(40%\), 5 a second, 2 min left", line)


@pytest.mark.parametrize(("rate", "left"), [(10.0, "10 s"), (0.05, "33 min"), (0.01, "2 h 47 min")])
def test_the_time_that_is_left_has_the_unit_that_fits(rate: float, left: str) -> None:
    line = progress_line("x", first=0, done=100, total=200, note="noted", seconds=100 / rate)
    assert line.endswith(f"{left} left, noted")


def test_work_that_has_not_advanced_has_no_rate() -> None:
    assert progress_line("x", first=3, done=3, total=9, note="", seconds=600.0).endswith("x: 3 of 9 (33%)")


def test_lines_come_while_nothing_advances_and_end_with_the_work() -> None:
    stream = io.StringIO()
    with plain_lines(stream, seconds=0.02) as progress:
        progress(1, 10, "load")
        time.sleep(0.15)
    lines = stream.getvalue().splitlines()
    assert len(lines) >= 2 and all("load: 1 of 10" in line for line in lines)
    time.sleep(0.05)
    assert stream.getvalue().splitlines() == lines


def test_short_work_is_silent() -> None:
    stream = io.StringIO()
    with plain_lines(stream) as progress:
        progress(10, 10, "load")
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ("Run `harness ppl`.", "Run `harness ppl --suite my.toml`."),
        ("Run `nox -s ppl bench`.", "Run `nox -s ppl bench -- --suite my.toml`."),
        ("Run `nox -s vllm -- ppl`.", "Run `nox -s vllm -- ppl --suite my.toml`."),
        ("Run `harness ppl --suite other.toml`.", "Run `harness ppl --suite other.toml`."),
        ("Run `harness plan`, then `harness gate`.", "Run `harness plan`, then `harness gate --suite my.toml`."),
        ("Run `nvidia-smi`.", "Run `nvidia-smi`."),
    ],
)
def test_commands_in_a_remedy_are_about_the_suite_that_the_user_named(said: str, named: str) -> None:
    assert naming_suite(said, "my.toml") == named
    assert naming_suite(said, None) == said


@pytest.mark.parametrize(
    "command",
    [
        ["publish", "--variant", "w4a4", "--repo", "me/my-9b", "--dry-run"],
        ["import", "bench.json", "--variant", "w4a4", "--machine", "box"],
        ["serve-command", "--variant", "w4a4", "--gpu-memory", "32"],
        ["gate", "--update-baseline", "--reason", "first"],
    ],
)
def test_what_could_harm_another_model_demands_its_suite(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code: object = main(command)
    except SystemExit as ended:  # argparse itself refuses
        code = ended.code
    assert code == 2
    assert "--suite" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_names_the_suite_in_its_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["publish", "--suite", str(demo.SUITE), "--variant", "w4a4", "--repo", "me/x", "--dry-run"]
    assert main([*asked, "--artifacts", str(tmp_path), "--results", str(tmp_path)]) == 2
    assert f"`nox -s build -- --suite {demo.SUITE}`" in capsys.readouterr().err
