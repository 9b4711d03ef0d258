"""Claims: declared in tables, supported only by intervals that say so, and made in no other words. The intervals of
hand-made records are those of scipy."""

import json
import math
import random
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
from scipy import stats as scipy_stats

from harness.cli import main
from harness.demo import SUITE as DEMO_SUITE
from harness.errors import UserError
from harness.record.run import Record
from harness.record.store import read_all
from harness.report import card, claims
from harness.report.claims import CLAIM_WORDS, JudgedClaim, check_words, claim_sentence
from harness.suite.load import load, narrowed
from harness.suite.rules import CLAIM_KINDS, Claim, ClaimMargins
from harness.suite.schema import Suite, Task
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


def declared(suite: Suite, *tables: str) -> Suite:
    """The suite with claims, each of them the entries of a [[claim]] table as they stand in a file."""
    text = SUITE + MEASURES + TASKS + "".join(f"[[claim]]\n{one}\n" for one in tables)
    with tempfile.TemporaryDirectory() as folder:
        return replace(suite, claim=written(Path(folder), text).claim)


def claim(suite: Suite, table: str, *records: Record) -> JudgedClaim:
    """A claim beside records; of nvfp4 unless it says otherwise."""
    lines = table.replace("; ", "\n")
    table = lines if "variant = " in lines else f'{lines}\nvariant = "nvfp4"'
    (one,) = claims.judged_claims(declared(suite, table), records)
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


# -- Equivalence -------------------------------------------------------------------------------------------------

NEAR = 'kind = "near-lossless"'


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
    found = claim(suite, NEAR, ppl("source"), ppl("nvfp4", loss, 0.003), divergence)
    assert found.supported == (low > -0.01 and high < 0.01)
    assert found.supported or "log_ppl wikitext2-512" in found.reason
    assert found.supported == ("within \u00b1 0.01" in found.reason)


def test_near_lossless_asks_for_the_divergence_and_the_margins_of_the_suite(suite: Suite) -> None:
    refused = claim(suite, NEAR, *near(kl=0.02))
    assert not refused.supported and "kl against source" in refused.reason and "log_ppl" not in refused.reason
    wider = replace(suite, claims=ClaimMargins(near_lossless_kl=0.03))
    assert claim(wider, NEAR, *near(kl=0.02)).supported
    strict = replace(suite, claims=ClaimMargins(near_lossless_log_ppl=0.0005))
    assert not claim(strict, NEAR, *near()).supported


def test_near_lossless_of_a_suite_with_tasks_asks_for_their_mean(with_tasks: Suite) -> None:
    steady = [*scored(4000, 2, 2), *scored(4000, 1, 1, "words")]
    assert claim(with_tasks, NEAR, *near(), *steady).supported
    for tasks, why in (
        ([*scored(60, 1, 1), *scored(60, 1, 0, "words")], "would decide"),  # open
        ([*scored(4000, 400), *scored(4000, 1, 1, "words")], "sums loses 0.1"),
        ([*scored(4000, 0, 400), *scored(4000, 1, 1, "words")], "reaches beyond -0.01"),  # another model
        ([*scored(4000, 2, 2)], "no whole run of nvfp4 (tasks/words)"),
    ):
        refused = claim(with_tasks, NEAR, *near(), *tasks)
        assert not refused.supported and why in refused.reason


def test_a_claim_is_of_the_variant_that_it_names(suite: Suite) -> None:
    refused = claim(suite, f'{NEAR}; variant = "w4a4"', *near())
    assert not refused.supported
    assert "no whole run of w4a4 (ppl/wikitext2-512): run `harness ppl`" in refused.reason
    assert claim(suite, f'{NEAR}; variant = "w4a4"', *near(), *near("w4a4")[1:]).supported


