"""A source: where it is, a folder as it stands or a hub id that is fetched into the hub's own cache; and its census,
from which `plan` and `build` start: what its configuration and the headers of its files say.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.model import hub
from harness.model.agreement import check_source
from harness.model.census import SourceTensor, expected_census, source_tensors
from harness.model.checkpoint import INDEX, Checkpoint, open_checkpoint, read_index, read_json, shards_of
from harness.model.families import parse_config
from harness.model.family import ModelConfig

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_CONFIG_FILES = ("config.json", INDEX)
# Safetensors only: pickled weights and code of a repository are never fetched.
_ALL_FILES = ("*.safetensors", "*.json", "*.txt", "*.jinja", "*.model", "LICENSE*", "NOTICE*", "USE_POLICY*")


def fetched_revision(folder: Path) -> str | None:
    """The commit that a folder of the hub's cache holds; None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" else None


def locate(location: str, revision: str | None = None, *, config_only: bool = False) -> Path:
    """The folder of a checkpoint, fetched first if `location` is a hub id; `config_only` fetches no weights.
    `UserError` for what is neither a folder nor a hub id, and as in `hub.fetch`."""
    if (folder := _local(location)) is not None:
        return folder
    return hub.fetch(location, revision, _CONFIG_FILES if config_only else _ALL_FILES)


def bytes_to_fetch(location: str, revision: str | None = None) -> int:
    """How much `locate` would fetch: 0 for a folder; else, and `UserError`, as in `hub.bytes_to_fetch`."""
    return 0 if _local(location) is not None else hub.bytes_to_fetch(location, revision, _ALL_FILES)


def _local(location: str) -> Path | None:
    """The folder that `location` names; None for a hub id."""
    path = Path(os.path.expanduser(location))  # noqa: PTH111 - pathlib raises where the user is unknown
    if path.is_dir():
        return path
    if path.exists() or not _HUB_ID.fullmatch(location):
        raise UserError(
            f"'{location}' is neither a folder nor a model id of the hub.",
            "Give the folder of a checkpoint, or an id such as Qwen/Qwen3.5-9B.",
        )
    return None


@dataclass(frozen=True)
class SourceCensus:
    """The numbers of a 16-bit checkpoint's configuration, its tensors in the order of its files, and what its user
    should know of it: sentences without a full stop."""

    config: ModelConfig
    tensors: tuple[SourceTensor, ...]
    notes: tuple[str, ...] = ()


def census_of(checkpoint: Checkpoint) -> SourceCensus:
    """The census of an opened checkpoint; `UserError` for one of an unknown architecture, for one that is quantized
    already, and as in `check_source`."""
    config = parse_config(checkpoint.config, str(checkpoint.folder / "config.json"))
    _refuse_quantized(checkpoint.folder, checkpoint.config)
    entries = checkpoint.tensors.values()
    notes = check_source(config, checkpoint.tensors, str(checkpoint.folder))
    tensors = source_tensors(config.family, ((entry.name, entry.shape, entry.num_bytes) for entry in entries))
    if strays := sorted({path.name for path in checkpoint.folder.glob("*.safetensors")} - set(checkpoint.shards)):
        notes += (f"{', '.join(strays)} lies beside the weights, no index names it, and nothing of it is built",)
    return SourceCensus(config, tensors, notes)


def census_at(path: Path) -> SourceCensus:
    """The census of a `config.json`, or of a folder with one; `UserError` as in `census_of`. Where not all shards lie
    beside it, the configuration says what there is, with an MTP head if an index in the folder names its tensors."""
    folder = None if path.is_file() else path
    config_file = path if folder is None else folder / "config.json"
    raw = read_json(config_file)
    config = parse_config(raw, str(config_file))
    _refuse_quantized(path, raw)
    index = None if folder is None else read_index(folder)
    if (
        folder is not None
        and (shards := shards_of(folder, index))
        and all((folder / shard).exists() for shard in shards)
    ):
        return census_of(open_checkpoint(folder))
    return SourceCensus(config, expected_census(config, with_mtp=config.family.has_part(index or (), "mtp")))


def _refuse_quantized(path: Path, config: Mapping[str, Any]) -> None:
    if "quantization_config" in config:
        raise UserError(f"{path} is quantized already.", "Start from its 16-bit source.")
