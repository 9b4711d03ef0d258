"""Cards that are traced: every number leads to a record and comes out of it again, and what does not is named."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.cli import main
from harness.errors import UserError
from harness.record.run import Record
from harness.record.store import read_all
from harness.report import card
from harness.report.trace import trace
from harness.suite.load import load
from harness.suite.schema import Suite
from tests.records import demo_records, fidelity_record, fidelity_windows, stored

ROOT = Path(__file__).parent.parent
SUITE = """
name = "demo"
title = "NVFP4 of a model"
description = "A small trained model of 8 layers."
[source]
location = "example/dense"
license = "apache-2.0"
[variants.nvfp4a16]
recipe = "rtn-a16"
[variants.w4a4]
recipe = "w4a4"
[ppl]
protocols = ["wikitext2-512"]
text = { demo = "heldout" }
[fidelity]
text = { demo = "heldout" }
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with records, and the card that was written from them."""
    root = tmp_path_factory.mktemp("project")
    (root / "demo.toml").write_text(SUITE)
    suite = load(root / "demo.toml")
    records = stored(root / "results", of(suite, demo_records()))
    card.write_files(card.generated_files(suite, records, results_dir="results", pages={}), root)
    return root


def of(suite: Suite, records: list[Record]) -> list[Record]:
    """The records as runs of a suite, with a fidelity among them."""
    measured = [*records, fidelity_record("nvfp4a16", fidelity_windows([0.01, 0.012, 0.011]))]
    return [dataclasses.replace(one, run=dataclasses.replace(one.run, suite=suite.resolved())) for one in measured]


@pytest.fixture
def page(folder: Path, tmp_path: Path) -> Path:
    """The card in a project of its own, to be damaged."""
    shutil.copytree(folder, tmp_path / "project")
    return tmp_path / "project" / "reports/demo/README.md"


def changed(page: Path, old: str, new: str) -> tuple[str, ...]:
    """What is found once a text in the card is another one."""
    text = page.read_text()
    assert old in text
    page.write_text(text.replace(old, new, 1))
    return trace(page).findings


def line_of(page: Path, words: str) -> int:
    return next(number for number, line in enumerate(page.read_text().split("\n"), 1) if words in line)


def row_of(page: Path, words: str) -> str:
    return page.read_text().split("\n")[line_of(page, words) - 1]


def test_every_number_of_a_rendered_card_comes_out_of_its_records(page: Path) -> None:
    found = trace(page)
    assert found.findings == ()
    links = set(re.findall(r"\]\((\S+\.jsonl)\)", page.read_text()))
    assert found.num_records == len(links) > 5
    assert found.num_lines > 10


def test_a_claim_on_a_card_comes_out_of_its_records_too(tmp_path: Path) -> None:
    claim = '[[claim]]\nkind = "within"\nvariant = "nvfp4a16"\nmargin = 0.5\n'
    (tmp_path / "demo.toml").write_text(SUITE + claim)
    suite = load(tmp_path / "demo.toml")
    records = stored(tmp_path / "results", of(suite, demo_records()))
    card.write_files(card.generated_files(suite, records, results_dir="results", pages={}), tmp_path)
    page = tmp_path / "reports/demo/README.md"
    assert "has at most 50 % more perplexity than the source" in page.read_text()
    assert trace(page).findings == ()
    (finding,) = changed(page, "at most 50 % more", "at most 40 % more")
    assert "is not what its records say" in finding


@pytest.mark.parametrize("suite", ["demo", "demo-moe"])
def test_the_committed_cards_are_traced(suite: str) -> None:
    found = trace(ROOT / "reports" / suite / "README.md", load(ROOT / "suites" / f"{suite}.toml"))
    assert found.findings == () and found.num_lines > 50


def test_a_changed_number_is_named_by_its_line(page: Path) -> None:
    line = line_of(page, "| nvfp4a16  | ")
    row = row_of(page, "| nvfp4a16  | ")
    number = re.search(r"\d+\.\d+", row)
    assert number is not None
    (finding,) = changed(page, row, row.replace(number[0], "99.99", 1))
    assert finding.startswith(f"Line {line} is not what its records say:")


def test_a_changed_headline_is_found(page: Path) -> None:
    (finding,) = changed(page, "6.50 MB of 18.00 MB", "5.50 MB of 18.00 MB")
    assert "is not what its records say" in finding and "5.50 MB" in finding


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_digit_of_a_row_can_be_changed_unseen(folder: Path, data: st.DataObject) -> None:
    source = folder / "reports/demo/README.md"
    lines = source.read_text().split("\n")
    rows = [place for place, line in enumerate(lines) if line.startswith("| nvfp4a16") and ".jsonl" in line]
    place = data.draw(st.sampled_from(rows))
    end = lines[place].index("](")
    digits = [at for at, letter in enumerate(lines[place][:end]) if letter.isdigit()]
    at = data.draw(st.sampled_from(digits))
    other = data.draw(st.sampled_from([one for one in "0123456789" if one != lines[place][at]]))
    lines[place] = lines[place][:at] + other + lines[place][at + 1 :]
    card_file = source.with_name("changed.md")
    card_file.write_text("\n".join(lines))
    assert any(f"Line {place + 1}" in finding for finding in trace(card_file).findings)


def test_a_missing_record_is_named(page: Path) -> None:
    missing = next(page.parent.parent.parent.glob("results/*/*-verify-*.jsonl"))
    missing.unlink()
    findings = trace(page).findings
    assert any(missing.name in finding and "cannot be read" in finding for finding in findings)


def test_a_record_that_was_cut_is_named(page: Path) -> None:
    record = next(page.parent.parent.parent.glob("results/*/*-verify-*.jsonl"))
    record.write_bytes(record.read_bytes()[:-20])
    assert any(record.name in finding and "is cut" in finding for finding in trace(page).findings)


def test_a_run_with_a_limit_is_no_evidence(page: Path) -> None:
    record = next(page.parent.parent.parent.glob("results/*/*-ppl-*.jsonl"))
    *lines, end = record.read_text().splitlines()
    document = json.loads(end)
    document["coverage"]["expected"] += 1
    record.write_text("\n".join((*lines, json.dumps(document))) + "\n")
    assert any(record.name in finding and "not a whole run" in finding for finding in trace(page).findings)


def test_a_reference_that_leads_to_another_run_is_named(page: Path) -> None:
    row = row_of(page, "| nvfp4a16  | ")
    run_id = re.search(r"\[([0-9a-f]{8})\]", row)
    assert run_id is not None
    findings = changed(page, row, row.replace(run_id[0], "[00000000]"))
    assert any(f"[00000000] leads to run {run_id[1]}" in finding for finding in findings)


def test_a_row_without_its_reference_is_named(page: Path) -> None:
    row = row_of(page, "| nvfp4a16  | ")
    bare = re.sub(r"\[[0-9a-f]{8}\]\(\S+\)", "", row)
    assert any("is not what its records say" in finding for finding in changed(page, row, bare))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tokens 297,053", "tokens 997,053"),  # a caption
        ("[95 %]", "[99 %]"),  # a heading of a column
        ("## Perplexity", "## Perplexity of another model"),
        ("harness ppl --suite", "harness ppl --limit 3 --suite"),  # code
        ('license: "apache-2.0"', 'license: "mit"'),  # metadata
        ("RMS Δp is the root", "RMS Δp is not the root"),
    ],
)
def test_nothing_that_was_generated_can_be_changed_unseen(page: Path, old: str, new: str) -> None:
    assert any("is not what its records say" in finding for finding in changed(page, old, new))


def test_what_is_added_or_taken_out_is_named(page: Path) -> None:
    row = row_of(page, "| nvfp4a16  | ")
    assert any("is missing: | nvfp4a16" in finding for finding in changed(page, f"{row}\n", ""))
    added = changed(page, "## Memory\n", "## Memory\n\nMMLU is 88.2 points, lossless.\n")
    assert any("MMLU is 88.2" in finding for finding in added)


def test_spaces_that_a_formatter_changes_are_no_findings(page: Path) -> None:
    lines = [re.sub(r" *\| *", " | ", line) if line.startswith("|") else line for line in page.read_text().split("\n")]
    page.write_text("\n\n".join(lines).replace("|\n\n |", "|\n|"))
    assert trace(page).findings == ()


def test_a_measured_number_in_the_words_of_a_suite_needs_a_reference(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "project"
    shutil.copytree(folder, root)
    (root / "demo.toml").write_text(SUITE.replace("of 8 layers", "of 0.3 % less, at 95 % confidence, in `7.5 GB`"))
    suite = load(root / "demo.toml")
    records = stored(root / "results", of(suite, demo_records()))
    card.write_files(card.generated_files(suite, records, results_dir="results", pages={}), root)
    found = trace(root / "reports/demo/README.md").findings
    assert len(found) == 1 and "says '0.3 %' and cites no record" in found[0]


def test_a_page_of_blocks_is_traced_by_the_lines_that_cite(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "project"
    shutil.copytree(folder, root)
    suite = load(root / "demo.toml")
    records, _ = read_all(root / "results")
    blocks = "".join(
        f"<!-- harness:begin {one} suite=demo -->\n<!-- harness:end {one} -->\n" for one in ("size", "runs")
    )
    page = b"# Notes of 1 GB\n" + blocks.encode()
    made = card.generated_files(suite, records, results_dir="results", pages={"NOTES.md": page})
    (root / "NOTES.md").write_bytes(made["NOTES.md"])
    assert trace(root / "NOTES.md").findings == () and trace(root / "NOTES.md").num_lines > 3
    (root / "NOTES.md").write_bytes(made["NOTES.md"].replace(b"6.50 MB", b"6.40 MB"))
    assert any("is not what its records say" in one for one in trace(root / "NOTES.md").findings)


def test_a_results_folder_with_spaces_is_found(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "results", tmp_path / "my results (1)")
    suite = load(folder / "demo.toml")
    records, _ = read_all(tmp_path / "my results (1)")
    card.write_files(card.generated_files(suite, records, results_dir="my results (1)", pages={}), tmp_path)
    assert trace(tmp_path / "reports/demo/README.md").findings == ()


def test_a_card_of_the_source_alone_is_traced(folder: Path, tmp_path: Path) -> None:
    suite = load(folder / "demo.toml")
    records = [one for one in of(suite, demo_records()) if one.run.variant["name"] == "source"]
    card.write_files(
        card.generated_files(suite, stored(tmp_path / "results", records), results_dir="results", pages={}), tmp_path
    )
    assert trace(tmp_path / "reports/demo/README.md").findings == ()


def test_the_card_of_one_variant_is_traced_where_it_is_published(folder: Path, tmp_path: Path) -> None:
    suite = load(folder / "demo.toml")
    records = of(suite, demo_records())
    made = card.variant_card(suite, records, "nvfp4a16", results_dir="results", repo="example/dense-nvfp4a16")
    for name, data in made.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    shutil.copytree(folder / "results", tmp_path / "results")
    assert trace(tmp_path / "README.md").findings == ()
    text = (tmp_path / "README.md").read_text()
    assert "# NVFP4 of a model: nvfp4a16" in text and "w4a4" not in text
    assert text.count("](results/") > 10 and "](figures/overview.svg)" in text


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "cannot be read"), (b"\xff", "not UTF-8"), (b"# A card\n\nwithout any number\n", "cites no record")],
)
def test_what_is_no_card_is_refused(tmp_path: Path, content: bytes | None, says: str) -> None:
    page = tmp_path / "README.md"
    if content is not None:
        page.write_bytes(content)
    with pytest.raises(UserError, match=says):
        trace(page)


def test_the_command_says_what_it_found_and_exits_so(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", str(page)]) == 0
    assert "come out of them again" in capsys.readouterr().out
    page.write_text(page.read_text().replace("6.50 MB of", "6.49 MB of", 1))
    assert main(["trace", str(page), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert len(found["findings"]) == 1
