"""Claims in prose: found where they are made and only there, and supported only by intervals that say so. The intervals
of hand-made records are those of scipy."""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from harness.cli import main
from harness.demo import SUITE as DEMO_SUITE
from harness.record.store import Record, read_all
from harness.report import claims, prose
from harness.report.claims import Claim
from harness.report.prose import Mention
from harness.suite.load import load
from harness.suite.schema import Claims, Suite, Task
from tests.records import (
    DATASET,
    ENGINE,
    TASK,
    VERIFY,
    choice,
    decodes,
    fidelity_record,
    fidelity_windows,
    make_record,
    prefills,
    tasks_record,
    windows,
)

ROOT = Path(__file__).parent.parent
SUITE = """
name = "demo"
title = "A demo"
[source]
location = "example/Dense-9B"
[variants.nvfp4]
recipe = "rtn-a16"
[variants.w4a4]
recipe = "w4a4"
[variants.w4a4-experts]
recipe = "w4a4-experts"
[setups.mtp1]
speculative_tokens = 1
"""
MEASURES = """
[ppl]
protocols = ["wikitext2-512"]
text = { demo = "heldout" }
[fidelity]
text = { demo = "heldout" }
[bench]
text = { demo = "heldout" }
prompt_tokens = 128
new_tokens = 128
batch_sizes = [1, 4]
"""
TASKS = """
[tasks.sums]
task = "demo:arithmetic"
[tasks.words]
task = "demo:agreement"
"""
EVERY = ("nvfp4", "w4a4", "w4a4-experts")
GPU = {**ENGINE, "name": "vllm", "device": "cuda", "kernels": {"linear": "MarlinNvFp4"}}


@pytest.fixture(scope="session")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    """Everything but tasks."""
    return written(tmp_path_factory.mktemp("suite"), SUITE + MEASURES)


