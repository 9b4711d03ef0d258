"""Tiny models in the published layout: configurations cut down from the real ones, and checkpoints of them.

`tiny_config` keeps every kind of layer that the published model has and shrinks its widths. The checkpoints are
written by safetensors itself, over three shards in turn, so that the layers a group fuses lie in different files.
"""

import json
import signal
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from safetensors.torch import load_file, save_file

from harness.demo.synthesize import synthesize
from harness.model.census import SourceTensor, source_tensors
from harness.model.checkpoint import INDEX, index_json
from harness.model.families import parse_config
from harness.model.family import ModelConfig, expected_tensors
from harness.report import figure_data, plots

DATA = Path(__file__).parent / "data"
NUM_SHARDS = 3

# A busy machine is no bug: examples may take as long as they need.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

BESIDE_THE_WEIGHTS = {
    "tokenizer.json": b'{"version": "1.0",  "model": {}}\n',
    "tokenizer_config.json": b'{\r\n "chat_template": "\xc3\xa9"\r\n}',
    "chat_template.jinja": b"{{ messages }}",
    "merges.txt": bytes(range(256)),
    "preprocessor_config.json": b"{}",
    "generation_config.json": b'{"eos_token_id": [1, 2]}',
}
"""Files that a build must copy unread; their contents are odd on purpose."""


def hear_interruptions() -> None:
    """For a child process: a shell starts background jobs deaf to SIGINT, and their children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def published_config(name: str) -> dict[str, Any]:
    """`config.json` of a published model, from tests/data."""
    return json.loads((DATA / f"{name}.json").read_text())


def tiny_config(name: str) -> dict[str, Any]:
    """A published configuration with its widths cut down: four layers, one of them full attention."""
    config = published_config(name)
    text = config["text_config"]
    text |= {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 4, "head_dim": 32}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    text |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
    text |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    text["rope_parameters"]["mrope_section"] = [2, 1, 1]
    if "num_experts" in text:
        text |= {"num_experts": 4, "num_experts_per_tok": 2}
        text |= {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 48}
    else:
        text["intermediate_size"] = 96
    config["vision_config"] |= {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2}
    config["vision_config"] |= {"out_hidden_size": 64, "num_position_embeddings": 16}
    return config | {key: 300 + n for n, key in enumerate(key for key in config if key.endswith("_token_id"))}


def census(config: dict[str, Any], *, with_mtp: bool = False) -> tuple[ModelConfig, tuple[SourceTensor, ...]]:
    """A configuration and its BF16 tensors."""
    parsed = parse_config(config, "here")
    tensors = expected_tensors(parsed, with_mtp=with_mtp)
    return parsed, source_tensors(parsed.family, ((name, shape, 2 * prod(shape)) for name, shape in tensors))


def write_checkpoint(folder: Path, config: dict[str, Any], seed: int = 0) -> Path:
    """A checkpoint of random weights with an index and `NUM_SHARDS` shards that take the tensors in turn."""
    synthesize(config, folder, num_layers=None, vocab_size=None, seed=seed, progress=lambda *_: None)
    tensors = {}
    for shard in folder.glob("*.safetensors"):
        tensors |= load_file(shard)
        shard.unlink()
    weight_map = {name: f"model-{n % NUM_SHARDS + 1}.safetensors" for n, name in enumerate(sorted(tensors))}
    for shard in set(weight_map.values()):
        members = {name: tensors[name] for name, place in weight_map.items() if place == shard}
        save_file(members, folder / shard, metadata={"format": "pt"})
    (folder / INDEX).write_bytes(index_json(weight_map, sum(tensor.nbytes for tensor in tensors.values())))
    for name, data in BESIDE_THE_WEIGHTS.items():
        (folder / name).write_bytes(data)
    return folder


_drawn: dict[tuple[str, str], dict[str, bytes]] = {}


@pytest.fixture
def drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of pages: a figure of the same data is drawn once in this process. Anew, it has the same bytes."""
    draw_anew = plots.image_files

    def image_files(name: str, plotted: Sequence[Any], draw: Callable[[], Any]) -> dict[str, bytes]:
        key = (name, figure_data.mark_of(plotted))
        if key not in _drawn:
            _drawn[key] = draw_anew(name, plotted, draw)
        return dict(_drawn[key])

    monkeypatch.setattr(plots, "image_files", image_files)


@pytest.fixture(scope="session")
def dense_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny dense checkpoint. Shared by all tests: read it only."""
    return write_checkpoint(tmp_path_factory.mktemp("source") / "dense", tiny_config("qwen3.5-9b"))


@pytest.fixture(scope="session")
def moe_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny mixture-of-experts checkpoint. Shared by all tests: read it only."""
    return write_checkpoint(tmp_path_factory.mktemp("source") / "moe", tiny_config("qwen3.6-35b-a3b"))
