"""Qwen3.5, Qwen3.6 and the dense Qwen3.8: three DeltaNet layers to one of full attention, each with an MLP or experts.

Beside them stand a vision tower and a multi-token-prediction (MTP) head. The projections of DeltaNet are stored apart,
and vLLM fuses them in pairs; the experts of a layer are stored in two 3-D tensors.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from harness.errors import UserError
from harness.model.families import deltanet
from harness.model.families.deltanet import number
from harness.model.family import Family, Layout, ModelConfig, Modeling, Role, Tensors

_DENSE, _MOE = "Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration"
_DENSE_TEXT, _MOE_TEXT = "Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM"
_TEXT, _TEXT_ALONE, _VISION = "model.language_model.", "model.", "model.visual."
_QKVZ = r"re:.*linear_attn\.in_proj_(qkv|z|qkvz)$"
_BA = r"re:.*linear_attn\.in_proj_(a|b|ba)$"

_ROLES = (
    deltanet.MTP,
    Role("visual", r"(model\.)?visual\..*", "visual", target=r"re:.*visual\..*"),
    deltanet.HEAD,
    deltanet.EMBEDDING,
    deltanet.NORM,
    *deltanet.ATTENTION,
    deltanet.deltanet("in_proj_qkv.weight", _QKVZ, "in_proj_qkvz", quantizable=True),
    deltanet.deltanet("in_proj_z.weight", _QKVZ, "in_proj_qkvz", quantizable=True),
    # Their 32 or 48 outputs are below the multiple of 64 that the FP4 kernels want.
    deltanet.deltanet("in_proj_b.weight", _BA, "in_proj_ba"),
    deltanet.deltanet("in_proj_a.weight", _BA, "in_proj_ba"),
    *deltanet.DELTANET_OUTPUT,
    *deltanet.MLP,
    *deltanet.EXPERTS,
)

_VISION_KEYS = (
    "depth",
    "hidden_size",
    "intermediate_size",
    "in_channels",
    "patch_size",
    "temporal_patch_size",
    "spatial_merge_size",
    "out_hidden_size",
    "num_position_embeddings",
)


def _read_config(config: Mapping[str, Any], where: str) -> ModelConfig:
    architecture = config["architectures"][0]
    is_text = architecture in TEXT_FAMILY.modeling
    text, section = config.get("text_config"), f"{where}: text_config."
    if is_text and text is None:  # its numbers stand at the top, and may stand where the whole model has them
        text, section = config, f"{where}: "
    if not isinstance(text, Mapping):
        raise UserError(f"{where} has no text_config.", "Give the config.json of the published multimodal model.")
    vision = None if is_text else config.get("vision_config")
    has_experts = architecture in (_MOE, _MOE_TEXT)
    return ModelConfig(
        family=TEXT_FAMILY if is_text else FAMILY,
        architecture=architecture,
        **deltanet.hybrid_numbers(text, section, has_experts=has_experts),
        attention_output_gate=bool(text.get("attn_output_gate", True)),
        intermediate_size=0 if has_experts else number(text, "intermediate_size", section),
        num_mtp_layers=number(text, "mtp_num_hidden_layers", section, 0) if "mtp_num_hidden_layers" in text else 0,
        tied_embeddings=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        vision=(
            {key: number(vision, key, f"{where}: vision_config.") for key in _VISION_KEYS}
            if isinstance(vision, Mapping)
            else None
        ),
    )


def _tensors(config: ModelConfig, layout: Layout, with_mtp: bool) -> Tensors:
    """Shapes follow transformers' modeling_qwen3_5.py and modeling_qwen3_5_moe.py."""
    yield from deltanet.trunk(config, layout, _projections)
    if config.vision is not None:
        yield from _vision_tower(config.vision)
    if with_mtp:
        yield from deltanet.mtp_head(config, has_experts=config.is_moe, fused_experts=layout.fused_mtp_experts)


