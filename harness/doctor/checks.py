"""What a suite needs, one `Diagnosis` each: GPU, driver, engine, kernels, source, datasets, disk, memory.

The checks go from cheap to dear, and nothing is downloaded but a source's configuration. `harness doctor` shows all of
them; the measuring commands stop at the first problem.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from harness import resolve, serve
from harness.doctor.box import Box
from harness.errors import UserError
from harness.model.checkpoint import free_disk
from harness.progress import duration
from harness.suite.texts import DatasetSamples, DatasetText

if TYPE_CHECKING:
    from harness.quantize.plan import Plan
    from harness.quantize.recipes import Recipe
    from harness.suite.schema import Suite

State = Literal["good", "note", "problem"]
Need = Literal["build", "ppl", "fidelity", "tasks", "bench"]
NEEDS: tuple[Need, ...] = ("build", "ppl", "fidelity", "tasks", "bench")

_DRIVER_OF_CUDA = {"13": 580, "12": 525}
"""By CUDA's major version, the oldest branch of the Linux driver that runs it (CUDA toolkit release notes, table 2)."""
_SHARED_MEMORY_UTILIZATION = 0.85
"""A DGX Spark's memory is the CPU's too: what the system needs must stay free."""
_LEAST_OVERHEAD_BYTES = 1_200_000_000
"""What vLLM took of an RTX 5090 beyond weights and cache, where it took least."""
_COMPUTED_ON_GPU, _SOURCE_BYTES = 2, 2
"""Bytes of a number that a layer computes with on an accelerator, and of a source's weight: both are bfloat16."""
_HIDDEN_STATES = 4
"""Hidden states of a token that calibration keeps at most: two streams at two boundaries."""
_PASSES, _SHARE_OF_RATE = 4, 0.4
"""What calibration computes, in passes over the weights, and at which share of its device's rate of float32 matrix
products: a count and a measurement of GPTQ at the layer shapes of the 9B on a CPU, good there to a factor of two."""


@dataclass(frozen=True)
class Diagnosis:
    """One thing that was looked at. A `problem` keeps the suite from running, and its `remedy` mends it; a `note` is
    what the user would want to know before hours are spent."""

    state: State
    subject: str
    text: str
    remedy: str = ""


def checks(
    suite: Suite,
    box: Box,
    artifacts: Path,
    needs: Sequence[Need] = NEEDS,
    variants: Sequence[str] | None = None,
    device: str = "auto",
) -> Iterator[Diagnosis]:
    """Everything that the suite needs for the measures `needs` of `variants` (all where None), in the order in which it
    would be missed; `device` is what calibrates."""
    measures = [need for need in needs if need != "build"]
    yield from _gpu(box)
    if measures:
        yield from _engine(suite, box)
    source = _source(suite)
    yield source
    yield from _datasets(suite, needs)
    if source.state == "problem":
        return  # its plan cannot be made
    plans = {name: _plan(suite, name) for name in suite.variants if variants is None or name in variants}
    missing = [name for name in plans if not (artifacts / suite.name / name).exists()]
    if measures and suite.engine.name == "vllm":
        yield from _kernels(box, {name: recipe for name, (recipe, _) in plans.items()})
        yield from _serving(suite, box, {name: plan for name, (_, plan) in plans.items()}, needs)
    yield from _disk(suite, artifacts, [plans[name][1] for name in missing])
    yield from _calibration(suite, box, {name: plans[name] for name in missing}, device)


def require(
    suite: Suite,
    box: Box,
    artifacts: Path,
    needs: Sequence[Need],
    variants: Sequence[str] | None = None,
    device: str = "auto",
) -> list[Diagnosis]:
    """The notes of the checks; `UserError` at the first problem."""
    notes = []
    for check in checks(suite, box, artifacts, needs, variants, device):
        if check.state == "problem":
            raise UserError(check.text, check.remedy)
        if check.state == "note":
            notes.append(check)
    return notes


