"""Every key of a suite file: its type, its default, what it must be, and what it is for.

One field is one key, and the string under a field documents it: editors show it, through `harness suite schema`. A key
that is added later has the metadata `ADDED`, so that the digests of suites that do not set it stay what they are.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import with_config

from harness.sampling import PRESETS
from harness.suite.names import BASELINE, NOISE, SOURCE, row_name
from harness.suite.rules import Claim, ClaimMargins, Rule
from harness.suite.texts import Calibration, Text
from harness.suite.values import (
    ADDED,
    STRICT,
    AtLeast0,
    AtLeast1,
    AtLeast2,
    Distinct,
    Name,
    NonEmpty,
    Share,
    as_json,
    at_least,
    keyed_by_name,
    one_of,
)


@dataclass(frozen=True)
class Source:
    """The unquantized checkpoint that every variant is built from and compared with."""

    location: NonEmpty
    """ "demo:<name>", a folder (written with a ".", "/" or "~" in front), or a hub id."""
    revision: NonEmpty | None = None
    """Branch, tag or commit of a hub id."""
    base_model: NonEmpty | None = None
    """The hub id that the card names where the location is no hub id."""
    license: NonEmpty | None = None
    """The licence as the Hub writes it, for example "apache-2.0"; a variant inherits it."""


@dataclass(frozen=True)
class Variant:
    """One quantization of the source."""

    recipe: NonEmpty
    """A recipe's name, as README lists them, such as `rtn-a16` or `w4a4`."""
    scales: Annotated[str, one_of("absmax", "search", "weighted-search")] | None = None
    """How scales are chosen; the recipe's own way where left out."""
    codes: Annotated[str, one_of("rtn", "gptq")] | None = None
    """How codes are chosen; the recipe's own way where left out."""


@dataclass(frozen=True, kw_only=True)
class VllmOptions:
    """What is asked of vLLM beyond its defaults. The engine knows which argument of which release an option is."""

    tensor_parallel: AtLeast1 | None = None
    """GPUs that share every layer."""
    pipeline_parallel: AtLeast1 | None = None
    """Groups of GPUs, each with some of the layers."""
    data_parallel: AtLeast1 | None = None
    """Copies of the model."""
    executor: NonEmpty | None = None
    """ "mp", "ray" (across machines) or "uni"."""
    max_model_len: AtLeast1 | Literal["auto"] | None = None
    """Tokens that a sequence may have; "auto" is what fits into the memory. Left out, it is what a measure needs."""
    max_num_seqs: AtLeast1 | None = None
    """Sequences that run at once. Left out, it is the batch of a measure; of tasks, vLLM's own number."""
    max_num_batched_tokens: AtLeast1 | None = None
    """Tokens in a step."""
    gpu_memory_utilization: float | None = None
    """The share of the GPU's memory that vLLM may take."""
    kv_cache_gb: float | None = None
    """The KV cache in units of 10⁹ bytes, instead of what is left of the memory."""
    kv_cache_dtype: NonEmpty | None = None
    """For example "fp8", which is measured where it is asked for and never a default."""
    enforce_eager: bool | None = None
    """Run without compiling and without CUDA graphs."""
    prefix_caching: bool | None = None
    """Off unless asked for: a cached prompt costs nothing."""
    text_only: bool | None = None
    """Load the model without its vision tower."""
    speculative_tokens: AtLeast1 | None = None
    """Tokens that the MTP head drafts."""
    emulate: bool | None = None
    """4-bit activations in software where the GPU has no such kernel (Hopper)."""
    max_cudagraph_capture_size: AtLeast1 | None = field(default=None, metadata=ADDED)
    """The largest batch that a CUDA graph is captured for."""
    limit_mm_per_prompt: Mapping[str, AtLeast0] | None = field(default=None, metadata=ADDED)
    """Images, videos and sounds of a prompt, by modality: 0 frees what vLLM keeps for them."""
    attention_backend: NonEmpty | None = field(default=None, metadata=ADDED)
    """The attention kernel by vLLM's name, such as "FLASHINFER"."""
    linear_backend: NonEmpty | None = field(default=None, metadata=ADDED)
    """The kernel of linear layers by vLLM's name, such as "marlin"."""
    moe_backend: NonEmpty | None = field(default=None, metadata=ADDED)
    """The kernel of experts by vLLM's name, such as "flashinfer_cutlass"."""


