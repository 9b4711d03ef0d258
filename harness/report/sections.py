"""The sections of a card: each a piece of Markdown about one question, and the block of that name in other pages."""

import shlex
from collections.abc import Callable
from functools import partial

import pandas as pd

from harness.record.stats import RESAMPLES, Estimate
from harness.report import columns, tables
from harness.report.evidence import OPTIONAL, Evidence, row_of
from harness.suite import NOISE, SOURCE

Link = Callable[[str], str]  # a path from the project's root -> its URL from where the text stands


def _headline(evidence: Evidence, link: Link) -> str:
    """One line per variant: what it weighs, what it loses, how fast it decodes."""
    lines = []
    for name, variant in evidence.suite.variants.items():
        parts = [part(evidence, name) for part in (_size_words, _perplexity_words, _decode_words)]
        said = "; ".join(part for part in parts if part) or "not measured yet"
        lines.append(f"- **{name}** ({columns.escape(variant.recipe)}): {said}.")
    return "\n".join(lines)


def _size_words(evidence: Evidence, variant: str) -> str | None:
    row = row_of(evidence.frames["size"], variant=variant, role="total")
    if row is None:
        return None
    show = columns.shown
    share = show("bytes_share", row["bytes_share"])
    output, source = (show(key, row[key]) for key in ("output_bytes", "source_bytes"))
    return f"{output} of {source} ({share})"


def _perplexity_words(evidence: Evidence, variant: str) -> str | None:
    row = row_of(evidence.frames["perplexity"], variant=variant, protocol=evidence.protocol)
    base = row_of(evidence.frames["perplexity"], variant=SOURCE, protocol=evidence.protocol)
    if row is None:
        return None
    kind = "perplexity" if row["unit"] == "token" else f"{row['unit']} perplexity"
    words = f"{kind} {columns.shown('ppl', row['ppl'])}"
    loss = row["delta_log_ppl"]
    if base is None or not isinstance(loss, Estimate):
        return f"{words} ({f'Δ {loss}' if loss == tables.AT_NOISE else loss})"
    change = columns.shown("relative_change_ratio", row["relative_change_ratio"])
    against = columns.shown("ppl", base["ppl"])
    return f"{words} against {against} ({change}; Δ log-perplexity {columns.shown('delta_log_ppl', loss)})"


def _decode_words(evidence: Evidence, variant: str) -> str | None:
    row = row_of(evidence.frames["decode"], variant=variant, batch=1)
    if row is None:
        return None
    speed = columns.shown("tokens_per_second", row["tokens_per_second"])
    ratio = row["speed_ratio"]
    relation = f"{columns.shown('speed_ratio', ratio)} × the source" if isinstance(ratio, Estimate) else ratio
    return f"decode {speed} tok/s at batch 1 ({relation or 'not measured for the source'})"


def _table(evidence: Evidence, link: Link, frame: pd.DataFrame) -> str:
    return columns.markdown(frame, lambda record: link(evidence.record_path(record)))


def _no_record(evidence: Evidence, measure: str) -> str | None:
    """Which variants a measure has no run of, and what to do; None if it has them all."""
    quantized = tuple(evidence.suite.variants)
    of_the_source = () if measure in ("build", "verify", "fidelity") else (SOURCE,)
    expected = of_the_source if measure in OPTIONAL else (*of_the_source, *quantized)
    missing = [variant for variant in expected if variant not in evidence.records[measure]]
    if not missing:
        return None
    of = "" if len(missing) == len(expected) else f" of {', '.join(f'`{variant}`' for variant in missing)}"
    return f"No record yet{of}: run `nox -s {measure}`."


def paragraphs(*parts: str | None) -> str:
    """Markdown of several parts, those that there are."""
    return "\n\n".join(part for part in parts if part)


def _size(evidence: Evidence, link: Link) -> str:
    frame = evidence.frames["size"]
    return paragraphs(None if frame.empty else _table(evidence, link, frame), _no_record(evidence, "build"))


def _roundtrip(evidence: Evidence, link: Link) -> str:
    frame, findings = evidence.frames["roundtrip"], evidence.frames["findings"]
    clean = [name for name, record in evidence.records["verify"].items() if not record.kind("finding")]
    return paragraphs(
        None if frame.empty else _table(evidence, link, frame),
        f"`harness verify` finds nothing to object to in {', '.join(f'`{name}`' for name in clean)}."
        if clean
        else None,
        None if findings.empty else _table(evidence, link, findings),
        _no_record(evidence, "verify"),
    )


def _sensitivity(evidence: Evidence, link: Link) -> str:
    frame = evidence.frames["sensitivity"]
    if frame.empty:
        return paragraphs(_no_record(evidence, "sensitivity"))
    folder = f"reports/{evidence.suite.name}"
    image = "Layer error by layer, projection and format"
    return paragraphs(
        " ".join(tables.sensitivity_words(frame)),
        f"[![{image}]({link(f'{folder}/sensitivity.png')})]({link(f'{folder}/sensitivity.svg')})",
        _table(evidence, link, frame),
        "Round-to-nearest with nothing else quantized, on the calibration samples. The layer error is the energy of "
        "what one group in that format changes at the end of its half of the decoder layer (attention or DeltaNet; MLP "
        "or experts), over the energy of what that half adds to the hidden states: the median over layers, and in "
        "brackets the layer where it is largest. The last column adds up what FP8 would take away from it in all "
        "layers. How much the loss depends on a half is not in these numbers.",
    )


