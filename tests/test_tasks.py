"""Task evals against lm-eval run by itself on the same files, and everything that can be wrong with a task."""

import contextlib
import gc
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]
import lm_eval
import pytest
from datasets.arrow_writer import ArrowWriter  # type: ignore[import-untyped]

from harness.cli import main
from harness.demo import checkpoint_path, corpus
from harness.engines import loading, torch_engine
from harness.engines.protocol import Answer, Engine, EngineDied, Prompt, Start, open_engine
from harness.engines.torch_engine import TorchEngine
from harness.errors import UserError
from harness.measure import tasks
from harness.measure.kept import Journal
from harness.measure.lm import Texts
from harness.record import store
from harness.suite.schema import Task
from tests.conftest import hear_interruptions

DENSE = checkpoint_path("dense")
LENGTH = 1024
LEFT_OUT = {"kind", "task", "repetition"}

CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{prompt}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "target_delimiter": "",
}
GENERATE = {
    "output_type": "generate_until",
    "doc_to_text": "{{prompt}}",
    "doc_to_target": "{{target}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 12, "do_sample": False},
    "filter_list": [
        {"name": "word", "filter": [{"function": "regex", "regex_pattern": r"(\S+)"}, {"function": "take_first"}]},
        {"name": "number", "filter": [{"function": "regex", "regex_pattern": r"(\d+)"}, {"function": "take_first"}]},
    ],
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
LIKELIHOOD = {
    "output_type": "loglikelihood",
    "doc_to_text": "{{prompt}}",
    "doc_to_target": "{{target}}",
    "target_delimiter": " ",
    "metric_list": [
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
    ],
}
ROLLING = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{prompt}}",
    "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
}


def rows(seed: int, count: int) -> Iterator[dict[str, Any]]:
    for number, item in enumerate(corpus.recall_items(seed, count)):
        choices = [item.answer, *item.distractors]
        place = number % len(choices)
        choices[0], choices[place] = choices[place], choices[0]
        yield {"prompt": item.prompt, "choices": choices, "answer": place, "target": item.answer.strip()}


def written(folder: Path, config: Mapping[str, Any], *, count: int = 24, name: str = "lists", **changes: Any) -> Path:
    """A task file over local data, the JSON of which is YAML."""
    data = {}
    for split, seed in (("test", 1), ("examples", 2)):
        file = folder / f"{split}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows(seed, count)))
        data[split] = str(file)
    document = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": data},
        "test_split": "test",
        "fewshot_split": "examples",
        "metadata": {"version": 1.0},
        **config,
        **changes,
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))
    return path


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = open_engine("torch", DENSE, dtype="float32", device="cpu")
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def texts() -> Texts:
    return Texts(DENSE)


def wanted(**options: Any) -> Task:
    return Task(**{"task": "./lists.yaml", "batch_size": 8, **options})


def loaded(file: Path, texts: Texts, **options: Any) -> tasks.ReadyTask:
    return tasks.ready_task(tasks.take_task("lists", wanted(**options), file), texts, LENGTH, "torch")


def run(
    task: tasks.ReadyTask, engine: Engine, folder: Path, *, limit: int | None = None, identity: str = "one"
) -> list[dict[str, Any]]:
    with Journal(folder, "lists", {"of": identity}) as journal:
        return list(tasks.task_samples(task, engine, journal, limit=limit))


def of_kind(samples: Sequence[Mapping[str, Any]], kind: str) -> list[Mapping[str, Any]]:
    return [sample for sample in samples if sample["kind"] == kind]


def by_itself(file: Path, **options: Any) -> Any:
    """lm-eval with its own model class."""
    model = {"pretrained": str(DENSE), "dtype": "float32", "max_length": LENGTH}
    thinking = options.pop("thinking", None)
    if thinking is not None:
        model |= {"enable_thinking": thinking, "think_end_token": "</think>"}
    return lm_eval.simple_evaluate(
        model="hf",
        model_args=model,
        tasks=[str(file)],
        task_manager=lm_eval.tasks.TaskManager(include_defaults=False),  # to list its thousands takes seconds
        device="cpu",
        batch_size=1,
        bootstrap_iters=1000,
        **options,
    )


