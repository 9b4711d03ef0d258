"""`harness bench`: decode and prefill times of every model, each in several engine starts."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from harness import resolve
from harness.commands.shared import MEASURING, add_shared, measuring_job, print_measured, print_models
from harness.errors import UserError
from harness.suite.names import SOURCE

if TYPE_CHECKING:
    from harness.engines.protocol import Engine
    from harness.job import Job, Measured, Model, Work
    from harness.measure.decode import Shape
    from harness.record.store import RunWriter
    from harness.suite.schema import Bench


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of a measure, and the server."""
    add = parser.add_argument
    add(
        "--server",
        metavar="URL",
        help="measure the running OpenAI-compatible server at this URL, which serves the one --variant",
    )
    add_shared(parser, *MEASURING)


def run(options: argparse.Namespace, given: Sequence[str]) -> int:
    """Times the suite's models, or a server, and prints their speeds."""
    with measuring_job(options, given) as job:
        if options.server:
            if options.engine or options.dtype or len(options.variant or ()) != 1:
                raise UserError("--server takes one --variant, the one it serves, no --engine, no --dtype.", "Name it.")
            job, work = _prepared_server(replace(job, server=options.server), options.variant[0])
        else:
            work = _prepared(job, options.variant)
        print_models(options, work.models)
        measured = _measured(job, work, options.limit)
        frames = []
        if measured.records and job.suite.bench is not None:
            from harness.report import runs, speed_tables

            # Beside the newest stored run of the source, where this command measured none.
            is_measured = SOURCE in measured.records
            stored = {} if is_measured else runs.newest_runs(job.stored(), job.suite.name, "bench", (SOURCE,))
            frames = speed_tables.bench_tables({**stored, **measured.records}, job.suite.bench.versus)
    return print_measured(options, measured.records, frames, measured.failures)


def _prepared(job: Job, names: Sequence[str] | None) -> Work:
    """The source and the variants that speed is measured of, built where missing, and the text's token ids. `UserError`
    for a suite that cannot be measured, before anything is built for it."""
    from harness.job import Work

    suite = job.suite
    variants = resolve.chosen_variants(suite, names, with_source=True)
    bench = resolve.required(suite, "bench", suite.bench)
    if bench.variants is not None and names is None:
        resolve.chosen_variants(suite, bench.variants, with_source=True)
        variants = [name for name in variants if name in (SOURCE, *bench.variants)]
    setups = resolve.chosen_setups(suite, bench.setups)
    resolve.check_lengths(suite, "bench", setups, _longest(bench))
    bench, ids, dataset = _text(job)
    return Work(job.models(variants, setups), ids, dataset)


def _longest(bench: Bench) -> int:
    """The most tokens of a sequence, those that check coherence included."""
    from harness.measure.decode import COHERENCE_TOKENS

    checked = max(_depths(bench)) + COHERENCE_TOKENS + 1
    return max(checked, *(shape.prompt_tokens + shape.new_tokens for shape in _shapes(bench)))


def _prepared_server(job: Job, variant: str) -> tuple[Job, Work]:
    """The job and the work of measuring a running server, which serves `variant` by its owner's word."""
    from harness.job import Model, Work
    from harness.suite.schema import EngineOptions

    resolve.chosen_variants(job.suite, [variant], with_source=True)
    bench, ids, dataset = _text(job)
    suite = replace(job.suite, engine=EngineOptions("server"), bench=replace(bench, starts=1))
    return replace(job, suite=suite), Work([Model(variant, job.source, None)], ids, dataset)


def _text(job: Job) -> tuple[Bench, list[int], dict[str, Any]]:
    """The suite's [bench] table, and the token ids of its text; `UserError` for a text that is too short."""
    from harness.measure import decode

    bench = resolve.required(job.suite, "bench", job.suite.bench)
    ids, dataset = resolve.tokenized(job.suite, bench.text)
    for shape in _shapes(bench):
        decode.prompts(ids, shape.batch, shape.prompt_tokens)
    decode.prompts(ids, 1, max(_depths(bench)) + decode.COHERENCE_TOKENS)
    return bench, ids, dataset


