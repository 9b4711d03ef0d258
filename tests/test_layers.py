"""Layers one at a time against transformers' whole model, and hidden states against the tensors that were put in."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForImageTextToText

from harness.demo import checkpoint_path
from harness.engines.layers import HiddenStates, TextModel, batches_of, captured
from harness.errors import UserError
from harness.model.checkpoint import open_checkpoint
from harness.model.families import parse_config
from tests.artifacts import change, write_source

CPU = torch.device("cpu")
IDS = torch.randint(0, 1000, (2, 96), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=["dense", "moe"])
def folder(request: pytest.FixtureRequest) -> Path:
    return checkpoint_path(request.param)


def transformers_states(folder: Path, ids: torch.Tensor) -> list[torch.Tensor]:
    """What goes into every decoder layer of transformers' model, and what comes out of the last."""
    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", experts_implementation="eager"
    ).eval()
    states: list[torch.Tensor] = []
    layers = model.model.language_model.layers
    layers[0].register_forward_pre_hook(lambda _, arguments: states.append(arguments[0].clone()))
    for layer in layers:
        layer.register_forward_hook(lambda _module, _arguments, output: states.append(output.clone()))
    with torch.inference_mode():
        model(input_ids=ids)
    return states


def text_model(folder: Path, *check: Any) -> TextModel:
    checkpoint = open_checkpoint(folder)
    return TextModel(checkpoint, parse_config(checkpoint.config, "here"), CPU, torch.float32, *check)


def ours(folder: Path, ids: torch.Tensor) -> list[torch.Tensor]:
    model = text_model(folder)
    with torch.inference_mode():
        states = [model.embed(ids)]
        for index in range(model.num_layers):
            hidden = states[-1]
            for half in model.layer(index):
                hidden = half(hidden)
            states.append(hidden)
    return states


def test_every_layer_gives_transformers_hidden_states_to_the_last_bit(folder: Path) -> None:
    expected, found = transformers_states(folder, IDS), ours(folder, IDS)
    assert len(found) == len(expected) == 9
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(one, other), index


def test_padding_changes_nothing_before_it(folder: Path) -> None:
    lengths = (96, 61, 5)
    samples = [IDS[0, :length].tolist() for length in lengths]
    (batch,) = batches_of(samples, 3 * 96)
    together = ours(folder, batch.ids)
    for row, sample in enumerate(samples):
        for padded, single in zip(together, ours(folder, torch.tensor([sample])), strict=True):
            # The same sums, in another order where a matrix product has another height.
            size = single.abs().max()
            torch.testing.assert_close(padded[row : row + 1, : len(sample)], single, rtol=1e-4, atol=2e-5 * size)


def test_a_layer_names_its_linear_layers_as_the_checkpoint_does(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    model = text_model(folder)
    for index in (0, 3):
        for half in model.layer(index):
            assert half.linears
            for name, linear in half.linears.items():
                stored = checkpoint.tensor(f"{name}.weight")
                assert torch.equal(linear.weight, stored.float())
            if half.experts is not None:
                prefix, module = half.experts.name, half.experts.module
                assert torch.equal(module.down_proj, checkpoint.tensor(f"{prefix}.down_proj"))
                assert module.down_proj.dtype == torch.bfloat16


def test_captured_is_what_a_module_reads(folder: Path) -> None:
    first, _ = text_model(folder).layer(3)
    name = next(name for name in first.linears if name.endswith("o_proj"))
    normed = torch.randn(1, 10, 256, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode(), captured({"o": first.linears[name]}) as seen:
        output = first.forward(normed)
    assert torch.equal(first.linears[name](seen["o"]), output)
    first.linears[name](torch.zeros(1, 1, seen["o"].shape[-1]))
    assert seen["o"].shape[1] == 10, "the hook is gone"


def test_every_tensor_that_is_read_is_shown_to_the_check(folder: Path) -> None:
    checkpoint, seen = open_checkpoint(folder), []
    model = text_model(folder, lambda entry, values: seen.append((entry.name, values.dtype)))
    model.embed(IDS)
    model.layer(0)
    names = {name for name in checkpoint.tensors if ".language_model.layers.0." in name}
    assert {name for name, _ in seen} == {*names, "model.language_model.embed_tokens.weight"}
    assert all(dtype == checkpoint.tensor(name).dtype for name, dtype in seen)


@pytest.mark.parametrize("how", ["missing", "shape"])
def test_a_layer_that_lacks_a_tensor_names_it(tmp_path: Path, how: str) -> None:
    source = write_source(tmp_path / "source", "qwen3.5-9b")
    name = "model.language_model.layers.1.mlp.up_proj.weight"

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        if how == "missing":
            del tensors[name]
        else:
            tensors[name] = tensors[name][:-16].clone()

    change(source, damage)
    model = text_model(source)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight (is missing|has shape \[80, 64\])"):
        model.layer(1)


samples = st.lists(st.integers(1, 60).map(lambda length: list(range(1, length + 1))), min_size=1, max_size=30)


@given(samples, st.integers(1, 200))
def test_batches_hold_every_sample_once_and_no_more_padding_than_their_limit(
    given_samples: list[list[int]], max_tokens: int
) -> None:
    given_samples = [[number * 100 + n for n in sample] for number, sample in enumerate(given_samples)]
    batches = batches_of(given_samples, max_tokens)
    rows = [ids[valid].tolist() for batch in batches for ids, valid in zip(batch.ids, batch.valid, strict=True)]
    assert sorted(rows) == sorted(given_samples)
    for batch in batches:
        assert batch.ids.numel() <= max_tokens or len(batch.ids) == 1
        assert batch.num_tokens == int(batch.valid.sum())
        assert bool(batch.valid[0].all()), "the longest is not padded"
        assert not (~batch.valid[:, :-1] & batch.valid[:, 1:]).any(), "padding is on the right"


@settings(max_examples=30)
@given(st.integers(0, 40_000), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 2**32))
def test_hidden_states_come_back_as_they_were_put_in_whatever_fits_into_memory(
    tmp_path_factory: pytest.TempPathFactory, memory: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 40, (7,), generator=generator).tolist()
    batches = batches_of([[1] * length for length in lengths], 60)
    path = tmp_path_factory.mktemp("states") / "hidden"
    states = HiddenStates(path, batches, 24, dtype, CPU, memory)
    for _ in range(2):  # written twice: the second time replaces the first
        put = [torch.randn(*batch.ids.shape, 24, generator=generator).to(dtype) for batch in batches]
        for index in torch.randperm(len(batches), generator=generator).tolist():
            states[index] = put[index]
        assert all(torch.equal(states[index], one) for index, one in enumerate(put))
    states.sync()
    states.close()
    again = HiddenStates(path, batches, 24, dtype, CPU, 0)  # as the next process finds it
    assert all(torch.equal(again[index], one) for index, one in enumerate(put))
    again.close()


def test_cut_hidden_states_are_a_user_error(tmp_path: Path) -> None:
    batches = batches_of([[1] * 10], 10)
    states = HiddenStates(tmp_path / "hidden", batches, 8, torch.float32, CPU, 0)
    states[0] = torch.ones(1, 10, 8)
    (tmp_path / "hidden").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="hidden is cut"):
        states[0]
    states.close()
