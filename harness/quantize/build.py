"""Builds an artifact: a source checkpoint in, a compressed-tensors checkpoint out, as a stream of pieces.

The layers that vLLM fuses into one matrix share one global scale, even where they lie in different shards. Everything
not quantized is copied byte for byte; `config.json` gains `quantization_config` and nothing else. A build that is
killed leaves `<out>.partial`, which is no checkpoint; the same command continues it at the shard it was in.
"""

import fcntl
import hashlib
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from harness import __version__
from harness.errors import BadWeightError, UserError
from harness.formats.config import quantization_config
from harness.formats.format import UNQUANTIZED_DTYPES, Format
from harness.formats.names import KEPT
from harness.model.census import SourceTensor, output_bytes
from harness.model.checkpoint import (
    INDEX,
    SINGLE,
    Checkpoint,
    ShardWriter,
    check_disk,
    index_json,
    new_shard,
    open_checkpoint,
    read_json,
    sync_folder,
    torch_dtype,
    write_file,
)
from harness.model.family import Family
from harness.model.sources import census_of
from harness.progress import Meter, Progress
from harness.quantize import layerwise
from harness.quantize.artifact import (
    CALIBRATION,
    LOCK,
    MANIFEST,
    NEW_CONFIG,
    PROGRESS,
    Artifact,
    commit_folder,
    copied_files,
    difference_of_builds,
    digest_of_existing,
    identity_of,
    new_tensors,
    pretty_json,
)
from harness.quantize.encode import Encoder, finite_amax, layers_that_share, workers
from harness.quantize.layerwise import CalibrationInput
from harness.quantize.plan import check_memory, plan, quantized
from harness.quantize.recipes import Recipe


@dataclass
class _Unfinished:
    """A build under way, as `progress.json` keeps it: reports of finished layers, digests of finished shards."""

    folder: Path
    identity: dict[str, Any]
    layers: list[dict[str, Any]] = field(default_factory=list)
    shards: dict[str, str] = field(default_factory=dict)

    def save(self) -> None:
        write_file(
            self.folder / PROGRESS,
            pretty_json({"identity": self.identity, "layers": self.layers, "shards": self.shards}),
        )


