"""Suites: one TOML file says what is built and measured, with names and numbers only.

    name = "demo"
    title = "NVFP4 of the embedded demo model"

    [source]
    location = "demo:dense"             # or a folder ("./checkpoint"), or a hub id ("Qwen/Qwen3.5-9B")

    [variants.nvfp4a16]
    recipe = "rtn-a16"

    [variants.w4a4-gptq]
    recipe = "w4a4"
    codes = "gptq"                      # scales and codes are the recipe's own unless they are named

    [calibration]
    sources = [{ dataset = "openai/gsm8k", config = "main", split = "train",
                 user = ["question"], assistant = "answer", samples = 256, max_tokens = 2048 }]

    [ppl]
    protocols = ["wikitext2-512", "llamacpp-512"]
    text = { demo = "heldout" }         # or { path = "wiki.txt" }, or { dataset = "Salesforce/wikitext", ... }

    [fidelity]
    text = { demo = "heldout" }

    [setups.mtp1]                       # options of vLLM that are measured beside the suite's own
    speculative_tokens = 1

    [bench]
    text = { demo = "heldout" }
    batch_sizes = [1, 2, 4]
    setups = ["mtp1"]

    [tasks.gsm8k]
    task = "gsm8k"                      # lm-eval's name, or "demo:arithmetic", or a task file ("./my-task.yaml")
    chat = true
    thinking = true
    preset = "thinking-general"

    [audit]
    cap_hit_share = 0.05

    [claims]
    near_lossless_kl = 0.01             # what "near-lossless" in title and description is held to

    [[gate]]
    metric = "log_ppl"                  # of METRICS
    variant = "nvfp4a16"
    versus = "source"                   # or another variant, or "baseline": what `harness gate` wrote down before
    margin = 0.02                       # the largest loss that is accepted, in the metric's unit

The dataclasses below *are* the schema: one reader walks their fields, so a key is documented, typed, defaulted
and checked in one place. Every key that is not a field is an error with the nearest known one. A suite file never
inherits from another, and nothing that changes a number hides in code: `Suite.resolved` writes every default out,
and that goes into the header of every run together with its digest.

Meaning never depends on what lies on the disk: a location is a folder if it is *written* as one (it begins with
`.`, `/` or `~`), and a relative path starts at the suite's own folder.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.sampling import PRESETS
from harness.suite.metrics import METRICS
from harness.suite.names import BASELINE, NOISE, SOURCE, row_name

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")

# A check returns what is wrong with a value, to be read after its key ("must be ..."), or None.
_Check = Callable[[Any], str | None]


def _at_least(minimum: int) -> _Check:
    def check(value: float | tuple[float, ...]) -> str | None:
        smallest = min(value) if isinstance(value, tuple) else value
        return f"must be at least {minimum}, not {smallest}" if smallest < minimum else None

    return check


def _one_of(*known: str) -> _Check:
    def check(value: str) -> str | None:
        return None if value in known else f"must be one of {', '.join(known)}, not '{value}'"

    return check


def _is_name(value: str) -> str | None:
    if _NAME.fullmatch(value):
        return None
    return f"must be a name of lower-case letters, digits, '.', '_' and '-', not '{value}'"


def _are_variant_names(value: Mapping[str, "Variant"]) -> str | None:
    if not value:
        return "must name at least one variant"
    for name, meaning in ((SOURCE, "the unquantized model"), (BASELINE, "an older run of a variant")):
        if name in value:
            return f"must not use '{name}', which always means {meaning}"
    if taken := next((name for name in value if name in NOISE), None):
        return f"must not use '{taken}', which means the source measured against itself"
    return next((f"has a variant that {wrong}" for name in value if (wrong := _is_name(name))), None)


def _are_setup_names(value: Mapping[str, "VllmOptions"]) -> str | None:
    return next((f"has a setup that {wrong}" for name in value if (wrong := _is_name(name))), None)


def _are_task_names(value: Mapping[str, "Task"]) -> str | None:
    for name, task in value.items():
        if wrong := _is_name(name):
            return f"has a task that {wrong}"
        if task.thinking is not None and not task.chat:
            return f"has '{name}', where thinking is set and chat is not: only a chat template knows of thinking"
        if task.system is not None and not task.chat:
            return f"has '{name}', where system is set and chat is not: only a chat has a system prompt"
    return None


def _share(value: float) -> str | None:
    return None if 0 <= value <= 1 else f"must be between 0 and 1, not {value}"


def _say_what_a_sample_is(value: tuple["Samples", ...]) -> str | None:
    for position, source in enumerate(value):
        if isinstance(source, DemoSamples):
            continue
        named = [key for key in ("column", "messages", "user", "assistant") if getattr(source, key) is not None]
        found = " and ".join(named) or "none of them"
        suffix = Path(source.path).suffix.lower() if isinstance(source, FileSamples) else None
        if suffix == TEXT_FILE and named:
            return f"has at [{position}] a {TEXT_FILE} file, which has no columns, and names {found}"
        if suffix is not None and suffix not in (TEXT_FILE, *ROW_FILES):
            return f"has at [{position}] a file whose name ends in none of {', '.join((TEXT_FILE, *ROW_FILES))}"
        if suffix != TEXT_FILE and named not in (["column"], ["messages"], ["user", "assistant"]):
            return f"needs at [{position}] exactly one of column, messages, or user with assistant, and has {found}"
    return None


def _checked(check: _Check, **kwargs: Any) -> Any:
    return field(metadata={"check": check}, **kwargs)


@dataclass(frozen=True)
class DemoText:
    """A split of the embedded corpus, generated on the spot."""

    demo: str


@dataclass(frozen=True)
class FileText:
    """A UTF-8 text file; a relative path starts at the suite's folder."""

    path: str


