"""The sections of a card: each a piece of Markdown about one question, and the block of that name in other pages.

Their words stand in `sections.md.jinja`, a block each. What those say of the evidence beyond its tables is found here.
"""

import re
import shlex
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from tabulate import tabulate

from harness.formats.names import KEPT
from harness.record.stats import RESAMPLES
from harness.report import columns, pieces, quality_tables, speed_tables
from harness.report.evidence import Evidence
from harness.report.numbers import format_bytes
from harness.suite.names import NOISE, SOURCE, row_name


def section(name: str) -> Callable[[Evidence, pieces.Link], str]:
    """What writes the section of a block of the template. What there are no records of leaves no gap."""

    def written(evidence: Evidence, link: pieces.Link) -> str:
        context = _template().new_context(_known(evidence, link))
        return re.sub(r"\n{3,}", "\n\n", "".join(_template().blocks[name](context)).strip())

    return written


@cache
def _template() -> Template:
    def text_of(value: object) -> object:
        return "" if value is None else value

    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=text_of)
    return environment.from_string(Path(__file__).with_name("sections.md.jinja").read_text("utf-8"))


def _known(evidence: Evidence, link: pieces.Link) -> dict[str, Any]:
    """What the template knows, by name."""
    of_page = (pieces.table, pieces.part, pieces.reference, _roles, _runs_by_packages)
    suite, records = evidence.suite, evidence.records
    return {
        "suite": suite,
        "records": records,
        "tables": evidence.tables,
        "image": partial(pieces.image, evidence, link),
        "no_record": partial(pieces.no_record, evidence),
        **{function.__name__.lstrip("_"): partial(function, evidence, link) for function in of_page},
        "speed_tables": speed_tables,
        "sensitivity_words": quality_tables.sensitivity_words,
        "commands_by_commit": _commands_by_commit(evidence),
        "has_noise": any(row in NOISE for row in records["fidelity"]),
        "remade_variants": _remade_variants(evidence),
        "is_torch": any((one.run.engine or {}).get("name") == "torch" for one in records["bench"].values()),
        "clean": [f"`{name}`" for name, record in records["verify"].items() if not record.kind("finding")],
        "missing_perplexities": _missing_perplexities(evidence),
        "missing_tasks": [
            f"`{variant}` in `{label}`"
            for label in suite.tasks
            for variant in (SOURCE, *suite.variants)
            if variant not in evidence.tasks.get(label, {})
        ],
        "SOURCE": SOURCE,
        "AT_NOISE": columns.AT_NOISE,
        "RESAMPLES": f"{RESAMPLES:,}",
    }


def _roles(evidence: Evidence, link: pieces.Link) -> str:
    """A row for each role of the source, and beside its bytes what every variant makes of them. Builds of other sources
    would have other roles, and a row for each all the same."""
    records = evidence.records["build"]
    found: dict[tuple[str, int, int, int], dict[str, str]] = {}
    for variant, record in records.items():
        for role in record.kind("role"):
            same = (role["role"], role["num_tensors"], role["num_params"], role["source_bytes"])
            kept = role["format"] == KEPT
            after = KEPT if kept else f"{format_bytes(role['output_bytes'])}, {role['format']}"
            found.setdefault(same, {})[variant] = after
    rows = [
        (name, f"{tensors:,}", f"{params:,}", format_bytes(size), *(after.get(variant, "—") for variant in records))
        for (name, tensors, params, size), after in found.items()
    ]
    headers = ("role", "tensors", "parameters", "before", *map(columns.escape, records))
    align = ("left", *("right" for _ in headers[1:]))
    table = tabulate(rows, headers=headers, tablefmt="pipe", colalign=align, disable_numparse=True)
    runs = (f"{columns.escape(name)} {pieces.reference(evidence, link, record)}" for name, record in records.items())
    return f"runs {' · '.join(runs)}\n\n{table}"


def _missing_perplexities(evidence: Evidence) -> list[str]:
    """Which rows have no run by which protocol."""
    suite = evidence.suite
    protocols = suite.ppl.protocols if suite.ppl else ()
    names = (SOURCE, *suite.variants)
    rows = [row_name(name, setup) for setup in (None, *pieces.setups_of(suite, "ppl")) for name in names]
    return [
        f"`{row}`" + (f" by {protocol}" if len(protocols) > 1 else "")
        for protocol in protocols
        for row in rows
        if row not in evidence.perplexities.get(protocol, {})
    ]


def _commands_by_commit(evidence: Evidence) -> dict[str, list[str]]:
    """The commands that made the runs, each once, by the commit that they ran at, the oldest run first."""
    found: dict[str, list[str]] = {}
    for row in sorted(evidence.tables["runs"].rows, key=lambda row: str(row["started_utc"])):
        commands = found.setdefault(row["commit"] or "unknown", [])
        if (command := shlex.join(row["run"].run.command)) not in commands:
            commands.append(command)
    return found


def _runs_by_packages(evidence: Evidence, link: pieces.Link) -> dict[str, list[str]]:
    """References to the runs, by the versions of packages that they were made with."""
    found: dict[str, list[str]] = {}
    for row in evidence.tables["runs"].rows:
        found.setdefault(row["packages"], []).append(pieces.reference(evidence, link, row["run"]))
    return found


def _remade_variants(evidence: Evidence) -> list[str]:
    """The variants whose runs are of several artifacts."""
    artifacts: dict[str, set[str | None]] = {}
    for row in evidence.tables["runs"].rows:
        artifacts.setdefault(row["variant"], set()).add(row["artifact"])
    return [variant for variant, digests in artifacts.items() if len(digests) > 1]
