"""One command over one suite: its models, engines, runs and failures.

The builder knows no suite, and a measure does not know where its samples go. A job puts them together: it builds the
variants that are missing, opens one engine at a time, and stores each run as a record.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import harness
from harness import resolve
from harness.engines.protocol import ENGINES, Engine, EngineDied, Purpose, open_engine
from harness.model.census import kv_bytes_per_token, state_bytes
from harness.model.checkpoint import open_checkpoint
from harness.model.sources import fetched_revision
from harness.progress import Progress, named
from harness.quantize.artifact import VERSION as BUILDER_VERSION
from harness.quantize.artifact import Artifact
from harness.quantize.recipes import Recipe, recipe_named
from harness.record import provenance, store
from harness.record.run import Record, Run
from harness.record.store import RunWriter
from harness.suite.names import SOURCE, row_name
from harness.suite.schema import EngineOptions, Suite

if TYPE_CHECKING:
    from harness.quantize.layerwise import CalibrationInput

_ENVIRONMENT = ("ATEN_CPU_CAPABILITY", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
"""The environment variables that decide what an engine computes with, beside vLLM's own."""


@dataclass(frozen=True)
class Model:
    """A checkpoint to be measured, and the setup that it is measured in. `digest` is None where the checkpoint is known
    by its owner's word only; `reused` is None for the source, which is never built."""

    variant: str
    folder: Path
    digest: str | None
    reused: bool | None = None
    setup: str | None = None

    @property
    def row(self) -> str:
        """The name of the table's row: the variant, and the setup where there is one."""
        return row_name(self.variant, self.setup)