@dataclass(frozen=True)
class EngineOptions:
    """What runs the model. A run's header holds these options as requested, beside what was effective."""

    name: NonEmpty = "torch"
    """ "torch", "streamed" or "vllm"."""
    dtype: NonEmpty = "bfloat16"
    """The type that is computed in."""
    device: NonEmpty = "auto"
    """The device that computes."""
    vllm: VllmOptions | None = None
    """Options of the vLLM engine; other engines do not look at them."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What a protocol must come to on the right text by the right tokenizer. Counts that are left out go unchecked."""

    num_tokens: AtLeast1 | None = None
    """Tokens of the text."""
    num_windows: AtLeast1 | None = None
    """Windows that the text is cut into."""
    num_scored: AtLeast1 | None = None
    """Tokens that are predicted."""


@dataclass(frozen=True)
class Perplexity:
    """`harness ppl`: a protocol fixes windows and scored tokens, the text fixes the rest."""

    protocols: Distinct[NonEmpty]
    """Names of protocols, such as `wikitext2-512`; the card's headline speaks of the first."""
    text: Text
    """The text that is predicted."""
    batch_size: AtLeast1 = 4
    """Windows in a forward pass."""
    max_length: AtLeast2 | None = None
    """Tokens of a document that are read at once (lmeval-word); the model's own length where left out."""
    expected: Mapping[str, Counts] = field(default_factory=dict)
    """By protocol, the counts to expect: another text or tokenizer is refused."""
    setups: Distinct[NonEmpty] | None = None
    """Setups that are measured too, each with every variant."""


@dataclass(frozen=True)
class Fidelity:
    """`harness fidelity`: how far every prediction is from the source's, in disjoint windows of a text."""

    text: Text
    """The text that is predicted."""
    window: AtLeast2 = 2048
    """Tokens in a window: errors that a state gathers show deep in a window."""
    batch_size: AtLeast1 = 4
    """Windows in a forward pass."""
    noise_batch_size: AtLeast1 | None = None
    """Windows in a forward pass of the source's second pass: what differs between the passes is noise. Where left out
    it is 1, or 2 where `batch_size` is 1."""
    noise_engine: NonEmpty | None = None
    """An engine that runs the source too: what differs between engines is noise."""
    named_tokens: AtLeast1 = 64
    """Tokens whose probability is stored at each place, by engines that do not tell all of them."""
    setups: Distinct[NonEmpty] | None = None
    """Setups that are measured too, each with every variant."""


@dataclass(frozen=True)
class Bench:
    """`harness bench`: decode at every batch size and one prefill, `starts` x `repetitions` times."""

    text: Text
    """Real text, whose token ids are the prompts."""
    prompt_tokens: AtLeast1 = 128
    """Tokens of the prompt that decoding starts from."""
    new_tokens: AtLeast2 = 129
    """Tokens that are generated; the first of them belongs to the prefill."""
    batch_sizes: Distinct[AtLeast1] = (1, 2, 4)
    """Sequences that are decoded at once."""
    prefill_tokens: AtLeast1 = 512
    """Tokens of the prompt whose prefill is timed."""
    repetitions: AtLeast1 = 5
    """Repetitions that are kept, for each start of the engine."""
    warmups: AtLeast0 = 1
    """Repetitions before them: stored and marked, never averaged."""
    starts: AtLeast1 = 2
    """How often the engine is loaded anew."""
    variants: Distinct[NonEmpty] | None = None
    """The variants that are timed beside the source; all of them where left out."""
    depths: Distinct[AtLeast0] | None = None
    """Tokens that stand in front of the decoded ones, as in llama-bench's tg @ d."""
    depth_tokens: AtLeast2 = 33
    """Tokens that are generated at each depth."""
    setups: Distinct[NonEmpty] | None = None
    """Setups that are measured too, each with every variant."""
    versus: NonEmpty = SOURCE
    """The row that speeds are divided by."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task of `harness tasks`: which task of lm-eval, and how it is put to the model."""

    task: NonEmpty
    """lm-eval's name of a task or group, "demo:<name>", or a task file (written with a ".", "/" or "~" in front)."""
    version: float | None = None
    """The task's version; another version is refused."""
    revision: NonEmpty | None = None
    """Branch, tag or commit of the task's dataset on the hub."""
    num_fewshot: AtLeast0 | None = None
    """Examples in front of the question; the task's own number where left out."""
    limit: AtLeast1 | None = None
    """Only so many documents, the first ones."""
    chat: bool = False
    """Ask through the model's chat template, examples as turns."""
    system: NonEmpty | None = None
    """The system prompt of a chat."""
    thinking: bool | None = None
    """Whether the chat template asks for thinking; if so, only what follows </think> is judged."""
    preset: Annotated[str, one_of(*PRESETS)] | None = None
    """How tokens are sampled, such as `thinking-general`; the task's own way where left out."""
    max_new_tokens: AtLeast1 | None = None
    """Tokens of an answer; the task's own bound where left out."""
    repeats: AtLeast1 = 1
    """How often the whole task is run, each time with seeds of its own."""
    seed: AtLeast0 = 0
    """The seed of sampled answers."""
    max_length: AtLeast2 | None = None
    """Tokens of a sequence; the model's own length where left out."""
    batch_size: AtLeast1 = 16
    """Contexts in a forward pass of the torch engine."""
    setups: Distinct[NonEmpty] | None = None
    """Setups that are run too, each with every variant."""
    unsafe_code: bool = False
    """Allow the task to run code that the model writes."""


