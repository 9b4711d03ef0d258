"""Loads a checkpoint folder as transformers' model: every weight from the file, decoded where it is quantized.

Dense checkpoints are loaded by transformers' compressed-tensors integration. That integration drops scales of experts,
so quantized mixture-of-experts checkpoints are decoded by `decoding`, and so is everything on the meta device.
"""

import contextlib
import importlib.util
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, GenerationConfig

from harness.engines.decoding import Stored, empty_model
from harness.engines.torch_common import DTYPES, out_of_memory
from harness.errors import UserError, first_line
from harness.formats.config import parse
from harness.model.checkpoint import open_checkpoint
from harness.model.families import family_of
from harness.model.family import Family


def load_model(folder: Path, dtype: str = "bfloat16", device: torch.device | str = "cpu") -> Any:
    """The transformers model of `folder` on `device`, every one of its weights read from the file and decoded where it
    is quantized, computing in `dtype` (a key of `DTYPES`). `UserError` for a folder that is not a whole checkpoint."""
    auto, config, quantization, family = _configuration(folder)
    is_moe = bool(getattr(config.get_text_config(), "num_experts", 0))
    with _loading(folder):
        if quantization is not None and is_moe:
            model, stored = _empty(folder, auto, config, quantization, family, dtype)
            stored.fill(model)
            # What `from_pretrained` reads too: without it an answer would not end where the source's does.
            if (folder / "generation_config.json").is_file():
                model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        else:
            model, report = _load_by_transformers(auto, config, quantization, folder, DTYPES[dtype])
            _refuse_partial(folder, family, report)
    with out_of_memory(f"Loading {folder}", "Use a machine with more memory."):
        model = model.eval().to(device)
        if dtype == "float32":
            # Widens what the decompressor wrote as BF16. Never the other way: the rotary frequencies and the
            # global scales are float32 in a BF16 model too, and must stay so.
            model = model.to(torch.float32)
    return model


def load_empty(folder: Path, dtype: str) -> tuple[Any, Stored]:
    """The transformers model of `folder` on the meta device, where its weights take no memory, and what its modules are
    filled from. `UserError` as in `load_model`, as far as names, shapes and types of tensors show it."""
    configuration = _configuration(folder)
    with _loading(folder), torch.device("meta"):
        model, stored = _empty(folder, *configuration, dtype)
    return model.eval(), stored


def _empty(folder: Path, auto: Any, config: Any, quantization: Any, family: Family, dtype: str) -> tuple[Any, Stored]:
    """The model without values, and what it is filled from. compressed-tensors' arguments are read, its code is not
    run."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    parsed = None if quantization is None else parse(quantization, str(folder / "config.json"))
    model = empty_model(auto, config, DTYPES[dtype])
    stored = Stored(open_checkpoint(folder), parsed)
    _refuse_partial(folder, family, stored.prepare(model))
    return model, stored


def _configuration(folder: Path) -> tuple[Any, Any, Any, Family]:
    """transformers' class for the checkpoint in `folder`, its configuration, how it is quantized, None where it is not,
    and its family."""
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise UserError(f"{folder} is not a checkpoint: it has no config.json.", "Name a folder that has one.")
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{folder} has no safetensors weights.", "Convert other weights first; pickles are never loaded."
        )
    try:
        raw = json.loads(config_file.read_text(encoding="utf-8"))
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise UserError(
            f"{config_file} is no configuration that transformers {transformers.__version__} knows: "
            f"{first_line(error)}.",
            "Check its model_type.",
        ) from None
    quantization = getattr(config, "quantization_config", None) or raw.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method")
        if method != "compressed-tensors":
            raise UserError(
                f"{config_file} says quant_method '{method}'.", "The harness reads compressed-tensors checkpoints only."
            )
    # The class whose tensor names are the checkpoint's: the names and patterns in a quantization_config are
    # written for those, and a text-only class built from a multimodal checkpoint renames them.
    multimodal = getattr(config, "vision_config", None) is not None
    auto = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
    return auto, config, quantization, family_of(raw, str(config_file))


@contextlib.contextmanager
def _loading(folder: Path) -> Iterator[None]:
    try:
        with out_of_memory(f"Loading {folder}", "Use a machine with more memory."):
            yield
    except UserError:
        raise
    except Exception as error:
        # Loading raises many types for a damaged checkpoint; each is about this folder.
        raise UserError(
            f"The torch engine cannot load {folder}: {first_line(error)}.", "Run `harness verify` on it."
        ) from error


def _load_by_transformers(
    auto: Any, config: Any, quantization: Any, folder: Path, dtype: torch.dtype
) -> tuple[Any, dict[str, Any]]:
    """By `from_pretrained`, compressed-tensors included."""
    if quantization is not None:
        if importlib.util.find_spec("compressed_tensors") is None:
            raise UserError(f"{folder} needs compressed-tensors.", "Run `pip install compressed-tensors`.")
        config.quantization_config = {**quantization, "dequantize": True}
    # compressed-tensors draws a progress bar on stderr and takes no argument against it.
    with contextlib.redirect_stderr(io.StringIO()):
        model, report = auto.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they come back in the report, by name
        )
    return model, report


def _refuse_partial(folder: Path, family: Family, report: dict[str, Any]) -> None:
    """`UserError` for a tensor that is missing, which transformers fills with random numbers, or has no place. The MTP
    head (multi-token prediction), which is no part of the model class, is excused."""
    unexpected = [key for key in report["unexpected_keys"] if family.part_of(key) != "mtp"]
    for what, keys in (
        ("lacks", sorted(report["missing_keys"])),
        ("has the wrong shape for", sorted(key[0] for key in report["mismatched_keys"])),
        ("has tensors the model has no place for:", sorted(unexpected)),
        ("failed:", sorted(report["error_msgs"])),
    ):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise UserError(f"{folder} {what} {', '.join(keys[:3])}{more}.", "Run `harness verify` on it.")
