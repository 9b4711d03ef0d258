"""What samples hold: every key of every kind of sample, by measure. `record/schema.py` says the rest of a record."""

from collections.abc import Mapping
from typing import Any

from harness.record.keys import POSITIVE, ROUNDING, Key, Keys, optional

# Why an engine did not start or did not survive, and what it said itself.
_FAILURE = Keys(
    reason=Key("text", "What happened, in a sentence."), log=Key("texts", "Lines of the engine's own log that say why.")
)
_TIMED = Keys(
    start=Key("count", "The engine start, from 0."),
    repetition=Key("count", "The repetition, from 0; warm-ups count by themselves."),
    warmup=Key("flag", "Whether the times are those of a warm-up, which no mean counts."),
    batch=Key("count", "Prompts at once.", "sequences", low=1),
    prompt_tokens=Key("count", "Tokens of each prompt.", "tokens", low=1),
    prefill_seconds=Key("number", "Until the first new token of the whole batch.", "seconds", low=POSITIVE),
)
_WINDOW = Keys(
    index=Key("count", "The window."),
    num_tokens=Key("count", "Tokens of the window.", "tokens", low=1),
    num_scored=Key("count", "Tokens of the window that count.", "tokens", low=1),
)
_FIRST_TOKEN = Key("count", "Where the window begins, from the start of the text.", "tokens")
_NLL = Key("number", "-ln p of the tokens that count, summed.", "nats", low=ROUNDING)
_DIVERGENCE = Keys(
    kl_nats=Key("number", "KL(source || variant), summed.", "nats", low=ROUNDING),
    num_agreed=Key("count", "Places where both find the same token the likeliest.", "tokens"),
    squared_dp=Key("number", "Squared difference of the probability of the token that came, summed.", low=ROUNDING),
)
_PEAK_RSS = Key("count", "The most resident memory; null where the system does not say.", "bytes", nullable=True)
_PEAK_VRAM = Key("count", "The most memory of the accelerator; null without one.", "bytes", nullable=True)
_WALL = Key("number", "Of the whole process.", "seconds", low=POSITIVE)
_SCALE = Key("number", "That ratio of global scales, theirs over ours.", low=POSITIVE)

