"""Baselines: which older runs the new runs of a suite are watched against, and why those.

    results/baselines/<suite>.json

    {"schema": 1, "suite": "demo", "history": [
      {"utc": "...", "reason": "first baseline", "commit": "...", "records": {
        "ppl/wikitext2-512": {"w4a4": {"file": "<machine>/<file>.jsonl", "sha256": "..."}}}}]}

A baseline holds no numbers: it names whole runs by their path from the folder that holds `baselines/` and by their
digest, and every comparison is made anew. The last entry is in force. A run that is gone, cut or changed is an error.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.record import store
from harness.record.keys import Key, Keys, optional
from harness.record.run import Record, utc_now

SCHEMA = 1
Slots = Mapping[str, Mapping[str, Record]]
"""What was measured (`slot`) -> the row's name -> the run that speaks for it."""


def slot(record: Record) -> str:
    """What a run measured: the measure, followed by the protocol of a perplexity or by a task's name in the suite."""
    key = {"ppl": "protocol", "tasks": "name"}.get(record.run.measure)
    return record.run.measure if key is None else f"{record.run.measure}/{(record.run.dataset or {}).get(key)}"


def path_of(folder: Path, suite: str) -> Path:
    """The file of a suite's baselines in a folder of results."""
    return folder / "baselines" / f"{suite}.json"


def baseline_in_force(folder: Path, suite: str) -> dict[str, dict[str, Record]]:
    """The baseline of a suite that is in force, with every run read; empty where there is none. `UserError` for a file
    that is no baseline, and for a run that is missing, not whole, or another than the baseline names."""
    path = path_of(folder, suite)
    history = _history(path, suite)
    if not history:
        return {}
    return {
        where: {row: _record(path, folder, where, row, entry) for row, entry in rows.items()}
        for where, rows in history[-1]["records"].items()
    }


def update(folder: Path, suite: str, records: Slots, *, reason: str, commit: str | None) -> Path:
    """Puts `records`, which must lie in `folder`, in force as the suite's baseline, for a `reason`, and keeps earlier
    baselines. `commit` is the harness's. Returns the file."""
    path = path_of(folder, suite)
    if not reason.strip():
        raise UserError("A baseline is changed for a reason.", 'Give it: --reason "why the new numbers are right".')
    named = {where: {row: _entry(folder, record) for row, record in rows.items()} for where, rows in records.items()}
    entry = {"utc": utc_now(), "reason": reason.strip(), "commit": commit, "records": named}
    document = {"schema": SCHEMA, "suite": suite, "history": [*_history(path, suite), entry]}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)
    return path


def _entry(folder: Path, record: Record) -> dict[str, str]:
    root, file = folder.resolve(), record.path.resolve()
    if not file.is_relative_to(root):
        raise UserError(
            f"{record.path} is not in {folder}, and a baseline names only what lies beside it.",
            "Copy the record there, or measure with --results set to that folder.",
        )
    return {"file": file.relative_to(root).as_posix(), "sha256": _sha256(file)}


def _record(path: Path, folder: Path, where: str, row: str, entry: Mapping[str, str]) -> Record:
    """The run that the baseline names for `row` under `where`."""
    file = folder / entry["file"]
    remedy = "Restore the file as it was committed, or make a new baseline: --update-baseline --reason."
    if not file.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{path} names {entry['file']}, which is not in {folder}.", "Make a new baseline.")
    if not file.is_file():
        raise UserError(f"{path} names {entry['file']}, which is not there.", remedy)
    if _sha256(file) != entry["sha256"]:
        raise UserError(f"{path} names {entry['file']}, which has changed since.", remedy)
    record = store.read(file)
    if not record.whole or (slot(record), record.run.variant["name"]) != (where, row):
        raise UserError(f"{path} names {entry['file']} as '{where}' of '{row}', and it is no whole run of it.", remedy)
    return record


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


_FILE = Keys(file=Key("text", "The run's path from the folder."), sha256=Key("text", "The digest of its file."))
_ENTRY = Keys(
    utc=Key("text", "When the baseline was made."),
    reason=Key("text", "Why."),
    records=Key("open table", "By what was measured and by row: a run's `_FILE`."),
    **optional(commit=Key("text", "The commit of the harness.", nullable=True)),
)


def _wrong_key(entry: Mapping[str, Any]) -> str | None:
    """The first key of an entry of the history that is not what it must be; None for a good entry."""
    if wrong := _ENTRY.problem(entry):
        return wrong
    slots = Keys(dict.fromkeys(entry["records"], Key("named tables", "By row.", keys=_FILE)))
    return "records" if slots.problem(entry["records"]) or slots.unknown(entry["records"]) else None


def _history(path: Path, suite: str) -> list[dict[str, Any]]:
    """Every baseline that the suite has had, the oldest first; none where there is no file."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}).", "Restore it as it was committed.") from error
    entries = document.get("history") if isinstance(document, dict) else None
    if not isinstance(entries, list) or (document.get("schema"), document.get("suite")) != (SCHEMA, suite):
        raise UserError(f"{path} is no list of baselines of suite '{suite}'.", "Restore it as it was committed.")
    for number, entry in enumerate(entries):
        if wrong := _wrong_key(entry if isinstance(entry, dict) else {}):
            raise UserError(f"{path}: entry {number} has no good '{wrong}'.", "Restore it as it was committed.")
    return entries
