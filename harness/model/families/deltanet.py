"""What hybrids of gated DeltaNet and full attention have in common: roles, numbers of a configuration, and shapes.

Plain pieces, from which a family's file puts itself together; a family takes those that are true of it.
"""

from collections.abc import Callable, Mapping
from typing import Any

from harness.errors import UserError
from harness.model.family import Block, ExpertNames, LayerNames, Layout, ModelConfig, Role, Tensors

_QKV = r"re:.*self_attn\.(q|k|v|qkv)_proj$"
_GATE_UP = r"re:.*mlp\.(gate|up|gate_up)_proj$"
_EXPERTS = r"re:.*mlp\.experts\.\d+\.(gate|up|down)_proj$"
_SHARED_GATE_UP = r"re:.*mlp\.shared_expert\.(gate|up|gate_up)_proj$"

MTP = Role("mtp", r"mtp\..*", "mtp", target=r"re:.*mtp\..*")
HEAD = Role("lm_head", r"lm_head\.weight", "head", "head", r"re:.*lm_head$", quantizable=True)
EMBEDDING = Role("embed_tokens", r"embed_tokens\.weight", "embedding")
NORM = Role("norm", r"(norm|layers\.\d+\.(.*layernorm|self_attn\.[qk]_norm|linear_attn\.norm))\.weight", block="norm")


def linear(
    name: str, block: Block, target: str = "", fused: str | None = None, tensor: str = "", **properties: bool
) -> Role:
    """The role of a linear layer of a decoder layer, which recipes may quantize unless it is `always_16_bit`.
    `tensor`, the pattern of what follows `layers.0.`, and `target` are those of a layer called `name`, unless given."""
    escaped = name.replace(".", r"\.")
    pattern = r"layers\.\d+\." + (tensor or rf"{escaped}\.weight")
    properties["quantizable"] = not properties.get("always_16_bit")
    return Role(name, pattern, "trunk", block, target or f"re:.*{escaped}$", fused, **properties)


def deltanet(tensor: str, target: str | None = None, fused: str | None = None, **properties: bool) -> Role:
    """The role of a tensor of the DeltaNet mixer, by what follows `linear_attn.` in its name; a linear layer where it
    has a target. None is quantized unless `properties` say so."""
    pattern = rf"layers\.\d+\.linear_attn\.{tensor}"
    name = f"linear_attn.{tensor.removesuffix('.weight')}"
    return Role(name, pattern.replace(".weight", r"\.weight"), "trunk", "deltanet", target, fused, **properties)


ATTENTION = (
    linear("self_attn.q_proj", "attention", _QKV, "qkv_proj"),
    linear("self_attn.k_proj", "attention", _QKV, "qkv_proj"),
    linear("self_attn.v_proj", "attention", _QKV, "qkv_proj"),
    linear("self_attn.o_proj", "attention", reads_hidden=False),
)
DELTANET_OUTPUT = (
    deltanet("out_proj.weight", r"re:.*linear_attn\.out_proj$", quantizable=True, reads_hidden=False),
    deltanet("conv1d.weight"),
    deltanet("A_log"),
    deltanet("dt_bias"),
)
MLP = (
    linear("mlp.gate_proj", "mlp", _GATE_UP, "gate_up_proj"),
    linear("mlp.up_proj", "mlp", _GATE_UP, "gate_up_proj"),
    linear("mlp.down_proj", "mlp", reads_hidden=False),
)
_OF_GATE_UP = r"mlp\.experts\.(gate_up_proj|\d+\.(gate|up)_proj\.weight)"
_OF_DOWN = r"mlp\.experts\.(down_proj|\d+\.down_proj\.weight)"
EXPERTS = (
    linear("mlp.router", "router", r"re:.*mlp\.gate$", tensor=r"mlp\.gate\.weight", always_16_bit=True),
    linear("mlp.experts.gate_up_proj", "experts", _EXPERTS, "w13", _OF_GATE_UP),
    linear("mlp.experts.down_proj", "experts", _EXPERTS, tensor=_OF_DOWN, reads_hidden=False),
    linear("mlp.shared_expert.gate_proj", "shared-expert", _SHARED_GATE_UP, "gate_up_proj"),
    linear("mlp.shared_expert.up_proj", "shared-expert", _SHARED_GATE_UP, "gate_up_proj"),
    linear("mlp.shared_expert.down_proj", "shared-expert", reads_hidden=False),
    linear("mlp.shared_expert_gate", "router", r"re:.*shared_expert_gate$", always_16_bit=True),
)

