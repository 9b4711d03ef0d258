"""The decode measure with an engine whose times are known, and with the real one on a tiny model."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3_5Config, Qwen3_5ForCausalLM

from harness.engines.protocol import Decoded, Drafts, Engine, EngineInfo, Memory, open_engine
from harness.errors import UserError
from harness.measure.decode import COHERENCE_TOKENS, Shape, coherence, prompts, speed_samples

DEFAULT = (Shape("prefill", 1, 512, 1), Shape("decode", 1, 128, 129))


def measure(
    engine: Engine, ids: Sequence[int], shapes: Sequence[Shape] = DEFAULT, **options: Any
) -> Iterator[dict[str, Any]]:
    """The measure with options for whatever a test does not care about."""
    return speed_samples(engine, ids, shapes, **{"start": 0, "repetitions": 5, "warmups": 1, **options})


class ClockEngine:
    """Takes 2 s for the first prefill, 3 s for the second …, and 0.5 s for every step."""

    info = EngineInfo(
        name="clock",
        version="1",
        device="cpu",
        dtype="float32",
        effective={"weight_bytes_resident": 1000, "weight_bytes_per_token": 800},
    )

    def __init__(self) -> None:
        self.asked: list[tuple[list[list[int]], int]] = []

    def score(self, windows: Sequence[Sequence[int]], batch_size: int) -> Iterator[Any]:
        raise NotImplementedError

    def decode(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Decoded:
        self.asked.append(([list(prompt) for prompt in prompts], num_tokens))
        tokens = tuple(tuple(range(num_tokens)) for _ in prompts)
        return Decoded(tokens, 1.0 + len(self.asked), (0.5,) * (num_tokens - 1))

    def memory(self) -> Memory:
        return Memory(peak_rss_bytes=5000, peak_vram_bytes=None)

    def close(self) -> None:
        pass


def test_samples_mark_warmups_and_keep_every_step_time() -> None:
    engine = ClockEngine()
    samples = list(
        measure(
            engine,
            range(1000),
            [Shape("prefill", 1, 100, 1), Shape("decode", 1, 10, 5), Shape("decode", 2, 10, 5)],
            start=3,
            repetitions=2,
            warmups=1,
        )
    )
    turns = [(0, True), (0, False), (1, False)]
    seconds = itertools.count(2.0)
    expected: list[dict[str, Any]] = []
    for repetition, warmup in turns:
        common = {"start": 3, "repetition": repetition, "warmup": warmup}
        expected.append(
            {"kind": "prefill", **common, "batch": 1, "prompt_tokens": 100, "prefill_seconds": next(seconds)}
        )
        for batch in (1, 2):
            decode = {"kind": "decode", **common, "batch": batch, "prompt_tokens": 10, "new_tokens": 5}
            expected.append(decode | {"prefill_seconds": next(seconds), "step_seconds": [0.5] * 4})
    expected.append(
        {
            "kind": "memory",
            "start": 3,
            "weight_bytes": 1000,
            "weight_bytes_per_token": 800,
            "kv_cache_tokens": None,
            "peak_rss_bytes": 5000,
            "peak_vram_bytes": None,
        }
    )
    assert samples == expected
    assert [(len(rows), len(rows[0]), n) for rows, n in engine.asked] == [(1, 100, 1), (1, 10, 5), (2, 10, 5)] * 3


class WholeEngine(ClockEngine):
    """Times the generation as one, and speculates."""

    def decode(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Decoded:
        tokens = tuple(tuple(range(num_tokens)) for _ in prompts)
        return Decoded(tokens, 1.0, (2.0,), Drafts(num_drafts=3, num_draft_tokens=6, num_accepted_tokens=4))


def test_an_engine_may_give_one_time_for_all_steps_and_what_it_speculated() -> None:
    (sample, _) = measure(WholeEngine(), range(1000), DEFAULT[1:], repetitions=1, warmups=0)
    assert (sample["step_seconds"], sample["new_tokens"]) == ([2.0], 129)
    assert (sample["num_drafts"], sample["num_draft_tokens"], sample["num_accepted_tokens"]) == (3, 6, 4)


class JudgingEngine(ClockEngine):
    """Finds real text (the tokens after 63) worth `text` nats a token, and what it decoded worth `generated`."""

    def __init__(self, text: float, generated: float) -> None:
        super().__init__()
        self.text, self.generated = text, generated

    def score(self, windows: Sequence[Sequence[int]], batch_size: int) -> Iterator[Any]:
        for window in windows:
            is_real = list(window) == list(range(len(window)))
            scores = np.full(len(window) - 1, -99.0)  # the prompt's are not looked at
            scores[-COHERENCE_TOKENS:] = -self.text if is_real else -self.generated
            yield scores


@pytest.mark.parametrize(
    ("text", "generated", "coherent"),
    [
        (2.0, 0.7, True),
        (2.0, 2.4, True),
        (2.0, 2.6, False),  # what decoding wrote is no text to its own prefill
        (5.5, 0.7, False),  # real text is hardly better than the ln 1024 = 6.9 of a guess
    ],
)
def test_gibberish_is_found_before_anything_is_timed(text: float, generated: float, coherent: bool) -> None:
    sample = coherence(JudgingEngine(text, generated), range(1000), vocabulary=1024)
    assert (sample["text_nll_nats"], sample["generated_nll_nats"]) == pytest.approx((text, generated))
    assert sample["limit_nats"] == pytest.approx(0.75 * 6.931, abs=1e-3)
    assert sample["coherent"] is coherent


def test_coherence_is_looked_at_as_deep_as_speed_is() -> None:
    engine = JudgingEngine(2.0, 0.7)
    sample = coherence(engine, range(1000), vocabulary=1024, prompt_tokens=300)
    assert sample["prompt_tokens"] == 300 and sample["coherent"]
    ((prompts_asked, new_tokens),) = engine.asked
    assert (len(prompts_asked[0]), new_tokens) == (300, COHERENCE_TOKENS)


def test_prompts_are_different_pieces_of_the_text() -> None:
    text = list(range(100))
    assert prompts(text, 1, 30) == [text[:30]]
    assert prompts(text, 3, 30) == [text[:30], text[30:60], text[60:90]]
    overlapping = prompts(text, 5, 60)  # too short for five times sixty
    assert [row[0] for row in overlapping] == [0, 10, 20, 30, 40]
    assert all(len(row) == 60 for row in overlapping)
    assert [row[0] for row in prompts(text, 4, 97)] == [0, 1, 2, 3]


def test_a_text_too_short_for_its_prompts_is_the_users_error() -> None:
    with pytest.raises(UserError, match="too few for 5 different prompts of 97"):
        prompts(range(100), 5, 97)
    with pytest.raises(UserError, match="too few for 1 different prompts of 512"):
        list(measure(ClockEngine(), range(100)))


@pytest.mark.parametrize("wrong", [{"repetitions": 0}, {"warmups": -1}])
def test_nothing_to_measure_is_the_users_error(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"(repetitions|warmups) = (0|-1)"):
        list(measure(ClockEngine(), range(1000), **wrong))


@pytest.mark.parametrize(
    ("decoded", "says"),
    [
        (Decoded(((1, 2, 3),), 1.0, (0.5, 0.5)), r"1 rows of \[3\] tokens"),
        (Decoded(((1, 2, 3, 4),), 1.0, (0.5, 0.5)), "2 step times"),
        (Decoded(((1, 2, 3, 4),) * 2, 1.0, (0.5,) * 3), "2 rows"),
        (Decoded(((1, 2, 3, 4),), 1.0, (0.5, -0.1, 0.5)), "a time of zero or less"),
        (Decoded(((1, 2, 3, 4),), 0.0, (0.5,) * 3), "a time of zero or less"),
    ],
)
def test_an_engine_that_stops_early_or_whose_clock_jumps_is_found(decoded: Decoded, says: str) -> None:
    class Broken(ClockEngine):
        def decode(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Decoded:
            return decoded

    with pytest.raises(UserError, match=says):
        list(measure(Broken(), range(1000), [Shape("decode", 1, 10, 4)]))


def test_progress_ends_at_its_total() -> None:
    seen: list[tuple[int, int]] = []
    list(
        measure(
            ClockEngine(),
            range(1000),
            start=0,
            repetitions=2,
            progress=lambda done, total, _: seen.append((done, total)),
        )
    )
    assert seen == [(done, 6) for done in range(7)]


def test_the_torch_engine_gives_all_samples(tmp_path: Any) -> None:
    text_config = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    }
    Qwen3_5ForCausalLM(Qwen3_5Config(text_config=text_config).text_config).to(torch.bfloat16).save_pretrained(tmp_path)
    engine = open_engine("torch", tmp_path, device="cpu")
    ids = torch.arange(500).remainder(64).tolist()
    samples = list(
        measure(
            engine,
            ids,
            [Shape("prefill", 1, 100, 1), Shape("decode", 1, 20, 4), Shape("decode", 3, 20, 4)],
            repetitions=1,
        )
    )
    assert [s["kind"] for s in samples] == ["prefill", "decode", "decode"] * 2 + ["memory"]
    assert all(len(s["step_seconds"]) == 3 for s in samples if s["kind"] == "decode")
    assert samples[-1]["weight_bytes"] >= samples[-1]["weight_bytes_per_token"] > 0
    assert samples[-1]["peak_rss_bytes"] > samples[-1]["weight_bytes"]
    assert coherence(engine, ids, 64)["coherent"] is False, "random weights know no text"