# -- The machine ---------------------------------------------------------------------------------------------------


def _gpu(box: Box) -> Iterator[Diagnosis]:
    if box.silent_gpu:
        yield Diagnosis(
            "note",
            "GPU",
            "An NVIDIA GPU is there, and its driver does not answer.",
            "Run `nvidia-smi`: install the driver, or restart after an update of it.",
        )
    for gpu in box.gpus:
        memory = "memory shared with the CPU" if gpu.total_bytes is None else f"{gpu.total_bytes / 2**30:.1f} GiB"
        free = "" if gpu.free_bytes is None else f", {gpu.free_bytes / 2**30:.1f} free"
        capability = "" if gpu.capability is None else f", sm_{gpu.capability[0]}{gpu.capability[1]}"
        yield Diagnosis("good", "GPU", f"{gpu.name}, {memory}{free}{capability}, driver {gpu.driver}.")
    if not box.gpus and not box.silent_gpu:
        yield Diagnosis("good", "GPU", "There is none: everything runs on the CPU.")
    needed = _DRIVER_OF_CUDA.get((box.torch_cuda or "").partition(".")[0])
    for gpu in box.gpus:
        branch = gpu.driver.partition(".")[0]
        if needed is not None and branch.isdigit() and int(branch) < needed:
            yield Diagnosis(
                "problem",
                "driver",
                f"The driver {gpu.driver} is too old for torch {box.torch}, which is built for CUDA {box.torch_cuda}.",
                f"Install driver {needed} or newer.",
            )


def _engine(suite: Suite, box: Box) -> Iterator[Diagnosis]:
    if suite.engine.name == "vllm":
        yield from _vllm(suite, box)
        return
    on_gpu = suite.engine.device.startswith("cuda") or (suite.engine.device == "auto" and box.gpus)
    if on_gpu and box.torch_cuda is None:
        asked = suite.engine.device != "auto"
        yield Diagnosis(
            "problem" if asked else "note",
            "torch",
            f"torch {box.torch} is a CPU build"
            + (f", and the suite asks for {suite.engine.device}." if asked else ": the GPU will not be used."),
            "Install the CUDA build of the same release: `pip install --force-reinstall torch` from PyPI.",
        )
    elif suite.engine.device.startswith("cuda") and not box.gpus:
        yield Diagnosis(
            "problem",
            "torch",
            f"The suite asks for {suite.engine.device}, and no GPU answers.",
            "Set device to auto or cpu, or run `nvidia-smi` and mend the driver.",
        )
    else:
        yield Diagnosis("good", "torch", f"torch {box.torch} computes on the {'GPU' if on_gpu else 'CPU'}.")


def _vllm(suite: Suite, box: Box) -> Iterator[Diagnosis]:
    from harness.engines.vllm_options import NEWEST, OLDEST, release_of

    if box.vllm is None:
        yield Diagnosis(
            "problem",
            "vLLM",
            f"Suite '{suite.name}' runs on vLLM, which is not installed here.",
            "On a GPU box `nox -s ppl bench` brings it (docs/gpu.md); without a GPU, `nox -s vllm -- ppl` has the CPU "
            "build, or give --engine torch.",
        )
        return
    release = release_of(box.vllm)
    if not OLDEST <= release <= NEWEST:
        oldest, newest = (f"{major}.{minor}" for major, minor in (OLDEST, NEWEST))
        yield Diagnosis(
            "note" if release > NEWEST else "problem",
            "vLLM",
            f"vLLM {box.vllm} is not known to the harness, which knows {oldest} to {newest}.",
            "Install one of these releases (constraints-vllm-*.txt).",
        )
    options = suite.vllm_options()
    wanted = [options.get(name, 1) for name in ("tensor_parallel", "pipeline_parallel", "data_parallel")]
    num_gpus = wanted[0] * wanted[1] * wanted[2]
    if box.vllm_on_cpu:
        if suite.engine.dtype == "float32":
            yield Diagnosis(
                "problem",
                "vLLM",
                "vLLM's CPU kernels of DeltaNet compute in bfloat16 only, and the suite says float32.",
                "Give --dtype bfloat16.",
            )
        unused = " although there is a GPU" if box.gpus else ""
        yield Diagnosis(
            "note" if box.gpus else "good", "vLLM", f"vLLM {box.vllm} is its CPU build: it runs on the CPU{unused}."
        )
    elif not box.gpus:
        yield Diagnosis(
            "problem",
            "vLLM",
            f"vLLM {box.vllm} is built for CUDA, and no GPU answers.",
            "Run `nvidia-smi` and mend the driver; without a GPU, `nox -s vllm -- ppl` has the CPU build.",
        )
    elif num_gpus > len(box.gpus) and options.get("executor") != "ray":
        yield Diagnosis(
            "problem",
            "vLLM",
            f"Suite '{suite.name}' spreads a model over {num_gpus} GPUs, and this machine has {len(box.gpus)}.",
            'Lower tensor_parallel, or set executor = "ray" where other machines have the rest.',
        )
    else:
        yield Diagnosis("good", "vLLM", f"vLLM {box.vllm} runs on {num_gpus} of {len(box.gpus)} GPUs.")