@dataclass(frozen=True)
class DatasetText:
    """One column of a hub dataset, rows joined as the protocol says."""

    dataset: str
    config: str | None = None
    split: str = "test"
    column: str = "text"
    revision: str | None = None


# A table with several possible shapes is told by the first key of each: `demo`, `path` or `dataset`.
Text = DemoText | FileText | DatasetText


TEXT_FILE = ".txt"
ROW_FILES = (".jsonl", ".json", ".parquet", ".csv")


@dataclass(frozen=True, kw_only=True)
class DemoSamples:
    """Windows of `max_tokens` tokens, cut from the embedded corpus."""

    demo: str
    samples: int = _checked(_at_least(1))
    max_tokens: int = _checked(_at_least(2))
    seed: int = _checked(_at_least(0), default=0)  # which windows


@dataclass(frozen=True, kw_only=True)
class FileSamples:
    """Rows of a local file (JSON, JSON lines, Parquet, CSV), or windows of a text file.

    What the sample of a row is, exactly one of three says: `column`, plain text as it stands; `messages`, a column
    that holds a chat, a list of {role, content}; or `user` and `assistant`, columns to make a chat of two messages
    from, those of `user` that are not empty joined by an empty line. Chats go through the model's own chat template.
    """

    path: str
    samples: int = _checked(_at_least(1))
    max_tokens: int = _checked(_at_least(2))  # what is longer is cut
    seed: int = _checked(_at_least(0), default=0)  # which rows
    column: str | None = None
    messages: str | None = None
    user: tuple[str, ...] | None = None
    assistant: str | None = None


@dataclass(frozen=True, kw_only=True)
class DatasetSamples:
    """Rows of a hub dataset; `column`, `messages`, `user` and `assistant` as for a file."""

    dataset: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    samples: int = _checked(_at_least(1))
    max_tokens: int = _checked(_at_least(2))
    seed: int = _checked(_at_least(0), default=0)
    column: str | None = None
    messages: str | None = None
    user: tuple[str, ...] | None = None
    assistant: str | None = None


Samples = DemoSamples | FileSamples | DatasetSamples


