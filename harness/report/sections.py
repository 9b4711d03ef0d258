"""The sections of a card: each a piece of Markdown about one question, and the block of that name in other pages."""

import json
import shlex
from collections.abc import Callable, Sequence
from functools import partial

import pandas as pd
from tabulate import tabulate

from harness import serve
from harness.record.stats import RESAMPLES, Estimate
from harness.record.store import Record
from harness.report import builds, columns, evaluations, figures, limits, tables
from harness.report.evidence import Evidence, row_of
from harness.report.numbers import format_bytes
from harness.sampling import GREEDY, PRESETS, Sampling
from harness.suite.names import NOISE, SOURCE, row_name
from harness.suite.schema import Suite

Link = Callable[[str], str]  # a path from the project's root -> its URL from where the text stands


def _headline(evidence: Evidence, link: Link) -> str:
    """One line per variant: what it weighs, what it loses, how fast it decodes, each with the run that says so."""
    lines = []
    for name, variant in evidence.suite.variants.items():
        parts = [
            part(evidence, name) for part in (_size_words, _perplexity_words, _kl_words, _task_words, _decode_words)
        ]
        said = "; ".join(
            f"{words} {' '.join(_reference(evidence, link, record) for record in records)}"
            for words, records in filter(None, parts)
        )
        lines.append(f"- **{name}** ({columns.escape(variant.recipe)}): {said or 'not measured yet'}.")
    marked = any(columns.NO_INTERVAL_MARK in line for line in lines)
    return paragraphs("\n".join(lines), columns.NO_INTERVAL if marked else None)


_Words = tuple[str, tuple[Record, ...]] | None  # what runs say of a variant


def _size_words(evidence: Evidence, variant: str) -> _Words:
    row = row_of(evidence.frames["totals"], variant=variant)
    if row is None:
        return None
    share, output, source = (columns.shown(key, row[key]) for key in ("bytes_share", "output_bytes", "source_bytes"))
    return f"{output} of {source} ({share})", (evidence.records["build"][variant],)


def _perplexity_words(evidence: Evidence, variant: str) -> _Words:
    row = row_of(evidence.frames["perplexity"], variant=variant, protocol=evidence.protocol)
    base = row_of(evidence.frames["perplexity"], variant=SOURCE, protocol=evidence.protocol)
    if row is None or evidence.protocol is None:
        return None
    runs = (evidence.perplexities[evidence.protocol][variant],)
    kind = "perplexity" if row["unit"] == "token" else f"{row['unit']} perplexity"
    words = f"{kind} {columns.shown('ppl', row['ppl'])}"
    loss = row["delta_log_ppl"]
    if base is None or not isinstance(loss, Estimate):
        return f"{words} ({f'Δ {loss}' if loss == tables.AT_NOISE else loss})", runs
    change = columns.shown("relative_change_ratio", row["relative_change_ratio"])
    against = columns.shown("ppl", base["ppl"])
    return f"{words} against {against} ({change}; Δ log-perplexity {columns.shown('delta_log_ppl', loss)})", runs


def _kl_words(evidence: Evidence, variant: str) -> _Words:
    row = row_of(evidence.frames["fidelity"], variant=variant)
    if row is None:
        return None
    unit = " nats" if isinstance(row["kl"], Estimate) else ""
    return f"KL to the source {columns.shown('kl', row['kl'])}{unit}", (evidence.records["fidelity"][variant],)


def _task_words(evidence: Evidence, variant: str) -> _Words:
    """All tasks together, or the only one."""
    rows = [row for row in columns.rows_of(evidence.frames["tasks"]) if row["variant"] == variant]
    row = next((row for row in rows if row["task"] == evaluations.ALL_TASKS), rows[0] if len(rows) == 1 else None)
    if row is None or not isinstance(row["delta_score"], Estimate):
        return None
    change = columns.shown("delta_score", row["delta_score"])
    return f"tasks {change} ({row['metric'] if len(rows) > 1 else row['task']})", columns.runs_of(row["run"])


