"""What each subcommand does, without a word printed: suites in, records out.

The rooms below do not know each other: the builder knows no suite, a measure does not know where its samples go.
Here they are put together. Every stage builds what is missing, opens one engine at a time, and stores each run
as one record.
"""

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import harness
from harness import suite as suites
from harness.audit import verify as audit
from harness.demo import checkpoint_path, corpus
from harness.engines.protocol import ENGINES, Engine, open_engine
from harness.errors import UserError, did_you_mean
from harness.formats.config import num_bytes
from harness.measure import decode, perplexity, texts
from harness.model.census import SourceTensor, kv_bytes_per_token, source_tensors, state_bytes
from harness.model.checkpoint import SINGLE, open_checkpoint, read_index, read_json
from harness.model.qwen35 import ModelConfig, expected_tensors, parse_config
from harness.model.sources import fetched_revision, locate
from harness.progress import Progress
from harness.quantize import build as builder
from harness.quantize import samples, sensitivity
from harness.quantize.layerwise import Calibration
from harness.quantize.plan import Plan, plan
from harness.quantize.recipes import Recipe, recipe_named
from harness.record import provenance, results
from harness.record.results import Record, Run, RunWriter
from harness.suite import SOURCE, DatasetText, DemoText, FileText, Suite, Text

T = TypeVar("T")

_DEMO = "demo:"
_DEMO_TEXTS = {"heldout": corpus.heldout_text}


def _calibration_documents(split: corpus.Split) -> Iterator[str]:
    for document in corpus.documents(split, num_documents=_NUM_CALIBRATION_DOCUMENTS):
        yield document.text + corpus.END_OF_TEXT


_NUM_CALIBRATION_DOCUMENTS = 1000
_CALIBRATION_TEXTS: dict[str, Callable[[], Iterator[str]]] = {
    "train": partial(_calibration_documents, "train"),
    "validation": partial(_calibration_documents, "validation"),
}


@dataclass(frozen=True)
class Job:
    """One command over one suite: where things lie, and how it tells its progress."""

    suite: Suite
    artifacts: Path
    results: Path
    progress: Progress
    command: tuple[str, ...]
    session_id: str

    def artifact(self, variant: str) -> Path:
        return self.artifacts / self.suite.name / variant

    @cached_property
    def calibration(self) -> Calibration | None:
        """The suite's calibration set as token ids, read once a command."""
        wanted, source = self.suite.calibration, _suite_source(self.suite)
        return None if wanted is None else read_calibration(wanted, self.suite.folder, source, self.progress)


def find_source(location: str, revision: str | None = None, *, config_only: bool = False) -> Path:
    """The folder of a source: an embedded model (`demo:dense`), a folder or a hub id."""
    if location.startswith(_DEMO):
        return checkpoint_path(location.removeprefix(_DEMO))
    return locate(location, revision, config_only=config_only)


def plan_source(location: str, recipe: Recipe | None, revision: str | None = None) -> tuple[ModelConfig, Plan]:
    """The plan of a recipe for a `config.json`, a folder or a hub id. Weights are not read: where shards lie
    beside the configuration their headers say what there is, else the configuration does, without an MTP head."""
    path = Path(location)
    if path.is_file():
        config_file, folder = path, None
    else:
        folder = find_source(location, revision, config_only=True)
        config_file = folder / "config.json"
    config_json = read_json(config_file)
    config = parse_config(config_json, str(config_file))
    if "quantization_config" in config_json:
        raise UserError(f"{location} is quantized already.", "Plan from its 16-bit source.")
    tensors = _census(folder, config)
    unknown = [tensor.name for tensor in tensors if tensor.role is None]
    if unknown:
        raise UserError(
            f"{location} has {len(unknown)} tensors that its architecture has not, such as {unknown[0]}.",
            "Plan from the published layout of the model.",
        )
    return config, plan(config, tensors, recipe)


def _census(folder: Path | None, config: ModelConfig) -> tuple[SourceTensor, ...]:
    with_mtp = False
    if folder is not None:
        index = read_index(folder) or {}
        if all((folder / shard).exists() for shard in set(index.values()) or {SINGLE}):
            entries = open_checkpoint(folder).tensors.values()
            return source_tensors((entry.name, entry.shape, entry.num_bytes) for entry in entries)
        with_mtp = any(name.startswith("mtp.") for name in index)
    tensors = expected_tensors(config, with_mtp=with_mtp)
    return source_tensors((name, shape, num_bytes("BF16", shape)) for name, shape in tensors)