def test_two_variants_are_as_good_as_each_other_within_the_same_margins(suite: Suite) -> None:
    table = f'{NEAR}; variant = "w4a4"; versus = "nvfp4"'
    found = claim(suite, table, *near(), *near("w4a4", 0.002, noise=0.002)[1:])
    assert found.supported and found.sentence == "`w4a4` is as good as `nvfp4`"
    refused = claim(suite, table, *near(), *near("w4a4", 0.02, noise=0.002)[1:])
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
    assert claim(by_word, NEAR, source, read("nvfp4", 0.004), divergence).supported
    assert not claim(by_word, NEAR, source, read("nvfp4", 0.011), divergence).supported


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
    assert claim(suite, 'kind = "noise"', *near("nvfp4", loss, kl), noise(*floor)).supported == supported


def test_within_noise_asks_for_a_noise_floor(suite: Suite) -> None:
    refused = claim(suite, 'kind = "noise"', *near())
    assert not refused.supported and "with the source beside itself: run `nox -s fidelity`" in refused.reason


def test_within_noise_allows_no_loss_in_tasks(with_tasks: Suite) -> None:
    measured = [*near(), noise(0.003, 0.003)]
    assert claim(with_tasks, 'kind = "noise"', *measured, *scored(200, 2, 2), *scored(200, 1, 1, "words")).supported
    assert not claim(with_tasks, 'kind = "noise"', *measured, *scored(200, 40), *scored(200, 1, 1, "words")).supported


def test_rounded_weights_are_never_lossless(suite: Suite) -> None:
    measured = [*near(), noise(0.003, 0.003)]
    refused = claim(suite, 'kind = "lossless"', *measured, make_record("verify", "nvfp4", VERIFY))
    assert not refused.supported and "its weights are rounded by up to 0.0123 in mlp.up_proj" in refused.reason
    exact = make_record("verify", "nvfp4", [{**VERIFY[0], "max_abs_error": 0.0}])
    assert claim(suite, 'kind = "lossless"', *measured, exact).supported
    assert "run `nox -s verify`" in claim(suite, 'kind = "lossless"', *measured).reason


# -- Gains and losses --------------------------------------------------------------------------------------------


def log_ratio_interval(seconds: float, base_seconds: float, wobble: float) -> tuple[float, float]:
    """Student's interval of the ratio of speeds, of the logarithms of what each start comes to."""
    sides = [[-math.log(one * factor(start, wobble)) for start in range(4)] for one in (seconds, base_seconds)]
    found = scipy_stats.ttest_ind(*sides).confidence_interval(0.95)
    return math.exp(found.low), math.exp(found.high)


@pytest.mark.parametrize("seconds", [0.004, 0.0066, 0.0095, 0.0099, 0.01, 0.0101, 0.013])
@pytest.mark.parametrize(("margin", "above"), [("", 1.0), ("; margin = 0.5", 1.5)])
def test_faster_is_an_interval_above_one_and_the_margin(
    suite: Suite, seconds: float, margin: str, above: float
) -> None:
    low, high = log_ratio_interval(seconds, 0.01, 0.01)
    found = claim(suite, f'kind = "faster"{margin}', timed("source", 0.01), timed("nvfp4", seconds))
    assert found.supported == (low > above)
    assert f"[{low:.3f}, {high:.3f}]" in found.reason
    assert found.supported or f"{above:g} is not below that interval" in found.reason


@pytest.mark.parametrize(("margin", "seconds", "other_seconds"), [(0.03, 0.01, 0.0105), (0.05, 0.0102, 0.0105)])
def test_within_a_share_of_the_speed_is_an_interval_above_what_may_be_lost(
    suite: Suite, margin: float, seconds: float, other_seconds: float
) -> None:
    table = f'kind = "within"; metric = "decode_speed"; margin = {margin}'
    for one, supported in ((seconds, True), (other_seconds, False)):
        low, high = log_ratio_interval(one, 0.01, 0.01)
        assert (low > 1 - margin) == supported
        found = claim(suite, table, timed("source", 0.01), timed("nvfp4", one))
        assert found.supported == supported and f"[{low:.3f}, {high:.3f}]" in found.reason