def _decode_words(evidence: Evidence, variant: str) -> _Words:
    decoded = evidence.frames["decode"]
    if decoded.empty:
        return None
    row = row_of(tables.single(decoded), variant=variant) or row_of(tables.by_depth(decoded), variant=variant)
    if row is None:
        return None
    speed, ratio = columns.shown("tokens_per_second", row["tokens_per_second"]), row["speed_ratio"]
    other = "the source" if row["versus"] == SOURCE else row["versus"]
    relation = f"{columns.shown('speed_ratio', ratio)} × {other}" if isinstance(ratio, Estimate) else ratio
    record = evidence.records["bench"][variant]
    caveat = "; no NVFP4 kernel" if (record.run.engine or {}).get("name") == "torch" else ""
    return f"decode {speed} tok/s at batch 1 ({relation or f'not measured for {other}'}{caveat})", (record,)


def _reference(evidence: Evidence, link: Link, record: Record) -> str:
    return f"[{record.run.run_id}]({link(evidence.record_path(record))})"


def _image(evidence: Evidence, link: Link, name: str) -> str | None:
    """A figure that leads to itself without pixels; None where nothing was measured that it could show."""
    if name not in figures.available(evidence):
        return None
    path = f"reports/{evidence.suite.name}/{name}"
    return f"[![{figures.FIGURES[name]}]({link(f'{path}.png')})]({link(f'{path}.svg')})"


def _table(evidence: Evidence, link: Link, frame: pd.DataFrame) -> str:
    return columns.markdown(frame, lambda record: link(evidence.record_path(record)))


def _no_record(evidence: Evidence, measure: str) -> str | None:
    """Which rows that the suite asks for a measure has no run of, and what to do; None if it has them all."""
    suite = evidence.suite
    quantized = tuple(suite.variants)
    expected = {"sensitivity": (SOURCE,), "bench": (SOURCE, *quantized)}.get(measure, quantized)
    left_out: tuple[str, ...] = ()
    if measure == "bench" and suite.bench and suite.bench.variants is not None:
        left_out = tuple(name for name in quantized if name not in suite.bench.variants)
        expected = (SOURCE, *suite.bench.variants)
    expected += tuple(row_name(name, setup) for setup in _setups(suite, measure) for name in expected)
    missing = [row for row in expected if row not in evidence.records[measure]]
    of = "" if len(missing) == len(expected) else f" of {_named(missing)}"
    return paragraphs(
        f"No record yet{of}: run `nox -s {measure}`." if missing else None,
        f"The suite does not measure the speed of {_named(left_out)}." if left_out else None,
    )


def _setups(suite: Suite, measure: str) -> tuple[str, ...]:
    """The setups that a measure is taken in too. They are options of vLLM, so on another engine there are none."""
    wanted = {"ppl": suite.ppl, "fidelity": suite.fidelity, "bench": suite.bench}.get(measure)
    return (wanted.setups if wanted and suite.engine.name == "vllm" else None) or ()


def _named(rows: Sequence[str]) -> str:
    return ", ".join(f"`{row}`" for row in rows)


def paragraphs(*parts: str | None) -> str:
    """Markdown of several parts, those that there are."""
    return "\n\n".join(part for part in parts if part)


def _size(evidence: Evidence, link: Link) -> str:
    totals = evidence.frames["totals"]
    return paragraphs(
        None if totals.empty else _table(evidence, link, totals),
        None if totals.empty else f"**By role**\n\n{_roles(evidence, link)}",
        _no_record(evidence, "build"),
    )


def _roles(evidence: Evidence, link: Link) -> str:
    """A row for each role of the source, and beside its bytes what every variant makes of them. Builds of other sources
    would have other roles, and a row for each all the same."""
    records = evidence.records["build"]
    found: dict[tuple[str, int, int, int], dict[str, str]] = {}
    for variant, record in records.items():
        for role in record.kind("role"):
            same = (role["role"], role["num_tensors"], role["num_params"], role["source_bytes"])
            kept = role["format"] == builds.KEPT
            after = builds.KEPT if kept else f"{format_bytes(role['output_bytes'])}, {role['format']}"
            found.setdefault(same, {})[variant] = after
    rows = [
        (name, f"{tensors:,}", f"{params:,}", format_bytes(size), *(after.get(variant, "—") for variant in records))
        for (name, tensors, params, size), after in found.items()
    ]
    headers = ("role", "tensors", "parameters", "before", *map(columns.escape, records))
    align = ("left", *("right" for _ in headers[1:]))
    table = tabulate(rows, headers=headers, tablefmt="pipe", colalign=align, disable_numparse=True)
    runs = (f"{columns.escape(variant)} {_reference(evidence, link, record)}" for variant, record in records.items())
    return f"runs {' · '.join(runs)}\n\n{table}"