def chosen_variants(suite: Suite, names: Sequence[str] | None, *, with_source: bool) -> list[str]:
    """The variants that a command is about: the named ones, or all of the suite, the source first."""
    known = [SOURCE, *suite.variants] if with_source else list(suite.variants)
    for name in names or ():
        if name not in known:
            raise UserError(f"Suite '{suite.name}' has no variant '{name}'.", did_you_mean(name, known))
    return [name for name in known if not names or name in names]


def read_calibration(wanted: suites.Calibration, folder: Path, source: Path, progress: Progress) -> Calibration:
    """The token ids of a calibration table whose relative paths start at `folder`, by the tokenizer of `source`."""
    read = samples.read(wanted, source, folder, _CALIBRATION_TEXTS, progress)
    return Calibration(read, wanted.batch_tokens, round(wanted.hidden_memory_gb * 1e9))


def build_variant(job: Job, variant: str) -> builder.Artifact:
    """Builds a variant of the suite, or finds it built. A build is recorded."""
    wanted = job.suite.variants[variant]
    recipe = recipe_named(wanted.recipe).with_method(wanted.scales, wanted.codes)
    source = _suite_source(job.suite)
    calibration = job.calibration if recipe.needs_calibration else None
    artifact = builder.build(source, recipe, job.artifact(variant), job.progress, calibration)
    if not artifact.reused:
        run = _run(job, "build", builder.VERSION, variant, artifact.digest)
        with RunWriter(job.results, run) as writer:
            for count in artifact.counts:
                writer.sample({"kind": "role", **vars(count)})
            for name, seconds in artifact.stage_seconds:
                writer.sample({"kind": "stage", "name": name, "seconds": seconds})
            total = sum(count.output_bytes for count in artifact.counts)
            peak = provenance.peak_rss_bytes()
            writer.sample({"kind": "totals", "peak_rss_bytes": peak, "output_bytes": total})
            for layer in artifact.layers:
                writer.sample({"kind": "layer", "index": layer["index"], "seconds": layer["seconds"]})
                for group in layer["groups"]:
                    writer.sample({"kind": "group", "index": layer["index"], **group})
                for expert, num_tokens in enumerate(layer["routed"] or ()):
                    routed = {"index": layer["index"], "expert": expert, "num_tokens": num_tokens}
                    writer.sample({"kind": "expert", **routed})
            if artifact.layers:
                memory = {
                    "planned_memory_bytes": artifact.planned_memory_bytes,
                    "peak_vram_bytes": artifact.peak_vram_bytes,
                }
                writer.sample({"kind": "calibration", "num_tokens": artifact.num_calibration_tokens, **memory})
            writer.finish()
    return artifact


def verify_variant(job: Job, variant: str) -> audit.Verification:
    """Checks a variant of the suite against its source, and records what was found."""
    artifact = build_variant(job, variant)
    verification = audit.verify(artifact.folder, _suite_source(job.suite), job.progress)
    run = _run(job, "verify", audit.VERSION, variant, artifact.digest)
    with RunWriter(job.results, run) as writer:
        for trip in verification.round_trips:
            snr = trip.snr_db if trip.relative_l2_error > 0 else None
            writer.sample({"kind": "roundtrip", **vars(trip), "snr_db": snr})
        for finding in verification.findings:
            writer.sample({"kind": "finding", **vars(finding)})
        writer.finish()
    return verification


@dataclass(frozen=True)
class Model:
    """A checkpoint to be measured; `reused` is None for the source, which is never built."""

    folder: Path
    digest: str
    reused: bool | None = None


@dataclass(frozen=True)
class Work:
    """What a measure needs: the checkpoints by variant, and one tokenization of the text for all of them."""

    models: dict[str, Model]
    ids: list[int]
    dataset: dict[str, Any]


