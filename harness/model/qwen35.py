"""Qwen3.5 and Qwen3.6: which tensor plays which role, what vLLM fuses, and what a configuration says.

The hybrid models (`Qwen3_5ForConditionalGeneration`, `Qwen3_5MoeForConditionalGeneration`) stack three
DeltaNet (linear attention) layers to one full-attention layer, each followed by an MLP or a mixture of experts,
beside a vision tower and a multi-token-prediction (MTP) head. This module is the only table of their tensors:
every other room asks `role_of` and `linears_of` and never looks at a name itself.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from harness.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Role:
    """What a tensor does. `target` is the pattern that names its module in a `quantization_config`, for roles
    that are linear layers: unanchored, and naming vLLM's fused form beside the shards (vLLM looks up either,
    by release). `fused` names the matrix that vLLM makes of several shards; its shards must share one format
    and one global scale."""

    name: str
    pattern: str
    target: str | None = None
    fused: str | None = None


_QKV = r"re:.*self_attn\.(q|k|v|qkv)_proj$"
_GATE_UP = r"re:.*mlp\.(gate|up|gate_up)_proj$"
_QKVZ = r"re:.*linear_attn\.in_proj_(qkv|z|qkvz)$"
_BA = r"re:.*linear_attn\.in_proj_(a|b|ba)$"
_EXPERTS = r"re:.*mlp\.experts\.\d+\.(gate|up|down)_proj$"
_SHARED_GATE_UP = r"re:.*mlp\.shared_expert\.(gate|up|gate_up)_proj$"

# First match wins. Patterns of text roles follow `model.language_model.layers.N.` or `model.layers.N.`.
ROLES: tuple[Role, ...] = (
    Role("mtp", r"mtp\..*", r"re:.*mtp\..*"),
    Role("visual", r"(model\.)?visual\..*", r"re:.*visual\..*"),
    Role("lm_head", r"lm_head\.weight", r"re:.*lm_head$"),
    Role("embed_tokens", r"embed_tokens\.weight"),
    Role("norm", r"(norm|layers\.\d+\.(.*layernorm|self_attn\.[qk]_norm|linear_attn\.norm))\.weight"),
    Role("self_attn.q_proj", r"layers\.\d+\.self_attn\.q_proj\.weight", _QKV, "qkv_proj"),
    Role("self_attn.k_proj", r"layers\.\d+\.self_attn\.k_proj\.weight", _QKV, "qkv_proj"),
    Role("self_attn.v_proj", r"layers\.\d+\.self_attn\.v_proj\.weight", _QKV, "qkv_proj"),
    Role("self_attn.o_proj", r"layers\.\d+\.self_attn\.o_proj\.weight", r"re:.*self_attn\.o_proj$"),
    Role("linear_attn.in_proj_qkv", r"layers\.\d+\.linear_attn\.in_proj_qkv\.weight", _QKVZ, "in_proj_qkvz"),
    Role("linear_attn.in_proj_z", r"layers\.\d+\.linear_attn\.in_proj_z\.weight", _QKVZ, "in_proj_qkvz"),
    Role("linear_attn.in_proj_b", r"layers\.\d+\.linear_attn\.in_proj_b\.weight", _BA, "in_proj_ba"),
    Role("linear_attn.in_proj_a", r"layers\.\d+\.linear_attn\.in_proj_a\.weight", _BA, "in_proj_ba"),
    Role("linear_attn.out_proj", r"layers\.\d+\.linear_attn\.out_proj\.weight", r"re:.*linear_attn\.out_proj$"),
    Role("linear_attn.conv1d", r"layers\.\d+\.linear_attn\.conv1d\.weight"),
    Role("linear_attn.A_log", r"layers\.\d+\.linear_attn\.A_log"),
    Role("linear_attn.dt_bias", r"layers\.\d+\.linear_attn\.dt_bias"),
    Role("mlp.gate_proj", r"layers\.\d+\.mlp\.gate_proj\.weight", _GATE_UP, "gate_up_proj"),
    Role("mlp.up_proj", r"layers\.\d+\.mlp\.up_proj\.weight", _GATE_UP, "gate_up_proj"),
    Role("mlp.down_proj", r"layers\.\d+\.mlp\.down_proj\.weight", r"re:.*mlp\.down_proj$"),
    Role("mlp.router", r"layers\.\d+\.mlp\.gate\.weight", r"re:.*mlp\.gate$"),
    Role("mlp.experts.gate_up_proj", r"layers\.\d+\.mlp\.experts\.gate_up_proj", _EXPERTS, "w13"),
    Role("mlp.experts.down_proj", r"layers\.\d+\.mlp\.experts\.down_proj", _EXPERTS),
    Role(
        "mlp.shared_expert.gate_proj",
        r"layers\.\d+\.mlp\.shared_expert\.gate_proj\.weight",
        _SHARED_GATE_UP,
        "gate_up_proj",
    ),
    Role(
        "mlp.shared_expert.up_proj",
        r"layers\.\d+\.mlp\.shared_expert\.up_proj\.weight",
        _SHARED_GATE_UP,
        "gate_up_proj",
    ),
    Role(
        "mlp.shared_expert.down_proj",
        r"layers\.\d+\.mlp\.shared_expert\.down_proj\.weight",
        r"re:.*mlp\.shared_expert\.down_proj$",
    ),
    Role("mlp.shared_expert_gate", r"layers\.\d+\.mlp\.shared_expert_gate\.weight", r"re:.*shared_expert_gate$"),
)

_COMPILED = tuple((re.compile(r"(?:model\.(?:language_model\.)?)?" + role.pattern), role) for role in ROLES)
_IN_LAYER = re.compile(r"model\.(?:language_model\.)?layers\.(\d+)\.")
ROLE = {role.name: role for role in ROLES}


def role_of(tensor: str) -> Role | None:
    """The role of a source tensor by its full name, or None for a name that these architectures do not have."""
    return next((role for pattern, role in _COMPILED if pattern.fullmatch(tensor)), None)


def layer_of(tensor: str) -> int | None:
    """The number of the decoder layer that a source tensor is part of; None outside of them (MTP has its own)."""
    found = _IN_LAYER.match(tensor)
    return int(found[1]) if found else None


@dataclass(frozen=True)
class Linear:
    """One linear layer inside a source tensor.

    `module` is its name in the checkpoint. Its weight `[out_features, in_features]` is rows `first_row` to
    `first_row + out_features` of the source tensor seen as a matrix of rows of `in_features`; fused 3-D experts
    hold many. `fused_into` names the matrix that vLLM fuses it into, the module itself where it stands alone.
    """

    module: str
    role: Role
    first_row: int
    out_features: int
    in_features: int
    fused_into: str


def linears_of(tensor: str, shape: tuple[int, ...]) -> tuple[Linear, ...]:
    """The linear layers in source tensor `tensor` of `shape`: one for a 2-D weight, 2E and E for the fused experts
    `gate_up_proj [E, 2I, H]` and `down_proj [E, H, I]`, none for anything else."""
    role = role_of(tensor)
    if role is None or role.target is None or not 2 <= len(shape) <= 3 or 0 in shape:
        return ()
    if len(shape) == 2:
        module = tensor.removesuffix(".weight")
        parent = module.rpartition(".")[0]
        return (Linear(module, role, 0, shape[0], shape[1], f"{parent}.{role.fused}" if role.fused else module),)
    if not role.name.startswith("mlp.experts."):
        return ()
    parent, _, last = tensor.rpartition(".")
    shards = ("gate_proj", "up_proj") if last == "gate_up_proj" else ("down_proj",)
    rows = shape[1] // len(shards)
    return tuple(
        Linear(
            module=f"{parent}.{expert}.{shard}",
            role=role,
            first_row=expert * shape[1] + index * rows,
            out_features=rows,
            in_features=shape[2],
            fused_into=f"{parent}.{expert}.{role.fused or shard}",
        )
        for expert in range(shape[0])
        for index, shard in enumerate(shards)
    )


@dataclass(frozen=True)
class ModelConfig:
    """The numbers of a `config.json` that decide shapes and sizes. MoE fields are 0 in dense models."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    full_attention_layers: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    attention_output_gate: bool
    conv_kernel: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    state_bytes_per_element: int
    intermediate_size: int
    num_experts: int
    num_experts_per_token: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    num_mtp_layers: int
    tied_embeddings: bool
    max_position_embeddings: int | None
    vision: Mapping[str, int] | None

    @property
    def is_moe(self) -> bool:
        return self.num_experts > 0

    @property
    def linear_key_size(self) -> int:
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def linear_value_size(self) -> int:
        return self.linear_num_value_heads * self.linear_value_head_dim


