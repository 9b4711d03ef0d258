"""`harness ppl`: the suite's text cut by every protocol, then every model over the windows that are missing.

A run is one protocol on one model. Protocols that cut the text alike read the same log-probabilities, which lie beside
the artifacts: a second protocol needs no model, and a command that was interrupted goes on at the window it was in.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from harness import resolve
from harness.commands.shared import MEASURING, add_shared, measuring_job, print_measured, print_models, stored_noise
from harness.errors import UserError
from harness.suite.names import SOURCE

if TYPE_CHECKING:
    from harness.engines.protocol import Engine
    from harness.job import Job, MeasuredByName, Model
    from harness.measure.perplexity import Protocol, Window
    from harness.record.run import Record
    from harness.suite.schema import Perplexity, Suite

_STORED = ".log-probs"  # no variant can be called so


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of a measure that keeps what it computes."""
    add_shared(parser, *MEASURING, "--fresh")


def run(options: argparse.Namespace, given: Sequence[str]) -> int:
    """Measures the suite's models and prints their perplexities, beside stored ones of a source not measured now."""
    with measuring_job(options, given) as job:
        models, readings = _prepared(job, options.variant)
        print_models(options, models)
        found = _measured(job, models, readings, options.limit, fresh=options.fresh)

        from harness.report import quality_tables, runs

        stored = runs.newest_by_protocol(job.stored(), job.suite.name, list(found.records), (SOURCE,))
        shown = {name: {**stored.get(name, {}), **rows} for name, rows in found.records.items()}
        frame = quality_tables.perplexity_table(shown, quality_tables.log_ppl_floor(stored_noise(job), shown))
    frames = [frame] if found.records else []
    notes = runs.reused(found.records, "windows")
    return print_measured(options, found.records, frames, found.failures, notes=notes)


@dataclass(frozen=True)
class _Reading:
    """A text as a protocol reads it."""

    protocol: Protocol
    ids: Sequence[int]
    cut: list[Window]  # all windows of the text, those whose log-probabilities are kept
    windows: list[Window]  # the windows that the protocol scores: the first of `cut`, or all
    dataset: dict[str, Any]  # what a run's header says of the text

    @property
    def what_is_read(self) -> tuple[str, str]:
        """Equal for readings that the same log-probabilities serve."""
        from harness.measure import perplexity

        return self.dataset["token_ids_sha256"], perplexity.windows_digest(self.cut)


def _prepared(job: Job, names: Sequence[str] | None) -> tuple[list[Model], list[_Reading]]:
    """The source and the variants, built where missing, and the text by every protocol of the suite. `UserError` for a
    suite that cannot be measured or a text that is not the expected one, before anything is built."""
    from harness.measure import perplexity

    suite, wanted = job.suite, resolve.required(job.suite, "ppl", job.suite.ppl)
    variants = resolve.chosen_variants(suite, names, with_source=True)
    protocols = [perplexity.get_protocol(name) for name in wanted.protocols]
    readings = [(_by_page if one.window is None else _by_window)(suite, wanted, one) for one in protocols]
    for reading in readings:
        _check_counts(wanted, reading)
    setups = resolve.chosen_setups(suite, wanted.setups)
    resolve.check_lengths(suite, "ppl", setups, _longest(readings))
    return job.models(variants, setups), readings


def _longest(readings: Sequence[_Reading]) -> int:
    """The most tokens of a sequence: the longest window, and the token that an engine writes after it."""
    return 1 + max(window.num_tokens for reading in readings for window in reading.cut)


def _by_window(suite: Suite, wanted: Perplexity, protocol: Protocol) -> _Reading:

    from harness.measure import perplexity

    ids, dataset = resolve.tokenized(suite, wanted.text)
    cut, scored = (perplexity.windows(one, len(ids)) for one in (perplexity.whole(protocol), protocol))
    return _Reading(protocol, ids, cut, scored, dataset | _header(protocol, scored))


def _by_page(suite: Suite, wanted: Perplexity, protocol: Protocol) -> _Reading:
    from harness.measure import perplexity, wikitext
    from harness.measure.lm import Texts, rolling_window

    about, text = resolve.read_text(suite, wanted.text, as_lines=True)
    longest = resolve.max_length(suite, wanted.max_length, wanted.setups)
    window = rolling_window(longest, suite.engine.name)
    if window < 1:
        raise UserError(
            f"{protocol.name} has no window in sequences of {longest} tokens on {suite.engine.name}.",
            "Raise max_length in [ppl], or max_model_len.",
        )
    found = wikitext.tokenize_pages(wikitext.pages(text), Texts(resolve.suite_source(suite)), window)
    dataset = {
        **about,
        "token_ids_sha256": perplexity.token_ids_digest(found.ids),
        "num_tokens": sum(found.num_tokens),
        **_header(protocol, found.windows),
        "documents": {"num_words": found.num_words, "num_tokens": found.num_tokens},
    }
    return _Reading(protocol, found.ids, found.windows, found.windows, dataset)


