"""The formats that the harness knows, by name: what it reads, decodes, checks and may build.

To add a format, write its module and name it here. `recipes.py` decides which of them a recipe uses.
"""

from harness.formats.format import Format
from harness.formats.fp8 import FP8_DYNAMIC
from harness.formats.nvfp4 import NVFP4, NVFP4A16

FORMATS: dict[str, Format] = {form.name: form for form in (NVFP4A16, NVFP4, FP8_DYNAMIC)}
"""In the order in which sensitivities are measured and messages list them."""


def packed_names() -> set[str]:
    """The suffixes of tensors that only a quantized layer has in the place of its weight."""
    return {next(iter(form.weight_tensors)) for form in FORMATS.values()} - {"weight"}


def input_scale_names() -> set[str]:
    """The suffixes of stored scales of a layer's inputs."""
    return {form.input_scale_name for form in FORMATS.values() if form.input_scale_name is not None}