def _kernels(box: Box, recipes: dict[str, Recipe]) -> Iterator[Diagnosis]:
    """Which kernel serves each format, on GPUs whose capability is known."""
    from harness.doctor.kernels import kernel_for
    from harness.engines.vllm_options import release_of

    if not box.gpus or box.vllm is None or box.vllm_on_cpu or (capability := box.gpus[0].capability) is None:
        return
    used: dict[str, list[str]] = {}
    forms = {}
    for name, recipe in recipes.items():
        for form, _ in recipe.stored:
            forms[form.name] = form
            used.setdefault(form.name, []).append(name)
    for form_name, names in used.items():
        form, where = forms[form_name], ", ".join(names)
        kernel = kernel_for(form, capability, release_of(box.vllm))
        if kernel is None:
            yield Diagnosis(
                "problem",
                "kernels",
                f"No kernel of vLLM serves {form_name} ({where}) on {box.gpus[0].name}.",
                "Use a GPU of compute capability 7.5 or newer.",
            )
        elif kernel.weight_only and form.input_bits < 16:
            yield Diagnosis(
                "note",
                "kernels",
                f"{form_name} ({where}) is served by {kernel.name}, which leaves activations in 16 bits: loss and "
                "speed will be those of a weight-only checkpoint.",
                "Set emulate = true in [engine.vllm] to measure the loss, or use a Blackwell GPU.",
            )
        else:
            yield Diagnosis("good", "kernels", f"{form_name} ({where}) is served by {kernel.name}.")


# -- Source and texts ----------------------------------------------------------------------------------------------


def _source(suite: Suite) -> Diagnosis:
    """Whether the source is here or can be had, and fits its disk."""
    location, revision = suite.source_location(), suite.source.revision
    try:
        _configuration(suite)
        if location.startswith(resolve.DEMO):
            return Diagnosis("good", "source", f"{location} is embedded.")
        from harness.model.sources import bytes_to_fetch

        missing = bytes_to_fetch(location, revision)
    except UserError as error:
        return Diagnosis("problem", "source", error.problem, error.remedy)
    if missing:
        return Diagnosis("note", "source", f"{location} will be downloaded: {missing / 1e9:.1f} GB.")
    return Diagnosis("good", "source", f"{location} is here.")


