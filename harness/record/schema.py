"""What a record holds: every key of its header and of its last line here, and of its samples in `record/samples.py`.
At the end stands which records may be compared.

    {"type": "run", "schema": 1, "measure": "ppl", ...}         `header_of`: what was measured, with what, on what
    {"type": "sample", "kind": "window", ...}                   `SAMPLES`: raw observations, in the order they came
    {"type": "end", "status": "complete", "num_samples": ...}   `END`: proof that nothing is missing

`record/store.py` holds every record to these keys, their types and their bounds. A record that is written has these
keys and no others. A record that is read must have every key that is not optional, or it is named and not used; further
names are passed over, because a record of a later version may say more, except at the top of the first and last line.

Units come last in names: `nll_nats`, `step_seconds`, `weight_bytes`; counts begin with `num_` or end in `_tokens`; a
share or a ratio is never percent. An `index` counts from 0. Digests are SHA-256 in hex.
"""

from functools import cache

from harness.record.keys import Key, Keys, optional
from harness.record.run import SCHEMA, Record, Run

# -- The first line ----------------------------------------------------------------------------------------------

_EFFECTIVE = Keys(
    **optional(  # of every engine that computes here
        weight_bytes_resident=Key("count", "All weights in memory; 0 where a server does not say.", "bytes"),
        weight_bytes_per_token=Key("count", "Weights that one decoded token reads at batch 1.", "bytes"),
        state_bytes=Key("count", "Recurrent states of one sequence.", "bytes"),
        kv_bytes_per_token=Key("count", "Keys and values that one token adds to the cache.", "bytes"),
        bandwidth_bytes_per_second=Key("count", "Of the GPUs that read a layer together.", "bytes/s", nullable=True),
        model_class=Key("text", "The model's class in the library that computes."),
        attention_implementation=Key("text", "What computes softmax attention.", nullable=True),
    ),
    **optional(  # of the torch engines
        threads=Key("count", "Threads of one operation on the CPU.", "threads"),
        omp_wait_policy=Key("text", "OMP_WAIT_POLICY: whether waiting threads spin.", nullable=True),
        cpu_capability=Key("text", "The vector instructions that torch uses."),
        deltanet_implementation=Key("text", "What computes the DeltaNet recurrence."),
        experts_implementation=Key("text", "What computes experts; null for a dense model.", nullable=True),
        weight_decoder=Key("text", "What decoded the weights; null for a model in 16 bits.", nullable=True),
        score_logits_dtype=Key("text", "The type of logits when a text is scored."),
        float32_matmul_precision=Key("text", "torch's setting of that name."),
        use_cache=Key(
            "table",
            "Whether a key and state cache is used.",
            keys=Keys(score=Key("flag", "While scoring."), **optional(decode=Key("flag", "While decoding."))),
        ),
        cache=Key("text", "The class of that cache."),
        end_tokens=Key("counts", "Ids of the tokens that end an answer."),
    ),
    **optional(  # of vLLM
        arguments=Key("open table", "What vLLM was started with, by vLLM's names."),
        tensor_parallel=Key("count", "GPUs that share each layer.", "GPUs"),
        pipeline_parallel=Key("count", "GPUs that hold layers one after another.", "GPUs"),
        data_parallel=Key("count", "Copies of the model.", "copies"),
        executor=Key("text", "What runs vLLM's workers."),
        num_devices=Key("count", "Devices in all.", "devices"),
        max_model_len=Key("count", "The longest sequence; null where a server does not say.", "tokens", nullable=True),
        max_num_seqs=Key("count", "The most sequences in one step.", "sequences"),
        max_num_batched_tokens=Key("count", "The most tokens in one step.", "tokens"),
        prefix_caching=Key("flag", "Whether common beginnings of prompts are computed once."),
        kv_cache_dtype=Key("text", "The type of stored keys and values."),
        kv_cache_tokens=Key("count", "Tokens that the cache holds; null where vLLM does not say.", nullable=True),
        cuda_graphs=Key("flag", "Whether steps run as captured CUDA graphs."),
        compiled=Key("flag", "Whether vLLM compiled the model."),
        memory_lines=Key("texts", "What vLLM's log says of memory."),
    ),
)
_ENGINE = Keys(
    name=Key("text", "`torch`, `streamed`, `vllm`, `server`, `layers` (sensitivity) or `vllm bench` (imported)."),
    version=Key("text", "The release of the library that computes."),
    device=Key("text", "`cpu`, the accelerator's own name, or `unknown`."),
    dtype=Key("text", "The type of activations and of weights that are not quantized."),
    requested=Key("open table", "What was asked of the engine: folder, dtype, device, and its own options."),
    effective=Key("table", "What was in force, in the engine's own words.", keys=_EFFECTIVE),
    kernels=Key("named texts", "What computed each kind of layer; `log`: what vLLM's log says of its choice."),
    **optional(
        served_as=Key("text", "The arithmetic, where it is not what the checkpoint says.", nullable=True),
        warnings=Key("texts", "What the settings cost or fail to do, a sentence each."),
    ),
)
_TEXT = Keys(
    name=Key("text", "The text: a file's name, a dataset's path on the hub, `demo:heldout`."),
    **optional(text_sha256=Key("text", "Digest of the text in UTF-8.")),
    token_ids_sha256=Key("text", "Digest of the token ids as little-endian 32-bit integers."),
    num_tokens=Key("count", "Tokens of the text.", "tokens"),
)
_CUT = optional(
    num_windows=Key("count", "Windows of the whole text.", "windows"),
    num_scored=Key("count", "Tokens of the whole text that count.", "tokens"),
)
_DATASETS = {
    "ppl": Keys(
        **_TEXT,
        **_CUT,
        protocol=Key("text", "How the text is cut and which tokens count, such as `wikitext2-512`."),
        **optional(
            unit=Key("text", "What the mean is taken over: `token` or `word`."),
            log_probs_sha256=Key("text", "Digest of the log-probabilities of the measured windows as float32."),
            documents=Key(
                "table",
                "Of each page, where a text is read page by page.",
                keys=Keys(
                    num_words=Key("counts", "Words before the page was detokenized.", "words"),
                    num_tokens=Key("counts", "Tokens, without the one that stands before them.", "tokens"),
                ),
            ),
        ),
    ),
    "fidelity": Keys(
        **_TEXT,
        **_CUT,
        window=Key("count", "Tokens of a window.", "tokens", low=1),
        distribution=Key("text", "What is compared: `whole vocabulary`, or how many named tokens."),
    ),
    "bench": _TEXT,
    "sensitivity": Keys(**_TEXT, num_samples=Key("count", "Calibration samples.", "samples")),
    "tasks": Keys(
        name=Key("text", "The task's name in the suite."),
        num_docs=Key("count", "Documents of all its tasks, under the suite's limit.", "documents"),
        settings=Key("open table", "The suite's table of the task, as resolved."),
        lm_eval=Key("text", "lm-eval's release."),
        task_digest=Key("text", "Digest of the configurations of all its tasks."),
        tokenizer_digest=Key("text", "Digest of vocabulary, rules and chat template."),
        tasks=Key(
            "named tables",
            "Of each leaf task, by lm-eval's name.",
            keys=Keys(
                version=Key("anything", "The task's own version."),
                num_docs=Key("count", "Documents of the task.", "documents"),
                **optional(
                    dataset=Key("text", "The dataset's path.", nullable=True),
                    dataset_config=Key("text", "Its configuration.", nullable=True),
                    dataset_revision=Key("text", "Its commit on the hub.", nullable=True),
                    num_fewshot=Key("count", "Examples in each prompt.", "examples", nullable=True),
                ),
            ),
        ),
    ),
}
_VARIANT = Keys(
    name=Key("text", "The row: a variant, with `+` and the setup that it was measured in, or a contestant."),
    recipe=Key("text", "The recipe's name; null for the source.", nullable=True),
    artifact_digest=Key("text", "Digest of the checkpoint; null where a server does not say it.", nullable=True),
    **optional(
        source_digest=Key("text", "Digest of the checkpoint that the variant was made from."),
        source_revision=Key("text", "The commit that was fetched from the hub.", nullable=True),
        setup=Key("text", "The setup of the suite, beside its own options.", nullable=True),
        contestant=Key("open table", "Of `peers`: which tool, with which arguments.", nullable=True),
    ),
)
_MACHINE = Keys(
    name=Key("text", "A slug of what computes, the name of the folder of its records."),
    cpu=Key("text", "The processor's model name."),
    cores=Key("count", "Cores that the process may use.", "cores", nullable=True),
    gpu=Key(
        "table",
        "The accelerators; null without one.",
        nullable=True,
        keys=Keys(
            name=Key("text", "The model's name by nvidia-smi."),
            count=Key("count", "How many of them.", "GPUs", low=1),
            memory_bytes=Key("count", "Of one; null where it is shared with the CPU.", "bytes", nullable=True),
            driver=Key("text", "The driver's version."),
        ),
    ),
    os=Key("text", "The distribution with its version.", nullable=True),
    **optional(
        memory_bytes=Key("count", "Memory of the machine.", "bytes"),
        python=Key("text", "Python's version."),
        omp_num_threads=Key("text", "Of `peers`: OMP_NUM_THREADS.", nullable=True),
    ),
)
_GIT = Keys(
    commit=Key("text", "The commit of the harness."), dirty=Key("flag", "Whether tracked files of the package differ.")
)