def _perplexity(evidence: Evidence, link: Link) -> str:
    if evidence.suite.ppl is None:
        return "The suite measures no perplexity."
    frame = evidence.frames["perplexity"]
    if frame.empty:
        return "No record yet: run `nox -s ppl`."
    units = set(frame["unit"])
    return paragraphs(
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


def _no_perplexity(evidence: Evidence) -> str | None:
    """Which variants have no run by which protocol; None if none is missing."""
    protocols = evidence.suite.ppl.protocols if evidence.suite.ppl else ()
    missing = [
        f"`{variant}`" + (f" by {protocol}" if len(protocols) > 1 else "")
        for protocol in protocols
        for variant in (SOURCE, *evidence.suite.variants)
        if variant not in evidence.perplexities.get(protocol, {})
    ]
    return f"No record yet of {', '.join(missing)}: run `nox -s ppl`." if missing else None


def _fidelity(evidence: Evidence, link: Link) -> str:
    if evidence.suite.fidelity is None:
        return "The suite measures no fidelity."
    frame, bands = evidence.frames["fidelity"], evidence.frames["bands"]
    if frame.empty:
        return paragraphs(_no_record(evidence, "fidelity"))
    noise = evidence.records["fidelity"].keys() & set(NOISE)
    return paragraphs(
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


def _tasks(evidence: Evidence, link: Link) -> str:
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
    return paragraphs(
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


def _decode(evidence: Evidence, link: Link) -> str:
    frame = evidence.frames["decode"]
    if frame.empty:
        return paragraphs(_no_record(evidence, "bench"))
    single = frame[frame["batch"] == 1].drop(columns="user_tokens_per_second")
    curve = frame.drop(columns=["ceiling_tokens_per_second", "ceiling_share"]).sort_values("batch", kind="stable")
    return paragraphs(
        None if single.empty else f"**One user**\n\n{_table(evidence, link, single)}",
        f"**By batch size**, in total and for each user\n\n{_table(evidence, link, curve)}",
        "Speeds are medians over repetitions with exact order-statistic intervals. The ratio is of runs of one "
        "session, its interval over the engine's starts, since repetitions of one start are alike (of a single start: "
        "over repetitions, by the exact Mann-Whitney test). The ceiling is memory bandwidth over the bytes that a step "
        "moves (weights, states, the prompt's keys and values), and a dash where the bandwidth is unknown.",
        _kernels(evidence),
        _no_record(evidence, "bench"),
    )


def _kernels(evidence: Evidence) -> str:
    """What computed each variant's layers, and a warning where that is not the format of its weights."""
    engines = {name: record.run.engine or {} for name, record in evidence.records["bench"].items()}
    lines = []
    for name, engine in engines.items():
        layers: dict[str, list[str]] = {}
        for layer, kernel in engine.get("kernels", {}).items():
            layers.setdefault(kernel, []).append(layer)
        lines += [
            f"- `{name}`: {columns.escape(kernel)} ({', '.join(f'`{one}`' for one in those)})"
            for kernel, those in layers.items()
        ]
    torch = any(engine.get("name") == "torch" for engine in engines.values())
    return paragraphs(
        "Kernels that ran:\n\n" + "\n".join(lines) if lines else None,
        "**The torch engine decompresses quantized weights to BF16 before it computes, on every device. Its decode "
        "speed says nothing about NVFP4 kernels.**"
        if torch
        else None,
    )


def _prefill(evidence: Evidence, link: Link) -> str:
    frame = evidence.frames["prefill"]
    return paragraphs(None if frame.empty else _table(evidence, link, frame), _no_record(evidence, "bench"))


def _memory(evidence: Evidence, link: Link) -> str:
    frame = evidence.frames["memory"]
    return paragraphs(None if frame.empty else _table(evidence, link, frame), _no_record(evidence, "bench"))


def _figure(evidence: Evidence, link: Link) -> str:
    folder = f"reports/{evidence.suite.name}"
    alternative = "Checkpoint size, loss of log-perplexity and decode step times of every variant beside the source"
    return f"[![{alternative}]({link(f'{folder}/overview.png')})]({link(f'{folder}/overview.svg')})"


def _reproduce(evidence: Evidence, link: Link) -> str:
    commands = dict.fromkeys(shlex.join(record.run.command) for record in evidence.chosen)
    if not commands:
        return "No record yet."
    return paragraphs(
        "```sh\n" + "\n".join(commands) + "\n```",
        "These are the commands that made the runs below. In a checkout each subcommand is also a nox session that "
        "installs what it needs: `python -m pip install nox`, then for example `python -m nox -s ppl -- --suite FILE`. "
        "`harness report` then rewrites this page.",
    )


def _runs(evidence: Evidence, link: Link) -> str:
    frame = evidence.frames["runs"]
    if frame.empty:
        return "No record yet."
    artifacts = frame[["variant", "artifact"]].drop_duplicates()
    changed = artifacts["variant"][artifacts["variant"].duplicated()].unique()
    return paragraphs(
        _table(evidence, link, frame),
        *(
            f"**The runs of `{variant}` are not all of one artifact: measure again what is of an older one.**"
            for variant in changed
        ),
    )


# What a page may ask for by name, under the heading that it has in the card.
BLOCKS: dict[str, tuple[str | None, Callable[[Evidence, Link], str]]] = {
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


def bound(evidence: Evidence, link: Link) -> dict[str, Callable[[], str]]:
    """The blocks of one suite for one page, by the name that the page asks for."""
    return {name: partial(block, evidence, link) for name, (_, block) in BLOCKS.items()}