def _method(evidence: Evidence, link: Link) -> str:
    frame, sources = evidence.frames["method"], evidence.frames["calibration"]
    return paragraphs(
        None if frame.empty else _table(evidence, link, frame),
        None
        if frame.empty
        else "Scales and codes say how the 8-bit scale of each block of 16 weights and the 4-bit codes under it were "
        "chosen: `absmax` and `rtn` round to nearest without data, `search` and `weighted-search` try scales, `gptq` "
        "corrects each column for what the ones before it lost. Digests are the first digits of SHA-256.",
        _part(evidence, link, "Calibration", sources),
        _image(evidence, link, "experts"),
        _no_record(evidence, "build"),
    )


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
    record = evidence.records["sensitivity"][SOURCE]
    return paragraphs(
        f"{' '.join(tables.sensitivity_words(frame))} {_reference(evidence, link, record)}",
        _image(evidence, link, "sensitivity"),
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
        _image(evidence, link, "losses"),
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
        for variant in _rows_of_perplexity(evidence.suite)
        if variant not in evidence.perplexities.get(protocol, {})
    ]
    return f"No record yet of {', '.join(missing)}: run `nox -s ppl`." if missing else None


def _rows_of_perplexity(suite: Suite) -> list[str]:
    names = (SOURCE, *suite.variants)
    return [row_name(name, setup) for setup in (None, *_setups(suite, "ppl")) for name in names]


def _fidelity(evidence: Evidence, link: Link) -> str:
    if evidence.suite.fidelity is None:
        return "The suite measures no fidelity."
    frame, bands = evidence.frames["fidelity"], evidence.frames["bands"]
    if frame.empty:
        return paragraphs(_no_record(evidence, "fidelity"))
    noise = evidence.records["fidelity"].keys() & set(NOISE)
    return paragraphs(
        _image(evidence, link, "divergence"),
        _table(evidence, link, frame),
        "KL(source ‖ variant) of every next-token prediction: its mean with a bootstrap over blocks of windows, and "
        "its percentiles over single predictions. RMS Δp is the root mean square of what the probability of the token "
        "that came has changed by.",
        "The `noise-` rows are the source beside itself, in a second pass, another batch or on another engine, as the "
        f"suite asks; what does not exceed them prints as {tables.AT_NOISE}."
        if noise
        else "**There is no noise floor yet: `nox -s fidelity` measures the source beside itself.**",
        _part(evidence, link, "By the tokens before", bands, "depth"),
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
        "Scores, their names (metric, filter) and standard errors are lm-eval's own. Δ is paired: variant and source "
        "answered the same prompts. Its interval is Tango's for answers that are right or wrong, and otherwise a "
        f"bootstrap over documents ({RESAMPLES:,} resamples). Lost and won count the items that only the source, and "
        "only the variant, gets right; p is of no difference at all (McNemar's exact test or a permutation), by Holm "
        "over all tasks.",
        _part(evidence, link, "Generated answers", answers),
        None
        if answers.empty
        else "Cut off: answers that came to the most new tokens that they may have. Unclosed: thoughts without their "
        "end. Not found: answers in which the task's filters see none. A run with too many of these is invalid and "
        "compared with nothing. Seconds are those of the whole run, answers of a batch together.",
        no_record if missing else None,
    )


def _decode(evidence: Evidence, link: Link) -> str:
    frame = evidence.frames["decode"]
    if frame.empty:
        return paragraphs(_no_record(evidence, "bench"))
    return paragraphs(
        _part(evidence, link, "One user", tables.single(frame), "decode"),
        _part(evidence, link, "By depth", tables.by_depth(frame)),
        _part(evidence, link, "By batch size, in total and for each user", tables.batch_curve(frame), "batch"),
        _part(evidence, link, "In other setups of the engine", tables.in_setups(frame)),
        "Speeds are medians over repetitions with exact order-statistic intervals. The ratio is of runs of one "
        "session, its interval over the engine's starts, since repetitions of one start are alike (of a single start: "
        "over repetitions, by the exact Mann-Whitney test); it is not the quotient of the two medians "
        "beside it. The ceiling is memory bandwidth over the bytes that a step "
        "moves (weights, states, the prompt's keys and values), and a dash where the bandwidth is unknown.",
        _part(evidence, link, "Kernels that ran", evidence.frames["kernels"]),
        "**The torch engine decompresses quantized weights before it computes, on every device. Its decode speed says "
        "nothing about NVFP4 kernels.**"
        if any((record.run.engine or {}).get("name") == "torch" for record in evidence.records["bench"].values())
        else None,
        _no_record(evidence, "bench"),
    )


