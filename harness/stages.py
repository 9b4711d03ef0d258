"""What each subcommand does, without a word printed: suites in, records out.

The rooms below do not know each other: the builder knows no suite, a measure does not know where its samples go.
Here they are put together. Every stage builds what is missing, opens one engine at a time, and stores each run
as one record.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import harness
from harness.audit import verify as audit
from harness.demo import checkpoint_path, corpus
from harness.engines.protocol import ENGINES, Engine, EngineDied, EngineInfo, Purpose, open_engine
from harness.errors import UserError, did_you_mean
from harness.formats.config import num_bytes
from harness.measure import decode, perplexity, texts, vllm_bench
from harness.model.census import RoleCount, SourceTensor, kv_bytes_per_token, source_tensors, state_bytes
from harness.model.checkpoint import SINGLE, open_checkpoint, read_index, read_json
from harness.model.qwen35 import ModelConfig, expected_tensors, parse_config
from harness.model.sources import fetched_revision, locate
from harness.progress import Progress, named
from harness.quantize import samples, sensitivity
from harness.quantize.artifact import VERSION as BUILDER_VERSION
from harness.quantize.artifact import Artifact
from harness.quantize.build import build
from harness.quantize.layerwise import Calibration
from harness.quantize.plan import Plan, plan
from harness.quantize.recipes import Recipe, recipe_named
from harness.record import provenance, store
from harness.record.schema import Run
from harness.record.store import Record, RunWriter
from harness.serve import Footprint
from harness.suite import schema as suites
from harness.suite.names import SOURCE, row_name
from harness.suite.schema import Bench, DatasetText, DemoText, EngineOptions, FileText, Suite, Text

T = TypeVar("T")

_DEMO = "demo:"
_ENVIRONMENT = ("ATEN_CPU_CAPABILITY", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
"""Variables that decide what an engine computes with, beside vLLM's own."""
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
    server: str | None = None
    """The URL of the server that is measured in place of an engine."""

    def artifact(self, variant: str) -> Path:
        return self.artifacts / self.suite.name / variant

    @cached_property
    def calibration(self) -> Calibration | None:
        """The suite's calibration set as token ids, read once a command."""
        wanted, source = self.suite.calibration, suite_source(self.suite)
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


def footprint(config: ModelConfig, counts: Sequence[RoleCount]) -> Footprint:
    """What a variant of these roles takes of a GPU that serves it."""
    return Footprint(
        weight_bytes=sum(count.output_bytes for count in counts),
        visual_bytes=sum(count.output_bytes for count in counts if count.role == "visual"),
        state_bytes=state_bytes(config),
        kv_bytes_per_token=kv_bytes_per_token(config),
        max_positions=config.max_position_embeddings,
    )


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


def build_variant(job: Job, variant: str) -> Artifact:
    """Builds a variant of the suite, or finds it built. A build is recorded."""
    wanted = job.suite.variants[variant]
    recipe = recipe_named(wanted.recipe).with_method(wanted.scales, wanted.codes)
    source = suite_source(job.suite)
    calibration = job.calibration if recipe.needs_calibration else None
    artifact = build(source, recipe, job.artifact(variant), job.progress, calibration)
    if not artifact.reused:
        run = new_run(job, "build", BUILDER_VERSION, Model(variant, artifact.folder, artifact.digest))
        with RunWriter(job.results, run) as writer:
            for count in artifact.counts:
                writer.sample({"kind": "role", **vars(count)})
            for name, seconds in artifact.stage_seconds:
                writer.sample({"kind": "stage", "name": name, "seconds": seconds})
            total = sum(count.output_bytes for count in artifact.counts)
            peak = provenance.peak_rss_bytes()
            writer.sample({"kind": "totals", "peak_rss_bytes": peak, "output_bytes": total})
            config = parse_config(read_json(source / "config.json"), str(source))
            writer.sample({"kind": "method", **vars(recipe.method)})
            writer.sample({"kind": "footprint", **vars(footprint(config, artifact.counts))})
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
                assert calibration is not None
                digest = calibration.samples.digest
                counted = {"num_tokens": artifact.num_calibration_tokens, "samples_sha256": digest}
                writer.sample({"kind": "calibration", **counted, **memory})
            writer.finish()
    return artifact


