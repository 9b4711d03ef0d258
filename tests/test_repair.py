"""Repair makes vLLM's view of a checkpoint right, changes nothing else, and writes nothing where it cannot."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.audit.repair import MAX_RELATIVE_ERROR, Repair, repair
from harness.audit.verify import verify
from harness.cli import main
from harness.errors import UserError
from harness.model.families.qwen35 import FAMILY
from harness.quantize.recipes import RECIPES
from tests.artifacts import INPUT_SCALE, Tensors, change, load, quiet, weight_of, write_artifact, write_source

LAYER = "model.language_model.layers"
QKV = tuple(f"{LAYER}.3.self_attn.{name}_proj" for name in "qkv")
GATE_UP = tuple(f"{LAYER}.0.mlp.{name}_proj" for name in ("gate", "up"))
QKVZ = tuple(f"{LAYER}.1.linear_attn.in_proj_{name}" for name in ("qkv", "z"))
W13 = tuple(f"{LAYER}.2.mlp.experts.3.{name}_proj" for name in ("gate", "up"))
SPOILT = {"dense": (*QKV, *GATE_UP, *QKVZ), "moe": (*W13, *QKV)}
# Of each group the shard with the largest weights, which vLLM decodes too small.
LARGEST = {"dense": (QKV[1], GATE_UP[1], QKVZ[1]), "moe": (W13[1], QKV[1])}
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models in which the shards of some fused groups differ in size by a factor that is no power of two."""
    folder = tmp_path_factory.mktemp("repair")
    found = {}
    for kind, name in (("dense", "qwen3.5-9b"), ("moe", "qwen3.6-35b-a3b")):
        found[kind] = write_source(folder / kind, name)

        def enlarge(tensors: Tensors, kind: str = kind) -> None:
            for tensor, weight in tensors.items():
                for linear in FAMILY.linears_of(tensor, tuple(weight.shape)):
                    if linear.module in LARGEST[kind]:
                        rows = slice(linear.first_row, linear.first_row + linear.out_features)
                        weight.view(-1, linear.in_features)[rows] *= 3.3

        change(found[kind], enlarge)
    return found


@pytest.fixture(scope="module")
def spoilt(sources: dict[str, Path]) -> dict[str, Path]:
    """Artifacts whose fused shards have global scales of their own."""
    return {
        kind: write_artifact(source, source.with_name(f"{kind}-spoilt"), RECIPES["w4a4-deltanet"], SPOILT[kind])
        for kind, source in sources.items()
    }


@pytest.fixture(scope="module")
def sound(sources: dict[str, Path]) -> Path:
    return write_artifact(sources["dense"], sources["dense"].with_name("sound"), RECIPES["w4a4-deltanet"])


@pytest.fixture
def artifact(sound: Path, tmp_path: Path) -> Path:
    """A sound copy to be damaged."""
    return Path(shutil.copytree(sound, tmp_path / "artifact"))


def mend(folder: Path, out: Path, source: Path | None = None, largest: float = MAX_RELATIVE_ERROR) -> Repair:
    return repair(folder, out, source, max_relative_error=largest, progress=quiet)


def decoded(tensors: Tensors, module: str, divisor: float) -> torch.Tensor:
    """A module's weights against any global scale: E2M1 by its table, low nibble first."""
    packed = tensors[f"{module}.weight_packed"].int()
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(1)
    values = E2M1[codes & 7] * torch.where(codes >= 8, -1.0, 1.0)
    return values * tensors[f"{module}.weight_scale"].float().repeat_interleave(16, 1) / divisor


def own_scale(tensors: Tensors, module: str) -> float:
    return float(tensors[f"{module}.weight_global_scale"])


def as_vllm_decodes(tensors: Tensors, shards: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Each shard against the one scale that vLLM keeps: the largest, or gate's for an expert."""
    scales = [own_scale(tensors, shard) for shard in shards]
    divisor = scales[0] if ".experts." in shards[0] else max(scales)
    return {shard: decoded(tensors, shard, divisor) for shard in shards}


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def source_weights(source: Path) -> Tensors:
    weights = load(source)
    return {
        linear.module: weight_of(weights, name, linear)
        for name, weight in weights.items()
        for linear in FAMILY.linears_of(name, tuple(weight.shape))
    }


def differing(ours: Tensors, theirs: Tensors) -> set[str]:
    """The tensors whose bytes are not the same."""
    return {name for name in ours if not torch.equal(ours[name].view(torch.uint8), theirs[name].view(torch.uint8))}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("kind", "shards"), [("dense", QKV), ("dense", GATE_UP), ("dense", QKVZ), ("moe", W13)])
