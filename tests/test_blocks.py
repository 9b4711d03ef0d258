"""Marked blocks: an edit by hand is told from a block that is out of date, and nothing of it is lost unasked."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.cli import main
from harness.report.blocks import edited, filled

PAGE = b"""# Notes

<!-- harness:begin size suite=demo -->
<!-- harness:end size -->

between

<!-- harness:begin decode suite=demo -->
an old table
<!-- harness:end decode -->
<!-- harness:begin size suite=other -->
<!-- harness:sha256 000000000000 -->
words of another suite
<!-- harness:end size -->
"""
TABLES = {"size": lambda: "| a | b |\n|---|---|\n| 1 | 2 |", "decode": lambda: "fast"}
SUITE = """
name = "demo"
title = "A model"
[source]
location = "demo:dense"
[variants.nvfp4a16]
recipe = "rtn-a16"
"""
# Lines of a page as people write them: no markers, and no ends of lines among them.
WORDS = st.text(st.characters(blacklist_categories=("Cs", "Cc", "Zl", "Zp"), blacklist_characters="<`~\x85"))


def test_what_was_written_is_not_an_edit() -> None:
    assert edited("a.md", PAGE, "demo") == []
    once = filled("a.md", PAGE, "demo", TABLES)
    assert edited("a.md", once, "demo") == []
    assert filled("a.md", once, "demo", TABLES) == once


def test_a_block_that_is_only_out_of_date_is_not_an_edit() -> None:
    once = filled("a.md", PAGE, "demo", TABLES)
    later = filled("a.md", once, "demo", {**TABLES, "decode": lambda: "faster"})
    assert later != once and edited("a.md", later, "demo") == []


def test_an_edited_block_is_named_by_its_line() -> None:
    once = filled("a.md", PAGE, "demo", TABLES)
    (block,) = edited("a.md", once.replace(b"| 1 | 2 |", b"| 1 | 3 |"), "demo")
    assert (block.name, block.line) == ("size", 3)
    both = once.replace(b"| 1 | 2 |", b"| 1 | 2 |\nand a word").replace(b"fast", b"slow")
    assert [block.name for block in edited("a.md", both, "demo")] == ["size", "decode"]


def test_spaces_and_ends_of_lines_that_an_editor_changes_are_no_edit() -> None:
    once = filled("a.md", PAGE, "demo", TABLES)
    assert edited("a.md", once.replace(b"\n", b"\r\n"), "demo") == []
    assert edited("a.md", once.replace(b"fast\n", b"fast   \n\n"), "demo") == []


def test_a_page_with_the_line_ends_of_windows_keeps_them() -> None:
    page = PAGE.replace(b"\n", b"\r\n")
    once = filled("a.md", page, "demo", TABLES)
    assert once.count(b"\n") == once.count(b"\r\n") and b"| 1 | 2 |\r\n" in once
    assert filled("a.md", once, "demo", TABLES) == once and edited("a.md", once, "demo") == []


def test_two_digests_in_a_block_are_an_edit() -> None:
    once = filled("a.md", PAGE, "demo", {**TABLES, "decode": lambda: "fast"})
    start = once.index(b"<!-- harness:sha256")
    mark = once[start : once.index(b"\n", start) + 1]
    assert [one.name for one in edited("a.md", once.replace(mark, mark + mark, 1), "demo")] == ["size"]


@given(st.lists(WORDS), WORDS)
def test_every_other_byte_stays(lines: list[str], content: str) -> None:
    around = "\n".join(lines)
    page = f"{around}\n<!-- harness:begin size suite=demo -->\nx\n<!-- harness:end size -->\n{around}".encode()
    made = filled("a.md", page, "demo", {"size": lambda: content}).decode()
    assert made.startswith(f"{around}\n<!-- harness:begin size suite=demo -->\n")
    assert made.endswith(f"\n<!-- harness:end size -->\n{around}")
    assert edited("a.md", made.encode(), "demo") == []
    assert filled("a.md", made.encode(), "demo", {"size": lambda: content}).decode() == made


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo.toml").write_text(SUITE)
    (tmp_path / "NOTES.md").write_bytes(PAGE)
    assert main(["report", "--suite", "demo.toml", "NOTES.md"]) == 0
    return tmp_path


def test_check_names_an_edit_and_report_does_not_overwrite_it(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = project / "NOTES.md"
    assert main(["report", "--suite", "demo.toml", "NOTES.md", "--check"]) == 0
    written = page.read_text()
    page.write_text(written.replace("No record yet", "My own words", 1))
    capsys.readouterr()
    assert main(["report", "--suite", "demo.toml", "NOTES.md", "--check"]) == 1
    assert "NOTES.md, line 3: the block 'size' was edited by hand." in capsys.readouterr().out
    assert main(["report", "--suite", "demo.toml", "NOTES.md"]) == 2
    assert "was edited by hand" in capsys.readouterr().err
    assert "My own words" in page.read_text()
    assert main(["report", "--suite", "demo.toml", "NOTES.md", "--overwrite"]) == 0
    assert page.read_text() == written
