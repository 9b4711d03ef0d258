"""A tiny Qwen3-Next that transformers' own class makes and saves, and what its tests put through it."""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

from harness.demo import checkpoint_path
from harness.quantize.layerwise import CalibrationInput
from harness.quantize.samples import CalibrationSet

VOCABULARY = 1024
"""The embedded models', whose tokenizer the checkpoint gets."""
TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,  # three of DeltaNet, one of full attention
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
    "mlp_only_layers": [1],
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOWS = [torch.randint(3, VOCABULARY, (40,), generator=torch.Generator().manual_seed(n)).tolist() for n in range(2)]


def config_json(**changes: Any) -> dict[str, Any]:
    config = Qwen3NextConfig(**TINY | changes).to_dict()
    return config | {"architectures": ["Qwen3NextForCausalLM"]}


def save_source(folder: Path, **changes: Any) -> Path:
    """As transformers saves it, with the embedded models' tokenizer."""
    torch.manual_seed(0)
    Qwen3NextForCausalLM(Qwen3NextConfig(**TINY | changes)).bfloat16().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint_path("dense") / name, folder)
    return folder


def calibration() -> CalibrationInput:
    samples = tuple(tuple(window) for window in WINDOWS)
    return CalibrationInput(CalibrationSet(samples, {"num_samples": 2}), 64, hidden_bytes=10**8, device="cpu")
