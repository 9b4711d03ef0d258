"""The upload folder of a variant: all that its page on the model hub holds, checked before it gets its name.

    publish/<suite>/<variant>/
      README.md, figures, index.html     the card
      config.json, *.safetensors, …      the artifact as its build wrote it, with the source's tokenizer and licence
      harness-build.json, …              what it was built from and calibrated on
      suite.toml                         the suite's file, to repeat it with
      results/<machine>/*.jsonl          the records that the card cites, and no others
      results/exports/, .eval_results/   the same numbers for programs
      harness-publish.json               the list of all these files

Nothing is built or measured here. The artifact is compared with its manifest, and that with the records; `verify`,
the gate and the claims must find nothing wrong; the card is traced, and the text is searched for what belongs to this
machine.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

from harness import __version__
from harness.audit.verify import verify
from harness.errors import UserError
from harness.job import Job
from harness.model.checkpoint import open_checkpoint, read_json
from harness.model.families import family_of
from harness.quantize.artifact import MANIFEST, altered, pretty_json
from harness.record import baselines
from harness.record.run import Record, Skipped
from harness.report import card, claims, export, gate
from harness.report.evidence import Evidence, gather
from harness.report.gate import Judgement
from harness.resolve import chosen_variants
from harness.serve import CONTAINER_CACHE
from harness.suite.load import narrowed
from harness.suite.names import SOURCE, row_parts

PUBLISHED = "harness-publish.json"
"""The file that lists what `harness publish` put into a folder; a folder with it may be replaced."""

_RESULTS = "results"
_EXPORTS = "results/exports"
_EVAL_RESULTS = ".eval_results/"  # where the Hub looks for scores (https://huggingface.co/docs/hub/eval-results)
_LICENCES = ("LICENSE*", "NOTICE*", "USE_POLICY*")
_NAMES_A_SECRET = re.compile("TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_?KEY")
_SHORTEST_SECRET = 8


@dataclass(frozen=True)
class Assembled:
    """A folder that was assembled, or why it was refused.

    `files`: bytes by path, empty where the folder was refused. `findings`: what is wrong. `undecided`: what the gate
    could not judge, which refuses the folder unless the command allows it."""

    folder: Path
    artifact_digest: str
    files: Mapping[str, int]
    findings: tuple[str, ...]
    undecided: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """0 for an assembled folder, 1 for findings, 3 for what could not be judged."""
        return 0 if self.files else 1 if self.findings else 3


# -- Checks ------------------------------------------------------------------------------------------------------


def assemble(
    job: Job,
    suite_file: Path,
    variant: str,
    repo: str,
    out: Path,
    records: Sequence[Record],
    skipped: Sequence[Skipped],
    *,
    allow_undecided: bool = False,
) -> Assembled:
    """Checks a variant and assembles its upload folder as `out`, or says why the variant cannot be published.

    `UserError`, with nothing written, for an artifact that is not built, was built by another recipe, changed since or
    is not the one that the records measured; for a suite without a rule for the variant; and for an `out` that holds
    anything but what this function wrote.
    """
    from harness.report.trace import trace

    chosen_variants(job.suite, [variant], with_source=False)
    claims.check_words(job.suite)
    out = out.resolve()
    _check_out(out)
    artifact = _artifact(job, variant)
    judged = _judgements(job, variant, records, skipped)
    evidence = gather(narrowed(job.suite, variant), records, _RESULTS, repo)
    _check_records(artifact, variant, evidence)
    _check_files(job, artifact, variant)
    findings = [
        f"verify: {one.tensor} {one.problem}: {one.consequence}"
        for one in verify(artifact.folder, artifact.source, job.progress).findings
        if one.severity == "error"
    ]
    findings += [_words(one) for one in judged if one.verdict == "fail"]
    judged_claims = claims.judged_claims(evidence.suite, records, skipped)
    findings += [f"claims: {one.reason}" for one in judged_claims if not one.supported]
    undecided = tuple(_words(one) for one in judged if gate.EXIT_CODES[one.verdict] == 3)
    outcome = Assembled(out, artifact.digest, {}, tuple(findings), undecided)
    if findings or (undecided and not allow_undecided):
        return outcome
    contents = _contents(artifact, evidence)
    card_files = card.variant_card(job.suite, records, variant, results_dir=_RESULTS, repo=repo)
    _add(contents, card_files, "the card")
    _add(contents, {"suite.toml": suite_file}, "the suite")
    with _new_folder(out) as made:
        files = _write(made, contents)
        about = {"suite": job.suite.name, "variant": variant, "repo": repo, "artifact_digest": artifact.digest}
        listed = pretty_json({"schema": 1, "harness": __version__, **about, "files": files})
        files[PUBLISHED] = (made / PUBLISHED).write_bytes(listed)
        findings = [f"trace: README.md: {one}" for one in trace(made / "README.md", job.suite).findings]
        findings += of_this_machine(made, files, _places(job, artifact), os.environ)
        if findings:
            told = tuple(one.replace(str(made), str(out)) for one in findings)
            return replace(outcome, findings=told)
        _put_in_place(made, out)
    return replace(outcome, files=files)


@dataclass(frozen=True)
class _Artifact:
    """A built artifact by its manifest; `files` are all that belong to it."""

    folder: Path
    source: Path
    source_digest: str
    digest: str
    files: tuple[str, ...]


def _artifact(job: Job, variant: str) -> _Artifact:
    """The artifact of a variant by its manifest; `UserError` for none, or one of another source or recipe."""
    folder, source = job.artifact(variant), job.source
    if not (folder / MANIFEST).is_file() or not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no built artifact of '{variant}'.", "Build it: run `nox -s build`.")
    manifest, recipe = read_json(folder / MANIFEST), job.recipe(variant)
    original = open_checkpoint(source)
    source_digest, family = original.fingerprint(), family_of(original.config, str(source))
    identity, files, digest = (manifest.get(key) for key in ("identity", "files", "digest"))
    if not (
        isinstance(identity, dict)
        and isinstance(digest, str)
        and isinstance(files, dict)
        and all(_is_entry(name, one) for name, one in files.items())
    ):
        raise UserError(f"{folder / MANIFEST} is no manifest of a build.", "Remove the folder to build it again.")
    wanted = {
        "recipe": recipe.name,
        "formats": {role: form.name for role, form in recipe.formats(family).items()},
        "method": vars(recipe.method),
        "source_fingerprint": source_digest,
    }
    if any(identity.get(key) != value for key, value in wanted.items()):
        raise UserError(
            f"{folder} holds an artifact of another recipe or source than the suite's '{variant}'.",
            "Remove it, and run `nox -s build`.",
        )
    return _Artifact(folder, source, source_digest, digest, (*files, MANIFEST))


def _is_entry(name: str, written: object) -> bool:
    """Whether an entry of a manifest names a file in the artifact's own folder, its bytes and its digest."""
    is_in_the_folder = Path(name).name == name and name not in ("", "..")
    return is_in_the_folder and isinstance(written, dict) and {"bytes", "digest"} <= written.keys()


