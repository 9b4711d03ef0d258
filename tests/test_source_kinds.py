"""Sources as people have them: what is refused before anything is written, and what is built as from its twin."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness.audit.verify import verify
from harness.cli import main
from harness.engines.protocol import open_engine
from harness.errors import UserError
from harness.model.checkpoint import INDEX
from harness.model.sources import census_at
from harness.quantize.build import build
from harness.quantize.layerwise import CalibrationInput
from harness.quantize.recipes import RECIPES
from harness.quantize.samples import CalibrationSet
from tests.artifacts import quiet
from tests.conftest import tiny_config, write_checkpoint
from tests.text_only import TEXT, text_only

DENSE, MOE = "qwen3.5-9b", "qwen3.6-35b-a3b"
WINDOWS = [[(7 * one + step) % 300 for step in range(40)] for one in range(8)]
CALIBRATION = CalibrationInput(CalibrationSet(WINDOWS, {"num_samples": 8}), 64, 10**7, "cpu")
EXPERTS = ("gate_up_proj", "down_proj")
Tensors = dict[str, Tensor]
Config = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """A kind of source: what it makes of a sound model's tensors and configuration."""

    change: Callable[[Tensors, Config], Tensors]
    problem: str = ""
    remedy: str = ""
    model: str = DENSE


def without(*pieces: str) -> Callable[[Tensors, Config], Tensors]:
    """The tensors whose names hold none of the pieces."""
    return lambda tensors, _: {name: one for name, one in tensors.items() if not any(p in name for p in pieces)}


def more(added: Mapping[str, Tensor]) -> Callable[[Tensors, Config], Tensors]:
    """Other tensors beside the weights."""
    return lambda tensors, _: tensors | dict(added)


def under(prefix: str) -> Callable[[Tensors, Config], Tensors]:
    """All names with a prefix."""
    return lambda tensors, _: {prefix + name: one for name, one in tensors.items()}


def renamed(old: str, new: str) -> Callable[[Tensors, Config], Tensors]:
    """The names with a piece replaced."""
    return lambda tensors, _: {name.replace(old, new): one for name, one in tensors.items()}


def text_number(key: str, value: int) -> Callable[[Tensors, Config], Tensors]:
    """Another number in the configuration."""

    def change(tensors: Tensors, config: Config) -> Tensors:
        config["text_config"][key] = value
        return tensors

    return change


def as_fp8(scale: str | None) -> Callable[[Tensors, Config], Tensors]:
    """A weight in FP8, with a scale or without."""

    def change(tensors: Tensors, config: Config) -> Tensors:
        name = f"{TEXT}layers.0.linear_attn.in_proj_qkv.weight"
        scales = {f"{name}{scale}": torch.ones(1, 1)} if scale else {}
        return tensors | {name: tensors[name].to(torch.float8_e4m3fn)} | scales

    return change


def apart(*parts: str) -> Callable[[Tensors, Config], Tensors]:
    """Routed experts one by one in the modules whose names begin with one of `parts`."""

    def change(tensors: Tensors, config: Config) -> Tensors:
        made: Tensors = {}
        for name, one in tensors.items():
            module, _, last = name.rpartition(".")
            if last not in EXPERTS or not name.startswith(parts):
                made[name] = one
                continue
            for expert, weight in enumerate(one):
                shards = ("gate_proj", "up_proj") if last == "gate_up_proj" else ("down_proj",)
                for shard, rows in zip(shards, weight.chunk(len(shards)), strict=True):
                    made[f"{module}.{expert}.{shard}.weight"] = rows.clone()
        return made

    return change


def fewer_experts(tensors: Tensors, config: Config) -> Tensors:
    """One layer has lost an expert."""
    module = f"{TEXT}layers.1.mlp.experts"
    return tensors | {f"{module}.{name}": tensors[f"{module}.{name}"][:3].clone() for name in EXPERTS}


