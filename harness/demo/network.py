"""The demo checkpoints: their shapes, the MTP head that transformers lacks, the files they are written as.

The model is `Qwen3_5ForConditionalGeneration` as transformers has it: eight layers, three DeltaNet layers to
one of full attention, with every width that NVFP4 kernels will see a multiple of 128, and DeltaNet heads of
64 because vLLM's CPU kernels take none smaller. Attention and recurrence run in both engines unchanged.

The multi-token-prediction head is not in transformers; `MtpHead` is it, with the semantics vLLM runs: at
position t it reads the embedding of token t+1 and the trunk's hidden state of t *after the final norm*, each
through a norm of its own, embedding first, and predicts token t+2 through one full-attention layer, a norm
and the shared `lm_head`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn
from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration, Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import (
    Qwen3_5DecoderLayer,
    Qwen3_5GatedDeltaNet,
    Qwen3_5RMSNorm,
)

from harness.demo import tokenizer

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


def build(config: dict[str, Any]) -> Qwen3_5ForConditionalGeneration:
    """A freshly initialized model in float32; seed torch before."""
    model: Qwen3_5ForConditionalGeneration = Qwen3_5ForConditionalGeneration(Qwen3_5Config(**config))  # type: ignore[no-untyped-call]
    nn.Module.to(model, torch.float32)
    mixers = [module for module in model.modules() if isinstance(module, Qwen3_5GatedDeltaNet)]
    for index, mixer in enumerate(mixers):
        _start_by_looking_up(mixer, distance=1 + index % 3)
    return model


@torch.no_grad()
def _start_by_looking_up(mixer: Qwen3_5GatedDeltaNet, distance: int) -> None:
    """Initialize a DeltaNet layer as the associative memory that it can be.

    Its state maps keys to values. Let the key of a position be the token `distance` before it, its value the
    token itself, and the query one token less far back, in the same projection as the key: then what the
    state answers is what followed the last time, and lists can be looked up from the first step. From random
    filters a model of this size does not find that out in the time a CPU has: after 2.5 M tokens it had not.
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


def spread_channels(weights: dict[str, torch.Tensor], config: dict[str, Any], seed: int) -> None:
    """Gives hidden channels unequal magnitudes, in place, without changing a bit of what the model computes.

    In large models a few channels are much larger than their neighbours, and a block of 16 weights pays for its
    largest one; a small model trained for minutes has no such channels, and 4-bit weights cost it next to nothing. So
    every channel between `up_proj` and `down_proj`, and between `v_proj` and `o_proj`, is scaled by 1/2, 1 or 2 on one
    side and by the inverse on the other. Both pairs are linear in the channel, and powers of two are exact in BF16.
    `weights` are those of the text model and may carry any prefix.
    """
    text = config["text_config"]
    num_kv_heads, head_dim = text["num_key_value_heads"], text["head_dim"]
    num_groups = text["num_attention_heads"] // num_kv_heads
    generator = torch.Generator().manual_seed(seed)

    def factors(*shape: int) -> torch.Tensor:
        return 2.0 ** torch.randint(-1, 2, shape, generator=generator)

    (prefix,) = {name[: name.index("layers.0.")] for name in weights if name.endswith("layers.0.mlp.up_proj.weight")}
    for layer in range(text["num_hidden_layers"]):
        names = f"{prefix}layers.{layer}."
        channels = factors(text["intermediate_size"])
        weights[f"{names}mlp.up_proj.weight"].div_(channels[:, None])
        weights[f"{names}mlp.down_proj.weight"].mul_(channels)
        if f"{names}self_attn.v_proj.weight" in weights:
            channels = factors(num_kv_heads, head_dim)
            weights[f"{names}self_attn.v_proj.weight"].div_(channels.view(-1, 1))
            # Each key-value head serves several query heads, which lie side by side.
            weights[f"{names}self_attn.o_proj.weight"].mul_(channels.repeat_interleave(num_groups, 0).view(-1))


class MtpHead(nn.Module):
    """Predicts the token after next; parameter names are the checkpoint's without `mtp.`."""

    def __init__(self, config: Qwen3_5TextConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.pre_fc_norm_embedding = Qwen3_5RMSNorm(width, eps=eps)
        self.pre_fc_norm_hidden = Qwen3_5RMSNorm(width, eps=eps)
        self.fc = nn.Linear(2 * width, width, bias=False)
        self.layers = nn.ModuleList([Qwen3_5DecoderLayer(config, layer_idx=FULL_ATTENTION_INTERVAL - 1)])
        self.norm = Qwen3_5RMSNorm(width, eps=eps)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=config.initializer_range)

    def forward(
        self, next_embeddings: torch.Tensor, hidden: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """Embeddings of tokens t+1, hidden states of t, [batch, time, width]: states for `lm_head`."""
        joined = [self.pre_fc_norm_embedding(next_embeddings), self.pre_fc_norm_hidden(hidden)]
        state = self.fc(torch.cat(joined, dim=-1))
        for layer in self.layers:
            state = layer(state, position_embeddings=rotary, attention_mask=None)
        normed: torch.Tensor = self.norm(state)
        return normed


def draft(net: Qwen3_5ForConditionalGeneration, mtp: MtpHead, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
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
    net: Qwen3_5ForConditionalGeneration,
    mtp: MtpHead,
    config: dict[str, Any],
    encoder: Tokenizer,
) -> None:
    """Every file of a published checkpoint: BF16 weights in two shards of equal size, configs, tokenizer."""
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
    tokenizer.write(encoder, directory)


def read_mtp(directory: Path, config: Qwen3_5TextConfig) -> MtpHead:
    """The head of a written checkpoint, in float32."""
    state = {}
    for shard in sorted(directory.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith("mtp.")]  # noqa: SIM118 (not a dict)
            state.update({name.removeprefix("mtp."): file.get_tensor(name) for name in names})
    head = MtpHead(config)
    head.load_state_dict(state)
    return head.float()
