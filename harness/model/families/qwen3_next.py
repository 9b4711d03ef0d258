"""Qwen3-Next: `Qwen3NextForCausalLM`, the hybrid of Qwen3.5 without a vision tower.

DeltaNet's `in_proj_qkvz` and `in_proj_ba` are stored fused, their rows interleaved by key head, and vLLM takes them as
they are. Experts lie one by one, and some layers may have an MLP. `config.json` need not count the layers of the MTP
head: vLLM takes one then. Names and shapes follow transformers' modeling_qwen3_next.py and vLLM 0.32's qwen3_next.py.
"""

from collections.abc import Mapping
from typing import Any

from harness.errors import UserError
from harness.model.families import deltanet
from harness.model.families.deltanet import number
from harness.model.family import Family, Layout, ModelConfig, Modeling, Tensors

_TEXT = "model."
_MTP_KEY = "num_nextn_predict_layers"

_ROLES = (
    deltanet.MTP,
    deltanet.HEAD,
    deltanet.EMBEDDING,
    deltanet.NORM,
    *deltanet.ATTENTION,
    deltanet.deltanet("in_proj_qkvz.weight", r"re:.*linear_attn\.in_proj_qkvz$", quantizable=True),
    # Kept, as the two projections of Qwen3.5 that it consists of are.
    deltanet.deltanet("in_proj_ba.weight", r"re:.*linear_attn\.in_proj_ba$"),
    *deltanet.DELTANET_OUTPUT,
    *deltanet.MLP,
    *deltanet.EXPERTS,
)


def _read_config(config: Mapping[str, Any], where: str) -> ModelConfig:
    section = f"{where}: "
    has_experts = config.get("num_experts") != 0
    numbers = deltanet.hybrid_numbers(config, section, has_experts=has_experts)
    step = number(config, "decoder_sparse_step", section) if "decoder_sparse_step" in config else 1
    listed = config.get("mlp_only_layers") or []
    if not isinstance(listed, list) or not all(type(layer) is int for layer in listed):
        raise UserError(
            f"{section}mlp_only_layers is {listed!r}, not a list of layers.", "Compare it with the model's source."
        )
    dense = frozenset(layer for layer in range(numbers["num_layers"]) if layer in listed or (layer + 1) % step)
    return ModelConfig(
        family=FAMILY,
        architecture=config["architectures"][0],
        **numbers,
        attention_output_gate=True,
        intermediate_size=number(config, "intermediate_size", section) if dense or not has_experts else 0,
        num_mtp_layers=number(config, _MTP_KEY, section, 0) if _MTP_KEY in config else 1,
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        vision=None,
        dense_layers=dense if has_experts else frozenset(),
        states_mtp=_MTP_KEY in config,
    )


def _tensors(config: ModelConfig, layout: Layout, with_mtp: bool) -> Tensors:
    yield from deltanet.trunk(config, layout, _projections)
    if with_mtp:
        # vLLM numbers the head's layers from 0 and gives layer 0 what layer 0 of the trunk would have.
        yield from deltanet.mtp_head(config, has_experts=config.has_experts(0), fused_experts=layout.fused_mtp_experts)


def _projections(config: ModelConfig, prefix: str) -> Tensors:
    key, value = config.linear_key_size, config.linear_value_size
    yield prefix + "linear_attn.in_proj_qkvz.weight", (2 * key + 2 * value, config.hidden_size)
    yield prefix + "linear_attn.in_proj_ba.weight", (2 * config.linear_num_value_heads, config.hidden_size)


FAMILY = Family(
    name="Qwen3-Next",
    modeling={
        "Qwen3NextForCausalLM": Modeling(
            "transformers.models.qwen3_next.modeling_qwen3_next",
            "Qwen3NextDecoderLayer",
            "Qwen3NextRotaryEmbedding",
            0,
        )
    },
    roles=_ROLES,
    published=Layout(_TEXT, fused_experts=False, fused_mtp_experts=False),
    parts={"mtp": "mtp."},
    embedding="embed_tokens",
    head="lm_head",
    experts=deltanet.EXPERT_NAMES,
    layer=deltanet.LAYER_NAMES,
    engine_attention=("self_attn.attn", "attn.attn"),
    read_config=_read_config,
    tensors=_tensors,
)
