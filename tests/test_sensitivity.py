"""Sensitivities: equal to arithmetic by other hands, with nothing left behind in the model that was measured."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from torch import Tensor, nn

from harness.cli import main
from harness.demo import checkpoint_path
from harness.engines.layers import Batch, Half, HiddenStates, TextModel, batches_of
from harness.engines.loading import load_model
from harness.errors import UserError
from harness.formats.config import FORMATS
from harness.formats.format import Format
from harness.formats.fp8 import FP8_DYNAMIC
from harness.formats.nvfp4 import NVFP4, NVFP4A16
from harness.model.checkpoint import Checkpoint, open_checkpoint
from harness.model.families.qwen35 import FAMILY
from harness.model.sources import census_of
from harness.quantize.layerwise import CalibrationInput
from harness.quantize.samples import CalibrationSet
from harness.quantize.sensitivity import FusedLayers, groups_by_layer, measure_half, measure_sensitivity
from harness.record import store
from tests.artifacts import quiet
from tests.conftest import census, tiny_config

SAMPLES = tuple(tuple((7 * place + 131 * n) % 300 for place in range(length)) for n, length in enumerate((20, 13, 17)))
ATTENTION = ("self_attn.qkv_proj", "self_attn.o_proj")
DELTANET = ("linear_attn.in_proj_qkvz", "linear_attn.out_proj")
MLP = ("mlp.gate_up_proj", "mlp.down_proj")
EXPERTS = tuple(f"mlp.{name}" for name in ("experts.w13", "experts.down_proj"))
SHARED = tuple(f"mlp.shared_expert.{name}" for name in ("gate_up_proj", "down_proj"))
CPU = torch.device("cpu")

SUITE = """
name = "tiny"
title = "A suite"
[source]
location = "demo:dense"
[variants.a16]
recipe = "rtn-a16"
"""
CALIBRATION = """
[[calibration.sources]]
demo = "validation"
samples = 1
max_tokens = 32
"""


def calibration(samples: Sequence[tuple[int, ...]] = SAMPLES, batch_tokens: int = 60) -> CalibrationInput:
    return CalibrationInput(CalibrationSet(tuple(samples), {}), batch_tokens, 10**7, "cpu")


def measured(source: Path, folder: Path, wanted: CalibrationInput | None = None) -> dict[tuple[int, str, str], Any]:
    """Every sample by layer, role and format."""
    folder.mkdir(exist_ok=True)
    found = list(measure_sensitivity(open_checkpoint(source), wanted or calibration(), folder, quiet))
    by_key = {(one["index"], one["role"], one["format"]): one for one in found}
    assert len(by_key) == len(found)
    return by_key


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str, str], Any]:
    return measured(checkpoint_path("dense"), tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def demo_moe(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str, str], Any]:
    return measured(checkpoint_path("moe"), tmp_path_factory.mktemp("moe"))


@pytest.fixture(scope="module")
def trunk() -> Any:
    """The demo model's first four layers as transformers computes them, in float32."""
    trunk = load_model(checkpoint_path("dense"), "float32").model.language_model
    trunk.layers = trunk.layers[:4]
    return trunk


# -- What is measured --------------------------------------------------------------------------------------------


def test_every_layer_group_and_format_is_measured_once(demo: Any, demo_moe: Any) -> None:
    for found, second in ((demo, MLP), (demo_moe, EXPERTS + SHARED)):
        expected = {
            (layer, role, form.name)
            for layer in range(8)
            for role in (ATTENTION if layer in (3, 7) else DELTANET) + second
            for form in FORMATS.values()
        }
        assert set(found) == expected


@pytest.mark.parametrize("error", ["output_error", "layer_error"])
def test_fp8_costs_every_group_less_than_nvfp4_and_rounded_inputs_more(demo: Any, demo_moe: Any, error: str) -> None:
    for found in (demo, demo_moe):
        for layer, role, _ in found:
            fp8, a16, nvfp4 = (found[layer, role, form.name][error] for form in (FP8_DYNAMIC, NVFP4A16, NVFP4))
            assert 0 < 4 * fp8 < a16 < nvfp4 < 0.1, (layer, role)


