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
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from harness import __version__
from harness.errors import UserError
from harness.formats import nvfp4
from harness.formats.config import Format, quantization_config
from harness.model.census import RoleCount, SourceTensor, output_bytes, source_tensors
from harness.model.checkpoint import (
    INDEX,
    PIECE_BYTES,
    TORCH_DTYPE,
    Checkpoint,
    NewTensor,
    TensorEntry,
    check_disk,
    index_json,
    new_shard,
    open_checkpoint,
    read_json,
    sync_folder,
    write_file,
)
from harness.model.qwen35 import Linear, parse_config
from harness.progress import Progress
from harness.quantize.plan import plan, quantized
from harness.quantize.recipes import Recipe

T = TypeVar("T")
R = TypeVar("R")

VERSION = 1
"""Bumped when the same source and recipe give other bytes."""

MANIFEST = "harness-build.json"
"""The file in an artifact that says what it was built from; a folder with it is ours."""

_PROGRESS = "progress.json"
_LOCK = "lock"
_NEW_CONFIG = "config.json.new"
_CHUNK_ELEMENTS = 1 << 18
"""Weights encoded at a time: their float32 temporaries stay in the second-level cache."""

_WEIGHT_DTYPES = ("BF16", "F16", "F32")
_NOT_COPIED_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".py", ".partial")
_NOT_COPIED_NAMES = ("config.json", INDEX, "README.md", MANIFEST)


class _BadWeightError(UserError):
    """A source that no build can finish."""


@dataclass(frozen=True)
class Artifact:
    """A finished variant. `reused` tells whether this call found it or built it; the other fields after it are
    what a build measured and empty for a reused one."""

    folder: Path
    digest: str
    reused: bool
    counts: tuple[RoleCount, ...]
    stage_seconds: tuple[tuple[str, float], ...] = ()


@dataclass
class _Meter:
    """Source bytes done so far, for the progress bar."""

    progress: Progress
    total: int
    done: int = 0

    def advance(self, num_bytes: int) -> None:
        self.done += num_bytes
        self.progress(self.done, self.total, "build")


def build(source: Path, recipe: Recipe, out: Path, progress: Progress) -> Artifact:
    """Builds `recipe` of the checkpoint in `source` into folder `out`, or finds it there.

    `UserError`, with nothing written, for a source that is damaged, of an unknown architecture, quantized
    already or not divisible into blocks; for an `out` that holds anything else; and for too little disk. A
    weight that is NaN or infinite, quantized or kept, stops the build and leaves nothing.
    """
    named, source, out = out, source.resolve(), out.resolve()
    if out == source or source in out.parents:
        raise UserError(f"{out} lies in the source's own folder.", "Give an --out beside it.")
    if recipe.needs_calibration:
        raise UserError(
            f"Recipe '{recipe.name}' stores scales of activations, and this version has no calibration to choose them.",
            "Build 'rtn-a16', which needs no data, or look at the recipe's sizes with `harness plan`.",
        )
    checkpoint = open_checkpoint(source)
    config = parse_config(checkpoint.config, str(source / "config.json"))
    if "quantization_config" in checkpoint.config:
        raise UserError(f"{source} is quantized already.", "Build from its 16-bit source.")
    tensors = source_tensors((e.name, e.shape, e.num_bytes) for e in checkpoint.tensors.values())
    what = plan(config, tensors, recipe)
    formats = {tensor.name: form for tensor, form in quantized(tensors, recipe)}
    _check_sources(checkpoint, formats)
    identity = _identity(checkpoint, recipe)
    if (found := _existing(out, identity, recipe)) is not None:
        return Artifact(named, found, reused=True, counts=what.counts)
    unfinished = out.with_name(out.name + ".partial")
    # What an interrupted build has finished is on the disk already.
    check_disk(out, what.output_bytes - sum(path.stat().st_size for path in unfinished.glob("*.safetensors")))
    with _claimed(unfinished, identity) as done, _workers() as pool:
        started = time.perf_counter()
        by_shard = {
            shard: [tensor for tensor in tensors if checkpoint.tensors[tensor.name].shard == shard]
            for shard in checkpoint.shards
        }
        groups = _fused_groups(tensors, formats)
        scales: dict[str, Tensor] = {}
        meter = _Meter(progress, what.source_bytes)
        for shard in checkpoint.shards:
            if shard not in done:
                done[shard] = _write_shard(
                    checkpoint, unfinished / shard, by_shard[shard], formats, groups, scales, meter, pool
                )
                write_file(unfinished / _PROGRESS, _json({"identity": identity, "shards": done}))
            else:
                meter.advance(sum(tensor.num_bytes for tensor in by_shard[shard]))
        seconds = time.perf_counter() - started
        digest = _finish(checkpoint, unfinished, recipe, identity, done, tensors, formats)
    unfinished.replace(out)
    _commit(out)
    return Artifact(named, digest, reused=False, counts=what.counts, stage_seconds=(("quantize", seconds),))