@pytest.fixture(scope="session")
def with_tasks(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    return written(tmp_path_factory.mktemp("suite"), SUITE + MEASURES + TASKS)


def written(folder: Path, text: str) -> Suite:
    (folder / "demo.toml").write_text(text)
    return load(folder / "demo.toml")


def mentioned(suite: Suite, description: str) -> list[Mention]:
    return list(prose.mentions(replace(suite, description=description)))


def claim(suite: Suite, description: str, *records: Record) -> Claim:
    """The only claim of a description."""
    (one,) = claims.claims_of(replace(suite, description=description), records)
    return one


# -- Records -----------------------------------------------------------------------------------------------------


def ppl(variant: str, loss: float = 0.0, noise: float = 0.0, num: int = 20, **header: Any) -> Record:
    """Windows that lose `loss` nats a token on average, half of them `noise` more and half `noise` less."""
    return make_record("ppl", variant, windows(8.0, spread(loss, noise, num), num_tokens=512 * num), **header)


def spread(mean: float, noise: float, num: int = 20) -> list[float]:
    signs = random.Random(0).sample([-1, 1], k=num, counts=[num // 2, num - num // 2])
    return [mean + noise * sign for sign in signs]


def near(variant: str = "nvfp4", loss: float = 0.001, kl: float = 0.002, noise: float = 0.001) -> list[Record]:
    """A variant beside the source in log-perplexity and divergence."""
    return [
        ppl("source"),
        ppl(variant, loss, noise),
        fidelity_record(variant, fidelity_windows(spread(kl, kl / 10))),
    ]


def scored(num: int, lost: int, won: int = 0, label: str = "sums", variant: str = "nvfp4") -> list[Record]:
    """The source solves all but the last `won` items, the variant all but the first `lost`."""
    sides = {"source": [1.0] * (num - won) + [0.0] * won, variant: [0.0] * lost + [1.0] * (num - lost)}
    return [
        tasks_record(
            name,
            [choice(doc_id, score) for doc_id, score in enumerate(scores)],
            dataset={**TASK, "name": label},
            run_id=f"{crc32(f'{name} {label}'.encode()):08x}",
        )
        for name, scores in sides.items()
    ]


def timed(variant: str, seconds: float, prefill: float = 0.25, wobble: float = 0.01, **header: Any) -> Record:
    """Four starts of the engine, `wobble` apart, at batch 1 and, twice as slow, at batch 4."""
    samples = [
        {**sample, "start": start, "repetition": sample["repetition"] % 2}
        for start in range(4)
        for sample in (
            *decodes(seconds * factor(start, wobble), repetitions=2),
            *decodes(2 * seconds * factor(start, wobble), batch=4, repetitions=2),
            *prefills(prefill * factor(start, wobble), 2),
        )
    ]
    return make_record("bench", variant, samples, **{"engine": GPU, **header})


def factor(start: int, wobble: float) -> float:
    return 1 + wobble * (start - 1.5)


def headed(record: Record, **header: Any) -> Record:
    return replace(record, run=replace(record.run, **header))


# -- What is a claim ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sentence", "kind"),
    [
        ("It is lossless.", "lossless"),
        ("Losslessly quantized.", "lossless"),
        ("4 bits without any quality loss.", "lossless"),
        ("No degradation.", "lossless"),
        ("It loses nothing.", "lossless"),
        ("Identical to BF16.", "lossless"),
        ("Bit-identical to the source.", "lossless"),
        ("A near-lossless quantization.", "near-lossless"),
        ("A near\u2011lossless quantization.", "near-lossless"),
        ("It is **nearly\nlossless**.", "near-lossless"),
        ("It is near-_lossless_.", "near-lossless"),
        ("Virtually no loss.", "near-lossless"),
        ("It has a negligible loss of accuracy.", "near-lossless"),
        ("Near-BF16 quality.", "near-lossless"),
        ("It preserves the quality.", "near-lossless"),
        ("Small without sacrificing accuracy.", "near-lossless"),
        ("Well within run-to-run noise.", "noise"),
        ("Below the noise floor.", "noise"),
        ("Within the margin of error.", "noise"),
        ("It is indistinguishable from the source.", "noise"),
        ("No measurable loss.", "noise"),
        ("On par with BF16.", "equal"),
        ("The same quality as the original.", "equal"),
        ("It matches BF16 accuracy.", "equal"),
        ("It matches the quality of the source.", "equal"),
        ("It decodes faster.", "faster"),
        ("\uff26aster decoding", "faster"),
        ("A 1.5\u00d7 speed-up.", "faster"),
        ("51 % faster", "faster"),
        ("51 % more tokens per second", "faster"),
        ("Twice as fast.", "faster"),
        ("It speeds up decoding.", "faster"),
        ("Higher throughput.", "faster"),
        ("It beats the source.", "better"),
        ("Outperforming BF16.", "better"),
        ("Superior quality.", "better"),
        ("Lower perplexity than the source.", "better"),
        ("Better than BF16.", "better"),
        ("State-of-the-art 4-bit.", "better"),
        ("It recovers 99 % of the accuracy.", "recovery"),
        ("99.2% recovery.", "recovery"),
        ("Retains 99 % of the accuracy of BF16.", "recovery"),
        ("99 % of the source's score", "recovery"),
        ("Not only small, and not just faster.", "faster"),
        ("It isn't just faster.", "faster"),
        ("It is not a toy, it is lossless.", "lossless"),
        ("Not small but lossless.", "lossless"),
        ("It needs no calibration and is lossless.", "lossless"),
        ("Can it be? It is lossless.", "lossless"),
        ("- lossless\n- small", "lossless"),
        ("[Lossless](https://example.com/faster)", "lossless"),
    ],
)
def test_a_claim_is_found_in_any_of_its_forms(suite: Suite, sentence: str, kind: str) -> None:
    assert [one.kind for one in mentioned(suite, sentence)] == [kind]


@pytest.mark.parametrize(
    "sentence",
    [
        "It is not lossless.",
        "It isn't faster.",
        "We make no claim of being lossless.",
        "Nobody should call this near-lossless.",
        "It cannot be called lossless.",
        "It is neither lossless nor faster.",
        "No variant is faster.",
        "Far from lossless.",
        'Another card says "lossless".',
        "Another card says \u201cnear-lossless and faster\u201d of itself.",
        "The 'lossless' of other cards.",
        "Run `bench --faster`.",
        "```\nlossless\n```",
        "> It is lossless.",
        "<!-- faster -->",
        "See [here](https://example.com/lossless) and https://example.com/faster.",
        "Is it lossless?",
        "The layout matches the source's tensors, and an entry that matches re:.*mtp.* stays.",
        "Two runs are identical to the last digit.",
        "It is outperformed by the source.",
        "Every build recovers from a kill.",
        "Download is faster with hf_transfer.",
        "Faster loading of files.",
        "w4a4 loads much faster, and is faster to download.",
        "A lossless codec is not used here.",
        "Near-lossless quality cannot be promised.",
        "We aim to be lossless.",
        "The goal is to be lossless.",
        "The vision tower is identical to the source's.",
        "The MTP head, all norms and the embeddings are identical to the source's.",
        "Its layout is the same as the source's, with an identical tokenizer.",
        "As fast as possible.",
        "Half as fast as BF16.",
        "It keeps 95 % of the weights in 4 bits, within 5 % of the budget.",
        "More than 5 % worse than BF16.",
        "It exceeds the memory of a card.",
        "Without loss of generality.",
        "Breakfast for fasters at noise level.",
        "Its channels are scaled apart, which changes nothing: without them NVFP4 would cost it next to nothing.",
    ],
)
def test_a_denial_a_quotation_a_question_and_other_uses_of_the_words_are_none(suite: Suite, sentence: str) -> None:
    assert mentioned(suite, sentence) == []


@pytest.mark.parametrize(
    ("sentence", "said"),
    [
        ("It is lossless.", [(EVERY, ("source",))]),
        ("w4a4 is lossless.", [(("w4a4",), ("source",))]),
        ("`w4a4-experts` is lossless.", [(("w4a4-experts",), ("source",))]),
        ("The lossless w4a4.", [(("w4a4",), ("source",))]),
        ("w4a4+mtp1 is faster.", [(("w4a4+mtp1",), ("source",))]),
        ("w4a4 beats nvfp4.", [(("w4a4",), ("nvfp4",))]),
        ("Better than nvfp4.", [(("w4a4", "w4a4-experts"), ("nvfp4",))]),
        ("w4a4 is faster than nvfp4 and Dense-9B.", [(("w4a4",), ("nvfp4", "source"))]),
        ("w4a4 beats all other variants.", [(("w4a4",), ("nvfp4", "w4a4-experts"))]),
        ("w4a4 and nvfp4 are faster.", [(("w4a4", "nvfp4"), ("source",))]),
        ("w4a4 is faster than nvfp4, and nvfp4 is lossless.", [(("w4a4",), ("nvfp4",)), (("nvfp4",), ("source",))]),
        ("w4a4 is faster and better than nvfp4.", [(("w4a4",), ("nvfp4",))] * 2),
        ("w4a4 is large but lossless.", [(("w4a4",), ("source",))]),
        ("BF16 is actually slightly faster than NVFP4.", [(("source",), EVERY)]),
        ("Compared to BF16, it is faster.", [(EVERY, ("source",))]),
        ("w4a4 is the fastest of the variants.", [(("w4a4",), ("nvfp4", "w4a4-experts"))]),
        ("w4a4 is the fastest of the four.", [(("w4a4",), ("source", "nvfp4", "w4a4-experts"))]),
        ("w4a4 has the lowest perplexity of the variants.", [(("w4a4",), ("nvfp4", "w4a4-experts"))]),
        ("w4a4 runs at twice nvfp4 speed.", [(("w4a4",), ("nvfp4",))]),
        ("w4a4 has twice the throughput of nvfp4.", [(("w4a4",), ("nvfp4",))]),
        ("w4a4 is as fast as nvfp4.", [(("w4a4",), ("nvfp4",))]),
        ("w4a4 with the MTP head is lossless.", [(("w4a4",), ("source",))]),
        ("With the vision tower kept, w4a4 is lossless.", [(("w4a4",), ("source",))]),
        ("We aim to please and w4a4 is lossless.", [(("w4a4",), ("source",))]),
        ("w4a4 decodes faster after loading.", [(("w4a4",), ("source",))]),
        ("A lossless w4a4, and not a slow one.", [(("w4a4",), ("source",))]),
        ("W4A4 is lossless.", [(EVERY, ("source",))]),  # a format, which variants share
    ],
)
def test_a_claim_is_about_what_the_sentence_names(
    suite: Suite, sentence: str, said: list[tuple[tuple[str, ...], tuple[str, ...]]]
) -> None:
    assert [(one.of, one.versus) for one in mentioned(suite, sentence)] == said


@pytest.mark.parametrize(
    ("sentence", "unknown"),
    [
        ("Faster than llama.cpp.", "llama.cpp"),
        ("w4a4 beats mmangkad/Qwen3.6-35B-A3B-NVFP4 in perplexity.", "mmangkad/Qwen3.6-35B-A3B-NVFP4"),
        ("On par with GPT-4.", "GPT-4"),
        ("Faster than FP8 and BF16.", "FP8 and BF16"),
        ("Near-lossless compared to AWQ.", "AWQ"),
        ("The fastest quantization on the hub.", "everything else"),
        ("State of the art.", "everything else"),
        ("The lowest perplexity.", "everything else"),
        ("Twice FP8 speed.", "FP8"),
        ("As fast as FP8.", "FP8"),
        ("Exceeds FP8.", "FP8"),
        ("Recovers 98 % of the published score.", "the published score"),
    ],
)
def test_what_the_suite_does_not_measure_cannot_be_beaten(suite: Suite, sentence: str, unknown: str) -> None:
    refused = claim(suite, sentence, *near(), timed("source", 0.01), timed("nvfp4", 0.005))
    assert not refused.supported
    assert f"there is no record of '{unknown}', and what was read or assumed is no baseline" in refused.reason


@pytest.mark.parametrize(
    ("sentence", "number"),
    [
        ("1.5\u00d7 faster", 1.5),
        ("1.5x faster", 1.5),
        ("51 % faster", 1.51),
        ("51\u00a0% faster", 1.51),
        ("51 percent faster", 1.51),
        ("3 times as fast", 3.0),
        ("twice the speed", 2.0),
        ("a speedup of up to 1.5\u00d7", 1.5),
        ("faster (+51 %)", 1.51),
        ("faster by 20-30 %", 1.3),
        ("20-30 % faster", 1.3),
        ("faster", None),
        ("faster at batch 4", None),
        ("99.5 % recovery", 0.995),
        ("full recovery", 1.0),
        ("halves the latency", 2.0),
        ("20 % less latency", 1.25),
        ("cuts latency by 20 %", 1.25),
        ("5 % slower than BF16", 0.95),
        ("within 1.8 % of BF16", 0.018),
    ],
)
def test_the_number_of_a_claim_is_read(suite: Suite, sentence: str, number: float | None) -> None:
    (one,) = mentioned(suite, sentence)
    assert (one.number and one.number[0]) == (number and pytest.approx(number))


# Words of cards, none of which claims anything, alone or together.
_NEUTRAL = st.lists(
    st.sampled_from(
        [
            *(
                "the",
                "of",
                "in",
                "on",
                "than",
                "with",
                "is",
                "are",
                "not",
                "it",
                "and",
                "but",
                "two",
                "4",
                "1.5",
                "99",
            ),
            *("nvfp4", "w4a4", "w4a4-experts", "source", "BF16", "FP8", "vLLM", "example/model", "model", "weights"),
            *(
                "perplexity",
                "quality",
                "loss",
                "speed",
                "noise",
                "accuracy",
                "score",
                "tasks",
                "tokens",
                "batch",
                "depth",
            ),
            *("rounded", "kept", "measured:", "decoding;", "prefill,", "(text)", "**bold**", "\u2014", "-", "lost"),
        ]
    )
)


@given(_NEUTRAL, st.sampled_from([" ", "\n", ". ", "\n\n"]))
def test_prose_without_words_of_claims_makes_none(suite: Suite, words: list[str], between: str) -> None:
    assert mentioned(suite, between.join(words)) == []


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
def test_any_text_can_be_read(suite: Suite, text: str) -> None:
    for one in mentioned(suite, text):
        assert one.sentence[one.start :].startswith(one.words) and one.words in one.context()


@given(
    _NEUTRAL,
    st.sampled_from(["It is lossless.", "w4a4 is faster than the source.", "Near-lossless.", "nvfp4 beats w4a4."]),
    _NEUTRAL,
)
def test_a_claim_is_found_wherever_it_stands_and_in_quotation_marks_never(
    suite: Suite, before: list[str], said: str, after: list[str]
) -> None:
    for text, num in ((said, 1), (f'"{said}"', 0)):
        assert len(mentioned(suite, "\n\n".join((" ".join(before), text, " ".join(after))))) == num


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("**loss**less", "loss**less"),
        ("loss*less*", "loss*less"),
        ("**lossless**", "lossless"),
        ("_lossless_", "lossless"),
        ("loss\u00adless", "lossless"),
    ],
)
def test_emphasis_inside_a_word_does_not_hide_it(suite: Suite, said: str, words: str) -> None:
    (one,) = mentioned(suite, f"A {said} model.")
    assert (one.kind, one.words) == ("lossless", words)


