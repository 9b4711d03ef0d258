"""The vLLM engine: what a server with this checkpoint would do, asked in token ids. The only importer of vllm.

vLLM runs as it does behind its own server (`AsyncLLM`), in processes of its own, and a crash there is an error here.
Times are the engine process's own stamps (scheduled, first token, last token). *What actually ran* is asked for, not
assumed: `vllm_worker` looks at the layers of the loaded model, and vLLM's log names the kernels.
"""

import asyncio
import contextlib
import itertools
import math
import queue
import threading
import time
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from harness.engines import vllm_options
from harness.engines.protocol import (
    Answer,
    Choice,
    Decoded,
    Drafts,
    Engine,
    EngineDied,
    EngineInfo,
    Memory,
    Prompt,
    Scored,
    Start,
    Top,
)
from harness.engines.vllm_options import KERNEL_LINES, MEMORY_LINES, Log, kv_tokens, reason
from harness.errors import UserError, first_line
from harness.formats.config import parse
from harness.model.checkpoint import read_json
from harness.model.families import family_of

T = TypeVar("T")

_DTYPES = ("bfloat16", "float16", "float32", "auto")
_OVER: Any = object()
"""Ends a queue."""


class VllmEngine(Engine):
    """A checkpoint folder served by vLLM; see `protocol.Engine` for what its methods promise."""

    def __init__(self, folder: Path, start: Start) -> None:
        if start.dtype not in _DTYPES:
            raise UserError(
                f"The vLLM engine does not compute in '{start.dtype}'.", f"It does in {', '.join(_DTYPES)}."
            )
        vllm_options.check_heads(folder, start.options)
        self._log = Log()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name="vllm")
        self._thread.start()
        self._numbers = itertools.count()
        self._engine: Any = None
        try:
            with self._log.capturing():
                vllm = _import_vllm()
                release = vllm_options.release_of(vllm.__version__)
                if vllm.platforms.current_platform.is_cpu():
                    start = replace(start, options=vllm_options.cache_by_need(folder, start.options))
                self._arguments = vllm_options.engine_arguments(folder, start, release)
                self._engine = self._run(_started(self._arguments))
                _check_dtype(self._engine.vllm_config)
                self.info = self._described(vllm.__version__, folder, start, release)
        except BaseException as error:  # Ctrl-C too: vLLM's processes must not stay behind
            lines = self._log.relevant()
            self.close()
            if isinstance(error, UserError) or not isinstance(error, Exception):
                raise
            # vLLM raises many types for a checkpoint or an option that it refuses.
            raise EngineDied(
                f"vLLM does not start on {folder}: {reason(error, lines)}.",
                "Run `harness verify` on it, or change the engine's options.",
                lines,
            ) from error

    def score(self, windows: Sequence[Sequence[int]], batch_size: int) -> Iterator[NDArray[np.float64]]:
        """Log-probabilities, in nats, of tokens 1 … n - 1 of each window of n tokens, in order."""
        for window, found in self._told(windows, batch_size, 0):
            rows = [found.logprobs[found.start_indices[place]] for place in range(1, len(window))]
            yield np.array(rows, dtype=np.float64)

    def log_probs(self, windows: Sequence[Sequence[int]], batch_size: int) -> Iterator[NDArray[np.float32]]:
        """Log-distributions [n - 1, vocabulary], in nats, after the first n - 1 tokens of each window, in order."""
        for window, found in self._told(windows, batch_size, -1):
            table = None
            for place in range(1, len(window)):
                part = slice(found.start_indices[place] + 1, found.end_indices[place])
                ids = np.array(found.token_ids[part])
                if table is None:
                    table = np.full((len(window) - 1, len(ids)), np.nan, dtype=np.float32)
                table[place - 1, ids] = found.logprobs[part]
            assert table is not None
            yield table

    def top_log_probs(self, windows: Sequence[Sequence[int]], batch_size: int, num: int) -> Iterator[Top]:
        """The most probable tokens at each place of each window, in order."""
        num = min(num, self._engine.vllm_config.model_config.get_vocab_size())
        for window, found in self._told(windows, batch_size, num):
            starts = [found.start_indices[place] for place in range(1, len(window))]
            yield Top(
                np.array([found.token_ids[at + 1 : at + 1 + num] for at in starts], np.int32).reshape(-1, num),
                np.array([found.logprobs[at + 1 : at + 1 + num] for at in starts], np.float32).reshape(-1, num),
                np.array([found.logprobs[at] for at in starts], np.float32),
            )

    def _told(self, windows: Sequence[Sequence[int]], batch_size: int, num: int) -> Iterator[tuple[Sequence[int], Any]]:
        """Each window with vLLM's flat list of log-probabilities: at each place the token itself, and then the `num`
        most probable ones (-1: all), which may name it a second time."""
        for start in range(0, len(windows), batch_size):
            batch = windows[start : start + batch_size]  # of whatever lengths, since vLLM pads nothing
            outputs = self._generate(batch, _greedy(1, prompt_logprobs=num, flat_logprobs=True))
            yield from zip(batch, (output.prompt_logprobs for output in outputs), strict=True)

    def decode(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Decoded:
        """Greedy continuation, by vLLM's scheduler; the steps come as one time, since it stamps only the ends."""
        if num_tokens < 1 or len({len(prompt) for prompt in prompts}) != 1:
            raise ValueError("decode needs num_tokens >= 1 and prompts of one length")
        before = _draft_counters()
        # No min_tokens: it forbids the end of text, where ignore_eos only goes on after it.
        outputs = self._generate(prompts, _greedy(num_tokens, ignore_eos=True))
        tokens = tuple(tuple(output.outputs[0].token_ids) for output in outputs)
        stamps = [output.metrics for output in outputs]
        first = max(one.first_token_ts for one in stamps)
        return Decoded(
            token_ids=tokens,
            prefill_seconds=first - min(one.scheduled_ts for one in stamps),
            step_seconds=(max(one.last_token_ts for one in stamps) - first,) if num_tokens > 1 else (),
            drafts=_drafts_since(before) if self._arguments.get("speculative_config") else None,
        )

    def choices(self, choices: Sequence[Choice], batch_size: int) -> Iterator[tuple[int, tuple[Scored, ...]]]:
        """See `protocol`. Every option is a prompt of its own: vLLM has no other way to ask for its probability."""
        params = _greedy(1, prompt_logprobs=1, flat_logprobs=True)
        options = [(place, number) for place, choice in enumerate(choices) for number in range(len(choice.options))]
        # Neighbours share a context, so that the options of one choice are known together.
        requests = [(choices[place].context + choices[place].options[number], params) for place, number in options]
        found: dict[int, dict[int, Scored]] = {}
        for at, output in self._stream(requests):
            place, number = options[at]
            known = found.setdefault(place, {})
            known[number] = _scored(output.prompt_logprobs, len(choices[place].context), len(requests[at][0]))
            if len(known) == len(choices[place].options):
                del found[place]
                yield place, tuple(known[number] for number in range(len(known)))

    def generate(self, prompts: Sequence[Prompt], batch_size: int) -> Iterator[tuple[int, Answer]]:
        """See `protocol`; how many are answered at a time is vLLM's to decide."""
        before = time.perf_counter()
        for place, output in self._stream([(prompt.token_ids, _sampling_params(prompt)) for prompt in prompts]):
            now = time.perf_counter()
            told = output.outputs[0]
            yield (
                place,
                Answer(tuple(told.token_ids), "length" if told.finish_reason == "length" else "stop", now - before),
            )
            before = time.perf_counter()

    def _generate(self, prompts: Sequence[Sequence[int]], params: Any) -> list[Any]:
        """The final outputs for all prompts, in order."""
        outputs = dict(self._stream([(ids, params) for ids in prompts], at_once=len(prompts)))
        return [outputs[place] for place in range(len(prompts))]

    def _stream(
        self, requests: Sequence[tuple[Sequence[int], Any]], at_once: int | None = None
    ) -> Iterator[tuple[int, Any]]:
        """(Its place, the final output) of each request of token ids and parameters, as they end; `at_once` of them are
        in vLLM's hands at the same time, twice as many as it computes together where that is left open."""
        at_once = at_once or 2 * int(self._engine.vllm_config.scheduler_config.max_num_seqs)
        ended: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()

        async def one(place: int, free: asyncio.Semaphore) -> None:
            ids, params = requests[place]
            last = None
            async with free:
                prompt = {"prompt_token_ids": list(ids)}
                async for output in self._engine.generate(prompt, params, f"harness-{next(self._numbers)}"):
                    last = output
            ended.put((place, last))

        async def every() -> None:
            free = asyncio.Semaphore(at_once)
            answers = asyncio.ensure_future(asyncio.gather(*(one(place, free) for place in range(len(requests)))))
            try:
                # A request that arrives while the engine dies is told nothing by vLLM, and would wait for ever.
                while not (await asyncio.wait({answers}, timeout=1.0))[0]:
                    if self._engine.errored:
                        raise self._engine.dead_error
                answers.result()
            finally:
                answers.cancel()  # of no effect where all have ended; else vLLM drops what nobody waits for

        work = asyncio.run_coroutine_threadsafe(every(), self._loop)
        work.add_done_callback(lambda _: ended.put(_OVER))
        try:
            while (one_more := ended.get()) is not _OVER:
                yield one_more
            work.result()
        except Exception as error:
            lines = self._log.relevant()
            longest = max(len(ids) for ids, _ in requests)
            if "longer than the maximum model length" in str(error) or type(error).__name__ == "VLLMValidationError":
                raise UserError(
                    f"vLLM refuses a prompt of {longest:,} tokens: {first_line(error)}.",
                    "Raise max_model_len, or use shorter windows.",
                ) from error
            raise EngineDied(
                f"vLLM's engine died over {len(requests)} × {longest:,} tokens: {reason(error, lines)}.",
                "Lower the batch size or max_num_batched_tokens; its last lines are in the record.",
                lines,
            ) from error
        finally:
            work.cancel()

    def memory(self) -> Memory:
        """The peaks of vLLM's workers, all of them together."""
        found = self.ask("harness_memory")
        vram = [one["vram"] for one in found if one["vram"] is not None]
        return Memory(sum(one["rss"] for one in found), sum(vram) if vram else None)

    def ask(self, method: str, *arguments: Any) -> list[Any]:
        """The answers of all workers to a method of `vllm_worker.HarnessWorker`."""
        return list(self._run(self._engine.collective_rpc(method, args=arguments)))

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def close(self) -> None:
        """End vLLM's processes and wait for them."""
        if self._engine is not None:
            with self._log.capturing(), contextlib.suppress(Exception):
                self._engine.shutdown()
                self._run(_cancelled())
            self._engine = None
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._log.close()

    def _described(self, version: str, folder: Path, start: Start, release: vllm_options.Release) -> EngineInfo:
        import torch

        config = self._engine.vllm_config
        layers = self.ask("harness_layers")[0]
        family = family_of(read_json(folder / "config.json"), str(folder))
        attention = next((layers[kind] for kind in family.engine_attention if kind in layers), None)
        weights = self.ask("harness_weights")
        on_cpu = config.device_config.device_type == "cpu"
        parallel = config.parallel_config
        lines = self._log.text()
        kernels = {**layers, "log": " | ".join(dict.fromkeys(KERNEL_LINES.findall(lines)))}
        return EngineInfo(
            name="vllm",
            version=f"vllm {version}, torch {torch.__version__}",
            device="cpu" if on_cpu else torch.cuda.get_device_name(0),
            dtype=str(config.model_config.dtype).removeprefix("torch."),
            requested={"folder": folder.name, "dtype": start.dtype, "device": start.device, **start.options},
            effective={
                "arguments": {name: value for name, value in self._arguments.items() if name != "model"},
                "model_class": config.model_config.architecture,
                "attention_implementation": attention,
                "tensor_parallel": parallel.tensor_parallel_size,
                "pipeline_parallel": parallel.pipeline_parallel_size,
                "data_parallel": parallel.data_parallel_size,
                "executor": str(parallel.distributed_executor_backend),
                "num_devices": parallel.world_size * parallel.data_parallel_size,
                "max_model_len": config.model_config.max_model_len,
                "max_num_seqs": config.scheduler_config.max_num_seqs,
                "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
                "prefix_caching": bool(config.cache_config.enable_prefix_caching),
                "kv_cache_dtype": str(config.cache_config.cache_dtype),
                "kv_cache_tokens": kv_tokens(lines),
                "cuda_graphs": not on_cpu and not config.model_config.enforce_eager,
                "compiled": not config.model_config.enforce_eager,
                "memory_lines": list(dict.fromkeys(MEMORY_LINES.findall(lines))),
                "weight_bytes_resident": sum(one["resident"] for one in weights),
                "weight_bytes_per_token": sum(one["per_token"] for one in weights) // parallel.data_parallel_size,
            },
            kernels=kernels,
            served_as=_served_as(folder, layers),
            warnings=tuple(vllm_options.warnings(start.options, release)),
        )


def _greedy(num_tokens: int, **more: Any) -> Any:
    """vLLM's parameters for the `num_tokens` most probable tokens, without their text."""
    from vllm import SamplingParams

    return SamplingParams(max_tokens=num_tokens, temperature=0.0, detokenize=False, **more)


def _sampling_params(prompt: Prompt) -> Any:
    from vllm import SamplingParams

    sampling = prompt.sampling
    return SamplingParams(
        max_tokens=prompt.max_new_tokens,
        **vars(sampling),
        seed=prompt.seed if sampling.temperature else None,
        stop=list(prompt.stop),
        # vLLM reads the text only to find what stops it, and special tokens may.
        detokenize=bool(prompt.stop),
        skip_special_tokens=False,
    )


def _scored(found: Any, start: int, end: int) -> Scored:
    """The log-probabilities of the tokens from `start` to `end` of a prompt, from vLLM's flat list. At each place the
    token itself comes first, and after it the most probable token where that is another."""
    own, greedy = [], True
    for place in range(start, end):
        told = found.logprobs[found.start_indices[place] : found.end_indices[place]]
        own.append(told[0])
        greedy = greedy and told[0] >= max(told)
    return Scored(math.fsum(own), greedy)


async def _started(arguments: Mapping[str, Any]) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))