@dataclass(frozen=True)
class Calibration:
    """What a calibrated build runs through the model, and how much of it at once. All samples of all sources count."""

    sources: tuple[Samples, ...] = _checked(_say_what_a_sample_is)
    batch_tokens: int = _checked(_at_least(1), default=8192)  # tokens per forward pass
    hidden_memory_gb: float = _checked(_at_least(0), default=4.0)  # 10⁹ bytes of hidden states in memory; more on disk


@dataclass(frozen=True)
class Source:
    """The unquantized checkpoint that every variant is built from and compared with."""

    location: str  # "demo:<name>", a folder, or a hub id
    revision: str | None = None  # of a hub id: branch, tag or commit
    base_model: str | None = None  # the hub id to name in the card when the location is not one
    license: str | None = None  # as the Hub writes it, for example "apache-2.0"; a variant inherits it


@dataclass(frozen=True)
class Variant:
    """One quantization of the source. Whether the recipe exists is the builder's to say."""

    recipe: str
    scales: str | None = _checked(_one_of("absmax", "search", "weighted-search"), default=None)  # None: the recipe's
    codes: str | None = _checked(_one_of("rtn", "gptq"), default=None)  # None: the recipe's own


@dataclass(frozen=True, kw_only=True)
class VllmOptions:
    """What is asked of vLLM beyond its defaults; which argument of which release says it is the engine's to know."""

    tensor_parallel: int | None = _checked(_at_least(1), default=None)  # GPUs that share every layer
    pipeline_parallel: int | None = _checked(_at_least(1), default=None)  # groups of GPUs, each with some layers
    data_parallel: int | None = _checked(_at_least(1), default=None)  # copies of the model
    executor: str | None = None  # "mp", "ray" (across machines) or "uni"
    max_model_len: int | None = _checked(_at_least(1), default=None)
    max_num_seqs: int | None = _checked(_at_least(1), default=None)
    max_num_batched_tokens: int | None = _checked(_at_least(1), default=None)
    gpu_memory_utilization: float | None = None
    kv_cache_gb: float | None = None  # 10⁹ bytes, instead of what is left of the memory
    kv_cache_dtype: str | None = None  # "fp8": measured where it is asked for, never a default
    enforce_eager: bool | None = None
    prefix_caching: bool | None = None  # off unless asked for: a cached prompt costs nothing
    text_only: bool | None = None  # without the vision tower
    speculative_tokens: int | None = _checked(_at_least(1), default=None)  # by the MTP head
    emulate: bool | None = None  # 4-bit activations in software where the GPU has no such kernel (Hopper)


@dataclass(frozen=True)
class EngineOptions:
    """What runs the model; 'requested' in the run header, where 'effective' stands beside it."""

    name: str = "torch"
    dtype: str = "bfloat16"
    device: str = "auto"
    vllm: VllmOptions | None = None  # not looked at by any other engine


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What a protocol must come to on the right text by the right tokenizer; what is left out is not looked at."""

    num_tokens: int | None = _checked(_at_least(1), default=None)
    num_windows: int | None = _checked(_at_least(1), default=None)
    num_scored: int | None = _checked(_at_least(1), default=None)


@dataclass(frozen=True)
class Perplexity:
    """`harness ppl`: a protocol fixes windows and scored tokens, the text fixes the rest."""

    protocols: tuple[str, ...]  # the first one is the one that the card's headline speaks of
    text: Text
    batch_size: int = _checked(_at_least(1), default=4)  # windows per forward pass
    max_length: int | None = _checked(
        _at_least(2), default=None
    )  # tokens of a document read at once (lmeval-word); the model's own where left out
    expected: Mapping[str, Counts] = field(default_factory=dict)  # by protocol: another text or tokenizer is refused
    setups: tuple[str, ...] | None = None  # measured too, each with every variant


@dataclass(frozen=True)
class Fidelity:
    """`harness fidelity`: how far every prediction is from the source's, in disjoint windows of a text."""

    text: Text
    window: int = _checked(_at_least(2), default=2048)  # tokens; errors that a state gathers show deep in a window
    batch_size: int = _checked(_at_least(1), default=4)  # windows per forward pass
    # Of the source's other pass: what differs is noise. 1 where it is left out, or 2 where batch_size is 1.
    noise_batch_size: int | None = _checked(_at_least(1), default=None)
    noise_engine: str | None = None  # runs the source too: what differs between engines is noise
    named_tokens: int = _checked(_at_least(1), default=64)  # at each place, by engines that do not tell all
    setups: tuple[str, ...] | None = None  # measured too, each with every variant