def test_an_error_of_the_last_projection_arrives_as_it_is(demo: Any) -> None:
    for (_, role, _), sample in demo.items():
        if role in ("self_attn.o_proj", "linear_attn.out_proj", "mlp.down_proj"):
            assert sample["layer_error"] == pytest.approx(sample["output_error"], rel=1e-3)


def test_bytes_are_those_of_the_stored_tensors(demo: Any) -> None:
    config = json.loads((checkpoint_path("dense") / "config.json").read_text())["text_config"]
    width, inner = config["hidden_size"], config["intermediate_size"]
    weights = 2 * inner * width  # gate and up
    fp8, a16, nvfp4 = (demo[0, "mlp.gate_up_proj", form.name] for form in (FP8_DYNAMIC, NVFP4A16, NVFP4))
    assert fp8["num_weights"] == weights
    in_nvfp4 = weights // 2 + weights // 16 + 2 * (4 + 4)
    assert fp8["extra_bytes"] == weights + 2 * 2 * inner - in_nvfp4
    assert a16["extra_bytes"] == -2 * 4  # the two scales of the inputs
    assert nvfp4["extra_bytes"] == 0


def test_rows_that_no_block_divides_are_refused_by_name() -> None:
    config = tiny_config("qwen3.5-9b")
    config["text_config"]["intermediate_size"] = 100
    with pytest.raises(UserError, match=r"mlp\.down_proj\.weight has rows of 100 weights"):
        groups_by_layer(FAMILY, census(config)[1])


# -- Other hands -------------------------------------------------------------------------------------------------


def stored(w: Tensor, form: Format) -> Tensor:
    """A weight by compressed-tensors' rounding under scales written out here."""
    args = QuantizationArgs(**dict(form.weights))
    if form is FP8_DYNAMIC:
        scales = (w.abs().amax(-1, keepdim=True) / 448).bfloat16().float()
        return fake_quantize(w, scales, torch.zeros_like(scales), args)
    global_scale = (448 * 6 / w.abs().max()).reshape(1)
    blocks = w.view(len(w), -1, 16).abs().amax(-1)
    scales = (blocks * global_scale / 6).to(torch.float8_e4m3fn).float()
    return fake_quantize(w, scales, None, args, global_scale=global_scale)


def seen(x: Tensor, form: Format, amax: Tensor) -> Tensor:
    """Inputs `[batch, tokens, in]` as compressed-tensors rounds them when the largest in calibration was `amax`."""
    if form.input_activations is None:
        return x
    args = QuantizationArgs(**dict(form.input_activations))
    global_scale = (448 * 6 / amax).reshape(1) if form is NVFP4 else None
    scales, zeros = compute_dynamic_scales_and_zp(x, args, nn.Identity(), global_scale=global_scale)
    return fake_quantize(x, scales, zeros, args, global_scale=global_scale)


