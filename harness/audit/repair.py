"""Mends in a quantized checkpoint what can be mended without quantizing again, into a new folder.

* Shards that vLLM fuses get one global scale, the smallest of theirs, which belongs to the largest weight. Block
  scales are multiplied by shared / own <= 1, so none passes E4M3's 448. Each is rounded to E4M3 again, by at most
  1/16 of itself, and the codes are chosen anew from the decoded values. The error of that is computed for every group
  before anything is written; scales that differ by a power of two cost nothing.
* Of unequal scales of activations the smallest covers the largest activation that calibration saw.
* Missing kept tensors and missing tokenizer and processor files are copied from the source, where it is given.

Every other fault stays, and stays a finding.
"""

import fcntl
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.audit.keys import Expectation, Module, expect, is_complete
from harness.audit.scales import are_unequal, global_scales, modules_by_matrix, scale_findings
from harness.audit.verify import Verification, open_original, texts, verify
from harness.errors import UserError
from harness.formats.config import parse
from harness.model.checkpoint import (
    INDEX,
    Checkpoint,
    TensorEntry,
    check_disk,
    index_json,
    new_shard,
    open_checkpoint,
    row_pieces,
    sync_folder,
    write_file,
)
from harness.model.families import parse_config
from harness.progress import Meter, Progress

MAX_RELATIVE_ERROR = 0.05
"""Rounding block scales to E4M3 again costs 0.026 of a weight's norm where their mantissas are spread evenly, and at
most 0.0625. NVFP4 itself costs about 0.1, so this bound lets the sum grow to 0.112; beyond it block scales have left
E4M3's normal numbers, and the source should be quantized anew."""

_LOG = "harness-repair.json"
_LOCK = ".harness-repair-lock"
_ADDED = "model-from-source.safetensors"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".partial")
# The builder's manifest lists digests that the repaired files no longer have.
_NOT_COPIED = ("config.json", INDEX, _LOG, "harness-build.json")


@dataclass(frozen=True)
class SharedScale:
    """One fused matrix whose shards got one global scale. `relative_error` is |new - old| / |old| in the 2-norm
    over the decoded weights of the shard that it costs most; 0 for scales of activations, which change no weight."""

    fused: str
    suffix: str
    before: tuple[float, ...]
    shared: float
    relative_error: float


@dataclass(frozen=True)
class Repair:
    """What was mended, and what `verify` still finds: in `out` if it was `written`, in the given folder if not.

    Nothing is written where there is nothing to mend, or where a group's error is above `max_relative_error`.
    """

    out: Path
    written: bool
    max_relative_error: float
    scales: tuple[SharedScale, ...]
    tensors: tuple[str, ...]
    files: tuple[str, ...]
    verification: Verification

    @property
    def refused(self) -> tuple[SharedScale, ...]:
        """The groups whose error is too large."""
        return tuple(one for one in self.scales if not one.relative_error <= self.max_relative_error)

    @property
    def passed(self) -> bool:
        """Whether every scale was mended and `verify` finds no error."""
        return not self.refused and self.verification.passed