@dataclass(frozen=True)
class Work:
    """What a measure of one text needs: the models in their setups, and the token ids that all of them read."""

    models: list[Model]
    ids: list[int]
    dataset: dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """What a measure gave, by row: records, and the reasons of the rows that failed."""

    records: dict[str, Record] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class MeasuredByName:
    """What a measure gave, by protocol or task: records by row; and the reasons of the rows that failed."""

    records: dict[str, dict[str, Record]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One command over one suite: where things lie, and how the command tells its progress."""

    suite: Suite
    artifacts: Path
    results: Path
    progress: Progress
    command: tuple[str, ...]
    session_id: str
    server: str | None = None
    """The URL of the server that is measured in place of an engine."""
    device: str = "auto"
    """The device that calibrates."""

    @cached_property
    def source(self) -> Path:
        """The folder of the suite's source."""
        return resolve.suite_source(self.suite)

    @cached_property
    def calibration(self) -> CalibrationInput | None:
        """The suite's calibration samples as token ids, read once a command; None where the suite has none."""
        wanted = self.suite.calibration
        if wanted is None:
            return None
        return resolve.read_calibration(wanted, self.suite.folder, self.source, self.progress, self.device)

    def named_progress(self, name: str) -> Progress:
        """Tells the command's progress, with `name` before every description."""
        return named(self.progress, name)

    def artifact(self, variant: str) -> Path:
        """The folder of a variant's artifact. Names that begin with a dot are no variants: what a measure keeps."""
        return self.artifacts / self.suite.name / variant

    def recipe(self, variant: str) -> Recipe:
        """The recipe of a variant, with the methods that the suite gives it."""
        wanted = self.suite.variants[variant]
        return recipe_named(wanted.recipe).with_method(wanted.scales, wanted.codes)

    # -- Models ----------------------------------------------------------------------------------------------------

    def build(self, variant: str) -> Artifact:
        """Builds a variant of the suite, or finds it built. A build is recorded."""
        from harness.quantize.build import build

        recipe = self.recipe(variant)
        calibration = self.calibration if recipe.needs_calibration else None
        artifact = build(self.source, recipe, self.artifact(variant), self.progress, calibration)
        if not artifact.reused:
            run = self.new_run("build", BUILDER_VERSION, Model(variant, artifact.folder, artifact.digest))
            self.store(run, self._build_samples(artifact, recipe))
        return artifact

    def _build_samples(self, artifact: Artifact, recipe: Recipe) -> Iterator[dict[str, Any]]:
        """What the record of a build holds."""
        for count in artifact.counts:
            yield {"kind": "role", **vars(count)}
        for name, seconds in artifact.stage_seconds:
            yield {"kind": "stage", "name": name, "seconds": seconds}
        total = sum(count.output_bytes for count in artifact.counts)
        yield {"kind": "totals", "peak_rss_bytes": provenance.peak_rss_bytes(), "output_bytes": total}
        yield {"kind": "method", **vars(recipe.method)}
        footprint = resolve.serving_footprint(resolve.source_config(self.source), artifact.counts)
        yield {"kind": "footprint", **vars(footprint)}
        for layer in artifact.layers:
            index = layer["index"]
            yield {"kind": "layer", "index": index, "seconds": layer["seconds"]}
            for group in layer["groups"]:
                yield {"kind": "group", "index": index, **group}
            for expert, num_tokens in enumerate(layer["routed"] or ()):
                yield {"kind": "expert", "index": index, "expert": expert, "num_tokens": num_tokens}
        if artifact.layers:
            assert self.calibration is not None
            yield {
                "kind": "calibration",
                "num_tokens": artifact.num_calibration_tokens,
                "samples_sha256": self.calibration.samples.digest,
                "planned_memory_bytes": artifact.planned_memory_bytes,
                "peak_vram_bytes": artifact.peak_vram_bytes,
                "device": self.calibration.computed_on(),
            }

    def models(self, variants: Sequence[str], setups: Sequence[str | None]) -> list[Model]:
        """The checkpoints of variants, built where missing, in each setup."""
        models = []
        for name in variants:
            if name == SOURCE:
                models.append(Model(name, self.source, fingerprint(self.source)))
            else:
                artifact = self.build(name)
                models.append(Model(name, artifact.folder, artifact.digest, artifact.reused))
        return [replace(model, setup=setup) for setup in setups for model in models]

    # -- Engines ---------------------------------------------------------------------------------------------------

    @contextmanager
    def engine(
        self, model: Model, purpose: Purpose, *, longest: int | None = None, batch: int | None = None
    ) -> Iterator[Engine]:
        """The suite's engine with a model in it, closed at the end. `longest` is the most tokens that a sequence will
        have and `batch` the most sequences at once, None where that is not known: vLLM reserves memory for them."""
        wanted = self.engine_of(model)
        options = None
        if wanted.name == "vllm":
            needed = {"max_model_len": longest or "auto", "max_num_seqs": batch}
            options = {**needed, **self.suite.vllm_options(model.setup)}
        if wanted != self.suite.engine and purpose == "decode":
            raise EngineDied(f"{model.row} is not timed: {self._source_too_large}", "Use larger GPUs, or more of them.")
        if self.server is not None:
            options = {"url": self.server}
        self.progress(0, 1, f"{model.row}: load")
        with closing(
            open_engine(
                wanted.name, model.folder, dtype=wanted.dtype, device=wanted.device, purpose=purpose, options=options
            )
        ) as engine:
            self.progress(1, 1, f"{model.row}: load")
            yield engine

    def engine_of(self, model: Model) -> EngineOptions:
        """The suite's engine; for a source that does not fit into the GPUs of vLLM, the streamed engine."""
        wanted = self.suite.engine
        if wanted.name == "vllm" and model.folder == self.source and self._source_too_large is not None:
            return replace(wanted, name="streamed")
        return wanted

    @cached_property
    def _source_too_large(self) -> str | None:
        from harness.doctor.box import this_box
        from harness.doctor.checks import does_not_fit

        plan = resolve.plan_source(self.suite.source_location(), None, self.suite.source.revision)[1]
        return does_not_fit(self.suite, this_box(), plan)

    def computed_by(self, model: Model) -> dict[str, Any]:
        """The identity of the numbers that the engine gives of a model: what decides them, known before it starts."""
        engine, machine = self.engine_of(model), provenance.machine()
        named = sorted(name for name in os.environ if name.startswith("VLLM_"))
        return {
            "artifact_digest": model.digest,
            # What lies there now: the artifact's digest is what its builder wrote down.
            "fingerprint": open_checkpoint(model.folder).fingerprint(),
            "engine": {"name": engine.name, "dtype": engine.dtype, "device": engine.device},
            "engine_version": ENGINES[engine.name].version,
            "options": self.suite.vllm_options(model.setup) if engine.name == "vllm" else None,
            "machine": {key: machine[key] for key in ("name", "cpu", "gpu")},
            "packages": provenance.packages(),
            "environment": {name: os.environ.get(name) for name in (*_ENVIRONMENT, *named)},
        }

    # -- Runs ------------------------------------------------------------------------------------------------------

    def new_run(
        self,
        measure: str,
        version: int,
        model: Model,
        *,
        engine: Engine | None = None,
        dataset: dict[str, Any] | None = None,
    ) -> Run:
        """The header of a run of this command: what was measured, on what, by what."""
        built = self.suite.variants.get(model.variant)
        return Run(
            measure=measure,
            measure_version=version,
            session_id=self.session_id,
            suite=self.suite.resolved(),
            suite_digest=self.suite.digest,
            variant={
                "name": model.row,
                "recipe": built and built.recipe,
                "setup": model.setup,
                "artifact_digest": model.digest,
                "source_digest": fingerprint(self.source),
                "source_revision": fetched_revision(self.source),
            },
            engine=None if engine is None else self._engine_header(engine),
            dataset=dataset,
            machine=provenance.machine(),
            packages=provenance.packages(),
            git=provenance.git(Path(harness.__file__).parent),
            command=self.command,
        )

    def _engine_header(self, engine: Engine) -> dict[str, Any]:
        """What a run's header says of its engine, with what decides the ceiling of its speed."""
        gpu = provenance.machine()["gpu"]
        on_gpu = gpu is not None and engine.info.device not in ("cpu", "unknown")
        bandwidth = provenance.bandwidth_bytes_per_second(gpu["name"]) if on_gpu else None
        if bandwidth is not None:
            # GPUs that share a layer read it together; those of another pipeline stage or copy wait for them.
            bandwidth *= engine.info.effective.get("tensor_parallel", 1)
        # The variant's state and cache are the source's: only its weights differ.
        config = resolve.source_config(self.source)
        effective = {
            **engine.info.effective,
            "state_bytes": state_bytes(config),
            "kv_bytes_per_token": kv_bytes_per_token(config),
            "bandwidth_bytes_per_second": bandwidth,
        }
        return replace(engine.info, effective=effective).as_dict()

    def store(self, run: Run, samples: Iterable[dict[str, Any]], *, expected: int | None = None) -> Record:
        """The record of a run, written with its samples (`expected` of them) or with what a dying engine says."""
        with RunWriter(self.results, run, expected=expected) as writer, failure_in(writer):
            for sample in samples:
                writer.sample(sample)
            return store.read(writer.finish())

    def stored(self) -> list[Record]:
        """Every complete run that the results folder holds."""
        return store.read_all(self.results)[0]

    # -- Failures --------------------------------------------------------------------------------------------------

    @contextmanager
    def noted_failures(
        self, measure: str, version: int, model: Model, dataset: dict[str, Any] | None, failures: dict[str, str]
    ) -> Iterator[None]:
        """Notes in `failures`, by row, an engine that does not start or dies, so that the other variants go on. An
        engine that did not start has no record yet and gets one."""
        try:
            yield
        except EngineDied as error:
            failures[model.row] = error.problem
            if not error.recorded:
                with RunWriter(self.results, self.new_run(measure, version, model, dataset=dataset)) as writer:
                    _write_failure(writer, error)

    @contextmanager
    def recorded_failure(self, run: Run) -> Iterator[None]:
        """Keeps what an engine said as it died in a record of its own, whose header is `run`."""
        try:
            yield
        except EngineDied as error:
            with RunWriter(self.results, run) as writer:
                _write_failure(writer, error)
            raise


@contextmanager
def failure_in(writer: RunWriter) -> Iterator[None]:
    """Keeps what an engine said as it died in the record that is being written."""
    try:
        yield
    except EngineDied as error:
        _write_failure(writer, error)
        raise


def _write_failure(writer: RunWriter, error: EngineDied) -> None:
    """Ends a run with what its engine said as it died."""
    writer.sample({"kind": "failure", "reason": error.problem, "log": list(error.log)})
    writer.finish("failed")
    error.recorded = True


@cache
def fingerprint(source: Path) -> str:
    """The digest of a source folder's files, read once a command."""
    return open_checkpoint(source).fingerprint()
