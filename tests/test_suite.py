"""A suite file means what it says, or is refused with the place and the remedy."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import UserError
from harness.suite import Bench, DatasetText, DemoText, Engine, FileText, Source, load

MINIMAL = """
name = "demo"
title = "A demo"
[source]
location = "demo:dense"
[variants.nvfp4a16]
recipe = "rtn-a16"
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "suite.toml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(tmp_path: Path, text: str) -> UserError:
    path = written(tmp_path, text)
    with pytest.raises(UserError) as caught:
        load(path)
    assert str(path) in caught.value.problem
    return caught.value


def test_the_minimal_suite_gets_every_default(tmp_path: Path) -> None:
    suite = load(written(tmp_path, MINIMAL))
    assert (suite.name, suite.source, suite.engine) == ("demo", Source("demo:dense"), Engine())
    assert (suite.ppl, suite.bench, suite.folder) == (None, None, tmp_path)


def test_every_key_is_read(tmp_path: Path) -> None:
    text = MINIMAL + (
        '[engine]\nname = "vllm"\ndtype = "float32"\ndevice = "cuda"\n'
        '[ppl]\nprotocol = "gptq-2048"\nbatch_size = 3\ntext = { path = "wiki.txt" }\n'
        '[bench]\ntext = { dataset = "Salesforce/wikitext", config = "c", split = "s", column = "x", revision = "r" }\n'
        "prompt_tokens = 7\nnew_tokens = 8\nbatch_sizes = [1, 9]\n"
        "prefill_tokens = 10\nrepetitions = 11\nwarmups = 0\nstarts = 12\n"
    )
    suite = load(written(tmp_path, text))
    assert suite.engine == Engine("vllm", "float32", "cuda")
    assert suite.ppl is not None and suite.ppl.text == FileText("wiki.txt")
    dataset = DatasetText("Salesforce/wikitext", "c", "s", "x", "r")
    assert suite.bench == Bench(dataset, 7, 8, (1, 9), 10, 11, 0, 12)


def test_the_resolved_suite_is_json_with_every_default_and_no_place_of_this_machine(tmp_path: Path) -> None:
    suite = load(written(tmp_path, MINIMAL + '[bench]\ntext = { demo = "heldout" }\n'))
    resolved = suite.resolved()
    assert json.loads(json.dumps(resolved)) == resolved
    assert resolved["bench"]["batch_sizes"] == [1, 2, 4]
    assert resolved["engine"] == {"name": "torch", "dtype": "bfloat16", "device": "auto"}
    assert resolved["ppl"] is None
    assert str(tmp_path) not in json.dumps(resolved)