def test_speed_is_that_of_the_batch_and_of_the_prefill_that_are_named(suite: Suite) -> None:
    records = [timed("source", 0.01), timed("nvfp4", 0.005, prefill=0.3)]
    for batch in (1, 4):
        found = claim(suite, f'kind = "faster"; batch = {batch}', *records)
        assert found.supported and f"decode_speed batch {batch}" in found.reason
        assert found.sentence == f"`nvfp4` decodes faster than the source (batch {batch})"
    assert claim(suite, 'kind = "faster"', *records).sentence.endswith("(batch 1)")
    refused = claim(suite, 'kind = "faster"; metric = "prefill_speed"', *records)
    assert not refused.supported and "prefill_speed" in refused.reason and "decode" not in refused.reason


def test_an_interval_that_holds_one_is_not_faster(suite: Suite) -> None:
    records = [timed("source", 0.01, wobble=0.2), timed("nvfp4", 0.009, wobble=0.2)]
    refused = claim(suite, 'kind = "faster"', *records)
    assert not refused.supported and "1 is not below that interval" in refused.reason


def test_repetitions_of_one_start_are_no_evidence_of_speed(suite: Suite) -> None:
    single = [
        make_record("bench", name, decodes(seconds), engine=GPU)
        for name, seconds in (("source", 0.01), ("nvfp4", 0.005))
    ]
    refused = claim(suite, 'kind = "faster"', *single)
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
    for table in ('kind = "faster"', 'kind = "within"; metric = "decode_speed"; margin = 0.1'):
        refused = claim(suite, table, *records)
        assert not refused.supported and why in refused.reason


def test_speeds_of_two_sessions_are_not_compared(suite: Suite) -> None:
    apart = headed(timed("nvfp4", 0.005), session_id="ffffffff")
    refused = claim(suite, 'kind = "faster"', timed("source", 0.01), apart)
    assert not refused.supported and "session_id" in refused.reason


def test_a_claim_without_a_record_says_where_it_stands_and_what_to_run(suite: Suite) -> None:
    refused = claim(suite, 'kind = "faster"')
    assert not refused.supported and "no whole run of nvfp4 (bench): run `harness bench`" in refused.reason
    said = "suite 'demo', claim[0]: no record supports that `nvfp4` decodes faster than the source (batch 1): "
    assert refused.reason.startswith(said)


def test_better_is_a_paired_interval_on_the_good_side(suite: Suite) -> None:
    first = [*near(loss=0.010, kl=0.005), *near("w4a4", 0.001, 0.002, noise=0.002)[1:]]
    table = 'kind = "better"; variant = "w4a4"; versus = "nvfp4"'
    for more in ("", '; metric = "log_ppl"', '; metric = "kl"'):
        assert claim(suite, table + more, *first).supported
    refused = claim(suite, 'kind = "better"; versus = "w4a4"', *first)
    assert not refused.supported and "is lost, and 0 is accepted" in refused.reason
    nearer = [*near(loss=0.0015, kl=0.002), *near("w4a4", -0.004, 0.002, noise=0.002)[1:]]
    assert not claim(suite, table, *nearer).supported, "the divergences are the same"


def test_beating_the_source_is_a_matter_of_perplexity_and_tasks(with_tasks: Suite) -> None:
    better = near(loss=-0.004)
    assert claim(with_tasks, 'kind = "better"; metric = "log_ppl"', *better).supported
    tasks = [*scored(300, 1, 40), *scored(300, 0, 30, "words")]
    found = claim(with_tasks, 'kind = "better"', *better, *tasks)
    assert found.supported and "score against source" in found.reason and "kl" not in found.reason
    of_task = 'kind = "better"; metric = "score"; task = '
    assert claim(with_tasks, f'{of_task}"words"', *scored(300, 0, 30, "words")).supported
    assert not claim(with_tasks, f'{of_task}"sums"', *scored(300, 4, 6)).supported


