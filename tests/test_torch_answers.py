"""The torch engine's batches of unequal texts against one text at a time, transformers' `generate`, and arithmetic."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from harness.demo import checkpoint_path, corpus
from harness.engines import torch_answers
from harness.engines.protocol import Choice, Engine, Prompt, open_engine
from harness.measure.perplexity import tokenize
from harness.sampling import GREEDY, PRESETS, Sampling


@pytest.fixture(scope="module", params=["dense", "moe"])
def folder(request: pytest.FixtureRequest) -> Path:
    return checkpoint_path(request.param)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    engine = open_engine("torch", folder, dtype="float32", device="cpu")
    yield engine
    engine.close()


def ids(folder: Path, text: str) -> tuple[int, ...]:
    return tuple(tokenize(folder, text))


@pytest.fixture(scope="module")
def questions(folder: Path) -> list[Choice]:
    """Lists of unequal lengths, with options of one to many tokens."""
    found = []
    for item in corpus.recall_items(3, 9):
        context = ids(folder, item.prompt)
        options = [ids(folder, item.prompt + option)[len(context) :] for option in (item.answer, *item.distractors)]
        found.append(Choice(context, (*options, options[0][:1], ids(folder, " and then a longer text."))))
    return found


def alone(engine: Engine, choice: Choice, option: tuple[int, ...]) -> float:
    (scores,) = engine.score([[*choice.context, *option]], 1)
    return float(scores[len(choice.context) - 1 :].sum())


def test_options_in_a_batch_are_as_probable_as_alone(engine: Engine, questions: list[Choice]) -> None:
    assert len({len(choice.context) for choice in questions}) > 4
    found = dict(engine.choices(questions, 4))
    assert sorted(found) == list(range(len(questions)))
    for place, choice in enumerate(questions):
        for scored, option in zip(found[place], choice.options, strict=True):
            assert scored.log_prob == pytest.approx(alone(engine, choice, option), abs=2e-4)


def test_an_option_is_greedy_if_decoding_would_write_it(engine: Engine, questions: list[Choice]) -> None:
    found = dict(engine.choices(questions, 3))
    written = [engine.decode([choice.context], max(map(len, choice.options))).token_ids[0] for choice in questions]
    greedy = [
        scored.greedy == (text[: len(option)] == option)
        for place, (choice, text) in enumerate(zip(questions, written, strict=True))
        for scored, option in zip(found[place], choice.options, strict=True)
    ]
    assert all(greedy)
    assert {scored.greedy for scores in found.values() for scored in scores} == {True, False}


def test_the_batch_size_moves_probabilities_by_rounding_alone(engine: Engine, questions: list[Choice]) -> None:
    one, many = dict(engine.choices(questions, 1)), dict(engine.choices(questions, 9))
    for place in one:
        for left, right in zip(one[place], many[place], strict=True):
            assert left.log_prob == pytest.approx(right.log_prob, abs=2e-4)


def test_few_rows_of_logits_at_a_time_give_the_same(
    engine: Engine, questions: list[Choice], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = dict(engine.choices(questions[:2], 2))
    monkeypatch.setattr(torch_answers, "LOGITS_BYTES", 1)
    rows = dict(engine.choices(questions[:2], 2))
    for place in whole:
        for left, right in zip(whole[place], rows[place], strict=True):
            # float32's steps are 8e-6 near -126, and a processor may add in another order.
            assert left.log_prob == pytest.approx(right.log_prob, abs=1e-4)
            assert left.greedy == right.greedy


def test_a_context_is_read_once_for_all_its_options(
    engine: Any, questions: list[Choice], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts the tokens that go through the model."""
    read = []
    forward = type(engine._trunk).forward
    monkeypatch.setattr(
        type(engine._trunk),
        "forward",
        lambda self, input_ids=None, **rest: (read.append(input_ids.numel()), forward(self, input_ids, **rest))[1],
    )
    choice = questions[0]
    list(engine.choices([choice], 16))
    tails = [len(option) - 1 for option in choice.options if len(option) > 1]
    assert read == [len(choice.context), len(tails) * max(tails)]
    read.clear()
    short = [option for option in choice.options if len(option) <= 4]
    list(engine.choices([Choice(choice.context, tuple(short))], 16))  # so few are read one by one
    assert read[0] == len(choice.context)
    assert sum(read[1:]) == sum(len(option) > 1 for option in short) * (max(map(len, short)) - 1)


def test_answers_in_a_batch_are_those_of_transformers_alone(folder: Path, engine: Engine) -> None:
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    texts = [ids(folder, item.prompt) for item in corpus.recall_items(4, 7)]
    found = dict(engine.generate([Prompt(text, 10) for text in texts], 4))
    for place, text in enumerate(texts):
        alone = model.generate(torch.tensor([text]), max_new_tokens=10, do_sample=False)[0, len(text) :].tolist()
        answer = found[place]
        assert list(answer.token_ids) == alone
        ended = alone[-1] in model.generation_config.eos_token_id
        assert answer.finish_reason == ("stop" if ended else "length")


