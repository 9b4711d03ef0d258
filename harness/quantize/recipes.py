"""The variants: which blocks are stored in which format, and how their scales and codes are chosen.

A recipe names blocks of a decoder layer (`model/family.py`), so one recipe serves dense and MoE models of every family.
The family says what of a block can be quantized.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from harness.errors import UserError, did_you_mean
from harness.formats.format import ABSMAX, SCALE_METHODS, WEIGHTED_SEARCH, Format
from harness.formats.fp8 import FP8_DYNAMIC
from harness.formats.nvfp4 import NVFP4, NVFP4A16
from harness.model.family import Block, Family, Role

_MLP: tuple[Block, ...] = ("mlp", "experts")
"""Behind the mixer: the MLP of a dense layer, the routed experts of another."""
_MAIN: tuple[Block, ...] = ("attention", *_MLP, "shared-expert")

ROUND_TO_NEAREST, GPTQ = "rtn", "gptq"
CODES = (ROUND_TO_NEAREST, GPTQ)


@dataclass(frozen=True)
class Method:
    """How scales (`SCALE_METHODS`) and codes (`CODES`; see gptq.py) are chosen. `damping` is added to the
    diagonal of GPTQ's matrix, as a share of its mean; `sweeps` are the visits to every column after GPTQ's own."""

    scales: str
    codes: str
    damping: float = 0.01
    sweeps: int = 0

    @property
    def two_streams(self) -> bool:
        """Whether the unquantized model's hidden states are needed beside the quantized one's."""
        return self.codes == GPTQ

    @property
    def needs_moments(self) -> bool:
        """Whether the second moments of inputs are needed."""
        return self.two_streams or self.scales == WEIGHTED_SEARCH


RTN = Method(ABSMAX, ROUND_TO_NEAREST)
CALIBRATED = Method(WEIGHTED_SEARCH, GPTQ, damping=0.2, sweeps=2)


@dataclass(frozen=True)
class Recipe:
    """Which blocks get which format; every tensor outside of them is kept byte for byte."""

    name: str
    stored: tuple[tuple[Format, tuple[Block, ...]], ...]
    method: Method = RTN

    def format_of(self, role: Role | None) -> Format | None:
        """The format that tensors of a role are stored in; None where they are kept."""
        if role is None or not role.quantizable:
            return None
        return next((form for form, blocks in self.stored if role.block in blocks), None)

    def formats(self, family: Family) -> dict[str, Format]:
        """Format by role name, of the roles of a family that are not kept."""
        return {role.name: form for form, blocks in self.stored for role in _roles(family, blocks)}

    @property
    def needs_calibration(self) -> bool:
        """Whether data has to go through the model: for scales of activations, or for what the method looks at."""
        return self.method.needs_moments or any(form.needs_calibration for form, _ in self.stored)

    def with_method(self, scales: str | None = None, codes: str | None = None) -> "Recipe":
        """This recipe with another choice of block scales or codes; `UserError` for an unknown method."""
        for what, value, known in (("scales", scales, SCALE_METHODS), ("codes", codes, CODES)):
            if value is not None and value not in known:
                raise UserError(f"There is no method '{value}' for {what}.", did_you_mean(value, known))
        method = replace(self.method, scales=scales or self.method.scales, codes=codes or self.method.codes)
        return replace(self, method=method)

    def targets(self, family: Family) -> dict[Format, list[str]]:
        """The patterns of a `quantization_config` that name this recipe's modules, by format."""
        return {form: _patterns(_roles(family, blocks)) for form, blocks in self.stored}

    def ignored(self, family: Family) -> list[str]:
        """The patterns of the linear layers that stay as they are."""
        return _patterns(role for role in family.roles if self.format_of(role) is None)


def _roles(family: Family, blocks: Iterable[Block]) -> list[Role]:
    """The roles that can be quantized, block by block."""
    return [role for block in blocks for role in family.roles if role.block == block and role.quantizable]


def _patterns(roles: Iterable[Role]) -> list[str]:
    return list(dict.fromkeys(role.target for role in roles if role.target is not None))


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("rtn-a16", ((NVFP4A16, _MAIN),)),
        Recipe("a16", ((NVFP4A16, _MAIN),), CALIBRATED),
        Recipe("w4a4", ((NVFP4, _MAIN),), CALIBRATED),
        Recipe("w4a4-experts", ((NVFP4, ("attention", *_MLP)),), CALIBRATED),
        Recipe("w4a4-deltanet", ((NVFP4, ("attention", "deltanet", *_MLP, "shared-expert")),), CALIBRATED),
        Recipe("mixed-fp8", ((NVFP4, _MLP), (FP8_DYNAMIC, ("attention", "shared-expert"))), CALIBRATED),
    )
}


def recipe_named(name: str) -> Recipe:
    """The recipe `name`; `UserError` with the nearest name for an unknown one."""
    if name not in RECIPES:
        raise UserError(f"There is no recipe '{name}'.", did_you_mean(name, RECIPES))
    return RECIPES[name]