def test_the_title_is_prose_too(suite: Suite) -> None:
    (one,) = claims.claims_of(replace(suite, title="Lossless NVFP4"), [])
    assert (one.key, one.words, one.supported) == ("title", "Lossless", False)


# -- Equivalence -------------------------------------------------------------------------------------------------


def students_interval(values: Sequence[float]) -> tuple[float, float]:
    low, high = scipy_stats.t.interval(
        0.95, len(values) - 1, loc=sum(values) / len(values), scale=scipy_stats.sem(values)
    )
    return float(low), float(high)


@pytest.mark.parametrize("loss", [-0.02, -0.0095, -0.005, 0.0, 0.004, 0.0075, 0.0095, 0.012])
def test_near_lossless_is_an_interval_inside_both_margins(suite: Suite, loss: float) -> None:
    low, high = students_interval(spread(loss, 0.003))
    assert all(abs(abs(end) - 0.01) > 1e-4 for end in (low, high)), "clear of the margin, so that both methods agree"
    _, _, divergence = near()
    found = claim(suite, "nvfp4 is near-lossless.", ppl("source"), ppl("nvfp4", loss, 0.003), divergence)
    assert found.supported == (low > -0.01 and high < 0.01)
    assert found.supported or "log_ppl wikitext2-512" in found.reason
    assert found.supported == ("within \u00b1 0.01" in found.reason)