@pytest.mark.parametrize("loss", [-0.01, 0.0005, 0.0012, 0.0019, 0.012, 0.0176, 0.0185, 0.03])
@pytest.mark.parametrize("share", [0.002, 0.018])
def test_within_a_share_is_an_interval_of_the_perplexity_that_ends_below_it(
    suite: Suite, share: float, loss: float
) -> None:
    _, high = students_interval(spread(loss, 0.001))
    assert abs(math.exp(high) - 1 - share) > 1e-5, "clear of the share, so that both methods agree"
    found = claim(suite, f'kind = "within"; margin = {share}', *near(loss=loss))
    assert found.supported == (math.exp(high) - 1 <= share)
    assert found.sentence == f"`nvfp4` has at most {100 * share:g} % more perplexity than the source"


# -- Recovery ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("margin", [0.1, 0.02, 0.01, 0.001, 0.0])
def test_recovery_is_promised_no_higher_than_its_interval_begins(suite: Suite, margin: float) -> None:
    asked = replace(suite, tasks={"sums": Task(task="demo:arithmetic")})
    num, lost, won = 1000, 8, 6
    share = (num - lost) / (num - won)
    half_width = 1.96 * math.sqrt(lost + won) / (num - won)  # of a ratio whose parts hardly vary
    clear = share - half_width - (1 - margin)
    assert abs(clear) > 0.0005
    found = claim(asked, f'kind = "recovery"; margin = {margin}', *scored(num, lost, won))
    assert found.supported == (clear > 0)
    assert f"{100 * share:.1f} [" in found.reason
    assert found.sentence == f"`nvfp4` recovers at least {100 * (1 - margin):g} % of the source's score"


def test_recovery_of_a_source_that_was_not_measured_so_is_refused(with_tasks: Suite) -> None:
    source, variant = scored(1000, 2, 1)
    table = 'kind = "recovery"; margin = 0.01; task = "sums"'
    assert claim(with_tasks, table, source, variant).supported
    refused = claim(with_tasks, table, variant)
    assert not refused.supported and "what the source itself scored under the same conditions" in refused.reason
    other = headed(variant, dataset={**TASK, "name": "sums", "settings": {"chat": True}})
    refused = claim(with_tasks, table, source, other)
    assert not refused.supported and "dataset.settings" in refused.reason
    every = claim(with_tasks, 'kind = "recovery"; margin = 0.01', source, variant)
    assert "no whole run of nvfp4 (tasks/words)" in every.reason


def test_every_kind_has_what_it_asks_and_what_it_says() -> None:
    sentences = {claim_sentence(Claim(kind=kind, variant="w4a4", versus="source", margin=0.1)) for kind in CLAIM_KINDS}
    assert list(CLAIM_KINDS) == list(claims._KINDS) and len(sentences) == len(CLAIM_KINDS)
    assert all(f"- `{kind}`: " in (claims.__doc__ or "") for kind in CLAIM_KINDS)


