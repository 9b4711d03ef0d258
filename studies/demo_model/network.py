"""The embedded checkpoints: their shapes, the MTP head that transformers lacks, and the files of a checkpoint.

The dense model is `Qwen3_5ForConditionalGeneration` as transformers has it. It has eight layers, three DeltaNet layers
to one of full attention. Every width that NVFP4 kernels see is a multiple of 128, and DeltaNet heads are 64 wide
because vLLM's CPU kernels take no smaller heads. Attention and recurrence run in both engines unchanged.

The MoE model is `Qwen3_5MoeForConditionalGeneration` of the same size: every MLP of 384 channels becomes a shared
expert of 128 and eight routed experts of 32, of which a token takes two. Its training starts from the trained dense
model cut up in this way (`upcycle`), so a short training is enough.

transformers does not have the multi-token-prediction head. `MtpHead` computes what vLLM computes: at position t it
reads the embedding of token t+1 and the trunk's hidden state of t *after the final norm*, each through a norm of its
own, embedding first, and predicts token t+2 through one full-attention layer, a norm and the shared `lm_head`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import nn
from transformers import (
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
)
from transformers.models.qwen3_5.modeling_qwen3_5 import (
    Qwen3_5DecoderLayer,
    Qwen3_5GatedDeltaNet,
    Qwen3_5RMSNorm,
)
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeDecoderLayer

from studies.demo_model import tokenizer

FULL_ATTENTION_INTERVAL = 4
_NUM_LAYERS = 8

DENSE: dict[str, Any] = {
    "architectures": ["Qwen3_5ForConditionalGeneration"],
    "image_token_id": 1018,
    "model_type": "qwen3_5",
    "text_config": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_output_gate": True,
        "dtype": "bfloat16",
        "eos_token_id": 1013,
        "full_attention_interval": FULL_ATTENTION_INTERVAL,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 256,
        "initializer_range": 0.02,
        "intermediate_size": 384,
        "layer_types": [
            "linear_attention" if (i + 1) % FULL_ATTENTION_INTERVAL else "full_attention" for i in range(_NUM_LAYERS)
        ],
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 64,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_value_head_dim": 64,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 16384,
        "model_type": "qwen3_5_text",
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "num_attention_heads": 4,
        "num_hidden_layers": _NUM_LAYERS,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [3, 3, 2],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "rope_type": "default",
        },
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": 1024,
    },
    "tie_word_embeddings": False,
    "video_token_id": 1019,
    "vision_config": {
        "deepstack_visual_indexes": [],
        "depth": 2,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 32,
        "in_channels": 3,
        "initializer_range": 0.02,
        "intermediate_size": 64,
        "model_type": "qwen3_5",
        "num_heads": 2,
        "num_position_embeddings": 256,
        "out_hidden_size": 256,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    "vision_end_token_id": 1017,
    "vision_start_token_id": 1016,
}
"""config.json of the dense demo model, field for field as the published checkpoints write theirs."""


def _is_moe(config: dict[str, Any]) -> bool:
    return "num_experts" in config["text_config"]


def _moe() -> dict[str, Any]:
    config = copy.deepcopy(DENSE)
    config |= {"architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe"}
    text = config["text_config"]
    del text["intermediate_size"]
    text |= {
        "model_type": "qwen3_5_moe_text",
        "moe_intermediate_size": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "shared_expert_intermediate_size": 128,
    }
    config["text_config"] = dict(sorted(text.items()))
    config["vision_config"]["model_type"] = "qwen3_5_moe"
    return config


MOE = _moe()
"""config.json of the MoE demo model."""

CONFIGS = {"dense": DENSE, "moe": MOE}

Network = Qwen3_5ForConditionalGeneration | Qwen3_5MoeForConditionalGeneration
TextConfig = Qwen3_5TextConfig | Qwen3_5MoeTextConfig


def new_network(config: dict[str, Any]) -> Network:
    """A freshly initialized model in float32; seed torch before the call."""
    model_class: Any = Qwen3_5MoeForConditionalGeneration if _is_moe(config) else Qwen3_5ForConditionalGeneration
    model: Network = model_class((Qwen3_5MoeConfig if _is_moe(config) else Qwen3_5Config)(**config))
    nn.Module.to(model, torch.float32)
    mixers = [module for module in model.modules() if isinstance(module, Qwen3_5GatedDeltaNet)]
    for index, mixer in enumerate(mixers):
        _start_by_looking_up(mixer, distance=1 + index % 3)
    return model


@torch.no_grad()
def _start_by_looking_up(mixer: Qwen3_5GatedDeltaNet, distance: int) -> None:
    """Initializes a DeltaNet layer as an associative memory.

    The state of the layer maps keys to values. Let the key of a position be the token `distance` before it, its value
    the token itself, and the query the token one place nearer, in the same projection as the key. Then the state
    answers with the token that followed the last time, and lists can be looked up from the first step. From random
    filters a model of this size does not learn that in the time that a CPU has: after 2.5 M tokens it had not.
    """
    key_dim = mixer.key_dim
    projection, taps = mixer.in_proj_qkv.weight, mixer.conv1d.weight[:, 0]  # [channel, width], [channel, tap]
    projection[key_dim : 2 * key_dim] = projection[:key_dim]
    taps.normal_(0, 0.1)
    taps[:key_dim, -distance] += 1
    taps[key_dim : 2 * key_dim, -distance - 1] += 1
    taps[2 * key_dim :, -1] += 1
    mixer.A_log.uniform_(1, 8).log_()
    step = torch.empty_like(mixer.dt_bias).uniform_(-6.9, -1.6).exp()  # heads forget over 2 to 1000 tokens
    mixer.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus


@torch.no_grad()
def upcycle(dense: dict[str, torch.Tensor], config: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """The weights of the MoE model of `config`, made by cutting up those of a dense model, MTP head included.

    This is sparse upcycling (arXiv 2212.05055) by splitting instead of copying, so that the size stays. The channels of
    an MLP with the largest weights become the shared expert; the other channels are dealt out to the routed experts.
    The gates of the shared expert and of the two routed experts start at one half, so the output matrices are doubled.
    """
    text = config["text_config"]
    num_experts, shared_width = text["num_experts"], text["shared_expert_intermediate_size"]
    generator = torch.Generator().manual_seed(seed)
    weights = {name: tensor for name, tensor in dense.items() if ".mlp." not in name or "visual" in name}
    for name, gate in dense.items():
        if not name.endswith(".mlp.gate_proj.weight"):
            continue
        prefix = name.removesuffix("gate_proj.weight")
        up, down = dense[f"{prefix}up_proj.weight"], dense[f"{prefix}down_proj.weight"]
        order = (gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)).argsort(descending=True)
        shared, routed = order[:shared_width], order[shared_width:].view(-1, num_experts).T  # [experts, width]
        weights[f"{prefix}shared_expert.gate_proj.weight"] = gate[shared]
        weights[f"{prefix}shared_expert.up_proj.weight"] = up[shared]
        weights[f"{prefix}shared_expert.down_proj.weight"] = 2 * down[:, shared]
        weights[f"{prefix}experts.gate_up_proj"] = torch.cat([gate[routed], up[routed]], dim=1)
        weights[f"{prefix}experts.down_proj"] = 2 * down.T[routed].transpose(1, 2)
        width = text["hidden_size"]
        for router, rows in (("gate", num_experts), ("shared_expert_gate", 1)):
            weights[f"{prefix}{router}.weight"] = 0.02 * torch.randn(rows, width, generator=generator)
    return weights


@torch.no_grad()
def spread_channels(weights: dict[str, torch.Tensor], config: dict[str, Any], seed: int, *, undo: bool = False) -> None:
    """Gives hidden channels unequal magnitudes, in place, without changing a bit of what the model computes.

    In large models a few channels are much larger than their neighbours, and a block of 16 weights pays for its largest
    weight. A small model trained for minutes has no such channels, and 4-bit weights cost it next to nothing. So every
    channel between `up_proj` and `down_proj` (of experts too), and between `v_proj` and `o_proj`, is scaled by 1/2, 1
    or 2 on one side and by the inverse on the other. Both pairs are linear in the channel, and powers of two are exact
    in BF16. `weights` are the text model's, under any prefix. `undo` takes back the scaling by the same seed.
    """
    text = config["text_config"]
    num_kv_heads, head_dim = text["num_key_value_heads"], text["head_dim"]
    num_groups = text["num_attention_heads"] // num_kv_heads
    generator = torch.Generator().manual_seed(seed)

    def factors(*shape: int) -> torch.Tensor:
        exponents = torch.randint(-1, 2, shape, generator=generator)
        return 2.0 ** (-exponents if undo else exponents)

    (prefix,) = {name[: name.index("layers.0.")] for name in weights if "layers.0.mlp." in name}
    for layer in range(text["num_hidden_layers"]):
        names = f"{prefix}layers.{layer}."
        if _is_moe(config):
            channels = factors(text["num_experts"], text["moe_intermediate_size"])
            up = weights[f"{names}mlp.experts.gate_up_proj"][:, text["moe_intermediate_size"] :]
            up.div_(channels[..., None])
            weights[f"{names}mlp.experts.down_proj"].mul_(channels[:, None, :])
        mlp = f"{names}mlp.shared_expert." if _is_moe(config) else f"{names}mlp."
        channels = factors(weights[f"{mlp}up_proj.weight"].shape[0])
        weights[f"{mlp}up_proj.weight"].div_(channels[:, None])
        weights[f"{mlp}down_proj.weight"].mul_(channels)
        if f"{names}self_attn.v_proj.weight" in weights:
            channels = factors(num_kv_heads, head_dim)
            weights[f"{names}self_attn.v_proj.weight"].div_(channels.view(-1, 1))
            # Each key-value head serves several query heads, which lie side by side.
            weights[f"{names}self_attn.o_proj.weight"].mul_(channels.repeat_interleave(num_groups, 0).view(-1))


class MtpHead(nn.Module):
    """Predicts the token after the next; its parameters are named as in the checkpoint, without `mtp.`."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.pre_fc_norm_embedding = Qwen3_5RMSNorm(width, eps=eps)
        self.pre_fc_norm_hidden = Qwen3_5RMSNorm(width, eps=eps)
        self.fc = nn.Linear(2 * width, width, bias=False)
        decoder_layer: Any = Qwen3_5MoeDecoderLayer if isinstance(config, Qwen3_5MoeTextConfig) else Qwen3_5DecoderLayer
        self.layers = nn.ModuleList([decoder_layer(config, layer_idx=FULL_ATTENTION_INTERVAL - 1)])
        self.norm = Qwen3_5RMSNorm(width, eps=eps)
        for parameter in self.parameters():
            if parameter.dim() >= 2:
                nn.init.normal_(parameter, std=config.initializer_range)

    def forward(
        self, next_embeddings: torch.Tensor, hidden: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """States for `lm_head`, of the embeddings of tokens t+1 and hidden states of t, all [batch, time, width]."""
        joined = [self.pre_fc_norm_embedding(next_embeddings), self.pre_fc_norm_hidden(hidden)]
        state = self.fc(torch.cat(joined, dim=-1))
        for layer in self.layers:
            state = layer(state, position_embeddings=rotary, attention_mask=None)
        normed: torch.Tensor = self.norm(state)
        return normed


def draft(net: Network, mtp: MtpHead, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """The head's states [batch, time - 1, width] for `ids` [batch, time] and the trunk's states of them.

    The state at t predicts token t+2, as the trunk's state at t+1 does.
    """
    text = net.model.language_model
    positions = torch.arange(ids.shape[1] - 1).view(1, 1, -1)
    rotary = text.rotary_emb(hidden, positions)
    states: torch.Tensor = mtp(text.embed_tokens(ids[:, 1:]), hidden[:, :-1], rotary)
    return states


GENERATION_CONFIG: dict[str, Any] = {
    "bos_token_id": 1013,
    "do_sample": True,
    "eos_token_id": [1015, 1013],
    "pad_token_id": 1013,
    "temperature": 1.0,
    "top_k": 20,
    "top_p": 0.95,
}
_VISION_INPUT: dict[str, Any] = {
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "merge_size": 2,
    "patch_size": 16,
    "processor_class": "Qwen3VLProcessor",
    "size": {"longest_edge": 262144, "shortest_edge": 4096},
    "temporal_patch_size": 2,
}


def write_checkpoint(
    directory: Path,
    net: Network,
    mtp: MtpHead,
    config: dict[str, Any],
    encoder: Tokenizer,
) -> None:
    """Writes every file of a published checkpoint: BF16 weights in two shards of equal size, configs, tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = dict(net.state_dict()) | {f"mtp.{name}": tensor for name, tensor in mtp.state_dict().items()}
    tensors = {name: tensors[name].detach().to(torch.bfloat16).contiguous() for name in sorted(tensors)}
    total = sum(tensor.nbytes for tensor in tensors.values())
    shards: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] = ({}, {})
    written = 0
    for name, tensor in tensors.items():
        shards[2 * written >= total][name] = tensor
        written += tensor.nbytes
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    tokenizer.write_json(
        directory / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": weight_map},
    )
    tokenizer.write_json(directory / "config.json", config)
    tokenizer.write_json(directory / "generation_config.json", GENERATION_CONFIG)
    images = _VISION_INPUT | {"image_processor_type": "Qwen2VLImageProcessorFast"}
    tokenizer.write_json(directory / "preprocessor_config.json", images)
    videos = _VISION_INPUT | {"video_processor_type": "Qwen3VLVideoProcessor"}
    tokenizer.write_json(directory / "video_preprocessor_config.json", videos)
    tokenizer.write_tokenizer(encoder, directory)


def read_mtp(directory: Path, config: TextConfig) -> MtpHead:
    """The MTP head of a written checkpoint, in float32."""
    state = {
        name.removeprefix("mtp."): tensor for name, tensor in read_weights(directory).items() if name.startswith("mtp.")
    }
    head = MtpHead(config)
    head.load_state_dict(state)
    return head.float()


def read_weights(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a written checkpoint by name, as they are stored."""
    weights = {}
    for shard in sorted(directory.glob("*.safetensors")):
        weights.update(load_file(shard))
    return weights