def _projections(config: ModelConfig, prefix: str) -> Tensors:
    key, value, heads = config.linear_key_size, config.linear_value_size, config.linear_num_value_heads
    yield prefix + "linear_attn.in_proj_qkv.weight", (2 * key + value, config.hidden_size)
    yield prefix + "linear_attn.in_proj_z.weight", (value, config.hidden_size)
    yield prefix + "linear_attn.in_proj_b.weight", (heads, config.hidden_size)
    yield prefix + "linear_attn.in_proj_a.weight", (heads, config.hidden_size)


def _vision_tower(vision: Mapping[str, int]) -> Tensors:
    hidden, width, merged = vision["hidden_size"], vision["intermediate_size"], vision["spatial_merge_size"] ** 2

    def affine(name: str, out_features: int, *in_features: int) -> Tensors:
        yield f"{_VISION}{name}.weight", (out_features, *in_features)
        yield f"{_VISION}{name}.bias", (out_features,)

    patch = (vision["in_channels"], vision["temporal_patch_size"], vision["patch_size"], vision["patch_size"])
    yield from affine("patch_embed.proj", hidden, *patch)
    yield f"{_VISION}pos_embed.weight", (vision["num_position_embeddings"], hidden)
    for block in range(vision["depth"]):
        yield from affine(f"blocks.{block}.norm1", hidden)
        yield from affine(f"blocks.{block}.norm2", hidden)
        yield from affine(f"blocks.{block}.attn.qkv", 3 * hidden, hidden)
        yield from affine(f"blocks.{block}.attn.proj", hidden, hidden)
        yield from affine(f"blocks.{block}.mlp.linear_fc1", width, hidden)
        yield from affine(f"blocks.{block}.mlp.linear_fc2", hidden, width)
    yield from affine("merger.norm", hidden)
    yield from affine("merger.linear_fc1", hidden * merged, hidden * merged)
    yield from affine("merger.linear_fc2", vision["out_hidden_size"], hidden * merged)


_MODULES = "transformers.models"
_DENSE_MODELING = Modeling(
    f"{_MODULES}.qwen3_5.modeling_qwen3_5", "Qwen3_5DecoderLayer", "Qwen3_5TextRotaryEmbedding", 3
)
_MOE_MODELING = Modeling(
    f"{_MODULES}.qwen3_5_moe.modeling_qwen3_5_moe", "Qwen3_5MoeDecoderLayer", "Qwen3_5MoeTextRotaryEmbedding", 3
)
FAMILY = Family(
    name="Qwen3.5",
    modeling={_DENSE: _DENSE_MODELING, _MOE: _MOE_MODELING},
    roles=_ROLES,
    published=Layout(_TEXT, fused_experts=True, fused_mtp_experts=True),
    other_prefixes=(_TEXT_ALONE,),
    parts={"mtp": "mtp.", "visual": _VISION},
    embedding="embed_tokens",
    head="lm_head",
    not_linear=("pos_embed.weight",),
    experts=deltanet.EXPERT_NAMES,
    layer=deltanet.LAYER_NAMES,
    engine_prefixes=(
        (_TEXT, "language_model.model."),
        (_VISION, "visual."),
        ("lm_head.", "language_model.lm_head."),
    ),
    engine_attention=("self_attn.attn", "attn.attn"),
    optional_modules=(f"{_VISION}blocks.0.attn.qkv",),
    read_config=_read_config,
    tensors=_tensors,
)

TEXT_FAMILY = replace(
    FAMILY,
    name="Qwen3.5, text only",
    modeling={_DENSE_TEXT: _DENSE_MODELING, _MOE_TEXT: _MOE_MODELING},
    roles=tuple(role for role in _ROLES if role.part != "visual"),
    published=replace(FAMILY.published, text_prefix=_TEXT_ALONE),
    other_prefixes=(_TEXT,),
    loads_other_prefixes=True,
    parts={"mtp": FAMILY.parts["mtp"]},
    engine_prefixes=((_TEXT, _TEXT_ALONE),),
    optional_modules=(),
)
"""The text part alone, under classes of its own; Qwen3.8 with 2.4T parameters is published so. vLLM's qwen3_5.py takes
the prefix of the whole model too."""
