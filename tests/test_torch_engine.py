"""The torch engine against transformers' own loss and generation, and against compressed-tensors' own decompression."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationStatus,
    apply_quantization_config,
    preset_name_to_scheme,
)
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
)

from harness.engines import torch_engine
from harness.engines.protocol import Engine, open_engine
from harness.errors import UserError
from harness.measure import perplexity

VOCABULARY = 256
TEXT_CONFIG = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,  # three linear attention layers, one full attention layer
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}


def _random_model(model_class: Any, config: Any) -> Any:
    torch.manual_seed(0)
    model = model_class(config)
    for parameter in model.parameters():
        # Far from the initialization, so that its logits differ enough for greedy decoding to be unambiguous.
        if parameter.ndim == 2:
            parameter.data.normal_(0, 0.15)
    return model.to(torch.bfloat16)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint in the published layout, vision tower and an `mtp.*` tensor included, BF16."""
    folder = tmp_path_factory.mktemp("plain")
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 64,
        "num_position_embeddings": 16,
        "patch_size": 4,
    }
    config = Qwen3_5Config(text_config=TEXT_CONFIG, vision_config=vision)
    _random_model(Qwen3_5ForConditionalGeneration, config).save_pretrained(folder)
    _rewrite(folder, lambda tensors: tensors.update({"mtp.fc.weight": torch.ones(2, 2, dtype=torch.bfloat16)}))
    return folder


def _quantize(source: Path, folder: Path, preset: str) -> Path:
    """An NVFP4 checkpoint made by compressed-tensors' own quantizer and compressor."""
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.bfloat16)
    config = QuantizationConfig(
        config_groups={"group_0": preset_name_to_scheme(preset, ["Linear"])},
        ignore=["lm_head", "re:.*visual.*", "re:.*in_proj_[ab]$"],
        format="nvfp4-pack-quantized",
    )
    apply_quantization_config(model, config)
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            weight = module.weight.data.float()
            divisor = (448 * 6 / weight.abs().max()).reshape(1)
            blocks = weight.reshape(len(weight), -1, 16).abs().amax(-1)
            module.weight_global_scale.data = divisor
            module.weight_scale.data = (divisor * blocks / 6).to(torch.float8_e4m3fn).float()
            if preset == "NVFP4":
                module.input_global_scale.data = torch.tensor([300.0])
            module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    return folder


