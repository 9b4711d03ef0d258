"""Runs both sides on the same inputs and keeps a record of each.

Every quantizer runs in a process of its own under one stopwatch; nothing of what is timed happens in this process.
Speed is measured interleaved (A B C, C B A, ...) so that a machine that slows down slows all of them alike, in a
folder in memory where there is room, so that no disk is measured. Quality is measured by one engine, ours, on every
artifact alike: the divergence from the source's predictions on held-out text, in float32.

A tool that fails is a finding, not an error: the reason is recorded, and the others go on.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

import harness
from harness.audit.verify import verify
from harness.demo import corpus
from harness.demo.synthesize import synthesize
from harness.engines.protocol import open_engine
from harness.errors import UserError
from harness.measure import fidelity, perplexity
from harness.model.checkpoint import open_checkpoint, read_json
from harness.progress import Progress, named
from harness.quantize import samples
from harness.quantize.artifact import VERSION as BUILDER_VERSION
from harness.record import provenance, store
from harness.record.schema import Run
from harness.record.store import Record, RunWriter
from harness.suite.texts import Calibration, FileSamples
from studies.peers import contest
from studies.peers.agreement import compare
from studies.peers.contest import Contestant, Ours, Theirs
from studies.peers.stopwatch import timed

VERSION = 1

WINDOW = 512
NUM_TOKENS = 30_720
"""Of each held-out text: 60 windows."""

LAYERS, VOCABULARY = 4, 32_000
"""What the 9B configuration is cut down to for speed: its widths stay."""

_COMPRESSOR = Path(__file__).with_name("compressor.py")
_CALIBRATION_DOCUMENTS = 600
_BATCH = 4
_STORED = ("kind", "index", "num_tokens", "num_scored", "kl_nats", "num_agreed")
"""Of a window's sample; the divergence of every token is not looked at here."""
_MEMORY_FOLDER = Path("/dev/shm")
_SCRATCH_BYTES = {
    "speed-a16": 9 * 10**9,
    "speed-w4a4": 10**9,
    "speed-scoring-synthetic": 11 * 10**9,
    "speed-scoring-dense": 10**9,
}
_MADE = "made.json"


@dataclass(frozen=True)
class Bench:
    """One session: where things are, and how often a time is taken."""

    their_python: Path
    their_packages: Mapping[str, str]
    artifacts: Path
    results: Path
    repetitions: int
    limit: int | None
    """Only so many windows of a text, or documents of a task; None for all."""
    progress: Progress
    command: tuple[str, ...]
    session_id: str


@dataclass(frozen=True)
class Made:
    """One run of a quantizer: what it left behind and what it took. With a `failure` there is nothing else."""

    digest: str | None = None
    wall_seconds: float = 0.0
    call_seconds: float | None = None
    """From the first byte read to the last written, without imports, as the tool itself tells."""
    peak_rss_bytes: int | None = None
    output_bytes: int = 0
    packages: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    failure: str | None = None


def their_packages(python: Path) -> dict[str, str]:
    """The versions in the other environment; `UserError` where it is missing or has no llm-compressor."""
    remedy = "Run `nox -s peers`, which makes it, or name another interpreter with --peers-python."
    if not python.exists():
        raise UserError(f"There is no environment of llm-compressor at {python}.", remedy)
    code = (
        "import importlib.metadata as m, json; names = ('llmcompressor', 'compressed-tensors', 'transformers', "
        "'torch', 'safetensors'); print(json.dumps({name: m.version(name) for name in names}))"
    )
    done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{python} has no llm-compressor ({done.stderr.strip().splitlines()[-1]}).", remedy)
    versions: dict[str, str] = json.loads(done.stdout)
    return versions


# -- One run of one quantizer ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """The calibration set: as our builder reads it, as llm-compressor's side reads it, and its digest."""

    toml: Path
    token_ids: Path
    digest: str


