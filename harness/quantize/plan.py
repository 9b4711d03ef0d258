"""A recipe over a census: what a build would make of a model, and what it needs for that, before anything is read."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from harness.errors import UserError
from harness.formats.format import Format
from harness.model.census import RoleCount, SourceTensor, TokenTraffic, count_roles, expected_census, token_traffic
from harness.model.family import ModelConfig
from harness.quantize.recipes import Recipe

EXPERTS_TOGETHER = 1 << 27
"""Weights of experts that are widened together."""
ROUNDED_TOGETHER = 1 << 25
"""Weights that GPTQ rounds together: rows do not depend on each other."""
ROUNDED_COPIES, FACTOR_COPIES = 9, 3
"""Arrays that GPTQ holds: of the size of the weights that are rounded together, while they are, and of the size of the
moments, while their Cholesky factor is made."""


@dataclass(frozen=True)
class Plan:
    """What becomes of every role. `num_quantized` counts source tensors, as model cards do."""

    counts: tuple[RoleCount, ...]
    num_tensors: int
    num_quantized: int
    source_bytes: int
    output_bytes: int
    source_traffic: TokenTraffic
    output_traffic: TokenTraffic


def plan(config: ModelConfig, tensors: Sequence[SourceTensor], recipe: Recipe | None) -> Plan:
    """The plan of `recipe` for a model; with no recipe every tensor is kept. `UserError` as in `check_widths`."""
    formats = {} if recipe is None else recipe.formats(config.family)
    for tensor in tensors:
        check_widths(tensor, None if recipe is None else recipe.format_of(tensor.role))
    counts = count_roles(tensors, formats)
    return Plan(
        counts=counts,
        num_tensors=len(tensors),
        num_quantized=sum(count.num_tensors for count in counts if count.role in formats),
        source_bytes=sum(count.source_bytes for count in counts),
        output_bytes=sum(count.output_bytes for count in counts),
        source_traffic=token_traffic(config, count_roles(tensors, {})),
        output_traffic=token_traffic(config, counts),
    )


def quantized(tensors: Sequence[SourceTensor], recipe: Recipe) -> Iterator[tuple[SourceTensor, Format]]:
    """The tensors that `recipe` quantizes, with their formats."""
    for tensor in tensors:
        if (form := recipe.format_of(tensor.role)) is not None:
            yield tensor, form


def check_widths(tensor: SourceTensor, form: Format | None) -> None:
    """`UserError` for a weight whose rows do not divide into the format's blocks."""
    if form is None or form.block == 1:
        return
    if not tensor.linears and 0 not in tensor.shape:
        raise UserError(
            f"{tensor.name} has shape {list(tensor.shape)}, which is no linear layer's.",
            "Compare the checkpoint with its config.json.",
        )
    if 0 in tensor.shape:
        raise UserError(f"{tensor.name} is empty: its shape is {list(tensor.shape)}.", "Download the source again.")
    width = tensor.linears[0].in_features
    if width % form.block:
        raise UserError(
            f"{tensor.name} has rows of {width} weights, which is not a multiple of {form.block}, "
            f"the block that shares a scale in {form.name}.",
            f"Choose a recipe that keeps {tensor.role.name if tensor.role else 'it'}.",
        )


@dataclass(frozen=True)
class CalibrationMemory:
    """What a calibrated build holds at once, in bytes: one decoder layer (two where the unquantized model goes along),
    the statistics of its inputs, what quantizing its largest group and a forward pass take for a moment, the hidden
    states kept in memory, and the interpreter with its libraries."""

    layer: int
    statistics: int
    work: int
    activations: int
    hidden: int
    interpreter: int = 1100 * 10**6

    @property
    def total(self) -> int:
        """All of it."""
        return self.on_accelerator + self.hidden + self.interpreter

    @property
    def on_accelerator(self) -> int:
        """What an accelerator holds of it where there is one."""
        return self.layer + self.statistics + self.work + self.activations


COMPUTED_BYTES = 4
"""A number that a layer computes with, on a CPU; 2 on an accelerator."""
_FLOAT = 4