# -- The same numbers as lm-eval -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "ours", "theirs"),
    [
        (CHOICE, {}, {}),
        (CHOICE, {"num_fewshot": 2, "limit": 10}, {"num_fewshot": 2, "limit": 10}),
        (CHOICE, {"chat": True}, {"apply_chat_template": True}),
        (LIKELIHOOD, {}, {}),
        (ROLLING, {}, {}),
        (GENERATE, {}, {}),
        (GENERATE, {"num_fewshot": 2, "limit": 10}, {"num_fewshot": 2, "limit": 10}),
        (
            GENERATE,
            {"chat": True, "system": "Answer.", "num_fewshot": 1, "limit": 10, "max_new_tokens": 24},
            {
                "apply_chat_template": True,
                "system_instruction": "Answer.",
                "num_fewshot": 1,
                "limit": 10,
                "gen_kwargs": {"max_gen_toks": 24},
            },
        ),
        (
            {**GENERATE, "generation_kwargs": {"until": [], "max_gen_toks": 24, "do_sample": False}},
            {"chat": True, "thinking": True, "limit": 10},
            {"apply_chat_template": True, "thinking": True, "limit": 10},
        ),
    ],
    ids=[
        "choice",
        "choice with examples",
        "choice in a chat",
        "likelihood",
        "rolling",
        "generation",
        "generation with examples",
        "generation in a chat with examples",
        "thinking",
    ],
)
def test_scores_and_items_are_those_of_lm_eval_by_itself(
    config: Any, ours: Any, theirs: Any, engine: Engine, texts: Texts, tmp_path: Path
) -> None:
    file = written(tmp_path, config)
    samples = run(loaded(file, texts, **ours), engine, tmp_path)
    expected = by_itself(file, **theirs)
    results = {one["metric"]: one for one in of_kind(samples, "result")}
    metrics = {key: value for key, value in expected["results"]["lists"].items() if "," in key}
    assert set(results) == {key for key in metrics if "_stderr" not in key} and results
    for key, result in results.items():
        metric, _, name = key.partition(",")
        assert result["value"] == pytest.approx(metrics[key], rel=1e-5), key
        error = metrics[f"{metric}_stderr,{name}"]
        if error != "N/A" and metric in ("acc", "acc_norm", "exact_match"):
            assert result["standard_error"] == pytest.approx(error), key
    items = {item["doc_id"]: item for item in of_kind(samples, "item")}
    logged = expected["samples"]["lists"]
    assert set(items) == {sample["doc_id"] for sample in logged}
    for sample in logged:
        item = items[sample["doc_id"]]
        assert item["doc_sha256"] == sample["doc_hash"]
        assert item["target_sha256"] == sample["target_hash"]
        for metric in sample["metrics"]:
            assert item["outcomes"][f"{metric},{sample['filter']}"] == pytest.approx(sample[metric], rel=1e-5)
        if "log_probs" in item and config is not ROLLING:
            found = [answer[0][0] for answer in sample["resps"]]
            assert item["log_probs"] == pytest.approx(found, rel=1e-4, abs=1e-4)


def test_the_demo_model_solves_the_lists_well_above_chance(engine: Engine, texts: Texts, tmp_path: Path) -> None:
    samples = run(loaded(written(tmp_path, GENERATE), texts), engine, tmp_path)
    assert {one["metric"]: one["value"] for one in of_kind(samples, "result")}["exact_match,word"] > 0.5


# -- Items -----------------------------------------------------------------------------------------------------------


def test_an_item_says_how_its_answer_ended_and_what_it_took(engine: Engine, texts: Texts, tmp_path: Path) -> None:
    file = written(tmp_path, GENERATE, generation_kwargs={"until": ["never"], "max_gen_toks": 3, "do_sample": False})
    for item in of_kind(run(loaded(file, texts), engine, tmp_path), "item"):
        assert item["num_tokens"] == 3
        assert item["finish_reasons"] == ["length"]
        assert item["seconds"] > 0
        prompt = texts.tokenizer.encode(list(rows(1, 24))[item["doc_id"]]["prompt"])
        assert item["num_prompt_tokens"] == len(prompt)