def write_calibration(tokenizer_folder: Path, folder: Path, num_samples: int, progress: Progress) -> Data:
    """Text of the embedded corpus' training split and the same samples as token ids, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    text = corpus.text("train", num_documents=_CALIBRATION_DOCUMENTS)
    (folder / "calibration.txt").write_bytes(text.encode())
    source = FileSamples(path="calibration.txt", samples=num_samples, max_tokens=contest.CALIBRATION_TOKENS, seed=0)
    chosen = samples.read(Calibration((source,)), tokenizer_folder, folder, {}, progress)
    data = Data(folder / "calibration.toml", folder / "calibration.json", chosen.digest)
    lines = (f'path = "{source.path}"', f"samples = {source.samples}", f"max_tokens = {source.max_tokens}", "seed = 0")
    data.toml.write_text("\n".join(("[[sources]]", *lines, "")), encoding="utf-8")
    data.token_ids.write_text(json.dumps(chosen.samples), encoding="utf-8")
    return data


def quantize(bench: Bench, contestant: Contestant, source: Path, out: Path, data: Data) -> Made:
    """Runs one quantizer to its end. `out` must not exist; logs lie beside it."""
    if isinstance(contestant, Ours):
        return _run_ours(contestant, source, out, data)
    return _run_theirs(bench, contestant, source, out, data)


def _run_ours(contestant: Ours, source: Path, out: Path, data: Data) -> Made:
    command = [sys.executable, "-m", "harness", "build", str(source), *contestant.arguments(), "--out", str(out)]
    calibration = ["--calibration", str(data.toml)] if contestant.needs_data else []
    run = timed([*command, *calibration, "--json"], _logs(out))
    if run.exit_code:
        return Made(failure=reason(run.exit_code, run.complaint))
    (built,) = json.loads(run.stdout)
    stages = built.get("stage_seconds")
    return Made(
        digest=built["digest"],
        wall_seconds=run.wall_seconds,
        call_seconds=sum(dict(stages).values()) if stages else None,
        peak_rss_bytes=run.peak_rss_bytes,
        output_bytes=_folder_bytes(out),
        packages=provenance.packages(),
    )


def _run_theirs(bench: Bench, contestant: Theirs, source: Path, out: Path, data: Data) -> Made:
    result = out.with_name(out.name + ".result.json")
    result.unlink(missing_ok=True)
    job = {
        **contestant.job(),
        "source": str(source),
        "out": str(out),
        "result": str(result),
        "token_ids": str(data.token_ids) if contestant.needs_data else None,
    }
    file = out.with_name(out.name + ".job.json")
    file.write_text(json.dumps(job, indent=2), encoding="utf-8")
    # -P: the modules beside `compressor` are not for that environment.
    command = [str(bench.their_python), "-P", str(_COMPRESSOR), str(file)]
    run = timed(command, _logs(out), env={"HF_HUB_OFFLINE": "1"})
    if run.exit_code or not result.exists():
        return Made(failure=reason(run.exit_code, run.complaint))
    told = json.loads(result.read_text(encoding="utf-8"))
    return Made(
        digest=_fingerprint(out),
        wall_seconds=run.wall_seconds,
        call_seconds=sum(told["seconds"].values()),
        peak_rss_bytes=run.peak_rss_bytes,
        output_bytes=_folder_bytes(out),
        packages=told["packages"],
        warnings=tuple(told["warnings"]),
    )


def _logs(out: Path) -> Path:
    return out.with_name(out.name + ".log")


def reason(exit_code: int, complaint: str) -> str:
    """The exception of a traceback or the sentence of a user error, whichever a tool ended with."""
    killed = f"killed by signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
    lines = [line for line in complaint.splitlines() if not line.startswith((" ", "\t"))]
    return f"{killed}: {lines[-1] if lines else 'no message'}"


def _fingerprint(folder: Path) -> str | None:
    try:
        return open_checkpoint(folder).fingerprint()
    except UserError:
        return None  # what is wrong with it, the auditor says


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _audit(folder: Path, source: Path, progress: Progress) -> dict[str, Any]:
    """The verdict of `harness verify` on an artifact, as a sample."""
    try:
        findings = verify(folder, source, progress).findings
        severities = [finding.severity for finding in findings]
        first = next((f"{f.tensor} {f.problem}" for f in findings if f.severity == "error"), None)
    except UserError as error:
        severities, first = ["error"], error.problem
    num_errors = severities.count("error")
    return {
        "kind": "verdict",
        "passed": num_errors == 0,
        "num_errors": num_errors,
        "num_warnings": severities.count("warning"),
        "first_error": first,
    }


# -- Speed -------------------------------------------------------------------------------------------------------


def speed_a16(bench: Bench, config: Path) -> list[Record]:
    """Round-to-nearest without data on a few layers of true width, random weights."""
    raw = read_json(config)
    with scratch("speed-a16", bench.progress) as (folder, in_memory):
        source = folder / "source"
        synthesize(raw, source, num_layers=LAYERS, vocab_size=VOCABULARY, seed=0, progress=bench.progress)
        # Random weights have no tokenizer, and need none.
        data = Data(folder / "none", folder / "none", "")
        about = {"source": config.stem, "layers": LAYERS, "vocabulary": VOCABULARY, "in_memory": in_memory}
        return _interleaved(bench, "speed-a16", about, contest.SPEED_A16, source, folder, data, with_copy=True)


def speed_w4a4(bench: Bench, original: Path) -> list[Record]:
    """Weights and activations, with calibration, on an embedded model."""
    with scratch("speed-w4a4", bench.progress) as (folder, in_memory):
        source = Path(shutil.copytree(original, folder / "source"))
        data = write_calibration(source, folder, contest.SPEED_SAMPLES, bench.progress)
        about = {"source": original.name, "calibration_digest": data.digest, "in_memory": in_memory}
        return _interleaved(bench, "speed-w4a4", about, contest.SPEED_W4A4, source, folder, data, with_copy=False)


def _interleaved(
    bench: Bench,
    part: str,
    about: dict[str, Any],
    contestants: Sequence[Contestant],
    source: Path,
    folder: Path,
    data: Data,
    *,
    with_copy: bool,
) -> list[Record]:
    about |= {"repetitions": bench.repetitions}
    checkpoint = open_checkpoint(source)
    source_digest = checkpoint.fingerprint()
    entries: list[Contestant | None] = [*contestants, *([None] if with_copy else [])]
    original = folder / contestants[0].name
    records = []
    with ExitStack() as stack:
        writers: dict[str, RunWriter] = {}
        failed: set[str] = set()
        for repetition in range(bench.repetitions):
            # The copy needs something to copy, so the first round is not turned round.
            for entry in entries[:: 1 if repetition % 2 == 0 else -1]:
                name = entry.name if entry else contest.COPY
                if name in failed:
                    continue
                bench.progress(0, 1, f"{part}, repetition {repetition + 1} of {bench.repetitions}: {name}")
                out = folder / name
                shutil.rmtree(out, ignore_errors=True)
                warm(folder, checkpoint.num_bytes)
                made = quantize(bench, entry, source, out, data) if entry else _copy(original, out)
                bench.progress(1, 1, f"{part}, repetition {repetition + 1} of {bench.repetitions}: {name}")
                if name not in writers:
                    run = _header(bench, part, about, name, entry, made, source_digest)
                    writers[name] = stack.enter_context(RunWriter(bench.results, run))
                if made.failure:
                    failed.add(name)
                    writers[name].sample({"kind": "failure", "reason": made.failure})
                    continue
                writers[name].sample(_repetition(made, repetition))
                if repetition == bench.repetitions - 1 and entry:
                    _write_remarks(writers[name], made, out, source, bench.progress)
                if name != original.name:
                    shutil.rmtree(out)
        for writer in writers.values():
            records.append(store.read(writer.finish()))
    return records


def warm(folder: Path, num_bytes: int) -> None:
    """Writes and removes so many bytes, so that every run finds memory that the machine really has: a virtual one
    gives what is free back to its host after seconds, and pays several times the cost of a write to get it again."""
    path, piece = folder / "warm", bytes(16 << 20)
    with path.open("wb") as file:
        for _ in range(num_bytes // len(piece)):
            file.write(piece)
    path.unlink()


def _copy(original: Path, out: Path) -> Made:
    """A plain copy of a folder's bytes; Python's own copy is in this process already and loads nothing."""
    if not original.is_dir():
        return Made(failure="there is nothing to copy")
    start = time.perf_counter()
    shutil.copytree(original, out)
    seconds = time.perf_counter() - start
    return Made(wall_seconds=seconds, call_seconds=seconds, output_bytes=_folder_bytes(out))


@contextmanager
def scratch(part: str, progress: Progress) -> Iterator[tuple[Path, bool]]:
    """A folder that is gone afterwards, and whether it is in memory: where twice its size is free there."""
    needed = _SCRATCH_BYTES[part]
    in_memory = (
        os.access(_MEMORY_FOLDER, os.W_OK)
        and shutil.disk_usage(_MEMORY_FOLDER).free > needed
        and psutil.virtual_memory().available > 1.6 * needed
    )
    with tempfile.TemporaryDirectory(prefix="harness-peers-", dir=_MEMORY_FOLDER if in_memory else None) as folder:
        progress(1, 1, f"{part}: working in {'memory' if in_memory else 'a folder on disk (too little free memory)'}")
        yield Path(folder), in_memory


# -- Quality -----------------------------------------------------------------------------------------------------


class _Remembered:
    """A predictor that has answered before: the source's distributions, computed once for all variants."""

    def __init__(self, answers: Sequence[NDArray[np.float32]]) -> None:
        self._answers = answers

    def log_probs(self, windows: Sequence[Sequence[int]], batch_size: int) -> Iterator[NDArray[np.float32]]:
        yield from self._answers


