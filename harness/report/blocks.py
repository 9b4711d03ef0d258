"""Marked blocks of Markdown pages: what stands between two markers is written from records, all else by people.

<!-- harness:begin perplexity suite=demo -->
…
<!-- harness:end perplexity -->
"""

import re
from collections.abc import Callable, Mapping

from harness.errors import UserError, did_you_mean

_MARKER = re.compile(r"<!--\s*harness:(begin|end)\b(.*)-->")
_BEGIN = re.compile(r"(\S+)\s+suite=(\S+)")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")


def filled(page: str, data: bytes, suite: str, blocks: Mapping[str, Callable[[], str]]) -> bytes:
    """The page with the blocks of `suite` replaced by what `blocks` makes of their names; every other byte stays.

    `UserError`, naming page and line, for a block that nobody makes and for markers that do not match.
    """
    try:
        lines = data.decode().split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{page} is not UTF-8 text.", "Save it as UTF-8.") from error
    output: list[str] = []
    opened: tuple[int, str, str] | None = None  # line, block and suite of the block we are in
    fence: str | None = None  # what opened the code block we are in, outside of blocks
    for number, line in enumerate(lines, start=1):
        if opened is None and (ticks := _FENCE.match(line)):
            if fence is None:
                fence = ticks[1]
            elif line.strip().startswith(fence) and set(line.strip()) == {fence[0]}:
                fence = None
        marker = None if fence else _MARKER.fullmatch(line.strip())
        if marker is None:
            if opened is None or opened[2] != suite:
                output.append(line)
            continue
        output.append(line)
        if marker[1] == "begin":
            if opened is not None:
                raise UserError(
                    f"{page}, line {number}: a block begins inside '{opened[1]}' of line {opened[0]}.",
                    f"End that one first with <!-- harness:end {opened[1]} -->.",
                )
            name, owner = _begun(page, number, marker[2])
            if owner == suite and name not in blocks:
                raise UserError(f"{page}, line {number}: unknown block '{name}'.", did_you_mean(name, blocks))
            opened = (number, name, owner)
            if owner == suite:
                output += ["", blocks[name](), ""]
        elif opened is None or marker[2].strip() != opened[1]:
            inside = f"'{opened[1]}' of line {opened[0]} is open" if opened else "no block is open"
            raise UserError(
                f"{page}, line {number}: the end of '{marker[2].strip()}', where {inside}.",
                "Make the markers match.",
            )
        else:
            opened = None
    if opened is not None:
        raise UserError(
            f"{page}, line {opened[0]}: the block '{opened[1]}' has no end.",
            f"Add <!-- harness:end {opened[1]} -->.",
        )
    return "\n".join(output).encode()


def _begun(page: str, number: int, words: str) -> tuple[str, str]:
    """Block and suite from the words of a begin marker."""
    parts = _BEGIN.fullmatch(words.strip())
    if parts is None:
        raise UserError(
            f"{page}, line {number}: this marker does not say which block of which suite begins.",
            "Write <!-- harness:begin BLOCK suite=SUITE -->.",
        )
    return parts[1], parts[2]
