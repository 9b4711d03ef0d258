"""Verdicts of the gate for people and for CI systems: a table, JSON, Markdown, JUnit XML."""

import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any
from xml.etree import ElementTree

from harness.report.gate import EXIT_CODES, Judgement
from harness.report.tables import Table, cell_text, markdown_table, table_of
from harness.suite.metrics import METRICS


def verdict_table(judgements: Sequence[Judgement]) -> Table:
    """One row a rule."""
    return table_of(
        [
            {
                "rule": one.name,
                "loss": one.loss,
                "margin": one.rule.margin,
                "num_units": f"{one.loss.num:,} {one.units}" if one.loss else None,
                "judged": one.verdict,
                "reason": one.reason,
            }
            for one in judgements
        ]
    )


def verdict_counts(judgements: Sequence[Judgement]) -> str:
    """How many rules came to which verdict."""
    counts = {verdict: sum(one.verdict == verdict for one in judgements) for verdict in EXIT_CODES}
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)


def verdict_rows(judgements: Sequence[Judgement]) -> list[dict[str, Any]]:
    """The judgements as JSON values."""
    return [{"name": one.name, **asdict(one), "unit": METRICS[one.rule.metric].unit} for one in judgements]


def step_summary(suite: str, judgements: Sequence[Judgement]) -> str:
    """Markdown for the page of a CI run."""
    table = markdown_table(verdict_table(judgements), lambda record: record.path.as_posix())
    return f"### harness gate: {suite}\n\n{verdict_counts(judgements)}\n\n{table}\n"


# XML 1.0 has no other characters.
_NO_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(suite: str, judgements: Sequence[Judgement]) -> str:
    """JUnit XML, one test case a rule. What could not be judged did not pass, and a CI system shows a skipped case as
    green: inconclusive is a failure of that type, incomparable an error."""
    tags = {"fail": "failure", "inconclusive": "failure", "incomparable": "error"}
    cases = [_case(suite, one, tags.get(one.verdict)) for one in judgements]
    counts = {
        "tests": str(len(cases)),
        "failures": str(sum(case.find("failure") is not None for case in cases)),
        "errors": str(sum(case.find("error") is not None for case in cases)),
        "skipped": "0",
    }
    root = ElementTree.Element("testsuites", counts)
    group = ElementTree.SubElement(root, "testsuite", {"name": f"harness gate: {suite}", **counts})
    group.extend(cases)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=False) + "\n"


def _case(suite: str, judgement: Judgement, tag: str | None) -> ElementTree.Element:
    margin = "" if judgement.rule.margin is None else f", margin {judgement.rule.margin:g}"  # which makes it unique
    name, reason = (_NO_XML.sub("\ufffd", text) for text in (judgement.name + margin, judgement.reason))
    case = ElementTree.Element("testcase", {"classname": f"harness.gate.{suite}", "name": name})
    loss = cell_text("loss", judgement.loss)
    said = f"{judgement.verdict}: {reason}\nloss {loss}, margin {cell_text('margin', judgement.rule.margin)}"
    if tag is None:
        ElementTree.SubElement(case, "system-out").text = said
    else:
        ElementTree.SubElement(case, tag, {"type": judgement.verdict, "message": reason}).text = said
    return case