def test_near_lossless_asks_for_the_divergence_and_the_margins_of_the_suite(suite: Suite) -> None:
    refused = claim(suite, "nvfp4 is near-lossless.", *near(kl=0.02))
    assert not refused.supported and "kl against source" in refused.reason and "log_ppl" not in refused.reason
    wider = replace(suite, claims=Claims(near_lossless_kl=0.03))
    assert claim(wider, "nvfp4 is near-lossless.", *near(kl=0.02)).supported
    strict = replace(suite, claims=Claims(near_lossless_log_ppl=0.0005))
    assert not claim(strict, "nvfp4 is near-lossless.", *near()).supported


def test_near_lossless_of_a_suite_with_tasks_asks_for_their_mean(with_tasks: Suite) -> None:
    text = "nvfp4 is near-lossless."
    steady = [*scored(4000, 2, 2), *scored(4000, 1, 1, "words")]
    assert claim(with_tasks, text, *near(), *steady).supported
    for tasks, why in (
        ([*scored(60, 1, 1), *scored(60, 1, 0, "words")], "would decide"),  # open
        ([*scored(4000, 400), *scored(4000, 1, 1, "words")], "sums loses 0.1"),
        ([*scored(4000, 0, 400), *scored(4000, 1, 1, "words")], "reaches beyond -0.01"),  # another model
        ([*scored(4000, 2, 2)], "no whole run of nvfp4 (tasks/words)"),
    ):
        refused = claim(with_tasks, text, *near(), *tasks)
        assert not refused.supported and why in refused.reason


def test_every_variant_that_is_meant_must_be_measured(suite: Suite) -> None:
    assert claim(suite, "nvfp4 is near-lossless.", *near()).supported
    refused = claim(suite, "Both are near-lossless: w4a4 as well.", *near())
    assert refused.of == ("w4a4",) and "no whole run of w4a4 (ppl/wikitext2-512): run `harness ppl`" in refused.reason
    refused = claim(suite, "It is near-lossless.", *near(), *near("w4a4")[1:])
    assert refused.of == EVERY and "no whole run of w4a4-experts" in refused.reason
    everyone = [*near(), *near("w4a4")[1:], *near("w4a4-experts")[1:]]
    assert claim(suite, "It is near-lossless.", *everyone).supported


