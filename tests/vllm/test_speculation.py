"""MTP in vLLM with the embedded models' own heads: acceptance by vLLM's counters, and text that does not change."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.demo import checkpoint_path, corpus
from harness.engines.protocol import Decoded, Engine, open_engine
from harness.errors import UserError
from harness.measure import decode, perplexity
from tests.vllm.conftest import IN_ONE_PROCESS, OPTIONS, Engines
from tests.vllm.ties import parted

PROMPTS, PROMPT, NEW_TOKENS = 8, 128, 65


def heldout(model: str) -> list[int]:
    return perplexity.tokenize(checkpoint_path(model), corpus.heldout_text())


def started(folder: Path, **options: int) -> Engine:
    wanted = {**OPTIONS, "text_only": True, **options}
    return open_engine("vllm", folder, dtype="bfloat16", purpose="decode", options=wanted)


@pytest.fixture(scope="module", params=["dense", "moe"])
def generations(request: pytest.FixtureRequest, engines: Engines) -> tuple[str, Decoded, Decoded]:
    """The same greedy generations without and with one speculative token."""
    engines.end()
    folder = checkpoint_path(request.param)
    prompts = decode.prompts(heldout(request.param), PROMPTS, PROMPT)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(*IN_ONE_PROCESS)
        for options in ({}, {"speculative_tokens": 1}):
            engine = started(folder, **options)
            found.append(engine.decode(prompts, NEW_TOKENS))
            engine.close()
    return request.param, found[0], found[1]


def test_the_trained_head_is_accepted_more_often_than_not(generations: tuple[str, Decoded, Decoded]) -> None:
    _, plain, speculative = generations
    assert plain.drafts is None
    drafts = speculative.drafts
    assert drafts is not None
    # Every draft adds itself if it is accepted, and the token that the model adds; the prefill adds one of its own.
    added = drafts.num_drafts + drafts.num_accepted_tokens
    wanted = PROMPTS * (NEW_TOKENS - 1)
    assert wanted <= added <= wanted + PROMPTS, "the counters are those of this generation"
    assert drafts.num_draft_tokens == drafts.num_drafts
    assert drafts.num_accepted_tokens / drafts.num_draft_tokens > 0.5


def test_speculation_changes_no_token_but_a_tie(generations: tuple[str, Decoded, Decoded]) -> None:
    model, plain, speculative = generations
    prompts = decode.prompts(heldout(model), PROMPTS, PROMPT)
    assert parted(checkpoint_path(model), prompts, speculative.token_ids, plain.token_ids) == []
    rows = zip(plain.token_ids, speculative.token_ids, strict=True)
    # How many ties tip is the processor's: without AVX-512 it rounds bfloat16 elsewhere.
    assert any(one == other for one, other in rows)


def changed_head(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Copies the dense model into `folder` with its MTP tensors changed."""
    shutil.copytree(checkpoint_path("dense"), folder)
    weight_map = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        head = change({name: tensor for name, tensor in tensors.items() if name.startswith("mtp.")})
        kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("mtp.")} | head
        save_file(kept, file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(kept, file.name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_a_missing_head_is_named_before_vllm_starts(tmp_path: Path) -> None:
    changed_head(tmp_path / "model", lambda head: {})
    with pytest.raises(UserError, match="has no MTP head"):
        started(tmp_path / "model", speculative_tokens=1)


@pytest.mark.usefixtures("in_one_process")
def test_an_untrained_head_is_found_before_anything_is_timed(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)

    def untrained(head: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            name: torch.randn(tensor.shape, generator=generator).mul(0.02).to(tensor.dtype)
            for name, tensor in head.items()
        }

    changed_head(tmp_path / "model", untrained)
    engine = started(tmp_path / "model", speculative_tokens=1)
    sample = decode.coherence(engine, heldout("dense"), vocabulary=1024)
    engine.close()
    assert sample["acceptance_share"] < decode.LEAST_ACCEPTANCE
    assert not sample["coherent"]
