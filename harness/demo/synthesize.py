"""Random weights in a configuration's true shapes: a checkpoint for speed and size work without a download.

The checkpoint has every tensor that the configuration calls for (text layers, vision tower, MTP head, embeddings), with
magnitudes like a trained model's, and the tokenizer and processors of the embedded models, so that an engine starts on
it. Its predictions mean nothing.
"""

import copy
import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from harness.demo import checkpoint_path
from harness.errors import UserError
from harness.model.checkpoint import (
    INDEX,
    NewTensor,
    check_disk,
    index_json,
    new_shard,
    read_json,
    row_pieces,
    sync_folder,
    write_file,
)
from harness.model.families import parse_config
from harness.model.family import expected_tensors
from harness.progress import Meter, Progress

_SHARD_BYTES = 4 * 10**9
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_PROCESSORS = ("preprocessor_config.json", "video_preprocessor_config.json")
_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "eos_token_id")


def synthesize(
    config: Mapping[str, Any],
    out: Path,
    *,
    num_layers: int | None,
    vocab_size: int | None,
    seed: int,
    progress: Progress,
) -> int:
    """Writes the checkpoint into the new folder `out` and returns its size in bytes.

    `num_layers` and `vocab_size` cut the model down; None keeps the configuration's number. Ids of special tokens
    that a cut vocabulary does not reach become the tokenizer's. Weights are BF16 and normal with a standard deviation
    of 1/sqrt(row length); norms and other one-dimensional tensors are small around zero. The same arguments give the
    same bytes. `UserError` if `out` exists or the disk is too full.
    """
    config = own = copy.deepcopy(dict(config))
    text = own.get("text_config", own)  # a text-only model's numbers stand at the top
    if isinstance(text, dict):
        if num_layers is not None:
            text["num_hidden_layers"] = num_layers
            text.pop("layer_types", None)
        if vocab_size is not None:
            text["vocab_size"] = vocab_size
            _take_token_ids(own, text, vocab_size)
    parsed = parse_config(config, "The configuration")
    if out.exists():
        raise UserError(f"{out} exists.", "Give the name of a new folder.")
    tensors = [NewTensor(name, "BF16", shape) for name, shape in expected_tensors(parsed, with_mtp=True)]
    total = sum(tensor.num_bytes for tensor in tensors)
    shards = _split(tensors)
    check_disk(out, total)
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    # Nothing here is worth continuing: an interrupted run leaves nothing.
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.absolute().parent) as folder:
        partial = Path(folder) / "checkpoint"
        partial.mkdir()
        _write(config, shards, partial, seed, progress)
        partial.replace(out)
    sync_folder(out.absolute().parent)
    return total


def _write(
    config: Mapping[str, Any], shards: list[list[NewTensor]], folder: Path, seed: int, progress: Progress
) -> None:
    total = sum(tensor.num_bytes for shard in shards for tensor in shard)
    generator = torch.Generator().manual_seed(seed)
    weight_map, meter = {}, Meter(progress, total, "synthesize")
    for number, members in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        with new_shard(folder / name, members) as writer:
            for tensor in members:
                weight_map[tensor.name] = name
                width = tensor.shape[-1]
                for _, num_rows in row_pieces(math.prod(tensor.shape) // width, 4 * width):
                    piece = torch.randn(num_rows, width, generator=generator)
                    writer.write(tensor.name, (piece / math.sqrt(width)).bfloat16())
                meter.advance(tensor.num_bytes)
            writer.close()
    write_file(folder / INDEX, index_json(weight_map, total))
    embedded = checkpoint_path("dense")
    for file in (*_TOKENIZER, *(_PROCESSORS if "vision_config" in config else ())):
        write_file(folder / file, (embedded / file).read_bytes())
    write_file(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())


def _take_token_ids(config: dict[str, Any], text: dict[str, Any], vocab_size: int) -> None:
    """Gives special tokens whose ids are not below `vocab_size` their ids in the embedded models."""
    embedded = read_json(checkpoint_path("dense") / "config.json")
    for numbers, known in ((config, embedded), (text, embedded["text_config"])):
        beyond = [name for name in _TOKENS if isinstance(numbers.get(name), int) and numbers[name] >= vocab_size]
        numbers.update({name: known[name] for name in beyond if name in known})


def _split(tensors: list[NewTensor]) -> list[list[NewTensor]]:
    shards: list[list[NewTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.num_bytes > _SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.num_bytes
    return shards