LORA = {f"{TEXT}layers.3.self_attn.q_proj.lora_A.weight": torch.ones(4, 64)}
REFUSED = {
    "an adapter beside the weights": Kind(more(LORA), "holds an adapter beside the weights", "merge_and_unload"),
    "PEFT's prefix": Kind(under("base_model.model."), "prefix 'base_model.model.' of a wrapper", "save_pretrained"),
    "another class's prefix": Kind(
        renamed(TEXT, "language_model.model."), "'language_model.' of a wrapper", "Save the"
    ),
    "a trainer's prefix": Kind(under("module."), "prefix 'module.' of a wrapper", "save_pretrained"),
    "a lost scale": Kind(as_fp8(None), "linear_attn.in_proj_qkv.weight as F8_E4M3, and its scale is not", "16-bit"),
    "a scale": Kind(as_fp8("_scale_inv"), "linear_attn.in_proj_qkv.weight as F8_E4M3.", "16-bit source"),
    "a scale of a 16-bit weight": Kind(
        more({f"{TEXT}layers.0.mlp.up_proj.weight_scale": torch.ones(1)}), "holds scales of quantized weights", "16-bit"
    ),
    "text names under the multimodal class": Kind(renamed(TEXT, "model."), "text part under 'model.'", "Save the"),
    "no vision tower": Kind(without("visual."), "describes a vision tower", "take vision_config out"),
    "no head": Kind(without("lm_head."), "has no lm_head.weight", "tie_word_embeddings"),
    "more layers in config.json": Kind(text_number("num_hidden_layers", 12), "config.json counts 12", "pruned"),
    "fewer layers in config.json": Kind(text_number("num_hidden_layers", 2), "there is a layer 2", "pruned"),
    "a layer of the middle gone": Kind(without("layers.1."), "layer 1 is not there", "pruned"),
    "a norm gone": Kind(without("layers.1.input_layernorm"), "lacks tensors that config.json calls for", "again"),
    "a strange tensor": Kind(more({f"{TEXT}layers.0.mlp.gate.bias": torch.ones(4)}), "that Qwen3_5For", "config.json"),
    "another width": Kind(text_number("intermediate_size", 112), "and config.json makes it [112, 64]", "config.json"),
    "another number of experts": Kind(text_number("num_experts", 8), "config.json counts 8", "num_experts", MOE),
    "experts pruned unevenly": Kind(fewer_experts, "has 3 experts in", "num_experts", MOE),
    "an expert of many gone": Kind(
        lambda tensors, config: without("layers.2.mlp.experts.1.")(apart(TEXT)(tensors, config), config),
        "has 3 experts in",
        "num_experts",
        MOE,
    ),
}
SAME = {
    "experts of the MTP head one by one": Kind(apart("mtp."), model=MOE),
    "experts of the trunk one by one": Kind(apart(TEXT), model=MOE),
    "all experts one by one": Kind(apart(TEXT, "mtp."), model=MOE),
}
TEXT_ONLY = {
    f"{words}, {'dense' if model == DENSE else 'experts'}": Kind(text_only(prefix), model=model)
    for model in (DENSE, MOE)
    for words, prefix in (("its own names", "model."), ("the whole model's names", TEXT))
}


def made(folder: Path, kind: Kind) -> Path:
    """A source of a kind, in one file."""
    config = tiny_config(kind.model)
    config["text_config"]["mtp_num_hidden_layers"] = 1
    write_checkpoint(folder, config)
    tensors: Tensors = {}
    for shard in folder.glob("*.safetensors"):
        tensors |= load_file(shard)
        shard.unlink()
    (folder / "model.safetensors.index.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    save_file(kind.change(tensors, config), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", REFUSED)
def test_what_config_and_files_disagree_about_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    kind = REFUSED[name]
    made(tmp_path / "source", kind)
    monkeypatch.chdir(tmp_path)
    for command in (["plan", "source"], ["build", "source", "--recipe", "rtn-a16", "--out", "out"]):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert kind.problem in said and kind.remedy in said, said
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("name", REFUSED)
def test_a_source_that_cannot_be_built_is_none_to_verify_against(tmp_path: Path, dense_source: Path, name: str) -> None:
    artifact = build(dense_source, RECIPES["rtn-a16"], tmp_path / "artifact", quiet).folder
    with pytest.raises(UserError) as caught:
        verify(artifact, made(tmp_path / "source", REFUSED[name]), quiet)
    assert REFUSED[name].problem in str(caught.value)