@dataclass(frozen=True)
class Audit:
    """Where answers no longer measure the model: a run above one of these bounds is invalid.

    Shares are of all answers; an answer counts as extracted if any filter of its task extracts it.
    """

    cap_hit_share: Share = 0.05
    """Answers that were cut off at `max_new_tokens`."""
    unclosed_share: Share = 0.05
    """Answers whose thinking does not end."""
    empty_share: Share = 0.05
    """Answers without text."""
    extraction_failure_share: Share = 0.2
    """Answers from which no filter could extract a result."""
    token_inflation_ratio: Annotated[float, at_least(1)] = 2.0
    """Tokens of an answer, divided by those of the source's answer."""


def _reserved_variant(variants: Mapping[str, Variant]) -> str | None:
    for name, meaning in ((SOURCE, "the unquantized model"), (BASELINE, "an older run of a variant")):
        if name in variants:
            return f"must not use '{name}', which always means {meaning}"
    noise = next((name for name in variants if name in NOISE), None)
    if noise is not None:
        return f"must not use '{noise}', which means the source measured against itself"
    return None if variants else "must name at least one variant"


def _chat_keys_without_chat(tasks: Mapping[str, Task]) -> str | None:
    for name, task in tasks.items():
        if task.thinking is not None and not task.chat:
            return f"has '{name}', where thinking is set and chat is not: only a chat template knows of thinking"
        if task.system is not None and not task.chat:
            return f"has '{name}', where system is set and chat is not: only a chat has a system prompt"
    return None


@with_config(STRICT)
@dataclass(frozen=True, kw_only=True)
class SuiteFile:
    """One model card: a source, its variants, and how they are measured."""

    name: Name
    """The suite's name, which its records and its report's folder have too."""
    title: NonEmpty
    """The card's heading."""
    source: Source
    """The unquantized model."""
    variants: Annotated[Mapping[str, Variant], keyed_by_name("a variant", _reserved_variant)]
    """The quantizations, by name."""
    description: NonEmpty | None = None
    """What the card says first, in Markdown."""
    calibration: Calibration | None = None
    """The calibration set of recipes that need one."""
    engine: EngineOptions = EngineOptions()
    """What runs the model."""
    setups: Annotated[Mapping[str, VllmOptions], keyed_by_name("a setup")] = field(default_factory=dict)
    """Options of vLLM over those of [engine.vllm], by the name of the setup that measures ask for."""
    ppl: Perplexity | None = None
    """How perplexity is measured."""
    fidelity: Fidelity | None = None
    """How the divergence from the source is measured."""
    bench: Bench | None = None
    """How speed is measured."""
    tasks: Annotated[Mapping[str, Task], keyed_by_name("a task", _chat_keys_without_chat)] = field(default_factory=dict)
    """The tasks that answers are scored on, by the label that tables use."""
    audit: Audit = Audit()
    """Which runs of tasks are invalid."""
    claims: ClaimMargins = field(default_factory=ClaimMargins)
    """How near "near-lossless" is."""
    gate: Distinct[Rule] = ()
    """What `harness gate` judges."""
    claim: Distinct[Claim] = field(default=(), metadata=ADDED)
    """What the card says of variants, as far as the records support it."""


@dataclass(frozen=True, kw_only=True)
class Suite(SuiteFile):
    """What a suite file says, and the folder that it lies in."""

    folder: Path = Path()

    def vllm_options(self, setup: str | None = None) -> dict[str, Any]:
        """What is asked of vLLM, by option, without None: the suite's own options, and over them those of a setup."""
        over = VllmOptions() if setup is None else self.setups[setup]
        return {
            name: value
            for options in (self.engine.vllm or VllmOptions(), over)
            for name, value in dataclasses.asdict(options).items()
            if value is not None
        }

    def rows(self) -> tuple[str, ...]:
        """What a table may have a row for: the source and the variants, and each of them again for every setup."""
        models = (SOURCE, *self.variants)
        return models + tuple(row_name(name, setup) for setup in self.setups for name in models)

    def resolved(self) -> dict[str, Any]:
        """Everything that the file says and every default that it leaves open, as JSON values. Paths stay as they are
        written, so two people with the same suite have the same digest."""
        everything: dict[str, Any] = as_json(self)
        del everything["folder"]
        return everything

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
