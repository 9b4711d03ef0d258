"""The torch engine: transformers' own model class on a CPU or one accelerator.

It is the reference: slow, readable, and the only engine that needs nothing but torch. Dense checkpoints are loaded by
transformers' compressed-tensors integration, so what is measured here is what any user of `from_pretrained` gets.
That integration drops scales of experts, so quantized mixture-of-experts checkpoints are decoded by `decoding`.

**What happens to quantized weights.** compressed-tensors has no 4-bit matrix product. With its default the packed
weights are decompressed to BF16 by a hook on the first forward pass, once; with `dequantize=True` the same code
runs at the end of loading. The arithmetic is identical; this engine asks for the second, because then no
first measurement pays for it, the resident bytes can be counted, and float32 is possible (the decompressor writes
BF16 whatever dtype was asked for, and a float32 activation times a BF16 weight is an error in torch: the weights are
widened after it). Either way the quantization scheme stays on the module, so the *activations* of a W4A4
checkpoint are still quantized and decoded on every call. So NVFP4 here shows what quantization loses, never
what it gains in speed: a decode step reads the decompressed weights.

**Logits are computed in float32.** BF16 logits step by 1/8 between 16 and 32, which is noise of the size of the
effects measured here; an unquantized `lm_head` is widened for `score` and `log_probs`. `decode` uses the
model's own head.
"""

import contextlib
import gc
import importlib.metadata
import importlib.util
import io
import json
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, GenerationConfig
from transformers.cache_utils import DynamicCache

