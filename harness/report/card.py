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
from harness.record.stats import Estimate
from harness.report import build_tables, export, figure_data, page, sections, speed_tables, task_tables
from harness.report.blocks import filled
from harness.report.claims import judged_claims
from harness.report.evidence import Evidence, gather
from harness.report.sections import Link, paragraphs, reference, section
from harness.report.tables import AT_NOISE, NO_INTERVAL, NO_INTERVAL_MARK, cell_text, escape, runs_of
from harness.suite.load import narrowed
from harness.suite.names import SOURCE
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
    drawn = drawn_files(evidence) if is_drawn else _undrawn_files(evidence)
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

    drawn = drawn_files(evidence)
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


# -- Figures -----------------------------------------------------------------------------------------------------


def drawn_files(evidence: Evidence) -> dict[str, bytes]:
    """The files of every figure that there is something for: "NAME.svg" and "NAME.png" -> bytes."""
    from harness.report.drawings import DRAWINGS
    from harness.report.plots import image_files

    made: dict[str, bytes] = {}
    for name, what in evidence.figures.items():
        made |= image_files(name, [what], partial(DRAWINGS[name], what))
    return made


def _undrawn_files(evidence: Evidence) -> dict[str, bytes]:
    """The same names, and in place of each drawing the mark that its file carries. It tells whether a file is stale, in
    a fraction of the time."""
    marks = {name: figure_data.mark_of([what]).encode() for name, what in evidence.figures.items()}
    return {f"{name}.{kind}": mark for name, mark in marks.items() for kind in ("svg", "png")}


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
            f"# {escape(_title(evidence))}",
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
    base_model = export.base_model_of(suite)
    sees = any(build_tables.has_role(one, "visual") for one in built.values())
    pipeline = "image-text-to-text" if sees else "text-generation"
    metadata: dict[str, str | list[Any] | None] = {
        "license": suite.source.license,
        "base_model": base_model,
        "base_model_relation": "quantized" if base_model else None,
        "library_name": "transformers",
        "pipeline_tag": pipeline if built else None,
        "tags": ["nvfp4", "compressed-tensors", "deltanet"],
        "datasets": build_tables.calibration_datasets(built),
        "model-index": export.model_index(evidence, next(iter(suite.variants))) if evidence.repo else None,
    }
    # JSON strings and lists of printable characters are YAML.
    lines = [
        f"{key}: {json.dumps(value, ensure_ascii=not str(value).isprintable())}"
        for key, value in metadata.items()
        if value
    ]
    return "\n".join(("---", *lines, "---"))


# -- Headline ------------------------------------------------------------------------------------------------------


def _headline(evidence: Evidence, link: Link) -> str:
    """One line per variant: what it weighs, what it loses, how fast it decodes, each with the run that says so."""
    lines = []
    for name, variant in evidence.suite.variants.items():
        parts = [
            part(evidence, name) for part in (_size_words, _perplexity_words, _kl_words, _task_words, _decode_words)
        ]
        said = "; ".join(
            f"{words} {' '.join(reference(evidence, link, record) for record in records)}"
            for words, records in filter(None, parts)
        )
        lines.append(f"- **{name}** ({escape(variant.recipe)}): {said or 'not measured yet'}.")
    marked = any(NO_INTERVAL_MARK in line for line in lines)
    return paragraphs("\n".join(lines), _claim_lines(evidence, link), NO_INTERVAL if marked else None)


def _claim_lines(evidence: Evidence, link: Link) -> str:
    """One line for every claim of the suite that the records support, with the runs that support it."""
    by_id = {record.run.run_id: record for record in evidence.chosen}
    return "\n".join(
        f"- {claim.sentence}: {escape(claim.reason)} "
        f"{' '.join(reference(evidence, link, by_id[run]) for run in claim.runs if run in by_id)}."
        for claim in judged_claims(evidence.suite, evidence.chosen)
        if claim.supported
    )


_Words = tuple[str, tuple[Record, ...]] | None  # what runs say of a variant


def _size_words(evidence: Evidence, variant: str) -> _Words:
    row = evidence.tables["totals"].row(variant=variant)
    if row is None:
        return None
    share, output, source = (cell_text(key, row[key]) for key in ("bytes_share", "output_bytes", "source_bytes"))
    return f"{output} of {source} ({share})", (evidence.records["build"][variant],)


def _perplexity_words(evidence: Evidence, variant: str) -> _Words:
    row = evidence.tables["perplexity"].row(variant=variant, protocol=evidence.protocol)
    base = evidence.tables["perplexity"].row(variant=SOURCE, protocol=evidence.protocol)
    if row is None or evidence.protocol is None:
        return None
    runs = (evidence.perplexities[evidence.protocol][variant],)
    kind = "perplexity" if row["unit"] == "token" else f"{row['unit']} perplexity"
    words = f"{kind} {cell_text('ppl', row['ppl'])}"
    loss = row["delta_log_ppl"]
    if base is None or not isinstance(loss, Estimate):
        return f"{words} ({f'Δ {loss}' if loss == AT_NOISE else loss})", runs
    change = cell_text("relative_change_ratio", row["relative_change_ratio"])
    against = cell_text("ppl", base["ppl"])
    return f"{words} against {against} ({change}; Δ log-perplexity {cell_text('delta_log_ppl', loss)})", runs


def _kl_words(evidence: Evidence, variant: str) -> _Words:
    row = evidence.tables["fidelity"].row(variant=variant)
    if row is None:
        return None
    unit = " nats" if isinstance(row["kl"], Estimate) else ""
    return f"KL to the source {cell_text('kl', row['kl'])}{unit}", (evidence.records["fidelity"][variant],)


def _task_words(evidence: Evidence, variant: str) -> _Words:
    """All tasks together, or the only one."""
    rows = [row for row in evidence.tables["tasks"].rows if row["variant"] == variant]
    row = next((row for row in rows if row["task"] == task_tables.ALL_TASKS), rows[0] if len(rows) == 1 else None)
    if row is None or not isinstance(row["delta_score"], Estimate):
        return None
    change = cell_text("delta_score", row["delta_score"])
    return f"tasks {change} ({row['metric'] if len(rows) > 1 else row['task']})", runs_of(row["run"])


def _decode_words(evidence: Evidence, variant: str) -> _Words:
    decoded = evidence.tables["decode"]
    if not decoded:
        return None
    row = speed_tables.single_user(decoded).row(variant=variant) or speed_tables.by_depth(decoded).row(variant=variant)
    if row is None:
        return None
    speed, ratio = cell_text("tokens_per_second", row["tokens_per_second"]), row["speed_ratio"]
    other = "the source" if row["versus"] == SOURCE else row["versus"]
    relation = f"{cell_text('speed_ratio', ratio)} × {other}" if isinstance(ratio, Estimate) else ratio
    record = evidence.records["bench"][variant]
    caveat = "; no NVFP4 kernel" if (record.run.engine or {}).get("name") == "torch" else ""
    return f"decode {speed} tok/s at batch 1 ({relation or f'not measured for {other}'}{caveat})", (record,)


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
    "usage": ("Usage", sections.usage),
    "presets": ("Sampling presets", sections.presets),
    "limits": ("Known limits", sections.known_limits),
    "reproduce": ("How to reproduce", section("reproduce")),
    "runs": ("Provenance", section("runs")),
}
