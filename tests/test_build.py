"""Built artifacts: the right bytes, loadable by transformers, and nothing half-made whatever happens."""

import dataclasses
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import generate_gparam
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3_5ForConditionalGeneration

from harness.demo.synthesize import synthesize
from harness.errors import UserError
from harness.formats import nvfp4
from harness.formats.nvfp4 import NVFP4A16
from harness.model.checkpoint import INDEX, open_checkpoint
from harness.quantize.artifact import CALIBRATION, MANIFEST, Artifact
from harness.quantize.build import build
from harness.quantize.layerwise import CalibrationInput
from harness.quantize.recipes import RECIPES, Recipe
from harness.quantize.samples import CalibrationSet
from tests import kill_builds
from tests.conftest import BESIDE_THE_WEIGHTS, tiny_config

RTN = RECIPES["rtn-a16"]
SCHEME = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**dict(NVFP4A16.weights)))
LAYERS = "model.language_model.layers."
SUFFIXES = ("weight_packed", "weight_scale", "weight_global_scale")


def run(source: Path, out: Path) -> Artifact:
    return build(source, RTN, out, lambda *_: None)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}


def modules(stored: dict[str, Tensor]) -> list[str]:
    return [name.removesuffix(".weight_packed") for name in stored if name.endswith(".weight_packed")]


def decoded(stored: dict[str, Tensor], module: str) -> Tensor:
    """The weight of a module by compressed-tensors' decompressor."""
    return NVFP4PackedCompressor.decompress({key: stored[f"{module}.{key}"] for key in SUFFIXES}, SCHEME)["weight"]


def source_weight(source: dict[str, Tensor], module: str) -> Tensor:
    """The 2-D weight of a module, cut out of the fused experts where it is one of them."""
    if f"{module}.weight" in source:
        return source[f"{module}.weight"]
    experts, expert, shard = module.rsplit(".", 2)
    if shard == "down_proj":
        return source[f"{experts}.down_proj"][int(expert)]
    return source[f"{experts}.gate_up_proj"][int(expert)].chunk(2)[("gate_proj", "up_proj").index(shard)]


def fused_with(module: str) -> list[str]:
    """The modules that vLLM fuses with `module`, itself included; written down apart from the table under test."""
    parent, _, last = module.rpartition(".")
    for shards in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("in_proj_qkv", "in_proj_z")):
        if last in shards:
            return [f"{parent}.{shard}" for shard in shards]
    return [module]


@pytest.fixture(scope="module", params=["dense", "moe"])
def source(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"{request.param}_source")


