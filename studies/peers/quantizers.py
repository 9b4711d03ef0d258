"""One run of one quantizer, ours or llm-compressor's, in a process of its own under the stopwatch.

Nothing of what is timed happens in this process. Both sides read the same calibration samples.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import harness
from harness.audit.verify import verify
from harness.demo import corpus
from harness.errors import UserError
from harness.model.checkpoint import open_checkpoint
from harness.progress import Progress
from harness.quantize import samples
from harness.quantize.artifact import VERSION as BUILDER_VERSION
from harness.record import provenance
from harness.suite.texts import Calibration, FileSamples
from studies.peers import contest
from studies.peers.contest import Contestant, Ours, Theirs
from studies.peers.session import Session, failure_reason
from studies.peers.stopwatch import timed

_COMPRESSOR = Path(__file__).with_name("compressor.py")
_CALIBRATION_DOCUMENTS = 600


@dataclass(frozen=True)
class Made:
    """One run of a quantizer: what it left behind and what it took. With a `failure` there is nothing else."""

    digest: str | None = None
    wall_seconds: float = 0.0
    call_seconds: float | None = None
    """From the first byte read to the last written, without imports, as the tool itself tells."""
    peak_rss_bytes: int | None = None
    output_bytes: int = 0
    packages: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    failure: str | None = None

    def sample(self, repetition: int) -> dict[str, Any]:
        """The raw observation that is kept."""
        return {
            "kind": "repetition",
            "repetition": repetition,
            "wall_seconds": self.wall_seconds,
            "call_seconds": self.call_seconds,
            "peak_rss_bytes": self.peak_rss_bytes,
            "output_bytes": self.output_bytes,
        }


@dataclass(frozen=True)
class Data:
    """The calibration set: as our builder reads it, as llm-compressor's side reads it, and its digest."""

    toml: Path
    token_ids: Path
    digest: str

    @classmethod
    def none(cls, folder: Path) -> "Data":
        """The data of contestants that need none."""
        return cls(folder / "none", folder / "none", "")


def their_packages(python: Path) -> dict[str, str]:
    """The versions in llm-compressor's environment; `UserError` where it is missing or has no llm-compressor."""
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


def write_calibration(tokenizer_folder: Path, folder: Path, num_samples: int, progress: Progress) -> Data:
    """Writes text of the embedded corpus' training split, and the same samples as token ids, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    text = corpus.split_text("train", num_documents=_CALIBRATION_DOCUMENTS)
    (folder / "calibration.txt").write_bytes(text.encode())
    source = FileSamples(path="calibration.txt", samples=num_samples, max_tokens=contest.CALIBRATION_TOKENS, seed=0)
    chosen = samples.read_samples(Calibration((source,)), tokenizer_folder, folder, {}, progress)
    data = Data(folder / "calibration.toml", folder / "calibration.json", chosen.digest)
    lines = (f'path = "{source.path}"', f"samples = {source.samples}", f"max_tokens = {source.max_tokens}", "seed = 0")
    data.toml.write_text("\n".join(("[[sources]]", *lines, "")), encoding="utf-8")
    data.token_ids.write_text(json.dumps(chosen.samples), encoding="utf-8")
    return data


def quantize(session: Session, contestant: Contestant, source: Path, out: Path, data: Data) -> Made:
    """Runs one quantizer to its end. `out` must not exist; logs are written beside it."""
    if isinstance(contestant, Ours):
        return _run_ours(contestant, source, out, data)
    return _run_theirs(session, contestant, source, out, data)


def quantize_once(
    session: Session, contestant: Contestant, source: Path, out: Path, data: Data, source_digest: str
) -> Made:
    """The artifact of a contestant, reused if an earlier session made it of the same things."""
    of = {
        "contestant": {"side": type(contestant).__name__, **asdict(contestant)},
        "source_digest": source_digest,
        "calibration_digest": data.digest if contestant.needs_data else None,
        "versions": [harness.__version__, BUILDER_VERSION] if isinstance(contestant, Ours) else session.their_packages,
    }
    stamp = out.with_name(f"{out.name}.made.json")
    if out.is_dir() and stamp.exists():
        kept = json.loads(stamp.read_text(encoding="utf-8"))
        if kept["of"] == json.loads(json.dumps(of)):
            session.progress(1, 1, "reused")
            return Made(**{**kept["made"], "warnings": tuple(kept["made"]["warnings"])})
    stamp.unlink(missing_ok=True)
    shutil.rmtree(out, ignore_errors=True)
    session.progress(0, 1, "quantize")
    made = quantize(session, contestant, source, out, data)
    session.progress(1, 1, "quantize")
    if not made.failure:
        stamp.write_text(json.dumps({"of": of, "made": asdict(made)}, indent=2), encoding="utf-8")
    return made


def remarks_on(made: Made, out: Path, source: Path, progress: Progress) -> Iterator[dict[str, Any]]:
    """Samples of what the tool said of its work, and of what `harness verify` says of it."""
    for text in made.warnings:
        yield {"kind": "warning", "text": text}
    try:
        findings = verify(out, source, progress).findings
        severities = [finding.severity for finding in findings]
        first = next((f"{f.tensor} {f.problem}" for f in findings if f.severity == "error"), None)
    except UserError as error:
        severities, first = ["error"], error.problem
    num_errors = severities.count("error")
    yield {
        "kind": "verdict",
        "passed": num_errors == 0,
        "num_errors": num_errors,
        "num_warnings": severities.count("warning"),
        "first_error": first,
    }


def folder_bytes(folder: Path) -> int:
    """The size of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _run_ours(contestant: Ours, source: Path, out: Path, data: Data) -> Made:
    command = [sys.executable, "-m", "harness", "build", str(source), *contestant.arguments(), "--out", str(out)]
    calibration = ["--calibration", str(data.toml)] if contestant.needs_data else []
    run = timed([*command, *calibration, "--json"], _logs(out))
    if run.exit_code:
        return Made(failure=failure_reason(run.exit_code, run.complaint))
    (built,) = json.loads(run.stdout)
    stages = built.get("stage_seconds")
    return Made(
        digest=built["digest"],
        wall_seconds=run.wall_seconds,
        call_seconds=sum(dict(stages).values()) if stages else None,
        peak_rss_bytes=run.peak_rss_bytes,
        output_bytes=folder_bytes(out),
        packages=provenance.packages(),
    )


def _run_theirs(session: Session, contestant: Theirs, source: Path, out: Path, data: Data) -> Made:
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
    command = [str(session.their_python), "-P", str(_COMPRESSOR), str(file)]
    run = timed(command, _logs(out), env={"HF_HUB_OFFLINE": "1"})
    if run.exit_code or not result.exists():
        return Made(failure=failure_reason(run.exit_code, run.complaint))
    told = json.loads(result.read_text(encoding="utf-8"))
    return Made(
        digest=_fingerprint(out),
        wall_seconds=run.wall_seconds,
        call_seconds=sum(told["seconds"].values()),
        peak_rss_bytes=run.peak_rss_bytes,
        output_bytes=folder_bytes(out),
        packages=told["packages"],
        warnings=tuple(told["warnings"]),
    )


def _logs(out: Path) -> Path:
    return out.with_name(out.name + ".log")


def _fingerprint(folder: Path) -> str | None:
    try:
        return open_checkpoint(folder).fingerprint()
    except UserError:
        return None  # the auditor says what is wrong with the folder
