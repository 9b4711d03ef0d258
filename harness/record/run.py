"""One run: its header, its samples, its end. What may stand in them is said by `record/schema.py`."""

import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

SCHEMA = 1
"""The version of a record's layout. A record of another one is not read."""
UTC_FORMAT = "%Y-%m-%dT%H:%M:%SZ"

Status = Literal["complete", "interrupted", "failed"]
Json = dict[str, Any]


def new_id() -> str:
    """Eight random hex digits: names a run, or the session that one command's runs share."""
    return secrets.token_hex(4)


def utc_now() -> str:
    """The time as results write it: `2026-03-01T12:00:00Z`."""
    return datetime.now(UTC).strftime(UTC_FORMAT)


@dataclass(frozen=True, kw_only=True)
class Run:
    """The first line: everything that must be known to repeat a run or to refuse a comparison. Its keys are those of
    `header_of(measure)`."""

    measure: str
    measure_version: int
    session_id: str
    suite: Json
    suite_digest: str
    variant: Json
    engine: Json | None
    dataset: Json | None
    machine: Json
    packages: Json
    git: Json | None
    command: tuple[str, ...]
    schema: int = SCHEMA
    run_id: str = field(default_factory=new_id)
    started_utc: str = field(default_factory=utc_now)

    @property
    def file_name(self) -> str:
        """Sorts by time; every part can be read without opening the file."""
        utc = self.started_utc.replace("-", "").replace(":", "")
        return f"{utc}-{self.measure}-{self.suite['name']}-{self.variant['name']}-{self.run_id}.jsonl"


@dataclass(frozen=True, kw_only=True)
class End:
    """The last line; its keys are those of `END`."""

    status: Status
    num_samples: int
    coverage: Json
    ended_utc: str


@dataclass(frozen=True)
class Record:
    """One run as it was stored; samples are the raw dicts, each with its `kind`."""

    path: Path
    run: Run
    samples: tuple[Json, ...]
    end: End

    def kind(self, kind: str) -> list[Json]:
        """The samples of one kind, in the order they were taken."""
        return [sample for sample in self.samples if sample["kind"] == kind]

    @property
    def whole(self) -> bool:
        """Complete, and over everything there was to measure (no `--limit`)."""
        return self.end.status == "complete" and self.end.coverage["done"] == self.end.coverage["expected"]


@dataclass(frozen=True)
class Skipped:
    """A file that is not used, and why; `record` is what it holds where it can be read."""

    path: Path
    reason: str
    record: Record | None = None
