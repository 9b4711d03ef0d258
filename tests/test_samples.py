"""A calibration set is the same tokens everywhere, says which they are, and is refused in words where it cannot be."""

import csv
import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from harness.demo import checkpoint_path, corpus
from harness.errors import UserError
from harness.quantize.samples import CalibrationSet, read_samples, shuffled
from harness.suite.texts import Calibration, DatasetSamples, DemoSamples, FileSamples, Samples

DENSE = checkpoint_path("dense")
WORDS = ["", "one two three", "four five", "   ", "six", "seven eight nine ten", "eleven"]
CHATS = [
    [{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": word * 3}] for word in ("a", "b", "c")
]


def documents() -> str:
    return corpus.split_text("train", num_documents=40)


def taken(*sources: Samples, folder: Path = Path(), tokenizer: Path = DENSE) -> CalibrationSet:
    return read_samples(Calibration(sources), tokenizer, folder, {"train": documents}, lambda *_: None)


def refusal(*sources: Samples, folder: Path = Path(), tokenizer: Path = DENSE) -> UserError:
    with pytest.raises(UserError) as caught:
        taken(*sources, folder=folder, tokenizer=tokenizer)
    return caught.value


@pytest.fixture(scope="module")
def encode() -> Callable[[str], tuple[int, ...]]:
    tokenizer = Tokenizer.from_file(str(DENSE / "tokenizer.json"))
    return lambda text: tuple(tokenizer.encode(text, add_special_tokens=False).ids)


def write_jsonl(folder: Path, rows: list[Any], name: str = "rows.jsonl") -> Path:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_csv(folder: Path, rows: list[dict[str, Any]], name: str = "rows.csv") -> Path:
    with (folder / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder


# --- which rows


@given(st.integers(0, 300), st.integers(0, 2**40))
def test_shuffled_is_a_permutation(count: int, seed: int) -> None:
    assert sorted(shuffled(count, seed)) == list(range(count))


@given(st.integers(1, 60), st.integers(0, 99))
def test_shuffled_is_the_textbook_shuffle(count: int, seed: int) -> None:
    import random

    below_one = random.Random(seed).random
    array = list(range(count))
    for position in range(count):
        other = position + int(below_one() * (count - position))
        array[position], array[other] = array[other], array[position]
    assert list(shuffled(count, seed)) == array


def test_the_order_is_fixed_for_ever() -> None:
    """These numbers are in the manifests of published artifacts: a change of them is a change of every build."""
    order = shuffled(207_865, 0)
    assert [next(order) for _ in range(6)] == [175525, 157552, 87423, 53821, 106278, 84174]
    assert list(shuffled(8, 1)) == [1, 6, 0, 4, 5, 2, 7, 3]


def test_rows_are_the_first_usable_ones_of_the_shuffle(
    tmp_path: Path, encode: Callable[[str], tuple[int, ...]]
) -> None:
    write_jsonl(tmp_path, [{"text": words} for words in WORDS])
    found = taken(FileSamples(path="rows.jsonl", samples=4, max_tokens=50, column="text", seed=3), folder=tmp_path)
    expected = [index for index in shuffled(len(WORDS), 3) if WORDS[index].strip()][:4]
    assert found.samples == tuple(encode(WORDS[index]) for index in expected)
    assert found.manifest["sources"][0]["row_indexes"] == expected


def test_another_seed_takes_other_rows_and_no_row_comes_twice(tmp_path: Path) -> None:
    write_jsonl(tmp_path, [{"text": f"row number {n}"} for n in range(100)])
    chosen = [
        taken(
            FileSamples(path="rows.jsonl", samples=20, max_tokens=50, column="text", seed=seed), folder=tmp_path
        ).manifest["sources"][0]["row_indexes"]
        for seed in (0, 1)
    ]
    assert chosen[0] != chosen[1]
    assert [len(set(indexes)) for indexes in chosen] == [20, 20]


def test_a_sample_is_cut_and_one_of_a_single_token_is_passed_over(
    tmp_path: Path, encode: Callable[[str], tuple[int, ...]]
) -> None:
    long = "the quick brown fox jumps " * 20
    assert len(encode("a")) == 1
    write_jsonl(tmp_path, [{"text": "a"}, {"text": long}])
    source = FileSamples(path="rows.jsonl", samples=1, max_tokens=7, column="text")
    assert taken(source, folder=tmp_path).samples == (encode(long)[:7],)
    problem = refusal(FileSamples(path="rows.jsonl", samples=2, max_tokens=7, column="text"), folder=tmp_path).problem
    assert problem == "rows.jsonl has 1 usable samples in 2 rows, and the calibration asks for 2."


# --- every kind of source


def test_every_kind_of_file_gives_the_same_samples(tmp_path: Path) -> None:
    rows = [{"text": f'line {n},\nits "second" line \u2028 {n}', "n": str(n)} for n in range(9)]
    write_jsonl(tmp_path, rows)
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1))
    write_csv(tmp_path, rows)
    pd.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "hub").mkdir()
    pd.DataFrame(rows).to_parquet(tmp_path / "hub/train-0.parquet")
    sets = [
        taken(FileSamples(path=f"rows.{kind}", samples=5, max_tokens=99, column="text"), folder=tmp_path)
        for kind in ("jsonl", "json", "csv", "parquet")
    ]
    sets.append(taken(DatasetSamples(dataset=str(tmp_path / "hub"), samples=5, max_tokens=99, column="text")))
    assert len({found.digest for found in sets}) == 1
    assert len({tuple(found.manifest["sources"][0]["row_indexes"]) for found in sets}) == 1