def repair(
    folder: Path,
    out: Path,
    source: Path | None = None,
    *,
    max_relative_error: float = MAX_RELATIVE_ERROR,
    progress: Progress,
) -> Repair:
    """Mends the checkpoint in `folder` into the new folder `out`, with tensors and files of `source` if given.

    `UserError`, with nothing written, for what `verify` refuses, for shards that disagree with their index, for an
    `out` that exists or lies in one of the folders, and for too little disk.
    """
    named, folder, out = out, folder.resolve(), out.resolve()
    for other in (folder, *([source.resolve()] if source else [])):
        if out == other or other in out.parents:
            raise UserError(f"{named} lies in {other}, which is only read.", "Give a new folder beside it.")
    if out.exists():
        raise UserError(f"{named} exists.", "Give the name of a new folder.")
    if not 0 <= max_relative_error < math.inf:
        raise UserError(f"A largest error of {max_relative_error} is none.", "Give a number from 0, such as 0.05.")
    checkpoint = open_checkpoint(folder)
    config = parse_config(checkpoint.config, str(folder / "config.json"))
    quantization = parse(checkpoint.config.get("quantization_config"), str(folder / "config.json"))
    original = None if source is None else open_original(source)
    expectation = expect(config, quantization, checkpoint.tensors, original, with_mtp=config.num_mtp_layers > 0)
    found, globals_, rescaled = _shared_scales(checkpoint, expectation, progress)
    added = _missing_tensors(checkpoint, original, expectation)
    files = [path for path in texts(original.folder) if not (folder / path.name).is_file()] if original else []
    too_far = any(not one.relative_error <= max_relative_error for one in found)
    written = bool(found or added or files) and not too_far
    if written:
        check_disk(out, checkpoint.num_bytes + sum(entry.num_bytes for entry in added))
        log = {"scales": [asdict(one) for one in found], "tensors": [entry.name for entry in added]}
        log |= {"files": [path.name for path in files], "repaired_fingerprint": checkpoint.fingerprint()}
        with _claimed(out) as partial:
            _write(checkpoint, original, partial, globals_, rescaled, added, files, log, progress)
            partial.replace(out)
        (out / _LOCK).unlink()
        sync_folder(out.parent)
    return Repair(
        out=named,
        written=written,
        max_relative_error=max_relative_error,
        scales=tuple(found),
        tensors=tuple(entry.name for entry in added),
        files=tuple(path.name for path in files),
        verification=verify(out if written else folder, source, progress),
    )


@dataclass(frozen=True)
class _Rescaled:
    """A module whose block scales and codes are written against `shared` instead of its own global scale."""

    module: Module
    shared: Tensor


def _shared_scales(
    checkpoint: Checkpoint, expectation: Expectation, progress: Progress
) -> tuple[list[SharedScale], dict[str, Tensor], dict[str, _Rescaled]]:
    """The groups to be mended with their errors, the new global scales by tensor name, the modules by name."""
    found: list[SharedScale] = []
    globals_: dict[str, Tensor] = {}
    rescaled: dict[str, _Rescaled] = {}
    groups = [members for members in modules_by_matrix(expectation.modules).items() if len(members[1]) > 1]
    for done, (fused, members) in enumerate(groups, 1):
        progress(done, len(groups), "repair: choose scales")
        if not _can_be_mended(checkpoint, members):
            continue
        for suffix in members[0].form.healthy_scales:
            values = global_scales(checkpoint, members, suffix)
            if not are_unequal(values):
                continue
            names = [f"{module.name}.{suffix}" for module in members if module.name in values]
            shared = torch.stack([checkpoint.tensor(name) for name in names]).amin(0)
            globals_ |= dict.fromkeys(names, shared)
            error = 0.0
            if suffix == members[0].form.shared_scale_name:
                changed = [_Rescaled(module, shared) for module in members if values[module.name] != float(shared)]
                rescaled |= {one.module.name: one for one in changed}
                error = max(_relative_error(checkpoint, one) for one in changed)
            found.append(SharedScale(fused, suffix, tuple(values.values()), float(shared), error))
    return found, globals_, rescaled


def _can_be_mended(checkpoint: Checkpoint, members: Sequence[Module]) -> bool:
    return (
        len({module.form.name for module in members}) == 1
        and members[0].form.shared_scale_name is not None
        and all(is_complete(checkpoint.tensors, module) for module in members)
        and not any(any(True for _ in scale_findings(checkpoint, module)) for module in members)
    )


def _relative_error(checkpoint: Checkpoint, one: _Rescaled) -> float:
    squared = norm = 0.0
    for first, count in _row_pieces(one.module):
        form = one.module.form
        old = form.decode_rows(checkpoint, one.module.name, first, count, torch.float32)
        written = {**_encoded_rows(checkpoint, one, first, count), str(form.shared_scale_name): one.shared}
        new = form.decode(written, torch.float32)
        norm += float(old.square().sum(dtype=torch.float64))
        squared += float((new - old).square().sum(dtype=torch.float64))
    return math.sqrt(squared / norm) if norm else 0.0


def _row_pieces(module: Module) -> Iterator[tuple[int, int]]:
    """(first, count) of rows whose float32 values fill a piece."""
    return row_pieces(module.linear.out_features, 4 * module.linear.in_features)