EXPERT_NAMES = ExpertNames(
    "experts", "gate", gate_up="gate_up_proj", gate="gate_proj", up="up_proj", down="down_proj", fused="w13"
)
LAYER_NAMES = LayerNames(
    input_norm="input_layernorm",
    post_norm="post_attention_layernorm",
    mixers={"full_attention": "self_attn", "linear_attention": "linear_attn"},
    mlp="mlp",
)


def number(table: Mapping[str, Any], key: str, where: str, least: int = 1) -> int:
    """The whole number `key` of a table of a configuration, which `where` names; `UserError` for anything else."""
    value = table.get(key)
    if type(value) is not int or not least <= value < 1 << 40:
        raise UserError(
            f"{where}{key} is {value!r}, not a whole number from {least}.", "Compare it with the model's source."
        )
    return value


def hybrid_numbers(text: Mapping[str, Any], where: str, *, has_experts: bool) -> dict[str, Any]:
    """The fields of a `ModelConfig` that all these models call alike in the table `text` of their configuration."""

    def read(key: str) -> int:
        return number(text, key, where)

    num_layers = read("num_hidden_layers")
    interval = read("full_attention_interval") if "full_attention_interval" in text else 4
    of_experts = {
        "num_experts": "num_experts",
        "num_experts_per_token": "num_experts_per_tok",
        "moe_intermediate_size": "moe_intermediate_size",
        "shared_expert_intermediate_size": "shared_expert_intermediate_size",
    }
    return {
        "vocab_size": read("vocab_size"),
        "hidden_size": read("hidden_size"),
        "num_layers": num_layers,
        "full_attention_layers": _full_attention_layers(text, num_layers, interval),
        "num_heads": read("num_attention_heads"),
        "num_kv_heads": read("num_key_value_heads"),
        "head_dim": read("head_dim"),
        "conv_kernel": read("linear_conv_kernel_dim"),
        "linear_num_key_heads": read("linear_num_key_heads"),
        "linear_num_value_heads": read("linear_num_value_heads"),
        "linear_key_head_dim": read("linear_key_head_dim"),
        "linear_value_head_dim": read("linear_value_head_dim"),
        "state_bytes_per_element": 2 if text.get("mamba_ssm_dtype") in ("bfloat16", "float16") else 4,
        **{field: read(key) if has_experts else 0 for field, key in of_experts.items()},
        "max_position_embeddings": read("max_position_embeddings") if "max_position_embeddings" in text else None,
    }


def _full_attention_layers(text: Mapping[str, Any], num_layers: int, interval: int) -> tuple[int, ...]:
    """`layer_types` where the configuration lists them, else every `interval`-th layer."""
    types = text.get("layer_types")
    if isinstance(types, list) and len(types) == num_layers:
        return tuple(i for i, kind in enumerate(types) if kind == "full_attention")
    return tuple(range(interval - 1, num_layers, interval))


def trunk(config: ModelConfig, layout: Layout, projections: Callable[[ModelConfig, str], Tensors]) -> Tensors:
    """Embedding, decoder layers, last norm and head. `projections` gives DeltaNet's tensors that read the hidden
    states, by the prefix of their layer."""
    yield f"{layout.text_prefix}embed_tokens.weight", (config.vocab_size, config.hidden_size)
    for layer in range(config.num_layers):
        prefix = f"{layout.text_prefix}layers.{layer}."
        yield from norms(config, prefix)
        if layer in config.full_attention_layers:
            yield from attention(config, prefix)
        else:
            yield from projections(config, prefix)
            yield from deltanet_state(config, prefix)
        has_experts = config.has_experts(layer)
        yield from feed_forward(config, prefix, has_experts=has_experts, fused_experts=layout.fused_experts)
    yield f"{layout.text_prefix}norm.weight", (config.hidden_size,)
    if not config.tied_embeddings:
        yield "lm_head.weight", (config.vocab_size, config.hidden_size)