# -- Suites, words and the command line --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ('kind = "near-losless"', "'claim[0].kind' must be one of lossless, noise, near-lossless, better, faster, "),
        ('kind = "noise"; variant = "nvfp"', "'claim[0].variant' names 'nvfp', which is none. Did you mean 'nvfp4'?"),
        ('kind = "noise"; versus = "w4a4"', "'claim[0].versus' is 'w4a4', which 'nvfp4' cannot be held against as"),
        ('kind = "faster"; versus = "nvfp4"', "'claim[0].versus' is 'nvfp4', which 'nvfp4' cannot be held against"),
        ('kind = "noise"; variant = "source"', "'claim[0].versus' is 'source', which 'source' cannot be held"),
        ('kind = "faster"; metric = "kl"', "'claim[0].metric' is kl, which 'faster' is not about. Name one of decode_"),
        ('kind = "noise"; metric = "kl"', "'claim[0].metric' is kl, which 'noise' is not about. Leave it out."),
        ('kind = "noise"; margin = 0.1', "'claim[0].margin' is set, and 'noise' has none."),
        ('kind = "within"', "'claim[0].margin' is missing."),
        ('kind = "within"; margin = 0.99', "'claim[0].margin' is 0.99. Use a share from 0 to 0.5."),
        ('kind = "faster"; margin = -0.1', "'claim[0].margin' is -0.1. Use a share of at least 0."),
        ('kind = "faster"; batch = 8', "'claim[0].batch' is 8, which the suite does not measure."),
        ('kind = "noise"; batch = 1', "'claim[0].batch' is set, and noise has none."),
        ('kind = "within"; margin = 0.1; protocol = "x"', "'claim[0].protocol' is x, which the suite does not"),
        ('kind = "faster"; task = "sums"', "'claim[0].task' is set, and decode_speed has none."),
        ('kind = "recovery"; margin = 0.01', "'claim[0].kind' is recovery, and the suite has no [tasks] table."),
    ],
)
def test_a_claim_that_means_nothing_is_refused_with_its_place(tmp_path: Path, table: str, says: str) -> None:
    lines = table.replace("; ", "\n")
    lines = lines if "variant = " in lines else f'{lines}\nvariant = "nvfp4"'
    with pytest.raises(UserError) as caught:
        written(tmp_path, f"{SUITE}{MEASURES}[[claim]]\n{lines}\n")
    assert says in str(caught.value)


def test_what_a_claim_leaves_open_is_filled_in(with_tasks: Suite) -> None:
    faster, within, better = declared(
        with_tasks,
        'kind = "faster"\nvariant = "w4a4+mtp1"\nversus = "w4a4"',
        'kind = "within"\nvariant = "w4a4"\nmargin = 0.02',
        'kind = "better"\nvariant = "w4a4"',
    ).claim
    assert (faster.metric, faster.batch, faster.margin) == ("decode_speed", 1, 0.0)
    assert (within.versus, within.metric, within.protocol) == ("source", "log_ppl", None)
    assert (better.metric, better.margin) == (None, None)


def test_a_claim_is_part_of_the_digest_and_none_changes_nothing(suite: Suite) -> None:
    assert "claim" not in suite.resolved()
    (one,) = declared(suite, f'{NEAR}\nvariant = "nvfp4"').resolved()["claim"]
    assert (one["kind"], one["versus"], one["margin"]) == ("near-lossless", "source", None)
    assert declared(suite, f'{NEAR}\nvariant = "nvfp4"').digest != suite.digest


def test_a_suite_of_one_variant_keeps_the_claims_that_need_no_other(suite: Suite) -> None:
    every = declared(
        suite,
        f'{NEAR}\nvariant = "nvfp4"',
        f'{NEAR}\nvariant = "w4a4"',
        'kind = "better"\nvariant = "nvfp4"\nversus = "w4a4"',
        'kind = "faster"\nvariant = "nvfp4+mtp1"\nversus = "nvfp4"',
    )
    assert [one.variant for one in narrowed(every, "nvfp4").claim] == ["nvfp4", "nvfp4+mtp1"]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("It is lossless.", "lossless"),
        ("A **near\u2011loss\u00adless** quantization.", "lossless"),
        ("4 bits with no\nloss.", "no loss"),
        ("\uff26aster decoding", "faster"),
        ("Outperforming BF16.", "outperforming"),
        ("State-of-the-art 4-bit.", "state-of-the-art"),
        ("A _SOTA_ quant", "sota"),
        ("On par with BF16", "on par"),
        *((words, words) for words in CLAIM_WORDS),
    ],
)
def test_a_word_that_claims_is_refused_in_title_and_description(suite: Suite, text: str, word: str) -> None:
    for key in ("title", "description"):
        with pytest.raises(UserError) as caught:
            check_words(replace(suite, **{key: text}))
        assert f"The {key} of suite 'demo' says '{word}'" in caught.value.problem
        assert "declare a [[claim]]" in caught.value.remedy


