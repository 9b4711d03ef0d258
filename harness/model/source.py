"""A source as `plan` and `build` read it: what its configuration says, and what its headers say there is.

No weight is read. The one reading decides what a checkpoint is: which family's, with which tensors in which roles, and
which tensors have none.
"""

from dataclasses import dataclass
from pathlib import Path

from harness.errors import UserError
from harness.model.census import SourceTensor, expected_census, source_tensors
from harness.model.checkpoint import SINGLE, Checkpoint, open_checkpoint, read_index, read_json
from harness.model.families import parse_config
from harness.model.family import ModelConfig


@dataclass(frozen=True)
class Source:
    """A 16-bit checkpoint: the numbers of its configuration, and its tensors in the order of its files."""

    config: ModelConfig
    tensors: tuple[SourceTensor, ...]

    @property
    def unknown(self) -> tuple[str, ...]:
        """The names of the tensors that the model's family does not have."""
        return tuple(tensor.name for tensor in self.tensors if tensor.role is None)


def source_of(checkpoint: Checkpoint) -> Source:
    """The source in an opened checkpoint; `UserError` for one of an unknown architecture, or quantized already."""
    config = parse_config(checkpoint.config, str(checkpoint.folder / "config.json"))
    if "quantization_config" in checkpoint.config:
        raise UserError(f"{checkpoint.folder} is quantized already.", "Start from its 16-bit source.")
    return Source(config, census_of(checkpoint, config))


def census_of(checkpoint: Checkpoint, config: ModelConfig) -> tuple[SourceTensor, ...]:
    """Every tensor of a checkpoint with its role."""
    entries = checkpoint.tensors.values()
    return source_tensors(config.family, ((entry.name, entry.shape, entry.num_bytes) for entry in entries))


def source_at(path: Path) -> Source:
    """The source that a `config.json`, or a folder with one, describes; `UserError` as in `source_of`.

    Where all shards lie beside the configuration their headers say what there is. Else the configuration does, with an
    MTP head if an index in the folder names its tensors.
    """
    folder = None if path.is_file() else path
    config_file = path if folder is None else folder / "config.json"
    raw = read_json(config_file)
    config = parse_config(raw, str(config_file))
    if "quantization_config" in raw:
        raise UserError(f"{path} is quantized already.", "Start from its 16-bit source.")
    index = {} if folder is None else read_index(folder) or {}
    if folder is not None and all((folder / shard).exists() for shard in set(index.values()) or {SINGLE}):
        return source_of(open_checkpoint(folder))
    return Source(config, expected_census(config, with_mtp=config.family.has_part(index, "mtp")))
