"""Builds an artifact: a source checkpoint in, a compressed-tensors checkpoint out, as a stream.

No model class is loaded. Shards are taken one by one and tensors in pieces of a few megabytes; the output has
the source's shards under the source's names, so a build needs memory for a piece, not for a model.

    source shards ─▶ largest magnitude per fused group ─▶ scales and codes ─▶ <out>.partial/ ─▶ rename to <out>

The layers that vLLM fuses into one matrix share one global scale, chosen from all of them before any block
scale, even where they lie in different shards. Everything not quantized is copied byte for byte: vision tower,
MTP head, embeddings, norms, and the tokenizer and configuration files; `config.json` gains
`quantization_config` and nothing else.

The same source and recipe give the same bytes. A build that is interrupted or killed leaves `<out>.partial`,
which holds no `config.json` and so is no checkpoint; the same command continues it at the shard it was in. A
finished folder takes its name first, and `config.json` appears in it last, in one rename.
"""

import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from blake3 import blake3

from harness import __version__
from harness.errors import UserError
from harness.formats.config import Format, quantization_config
from harness.model.census import RoleCount, SourceTensor, output_bytes, source_tensors
from harness.model.checkpoint import (
    INDEX,
    PIECE_BYTES,
    TORCH_DTYPE,
    Checkpoint,
    NewTensor,
    ShardWriter,
    check_disk,
    header_bytes,
    index_json,
    new_shard,
    open_checkpoint,
    read_json,
    sync_folder,
    write_file,
)
from harness.model.qwen35 import parse_config
from harness.progress import Progress
from harness.quantize import layerwise
from harness.quantize.encode import WEIGHT_DTYPES, BadWeightError, Encoder, finite_amax, fused_groups, workers
from harness.quantize.layerwise import Calibration
from harness.quantize.plan import Plan, check_memory, plan, quantized
from harness.quantize.recipes import Recipe

VERSION = 4
"""Bumped when the same source and recipe give other bytes."""

MANIFEST = "harness-build.json"
"""The file in an artifact that says what it was built from; a folder with it is ours."""

CALIBRATION = "harness-calibration.json"
"""The file in an artifact that says what it was calibrated on, and what every layer made of that."""

_PROGRESS = "progress.json"
_LOCK = "lock"
_NEW_CONFIG = "config.json.new"

_NOT_COPIED_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".py", ".partial")
_NOT_COPIED_NAMES = ("config.json", INDEX, "README.md", MANIFEST, CALIBRATION)


@dataclass(frozen=True)
class Artifact:
    """A finished variant. `reused` tells whether this call found it or built it; the other fields after it are
    what a build measured and empty for a reused one."""

    folder: Path
    digest: str
    reused: bool
    counts: tuple[RoleCount, ...]
    stage_seconds: tuple[tuple[str, float], ...] = ()
    layers: tuple[Mapping[str, Any], ...] = ()
    """What calibration reported of every layer: see calibrate.LayerReport."""
    num_calibration_tokens: int = 0
    planned_memory_bytes: int | None = None
    """What the calibration was expected to hold at most."""
    peak_vram_bytes: int | None = None


@dataclass
class _Unfinished:
    """A build under way, as `progress.json` keeps it: reports of finished layers, digests of finished shards."""

    folder: Path
    identity: dict[str, Any]
    layers: list[dict[str, Any]] = field(default_factory=list)
    shards: dict[str, str] = field(default_factory=dict)

    def save(self) -> None:
        write_file(
            self.folder / _PROGRESS,
            _json({"identity": self.identity, "layers": self.layers, "shards": self.shards}),
        )


@dataclass
class _Meter:
    """Source bytes done so far, for the progress bar."""

    progress: Progress
    total: int
    done: int = 0

    def advance(self, num_bytes: int) -> None:
        self.done += num_bytes
        self.progress(self.done, self.total, "build")