@pytest.mark.parametrize("text", ["Breakfast.", "Beatles", "Two runs are identical.", "The source is fast."])
def test_other_words_claim_nothing(suite: Suite, text: str) -> None:
    check_words(replace(suite, title=text, description=text))


def test_a_supported_claim_names_its_runs(suite: Suite) -> None:
    records = near()
    found = claim(suite, NEAR, *records)
    assert set(found.runs) == {record.run.run_id for record in records}
    (row,) = json.loads(json.dumps(claims.claim_rows([found])))
    assert row["runs"] == list(found.runs) and row["kind"] == "near-lossless" and row["supported"]


def test_margins_are_part_of_the_resolved_suite(suite: Suite, tmp_path: Path) -> None:
    assert suite.resolved()["claims"] == {
        "near_lossless_log_ppl": 0.01,
        "near_lossless_kl": 0.01,
        "near_lossless_score": 0.01,
    }
    other = written(tmp_path, SUITE + MEASURES + "[claims]\nnear_lossless_kl = 0.02\n")
    assert other.claims.near_lossless_kl == 0.02 and other.digest != suite.digest


@pytest.mark.parametrize("path", [DEMO_SUITE, *sorted((ROOT / "suites").glob("*.toml"))], ids=lambda path: path.stem)
def test_no_suite_claims_what_its_records_do_not_say(path: Path) -> None:
    records, _ = read_all(ROOT / "results")
    check_words(load(path))
    assert [one.reason for one in claims.judged_claims(load(path), records) if not one.supported] == []


def report(folder: Path, text: str, *options: str) -> int:
    (folder / "demo.toml").write_text(text)
    return main(["report", "--suite", "demo.toml", *options])


@pytest.mark.parametrize("options", [[], ["--check"], ["--json"]])
def test_report_refuses_a_claim_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = f'{SUITE}{MEASURES}[[claim]]\n{NEAR}\nvariant = "w4a4"\n[[claim]]\nkind = "faster"\nvariant = "w4a4"\n'
    assert report(tmp_path, text, *options) == 1
    printed = capsys.readouterr()
    assert [path.name for path in tmp_path.rglob("*")] == ["demo.toml"]
    assert printed.err.count("harness: suite 'demo', claim[") == 2 and claims.REMEDY in printed.err
    told = json.loads(printed.out) if "--json" in options else None
    assert told is None or [one["supported"] for one in told["claims"]] == [False, False]


def test_report_refuses_a_word_that_claims_before_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert report(tmp_path, 'description = "Four bits, and lossless."\n' + SUITE + MEASURES) == 2
    assert "The description of suite 'demo' says 'lossless'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["demo.toml"]


def test_a_card_has_the_sentence_of_a_claim_that_holds_with_its_runs(suite: Suite) -> None:
    records = near()
    claimed = declared(suite, f'{NEAR}\nvariant = "nvfp4"')
    files = card.generated_files(claimed, records, results_dir="results", pages={})
    (line,) = [one for one in files["reports/demo/README.md"].decode().split("\n") if "is near-lossless" in one]
    assert line.startswith("- `nvfp4` is near-lossless: nvfp4: log_ppl wikitext2-512 against source: +0.001")
    assert all(f"[{record.run.run_id}](" in line for record in records)
    unsupported = card.generated_files(claimed, near(kl=0.02), results_dir="results", pages={})
    assert "is near-lossless" not in unsupported["reports/demo/README.md"].decode()


def test_report_writes_a_card_of_a_suite_without_claims(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert report(tmp_path, SUITE + MEASURES, "--json") == 0
    assert json.loads(capsys.readouterr().out)["claims"] == []
    assert (tmp_path / "reports/demo/README.md").is_file()
