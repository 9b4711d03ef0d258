"""What `harness ppl` does, without a word printed: the suite's text cut by every protocol, checked before any model is
loaded, then every model over the windows that are missing.

One run is one protocol on one model. Protocols that cut the text alike read the same log-probabilities, which lie
beside the artifacts: a second protocol needs no model, and a command that was interrupted goes on at the window it was
in.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from harness.engines.protocol import Engine, EngineDied
from harness.errors import UserError
from harness.measure import perplexity
from harness.measure.log_probs import LogProbs
from harness.measure.perplexity import Protocol, Window
from harness.progress import named
from harness.record import schema, store
from harness.record.schema import Run
from harness.record.store import Record, RunWriter
from harness.stages import (
    Job,
    Model,
    built_models,
    check_engine,
    check_lengths,
    chosen_setups,
    chosen_variants,
    computed_by,
    max_length,
    new_run,
    noted_failures,
    read_text,
    required,
    running_engine,
    suite_source,
    tokenized,
    write_failure,
)
from harness.suite.names import SOURCE
from harness.suite.schema import Perplexity, Suite

_STORED = ".log-probs"  # no variant can be called so


@dataclass(frozen=True)
class Reading:
    """A text as a protocol reads it."""

    protocol: Protocol
    ids: Sequence[int]
    cut: list[Window]
    """All windows of the text, those whose log-probabilities are kept."""
    windows: list[Window]
    """Those that the protocol scores: the first of `cut`, or all."""
    dataset: dict[str, Any]
    """What a run's header says of it."""

    @property
    def what_is_read(self) -> tuple[str, str]:
        """Equal for readings that the same log-probabilities serve."""
        return self.dataset["token_ids_sha256"], perplexity.windows_digest(self.cut)


@dataclass(frozen=True)
class Work:
    """The models in their setups, and what they read."""

    models: list[Model]
    readings: list[Reading]


