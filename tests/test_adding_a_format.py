"""CONTRIBUTING's recipe for a new number format, followed step by step: its module and its place in the table.

The format is INT8 with a scale an output channel and 16-bit inputs, which no recipe of the harness has. Here is all
that a module of `harness/formats/` would hold; no other line of the harness knows of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from harness.audit.verify import verify
from harness.engines.protocol import open_engine
from harness.formats.config import FORMATS
from harness.formats.format import ABSMAX, Format, Rounding, StoredTensor
from harness.formats.nvfp4 import NVFP4A16
from harness.model.checkpoint import open_checkpoint
from harness.model.sources import census_of
from harness.quantize.build import build
from harness.quantize.layerwise import CalibrationInput
from harness.quantize.recipes import CALIBRATED, RTN, Method, Recipe
from harness.quantize.samples import CalibrationSet
from tests.artifacts import quiet

# -- Step 1: the module ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Int8Channel(Format):
    """INT8 with a bfloat16 multiplier an output channel (compressed-tensors `int-quantized`)."""

    weight_tensors: ClassVar[Mapping[str, int]] = {"weight": 1, "weight_scale": 1}

    def stored(self, out_features: int, in_features: int) -> tuple[StoredTensor, ...]:
        return (
            StoredTensor("weight", "I8", (out_features, in_features)),
            StoredTensor("weight_scale", "BF16", (out_features, 1)),
        )

    def choose_scales(
        self, w: Tensor, shared: Tensor, method: str = ABSMAX, importance: Tensor | None = None
    ) -> Tensor:
        return (w.abs().amax(-1, keepdim=True) / 127).bfloat16()

    def encode(self, w: Tensor, scales: Tensor, shared: Tensor) -> Tensor:
        return (w / scales.float()).round_().clamp_(-128, 127).to(torch.int8)

    def pack(self, codes: Tensor, scales: Tensor) -> dict[str, Tensor]:
        return {"weight": codes, "weight_scale": scales}

    def decode(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        return (tensors["weight"].float() * tensors["weight_scale"].float()).to(dtype)

    def rounding(self, input_scale: Tensor | None = None) -> Rounding | None:
        return None


INT8 = Int8Channel(
    "INT8",
    "int-quantized",
    (("num_bits", 8), ("type", "int"), ("strategy", "channel"), ("symmetric", True), ("dynamic", False)),
)


# -- Step 2: its place in the table ------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, INT8.name, INT8)


# -- What follows from it ----------------------------------------------------------------------------------------

WINDOWS = [[5, 17, 3, 44, 9, 21, 30, 2], [8, 1, 12, 60, 33, 7, 25, 11]]


@pytest.fixture(params=["dense_source", "moe_source"])
def source(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(request.param)
    return folder


@pytest.mark.parametrize("method", [RTN, CALIBRATED], ids=["streamed", "calibrated"])
def test_a_format_in_the_table_is_built_verified_and_computed_with(
    source: Path, method: Method, tmp_path: Path
) -> None:
    recipe = Recipe("mixed", ((INT8, ("attention", "shared-expert")), (NVFP4A16, ("mlp", "experts"))), method)
    samples = CalibrationSet((tuple(WINDOWS[0]), tuple(WINDOWS[1])), {})
    build(source, recipe, tmp_path / "out", quiet, CalibrationInput(samples, 64, 10**7, "cpu"))

    checked = verify(tmp_path / "out", source, quiet)
    assert checked.passed and checked.findings == ()
    errors = {trip.format: trip.relative_l2_error for trip in checked.round_trips}
    assert 0 < errors[INT8.name] < 0.01 < errors[NVFP4A16.name]

    original, artifact = open_checkpoint(source), open_checkpoint(tmp_path / "out")
    stored = [t for t in census_of(original).tensors if recipe.format_of(t.role) is INT8]
    assert stored
    for tensor in stored:
        (linear,) = tensor.linears
        decoded = INT8.decode_rows(artifact, linear.module, 0, linear.out_features, torch.float32)
        assert torch.equal(decoded, INT8.round_trip(original.tensor(tensor.name)))

    scores = []
    for engine in ("torch", "streamed"):  # the torch engine leaves dense models to compressed-tensors' own decoder
        opened = open_engine(engine, tmp_path / "out", dtype="float32", device="cpu")
        scores.append([row.tolist() for row in opened.score(WINDOWS, 2)])
        opened.close()
    for ours, theirs in zip(*scores, strict=True):
        assert ours == pytest.approx(theirs, abs=5e-3)
