"""The sections of a card for who wants to serve a variant: usage, sampling presets, known limits."""

import json
import tomllib
from pathlib import Path

from tabulate import tabulate

from harness import serve
from harness.report import build_tables
from harness.report.evidence import Evidence
from harness.report.pieces import Link, paragraphs, part, reference
from harness.sampling import GREEDY, PRESETS, Sampling


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
        if build_tables.has_mtp(record)
        else None,
        f"```python\n{python}\n```",
        part(evidence, link, "What fits", evidence.tables["sizes"]),
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


_NEEDS = {
    "mtp": build_tables.has_mtp,
    "activations": build_tables.has_four_bit_activations,
    "experts": build_tables.has_experts,
}
"""By the words of `limits.toml`: whether a build has what a limit is about."""


def known_limits(evidence: Evidence, link: Link) -> str:
    """The known limits that concern the variants that were built; all of them where nothing was built."""
    built = evidence.records["build"].values()
    known = tomllib.loads(Path(__file__).with_name("limits.toml").read_text("utf-8"))["limit"]
    rows = [
        (one["configuration"], one["effect"], one["remedy"], f"[source]({one['source']})")
        for one in known
        if not built or all(any(map(_NEEDS[need], built)) for need in one.get("needs", ()))
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