SAMPLES: Mapping[str, Mapping[str, Keys]] = {
    "ppl": {
        "window": Keys(
            **_WINDOW,
            first_token=_FIRST_TOKEN,
            nll_nats=_NLL,
            **optional(document=Key("count", "The page, where a text is read page by page.")),
        ),
        "reused": Keys(
            num_windows=Key("count", "Windows of the run.", "windows"),
            num_reused=Key("count", "Those that an earlier run had scored.", "windows"),
        ),
        "failure": _FAILURE,
    },
    # A variant beside its source. A source beside itself is in rows whose names begin with `noise-`.
    "fidelity": {
        "window": Keys(
            **_WINDOW,
            first_token=_FIRST_TOKEN,
            **_DIVERGENCE,
            nll_nats=_NLL,
            source_nll_nats=Key("number", "The same of the source.", "nats", low=ROUNDING),
            bands=Key(
                "tables",
                "The sums again, by how many tokens stand before.",
                keys=Keys(
                    end=Key("count", "Fewer tokens than this stand before.", "tokens", low=1),
                    num_scored=Key("count", "Tokens of the band.", "tokens"),
                    **_DIVERGENCE,
                ),
            ),
            kl_codes=Key("text", "The divergence of every token, packed (`record/packed.py`).", "nats"),
        ),
        "failure": _FAILURE,
    },
    "bench": {
        "coherence": Keys(
            prompt_tokens=Key("count", "Tokens of the prompt.", "tokens", low=1),
            num_tokens=Key("count", "Tokens that follow it.", "tokens", low=1),
            text_nll_nats=Key("number", "Mean -ln p of real text.", "nats"),
            generated_nll_nats=Key("number", "Mean -ln p of what the engine decodes in its place.", "nats"),
            limit_nats=Key("number", "Real text that costs more is no text to the model.", "nats"),
            coherent=Key("flag", "Whether the model makes sense."),
            **optional(acceptance_share=Key("number", "Accepted drafts; null without.", low=0, high=1, nullable=True)),
        ),
        "decode": Keys(
            **_TIMED,
            step_seconds=Key("numbers", "Each step after the prefill, or all as one time.", "seconds", low=POSITIVE),
            **optional(
                new_tokens=Key("count", "New tokens of each prompt.", "tokens", low=1),
                # With speculative decoding.
                num_drafts=Key("count", "Drafts that were proposed.", "drafts"),
                num_draft_tokens=Key("count", "Their tokens.", "tokens"),
                num_accepted_tokens=Key("count", "Those that the model accepted.", "tokens"),
            ),
        ),
        "prefill": _TIMED,
        "memory": Keys(
            start=Key("count", "The engine start, from 0."),
            weight_bytes=Key("count", "All weights in memory.", "bytes"),
            peak_rss_bytes=_PEAK_RSS,
            **optional(
                peak_vram_bytes=_PEAK_VRAM,
                weight_bytes_per_token=Key("count", "Weights that one decoded token reads at batch 1.", "bytes"),
                kv_cache_tokens=Key("count", "Tokens that the cache holds; null if unknown.", "tokens", nullable=True),
            ),
        ),
        "failure": _FAILURE,
    },
    # One run per task of the suite, which may hold several of lm-eval's.
    "tasks": {
        "item": Keys(
            task=Key("text", "The leaf task, by lm-eval's name."),
            repetition=Key("count", "The repetition, from 0."),
            doc_id=Key("count", "The document, by lm-eval's number."),
            doc_sha256=Key("text", "Digest of the document, by lm-eval."),
            prompt_sha256=Key("text", "Digest of the token ids of all its requests."),
            target_sha256=Key("text", "Digest of the right answer, by lm-eval."),
            outcomes=Key("scores", "Scores by `metric,filter`; lists where lm-eval aggregates several numbers."),
            num_prompt_tokens=Key("count", "Tokens of all its prompts.", "tokens"),
            num_tokens=Key("count", "Tokens that were generated or compared.", "tokens"),
            seconds=Key("number", "Its share of the time of all answers.", "seconds"),
            **optional(
                log_probs=Key("numbers", "Of a choice: ln p of each option.", "nats"),
                # Of a generated answer.
                finish_reasons=Key("texts", "How each answer ended: `stop`, or `length` where it was cut off."),
                unclosed=Key("flag", "Whether a thought was left open."),
                empty=Key("flag", "Whether an answer was empty."),
                extracted=Key("flag", "Whether a filter found an answer in it."),
            ),
        ),
        "result": Keys(  # what lm-eval makes of the items: its aggregations cannot be had without it
            task=Key("text", "The task or group, by lm-eval's name."),
            repetition=Key("count", "The repetition, from 0."),
            metric=Key("text", "`metric,filter`."),
            value=Key("number", "The score, in the metric's own unit."),
            standard_error=Key("number", "lm-eval's, null where it gives none.", nullable=True),
            num_items=Key("count", "Items that the score is of.", "items"),
            **optional(higher_is_better=Key("flag", "Whether more is better; null if unknown.", nullable=True)),
        ),
        "reused": Keys(
            num_answers=Key("count", "Answers of the run.", "answers"),
            num_reused=Key("count", "Those that an earlier run had been given.", "answers"),
        ),
        "failure": _FAILURE,
    },
    # By `vllm bench` on another machine, imported.
    "served": {
        "request": Keys(
            prompt_tokens=Key("count", "Tokens of the prompt.", "tokens", low=1),
            new_tokens=Key("count", "Tokens of the answer.", "tokens", low=1),
            first_token_seconds=Key("number", "Until the first new token.", "seconds", low=POSITIVE),
            decode_seconds=Key("number", "From there to the last one.", "seconds"),
        ),
        "failed_request": Keys(reason=Key("text", "What vLLM said.")),
        "generation": Keys(
            batch=Key("count", "Prompts at once.", "sequences", low=1),
            prompt_tokens=Key("count", "Tokens of each prompt.", "tokens", low=1),
            new_tokens=Key("count", "New tokens of each prompt.", "tokens", low=1),
            seconds=Key("number", "Of the whole batch.", "seconds", low=POSITIVE),
        ),
        "throughput": Keys(
            num_requests=Key("count", "Requests in all.", "requests", low=1),
            num_tokens=Key("count", "Tokens of all prompts and answers.", "tokens", low=1),
            seconds=Key("number", "Of all requests.", "seconds", low=POSITIVE),
        ),
    },
    "build": {
        "role": Keys(
            role=Key("text", "What the tensors are: `mlp.up_proj`, `norm`."),
            format=Key("text", "The number format, or `kept`."),
            num_tensors=Key("count", "Tensors of the source.", "tensors"),
            num_params=Key("count", "Their elements.", "elements"),
            source_bytes=Key("count", "Their size in the source.", "bytes"),
            output_bytes=Key("count", "Their size in the artifact, scales included.", "bytes"),
        ),
        "stage": Keys(name=Key("text", "The stage."), seconds=Key("number", "Its duration.", "seconds")),
        "totals": Keys(
            peak_rss_bytes=_PEAK_RSS, output_bytes=Key("count", "The size of all tensors of the artifact.", "bytes")
        ),
        "method": Keys(
            scales=Key("text", "How block scales are chosen."),
            codes=Key("text", "How codes are chosen."),
            **optional(
                damping=Key("number", "GPTQ's, as a share of its matrix's mean diagonal.", low=0),
                sweeps=Key("count", "Visits to every column after GPTQ's own."),
            ),
        ),
        "footprint": Keys(  # what sizes a server
            weight_bytes=Key("count", "All tensors.", "bytes"),
            visual_bytes=Key("count", "Those of the vision tower.", "bytes"),
            state_bytes=Key("count", "Recurrent states of one sequence.", "bytes"),
            kv_bytes_per_token=Key("count", "Keys and values of one token.", "bytes"),
            max_positions=Key("count", "The longest sequence that the model was made for.", "tokens", nullable=True),
        ),
        "calibration": Keys(
            num_tokens=Key("count", "Tokens that went through the model.", "tokens", low=1),
            planned_memory_bytes=Key("count", "What the plan said that it takes.", "bytes", low=1),
            peak_vram_bytes=_PEAK_VRAM,
            **optional(
                samples_sha256=Key("text", "Digest of the calibration samples' token ids."),
                device=Key("text", "What calibrated: cpu, or the GPU by its name."),
            ),
        ),
        "layer": Keys(
            index=Key("count", "The layer."),
            seconds=Key("named numbers", "The duration of each step.", "seconds"),
        ),
        "group": Keys(
            index=Key("count", "The layer."),
            group=Key("text", "Linear layers that share their scales."),
            format=Key("text", "The number format."),
            num_weights=Key("count", "Weights of the group.", "weights"),
            error=Key("number", "Squared error of the output over calibration data.", nullable=True),
            rtn_error=Key("number", "The same, were codes rounded to nearest.", nullable=True),
            output=Key("number", "Squares of the exact output, summed.", nullable=True),
            num_rows_rtn=Key("count", "Rows that were rounded to nearest after all.", "rows"),
            damping=Key("number", "What GPTQ really used.", nullable=True),
        ),
        "expert": Keys(
            index=Key("count", "The layer."),
            expert=Key("count", "The expert."),
            num_tokens=Key("count", "Calibration tokens that reached it.", "tokens"),
        ),
    },
    "verify": {
        "roundtrip": Keys(
            role=Key("text", "What the tensors are."),
            num_tensors=Key("count", "Tensors of the role.", "tensors"),
            max_abs_error=Key("number", "The largest |stored - source|."),
            mean_abs_error=Key("number", "The mean of it."),
            relative_l2_error=Key("number", "|stored - source| / |source| in the 2-norm."),
            snr_db=Key("number", "-20 log10 of that; null for an exact round trip.", "dB", nullable=True),
            **optional(format=Key("text", "The number format.")),
        ),
        "finding": Keys(
            severity=Key("text", "`error` or `warning`."),
            tensor=Key("text", "Where."),
            problem=Key("text", "What is wrong."),
            consequence=Key("text", "What comes of it."),
        ),
    },
    "sensitivity": {
        "sensitivity": Keys(
            index=Key("count", "The layer."),
            role=Key("text", "The fused group of linear layers."),
            format=Key("text", "The number format that is tried."),
            output_error=Key("number", "Relative squared error of the group's output; null if 0.", nullable=True),
            layer_error=Key("number", "The same of the half layer's output.", nullable=True),
            num_weights=Key("count", "Weights of the group.", "weights", low=1),
            extra_bytes=Key("number", "More than the group takes in NVFP4; negative for less.", "bytes"),
        ),
    },
    # Other tools at the same work, one run per contestant.
    "peers": {
        "repetition": Keys(
            repetition=Key("count", "The repetition, from 0."),
            wall_seconds=_WALL,
            call_seconds=Key("number", "Without imports; null if untold.", "seconds", low=POSITIVE, nullable=True),
            peak_rss_bytes=_PEAK_RSS,
            output_bytes=Key("count", "The size of the checkpoint.", "bytes", low=1),
        ),
        "evaluation": Keys(
            repetition=Key("count", "The repetition, from 0."),
            wall_seconds=_WALL,
            call_seconds=Key("number", "Without imports; of tasks without loading models.", "seconds", low=POSITIVE),
            num_items=Key("count", "Documents, or windows.", "items", low=1),
            num_requests=Key("count", "Requests that were answered.", "requests", low=1),
            peak_rss_bytes=_PEAK_RSS,
            scores=Key("scores", "Accuracies by task, or mean -ln p by model."),
        ),
        "verdict": Keys(
            passed=Key("flag", "Whether the auditor finds no error."),
            num_errors=Key("count", "Its errors.", "findings"),
            num_warnings=Key("count", "Its warnings.", "findings"),
            **optional(first_error=Key("text", "The first error; null without.", nullable=True)),
        ),
        "warning": Keys(text=Key("text", "What the tool said of its work.")),
        "failure": Keys(reason=Key("text", "What happened, in a sentence.")),
        "agreement": Keys(
            against=Key("text", "Our contestant."),
            num_bytes=Key("count", "Bytes of packed codes.", "bytes", low=1),
            num_bytes_equal=Key("count", "Those that are equal under the tool's scales.", "bytes"),
            num_scales=Key("count", "Block scales.", "scales", low=1),
            num_scales_equal=Key("count", "Those that are equal.", "scales"),
            weight_global_scale_low=_SCALE,
            weight_global_scale_high=_SCALE,
            input_global_scale_low=Key("number", "null without such scales.", low=POSITIVE, nullable=True),
            input_global_scale_high=Key("number", "null without such scales.", low=POSITIVE, nullable=True),
        ),
        "window": Keys(
            **_WINDOW,
            text=Key("text", "Which text."),
            kl_nats=Key("number", "KL(source || variant), summed.", "nats"),
            num_agreed=Key("count", "Places where both find the same token the likeliest.", "tokens"),
        ),
    },
}


def sample_problem(measure: str, sample: Mapping[str, Any], *, exact: bool, bounded: bool = True) -> str | None:
    """What keeps a sample from being one of `SAMPLES`, or None. `exact`: it may have no other keys; not `bounded`: its
    numbers may be of any size."""
    kinds, kind = SAMPLES[measure], sample.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        return f"a sample of {measure} cannot be of the kind {kind!r}"
    keys = kinds[kind] if bounded else kinds[kind].without_bounds()
    if wrong := keys.problem(sample):
        return f"a {kind} sample has no good '{wrong}'"
    if exact and (surplus := keys.unknown({key: value for key, value in sample.items() if key != "kind"})):
        return f"a {kind} sample has '{surplus}', which record/samples.py does not list"
    return None