def test_two_variants_are_as_good_as_each_other_within_the_same_margins(suite: Suite) -> None:
    text = "w4a4 is on par with nvfp4."
    assert claim(suite, text, *near(), *near("w4a4", 0.002, noise=0.002)[1:]).supported
    refused = claim(suite, text, *near(), *near("w4a4", 0.02, noise=0.002)[1:])
    assert not refused.supported and "w4a4: log_ppl wikitext2-512 against nvfp4: at least 0.01" in refused.reason


def test_margins_are_per_token_also_where_perplexity_is_per_word(suite: Suite) -> None:
    assert suite.ppl is not None
    by_word = replace(suite, ppl=replace(suite.ppl, protocols=("lmeval-word",)))
    num = 20
    documents = {"num_words": [100] * num, "num_tokens": [511] * num}
    dataset = {**DATASET, "protocol": "lmeval-word", "unit": "word", "documents": documents}

    def read(variant: str, loss: float, noise: float = 0.0001) -> Record:
        record = ppl(variant, loss, noise, num, dataset=dataset)
        return replace(record, samples=tuple({**one, "document": one["index"]} for one in record.samples))

    source = read("source", 0.0, 0.0)
    divergence = near()[2]
    # 0.004 nats a token are 0.02 nats a word.
    assert 0.004 * 511 / 100 > 0.01
    assert claim(by_word, "nvfp4 is near-lossless.", source, read("nvfp4", 0.004), divergence).supported
    assert not claim(by_word, "nvfp4 is near-lossless.", source, read("nvfp4", 0.011), divergence).supported


def noise(kl: float, loss: float) -> Record:
    return fidelity_record("noise-batch", fidelity_windows([kl] * 20, loss_nats=loss))


@pytest.mark.parametrize(
    ("loss", "kl", "floor", "supported"),
    [
        (0.001, 0.002, (0.003, 0.003), True),
        (0.001, 0.002, (0.001, 0.003), False),  # the divergence is above it
        (0.001, 0.002, (0.003, 0.0005), False),  # the loss is above it
        (0.0028, 0.002, (0.003, 0.003), False),  # the value is under the floor, its interval is not
    ],
)
def test_within_noise_is_an_interval_under_what_the_source_differs_from_itself_by(
    suite: Suite, loss: float, kl: float, floor: tuple[float, float], supported: bool
) -> None:
    assert claim(suite, "nvfp4 is within noise.", *near("nvfp4", loss, kl), noise(*floor)).supported == supported


def test_within_noise_asks_for_a_noise_floor(suite: Suite) -> None:
    refused = claim(suite, "nvfp4 is within noise.", *near())
    assert not refused.supported and "with the source beside itself: run `nox -s fidelity`" in refused.reason


def test_within_noise_allows_no_loss_in_tasks(with_tasks: Suite) -> None:
    measured = [*near(), noise(0.003, 0.003)]
    text = "nvfp4 is indistinguishable from the source."
    assert claim(with_tasks, text, *measured, *scored(200, 2, 2), *scored(200, 1, 1, "words")).supported
    assert not claim(with_tasks, text, *measured, *scored(200, 40), *scored(200, 1, 1, "words")).supported


def test_rounded_weights_are_never_lossless(suite: Suite) -> None:
    measured = [*near(), noise(0.003, 0.003)]
    refused = claim(suite, "nvfp4 is lossless.", *measured, make_record("verify", "nvfp4", VERIFY))
    assert not refused.supported and "its weights are rounded by up to 0.0123 in mlp.up_proj" in refused.reason
    exact = make_record("verify", "nvfp4", [{**VERIFY[0], "max_abs_error": 0.0}])
    assert claim(suite, "nvfp4 is lossless.", *measured, exact).supported
    assert "run `nox -s verify`" in claim(suite, "nvfp4 is lossless.", *measured).reason


# -- Superiority -------------------------------------------------------------------------------------------------


def log_ratio_interval(seconds: float, base_seconds: float, wobble: float) -> tuple[float, float]:
    """Student's interval of the ratio of speeds, of the logarithms of what each start comes to."""
    sides = [[-math.log(one * factor(start, wobble)) for start in range(4)] for one in (seconds, base_seconds)]
    found = scipy_stats.ttest_ind(*sides).confidence_interval(0.95)
    return math.exp(found.low), math.exp(found.high)


@pytest.mark.parametrize("seconds", [0.004, 0.0066, 0.0095, 0.0099, 0.01, 0.0101, 0.013])
@pytest.mark.parametrize(
    ("says", "least"),
    [("nvfp4 is faster.", 1.0), ("nvfp4 is 1.5\u00d7 faster than the source.", 1.45), ("nvfp4 is 51 % faster.", 1.505)],
)
def test_faster_is_an_interval_above_one_and_a_number_is_not_above_it(
    suite: Suite, seconds: float, says: str, least: float
) -> None:
    low, high = log_ratio_interval(seconds, 0.01, 0.01)
    found = claim(suite, says, timed("source", 0.01), timed("nvfp4", seconds))
    assert found.supported == (low > 1 and high >= least)
    assert f"[{low:.3f}, {high:.3f}]" in found.reason


