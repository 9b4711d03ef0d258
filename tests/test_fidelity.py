"""Divergences against scipy, against arithmetic by hand, and against the embedded model itself."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats as scipy_stats
from scipy.special import log_softmax

from harness.demo import checkpoint_path
from harness.engines.protocol import Chunk, Top, open_engine
from harness.errors import UserError
from harness.measure import fidelity
from harness.measure.fidelity import token_kl_nats
from harness.record.packed import unpack_numbers
from studies.peers.chunks import chunks_of


class Told:
    """A predictor that says what it was told: one array [n - 1, vocabulary] per window."""

    def __init__(self, *answers: NDArray[np.float32]) -> None:
        self.answers = answers

    def log_probs(self, windows: Sequence[Sequence[int]], batch_size: int) -> Iterator[NDArray[np.float32]]:
        yield from self.answers


def logs(*rows: Sequence[float]) -> NDArray[np.float32]:
    """Rows of probabilities as log-probabilities."""
    with np.errstate(divide="ignore"):
        return np.log(np.array(rows)).astype(np.float32)


def random_logs(seed: int, num: int = 6, vocabulary: int = 50) -> NDArray[np.float64]:
    return log_softmax(np.random.default_rng(seed).normal(0, 3, (num, vocabulary)), axis=1)


def test_a_divergence_is_what_the_definition_gives_by_hand() -> None:
    found = token_kl_nats(logs((0.5, 0.5), (0.25, 0.75)), logs((0.25, 0.75), (0.25, 0.75)))
    assert found == pytest.approx([0.5 * math.log(2) + 0.5 * math.log(2 / 3), 0], abs=1e-7)


def test_a_divergence_is_scipys_relative_entropy() -> None:
    log_p, log_q = random_logs(1), random_logs(2)
    reference = scipy_stats.entropy(np.exp(log_p), np.exp(log_q), axis=1)
    assert token_kl_nats(log_p.astype(np.float32), log_q.astype(np.float32)) == pytest.approx(reference, rel=1e-5)


def test_the_divergence_is_from_the_reference_to_the_variant() -> None:
    p, q = logs((0.9, 0.1)), logs((0.5, 0.5))
    assert token_kl_nats(p, q)[0] == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2))
    assert token_kl_nats(q, p)[0] == pytest.approx(0.5 * math.log(5 / 9) + 0.5 * math.log(5))


@pytest.mark.parametrize("size", [1e-3, 1e-4])
def test_a_small_divergence_survives_float32(size: float) -> None:
    """Log-probabilities around -10 have steps of 1e-6; the divergence here is about the square of `size`."""
    logits = np.random.default_rng(3).normal(0, 2, (40, 2000))
    log_p = log_softmax(logits, axis=1)
    log_q = log_softmax(logits + np.random.default_rng(4).normal(0, size, logits.shape), axis=1)
    exact = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    found = token_kl_nats(log_p.astype(np.float32), log_q.astype(np.float32))
    assert found == pytest.approx(exact, rel=0.02)


def test_probabilities_that_miss_one_do_not_reach_the_divergence() -> None:
    """A miss of 1e-5 in every log-probability would shift the usual sum by 1e-5; here it costs its square."""
    log_p = random_logs(5).astype(np.float32)
    assert token_kl_nats(log_p, log_p + np.float32(1e-5)).max() < 1e-9


def test_a_token_that_the_reference_rules_out_costs_nothing_where_the_variant_does_too() -> None:
    assert token_kl_nats(logs((0.5, 0.5, 0)), logs((0.5, 0.5, 0)))[0] == pytest.approx(0, abs=1e-7)
    assert token_kl_nats(logs((1, 0)), logs((0.5, 0.5)))[0] == pytest.approx(math.log(2))
    assert token_kl_nats(logs((0.5, 0.5)), logs((1, 0)))[0] == math.inf


def test_many_rows_are_taken_in_pieces_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    log_p, log_q = random_logs(6, num=7).astype(np.float32), random_logs(7, num=7).astype(np.float32)
    whole = token_kl_nats(log_p, log_q)
    monkeypatch.setattr(fidelity, "_ROWS_ELEMENTS", 100)
    assert token_kl_nats(log_p, log_q).tolist() == whole.tolist()


def pairs(reference: Told, variant: Told, windows: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    chunks = chunks_of([reference, variant], windows, 1)
    return [sample for _, sample in fidelity.fidelity_samples(chunks, windows, ["w4a4"])]


def test_a_window_is_summed_and_its_agreements_counted() -> None:
    reference = Told(logs((0.6, 0.3, 0.1), (0.2, 0.5, 0.3)), logs((0.1, 0.1, 0.8)))
    variant = Told(logs((0.5, 0.4, 0.1), (0.5, 0.2, 0.3)), logs((0.1, 0.1, 0.8)))
    first, second = pairs(reference, variant, [[1, 0, 1], [2, 2]])
    by_hand = 0.6 * math.log(1.2) + 0.3 * math.log(0.75) + 0.2 * math.log(0.4) + 0.5 * math.log(2.5)
    sums = {
        "kl_nats": pytest.approx(by_hand, rel=1e-5),
        "num_agreed": 1,
        "squared_dp": pytest.approx(0.1**2 + 0.3**2, rel=1e-5),
    }
    codes = first.pop("kl_codes")
    assert unpack_numbers(codes).sum() == pytest.approx(by_hand, rel=1e-3)
    assert first == {
        "kind": "window",
        "index": 0,
        "num_tokens": 3,
        "num_scored": 2,
        **sums,
        "nll_nats": pytest.approx(-math.log(0.5 * 0.2), rel=1e-5),
        "source_nll_nats": pytest.approx(-math.log(0.6 * 0.5), rel=1e-5),
        "bands": [{"end": 512, "num_scored": 2, **sums}],
    }
    assert (second["index"], second["num_scored"], second["num_agreed"]) == (1, 1, 1)
    assert second["kl_nats"] == 0


def test_a_prediction_belongs_to_the_band_of_the_tokens_before_it() -> None:
    """511 tokens before: the last prediction of the first band; 512: the first one of the second."""
    num = 600
    window = [0] * num
    reference = Told(np.log(np.full((num - 1, 2), 0.5)).astype(np.float32))
    table = np.log(np.full((num - 1, 2), 0.5)).astype(np.float32)
    table[511] = np.log([0.25, 0.75])  # after 512 tokens
    (sample,) = pairs(reference, Told(table), [window])
    assert [(band["end"], band["num_scored"]) for band in sample["bands"]] == [(512, 511), (4096, 88)]
    assert sample["bands"][0]["kl_nats"] == 0
    assert sample["bands"][1]["kl_nats"] == pytest.approx(sample["kl_nats"])
    assert unpack_numbers(sample["kl_codes"])[511] == pytest.approx(sample["kl_nats"], rel=1e-3)


@given(st.data())
def test_chunks_may_be_cut_anywhere(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(2, 9), min_size=1, max_size=4))
    windows = [[number % 5 for number in range(length)] for length in lengths]
    tables = [
        [random_logs(model * 10 + i, n - 1, 5).astype(np.float32) for i, n in enumerate(lengths)] for model in (0, 1, 2)
    ]

    def stream(models: Sequence[int]) -> Iterator[Chunk]:
        for index, length in enumerate(lengths):
            cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=3)) | {length - 1})
            for first, last in zip([0, *cuts], cuts, strict=False):
                yield Chunk(index, first, tuple(tables[model][index][first:last] for model in models))

    found = dict.fromkeys(("a", "b"), 0.0)
    for name, sample in fidelity.fidelity_samples(
        fidelity.side_by_side(stream([0, 1]), stream([2])), windows, ["a", "b"]
    ):
        found[name] += sample["kl_nats"]
    whole = {
        name: sum(token_kl_nats(p, q).sum() for p, q in zip(tables[0], tables[model], strict=True))
        for name, model in (("a", 1), ("b", 2))
    }
    assert found == pytest.approx(whole, rel=1e-12)


def test_another_vocabulary_is_an_error() -> None:
    with pytest.raises(UserError, match="knows 3 tokens and w4a4 2"):
        pairs(Told(logs((0.2, 0.3, 0.5))), Told(logs((0.5, 0.5))), [[0, 1]])


@pytest.mark.parametrize("short", ["reference", "variant"])
def test_windows_that_an_engine_left_out_are_an_error(short: str) -> None:
    one = logs((0.5, 0.5))
    engines = {"reference": Told(one, one), "variant": Told(one, one)} | {short: Told(one)}
    with pytest.raises(UserError, match="1 of 2 windows"):
        pairs(**engines, windows=[[0, 1], [0, 1]])


def test_a_missing_position_is_an_error() -> None:
    with pytest.raises(UserError, match="Window 0 has 3 tokens, and the engines predicted 1 of its 2 last"):
        pairs(Told(logs((0.5, 0.5))), Told(logs((0.5, 0.5))), [[0, 1, 1]])


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_broken_distribution_is_named_by_window_and_position(value: float) -> None:
    broken = logs((0.5, 0.5), (0.5, 0.5))
    broken[1, 0] = value
    with pytest.raises(UserError, match=r"Window 0 of w4a4 has a divergence of (nan|inf) at position 1"):
        pairs(Told(logs((0.5, 0.5), (0.5, 0.5))), Told(broken), [[0, 1, 0]])


def test_a_model_does_not_diverge_from_itself() -> None:
    windows = [list(range(10, 30)), list(range(50, 60)), list(range(70, 90))]
    engine = open_engine("torch", checkpoint_path("dense"), dtype="float32", device="cpu")
    chunks = chunks_of([engine, engine], windows, 2)
    samples = [sample for _, sample in fidelity.fidelity_samples(chunks, windows, ["itself"])]
    assert [sample["kl_nats"] for sample in samples] == [0, 0, 0]
    assert [sample["num_agreed"] for sample in samples] == [19, 9, 19]


def test_progress_counts_windows_to_the_end() -> None:
    told = Told(*[logs((0.5, 0.5))] * 3)
    seen: list[tuple[int, int, str]] = []
    chunks = chunks_of([told, told], [[0, 1]] * 3, 1)
    list(fidelity.fidelity_samples(chunks, [[0, 1]] * 3, ["w4a4"], progress=lambda *step: seen.append(step)))
    assert seen == [(done, 3, "fidelity") for done in range(4)]


def top(table: NDArray[np.float64], num: int, actual: Sequence[int]) -> Top:
    """What an engine names of whole distributions."""
    ids = np.argsort(-table, axis=1, kind="stable")[:, :num].astype(np.int32)
    rows = np.arange(len(table))
    return Top(ids, np.take_along_axis(table, ids, 1).astype(np.float32), table[rows, actual].astype(np.float32))


def test_a_divergence_of_named_tokens_is_by_hand_that_of_merged_events() -> None:
    """Tokens 0 and 1 are named by both, token 4 came, 2 and 3 are the rest."""
    p, q = [0.4, 0.3, 0.15, 0.1, 0.05], [0.3, 0.35, 0.1, 0.05, 0.2]
    found = fidelity.compare_top(top(np.log([p]), 2, [4]), top(np.log([q]), 2, [4]), [4])
    events = ([0.4, 0.3, 0.05, 0.25], [0.3, 0.35, 0.2, 0.15])
    assert found.kl_nats == pytest.approx([scipy_stats.entropy(*events)], rel=1e-5)
    assert not found.agreed[0]
    assert found.log_prob == pytest.approx([math.log(0.2)])
    assert found.reference_log_prob == pytest.approx([math.log(0.05)])


@given(st.integers(0, 1000), st.integers(1, 50))
def test_a_divergence_of_named_tokens_never_exceeds_the_whole_one(seed: int, num: int) -> None:
    log_p = random_logs(seed)
    log_q = log_softmax(log_p + np.random.default_rng(seed).normal(0, 0.5, log_p.shape), axis=1)
    actual = np.random.default_rng(seed + 1).integers(0, 50, len(log_p)).tolist()
    whole = fidelity.compare_whole(log_p.astype(np.float32), log_q.astype(np.float32), actual)
    found = fidelity.compare_top(top(log_p, num, actual), top(log_q, num, actual), actual)
    assert (found.kl_nats <= whole.kl_nats + 2e-6).all()
    assert (found.agreed == whole.agreed).all()
    assert found.log_prob == pytest.approx(whole.log_prob)
    if num == 50:
        assert found.kl_nats == pytest.approx(whole.kl_nats, rel=1e-5, abs=2e-6)


def test_the_torch_engine_names_what_its_distributions_do() -> None:
    windows = [list(range(10, 30)), list(range(50, 60))]
    engine = open_engine("torch", checkpoint_path("dense"), dtype="float32", device="cpu")
    for window, table, named in zip(
        windows, engine.log_probs(windows, 2), engine.top_log_probs(windows, 2, 7), strict=True
    ):
        assert (named.ids == np.argsort(-table, axis=1)[:, :7]).all()
        assert (named.log_probs == np.sort(table, axis=1)[:, :-8:-1]).all()
        assert named.actual.tolist() == [table[at, token] for at, token in enumerate(window[1:])]