@dataclass(frozen=True)
class Bench:
    """`harness bench`: decode at every batch size and one prefill, `starts` x `repetitions` times."""

    text: Text  # prompts are token ids of real text
    prompt_tokens: int = _checked(_at_least(1), default=128)
    new_tokens: int = _checked(_at_least(2), default=129)  # the first one belongs to the prefill
    batch_sizes: tuple[int, ...] = _checked(_at_least(1), default=(1, 2, 4))
    prefill_tokens: int = _checked(_at_least(1), default=512)
    repetitions: int = _checked(_at_least(1), default=5)  # kept, per engine start
    warmups: int = _checked(_at_least(0), default=1)  # stored and marked, never averaged
    starts: int = _checked(_at_least(1), default=2)  # times the engine is loaded anew
    variants: tuple[str, ...] | None = None  # only these and the source; all where it is left out
    depths: tuple[int, ...] | None = _checked(_at_least(0), default=None)  # tokens in front, as llama-bench's tg @ d
    depth_tokens: int = _checked(_at_least(2), default=33)  # new tokens there
    setups: tuple[str, ...] | None = None  # measured too, each with every variant
    versus: str = SOURCE  # the row that speeds are divided by


@dataclass(frozen=True, kw_only=True)
class Task:
    """One evaluation of `harness tasks`: a task of lm-eval, and how it is put to the model."""

    task: (
        str  # lm-eval's name of a task or group, "demo:<name>", or a task file, written with a ".", "/" or "~" in front
    )
    version: float | None = None  # of the task; another one is refused
    revision: str | None = None  # of its dataset on the hub
    num_fewshot: int | None = _checked(_at_least(0), default=None)  # examples in front; the task's own where left out
    limit: int | None = _checked(_at_least(1), default=None)  # only the first documents
    chat: bool = False  # through the model's chat template, examples as turns
    system: str | None = None  # the system prompt of a chat
    thinking: bool | None = None  # of the chat template; with it only what follows </think> is judged
    preset: str | None = _checked(_one_of(*PRESETS), default=None)  # of sampling; the task's own where left out
    max_new_tokens: int | None = _checked(_at_least(1), default=None)  # the task's own where left out
    repeats: int = _checked(_at_least(1), default=1)  # the whole task so many times, each with seeds of its own
    seed: int = _checked(_at_least(0), default=0)
    max_length: int | None = _checked(
        _at_least(2), default=None
    )  # tokens of a sequence; the model's own where left out
    batch_size: int = _checked(_at_least(1), default=16)  # contexts in a forward pass of the torch engine
    setups: tuple[str, ...] | None = None  # run too, each with every variant
    unsafe_code: bool = False  # allow a task to run what the model writes


@dataclass(frozen=True)
class Audit:
    """Where answers are no measurement of the model any more: a run above one of these bounds is invalid.

    Shares are of all answers; an answer is extracted if any filter of its task finds one.
    """

    cap_hit_share: float = _checked(_share, default=0.05)  # cut off at max_new_tokens
    unclosed_share: float = _checked(_share, default=0.05)  # a thought without its end
    empty_share: float = _checked(_share, default=0.05)
    extraction_failure_share: float = _checked(_share, default=0.2)  # no answer found in the text
    token_inflation_ratio: float = _checked(_at_least(1), default=2.0)  # tokens per answer against the source's