def _check_sources(checkpoint: Checkpoint, formats: dict[str, Format]) -> None:
    if not formats:
        raise UserError(
            f"{checkpoint.folder} has no tensor that the recipe quantizes.", "Choose a recipe for this kind of model."
        )
    for name in formats:
        if checkpoint.tensors[name].dtype not in _WEIGHT_DTYPES:
            raise UserError(
                f"{name} is stored as {checkpoint.tensors[name].dtype}, not as a {' or '.join(_WEIGHT_DTYPES)} weight.",
                "Build from the 16-bit source.",
            )


def _identity(checkpoint: Checkpoint, recipe: Recipe) -> dict[str, Any]:
    """What decides an artifact's bytes."""
    return {
        "builder": VERSION,
        "recipe": recipe.name,
        "formats": {role: form.name for role, form in recipe.formats.items()},
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
        other = found.get("recipe")
        what = f"recipe '{other}'" if other != recipe.name else "another source or builder version"
        raise UserError(
            f"{out} holds an artifact of {what}, not of '{recipe.name}' from this source.",
            "Remove it, or give another --out.",
        )
    if (out / _NEW_CONFIG).exists():
        _commit(out)
    for name, written in files.items():
        path = out / name
        if not path.is_file() or path.stat().st_size != written["bytes"]:
            raise UserError(f"{path} is not as its build wrote it.", "Remove the folder to build it again.")
    return str(manifest["digest"])


def _commit(out: Path) -> None:
    """Makes the finished folder `out` a checkpoint; done again after a kill in the middle of it."""
    sync_folder(out.parent)
    for leftover in (_PROGRESS, _LOCK):
        (out / leftover).unlink(missing_ok=True)
    (out / _NEW_CONFIG).replace(out / "config.json")
    sync_folder(out)


@contextmanager
def _claimed(folder: Path, identity: dict[str, Any]) -> Iterator[dict[str, str]]:
    """Makes or continues `folder` and yields the digests of its finished shards, by file name."""
    found = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if not found <= {_LOCK, f"{_PROGRESS}.partial"} and _PROGRESS not in found:
        raise UserError(f"{folder} exists and is no unfinished build.", "Move it away, or give another --out.")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"Another build is writing {folder}.", "Wait for it, or give another --out.") from None
        saved = read_json(folder / _PROGRESS) if (folder / _PROGRESS).exists() else {}
        if saved.get("identity") != identity:
            # Left by a build of something else under the same name: none of it can be used.
            for path in folder.iterdir():
                if path.name not in (_LOCK, _PROGRESS):
                    path.unlink()
            saved = {"identity": identity, "shards": {}}
            write_file(folder / _PROGRESS, _json(saved))
        try:
            yield {name: digest for name, digest in saved["shards"].items() if (folder / name).is_file()}
        except _BadWeightError:
            shutil.rmtree(folder)  # continuing would meet it again
            raise


def _fused_groups(tensors: Sequence[SourceTensor], formats: dict[str, Format]) -> dict[str, list[tuple[str, Linear]]]:
    """The linear layers that share one global scale, by the name of the matrix that vLLM fuses them into."""
    groups: dict[str, list[tuple[str, Linear]]] = {}
    for tensor in tensors:
        if tensor.name in formats:
            for linear in tensor.linears:
                groups.setdefault(linear.fused_into, []).append((tensor.name, linear))
    return groups


