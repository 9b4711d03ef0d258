"""What the sections of a card are made of: tables, figures, references to runs, and words for what is missing."""

from collections.abc import Callable, Sequence

from harness.record.run import Record
from harness.report.evidence import Evidence
from harness.report.figure_data import FIGURES
from harness.report.tables import Table, markdown_table
from harness.suite.names import SOURCE, row_name
from harness.suite.schema import Suite

Link = Callable[[str], str]  # a path from the project's root -> its URL from where the text stands


def reference(evidence: Evidence, link: Link, record: Record) -> str:
    """A link to a record, called by the run's id."""
    return f"[{record.run.run_id}]({link(evidence.record_path(record))})"


def image(evidence: Evidence, link: Link, name: str) -> str | None:
    """A figure that leads to itself without pixels; None where nothing was measured that it could show."""
    if name not in evidence.figures:
        return None
    path = f"reports/{evidence.suite.name}/{name}"
    return f"[![{FIGURES[name]}]({link(f'{path}.png')})]({link(f'{path}.svg')})"


def table(evidence: Evidence, link: Link, frame: Table) -> str | None:
    """A table whose runs are links to their records; None where it has no rows."""
    return markdown_table(frame, lambda record: link(evidence.record_path(record))) if frame else None


def part(evidence: Evidence, link: Link, title: str, frame: Table, figure: str | None = None) -> str | None:
    """A table under a title of its own, with its figure; None where it has no rows."""
    if not frame:
        return None
    return paragraphs(f"**{title}**", figure and image(evidence, link, figure), table(evidence, link, frame))


def no_record(evidence: Evidence, measure: str) -> str | None:
    """Which rows that the suite asks for a measure has no run of, and what to do; None if it has them all."""
    suite = evidence.suite
    quantized = tuple(suite.variants)
    expected = {"sensitivity": (SOURCE,), "bench": (SOURCE, *quantized)}.get(measure, quantized)
    left_out: tuple[str, ...] = ()
    if measure == "bench" and suite.bench and suite.bench.variants is not None:
        left_out = tuple(name for name in quantized if name not in suite.bench.variants)
        expected = (SOURCE, *suite.bench.variants)
    expected += tuple(row_name(name, setup) for setup in setups_of(suite, measure) for name in expected)
    missing = [row for row in expected if row not in evidence.records[measure]]
    of = "" if len(missing) == len(expected) else f" of {code_names(missing)}"
    return paragraphs(
        f"No record yet{of}: run `nox -s {measure}`." if missing else None,
        f"The suite does not measure the speed of {code_names(left_out)}." if left_out else None,
    )


def setups_of(suite: Suite, measure: str) -> tuple[str, ...]:
    """The setups that a measure is taken in too. They are options of vLLM, so on another engine there are none."""
    wanted = {"ppl": suite.ppl, "fidelity": suite.fidelity, "bench": suite.bench}.get(measure)
    return (wanted.setups if wanted and suite.engine.name == "vllm" else None) or ()


def code_names(rows: Sequence[str]) -> str:
    """Names of rows as code, with commas between."""
    return ", ".join(f"`{row}`" for row in rows)


def paragraphs(*parts: str | None) -> str:
    """Markdown of several parts, those that there are."""
    return "\n\n".join(part for part in parts if part)