def quality(bench: Bench, source: Path, groups: Sequence[contest.Group] = contest.QUALITY) -> list[Record]:
    """Every contestant of the groups on an embedded model: built if it is not there yet, checked, measured."""
    part = f"quality-{source.name}"
    folder = bench.artifacts / source.name
    data = write_calibration(source, folder, contest.QUALITY_SAMPLES, bench.progress)
    windows = heldout_windows(source, bench.limit)
    source_digest = open_checkpoint(source).fingerprint()
    about = {
        "source": source.name,
        "calibration_digest": data.digest,
        "dtype": "float32",
        "texts": {
            text: {
                "num_windows": len(cut),
                "token_ids_sha256": perplexity.token_ids_digest([i for one in cut for i in one]),
            }
            for text, cut in windows.items()
        },
    }
    with closing(open_engine("torch", source, dtype="float32")) as engine:
        reference = {text: _Remembered(list(engine.log_probs(cut, _BATCH))) for text, cut in windows.items()}
        bench.progress(1, 1, f"{part}: the source's predictions")
    records = []
    contestants = {one.name: one for group in groups for one in group.contestants}
    for number, (name, contestant) in enumerate(contestants.items(), 1):
        told = replace(bench, progress=named(bench.progress, f"{part}, {number} of {len(contestants)}: {name}"))
        made = _made(told, contestant, source, folder / name, data, source_digest)
        run = _header(bench, part, about, name, contestant, made, source_digest)
        with ExitStack() as stack:
            failure, variant = made.failure, None
            if not failure:
                try:
                    opened = open_engine("torch", folder / name, dtype="float32")
                    variant = stack.enter_context(closing(opened))
                    run = replace(run, engine=opened.info.as_dict())
                except UserError as error:
                    failure = error.problem
            writer = stack.enter_context(RunWriter(bench.results, run))
            if not made.failure:
                writer.sample(_repetition(made, 0))
                _write_remarks(writer, made, folder / name, source, told.progress)
            if failure or variant is None:
                writer.sample({"kind": "failure", "reason": failure or "it was not opened"})
            else:
                for text, cut in windows.items():
                    progress = named(told.progress, text)
                    chunks = fidelity.chunks_of([reference[text], variant], cut, _BATCH)
                    for _, sample in fidelity.fidelity_samples(chunks, cut, [name], progress=progress):
                        writer.sample({**{key: sample[key] for key in _STORED}, "text": text})
            records.append(store.read(writer.finish()))
    return records