def verify_variant(job: Job, variant: str) -> audit.Verification:
    """Checks a variant of the suite against its source, and records what was found."""
    artifact = build_variant(job, variant)
    verification = audit.verify(artifact.folder, suite_source(job.suite), job.progress)
    run = new_run(job, "verify", audit.VERSION, Model(variant, artifact.folder, artifact.digest))
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
    """A checkpoint to be measured, and the setup that it is measured in. `digest` is None where it is only said to be
    that checkpoint, `reused` for the source, which is never built."""

    variant: str
    folder: Path
    digest: str | None
    reused: bool | None = None
    setup: str | None = None

    @property
    def row(self) -> str:
        return row_name(self.variant, self.setup)


@dataclass(frozen=True)
class Work:
    """What a measure needs: the checkpoints in their setups, and one tokenization of the text for all of them."""

    models: list[Model]
    ids: list[int]
    dataset: dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """What a measure gave, by row: records, and the reasons of those that failed."""

    records: dict[str, Record]
    failures: dict[str, str]


def prepare(job: Job, names: Sequence[str] | None) -> Work:
    """The source and the variants that speed is measured of, built where missing, and the text's token ids.

    `UserError` for a suite that cannot be measured, before anything is built for it.
    """
    variants = chosen_variants(job.suite, names, with_source=True)
    check_engine(job.suite)
    bench = required(job.suite, "bench", job.suite.bench)
    ids, dataset = tokenized(job.suite, bench.text)
    _check_text(bench, ids)
    checked = max(_depths(bench)) + decode.COHERENCE_TOKENS + 1
    longest = max(checked, *(one.prompt_tokens + one.new_tokens for one in _shapes(bench)))
    if bench.variants is not None and names is None:
        chosen_variants(job.suite, bench.variants, with_source=True)
        variants = [name for name in variants if name in (SOURCE, *bench.variants)]
    chosen = chosen_setups(job.suite, bench.setups)
    check_lengths(job.suite, "bench", chosen, longest)
    return Work(built_models(job, variants, chosen), ids, dataset)


def check_engine(suite: Suite) -> None:
    """`UserError` where the suite's engine is none that a suite starts."""
    engine = suite.engine.name
    if engine not in ENGINES:
        raise UserError(f"There is no engine '{engine}'.", did_you_mean(engine, ENGINES))
    if engine == "server":
        raise UserError("A server is no engine that a suite starts.", "Measure it by `harness bench --server URL`.")


def with_engine(suite: Suite, name: str | None, dtype: str | None) -> Suite:
    """The suite with another engine or type of activations, where one is given."""
    engine = suite.engine
    return replace(suite, engine=replace(engine, name=name or engine.name, dtype=dtype or engine.dtype))


def chosen_setups(suite: Suite, setups: Sequence[str] | None) -> list[str | None]:
    """The setups to measure in, first the suite's own options. They are options of vLLM: another engine measures the
    variants as they are."""
    return [None, *(setups or ())] if suite.engine.name == "vllm" else [None]


def built_models(job: Job, variants: Sequence[str], setups: Sequence[str | None]) -> list["Model"]:
    """The checkpoints of variants, built where missing, in each setup."""
    models = []
    for name in variants:
        if name == SOURCE:
            folder = suite_source(job.suite)
            models.append(Model(name, folder, fingerprint(folder)))
        else:
            artifact = build_variant(job, name)
            models.append(Model(name, artifact.folder, artifact.digest, artifact.reused))
    return [replace(model, setup=setup) for setup in setups for model in models]


def check_lengths(suite: Suite, measure: str, setups: Sequence[str | None], longest: int) -> None:
    """`UserError` where vLLM is to take fewer tokens of a sequence than the measure gives it."""
    for setup in setups if suite.engine.name == "vllm" else ():
        most = suite.vllm_options(setup).get("max_model_len")
        if most is not None and most < longest:
            where = "[engine.vllm]" if setup is None else f"[setups.{setup}]"
            raise UserError(
                f"Suite '{suite.name}' has max_model_len = {most:,} in {where}, and {measure} needs {longest:,}.",
                "Raise it, or measure shorter pieces.",
            )