def test_speed_is_that_of_the_batch_and_of_the_prefill_that_are_named(suite: Suite) -> None:
    records = [timed("source", 0.01), timed("nvfp4", 0.005, prefill=0.3)]
    assert "decode_speed batch 1" in claim(suite, "nvfp4 is faster.", *records).reason
    found = claim(suite, "nvfp4 is faster at batch sizes 1 and 4.", *records)
    assert found.supported and all(f"decode_speed batch {batch}" in found.reason for batch in (1, 4))
    refused = claim(suite, "nvfp4 is faster at batch 8.", *records)
    assert not refused.supported and "has no decode of batch 8" in refused.reason
    refused = claim(suite, "nvfp4 has a faster prefill.", *records)
    assert not refused.supported and "prefill_speed" in refused.reason and "decode" not in refused.reason
    assert not claim(suite, "nvfp4 is faster at a depth of 4096 tokens.", *records).supported


def test_an_interval_that_holds_one_is_not_faster(suite: Suite) -> None:
    records = [timed("source", 0.01, wobble=0.2), timed("nvfp4", 0.009, wobble=0.2)]
    refused = claim(suite, "nvfp4 is faster.", *records)
    assert not refused.supported and "1 is not below that interval" in refused.reason


def test_repetitions_of_one_start_are_no_evidence_of_speed(suite: Suite) -> None:
    single = [
        make_record("bench", name, decodes(seconds), engine=GPU)
        for name, seconds in (("source", 0.01), ("nvfp4", 0.005))
    ]
    refused = claim(suite, "nvfp4 is faster.", *single)
    assert not refused.supported and "there is no interval from 1 of the starts" in refused.reason


@pytest.mark.parametrize(
    ("engine", "served", "why"),
    [
        (ENGINE, {}, "the torch engine decompresses weights before it computes"),
        ({**GPU, "device": "cpu"}, {}, "a CPU has no kernels for 4-bit floats"),
        (GPU, {"served_as": "16-bit activations (Marlin)"}, "served nvfp4 as 16-bit activations"),
    ],
)
def test_a_speed_that_is_not_that_of_the_format_supports_nothing(
    suite: Suite, engine: dict[str, Any], served: dict[str, str], why: str
) -> None:
    records = [timed("source", 0.01, engine=engine), timed("nvfp4", 0.005, engine={**engine, **served})]
    refused = claim(suite, "nvfp4 is faster.", *records)
    assert not refused.supported and why in refused.reason


def test_speeds_of_two_sessions_are_not_compared(suite: Suite) -> None:
    apart = headed(timed("nvfp4", 0.005), session_id="ffffffff")
    refused = claim(suite, "nvfp4 is faster.", timed("source", 0.01), apart)
    assert not refused.supported and "session_id" in refused.reason


def test_faster_without_a_record_says_what_to_run(suite: Suite) -> None:
    refused = claim(suite, "nvfp4 decodes much faster than the source does on any machine of ours.")
    assert not refused.supported and "no whole run of nvfp4 (bench): run `harness bench`" in refused.reason
    assert "suite 'demo', description: 'nvfp4 decodes much faster than" in refused.reason
    unmeasured = replace(suite, bench=None)
    assert "the suite has no [bench]" in claim(unmeasured, "nvfp4 is faster.", timed("source", 0.01)).reason


def test_better_is_a_paired_interval_on_the_good_side(suite: Suite) -> None:
    first = [*near(loss=0.010, kl=0.005), *near("w4a4", 0.001, 0.002, noise=0.002)[1:]]
    for says in (
        "w4a4 beats nvfp4.",
        "w4a4 has a lower perplexity than nvfp4.",
        "w4a4 has a lower divergence than nvfp4.",
    ):
        assert claim(suite, says, *first).supported
    refused = claim(suite, "nvfp4 outperforms w4a4.", *first)
    assert not refused.supported and "is lost, and 0 is accepted" in refused.reason
    nearer = [*near(loss=0.0015, kl=0.002), *near("w4a4", -0.004, 0.002, noise=0.002)[1:]]
    assert not claim(suite, "w4a4 beats nvfp4.", *nearer).supported, "the divergences are the same"


def test_beating_the_source_is_a_matter_of_perplexity_and_tasks(with_tasks: Suite) -> None:
    better = near(loss=-0.004)
    assert claim(with_tasks, "nvfp4 beats BF16 in perplexity.", *better).supported
    tasks = [*scored(300, 1, 40), *scored(300, 0, 30, "words")]
    found = claim(with_tasks, "nvfp4 beats BF16.", *better, *tasks)
    assert found.supported and "score against source" in found.reason and "kl" not in found.reason
    assert claim(with_tasks, "nvfp4 beats BF16 in words.", *scored(300, 0, 30, "words")).supported
    assert not claim(with_tasks, "nvfp4 beats BF16 in sums.", *scored(300, 4, 6)).supported


# -- Other words for the same -------------------------------------------------------------------------------------


def alone(suite: Suite, *names: str) -> Suite:
    """A suite with some of its variants, which are then all that a sentence without a name is about."""
    return replace(suite, variants={name: suite.variants[name] for name in names or ("nvfp4",)})


