"""The embedded models' lm-eval tasks: documents with one right answer each, the same for everyone."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable
from itertools import permutations
from typing import Any

import pytest
from datasets import Dataset
from lm_eval.tasks import TaskManager

from harness.demo import checkpoint_path, corpus, language
from harness.demo.tasks import items
from harness.measure import tasks
from harness.measure.lm import Texts
from harness.suite.schema import Task

FOLDER = checkpoint_path().parent / "tasks"
FILES = {file.stem: file for file in sorted(FOLDER.glob("*.yaml"))}
CHOICES = ("demo_agreement", "demo_arithmetic_choice", "demo_recall_choice")
TASKS = (*CHOICES, "demo_arithmetic", "demo_arithmetic_chat", "demo_recall")
MAKERS: dict[str, Callable[..., dict[str, Dataset]]] = {
    name: getattr(items, name.removeprefix("demo_")) for name in TASKS
}


@pytest.fixture(scope="module")
def documents() -> dict[str, list[dict[str, Any]]]:
    return {name: MAKERS[name]()["test"].to_list() for name in TASKS}


@pytest.fixture(scope="module")
def loaded() -> dict[str, Any]:
    found: dict[str, Any] = TaskManager(include_path=str(FOLDER), include_defaults=False).load(list(TASKS))["tasks"]
    return found


def answer(document: dict[str, Any]) -> str:
    """The right one, without the space or line's end that it carries."""
    right = document["choices"][document["answer"]] if "choices" in document else document["answer"]
    return str(right).strip()


def test_every_file_is_a_task_of_its_own_name_and_none_was_forgotten(loaded: dict[str, Any]) -> None:
    assert set(FILES) == set(TASKS) == set(loaded)


def test_a_task_can_be_taken_by_its_file_alone(documents: dict[str, list[dict[str, Any]]]) -> None:
    for name, file in FILES.items():
        (task,) = TaskManager(include_defaults=False).load([str(file)])["tasks"].values()
        assert list(task.eval_docs) == documents[name]


def test_lm_eval_asks_what_the_document_says(
    loaded: dict[str, Any], documents: dict[str, list[dict[str, Any]]]
) -> None:
    for name, task in loaded.items():
        document = documents[name][0]
        context = task.fewshot_context(document, 0)
        requests = task.construct_requests(document, context, metadata=(name, 0, 1))
        if name in CHOICES:
            asked = [request.args for request in requests]
            assert asked == [(document["prompt"], choice) for choice in document["choices"]]
        else:
            assert requests.args[0] == document["prompt"]
            assert requests.args[1]["do_sample"] is False
        assert task.VERSION == 1.0


@pytest.mark.parametrize(
    ("name", "written", "taken"),
    [
        ("demo_recall", " gunbru", "gunbru"),
        ("demo_arithmetic", "46", "46"),
        ("demo_arithmetic", "46=4", "[invalid]"),
        ("demo_arithmetic", "", "[invalid]"),
        ("demo_arithmetic_chat", "12+34 is 46.", "46"),
        ("demo_arithmetic_chat", "It is late.", "[invalid]"),
    ],
)
def test_an_answer_is_taken_from_what_was_written_or_is_visibly_invalid(
    loaded: dict[str, Any], documents: dict[str, list[dict[str, Any]]], name: str, written: str, taken: str
) -> None:
    task = loaded[name]
    (answers,) = task._filters
    document = documents[name][0]
    (request,) = [task.construct_requests(document, document["prompt"], metadata=(name, 0, 1))]
    request.resps = [written]
    answers.apply([request])
    assert request.filtered_resps[answers.name] == taken
    assert task.process_results({**document, "answer": "46"}, [taken])["exact_match"] == (taken == "46")
    assert task.process_results({**document, "answer": "gunbru"}, [taken])["exact_match"] == (taken == "gunbru")


def test_the_documents_are_the_same_bytes_on_every_machine(documents: dict[str, list[dict[str, Any]]]) -> None:
    """Other documents are another version of the task: its figures cannot be compared with older ones."""
    assert {name: hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16] for name, found in documents.items()} == {
        "demo_agreement": "76547e30c91768de",
        "demo_arithmetic": "d58c061540d97915",
        "demo_arithmetic_chat": "d44d19dee356bda6",
        "demo_arithmetic_choice": "011adbb8c1f60694",
        "demo_recall": "5e362ecebcb1f182",
        "demo_recall_choice": "2f56278ce3641e73",
    }


def test_the_digests_of_the_tasks_are_those_of_the_committed_records() -> None:
    """They cover the source text of the functions that make the documents: a new docstring is another task."""
    texts = Texts(checkpoint_path())
    digests = {}
    for name, file in FILES.items():
        loaded = tasks.ready_task(tasks.take_task(name, Task(task=str(file)), file), texts, 2048, "torch")
        digests[name] = loaded.identity["task_digest"][:16]
    assert digests == {
        "demo_agreement": "1194c0289987c055",
        "demo_arithmetic": "073beb5f4723171e",
        "demo_arithmetic_chat": "9d7a0bebd6911736",
        "demo_arithmetic_choice": "ad3a968a92903a00",
        "demo_recall": "3d4bbaaee6295c95",
        "demo_recall_choice": "00ca1d7fe8f3b69c",
    }


