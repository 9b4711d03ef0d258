"""The sections of a card: each a piece of Markdown about one question, and the block of that name in other pages.

The words of most stand in `sections.md.jinja`, a block each. What those say of the evidence beyond its tables is found
here, and so is what somebody needs who wants to serve a variant.
"""

import json
import re
import shlex
import tomllib
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, StrictUndefined, Template
from tabulate import tabulate

from harness import serve
from harness.formats.names import KEPT
from harness.record.run import Record
from harness.record.stats import RESAMPLES
from harness.report import build_tables, quality_tables, speed_tables
from harness.report.evidence import Evidence
from harness.report.figure_data import FIGURES
from harness.report.numbers import format_bytes
from harness.report.tables import AT_NOISE, Table, escape, markdown_table
from harness.sampling import GREEDY, PRESETS, Sampling
from harness.suite.names import NOISE, SOURCE, row_name
from harness.suite.schema import Suite

Link = Callable[[str], str]  # a path from the project's root -> its URL from where the text stands


# -- What sections are made of -------------------------------------------------------------------------------------


def reference(evidence: Evidence, link: Link, record: Record) -> str:
    """A link to a record, called by the run's id."""
    return f"[{record.run.run_id}]({link(evidence.record_path(record))})"


def _image(evidence: Evidence, link: Link, name: str) -> str | None:
    """A figure that leads to itself without pixels; None where nothing was measured that it could show."""
    if name not in evidence.figures:
        return None
    path = f"reports/{evidence.suite.name}/{name}"
    return f"[![{FIGURES[name]}]({link(f'{path}.png')})]({link(f'{path}.svg')})"


def _table(evidence: Evidence, link: Link, frame: Table) -> str | None:
    """A table whose runs are links to their records; None where it has no rows."""
    return markdown_table(frame, lambda record: link(evidence.record_path(record))) if frame else None


def _part(evidence: Evidence, link: Link, title: str, frame: Table, figure: str | None = None) -> str | None:
    """A table under a title of its own, with its figure; None where it has no rows."""
    if not frame:
        return None
    return paragraphs(f"**{title}**", figure and _image(evidence, link, figure), _table(evidence, link, frame))


def _no_record(evidence: Evidence, measure: str) -> str | None:
    """Which rows that the suite asks for a measure has no run of, and what to do; None if it has them all."""
    suite = evidence.suite
    quantized = tuple(suite.variants)
    expected = {"sensitivity": (SOURCE,), "bench": (SOURCE, *quantized)}.get(measure, quantized)
    left_out: tuple[str, ...] = ()
    if measure == "bench" and suite.bench and suite.bench.variants is not None:
        left_out = tuple(name for name in quantized if name not in suite.bench.variants)
        expected = (SOURCE, *suite.bench.variants)
    expected += tuple(row_name(name, setup) for setup in _setups_of(suite, measure) for name in expected)
    missing = [row for row in expected if row not in evidence.records[measure]]
    of = "" if len(missing) == len(expected) else f" of {_code_names(missing)}"
    return paragraphs(
        f"No record yet{of}: run `nox -s {measure}`." if missing else None,
        f"The suite does not measure the speed of {_code_names(left_out)}." if left_out else None,
    )


def _setups_of(suite: Suite, measure: str) -> tuple[str, ...]:
    """The setups that a measure is taken in too. They are options of vLLM, so on another engine there are none."""
    wanted = {"ppl": suite.ppl, "fidelity": suite.fidelity, "bench": suite.bench}.get(measure)
    return (wanted.setups if wanted and suite.engine.name == "vllm" else None) or ()


def _code_names(rows: Sequence[str]) -> str:
    """Names of rows as code, with commas between."""
    return ", ".join(f"`{row}`" for row in rows)


def paragraphs(*parts: str | None) -> str:
    """Markdown of several parts, those that there are."""
    return "\n\n".join(part for part in parts if part)


# -- Sections of the template --------------------------------------------------------------------------------------


def section(name: str) -> Callable[[Evidence, Link], str]:
    """What writes the section of a block of the template. What there are no records of leaves no gap."""

    def written(evidence: Evidence, link: Link) -> str:
        context = _template().new_context(_known(evidence, link))
        return re.sub(r"\n{3,}", "\n\n", "".join(_template().blocks[name](context)).strip())

    return written


@cache
def _template() -> Template:
    def text_of(value: object) -> object:
        return "" if value is None else value

    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=text_of)
    return environment.from_string(Path(__file__).with_name("sections.md.jinja").read_text("utf-8"))


def _known(evidence: Evidence, link: Link) -> dict[str, Any]:
    """What the template knows, by name."""
    of_page = (_table, _part, reference, _roles, _runs_by_packages)
    suite, records = evidence.suite, evidence.records
    return {
        "suite": suite,
        "records": records,
        "tables": evidence.tables,
        "image": partial(_image, evidence, link),
        "no_record": partial(_no_record, evidence),
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
        "AT_NOISE": AT_NOISE,
        "RESAMPLES": f"{RESAMPLES:,}",
    }


