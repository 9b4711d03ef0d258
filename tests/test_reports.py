"""Reports of folders as they really are: damaged files, other schemas, names that break markup, a thousand runs, and no
torch."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from harness.cli import main
from harness.report.trace import trace
from harness.suite.load import load
from tests.records import DATASET, demo_records, make_record, stored, windows

pytestmark = pytest.mark.usefixtures("drawn_once")

NEWEST = "2026-03-01T12:04:00Z"  # of all runs; a hand-made one ends a minute later
ROOT = Path(__file__).parent.parent
SUITE = """
name = "demo"
title = "A | *model* <b>of</b> `code` & 模型 [x](y)"
[source]
location = "example/dense"
[variants.nvfp4a16]
recipe = "rtn-a16"
[ppl]
protocols = ["wikitext2-512"]
text = { demo = "heldout" }
[[gate]]
metric = "log_ppl"
variant = "nvfp4a16"
margin = 0.05
"""
WITHOUT_TORCH = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "compressed_tensors", "safetensors", "vllm", "lm_eval"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
from harness.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo.toml").write_text(SUITE, encoding="utf-8")
    suite = load(tmp_path / "demo.toml")
    records = [
        dataclasses.replace(one, run=dataclasses.replace(one.run, suite=suite.resolved())) for one in demo_records()
    ]
    stored(tmp_path / "results", records)
    return tmp_path


def report() -> int:
    return main(["report", "--suite", "demo.toml"])


def text(project: Path) -> str:
    return (project / "reports/demo/README.md").read_text(encoding="utf-8")


def test_damaged_files_and_other_schemas_are_named_and_not_used(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report() == 0
    expected = text(project)
    folder = project / "results/test-cpu-2c"
    whole = next(folder.glob("*-ppl-demo-nvfp4a16-*.jsonl")).read_text()
    head, *rest = whole.splitlines()
    newer = {**json.loads(head), "schema": 2, "started_utc": "2027-01-01T00:00:00Z", "run_id": "ffffffff"}
    (folder / "schema.jsonl").write_text("\n".join((json.dumps(newer), *rest)) + "\n")
    (folder / "cut.jsonl").write_text(whole[:-30])
    (folder / "noise.jsonl").write_bytes(b"\xff\x00\xfe")
    (folder / "nan.jsonl").write_text(whole.replace('"nll_nats": ', '"nll_nats": NaN, "x": ', 1))
    capsys.readouterr()
    assert report() == 0
    told = capsys.readouterr().err
    for name, reason in (
        ("schema", "its schema is 2"),
        ("cut", "is cut"),
        ("noise", "cannot be read"),
        ("nan", "is not a JSON object of finite numbers"),
    ):
        assert any(f"{name}.jsonl is not used" in line and reason in line for line in told.splitlines()), name
    assert text(project) == expected


def test_without_the_source_every_comparison_says_so(project: Path) -> None:
    for path in (project / "results").rglob("*-source-*.jsonl"):
        path.unlink()
    assert report() == 0
    card = text(project)
    assert "no record of the source" in card
    assert "No record yet of `source`" in card
    assert trace(project / "reports/demo/README.md").findings == ()


def test_names_that_break_markup_are_literal(project: Path) -> None:
    odd = "a|b `c` <script>alert(1)</script> *d* _e_ [f](g) 模型 &amp; \u202e"
    dataset = {**DATASET, "name": odd}
    made = make_record("ppl", "source", windows(8.0), dataset=dataset, started_utc="2026-03-01T12:01:00Z")
    suite = load(project / "demo.toml")
    stored(project / "results", [dataclasses.replace(made, run=dataclasses.replace(made.run, suite=suite.resolved()))])
    assert report() == 0
    card = text(project)
    row = next(line for line in card.split("\n") if line.startswith("| source") and "模型" in line)
    other = next(line for line in card.split("\n") if line.startswith("| nvfp4a16") and "demo:heldout" in line)
    assert row.replace("\\|", "").count("|") == other.count("|")
    assert "<script>" not in card.replace("\\<script\\>", "")
    page = (project / "reports/demo/index.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "<script>alert" not in page
    assert trace(project / "reports/demo/README.md").findings == ()


def test_of_a_thousand_runs_the_newest_speaks(project: Path) -> None:
    suite = load(project / "demo.toml")
    few = windows(8.5, num_tokens=2000)
    made = [
        make_record(
            "ppl",
            variant,
            windows(8.0 + 0.001 * number, num_tokens=2000) if number < 499 else few,
            run_id=f"{number:04x}{variant.encode().hex()[:4]}",
            started_utc=f"2026-02-{1 + number // 24:02}T{number % 24:02}:00:00Z" if number < 499 else NEWEST,
            suite=suite.resolved(),
        )
        for number in range(500)
        for variant in ("source", "nvfp4a16")
    ]
    stored(project / "results", made)
    assert len(list((project / "results").rglob("*.jsonl"))) > 1000
    assert report() == 0
    card = text(project)
    assert "8.5000" in card and "[01f3" in card
    assert set(re.findall(r"\d{8}T\d{6}Z-ppl-\S+?\.jsonl", card)) == {
        path.name for path in (project / "results").rglob("20260301T120400Z-ppl-*.jsonl")
    }


@pytest.mark.parametrize(
    "command",
    [
        ("report", "--suite", "demo.toml"),
        ("trace", "reports/demo/README.md"),
        ("export", "--suite", "demo.toml", "--out", "exports"),
        ("gate", "--suite", "demo.toml"),
    ],
    ids=lambda command: command[0],
)
def test_no_torch_is_needed(project: Path, command: tuple[str, ...]) -> None:
    assert report() == 0
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *command],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        check=False,
    )
    assert done.returncode == 0, done.stderr  # the gate's too: 8.1939 against 8.0481 is a loss of 0.018 nats
    assert "Traceback" not in done.stderr and "torch" not in done.stderr
