"""The streamed scorer against the torch engine: the same bits, whatever is in memory and wherever a pass was cut."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from harness.demo import checkpoint_path
from harness.demo.synthesize import synthesize
from harness.engines import torch_common
from harness.engines.protocol import Chunk, Engine, Prompt, open_engine
from harness.engines.streamed import Streamed
from harness.errors import UserError
from harness.formats import nvfp4
from harness.formats.nvfp4 import NVFP4, NVFP4A16
from harness.model.checkpoint import open_checkpoint
from harness.model.families.qwen35 import FAMILY
from harness.quantize.recipes import RECIPES, Recipe
from tests.artifacts import change, quiet, write_artifact, write_source
from tests.calibrated import demo_ids
from tests.conftest import tiny_config

Table = NDArray[np.float32]
LENGTHS = (70, 70, 70, 20, 1, 33, 33, 90)
TINY_VOCABULARY = 320
VARIANTS = ("rtn-a16", "w4a4", "w4a4-experts", "w4a4-deltanet", "mixed-fp8")
INPUTS_ROUNDED = [
    name for name in VARIANTS if any(form.input_activations for form in RECIPES[name].formats(FAMILY).values())
]


@pytest.fixture(scope="module", params=["dense", "moe"])
def demo(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def models(demo: str, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """An embedded model and a variant of it in every format."""
    source, folder = checkpoint_path(demo), tmp_path_factory.mktemp(demo)
    return [source, *(write_artifact(source, folder / name, RECIPES[name]) for name in VARIANTS)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A dense checkpoint of four layers, and two variants of it."""
    folder = tmp_path_factory.mktemp("tiny")
    source = write_source(folder / "source", "qwen3.5-9b")
    return [source, *(write_artifact(source, folder / name, RECIPES[name]) for name in ("rtn-a16", "w4a4"))]


@cache
def demo_windows(demo: str) -> list[list[int]]:
    ids = demo_ids(demo)
    starts = np.cumsum((0, *LENGTHS))
    return [ids[start : start + length] for start, length in zip(starts, LENGTHS, strict=False)]