def _datasets(suite: Suite, needs: Sequence[Need]) -> Iterator[Diagnosis]:
    """Whether the datasets of the suite's texts and calibration are in the cache or can be had."""
    texts = [
        *([suite.ppl.text] if suite.ppl and "ppl" in needs else []),
        *([suite.fidelity.text] if suite.fidelity and "fidelity" in needs else []),
        *([suite.bench.text] if suite.bench and "bench" in needs else []),
        *(suite.calibration.sources if suite.calibration and _calibrates(suite) else []),
    ]
    wanted = {(text.dataset, text.revision) for text in texts if isinstance(text, DatasetText | DatasetSamples)}
    named = [task for task in suite.tasks.values() if task.task[0] not in "./~" and not task.task.startswith("demo:")]
    if named and "tasks" in needs:
        from harness.measure.tasks import datasets_of

        wanted |= {(path, task.revision) for task in named for path in datasets_of(task.task)}
    for name, revision in sorted(wanted, key=str):
        yield _dataset(name, revision)


def _dataset(name: str, revision: str | None) -> Diagnosis:
    from datasets import config, naming  # type: ignore[import-untyped]

    from harness.model.hub import dataset_refusal

    owner, _, own = name.rpartition("/")
    snake = naming.camelcase_to_snakecase(own)  # as datasets.DatasetBuilder names the folder
    cached = f"{owner}___{snake}" if owner else snake
    if Path(name).exists() or (Path(config.HF_DATASETS_CACHE) / cached).exists():
        return Diagnosis("good", "dataset", f"{name} is here.")
    if (refusal := dataset_refusal(name, revision)) is not None:
        return Diagnosis("problem", "dataset", refusal.problem, refusal.remedy)
    return Diagnosis("note", "dataset", f"{name} will be downloaded.")


# -- Room ----------------------------------------------------------------------------------------------------------


def _recipe(suite: Suite, variant: str) -> Recipe:
    from harness.quantize.recipes import recipe_named

    wanted = suite.variants[variant]
    return recipe_named(wanted.recipe).with_method(wanted.scales, wanted.codes)


def _calibrates(suite: Suite) -> bool:
    return any(_recipe(suite, name).needs_calibration for name in suite.variants)


def _configuration(suite: Suite) -> Path:
    """A folder with the source's configuration."""
    return resolve.find_source(suite.source_location(), suite.source.revision, config_only=True)


def _plan(suite: Suite, variant: str) -> tuple[Recipe, Plan]:
    recipe = _recipe(suite, variant)
    return recipe, resolve.plan_source(suite.source_location(), recipe, suite.source.revision)[1]


def _disk(suite: Suite, artifacts: Path, plans: Sequence[Plan]) -> Iterator[Diagnosis]:
    """Whether the artifacts that are missing fit the disk. A build checks again, with what it needs on the way."""
    needed = sum(plan.output_bytes for plan in plans)
    folder, free = free_disk(artifacts)
    if needed > free:
        yield Diagnosis(
            "problem",
            "disk",
            f"{len(plans)} artifacts of suite '{suite.name}' take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are "
            f"free in {folder}.",
            "Make room, give another --artifacts, or name one --variant.",
        )
    elif plans:
        yield Diagnosis("good", "disk", f"{len(plans)} artifacts take {needed / 1e9:.1f} GB of {free / 1e9:.1f} free.")


def _calibration(suite: Suite, box: Box, plans: dict[str, tuple[Recipe, Plan]], device: str) -> Iterator[Diagnosis]:
    """Whether calibration fits into memory, where it is computed, and how long that takes."""
    from harness.quantize.plan import COMPUTED_BYTES, calibration_memory, check_memory

    wanted = suite.calibration
    calibrated = {name: both for name, both in plans.items() if both[0].needs_calibration}
    if wanted is None or not calibrated:
        return
    on_gpu = device != "cpu" and bool(box.gpus) and box.torch_cuda is not None
    where = box.gpus[0].name if on_gpu else "the CPU"
    config = resolve.source_config(_configuration(suite))
    item_bytes = _COMPUTED_ON_GPU if on_gpu else COMPUTED_BYTES
    num_tokens = sum(source.samples * source.max_tokens for source in wanted.sources)
    for name, (recipe, plan) in calibrated.items():
        states = _HIDDEN_STATES * num_tokens * config.hidden_size * item_bytes
        needed = calibration_memory(
            config,
            recipe,
            batch_tokens=wanted.batch_tokens,
            hidden_bytes=min(round(wanted.hidden_memory_gb * 1e9), states),
            item_bytes=item_bytes,
        )
        try:
            check_memory(needed, box.free_memory, box.gpus[0].free_bytes if on_gpu else None)
        except UserError as error:
            yield Diagnosis("problem", "calibration", f"'{name}': {error.problem}", error.remedy)
            continue
        text = f"'{name}' is calibrated on {where}, with {needed.total / 1e9:.1f} GB of memory"
        rate = multiply_rate("cuda" if device == "auto" else device) if on_gpu else multiply_rate("cpu")
        if rate is not None:
            weights = plan.source_traffic.weight_bytes / _SOURCE_BYTES
            text += f", in about {duration(_PASSES * 2 * weights * num_tokens / (_SHARE_OF_RATE * rate))}"
        yield Diagnosis("note", "calibration", f"{text}.")


