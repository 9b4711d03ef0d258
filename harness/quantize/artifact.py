"""The folder of a finished variant: which build it came from, and whether its files are as that build wrote them."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from harness.errors import UserError
from harness.formats.format import Format
from harness.model.census import RoleCount, SourceTensor
from harness.model.checkpoint import (
    INDEX,
    PIECE_BYTES,
    Checkpoint,
    NewTensor,
    header_bytes,
    open_checkpoint,
    read_json,
    sync_folder,
)
from harness.model.family import Family
from harness.model.sources import census_of
from harness.progress import Progress
from harness.quantize.plan import quantized
from harness.quantize.recipes import Recipe

VERSION = 4
"""Bumped when the same source and recipe give other bytes."""

MANIFEST = "harness-build.json"
"""The file in an artifact that says what it was built from; only artifacts of the harness have it."""

CALIBRATION = "harness-calibration.json"
"""The file in an artifact that says what it was calibrated on, and what every layer made of that."""

PROGRESS = "progress.json"
LOCK = "lock"
NEW_CONFIG = "config.json.new"
SCRATCH = ("layer-*.safetensors*", "hidden-*")
"""What only an unfinished build needs: the layers' quantized tensors, and hidden states (layerwise.py)."""

_NOT_COPIED_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".py", ".partial")
_NOT_COPIED_NAMES = ("config.json", INDEX, "README.md", MANIFEST, CALIBRATION)


@dataclass(frozen=True)
class Artifact:
    """A finished variant, found (`reused`) or built. What a build measures is empty for a reused one."""

    folder: Path
    digest: str
    reused: bool
    counts: tuple[RoleCount, ...]
    notes: tuple[str, ...] = ()
    """What its user should know of its source (see `SourceCensus`)."""
    stage_seconds: tuple[tuple[str, float], ...] = ()
    layers: tuple[Mapping[str, Any], ...] = ()
    """What calibration reported of every layer: see calibrate.LayerReport."""
    num_calibration_tokens: int = 0
    planned_memory_bytes: int | None = None
    """What the calibration was expected to hold at most."""
    peak_vram_bytes: int | None = None


def identity_of(
    checkpoint: Checkpoint, family: Family, recipe: Recipe, calibration: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What decides an artifact's bytes, beside the kind of processor that calibrates it. `calibration` is the identity
    of the samples and of how they go through the model."""
    return {
        "builder": VERSION,
        "recipe": recipe.name,
        "formats": {role: form.name for role, form in recipe.formats(family).items()},
        "method": vars(recipe.method),
        "calibration": calibration,
        "source_fingerprint": checkpoint.fingerprint(),
        "copied": {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in copied_files(checkpoint.folder)
        },
    }


def digest_of_existing(out: Path, identity: dict[str, Any], recipe: Recipe) -> str | None:
    """The digest of the artifact in `out`, where the same build made it; None where `out` is free. `UserError` where
    `out` holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / MANIFEST).is_file():
        raise UserError(f"{out} exists and was not made by this harness.", "Give another --out, or move it away.")
    manifest = read_json(out / MANIFEST)
    found, files = manifest.get("identity"), manifest.get("files")
    if not isinstance(found, dict) or not isinstance(files, dict):
        raise UserError(f"{out / MANIFEST} is no manifest of a build.", "Give another --out, or move the folder away.")
    if found != identity:
        raise UserError(
            f"{out} holds an artifact of {difference_of_builds(found, identity)}.", "Remove it, or give another --out."
        )
    if (out / NEW_CONFIG).exists():
        commit_folder(out)
    for name, written in files.items():
        path = out / name
        if not path.is_file() or path.stat().st_size != written["bytes"]:
            raise UserError(f"{path} is not as its build wrote it.", "Remove the folder to build it again.")
    return str(manifest["digest"])