def _shapes(bench: Bench) -> list[Shape]:
    """What is timed, in the order in which it is."""
    from harness.measure.decode import Shape

    shapes = [
        Shape("prefill", 1, bench.prefill_tokens, 1),
        *(Shape("decode", batch, bench.prompt_tokens, bench.new_tokens) for batch in bench.batch_sizes),
        # There is no empty prompt: depth 0 is the text's first token.
        *(Shape("decode", 1, max(depth, 1), bench.depth_tokens) for depth in bench.depths or ()),
    ]
    return list(dict.fromkeys(shapes))


def _depths(bench: Bench) -> list[int]:
    """The prompt lengths after which a model must be coherent: what corrupts a cache may show only after a while."""
    from harness.measure.decode import COHERENCE_TOKENS

    return [COHERENCE_TOKENS, *(depth for depth in bench.depths or () if depth > COHERENCE_TOKENS)]


def _measured(job: Job, work: Work, limit: int | None) -> Measured:
    """Decode and prefill times. The engine is started anew for every variant and round, and the order of the variants
    turns round after each (A B, B A, …), so that a machine that slows down slows all of them alike."""
    from harness.job import Measured, failure_in
    from harness.measure import decode
    from harness.record.store import RunWriter, read

    bench = job.suite.bench
    assert bench is not None
    shapes = _shapes(bench)
    timed = bench.starts * ((bench.warmups + bench.repetitions) * len(shapes) + 1)
    measured = Measured()
    with ExitStack() as stack:
        writers: dict[str, RunWriter] = {}
        for start in range(bench.starts):
            for model in work.models[:: 1 if start % 2 == 0 else -1]:
                if model.row in measured.failures:
                    continue
                with (
                    job.noted_failures("bench", decode.VERSION, model, work.dataset, measured.failures),
                    job.engine(model, "decode", longest=_longest(bench), batch=max(bench.batch_sizes)) as engine,
                ):
                    is_new = model.row not in writers
                    depths = _depths(bench) if is_new and engine.info.can_score else []
                    if is_new:
                        run = job.new_run("bench", decode.VERSION, model, engine=engine, dataset=work.dataset)
                        writer = RunWriter(job.results, run, expected=len(depths) + timed)
                        writers[model.row] = stack.enter_context(writer)
                    writer = writers[model.row]
                    with failure_in(writer):
                        for depth in depths:
                            writer.sample(_coherent(job, engine, work, model, depth))
                        samples = decode.speed_samples(
                            engine,
                            work.ids,
                            shapes,
                            start=start,
                            repetitions=bench.repetitions if limit is None else min(limit, bench.repetitions),
                            warmups=bench.warmups,
                            progress=job.named_progress(f"{model.row}, start {start + 1} of {bench.starts}"),
                        )
                        for sample in samples:
                            writer.sample(sample)
        for row, writer in writers.items():
            if row not in measured.failures:
                measured.records[row] = read(writer.finish())
    return measured


def _coherent(job: Job, engine: Engine, work: Work, model: Model, prompt_tokens: int) -> dict[str, Any]:
    """The sample of the check that comes before any speed; `EngineDied` where the model writes gibberish."""
    from harness.engines.protocol import EngineDied
    from harness.measure import decode

    sample = decode.coherence(engine, work.ids, resolve.source_config(job.source).vocab_size, prompt_tokens)
    accepted = sample["acceptance_share"]
    if accepted is not None and accepted < decode.LEAST_ACCEPTANCE:
        raise EngineDied(
            f"{model.row} accepts {accepted:.0%} of what its MTP head drafts.",
            "The head's weights were not loaded or never trained: run `harness verify`, or leave speculation out.",
        )
    if not sample["coherent"]:
        raise EngineDied(
            f"{model.row} writes gibberish after {prompt_tokens:,} tokens: its own text costs it "
            f"{sample['generated_nll_nats']:.2f} nats a token and real text {sample['text_nll_nats']:.2f}, where at "
            f"most {sample['limit_nats']:.2f} is sense.",
            "Its speed means nothing. Look at its perplexity, and at the kernels that ran.",
        )
    return sample
