"""What `harness fidelity` does, without a word printed: every variant beside the source, and the source beside itself.

Where the torch engine computes, all of them go through the layers together (engines/streamed.py), and whole
distributions are compared. An engine that serves holds one model: the source's most probable tokens are kept in a
pack, and each variant is compared with that.

The source beside itself, in a second pass (of an engine that serves: after a restart), in another batch, on another
engine, is the noise floor: what a difference must exceed to be one. It has rows of its own, called after what was
changed.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from harness.engines import streamed
from harness.engines.protocol import Engine, Top
from harness.errors import UserError
from harness.measure import fidelity
from harness.measure.packs import Pack, pack_of
from harness.progress import named
from harness.record import store
from harness.record.store import RunWriter
from harness.stages import (
    Job,
    Measured,
    Model,
    Work,
    built_models,
    check_engine,
    check_lengths,
    chosen_setups,
    chosen_variants,
    computed_by,
    new_run,
    noted_failures,
    required,
    running_engine,
    said_in,
    tokenized,
)
from harness.suite.names import NOISE, SOURCE
from harness.suite.schema import Fidelity, Suite

RESTART, BATCH, ENGINE = NOISE
_PACKS, _SCRATCH = ".packs", ".streamed"  # beside the artifacts; no variant can be called so
_TOGETHER = ("torch", "streamed")
_WHOLE = "whole vocabulary"


def prepare(job: Job, names: Sequence[str] | None) -> Work:
    """The source, then the variants and setups to be compared with it, built where missing, and the text's token ids.
    `UserError` for a suite that cannot be measured, before anything is built for it."""
    suite, wanted = job.suite, _wanted(job.suite)
    variants = chosen_variants(suite, names, with_source=True)
    check_engine(suite)
    _check_noise(suite, wanted)
    ids, dataset = tokenized(suite, wanted.text)
    windows = cut(ids, wanted.window)
    if not windows:
        raise UserError(
            f"The text of [fidelity] has {len(ids)} tokens: none of them has one before it.", "Use another."
        )
    chosen = chosen_setups(suite, wanted.setups)
    for one in (suite, *([_noise_suite(suite, wanted)] if wanted.noise_engine else [])):
        check_lengths(one, "fidelity", chosen, len(windows[0]) + 1)
    dataset |= {
        "window": wanted.window,
        "num_windows": len(windows),
        "num_scored": sum(len(window) - 1 for window in windows),
        "distribution": _WHOLE if _computes_together(suite) else f"{wanted.named_tokens} named tokens",
    }
    models = built_models(job, [SOURCE, *(name for name in variants if name != SOURCE)], chosen)
    if SOURCE in variants:
        models += [replace(models[0], variant=name) for name in NOISE if name != ENGINE or wanted.noise_engine]
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
    assert wanted.noise_engine is not None
    return replace(suite, engine=replace(suite.engine, name=wanted.noise_engine))


def cut(ids: Sequence[int], window: int) -> list[list[int]]:
    """Disjoint windows of a text, the last one shorter; none of a single token, which predicts nothing."""
    windows = [list(ids[first : first + window]) for first in range(0, len(ids), window)]
    return [one for one in windows if len(one) > 1]


def compare(job: Job, work: Work, limit: int | None) -> Measured:
    """One run a row, all on the same windows; `limit` keeps the first of them."""
    windows = cut(work.ids, _wanted(job.suite).window)[:limit]
    measured = Measured({}, {})
    if _computes_together(job.suite):
        _together(job, work, windows, measured)
    else:
        _one_after_another(job, work, windows, measured)
    if any(model.variant == ENGINE for model in work.models):
        _other_engine(job, work, windows, measured)
    return measured


def _wanted(suite: Suite) -> Fidelity:
    return required(suite, "fidelity", suite.fidelity)


def _computes_together(suite: Suite) -> bool:
    return suite.engine.name in _TOGETHER


def _batch_size(wanted: Fidelity, model: Model) -> int:
    other = wanted.noise_batch_size or (1 if wanted.batch_size > 1 else 2)
    return other if model.variant == BATCH else wanted.batch_size


def _together(job: Job, work: Work, windows: Sequence[Sequence[int]], measured: Measured) -> None:
    wanted, engine = _wanted(job.suite), job.suite.engine
    source, *others = (model for model in work.models if model.variant != ENGINE)
    variants = [model for model in others if model.variant not in NOISE]
    noise = [model for model in others if model.variant in NOISE]
    passes = [
        ("variants", [source, *variants], wanted.batch_size),
        *((model.variant, [source], _batch_size(wanted, model)) for model in noise),
    ]
    scratch = job.artifacts / job.suite.name / _SCRATCH
    chunks = fidelity.side_by_side(
        *(
            streamed.log_probs(
                [model.folder for model in models],
                windows,
                batch_size,
                dtype=engine.dtype,
                device=engine.device,
                scratch=scratch / name,
                hidden_bytes=streamed.HIDDEN_BYTES // len(passes),
                progress=named(job.progress, name),
            )
            for name, models, batch_size in passes
        )
    )
    alone = replace(job, suite=replace(job.suite, engine=replace(engine, name="streamed")))
    with ExitStack() as stack:
        writers = {}
        for model in [*variants, *noise]:
            with running_engine(alone, model, "score") as computing:
                run = new_run(job, "fidelity", fidelity.VERSION, model, engine=computing, dataset=work.dataset)
            writer = RunWriter(job.results, run, expected=work.dataset["num_windows"])
            writers[model.row] = stack.enter_context(writer)
        for row, sample in fidelity.measure(chunks, windows, list(writers), progress=job.progress):
            writers[row].sample(_placed(sample, wanted))
        measured.records.update({row: store.read(writer.finish()) for row, writer in writers.items()})


def _one_after_another(job: Job, work: Work, windows: Sequence[Sequence[int]], measured: Measured) -> None:
    wanted = _wanted(job.suite)
    source, *others = (model for model in work.models if model.variant != ENGINE)
    with noted_failures(job, "fidelity", fidelity.VERSION, source, work.dataset, measured.failures):
        pack = _pack(job, work, source, windows)
    if source.row in measured.failures:
        return
    for model in others:
        _compare_one(job, work, model, windows, pack, _batch_size(wanted, model), measured)


def _other_engine(job: Job, work: Work, windows: Sequence[Sequence[int]], measured: Measured) -> None:
    """The source on the engine that noise is measured with, beside the source on the suite's own."""
    wanted = _wanted(job.suite)
    source = work.models[0]
    (model,) = (one for one in work.models if one.variant == ENGINE)
    pack = _pack(job, work, source, windows)
    there = replace(job, suite=_noise_suite(job.suite, wanted))
    named_only = replace(work, dataset=work.dataset | {"distribution": f"{pack.num} named tokens"})
    _compare_one(there, named_only, model, windows, pack, wanted.batch_size, measured)


