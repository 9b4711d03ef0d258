"""A recipe over a census: what a build would make of a model, in bytes, before anything is read."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from harness.errors import UserError
from harness.formats import nvfp4
from harness.formats.config import Format
from harness.model.census import RoleCount, SourceTensor, TokenTraffic, count_roles, token_traffic
from harness.model.qwen35 import ModelConfig
from harness.quantize.recipes import Recipe


@dataclass(frozen=True)
class Plan:
    """What becomes of every role. `num_quantized` counts source tensors, as model cards do."""

    recipe: Recipe | None
    counts: tuple[RoleCount, ...]
    num_tensors: int
    num_quantized: int
    source_bytes: int
    output_bytes: int
    source_traffic: TokenTraffic
    output_traffic: TokenTraffic


def plan(config: ModelConfig, tensors: Sequence[SourceTensor], recipe: Recipe | None) -> Plan:
    """The plan of `recipe` for a model; with no recipe every tensor is kept. `UserError` where a tensor of a
    role to be quantized cannot be: a width that is no multiple of the block."""
    formats = {} if recipe is None else recipe.formats
    for tensor in tensors:
        check_widths(tensor, _format_of(tensor, formats))
    counts = count_roles(tensors, formats)
    return Plan(
        recipe=recipe,
        counts=counts,
        num_tensors=len(tensors),
        num_quantized=sum(count.num_tensors for count in counts if count.role in formats),
        source_bytes=sum(count.source_bytes for count in counts),
        output_bytes=sum(count.output_bytes for count in counts),
        source_traffic=token_traffic(config, count_roles(tensors, {})),
        output_traffic=token_traffic(config, counts),
    )


def _format_of(tensor: SourceTensor, formats: dict[str, Format]) -> Format | None:
    return formats.get(tensor.role.name) if tensor.role else None


def quantized(tensors: Sequence[SourceTensor], recipe: Recipe) -> Iterator[tuple[SourceTensor, Format]]:
    """The tensors that `recipe` quantizes, with their formats."""
    formats = recipe.formats
    for tensor in tensors:
        if (form := _format_of(tensor, formats)) is not None:
            yield tensor, form


def check_widths(tensor: SourceTensor, form: Format | None) -> None:
    """`UserError` for a weight whose rows do not divide into blocks of 16."""
    if form is None or form.compressor != "nvfp4-pack-quantized":
        return
    if not tensor.linears and 0 not in tensor.shape:
        raise UserError(
            f"{tensor.name} has shape {list(tensor.shape)}, which is no linear layer's.",
            "Compare the checkpoint with its config.json.",
        )
    if 0 in tensor.shape:
        raise UserError(f"{tensor.name} is empty: its shape is {list(tensor.shape)}.", "Download the source again.")
    width = tensor.linears[0].in_features
    if width % nvfp4.BLOCK:
        raise UserError(
            f"{tensor.name} has rows of {width} weights, which is not a multiple of {nvfp4.BLOCK}, "
            "the block that shares an NVFP4 scale.",
            f"Choose a recipe that keeps {tensor.role.name if tensor.role else 'it'}.",
        )