async def _cancelled() -> None:
    """Ends the tasks that vLLM leaves in the loop."""
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _import_vllm() -> Any:
    try:
        import vllm
        import vllm.platforms
    except ImportError as error:
        raise UserError(
            f"vLLM cannot be imported: {first_line(error)}.",
            "Install it (`nox -s vllm` makes an environment for CPUs), or use the torch engine.",
        ) from error
    return vllm


def _check_dtype(config: Any) -> None:
    """vLLM's CPU kernels of DeltaNet assert bfloat16 at the first request (0.32, `qwen_gdn_linear_attn.py`)."""
    dtype = str(config.model_config.dtype).removeprefix("torch.")
    if config.device_config.device_type == "cpu" and dtype != "bfloat16":
        raise UserError(f"vLLM computes DeltaNet on a CPU in bfloat16 only, not in {dtype}.", "Give --dtype bfloat16.")


def _served_as(folder: Path, layers: Mapping[str, str]) -> str | None:
    """How the checkpoint's activations were really multiplied, where that is not what it says; else None."""
    raw = read_json(folder / "config.json").get("quantization_config")
    if raw is None:
        return None
    groups = parse(raw, str(folder / "config.json")).groups
    asks = any(one.format is not None and one.format.input_bits == 4 for one in groups)
    weight_only = sorted({how for how in layers.values() if "fp4" in how.lower() and vllm_options.is_weight_only(how)})
    return f"16-bit activations ({', '.join(weight_only)})" if asks and weight_only else None


def _draft_counters() -> list[int]:
    """vLLM's counters of speculative decoding, from the start of this process, ordered as the fields of `Drafts`."""
    from vllm.v1.metrics.reader import get_metrics_snapshot

    counters = {metric.name: getattr(metric, "value", 0) for metric in get_metrics_snapshot()}
    return [int(counters.get(f"vllm:spec_decode_{one.name}", 0)) for one in fields(Drafts)]


def _drafts_since(before: list[int]) -> Drafts:
    """The counters are booked by another thread, a moment after the last token."""
    last = None
    while last != (now := _draft_counters()):
        last = now
        time.sleep(0.05)
    return Drafts(*(after - earlier for after, earlier in zip(now, before, strict=True)))