def _compare_one(
    job: Job,
    work: Work,
    model: Model,
    windows: Sequence[Sequence[int]],
    pack: Pack,
    batch_size: int,
    measured: Measured,
) -> None:
    with (
        noted_failures(job, "fidelity", fidelity.VERSION, model, work.dataset, measured.failures),
        running_engine(job, model, "score") as engine,
    ):
        run = new_run(job, "fidelity", fidelity.VERSION, model, engine=engine, dataset=work.dataset)
        with RunWriter(job.results, run, expected=work.dataset["num_windows"]) as writer, said_in(writer):
            for sample in fidelity.measure_top(
                pack.tops(windows),
                engine.top_log_probs(windows, batch_size, pack.num),
                windows,
                model.row,
                progress=named(job.progress, model.row),
            ):
                writer.sample(_placed(sample, _wanted(job.suite)))
            measured.records[model.row] = store.read(writer.finish())


def _pack(job: Job, work: Work, source: Model, windows: Sequence[Sequence[int]]) -> Pack:
    """What the source predicts on the suite's engine: built once, kept beside the artifacts."""
    wanted = _wanted(job.suite)
    identity = {
        "measure_version": fidelity.VERSION,
        **computed_by(job, source),
        "token_ids_sha256": work.dataset["token_ids_sha256"],
        "windows": [wanted.window, len(windows), wanted.batch_size],
        "named_tokens": wanted.named_tokens,
    }
    return pack_of(job.artifacts / job.suite.name / _PACKS, identity, lambda: _predict(job, source, windows))


def _predict(job: Job, source: Model, windows: Sequence[Sequence[int]]) -> Iterator[Top]:
    wanted = _wanted(job.suite)
    engine: Engine
    with running_engine(job, source, "score") as engine:
        for number, top in enumerate(engine.top_log_probs(windows, wanted.batch_size, wanted.named_tokens), 1):
            job.progress(number, len(windows), f"{source.row}: reference pack")
            yield top


def _placed(sample: dict[str, Any], wanted: Fidelity) -> dict[str, Any]:
    return sample | {"first_token": sample["index"] * wanted.window}