from harness.engines import decoding, torch_answers
from harness.engines.decoding import Stored, formats_of
from harness.engines.layers import device_named, silence_transformers
from harness.engines.protocol import Answer, Choice, Decoded, Engine, EngineInfo, Memory, Prompt, Scored, Start, Top
from harness.engines.torch_answers import LOGITS_BYTES
from harness.errors import UserError, did_you_mean
from harness.formats.config import Format, QuantizationConfig, parse
from harness.model.checkpoint import open_checkpoint

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class TorchEngine(Engine):
    """A checkpoint folder as a transformers model; see `protocol.Engine` for what its methods promise."""

    def __init__(self, folder: Path, start: Start) -> None:
        if start.options:
            raise UserError(f"The torch engine has no option '{next(iter(start.options))}'.", "Leave it out.")
        self._device = prepare(start.dtype, start.device)
        model = load_model(folder, start.dtype, self._device)
        self._folder = folder
        self._model: Any = model
        self._trunk: Any = model.get_decoder()
        self._head: Any = model.get_output_embeddings()
        info = describe("torch", model, folder, start.dtype, start.device, self._device)
        own = {
            "use_cache": {"score": False, "decode": True},
            "cache": "DynamicCache",
            "weight_bytes_resident": weight_bytes(model),
            "end_tokens": sorted(self._end_tokens),
        }
        self._info = replace(info, effective={**info.effective, **own})

    @property
    def info(self) -> EngineInfo:
        """What runs, and how."""
        return self._info

    def score(self, windows: Sequence[Sequence[int]], batch_size: int) -> Iterator[NDArray[np.float64]]:
        """Log-probabilities, in nats, of tokens 1 … n - 1 of each window of n tokens, in order."""
        weight = wide_head(self._head)
        for batch in batches_of_equals(windows, batch_size):
            with self._scoring(batch):
                targets = torch.tensor(batch, device=self._device)[:, 1:].flatten()
                found = torch.empty(len(targets), dtype=torch.float32, device=self._device)
                start = 0
                for logits in self._logits(batch, weight):
                    part = slice(start, start + len(logits))
                    target = logits.gather(1, targets[part, None]).squeeze(1)
                    found[part] = target - logits.logsumexp(dim=1)
                    start += len(logits)
                rows: NDArray[np.float64] = found.double().reshape(len(batch), -1).cpu().numpy()
            yield from rows

    def log_probs(self, windows: Sequence[Sequence[int]], batch_size: int) -> Iterator[NDArray[np.float32]]:
        """Log-distributions [n - 1, vocabulary], in nats, after the first n - 1 tokens of each window, in order."""
        weight = wide_head(self._head)
        for batch in batches_of_equals(windows, batch_size):
            shape = (len(batch[0]) - 1, self._head.weight.shape[0])
            chunks = self._logits(batch, weight)
            left = np.empty((0, shape[1]), np.float32)  # of the last chunk, rows of the next window
            for _ in batch:
                with self._scoring(batch):
                    table, filled = np.empty(shape, np.float32), 0
                    while filled < len(table):
                        if not len(left):
                            logits = next(chunks)
                            left = (logits - logits.logsumexp(dim=1, keepdim=True)).cpu().numpy()
                        taken = left[: len(table) - filled]
                        table[filled : filled + len(taken)] = taken
                        filled, left = filled + len(taken), left[len(taken) :]
                yield table

    def top_log_probs(self, windows: Sequence[Sequence[int]], batch_size: int, num: int) -> Iterator[Top]:
        """The most probable tokens at each place of each window, in order; of equal ones the lowest id first."""
        for window, table in zip(windows, self.log_probs(windows, batch_size), strict=True):
            yield top_of(window, table, num)

    def _logits(self, batch: list[Sequence[int]], weight: torch.Tensor | None) -> Iterator[torch.Tensor]:
        """Float32 logits [rows, vocabulary] after each token but the last of each window of equal length, windows one
        after another, some rows at a time."""
        ids = torch.tensor(batch, device=self._device)  # [batch, n]
        hidden = self._trunk(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]  # [batch, n - 1, width]
        hidden = hidden.flatten(0, 1)
        for part in hidden.split(rows_at_once(self._head)) if len(hidden) else ():
            yield wide_logits(part, self._head, weight)

    @contextlib.contextmanager
    def _scoring(self, batch: list[Sequence[int]]) -> Iterator[None]:
        with (
            torch.inference_mode(),
            out_of_memory(f"Scoring {len(batch)} windows of {len(batch[0])} tokens", "Lower the batch size."),
        ):
            yield

    def decode(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Decoded:
        """Greedy continuation; the prefill gives the first new token, each step one more."""
        if num_tokens < 1 or len({len(prompt) for prompt in prompts}) != 1:
            raise ValueError("decode needs num_tokens >= 1 and prompts of one length")
        with (
            torch.inference_mode(),
            out_of_memory(
                f"Decoding {len(prompts)} × {len(prompts[0])} + {num_tokens} tokens", "Lower the batch or the prompt."
            ),
        ):
            ids = torch.tensor(prompts, device=self._device)  # [batch, prompt]
            cache = DynamicCache(config=self._trunk.config)
            tokens, seconds = [], []
            for _ in range(num_tokens):
                start = self._clock()
                hidden = self._trunk(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state
                # Only the last position's logits: the prompt's are never looked at.
                ids = self._head(hidden[:, -1:]).argmax(dim=-1)  # [batch, 1]
                seconds.append(self._clock() - start)
                tokens.append(ids)
            rows = torch.cat(tokens, dim=1).tolist()
        return Decoded(tuple(tuple(row) for row in rows), seconds[0], tuple(seconds[1:]))

    def choices(self, choices: Sequence[Choice], batch_size: int) -> Iterator[tuple[int, tuple[Scored, ...]]]:
        """See `torch_answers`; with float32 logits, as in `score`."""
        logits = partial(wide_logits, head=self._head, weight=wide_head(self._head))
        with out_of_memory(f"Scoring {batch_size} contexts at a time", "Lower the batch size."):
            yield from torch_answers.choices(self._trunk, logits, choices, batch_size)

    def generate(self, prompts: Sequence[Prompt], batch_size: int) -> Iterator[tuple[int, Answer]]:
        """See `torch_answers`; with the model's own head, as in `decode`."""
        text = self._tokenizer.decode if any(prompt.stop for prompt in prompts) else str
        with out_of_memory(f"Answering {batch_size} prompts at a time", "Lower the batch size."):
            yield from torch_answers.generate(
                self._trunk, lambda hidden: self._head(hidden).float(), text, self._end_tokens, prompts, batch_size
            )

    @cached_property
    def _tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self._folder, local_files_only=True, trust_remote_code=False)

    @cached_property
    def _end_tokens(self) -> frozenset[int]:
        """What ends an answer: the tokens that the model's generation configuration names."""
        named = self._model.generation_config.eos_token_id
        return frozenset([named] if isinstance(named, int) else named or ())

    def _clock(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def memory(self) -> Memory:
        """The peaks since this engine began to load."""
        return peak_memory(self._device)

    def close(self) -> None:
        """Drop the model and hand its memory back."""
        self._model = self._trunk = self._head = None
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def batches_of_equals(windows: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[Sequence[int]]]:
    """Neighbouring windows of one length, at most `batch_size` of them."""
    for _, run in groupby(windows, key=len):
        equal = list(run)
        for start in range(0, len(equal), batch_size):
            yield equal[start : start + batch_size]


def wide_head(head: Any) -> torch.Tensor | None:
    """The head's weight in float32; None for a quantized head, which keeps its own forward: that also quantizes its
    activations."""
    if getattr(head, "quantization_scheme", None) is not None or formats_of(head):
        return None
    wide: torch.Tensor = head.weight.float()
    return wide


def rows_at_once(head: Any) -> int:
    """The positions whose float32 logits are computed together."""
    vocabulary: int = head.weight.shape[0]
    return max(1, LOGITS_BYTES // (4 * vocabulary))


def wide_logits(hidden: torch.Tensor, head: Any, weight: torch.Tensor | None) -> torch.Tensor:
    """Float32 logits [rows, vocabulary] of hidden states [rows, width]; `weight` as `wide_head` gives it."""
    found: torch.Tensor
    found = head(hidden).float() if weight is None else nn.functional.linear(hidden.float(), weight)
    return found


def top_of(window: Sequence[int], table: NDArray[np.float32], num: int) -> Top:
    """The most probable tokens at each place of a window of n tokens with the log-distributions [n - 1, vocabulary]; of
    equal ones the lowest id first."""
    num = min(num, table.shape[1])
    found = np.sort(np.argpartition(-table, num - 1, axis=1)[:, :num], axis=1)
    values = np.take_along_axis(table, found, axis=1)
    order = np.argsort(-values, axis=1, kind="stable")
    ids = np.take_along_axis(found, order, axis=1).astype(np.int32)
    return Top(ids, np.take_along_axis(values, order, axis=1), table[np.arange(len(table)), window[1:]])


def prepare(dtype: str, device: str) -> torch.device:
    """Readies this process to compute in `dtype` on `device`, with peaks of memory counted from now on. `UserError` for
    a type or a device that there is not."""
    if dtype not in DTYPES:
        raise UserError(f"The torch engine does not compute in '{dtype}'.", did_you_mean(dtype, DTYPES))
    found = device_named(device)
    _set_threads()
    _reset_peak_memory(found)
    silence_transformers()
    return found


def _set_threads() -> None:
    """All the cores this process may use, unless the user decided: torch's own default counts physical ones."""
    if "OMP_NUM_THREADS" not in os.environ:
        has_affinity = hasattr(os, "sched_getaffinity")  # not on macOS
        torch.set_num_threads(len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1)


def load_model(folder: Path, dtype: str = "bfloat16", device: torch.device | str = "cpu") -> Any:
    """The transformers model of `folder` on `device`, every one of its weights read from the file and decoded where it
    is quantized, computing in `dtype` (a key of `DTYPES`). `UserError` for a folder that is not a whole checkpoint."""
    model = _load(folder, DTYPES[dtype])
    with out_of_memory(f"Loading {folder}", "Use a machine with more memory."):
        model = model.to(device)
        if dtype == "float32":
            # Widens what the decompressor wrote as BF16. Never the other way: the rotary frequencies and the
            # global scales are float32 in a BF16 model too, and must stay so.
            model = model.to(torch.float32)
    return model


def load_empty(folder: Path, dtype: str) -> tuple[Any, Stored]:
    """The transformers model of `folder` on the meta device, where its weights take no memory, and what its modules are
    filled from. `UserError` as in `load_model`, as far as names, shapes and types of tensors show it."""
    auto, config, quantization = _configuration(folder)
    stored_as = QuantizationConfig((), (), False)
    if quantization is not None:
        stored_as = _parsed(config, quantization, folder)
    with _loading(folder):
        stored = Stored(open_checkpoint(folder), stored_as)
        with torch.device("meta"):
            model = decoding.empty_model(auto, config, DTYPES[dtype])
        report = stored.prepare(model)
    _refuse_partial(folder, vars(report))
    return model.eval(), stored


def _load(folder: Path, dtype: torch.dtype) -> Any:
    auto, config, quantization = _configuration(folder)
    load = _load_decoded if quantization is not None and _is_moe(config) else _load_by_transformers
    with _loading(folder):
        model, report = load(auto, config, quantization, folder, dtype)
    _refuse_partial(folder, report)
    return model.eval()


def _configuration(folder: Path) -> tuple[Any, Any, Any]:
    """transformers' class for the checkpoint in `folder`, its configuration, and how it is quantized, None where it is
    not."""
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
            f"{config_file} is no configuration that transformers {transformers.__version__} knows: {_line(error)}.",
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
    return AutoModelForImageTextToText if multimodal else AutoModelForCausalLM, config, quantization


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
            f"The torch engine cannot load {folder}: {_line(error)}.", "Run `harness verify` on it."
        ) from error


def _is_moe(config: Any) -> bool:
    return bool(getattr(config.get_text_config(), "num_experts", 0))


def _load_decoded(
    auto: Any, config: Any, quantization: Any, folder: Path, dtype: torch.dtype
) -> tuple[Any, dict[str, Any]]:
    """By the harness: compressed-tensors' arguments are read, its code is not run."""
    model, report = decoding.load(auto, config, _parsed(config, quantization, folder), folder, dtype)
    # What `from_pretrained` reads too: without it an answer would not end where the source's does.
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model, vars(report)


def _parsed(config: Any, quantization: Any, folder: Path) -> QuantizationConfig:
    """How the checkpoint is quantized; taken out of `config`, since the model that is built from it is not."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return parse(quantization, str(folder / "config.json"))


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


def _refuse_partial(folder: Path, report: dict[str, Any]) -> None:
    """transformers fills a tensor it misses with random numbers and only warns; here that is an error.

    `mtp.*` (the multi-token-prediction head) is no part of the model class and is excused by transformers itself.
    """
    unexpected = [key for key in report["unexpected_keys"] if not key.startswith("mtp.")]
    for what, keys in (
        ("lacks", sorted(report["missing_keys"])),
        ("has the wrong shape for", sorted(key[0] for key in report["mismatched_keys"])),
        ("has tensors the model has no place for:", sorted(unexpected)),
        ("failed:", sorted(report["error_msgs"])),
    ):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise UserError(f"{folder} {what} {', '.join(keys[:3])}{more}.", "Run `harness verify` on it.")


def describe(name: str, model: Any, folder: Path, dtype: str, requested: str, device: torch.device) -> EngineInfo:
    """What computes the transformers model `model` of `folder`, whose device may be another now, on `device`; without
    what the engines of this room do differently."""
    trunk, head = model.get_decoder(), model.get_output_embeddings()
    config = trunk.config
    cuda = device.type == "cuda"
    return EngineInfo(
        name=name,
        version=f"transformers {transformers.__version__}, torch {torch.__version__}",
        device=torch.cuda.get_device_name(device) if cuda else "cpu",
        dtype=dtype,
        requested={"folder": folder.name, "dtype": dtype, "device": requested},
        effective={
            "model_class": type(model).__name__,
            "threads": torch.get_num_threads(),
            # Waiting threads spin by default: the fastest way on a quiet machine, several times slower on a busy one.
            "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "attention_implementation": config._attn_implementation,
            "deltanet_implementation": _deltanet_kernels(config, device),
            "experts_implementation": _experts_implementation(trunk),
            "weight_decoder": _weight_decoder(model),
            "score_logits_dtype": "float32",
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "weight_bytes_per_token": _bytes_per_token(trunk, head),
        },
        kernels=_kernels(trunk, head, device),
    )


def _deltanet_kernels(config: Any, device: torch.device) -> str:
    """flash-linear-attention if transformers can import it, else transformers' readable reference."""
    if "linear_attention" not in getattr(config, "layer_types", ()):
        return "none"
    if device.type == "cuda" and importlib.util.find_spec("fla") is not None:
        return "flash-linear-attention"
    return "transformers reference"


def _kernels(trunk: Any, head: Any, device: torch.device) -> dict[str, str]:
    """Kind of layer -> what computes it. The kind of a linear layer is the end of its name, `mlp.down_proj`."""
    found: dict[str, set[str]] = {}
    for name, module in [*trunk.named_modules(), ("lm_head", head)]:
        kind = ".".join(name.split(".")[-2:])
        if isinstance(module, nn.Linear):
            found.setdefault(kind, set()).add(_linear_kernel(module))
        elif _is_experts(module):
            found.setdefault(kind, set()).add(_experts_kernel(module))
    kernels = {kind: " | ".join(sorted(ways)) for kind, ways in sorted(found.items())}
    kernels["full_attention"] = trunk.config._attn_implementation
    deltanet = _deltanet_kernels(trunk.config, device)
    if deltanet != "none":
        kernels["linear_attention"] = f"{deltanet}: chunked in prefill, recurrent in decode"
    return kernels


def _linear_kernel(module: nn.Linear) -> str:
    product = f"{_dtype_name(module.weight)} F.linear"
    if formats := formats_of(module):
        return _decoded_kernel(formats, product)
    scheme = getattr(module, "quantization_scheme", None)
    if scheme is None:
        return product
    activations = scheme.input_activations
    inputs = "" if activations is None else f", {activations.num_bits}-bit {activations.type} activations emulated"
    weights = scheme.weights
    return f"{weights.num_bits}-bit {weights.type} weights, compressed-tensors decompress → {product}{inputs}"


def _is_experts(module: nn.Module) -> bool:
    """Whether `module` is transformers' fused experts: all of a layer's in two 3-D parameters."""
    return isinstance(getattr(module, "down_proj", None), nn.Parameter)


def _experts_kernel(module: Any) -> str:
    how = f"{_dtype_name(module.down_proj)} {_experts_way(module)}"
    formats = formats_of(module)
    return _decoded_kernel(formats, how) if formats else how


def _experts_way(module: Any) -> str:
    """The forward that runs: emulation sets one where inputs are rounded, else transformers dispatches by the
    configuration."""
    if any(form and form.input_activations for form in formats_of(module)):
        return "F.linear, one expert after another"
    implementation = module.config._experts_implementation
    return "eager experts, one after another" if implementation == "eager" else f"{implementation} experts"


def _experts_implementation(trunk: Any) -> str | None:
    """How routed experts are computed; None in a dense model."""
    return " | ".join(sorted({_experts_way(module) for module in trunk.modules() if _is_experts(module)})) or None


def _decoded_kernel(formats: tuple[Format | None, ...], product: str) -> str:
    """What runs for weights that the harness decoded, format by format."""

    def kind(arguments: Any) -> str:
        of = dict(arguments)
        return f"{of['num_bits']}-bit {of['type']}"

    ways = []
    for form in formats:
        weights = "weights as stored" if form is None else f"{kind(form.weights)} weights, decoded by the harness"
        activations = form and form.input_activations
        ways.append(f"{weights} → {product}" + (f", {kind(activations)} activations emulated" if activations else ""))
    return " | ".join(ways)


def _weight_decoder(model: nn.Module) -> str | None:
    """Who decoded the quantized weights; None where there are none."""
    if any(formats_of(module) for module in model.modules()):
        return "harness"
    if any(getattr(module, "quantization_scheme", None) is not None for module in model.modules()):
        return f"compressed-tensors {importlib.metadata.version('compressed-tensors')}"
    return None


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights and buffers; tied tensors count once."""
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in _tensors(model)}.values())


def _bytes_per_token(trunk: Any, head: Any) -> int:
    """Weight bytes that one decode step reads at batch 1: the text trunk and the head, but of the embedding table one
    row and of the routed experts only those that a token is sent to. Scales that decompression left behind
    are resident but not read. KV cache and DeltaNet state come on top and grow with the prompt."""
    config = trunk.config
    experts_share = getattr(config, "num_experts_per_tok", 1) / getattr(config, "num_experts", 1)
    total: int = head.weight.numel() * head.weight.element_size()
    for name, tensor in trunk.named_parameters():
        size = tensor.numel() * tensor.element_size()
        if name == "embed_tokens.weight":
            size //= tensor.shape[0]
        elif ".experts." in name:
            size = round(size * experts_share)
        elif name.endswith(("_scale", "_zero_point")):
            size = 0
        total += size
    return total


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()


@contextlib.contextmanager
def out_of_memory(doing: str, remedy: str) -> Iterator[None]:
    """Turn every way of running out of memory into a sentence."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise UserError(f"{doing} ran out of memory.", remedy) from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # what torch's CPU allocator says
            raise
        raise UserError(f"{doing} ran out of memory.", remedy) from error


def _line(error: Exception) -> str:
    """The first line of an error, without its full stop."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].strip().rstrip(".")[:300]


def _reset_peak_memory(device: torch.device) -> None:
    """Start the peaks anew, so that each engine start has its own. Linux resets the resident peak on `5`."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> Memory:
    """The peaks since `prepare`."""
    vram = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return Memory(_peak_rss_bytes(), vram)


def _peak_rss_bytes() -> int:
    # Kilobytes everywhere but on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