def test_vllm_decodes_the_repaired_weights_as_the_source_and_the_spoilt_ones_not(
    kind: str, shards: tuple[str, ...], spoilt: dict[str, Path], sources: dict[str, Path], tmp_path: Path
) -> None:
    before = contents(spoilt[kind])
    outcome = mend(spoilt[kind], tmp_path / "out")
    assert outcome.written
    assert outcome.passed
    assert verify(tmp_path / "out", sources[kind], quiet).findings == ()
    assert contents(spoilt[kind]) == before
    weights, bad, good = source_weights(sources[kind]), load(spoilt[kind]), load(tmp_path / "out")
    spoilt_view, repaired_view = as_vllm_decodes(bad, shards), as_vllm_decodes(good, shards)
    largest = next(shard for shard in shards if shard in LARGEST[kind])
    # Decoded against a divisor about 3.3 times too large, so about 1 - 1/3.3 of the weight is lost.
    assert relative(spoilt_view[largest], weights[largest]) > 0.5
    for shard in shards:
        own = relative(decoded(bad, shard, own_scale(bad, shard)), weights[shard])
        assert relative(repaired_view[shard], weights[shard]) < min(0.13, own + 0.02)


def test_the_shared_scale_is_that_of_the_largest_weight_and_the_error_is_told(
    spoilt: dict[str, Path], tmp_path: Path
) -> None:
    outcome = mend(spoilt["dense"], tmp_path / "out")
    bad, good = load(spoilt["dense"]), load(tmp_path / "out")
    table = {one.fused: one for one in outcome.scales}
    assert set(table) == {f"{LAYER}.3.self_attn.qkv_proj", f"{LAYER}.0.mlp.gate_up_proj", QKVZ[0] + "z"}
    for shards, fused in ((QKV, f"{LAYER}.3.self_attn.qkv_proj"), (GATE_UP, f"{LAYER}.0.mlp.gate_up_proj")):
        one = table[fused]
        scales = [own_scale(bad, shard) for shard in shards]
        assert one.before == tuple(scales)
        assert one.shared == min(scales)
        assert {own_scale(good, shard) for shard in shards} == {one.shared}
        errors = []
        for shard, scale in zip(shards, scales, strict=True):
            old, new = decoded(bad, shard, scale), decoded(good, shard, one.shared)
            errors.append(relative(new, old))
            # One E4M3 rounding of a block scale moves no weight by more than a sixteenth of itself.
            assert float(good[f"{shard}.weight_scale"].float().min()) >= 2**-6
            assert bool(((new - old).abs() <= old.abs() / 16 * (1 + 1e-5)).all())
        assert 0.005 < one.relative_error < MAX_RELATIVE_ERROR
        assert one.relative_error == pytest.approx(max(errors), rel=1e-4)


def test_everything_else_stays_byte_for_byte(spoilt: dict[str, Path], tmp_path: Path) -> None:
    mend(spoilt["dense"], tmp_path / "out")
    bad, good = load(spoilt["dense"]), load(tmp_path / "out")
    changed = differing(bad, good)
    assert bad.keys() == good.keys()
    assert {name.rpartition(".")[0] for name in changed} <= set(SPOILT["dense"])
    assert not changed & {f"{module}.weight_packed" for module in LARGEST["dense"]}
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (spoilt["dense"] / name).read_bytes()
    assert {path.name for path in (tmp_path / "out").iterdir()} - {path.name for path in spoilt["dense"].iterdir()} == {
        "harness-repair.json"
    }


def test_scales_that_differ_by_a_power_of_two_cost_nothing(artifact: Path, tmp_path: Path) -> None:
    def halve(tensors: Tensors) -> None:
        tensors[f"{QKV[1]}.weight_global_scale"] *= 0.25
        tensors[f"{QKV[1]}.weight_scale"] = (tensors[f"{QKV[1]}.weight_scale"].float() * 0.25).to(torch.float8_e4m3fn)

    change(artifact, halve)
    before = load(artifact)
    outcome = mend(artifact, tmp_path / "out")
    assert [one.relative_error for one in outcome.scales] == [0.0]
    after = load(tmp_path / "out")
    for module in QKV:
        old = decoded(before, module, own_scale(before, module))
        assert torch.equal(old, decoded(after, module, own_scale(after, module)))


