"""How long work tells how far it is; the command line alone decides whether anything is drawn."""

from dataclasses import dataclass
from typing import Protocol


class Progress(Protocol):
    """Called as work advances, the last time with done == total."""

    def __call__(self, done: int, total: int, description: str, note: str = "", /) -> None:
        """`description` names one stretch of work, and stays; `note` is what it has to say of itself now."""


def silent(done: int, total: int, description: str, note: str = "", /) -> None:
    """Tells nothing: the progress of work that nobody watches."""


def named(progress: Progress, name: str) -> Progress:
    """Tells the same, with `name` before every description."""

    def tell(done: int, total: int, description: str, note: str = "", /) -> None:
        progress(done, total, f"{name}: {description}", note)

    return tell


@dataclass
class Meter:
    """Adds up what is done of `total`, and tells it as one stretch of work."""

    progress: Progress
    total: int
    description: str
    done: int = 0

    def advance(self, amount: int) -> None:
        """Adds `amount`, and tells the sum."""
        self.done += amount
        self.progress(self.done, self.total, self.description)


def duration(seconds: float) -> str:
    """`3 h 25 min`, `25 min` or `40 s`."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
