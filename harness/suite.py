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
import math
import re
import tomllib
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.errors import UserError, did_you_mean
from harness.sampling import PRESETS

SOURCE = "source"  # the name that the unquantized model has among the variants of a run
BASELINE = "baseline"  # what a rule compares a variant with: an older run of its own
NOISE = ("noise-restart", "noise-batch", "noise-engine")
"""The source beside itself: rows of `harness fidelity`, and no names for variants."""
_SETUP = "+"  # between a variant and the setup that it was measured in
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_HUB_ID = re.compile(r"(?!.*(--|\.\.|\.git$))\w([\w.-]{0,94}\w)?/\w([\w.-]{0,94}\w)?", re.ASCII)


def row_name(variant: str, setup: str | None) -> str:
    """How a variant in a setup is called: `w4a4+mtp1`."""
    return variant if setup is None else f"{variant}{_SETUP}{setup}"


def row_parts(row: str) -> tuple[str, str | None]:
    """The variant and the setup of a row; None for the suite's own options."""
    variant, _, setup = row.partition(_SETUP)
    return variant, setup or None


def is_hub_id(name: object) -> bool:
    """Whether a name is `owner/name` as the Hub takes it (https://huggingface.co/docs/huggingface_hub, `HfApi`'s
    `validate_repo_id`). A name without an owner is none: among datasets it may be a kind of local files, such as
    `json`."""
    return isinstance(name, str) and _HUB_ID.fullmatch(name) is not None


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
class Engine:
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
class Metric:
    """What a rule on one metric may say."""

    unit: str | None  # of the loss and its margin; None: found or not found, of one model alone, without a margin
    table: str | None = None  # of the suite, which says how it is measured
    option: str | None = None  # the key that says which of several numbers is meant
    has_baseline: bool = True


_SHARE = "share"
METRICS = {
    # Per token, or per word, as the protocol counts.
    "log_ppl": Metric(unit="nats", table="ppl", option="protocol"),
    "kl": Metric(unit="nats", table="fidelity"),  # per token, to the source
    "top1": Metric(unit=_SHARE, table="fidelity"),  # of the places where the likeliest token is not the source's
    "score": Metric(unit=_SHARE, table="tasks", option="task"),
    # Speed is a ratio within one session: a stored figure lets regressions through.
    "decode_speed": Metric(unit=_SHARE, table="bench", option="batch", has_baseline=False),
    "prefill_speed": Metric(unit=_SHARE, table="bench", has_baseline=False),
    "verify": Metric(unit=None),  # no finding that is an error
    "arithmetic": Metric(unit=None),  # every engine computed what the checkpoint says
}


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
    engine: Engine = Engine()
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


def narrowed(suite: Suite, variant: str) -> Suite:
    """The suite with one of its variants alone beside the source: without the rules that are about others, or hold it
    against one."""
    alone = dataclasses.replace(suite, variants={variant: suite.variants[variant]})
    rows = alone.rows()
    bench = suite.bench
    if bench is not None and bench.variants is not None:
        bench = dataclasses.replace(bench, variants=tuple(name for name in bench.variants if name in rows))
    if bench is not None and bench.versus not in rows:
        bench = dataclasses.replace(bench, versus=SOURCE)
    gate = tuple(rule for rule in suite.gate if rule.variant in rows and rule.versus in (None, BASELINE, *rows))
    return dataclasses.replace(alone, bench=bench, gate=gate)


def load(path: Path) -> Suite:
    """Read and check one suite file."""
    suite: Suite = _Reader(path, "suite").table(Suite, _document(path, "suite", "--suite"), "")
    tasks = ((f"tasks.{name}", task) for name, task in suite.tasks.items())
    for table, wanted in (("ppl", suite.ppl), ("fidelity", suite.fidelity), ("bench", suite.bench), *tasks):
        for setup in (wanted and wanted.setups) or ():
            if setup not in suite.setups:
                raise UserError(
                    f"{path}: '{table}.setups' names '{setup}', and there is no [setups.{setup}].",
                    did_you_mean(setup, suite.setups),
                )
    if suite.bench and suite.bench.versus not in (timed := _timed_rows(suite, suite.bench)):
        raise UserError(
            f"{path}: 'bench.versus' names '{suite.bench.versus}', which the suite does not measure the speed of.",
            did_you_mean(suite.bench.versus, timed),
        )
    for name in suite.ppl.expected if suite.ppl else ():
        if suite.ppl and name not in suite.ppl.protocols:
            raise UserError(
                f"{path}: 'ppl.expected' has '{name}', which is not among the protocols.",
                did_you_mean(name, suite.ppl.protocols),
            )
    rules = tuple(_completed(f"{path}: 'gate[{place}]", rule, suite) for place, rule in enumerate(suite.gate))
    return dataclasses.replace(suite, gate=rules, folder=path.parent)