@dataclass(frozen=True)
class Measured:
    """Records by protocol and row, and the reasons of the rows that failed."""

    records: dict[str, dict[str, Record]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def prepare(job: Job, names: Sequence[str] | None) -> Work:
    """The source and the variants, built where missing, and the text by every protocol of the suite. `UserError` for a
    suite that cannot be measured or a text that is not the expected one, before anything is built."""
    check_engine(job.suite)
    suite, wanted = job.suite, _wanted(job.suite)
    variants = chosen_variants(suite, names, with_source=True)
    protocols = [perplexity.get_protocol(name) for name in wanted.protocols]
    readings = [_by_page(suite, one) if one.window is None else _by_window(suite, one) for one in protocols]
    for reading in readings:
        _check_counts(wanted, reading)
    setups = chosen_setups(suite, wanted.setups)
    check_lengths(suite, "ppl", setups, 1 + max(window.num_tokens for one in readings for window in one.windows))
    return Work(built_models(job, variants, setups), readings)


def _wanted(suite: Suite) -> Perplexity:
    return required(suite, "ppl", suite.ppl)


def _by_window(suite: Suite, protocol: Protocol) -> Reading:
    ids, dataset = tokenized(suite, _wanted(suite).text)
    cut, windows = (perplexity.windows(one, len(ids)) for one in (perplexity.whole(protocol), protocol))
    return Reading(protocol, ids, cut, windows, dataset | _header(protocol, windows))


def _by_page(suite: Suite, protocol: Protocol) -> Reading:
    from harness.measure import wikitext
    from harness.measure.lm import Texts, rolling_window

    wanted = _wanted(suite)
    about, text = read_text(suite, wanted.text, as_lines=True)
    longest = max_length(suite, wanted.max_length, wanted.setups)
    window = rolling_window(longest, suite.engine.name)
    if window < 1:
        raise UserError(
            f"{protocol.name} has no window in sequences of {longest} tokens on {suite.engine.name}.",
            "Raise max_length in [ppl], or max_model_len.",
        )
    found = wikitext.read(wikitext.pages(text), Texts(suite_source(suite)), window)
    dataset = {
        **about,
        "token_ids_sha256": perplexity.token_ids_digest(found.ids),
        "num_tokens": sum(found.num_tokens),
        **_header(protocol, found.windows),
        "documents": {"num_words": found.num_words, "num_tokens": found.num_tokens},
    }
    return Reading(protocol, found.ids, found.windows, found.windows, dataset)


def _header(protocol: Protocol, windows: Sequence[Window]) -> dict[str, Any]:
    return {
        "protocol": protocol.name,
        "unit": protocol.unit,
        "num_windows": len(windows),
        "num_scored": sum(window.num_scored for window in windows),
    }


def _check_counts(wanted: Perplexity, reading: Reading) -> None:
    """`UserError` where the suite expects other numbers of tokens or windows."""
    name, dataset = reading.protocol.name, reading.dataset
    for key, expected in vars(wanted.expected[name]).items() if name in wanted.expected else ():
        if expected is not None and expected != dataset[key]:
            raise UserError(
                f"{dataset['name']} has {key} = {dataset[key]:,} by {name}, and the suite expects {expected:,}.",
                "This is another text or another tokenizer, whose perplexity cannot be compared: correct "
                f"[ppl] text, or [ppl.expected.{name}].",
            )


def measure(job: Job, work: Work, limit: int | None = None, *, fresh: bool = False) -> Measured:
    """One run a protocol and row. `limit` reads the first windows only; `fresh` forgets what earlier runs computed. An
    engine that dies takes its own row with it, and what it computed stays."""
    measured = Measured()
    for model in work.models:
        with noted_failures(job, "ppl", perplexity.VERSION, model, None, measured.failures):
            for name, record in _read_all(job, model, work.readings, limit, fresh):
                measured.records.setdefault(name, {})[model.row] = record
    return measured


def _read_all(
    job: Job, model: Model, readings: Sequence[Reading], limit: int | None, fresh: bool
) -> Iterator[tuple[str, Record]]:
    """The runs of one model by all protocols."""
    sharing: dict[tuple[str, str], list[Reading]] = {}
    for reading in readings:
        sharing.setdefault(reading.what_is_read, []).append(reading)
    with ExitStack() as stack:

        @cache
        def start() -> Engine:
            return stack.enter_context(running_engine(job, model, "score"))

        for alike in sharing.values():
            yield from _read(job, model, alike, start, limit, fresh)


def _read(
    job: Job,
    model: Model,
    readings: Sequence[Reading],
    start: Callable[[], Engine],
    limit: int | None,
    fresh: bool,
) -> Iterator[tuple[str, Record]]:
    """The runs of one model by protocols that read the same; `start` gives the engine, which may not be needed."""
    one, wanted = readings[0], _wanted(job.suite)
    num_windows = max(len(reading.windows[:limit]) for reading in readings)
    lengths = [window.num_tokens for window in one.cut]
    folder = job.artifacts / job.suite.name / _STORED
    with LogProbs(folder, model.row, _identity(job, model, one), lengths, fresh=fresh) as stored:
        if len(stored) < num_windows:
            run = new_run(job, "ppl", perplexity.VERSION, model, engine=(engine := start()), dataset=one.dataset)
            assert run.engine is not None
            with _recorded_failure(job.results, run):
                num_reused = perplexity.extend(
                    stored,
                    engine,
                    run.engine,
                    one.ids,
                    one.cut,
                    num_windows,
                    batch_size=wanted.batch_size,
                    name=", ".join(reading.protocol.name for reading in readings),
                    progress=named(job.progress, model.row),
                )
        else:
            run = replace(new_run(job, "ppl", perplexity.VERSION, model), engine=stored.engine)
            num_reused = num_windows
        for reading in readings:
            windows = reading.windows[:limit]
            dataset = {**reading.dataset, "log_probs_sha256": stored.sha256(len(windows))}
            of_protocol = replace(run, run_id=schema.new_id(), dataset=dataset)
            # A sample for each window, and one that says how many are of earlier runs.
            with RunWriter(job.results, of_protocol, expected=len(reading.windows) + 1) as writer:
                for sample in perplexity.samples(windows, stored.rows(len(windows))):
                    writer.sample(sample)
                reused = min(num_reused, len(windows))
                writer.sample({"kind": "reused", "num_windows": len(windows), "num_reused": reused})
                yield reading.protocol.name, store.read(writer.finish())


def _identity(job: Job, model: Model, reading: Reading) -> dict[str, Any]:
    """Whose log-probabilities a file holds: this checkpoint's, of these windows, by what would be started now."""
    token_ids, windows = reading.what_is_read
    return {
        "measure_version": perplexity.VERSION,
        **computed_by(job, model),
        "batch_size": _wanted(job.suite).batch_size,
        "token_ids_sha256": token_ids,
        "windows_sha256": windows,
    }


@contextmanager
def _recorded_failure(folder: Path, run: Run) -> Iterator[None]:
    """Keeps in a record of its own what an engine said as it died."""
    try:
        yield
    except EngineDied as error:
        with RunWriter(folder, run) as writer:
            write_failure(writer, error)
        error.recorded = True
        raise


def with_stored_source(job: Job, measured: Mapping[str, Mapping[str, Record]]) -> dict[str, dict[str, Record]]:
    """The measured runs of each protocol beside the newest stored one of the source, where this command measured
    none."""
    from harness.report import runs

    stored, _ = store.read_all(job.results)
    source = runs.newest_by_protocol(stored, job.suite.name, list(measured), (SOURCE,))
    return {name: {**source.get(name, {}), **rows} for name, rows in measured.items()}