ARCHITECTURES = ("Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration")

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


def parse_config(config: Mapping[str, Any], where: str) -> ModelConfig:
    """Reads a `config.json`; `UserError`, naming `where`, for an unknown architecture or a missing number."""
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    if name not in ARCHITECTURES:
        raise UserError(
            f"{where} is of architecture {name!r}, which this harness does not know.",
            did_you_mean(str(name), ARCHITECTURES),
        )
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        raise UserError(f"{where} has no text_config.", "Give the config.json of the published multimodal model.")

    def number(table: Mapping[str, Any], key: str, section: str, least: int = 1) -> int:
        value = table.get(key)
        if type(value) is not int or not least <= value < 1 << 40:
            raise UserError(
                f"{where}: {section}.{key} is {value!r}, not a whole number from {least}.",
                "Compare it with the model's source.",
            )
        return value

    moe = name.startswith("Qwen3_5Moe")
    num_layers = number(text, "num_hidden_layers", "text_config")
    vision = config.get("vision_config")
    return ModelConfig(
        architecture=name,
        vocab_size=number(text, "vocab_size", "text_config"),
        hidden_size=number(text, "hidden_size", "text_config"),
        num_layers=num_layers,
        full_attention_layers=_full_attention_layers(
            text,
            num_layers,
            number(text, "full_attention_interval", "text_config") if "full_attention_interval" in text else 4,
        ),
        num_heads=number(text, "num_attention_heads", "text_config"),
        num_kv_heads=number(text, "num_key_value_heads", "text_config"),
        head_dim=number(text, "head_dim", "text_config"),
        attention_output_gate=bool(text.get("attn_output_gate", True)),
        conv_kernel=number(text, "linear_conv_kernel_dim", "text_config"),
        linear_num_key_heads=number(text, "linear_num_key_heads", "text_config"),
        linear_num_value_heads=number(text, "linear_num_value_heads", "text_config"),
        linear_key_head_dim=number(text, "linear_key_head_dim", "text_config"),
        linear_value_head_dim=number(text, "linear_value_head_dim", "text_config"),
        state_bytes_per_element=2 if text.get("mamba_ssm_dtype") in ("bfloat16", "float16") else 4,
        intermediate_size=0 if moe else number(text, "intermediate_size", "text_config"),
        num_experts=number(text, "num_experts", "text_config") if moe else 0,
        num_experts_per_token=number(text, "num_experts_per_tok", "text_config") if moe else 0,
        moe_intermediate_size=number(text, "moe_intermediate_size", "text_config") if moe else 0,
        shared_expert_intermediate_size=(number(text, "shared_expert_intermediate_size", "text_config") if moe else 0),
        num_mtp_layers=(
            number(text, "mtp_num_hidden_layers", "text_config", 0) if "mtp_num_hidden_layers" in text else 0
        ),
        tied_embeddings=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        max_position_embeddings=(
            number(text, "max_position_embeddings", "text_config") if "max_position_embeddings" in text else None
        ),
        vision=(
            {key: number(vision, key, "vision_config") for key in _VISION_KEYS} if isinstance(vision, Mapping) else None
        ),
    )