@cache
def header_of(measure: str) -> Keys:
    """The keys of the first line of a measure's record, without its `type`."""
    dataset = _DATASETS.get(measure)
    return Keys(
        measure=Key("text", "What was measured: a key of `SAMPLES`."),
        measure_version=Key("count", "The VERSION of the measure's code."),
        session_id=Key("text", "Eight hex digits that the runs of one command share."),
        suite=Key("open table", "The suite as resolved: every key of its file, and every default."),
        suite_digest=Key("text", "Digest of the suite as canonical JSON."),
        variant=Key("table", "The checkpoint that was measured.", keys=_VARIANT),
        engine=Key("table", "What computed; null for a measure that has no engine.", nullable=True, keys=_ENGINE),
        dataset=Key("open table", "Nothing: the measure reads no text.", nullable=True)
        if dataset is None
        else Key("table", "What was read; null where no engine started.", nullable=True, keys=dataset),
        machine=Key("table", "The hardware.", keys=_MACHINE),
        packages=Key("named texts", "Version of each installed package whose version can change a number."),
        git=Key("table", "The checkout of the harness; null where there is none.", nullable=True, keys=_GIT),
        command=Key("texts", "The command line."),
        schema=Key("count", "The version of this layout.", low=SCHEMA, high=SCHEMA),
        run_id=Key("text", "Eight hex digits that name the run."),
        started_utc=Key("text", "When the run began, `2026-03-01T12:00:00Z`."),
    )