def _write_shard(
    checkpoint: Checkpoint,
    path: Path,
    tensors: Sequence[SourceTensor],
    formats: dict[str, Format],
    groups: dict[str, list[tuple[str, Linear]]],
    scales: dict[str, Tensor],
    meter: _Meter,
    pool: ThreadPoolExecutor,
) -> str:
    """Writes the tensors of one source shard and returns the file's digest."""
    new = [new for tensor in tensors for new in _new_tensors(checkpoint, tensor, formats.get(tensor.name))]
    with new_shard(path, new) as writer:
        for tensor in tensors:
            if tensor.name not in formats:
                entry = checkpoint.tensors[tensor.name]
                for piece in checkpoint.pieces(tensor.name):
                    if entry.dtype in _WEIGHT_DTYPES:
                        _finite_amax(entry, torch.frombuffer(piece, dtype=TORCH_DTYPE[entry.dtype]))
                    writer.write(tensor.name, piece)
                    meter.advance(len(piece))
                continue
            for linear in tensor.linears:
                if linear.fused_into not in scales:
                    scales[linear.fused_into] = _global_scale(checkpoint, groups[linear.fused_into], pool)
                encode = partial(_encode, checkpoint, tensor.name, global_scale=scales[linear.fused_into])
                for packed, block_scales in _in_order(pool, encode, _row_pieces(checkpoint, tensor.name, linear)):
                    writer.write(f"{linear.module}.weight_packed", packed)
                    writer.write(f"{linear.module}.weight_scale", block_scales)
                    meter.advance(tensor.num_bytes * packed.numel() * 2 // tensor.num_params)
                writer.write(f"{linear.module}.weight_global_scale", scales[linear.fused_into])
        digests = writer.close()
    return hashlib.sha256(_json(digests)).hexdigest()


def _in_order(pool: ThreadPoolExecutor, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`map` over a pool with a few items under way at a time, so that memory does not grow with their number."""
    pending: deque[Future[R]] = deque()
    for item in items:
        pending.append(pool.submit(work, item))
        if len(pending) > 2 * num_threads():
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def num_threads() -> int:
    """Processors to encode on: those that this process may use, up to where reading becomes the limit and memory,
    which grows with the pieces under way, would not pay."""
    return min(len(os.sched_getaffinity(0)), 8)


@contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """Threads that each run torch on one processor.

    Torch's own threads meet at a barrier after every operation, which on small operations beside the thread that
    writes costs ten times the work itself. One piece a thread needs no barriers.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(num_threads(), thread_name_prefix="encode") as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def _new_tensors(checkpoint: Checkpoint, tensor: SourceTensor, form: Format | None) -> Iterator[NewTensor]:
    if form is None:
        yield NewTensor(tensor.name, checkpoint.tensors[tensor.name].dtype, tensor.shape)
        return
    for linear in tensor.linears:
        for stored in form.stored(linear.out_features, linear.in_features):
            yield NewTensor(f"{linear.module}.{stored.suffix}", stored.dtype, stored.shape)


@dataclass(frozen=True)
class _Rows:
    """Consecutive rows of a source tensor."""

    first: int
    count: int


def _row_pieces(checkpoint: Checkpoint, name: str, linear: Linear) -> Iterator[_Rows]:
    """The rows of `linear` in source tensor `name`, in pieces of about `PIECE_BYTES`."""
    entry = checkpoint.tensors[name]
    row_bytes = entry.num_bytes // entry.num_elements * linear.in_features
    step = max(1, PIECE_BYTES // row_bytes)
    for first in range(0, linear.out_features, step):
        yield _Rows(linear.first_row + first, min(step, linear.out_features - first))


def _global_scale(checkpoint: Checkpoint, members: Sequence[tuple[str, Linear]], pool: ThreadPoolExecutor) -> Tensor:
    """The one global scale `[1]` of a fused group; `UserError` for a weight that is NaN or infinite."""
    largest = torch.zeros(())
    for name, linear in members:
        for amax in _in_order(pool, partial(_amax, checkpoint, name), _row_pieces(checkpoint, name, linear)):
            largest = torch.maximum(largest, amax)
    return nvfp4.global_encode_scale(largest)


def _amax(checkpoint: Checkpoint, name: str, rows: _Rows) -> Tensor:
    return _finite_amax(checkpoint.tensors[name], checkpoint.rows(name, rows.first, rows.count))


def _finite_amax(entry: TensorEntry, values: Tensor) -> Tensor:
    """The largest magnitude `[]` of some of a tensor's values; an error for NaN and infinity among them."""
    low, high = torch.aminmax(values)
    amax = torch.maximum(-low, high).float()
    if not torch.isfinite(amax):
        raise _BadWeightError(
            f"{entry.name} in {entry.shard} holds NaN or infinite weights.",
            "Download the source again; if they are in it, it cannot be quantized.",
        )
    return amax


def _encode(checkpoint: Checkpoint, name: str, rows: _Rows, *, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Packed codes `[n, in/2]` and block scales `[n, in/16]` of n rows of a source tensor."""
    weights = checkpoint.rows(name, rows.first, rows.count)
    step = max(1, _CHUNK_ELEMENTS // weights.shape[1])
    packed = torch.empty((weights.shape[0], weights.shape[1] // 2), dtype=torch.uint8)
    scales = torch.empty((weights.shape[0], weights.shape[1] // nvfp4.BLOCK), dtype=torch.float8_e4m3fn)
    for first in range(0, weights.shape[0], step):
        chunk = weights[first : first + step].float()
        scale = nvfp4.absmax_block_scales(chunk, global_scale)
        packed[first : first + step] = nvfp4.pack(nvfp4.encode(chunk, scale, global_scale))
        scales[first : first + step] = scale
    return packed, scales


def _finish(
    checkpoint: Checkpoint,
    folder: Path,
    recipe: Recipe,
    identity: dict[str, Any],
    shard_digests: dict[str, str],
    tensors: Sequence[SourceTensor],
    formats: dict[str, Format],
) -> str:
    """Writes everything beside the shards, `config.json` under its temporary name; returns the artifact's digest."""
    digests = dict(sorted(shard_digests.items()))

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
    quantization = quantization_config(recipe.targets(), recipe.ignored())
    put("config.json", _json({**checkpoint.config, "quantization_config": quantization}), _NEW_CONFIG)
    digest = hashlib.sha256(_json(digests)).hexdigest()
    sizes = {name: (folder / (_NEW_CONFIG if name == "config.json" else name)).stat().st_size for name in digests}
    manifest = {
        "schema": 1,
        "harness": __version__,
        "identity": identity,
        "digest": digest,
        "files": {name: {"bytes": sizes[name], "sha256": one} for name, one in digests.items()},
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