def agreement(bench: Bench, source: Path) -> list[Record]:
    """Our rounding to nearest against theirs on an embedded model, tensor by tensor."""
    part = f"agreement-{source.name}"
    folder = bench.artifacts / source.name
    data = write_calibration(source, folder, contest.QUALITY_SAMPLES, bench.progress)
    source_digest = open_checkpoint(source).fingerprint()
    about = {"source": source.name, "calibration_digest": data.digest}
    records = []
    for ours, theirs in contest.AGREEMENTS:
        told = replace(bench, progress=named(bench.progress, f"{part}: {theirs.name}"))
        mine, made = (_made(told, one, source, folder / one.name, data, source_digest) for one in (ours, theirs))
        with RunWriter(bench.results, _header(bench, part, about, theirs.name, theirs, made, source_digest)) as writer:
            if failure := mine.failure or made.failure:
                writer.sample({"kind": "failure", "reason": failure})
            else:
                writer.sample(compare(source, folder / ours.name, folder / theirs.name))
            records.append(store.read(writer.finish()))
    return records


def heldout_windows(source: Path, limit: int | None) -> dict[str, list[list[int]]]:
    """Windows of token ids of held-out text: `near`, in the language that the calibration is in, and `far`."""
    texts = {"near": corpus.heldout_text(corpus.NEAR), "far": corpus.heldout_text(corpus.FAR)}
    ids = {text: perplexity.tokenize(source, content)[:NUM_TOKENS] for text, content in texts.items()}
    return {
        text: [one[first : first + WINDOW] for first in range(0, len(one) - WINDOW + 1, WINDOW)][:limit]
        for text, one in ids.items()
    }