def build(
    source: Path, recipe: Recipe, out: Path, progress: Progress, calibration: Calibration | None = None
) -> Artifact:
    """Builds `recipe` of the checkpoint in `source` into folder `out`, or finds it there.

    `UserError`, with nothing written, for a source that is damaged, of an unknown architecture, quantized
    already or not divisible into blocks; for a recipe that needs a calibration and has none; for an `out` that holds
    anything else; and for too little disk or memory. A weight that is NaN or infinite, quantized or kept, stops the
    build and leaves nothing.
    """
    named, source, out = out, source.resolve(), out.resolve()
    if out == source or source in out.parents:
        raise UserError(f"{out} lies in the source's own folder.", "Give an --out beside it.")
    if not recipe.needs_calibration:
        calibration = None
    elif calibration is None:
        raise UserError(
            f"Recipe '{recipe.name}' chooses its scales from data, and no calibration set is given.",
            "Add a [calibration] table to the suite, or give --calibration; 'rtn-a16' needs no data.",
        )
    checkpoint = open_checkpoint(source)
    config = parse_config(checkpoint.config, str(source / "config.json"))
    if "quantization_config" in checkpoint.config:
        raise UserError(f"{source} is quantized already.", "Build from its 16-bit source.")
    tensors = source_tensors((e.name, e.shape, e.num_bytes) for e in checkpoint.tensors.values())
    what = plan(config, tensors, recipe)
    formats = {tensor.name: form for tensor, form in quantized(tensors, recipe)}
    _check_sources(checkpoint, formats)
    identity = _identity(checkpoint, recipe, calibration)
    if (found := _existing(out, identity, recipe)) is not None:
        return Artifact(named, found, reused=True, counts=what.counts)
    memory = None if calibration is None else layerwise.memory(calibration, config, recipe)
    if memory is not None:
        check_memory(memory, psutil.virtual_memory().available)
    unfinished = out.with_name(out.name + ".partial")
    needed = what.output_bytes + (0 if calibration is None else _scratch_bytes(what, calibration, config.hidden_size))
    # What an interrupted build has finished is on the disk already.
    check_disk(out, needed - sum(path.stat().st_size for path in unfinished.glob("*") if path.is_file()))
    with _claimed(unfinished, identity) as state:
        seconds: dict[str, float] = {}
        if calibration is not None:
            model = layerwise.text_model(checkpoint, calibration)
            started = time.perf_counter()
            layerwise.quantize_layers(
                model,
                tensors,
                recipe.formats,
                recipe.method,
                calibration,
                unfinished,
                state.layers,
                state.save,
                progress,
            )
            seconds["calibrate"] = time.perf_counter() - started
        started = time.perf_counter()
        _write_shards(checkpoint, tensors, formats, recipe, state, _Meter(progress, what.source_bytes))
        digest = _finish(checkpoint, recipe, state, tensors, formats, calibration)
        seconds["write"] = time.perf_counter() - started
    unfinished.replace(out)
    _commit(out)
    return Artifact(
        named,
        digest,
        reused=False,
        counts=what.counts,
        stage_seconds=tuple(seconds.items()),
        layers=tuple(state.layers),
        num_calibration_tokens=0 if calibration is None else calibration.samples.num_tokens,
        planned_memory_bytes=None if memory is None else memory.total,
        peak_vram_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    )


def _scratch_bytes(what: Plan, calibration: Calibration, width: int) -> int:
    """What a calibrated build has on the disk beside its output: the layers' tensors, and the hidden states."""
    layers = sum(count.output_bytes for count in what.counts if count.format != "kept")
    return layers + layerwise.hidden_bytes(calibration, what.recipe, width)


def _check_sources(checkpoint: Checkpoint, formats: Mapping[str, Format]) -> None:
    if not formats:
        raise UserError(
            f"{checkpoint.folder} has no tensor that the recipe quantizes.", "Choose a recipe for this kind of model."
        )
    for name in formats:
        if checkpoint.tensors[name].dtype not in WEIGHT_DTYPES:
            raise UserError(
                f"{name} is stored as {checkpoint.tensors[name].dtype}, not as a {' or '.join(WEIGHT_DTYPES)} weight.",
                "Build from the 16-bit source.",
            )


def _identity(checkpoint: Checkpoint, recipe: Recipe, calibration: Calibration | None) -> dict[str, Any]:
    """What decides an artifact's bytes."""
    return {
        "builder": VERSION,
        "recipe": recipe.name,
        "formats": {role: form.name for role, form in recipe.formats.items()},
        "method": vars(recipe.method),
        "calibration": None if calibration is None else calibration.identity(),
        "source_fingerprint": checkpoint.fingerprint(),
        "copied": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in _copied(checkpoint.folder)},
    }


