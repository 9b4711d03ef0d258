"""`harness fidelity`: every variant beside the source, and the source beside itself.

Where the torch engine computes, all models go through the layers together, and whole distributions are compared. An
engine that serves holds one model: each variant is compared with a pack of the source's most probable tokens. The
source beside itself (in a second pass or after a restart, in another batch, on another engine) is the noise floor.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from harness.commands.shared import MEASURING, add_shared, measuring_job, print_measured, print_models, stored_noise
from harness.errors import UserError
from harness.resolve import check_engine, check_lengths, chosen_setups, chosen_variants, required, tokenized
from harness.suite.names import NOISE, SOURCE

if TYPE_CHECKING:
    from harness.engines.protocol import Top
    from harness.job import Job, Measured, Model, Work
    from harness.measure.kept import Pack
    from harness.suite.schema import Fidelity, Suite

_PACKS, _SCRATCH = ".packs", ".streamed"  # beside the artifacts; no variant can be called so
_RESTART, _BATCH, _ENGINE = NOISE
_TOGETHER = ("torch", "streamed")
_WHOLE = "whole vocabulary"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of a measure."""
    add_shared(parser, *MEASURING)


def run(options: argparse.Namespace, given: Sequence[str]) -> int:
    """Compares the suite's variants with their source and prints their divergences beside the noise."""
    with measuring_job(options, given) as job:
        work = fidelity_work(job, options.variant)
        print_models(options, work.models)
        measured = compare_with_source(job, work, options.limit)
        stored = stored_noise(job)

    from harness.report import quality_tables

    records = measured.records
    shown = {**records, **{row: one for row, one in stored.items() if row not in records}}
    frames = [quality_tables.divergence_table(shown), quality_tables.band_table(shown)] if records else []
    return print_measured(options, records, frames, measured.failures)


def fidelity_work(job: Job, names: Sequence[str] | None) -> Work:
    """The source, then the variants and setups to be compared with it, built where missing, and the text's token ids.
    `UserError` for a suite that cannot be measured, before anything is built for it."""
    from harness.job import Work

    suite, wanted = job.suite, required(job.suite, "fidelity", job.suite.fidelity)
    variants = chosen_variants(suite, names, with_source=True)
    _check_noise(suite, wanted)
    ids, dataset = tokenized(suite, wanted.text)
    windows = disjoint_windows(ids, wanted.window)
    if not windows:
        raise UserError(
            f"The text of [fidelity] has {len(ids)} tokens: none of them has one before it.", "Use another."
        )
    setups = chosen_setups(suite, wanted.setups)
    for one in (suite, *([_noise_suite(suite, wanted)] if wanted.noise_engine else [])):
        check_lengths(one, "fidelity", setups, len(windows[0]) + 1)
    dataset |= {
        "window": wanted.window,
        "num_windows": len(windows),
        "num_scored": sum(len(window) - 1 for window in windows),
        "distribution": _WHOLE if suite.engine.name in _TOGETHER else f"{wanted.named_tokens} named tokens",
    }
    models = job.models([SOURCE, *(name for name in variants if name != SOURCE)], setups)
    if SOURCE in variants:
        models += [replace(models[0], variant=name) for name in NOISE if name != _ENGINE or wanted.noise_engine]
    return Work(models, ids, dataset)


def _check_noise(suite: Suite, wanted: Fidelity) -> None:
    """`UserError` for noise that would be none, or that nothing here can measure."""
    if wanted.noise_batch_size == wanted.batch_size:
        raise UserError(
            f"Suite '{suite.name}' has noise_batch_size = batch_size = {wanted.batch_size} in [fidelity].",
            "Another batch must be another one: change either.",
        )
    if wanted.noise_engine is None:
        return
    check_engine(_noise_suite(suite, wanted))
    if wanted.noise_engine == suite.engine.name:
        raise UserError(f"'{wanted.noise_engine}' is the engine of suite '{suite.name}' itself.", "Name another one.")
    if wanted.noise_engine == "vllm" and find_spec("vllm") is None:
        raise UserError("noise_engine is vllm, which is not installed here.", "Install it, or leave noise_engine out.")


def _noise_suite(suite: Suite, wanted: Fidelity) -> Suite:
    """The suite on the engine that noise is measured by."""
    assert wanted.noise_engine is not None
    return replace(suite, engine=replace(suite.engine, name=wanted.noise_engine))


def disjoint_windows(ids: Sequence[int], window: int) -> list[list[int]]:
    """Disjoint windows of a text, the last one shorter; none of a single token, which predicts nothing."""
    windows = [list(ids[first : first + window]) for first in range(0, len(ids), window)]
    return [one for one in windows if len(one) > 1]


def compare_with_source(job: Job, work: Work, limit: int | None) -> Measured:
    """One run a row, all on the same windows; `limit` keeps the first of them."""
    from harness.job import Measured

    wanted = _wanted(job)
    windows = disjoint_windows(work.ids, wanted.window)[:limit]
    measured = Measured()
    if job.suite.engine.name in _TOGETHER:
        _together(job, work, windows, measured)
    else:
        _one_after_another(job, work, windows, measured)
    for model in (one for one in work.models if one.variant == _ENGINE):
        # The source on the engine that noise is measured with, beside the source on the suite's own.
        pack = _pack(job, work, work.models[0], windows)
        there = replace(job, suite=_noise_suite(job.suite, wanted))
        named_only = replace(work, dataset=work.dataset | {"distribution": f"{pack.num} named tokens"})
        _compare_one(there, named_only, model, windows, pack, wanted.batch_size, measured)
    return measured


