"""Marked blocks of Markdown pages: what stands between two markers is written from records, all else by people.

<!-- harness:begin perplexity suite=demo -->
…
<!-- harness:sha256 d1f0e4a2b7c3 -->
<!-- harness:end perplexity -->

The digest at the end of a block is of what was written into it, so that an edit by hand can be told from a block
that is merely out of date.
"""

import hashlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

from harness.errors import UserError, did_you_mean

_MARKER = re.compile(r"<!--\s*harness:(begin|end)\b(.*)-->")
_BEGIN = re.compile(r"(\S+)\s+suite=(\S+)")
_DIGEST = re.compile(r"<!-- harness:sha256 ([0-9a-f]{12}) -->")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")


@dataclass(frozen=True)
class Block:
    """A block of a page: what it is called, whose it is, the line of its first marker (from 1) and the lines inside."""

    name: str
    suite: str
    line: int
    inside: tuple[str, ...]


def filled(page: str, data: bytes, suite: str, blocks: Mapping[str, Callable[[], str]]) -> bytes:
    """The page with the blocks of `suite` replaced by what `blocks` makes of their names; every other byte stays.

    `UserError`, naming page and line, for a block that nobody makes and for markers that do not match.
    """
    output: list[str] = []
    for piece in _pieces(page, data, {suite: blocks}):
        if isinstance(piece, str):
            output.append(piece)
        elif piece.suite != suite:
            output += piece.inside
        else:
            content = blocks[piece.name]()
            digest = _digest(content.split("\n"))
            end = "\r" if output[-1].endswith("\r") else ""  # as the line of the marker ends
            lines = ("", *content.split("\n"), "", f"<!-- harness:sha256 {digest} -->")
            output += [f"{line}{end}" for line in lines]
    return "\n".join(output).encode()


def edited(page: str, data: bytes, suite: str) -> list[Block]:
    """The blocks of a suite that hold something else than was written into them, if anything was."""
    found = []
    for piece in _pieces(page, data, {}):
        if isinstance(piece, Block) and piece.suite == suite:
            marks = [mark[1] for line in piece.inside if (mark := _DIGEST.fullmatch(line.strip()))]
            words = [line for line in piece.inside if not _DIGEST.fullmatch(line.strip())]
            if marks and marks != [_digest(words)]:
                found.append(piece)
    return found


def _digest(lines: list[str]) -> str:
    """Of the words, not of the spaces around them or of how an editor ends its lines."""
    words = "\n".join(stripped for line in lines if (stripped := line.strip()))
    return hashlib.sha256(words.encode()).hexdigest()[:12]


def _pieces(page: str, data: bytes, known: Mapping[str, Collection[str]]) -> Iterator[str | Block]:
    """The page in order: lines outside of blocks, markers among them, and what is between two markers as a block.
    `known` are the blocks that there are of some suites; of other suites any may be there."""
    try:
        lines = data.decode().split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{page} is not UTF-8 text.", "Save it as UTF-8.") from error
    opened: tuple[int, str, str] | None = None  # line, block and suite of the block we are in
    inside: list[str] = []
    fence: str | None = None  # what opened the code block we are in, outside of blocks
    for number, line in enumerate(lines, start=1):
        if opened is None and (ticks := _FENCE.match(line)):
            if fence is None:
                fence = ticks[1]
            elif line.strip().startswith(fence) and set(line.strip()) == {fence[0]}:
                fence = None
        marker = None if fence else _MARKER.fullmatch(line.strip())
        if marker is None:
            if opened is None:
                yield line
            else:
                inside.append(line)
        elif marker[1] == "begin":
            if opened is not None:
                raise UserError(
                    f"{page}, line {number}: a block begins inside '{opened[1]}' of line {opened[0]}.",
                    f"End that one first with <!-- harness:end {opened[1]} -->.",
                )
            named = _BEGIN.fullmatch(marker[2].strip())
            if named is None:
                raise UserError(
                    f"{page}, line {number}: this marker does not say which block of which suite begins.",
                    "Write <!-- harness:begin BLOCK suite=SUITE -->.",
                )
            opened = (number, named[1], named[2])
            if named[2] in known and named[1] not in known[named[2]]:
                unknown = f"{page}, line {number}: unknown block '{named[1]}'."
                raise UserError(unknown, did_you_mean(named[1], known[named[2]]))
            yield line
        elif opened is None or marker[2].strip() != opened[1]:
            where = f"'{opened[1]}' of line {opened[0]} is open" if opened else "no block is open"
            raise UserError(
                f"{page}, line {number}: the end of '{marker[2].strip()}', where {where}.", "Make the markers match."
            )
        else:
            yield Block(opened[1], opened[2], opened[0], tuple(inside))
            yield line
            opened, inside = None, []
    if opened is not None:
        raise UserError(
            f"{page}, line {opened[0]}: the block '{opened[1]}' has no end.",
            f"Add <!-- harness:end {opened[1]} -->.",
        )