def test_a_group_that_would_lose_too_much_is_refused_and_nothing_is_written(artifact: Path, tmp_path: Path) -> None:
    def enlarge(tensors: Tensors) -> None:
        tensors[f"{QKV[0]}.weight_global_scale"] *= 100
        tensors[f"{QKV[1]}.weight_global_scale"] *= 1e-3
        tensors[f"{GATE_UP[1]}.weight_global_scale"] *= 0.9

    change(artifact, enlarge)
    outcome = mend(artifact, tmp_path / "out", largest=0.04)
    assert not outcome.written
    assert not outcome.passed
    # The block scales of q leave E4M3's normal numbers; those of gate lose the usual rounding.
    assert [one.fused for one in outcome.refused] == [f"{LAYER}.3.self_attn.qkv_proj"]
    assert len(outcome.scales) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]
    assert mend(artifact, tmp_path / "out", largest=0.9).written


def test_unequal_scales_of_activations_become_the_smallest_and_no_weight_changes(
    artifact: Path, tmp_path: Path
) -> None:
    change(artifact, lambda tensors: tensors[f"{QKV[2]}.input_global_scale"].mul_(1.5))
    before = load(artifact)
    outcome = mend(artifact, tmp_path / "out")
    (one,) = outcome.scales
    assert (one.suffix, one.shared, one.relative_error) == ("input_global_scale", INPUT_SCALE, 0.0)
    after = load(tmp_path / "out")
    assert [float(after[f"{module}.input_global_scale"]) for module in QKV] == [INPUT_SCALE] * 3
    changed = {
        name for name in before if not torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8))
    }
    assert changed == {f"{QKV[2]}.input_global_scale"}
    assert outcome.passed


def drop_mtp(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.startswith("mtp.")]:
        del tensors[name]


def test_missing_tensors_and_files_come_from_the_source(
    artifact: Path, sources: dict[str, Path], tmp_path: Path
) -> None:
    change(artifact, drop_mtp)
    (artifact / "tokenizer.json").unlink()
    assert not mend(artifact, tmp_path / "out").written
    outcome = mend(artifact, tmp_path / "out", sources["dense"])
    weights, out = load(sources["dense"]), load(tmp_path / "out")
    assert set(outcome.tensors) == {name for name in weights if name.startswith("mtp.")}
    assert outcome.files == ("tokenizer.json",)
    for name in outcome.tensors:
        assert torch.equal(out[name].view(torch.uint8), weights[name].view(torch.uint8))
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == out.keys()
    assert verify(tmp_path / "out", sources["dense"], quiet).findings == ()


def test_a_checkpoint_of_one_file_gets_an_index_with_its_second(
    artifact: Path, sources: dict[str, Path], tmp_path: Path
) -> None:
    change(artifact, drop_mtp)
    next(artifact.glob("*.safetensors")).rename(artifact / "model.safetensors")
    (artifact / "model.safetensors.index.json").unlink()
    assert mend(artifact, tmp_path / "out", sources["dense"]).passed
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 2