def _wanted(job: Job) -> Fidelity:
    assert job.suite.fidelity is not None
    return job.suite.fidelity


def _batch_size(wanted: Fidelity, model: Model) -> int:
    other = wanted.noise_batch_size or (1 if wanted.batch_size > 1 else 2)
    return other if model.variant == _BATCH else wanted.batch_size


def _together(job: Job, work: Work, windows: Sequence[Sequence[int]], measured: Measured) -> None:
    """All models side by side through one pass over the layers, and the source's noise in passes of its own."""
    from harness.engines.streamed import HIDDEN_BYTES, Streamed
    from harness.measure import fidelity
    from harness.record import store

    wanted, engine = _wanted(job), job.suite.engine
    source, *others = (model for model in work.models if model.variant != _ENGINE)
    variants = [model for model in others if model.variant not in NOISE]
    noise = [model for model in others if model.variant in NOISE]
    passes = [
        ("variants", [source, *variants], wanted.batch_size),
        *((model.variant, [source], _batch_size(wanted, model)) for model in noise),
    ]
    chunks = fidelity.side_by_side(
        *(
            Streamed([model.folder for model in models], dtype=engine.dtype, device=engine.device).log_probs(
                windows,
                batch_size,
                scratch=job.artifact(_SCRATCH) / name,
                hidden_bytes=HIDDEN_BYTES // len(passes),
                progress=job.named_progress(name),
            )
            for name, models, batch_size in passes
        )
    )
    alone = replace(job, suite=replace(job.suite, engine=replace(engine, name="streamed")))
    with ExitStack() as stack:
        writers = {}
        for model in [*variants, *noise]:
            with alone.engine(model, "score") as computing:
                run = job.new_run("fidelity", fidelity.VERSION, model, engine=computing, dataset=work.dataset)
            writer = store.RunWriter(job.results, run, expected=work.dataset["num_windows"])
            writers[model.row] = stack.enter_context(writer)
        for row, sample in fidelity.fidelity_samples(chunks, windows, list(writers), progress=job.progress):
            writers[row].sample(_placed(sample, wanted))
        measured.records.update({row: store.read(writer.finish()) for row, writer in writers.items()})


def _one_after_another(job: Job, work: Work, windows: Sequence[Sequence[int]], measured: Measured) -> None:
    """Every model in an engine of its own, compared with what the source's pack holds."""
    from harness.measure import fidelity

    source, *others = (model for model in work.models if model.variant != _ENGINE)
    with job.noted_failures("fidelity", fidelity.VERSION, source, work.dataset, measured.failures):
        pack = _pack(job, work, source, windows)
    if source.row in measured.failures:
        return
    for model in others:
        _compare_one(job, work, model, windows, pack, _batch_size(_wanted(job), model), measured)


def _compare_one(
    job: Job,
    work: Work,
    model: Model,
    windows: Sequence[Sequence[int]],
    pack: Pack,
    batch_size: int,
    measured: Measured,
) -> None:

    from harness.measure import fidelity

    with (
        job.noted_failures("fidelity", fidelity.VERSION, model, work.dataset, measured.failures),
        job.engine(model, "score", longest=_wanted(job).window + 1, batch=batch_size) as engine,
    ):
        run = job.new_run("fidelity", fidelity.VERSION, model, engine=engine, dataset=work.dataset)
        samples = fidelity.top_fidelity_samples(
            pack.tops(windows),
            engine.top_log_probs(windows, batch_size, pack.num),
            windows,
            model.row,
            progress=job.named_progress(model.row),
        )
        placed = (_placed(sample, _wanted(job)) for sample in samples)
        measured.records[model.row] = job.store(run, placed, expected=work.dataset["num_windows"])


def _pack(job: Job, work: Work, source: Model, windows: Sequence[Sequence[int]]) -> Pack:
    """What the source predicts on the suite's engine: built once, kept beside the artifacts."""
    from harness.measure import fidelity
    from harness.measure.kept import pack_of

    wanted = _wanted(job)
    identity = {
        "measure_version": fidelity.VERSION,
        **job.computed_by(source),
        "token_ids_sha256": work.dataset["token_ids_sha256"],
        "windows": [wanted.window, len(windows), wanted.batch_size],
        "named_tokens": wanted.named_tokens,
    }

    def predictions() -> Iterator[Top]:
        with job.engine(source, "score", longest=wanted.window + 1, batch=wanted.batch_size) as engine:
            for number, top in enumerate(engine.top_log_probs(windows, wanted.batch_size, wanted.named_tokens), 1):
                job.progress(number, len(windows), f"{source.row}: reference pack")
                yield top

    return pack_of(job.artifact(_PACKS), identity, predictions)


def _placed(sample: dict[str, Any], wanted: Fidelity) -> dict[str, Any]:
    return sample | {"first_token": sample["index"] * wanted.window}