def test_a_thought_that_never_ends_is_an_empty_answer(engine: Engine, texts: Texts, tmp_path: Path) -> None:
    file = written(tmp_path, GENERATE, generation_kwargs={"until": [], "max_gen_toks": 1, "do_sample": False}, count=4)
    items = of_kind(run(loaded(file, texts, chat=True, thinking=True), engine, tmp_path), "item")
    assert [(item["unclosed"], item["empty"], item["finish_reasons"]) for item in items] == [
        (True, True, ["length"])
    ] * 4


def test_an_answer_that_no_filter_finds_is_not_extracted(engine: Engine, texts: Texts, tmp_path: Path) -> None:
    never = [{"name": "never", "filter": [{"function": "regex", "regex_pattern": "(§)"}, {"function": "take_first"}]}]
    file = written(tmp_path, GENERATE, filter_list=never, count=4)
    items = of_kind(run(loaded(file, texts), engine, tmp_path), "item")
    assert [item["extracted"] for item in items] == [False] * 4


def test_repetitions_draw_anew_and_a_second_run_draws_the_same(engine: Engine, texts: Texts, tmp_path: Path) -> None:
    file = written(tmp_path, GENERATE, count=8)
    task = loaded(file, texts, preset="thinking-general", repeats=3)
    first = run(task, engine, tmp_path / "a")
    second = run(task, engine, tmp_path / "b")
    assert [item["repetition"] for item in of_kind(first, "item")] == [0] * 8 + [1] * 8 + [2] * 8
    for one, other in zip(of_kind(first, "item"), of_kind(second, "item"), strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    with Journal(tmp_path / "a", "lists", {"of": "one"}) as journal:
        texts_by_repetition = list(journal.path.read_text().splitlines())[1:]
    assert len(texts_by_repetition) == 24
    assert len({json.loads(line)["value"]["text"] for line in texts_by_repetition}) > 8


def test_the_digest_of_a_prompt_changes_with_its_tokens_alone(texts: Texts, engine: Engine, tmp_path: Path) -> None:
    file = written(tmp_path, CHOICE, count=4)

    def digests(**options: Any) -> list[str]:
        samples = run(loaded(file, texts, **options), engine, tmp_path, identity=str(options))
        return [item["prompt_sha256"] for item in of_kind(samples, "item")]

    plain = digests()
    assert len(set(plain)) == 4
    assert digests(batch_size=1) == plain
    assert not set(digests(chat=True)) & set(plain)
    assert not set(digests(num_fewshot=1)) & set(plain)


def test_progress_tells_items_speed_and_answers_that_were_cut_off(engine: Engine, texts: Texts, tmp_path: Path) -> None:
    file = written(
        tmp_path, GENERATE, generation_kwargs={"until": ["never"], "max_gen_toks": 3, "do_sample": False}, count=6
    )
    told: list[tuple[int, int, str, str]] = []
    with Journal(tmp_path, "lists", {}) as journal:
        list(tasks.task_samples(loaded(file, texts), engine, journal, progress=lambda *step: told.append(step)))
    assert [step[:3] for step in told] == [(done, 6, "answers") for done in range(7)]
    assert re.fullmatch(r"6 of 6, [\d,]+ tok/s, 6 cut off", told[-1][3])


# -- What is answered once is not asked again --------------------------------------------------------------------------


class Dying(TorchEngine):
    """Ends after some answers, as an engine process that is killed does."""

    lives = 5

    def generate(self, prompts: Sequence[Prompt], batch_size: int) -> Iterator[tuple[int, Answer]]:
        for number, answer in enumerate(super().generate(prompts, batch_size)):
            if number == self.lives:
                raise EngineDied("The engine died.", "Look at its log.", ["killed"])
            yield answer


def test_a_run_goes_on_at_the_item_where_its_engine_died(engine: Engine, texts: Texts, tmp_path: Path) -> None:
    task = loaded(written(tmp_path, GENERATE), texts)
    whole = run(task, engine, tmp_path / "whole")
    dying = Dying(DENSE, Start("float32", "cpu"))
    with pytest.raises(EngineDied):
        run(task, dying, tmp_path)
    dying.close()
    again = run(task, engine, tmp_path)
    (reused,) = of_kind(again, "reused")
    assert (reused["num_answers"], reused["num_reused"]) == (24, Dying.lives)
    strip = [{**sample, "seconds": 0} for sample in whole if sample["kind"] != "reused"]
    assert [{**sample, "seconds": 0} for sample in again if sample["kind"] != "reused"] == strip


def test_answers_of_another_model_are_never_taken(engine: Engine, texts: Texts, tmp_path: Path) -> None:
    task = loaded(written(tmp_path, CHOICE, count=4), texts)
    run(task, engine, tmp_path, identity="one")
    (reused,) = of_kind(run(task, engine, tmp_path, identity="another"), "reused")
    assert reused["num_reused"] == 0


def test_a_limit_takes_the_first_documents_and_its_answers_serve_the_whole_run(
    engine: Engine, texts: Texts, tmp_path: Path
) -> None:
    task = loaded(written(tmp_path, CHOICE), texts)
    some = run(task, engine, tmp_path, limit=5)
    assert [item["doc_id"] for item in of_kind(some, "item")] == list(range(5))
    (reused,) = of_kind(run(task, engine, tmp_path), "reused")
    assert (reused["num_answers"], reused["num_reused"]) == (96, 20)


# -- Bad input -------------------------------------------------------------------------------------------------------


def refused(*parts: str) -> Any:
    return pytest.raises(UserError, match=".*".join(parts))


def test_an_unknown_task_has_its_nearest_names() -> None:
    with refused("no task 'gsm8kk'", "'gsm8k'"):
        tasks.take_task("x", wanted(), "gsm8kk")


@pytest.mark.parametrize(
    "name", ["gsm8k", "mmlu_pro", "gpqa_diamond_zeroshot", "arc_challenge", "hellaswag", "wikitext"]
)
def test_a_dataset_that_cannot_be_had_is_named_with_the_way_to_fetch_it(name: str) -> None:
    with refused(f"'x' \\({name}\\) needs the dataset", "load_dataset"):
        tasks.take_task("x", wanted(), name)


def test_a_pinned_revision_is_asked_for() -> None:
    with refused("openai/gsm8k", "revision='abc'"):
        tasks.take_task("x", wanted(revision="abc"), "gsm8k")


def test_a_missing_file_is_named(texts: Texts, tmp_path: Path) -> None:
    with refused("no file", "none.yaml"):
        loaded(tmp_path / "none.yaml", texts)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"doc_to_text": "{{prompt"}, "template fails"),
        ({"doc_to_text": "{{prompt.missing.deep}}"}, "template fails"),
        ({"output_type": "sing"}, "output_type"),
        ({"metric_list": [{"metric": "unheard_of"}]}, "unheard_of"),
        ({"test_split": "nowhere"}, "nowhere"),
    ],
)
def test_a_broken_task_file_is_refused_with_its_reason(changes: Any, says: str, texts: Texts, tmp_path: Path) -> None:
    with refused("lists.yaml", says):
        loaded(written(tmp_path, GENERATE, **changes), texts)


