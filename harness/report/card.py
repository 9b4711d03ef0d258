"""The card: what a suite's records say, as `reports/<suite>/README.md`, and the same sections inside other pages.

One run speaks for each variant in each measure, and by each protocol of perplexity: the newest whole one. Nothing in a
file depends on when or where it is written, so a card is out of date exactly if its bytes differ (figures: if their
data differ, see `figure_data`). `blocks` says how a page asks for a section.
"""

import json
import posixpath
import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import quote

from harness.record.run import Record
from harness.report import build_tables, columns, figure_data, figures, headline, hub_scores, page, usage
from harness.report.blocks import filled
from harness.report.claims import judged_claims
from harness.report.evidence import Evidence
from harness.report.gather import gather
from harness.report.pieces import Link, paragraphs
from harness.report.sections import section
from harness.suite.load import narrowed
from harness.suite.schema import Suite


def generated_files(
    suite: Suite, records: Sequence[Record], *, results_dir: str, pages: Mapping[str, bytes], is_drawn: bool = True
) -> dict[str, bytes]:
    """Every generated file: path from the project's root -> bytes.

    `results_dir` is the results folder and the keys of `pages` are the Markdown files whose blocks are to be
    filled, all as POSIX paths from the root. With `is_drawn` false, figures are only marked with what they show, which
    is all that `stale_files` needs.
    """
    evidence = gather(suite, records, results_dir)
    folder = f"reports/{suite.name}"
    drawn = figures.drawn_files(evidence) if is_drawn else figures.undrawn_files(evidence)
    files = {
        **_card_files(evidence, f"{folder}/", _linker(f"{folder}/README.md"), drawn),
        **{f"{folder}/{name}": data for name, data in drawn.items()},
    }
    for path, text in pages.items():
        blocks = {name: partial(block, evidence, _linker(path)) for name, (_, block) in BLOCKS.items()}
        files[path] = filled(path, text, suite.name, blocks)
    return files


def variant_card(
    suite: Suite, records: Sequence[Record], variant: str, *, results_dir: str, repo: str
) -> dict[str, bytes]:
    """The card of one variant as the root of a repository on the hub has it: path in the repository -> bytes.

    `repo` is the repository's id, and the records that the card cites lie in it under `results_dir`.
    """
    evidence = gather(narrowed(suite, variant), records, results_dir, repo)
    folder = f"reports/{suite.name}/"

    def link(path: str) -> str:
        return quote(f"{_FIGURES}/{path.removeprefix(folder)}" if path.startswith(folder) else path)

    drawn = figures.drawn_files(evidence)
    return {
        **_card_files(evidence, "", link, drawn),
        **{f"{_FIGURES}/{name}": data for name, data in drawn.items()},
    }


_FIGURES = "figures"


def _card_files(evidence: Evidence, folder: str, link: Link, drawn: Mapping[str, bytes]) -> dict[str, bytes]:
    """The card and its page under `folder`, which ends with a slash or is empty."""
    return {
        f"{folder}README.md": written(evidence, link).encode(),
        f"{folder}index.html": page.page(_title(evidence), _card(evidence, link), drawn),
    }


def written(evidence: Evidence, link: Link) -> str:
    """The card as Markdown: metadata, a mark that says what it is a card of, and all its sections."""
    of = [f"suite={evidence.suite.name}"]
    if evidence.repo is not None:
        of += [f"variant={next(iter(evidence.suite.variants))}", f"repo={evidence.repo}"]
    return f"{_front_matter(evidence)}\n\n<!-- harness:card {' '.join(of)} -->\n\n{_card(evidence, link)}"


def stale_files(rendered: Mapping[str, bytes], root: Path) -> list[str]:
    """The files under `root` that are missing or do not say what the records say."""
    return [path for path, data in rendered.items() if not _says(root / path, data)]


def write_files(rendered: Mapping[str, bytes], root: Path) -> list[str]:
    """Bring the stale files up to date, each replaced in one step; returns their paths."""
    outdated = stale_files(rendered, root)
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
    present = path.read_bytes()
    if path.suffix == ".html":
        return page.comparable(present) == page.comparable(data)
    digest = figure_data.embedded_digest(data)
    return present == data if digest is None else figure_data.embedded_digest(present) == digest


# -- Pages -------------------------------------------------------------------------------------------------------


def _linker(document: str) -> Link:
    folder = posixpath.dirname(document)
    return lambda path: quote(posixpath.relpath(path, folder or "."))


def _title(evidence: Evidence) -> str:
    suite = evidence.suite
    return suite.title if evidence.repo is None else f"{suite.title}: {next(iter(suite.variants))}"


def _card(evidence: Evidence, link: Link) -> str:
    suite = evidence.suite
    headed = ((heading and f"## {heading}", block(evidence, link)) for heading, block in BLOCKS.values())
    source = suite.source.location + (f" at revision {suite.source.revision}" if suite.source.revision else "")
    return (
        paragraphs(
            f"# {columns.escape(_title(evidence))}",
            suite.description and suite.description.strip(),
            f"NVFP4 quantization of `{source}`. Every number is computed from the raw records that its row links to; "
            "`harness trace` resolves them.",
            *chain.from_iterable(headed),
        )
        + "\n"
    )


def _front_matter(evidence: Evidence) -> str:
    """The metadata that the model hub reads; keys that the suite leaves open are left out, not guessed."""
    suite, built = evidence.suite, evidence.records["build"]
    base_model = hub_scores.base_model_of(suite)
    metadata: dict[str, str | list[Any] | None] = {
        "license": suite.source.license,
        "base_model": base_model,
        "base_model_relation": "quantized" if base_model else None,
        "library_name": "transformers",
        "pipeline_tag": ("image-text-to-text" if build_tables.has_vision(built) else "text-generation")
        if built
        else None,
        "tags": ["nvfp4", "compressed-tensors", "deltanet"],
        "datasets": build_tables.calibration_datasets(built),
        "model-index": hub_scores.model_index(evidence, next(iter(suite.variants))) if evidence.repo else None,
    }
    # JSON strings and lists of printable characters are YAML.
    lines = [
        f"{key}: {json.dumps(value, ensure_ascii=not str(value).isprintable())}"
        for key, value in metadata.items()
        if value
    ]
    return "\n".join(("---", *lines, "---"))


def _headline(evidence: Evidence, link: Link) -> str:
    return headline.headline(evidence, link, judged_claims(evidence.suite, evidence.chosen))


# What a page may ask for by name, under the heading that it has in the card.
BLOCKS: dict[str, tuple[str | None, Callable[[Evidence, Link], str]]] = {
    "headline": (None, _headline),
    "figure": (None, section("figure")),
    "size": ("What is quantized and what is kept", section("size")),
    "method": ("Method and calibration", section("method")),
    "roundtrip": ("Round-trip error", section("roundtrip")),
    "sensitivity": ("Sensitivity", section("sensitivity")),
    "perplexity": ("Perplexity", section("perplexity")),
    "fidelity": ("Fidelity", section("fidelity")),
    "tasks": ("Tasks", section("tasks")),
    "decode": ("Decode speed", section("decode")),
    "prefill": ("Prefill speed", section("prefill")),
    "memory": ("Memory", section("memory")),
    "served": ("Served elsewhere", section("served")),
    "usage": ("Usage", usage.usage),
    "presets": ("Sampling presets", usage.presets),
    "limits": ("Known limits", usage.known_limits),
    "reproduce": ("How to reproduce", section("reproduce")),
    "runs": ("Provenance", section("runs")),
}