# -- The last line -----------------------------------------------------------------------------------------------

END = Keys(
    status=Key("text", "`complete`, `interrupted` or `failed`."),
    num_samples=Key("count", "Sample lines above.", "samples"),
    coverage=Key(
        "table",
        "How much of the whole was measured.",
        keys=Keys(
            expected=Key("count", "Samples of the whole text or plan.", "samples"),
            done=Key("count", "Samples of this run.", "samples"),
        ),
    ),
    ended_utc=Key("text", "When the run ended."),
)


# -- Two runs side by side: what must be equal in their headers --------------------------------------------------


def _of(table: str, *keys: str) -> tuple[str, ...]:
    return tuple(f"{table}.{key}" for key in keys)


_SOURCE = ("measure_version", "variant.source_digest")
_RELEASE = _of("engine", "name", "version")
_COMPUTED_BY = (*_RELEASE, "engine.dtype", "engine.device")

# Speed belongs to one session on one machine; a loss in quality belongs to the same tokens through the same arithmetic.
COMPARABLE: dict[str, tuple[str, ...]] = {
    "ppl": (
        *_SOURCE,
        *_of("dataset", "protocol", "token_ids_sha256", "documents"),
        "suite.ppl.batch_size",
        *_COMPUTED_BY,
        *_of("engine.effective", "cpu_capability", "attention_implementation", "deltanet_implementation"),
    ),
    "fidelity": (
        *_SOURCE,
        *_of("dataset", "token_ids_sha256", "window", "distribution"),
        "suite.fidelity.batch_size",
        *_COMPUTED_BY,
        "engine.effective.cpu_capability",
    ),
    "bench": (
        *_SOURCE,
        "session_id",
        "machine.name",
        "dataset.token_ids_sha256",
        *_COMPUTED_BY,
        "engine.effective.threads",
    ),
    "tasks": (
        *_SOURCE,
        *_of("dataset", "name", "task_digest", "settings", "tokenizer_digest"),
        "packages.lm_eval",
        *_COMPUTED_BY,
        "engine.effective.end_tokens",
    ),
    "peers": ("measure_version", "session_id", "suite_digest", "machine.name", "variant.source_digest"),
    "sensitivity": (*_SOURCE, "dataset.token_ids_sha256", *_RELEASE, "engine.dtype"),
    "served": (*_SOURCE, "machine.name", *_RELEASE),
    "build": ("measure_version",),
    "verify": ("measure_version",),
}

# How the keys begin that may differ between a run and an older run that it is watched against: a regression comes from
# a new release of the engine, a new driver or another machine, so these must not hide it.
WATCHED = ("session_id", "machine.", "engine.version", "engine.device", "engine.effective.")


def incomparable(a: Record, b: Record, *, over_time: bool = False) -> list[str]:
    """The header keys that forbid comparing two runs, by `COMPARABLE`; empty if their numbers may stand side by side.
    `over_time`: one run is the baseline of the other, so that `WATCHED` keys may differ."""
    if a.run.measure != b.run.measure:
        return ["measure"]
    keys = [key for key in COMPARABLE[a.run.measure] if not (over_time and key.startswith(WATCHED))]
    return [key for key in keys if _lookup(a.run, key) != _lookup(b.run, key)]


def _lookup(run: Run, dotted: str) -> object:
    """The header value at a dotted key; None where a table on the way is missing."""
    first, *rest = dotted.split(".")
    value = getattr(run, first)
    for key in rest:
        value = value.get(key) if isinstance(value, dict) else None
    return value