def test_what_lm_eval_passes_changes_no_document(documents: dict[str, list[dict[str, Any]]]) -> None:
    for name, make in MAKERS.items():
        assert make(version=1.0, max_seq_lengths=[4096])["test"].to_list() == documents[name]


def test_no_document_appears_twice_and_no_prompt_in_two_tasks(documents: dict[str, list[dict[str, Any]]]) -> None:
    prompts = [document["prompt"] for found in documents.values() for document in found]
    assert len(set(prompts)) == len(prompts) == 5 * items.NUM_ITEMS + items.NUM_QUESTIONS


def test_no_prompt_ends_in_a_space_that_lm_eval_would_move(documents: dict[str, list[dict[str, Any]]]) -> None:
    assert all(document["prompt"] == document["prompt"].strip() for found in documents.values() for document in found)


@pytest.mark.parametrize("name", CHOICES)
def test_the_right_choice_is_there_once_in_any_place_and_no_choice_begins_another(
    documents: dict[str, list[dict[str, Any]]], name: str
) -> None:
    found = documents[name]
    num_choices = len(found[0]["choices"])
    for document in found:
        assert len(document["choices"]) == num_choices
        assert document["choices"].count(document["choices"][document["answer"]]) == 1
        assert not any(one.startswith(other) for one, other in permutations(document["choices"], 2))
    places = Counter(document["answer"] for document in found)
    assert set(places) == set(range(num_choices))
    assert min(places.values()) > len(found) / num_choices * 0.7


@pytest.mark.parametrize("name", ["demo_arithmetic", "demo_arithmetic_choice", "demo_arithmetic_chat"])
def test_the_answer_is_the_result_and_the_problem_is_held_out_of_training(
    documents: dict[str, list[dict[str, Any]]], name: str
) -> None:
    for document in documents[name]:
        last = document["prompt"].splitlines()[-1]
        problem = re.fullmatch(r"(?:What is )?(\d+)([+-])(\d+)[=?]", last)
        assert problem is not None
        a, sign, b = int(problem[1]), problem[2], int(problem[3])
        assert answer(document) == str(a + b if sign == "+" else a - b)
        assert corpus.belongs(a, b, sign, "heldout")
        assert not corpus.belongs(a, b, sign, "train")


def test_no_other_problem_stands_before_the_one_to_solve(documents: dict[str, list[dict[str, Any]]]) -> None:
    for name in ("demo_arithmetic", "demo_arithmetic_choice"):
        assert not any(re.search(r"\d", document["prompt"].rsplit("\n", 1)[0]) for document in documents[name])


@pytest.mark.parametrize("name", ["demo_recall", "demo_recall_choice"])
def test_the_answer_is_what_the_list_says_and_the_other_choices_are_in_it_too(
    documents: dict[str, list[dict[str, Any]]], name: str
) -> None:
    for document in documents[name]:
        *lines, last = document["prompt"].splitlines()
        pairs = [line.split(": ") for line in lines if ": " in line]
        listed = dict(pairs)
        assert len(listed) == len(pairs) == len({*listed.values()})
        assert answer(document) == listed[last.removesuffix(" ->")]
        assert all(listed[key] == value for key, value in (line.split(" -> ") for line in lines[len(pairs) :]))
        assert {choice.strip() for choice in document.get("choices", ())} <= {*listed.values()}


def test_the_verb_agrees_with_the_subject_and_every_noun_between_has_the_other_number(
    documents: dict[str, list[dict[str, Any]]],
) -> None:
    keys = language.lexicon(language.NEAR).nouns
    kinds: Counter[tuple[bool, int]] = Counter()
    for document in documents["demo_agreement"]:
        words = document["prompt"].rsplit(". ", 1)[1].lower().split()
        heads = [words[i + 1 :] for i, word in enumerate(words) if word == "the"]
        nouns = [next(word for word in head if word in keys or word.removesuffix("s") in keys) for head in heads]
        subject, *between = (noun not in keys for noun in nouns)
        assert set(between) == {not subject}
        stems = {choice[:-2] for choice in document["choices"]}
        assert len(stems) == 1
        assert answer(document).endswith("en" if subject else "es")
        kinds[subject, len(between)] += 1
    assert set(kinds) == {(plural, depth) for plural in (False, True) for depth in (2, 5, 6)}
    assert min(kinds.values()) >= items.NUM_ITEMS // 16


def test_the_documents_stay_in_memory() -> None:
    assert all(make()["test"].cache_files == [] for make in MAKERS.values())
