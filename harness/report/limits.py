"""What is known to go wrong with models of this kind, in one maintained table, each with where it is known from.

Add a row when a report or a measurement shows a new one; remove one when no release that people run has it any more.
"""

from dataclasses import dataclass

_VLLM = "https://github.com/vllm-project/vllm"


@dataclass(frozen=True)
class Limit:
    """A configuration, what it does, what to do instead, and the page that says so. `needs_mtp`, `needs_activations`,
    `needs_experts`: only of variants with an MTP head, with 4-bit activations, or of a mixture of experts."""

    configuration: str
    effect: str
    remedy: str
    source: str
    needs_mtp: bool = False
    needs_activations: bool = False
    needs_experts: bool = False


LIMITS = (
    Limit(
        "FP8 KV cache with `--calculate-kv-scales`",
        "The text turns to gibberish as the context grows; the option is gone from vLLM 0.28.",
        "Keep the 16-bit cache. An FP8 cache without that option is to be measured before it is served.",
        f"{_VLLM}/issues/37554",
    ),
    Limit(
        "`kv_cache_scheme` in a checkpoint's quantization config",
        "`--kv-cache-dtype auto` then means FP8, whether it was asked for or not.",
        "Checkpoints of the harness have none; look at the line of vLLM's log that names the cache's type.",
        f"{_VLLM}/blob/main/vllm/model_executor/layers/quantization/compressed_tensors/compressed_tensors.py",
    ),
    Limit(
        "`--enforce-eager`",
        "No CUDA graphs: decoding at batch 1 is several times slower.",
        "Leave it out; use it only to debug.",
        "https://docs.vllm.ai/en/latest/design/cuda_graphs/",
    ),
    Limit(
        "Prefix caching together with MTP",
        "The state of DeltaNet layers is corrupted. From vLLM 0.26 on, hybrid models have prefix caching by default.",
        "`--no-enable-prefix-caching` where a draft model speculates.",
        f"{_VLLM}/issues/53912",
        needs_mtp=True,
    ),
    Limit(
        "An MTP head that was not loaded or never trained",
        "Nothing that it drafts is accepted, and every step pays for it. transformers does not load the head, so "
        "tools that save what it loaded lose it.",
        "`harness verify` and `harness repair`; in vLLM, an acceptance rate near zero.",
        "https://huggingface.co/Infatoshi/Qwen3.6-35B-A3B-NVFP4-FP8",
        needs_mtp=True,
    ),
    Limit(
        "Hopper and older GPUs",
        "They have no 4-bit matrix products: W4A4 is served by a weight-only kernel (Marlin, from vLLM 0.32 Humming), "
        "and what is measured there is W4A16.",
        "Measure on Blackwell, or ask for emulation (`--linear-backend emulation --moe-backend emulation`).",
        f"{_VLLM}/pull/49376",
        needs_activations=True,
    ),
    Limit(
        "FlashInfer's CUTLASS MoE kernels on sm_120 (RTX 5090, RTX PRO 6000)",
        "Some of the tactics that the autotuner tries do not start there and are skipped, with noise in the log; the "
        "TensorRT-LLM backend does not run there at all.",
        "Nothing to do: the selection falls on `FLASHINFER_CUTLASS`. Look for the line that names the backend.",
        "https://huggingface.co/Infatoshi/Qwen3.6-35B-A3B-NVFP4-FP8",
        needs_activations=True,
        needs_experts=True,
    ),
    Limit(
        "Tensor parallelism that leaves a rank a width that is no multiple of 32",
        "Loading fails, or a padded kernel is slow.",
        "Use fewer ranks.",
        f"{_VLLM}/issues/48898",
    ),
    Limit(
        "Another release of transformers",
        "The tokenizer of this family is rebuilt by its class: the same files gave other tokens under 5.17 and 5.19.",
        "Compare only runs of one digest of the token ids, as the harness does.",
        "https://github.com/huggingface/transformers/tree/main/src/transformers/models/qwen3_5",
    ),
)
