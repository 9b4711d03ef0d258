"""The calibrated part of a build: every decoder layer in turn, each of them finished on the disk before the next.

The files of the layers hold the quantized tensors; the build puts them into the source's shards afterwards. Hidden
states alternate between two files, so a build that is killed continues at the layer it was in, with the same bytes.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from harness.engines.layers import Batch, HiddenStates, TextModel, batches_of, compute_dtype, device_named
from harness.errors import UserError
from harness.formats.format import Format
from harness.model.census import SourceTensor
from harness.model.checkpoint import Checkpoint, NewTensor, new_shard, read_header
from harness.model.family import Linear, ModelConfig
from harness.progress import Meter, Progress
from harness.quantize.calibrate import Streams, quantize_layer
from harness.quantize.encode import finite_amax
from harness.quantize.plan import CalibrationMemory, calibration_memory, quantized
from harness.quantize.recipes import Method, Recipe
from harness.quantize.samples import CalibrationSet


@dataclass(frozen=True)
class CalibrationInput:
    """What goes through the model, and what it may take: tokens in a forward pass, bytes of hidden states in memory,
    the device."""

    samples: CalibrationSet
    batch_tokens: int
    hidden_bytes: int
    device: str = "auto"

    def identity(self) -> dict[str, Any]:
        """What decides an artifact's bytes."""
        return {
            "samples": self.samples.digest,
            "batch_tokens": self.batch_tokens,
            "dtype": str(compute_dtype(device_named(self.device))).removeprefix("torch."),
        }

    def computed_on(self) -> str:
        """The device by its own name."""
        device = device_named(self.device)
        return "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)


def hidden_bytes(calibration: CalibrationInput, recipe: Recipe, width: int) -> int:
    """What the hidden states take on the disk: both boundaries of a layer, of one stream or two."""
    dtype = compute_dtype(device_named(calibration.device))
    padded = sum(batch.ids.numel() for batch in batches_of(calibration.samples.samples, calibration.batch_tokens))
    streams = 2 if recipe.method.two_streams else 1
    return 2 * streams * padded * width * dtype.itemsize


def memory(calibration: CalibrationInput, config: ModelConfig, recipe: Recipe) -> CalibrationMemory:
    """What the calibration will hold at once. On an accelerator all but the hidden states is held there."""
    return calibration_memory(
        config,
        recipe,
        batch_tokens=calibration.batch_tokens,
        hidden_bytes=min(calibration.hidden_bytes, hidden_bytes(calibration, recipe, config.hidden_size)),
        item_bytes=compute_dtype(device_named(calibration.device)).itemsize,
    )


def free_accelerator_memory(calibration: CalibrationInput) -> int | None:
    """The bytes that are free on the accelerator; None where the CPU calibrates."""
    device = device_named(calibration.device)
    return None if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]


def layer_file(index: int) -> str:
    """The file of a layer's quantized tensors in an unfinished build."""
    return f"layer-{index:05}.safetensors"


def text_model(checkpoint: Checkpoint, config: ModelConfig, calibration: CalibrationInput) -> TextModel:
    """The source as calibration runs it. Loads transformers' model classes, which takes seconds."""
    device = device_named(calibration.device)
    return TextModel(checkpoint, config, device, compute_dtype(device), finite_amax)


def quantize_layers(
    model: TextModel,
    tensors: Sequence[SourceTensor],
    recipe: Recipe,
    calibration: CalibrationInput,
    folder: Path,
    finished: list[dict[str, Any]],
    save: Callable[[], None],
    progress: Progress,
) -> None:
    """Writes the files of all layers into `folder`. `finished` holds the reports of the layers that an earlier run
    finished, as JSON; the others are added, and `save` is called after each."""
    family, method = model.family, recipe.method
    linears: dict[int, list[tuple[Linear, Format]]] = {index: [] for index in range(model.num_layers)}
    for tensor, form in quantized(tensors, recipe):
        if (index := family.layer_of(tensor.name)) is not None:
            linears[index] += [(linear, form) for linear in tensor.linears]
    batches = batches_of(calibration.samples.samples, calibration.batch_tokens)
    passes = 2 * calibration.samples.num_tokens
    meter = Meter(progress, model.num_layers * passes, "calibrate")
    meter.advance(len(finished) * passes)
    with torch.inference_mode():
        before = _streams(folder, len(finished), batches, model, method, calibration)
        if not finished:
            for number, batch in enumerate(batches):
                embedded = model.embed(batch.ids)
                before.quantized[number] = embedded
                if before.reference is not None:
                    before.reference[number] = embedded
        for index in range(len(finished), model.num_layers):
            after = _streams(folder, index + 1, batches, model, method, calibration)
            new = [
                NewTensor(f"{linear.module}.{stored.suffix}", stored.dtype, stored.shape)
                for linear, form in linears[index]
                for stored in form.stored(linear.out_features, linear.in_features)
            ]
            started = time.perf_counter()
            with new_shard(folder / layer_file(index), new) as writer:
                try:
                    report = quantize_layer(
                        model, index, linears[index], method, batches, before, after, writer.write, meter.advance
                    )
                except torch.OutOfMemoryError as error:
                    raise UserError(
                        f"The GPU ran out of memory in layer {index} of {model.num_layers}.",
                        "End other programs on it and run the same command, which goes on at this layer; or begin anew "
                        "with fewer batch_tokens, or with --device cpu.",
                    ) from error
                writer.close()
            for stream in after:
                stream.sync()
            report.seconds["total"] = time.perf_counter() - started
            finished.append(asdict(report))
            save()
            for stream in before:
                stream.close()
            before = after
        for stream in before:
            stream.close()


def _streams(
    folder: Path,
    boundary: int,
    batches: Sequence[Batch],
    model: TextModel,
    method: Method,
    calibration: CalibrationInput,
) -> Streams:
    """The hidden states in front of layer `boundary`. A layer reads two boundaries: each has half of the memory."""
    names = ("quantized", "reference") if method.two_streams else ("quantized",)
    memory = calibration.hidden_bytes // (2 * len(names))
    made = [
        HiddenStates(folder / f"hidden-{name}-{boundary % 2}", batches, model.width, model.dtype, model.device, memory)
        for name in names
    ]
    return Streams(made[0], made[1] if method.two_streams else None)


def read_layers(folder: Path, num_layers: int) -> Checkpoint:
    """The quantized tensors of all layers, as they lie in the layers' files."""
    files = tuple(layer_file(index) for index in range(num_layers))
    entries = [entry for file in files for entry in read_header(folder / file)]
    return Checkpoint(folder, {}, files, {entry.name: entry for entry in entries})