def _encoded_rows(checkpoint: Checkpoint, one: _Rescaled, first: int, count: int) -> dict[str, Tensor]:
    """The stored tensors of some rows, by suffix, against the shared scale."""
    form = one.module.form
    return form.rescaled(form.stored_rows(checkpoint, one.module.name, first, count), one.shared)


def _missing_tensors(
    checkpoint: Checkpoint, original: Checkpoint | None, expectation: Expectation
) -> list[TensorEntry]:
    """The source's entries of kept tensors that the checkpoint lacks."""
    if original is None:
        return []
    return [
        original.tensors[name]
        for name, (dtype, shape) in expectation.tensors.items()
        if dtype is None
        and name not in checkpoint.tensors
        and name in original.tensors
        and original.tensors[name].shape == shape
    ]


@contextmanager
def _claimed(out: Path) -> Iterator[Path]:
    """An empty `<out>.partial` under a lock, made anew if a killed repair left one; gone if an exception leaves it."""
    partial = out.with_name(out.name + ".partial")
    if partial.exists() and not (partial / _LOCK).is_file():
        raise UserError(f"{partial} exists and is no unfinished repair.", "Move it away, or give another OUT.")
    partial.mkdir(parents=True, exist_ok=True)
    with (partial / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"Another repair is writing {partial}.", "Wait for it, or give another OUT.") from None
        for path in partial.iterdir():
            if path.name != _LOCK:
                path.unlink()
        try:
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _write(
    checkpoint: Checkpoint,
    original: Checkpoint | None,
    folder: Path,
    globals_: Mapping[str, Tensor],
    rescaled: Mapping[str, _Rescaled],
    added: Sequence[TensorEntry],
    files: Sequence[Path],
    log: Mapping[str, Any],
    progress: Progress,
) -> None:
    """The whole repaired checkpoint, `config.json` last."""
    total = checkpoint.num_bytes + sum(entry.num_bytes for entry in added)
    meter = Meter(progress, total, "repair: write")
    weight_map: dict[str, str] = {}
    plan: list[tuple[Checkpoint, str, list[TensorEntry]]] = [
        (checkpoint, shard, [entry for entry in checkpoint.tensors.values() if entry.shard == shard])
        for shard in checkpoint.shards
    ]
    if original is not None and added:
        name = _ADDED
        while name in checkpoint.shards:
            name = f"more-{name}"
        plan.append((original, name, list(added)))
    for origin, shard, entries in plan:
        weight_map |= {entry.name: shard for entry in entries}
        with new_shard(folder / shard, entries) as writer:
            for entry in entries:
                mended = _mended(checkpoint, entry, globals_, rescaled) if origin is checkpoint else None
                for piece in origin.pieces(entry.name) if mended is None else mended:
                    writer.write(entry.name, piece)
                meter.advance(entry.num_bytes)
            writer.close()
    for path in [*sorted(checkpoint.folder.iterdir()), *files]:
        is_left = path.name.startswith(".") or path.name in _NOT_COPIED or path.name.endswith(_WEIGHTS)
        if path in files or (path.is_file() and not is_left):
            write_file(folder / path.name, path.read_bytes())
    if added or (checkpoint.folder / INDEX).exists():
        write_file(folder / INDEX, index_json(weight_map, total))
    write_file(folder / _LOG, (json.dumps(log, indent=2) + "\n").encode())
    sync_folder(folder)
    write_file(folder / "config.json", (checkpoint.folder / "config.json").read_bytes())


def _mended(
    checkpoint: Checkpoint, entry: TensorEntry, globals_: Mapping[str, Tensor], rescaled: Mapping[str, _Rescaled]
) -> Iterator[Tensor] | None:
    """The new contents of one tensor in pieces; None for one that stays as it is."""
    if entry.name in globals_:
        return iter((globals_[entry.name],))
    module, _, suffix = entry.name.rpartition(".")
    if module not in rescaled or not rescaled[module].module.form.weight_tensors.get(suffix):
        return None
    one = rescaled[module]
    return (_encoded_rows(checkpoint, one, first, count)[suffix] for first, count in _row_pieces(one.module))
