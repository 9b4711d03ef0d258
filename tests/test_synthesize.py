"""Synthesized checkpoints: reproducible, of the configuration's shapes, and openable like any other."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

from harness.demo import synthesize as synthesize_module
from harness.demo.synthesize import synthesize
from harness.errors import UserError
from harness.model.checkpoint import inspect_checkpoint, open_checkpoint
from harness.model.families import parse_config
from harness.model.family import expected_tensors
from tests.conftest import published_config, tiny_config


def make(folder: Path, config: dict[str, Any] | None = None, seed: int = 0, **cuts: int | None) -> Path:
    config = config or tiny_config("qwen3.5-9b")
    arguments: dict[str, Any] = {"num_layers": None, "vocab_size": None, **cuts}
    synthesize(config, folder, seed=seed, progress=lambda *_: None, **arguments)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("model", ["qwen3.5-9b", "qwen3.6-35b-a3b"])
def test_a_synthesized_checkpoint_opens_with_every_tensor_of_its_configuration_in_bf16(
    tmp_path: Path, model: str
) -> None:
    config = tiny_config(model)
    opened, problems = inspect_checkpoint(make(tmp_path / "new", config))
    assert problems == []
    assert opened.config == config
    assert {entry.dtype for entry in opened.tensors.values()} == {"BF16"}
    expected = dict(expected_tensors(parse_config(config, "here"), with_mtp=True))
    assert {name: entry.shape for name, entry in opened.tensors.items()} == expected


def test_the_same_seed_gives_the_same_bytes_and_another_seed_gives_others(tmp_path: Path) -> None:
    one, again, other = (contents(make(tmp_path / name, seed=seed)) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert one == again
    assert {name for name in one if one[name] != other[name]} == {"model-00001-of-00001.safetensors"}


def test_layers_and_vocabulary_are_cut_to_what_was_asked_and_the_configuration_says_so(tmp_path: Path) -> None:
    config = tiny_config("qwen3.5-9b")
    config["text_config"]["layer_types"] = ["linear_attention"] * 3 + ["full_attention"]
    opened = open_checkpoint(make(tmp_path / "cut", config, num_layers=2, vocab_size=48))
    parsed = parse_config(opened.config, "here")
    assert (parsed.num_layers, parsed.vocab_size, parsed.full_attention_layers) == (2, 48, ())
    assert opened.tensors["lm_head.weight"].shape == opened.tensors["model.language_model.embed_tokens.weight"].shape
    assert opened.tensors["lm_head.weight"].shape == (48, 64)
    assert not [name for name in opened.tensors if ".language_model.layers.2." in name]
    assert AutoConfig.for_model(**opened.config).text_config.layer_types == ["linear_attention"] * 2
    assert config["text_config"]["num_hidden_layers"] == 4


def test_a_cut_model_has_a_processor_and_token_ids_that_its_tokenizer_knows(tmp_path: Path) -> None:
    config = published_config("qwen3.5-9b")
    config["text_config"] |= {"hidden_size": 64, "intermediate_size": 96}
    config["vision_config"] |= {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64}
    made = open_checkpoint(make(tmp_path / "cut", config, num_layers=1, vocab_size=1024)).config
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "cut")
    assert made["image_token_id"] == tokenizer.convert_tokens_to_ids("<|image_pad|>") < 1024
    assert made["video_token_id"] == tokenizer.convert_tokens_to_ids("<|video_pad|>") < 1024
    processor = json.loads((tmp_path / "cut" / "preprocessor_config.json").read_text())
    assert processor["patch_size"] == made["vision_config"]["patch_size"]
    assert config["image_token_id"] == 248056


def test_weights_are_finite_and_of_a_trained_models_magnitude(tmp_path: Path) -> None:
    opened = open_checkpoint(make(tmp_path / "new"))
    for name in opened.tensors:
        assert opened.tensor(name).isfinite().all(), name
    weight = opened.tensor("model.language_model.layers.0.mlp.gate_proj.weight").float()
    assert weight.std().item() == pytest.approx(64**-0.5, rel=0.05)


def test_a_large_model_is_split_into_shards_that_its_index_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load_file(make(tmp_path / "whole") / "model-00001-of-00001.safetensors")
    monkeypatch.setattr(synthesize_module, "_SHARD_BYTES", 100_000)
    opened = open_checkpoint(make(tmp_path / "split"))
    assert len(opened.shards) > 2
    assert list(opened.shards) == [
        f"model-{n + 1:05}-of-{len(opened.shards):05}.safetensors" for n in range(len(opened.shards))
    ]
    for shard in opened.shards:
        tensors = load_file(tmp_path / "split" / shard)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 100_000
        assert all(torch.equal(tensor, whole[name]) for name, tensor in tensors.items())
    index = json.loads((tmp_path / "split" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())


def test_progress_ends_at_the_bytes_that_are_returned(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    total = synthesize(
        tiny_config("qwen3.5-9b"),
        tmp_path / "new",
        num_layers=None,
        vocab_size=None,
        seed=0,
        progress=lambda done, total, _: calls.append((done, total)),
    )
    assert calls == sorted(calls)
    assert calls[-1] == (total, total)


def test_an_existing_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("precious")
    with pytest.raises(UserError, match="mine exists"):
        make(tmp_path / "mine")
    assert contents(tmp_path / "mine") == {"file": b"precious"}
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_an_unknown_architecture_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="which this harness does not know"):
        make(tmp_path / "new", {"architectures": ["LlamaForCausalLM"]})
    assert list(tmp_path.iterdir()) == []
