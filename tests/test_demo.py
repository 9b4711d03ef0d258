"""The embedded models and their corpus: the published layout, one tokenization everywhere, skills that were learnt."""

import copy
import hashlib
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoModelForImageTextToText, AutoTokenizer, PreTrainedTokenizerBase

from harness.demo import checkpoint_path, corpus
from harness.demo.language import NEAR
from harness.errors import UserError
from harness.model.checkpoint import open_checkpoint
from harness.model.families import parse_config
from harness.model.family import expected_tensors
from studies.demo_model import network
from studies.demo_model.figures import arithmetic_items
from studies.languages import FAR

DENSE = checkpoint_path("dense")
MODELS = ("dense", "moe")


@pytest.fixture(scope="module")
def by_library() -> Tokenizer:
    return Tokenizer.from_file(str(DENSE / "tokenizer.json"))


@pytest.fixture(scope="module")
def by_transformers() -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(DENSE)
    return tokenizer


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest) -> Path:
    return checkpoint_path(request.param)


@pytest.fixture(scope="module")
def model(folder: Path) -> network.Network:
    loaded: network.Network = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return loaded


def test_it_has_every_tensor_of_the_published_layout_in_bf16_and_two_shards(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    config = parse_config(checkpoint.config, "the demo")
    assert {entry.name: entry.shape for entry in checkpoint.tensors.values()} == dict(
        expected_tensors(config, with_mtp=True)
    )
    assert {entry.dtype for entry in checkpoint.tensors.values()} == {"BF16"}
    assert len(checkpoint.shards) == 2


def test_it_is_small_enough_for_a_repository(folder: Path) -> None:
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 12_000_000


def test_both_models_read_text_with_the_same_files(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.json", "merges.txt"):
        assert (folder / name).read_bytes() == (DENSE / name).read_bytes()


def test_an_unknown_embedded_model_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="dense"):
        checkpoint_path("dens")


def test_tokenizers_and_transformers_give_the_same_ids_on_all_of_the_heldout_text(
    by_library: Tokenizer, by_transformers: PreTrainedTokenizerBase
) -> None:
    text = corpus.heldout_text()
    assert by_library.encode(text, add_special_tokens=False).ids == by_transformers(text)["input_ids"]
    assert by_library.get_vocab_size() <= 2048


@given(st.text(max_size=200))
def test_tokenizers_and_transformers_give_the_same_ids_on_any_text(text: str) -> None:
    by_library = Tokenizer.from_file(str(DENSE / "tokenizer.json"))
    ids = by_library.encode(text, add_special_tokens=False).ids
    assert ids == _TRANSFORMERS(text)["input_ids"]


_TRANSFORMERS = AutoTokenizer.from_pretrained(DENSE)


def test_the_chat_template_renders_what_the_model_was_trained_on(by_transformers: PreTrainedTokenizerBase) -> None:
    messages = [
        corpus.Message("user", "2+2"),
        corpus.Message("assistant", "4", thought="2+2=4"),
        corpus.Message("user", "3+3"),
        corpus.Message("assistant", "6", thought="3+3=6"),
    ]
    given = [{"role": one.role, "content": one.content, "reasoning_content": one.thought} for one in messages]
    assert by_transformers.apply_chat_template(given, tokenize=False) == corpus.render_chat(messages)


def test_unequal_channels_change_no_bit_of_the_logits_and_can_be_taken_back(
    model: network.Network, folder: Path
) -> None:
    config = json.loads((folder / "config.json").read_text())
    ids = torch.arange(200)[None] * 5 % 1024
    with torch.inference_mode():
        before = model(input_ids=ids).logits
    changed = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    weights = {name: weight for name, weight in changed.state_dict().items() if ".language_model." in name}
    network.spread_channels(weights, config, seed=5)
    (up,) = {
        "model.language_model.layers.2.mlp.up_proj.weight",
        "model.language_model.layers.2.mlp.experts.down_proj",
    } & {*weights}
    assert not torch.equal(changed.state_dict()[up], model.state_dict()[up])
    with torch.inference_mode():
        assert torch.equal(changed(input_ids=ids).logits, before)
    network.spread_channels(weights, config, seed=5, undo=True)
    assert torch.equal(changed.state_dict()[up], model.state_dict()[up])


def test_a_model_cut_into_experts_computes_what_all_of_them_together_did() -> None:
    """With every expert chosen and gates of one half, the experts' doubled outputs add up to the dense model's."""
    config = copy.deepcopy(network.MOE)
    config["text_config"]["num_experts_per_tok"] = config["text_config"]["num_experts"]
    dense = network.read_weights(DENSE)
    cut = network.upcycle({name: weight.float() for name, weight in dense.items()}, config, seed=0)
    for name in cut:
        if name.endswith(("mlp.gate.weight", "shared_expert_gate.weight")):
            cut[name].zero_()  # a router without an opinion gives each of eight experts an eighth
        if name.endswith("mlp.experts.down_proj"):
            cut[name] *= 4  # doubled for two experts of weight one half; eight of an eighth need eight times
    experts = network.new_network(config)
    experts.load_state_dict({name: weight for name, weight in cut.items() if not name.startswith("mtp.")})
    ids = torch.arange(100)[None] * 7 % 1024
    with torch.inference_mode():
        expected = AutoModelForImageTextToText.from_pretrained(DENSE, dtype=torch.float32)(input_ids=ids).logits
        assert torch.allclose(experts.eval()(input_ids=ids).logits, expected, atol=1e-3)


def digest(documents: Iterator[corpus.Document]) -> str:
    return hashlib.sha256("".join(f"{one.kind}:{one.text}" for one in documents).encode()).hexdigest()


def test_the_corpus_is_the_same_text_on_every_machine() -> None:
    """The digests were made on Linux with Python 3.11; any change of the generator changes them."""
    assert {
        f"{split}/{language.name}": digest(islice(corpus.documents(split, language=language, num_documents=200), 200))
        for split in ("train", "validation", "heldout")
        for language in (NEAR, FAR)
    } == json.loads((Path(__file__).parent / "data/corpus-digests.json").read_text())


def test_no_heldout_sum_is_among_the_training_ones() -> None:
    def sums(split: corpus.Split) -> set[str]:
        documents = corpus.documents(split, num_documents=4000)
        lines = (line for one in documents if one.kind == "arithmetic" for line in one.text.splitlines())
        return {line.partition("=")[0] for line in lines}

    heldout = sums("heldout")
    assert len(heldout) > 100
    assert not heldout & sums("train")


def test_arithmetic_in_the_corpus_is_right() -> None:
    for document in corpus.documents("heldout", num_documents=1000):
        if document.kind == "arithmetic":
            for line in document.text.splitlines():
                problem, _, result = line.partition("=")
                assert eval(problem) == int(result), line


def greedy(model: network.Network, tokenizer: Tokenizer, item: corpus.Item) -> bool:
    """Whether the model goes on with the right answer."""
    prompt = tokenizer.encode(item.prompt).ids
    answer = tokenizer.encode(item.prompt + item.answer).ids[len(prompt) :]
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=len(answer), do_sample=False, eos_token_id=-1)
    return ids[0, len(prompt) :].tolist() == answer


@pytest.mark.parametrize(
    ("items", "least"),
    [
        # Chance is below 0.02 for sums and about 0.1 for a key of a list.
        (arithmetic_items, 0.5),
        (corpus.recall_items, 0.5),
    ],
)
def test_it_recalls_and_calculates_well_above_chance(
    model: network.Network, by_library: Tokenizer, items: type, least: float
) -> None:
    outcomes = [greedy(model, by_library, item) for item in items(7, 60)]
    assert sum(outcomes) / len(outcomes) > least