def _made(bench: Bench, contestant: Contestant, source: Path, out: Path, data: Data, source_digest: str) -> Made:
    """The artifact of a contestant, from an earlier session if that made it of the same things."""
    of = {
        "contestant": {"side": type(contestant).__name__, **asdict(contestant)},
        "source_digest": source_digest,
        "calibration_digest": data.digest if contestant.needs_data else None,
        "versions": [harness.__version__, BUILDER_VERSION] if isinstance(contestant, Ours) else bench.their_packages,
    }
    stamp = out.with_name(f"{out.name}.{_MADE}")
    if out.is_dir() and stamp.exists():
        kept = json.loads(stamp.read_text(encoding="utf-8"))
        if kept["of"] == json.loads(json.dumps(of)):
            bench.progress(1, 1, "reused")
            return Made(**{**kept["made"], "warnings": tuple(kept["made"]["warnings"])})
    stamp.unlink(missing_ok=True)
    shutil.rmtree(out, ignore_errors=True)
    bench.progress(0, 1, "quantize")
    made = quantize(bench, contestant, source, out, data)
    bench.progress(1, 1, "quantize")
    if not made.failure:
        stamp.write_text(json.dumps({"of": of, "made": asdict(made)}, indent=2), encoding="utf-8")
    return made


# -- Records -----------------------------------------------------------------------------------------------------


def _repetition(made: Made, repetition: int) -> dict[str, Any]:
    return {
        "kind": "repetition",
        "repetition": repetition,
        "wall_seconds": made.wall_seconds,
        "call_seconds": made.call_seconds,
        "peak_rss_bytes": made.peak_rss_bytes,
        "output_bytes": made.output_bytes,
    }


def _write_remarks(writer: RunWriter, made: Made, out: Path, source: Path, progress: Progress) -> None:
    """What the tool said of its work, and what the auditor says of it."""
    for text in made.warnings:
        writer.sample({"kind": "warning", "text": text})
    writer.sample(_audit(out, source, progress))


def _header(
    bench: Bench,
    part: str,
    about: dict[str, Any],
    name: str,
    contestant: Contestant | None,
    made: Made,
    source_digest: str,
) -> Run:
    variant = {
        "name": name,
        "recipe": contestant.recipe if contestant else None,
        "contestant": asdict(contestant) if contestant else None,
        "artifact_digest": made.digest,
        "source_digest": source_digest,
    }
    return header(bench, part, about, variant, made.packages)


def header(bench: Bench, part: str, about: Mapping[str, Any], variant: dict[str, Any], packages: dict[str, str]) -> Run:
    """The header of a contestant's record in a part of the comparison; `about` says what all of it is about."""
    suite = {"name": part, **about}
    canonical = json.dumps(suite, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    threads = os.environ.get("OMP_NUM_THREADS")
    return Run(
        measure="peers",
        measure_version=VERSION,
        session_id=bench.session_id,
        suite=suite,
        suite_digest=hashlib.sha256(canonical.encode()).hexdigest(),
        variant=variant,
        engine=None,
        dataset=None,
        machine={**provenance.machine(), "omp_num_threads": threads},
        packages=packages,
        git=provenance.git(Path(harness.__file__).parent),
        command=bench.command,
    )
