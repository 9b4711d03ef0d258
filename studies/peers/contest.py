"""What is compared: quantizers, task answerers and scorers.

Our recipes and options stand beside llm-compressor's methods in groups of equal bits, our engines beside lm-eval's own
model classes, and the streamed scorer beside the torch engine. A group has one baseline, our round-to-nearest on absmax
scales, and every divergence in the group is also given as a share of the baseline's. Both sides quantize the same
modules: llm-compressor's ignore list is made of the recipe.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from harness.model.families import qwen35
from harness.quantize.recipes import recipe_named

SPEED_SAMPLES, QUALITY_SAMPLES = 32, 64
"""Samples of calibration text."""
CALIBRATION_TOKENS = 512
"""Tokens of a sample of calibration text."""


@dataclass(frozen=True)
class Ours:
    """A build by `harness build --recipe … --scales … --codes …`; None leaves an option to the recipe."""

    recipe: str
    scales: str | None = None
    codes: str | None = None

    @property
    def name(self) -> str:
        """The recipe and its options; the folder of the artifact has this name."""
        return "-".join(part for part in (self.recipe, self.scales, self.codes) if part)

    @property
    def needs_data(self) -> bool:
        """Whether the build needs calibration text."""
        return recipe_named(self.recipe).with_method(self.scales, self.codes).needs_calibration

    def arguments(self) -> list[str]:
        """The arguments of `harness build` that say what is built."""
        options = (("--recipe", self.recipe), ("--scales", self.scales), ("--codes", self.codes))
        return [word for option, value in options if value for word in (option, value)]


@dataclass(frozen=True)
class Theirs:
    """One of llm-compressor's methods on the modules of our `recipe`; `compressor` explains the words."""

    method: str
    scheme: str
    recipe: str
    observer: str | None = None

    @property
    def name(self) -> str:
        """The recipe, the method and the observer; the folder of the artifact has this name."""
        short = {"model_free_ptq": "model-free", "QuantizationModifier": "rtn", "GPTQModifier": "gptq"}[self.method]
        parts = ("llmcompressor", self.recipe, short, self.observer)
        return "-".join(part.replace("_", "-") for part in parts if part)

    @property
    def needs_data(self) -> bool:
        """Whether the method needs calibration text."""
        return self.scheme == "NVFP4" or self.method == "GPTQModifier"

    def job(self) -> dict[str, Any]:
        """The part of a `compressor` job that says what is built."""
        kept = recipe_named(self.recipe).ignored(qwen35.FAMILY)
        # `model_free_ptq` takes every weight that is not ignored for a linear layer's; `oneshot` does not.
        kept += ["re:.*embed_tokens$", "re:.*conv1d$"]
        return {"method": self.method, "scheme": self.scheme, "observer": self.observer, "ignore": kept}


Contestant = Ours | Theirs


@dataclass(frozen=True)
class QualityGroup:
    """Variants of equal bits. `targets` are the largest shares of the baseline's divergence that our best variant may
    keep, on text like the calibration's and on text unlike it; None where there is no target."""

    name: str
    baseline: Ours
    others: tuple[Contestant, ...]
    targets: tuple[float, float] | None = None

    @property
    def contestants(self) -> tuple[Contestant, ...]:
        """All variants, the baseline first."""
        return (self.baseline, *self.others)


_STEPS = (
    ("search", "rtn"),
    ("weighted-search", "rtn"),
    ("absmax", "gptq"),
    ("search", "gptq"),
    ("weighted-search", "gptq"),
)
_EXPANDED = "nvfp4_expanded_mse"


def _w4a4(name: str, recipe: str, targets: tuple[float, float] | None) -> QualityGroup:
    theirs = (
        Theirs("QuantizationModifier", "NVFP4", recipe),
        Theirs("QuantizationModifier", "NVFP4", recipe, _EXPANDED),
        Theirs("GPTQModifier", "NVFP4", recipe),
        Theirs("GPTQModifier", "NVFP4", recipe, _EXPANDED),
    )
    ours = tuple(Ours(recipe, scales, codes) for scales, codes in _STEPS)
    return QualityGroup(name, Ours(recipe, "absmax", "rtn"), (*ours, *theirs), targets)


QUALITY = (
    QualityGroup(
        "A16",
        Ours("rtn-a16"),
        (
            *(Ours("a16", scales, codes) for scales, codes in _STEPS),
            Theirs("model_free_ptq", "NVFP4A16", "rtn-a16"),
            Theirs("QuantizationModifier", "NVFP4A16", "rtn-a16"),
            Theirs("QuantizationModifier", "NVFP4A16", "rtn-a16", _EXPANDED),
            Theirs("GPTQModifier", "NVFP4A16", "rtn-a16"),
            Theirs("GPTQModifier", "NVFP4A16", "rtn-a16", _EXPANDED),
        ),
        targets=(0.5, 0.75),
    ),
    _w4a4("W4A4", "w4a4", (0.7, 0.82)),
    _w4a4("W4A4, DeltaNet included", "w4a4-deltanet", None),
)


AGREEMENTS = (
    (Ours("rtn-a16"), Theirs("model_free_ptq", "NVFP4A16", "rtn-a16")),
    (Ours("rtn-a16"), Theirs("QuantizationModifier", "NVFP4A16", "rtn-a16")),
    (Ours("w4a4", "absmax", "rtn"), Theirs("QuantizationModifier", "NVFP4", "w4a4")),
)
"""Pairs of variants that round to nearest and should be equal."""


