"""The census of a source, from which `plan` and `build` start: what its configuration and the headers of its files say.
No weight is read."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.model.census import SourceTensor, expected_census, source_tensors
from harness.model.checkpoint import SINGLE, Checkpoint, open_checkpoint, read_index, read_json
from harness.model.families import parse_config
from harness.model.family import ModelConfig


@dataclass(frozen=True)
class SourceCensus:
    """The numbers of a 16-bit checkpoint's configuration, and its tensors in the order of its files."""

    config: ModelConfig
    tensors: tuple[SourceTensor, ...]

    @property
    def unknown(self) -> tuple[str, ...]:
        """The names of the tensors that the model's family does not have."""
        return tuple(tensor.name for tensor in self.tensors if tensor.role is None)


def census_of(checkpoint: Checkpoint) -> SourceCensus:
    """The census of an opened checkpoint; `UserError` for one of an unknown architecture, or quantized already."""
    config = parse_config(checkpoint.config, str(checkpoint.folder / "config.json"))
    _refuse_quantized(checkpoint.folder, checkpoint.config)
    entries = checkpoint.tensors.values()
    tensors = source_tensors(config.family, ((entry.name, entry.shape, entry.num_bytes) for entry in entries))
    return SourceCensus(config, tensors)


def census_at(path: Path) -> SourceCensus:
    """The census of a `config.json`, or of a folder with one; `UserError` as in `census_of`. Where not all shards lie
    beside it, the configuration says what there is, with an MTP head if an index in the folder names its tensors."""
    folder = None if path.is_file() else path
    config_file = path if folder is None else folder / "config.json"
    raw = read_json(config_file)
    config = parse_config(raw, str(config_file))
    _refuse_quantized(path, raw)
    index = {} if folder is None else read_index(folder) or {}
    if folder is not None and all((folder / shard).exists() for shard in set(index.values()) or {SINGLE}):
        return census_of(open_checkpoint(folder))
    return SourceCensus(config, expected_census(config, with_mtp=config.family.has_part(index, "mtp")))


def _refuse_quantized(path: Path, config: Mapping[str, Any]) -> None:
    if "quantization_config" in config:
        raise UserError(f"{path} is quantized already.", "Start from its 16-bit source.")