def prepare_server(job: Job, variant: str) -> tuple[Job, Work]:
    """The job and the work of measuring a server, which serves `variant` by its owner's word: nothing is built, and it
    is not started anew."""
    chosen_variants(job.suite, [variant], with_source=True)
    bench = required(job.suite, "bench", job.suite.bench)
    ids, dataset = tokenized(job.suite, bench.text)
    _check_text(bench, ids)
    suite = replace(job.suite, engine=EngineOptions("server"), bench=replace(bench, starts=1))
    return replace(job, suite=suite), Work([Model(variant, suite_source(job.suite), None)], ids, dataset)


def _check_text(bench: Bench, ids: Sequence[int]) -> None:
    """`UserError` for a text that is too short for what is timed, or for what is checked before."""
    for shape in _shapes(bench):
        decode.prompts(ids, shape.batch, shape.prompt_tokens)
    decode.prompts(ids, 1, max(_depths(bench)) + decode.COHERENCE_TOKENS)


def _shapes(bench: Bench) -> list[decode.Shape]:
    """What `harness bench` times, in the order in which it does."""
    shapes = [
        decode.Shape("prefill", 1, bench.prefill_tokens, 1),
        *(decode.Shape("decode", batch, bench.prompt_tokens, bench.new_tokens) for batch in bench.batch_sizes),
        # There is no empty prompt: depth 0 is the text's first token.
        *(decode.Shape("decode", 1, max(depth, 1), bench.depth_tokens) for depth in bench.depths or ()),
    ]
    return list(dict.fromkeys(shapes))


def computed_by(job: Job, model: Model) -> dict[str, Any]:
    """What decides the numbers that an engine gives of a model, before it is started: the identity of what is kept of
    them."""
    engine, machine = job.suite.engine, provenance.machine()
    named = sorted(name for name in os.environ if name.startswith("VLLM_"))
    return {
        "artifact_digest": model.digest,
        # What lies there now: the artifact's digest is what its builder wrote down.
        "fingerprint": open_checkpoint(model.folder).fingerprint(),
        "engine": {"name": engine.name, "dtype": engine.dtype, "device": engine.device},
        "options": job.suite.vllm_options(model.setup) if engine.name == "vllm" else None,
        "machine": {key: machine[key] for key in ("name", "cpu", "gpu")},
        "packages": provenance.packages(),
        "code": provenance.code_digest(),
        "environment": {name: os.environ.get(name) for name in (*_ENVIRONMENT, *named)},
    }


@cache
def fingerprint(source: Path) -> str:
    return open_checkpoint(source).fingerprint()


def measure_decode(job: Job, work: Work, limit: int | None) -> Measured:
    """Decode and prefill times. The engine is started anew for every variant and round, and the order of the variants
    turns round after each (A B, B A, …), so that a machine that slows down slows all of them alike."""
    wanted = required(job.suite, "bench", job.suite.bench)
    shapes = _shapes(wanted)
    timed = wanted.starts * ((wanted.warmups + wanted.repetitions) * len(shapes) + 1)
    measured = Measured({}, {})
    with ExitStack() as stack:
        writers: dict[str, RunWriter] = {}
        for start in range(wanted.starts):
            for model in work.models[:: 1 if start % 2 == 0 else -1]:
                if model.row in measured.failures:
                    continue
                with (
                    noted_failures(job, "bench", decode.VERSION, model, work.dataset, measured.failures),
                    running_engine(job, model, "decode") as engine,
                ):
                    is_new = model.row not in writers
                    depths = _depths(wanted) if is_new and engine.info.can_score else []
                    if is_new:
                        run = new_run(job, "bench", decode.VERSION, model, engine=engine, dataset=work.dataset)
                        writer = RunWriter(job.results, run, expected=len(depths) + timed)
                        writers[model.row] = stack.enter_context(writer)
                    writer = writers[model.row]
                    with said_in(writer):
                        for depth in depths:
                            writer.sample(_coherent(job, engine, work, model, depth))
                        samples = decode.measure(
                            engine,
                            work.ids,
                            shapes,
                            start=start,
                            repetitions=wanted.repetitions if limit is None else min(limit, wanted.repetitions),
                            warmups=wanted.warmups,
                            progress=named(job.progress, f"{model.row}, start {start + 1} of {wanted.starts}"),
                        )
                        for sample in samples:
                            writer.sample(sample)
        for row, writer in writers.items():
            if row not in measured.failures:
                measured.records[row] = store.read(writer.finish())
    return measured