def restored(resolved: Mapping[str, Any], where: str) -> Suite:
    """The suite that `Suite.resolved` wrote out, for example into the header of a run; its folder is not known. `where`
    it stands is for the `UserError` of one that another version of the harness wrote."""

    def stated(value: Any) -> Any:
        """Without what is left open: null, which TOML has not, and lists of nothing."""
        if isinstance(value, dict):
            return {key: stated(one) for key, one in value.items() if one is not None and one != []}
        return [stated(one) for one in value] if isinstance(value, list) else value

    suite: Suite = _Reader(Path(where), "suite").table(Suite, stated(dict(resolved)), "")
    return suite


def _timed_rows(suite: Suite, bench: Bench) -> list[str]:
    """The rows whose speed is measured."""
    names = (SOURCE, *(suite.variants if bench.variants is None else bench.variants))
    return [row_name(name, setup) for setup in (None, *(bench.setups or ())) for name in names]


def _completed(where: str, rule: Rule, suite: Suite) -> Rule:
    """A rule with what it leaves open filled in; `UserError` for one that this suite has no numbers for."""
    metric = METRICS[rule.metric]
    if metric.table and not getattr(suite, metric.table):
        raise UserError(
            f"{where}.metric' is {rule.metric}, and the suite has no [{metric.table}] table.",
            "Add the table, or leave the rule out.",
        )
    rows = suite.variants if metric.unit is None else suite.rows()
    if rule.variant not in rows:
        raise UserError(f"{where}.variant' names '{rule.variant}', which is none.", did_you_mean(rule.variant, rows))
    filled = _with_option(where, rule, suite)
    if metric.unit is None:
        for key in ("versus", "margin"):
            if getattr(rule, key) is not None:
                raise UserError(f"{where}.{key}' is set, and {rule.metric} looks at one model alone.", "Leave it out.")
        return filled
    versus = rule.versus or SOURCE
    against = [*rows, BASELINE] if metric.has_baseline else list(rows)
    against.remove(rule.variant)
    if rule.variant == SOURCE:  # which the others are held against, and whose fidelity to itself is none
        against = [row for row in against if row == BASELINE and metric.table != "fidelity"]
    if versus not in against:
        raise UserError(
            f"{where}.versus' is '{versus}', which {rule.metric} of '{rule.variant}' cannot be held against.",
            did_you_mean(versus, against) if against else "Name a variant.",
        )
    if rule.margin is None:
        raise UserError(f"{where}.margin' is missing.", f"Say what loss is accepted, for example 0.01 ({metric.unit}).")
    # A gain of speed has no bound.
    if metric.unit == _SHARE and (rule.margin >= 1 or (rule.margin <= -1 and metric.has_baseline)):
        raise UserError(f"{where}.margin' is {rule.margin:g}, and a share is below 1.", "Write 0.03 for three points.")
    if rule.margin < 0 and metric.has_baseline and versus in (SOURCE, BASELINE):
        raise UserError(
            f"{where}.margin' is {rule.margin:g}: below zero it asks for a gain, which rounding does not bring.",
            "Use a margin of at least 0.",
        )
    return dataclasses.replace(filled, versus=versus)


def _with_option(where: str, rule: Rule, suite: Suite) -> Rule:
    """The rule with the default of its metric's own key, which must be something that the suite measures."""
    option = METRICS[rule.metric].option
    protocols = suite.ppl.protocols if suite.ppl else ()
    filled = dataclasses.replace(
        rule,
        protocol=rule.protocol or (protocols[0] if option == "protocol" else None),
        batch=rule.batch or (1 if option == "batch" else None),
    )
    measured = {
        "task": tuple(suite.tasks),
        "protocol": protocols,
        "batch": suite.bench.batch_sizes if suite.bench else (),
    }
    for key, known in measured.items():
        value = getattr(filled, key)
        if value is not None and key != option:
            raise UserError(f"{where}.{key}' is set, and {rule.metric} has none.", "Leave it out.")
        if value is not None and value not in known:
            remedy = did_you_mean(str(value), map(str, known))
            raise UserError(f"{where}.{key}' is {value}, which the suite does not measure.", remedy)
    return filled