def _check_files(job: Job, artifact: _Artifact, variant: str) -> None:
    """`UserError` for an artifact that is not what its build wrote."""
    found = altered(artifact.folder, artifact.source, job.recipe(variant), job.progress)
    if found:
        more = f", nor are {len(found) - 1} more" if len(found) > 1 else ""
        raise UserError(
            f"{artifact.folder / found[0]} is not as its build wrote it{more}.", "Remove the folder to build it again."
        )


def _check_records(artifact: _Artifact, variant: str, evidence: Evidence) -> None:
    """`UserError` for a card about another artifact or source. A run known by its owner's word has no digest."""
    cited = [record for record in evidence.chosen if row_parts(record.run.variant["name"])[0] == variant]
    if not cited:
        raise UserError(f"There is no record of '{variant}' to make a card of.", "Measure it: run `nox -s ppl bench`.")
    for record in evidence.chosen:
        digests = {"source_digest": artifact.source_digest}
        if record in cited:
            digests["artifact_digest"] = artifact.digest
        for key, here in digests.items():
            if (known := record.run.variant.get(key)) not in (None, here):
                what = key.removesuffix("_digest")
                raise UserError(
                    f"Run {record.run.run_id} ({record.run.measure}) is of another {what}, {known[:12]}, than the one "
                    f"that lies here, {here[:12]}.",
                    f"Run `nox -s {record.run.measure}` again, or restore what was measured.",
                )


def _judgements(job: Job, variant: str, records: Sequence[Record], skipped: Sequence[Skipped]) -> tuple[Judgement, ...]:
    """The verdicts on the suite's rules about a variant and about the source, which its card compares it with."""
    rows = narrowed(job.suite, variant).rows()
    rules = tuple(rule for rule in job.suite.gate if rule.variant in rows)
    if all(row_parts(rule.variant)[0] == SOURCE for rule in rules):
        raise UserError(
            f"Suite '{job.suite.name}' has no [[gate]] rule about '{variant}'.", "Say what it may lose: add one."
        )
    baseline = baselines.baseline_in_force(job.results, job.suite.name)

    return gate.judge(replace(job.suite, gate=rules), records, baseline, skipped)


def _words(judgement: Judgement) -> str:
    return f"gate: {judgement.name}: {judgement.verdict}: {judgement.reason}"


# -- The folder --------------------------------------------------------------------------------------------------