@pytest.fixture(scope="module")
def artifact(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return run(source, tmp_path_factory.mktemp("artifact") / "out")


@pytest.fixture
def damaged(dense_source: Path, tmp_path: Path) -> Path:
    """A copy of the dense source that a test may break."""
    return Path(shutil.copytree(dense_source, tmp_path / "source"))


def test_every_quantized_weight_is_the_sources_rounded_under_its_fused_groups_one_scale(
    source: Path, artifact: Artifact
) -> None:
    before, after = tensors(source), tensors(artifact.folder)
    quantized = modules(after)
    assert len(quantized) == sum(
        count.num_tensors
        if "experts." not in count.role
        else 4 * count.num_tensors * (2 if "gate_up" in count.role else 1)
        for count in artifact.counts
        if count.format == "NVFP4A16"
    )
    for module in quantized:
        amax = max(source_weight(before, name).abs().max() for name in fused_with(module))
        global_scale = generate_gparam(torch.zeros(()), amax.float())
        weight = source_weight(before, module)
        scales = nvfp4.absmax_block_scales(weight, global_scale)
        expected = nvfp4.pack(nvfp4.encode(weight, scales, global_scale)), scales, global_scale
        for suffix, tensor in zip(SUFFIXES, expected, strict=True):
            assert torch.equal(after[f"{module}.{suffix}"].view(torch.uint8), tensor.view(torch.uint8)), (
                module,
                suffix,
            )
        error = (decoded(after, module).float() - weight.float()).norm() / weight.float().norm()
        assert 0.05 < error < 0.15, module


def test_fused_groups_share_one_global_scale_though_their_layers_lie_in_different_shards(
    source: Path, artifact: Artifact
) -> None:
    after = tensors(artifact.folder)
    weight_map = json.loads((artifact.folder / INDEX).read_text())["weight_map"]
    spread = 0
    for module in modules(after):
        group = fused_with(module)
        assert len({after[f"{name}.weight_global_scale"].item() for name in group}) == 1, group
        spread += len({weight_map[f"{name}.weight_packed"] for name in group}) > 1
    assert spread > 3


def test_the_attention_and_mlp_and_nothing_else_is_quantized(source: Path, artifact: Artifact) -> None:
    quantized = {module.rsplit(".", 1)[0].split(".", 4)[-1] for module in modules(tensors(artifact.folder))}
    moe = {"mlp.shared_expert", *(f"mlp.experts.{expert}" for expert in range(4))}
    assert quantized == {"self_attn"} | (moe if source.name == "moe" else {"mlp"})


def test_every_kept_tensor_is_identical_and_lies_in_the_shard_of_its_source(source: Path, artifact: Artifact) -> None:
    kept = 0
    for shard in source.glob("*.safetensors"):
        before, after = load_file(shard), load_file(artifact.folder / shard.name)
        for name in before.keys() & after.keys():
            assert before[name].dtype == after[name].dtype
            assert torch.equal(before[name].view(torch.int16), after[name].view(torch.int16)), name
        kept += len(before.keys() & after.keys())
        weights = before.keys() - after.keys()
        assert all(".self_attn." in name or ".mlp." in name for name in weights)
        assert all(name.startswith(LAYERS) for name in weights)
    assert kept == len(tensors(source)) - sum(c.num_tensors for c in artifact.counts if c.format != "kept")
    assert len([name for name in tensors(artifact.folder) if name.startswith("mtp.")]) == (
        19 if source.name == "moe" else 15
    )


def test_the_index_places_every_tensor_and_states_their_bytes(artifact: Artifact) -> None:
    index = json.loads((artifact.folder / INDEX).read_text())
    placed = {name: shard.name for shard in artifact.folder.glob("*.safetensors") for name in load_file(shard)}
    assert index["weight_map"] == placed
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors(artifact.folder).values())
    assert index["metadata"]["total_size"] == sum(count.output_bytes for count in artifact.counts)


def test_files_beside_the_weights_are_copied_unchanged_and_the_configuration_gains_one_key(
    source: Path, artifact: Artifact
) -> None:
    for name, data in BESIDE_THE_WEIGHTS.items():
        assert (artifact.folder / name).read_bytes() == data
    config = json.loads((artifact.folder / "config.json").read_text())
    assert config.pop("quantization_config")["format"] == "nvfp4-pack-quantized"
    assert config == json.loads((source / "config.json").read_text())
    assert set(files(artifact.folder)) == {*files(source), MANIFEST}


def test_weights_code_and_readme_of_the_source_are_not_carried_along(damaged: Path, tmp_path: Path) -> None:
    for name in ("README.md", "pytorch_model.bin", "modeling_x.py", ".gitattributes", "model.gguf"):
        (damaged / name).write_text("x")
    (damaged / "LICENSE").write_text("terms")
    run(damaged, tmp_path / "out")
    assert set(files(damaged)) - set(files(tmp_path / "out")) == {
        "README.md",
        "pytorch_model.bin",
        "modeling_x.py",
        ".gitattributes",
        "model.gguf",
    }


def test_building_twice_gives_identical_bytes_and_the_digest_says_so(
    source: Path, artifact: Artifact, tmp_path: Path
) -> None:
    again = run(source, tmp_path / "again")
    assert not again.reused
    assert files(again.folder) == files(artifact.folder)
    assert again.digest == artifact.digest