def _full_attention_layers(text: Mapping[str, Any], num_layers: int, interval: int) -> tuple[int, ...]:
    """`layer_types` where the configuration lists them, else every `interval`-th layer."""
    types = text.get("layer_types")
    if isinstance(types, list) and len(types) == num_layers:
        return tuple(i for i, kind in enumerate(types) if kind == "full_attention")
    return tuple(range(interval - 1, num_layers, interval))


def expected_tensors(config: ModelConfig, *, with_mtp: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of a source checkpoint of `config` as (name, shape), in the published layout.

    Shapes follow transformers' modeling_qwen3_5.py and modeling_qwen3_5_moe.py; MTP names follow vLLM's
    qwen3_5_mtp.py, since transformers has no module for them.
    """
    yield "model.language_model.embed_tokens.weight", (config.vocab_size, config.hidden_size)
    for layer in range(config.num_layers):
        prefix = f"model.language_model.layers.{layer}."
        full = layer in config.full_attention_layers
        yield from _decoder_layer(config, prefix, full_attention=full)
    yield "model.language_model.norm.weight", (config.hidden_size,)
    if not config.tied_embeddings:
        yield "lm_head.weight", (config.vocab_size, config.hidden_size)
    if config.vision is not None:
        yield from _vision_tower(config.vision)
    if with_mtp:
        yield "mtp.fc.weight", (config.hidden_size, 2 * config.hidden_size)
        for layer in range(config.num_mtp_layers):
            yield from _decoder_layer(config, f"mtp.layers.{layer}.", full_attention=True)
        for norm in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
            yield f"mtp.{norm}.weight", (config.hidden_size,)


def _decoder_layer(config: ModelConfig, prefix: str, *, full_attention: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden = config.hidden_size
    yield prefix + "input_layernorm.weight", (hidden,)
    yield prefix + "post_attention_layernorm.weight", (hidden,)
    if full_attention:
        heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        yield prefix + "self_attn.q_proj.weight", (heads * (2 if config.attention_output_gate else 1), hidden)
        yield prefix + "self_attn.k_proj.weight", (kv, hidden)
        yield prefix + "self_attn.v_proj.weight", (kv, hidden)
        yield prefix + "self_attn.o_proj.weight", (hidden, heads)
        yield prefix + "self_attn.q_norm.weight", (config.head_dim,)
        yield prefix + "self_attn.k_norm.weight", (config.head_dim,)
    else:
        key, value = config.linear_key_size, config.linear_value_size
        yield prefix + "linear_attn.in_proj_qkv.weight", (2 * key + value, hidden)
        yield prefix + "linear_attn.in_proj_z.weight", (value, hidden)
        yield prefix + "linear_attn.in_proj_b.weight", (config.linear_num_value_heads, hidden)
        yield prefix + "linear_attn.in_proj_a.weight", (config.linear_num_value_heads, hidden)
        yield prefix + "linear_attn.conv1d.weight", (2 * key + value, 1, config.conv_kernel)
        yield prefix + "linear_attn.A_log", (config.linear_num_value_heads,)
        yield prefix + "linear_attn.dt_bias", (config.linear_num_value_heads,)
        yield prefix + "linear_attn.norm.weight", (config.linear_value_head_dim,)
        yield prefix + "linear_attn.out_proj.weight", (hidden, value)
    if not config.is_moe:
        yield from _mlp(prefix + "mlp.", hidden, config.intermediate_size)
        return
    experts, width = config.num_experts, config.moe_intermediate_size
    yield prefix + "mlp.gate.weight", (experts, hidden)
    yield prefix + "mlp.experts.gate_up_proj", (experts, 2 * width, hidden)
    yield prefix + "mlp.experts.down_proj", (experts, hidden, width)
    yield from _mlp(prefix + "mlp.shared_expert.", hidden, config.shared_expert_intermediate_size)
    yield prefix + "mlp.shared_expert_gate.weight", (1, hidden)


def _mlp(prefix: str, hidden: int, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield prefix + "gate_proj.weight", (width, hidden)
    yield prefix + "up_proj.weight", (width, hidden)
    yield prefix + "down_proj.weight", (hidden, width)


def _vision_tower(vision: Mapping[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, width, merged = vision["hidden_size"], vision["intermediate_size"], vision["spatial_merge_size"] ** 2

    def affine(name: str, out_features: int, *in_features: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"model.visual.{name}.weight", (out_features, *in_features)
        yield f"model.visual.{name}.bias", (out_features,)

    patch = (vision["in_channels"], vision["temporal_patch_size"], vision["patch_size"], vision["patch_size"])
    yield from affine("patch_embed.proj", hidden, *patch)
    yield "model.visual.pos_embed.weight", (vision["num_position_embeddings"], hidden)
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