def _contents(artifact: _Artifact, evidence: Evidence) -> dict[str, bytes | Path]:
    """What a folder holds beside the card and the suite: its path there, and the bytes or where they lie."""
    contents: dict[str, bytes | Path] = {name: artifact.folder / name for name in artifact.files}
    licences = {path.name: path for pattern in _LICENCES for path in sorted(artifact.source.glob(pattern))}
    contents |= {name: path for name, path in licences.items() if name not in contents and path.is_file()}
    _add(contents, {evidence.record_path(record): record.path for record in evidence.chosen}, "the records")

    (variant,) = evidence.suite.variants
    exported = export.variant_files(evidence, variant) | export.csv_files(evidence, evidence.suite.rows())
    placed = {name if name.startswith(_EVAL_RESULTS) else f"{_EXPORTS}/{name}": data for name, data in exported.items()}
    _add(contents, placed, "the exports")
    return contents


def _add(contents: dict[str, bytes | Path], more: Mapping[str, bytes | Path], what: str) -> None:
    if taken := sorted(contents.keys() & more.keys()):
        raise UserError(
            f"The artifact has a file '{taken[0]}', and so have {what}.", "Rename it in the source, and build again."
        )
    contents |= more


def _check_out(out: Path) -> None:
    """`UserError` for a place that holds anything that was not put there to be published."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    remedy = "Give another --out, or move it away."
    listed = read_json(out / PUBLISHED).get("files") if (out / PUBLISHED).is_file() else None
    if not isinstance(listed, dict):
        raise UserError(f"{out} exists and was not made by `harness publish`.", remedy)
    present = {path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir()}
    if others := sorted(present - listed.keys() - {PUBLISHED}):
        raise UserError(f"{out} holds {others[0]}, which `harness publish` did not put there.", remedy)


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A new folder beside `out`. If it is not put in its place, it goes again, with the folders made above it."""
    made = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    above = [folder for folder in out.parents if not folder.exists()]
    made.mkdir(parents=True)
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
        with suppress(OSError):  # the first that holds something
            for folder in above:
                folder.rmdir()


def _put_in_place(made: Path, out: Path) -> None:
    """Gives a finished folder its name. What had it goes after that, so that there is always a whole one."""
    if out.exists():
        old = made.with_suffix(".old")
        out.rename(old)
        made.rename(out)
        shutil.rmtree(old)
    else:
        made.rename(out)


def _write(made: Path, contents: Mapping[str, bytes | Path]) -> dict[str, int]:
    """Writes every file; returns its bytes by its path. Shards are linked where the disk can, and never written to:
    they are most of an artifact, and all the rest may be edited before it is uploaded."""
    for name, content in sorted(contents.items()):
        target = made / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            target.write_bytes(content)
        elif name.endswith(".safetensors"):
            _link(content.resolve(), target)
        else:
            shutil.copyfile(content, target)
    return {name: (made / name).stat().st_size for name in sorted(contents)}


def _link(file: Path, target: Path) -> None:
    try:
        target.hardlink_to(file)
    except OSError:  # another disk, or one without links
        shutil.copyfile(file, target)


def _places(job: Job, artifact: _Artifact) -> list[Path]:
    """The folders of this machine that a command has to do with."""
    given = (Path.home(), Path.cwd(), artifact.folder, artifact.source, job.artifacts, job.results, job.suite.folder)
    return list(dict.fromkeys(place for path in given for place in (path.absolute(), path.resolve())))


# -- What belongs to this machine ------------------------------------------------------------------------------------


def of_this_machine(
    folder: Path, files: Iterable[str], places: Iterable[Path], environment: Mapping[str, str]
) -> Iterator[str]:
    """Where a file of `folder` holds one of the paths `places`, or the value of a variable whose name is that of a
    secret: a sentence for each, which does not repeat a secret. Weights are not looked at."""
    wanted = [(str(place), str(place), True) for place in places if len(place.parts) > 1]
    for name, value in sorted(environment.items()):
        if _NAMES_A_SECRET.search(name.upper()) and len(value) >= _SHORTEST_SECRET:
            wanted.append((f"the value of the variable {name}", value, False))
    for file in sorted(files):
        if file.endswith(".safetensors"):
            continue
        data = (folder / file).read_bytes()
        for what, text, is_path in wanted:
            if (place := _position(data, text, is_path)) is not None:
                line = data.count(b"\n", 0, place) + 1
                yield f"{file}, line {line} holds {what}: that is of this machine alone"


def _position(data: bytes, text: str, is_path: bool) -> int | None:
    """Where a text first stands, as it is, as JSON has it or as a link has it; None if it does not. A path stands where
    it is not inside another, nor the start of a longer name; one of a single name may be a word, and counts where
    something follows it. The cache of a container, as the commands to serve a variant mount it, is of no machine."""
    ways = (way.encode(errors="surrogateescape") for way in dict.fromkeys((text, json.dumps(text)[1:-1], quote(text))))
    start = rb"(?<![\w.~-])(?!(?<=:)" + re.escape(CONTAINER_CACHE.encode()) + rb"\b)"
    end = rb"/[\w.]" if text.count("/") == 1 else rb"(?![\w-])"
    for way in ways:
        if way in data:  # the expression is slow, and seldom needed
            if not is_path:
                return data.index(way)
            if found := re.search(start + re.escape(way) + end, data):
                return found.start()
    return None