def test_a_source_of_one_file_without_an_index_gives_the_same_weights(
    dense_source: Path, damaged: Path, tmp_path: Path
) -> None:
    for path in [*damaged.glob("*.safetensors"), damaged / INDEX]:
        path.unlink()
    save_file(tensors(dense_source), damaged / "model.safetensors")
    run(damaged, tmp_path / "one")
    run(dense_source, tmp_path / "three")
    one, three = tensors(tmp_path / "one"), tensors(tmp_path / "three")
    assert not (tmp_path / "one" / INDEX).exists()
    assert one.keys() == three.keys()
    assert all(torch.equal(one[name].view(torch.uint8), three[name].view(torch.uint8)) for name in one)


def test_a_finished_artifact_is_reused_and_not_touched(source: Path, artifact: Artifact) -> None:
    def state() -> dict[str, tuple[int, int, int]]:
        stats = {path.name: path.stat() for path in [artifact.folder, *artifact.folder.iterdir()]}
        return {name: (stat.st_ino, stat.st_mtime_ns, stat.st_size) for name, stat in stats.items()}

    before = state()
    again = run(source, artifact.folder)
    assert again.reused
    assert not artifact.reused
    assert (again.digest, again.counts) == (artifact.digest, artifact.counts)
    assert state() == before


def test_progress_rises_to_the_sources_bytes(source: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    build(source, RTN, tmp_path / "out", lambda done, total, _: calls.append((done, total)))
    assert calls == sorted(calls)
    assert calls[-1] == (open_checkpoint(source).num_bytes,) * 2


# Crashes: a child process kills itself just before the n-th step that changes what a folder holds.


def _build_and_die(source: Path, out: Path, step: int) -> None:
    """Builds, and kills this process before the `step`-th fsync, rename or removal."""
    count = 0

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return wrapper

    for owner, name in ((os, "fsync"), (os, "posix_fallocate"), (Path, "replace"), (Path, "unlink"), (Path, "mkdir")):
        setattr(owner, name, counted(getattr(owner, name)))
    run(source, out)


def test_a_build_killed_at_any_step_leaves_no_checkpoint_and_the_next_one_finishes_with_the_same_bytes(
    damaged: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    for name in list(BESIDE_THE_WEIGHTS)[1:]:  # one will do, and every file costs four more builds
        (damaged / name).unlink()
    folder = tmp_path_factory.mktemp("killed")
    whole = files(run(damaged, folder / "whole").folder)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__])
    out, partial = folder / "out", folder / "out.partial"
    for step in range(1, 1000):
        process = processes.Process(target=_build_and_die, args=(damaged, out, step))
        process.start()
        process.join(60)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL, step
        with pytest.raises(UserError):
            open_checkpoint(partial)
        committed = (out / "config.json").exists()
        assert not committed or files(out) == whole, step
        run(damaged, out)
        assert files(out) == whole, step
        assert sorted(path.name for path in folder.iterdir()) == ["out", "whole"], step
        shutil.rmtree(out)
    assert step > 25
    assert files(out) == whole


def test_a_continued_build_keeps_the_shards_that_are_done(dense_source: Path, tmp_path: Path) -> None:
    def interrupt(*_: Any) -> None:
        if (tmp_path / "out.partial" / "model-2.safetensors").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(dense_source, RTN, tmp_path / "out", interrupt)
    inodes = {path.name: path.stat().st_ino for path in (tmp_path / "out.partial").glob("*.safetensors")}
    assert set(inodes) == {"model-1.safetensors", "model-2.safetensors"}
    run(dense_source, tmp_path / "out")
    assert {name: (tmp_path / "out" / name).stat().st_ino for name in inodes} == inodes