def _existing(out: Path, identity: dict[str, Any], recipe: Recipe) -> str | None:
    """The digest of the artifact in `out` if it is the one to be built; None if there is nothing in the way."""
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
            f"{out} holds an artifact of {_difference(found, identity)}.", "Remove it, or give another --out."
        )
    if (out / _NEW_CONFIG).exists():
        _commit(out)
    for name, written in files.items():
        path = out / name
        if not path.is_file() or path.stat().st_size != written["bytes"]:
            raise UserError(f"{path} is not as its build wrote it.", "Remove the folder to build it again.")
    return str(manifest["digest"])


def altered(folder: Path, source: Path, recipe: Recipe, progress: Progress) -> list[str]:
    """The files of the artifact in `folder` that are not, byte for byte, what its build of `recipe` from `source` wrote
    down in its manifest; one that is missing is among them. Every file is read whole."""
    checkpoint = open_checkpoint(source)
    tensors = source_tensors((e.name, e.shape, e.num_bytes) for e in checkpoint.tensors.values())
    formats = {tensor.name: form for tensor, form in quantized(tensors, recipe)}
    manifest = read_json(folder / MANIFEST)
    files = manifest["files"]
    digests = {name: written["digest"] for name, written in files.items()}
    found = [] if manifest["digest"] == hashlib.sha256(_json(digests)).hexdigest() else [MANIFEST]
    for done, (name, written) in enumerate(files.items(), 1):
        path = folder / name
        new = [
            new
            for tensor in tensors
            if checkpoint.tensors[tensor.name].shard == name
            for new in _new_tensors(checkpoint, tensor, formats.get(tensor.name))
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
    return hashlib.sha256(_json(digests)).hexdigest()


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
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


def _commit(out: Path) -> None:
    """Makes the finished folder `out` a checkpoint; done again after a kill in the middle of it."""
    sync_folder(out.parent)
    for leftover in (_PROGRESS, _LOCK):
        (out / leftover).unlink(missing_ok=True)
    layerwise.remove_scratch(out)
    (out / _NEW_CONFIG).replace(out / "config.json")
    sync_folder(out)


@contextmanager
def _claimed(folder: Path, identity: dict[str, Any]) -> Iterator[_Unfinished]:
    """Makes or continues `folder`, and yields what is finished in it."""
    found = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if not found <= {_LOCK, f"{_PROGRESS}.partial"} and _PROGRESS not in found:
        raise UserError(f"{folder} exists and is no unfinished build.", "Move it away, or give another --out.")
    if _PROGRESS in found and (saved := read_json(folder / _PROGRESS)).get("identity") != identity:
        raise UserError(
            f"{folder} holds an unfinished build of {_difference(saved.get('identity') or {}, identity)}.",
            "Remove it, or give another --out.",
        )
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"Another build is writing {folder}.", "Wait for it, or give another --out.") from None
        state = _Unfinished(folder, identity)
        if (folder / _PROGRESS).exists():
            saved = read_json(folder / _PROGRESS)
            state.layers = list(saved["layers"])
            state.shards = {name: digest for name, digest in saved["shards"].items() if (folder / name).is_file()}
        else:
            state.save()
        try:
            yield state
        except BadWeightError:
            shutil.rmtree(folder)  # continuing would meet it again
            raise


def _write_shards(
    checkpoint: Checkpoint,
    tensors: Sequence[SourceTensor],
    formats: Mapping[str, Format],
    recipe: Recipe,
    state: _Unfinished,
    meter: _Meter,
) -> None:
    """Writes every shard that is not written yet: kept tensors from the source, quantized ones from the layers' files
    where calibration made them and else encoded on the way."""
    made = layerwise.read_layers(state.folder, len(state.layers)) if state.layers else None
    with workers() as pool:
        encoder = Encoder(checkpoint, fused_groups(tensors, formats), recipe.method.scales, pool)
        for shard in checkpoint.shards:
            members = [tensor for tensor in tensors if checkpoint.tensors[tensor.name].shard == shard]
            if shard in state.shards:
                meter.advance(sum(tensor.num_bytes for tensor in members))
                continue
            new = [new for tensor in members for new in _new_tensors(checkpoint, tensor, formats.get(tensor.name))]
            with new_shard(state.folder / shard, new) as writer:
                for tensor in members:
                    if tensor.name not in formats:
                        _copy(checkpoint, tensor.name, writer, meter)
                    elif made is not None and f"{tensor.linears[0].module}.weight_scale" in made.tensors:
                        _collect(made, tensor, formats[tensor.name], writer)
                        meter.advance(tensor.num_bytes)
                    else:
                        _encode(encoder, tensor, writer, meter)
                digests = writer.close()
            state.shards[shard] = hashlib.sha256(_json(digests)).hexdigest()
            state.save()


