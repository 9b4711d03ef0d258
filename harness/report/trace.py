"""Whether a card is what its records say, wherever it lies: in a checkout, in an upload folder, in a download.

The links of a card say where its records are, and a mark in it says what it is a card of. The card is written again
from the cited records alone, and the two are compared line by line, without spaces. Of another page, for example one
with marked blocks, only the lines that cite records are compared, since it need not show everything that they say.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from harness.errors import UserError
from harness.record import store
from harness.record.run import Record
from harness.report import card as cards
from harness.report.evidence import gather
from harness.report.sections import Link
from harness.suite.load import narrowed, restored
from harness.suite.schema import Suite

_LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
_TARGET = re.compile(r"\]\(([^)\s]+)\)")
_CARD = re.compile(r"<!-- harness:card suite=(?P<suite>\S+)(?: variant=(?P<variant>\S+) repo=(?P<repo>\S+))? -->")
_RULE = re.compile(r"\|[\s:|-]+\|?")
_CELLS = re.compile(r"\s*\|\s*")
# What was measured has a unit; a level of confidence is no measurement.
_UNIT = r"(?:[×x](?!\s?\d)|%|per ?cent|[kMGT]i?B|tok/s|t/s|tokens/s|nats|ms)(?!\w)"
_MEASURED = re.compile(
    rf"(?<![\w.])(?!95\s?% (?:confidence|interval))[+−-]?\d[\d,.]*\s?{_UNIT}|(?:perplexity|PPL)(?: of)? \d",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Traced:
    """What was found in a card: its references, the lines that came out of the records again, and what is wrong, a
    sentence each."""

    num_references: int
    num_records: int
    num_lines: int
    findings: tuple[str, ...]


@dataclass(frozen=True)
class _Line:
    """A line of a page that is not empty, with the number that it has in the file, and the records that it cites."""

    number: int
    text: str
    references: tuple[tuple[str, str], ...]  # (run id, link)

    @property
    def words(self) -> str:
        """Without the spaces that change nothing: those around the cells of tables, and more than one."""
        text = " ".join(self.text.split())
        return "|---|" if _RULE.fullmatch(text) else _CELLS.sub("|", text)


def trace(card: Path, suite: Suite | None = None) -> Traced:
    """Follows every reference of the Markdown file `card`, whose links are relative to its folder. `suite` is what the
    card was written for; without it, what the newest of its records was made with. `UserError` for a file that cannot
    be read or cites no record."""
    try:
        text = card.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{card} cannot be read ({error.strerror}).", "Name the Markdown file of a card.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{card} is not UTF-8 text.", "Save it as UTF-8.") from error
    lines = _lines(text)
    cited = dict.fromkeys(link for line in lines for _, link in line.references)
    if not cited:
        raise UserError(f"{card} cites no record.", "Name the Markdown file of a card that `harness report` wrote.")
    findings: list[str] = []
    records: dict[str, Record] = {}
    for link in cited:
        where = next(line.number for line in lines if link in (one for _, one in line.references))
        try:
            record = store.read(card.parent / unquote(link))
        except UserError as error:
            findings.append(f"Line {where}: {error.problem}")
            continue
        if record.whole:
            records[link] = record
        else:
            told = f"{record.end.status}, {record.end.coverage['done']} of {record.end.coverage['expected']} samples"
            findings.append(f"Line {where}: {record.path} is not a whole run ({told}).")
    for line in lines:
        findings += [
            f"Line {line.number}: [{run_id}] leads to run {records[link].run.run_id}."
            for run_id, link in line.references
            if link in records and records[link].run.run_id != run_id
        ]
    if mark := _CARD.search(text):
        about = mark.groupdict()
        folder = PurePosixPath(unquote(next(iter(cited)))).parent.parent.as_posix()
        whole, own = _own(about["suite"], list(records.values()), suite)
        if (variant := about["variant"]) is not None and variant not in whole.variants:
            raise UserError(
                f"The card is of variant '{variant}', which suite '{whole.name}' has not.", "Name its suite."
            )
        evidence = gather(narrowed(whole, variant) if variant else whole, own, folder, about["repo"])
        expected = _lines(cards.written(evidence, _linked(text)))
        words, wanted = ([line.words for line in side] for side in (lines, expected))
        matcher = difflib.SequenceMatcher(None, wanted, words, autojunk=False)
        prose = {line.words for line in _lines(evidence.suite.description or "")}
        findings += _differences(matcher, expected, lines)
        findings += _without_reference([line for line in lines if line.words in prose])
        num_lines = sum(block.size for block in matcher.get_matching_blocks())
    else:
        known = {line.words for line in _of_blocks(records.values(), suite, _linked(text))}
        citing = [line for line, links in _citing(lines) if records.keys() >= links]
        differing = [line for line in citing if line.words not in known]
        findings += [f"Line {line.number} is not what its records say: {_shortened(line.text)}" for line in differing]
        num_lines = len(citing) - len(differing)
    references = sum(len(line.references) for line in lines)
    return Traced(references, len(records), num_lines, tuple(findings))


def _lines(text: str) -> list[_Line]:
    found = []
    for number, line in enumerate(text.split("\n"), start=1):
        cited = tuple((name, link) for name, link in _LINK.findall(line) if link.endswith(".jsonl"))
        if line.strip():
            found.append(_Line(number, line, cited))
    return found


def _own(name: str, records: Sequence[Record], given: Suite | None) -> tuple[Suite, list[Record]]:
    """A suite, and its records among the cited ones."""
    own = [record for record in records if record.run.suite["name"] == name]
    if given is not None and given.name == name:
        return given, own
    if not own:
        raise UserError(f"The card is of suite '{name}', and cites no record of it.", "Write it again by `report`.")
    newest = max(own, key=lambda record: (record.run.started_utc, record.run.run_id))
    return restored(newest.run.suite, newest.path.name), own


def _of_blocks(records: Iterable[Record], given: Suite | None, link: Link) -> Iterator[_Line]:
    """Every line of every section that the cited records give, for each of their suites."""
    every = list(records)
    for name in dict.fromkeys(record.run.suite["name"] for record in every):
        evidence = gather(*_own(name, every, given), results_dir="")
        for _, block in cards.BLOCKS.values():
            yield from _lines(block(evidence, link))


def _citing(lines: Sequence[_Line]) -> Iterator[tuple[_Line, set[str]]]:
    """The lines that cite runs themselves, or are rows of a table whose caption does, with the links to the runs."""
    caption: set[str] = set()
    for line in lines:
        links = {link for _, link in line.references}
        if not line.text.lstrip().startswith("|"):
            caption = links
        if links or caption:
            yield line, links or caption


def _linked(text: str) -> Link:
    """Paths to the links that the page has to files of these names."""
    links = {PurePosixPath(unquote(link)).name: link for link in _TARGET.findall(text)}
    return lambda path: links.get(PurePosixPath(path).name, path)


def _differences(
    matcher: difflib.SequenceMatcher[str], expected: Sequence[_Line], found: Sequence[_Line]
) -> Iterator[str]:
    """Lines that the records do not give, and lines that they give and that are not there."""
    for kind, first, last, start, end in matcher.get_opcodes():
        if kind == "equal":
            continue
        for line in found[start:end]:
            yield f"Line {line.number} is not what its records say: {_shortened(line.text)}"
        for line in expected[first + (end - start) : last]:
            where = f"After line {found[start - 1].number}" if start else "At the top"
            yield f"{where} is missing: {_shortened(line.text)}"


def _without_reference(prose: Sequence[_Line]) -> Iterator[str]:
    """What the words of a suite say as if it was measured: they cite no record."""
    for line in prose:
        if found := _MEASURED.search(line.text):
            yield f"Line {line.number} says '{found[0].strip()}' and cites no record: {_shortened(line.text)}"


def _shortened(text: str, most: int = 100) -> str:
    words = " ".join(_LINK.sub(r"\1", text).split())
    return words if len(words) <= most else f"{words[:most].rstrip()} …"