@pytest.mark.parametrize("name", SAME)
def test_a_source_written_in_another_way_makes_the_same_weights_and_passes(tmp_path: Path, name: str) -> None:
    kind = SAME[name]
    twin = made(tmp_path / "twin", Kind(lambda tensors, _: tensors, model=kind.model))
    source = made(tmp_path / "source", kind)
    built = [build(one, RECIPES["rtn-a16"], one.with_suffix(".out"), quiet).folder for one in (twin, source)]
    for against in (None, source):
        checked = verify(built[1], against, quiet)
        assert checked.findings == ()
    assert {trip.role for trip in checked.round_trips} >= {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    ours, theirs = (load_file(folder / "model.safetensors") for folder in reversed(built))
    assert all(torch.equal(one, ours[name]) for name, one in theirs.items() if name in ours)
    assert {name.split(".")[0] for name in theirs.keys() ^ ours.keys()} <= {"mtp"}


@pytest.mark.parametrize("recipe", ["rtn-a16", "w4a4"])
@pytest.mark.parametrize("name", TEXT_ONLY)
def test_the_text_part_alone_is_built_verified_and_scored_as_in_the_whole_model(
    tmp_path: Path, name: str, recipe: str
) -> None:
    kind = TEXT_ONLY[name]
    whole = made(tmp_path / "whole", Kind(lambda tensors, _: tensors, model=kind.model))
    text = made(tmp_path / "text", kind)
    scores: dict[tuple[str, str], list[list[float]]] = {}
    for source in (whole, text):
        samples = CALIBRATION if RECIPES[recipe].needs_calibration else None
        out = build(source, RECIPES[recipe], source.with_suffix(".out"), quiet, samples).folder
        assert verify(out, source, quiet).findings == () == verify(out, None, quiet).findings
        for folder in (source, out):
            for engine in ("torch", "streamed"):
                scored = open_engine(engine, folder, device="cpu").score(WINDOWS, 2)
                scores.setdefault((folder.suffix, engine), []).append(np.concatenate(list(scored)).tolist())
    for one, other in scores.values():
        assert one == pytest.approx(other, abs=1e-5)
    assert scores["", "torch"][0] != pytest.approx(scores[".out", "torch"][0], abs=1e-3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("mtp."), "config.json counts 1 MTP layer, and the files hold none"),
        (without("mtp.norm"), "the MTP head is not the one that config.json describes (mtp.norm.weight)"),
    ],
)
def test_a_head_that_is_lost_or_another_is_told_by_plan_and_build(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Tensors, Config], Tensors],
    words: str,
) -> None:
    source = made(tmp_path / "source", Kind(change))
    monkeypatch.chdir(tmp_path)
    for command in (["plan", "source"], ["build", "source", "--recipe", "rtn-a16", "--out", "out"]):
        assert main(command) == 0
        assert words in capsys.readouterr().out
    assert len(census_at(source).notes) == 1


def test_a_file_that_no_index_names_is_told(tmp_path: Path) -> None:
    source = made(tmp_path / "source", Kind(without("mtp.")))
    save_file({"mtp.norm.weight": torch.ones(64)}, source / "mtp.safetensors")
    notes = census_at(source).notes
    assert len(notes) == 2 and notes[1].startswith("mtp.safetensors lies beside the weights")


def test_shards_without_an_index_are_built_with_one(tmp_path: Path, dense_source: Path) -> None:
    twin = shutil.copytree(dense_source, tmp_path / "twin")
    (twin / INDEX).unlink()
    built = [
        build(one, RECIPES["rtn-a16"], tmp_path / name, quiet).folder
        for one, name in ((dense_source, "whole"), (twin, "without"))
    ]
    weight_maps = [json.loads((folder / INDEX).read_text())["weight_map"] for folder in built]
    assert weight_maps[0] == weight_maps[1]
    assert verify(built[1], twin, quiet).findings == ()


def test_a_sound_source_needs_no_note(dense_source: Path, moe_source: Path) -> None:
    assert census_at(dense_source).notes == census_at(moe_source).notes == ()