def test_chats_go_through_the_template_of_the_model(tmp_path: Path) -> None:
    by_transformers = AutoTokenizer.from_pretrained(DENSE)
    write_jsonl(tmp_path, [{"chat": chat, "id": 1} for chat in CHATS])
    pq.write_table(pa.Table.from_pylist([{"chat": chat} for chat in CHATS]), tmp_path / "rows.parquet")
    order = list(shuffled(3, 0))
    expected = tuple(tuple(by_transformers.apply_chat_template(CHATS[i])["input_ids"]) for i in order)
    for name in ("rows.jsonl", "rows.parquet"):
        found = taken(FileSamples(path=name, samples=3, max_tokens=500, messages="chat"), folder=tmp_path)
        assert found.samples == expected


def test_a_question_and_an_answer_make_the_chat_that_they_would_be(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"instruction": "Say hello.", "input": "", "output": "hello"},
        {"instruction": "Greet.", "input": None, "output": "good day"},
    ]
    asked = ["Add.\n\n1 and 2", "Say hello.", "Greet."]
    chats = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
        for question, row in zip(asked, rows, strict=True)
    ]
    write_jsonl(tmp_path, rows)
    write_jsonl(tmp_path, [{"m": chat} for chat in chats], "chats.jsonl")
    pairs = FileSamples(path="rows.jsonl", samples=3, max_tokens=99, user=("instruction", "input"), assistant="output")
    whole = FileSamples(path="chats.jsonl", samples=3, max_tokens=99, messages="m")
    assert taken(pairs, folder=tmp_path).samples == taken(whole, folder=tmp_path).samples


def test_a_row_without_a_question_an_answer_or_messages_is_empty(tmp_path: Path) -> None:
    rows = [{"q": "", "a": "x"}, {"q": "x", "a": " "}, {"a": "x"}, {"q": "who", "a": "me"}]
    write_jsonl(tmp_path, rows)
    found = taken(FileSamples(path="rows.jsonl", samples=1, max_tokens=99, user=("q",), assistant="a"), folder=tmp_path)
    assert found.manifest["sources"][0]["row_indexes"] == [3]
    write_jsonl(tmp_path, [{"m": []}, {"m": None}, {"m": [{"role": "user", "content": " "}]}, {"m": CHATS[0]}])
    found = taken(FileSamples(path="rows.jsonl", samples=1, max_tokens=99, messages="m"), folder=tmp_path)
    assert found.manifest["sources"][0]["row_indexes"] == [3]


def test_fields_that_a_table_fills_up_with_nulls_do_not_reach_the_template(tmp_path: Path) -> None:
    filled = [[message | {"reasoning_content": None, "tool_calls": None} for message in chat] for chat in CHATS]
    write_jsonl(tmp_path, [{"m": chat} for chat in CHATS], "plain.jsonl")
    write_jsonl(tmp_path, [{"m": chat} for chat in filled], "filled.jsonl")
    plain, nulls = (
        taken(FileSamples(path=name, samples=3, max_tokens=99, messages="m"), folder=tmp_path)
        for name in ("plain.jsonl", "filled.jsonl")
    )
    assert plain.digest == nulls.digest