@pytest.fixture(scope="module")
def a16(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _quantize(plain, tmp_path_factory.mktemp("a16"), "NVFP4A16")


@pytest.fixture(scope="module")
def w4a4(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _quantize(plain, tmp_path_factory.mktemp("w4a4"), "NVFP4")


@pytest.fixture(scope="module")
def dequantized(a16: Path, plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The BF16 checkpoint that holds what compressed-tensors decodes from the 4-bit one, tensor by tensor."""
    folder = tmp_path_factory.mktemp("dequantized")
    shutil.copytree(plain, folder, dirs_exist_ok=True)
    scheme = preset_name_to_scheme("NVFP4A16", ["Linear"])
    packed = load_file(a16 / "model.safetensors")
    tensors = {key: value for key, value in packed.items() if not key.endswith(("_packed", "_scale"))}
    for key in packed:
        if key.endswith(".weight_packed"):
            stem = key.removesuffix("weight_packed")
            parts = {name: packed[stem + name] for name in ("weight_packed", "weight_scale", "weight_global_scale")}
            tensors[stem + "weight"] = NVFP4PackedCompressor.decompress(parts, scheme)["weight"].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _rewrite(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _windows(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture
def engine(plain: Path) -> Iterator[Engine]:
    opened = open_engine("torch", plain, dtype="float32", device="cpu")
    yield opened
    opened.close()


def _reference(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()


def test_scores_equal_transformers_own_loss(engine: Engine, plain: Path) -> None:
    model = _reference(plain)
    windows = _windows(130, 130, 7, 2)
    for ids, log_probs in zip(windows, engine.score(windows, batch_size=2), strict=True):
        row = torch.tensor([ids])
        with torch.no_grad():
            loss = model(input_ids=row, labels=row).loss.item()
        assert -log_probs.mean() == pytest.approx(loss, rel=1e-5)


def test_scores_equal_a_full_log_softmax_token_by_token(engine: Engine, plain: Path) -> None:
    model = _reference(plain)
    (ids,) = _windows(100)
    with torch.no_grad():
        table = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), dim=-1)
    expected = [table[position - 1, ids[position]].item() for position in range(1, 100)]
    np.testing.assert_allclose(next(engine.score([ids], 1)), expected, atol=1e-4)


def test_bf16_scores_have_float32_logits(plain: Path) -> None:
    model = _reference(plain, torch.bfloat16)
    (ids,) = _windows(100)
    with torch.no_grad():
        hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        table = torch.log_softmax(hidden.double() @ model.lm_head.weight.double().T, dim=-1)
    expected = [table[position - 1, ids[position]].item() for position in range(1, 100)]
    scores = next(open_engine("torch", plain, device="cpu").score([ids], 1))
    np.testing.assert_allclose(scores, expected, atol=1e-4)


def test_cutting_the_logits_into_pieces_changes_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = _windows(40, 40, 40)
    whole = np.concatenate(list(engine.score(windows, 3)))
    monkeypatch.setattr(torch_engine, "LOGITS_BYTES", 7 * 4 * VOCABULARY)  # seven tokens at once
    np.testing.assert_allclose(np.concatenate(list(engine.score(windows, 3))), whole, atol=1e-5)


def test_batching_changes_neither_order_nor_numbers(engine: Engine) -> None:
    windows = _windows(70, 70, 70, 20, 70, 1, 33, 33)
    alone = [next(engine.score([window], 1)) for window in windows]
    for batch_size in (1, 2, 5, 100):
        together = list(engine.score(windows, batch_size))
        assert [len(row) for row in together] == [69, 69, 69, 19, 69, 0, 32, 32]
        for one, other in zip(alone, together, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4)


def test_the_same_call_gives_the_same_bits(engine: Engine) -> None:
    windows = _windows(70, 70)
    for one, other in zip(engine.score(windows, 2), engine.score(windows, 2), strict=True):
        assert one.tobytes() == other.tobytes()


def test_a_later_token_changes_no_earlier_score(engine: Engine) -> None:
    (ids,) = _windows(80)
    changed = [*ids[:60], *reversed(ids[60:])]
    one, other = next(engine.score([ids], 1)), next(engine.score([changed], 1))
    np.testing.assert_allclose(one[:59], other[:59], atol=1e-5)


def test_decoding_equals_transformers_greedy_generation(engine: Engine, plain: Path) -> None:
    prompts = _windows(90, 90, 90)
    decoded = engine.decode(prompts, 20)
    with torch.no_grad():
        generated = _reference(plain).generate(
            torch.tensor(prompts), do_sample=False, max_new_tokens=20, eos_token_id=None, pad_token_id=0
        )
    assert [list(row) for row in decoded.token_ids] == generated[:, 90:].tolist()
    assert len(decoded.step_seconds) == 19
    assert min(decoded.prefill_seconds, *decoded.step_seconds) > 0


def test_decoding_equals_repeated_full_forwards_without_a_cache(engine: Engine, plain: Path) -> None:
    model = _reference(plain)
    (ids,) = _windows(10)
    decoded = engine.decode([ids], 6)
    for token in decoded.token_ids[0]:
        with torch.no_grad():
            assert model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax() == token
        ids.append(token)


def test_decoding_does_not_stop_at_the_end_of_text_token(plain: Path, tmp_path: Path) -> None:
    (ids,) = _windows(30)
    first = open_engine("torch", plain, device="cpu").decode([ids], 1).token_ids[0][0]
    shutil.copytree(plain, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["eos_token_id"] = first
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": first}))
    decoded = open_engine("torch", tmp_path, device="cpu").decode([ids], 5)
    assert decoded.token_ids[0][0] == first
    assert len(decoded.token_ids[0]) == 5


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_nvfp4_checkpoint_scores_as_a_plain_model_with_its_decoded_weights(
    a16: Path, dequantized: Path, plain: Path, dtype: str
) -> None:
    windows = _windows(70, 70)
    quantized, decoded, source = (
        np.concatenate(list(open_engine("torch", folder, dtype=dtype, device="cpu").score(windows, 2)))
        for folder in (a16, dequantized, plain)
    )
    np.testing.assert_array_equal(quantized, decoded)
    assert np.abs(quantized - source).max() > 0.01  # and it is not the source that was measured


def test_w4a4_activations_are_quantized_in_every_forward(w4a4: Path, a16: Path) -> None:
    windows = _windows(70)
    # transformers' default path: packed weights, decompressed by a hook in the first forward.
    model = _reference(w4a4, torch.bfloat16)
    engine = open_engine("torch", w4a4, device="cpu")
    row = torch.tensor(windows)
    for _ in range(2):
        with torch.no_grad():
            logits = model(input_ids=row).logits.double()
        table = torch.log_softmax(logits[0], dim=-1)
        expected = table[:-1].gather(1, row[0, 1:, None]).squeeze(1).numpy()
        np.testing.assert_allclose(next(engine.score(windows, 1)), expected, atol=0.1)  # BF16 logits there
    weights_only = next(open_engine("torch", a16, device="cpu").score(windows, 1))
    assert np.abs(next(engine.score(windows, 1)) - weights_only).max() > 0.2
    assert "4-bit float activations emulated" in engine.info.kernels["mlp.down_proj"]


def test_a_text_only_checkpoint_loads_too(tmp_path: Path) -> None:
    config = Qwen3_5Config(text_config=TEXT_CONFIG).text_config
    _random_model(Qwen3_5ForCausalLM, config).save_pretrained(tmp_path)
    engine = open_engine("torch", tmp_path, device="cpu")
    assert engine.info.effective["model_class"] == "Qwen3_5ForCausalLM"
    assert len(next(engine.score(_windows(9), 1))) == 8


def test_info_states_bytes_and_kernels(plain: Path, a16: Path) -> None:
    tensors = load_file(plain / "model.safetensors")
    info = open_engine("torch", plain, device="cpu").info
    text = [v.nbytes for k, v in tensors.items() if k.startswith(("model.language_model.layers", "lm_head"))]
    norm, row = 64 * 2, 64 * 2
    assert info.effective["weight_bytes_per_token"] == sum(text) + norm + row
    file_bytes = sum(v.nbytes for k, v in tensors.items() if not k.startswith("mtp."))
    # What is resident beyond the file are small computed buffers, such as rotary frequencies.
    assert 0 <= info.effective["weight_bytes_resident"] - file_bytes < 1000
    assert info.kernels["mlp.down_proj"] == "bfloat16 F.linear"
    quantized = open_engine("torch", a16, device="cpu").info
    assert quantized.kernels["mlp.down_proj"].startswith("4-bit float weights, compressed-tensors decompress")
    assert quantized.kernels["linear_attn.in_proj_b"] == "bfloat16 F.linear"
    # A decode step reads decompressed weights: just what the source's does.
    assert quantized.effective["weight_bytes_per_token"] == info.effective["weight_bytes_per_token"]
    assert json.loads(json.dumps(info.as_dict())) == info.as_dict()


def test_the_peak_of_memory_covers_the_weights(engine: Engine) -> None:
    memory = engine.memory()
    assert memory.peak_rss_bytes is not None
    assert memory.peak_rss_bytes > engine.info.effective["weight_bytes_resident"]
    assert memory.peak_vram_bytes is None


def test_the_users_thread_count_is_kept(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda _: pytest.fail("changed the number of threads"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert open_engine("torch", plain, device="cpu").info.effective["threads"] == torch.get_num_threads()


def test_loading_and_scoring_write_nothing(w4a4: Path, capfd: pytest.CaptureFixture[str]) -> None:
    next(open_engine("torch", w4a4, device="cpu").score(_windows(9), 1))
    assert capfd.readouterr() == ("", "")


def _damage_missing(folder: Path) -> None:
    _rewrite(folder, lambda t: t.pop("model.language_model.layers.1.mlp.up_proj.weight"))


def _damage_extra(folder: Path) -> None:
    _rewrite(folder, lambda t: t.update({"model.language_model.layers.9.extra.weight": torch.ones(2)}))


def _damage_shape(folder: Path) -> None:
    _rewrite(folder, lambda t: t.update({"lm_head.weight": torch.ones(VOCABULARY, 32, dtype=torch.bfloat16)}))


def _damage_truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def _damage_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def _damage_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _damage_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def _damage_architecture(folder: Path) -> None:
    _change_config(folder, model_type="nobody_knows", architectures=["Nobody"])


def _damage_quantization(folder: Path) -> None:
    _change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})


def _damage_shards(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    tensors = {"lm_head.weight": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": tensors}))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_damage_missing, "lacks model.language_model.layers.1.mlp.up_proj.weight"),
        (_damage_extra, "no place for: model.language_model.layers.9.extra.weight"),
        (_damage_shape, "wrong shape for lm_head.weight"),
        (_damage_truncated, "cannot load"),
        (_damage_pickle, "no safetensors weights"),
        (_damage_no_config, "no config.json"),
        (_damage_json, "no configuration that transformers"),
        (_damage_architecture, "nobody_knows"),
        (_damage_quantization, "quant_method 'gptq'"),
        (_damage_shards, "cannot load"),
    ],
)
def test_a_damaged_checkpoint_is_the_users_error(plain: Path, tmp_path: Path, damage: Any, says: str) -> None:
    shutil.copytree(plain, tmp_path, dirs_exist_ok=True)
    damage(tmp_path)
    with pytest.raises(UserError) as caught:
        open_engine("torch", tmp_path, device="cpu")
    assert says in caught.value.problem
    assert "\n" not in str(caught.value)


def test_a_missing_scale_of_an_nvfp4_checkpoint_is_the_users_error(a16: Path, tmp_path: Path) -> None:
    shutil.copytree(a16, tmp_path, dirs_exist_ok=True)
    key = "model.language_model.layers.3.self_attn.q_proj.weight_global_scale"
    _rewrite(tmp_path, lambda t: t.pop(key))
    with pytest.raises(UserError, match="lacks " + key):
        open_engine("torch", tmp_path, device="cpu")


def test_a_nan_weight_is_found_and_its_window_named(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path, dirs_exist_ok=True)

    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.language_model.embed_tokens.weight"][7] = torch.nan

    _rewrite(tmp_path, poison)
    ids = [1] * 512 + [2] * 100 + [7] + [2] * 411
    engine = open_engine("torch", tmp_path, device="cpu")
    with pytest.raises(UserError, match="Window 1 has a log-probability of nan"):
        list(perplexity.measure(engine, ids, perplexity.get_protocol("wikitext2-512")))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"name": "tork"}, "Did you mean 'torch'"),
        ({"dtype": "bfloat61"}, "Did you mean 'bfloat16'"),
        ({"device": "tpu"}, "does not know the device"),
    ],
)
def test_an_unknown_engine_dtype_or_device_is_the_users_error(plain: Path, arguments: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        open_engine(**({"name": "torch", "folder": plain} | arguments))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has an accelerator")
def test_an_absent_accelerator_is_the_users_error(plain: Path) -> None:
    with pytest.raises(UserError, match="sees none"):
        open_engine("torch", plain, device="cuda")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_running_out_of_memory_is_the_users_error(engine: Any, error: Exception) -> None:
    def fail(**_: Any) -> None:
        raise error

    engine._trunk = fail
    with pytest.raises(UserError, match=r"2 windows of 9 tokens ran out of memory\. Lower the batch size"):
        list(engine.score(_windows(9, 9), 2))


def test_perplexity_of_a_text_equals_the_loss_of_transformers(engine: Engine, plain: Path) -> None:
    (ids,) = _windows(1300)
    samples = list(perplexity.measure(engine, ids, perplexity.get_protocol("wikitext2-512"), batch_size=2))
    model, nll, scored = _reference(plain), 0.0, 0
    for first in (0, 512, 1024):
        row = torch.tensor([ids[first : first + 512]])
        with torch.no_grad():
            nll += model(input_ids=row, labels=row).loss.item() * (row.shape[1] - 1)
        scored += row.shape[1] - 1
    assert sum(sample["num_scored"] for sample in samples) == scored == 1297
    assert sum(sample["nll_nats"] for sample in samples) == pytest.approx(nll, rel=1e-5)