@pytest.mark.parametrize(
    ("says", "least", "seconds", "other_seconds"),
    [
        ("Runs at twice BF16 speed.", 2, 0.005, 0.006),
        ("Doubles throughput.", 2, 0.005, 0.006),
        ("It halves the latency.", 2, 0.005, 0.006),
        ("50 % less latency", 1 / (1 - 0.495), 0.005, 0.006),
        ("Cuts latency by 50 %.", 1 / (1 - 0.495), 0.005, 0.006),
        ("The lower latency.", 1, 0.009, 0.01),
        ("Decode improves by 51 %.", 1.505, 0.0066, 0.008),
        ("+51 % decode over BF16", 1.505, 0.0066, 0.008),
        ("Decode speed: +51 %.", 1.505, 0.0066, 0.008),
        ("Throughput is 51 % higher.", 1.505, 0.0066, 0.008),
        ("51 % speedier", 1.505, 0.0066, 0.008),
        ("3.1x as quick", 3.05, 0.0032, 0.004),
        ("It exceeds BF16 speed.", 1, 0.009, 0.01),
    ],
)
def test_other_words_for_faster_ask_for_the_same_interval(
    suite: Suite, says: str, least: float, seconds: float, other_seconds: float
) -> None:
    for one, supported in ((seconds, True), (other_seconds, False)):
        low, high = log_ratio_interval(one, 0.01, 0.01)
        assert (low > 1 and high >= least) == supported
        found = claim(alone(suite), says, timed("source", 0.01), timed("nvfp4", one))
        assert found.supported == supported and f"[{low:.3f}, {high:.3f}]" in found.reason


@pytest.mark.parametrize(
    ("says", "above", "seconds", "other_seconds"),
    [
        ("As fast as BF16", 0.97, 0.01, 0.0105),
        ("It is nearly as fast as BF16.", 0.97, 0.01, 0.0105),
        ("No slower than BF16.", 0.97, 0.01, 0.0105),
        ("It matches BF16 speed.", 0.97, 0.01, 0.0105),
        ("The same throughput as BF16.", 0.97, 0.01, 0.0105),
        ("Only 5 % slower than BF16.", 0.95, 0.0102, 0.0105),
        ("Within 2 % of BF16 speed.", 0.98, 0.0099, 0.01),
    ],
)
def test_as_fast_is_an_interval_above_what_may_be_lost(
    suite: Suite, says: str, above: float, seconds: float, other_seconds: float
) -> None:
    for one, supported in ((seconds, True), (other_seconds, False)):
        low, high = log_ratio_interval(one, 0.01, 0.01)
        assert (low > above) == supported
        found = claim(alone(suite), says, timed("source", 0.01), timed("nvfp4", one))
        assert found.supported == supported and f"[{low:.3f}, {high:.3f}]" in found.reason
        assert supported or f"{above:g} is not below that interval" in found.reason


@pytest.mark.parametrize(
    "says",
    [
        "Its accuracy equals that of the source.",
        "Full BF16 quality at half the size.",
        "Quality is preserved.",
        "It is virtually the same as BF16.",
        "It is exactly the same as BF16.",
        "BF16-level accuracy.",
    ],
)
def test_other_words_for_near_lossless_ask_for_the_same_margins(suite: Suite, says: str) -> None:
    assert claim(alone(suite), says, *near()).supported
    for records in (near(loss=0.02), near(kl=0.02)):
        refused = claim(alone(suite), says, *records)
        assert not refused.supported and "and 0.01 is accepted" in refused.reason


@pytest.mark.parametrize("loss", [-0.01, 0.0005, 0.0012, 0.0019, 0.012, 0.0176, 0.0185, 0.03])
@pytest.mark.parametrize(
    ("says", "share"),
    [
        ("Only 0.2 % worse than BF16.", 0.002),
        ("No more than 0.2 % higher perplexity than BF16.", 0.002),
        ("It lands within ~1.8 % of BF16 PPL.", 0.018),
        ("Within 1.8 % of BF16.", 0.018),
        ("1.8 % degradation.", 0.018),
    ],
)
def test_within_a_share_is_an_interval_of_the_perplexity_that_ends_below_it(
    suite: Suite, says: str, share: float, loss: float
) -> None:
    _, high = students_interval(spread(loss, 0.001))
    assert abs(math.exp(high) - 1 - share) > 1e-5, "clear of the share, so that both methods agree"
    found = claim(alone(suite), says, *near(loss=loss))
    assert found.supported == (math.exp(high) - 1 <= share)


@pytest.mark.parametrize(
    "says",
    [
        "It keeps 95 %.",
        "It keeps 95 % of BF16.",
        "95 % of the accuracy is preserved.",
        "Less than 5 % accuracy loss.",
        "It loses only 5 % of the accuracy.",
        "Within 5 % of BF16 accuracy.",
    ],
)
def test_other_words_for_recovery_ask_for_the_same_share(suite: Suite, says: str) -> None:
    asked = alone(replace(suite, ppl=None, tasks={"sums": Task(task="demo:arithmetic")}))
    assert claim(asked, says, *scored(1000, 8, 6)).supported
    refused = claim(asked, says, *scored(1000, 80, 6))
    assert not refused.supported and "which does not make sure of 95 %" in refused.reason


@pytest.mark.parametrize("says", ["It exceeds the source.", "It improves on the source.", "It exceeds BF16 quality."])
def test_other_words_for_beating_the_source_ask_for_a_better_interval(suite: Suite, says: str) -> None:
    assert claim(alone(suite), says, *near(loss=-0.004)).supported
    assert not claim(alone(suite), says, *near(loss=0.001)).supported


