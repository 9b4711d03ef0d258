"""The families that the harness knows, each in a file of its own. Nothing here needs torch."""

from collections.abc import Mapping
from typing import Any

from harness.errors import UserError, did_you_mean
from harness.model.families import qwen3_next, qwen35
from harness.model.family import Block, Family, ModelConfig, Part

FAMILIES = (qwen35.FAMILY, qwen35.TEXT_FAMILY, qwen3_next.FAMILY)


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """The family of a `config.json`; `UserError`, naming `where`, for an unknown architecture."""
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    for family in FAMILIES:
        if name in family.modeling:
            return family
    raise UserError(
        f"{where} is of architecture {name!r}, which this harness does not know.",
        # Architectures have long names with much in common: only a slip of the pen is answered with another.
        did_you_mean(str(name), [known for family in FAMILIES for known in family.modeling], cutoff=0.9),
    )


def parse_config(config: Mapping[str, Any], where: str) -> ModelConfig:
    """Reads a `config.json`; `UserError`, naming `where`, for an architecture that the harness does not build, or for a
    missing number."""
    return family_of(config, where).read_config(config, where)


def role_is(name: str, kind: Part | Block) -> bool:
    """Whether a role belongs to `kind`, a part of the model or a block of a decoder layer; by the name of the role, or
    of the matrix that vLLM fuses it into. Roles of one name have the same properties in all families."""
    roles = (role for family in FAMILIES for role in family.roles if name in (role.name, role.group))
    return any(kind in (role.part, role.block) for role in roles)