def prepare(job: Job, measure: str, names: Sequence[str] | None) -> Work:
    """The source and the variants that a measure is about, built where missing, and the text's token ids.

    `UserError` for a suite that cannot be measured, before anything is built for it.
    """
    variants = chosen_variants(job.suite, names, with_source=True)
    engine = job.suite.engine.name
    if engine not in ENGINES:
        raise UserError(f"There is no engine '{engine}'.", did_you_mean(engine, ENGINES))
    if measure == "ppl":
        wanted = _required(job.suite, "ppl", job.suite.ppl)
        protocol = perplexity.get_protocol(wanted.protocol)
        ids, dataset = _tokens(job.suite, wanted.text)
        windows = perplexity.windows(protocol, len(ids))
        dataset |= {
            "protocol": protocol.name,
            "num_windows": len(windows),
            "num_scored": sum(window.num_scored for window in windows),
        }
    else:
        bench = _required(job.suite, "bench", job.suite.bench)
        ids, dataset = _tokens(job.suite, bench.text)
        decode.prompts(ids, 1, bench.prefill_tokens)
        decode.prompts(ids, max(bench.batch_sizes), bench.prompt_tokens)
        if bench.variants is not None and names is None:
            chosen_variants(job.suite, bench.variants, with_source=True)
            variants = [name for name in variants if name in (SOURCE, *bench.variants)]
    models = {}
    for name in variants:
        if name == SOURCE:
            folder = _suite_source(job.suite)
            models[name] = Model(folder, _fingerprint(folder))
        else:
            artifact = build_variant(job, name)
            models[name] = Model(artifact.folder, artifact.digest, artifact.reused)
    return Work(models, ids, dataset)


@cache
def _fingerprint(source: Path) -> str:
    return open_checkpoint(source).fingerprint()


def measure_perplexity(job: Job, work: Work, limit: int | None) -> dict[str, Record]:
    """One run a variant, all on the same token ids."""
    wanted = _required(job.suite, "ppl", job.suite.ppl)
    protocol = perplexity.get_protocol(wanted.protocol)
    records = {}
    for variant, model in work.models.items():
        with _engine(job, variant, model) as engine:
            run = _run(job, "ppl", perplexity.VERSION, variant, model.digest, engine, work.dataset)
            with RunWriter(job.results, run, expected=work.dataset["num_windows"]) as writer:
                samples = perplexity.measure(
                    engine,
                    work.ids,
                    protocol,
                    batch_size=wanted.batch_size,
                    limit=limit,
                    progress=_named(job.progress, variant),
                )
                for sample in samples:
                    writer.sample(sample)
                records[variant] = results.read(writer.finish())
    return records


def measure_decode(job: Job, work: Work, limit: int | None) -> dict[str, Record]:
    """Decode and prefill times. The engine is started anew for every variant and round, and the order of the variants
    turns round after each (A B, B A, …), so that a machine that slows down slows all of them alike."""
    wanted = _required(job.suite, "bench", job.suite.bench)
    repetitions = wanted.repetitions if limit is None else min(limit, wanted.repetitions)
    expected = wanted.starts * ((wanted.warmups + wanted.repetitions) * (1 + len(wanted.batch_sizes)) + 1)
    records = {}
    with ExitStack() as stack:
        writers: dict[str, RunWriter] = {}
        for start in range(wanted.starts):
            for variant in list(work.models)[:: 1 if start % 2 == 0 else -1]:
                model = work.models[variant]
                with _engine(job, variant, model) as engine:
                    if variant not in writers:
                        run = _run(job, "bench", decode.VERSION, variant, model.digest, engine, work.dataset)
                        writers[variant] = stack.enter_context(RunWriter(job.results, run, expected=expected))
                    samples = decode.measure(
                        engine,
                        work.ids,
                        start=start,
                        prompt_tokens=wanted.prompt_tokens,
                        new_tokens=wanted.new_tokens,
                        prefill_tokens=wanted.prefill_tokens,
                        batch_sizes=wanted.batch_sizes,
                        repetitions=repetitions,
                        warmups=wanted.warmups,
                        progress=_named(job.progress, f"{variant}, start {start + 1} of {wanted.starts}"),
                    )
                    for sample in samples:
                        writers[variant].sample(sample)
        for variant, writer in writers.items():
            records[variant] = results.read(writer.finish())
    return records


def measure_sensitivity(job: Job) -> Record:
    """What each format would cost each group of the source's layers, on the suite's calibration samples."""
    _required(job.suite, "calibration", job.suite.calibration)
    source, calibration = _suite_source(job.suite), job.calibration
    assert calibration is not None
    dataset = {
        "name": ", ".join(one["name"] for one in calibration.samples.manifest["sources"]),
        "token_ids_sha256": calibration.samples.digest,
        "num_samples": len(calibration.samples.samples),
        "num_tokens": calibration.samples.num_tokens,
    }
    run = _run(job, "sensitivity", sensitivity.VERSION, SOURCE, _fingerprint(source), dataset=dataset)
    run = replace(run, engine=sensitivity.computed_by(calibration).as_dict())
    job.artifacts.mkdir(parents=True, exist_ok=True)
    with (
        RunWriter(job.results, run) as writer,
        tempfile.TemporaryDirectory(prefix=".sensitivity-", dir=job.artifacts) as scratch,
    ):
        for sample in sensitivity.measure(open_checkpoint(source), calibration, Path(scratch), job.progress):
            writer.sample(sample)
        return results.read(writer.finish())