def _part(evidence: Evidence, link: Link, title: str, frame: pd.DataFrame, image: str | None = None) -> str | None:
    """A table under a title of its own, with its figure; None where it has no rows."""
    if frame.empty:
        return None
    return paragraphs(f"**{title}**", image and _image(evidence, link, image), _table(evidence, link, frame))


def _prefill(evidence: Evidence, link: Link) -> str:
    frame = evidence.frames["prefill"]
    return paragraphs(None if frame.empty else _table(evidence, link, frame), _no_record(evidence, "bench"))


def _memory(evidence: Evidence, link: Link) -> str:
    frame = evidence.frames["memory"]
    return paragraphs(None if frame.empty else _table(evidence, link, frame), _no_record(evidence, "bench"))


def _served(evidence: Evidence, link: Link) -> str:
    frame = evidence.frames["served"]
    if frame.empty:
        return "No record yet: `harness import` takes what `vllm bench` wrote on another machine."
    return paragraphs(
        _table(evidence, link, frame),
        "By `vllm bench` on another machine, as its files say; imported by `harness import`.",
    )


def _overview(evidence: Evidence, link: Link) -> str:
    return _image(evidence, link, "overview") or ""


def _usage(evidence: Evidence, link: Link) -> str:
    """How the first variant is served; the others differ by their name."""
    variant = next(iter(evidence.suite.variants))
    record = evidence.records["build"].get(variant)
    needed = record and builds.footprint(record)
    if not record or not needed:
        return (
            f"Sizes are not known before a build: run `nox -s build`, or `harness serve-command --variant {variant}`."
        )
    model = evidence.repo or f"./artifacts/{evidence.suite.name}/{variant}"
    fitting = row_of(evidence.frames["sizes"], variant=variant)  # the smallest first
    if fitting is None:
        most = builds.GPUS_GIB[-1]
        return (
            f"No single GPU of {most} GiB holds `{variant}` ({_reference(evidence, link, record)}): "
            "see `harness serve-command --gpus`."
        )
    gib = int(str(fitting["gpu_gib"]))
    sizing = serve.size(needed, gpu_gib=gib)
    name = f"{evidence.suite.name}-{variant}"
    given = serve.arguments(sizing, name=name)
    speculating = serve.arguments(sizing, name=name, speculative_tokens=1)
    python = (
        "from vllm import LLM, SamplingParams\n\n"
        f"llm = LLM({json.dumps(model)}, max_model_len={min(sizing.max_model_len, _PYTHON_LENGTH)})\n"
        f"sampling = SamplingParams({_settings(PRESETS['instruct-general'])}, max_tokens=512)\n"
        'print(llm.chat([{"role": "user", "content": "What is a Gated DeltaNet?"}], sampling)[0].outputs[0].text)'
    )
    return paragraphs(
        f"Sized for `{variant}` on a GPU of {gib} GiB, by the bytes of its tensors and of its cache "
        f"({_reference(evidence, link, record)})."
        + (" Only Blackwell GPUs compute in 4 bits." if builds.has_four_bit_activations(record) else ""),
        f"```sh\n{serve.vllm_line(model, given)}\n```",
        f"```sh\n{serve.docker_bash(model, given)}\n```",
        f"With one token drafted by the MTP head:\n\n```sh\n{serve.vllm_line(model, speculating)}\n```"
        if builds.has_mtp(record)
        else None,
        f"```python\n{python}\n```",
        _part(evidence, link, "What fits", evidence.frames["sizes"]),
        f"With images, `--utilization {serve.UTILIZATION:g}` of the GPU's memory and `--overhead-gb "
        f"{serve.OVERHEAD_GB[True]:g}` for vLLM itself, which measures its own as it starts. `harness serve-command` "
        "sizes other GPUs, users and lengths and writes PowerShell and compose files.",
    )


_PYTHON_LENGTH = 32768
"""Tokens: enough for a first look, and quicker to start than the longest that fits."""


def _settings(preset: Sampling) -> str:
    """The arguments of vLLM's SamplingParams that differ from its defaults, which are ours without the greed."""
    unlike = {name: value for name, value in vars(preset).items() if value != getattr(GREEDY, name)}
    return ", ".join(f"{name}={value:g}" for name, value in unlike.items())