def test_the_digest_is_that_of_canonical_json(tmp_path: Path) -> None:
    suite = load(written(tmp_path, MINIMAL))
    canonical = json.dumps(suite.resolved(), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert suite.digest == hashlib.sha256(canonical.encode()).hexdigest()


def test_writing_a_default_out_does_not_change_the_digest(tmp_path: Path) -> None:
    plain = load(written(tmp_path, MINIMAL)).digest
    assert load(written(tmp_path, MINIMAL + '[engine]\ndtype = "bfloat16"\n')).digest == plain
    assert load(written(tmp_path, MINIMAL + '[engine]\ndtype = "float32"\n')).digest != plain


def test_a_relative_path_starts_at_the_suite(tmp_path: Path) -> None:
    suite = load(written(tmp_path, MINIMAL.replace("demo:dense", "./models/dense")))
    assert suite.source_location() == str(tmp_path / "models/dense")
    assert suite.path("wiki.txt") == tmp_path / "wiki.txt"
    assert suite.path("/data/wiki.txt") == Path("/data/wiki.txt")


@pytest.mark.parametrize("location", ["demo:dense", "Qwen/Qwen3.5-9B"])
def test_a_location_that_is_not_written_as_a_folder_stays_as_it_is(tmp_path: Path, location: str) -> None:
    (tmp_path / location).mkdir(parents=True)
    assert load(written(tmp_path, MINIMAL.replace("demo:dense", location))).source_location() == location


@pytest.mark.parametrize(
    ("added", "dotted", "near"),
    [
        ("[engin]\n", "engin", "engine"),
        ('[engine]\ndtpye = "x"\n', "engine.dtpye", "dtype"),
        ('[bench]\ntext = { demo = "x" }\nwarmup = 1\n', "bench.warmup", "warmups"),
        ('[ppl]\nprotocol = "x"\ntext = { dataset = "x", splitt = "y" }\n', "ppl.text.splitt", "split"),
        ('[variants.b]\nrecipe = "x"\nrecipee = "y"\n', "variants.b.recipee", "recipe"),
    ],
)
def test_an_unknown_key_is_named_with_its_table_and_the_nearest_known_one(
    tmp_path: Path, added: str, dotted: str, near: str
) -> None:
    error = refusal(tmp_path, MINIMAL + added)
    assert f"unknown key '{dotted}'" in error.problem
    assert f"Did you mean '{near}'?" in error.remedy


def test_the_suites_own_folder_is_not_a_key(tmp_path: Path) -> None:
    assert "unknown key 'folder'" in refusal(tmp_path, 'folder = "x"\n' + MINIMAL).problem


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (MINIMAL.replace('title = "A demo"', ""), "'title' is missing"),
        (MINIMAL.replace('location = "demo:dense"', ""), "'source.location' is missing"),
        (MINIMAL + '[ppl]\ntext = { demo = "x" }\n', "'ppl.protocol' is missing"),
        (MINIMAL.replace('"A demo"', "3"), "'title' must be a string, not a whole number"),
        (MINIMAL.replace('"A demo"', '""'), "'title' must not be empty"),
        ('engine = "torch"\n' + MINIMAL, "'engine' must be a table, not a string"),
        (
            MINIMAL + '[bench]\ntext = { demo = "x" }\nstarts = true\n',
            "'bench.starts' must be a whole number, not true",
        ),
        (MINIMAL + '[bench]\ntext = { demo = "x" }\nstarts = 0\n', "'bench.starts' must be at least 1, not 0"),
        (MINIMAL + '[bench]\ntext = { demo = "x" }\nbatch_sizes = 1\n', "'bench.batch_sizes' must be a list"),
        (MINIMAL + '[bench]\ntext = { demo = "x" }\nbatch_sizes = []\n', "at least one value"),
        (MINIMAL + '[bench]\ntext = { demo = "x" }\nbatch_sizes = [1, 1]\n', "none twice"),
        (
            MINIMAL + '[bench]\ntext = { demo = "x" }\nbatch_sizes = [1, "2"]\n',
            "'bench.batch_sizes[1]' must be a whole",
        ),
        (MINIMAL + '[bench]\ntext = { demo = "x" }\nbatch_sizes = [4, 0]\n', "must be at least 1, not 0"),
        (MINIMAL + '[bench]\ntext = { demo = "x", path = "y" }\n', "exactly one of the keys demo, path, dataset"),
        (MINIMAL + "[bench]\ntext = {}\n", "and has none of them"),
        (MINIMAL + '[bench]\ntext = "x"\n', "'bench.text' must be a table"),
        (MINIMAL.replace('"demo"', '"De mo"'), "'name' must be a name of lower-case letters"),
        (MINIMAL.replace("variants.nvfp4a16", "variants.NVFP4"), "not 'NVFP4'"),
        (MINIMAL.replace("variants.nvfp4a16", 'variants."../x"'), "not '../x'"),
        (MINIMAL.replace("variants.nvfp4a16", "variants.source"), "always means the unquantized model"),
        (MINIMAL.replace('[variants.nvfp4a16]\nrecipe = "rtn-a16"', "[variants]"), "at least one variant"),
        (MINIMAL.replace('[variants.nvfp4a16]\nrecipe = "rtn-a16"', ""), "'variants' is missing"),
    ],
)
def test_a_wrong_value_is_refused_in_words(tmp_path: Path, text: str, says: str) -> None:
    assert says in refusal(tmp_path, text).problem


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (MINIMAL + "[engine\n", "line 8"),
        (MINIMAL + '[variants.nvfp4a16]\nrecipe = "x"\n', "line 8"),
        (MINIMAL + 'x = """never closed', "line 8, the end of the file"),
    ],
)
def test_a_syntax_error_names_its_line(tmp_path: Path, text: str, line: str) -> None:
    assert line in refusal(tmp_path, text).problem