def with_stored_source(job: Job, measured: Mapping[str, Record]) -> dict[str, Record]:
    """The measured runs beside the newest stored one of the source, where this command measured none."""
    from harness.report import tables

    if SOURCE in measured:
        return dict(measured)
    measure = next(iter(measured.values())).run.measure
    stored, _ = results.read_all(job.results)
    return {**tables.newest(stored, job.suite.name, measure, (SOURCE,)), **measured}


def _required(suite: Suite, table: str, value: T | None) -> T:
    if value is None:
        raise UserError(f"Suite '{suite.name}' has no [{table}] table.", "Add it, or measure another suite.")
    return value


def _suite_source(suite: Suite) -> Path:
    return find_source(suite.source_location(), suite.source.revision)


def _tokens(suite: Suite, text: Text) -> tuple[list[int], dict[str, Any]]:
    """Token ids by the source's tokenizer, and what identifies them."""
    name, content = _text(suite, text)
    ids = perplexity.tokenize(_suite_source(suite), content)
    dataset = {
        "name": name,
        "text_sha256": hashlib.sha256(content.encode()).hexdigest(),
        "token_ids_sha256": perplexity.token_ids_digest(ids),
        "num_tokens": len(ids),
    }
    return ids, dataset


def _text(suite: Suite, text: Text) -> tuple[str, str]:
    match text:
        case DemoText(split):
            if split not in _DEMO_TEXTS:
                raise UserError(f"The embedded corpus has no text '{split}'.", did_you_mean(split, _DEMO_TEXTS))
            return f"{_DEMO}{split}", _DEMO_TEXTS[split]()
        case FileText(path):
            return Path(path).name, texts.load_text(path=suite.path(path))
        case DatasetText(dataset, config, split, column, revision):
            name = "/".join(part for part in (dataset, config, split) if part)
            return name, texts.load_text(dataset=dataset, config=config, split=split, column=column, revision=revision)


@contextmanager
def _engine(job: Job, variant: str, model: Model) -> Iterator[Engine]:
    options = job.suite.engine
    job.progress(0, 1, f"{variant}: load")
    with closing(open_engine(options.name, model.folder, dtype=options.dtype, device=options.device)) as engine:
        job.progress(1, 1, f"{variant}: load")
        yield engine


def _named(progress: Progress, variant: str) -> Progress:
    return lambda done, total, description: progress(done, total, f"{variant}: {description}")


def _run(
    job: Job,
    measure: str,
    version: int,
    variant: str,
    digest: str,
    engine: Engine | None = None,
    dataset: dict[str, Any] | None = None,
) -> Run:
    source, machine = _suite_source(job.suite), provenance.machine()
    info = None
    if engine is not None:
        gpu = machine["gpu"]
        on_gpu = gpu is not None and engine.info.device != "cpu"
        bandwidth = provenance.bandwidth_bytes_per_second(gpu["name"]) if on_gpu else None
        # The variant's state and cache are the source's: only its weights differ.
        config = parse_config(read_json(source / "config.json"), str(source))
        effective = {
            **engine.info.effective,
            "state_bytes": state_bytes(config),
            "kv_bytes_per_token": kv_bytes_per_token(config),
            "bandwidth_bytes_per_second": bandwidth,
        }
        info = replace(engine.info, effective=effective).as_dict()
    recipe = None if variant == SOURCE else job.suite.variants[variant].recipe
    return Run(
        measure=measure,
        measure_version=version,
        session_id=job.session_id,
        suite=job.suite.resolved(),
        suite_digest=job.suite.digest,
        variant={
            "name": variant,
            "recipe": recipe,
            "artifact_digest": digest,
            "source_digest": _fingerprint(source),
            "source_revision": fetched_revision(source),
        },
        engine=info,
        dataset=dataset,
        machine=machine,
        packages=provenance.packages(),
        git=provenance.git(Path(harness.__file__).parent),
        command=job.command,
    )