@cache
def multiply_rate(device: str) -> float | None:
    """Floating-point operations a second of a device of torch in a matrix product of float32, the type of calibration's
    moments, as measured now; None where torch cannot use the device."""
    import torch

    size = 1024 if device == "cpu" else 4096
    times = []
    try:
        one = torch.ones((size, size), device=device)
        for _ in range(3):  # the first one starts the device's library
            began = time.perf_counter()
            (one @ one)[0, 0].item()  # an accelerator is waited for
            times.append(time.perf_counter() - began)
    except (RuntimeError, AssertionError):  # no memory or no driver; a build of torch without CUDA
        return None
    return 2 * size**3 / min(times)


def _serving(suite: Suite, box: Box, plans: dict[str, Plan], needs: Sequence[Need]) -> Iterator[Diagnosis]:
    """Whether vLLM gets the source and each variant into the GPUs' memory. The source can be scored without that."""
    if not box.gpus or box.vllm_on_cpu:
        return
    source = resolve.plan_source(suite.source_location(), None, suite.source.revision)[1]
    if (problem := does_not_fit(suite, box, source)) is not None:
        lost = [need for need in needs if need in ("tasks", "bench")]
        yield Diagnosis(
            "note",
            "GPU memory",
            f"The source does not fit: {problem}",
            "The streamed engine scores it a layer at a time, and differences from it are not to be had"
            + (f"; the tables of {' and '.join(lost)} will lack it." if lost else "."),
        )
    for name, plan in plans.items():
        if (problem := does_not_fit(suite, box, plan)) is not None:
            remedy = "Use a larger GPU, set tensor_parallel for more of them, or choose a smaller recipe."
            yield Diagnosis("problem", "GPU memory", f"'{name}' does not fit: {problem}", remedy)
        else:
            yield Diagnosis("good", "GPU memory", f"'{name}' fits.")


def does_not_fit(suite: Suite, box: Box, plan: Plan) -> str | None:
    """Why a model of this plan does not fit into the memory that vLLM may take; None if it does, or where no GPU tells.
    Only what is certain counts: weights, and the least overhead that was seen."""
    if not box.gpus or box.vllm_on_cpu:
        return None
    options = suite.vllm_options()
    one = box.gpus[0].total_bytes
    share = options.get("gpu_memory_utilization", serve.UTILIZATION if one else _SHARED_MEMORY_UTILIZATION)
    num_gpus = options.get("tensor_parallel", 1) * options.get("pipeline_parallel", 1)
    allowed = share * num_gpus * (one or box.total_memory)
    needed = plan.output_bytes + num_gpus * _LEAST_OVERHEAD_BYTES
    if needed <= allowed:
        return None
    return (
        f"{plan.output_bytes / 1e9:.1f} GB of weights and {num_gpus * _LEAST_OVERHEAD_BYTES / 1e9:.1f} GB for vLLM "
        f"itself, of {allowed / 1e9:.1f} GB that it may take."
    )
