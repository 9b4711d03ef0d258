"""An image with text through source and artifacts: the vision tower is the source's to the bit, and it is looked at.

The image goes the way of any image: transformers' own processor, by the checkpoint's `preprocessor_config.json`, cuts
it into patches; the prompt holds one image token for every merged patch; transformers' model class does the rest.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from harness.demo import checkpoint_path
from harness.engines.loading import load_model
from harness.quantize.build import build
from harness.quantize.recipes import RECIPES
from studies.demo_model import network, tokenizer

DENSE = checkpoint_path("dense")
GRID = (1, 4, 6)
"""Of the image, in patches: one frame, 4 rows, 6 columns."""

NUM_IMAGE_TOKENS = 2 * 3  # patches are merged two by two


@pytest.fixture(scope="module", params=["dense", "moe"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dense demo checkpoint, and a mixture of experts of random weights in the shape of the other one."""
    if request.param == "dense":
        return DENSE
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("source") / "moe"
    net = network.new_network(network.MOE)
    mtp = network.MtpHead(net.config.text_config)
    encoder = tokenizer.Tokenizer.from_file(str(DENSE / "tokenizer.json"))
    network.write_checkpoint(folder, net, mtp, network.MOE, encoder)
    return folder


@pytest.fixture(scope="module")
def artifact(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(source, RECIPES["rtn-a16"], tmp_path_factory.mktemp("a16") / "out", lambda *_: None).folder


def picture(seed: int) -> np.ndarray:
    """A gradient with noise, [height, width, channel]: as many pixels as `GRID` has, so that nothing is resized."""
    height, width = GRID[1] * 16, GRID[2] * 16
    slope = np.linspace(0, 200, width)[None, :, None] * np.array([1.0, 0.5, 0.0])
    noise = np.random.default_rng(seed).integers(0, 55, (height, width, 3))
    return (slope + noise).astype(np.uint8)


def inputs(folder: Path, image: np.ndarray) -> dict[str, Tensor]:
    """What the model takes, made from the files in `folder` alone."""
    pixels = AutoImageProcessor.from_pretrained(folder)(images=[image], return_tensors="pt")
    pads = "<|image_pad|>" * NUM_IMAGE_TOKENS
    text = f"<|im_start|>user\n<|vision_start|>{pads}<|vision_end|>What is this?<|im_end|>\n"
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)(text)["input_ids"]])
    image_token = network.DENSE["image_token_id"]
    assert (ids == image_token).sum() == NUM_IMAGE_TOKENS
    return {"input_ids": ids, "mm_token_type_ids": (ids == image_token).int(), **pixels}


def features(model: Any, given: dict[str, Tensor]) -> Tensor:
    """[image tokens, width] of the vision tower."""
    with torch.inference_mode():
        found = model.get_image_features(given["pixel_values"], given["image_grid_thw"])
    return torch.cat(found.pooler_output)


def logits(model: Any, given: dict[str, Tensor]) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(**given).logits[0]
    return found


def test_the_processor_cuts_an_image_into_patches_as_its_configuration_says(source: Path) -> None:
    image = picture(0)
    given = inputs(source, image)
    assert given["image_grid_thw"].tolist() == [list(GRID)]
    assert given["pixel_values"].shape == (4 * 6, 3 * 2 * 16 * 16)  # [patches, channel x frames x height x width]
    # Patches of a merged square follow one another; the third is the left one of the second row.
    patch = (image[16:32, :16].astype(np.float32) / 255 - 0.5) / 0.5
    found = given["pixel_values"][2].view(3, 2, 16, 16)
    for frame in range(2):  # a still image is two equal frames
        torch.testing.assert_close(found[:, frame], torch.from_numpy(patch).permute(2, 0, 1))


def test_an_artifact_carries_the_sources_processor_and_tokenizer(source: Path, artifact: Path) -> None:
    for name in ("preprocessor_config.json", "video_preprocessor_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (artifact / name).read_bytes() == (source / name).read_bytes()
    ours, theirs = inputs(artifact, picture(0)), inputs(source, picture(0))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_vision_features_of_an_artifact_are_its_sources_bit_for_bit(
    source: Path, artifact: Path, dtype: str
) -> None:
    given = inputs(source, picture(0))
    expected = features(load_model(source, dtype), given)
    found = features(load_model(artifact, dtype), given)
    assert found.shape == (NUM_IMAGE_TOKENS, network.DENSE["vision_config"]["out_hidden_size"])
    assert found.dtype == getattr(torch, dtype)
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
    other = features(load_model(artifact, dtype), inputs(source, picture(1)))
    assert not torch.equal(found, other)  # so there is something to be equal in


def test_an_image_with_text_gives_finite_logits_that_the_image_changes(source: Path, artifact: Path) -> None:
    model = load_model(artifact, "float32")
    given = inputs(artifact, picture(0))
    seen = logits(model, given)
    assert seen.shape == (given["input_ids"].shape[1], network.DENSE["text_config"]["vocab_size"])
    assert bool(seen.isfinite().all())
    blind = logits(model, {"input_ids": given["input_ids"]})
    other = logits(model, inputs(artifact, picture(1)))
    first = int((given["input_ids"][0] == network.DENSE["image_token_id"]).nonzero()[0])
    torch.testing.assert_close(seen[:first], other[:first])  # before the image nothing knows of it
    for without in (blind, other):
        assert (seen - without)[first + NUM_IMAGE_TOKENS :].abs().max() > 1e-3
    # The text model is quantized: with the same image its answer is near its source's and not equal.
    expected = logits(load_model(source, "float32"), given)
    assert 0 < (seen - expected).abs().mean() < (expected - expected.mean(dim=-1, keepdim=True)).abs().mean()


def test_the_engine_runs_the_class_that_users_of_from_pretrained_get(source: Path) -> None:
    given = inputs(source, picture(0))
    theirs = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32).eval()
    assert torch.equal(logits(load_model(source, "float32"), given), logits(theirs, given))