def _copy(checkpoint: Checkpoint, name: str, writer: ShardWriter, meter: _Meter) -> None:
    entry = checkpoint.tensors[name]
    for piece in checkpoint.pieces(name):
        if entry.dtype in WEIGHT_DTYPES:
            finite_amax(entry, torch.frombuffer(piece, dtype=TORCH_DTYPE[entry.dtype]))
        writer.write(name, piece)
        meter.advance(len(piece))


def _collect(made: Checkpoint, tensor: SourceTensor, form: Format, writer: ShardWriter) -> None:
    for linear in tensor.linears:
        for stored in form.stored(linear.out_features, linear.in_features):
            name = f"{linear.module}.{stored.suffix}"
            for piece in made.pieces(name):
                writer.write(name, piece)


def _encode(encoder: Encoder, tensor: SourceTensor, writer: ShardWriter, meter: _Meter) -> None:
    for linear in tensor.linears:
        for packed, block_scales in encoder.pieces(tensor.name, linear):
            writer.write(f"{linear.module}.weight_packed", packed)
            writer.write(f"{linear.module}.weight_scale", block_scales)
            meter.advance(tensor.num_bytes * packed.numel() * 2 // tensor.num_params)
        writer.write(f"{linear.module}.weight_global_scale", encoder.global_scale(linear))


def _new_tensors(checkpoint: Checkpoint, tensor: SourceTensor, form: Format | None) -> Iterator[NewTensor]:
    if form is None:
        yield NewTensor(tensor.name, checkpoint.tensors[tensor.name].dtype, tensor.shape)
        return
    for linear in tensor.linears:
        for stored in form.stored(linear.out_features, linear.in_features):
            yield NewTensor(f"{linear.module}.{stored.suffix}", stored.dtype, stored.shape)


def _finish(
    checkpoint: Checkpoint,
    recipe: Recipe,
    state: _Unfinished,
    tensors: Sequence[SourceTensor],
    formats: Mapping[str, Format],
    calibration: Calibration | None,
) -> str:
    """Writes everything beside the shards, `config.json` under its temporary name; returns the artifact's digest."""
    folder = state.folder
    digests = dict(sorted(state.shards.items()))

    def put(name: str, data: bytes, written_as: str | None = None) -> None:
        write_file(folder / (written_as or name), data)
        digests[name] = hashlib.sha256(data).hexdigest()

    for path in _copied(checkpoint.folder):
        put(path.name, path.read_bytes())
    if (checkpoint.folder / INDEX).exists():
        weight_map = {
            new.name: checkpoint.tensors[tensor.name].shard
            for tensor in tensors
            for new in _new_tensors(checkpoint, tensor, formats.get(tensor.name))
        }
        put(INDEX, index_json(weight_map, sum(output_bytes(tensor, formats.get(tensor.name)) for tensor in tensors)))
    if calibration is not None:
        layers = [{key: value for key, value in layer.items() if key != "seconds"} for layer in state.layers]
        put(CALIBRATION, _json({"calibration": calibration.samples.manifest, "layers": layers}))
    quantization = quantization_config(recipe.targets(), recipe.ignored())
    put("config.json", _json({**checkpoint.config, "quantization_config": quantization}), _NEW_CONFIG)
    digest = hashlib.sha256(_json(digests)).hexdigest()
    sizes = {name: (folder / (_NEW_CONFIG if name == "config.json" else name)).stat().st_size for name in digests}
    manifest = {
        "schema": 1,
        "harness": __version__,
        "identity": state.identity,
        "digest": digest,
        "files": {name: {"bytes": sizes[name], "digest": one} for name, one in digests.items()},
    }
    write_file(folder / MANIFEST, _json(manifest))
    sync_folder(folder)
    return digest


def _copied(folder: Path) -> list[Path]:
    """The files of a source that go into the artifact unread: tokenizer, template, processor, licence, ..."""
    return sorted(path for path in folder.iterdir() if path.is_file() and _is_copied(path.name))


def _is_copied(name: str) -> bool:
    return not (name.startswith(".") or name in _NOT_COPIED_NAMES or name.endswith(_NOT_COPIED_SUFFIXES))


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
