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
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pandas as pd

from harness.record.results import Record
from harness.record.stats import RESAMPLES, Estimate
from harness.report import evaluations, fidelities, plots, tables
from harness.report.blocks import filled
from harness.suite import NOISE, SOURCE, Suite

MEASURES = ("build", "verify", "ppl", "fidelity", "bench")  # in the order in which they run; each is also a nox session
OPTIONAL = ("sensitivity",)  # of the source alone; a card has the block of that name only where there is a record

Link = Callable[[str], str]  # a path from the project's root -> its URL from where the text stands


@dataclass(frozen=True)
class _Evidence:
    """A suite and the runs that speak for it, with every frame computed once."""

    suite: Suite
    results_dir: str
    records: Mapping[str, tables.Records]  # measure -> variant -> record; all but perplexities and tasks
    perplexities: tables.ByProtocol  # protocol -> variant -> record
    tasks: evaluations.ByTask  # task -> variant -> record
    frames: Mapping[str, pd.DataFrame]

    @property
    def chosen(self) -> list[Record]:
        """Every run that speaks on the card."""
        measured = (*self.records.values(), *self.perplexities.values(), *self.tasks.values())
        return [record for runs in measured for record in runs.values()]

    @property
    def protocol(self) -> str | None:
        """Of the perplexities that stand where there is room for one: the suite's first."""
        return self.suite.ppl.protocols[0] if self.suite.ppl else None

    def record_path(self, record: Record) -> str:
        return posixpath.join(self.results_dir, record.path.parent.name, record.path.name)