def commit_folder(out: Path) -> None:
    """Makes the finished folder `out` a checkpoint; done again after a kill in the middle of it."""
    sync_folder(out.parent)
    for leftover in (PROGRESS, LOCK):
        (out / leftover).unlink(missing_ok=True)
    for pattern in SCRATCH:
        for path in out.glob(pattern):
            path.unlink()
    (out / NEW_CONFIG).replace(out / "config.json")
    sync_folder(out)


def altered(folder: Path, source: Path, recipe: Recipe, progress: Progress) -> list[str]:
    """The files of the artifact in `folder` that are not, byte for byte, what its build of `recipe` from `source` wrote
    down in its manifest; missing files are among them. Every file is read whole."""
    checkpoint = open_checkpoint(source)
    tensors = census_of(checkpoint).tensors
    formats = {tensor.name: form for tensor, form in quantized(tensors, recipe)}
    manifest = read_json(folder / MANIFEST)
    files = manifest["files"]
    digests = {name: written["digest"] for name, written in files.items()}
    found = [] if manifest["digest"] == hashlib.sha256(pretty_json(digests)).hexdigest() else [MANIFEST]
    for done, (name, written) in enumerate(files.items(), 1):
        path = folder / name
        new = [
            new
            for tensor in tensors
            if checkpoint.tensors[tensor.name].shard == name
            for new in new_tensors(checkpoint, tensor, formats.get(tensor.name))
        ]
        is_whole = path.is_file() and path.stat().st_size == written["bytes"]
        if not is_whole or written["digest"] != _file_digest(path, new):
            found.append(name)
        progress(done, len(files), "check files")
    return found


def _file_digest(path: Path, tensors: Sequence[NewTensor]) -> str:
    """The digest of a file as a build notes it: of a shard, which has tensors, that of what `ShardWriter.close` says of
    its bytes."""
    if not tensors:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    head, offsets = header_bytes(tensors)
    with path.open("rb") as file:
        digests = {"": blake3(file.read(len(head))).hexdigest()}
        for tensor in tensors:
            file.seek(offsets[tensor.name])
            digest, left = blake3(), tensor.num_bytes
            while left and (piece := file.read(min(left, PIECE_BYTES))):
                digest.update(piece)
                left -= len(piece)
            digests[tensor.name] = digest.hexdigest()
    return hashlib.sha256(pretty_json(digests)).hexdigest()


def difference_of_builds(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """What tells two identities apart, in words."""
    if found.get("recipe") != wanted["recipe"]:
        return f"recipe '{found.get('recipe')}', not of '{wanted['recipe']}' from this source"
    if found.get("method") != wanted["method"]:
        method = found.get("method") or {}
        words = f"recipe '{wanted['recipe']}' with scales '{method.get('scales')}' and codes '{method.get('codes')}'"
        named = all(method.get(name) == wanted["method"][name] for name in ("scales", "codes"))
        return f"{words}, which this version of the harness does with other settings" if named else words
    if found.get("calibration") != wanted["calibration"]:
        return f"recipe '{wanted['recipe']}' on another calibration set"
    return f"another source or builder version, not of '{wanted['recipe']}' from this source"


def new_tensors(checkpoint: Checkpoint, tensor: SourceTensor, form: Format | None) -> Iterator[NewTensor]:
    """The tensors of an artifact that one tensor of the source becomes, stored in `form`, or as it is for None."""
    if form is None:
        yield NewTensor(tensor.name, checkpoint.tensors[tensor.name].dtype, tensor.shape)
        return
    for linear in tensor.linears:
        for stored in form.stored(linear.out_features, linear.in_features):
            yield NewTensor(f"{linear.module}.{stored.suffix}", stored.dtype, stored.shape)


def copied_files(folder: Path) -> list[Path]:
    """The files of a source that go into the artifact unread: tokenizer, template, processor, licence, ..."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file()
        and not path.name.startswith(".")
        and path.name not in _NOT_COPIED_NAMES
        and not path.name.endswith(_NOT_COPIED_SUFFIXES)
    )


def pretty_json(value: Any) -> bytes:
    """A value as JSON that people read: indented, UTF-8."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
