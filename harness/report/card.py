"""The card: what a suite's records say, as `reports/<suite>/README.md`, and the same tables inside other pages.

`render` is a pure function from a suite, records and the pages to fill to the bytes of every file; `stale` and
`write` compare those with a folder. Nothing in the output depends on when or where it is rendered, so a card is
out of date exactly if its bytes differ (figures: if their data differ, see `plots`).

A page may hold blocks:

    <!-- harness:begin perplexity suite=demo -->
    ...replaced...
    <!-- harness:end perplexity -->

Each marker stands alone on its line. Text around the blocks is never touched, and neither is a block of another
suite, nor a marker shown inside a fenced code block.

One run speaks for each variant in each measure, and by each protocol of perplexity: the newest whole one. The
numbers of two runs stand in relation only if `results.incomparable` allows it.
"""

import json
import posixpath
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness.record.results import Record
from harness.report import columns, figures, plots
from harness.report.blocks import filled
from harness.report.evidence import OPTIONAL, Evidence, gather
from harness.report.sections import BLOCKS, Link, bound, paragraphs
from harness.suite import Suite


def render(
    suite: Suite, records: Sequence[Record], *, results_dir: str, pages: Mapping[str, bytes]
) -> dict[str, bytes]:
    """Every generated file: path from the project's root -> bytes.

    `results_dir` is the results folder and the keys of `pages` are the Markdown files whose blocks are to be
    filled, all as POSIX paths from the root.
    """
    evidence = gather(suite, records, results_dir)
    folder = f"reports/{suite.name}"
    card = f"{folder}/README.md"
    return {
        card: _card(evidence, _linker(card)).encode(),
        **{f"{folder}/{name}": data for name, data in figures.files(evidence).items()},
        **{page: filled(page, text, suite.name, bound(evidence, _linker(page))) for page, text in pages.items()},
    }


def stale(rendered: Mapping[str, bytes], root: Path) -> list[str]:
    """The files under `root` that are missing or do not say what the records say."""
    return [path for path, data in rendered.items() if not _says(root / path, data)]


def write(rendered: Mapping[str, bytes], root: Path) -> list[str]:
    """Bring the stale files up to date, each replaced in one step; returns their paths."""
    outdated = stale(rendered, root)
    for path in outdated:
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        temporary.write_bytes(rendered[path])
        temporary.replace(target)
    return outdated


def _says(path: Path, data: bytes) -> bool:
    if not path.is_file():
        return False
    digest = plots.embedded_digest(data)
    present = path.read_bytes()
    return present == data if digest is None else plots.embedded_digest(present) == digest


# -- Pages -------------------------------------------------------------------------------------------------------


def _linker(document: str) -> Link:
    folder = posixpath.dirname(document)
    return lambda path: posixpath.relpath(path, folder or ".")


def _card(evidence: Evidence, link: Link) -> str:
    suite = evidence.suite
    sections = [
        paragraphs(f"## {heading}" if heading else None, block(evidence, link))
        for name, (heading, block) in BLOCKS.items()
        if _is_shown(evidence, name)
    ]
    source = suite.source.location + (f" at revision {suite.source.revision}" if suite.source.revision else "")
    return (
        paragraphs(
            _front_matter(suite),
            f"# {columns.escape(suite.title)}",
            suite.description and suite.description.strip(),
            f"NVFP4 quantization of `{source}`. Every number is computed from the raw records that its row links to.",
            *sections,
        )
        + "\n"
    )


def _is_shown(evidence: Evidence, block: str) -> bool:
    """Whether a card has a block: an optional one only where there is something to say."""
    if block == "tasks":
        return bool(evidence.suite.tasks)
    return block not in OPTIONAL or bool(evidence.records[block])


def _front_matter(suite: Suite) -> str:
    """The metadata that the model hub reads; keys that the suite leaves open are left out, not guessed."""
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", suite.source.location)
    base_model = suite.source.base_model or (suite.source.location if is_hub_id else None)
    metadata: dict[str, str | list[str] | None] = {
        "license": suite.source.license,
        "base_model": base_model,
        "base_model_relation": "quantized" if base_model else None,
        "library_name": "transformers",
        "tags": ["nvfp4", "compressed-tensors", "deltanet"],
    }
    # JSON strings and lists are YAML, whatever characters they hold.
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in metadata.items() if value]
    return "\n".join(("---", *lines, "---"))