def test_the_best_of_the_variants_is_held_against_the_other_variants(suite: Suite) -> None:
    two = alone(suite, "nvfp4", "w4a4")
    measured = [*near(loss=0.010, kl=0.005), *near("w4a4", 0.001, 0.002, noise=0.002)[1:]]
    assert claim(two, "w4a4 has the lowest perplexity of the variants.", *measured).supported
    assert not claim(two, "nvfp4 has the lowest perplexity of the variants.", *measured).supported
    asked = replace(two, tasks={"sums": Task(task="demo:arithmetic")})
    scores = [*scored(300, 40), *scored(300, 1, variant="w4a4")[1:]]
    assert claim(asked, "w4a4 is the most accurate variant.", *scores).supported
    assert not claim(asked, "nvfp4 is the most accurate variant.", *scores).supported


def test_winning_on_every_task_is_more_than_winning_on_average(with_tasks: Suite) -> None:
    says = "It wins on every task."
    won = [*scored(300, 1, 40), *scored(300, 0, 30, "words")]
    assert claim(alone(with_tasks), says, *won).supported
    mixed = [*scored(300, 4, 6), *scored(300, 0, 60, "words")]
    assert claim(alone(with_tasks), "It has a higher accuracy.", *mixed).supported
    refused = claim(alone(with_tasks), says, *mixed)
    assert not refused.supported and "score sums" in refused.reason and "score words" not in refused.reason


# -- Recovery ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("percent", ["90", "98", "99", "99.9", "101"])
def test_recovery_is_promised_no_higher_than_its_interval_begins(suite: Suite, percent: str) -> None:
    asked = replace(suite, tasks={"sums": Task(task="demo:arithmetic")})
    num, lost, won = 1000, 8, 6
    share = (num - lost) / (num - won)
    half_width = 1.96 * math.sqrt(lost + won) / (num - won)  # of a ratio whose parts hardly vary
    half_a_unit = 0.0005 if "." in percent else 0.005
    margin = share - half_width - (float(percent) / 100 - half_a_unit)
    assert abs(margin) > 0.001
    found = claim(asked, f"nvfp4 retains {percent} % of the accuracy of the source.", *scored(num, lost, won))
    assert found.supported == (margin > 0)
    assert f"{100 * share:.1f} [" in found.reason


def test_recovery_of_an_assumed_baseline_is_refused(with_tasks: Suite) -> None:
    source, variant = scored(1000, 2, 1)
    assert claim(with_tasks, "99 % recovery of nvfp4 in sums.", source, variant).supported
    for says, records in (
        ("99 % recovery of nvfp4 in sums.", [variant]),
        ("nvfp4 recovers 99 % of the accuracy in sums, by the published score.", [source, variant]),
    ):
        refused = claim(with_tasks, says, *records)
        assert not refused.supported and "under the same conditions, and not of an assumed baseline" in refused.reason
    other = headed(variant, dataset={**TASK, "name": "sums", "settings": {"chat": True}})
    refused = claim(with_tasks, "99 % recovery of nvfp4 in sums.", source, other)
    assert not refused.supported and "dataset.settings" in refused.reason
    assert "no whole run of nvfp4 (tasks/words)" in claim(with_tasks, "99 % recovery of nvfp4.", source, variant).reason
    assert "the suite has no [tasks]" in claim(replace(with_tasks, tasks={}), "99 % recovery.", source, variant).reason


# -- Suites and the command line ---------------------------------------------------------------------------------


def test_a_supported_claim_names_its_runs(suite: Suite) -> None:
    records = near()
    found = claim(suite, "nvfp4 is near-lossless.", *records)
    assert set(found.runs) == {record.run.run_id for record in records}
    assert json.loads(json.dumps(claims.rows([found])))[0]["runs"] == list(found.runs)


def test_margins_are_part_of_the_resolved_suite(suite: Suite, tmp_path: Path) -> None:
    assert suite.resolved()["claims"] == {
        "near_lossless_log_ppl": 0.01,
        "near_lossless_kl": 0.01,
        "near_lossless_score": 0.01,
    }
    other = written(tmp_path, SUITE + MEASURES + "[claims]\nnear_lossless_kl = 0.02\n")
    assert other.claims.near_lossless_kl == 0.02 and other.digest != suite.digest


@pytest.mark.parametrize("path", [DEMO_SUITE, *sorted((ROOT / "suites").glob("*.toml"))], ids=lambda path: path.stem)
def test_the_prose_of_every_suite_claims_nothing_that_its_records_do_not_say(path: Path) -> None:
    records, _ = read_all(ROOT / "results")
    assert [one.reason for one in claims.claims_of(load(path), records) if not one.supported] == []


@pytest.mark.parametrize("options", [[], ["--check"], ["--json"]])
def test_report_refuses_a_claim_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo.toml").write_text('description = "Lossless, and faster than BF16."\n' + SUITE + MEASURES)
    before = sorted(tmp_path.rglob("*"))
    assert main(["report", "--suite", "demo.toml", *options]) == 1
    printed = capsys.readouterr()
    assert sorted(tmp_path.rglob("*")) == before
    assert printed.err.count("harness: suite 'demo', description: 'Lossless, and faster than BF16' says that") == 2
    assert claims.REMEDY in printed.err
    told = json.loads(printed.out) if "--json" in options else None
    assert told is None or [one["supported"] for one in told["claims"]] == [False, False]


def test_report_writes_a_card_whose_prose_claims_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo.toml").write_text('description = "Four bits, and not lossless."\n' + SUITE + MEASURES)
    assert main(["report", "--suite", "demo.toml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["claims"] == []
    assert (tmp_path / "reports/demo/README.md").is_file()