def test_the_embedded_corpus_is_cut_into_windows(encode: Callable[[str], tuple[int, ...]]) -> None:
    found = taken(DemoSamples(demo="train", samples=4, max_tokens=32, seed=5))
    ids = encode(documents())
    indexes = found.manifest["sources"][0]["row_indexes"]
    assert indexes == list(shuffled(-(-len(ids) // 32), 5))[:4]
    assert found.samples == tuple(ids[index * 32 : index * 32 + 32] for index in indexes)


def test_a_text_file_is_cut_into_windows_that_together_are_the_text(
    tmp_path: Path, encode: Callable[[str], tuple[int, ...]]
) -> None:
    text = "sum of parts\r\n" * 31
    (tmp_path / "a.txt").write_bytes(text.encode())
    ids = encode(text)
    count = -(-len(ids) // 10)
    assert len(ids) % 10 >= 2  # the last window is short, and long enough
    found = taken(FileSamples(path="a.txt", samples=count, max_tokens=10), folder=tmp_path)
    parts = dict(zip(found.manifest["sources"][0]["row_indexes"], found.samples, strict=True))
    assert sum((parts[index] for index in range(count)), ()) == ids


def test_an_absolute_path_and_one_from_the_home_folder_stand_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(tmp_path, [{"t": "some words"}])
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in (str(tmp_path / "rows.jsonl"), "~/rows.jsonl"):
        source = FileSamples(path=path, samples=1, max_tokens=9, column="t")
        assert taken(source, folder=Path("/elsewhere")).manifest["sources"][0]["name"] == path


@pytest.fixture
def cached_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A dataset as the library leaves it in its cache after a download, and no network."""
    rows = datasets.Dataset.from_dict({"question": [f"what is {n}" for n in range(6)], "answer": list("abcdef")})
    folder = tmp_path / "cache/some-lab___sums/main/0.0.0" / ("ab" * 20)
    folder.mkdir(parents=True)
    rows.save_to_disk(str(tmp_path / "saved"))
    shutil.copy(tmp_path / "saved/data-00000-of-00001.arrow", folder / "sums-train.arrow")
    splits = {"train": {"name": "train", "num_bytes": 1, "num_examples": 6, "dataset_name": "sums"}}
    features = {name: {"dtype": "string", "_type": "Value"} for name in ("question", "answer")}
    info = {"features": features, "splits": splits, "dataset_name": "sums", "config_name": "main", "builder_name": "x"}
    info["version"] = {"version_str": "0.0.0", "major": 0, "minor": 0, "patch": 0}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return "some-lab/sums"


def test_a_hub_dataset_is_read_from_the_cache_and_its_commit_is_known(cached_dataset: str) -> None:
    source = DatasetSamples(
        dataset=cached_dataset, config="main", samples=3, max_tokens=99, user=("question",), assistant="answer"
    )
    entry = taken(source).manifest["sources"][0]
    assert (entry["name"], entry["revision"]) == ("some-lab/sums/main/train", "ab" * 20)
    assert (entry["num_rows"], entry["row_indexes"]) == (6, list(shuffled(6, 0))[:3])


def test_a_cache_that_holds_another_commit_than_the_suite_names_is_refused(cached_dataset: str) -> None:
    def source(revision: str) -> DatasetSamples:
        return DatasetSamples(
            dataset=cached_dataset, config="main", samples=1, max_tokens=9, column="answer", revision=revision
        )

    error = refusal(source("cd" * 20))
    assert "ab" * 20 in error.problem and "cd" * 20 in error.problem


def test_an_absent_dataset_says_how_to_fetch_it(cached_dataset: str) -> None:
    source = DatasetSamples(
        dataset="some-lab/absent", config="c", revision="v1", samples=1, max_tokens=9, column="text"
    )
    error = refusal(source)
    assert error.problem.endswith("is set, and the hub's cache lacks the dataset some-lab/absent.")
    assert "datasets.load_dataset('some-lab/absent', 'c', revision='v1')" in error.remedy


# --- what the set says of itself


def test_the_manifest_and_the_digests_can_be_recomputed_by_hand(tmp_path: Path) -> None:
    write_jsonl(tmp_path, [{"text": words} for words in WORDS])
    rows = FileSamples(path="rows.jsonl", samples=3, max_tokens=4, column="text", seed=1)
    found = taken(rows, DemoSamples(demo="train", samples=2, max_tokens=16), folder=tmp_path)
    manifest = found.manifest
    assert json.loads(json.dumps(manifest)) == manifest
    packed = [struct.pack(f"<{len(sample)}I", *sample) for sample in found.samples]
    whole = b"".join(struct.pack("<I", len(data) // 4) + data for data in packed)
    assert manifest["digest"] == found.digest == hashlib.sha256(whole).hexdigest()
    assert (manifest["num_samples"], manifest["num_tokens"]) == (5, found.num_tokens)
    assert found.num_tokens == sum(len(data) for data in packed) // 4
    first, second = manifest["sources"]
    assert first["sample_sha256"] + second["sample_sha256"] == [hashlib.sha256(data).hexdigest() for data in packed]
    assert first["file_sha256"] == hashlib.sha256((tmp_path / "rows.jsonl").read_bytes()).hexdigest()
    assert (first["source"]["seed"], first["source"]["max_tokens"], first["num_samples"]) == (1, 4, 3)
    assert (second["name"], second["revision"], second["file_sha256"]) == ("demo:train", None, None)


def test_the_same_set_read_from_another_folder_has_the_same_manifest(tmp_path: Path) -> None:
    manifests = []
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name, [{"t": "a word"}])
        source = FileSamples(path="rows.jsonl", samples=1, max_tokens=9, column="t")
        manifests.append(taken(source, folder=tmp_path / name).manifest)
    assert manifests[0] == manifests[1]
    assert str(tmp_path) not in json.dumps(manifests)


def test_the_digest_knows_where_a_sample_ends() -> None:
    assert CalibrationSet(((1, 2), (3, 4)), {}).digest != CalibrationSet(((1, 2, 3), (4,)), {}).digest
    assert CalibrationSet(((1, 2), (3, 4)), {}).digest != CalibrationSet(((3, 4), (1, 2)), {}).digest


def test_progress_starts_at_none_and_ends_at_all() -> None:
    told: list[tuple[int, int]] = []
    sources = (DemoSamples(demo="train", samples=3, max_tokens=8), DemoSamples(demo="train", samples=2, max_tokens=9))
    read_samples(
        Calibration(sources), DENSE, Path(), {"train": documents}, lambda done, total, *_: told.append((done, total))
    )
    assert told == [(n, 5) for n in range(6)]


def test_settings_left_in_a_tokenizer_neither_cut_nor_fill_up(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(DENSE / "tokenizer.json"))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    source = DemoSamples(demo="train", samples=2, max_tokens=32)
    assert taken(source, tokenizer=tmp_path).digest == taken(source).digest


# --- what is refused


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.jsonl", b'{"text": "x y"}\n{"text": \n', "a.jsonl, line 2, is not JSON: Expecting value at column 10"),
        ("a.jsonl", b'{"text": "x y"}\n\n[1]\n', "a.jsonl, line 3, is no JSON object"),
        ("a.jsonl", b'{"text": "\xff"}\n', "a.jsonl, line 1, is not UTF-8 (byte 10)"),
        ("a.jsonl", b'{"text": 7}\n', "a.jsonl, line 1: column 'text' holds int 7, not text"),
        ("a.jsonl", b"", "a.jsonl has no rows"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl, line 1, cannot be read as JSON: "),
        ("a.jsonl", b'{"text": ' + b"1" * 9999 + b"}", "a.jsonl, line 1, cannot be read as JSON: "),
        ("a.jsonl", b'{"text": "x \\ud800 y"}', "a.jsonl, line 1: the text holds half of a UTF-16 pair"),
        ("a.json", b'{"text": "x y"}\n{"text": "z"}\n', "a.json is not JSON: Extra data at line 2, column 1"),
        ("a.json", b'{"text": "x y"}', "a.json is no list of objects"),
        ("a.json", b'[{"text": "x"}, 3]', "a.json, row 1, is no JSON object"),
        ("a.json", b"[]", "a.json has no rows"),
        ("a.csv", b'text,n\nx y,1\n"a,b",2,3\n', "a.csv, line 3, has 3 cells under 2 column names"),
        ("a.csv", b'text\n"never closed\n', "a.csv, line 2, is not CSV"),
        ("a.csv", b"text\n\xff\n", "a.csv is not UTF-8 (byte 5)"),
        ("a.csv", b"", "a.csv has no rows"),
        ("a.parquet", b"PAR1 and then nothing", "a.parquet is no sound Parquet file"),
        ("a.parquet", b"PAR1" + bytes(100) + b"\x20\0\0\0PAR1", "a.parquet is no sound Parquet file"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_refused_with_the_place(
    tmp_path: Path, name: str, data: bytes, says: str
) -> None:
    (tmp_path / name).write_bytes(data)
    error = refusal(FileSamples(path=name, samples=1, max_tokens=9, column="text"), folder=tmp_path)
    assert error.problem.startswith(says)


def test_json_lines_in_a_json_file_are_answered_with_the_right_name(tmp_path: Path) -> None:
    write_jsonl(tmp_path, [{"text": "x"}, {"text": "y"}], "rows.json")
    error = refusal(FileSamples(path="rows.json", samples=1, max_tokens=9, column="text"), folder=tmp_path)
    assert ".jsonl" in error.remedy


@pytest.mark.parametrize("name", ["gone.jsonl", "gone.parquet", "gone.txt"])
def test_a_missing_file_is_named_with_where_it_was_looked_for(tmp_path: Path, name: str) -> None:
    column = None if name.endswith("txt") else "text"
    error = refusal(FileSamples(path=name, samples=1, max_tokens=9, column=column), folder=tmp_path)
    assert f"{tmp_path / name} cannot be read: No such file" in error.problem


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "dataset"])
def test_a_misspelt_column_is_answered_with_the_nearest(tmp_path: Path, kind: str) -> None:
    rows = [{"question": "who", "answer": "me"}]
    write_jsonl(tmp_path, rows)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    write_csv(tmp_path, rows)
    (tmp_path / "hub").mkdir()
    for path in ("rows.parquet", "hub/train-0.parquet"):
        pd.DataFrame(rows).to_parquet(tmp_path / path)
    if kind == "dataset":
        hub = str(tmp_path / "hub")
        error = refusal(DatasetSamples(dataset=hub, samples=1, max_tokens=9, user=("questoin",), assistant="answer"))
    else:
        source = FileSamples(path=f"rows.{kind}", samples=1, max_tokens=9, user=("questoin",), assistant="answer")
        error = refusal(source, folder=tmp_path)
    assert error.problem.endswith("has no column 'questoin'.")
    assert error.remedy == "Did you mean 'question'? Known: answer, question."


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ("hello", "column 'm' holds no list of messages but 'hello'"),
        ({"role": "user", "content": "x"}, "column 'm' holds no list of messages but {'role'"),
        (["hello"], "m[0] is no message but 'hello'"),
        ([CHATS[0][0], {"from": "gpt", "value": "x"}], "m[1] has no role"),
        ([{"role": "user"}], "m[0] has no content"),
        ([{"role": "user", "content": None}], "m[0] has the content None"),
        ([{"role": 1, "content": "x"}], "m[0] has the role 1"),
    ],
)
def test_messages_of_the_wrong_shape_are_named_with_their_row(tmp_path: Path, messages: Any, says: str) -> None:
    write_jsonl(tmp_path, [{"m": None}, {"m": messages}])
    error = refusal(FileSamples(path="rows.jsonl", samples=1, max_tokens=9, messages="m"), folder=tmp_path)
    assert error.problem.startswith(f"rows.jsonl, line 2: {says}")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (DemoSamples(demo="train", samples=9999, max_tokens=64), r"demo:train has \d+ usable samples in \d+ windows"),
        (FileSamples(path="rows.jsonl", samples=9, max_tokens=9, column="text"), "5 usable samples in 7 rows"),
        (FileSamples(path="blank.jsonl", samples=1, max_tokens=9, column="text"), "0 usable samples in 1 rows"),
        (FileSamples(path="empty.txt", samples=1, max_tokens=9), "0 usable samples in 0 windows of 9 tokens"),
    ],
)
def test_too_few_samples_are_an_error_with_the_counts(tmp_path: Path, source: Samples, says: str) -> None:
    write_jsonl(tmp_path, [{"text": words} for words in WORDS])
    write_jsonl(tmp_path, [{"text": " "}], "blank.jsonl")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match=says):
        taken(source, folder=tmp_path)


def test_an_unknown_part_of_the_corpus_is_answered_with_the_nearest() -> None:
    error = refusal(DemoSamples(demo="trian", samples=1, max_tokens=9))
    assert "no text 'trian'" in error.problem and "Did you mean 'train'?" in error.remedy


def test_a_folder_without_a_tokenizer_or_with_a_broken_one_is_named(tmp_path: Path) -> None:
    source = DemoSamples(demo="train", samples=1, max_tokens=9)
    assert f"{tmp_path} has no tokenizer.json" in refusal(source, tokenizer=tmp_path).problem
    (tmp_path / "tokenizer.json").write_text("{}")
    assert f"{tmp_path / 'tokenizer.json'} is not a tokenizer" in refusal(source, tokenizer=tmp_path).problem


@pytest.fixture
def without_template(tmp_path: Path) -> Path:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(DENSE / name, folder)
    return folder


def test_a_tokenizer_without_a_chat_template_is_refused_before_any_file_is_opened(without_template: Path) -> None:
    chats = FileSamples(path="gone.jsonl", samples=1, max_tokens=9, messages="m")
    error = refusal(chats, tokenizer=without_template)
    assert f"{without_template} has no chat template" in error.problem and "chat_template.jinja" in error.remedy
    text = DemoSamples(demo="train", samples=1, max_tokens=9)
    assert taken(text, tokenizer=without_template).samples == taken(text).samples


def test_a_chat_that_the_template_refuses_is_named_with_its_row(tmp_path: Path, without_template: Path) -> None:
    (without_template / "chat_template.jinja").write_text("{{ raise_exception('Roles must alternate.\nReally.') }}")
    write_jsonl(tmp_path, [{"m": CHATS[0]}])
    source = FileSamples(path="rows.jsonl", samples=1, max_tokens=9, messages="m")
    problem = refusal(source, folder=tmp_path, tokenizer=without_template).problem
    assert problem == "rows.jsonl, line 1: the chat template refuses the messages: Roles must alternate."


@given(rows=st.lists(st.text(st.characters(codec="utf-8"), max_size=40), max_size=6), seed=st.integers(0, 9))
def test_whatever_text_a_row_holds_comes_through_every_format_alike(
    tmp_path_factory: pytest.TempPathFactory, rows: list[str], seed: int
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    records = [{"text": text} for text in [*rows, "at least this"]]
    write_jsonl(folder, records)
    (folder / "rows.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(records), folder / "rows.parquet")
    digests = {
        taken(
            FileSamples(path=f"rows.{kind}", samples=1, max_tokens=64, column="text", seed=seed), folder=folder
        ).digest
        for kind in ("jsonl", "json", "parquet")
    }
    assert len(digests) == 1


@given(
    kind=st.sampled_from(["jsonl", "json", "csv", "parquet", "txt"]),
    data=st.one_of(
        st.binary(max_size=60),
        st.text(st.sampled_from('[]{}",:\\ \r\n\0mtex1du'), max_size=60).map(str.encode),
        st.lists(st.sampled_from(['{"m":', '"text":', "[", "]", "{", "}", '"x y"', ",", "\n", "null", "text"])).map(
            lambda parts: "".join(parts).encode()
        ),
    ),
    messages=st.booleans(),
)
def test_whatever_a_file_holds_it_is_read_or_refused_in_words(
    tmp_path_factory: pytest.TempPathFactory, kind: str, data: bytes, messages: bool
) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / f"a.{kind}").write_bytes(data)
    how = {} if kind == "txt" else {"messages": "m"} if messages else {"column": "text"}
    try:
        found = taken(FileSamples(path=f"a.{kind}", samples=1, max_tokens=8, **how), folder=folder)
    except UserError:
        return
    assert len(found.samples) == 1 and 2 <= found.num_tokens <= 8