def _roles(evidence: Evidence, link: Link) -> str:
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
    headers = ("role", "tensors", "parameters", "before", *map(escape, records))
    align = ("left", *("right" for _ in headers[1:]))
    runs = (f"{escape(name)} {reference(evidence, link, record)}" for name, record in records.items())
    return paragraphs(
        f"runs {' · '.join(runs)}",
        tabulate(rows, headers=headers, tablefmt="pipe", colalign=align, disable_numparse=True),
    )


def _missing_perplexities(evidence: Evidence) -> list[str]:
    """Which rows have no run by which protocol."""
    suite = evidence.suite
    protocols = suite.ppl.protocols if suite.ppl else ()
    names = (SOURCE, *suite.variants)
    rows = [row_name(name, setup) for setup in (None, *_setups_of(suite, "ppl")) for name in names]
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


def _runs_by_packages(evidence: Evidence, link: Link) -> dict[str, list[str]]:
    """References to the runs, by the versions of packages that they were made with."""
    found: dict[str, list[str]] = {}
    for row in evidence.tables["runs"].rows:
        found.setdefault(row["packages"], []).append(reference(evidence, link, row["run"]))
    return found


def _remade_variants(evidence: Evidence) -> list[str]:
    """The variants whose runs are of several artifacts."""
    artifacts: dict[str, set[str | None]] = {}
    for row in evidence.tables["runs"].rows:
        artifacts.setdefault(row["variant"], set()).add(row["artifact"])
    return [variant for variant, digests in artifacts.items() if len(digests) > 1]


# -- Serving -------------------------------------------------------------------------------------------------------


def usage(evidence: Evidence, link: Link) -> str:
    """How the first variant is served; the others differ by their name."""
    variant = next(iter(evidence.suite.variants))
    record = evidence.records["build"].get(variant)
    needed = record and build_tables.server_footprint(record)
    if not record or not needed:
        return (
            f"Sizes are not known before a build: run `nox -s build`, or `harness serve-command --variant {variant}`."
        )
    model = evidence.repo or f"./artifacts/{evidence.suite.name}/{variant}"
    fitting = evidence.tables["sizes"].row(variant=variant)  # the smallest first
    if fitting is None:
        most = build_tables.GPUS_GIB[-1]
        return (
            f"No single GPU of {most} GiB holds `{variant}` ({reference(evidence, link, record)}): "
            "see `harness serve-command --gpus`."
        )
    gib = int(str(fitting["gpu_gib"]))
    sizing = serve.size(needed, gpu_gib=gib)
    name = f"{evidence.suite.name}-{variant}"
    given = serve.vllm_arguments(sizing, name=name)
    speculating = serve.vllm_arguments(sizing, name=name, speculative_tokens=1)
    python = (
        "from vllm import LLM, SamplingParams\n\n"
        f"llm = LLM({json.dumps(model)}, max_model_len={min(sizing.max_model_len, _PYTHON_LENGTH)})\n"
        f"sampling = SamplingParams({_settings(PRESETS['instruct-general'])}, max_tokens=512)\n"
        'print(llm.chat([{"role": "user", "content": "What is a Gated DeltaNet?"}], sampling)[0].outputs[0].text)'
    )
    return paragraphs(
        f"Sized for `{variant}` on a GPU of {gib} GiB, by the bytes of its tensors and of its cache "
        f"({reference(evidence, link, record)})."
        + (" Only Blackwell GPUs compute in 4 bits." if build_tables.has_four_bit_activations(record) else ""),
        f"```sh\n{serve.vllm_line(model, given)}\n```",
        f"```sh\n{serve.docker_bash(model, given)}\n```",
        f"With one token drafted by the MTP head:\n\n```sh\n{serve.vllm_line(model, speculating)}\n```"
        if build_tables.has_role(record, "mtp")
        else None,
        f"```python\n{python}\n```",
        _part(evidence, link, "What fits", evidence.tables["sizes"]),
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


def _has(record: Record, need: Literal["mtp", "activations", "experts"]) -> bool:
    """Whether a build has what a limit is about, by the words of `limits.toml`."""
    if need == "activations":
        return build_tables.has_four_bit_activations(record)
    return build_tables.has_role(record, need)


def known_limits(evidence: Evidence, link: Link) -> str:
    """The known limits that concern the variants that were built; all of them where nothing was built."""
    built = evidence.records["build"].values()
    known = tomllib.loads(Path(__file__).with_name("limits.toml").read_text("utf-8"))["limit"]
    rows = [
        (one["configuration"], one["effect"], one["remedy"], f"[source]({one['source']})")
        for one in known
        if not built or all(any(_has(record, need) for record in built) for need in one.get("needs", ()))
    ]
    headers = ("configuration", "what happens", "instead", "where it is known from")
    return tabulate(rows, headers=headers, tablefmt="pipe")


def presets(evidence: Evidence, link: Link) -> str:
    """The sampling presets of the tasks, with their source."""
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