def load_calibration(path: Path) -> tuple[Calibration, Path]:
    """The calibration set in a file that holds what a suite's [calibration] table does, and the folder that its
    relative paths start at."""
    document = _document(path, "calibration set", "--calibration")
    calibration: Calibration = _Reader(path, "calibration set").table(Calibration, document, "")
    return calibration, path.parent


def _document(path: Path, what: str, option: str) -> dict[str, Any]:
    """The TOML file `path`, as its own types; `what` and `option` are for messages."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{path}: the {what} cannot be read ({error.strerror}).",
            f"Give the path of a TOML file with {option}.",
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: the {what} is not UTF-8 text.", "Save it as UTF-8.") from error
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        last_line = f"at line {text.count(chr(10)) + 1}, the end of the file"
        where = str(error).replace("at end of document", last_line)
        raise UserError(f"{path}: not valid TOML: {where}.", "Mend that line.") from error


_TYPE_WORDS = {
    str: "a string",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "a table",
}


def _describe(value: object) -> str:
    return _TYPE_WORDS.get(type(value), f"a {type(value).__name__}")


@dataclass(frozen=True)
class _Reader:
    """TOML values to dataclasses, driven by the annotations; `file` and `what` it holds are only for messages."""

    file: Path
    what: str

    def value(self, kind: Any, value: object, dotted: str) -> Any:
        """`value` as an annotation wants it: dataclass, union, tuple, mapping of names, or a plain type."""
        if dataclasses.is_dataclass(kind):
            return self.table(kind, value, dotted)
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if origin is types.UnionType:
            return self.union([one for one in arguments if one is not types.NoneType], value, dotted)
        if origin is tuple:
            items = self.expect(list, value, dotted)
            if not items or len(set(map(repr, items))) < len(items):
                raise self.wrong(dotted, "must be a list of at least one value, none twice")
            return tuple(self.value(arguments[0], item, f"{dotted}[{i}]") for i, item in enumerate(items))
        if origin is Mapping:
            entries = self.expect(dict, value, dotted)
            return {name: self.value(arguments[1], entry, f"{dotted}.{name}") for name, entry in entries.items()}
        if kind is float and type(value) is int:
            value = float(value)
        plain = self.expect(kind, value, dotted)
        if plain == "":
            raise self.wrong(dotted, "must not be empty")
        if kind is float and not math.isfinite(plain):
            raise self.wrong(dotted, f"must be a finite number, not {plain}")
        return plain

    def union(self, kinds: list[Any], value: object, dotted: str) -> Any:
        """The one kind whose first key is present; a union of one kind (`X | None`) needs no telling."""
        if len(kinds) == 1:
            return self.value(kinds[0], value, dotted)
        tags = {dataclasses.fields(kind)[0].name: kind for kind in kinds}
        present = [tag for tag in tags if tag in self.expect(dict, value, dotted)]
        if len(present) != 1:
            found = " and ".join(present) or "none of them"
            raise self.wrong(dotted, f"must have exactly one of the keys {', '.join(tags)}, and has {found}")
        return self.table(tags[present[0]], value, dotted)

    def table(self, kind: Any, value: object, dotted: str) -> Any:
        """A TOML table as the dataclass `kind`: no unknown key, no missing one, every check passed."""
        entries = self.expect(dict, value, dotted)
        prefix = f"{dotted}." if dotted else ""
        fields = {one.name: one for one in dataclasses.fields(kind) if one.metadata.get("in_file", True)}
        for key in entries:
            if key not in fields:
                raise UserError(f"{self.file}: unknown key '{prefix}{key}'.", did_you_mean(key, fields))
        arguments = {}
        for key, one in fields.items():
            if key in entries:
                arguments[key] = self.value(one.type, entries[key], prefix + key)
                wrong = one.metadata.get("check", lambda _: None)(arguments[key])
                if wrong:
                    raise self.wrong(prefix + key, wrong)
            elif one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING:
                raise UserError(
                    f"{self.file}: '{prefix}{key}' is missing.",
                    f"Add it{f' to [{dotted}]' if dotted else ''}.",
                )
        return kind(**arguments)

    def expect(self, kind: Any, value: object, dotted: str) -> Any:
        """`value` if it is exactly a `kind` (true is no number), an error otherwise."""
        if type(value) is not kind:
            raise self.wrong(dotted, f"must be {_TYPE_WORDS[kind]}, not {_describe(value)}")
        return value

    def wrong(self, dotted: str, problem: str) -> UserError:
        return UserError(f"{self.file}: '{dotted}' {problem}.", f"Correct it in the {self.what}.")