def norms(config: ModelConfig, prefix: str) -> Tensors:
    """The two norms of a decoder layer, each in front of a half."""
    yield prefix + "input_layernorm.weight", (config.hidden_size,)
    yield prefix + "post_attention_layernorm.weight", (config.hidden_size,)


def attention(config: ModelConfig, prefix: str) -> Tensors:
    """Full attention. With an output gate the query projection has the gate's rows beside the query's."""
    hidden, heads, kv = config.hidden_size, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    yield prefix + "self_attn.q_proj.weight", (heads * (2 if config.attention_output_gate else 1), hidden)
    yield prefix + "self_attn.k_proj.weight", (kv, hidden)
    yield prefix + "self_attn.v_proj.weight", (kv, hidden)
    yield prefix + "self_attn.o_proj.weight", (hidden, heads)
    yield prefix + "self_attn.q_norm.weight", (config.head_dim,)
    yield prefix + "self_attn.k_norm.weight", (config.head_dim,)


def deltanet_state(config: ModelConfig, prefix: str) -> Tensors:
    """Everything of DeltaNet but the projections that read the hidden states."""
    key, value = config.linear_key_size, config.linear_value_size
    yield prefix + "linear_attn.conv1d.weight", (2 * key + value, 1, config.conv_kernel)
    yield prefix + "linear_attn.A_log", (config.linear_num_value_heads,)
    yield prefix + "linear_attn.dt_bias", (config.linear_num_value_heads,)
    yield prefix + "linear_attn.norm.weight", (config.linear_value_head_dim,)
    yield prefix + "linear_attn.out_proj.weight", (config.hidden_size, value)


def mlp(prefix: str, hidden: int, width: int) -> Tensors:
    """Gate, up and down projection."""
    yield prefix + "gate_proj.weight", (width, hidden)
    yield prefix + "up_proj.weight", (width, hidden)
    yield prefix + "down_proj.weight", (hidden, width)


def feed_forward(config: ModelConfig, prefix: str, *, has_experts: bool, fused_experts: bool) -> Tensors:
    """The MLP of a decoder layer, or its router, routed experts and shared expert."""
    hidden = config.hidden_size
    if not has_experts:
        yield from mlp(prefix + "mlp.", hidden, config.intermediate_size)
        return
    num, width = config.num_experts, config.moe_intermediate_size
    yield prefix + "mlp.gate.weight", (num, hidden)
    if fused_experts:
        yield prefix + "mlp.experts.gate_up_proj", (num, 2 * width, hidden)
        yield prefix + "mlp.experts.down_proj", (num, hidden, width)
    else:
        for expert in range(num):
            yield from mlp(f"{prefix}mlp.experts.{expert}.", hidden, width)
    yield from mlp(prefix + "mlp.shared_expert.", hidden, config.shared_expert_intermediate_size)
    yield prefix + "mlp.shared_expert_gate.weight", (1, hidden)


def mtp_head(config: ModelConfig, *, has_experts: bool, fused_experts: bool) -> Tensors:
    """The MTP head: a projection of embeddings and hidden states, decoder layers of full attention, three norms. Names
    follow vLLM's qwen3_5_mtp.py and qwen3_next_mtp.py, since transformers has no module for them."""
    yield "mtp.fc.weight", (config.hidden_size, 2 * config.hidden_size)
    for layer in range(config.num_mtp_layers):
        prefix = f"mtp.layers.{layer}."
        yield from norms(config, prefix)
        yield from attention(config, prefix)
        yield from feed_forward(config, prefix, has_experts=has_experts, fused_experts=fused_experts)
    for norm in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        yield f"mtp.{norm}.weight", (config.hidden_size,)
