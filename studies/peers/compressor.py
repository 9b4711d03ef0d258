"""llm-compressor's side: one job in, one quantized checkpoint and one result out.

    python -m studies.peers.compressor JOB.json

The program runs in the environment that has llm-compressor, without the harness's own dependencies, and calls what
users of llm-compressor call: `model_free_ptq` for round-to-nearest without a model, `oneshot` with a modifier for
everything else. The job is a JSON object:

    source, out     the checkpoint folder and the new folder
    result          the file for what was measured, written last: without it the job has failed
    method          "model_free_ptq", "QuantizationModifier" or "GPTQModifier"
    scheme          "NVFP4A16" or "NVFP4"
    observer        how block scales are chosen, null for the default (largest magnitude)
    ignore          patterns of the modules to keep
    token_ids       a JSON file with one list of ids per calibration sample; null for a method without data

and the result {"seconds": {stage: seconds}, "packages": {name: version}, "warnings": [text]}. The stages are `load`,
`quantize` and `save`, without the imports before them; `model_free_ptq` has only `quantize`.
"""

import importlib.metadata
import json
import shutil
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

PACKAGES = ("llmcompressor", "compressed-tensors", "transformers", "torch", "safetensors")
_WEIGHTS = (".safetensors", ".safetensors.index.json")


def main(arguments: list[str]) -> None:
    """Runs the job in the file that the only argument names."""
    job = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    warnings = _listen()
    seconds = _model_free(job) if job["method"] == "model_free_ptq" else _oneshot(job)
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    result = {"seconds": seconds, "packages": packages, "warnings": warnings}
    Path(job["result"]).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _listen() -> list[str]:
    """The list that llm-compressor's warnings and errors go to from now on: failed Cholesky decompositions, modules
    that no sample reached, and everything else that does not stop it."""
    import llmcompressor  # type: ignore[import-not-found]  # noqa: F401 - takes all listeners away when imported
    from loguru import logger

    heard: list[str] = []
    levels = ("WARNING", "ERROR", "CRITICAL")  # by name: its own level for metrics ranks above them
    logger.add(
        lambda message: heard.append(str(message).strip()),
        filter=lambda record: record["level"].name in levels,
        format="{message}",
    )
    return heard


def _model_free(job: dict[str, Any]) -> dict[str, float]:
    from llmcompressor import model_free_ptq

    start = time.perf_counter()
    model_free_ptq(job["source"], job["out"], scheme=job["scheme"], ignore=job["ignore"], max_workers=1, device="cpu")
    return {"quantize": time.perf_counter() - start}


def _oneshot(job: dict[str, Any]) -> dict[str, float]:
    import torch
    from datasets import Dataset  # type: ignore[import-untyped]
    from llmcompressor import oneshot
    from llmcompressor.modeling.moe.linearize import load_quantizable_moe  # type: ignore[import-not-found]
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    times = [time.perf_counter()]
    source, out = Path(job["source"]), Path(job["out"])
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    mixture = "num_experts" in config["text_config"]
    with load_quantizable_moe(AutoModelForImageTextToText) if mixture else nullcontext():
        model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.bfloat16)
    times.append(time.perf_counter())
    samples = json.loads(Path(job["token_ids"]).read_text(encoding="utf-8")) if job["token_ids"] else None
    data: dict[str, Any] = {}
    if samples:
        rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in samples]
        data = {
            "dataset": Dataset.from_list(rows),
            "processor": AutoTokenizer.from_pretrained(source),  # wanted beside a dataset, even one of token ids
            "max_seq_length": max(map(len, samples)),
            "num_calibration_samples": len(samples),
            "shuffle_calibration_samples": False,
        }
    oneshot(model=model, recipe=_modifier(job), **data)
    times.append(time.perf_counter())
    model.save_pretrained(out, save_compressed=True)
    for file in source.iterdir():
        # Tokenizer, templates, processor: the source's own, as its users copy them.
        if file.is_file() and not file.name.endswith(_WEIGHTS) and not (out / file.name).exists():
            shutil.copyfile(file, out / file.name)
    times.append(time.perf_counter())
    return {
        name: end - start for name, start, end in zip(("load", "quantize", "save"), times[:-1], times[1:], strict=True)
    }


def _modifier(job: dict[str, Any]) -> Any:
    from compressed_tensors.quantization import preset_name_to_scheme  # type: ignore[import-untyped]
    from llmcompressor.modifiers.gptq import GPTQModifier  # type: ignore[import-not-found]
    from llmcompressor.modifiers.quantization import QuantizationModifier  # type: ignore[import-not-found]

    kind = {"QuantizationModifier": QuantizationModifier, "GPTQModifier": GPTQModifier}[job["method"]]
    if job["observer"] is None:
        return kind(targets="Linear", scheme=job["scheme"], ignore=job["ignore"])
    scheme = preset_name_to_scheme(job["scheme"], ["Linear"])
    scheme.weights.observer = job["observer"]
    return kind(config_groups={"group_0": scheme}, ignore=job["ignore"])


if __name__ == "__main__":
    main(sys.argv[1:])