def test_a_file_that_is_no_yaml_is_refused(texts: Texts, tmp_path: Path) -> None:
    (tmp_path / "lists.yaml").write_text("task: [")
    with refused("lists.yaml", "cannot be loaded"):
        loaded(tmp_path / "lists.yaml", texts)


def test_a_chat_needs_a_chat_template(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((DENSE / file).read_bytes())
    file = written(tmp_path, GENERATE)
    loaded(file, Texts(folder))
    with refused("asks for a chat", "no chat template"):
        loaded(file, Texts(folder), chat=True)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((DENSE / "config.json").read_bytes())
    with refused("no tokenizer.json"):
        Texts(tmp_path)


@pytest.mark.parametrize("config", [CHOICE, GENERATE], ids=["choice", "generation"])
def test_a_prompt_that_is_too_long_is_refused_before_a_model_is_loaded(
    config: Any, texts: Texts, tmp_path: Path
) -> None:
    with refused("document 0 of lists", "takes 20"):
        tasks.ready_task(tasks.take_task("x", wanted(), written(tmp_path, config)), texts, 20, "torch")


@pytest.mark.parametrize(
    ("config", "options", "says"),
    [
        (CHOICE, {"chat": True, "thinking": True}, "only compares"),
        (CHOICE, {"repeats": 2}, "draws nothing"),
        (GENERATE, {"repeats": 2}, "decodes greedily"),
        (GENERATE, {"version": 2.0}, "pinned to version 2"),
        ({**GENERATE, "unsafe_code": True}, {}, "runs code"),
        ({**GENERATE, "generation_kwargs": {"until": [], "beams": 3}}, {}, "generation_kwargs.beams"),
        (GENERATE, {"revision": "main"}, "is a file"),
    ],
)
def test_what_cannot_be_put_that_way_is_refused(
    config: Any, options: Any, says: str, texts: Texts, tmp_path: Path
) -> None:
    with refused(says):
        loaded(written(tmp_path, config), texts, **options)


# -- The command -------------------------------------------------------------------------------------------------------

SUITE = """
name = "lists"
title = "Lists"
[source]
location = "demo:dense"
[variants.nvfp4a16]
recipe = "rtn-a16"
[engine]
dtype = "float32"
device = "cpu"
[tasks.lists]
task = "./lists.yaml"
batch_size = 4
"""


def command(folder: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "harness", "tasks", "--suite", str(folder / "suite.toml"), *arguments]


def place(folder: Path, config: Any = GENERATE, suite: str = SUITE, **changes: Any) -> Path:
    written(folder, config, **changes)
    (folder / "suite.toml").write_text(suite)
    return folder


def document(folder: Path, *arguments: str, code: int = 0) -> Any:
    printed, said = io.StringIO(), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
        assert main(["tasks", "--suite", "suite.toml", "--json", *arguments]) == code, said.getvalue()
    return json.loads(printed.getvalue())


def test_an_interrupted_command_goes_on_where_it_was_and_ends_with_the_same_items(tmp_path: Path) -> None:
    folder = place(tmp_path, count=80)
    process = subprocess.Popen(
        command(folder, "--variant", "source"),
        cwd=folder,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_interruptions,
    )
    journal = None
    for _ in range(1200):
        journal = next(iter(folder.glob("artifacts/lists/.answers/*.jsonl")), None)
        if journal is not None and journal.read_bytes().count(b"\n") > 20:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 130, complaint
    assert complaint.startswith("harness: interrupted.")
    assert journal is not None
    before = journal.read_bytes().count(b"\n") - 1
    assert 0 < before < 80
    found = document(folder, "--variant", "source")
    again = store.read(folder / found["records"]["lists"]["source"])
    whole = store.read(folder / document(folder, "--variant", "source", "--fresh")["records"]["lists"]["source"])
    assert [reused["num_reused"] for reused in (*again.kind("reused"), *whole.kind("reused"))] == [before, 0]
    for one, other in zip(again.kind("item"), whole.kind("item"), strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}


def test_a_run_above_a_bound_is_invalid_says_why_and_ends_with_code_1(tmp_path: Path) -> None:
    folder = place(tmp_path, generation_kwargs={"until": ["never"], "max_gen_toks": 2, "do_sample": False}, count=6)
    found = document(folder, code=1)
    assert any("100.0 % of the answers were cut off" in line for line in found["invalid"])
    scores, answers = found["tables"]
    assert {row["delta_score"] for row in scores} == {"invalid"}
    assert all(row["verdict"].startswith("invalid: ") for row in answers)


def test_the_first_model_is_gone_before_the_second_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = place(tmp_path, CHOICE, count=2)
    monkeypatch.chdir(folder)
    alive: list[Any] = []
    counts = []
    load_model = loading.load_model

    def counting(*arguments: Any) -> Any:
        gc.collect()
        counts.append(sum(reference() is not None for reference in alive))
        model = load_model(*arguments)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(torch_engine, "load_model", counting)
    assert main(["tasks", "--suite", "suite.toml"]) == 0
    assert counts == [0, 0]
    assert "variant" in capsys.readouterr().out


def test_a_limited_run_is_never_reported(tmp_path: Path) -> None:
    folder = place(tmp_path, CHOICE, count=6)
    record = store.read(folder / document(folder, "--variant", "source", "--limit", "2")["records"]["lists"]["source"])
    assert len(record.kind("item")) == 2
    assert not record.whole
    assert record.end.coverage["expected"] - record.end.coverage["done"] == 4


@pytest.mark.parametrize(
    ("change", "arguments", "says"),
    [
        (("./lists.yaml", "gsm8kk"), (), "no task 'gsm8kk'"),
        (("./lists.yaml", "demo:recal"), (), "Did you mean 'recall'"),
        (("", ""), ("--task", "list"), "Did you mean 'lists'"),
        (("[tasks.lists]", "[variants.b]\nrecipe = 'rtn-a16'\n[other]"), (), "unknown key 'other'"),
    ],
)
def test_bad_input_is_one_sentence_a_remedy_and_nothing_written(
    change: tuple[str, str],
    arguments: Sequence[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = place(tmp_path, suite=SUITE.replace(*change) if change[0] else SUITE)
    monkeypatch.chdir(folder)
    assert main(["tasks", "--suite", "suite.toml", *arguments]) == 2
    complaint = capsys.readouterr().err
    assert says in complaint
    assert len(complaint.strip().splitlines()) == 2
    assert not (folder / "results").exists()
    assert not (folder / "artifacts").exists()


def test_a_suite_without_tasks_says_so(tmp_path: Path) -> None:
    folder = place(tmp_path, suite=SUITE.partition("[tasks")[0])
    done = subprocess.run(command(folder), cwd=folder, capture_output=True, text=True)
    assert (done.returncode, "no [tasks.NAME] table" in done.stderr) == (2, True)


def filled_cache(home: Path) -> None:
    """What `datasets.load_dataset("openai/gsm8k", "main")` leaves behind, with questions made here."""
    folder = home / "datasets/openai___gsm8k/main/0.0.0" / COMMIT
    folder.mkdir(parents=True)
    questions = [
        {"question": f"A jar has {n} beans and loses {n // 3}. How many are left?", "answer": f"#### {n - n // 3}"}
        for n in range(10, 22)
    ]
    features = datasets.Dataset.from_list(questions).features
    info = datasets.DatasetInfo(
        features=features, builder_name="parquet", dataset_name="gsm8k", config_name="main", version="0.0.0", splits={}
    )
    for name in ("train", "test"):
        writer = ArrowWriter(path=str(folder / f"gsm8k-{name}.arrow"), features=features)
        for question in questions:
            writer.write(question)
        num_examples, num_bytes = writer.finalize()
        info.splits[name] = datasets.SplitInfo(name, num_bytes, num_examples, dataset_name="gsm8k")
    info.write_to_directory(str(folder))


COMMIT = "0123456789" * 4


def test_a_task_of_lm_evals_own_runs_from_a_filled_cache_and_its_versions_are_recorded(tmp_path: Path) -> None:
    filled_cache(tmp_path / "home")
    suite = SUITE.replace("./lists.yaml", "gsm8k") + "version = 3.0\nnum_fewshot = 1\nlimit = 3\nmax_new_tokens = 8\n"
    folder = place(tmp_path, suite=suite)
    done = subprocess.run(
        command(folder, "--variant", "source"),
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 1, done.stderr  # the embedded model cannot solve it, and the audit says so
    assert "is invalid" in done.stderr
    (path,) = folder.glob("results/*/*.jsonl")
    record = store.read(path)
    assert record.run.dataset is not None
    about = record.run.dataset["tasks"]["gsm8k"]
    assert (about["version"], about["dataset"], about["dataset_revision"]) == (3.0, "openai/gsm8k", COMMIT)
    assert [item["doc_id"] for item in record.kind("item")] == [0, 1, 2]
    assert {one["metric"] for one in record.kind("result")} == {
        "exact_match,strict-match",
        "exact_match,flexible-extract",
    }
    assert record.whole