def render(
    suite: Suite, records: Sequence[Record], *, results_dir: str, pages: Mapping[str, bytes]
) -> dict[str, bytes]:
    """Every generated file: path from the project's root -> bytes.

    `results_dir` is the results folder and the keys of `pages` are the Markdown files whose blocks are to be
    filled, all as POSIX paths from the root.
    """
    evidence = _gather(suite, records, results_dir)
    folder = f"reports/{suite.name}"
    card = f"{folder}/README.md"
    return {
        card: _card(evidence, _linker(card)).encode(),
        **{f"{folder}/{name}": data for name, data in _figure_files(evidence).items()},
        **{page: filled(page, text, suite.name, _blocks(evidence, _linker(page))) for page, text in pages.items()},
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


def _gather(suite: Suite, records: Sequence[Record], results_dir: str) -> _Evidence:
    variants = suite.rows()
    chosen = {
        measure: tables.newest(records, suite.name, measure, (*variants, *NOISE))
        for measure in (*MEASURES, *OPTIONAL)
        if measure != "ppl"
    }
    protocols = suite.ppl.protocols if suite.ppl else ()
    perplexities = tables.newest_by_protocol(records, suite.name, protocols, variants)
    tasks = evaluations.newest(records, suite, variants)
    frames = {
        "size": tables.size(chosen["build"]),
        "roundtrip": tables.roundtrip(chosen["verify"]),
        "findings": tables.findings(chosen["verify"]),
        "sensitivity": tables.sensitivity(chosen["sensitivity"]),
        "perplexity": tables.perplexity(perplexities, fidelities.log_ppl_floor(chosen["fidelity"], perplexities)),
        "fidelity": fidelities.divergences(chosen["fidelity"]),
        "bands": fidelities.bands(chosen["fidelity"]),
        "decode": tables.decode(chosen["bench"]),
        "prefill": tables.prefill(chosen["bench"]),
        "memory": tables.memory(chosen["bench"]),
        "tasks": evaluations.scores(tasks),
        "answers": evaluations.answers(tasks),
    }
    evidence = _Evidence(suite, results_dir, chosen, perplexities, tasks, frames)
    return replace(evidence, frames={**frames, "runs": tables.runs(evidence.chosen)})


# -- Blocks: each a piece of Markdown about one question -----------------------------------------------------------


def _headline(evidence: _Evidence, link: Link) -> str:
    """One line per variant: what it weighs, what it loses, how fast it decodes."""
    lines = []
    for name, variant in evidence.suite.variants.items():
        parts = [part(evidence, name) for part in (_size_words, _perplexity_words, _decode_words)]
        said = "; ".join(part for part in parts if part) or "not measured yet"
        lines.append(f"- **{name}** ({tables.escape(variant.recipe)}): {said}.")
    return "\n".join(lines)


def _row(frame: pd.DataFrame, **wanted: object) -> dict[str, object] | None:
    """The first row with the wanted values, if there is one."""
    for row in frame.to_dict("records"):
        if all(row[key] == value for key, value in wanted.items()):
            return {str(key): value for key, value in row.items()}
    return None


def _size_words(evidence: _Evidence, variant: str) -> str | None:
    row = _row(evidence.frames["size"], variant=variant, role="total")
    if row is None:
        return None
    show = tables.shown
    share = show("bytes_share", row["bytes_share"])
    output, source = (show(key, row[key]) for key in ("output_bytes", "source_bytes"))
    return f"{output} of {source} ({share})"


def _perplexity_words(evidence: _Evidence, variant: str) -> str | None:
    row = _row(evidence.frames["perplexity"], variant=variant, protocol=evidence.protocol)
    base = _row(evidence.frames["perplexity"], variant=SOURCE, protocol=evidence.protocol)
    if row is None:
        return None
    kind = "perplexity" if row["unit"] == "token" else f"{row['unit']} perplexity"
    words = f"{kind} {tables.shown('ppl', row['ppl'])}"
    loss = row["delta_log_ppl"]
    if base is None or not isinstance(loss, Estimate):
        return f"{words} ({f'Δ {loss}' if loss == tables.AT_NOISE else loss})"
    change = tables.shown("relative_change_ratio", row["relative_change_ratio"])
    against = tables.shown("ppl", base["ppl"])
    return f"{words} against {against} ({change}; Δ log-perplexity {tables.shown('delta_log_ppl', loss)})"


def _decode_words(evidence: _Evidence, variant: str) -> str | None:
    row = _row(evidence.frames["decode"], variant=variant, batch=1)
    if row is None:
        return None
    speed = tables.shown("tokens_per_second", row["tokens_per_second"])
    ratio = row["speed_ratio"]
    relation = f"{tables.shown('speed_ratio', ratio)} × the source" if isinstance(ratio, Estimate) else ratio
    return f"decode {speed} tok/s at batch 1 ({relation or 'not measured for the source'})"


def _table(evidence: _Evidence, link: Link, frame: pd.DataFrame) -> str:
    return tables.markdown(frame, lambda record: link(evidence.record_path(record)))


def _no_record(evidence: _Evidence, measure: str) -> str | None:
    """Which variants a measure has no run of, and what to do; None if it has them all."""
    quantized = tuple(evidence.suite.variants)
    of_the_source = () if measure in ("build", "verify", "fidelity") else (SOURCE,)
    expected = of_the_source if measure in OPTIONAL else (*of_the_source, *quantized)
    missing = [variant for variant in expected if variant not in evidence.records[measure]]
    if not missing:
        return None
    of = "" if len(missing) == len(expected) else f" of {', '.join(f'`{variant}`' for variant in missing)}"
    return f"No record yet{of}: run `nox -s {measure}`."


def _paragraphs(*parts: str | None) -> str:
    return "\n\n".join(part for part in parts if part)


def _size(evidence: _Evidence, link: Link) -> str:
    frame = evidence.frames["size"]
    return _paragraphs(None if frame.empty else _table(evidence, link, frame), _no_record(evidence, "build"))


def _roundtrip(evidence: _Evidence, link: Link) -> str:
    frame, findings = evidence.frames["roundtrip"], evidence.frames["findings"]
    clean = [name for name, record in evidence.records["verify"].items() if not record.kind("finding")]
    return _paragraphs(
        None if frame.empty else _table(evidence, link, frame),
        f"`harness verify` finds nothing to object to in {', '.join(f'`{name}`' for name in clean)}."
        if clean
        else None,
        None if findings.empty else _table(evidence, link, findings),
        _no_record(evidence, "verify"),
    )


def _sensitivity(evidence: _Evidence, link: Link) -> str:
    frame = evidence.frames["sensitivity"]
    if frame.empty:
        return _paragraphs(_no_record(evidence, "sensitivity"))
    folder = f"reports/{evidence.suite.name}"
    image = "Layer error by layer, projection and format"
    return _paragraphs(
        " ".join(tables.sensitivity_words(frame)),
        f"[![{image}]({link(f'{folder}/sensitivity.png')})]({link(f'{folder}/sensitivity.svg')})",
        _table(evidence, link, frame),
        "Round-to-nearest with nothing else quantized, on the calibration samples. The layer error is the energy of "
        "what one group in that format changes at the end of its half of the decoder layer (attention or DeltaNet; MLP "
        "or experts), over the energy of what that half adds to the hidden states: the median over layers, and in "
        "brackets the layer where it is largest. The last column adds up what FP8 would take away from it in all "
        "layers. How much the loss depends on a half is not in these numbers.",
    )


def _perplexity(evidence: _Evidence, link: Link) -> str:
    if evidence.suite.ppl is None:
        return "The suite measures no perplexity."
    frame = evidence.frames["perplexity"]
    if frame.empty:
        return "No record yet: run `nox -s ppl`."
    units = set(frame["unit"])
    return _paragraphs(
        _table(evidence, link, frame),
        "Δ is paired: variant and source scored the same tokens, and their difference is taken window by window. The "
        f"interval is a bootstrap over blocks of neighbouring windows ({RESAMPLES:,} resamples)."
        if "token" in units
        else None,
        "Where PPL is per word, Δ is per word too, its pairs are documents, and the bootstrap is over documents."
        if "word" in units
        else None,
        _no_perplexity(evidence),
    )


def _no_perplexity(evidence: _Evidence) -> str | None:
    """Which variants have no run by which protocol; None if none is missing."""
    protocols = evidence.suite.ppl.protocols if evidence.suite.ppl else ()
    missing = [
        f"`{variant}`" + (f" by {protocol}" if len(protocols) > 1 else "")
        for protocol in protocols
        for variant in (SOURCE, *evidence.suite.variants)
        if variant not in evidence.perplexities.get(protocol, {})
    ]
    return f"No record yet of {', '.join(missing)}: run `nox -s ppl`." if missing else None


def _fidelity(evidence: _Evidence, link: Link) -> str:
    if evidence.suite.fidelity is None:
        return "The suite measures no fidelity."
    frame, bands = evidence.frames["fidelity"], evidence.frames["bands"]
    if frame.empty:
        return _paragraphs(_no_record(evidence, "fidelity"))
    noise = evidence.records["fidelity"].keys() & set(NOISE)
    return _paragraphs(
        _table(evidence, link, frame),
        "KL(source ‖ variant) of every next-token prediction: its mean with a bootstrap over blocks of windows, and "
        "its percentiles over single predictions. RMS Δp is the root mean square of what the probability of the token "
        "that came has changed by.",
        "The `noise-` rows are the source beside itself: in a second pass, in another batch, on another engine. What "
        f"does not exceed them prints as {tables.AT_NOISE}."
        if noise
        else "**There is no noise floor yet: `nox -s fidelity` measures the source beside itself.**",
        None if bands.empty else f"**By the tokens before**\n\n{_table(evidence, link, bands)}",
        _no_record(evidence, "fidelity"),
    )


def _tasks(evidence: _Evidence, link: Link) -> str:
    if not evidence.suite.tasks:
        return "The suite has no tasks."
    missing = [
        f"`{variant}` in `{label}`"
        for label in evidence.suite.tasks
        for variant in (SOURCE, *evidence.suite.variants)
        if variant not in evidence.tasks.get(label, {})
    ]
    no_record = f"No record yet of {', '.join(missing)}: run `nox -s tasks`." if evidence.tasks else None
    if evidence.frames["tasks"].empty:
        return "No record yet: run `nox -s tasks`."
    answers = evidence.frames["answers"]
    return _paragraphs(
        _table(evidence, link, evidence.frames["tasks"]),
        "Scores and standard errors are lm-eval's own. Δ is paired: variant and source answered the same prompts. Its "
        "interval is Tango's for answers that are right or wrong, and otherwise a bootstrap over documents "
        f"({RESAMPLES:,} resamples). Lost and won count the items that only the source, and only the variant, gets "
        "right; p is of no difference at all (McNemar's exact test or a permutation), by Holm over all tasks.",
        None if answers.empty else f"**Generated answers**\n\n{_table(evidence, link, answers)}",
        None
        if answers.empty
        else "An answer is cut off at the most new tokens that it may have; unclosed is a thought without its end, not "
        "found an answer that the task's filters do not see in the text. A run with too many of any of these is "
        "invalid and compared with nothing. Seconds are those of the whole run, answers of a batch together.",
        no_record if missing else None,
    )


def _decode(evidence: _Evidence, link: Link) -> str:
    frame = evidence.frames["decode"]
    if frame.empty:
        return _paragraphs(_no_record(evidence, "bench"))
    single = frame[frame["batch"] == 1].drop(columns="user_tokens_per_second")
    curve = frame.drop(columns=["ceiling_tokens_per_second", "ceiling_share"]).sort_values("batch", kind="stable")
    return _paragraphs(
        None if single.empty else f"**One user**\n\n{_table(evidence, link, single)}",
        f"**By batch size**, in total and for each user\n\n{_table(evidence, link, curve)}",
        "Speeds are medians over repetitions with exact order-statistic intervals. The ratio is of runs of one "
        "session, its interval over the engine's starts, since repetitions of one start are alike (of a single start: "
        "over repetitions, by the exact Mann-Whitney test). The ceiling is memory bandwidth over the bytes that a step "
        "moves (weights, states, the prompt's keys and values), and a dash where the bandwidth is unknown.",
        _kernels(evidence),
        _no_record(evidence, "bench"),
    )


def _kernels(evidence: _Evidence) -> str:
    """What computed each variant's layers, and a warning where that is not the format of its weights."""
    engines = {name: record.run.engine or {} for name, record in evidence.records["bench"].items()}
    lines = []
    for name, engine in engines.items():
        layers: dict[str, list[str]] = {}
        for layer, kernel in engine.get("kernels", {}).items():
            layers.setdefault(kernel, []).append(layer)
        lines += [
            f"- `{name}`: {tables.escape(kernel)} ({', '.join(f'`{one}`' for one in those)})"
            for kernel, those in layers.items()
        ]
    torch = any(engine.get("name") == "torch" for engine in engines.values())
    return _paragraphs(
        "Kernels that ran:\n\n" + "\n".join(lines) if lines else None,
        "**The torch engine decompresses quantized weights to BF16 before it computes, on every device. Its decode "
        "speed says nothing about NVFP4 kernels.**"
        if torch
        else None,
    )


def _prefill(evidence: _Evidence, link: Link) -> str:
    frame = evidence.frames["prefill"]
    return _paragraphs(None if frame.empty else _table(evidence, link, frame), _no_record(evidence, "bench"))


def _memory(evidence: _Evidence, link: Link) -> str:
    frame = evidence.frames["memory"]
    return _paragraphs(None if frame.empty else _table(evidence, link, frame), _no_record(evidence, "bench"))


def _figure(evidence: _Evidence, link: Link) -> str:
    folder = f"reports/{evidence.suite.name}"
    alternative = "Checkpoint size, loss of log-perplexity and decode step times of every variant beside the source"
    return f"[![{alternative}]({link(f'{folder}/overview.png')})]({link(f'{folder}/overview.svg')})"


def _figure_files(evidence: _Evidence) -> dict[str, bytes]:
    rows = []
    sizes = evidence.frames["size"]
    for variant in (SOURCE, *evidence.suite.variants):
        # Every build read the same source, so any of them tells its size.
        total = _row(sizes, role="total") if variant == SOURCE else _row(sizes, role="total", variant=variant)
        num_bytes = total and total["source_bytes" if variant == SOURCE else "output_bytes"]
        ppl = _row(evidence.frames["perplexity"], variant=variant, protocol=evidence.protocol) or {}
        loss = ppl.get("delta_log_ppl")
        speed = _row(evidence.frames["decode"], variant=variant, batch=1)
        steps: list[float] = []
        if speed and not isinstance(speed["speed_ratio"], str):
            shape = (1, int(str(speed["prompt_tokens"])), int(str(speed["new_tokens"])))
            for sample in tables.by_shape(evidence.records["bench"][variant], "decode")[shape]:
                steps += tables.token_seconds(sample)
        rows.append(
            plots.Row(
                variant,
                num_bytes if isinstance(num_bytes, int) else None,
                loss if isinstance(loss, Estimate) else None,
                tuple(steps),
            )
        )
    return {**plots.overview(rows), **_heat_map(evidence)}


def _heat_map(evidence: _Evidence) -> dict[str, bytes]:
    """The figure of the sensitivities, groups in the order of the table; none without a record."""
    order = {role: place for place, role in enumerate(evidence.frames["sensitivity"].get("role", ()))}
    samples = [one for record in evidence.records["sensitivity"].values() for one in record.kind("sensitivity")]
    cells = [plots.Cell(one["index"], one["role"], one["format"], one["layer_error"]) for one in samples]
    return plots.heat_map(sorted(cells, key=lambda cell: (order[cell.role], cell.layer))) if cells else {}


def _reproduce(evidence: _Evidence, link: Link) -> str:
    commands = dict.fromkeys(shlex.join(record.run.command) for record in evidence.chosen)
    if not commands:
        return "No record yet."
    return _paragraphs(
        "```sh\n" + "\n".join(commands) + "\n```",
        "These are the commands that made the runs below. In a checkout each subcommand is also a nox session that "
        "installs what it needs: `python -m pip install nox`, then for example `python -m nox -s ppl -- --suite FILE`. "
        "`harness report` then rewrites this page.",
    )


def _runs(evidence: _Evidence, link: Link) -> str:
    frame = evidence.frames["runs"]
    if frame.empty:
        return "No record yet."
    artifacts = frame[["variant", "artifact"]].drop_duplicates()
    changed = artifacts["variant"][artifacts["variant"].duplicated()].unique()
    return _paragraphs(
        _table(evidence, link, frame),
        *(
            f"**The runs of `{variant}` are not all of one artifact: measure again what is of an older one.**"
            for variant in changed
        ),
    )


# What a page may ask for by name, under the heading that it has in the card.
BLOCKS: dict[str, tuple[str | None, Callable[[_Evidence, Link], str]]] = {
    "headline": (None, _headline),
    "figure": (None, _figure),
    "size": ("What is quantized and what is kept", _size),
    "roundtrip": ("Round-trip error", _roundtrip),
    "sensitivity": ("Sensitivity", _sensitivity),
    "perplexity": ("Perplexity", _perplexity),
    "fidelity": ("Fidelity", _fidelity),
    "tasks": ("Tasks", _tasks),
    "decode": ("Decode speed", _decode),
    "prefill": ("Prefill speed", _prefill),
    "memory": ("Memory", _memory),
    "reproduce": ("How to reproduce", _reproduce),
    "runs": ("Runs", _runs),
}


def _blocks(evidence: _Evidence, link: Link) -> dict[str, Callable[[], str]]:
    return {name: partial(block, evidence, link) for name, (_, block) in BLOCKS.items()}


# -- Pages -------------------------------------------------------------------------------------------------------


def _linker(document: str) -> Link:
    folder = posixpath.dirname(document)
    return lambda path: posixpath.relpath(path, folder or ".")


def _card(evidence: _Evidence, link: Link) -> str:
    suite = evidence.suite
    sections = [
        _paragraphs(f"## {heading}" if heading else None, block(evidence, link))
        for name, (heading, block) in BLOCKS.items()
        if _is_shown(evidence, name)
    ]
    source = suite.source.location + (f" at revision {suite.source.revision}" if suite.source.revision else "")
    return (
        _paragraphs(
            _front_matter(suite),
            f"# {tables.escape(suite.title)}",
            suite.description and suite.description.strip(),
            f"NVFP4 quantization of `{source}`. Every number is computed from the raw records that its row links to.",
            *sections,
        )
        + "\n"
    )


def _is_shown(evidence: _Evidence, block: str) -> bool:
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