def test_a_missing_file_and_a_file_that_is_no_text_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path / "absent.toml")
    path = tmp_path / "binary.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        load(path)


NAMES = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,8}", fullmatch=True).filter(lambda name: name != "source")
WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1)
TEXTS = st.one_of(
    WORDS.map(lambda word: {"demo": word}),
    WORDS.map(lambda word: {"path": word}),
    st.fixed_dictionaries({"dataset": WORDS}, optional={"config": WORDS, "split": WORDS, "revision": WORDS}),
)
COUNTS = st.integers(2, 10**6)
SUITES = st.fixed_dictionaries(
    {
        "name": NAMES,
        "title": WORDS,
        "source": st.fixed_dictionaries({"location": WORDS}, optional={"revision": WORDS, "license": WORDS}),
        "variants": st.dictionaries(NAMES, st.fixed_dictionaries({"recipe": WORDS}), min_size=1, max_size=3),
    },
    optional={
        "description": WORDS,
        "engine": st.fixed_dictionaries({}, optional={"name": WORDS, "dtype": WORDS, "device": WORDS}),
        "ppl": st.fixed_dictionaries({"protocol": WORDS, "text": TEXTS}, optional={"batch_size": COUNTS}),
        "bench": st.fixed_dictionaries(
            {"text": TEXTS},
            optional={"new_tokens": COUNTS, "batch_sizes": st.lists(COUNTS, min_size=1, unique=True)},
        ),
    },
)


def toml(value: Any) -> str:
    """A value as inline TOML. JSON's strings, numbers and lists are TOML's too, but for the character DEL."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(item)}" for key, item in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False)


def contains(whole: Any, part: Any) -> bool:
    """Every value of `part` stands in `whole` at the same place."""
    if isinstance(part, dict):
        return all(key in whole and contains(whole[key], value) for key, value in part.items())
    return bool(whole == part)


@given(SUITES)
def test_whatever_a_valid_file_says_is_in_the_resolved_suite(
    tmp_path_factory: pytest.TempPathFactory, document: dict[str, Any]
) -> None:
    text = "".join(f"{key} = {toml(value)}\n" for key, value in document.items())
    suite = load(written(tmp_path_factory.mktemp("suite"), text))
    assert contains(suite.resolved(), document)
    again = load(written(tmp_path_factory.mktemp("moved"), text))
    assert dataclasses.replace(again, folder=suite.folder) == suite and again.digest == suite.digest


@given(st.data())
def test_a_key_that_is_misspelt_anywhere_is_always_found(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    document = data.draw(SUITES)
    tables = [document, document["source"], *document["variants"].values()]
    tables += [document[key] for key in ("engine", "ppl", "bench") if key in document]
    data.draw(st.sampled_from(tables))["zzz"] = 1
    text = "".join(f"{key} = {toml(value)}\n" for key, value in document.items())
    with pytest.raises(UserError, match=r"unknown key '(.*\.)?zzz'"):
        load(written(tmp_path_factory.mktemp("suite"), text))


def test_the_demo_text_is_told_by_its_key(tmp_path: Path) -> None:
    suite = load(written(tmp_path, MINIMAL + '[ppl]\nprotocol = "x"\ntext = { demo = "heldout" }\n'))
    assert suite.ppl is not None and suite.ppl.text == DemoText("heldout")