@dataclass(frozen=True, kw_only=True)
class Claims:
    """How near is near: the margins within which the suite's prose may call a variant near-lossless, or as good as
    another. The whole interval of a difference has to lie within them, to both sides.

    0.01 nats of log-perplexity are one per cent of perplexity. Of the usual formats of llama.cpp on an 8B model, the
    ones of 8 and 6 bits that are called near-lossless come to 0.0014 and 0.0055 nats of divergence and lose 0.0004 and
    0.0035 of log-perplexity, and the one of 5 bits, which few would call so, comes to 0.0108
    (https://github.com/ggml-org/llama.cpp/pull/6936). A point of the mean score is the least that evaluations of usual
    size can tell: identical weights run twice differ by a third of it.
    """

    near_lossless_log_ppl: float = _checked(_share, default=0.01)  # nats per token
    near_lossless_kl: float = _checked(_share, default=0.01)  # nats per token
    near_lossless_score: float = _checked(_share, default=0.01)  # of the mean over tasks


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What `harness gate` holds a variant to: it loses at most `margin` against `versus`. Read, a rule has nothing open
    but the task, where it is about all of them together."""

    metric: str = _checked(_one_of(*METRICS))
    variant: str  # or the source, against its baseline
    versus: str | None = None  # the source where left out
    margin: float | None = None  # in the metric's unit; below zero where a gain is wanted
    task: str | None = None  # of a score: all tasks where left out
    protocol: str | None = None  # of log_ppl: the suite's first where left out
    batch: int | None = _checked(_at_least(1), default=None)  # of decode_speed: 1 where left out


@dataclass(frozen=True, kw_only=True)
class Suite:
    """One model card: a source, its variants, and how they are measured."""

    name: str = _checked(_is_name)
    title: str
    source: Source
    variants: Mapping[str, Variant] = _checked(_are_variant_names)
    description: str | None = None
    calibration: Calibration | None = None
    engine: EngineOptions = EngineOptions()
    setups: Mapping[str, VllmOptions] = _checked(_are_setup_names, default_factory=dict)  # options over [engine.vllm]
    ppl: Perplexity | None = None
    fidelity: Fidelity | None = None
    bench: Bench | None = None
    tasks: Mapping[str, Task] = _checked(_are_task_names, default_factory=dict)
    audit: Audit = Audit()
    claims: Claims = Claims()
    gate: tuple[Rule, ...] = ()
    folder: Path = field(default=Path(), metadata={"in_file": False})  # where the file lies

    def vllm_options(self, setup: str | None = None) -> dict[str, Any]:
        """What is asked of vLLM, by option: the suite's own, and over them those of a setup; None is left out."""
        over = VllmOptions() if setup is None else self.setups[setup]
        return {
            name: value
            for options in (self.engine.vllm or VllmOptions(), over)
            for name, value in dataclasses.asdict(options).items()
            if value is not None
        }

    def rows(self) -> tuple[str, ...]:
        """What a table may have a row for: the source and the variants, and each of them again for every setup."""
        named = (SOURCE, *self.variants)
        return named + tuple(row_name(name, setup) for setup in self.setups for name in named)

    def resolved(self) -> dict[str, Any]:
        """Everything the file says and every default that it leaves open, as JSON values.

        Paths stay as they are written, so two people with the same suite have the same digest.
        """
        everything = dataclasses.asdict(self)
        del everything["folder"]
        resolved: dict[str, Any] = json.loads(json.dumps(everything))
        return resolved

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the resolved suite as canonical JSON: sorted keys, no spaces, UTF-8."""
        text = json.dumps(self.resolved(), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def path(self, written: str) -> Path:
        """Where a path written in this suite really is."""
        return self.folder / Path(written).expanduser()

    def source_location(self) -> str:
        """Where the source is: a folder counted from the suite's own, anything else as it is written."""
        location = self.source.location
        return str(self.path(location)) if location.startswith((".", "/", "~")) else location
