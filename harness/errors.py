"""User errors: one sentence that names what is wrong and where, and one remedy.

Every other exception is a bug of the harness and keeps its traceback. `cli` alone turns a `UserError` into
text and exit code 2, so a library caller can catch it and read its two parts.
"""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can mend: a bad file, an unknown name, a full disk."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem} {remedy}")
        self.problem = problem
        self.remedy = remedy


class BadWeightError(UserError):
    """A checkpoint with weights, or inputs of layers, that are no numbers: no build can finish it."""


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The remedy for an unknown name: the nearest known name, if one is at least `cutoff` alike, and all of them."""
    choices = sorted(known)
    near = difflib.get_close_matches(name, choices, n=1, cutoff=cutoff)
    hint = f"Did you mean '{near[0]}'? " if near else ""
    return f"{hint}Known: {', '.join(choices)}."


def first_line(error: BaseException) -> str:
    """The first line of what an error says, without its full stop; its type where it says nothing."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].strip().rstrip(".")[:300]