def _limits(evidence: Evidence, link: Link) -> str:
    built = evidence.records["build"].values()
    known = [
        one
        for one in limits.LIMITS
        if not built
        or (
            (not one.needs_mtp or any(map(builds.has_mtp, built)))
            and (not one.needs_activations or any(map(builds.has_four_bit_activations, built)))
            and (not one.needs_experts or any(map(builds.has_experts, built)))
        )
    ]
    rows = [(one.configuration, one.effect, one.remedy, f"[source]({one.source})") for one in known]
    return tabulate(
        rows, headers=("configuration", "what happens", "instead", "where it is known from"), tablefmt="pipe"
    )


def _presets(evidence: Evidence, link: Link) -> str:
    fields = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "repetition_penalty")
    rows = [
        (f"`{name}`", *(f"{getattr(preset, field):g}" for field in fields), f"[Qwen]({_PRESETS_SOURCE})")
        for name, preset in PRESETS.items()
    ]
    headers = ("preset", *(field.replace("_", " ") for field in fields), "recommended by")
    return paragraphs(
        tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True),
        "Greedy decoding is not among them: a model that thinks may then repeat itself without end.",
    )


_PRESETS_SOURCE = "https://huggingface.co/Qwen/Qwen3.5-9B#best-practices"


def _reproduce(evidence: Evidence, link: Link) -> str:
    by_commit: dict[str, dict[str, None]] = {}
    for record in sorted(evidence.chosen, key=lambda record: record.run.started_utc):
        git = record.run.git
        commit = f"{git['commit'][:12]}{' with changes' if git['dirty'] else ''}" if git else "unknown"
        by_commit.setdefault(commit, {})[shlex.join(record.run.command)] = None
    if not by_commit:
        return "No record yet."
    parts = ("\n".join((f"# commit {commit}", *commands)) for commit, commands in by_commit.items())
    return paragraphs(
        "```sh\n" + "\n".join(parts) + "\n```",
        "These are the commands that made the runs below, by the commit of the harness that they ran at. In a checkout "
        "each subcommand is also a nox session that installs what it needs: `python -m pip install nox`, then for "
        "example `python -m nox -s ppl -- --suite FILE`. `harness report` then rewrites this page.",
    )


def _runs(evidence: Evidence, link: Link) -> str:
    frame = evidence.frames["runs"]
    if frame.empty:
        return "No record yet."
    artifacts = frame[["variant", "artifact"]].drop_duplicates()
    changed = artifacts["variant"][artifacts["variant"].duplicated()].unique()
    packages: dict[str, list[str]] = {}
    for row in frame.to_dict("records"):
        packages.setdefault(row["packages"], []).append(_reference(evidence, link, row["run"]))
    return paragraphs(
        _table(evidence, link, frame.drop(columns="packages")),
        *(
            f"**The runs of `{variant}` are not all of one artifact: measure again what is of an older one.**"
            for variant in changed
        ),
        "Packages:\n\n" + "\n".join(f"- {named}: {', '.join(those)}" for named, those in packages.items()),
    )


# What a page may ask for by name, under the heading that it has in the card.
BLOCKS: dict[str, tuple[str | None, Callable[[Evidence, Link], str]]] = {
    "headline": (None, _headline),
    "figure": (None, _overview),
    "size": ("What is quantized and what is kept", _size),
    "method": ("Method and calibration", _method),
    "roundtrip": ("Round-trip error", _roundtrip),
    "sensitivity": ("Sensitivity", _sensitivity),
    "perplexity": ("Perplexity", _perplexity),
    "fidelity": ("Fidelity", _fidelity),
    "tasks": ("Tasks", _tasks),
    "decode": ("Decode speed", _decode),
    "prefill": ("Prefill speed", _prefill),
    "memory": ("Memory", _memory),
    "served": ("Served elsewhere", _served),
    "usage": ("Usage", _usage),
    "presets": ("Sampling presets", _presets),
    "limits": ("Known limits", _limits),
    "reproduce": ("How to reproduce", _reproduce),
    "runs": ("Provenance", _runs),
}


def bound(evidence: Evidence, link: Link) -> dict[str, Callable[[], str]]:
    """The blocks of one suite for one page, by the name that the page asks for."""
    return {name: partial(block, evidence, link) for name, (_, block) in BLOCKS.items()}