def tiny_windows(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(len(lengths))
    return [torch.randint(TINY_VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def by_torch(folder: Path, windows: Sequence[Sequence[int]], batch_size: int, dtype: str = "float32") -> list[Table]:
    return list(open_engine("torch", folder, dtype=dtype, device="cpu").log_probs(windows, batch_size))


def together(chunks: Iterator[Chunk], windows: Sequence[Sequence[int]]) -> list[list[Table]]:
    """A table a window, by model, from chunks that must lie in order and without gaps."""
    found: list[list[list[Table]]] = []
    for chunk in chunks:
        if chunk.first == 0:
            found.append([[] for _ in chunk.log_probs])
        assert chunk.window == len(found) - 1
        for pieces, table in zip(found[-1], chunk.log_probs, strict=True):
            assert table.dtype == np.float32
            assert chunk.first == sum(map(len, pieces))
            pieces.append(table)
    assert len(found) == len(windows)
    joined = [[np.concatenate(pieces) for pieces in window] for window in found]
    assert [[len(table) for table in window] for window in joined] == [[len(w) - 1] * len(joined[0]) for w in windows]
    return [list(tables) for tables in zip(*joined, strict=True)]


def streamed(
    folders: Sequence[Path],
    windows: Sequence[Sequence[int]],
    batch_size: int,
    scratch: Path,
    dtype: str = "float32",
    **more: Any,
) -> list[list[Table]]:
    opened = Streamed(folders, dtype=dtype, device="cpu")
    return together(opened.log_probs(windows, batch_size, scratch=scratch, **more), windows)


def equal(one: Sequence[Table], other: Sequence[Table]) -> bool:
    return len(one) == len(other) and all(np.array_equal(a, b, equal_nan=True) for a, b in zip(one, other, strict=True))


def divergence(p: Sequence[Table], q: Sequence[Table]) -> float:
    """Mean Kullback-Leibler divergence, in nats a token."""
    one, other = (np.concatenate(tables).astype(float) for tables in (p, q))
    return float((np.exp(one) * (one - other)).sum(axis=1).mean())


# The numbers.


@pytest.fixture(scope="module")
def exact(models: list[Path], demo: str) -> list[dict[int, list[Table]]]:
    """By model and batch size, what the torch engine predicts in float32."""
    engines = (open_engine("torch", folder, dtype="float32", device="cpu") for folder in models)
    return [{size: list(engine.log_probs(demo_windows(demo), size)) for size in (1, 4)} for engine in engines]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_in_float32_one_pass_gives_the_torch_engines_bits_for_a_source_and_every_variant(
    models: list[Path], demo: str, exact: list[dict[int, list[Table]]], batch_size: int, tmp_path: Path
) -> None:
    found = streamed(models, demo_windows(demo), batch_size, tmp_path / "scratch")
    for folder, tables, expected in zip(models, found, exact, strict=True):
        assert equal(tables, expected[batch_size]), folder.name
    assert not any(equal(found[0], tables) for tables in found[1:])


def test_in_bfloat16_what_differs_is_what_compressed_tensors_rounds_and_no_more_than_bfloat16_does(
    models: list[Path], demo: str, exact: list[dict[int, list[Table]]], tmp_path: Path
) -> None:
    windows = demo_windows(demo)
    found = streamed(models, windows, 4, tmp_path / "scratch", "bfloat16")
    for folder, tables, in_float32 in zip(models, found, exact, strict=True):
        expected = by_torch(folder, windows, 4, "bfloat16")
        if demo == "dense" and folder.name in INPUTS_ROUNDED:
            # compressed-tensors computes the scales of activations in BF16, and `loading` in float32: the two are not
            # much further apart than the torch engine's BF16 is from float32, where they agree.
            by_bfloat16 = divergence(in_float32[4], expected)
            assert 0 < divergence(expected, tables) < 2 * by_bfloat16, folder.name
            assert divergence(in_float32[4], tables) < 1.5 * by_bfloat16, folder.name
        else:
            assert equal(tables, expected), folder.name


def test_a_variants_own_head_is_used_quantized_or_not(tiny: list[Path], tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(tiny[0], changed)
    change(changed, lambda tensors: tensors["lm_head.weight"].mul_(1.5))
    folders = [tiny[0], changed]
    for form in (NVFP4A16, NVFP4):
        folders.append(write_artifact(tiny[0], tmp_path / form.name, Recipe("head", ((form, ("head",)),))))
    windows = tiny_windows(40, 40, 7)
    found = streamed(folders, windows, 2, tmp_path / "scratch")
    for folder, tables in zip(folders, found, strict=True):
        assert equal(tables, by_torch(folder, windows, 2)), folder.name
    assert not any(equal(found[0], tables) for tables in found[1:])


def test_a_tied_head_is_the_embedding_table(tmp_path: Path) -> None:
    config = tiny_config("qwen3.5-9b") | {"tie_word_embeddings": True}
    config["text_config"]["tie_word_embeddings"] = True
    synthesize(config, tmp_path / "tied", num_layers=None, vocab_size=None, seed=0, progress=quiet)
    change(tmp_path / "tied", lambda tensors: tensors.pop("lm_head.weight", None))
    windows = tiny_windows(30, 30)
    (found,) = streamed([tmp_path / "tied"], windows, 2, tmp_path / "scratch")
    assert equal(found, by_torch(tmp_path / "tied", windows, 2))


def test_rows_of_a_product_with_the_head_are_the_torch_engines_and_bound_a_chunk(
    tiny: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_common, "LOGITS_BYTES", 7 * 4 * TINY_VOCABULARY)  # seven tokens at once
    windows = tiny_windows(30, 30, 30, 8, 2)
    chunks = list(Streamed(tiny, dtype="float32", device="cpu").log_probs(windows, 3, scratch=tmp_path / "scratch"))
    assert max(len(chunk.log_probs[0]) for chunk in chunks) == 7
    for folder, tables in zip(tiny, together(iter(chunks), windows), strict=True):
        assert equal(tables, by_torch(folder, windows, 3))


def test_weights_that_are_no_numbers_give_what_they_give_in_the_torch_engine(tiny: list[Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny[0], broken)
    change(broken, lambda tensors: tensors["model.language_model.embed_tokens.weight"][7].fill_(torch.nan))
    windows = [[1] * 20, [2] * 10 + [7] + [2] * 9]
    (found,) = streamed([broken], windows, 1, tmp_path / "scratch")
    assert equal(found, by_torch(broken, windows, 1))
    assert np.isfinite(found[0]).all()
    assert np.isnan(found[1][10:]).all()


lengths = st.lists(st.sampled_from([1, 2, 5, 5, 17, 17, 40]), min_size=1, max_size=9)


@settings(max_examples=8, phases=[Phase.explicit, Phase.reuse, Phase.generate])  # to shrink would take minutes
@given(lengths, st.integers(1, 4), st.integers(0, 60_000))
def test_every_position_is_predicted_once_whatever_fits_into_memory(
    tmp_path_factory: pytest.TempPathFactory, tiny: list[Path], given_lengths: list[int], batch_size: int, memory: int
) -> None:
    windows, folder = tiny_windows(*given_lengths), tmp_path_factory.mktemp("pass")
    opened = Streamed(tiny[:2], dtype="float32", device="cpu")
    found, expected = (
        together(opened.log_probs(windows, batch_size, scratch=folder / "scratch", hidden_bytes=limit), windows)
        for limit in (memory, 10**9)
    )
    for one, other in zip(found, expected, strict=True):
        assert equal(one, other)
        for table in one:
            np.testing.assert_allclose(np.exp(table.astype(float)).sum(axis=1), 1, atol=1e-5)
    assert list(folder.iterdir()) == []


def test_block_scales_of_activations_are_those_of_compressed_tensors_on_either_side_of_a_tie() -> None:
    """Over so many blocks that another order of the product would show: one in two million rounds otherwise."""
    generator = torch.Generator().manual_seed(0)
    arguments = QuantizationArgs(**dict(NVFP4.input_activations or ()))
    x = torch.rand(1, 1 << 14, 16 * 64, generator=generator)
    others = 0
    for divisor in torch.rand(8, 1, generator=generator) * 400 + 50:
        expected, _ = compute_dynamic_scales_and_zp(x, arguments, nn.Module(), global_scale=divisor)
        found = nvfp4.activation_block_scales(x, divisor).float()
        assert torch.equal(found, expected.float().view_as(found))
        others += int((nvfp4.absmax_block_scales(x, divisor).float() != found).sum())
    assert others > 0


# As an engine.


@pytest.fixture
def engine(tiny: list[Path]) -> Iterator[Engine]:
    opened = open_engine("streamed", tiny[2], dtype="float32", device="cpu")
    yield opened
    opened.close()


def test_as_an_engine_it_scores_as_the_torch_engine_does(engine: Engine, tiny: list[Path]) -> None:
    windows = tiny_windows(50, 50, 50, 1, 9)
    reference = open_engine("torch", tiny[2], dtype="float32", device="cpu")
    scores = list(engine.score(windows, 2))
    assert {score.dtype for score in scores} == {np.dtype(np.float64)}
    for found, expected in zip(scores, reference.score(windows, 2), strict=True):
        assert np.array_equal(found, expected)
    assert equal(list(engine.log_probs(windows, 2)), list(reference.log_probs(windows, 2)))
    for top, other in zip(engine.top_log_probs(windows, 2, 5), reference.top_log_probs(windows, 2, 5), strict=True):
        for one, two in zip(vars(top).values(), vars(other).values(), strict=True):
            assert np.array_equal(one, two)


def test_it_leaves_nothing_in_the_temporary_folder_even_if_it_is_not_heard_out(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    answers = engine.score(tiny_windows(20, 20), 1)
    next(answers)
    assert list(tmp_path.iterdir()) != []
    del answers
    assert list(tmp_path.iterdir()) == []


def test_what_an_engine_that_only_scores_cannot_do_is_the_users_error(engine: Engine, tiny: list[Path]) -> None:
    assert engine.info.can_score
    for ask in (
        lambda: engine.decode([[1, 2]], 2),
        lambda: engine.choices([], 1),
        lambda: engine.generate([Prompt((1,), 3)], 1),
    ):
        with pytest.raises(UserError, match=r"only scores texts\. Use the torch"):
            ask()
    with pytest.raises(UserError, match="has no option 'fast'"):
        open_engine("streamed", tiny[0], options={"fast": True})
    with pytest.raises(UserError, match="Did you mean 'bfloat16'"):
        open_engine("streamed", tiny[0], dtype="bfloat61")


def test_info_says_what_computes_each_layer_and_that_one_is_in_memory(models: list[Path], demo: str) -> None:
    for folder, info in zip(models, Streamed(models, dtype="float32", device="cpu").infos, strict=True):
        reference = open_engine("torch", folder, dtype="float32", device="cpu").info
        assert (info.name, info.version, info.device, info.dtype) == ("streamed", *reference_of(reference))
        assert info.kernels.keys() == reference.kernels.keys()
        decoded_by = {
            how.replace("compressed-tensors decompress", "decoded by the harness") for how in info.kernels.values()
        }
        assert decoded_by == {
            how.replace("compressed-tensors decompress", "decoded by the harness") for how in reference.kernels.values()
        }
        same = ("attention_implementation", "deltanet_implementation", "experts_implementation", "cpu_capability")
        assert {key: info.effective[key] for key in same} == {key: reference.effective[key] for key in same}
        assert info.effective["weight_bytes_per_token"] == reference.effective["weight_bytes_per_token"]
        assert info.effective["weight_bytes_resident"] == largest_layer_bytes(models[0])
        assert json.loads(json.dumps(info.as_dict())) == info.as_dict()


def reference_of(info: Any) -> tuple[str, str, str]:
    return info.version, info.device, info.dtype


def largest_layer_bytes(source: Path) -> int:
    """In float32, from the shapes on the disk: of a decoder layer or the head."""
    sizes: dict[str, int] = {}
    for name, entry in open_checkpoint(source).tensors.items():
        if name.startswith("model.language_model.layers.") or name == "lm_head.weight":
            part = ".".join(name.split(".")[:4])
            sizes[part] = sizes.get(part, 0) + 4 * entry.num_elements
    return max(sizes.values())


# Interrupted passes.


class Killed(Exception):  # noqa: N818 - it is what happened
    pass


@pytest.mark.parametrize("layers", [0, 1, 3, 5, 11])
@pytest.mark.parametrize("memory", [0, 10**9])
def test_a_killed_pass_goes_on_at_the_layer_it_was_in_and_ends_with_the_same_bits(
    tiny: list[Path], tmp_path: Path, layers: int, memory: int
) -> None:
    windows, scratch = tiny_windows(30, 30, 12), tmp_path / "scratch"
    expected = streamed(tiny, windows, 1, tmp_path / "other")
    total = 4 * len(tiny) * len(windows)
    calls: list[tuple[int, int, str]] = []

    def kill(done: int, total: int, description: str, note: str = "") -> None:
        if done == layers * len(windows) + 1:  # within the next layer
            raise Killed

    def count(done: int, total: int, description: str, note: str = "") -> None:
        calls.append((done, total, description))

    with pytest.raises(Killed):
        streamed(tiny, windows, 1, scratch, hidden_bytes=memory, progress=kill)
    found = streamed(tiny, windows, 1, scratch, hidden_bytes=memory, progress=count)
    assert all(equal(one, other) for one, other in zip(found, expected, strict=True))
    assert calls == [(done, total, "score layers") for done in range(layers * len(windows), total + 1)]
    assert not scratch.exists()


def test_predictions_that_were_not_heard_out_are_made_again_without_a_layer(tiny: list[Path], tmp_path: Path) -> None:
    windows, scratch = tiny_windows(30, 12), tmp_path / "scratch"
    expected = streamed(tiny, windows, 2, tmp_path / "other")
    chunks = Streamed(tiny, dtype="float32", device="cpu").log_probs(windows, 2, scratch=scratch)
    next(chunks)
    del chunks
    calls: list[int] = []
    found = streamed(tiny, windows, 2, scratch, progress=lambda done, *_: calls.append(done))
    assert all(equal(one, other) for one, other in zip(found, expected, strict=True))
    assert calls == [4 * len(tiny) * 2]


def interrupted(folders: Sequence[Path], windows: Sequence[Sequence[int]], scratch: Path) -> None:
    """Leaves a pass in `scratch` whose layers are all finished."""
    next(Streamed(folders, dtype="float32", device="cpu").log_probs(windows, 1, scratch=scratch))


@pytest.mark.parametrize("other", ["windows", "batch size", "dtype", "models", "weights"])
def test_what_another_pass_left_is_not_used(tiny: list[Path], tmp_path: Path, other: str) -> None:
    windows, scratch, folders = tiny_windows(30, 30), tmp_path / "scratch", tiny[:2]
    source = tmp_path / "source"
    shutil.copytree(tiny[0], source)
    interrupted([source, tiny[1]], windows, scratch)
    (scratch / "mine").write_text("precious")
    if other == "weights":
        change(source, lambda tensors: tensors["model.language_model.norm.weight"].add_(1))
    folders = [source, tiny[2] if other == "models" else tiny[1]]
    windows = windows[::-1] if other == "windows" else windows
    batch_size = 2 if other == "batch size" else 1
    dtype = "bfloat16" if other == "dtype" else "float32"
    calls: list[int] = []
    found = streamed(folders, windows, batch_size, scratch, dtype, progress=lambda done, *_: calls.append(done))
    assert calls[0] == 0
    assert equal(found[0], by_torch(source, windows, batch_size, dtype))
    assert [path.name for path in scratch.iterdir()] == ["mine"]


def test_a_state_that_is_no_state_is_a_fresh_start(tiny: list[Path], tmp_path: Path) -> None:
    windows, scratch = tiny_windows(10), tmp_path / "scratch"
    for text in ("{", "[1]", "{}"):
        interrupted(tiny[:1], windows, scratch)
        (state,) = scratch.glob("*.json")
        state.write_text(text)
        calls: list[int] = []
        streamed(tiny[:1], windows, 1, scratch, progress=lambda done, *_, calls=calls: calls.append(done))
        assert calls == list(range(5))


def test_hidden_states_that_were_cut_are_named(tiny: list[Path], tmp_path: Path) -> None:
    windows, scratch = tiny_windows(10), tmp_path / "scratch"
    interrupted(tiny[:1], windows, scratch)
    for path in scratch.glob("streamed-hidden-*"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"streamed-hidden-0-0 is cut"):
        streamed(tiny[:1], windows, 1, scratch)


# What the user can mend.


def test_a_folder_that_cannot_be_written_is_the_users_error(tiny: list[Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="scratch cannot be written"):
        streamed(tiny[:1], tiny_windows(5), 1, tmp_path / "file" / "scratch")


@pytest.mark.parametrize(
    ("cut", "says"),
    [
        ({"num_layers": 3, "vocab_size": None}, "source has 4 decoder layers and .*other 3"),
        ({"num_layers": None, "vocab_size": 256}, "source has 320 tokens in its vocabulary and .*other 256"),
    ],
)
def test_models_that_cannot_be_compared_are_both_named(
    tiny: list[Path], tmp_path: Path, cut: dict[str, Any], says: str
) -> None:
    synthesize(tiny_config("qwen3.5-9b"), tmp_path / "other", seed=0, progress=quiet, **cut)
    with pytest.raises(UserError, match=says):
        Streamed([tiny[0], tmp_path / "other"], dtype="float32", device="cpu")


@pytest.mark.parametrize("token", [-1, TINY_VOCABULARY])
def test_a_token_that_the_model_does_not_know_is_named(tiny: list[Path], tmp_path: Path, token: int) -> None:
    with pytest.raises(UserError, match=f"Window 1 has the token {token}, and .* knows 320 tokens"):
        streamed(tiny[:1], [[1, 2], [3, token]], 1, tmp_path / "scratch")
    assert list(tmp_path.iterdir()) == []


LAYER = "model.language_model.layers.3.self_attn."


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda t: t.pop(f"{LAYER}o_proj.weight_packed"), f"lacks {LAYER}o_proj.weight_packed"),
        (lambda t: t.update({"lm_head.weight": torch.ones(2)}), "has the wrong shape for lm_head.weight"),
        (lambda t: t.update({f"{LAYER}new": torch.ones(2)}), f"no place for: {LAYER}new"),
        (
            lambda t: t.update({f"{LAYER}q_norm.weight": torch.ones(32, dtype=torch.uint8)}),
            f"{LAYER}q_norm.weight is U8",
        ),
    ],
)
def test_a_damaged_checkpoint_is_named_before_anything_is_computed(
    tiny: list[Path], tmp_path: Path, damage: Callable[[dict[str, torch.Tensor]], object], says: str
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny[2], broken)
    change(broken, damage)
    with pytest.raises(UserError) as caught:
        open_engine("streamed", broken, device="cpu")
    assert says in caught.value.problem


# Memory.

PEAK_MEMORY = """
import sys
from pathlib import Path
from harness.engines.streamed import Streamed

def peak():
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024

def run(*folders):
    streamed = Streamed(folders, dtype="bfloat16", device="cpu")
    for chunk in streamed.log_probs([[1] * 64] * 2, 1, scratch=Path(sys.argv[1])):
        pass

run(Path(sys.argv[2]))
before = peak()
run(*map(Path, sys.argv[3:]))
sys.stdout.write(str(peak() - before))
"""


def test_a_pass_over_two_models_takes_the_memory_of_one_layer(tiny: list[Path], tmp_path: Path) -> None:
    config = tiny_config("qwen3.5-9b")
    config["text_config"] |= {"hidden_size": 512, "intermediate_size": 3072, "num_hidden_layers": 16}
    config["vision_config"]["out_hidden_size"] = 512
    source = tmp_path / "source"
    size = synthesize(config, source, num_layers=None, vocab_size=None, seed=0, progress=quiet)
    attention = Recipe("attention", ((NVFP4A16, ("attention",)),))
    variant = write_artifact(source, tmp_path / "variant", attention)
    layer = 2 * sum(
        entry.num_elements
        for name, entry in open_checkpoint(source).tensors.items()
        if name.startswith("model.language_model.layers.0.")
    )
    assert size > 16 * layer > 150e6
    command = [sys.executable, "-c", PEAK_MEMORY, *map(str, (tmp_path / "scratch", tiny[0], source, variant))]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    # The layer, and some rows of its weights while they are read.
    assert layer < int(result.stdout) < 4 * layer < 0.3 * size


def test_two_passes_do_not_share_a_scratch(tmp_path: Path) -> None:
    windows = [list(range(10, 20))]
    source = checkpoint_path("dense")
    scratch = tmp_path / "scratch"

    def begin(done: int, total: int, description: str, note: str = "", /) -> None:
        if done == 1:
            other = Streamed([source], dtype="float32", device="cpu").log_probs(windows, 1, scratch=scratch)
            with pytest.raises(UserError, match="is used by another run"):
                next(other)

    opened = Streamed([source], dtype="float32", device="cpu")
    chunks = opened.log_probs(windows, 1, scratch=scratch, progress=begin)
    assert len(list(chunks)) == 1
    assert not scratch.exists()
