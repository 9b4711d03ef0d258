"""Whether the numbers of a card are what its records say: every one has a reference, every reference leads to a whole
record, and the rows that cite it come out of it again.

A card is traced by itself, wherever it lies: in a checkout, in an upload folder, in a download from the hub. Its links
say where the records are, and the newest of them holds the suite that the card was written for; what `report` would
write from these records alone is what the card must say.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from harness import suite as suites
from harness.errors import UserError
from harness.record import results
from harness.record.results import Record
from harness.report import sections
from harness.report.evidence import gather

_LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
_CODE = re.compile(r"`[^`]*`")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_RULE = re.compile(r"\|[\s:|-]+\|?")
# What was measured has a unit; a level of confidence is no measurement.
_MEASURED = re.compile(r"(?<![\w.])(?!95\s?%)[+−-]?\d[\d,.]*\s?(?:%|×|[kMGT]i?B|tok/s|tokens/s|nats|ms)(?!\w)")


@dataclass(frozen=True)
class Traced:
    """What was found in a card: its references, the lines that a record's numbers came out equal in, and what is wrong,
    a sentence each."""

    num_references: int
    num_records: int
    num_lines: int
    findings: tuple[str, ...]


@dataclass(frozen=True)
class _Line:
    """A line of a card outside of code, with the number that it has in the file, and the records that it cites."""

    number: int
    text: str
    references: tuple[tuple[str, str], ...]  # (run id, link)
    caption: tuple[tuple[str, str], ...]  # those of the last line before the table that it is a row of
    is_row: bool  # of figures: headings are none
    has_source: bool
    """Whether it names a page on the web as its source."""


def trace(card: Path) -> Traced:
    """Follows every reference of the Markdown file `card`, whose links are relative to its folder. `UserError` for a
    file that cannot be read or cites no record."""
    try:
        text = card.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{card} cannot be read ({error.strerror}).", "Name the Markdown file of a card.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{card} is not UTF-8 text.", "Save it as UTF-8.") from error
    lines = list(_lines(text))
    cited = dict.fromkeys(link for line in lines for _, link in line.references)
    if not cited:
        raise UserError(f"{card} cites no record.", "Name the Markdown file of a card that `harness report` wrote.")
    findings: list[str] = []
    records: dict[str, Record] = {}
    for link in cited:
        where = next(line.number for line in lines if link in (one for _, one in line.references))
        try:
            records[link] = _whole(results.read(card.parent / link))
        except UserError as error:
            findings.append(f"Line {where}: {error.problem}")
    for line in lines:
        findings += [
            f"Line {line.number}: [{run_id}] leads to run {records[link].run.run_id}."
            for run_id, link in line.references
            if link in records and records[link].run.run_id != run_id
        ]
    findings += _without_reference(lines)
    expected = _expected(records)
    citing = [line for line in lines if (cites := line.references or line.caption) and _known(cites, records)]
    differing = [line for line in citing if line.text not in expected]
    findings += [f"Line {line.number} is not what its records say: {_shortened(line.text)}" for line in differing]
    return Traced(
        num_references=sum(len(line.references) for line in lines),
        num_records=len(records),
        num_lines=len(citing) - len(differing),
        findings=tuple(findings),
    )


def _known(references: tuple[tuple[str, str], ...], records: Mapping[str, Record]) -> bool:
    return all(link in records for _, link in references)


def _whole(record: Record) -> Record:
    if not record.whole:
        done, status = record.end.coverage, record.end.status
        raise UserError(
            f"{record.path} is not a whole run ({status}, {done['done']} of {done['expected']} samples).",
            "Measure again without a limit.",
        )
    return record


def _lines(text: str) -> Iterator[_Line]:
    """The lines that may say something: without code, and without the front matter."""
    fence: str | None = None
    in_front = text.startswith("---\n")
    caption: tuple[tuple[str, str], ...] = ()
    in_table = False
    for number, line in enumerate(text.split("\n"), start=1):
        if in_front:
            in_front = number == 1 or line != "---"
            continue
        if ticks := _FENCE.match(line):
            fence = None if fence and line.strip().startswith(fence) else fence or ticks[1]
            continue
        if fence is not None:
            continue
        links = _LINK.findall(line)
        cited = tuple((name, link) for name, link in links if link.endswith(".jsonl"))
        was_in_table, in_table = in_table, line.lstrip().startswith("|")
        if line.strip() and not in_table:
            caption = cited
        is_row = was_in_table and in_table and not _RULE.fullmatch(line.strip())
        yield _Line(number, line, cited, caption if is_row else (), is_row, any("://" in link for _, link in links))


def _without_reference(lines: list[_Line]) -> Iterator[str]:
    """What says a number and cites nothing: rows of tables, and sentences."""
    for line in lines:
        if line.references or line.caption or line.has_source:
            continue
        words = _bare(line.text)
        if line.is_row and re.search(r"\d", words):
            yield f"Line {line.number} has numbers and no reference: {_shortened(line.text)}"
        elif not line.text.lstrip().startswith("|") and (found := _MEASURED.search(words)):
            yield f"Line {line.number} says '{found[0].strip()}' and cites no record: {_shortened(line.text)}"


def _bare(text: str) -> str:
    """A line without code and without the targets of its links."""
    return _LINK.sub(r"\1", _CODE.sub("", text))


def _expected(records: Mapping[str, Record]) -> set[str]:
    """Every line of every section that the cited records give, with links as the card has them."""
    if not records:
        return set()
    newest = max(records.values(), key=lambda record: (record.run.started_utc, record.run.run_id))
    suite = suites.restored(newest.run.suite, newest.path.name)
    # The card of one variant knows nothing of the others.
    shown = {record.run.variant["name"] for record in records.values()}
    variants = {name: variant for name, variant in suite.variants.items() if name in shown}
    links = {record.path.name: link for link, record in records.items()}
    evidence = gather(replace(suite, variants=variants), list(records.values()), results_dir="")
    found: set[str] = set()
    for _, block in sections.BLOCKS.values():
        text = block(evidence, lambda path: links.get(path.rpartition("/")[2], path))
        found.update(text.split("\n"))
    return found


def _shortened(text: str, most: int = 100) -> str:
    words = " ".join(_LINK.sub(r"\1", text).split())
    return words if len(words) <= most else f"{words[:most].rstrip()} …"