@dataclass(frozen=True)
class Race:
    """The goal of two contestants: the time of `loser` is at least `times` the time of `winner` (None for no goal), and
    the peak memory of `winner` at most `memory_share` of the loser's (None for no goal)."""

    winner: str
    loser: str
    times: float | None
    memory_share: float | None = None


COPY = "copy"
"""A plain copy of the first contestant's output, as a floor for whatever writes those bytes."""

_RTN_A16, _SEARCH_A16 = Ours("rtn-a16"), Ours("a16", "search", "rtn")
_MODEL_FREE = Theirs("model_free_ptq", "NVFP4A16", "rtn-a16")
_RTN, _GPTQ = Ours("w4a4", "absmax", "rtn"), Ours("w4a4", "absmax", "gptq")
_THEIR_RTN = Theirs("QuantizationModifier", "NVFP4", "w4a4")
_THEIR_GPTQ = Theirs("GPTQModifier", "NVFP4", "w4a4")

SPEED_A16: tuple[Contestant, ...] = (_RTN_A16, _MODEL_FREE, _SEARCH_A16)
RACES_A16 = (
    Race(_RTN_A16.name, _MODEL_FREE.name, 10, memory_share=1 / 4),
    Race(_RTN_A16.name, COPY, 1 / 4),
    Race(_SEARCH_A16.name, _RTN_A16.name, 1 / 3),
)
SPEED_W4A4: tuple[Contestant, ...] = (_RTN, _THEIR_RTN, _GPTQ, _THEIR_GPTQ)
RACES_W4A4 = (Race(_RTN.name, _THEIR_RTN.name, 5), Race(_GPTQ.name, _THEIR_GPTQ.name, 5))


@dataclass(frozen=True)
class Answerer:
    """One way to answer tasks: lm-eval's own model class `engine`, or our engine of that name.

    `arguments` are those of the model class beside the checkpoint, or those of `open_engine` and two more: the contexts
    in a forward pass (`batch_size`) and the tokens of a sequence (`max_length`).
    """

    name: str
    side: Literal["lm-eval", "harness"]
    engine: str
    arguments: Mapping[str, Any]

    def job(self) -> dict[str, Any]:
        """The part of an `answerer` job that says who answers."""
        return {"side": self.side, "engine": self.engine, "arguments": dict(self.arguments)}


TASKS = ("recall_choice", "agreement", "arithmetic_choice")
"""The embedded tasks of the races: log-likelihoods, 300 documents each."""
SEQUENCE_TOKENS = 1024

_CPU: dict[str, Any] = {"device": "cpu"}
_WIDE = {**_CPU, "dtype": "float32"}
_HF = Answerer("lm-eval-hf", "lm-eval", "hf", _CPU)
_HF_FLOAT32 = Answerer("lm-eval-hf-float32", "lm-eval", "hf", _WIDE)
_HF_BATCHED = Answerer("lm-eval-hf-float32-batch16", "lm-eval", "hf", {**_WIDE, "batch_size": 16})
_TORCH = Answerer("harness-torch", "harness", "torch", {**_WIDE, "batch_size": 16, "max_length": SEQUENCE_TOKENS})

SPEED_TASKS = (_TORCH, _HF, _HF_FLOAT32, _HF_BATCHED)
RACES_TASKS = (
    Race(_TORCH.name, _HF.name, 2),
    Race(_TORCH.name, _HF_FLOAT32.name, 2),
    Race(_TORCH.name, _HF_BATCHED.name, None),
)

_THEIR_VLLM = Answerer(
    "lm-eval-vllm",
    "lm-eval",
    "vllm",
    {
        "dtype": "bfloat16",
        "seed": 0,
        "batch_size": "auto",
        "max_model_len": SEQUENCE_TOKENS,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 2048,
        "kv_cache_memory_bytes": 500_000_000,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "language_model_only": True,
        "hf_overrides": {"head_dtype": "float32"},
    },
)
"""Its arguments are those that our engine gives vLLM for the options below."""
_VLLM = Answerer(
    "harness-vllm",
    "harness",
    "vllm",
    {
        "dtype": "bfloat16",
        "batch_size": 16,
        "max_length": SEQUENCE_TOKENS,
        "options": {
            "max_model_len": SEQUENCE_TOKENS,
            "max_num_seqs": 8,
            "kv_cache_gb": 0.5,
            "enforce_eager": True,
            "text_only": True,
        },
    },
)
SPEED_TASKS_VLLM = (_VLLM, _THEIR_VLLM)
RACES_TASKS_VLLM = (Race(_VLLM.name, _THEIR_VLLM.name, 1),)


@dataclass(frozen=True)
class Scorer:
    """One way to score a source and its variants: `streamed` takes all models through their layers together, `separate`
    loads one model after the other into the torch engine."""

    name: Literal["streamed", "separate"]

    def job(self) -> dict[str, Any]:
        """The part of a `scorer` job that says which way."""
        return {"way": self.name}


STREAMED, SEPARATE = Scorer("streamed"), Scorer("separate")
SPEED_SCORING = (STREAMED, SEPARATE)
SCORED = (Ours("rtn-a16"), Ours("rtn-a16", "search"))
"""The variants that are scored together with their source."""
SCORED_WINDOWS, SCORED_TOKENS = 2, 512
"""Windows, and tokens of a window. The tokens are drawn, since no time depends on how likely they are."""