def _depths(bench: Bench) -> list[int]:
    """The prompt lengths after which a model must be coherent: what corrupts a cache may show only after a while."""
    shortest = decode.COHERENCE_TOKENS
    return [shortest, *(depth for depth in bench.depths or () if depth > shortest)]


def _coherent(job: Job, engine: Engine, work: Work, model: Model, prompt_tokens: int) -> dict[str, Any]:
    """The sample of the check that comes before any speed; `EngineDied` where the model writes gibberish."""
    source = suite_source(job.suite)
    vocabulary = parse_config(read_json(source / "config.json"), str(source)).vocab_size
    sample = decode.coherence(engine, work.ids, vocabulary, prompt_tokens)
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


def max_length(suite: Suite, asked: int | None, setups: Sequence[str] | None) -> int:
    """The most tokens of a sequence: the least of what the model, the engine in each setup and the suite say."""
    source = suite_source(suite)
    said = [parse_config(read_json(source / "config.json"), str(source)).max_position_embeddings, asked]
    if suite.engine.name == "vllm":
        said += [suite.vllm_options(setup).get("max_model_len") for setup in chosen_setups(suite, setups)]
    known = [one for one in said if one is not None]
    if not known:
        raise UserError(
            f"The configuration of suite '{suite.name}'s source does not say how many tokens it takes.",
            "Set max_length.",
        )
    return min(known)


@contextmanager
def noted_failures(
    job: Job, measure: str, version: int, model: Model, dataset: dict[str, Any] | None, failures: dict[str, str]
) -> Iterator[None]:
    """Notes an engine that does not start or dies, by row, so that the other variants go on. One that did not start has
    no record yet and gets one."""
    try:
        yield
    except EngineDied as error:
        failures[model.row] = error.problem
        if not error.recorded:
            with RunWriter(job.results, new_run(job, measure, version, model, dataset=dataset)) as writer:
                write_failure(writer, error)


@contextmanager
def said_in(writer: RunWriter) -> Iterator[None]:
    """Keeps in the run's record what an engine said as it died."""
    try:
        yield
    except EngineDied as error:
        write_failure(writer, error)
        error.recorded = True
        raise


def write_failure(writer: RunWriter, error: EngineDied) -> None:
    """Ends a run with what an engine said as it died."""
    writer.sample({"kind": "failure", "reason": error.problem, "log": list(error.log)})
    writer.finish("failed")


def import_benchmark(
    job: Job, variant: str, path: Path, shape: vllm_bench.BatchShape | None, machine: str, version: str
) -> Record:
    """The record of a run of `vllm bench` on another machine, which is named by the user's word."""
    chosen_variants(job.suite, [variant], with_source=True)
    found = vllm_bench.read(path, shape)
    source = suite_source(job.suite)
    run = new_run(job, "served", vllm_bench.VERSION, Model(variant, source, None))
    engine = EngineInfo(
        name="vllm bench",
        version=version,
        device="unknown",
        dtype="unknown",
        requested={"benchmark": found.benchmark, "model": found.model, **found.settings},
    )
    elsewhere = {"name": machine, "cpu": "unknown", "cores": None, "gpu": None, "os": None}
    with RunWriter(job.results, replace(run, engine=engine.as_dict(), machine=elsewhere, packages={})) as writer:
        for sample in found.samples:
            writer.sample(sample)
        return store.read(writer.finish())


def measure_sensitivity(job: Job) -> Record:
    """What each format would cost each group of the source's layers, on the suite's calibration samples."""
    required(job.suite, "calibration", job.suite.calibration)
    source, calibration = suite_source(job.suite), job.calibration
    assert calibration is not None
    dataset = {
        "name": ", ".join(one["name"] for one in calibration.samples.manifest["sources"]),
        "token_ids_sha256": calibration.samples.digest,
        "num_samples": len(calibration.samples.samples),
        "num_tokens": calibration.samples.num_tokens,
    }
    run = new_run(job, "sensitivity", sensitivity.VERSION, Model(SOURCE, source, fingerprint(source)), dataset=dataset)
    run = replace(run, engine=sensitivity.computed_by(calibration).as_dict())
    job.artifacts.mkdir(parents=True, exist_ok=True)
    with (
        RunWriter(job.results, run) as writer,
        tempfile.TemporaryDirectory(prefix=".sensitivity-", dir=job.artifacts) as scratch,
    ):
        for sample in sensitivity.measure(open_checkpoint(source), calibration, Path(scratch), job.progress):
            writer.sample(sample)
        return store.read(writer.finish())