def test_an_unfinished_build_of_another_source_is_refused_and_kept(
    dense_source: Path, damaged: Path, tmp_path: Path
) -> None:
    shard = damaged / "model-1.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(shard).items()}, shard, metadata={"format": "pt"})

    def interrupt(*_: Any) -> None:
        if (tmp_path / "out.partial" / "model-2.safetensors").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(damaged, RTN, tmp_path / "out", interrupt)
    before = files(tmp_path / "out.partial")
    with pytest.raises(UserError, match=r"out\.partial holds an unfinished build of another source"):
        run(dense_source, tmp_path / "out")
    assert files(tmp_path / "out.partial") == before
    run(damaged, tmp_path / "out")
    assert files(tmp_path / "out") == files(run(damaged, tmp_path / "whole").folder)


def test_two_builds_of_one_folder_do_not_mix(dense_source: Path, tmp_path: Path) -> None:
    def second(*_: Any) -> None:
        with pytest.raises(UserError, match=r"Another build is writing .*out\.partial"):
            run(dense_source, tmp_path / "out")

    build(dense_source, RTN, tmp_path / "out", second)
    assert (tmp_path / "out" / MANIFEST).is_file()


# Bad input: one sentence, a remedy, and nothing written.


def change_weight(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    def damage(source: Path) -> None:
        shard = source / json.loads((source / INDEX).read_text())["weight_map"][name]
        stored = load_file(shard)
        save_file(stored | {name: change(stored[name]).contiguous()}, shard, metadata={"format": "pt"})

    return damage


def change_config(**changes: Any) -> Callable[[Path], object]:
    return lambda source: (source / "config.json").write_text(
        json.dumps(json.loads((source / "config.json").read_text()) | changes)
    )


def fill(value: float) -> Callable[[Tensor], Tensor]:
    def change(weight: Tensor) -> Tensor:
        weight[-1, -1] = value
        return weight

    return change


def keep_only(name: str, source: Path) -> None:
    kept = {name: tensors(source)[name]}
    for path in [*source.glob("*.safetensors"), source / INDEX]:
        path.unlink()
    save_file(kept, source / "model.safetensors")


V_PROJ = f"{LAYERS}3.self_attn.v_proj.weight"
DOWN_PROJ = f"{LAYERS}1.mlp.down_proj.weight"
BAD_SOURCES: dict[str, tuple[Callable[[Path], object], str]] = {
    "NaN": (change_weight(V_PROJ, fill(float("nan"))), rf"{V_PROJ} in model-\d\.safetensors holds NaN or infinite"),
    "infinity": (change_weight(V_PROJ, fill(float("inf"))), rf"{V_PROJ} in model-\d\.safetensors holds NaN or inf"),
    "minus infinity": (change_weight(DOWN_PROJ, fill(float("-inf"))), rf"{DOWN_PROJ} in model-\d\.safetensors holds"),
    "width": (change_weight(DOWN_PROJ, lambda w: w[:, :88]), rf"{DOWN_PROJ} in shape \[64, 88\], and config"),
    "integers": (
        change_weight(V_PROJ, lambda w: w.to(torch.int8)),
        rf"stores {V_PROJ} as I8, and its scale is not there",
    ),
    "architecture": (change_config(architectures=["Mamba"]), r"config\.json is of architecture 'Mamba', which"),
    "quantized": (change_config(quantization_config={"quant_method": "fp8"}), r"source is quantized already"),
    "nearly nothing": (lambda source: keep_only("lm_head.weight", source), r"describes a vision tower in config\.json"),
    "cut shard": (lambda source: os.truncate(source / "model-2.safetensors", 5000), r"model-2\.safetensors"),
    "missing shard": (lambda source: (source / "model-2.safetensors").unlink(), r"model-2\.safetensors is missing"),
    "no folder": (shutil.rmtree, r"source is not a folder"),
}


def test_a_recipe_for_experts_has_nothing_to_do_in_a_dense_model(dense_source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no tensor that the recipe quantizes"):
        build(dense_source, Recipe("experts", ((NVFP4A16, ("experts",)),)), tmp_path / "out", lambda *_: None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("damage", "message"), BAD_SOURCES.values(), ids=list(BAD_SOURCES))
def test_a_bad_source_is_a_user_error_with_a_remedy_and_leaves_nothing_behind(
    damaged: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(damaged)
    with pytest.raises(UserError, match=message) as caught:
        run(damaged, tmp_path / "out")
    assert caught.value.remedy
    assert [path.name for path in tmp_path.iterdir() if path != damaged] == []


def test_nan_in_a_tensor_that_is_kept_is_refused_too(damaged: Path, tmp_path: Path) -> None:
    change_weight("lm_head.weight", fill(float("nan")))(damaged)
    with pytest.raises(UserError, match=r"lm_head.weight in .* holds NaN"):
        run(damaged, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_an_edited_tokenizer_of_the_source_is_another_source(damaged: Path, tmp_path: Path) -> None:
    run(damaged, tmp_path / "out")
    (damaged / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="another source"):
        run(damaged, tmp_path / "out")


def test_an_output_inside_the_source_is_refused(damaged: Path) -> None:
    with pytest.raises(UserError, match="source's own folder"):
        run(damaged, damaged / "out")
    with pytest.raises(UserError, match="source's own folder"):
        run(damaged, damaged)


@pytest.mark.parametrize(
    "recipe", [recipe for recipe in RECIPES.values() if recipe.needs_calibration], ids=lambda r: r.name
)
def test_a_recipe_that_needs_data_is_refused_by_name(dense_source: Path, tmp_path: Path, recipe: Any) -> None:
    with pytest.raises(UserError, match=rf"Recipe '{recipe.name}' chooses its scales from data"):
        build(dense_source, recipe, tmp_path / "out", lambda *_: None)
    assert list(tmp_path.iterdir()) == []


def foreign(out: Path) -> None:
    (out / "precious.txt").write_text("x")


def other_recipe(out: Path) -> None:
    (out / MANIFEST).write_text(json.dumps({"identity": {"recipe": "w4a4"}, "digest": "0", "files": {}}))


def a_file(out: Path) -> None:
    out.rmdir()
    out.write_text("x")


def foreign_partial(out: Path) -> None:
    out.rename(out.with_name("out.partial"))
    (out.with_name("out.partial") / "precious.txt").write_text("x")


def lost_shard(out: Path) -> None:
    out.rmdir()
    run(out.parent.parent / "source", out)
    (out / "model-2.safetensors").unlink()


def another_sources_artifact(out: Path) -> None:
    out.rmdir()
    source = out.parent.parent / "source"
    run(source, out)
    change_weight(V_PROJ, lambda w: w * 2)(source)


IN_THE_WAY: dict[str, tuple[Callable[[Path], None], str]] = {
    "foreign folder": (foreign, r"out exists and was not made by this harness"),
    "file": (a_file, r"out exists and was not made by this harness"),
    "other recipe": (other_recipe, r"out holds an artifact of recipe 'w4a4', not of 'rtn-a16'"),
    "other source": (another_sources_artifact, r"out holds an artifact of another source"),
    "foreign partial": (foreign_partial, r"out\.partial exists and is no unfinished build"),
    "lost shard": (lost_shard, r"model-2\.safetensors is not as its build wrote it"),
}


@pytest.mark.parametrize(("prepare", "message"), IN_THE_WAY.values(), ids=list(IN_THE_WAY))
def test_an_output_folder_that_is_not_this_builds_is_refused_and_left_alone(
    damaged: Path, tmp_path: Path, prepare: Callable[[Path], None], message: str
) -> None:
    out = tmp_path / "artifacts" / "out"
    out.mkdir(parents=True)
    prepare(out)

    def state() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in out.parent.rglob("*") if path.is_file()}

    before = state()
    with pytest.raises(UserError, match=message):
        run(damaged, out)
    assert state() == before


def test_an_empty_output_folder_is_taken(dense_source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert not run(dense_source, tmp_path / "out").reused
    open_checkpoint(tmp_path / "out")


def test_too_little_disk_is_found_before_anything_is_written(
    dense_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = run(dense_source, tmp_path / "whole").counts
    size = sum(count.output_bytes for count in needed)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size - 1))
    with pytest.raises(UserError, match=r"new/deep/out needs .* GB and .* has .* GB free"):
        run(dense_source, tmp_path / "new" / "deep" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


# What others make of an artifact.


def test_transformers_loads_an_artifact_and_its_logits_are_those_of_the_decoded_weights(
    dense_source: Path, tmp_path: Path
) -> None:
    artifact = run(dense_source, tmp_path / "out")
    stored = tensors(artifact.folder)
    loaded = Qwen3_5ForConditionalGeneration.from_pretrained(artifact.folder)
    plain = Qwen3_5ForConditionalGeneration.from_pretrained(dense_source)
    tokens = torch.arange(300).remainder(290).view(3, 100)
    with torch.inference_mode():
        original = plain(tokens).logits
        for module in modules(stored):
            plain.get_submodule(module).weight.copy_(decoded(stored, module))
        expected = plain(tokens).logits
        logits = loaded(tokens).logits
    assert logits.dtype == torch.bfloat16
    assert torch.equal(logits, expected)
    assert not torch.equal(logits, original)


# Calibrated builds: layer by layer, and after any interruption the same bytes.


def calibration(seed: int = 0, batch_tokens: int = 64) -> CalibrationInput:
    """Three samples of random token ids."""
    generator = torch.Generator().manual_seed(seed)
    samples = tuple(tuple(torch.randint(0, 290, (n,), generator=generator).tolist()) for n in (48, 40, 20))
    return CalibrationInput(CalibrationSet(samples, {"num_samples": 3}), batch_tokens, 10**6, "cpu")


CALIBRATED = RECIPES["w4a4-deltanet"].with_method("search", "gptq")


def interrupt_at(layer: float) -> Callable[[int, int, str], None]:
    """A progress bar that interrupts once so many of the four layers are behind it."""

    def progress(done: int, total: int, description: str) -> None:
        if description == "calibrate" and done >= total * layer / 4:
            raise KeyboardInterrupt

    return progress


@pytest.fixture(scope="module")
def calibrated(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    out = tmp_path_factory.mktemp("calibrated") / "out"
    return build(source, CALIBRATED, out, lambda *_: None, calibration())


@pytest.mark.parametrize("layers", [0, 0.4, 1, 2.7, 4])
def test_a_calibrated_build_continues_in_the_layer_it_was_in_and_ends_with_the_same_bytes(
    source: Path, calibrated: Artifact, tmp_path: Path, layers: float
) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(source, CALIBRATED, tmp_path / "out", interrupt_at(layers), calibration())
    partial = tmp_path / "out.partial"
    with pytest.raises(UserError):
        open_checkpoint(partial)
    finished = {path.name: path.stat().st_ino for path in partial.glob("layer-*.safetensors")}
    # The last tokens of a layer are told before its file is closed.
    assert len(finished) == max(0, math.ceil(layers) - 1)
    kept = []

    def look(done: int, total: int, description: str) -> None:
        if description == "build" and not kept:
            kept.append({name: (partial / name).stat().st_ino for name in finished})

    again = build(source, CALIBRATED, tmp_path / "out", look, calibration())
    assert kept == [finished], "finished layers are not made again"
    assert not again.reused
    assert again.digest == calibrated.digest
    assert files(tmp_path / "out") == files(calibrated.folder)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_gpu_that_runs_out_of_memory_is_a_sentence_and_the_build_goes_on_at_that_layer(
    source: Path, calibrated: Artifact, tmp_path: Path
) -> None:
    """The progress stands for the GPU: it raises what torch raises, in the second of four layers."""

    def full(done: int, total: int, description: str) -> None:
        if description == "calibrate" and done >= total * 0.4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with pytest.raises(UserError, match="ran out of memory in layer 1 of 4") as refused:
        build(source, CALIBRATED, tmp_path / "out", full, calibration())
    assert "goes on at this layer" in refused.value.remedy and "--device cpu" in refused.value.remedy
    assert [path.name for path in (tmp_path / "out.partial").glob("layer-*.safetensors")] == ["layer-00000.safetensors"]
    assert build(source, CALIBRATED, tmp_path / "out", lambda *_: None, calibration()).digest == calibrated.digest


def test_a_calibrated_build_continues_among_its_shards_too(source: Path, calibrated: Artifact, tmp_path: Path) -> None:
    def interrupt(*_: Any) -> None:
        if (tmp_path / "out.partial" / "model-2.safetensors").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(source, CALIBRATED, tmp_path / "out", interrupt, calibration())
    inodes = {path.name: path.stat().st_ino for path in (tmp_path / "out.partial").glob("model-*.safetensors")}
    assert set(inodes) == {"model-1.safetensors", "model-2.safetensors"}
    assert build(source, CALIBRATED, tmp_path / "out", lambda *_: None, calibration()).digest == calibrated.digest
    assert {name: (tmp_path / "out" / name).stat().st_ino for name in inodes} == inodes
    assert files(tmp_path / "out") == files(calibrated.folder)


def test_a_calibrated_artifact_says_what_it_was_calibrated_on(calibrated: Artifact) -> None:
    said = json.loads((calibrated.folder / CALIBRATION).read_text())
    assert said["calibration"] == calibration().samples.manifest
    assert [layer["index"] for layer in said["layers"]] == [0, 1, 2, 3]
    identity = json.loads((calibrated.folder / MANIFEST).read_text())["identity"]
    assert identity["calibration"]["samples"] == calibration().samples.digest
    assert calibrated.num_calibration_tokens == 48 + 40 + 20


def test_memory_for_hidden_states_changes_no_byte(source: Path, calibrated: Artifact, tmp_path: Path) -> None:
    little = dataclasses.replace(calibration(), hidden_bytes=0)
    assert build(source, CALIBRATED, tmp_path / "out", lambda *_: None, little).digest == calibrated.digest


OTHERS: dict[str, tuple[Recipe, CalibrationInput | None, str]] = {
    "calibration set": (CALIBRATED, calibration(seed=1), "on another calibration set"),
    "batches": (CALIBRATED, calibration(batch_tokens=1), "on another calibration set"),
    "scales": (
        CALIBRATED.with_method("absmax"),
        calibration(),
        "'w4a4-deltanet' with scales 'search' and codes 'gptq'",
    ),
    "codes": (CALIBRATED.with_method(codes="rtn"), calibration(), "with scales 'search' and codes 'gptq'"),
    "settings": (
        dataclasses.replace(CALIBRATED, method=dataclasses.replace(CALIBRATED.method, damping=0.5)),
        calibration(),
        "with scales 'search' and codes 'gptq', which this version of the harness does with other settings",
    ),
    "recipe": (RECIPES["w4a4"], calibration(), "recipe 'w4a4-deltanet', not of 'w4a4'"),
    "no calibration": (RTN, None, "recipe 'w4a4-deltanet', not of 'rtn-a16'"),
}


@pytest.mark.parametrize(("recipe", "other", "words"), OTHERS.values(), ids=list(OTHERS))
@pytest.mark.parametrize("finished", [False, True])
def test_the_folder_of_another_build_is_refused_by_what_differs_and_left_alone(
    dense_source: Path, tmp_path: Path, recipe: Recipe, other: CalibrationInput | None, words: str, finished: bool
) -> None:
    if finished:
        build(dense_source, CALIBRATED, tmp_path / "out", lambda *_: None, calibration())
    else:
        with pytest.raises(KeyboardInterrupt):
            build(dense_source, CALIBRATED, tmp_path / "out", interrupt_at(1.5), calibration())
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    what = "an artifact" if finished else "an unfinished build"
    with pytest.raises(UserError, match=f"holds {what} of .*{words}") as caught:
        build(dense_source, recipe, tmp_path / "out", lambda *_: None, other)
    assert caught.value.remedy
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


BAD_WEIGHTS = ["layers.2.mlp.up_proj.weight", "layers.1.input_layernorm.weight", "layers.0.linear_attn.A_log"]


@pytest.mark.parametrize("name", [*BAD_WEIGHTS, "layers.3.self_attn.q_norm.weight", "lm_head.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_calibrated_build_refuses_nan_wherever_it_is(damaged: Path, tmp_path: Path, name: str, value: float) -> None:
    name = name if name.startswith("lm_head") else f"model.language_model.{name}"

    def damage(weight: Tensor) -> Tensor:
        weight.view(-1)[-1] = value
        return weight

    change_weight(name, damage)(damaged)
    with pytest.raises(UserError, match=rf"{name} in model-\d\.safetensors holds NaN or infinite weights"):
        build(damaged, CALIBRATED, tmp_path / "out", lambda *_: None, calibration())
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_nan_in_one_expert_is_refused(moe_source: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(moe_source, tmp_path / "source"))
    name = "model.language_model.layers.1.mlp.experts.down_proj"
    change_weight(name, fill(float("nan")))(source)
    with pytest.raises(UserError, match=rf"{name} in .* holds NaN"):
        build(source, RECIPES["w4a4-experts"], tmp_path / "out", lambda *_: None, calibration())
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_calibration_that_does_not_fit_into_memory_is_refused_before_anything_is_written(
    dense_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free._replace(available=500 * 10**6))
    with pytest.raises(UserError, match=r"Calibrating takes about 1\.1 GB of memory .* and 0\.5 GB are free"):
        build(dense_source, CALIBRATED, tmp_path / "out", lambda *_: None, calibration())
    assert list(tmp_path.iterdir()) == []


def test_hidden_states_and_layers_count_as_disk(
    dense_source: Path, calibrated: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(count.output_bytes for count in calibrated.counts)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size + 10_000))
    with pytest.raises(UserError, match="GB free"):
        build(dense_source, CALIBRATED, tmp_path / "out", lambda *_: None, calibration())
    assert list(tmp_path.iterdir()) == []


def test_a_calibrated_build_killed_at_random_moments_ends_with_the_same_bytes(tmp_path: Path) -> None:
    outcome = kill_builds.kill_builds(tmp_path, points=2, seed=1, codes="rtn")
    assert len(outcome) == 2
    assert all(one.identical for one in outcome), outcome


PEAK_MEMORY = """
import sys
from pathlib import Path
from harness.quantize.build import build
from harness.quantize.recipes import RECIPES

def peak():
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024

before = peak()
build(Path(sys.argv[1]), RECIPES["rtn-a16"], Path(sys.argv[2]), lambda *_: None)
sys.stdout.write(str(peak() - before))
"""


def test_a_build_needs_memory_for_a_piece_and_not_for_the_model(tmp_path: Path) -> None:
    config = tiny_config("qwen3.5-9b")
    config["text_config"] |= {"vocab_size": 48_000, "hidden_size": 1024, "intermediate_size": 4096}
    size = synthesize(config, tmp_path / "source", num_layers=None, vocab_size=None, seed=0, progress=lambda *_: None)
    assert size > 300e6
    command = [sys.executable, "-c", PEAK_MEMORY, str(tmp_path / "source"), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert 0 < int(result.stdout) < 200e6