def _header(protocol: Protocol, windows: Sequence[Window]) -> dict[str, Any]:
    return {
        "protocol": protocol.name,
        "unit": protocol.unit,
        "num_windows": len(windows),
        "num_scored": sum(window.num_scored for window in windows),
    }


def _check_counts(wanted: Perplexity, reading: _Reading) -> None:
    """`UserError` where the suite expects other numbers of tokens or windows."""
    name, dataset = reading.protocol.name, reading.dataset
    for key, expected in vars(wanted.expected[name]).items() if name in wanted.expected else ():
        if expected is not None and expected != dataset[key]:
            raise UserError(
                f"{dataset['name']} has {key} = {dataset[key]:,} by {name}, and the suite expects {expected:,}.",
                "This is another text or another tokenizer, whose perplexity cannot be compared: correct "
                f"[ppl] text, or [ppl.expected.{name}].",
            )


def _measured(
    job: Job, models: Sequence[Model], readings: Sequence[_Reading], limit: int | None, *, fresh: bool
) -> MeasuredByName:
    """One run a protocol and row. `limit` reads the first windows only; `fresh` forgets what earlier runs computed. An
    engine that dies takes its own row with it, and what it computed stays."""
    from harness.job import MeasuredByName
    from harness.measure import perplexity

    measured = MeasuredByName()
    for model in models:
        with job.noted_failures("ppl", perplexity.VERSION, model, None, measured.failures):
            for name, record in _runs(job, model, readings, limit, fresh):
                measured.records.setdefault(name, {})[model.row] = record
    return measured


def _runs(
    job: Job, model: Model, readings: Sequence[_Reading], limit: int | None, fresh: bool
) -> Iterator[tuple[str, Record]]:
    """The runs of one model by all protocols."""
    sharing: dict[tuple[str, str], list[_Reading]] = {}
    for reading in readings:
        sharing.setdefault(reading.what_is_read, []).append(reading)
    assert job.suite.ppl is not None
    batch_size = job.suite.ppl.batch_size
    with ExitStack() as stack:

        @cache
        def start() -> Engine:
            return stack.enter_context(job.engine(model, "score", longest=_longest(readings), batch=batch_size))

        for alike in sharing.values():
            yield from _runs_alike(job, model, alike, start, limit, fresh)


def _runs_alike(
    job: Job, model: Model, readings: Sequence[_Reading], start: Callable[[], Engine], limit: int | None, fresh: bool
) -> Iterator[tuple[str, Record]]:
    """The runs of one model by protocols that read the same; `start` gives the engine, which may not be needed."""
    from harness.measure import perplexity
    from harness.measure.kept import LogProbs
    from harness.record.run import new_id

    assert job.suite.ppl is not None
    first, batch_size = readings[0], job.suite.ppl.batch_size
    token_ids, windows_digest = first.what_is_read
    identity = {  # whose log-probabilities these are: this checkpoint's, of these windows, by what would be started now
        "measure_version": perplexity.VERSION,
        **job.computed_by(model),
        "batch_size": batch_size,
        "token_ids_sha256": token_ids,
        "windows_sha256": windows_digest,
    }
    num_windows = max(len(reading.windows[:limit]) for reading in readings)
    lengths = [window.num_tokens for window in first.cut]
    with LogProbs(job.artifact(_STORED), model.row, identity, lengths, fresh=fresh) as stored:
        if len(stored) < num_windows:
            engine = start()
            run = job.new_run("ppl", perplexity.VERSION, model, engine=engine, dataset=first.dataset)
            assert run.engine is not None
            with job.recorded_failure(run):
                num_reused = perplexity.extend(
                    stored,
                    engine,
                    run.engine,
                    first.ids,
                    first.cut,
                    num_windows,
                    batch_size=batch_size,
                    name=", ".join(reading.protocol.name for reading in readings),
                    progress=job.named_progress(model.row),
                )
        else:
            run = replace(job.new_run("ppl", perplexity.VERSION, model), engine=stored.engine)
            num_reused = num_windows
        for reading in readings:
            windows = reading.windows[:limit]
            dataset = {**reading.dataset, "log_probs_sha256": stored.sha256(len(windows))}
            reused = {"num_windows": len(windows), "num_reused": min(num_reused, len(windows))}
            # A sample for each window, and one that says how many are of earlier runs.
            samples = [*perplexity.window_samples(windows, stored.rows(len(windows))), {"kind": "reused", **reused}]
            of_protocol = replace(run, run_id=new_id(), dataset=dataset)
            yield reading.protocol.name, job.store(of_protocol, samples, expected=len(reading.windows) + 1)