def run(trunk: Any, modules: dict[str, nn.Module]) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """First input and output of each module for every sample, one sample at a time and so without padding."""
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in modules}

    def hook(name: str) -> Any:
        def note(_: nn.Module, arguments: Any, keywords: Any, output: Any) -> None:
            x = arguments[0] if arguments else keywords["hidden_states"]
            calls[name].append((x[0].clone(), (output[0] if isinstance(output, tuple) else output)[0].clone()))

        return note

    handles = [module.register_forward_hook(hook(name), with_kwargs=True) for name, module in modules.items()]
    try:
        with torch.inference_mode():
            for sample in SAMPLES:
                trunk(input_ids=torch.tensor([sample]), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def share(changed: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    a, b = torch.cat(list(changed)).double(), torch.cat(list(exact)).double()
    return float((a - b).square().sum() / b.square().sum())


@pytest.mark.parametrize("form", FORMATS.values())
@pytest.mark.parametrize(
    ("layer", "role", "half", "names"),
    [
        (3, "self_attn.qkv_proj", "self_attn", ("q_proj", "k_proj", "v_proj")),
        (1, "linear_attn.in_proj_qkvz", "linear_attn", ("in_proj_qkv", "in_proj_z")),
        (2, "mlp.gate_up_proj", "mlp", ("gate_proj", "up_proj")),
        (2, "mlp.down_proj", "mlp", ("down_proj",)),
    ],
)
def test_both_errors_equal_arithmetic_in_transformers_own_model(
    demo: Any, trunk: Any, form: Format, layer: int, role: str, half: str, names: tuple[str, ...]
) -> None:
    """Weights and inputs rounded by compressed-tensors, in the whole model, whose first layers know nothing of it."""
    whole = getattr(trunk.layers[layer], half)
    linears: dict[str, nn.Linear] = {name: getattr(whole, name) for name in names}
    before = run(trunk, {"half": whole, **linears})
    inputs = [x for x, _ in before[names[0]]]
    amax = torch.cat(inputs).abs().max()
    originals = [linear.weight for linear in linears.values()]
    together = stored(torch.cat([weight.detach() for weight in originals]), form)  # fused: one global scale
    parts = together.split([len(weight) for weight in originals])
    handles = []
    try:
        for linear, part in zip(linears.values(), parts, strict=True):
            linear.weight = nn.Parameter(part, requires_grad=False)
            handles.append(linear.register_forward_pre_hook(lambda _, x: (seen(x[0], form, amax),)))
        after = run(trunk, {"half": whole, **linears})
    finally:
        for handle in handles:
            handle.remove()
        for linear, weight in zip(linears.values(), originals, strict=True):
            linear.weight = weight
    sample = demo[layer, role, form.name]
    assert sample["layer_error"] == pytest.approx(
        share([y for _, y in after["half"]], [y for _, y in before["half"]]), rel=0.01
    )
    outputs = [[torch.cat([calls[name][n][1] for name in names], -1) for n in range(3)] for calls in (after, before)]
    assert sample["output_error"] == pytest.approx(share(*outputs), rel=0.01)


def test_padding_counts_for_nothing(demo: Any, tmp_path: Path) -> None:
    alone = measured(checkpoint_path("dense"), tmp_path, calibration(batch_tokens=1))
    for key, sample in alone.items():
        assert sample["layer_error"] == pytest.approx(demo[key]["layer_error"], rel=0.02), key
        assert sample["output_error"] == pytest.approx(demo[key]["output_error"], rel=0.02), key


# -- What is left behind -----------------------------------------------------------------------------------------


def parts_of(
    source: Path, folder: Path
) -> tuple[TextModel, dict[int, list[FusedLayers]], list[Batch], list[HiddenStates]]:
    checkpoint = open_checkpoint(source)
    model = TextModel(checkpoint, census_of(checkpoint).config, CPU, torch.float32)
    batches = batches_of(SAMPLES, 60)
    streams = [HiddenStates(folder / name, batches, model.width, torch.float32, CPU, 10**7) for name in "ab"]
    for number, batch in enumerate(batches):
        streams[0][number] = model.embed(batch.ids)
    return model, groups_by_layer(FAMILY, tensors_of(checkpoint)), batches, streams


def tensors_of(checkpoint: Checkpoint) -> Any:
    return census_of(checkpoint).tensors


def state(half: Half) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in half.body.state_dict().items()}


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_the_stream_is_that_of_the_plain_model_and_the_layers_are_left_alone(name: str, tmp_path: Path) -> None:
    model, groups, batches, (hidden, added) = parts_of(checkpoint_path(name), tmp_path)
    with torch.inference_mode():
        plain = [model.embed(batch.ids) for batch in batches]
        for index in (0, 1, 2, 3):
            for half, untouched in zip(model.layer(index), model.layer(index), strict=True):
                weights = state(half)
                assert measure_half(half, groups[index], batches, hidden, added, lambda _: None)
                after = state(half)
                assert all(torch.equal(after[key], weight) for key, weight in weights.items())
                for number, states in enumerate(plain):
                    again = half(states)
                    plain[number] = untouched(states)
                    assert torch.equal(again, plain[number])
                    assert torch.equal(hidden[number], plain[number])


# -- Experts -----------------------------------------------------------------------------------------------------


def moe_half(folder: Path) -> tuple[Half, list[FusedLayers], list[Batch], HiddenStates, HiddenStates]:
    model, groups, batches, (hidden, added) = parts_of(checkpoint_path("moe"), folder)
    return model.layer(0)[1], groups[0], batches, hidden, added


def test_experts_that_no_token_reaches_give_no_nan(tmp_path: Path) -> None:
    half, groups, batches, hidden, added = moe_half(tmp_path)
    gate: Any = half.body.gate
    with torch.inference_mode():
        gate.weight.zero_()  # all experts are equal, and every token goes to the same two
        reached = torch.unique(gate(half.norm(hidden[0]))[2])
        assert len(reached) == 2
        found = {
            (one["role"], one["format"]): one
            for one in measure_half(half, groups, batches, hidden, added, lambda _: None)
        }
    assert len(found) == len(EXPERTS + SHARED) * len(FORMATS)
    assert all(0 < one[error] < 0.2 for one in found.values() for error in ("output_error", "layer_error"))


@pytest.mark.parametrize("form", FORMATS.values())
def test_an_experts_error_equals_arithmetic_token_by_token(tmp_path: Path, form: Format) -> None:
    half, groups, batches, hidden, added = moe_half(tmp_path)
    assert half.experts is not None
    module: Any = half.experts.module
    with torch.inference_mode():
        normed = torch.cat([half.norm(hidden[n])[batch.valid] for n, batch in enumerate(batches)])
        chosen = half.body.gate(normed)[2]  # type: ignore[operator]
        (found,) = (
            one
            for one in measure_half(half, groups, batches, hidden, added, lambda _: None)
            if (one["role"], one["format"]) == ("mlp.experts.down_proj", form.name)
        )
    changed, exact = [], []
    for expert in range(len(module.down_proj)):
        gate, up = (normed @ module.gate_up_proj[expert].float().T).chunk(2, -1)
        inner = nn.functional.silu(gate) * up
        weight = module.down_proj[expert].float()
        decoded = stored(weight, form).bfloat16().float()  # experts stay as they are stored, in 16 bits
        mine = (chosen == expert).any(-1)
        changed.append(
            seen(inner[None], form, inner.abs().max())[0, mine] @ decoded.T
        )  # every token counts for the scale
        exact.append(inner[mine] @ weight.T)
    assert found["output_error"] == pytest.approx(share(changed, exact), rel=0.01)


def test_an_output_of_zeros_has_no_relative_error(tmp_path: Path) -> None:
    model, groups, batches, (hidden, added) = parts_of(checkpoint_path("dense"), tmp_path)
    half = model.layer(0)[1]
    with torch.inference_mode():
        half.linears["model.language_model.layers.0.mlp.down_proj"].weight.zero_()
        found = measure_half(half, groups[0], batches, hidden, added, lambda _: None)
    assert {one["layer_error"] for one in found} == {None}
    by_role = {one["role"]: one["output_error"] for one in found if one["format"] == "NVFP4"}
    assert by_role["mlp.down_proj"] is None and by_role["mlp.gate_up_proj"] > 0


# -- The command -------------------------------------------------------------------------------------------------


def test_a_suite_without_calibration_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.toml").write_text(SUITE)
    monkeypatch.chdir(tmp_path)
    assert main(["sensitivity", "--suite", "tiny.toml"]) == 2
    assert "harness: Suite 'tiny' has no [calibration] table.\n" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.toml"]


def test_the_command_prints_a_table_and_sentences_and_leaves_a_record_and_no_scratch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.toml").write_text(SUITE + CALIBRATION)
    monkeypatch.chdir(tmp_path)
    assert main(["sensitivity", "--suite", "tiny.toml", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    record = store.read(tmp_path / document["records"]["source"])
    assert record.whole and len(record.kind("sensitivity")) == 8 * 4 * len(FORMATS)
    assert record.run.dataset is not None and record.run.dataset["num_tokens"] == 32
    assert record.run.engine is not None and record.run.engine["dtype"] == "float32"
    (table,) = document["tables"]
    assert {row["role"] for row in table} == {*ATTENTION, *DELTANET, *MLP}
    medians = [row["NVFP4"]["median"] for row in table]
    assert medians == sorted(medians, reverse=True) and all(math.isfinite(median) for median in medians)
    assert len(document["summary"]) == 2 and document["summary"][0].startswith("FP8 gains most for its bytes in ")
    assert list((tmp_path / "artifacts").iterdir()) == []