def calibration_memory(
    config: ModelConfig, recipe: Recipe, *, batch_tokens: int, hidden_bytes: int, item_bytes: int
) -> CalibrationMemory:
    """The most memory that calibrating `recipe` takes; `item_bytes` is the size of the type that layers compute in."""
    method, streams = recipe.method, 2 if recipe.method.two_streams else 1
    layers: dict[int, list[SourceTensor]] = {}
    for tensor in expected_census(config, with_mtp=False):
        if (index := config.family.layer_of(tensor.name)) is not None:
            layers.setdefault(index, []).append(tensor)
    largest, statistics, work = 0, 0, 0
    for members in layers.values():
        largest = max(largest, sum(t.num_params * (2 if _is_routed(t) else item_bytes) for t in members))
        sites: dict[str, tuple[int, int]] = {}  # number of matrices and width, by input
        sizes: dict[str, tuple[int, int]] = {}  # number of weights and width, of what is quantized together
        for tensor, _ in quantized(members, recipe):
            role, linear = tensor.role, tensor.linears[0]
            assert role is not None
            if _is_routed(tensor):
                sites[role.name] = (1 if role.reads_hidden else config.num_experts, linear.in_features)
                before = sizes.get(role.name, (0, 0))[0]
                sizes[role.name] = (min(before + tensor.num_params, EXPERTS_TOGETHER), linear.in_features)
            else:
                sites[linear.fused_into] = (1, linear.in_features)
                sizes[tensor.name] = (2 * tensor.num_params, linear.in_features)
        for num_weights, width in sizes.values():
            rounded = min(num_weights, ROUNDED_TOGETHER) if method.two_streams else 1 << 18
            factors = width**2 * _FLOAT * FACTOR_COPIES if method.two_streams else 0
            work = max(work, 4 * num_weights * _FLOAT + ROUNDED_COPIES * rounded * _FLOAT + factors)
        taken = 0
        for num, width in sites.values():
            if method.two_streams:
                taken += 2 * num * width**2 * _FLOAT
            elif method.needs_moments:
                taken += num * width * _FLOAT
        statistics = max(statistics, taken)
    widest = max(
        3 * config.intermediate_size,
        3 * config.shared_expert_intermediate_size + 3 * config.moe_intermediate_size,
        6 * (2 * config.linear_key_size + 2 * config.linear_value_size),
        4 * config.num_heads * config.head_dim,
    )
    return CalibrationMemory(
        layer=streams * largest,
        statistics=statistics,
        work=work,
        activations=batch_tokens * (widest + 6 * config.hidden_size) * (item_bytes + _FLOAT),
        hidden=hidden_bytes,
    )


def _is_routed(tensor: SourceTensor) -> bool:
    return tensor.role is not None and tensor.role.block == "experts"


def check_memory(needed: CalibrationMemory, available: int, on_accelerator: int | None = None) -> None:
    """`UserError` if a calibration would not fit into `available` bytes; on an accelerator, of which `on_accelerator`
    bytes are free, all but the hidden states is held there."""
    if on_accelerator is not None:
        if needed.on_accelerator > on_accelerator:
            raise UserError(
                f"Calibrating takes about {needed.on_accelerator / 1e9:.1f} GB of the GPU ({needed.layer / 1e9:.1f} "
                f"for a layer, {needed.statistics / 1e9:.1f} for statistics), and {on_accelerator / 1e9:.1f} GB are "
                "free.",
                "End other programs on the GPU, lower batch_tokens, choose codes 'rtn', or build with --device cpu.",
            )
        available += needed.on_accelerator
    if needed.total > available:
        raise UserError(
            f"Calibrating takes about {needed.total / 1e9:.1f} GB of memory ({needed.layer / 1e9:.1f} for a layer, "
            f"{needed.statistics / 1e9:.1f} for statistics, {needed.hidden / 1e9:.1f} for hidden states), and "
            f"{available / 1e9:.1f} GB are free.",
            "Lower hidden_memory_gb or batch_tokens, or choose codes 'rtn'.",
        )