def with_stored_source(job: Job, measure: str, measured: Mapping[str, Record]) -> dict[str, Record]:
    """The measured runs beside the newest stored one of the source, where this command measured none."""
    from harness.report import runs

    if SOURCE in measured:
        return dict(measured)
    stored, _ = store.read_all(job.results)
    return {**runs.newest_runs(stored, job.suite.name, measure, (SOURCE,)), **measured}


def required(suite: Suite, table: str, value: T | None) -> T:
    if value is None:
        raise UserError(f"Suite '{suite.name}' has no [{table}] table.", "Add it, or measure another suite.")
    return value


def suite_source(suite: Suite) -> Path:
    return find_source(suite.source_location(), suite.source.revision)


def tokenized(suite: Suite, text: Text) -> tuple[list[int], dict[str, Any]]:
    """Token ids by the source's tokenizer, and what identifies them."""
    about, content = read_text(suite, text)
    ids = perplexity.tokenize(suite_source(suite), content)
    return ids, {**about, "token_ids_sha256": perplexity.token_ids_digest(ids), "num_tokens": len(ids)}


def read_text(suite: Suite, text: Text, *, as_lines: bool = False) -> tuple[dict[str, Any], str]:
    """What identifies a text, and the text; `as_lines` as for `texts.load_text`."""
    match text:
        case DemoText(split):
            if split not in _DEMO_TEXTS:
                raise UserError(f"The embedded corpus has no text '{split}'.", did_you_mean(split, _DEMO_TEXTS))
            name, content = f"{_DEMO}{split}", _DEMO_TEXTS[split]()
        case FileText(path):
            name, content = Path(path).name, texts.load_text(path=suite.path(path))
        case DatasetText():
            name = "/".join(part for part in (text.dataset, text.config, text.split) if part)
            content = texts.load_text(**vars(text), as_lines=as_lines)
    return {"name": name, "text_sha256": hashlib.sha256(content.encode()).hexdigest()}, content


@contextmanager
def running_engine(job: Job, model: Model, purpose: Purpose) -> Iterator[Engine]:
    wanted = job.suite.engine
    options = job.suite.vllm_options(model.setup) if wanted.name == "vllm" else None
    if job.server is not None:
        options = {"url": job.server}
    job.progress(0, 1, f"{model.row}: load")
    with closing(
        open_engine(
            wanted.name, model.folder, dtype=wanted.dtype, device=wanted.device, purpose=purpose, options=options
        )
    ) as engine:
        job.progress(1, 1, f"{model.row}: load")
        yield engine


def new_run(
    job: Job,
    measure: str,
    version: int,
    model: Model,
    *,
    engine: Engine | None = None,
    dataset: dict[str, Any] | None = None,
) -> Run:
    source, machine = suite_source(job.suite), provenance.machine()
    info = None
    if engine is not None:
        gpu = machine["gpu"]
        on_gpu = gpu is not None and engine.info.device not in ("cpu", "unknown")
        bandwidth = provenance.bandwidth_bytes_per_second(gpu["name"]) if on_gpu else None
        if bandwidth is not None:
            # GPUs that share a layer read it together; those of another pipeline stage or copy wait for them.
            bandwidth *= engine.info.effective.get("tensor_parallel", 1)
        # The variant's state and cache are the source's: only its weights differ.
        config = parse_config(read_json(source / "config.json"), str(source))
        effective = {
            **engine.info.effective,
            "state_bytes": state_bytes(config),
            "kv_bytes_per_token": kv_bytes_per_token(config),
            "bandwidth_bytes_per_second": bandwidth,
        }
        info = replace(engine.info, effective=effective).as_dict()
    built = job.suite.variants.get(model.variant)
    return Run(
        measure=measure,
        measure_version=version,
        session_id=job.session_id,
        suite=job.suite.resolved(),
        suite_digest=job.suite.digest,
        variant={
            "name": model.row,
            "recipe": built and built.recipe,
            "setup": model.setup,
            "artifact_digest": model.digest,
            "source_digest": fingerprint(source),
            "source_revision": fetched_revision(source),
        },
        engine=info,
        dataset=dataset,
        machine=machine,
        packages=provenance.packages(),
        git=provenance.git(Path(harness.__file__).parent),
        command=job.command,
    )