def test_an_answer_ends_where_a_stop_text_is_written_and_not_before(folder: Path, engine: Engine) -> None:
    texts = [ids(folder, item.prompt) for item in corpus.recall_items(4, 5)]
    whole = dict(engine.generate([Prompt(text, 12) for text in texts], 5))
    cut = dict(engine.generate([Prompt(text, 12, stop=("\n", "never written")) for text in texts], 5))
    line = tokenize(folder, "\n")[0]
    for place in whole:
        written = whole[place].token_ids
        expected = written[: written.index(line) + 1] if line in written else written
        assert cut[place].token_ids == expected
        assert cut[place].finish_reason == ("stop" if line in written else whole[place].finish_reason)


def test_a_stop_text_that_never_comes_cuts_the_answer_off(folder: Path, engine: Engine) -> None:
    prompt = Prompt(ids(folder, "1+1=2\n"), 9, stop=("never written",))
    ((_, answer),) = engine.generate([prompt], 1)
    assert (len(answer.token_ids), answer.finish_reason) == (9, "length")


def test_the_end_token_ends_an_answer(folder: Path, engine: Engine) -> None:
    prompt = Prompt(
        ids(folder, "<|im_start|>user\nWhat is 12+13?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"), 60
    )
    ((_, answer),) = engine.generate([prompt], 1)
    assert answer.finish_reason == "stop"
    assert answer.token_ids[-1] == ids(folder, "<|im_end|>")[0]


@pytest.mark.parametrize("sampling", [GREEDY, PRESETS["thinking-general"]], ids=["greedy", "sampled"])
def test_company_and_order_do_not_change_an_answer(folder: Path, engine: Engine, sampling: Sampling) -> None:
    texts = [ids(folder, item.prompt) for item in corpus.recall_items(4, 6)]
    prompts = [Prompt(text, 8, sampling=sampling, seed=place) for place, text in enumerate(texts)]
    together = dict(engine.generate(prompts, 6))
    alone = dict(engine.generate(prompts[::-1], 1))
    assert [together[place].token_ids for place in range(6)] == [alone[5 - place].token_ids for place in range(6)]


def test_another_seed_draws_another_answer(folder: Path, engine: Engine) -> None:
    text, sampling = ids(folder, "The "), Sampling(temperature=1.0)
    prompts = [Prompt(text, 8, sampling=sampling, seed=seed) for seed in range(8)]
    assert len({answer.token_ids for _, answer in engine.generate(prompts, 8)}) > 4


def test_the_seconds_of_all_answers_add_up_to_less_than_the_run(folder: Path, engine: Engine) -> None:
    import time

    prompts = [Prompt(ids(folder, item.prompt), 6) for item in corpus.recall_items(4, 5)]
    before = time.perf_counter()
    total = sum(answer.seconds for _, answer in engine.generate(prompts, 2))
    assert 0 < total <= time.perf_counter() - before


# -- How a token is chosen, on logits given by hand ----------------------------------------------------------------


def drawn(
    logits: list[float], sampling: Sampling, prompt: tuple[int, ...] = (), written: tuple[int, ...] = ()
) -> Counter[int]:
    """How often each token is chosen in 2,000 draws."""
    found: Counter[int] = Counter()
    generator = torch.Generator().manual_seed(0)
    for _ in range(2000):
        row = torch_answers._Row(0, Prompt(prompt, 1, sampling=sampling), generator, list(written))
        found[torch_answers._chosen(row, torch.tensor(logits))] += 1
    return found


def test_tokens_are_drawn_as_often_as_they_are_probable() -> None:
    found = drawn([0.0, 1.0, 2.0], Sampling(temperature=1.0))
    expected = torch.tensor([0.0, 1.0, 2.0]).softmax(0)
    assert [found[token] / 2000 for token in range(3)] == pytest.approx(expected.tolist(), abs=0.03)


def test_temperature_divides_the_logits() -> None:
    found = drawn([0.0, 1.0], Sampling(temperature=0.5))
    assert found[1] / 2000 == pytest.approx(torch.tensor(2.0).sigmoid().item(), abs=0.03)


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(temperature=1.0, top_k=2), {2, 3}),
        (Sampling(temperature=1.0, top_p=0.6), {3}),  # 0.64 of the mass is the first token's
        (Sampling(temperature=1.0, top_p=0.8), {2, 3}),
        (Sampling(temperature=1.0, min_p=0.2), {2, 3}),  # 1/e = 0.37 and 0.14 of the most probable
    ],
)
def test_unlikely_tokens_are_left_out(sampling: Sampling, kept: set[int]) -> None:
    assert set(drawn([0.0, 1.0, 2.0, 3.0], sampling)) == kept


def test_the_presence_penalty_is_taken_once_from_what_was_written_and_not_from_the_prompt() -> None:
    greedy = Sampling(presence_penalty=1.5)
    assert set(drawn([2.0, 1.0], greedy, prompt=(0,))) == {0}
    assert set(drawn([2.0, 1.0], greedy, written=(0,))) == {1}
    assert set(drawn([3.0, 1.0], greedy, written=(0, 0, 0))) == {0}


def test_the_repetition_penalty_divides_the_logits_of_prompt_and_answer() -> None:
    greedy = Sampling(repetition_penalty=2.0)
    assert set(drawn([3.0, 2.0], greedy)) == {0}
    assert set(drawn([3.0, 2.0], greedy, prompt=(0,))) == {1}
    assert set(drawn([3.0, 2.0], greedy, written=(0,))) == {1}
    assert set(drawn([-1.0, -1.5], greedy, written=(0,))) == {1}
