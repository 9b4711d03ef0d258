"""The presets are the published ones, and what nobody sets changes nothing."""

from dataclasses import astuple

import pytest

from harness.sampling import GREEDY, PRESETS, Sampling


@pytest.mark.parametrize(
    ("preset", "published"),
    # Model cards of Qwen3.5 and Qwen3.6: temperature, top_p, top_k, min_p, presence and repetition penalty.
    [
        ("thinking-general", (1.0, 0.95, 20, 0.0, 1.5, 1.0)),
        ("thinking-coding", (0.6, 0.95, 20, 0.0, 0.0, 1.0)),
        ("instruct-general", (0.7, 0.8, 20, 0.0, 1.5, 1.0)),
        ("instruct-reasoning", (1.0, 1.0, 40, 0.0, 2.0, 1.0)),
    ],
)
def test_a_preset_is_the_published_one(preset: str, published: tuple[float, ...]) -> None:
    sampling = PRESETS[preset]
    assert astuple(sampling) == published
    assert published == (
        sampling.temperature,
        sampling.top_p,
        sampling.top_k,
        sampling.min_p,
        sampling.presence_penalty,
        sampling.repetition_penalty,
    )


def test_there_are_no_other_presets() -> None:
    assert list(PRESETS) == ["thinking-general", "thinking-coding", "instruct-general", "instruct-reasoning"]


def test_greedy_is_temperature_zero_and_nothing_else() -> None:
    assert GREEDY == Sampling() == Sampling(temperature=0.0)
    assert astuple(GREEDY) == (0.0, 1.0, 0, 0.0, 0.0, 1.0)