def test_a_group_whose_tensors_lie_in_several_shards_is_mended(spoilt: dict[str, Path], tmp_path: Path) -> None:
    apart = Path(shutil.copytree(spoilt["dense"], tmp_path / "apart"))
    tensors = load(apart)
    next(apart.glob("*.safetensors")).unlink()
    weight_map = {name: f"model-{place % 3}.safetensors" for place, name in enumerate(sorted(tensors))}
    for shard in set(weight_map.values()):
        save_file({name: one for name, one in tensors.items() if weight_map[name] == shard}, apart / shard)
    (apart / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert mend(apart, tmp_path / "out").passed
    assert mend(spoilt["dense"], tmp_path / "whole").passed
    ours, theirs = load(tmp_path / "out"), load(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert not differing(ours, theirs)
    assert load_file(tmp_path / "out/model-1.safetensors").keys() == {n for n in tensors if weight_map[n][6] == "1"}


def test_what_cannot_be_mended_stays_a_finding(artifact: Path, sources: dict[str, Path], tmp_path: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors[f"{QKV[1]}.weight_global_scale"] *= 0.7
        tensors[f"{GATE_UP[0]}.weight_scale"].view(torch.uint8)[0, 0] = 0x7F
        tensors[f"{GATE_UP[1]}.weight_global_scale"] *= 0.7

    change(artifact, spoil)
    (artifact / "tokenizer.json").write_text("{}")
    outcome = mend(artifact, tmp_path / "out", sources["dense"])
    assert outcome.written
    assert not outcome.passed
    assert [one.fused for one in outcome.scales] == [f"{LAYER}.3.self_attn.qkv_proj"]
    left = {one.tensor for one in outcome.verification.findings}
    assert {"tokenizer.json", f"{GATE_UP[0]}.weight_scale"} < left
    assert f"{LAYER}.0.mlp.gate_up_proj.weight_global_scale" in left
    assert (tmp_path / "out/tokenizer.json").read_text() == "{}"


def test_a_sound_checkpoint_is_left_alone(sound: Path, tmp_path: Path) -> None:
    outcome = mend(sound, tmp_path / "out")
    assert outcome.passed
    assert not outcome.written
    assert outcome.scales == ()
    assert not (tmp_path / "out").exists()


def test_bad_places_are_refused_and_nothing_is_written(
    spoilt: dict[str, Path], sources: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(spoilt["dense"], tmp_path / "folder"))
    before = contents(folder)
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match="exists"):
        mend(folder, tmp_path / "taken")
    for out in (folder, folder / "deeper"):
        with pytest.raises(UserError, match="only read"):
            mend(folder, out)
    with pytest.raises(UserError, match="only read"):
        mend(folder, sources["dense"] / "out", sources["dense"])
    with pytest.raises(UserError, match="quantized itself"):
        mend(folder, tmp_path / "out", folder)
    with pytest.raises(UserError, match="no compressed-tensors"):
        mend(sources["dense"], tmp_path / "out")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/precious").write_text("kept")
    with pytest.raises(UserError, match="no unfinished repair"):
        mend(folder, tmp_path / "out")
    assert (tmp_path / "out.partial/precious").read_text() == "kept"
    assert contents(folder) == before
    assert not (tmp_path / "out").exists()


def test_an_interrupted_repair_leaves_nothing(spoilt: dict[str, Path], tmp_path: Path) -> None:
    def interrupt(done: int, total: int, description: str) -> None:
        if description == "repair: write" and done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        repair(spoilt["dense"], tmp_path / "out", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_repair_leaves_no_checkpoint_and_can_be_repeated(spoilt: dict[str, Path], tmp_path: Path) -> None:
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from harness.audit.repair import repair\n"
        "def die(done, total, description):\n"
        "    if description == 'repair: write' and done > total // 2:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "repair(Path(sys.argv[1]), Path(sys.argv[2]), progress=die)\n"
    )
    command = [sys.executable, "-c", program, str(spoilt["dense"]), str(tmp_path / "out")]
    assert subprocess.run(command, env={**os.environ}, check=False).returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    assert not (tmp_path / "out.partial/config.json").exists()
    assert mend(spoilt["dense"], tmp_path / "out").passed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_command_shows_each_scale_and_exits_by_what_is_left(
    spoilt: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = str(spoilt["dense"]), str(tmp_path / "out")
    assert main(["repair", folder, out, "--max-error", "0.001"]) == 1
    printed = capsys.readouterr().out
    assert "3 layers would lose more than 0.001 of their norm: nothing is written" in printed
    assert not (tmp_path / "out").exists()
    assert main(["repair", folder, out]) == 0
    printed = capsys.readouterr().out
    assert f"{LAYER}.0.mlp.gate_up_proj" in printed
    assert printed.endswith("passed\n")
    assert main(["verify", out]) == 0
    assert main(["repair", folder, out]) == 2
    assert "exists" in capsys.readouterr().err


def test_the_command_writes_one_json_document(
    spoilt: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["repair", str(spoilt["moe"]), str(tmp_path / "out"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["written"] and document["passed"]
    assert {one["suffix"] for one in document["scales"]} == {"weight_global_scale"}
