"""The variants: which roles are stored in which format, and how their scales and codes are chosen.

A recipe is a frozen constant. Roles that a model lacks are simply absent from its plan, so one recipe serves
dense and MoE models. `in_proj_a` and `in_proj_b` of DeltaNet are in none: their 32 or 48 outputs are below the
multiple of 64 that the FP4 kernels want.
"""

from dataclasses import dataclass, replace

from harness.errors import UserError, did_you_mean
from harness.formats.config import FP8_DYNAMIC, NVFP4, NVFP4A16, Format
from harness.model.qwen35 import ROLE, ROLES

_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_DELTANET = ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z", "linear_attn.out_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
_SHARED_EXPERT = ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj")


ABSMAX, SEARCH, WEIGHTED_SEARCH = "absmax", "search", "weighted-search"
SCALES = (ABSMAX, SEARCH, WEIGHTED_SEARCH)
ROUND_TO_NEAREST, GPTQ = "rtn", "gptq"
CODES = (ROUND_TO_NEAREST, GPTQ)


@dataclass(frozen=True)
class Method:
    """How block scales (`SCALES`, see search.py) and codes (`CODES`, see gptq.py) are chosen. `damping` is added to
    the diagonal of GPTQ's matrix, as a share of its mean; `sweeps` are the visits to every column after GPTQ's own."""

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
        return self.two_streams or self.scales == WEIGHTED_SEARCH


RTN = Method(ABSMAX, ROUND_TO_NEAREST)


@dataclass(frozen=True)
class Recipe:
    """Which roles get which format; every role not named is kept byte for byte."""

    name: str
    summary: str
    stored: tuple[tuple[Format, tuple[str, ...]], ...]
    method: Method = RTN

    @property
    def formats(self) -> dict[str, Format]:
        """Format by role name."""
        return {role: form for form, roles in self.stored for role in roles}

    @property
    def needs_calibration(self) -> bool:
        """Whether data has to go through the model: for scales of activations, or for what the method looks at."""
        return self.method.needs_moments or any(form.needs_calibration for form, _ in self.stored)

    def with_method(self, scales: str | None = None, codes: str | None = None) -> "Recipe":
        """This recipe with another choice of block scales or codes; `UserError` for one that does not exist."""
        for what, value, known in (("scales", scales, SCALES), ("codes", codes, CODES)):
            if value is not None and value not in known:
                raise UserError(f"There is no method '{value}' for {what}.", did_you_mean(value, known))
        method = replace(self.method, scales=scales or self.method.scales, codes=codes or self.method.codes)
        return replace(self, method=method)

    def targets(self) -> dict[Format, list[str]]:
        """The patterns of a `quantization_config` that name this recipe's modules, by format."""
        return {form: _patterns(roles) for form, roles in self.stored}

    def ignored(self) -> list[str]:
        """The patterns of the linear layers that stay as they are."""
        return _patterns(tuple(role.name for role in ROLES if role.name not in self.formats))


def _patterns(roles: tuple[str, ...]) -> list[str]:
    return list(dict.fromkeys(target for role in roles if (target := ROLE[role].target) is not None))


CALIBRATED = Method(WEIGHTED_SEARCH, GPTQ, damping=0.2, sweeps=2)

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "rtn-a16",
            "NVFP4 weights by round-to-nearest, 16-bit activations; attention and MLP; no data",
            ((NVFP4A16, _ATTENTION + _MLP + _EXPERTS + _SHARED_EXPERT),),
        ),
        Recipe(
            "a16",
            "NVFP4 weights, calibrated, 16-bit activations; attention and MLP",
            ((NVFP4A16, _ATTENTION + _MLP + _EXPERTS + _SHARED_EXPERT),),
            CALIBRATED,
        ),
        Recipe(
            "w4a4",
            "NVFP4 weights and activations; attention and MLP",
            ((NVFP4, _ATTENTION + _MLP + _EXPERTS + _SHARED_EXPERT),),
            CALIBRATED,
        ),
        Recipe(
            "w4a4-experts",
            "NVFP4 weights and activations; attention and routed experts (MLP in dense models); shared expert kept",
            ((NVFP4, _ATTENTION + _MLP + _EXPERTS),),
            CALIBRATED,
        ),
        Recipe(
            "w4a4-deltanet",
            "NVFP4 weights and activations; attention, MLP and DeltaNet's large projections",
            ((NVFP4, _ATTENTION + _DELTANET + _MLP + _EXPERTS + _SHARED_EXPERT),),
            CALIBRATED,
        ),
        Recipe(
            "mixed-fp8",
            "NVFP4 weights and activations in MLP or experts; FP8 in attention and the shared expert",
            ((NVFP4, _MLP + _EXPERTS), (FP8_DYNAMIC, _ATTENTION + _SHARED_EXPERT)),
            CALIBRATED,
        ),
    )
}


def recipe_named(name: str) -> Recipe:
    """The recipe `name`; `UserError` with the nearest name for an unknown one."""
    if name not in RECIPES:
        raise UserError(f"There is no recipe '{name}'.", did_you_mean(name, RECIPES))
    return RECIPES[name]