def build(
    source: Path, recipe: Recipe, out: Path, progress: Progress, calibration: CalibrationInput | None = None
) -> Artifact:
    """Builds `recipe` of the checkpoint in `source` into folder `out`, or finds it there.

    `UserError`, with nothing written, for a source that cannot be quantized, a recipe that needs a calibration and has
    none, an `out` that holds anything else, and too little disk or memory. A weight that is NaN or infinite stops the
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
    read = census_of(checkpoint)
    config, family, tensors = read.config, read.config.family, read.tensors
    what = plan(config, tensors, recipe)
    formats = {tensor.name: form for tensor, form in quantized(tensors, recipe)}
    if not formats:
        raise UserError(f"{source} has no tensor that the recipe quantizes.", "Choose a recipe for this kind of model.")
    identity = identity_of(checkpoint, family, recipe, None if calibration is None else calibration.identity())
    if (found := digest_of_existing(out, identity, recipe)) is not None:
        return Artifact(named, found, reused=True, counts=what.counts, notes=read.notes)
    memory = None if calibration is None else layerwise.memory(calibration, config, recipe)
    if memory is not None and calibration is not None:
        check_memory(memory, psutil.virtual_memory().available, layerwise.free_accelerator_memory(calibration))
    unfinished = out.with_name(out.name + ".partial")
    needed = what.output_bytes
    if calibration is not None:  # the layers' tensors and the hidden states lie beside the output
        needed += sum(count.output_bytes for count in what.counts if count.format != KEPT)
        needed += layerwise.hidden_bytes(calibration, recipe, config.hidden_size)
    # What an interrupted build has finished is on the disk already.
    check_disk(out, needed - sum(path.stat().st_size for path in unfinished.glob("*") if path.is_file()))
    with _claimed(unfinished, identity) as state:
        seconds: dict[str, float] = {}
        if calibration is not None:
            model = layerwise.text_model(checkpoint, config, calibration)
            started = time.perf_counter()
            layerwise.quantize_layers(
                model, tensors, recipe, calibration, unfinished, state.layers, state.save, progress
            )
            seconds["calibrate"] = time.perf_counter() - started
        started = time.perf_counter()
        _write_shards(checkpoint, tensors, formats, recipe, state, Meter(progress, what.source_bytes, "build"))
        digest = _finish(checkpoint, family, recipe, state, tensors, formats, calibration)
        seconds["write"] = time.perf_counter() - started
    unfinished.replace(out)
    commit_folder(out)
    return Artifact(
        named,
        digest,
        reused=False,
        counts=what.counts,
        notes=read.notes,
        stage_seconds=tuple(seconds.items()),
        layers=tuple(state.layers),
        num_calibration_tokens=0 if calibration is None else calibration.samples.num_tokens,
        planned_memory_bytes=None if memory is None else memory.total,
        peak_vram_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    )


@contextmanager
def _claimed(folder: Path, identity: dict[str, Any]) -> Iterator[_Unfinished]:
    """Makes or continues `folder`, and yields what is finished in it."""
    found = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if not found <= {LOCK, f"{PROGRESS}.partial"} and PROGRESS not in found:
        raise UserError(f"{folder} exists and is no unfinished build.", "Move it away, or give another --out.")
    if PROGRESS in found and (saved := read_json(folder / PROGRESS)).get("identity") != identity:
        raise UserError(
            f"{folder} holds an unfinished build of {difference_of_builds(saved.get('identity') or {}, identity)}.",
            "Remove it, or give another --out.",
        )
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"Another build is writing {folder}.", "Wait for it, or give another --out.") from None
        state = _Unfinished(folder, identity)
        if (folder / PROGRESS).exists():
            saved = read_json(folder / PROGRESS)
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
    meter: Meter,
) -> None:
    """Writes every shard that is not written yet: kept tensors from the source, quantized ones from the layers' files
    where calibration made them and else encoded on the way."""
    made = layerwise.read_layers(state.folder, len(state.layers)) if state.layers else None
    with workers() as pool:
        encoder = Encoder(checkpoint, formats, layers_that_share(tensors, formats), recipe.method.scales, pool)
        for shard in checkpoint.shards:
            members = [tensor for tensor in tensors if checkpoint.tensors[tensor.name].shard == shard]
            if shard in state.shards:
                meter.advance(sum(tensor.num_bytes for tensor in members))
                continue
            new = [new for tensor in members for new in new_tensors(checkpoint, tensor, formats.get(tensor.name))]
            with new_shard(state.folder / shard, new) as writer:
                for tensor in members:
                    if tensor.name not in formats:
                        _copy(checkpoint, tensor.name, writer, meter)
                    elif made is not None and (names := _made(made, tensor, formats[tensor.name])):
                        for name in names:
                            for piece in made.pieces(name):
                                writer.write(name, piece)
                        meter.advance(tensor.num_bytes)
                    else:
                        _encode(encoder, tensor, writer, meter)
                digests = writer.close()
            state.shards[shard] = hashlib.sha256(pretty_json(digests)).hexdigest()
            state.save()


def _copy(checkpoint: Checkpoint, name: str, writer: ShardWriter, meter: Meter) -> None:
    entry = checkpoint.tensors[name]
    for piece in checkpoint.pieces(name):
        if entry.dtype in UNQUANTIZED_DTYPES:
            finite_amax(entry, torch.frombuffer(piece, dtype=torch_dtype(entry.dtype)))
        writer.write(name, piece)
        meter.advance(len(piece))


def _made(made: Checkpoint, tensor: SourceTensor, form: Format) -> list[str]:
    """The tensors of the artifact that `tensor` becomes; none where calibration did not write its linear layers."""
    names = [new.name for new in new_tensors(made, tensor, form)]
    return names if names and names[0] in made.tensors else []


def _encode(encoder: Encoder, tensor: SourceTensor, writer: ShardWriter, meter: Meter) -> None:
    form = encoder.formats[tensor.name]
    for linear in tensor.linears:
        for num_rows, stored in encoder.pieces(tensor.name, linear):
            for suffix, rows in stored.items():
                writer.write(f"{linear.module}.{suffix}", rows)
            meter.advance(tensor.num_bytes * num_rows * linear.in_features // tensor.num_params)
        if form.shared_scale_name is not None:
            writer.write(f"{linear.module}.{form.shared_scale_name}", encoder.shared_scale(tensor.name, linear))


def _finish(
    checkpoint: Checkpoint,
    family: Family,
    recipe: Recipe,
    state: _Unfinished,
    tensors: Sequence[SourceTensor],
    formats: Mapping[str, Format],
    calibration: CalibrationInput | None,
) -> str:
    """Writes everything beside the shards, `config.json` under its temporary name; returns the artifact's digest."""
    folder = state.folder
    digests = dict(sorted(state.shards.items()))

    def put(name: str, data: bytes, written_as: str | None = None) -> None:
        write_file(folder / (written_as or name), data)
        digests[name] = hashlib.sha256(data).hexdigest()

    for path in copied_files(checkpoint.folder):
        put(path.name, path.read_bytes())
    if checkpoint.shards != (SINGLE,) or (checkpoint.folder / INDEX).exists():
        weight_map = {
            new.name: checkpoint.tensors[tensor.name].shard
            for tensor in tensors
            for new in new_tensors(checkpoint, tensor, formats.get(tensor.name))
        }
        put(INDEX, index_json(weight_map, sum(output_bytes(tensor, formats.get(tensor.name)) for tensor in tensors)))
    if calibration is not None:
        layers = [{key: value for key, value in layer.items() if key != "seconds"} for layer in state.layers]
        put(CALIBRATION, pretty_json({"calibration": calibration.samples.manifest, "layers": layers}))
    quantization = quantization_config(recipe.targets(family), recipe.ignored(family))
    put("config.json", pretty_json({**checkpoint.config, "quantization_config": quantization}), NEW_CONFIG)
    digest = hashlib.sha256(pretty_json(digests)).hexdigest()
    sizes = {name: (folder / (NEW_CONFIG if name == "config.json" else name)).stat().st_size for name in digests}
    manifest = {
        "schema": 1,
        "harness": __version__,
        "identity": state.identity,
        "digest": digest,
        "files": {name: {"bytes": sizes[name], "digest": one} for name, one in digests.items()},
    }
    write_file(folder / MANIFEST, pretty_json(manifest))
    sync_folder(folder)
    return digest
