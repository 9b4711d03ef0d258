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
from harness.sampling import PRESETS
from harness.suite.load import load, load_calibration
from harness.suite.names import row_name, row_parts
from harness.suite.schema import Audit, Bench, Counts, EngineOptions, Perplexity, Source, Task, Variant
from harness.suite.texts import (
    ROW_FILES,
    Calibration,
    DatasetSamples,
    DatasetText,
    DemoSamples,
    DemoText,
    FileSamples,
    FileText,
)

MINIMAL = """
name = "demo"
title = "A demo"
[source]
location = "demo:dense"
[variants.nvfp4a16]
recipe = "rtn-a16"
"""


CALIBRATION = """
[calibration]
batch_tokens = 4096
hidden_memory_gb = 2
[[calibration.sources]]
demo = "train"
samples = 8
max_tokens = 64
[[calibration.sources]]
path = "rows.jsonl"
samples = 9
max_tokens = 65
seed = 7
messages = "chat"
[[calibration.sources]]
dataset = "openai/gsm8k"
config = "main"
revision = "abc"
samples = 10
max_tokens = 66
user = ["question"]
assistant = "answer"
"""


TASKS = """
[setups.mtp1]
speculative_tokens = 1
[tasks.gsm8k-thinking]
task = "gsm8k"
version = 3
revision = "abc"
num_fewshot = 0
limit = 50
chat = true
system = "Be brief."
thinking = true
preset = "thinking-general"
max_new_tokens = 4096
repeats = 3
seed = 7
max_length = 8192
batch_size = 4
setups = ["mtp1"]
unsafe_code = true
[tasks.facts]
task = "demo:agreement"
[tasks.mine]
task = "./my-task.yaml"
chat = true
thinking = false
[audit]
cap_hit_share = 0.1
unclosed_share = 0
empty_share = 1
extraction_failure_share = 0.3
token_inflation_ratio = 3
"""


def task(entries: str) -> str:
    """A suite with one task."""
    return f'{MINIMAL}[tasks.sums]\ntask = "demo:arithmetic"\n{entries}\n'


def ppl(entries: str) -> str:
    """A suite that measures perplexity."""
    return f'{MINIMAL}[ppl]\ntext = {{ demo = "heldout" }}\n{entries}\n'


def source(entry: str) -> str:
    """A suite with one calibration source."""
    return f"{MINIMAL}[calibration]\nsources = [{{ samples = 1, max_tokens = 9, {entry} }}]\n"


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
    assert (suite.name, suite.source, suite.engine) == ("demo", Source("demo:dense"), EngineOptions())
    assert (suite.ppl, suite.bench, suite.calibration, suite.folder) == (None, None, None, tmp_path)
    assert suite.variants["nvfp4a16"] == Variant("rtn-a16", scales=None, codes=None)


def test_every_key_is_read(tmp_path: Path) -> None:
    text = MINIMAL + (
        '[engine]\nname = "vllm"\ndtype = "float32"\ndevice = "cuda"\n'
        '[ppl]\nprotocols = ["gptq-2048", "lmeval-word"]\nbatch_size = 3\ntext = { path = "wiki.txt" }\n'
        "max_length = 4096\nexpected.gptq-2048 = { num_tokens = 5, num_scored = 4 }\n"
        '[bench]\ntext = { dataset = "Salesforce/wikitext", config = "c", split = "s", column = "x", revision = "r" }\n'
        "prompt_tokens = 7\nnew_tokens = 8\nbatch_sizes = [1, 9]\n"
        "prefill_tokens = 10\nrepetitions = 11\nwarmups = 0\nstarts = 12\n"
    )
    suite = load(written(tmp_path, text))
    assert suite.engine == EngineOptions("vllm", "float32", "cuda")
    expected = {"gptq-2048": Counts(num_tokens=5, num_scored=4)}
    assert suite.ppl == Perplexity(("gptq-2048", "lmeval-word"), FileText("wiki.txt"), 3, 4096, expected)
    dataset = DatasetText("Salesforce/wikitext", "c", "s", "x", "r")
    assert suite.bench == Bench(dataset, 7, 8, (1, 9), 10, 11, 0, 12)


def test_every_key_of_a_task_and_of_the_audit_is_read(tmp_path: Path) -> None:
    suite = load(written(tmp_path, MINIMAL + TASKS))
    assert list(suite.tasks.items()) == [
        (
            "gsm8k-thinking",
            Task(
                task="gsm8k",
                version=3.0,
                revision="abc",
                num_fewshot=0,
                limit=50,
                chat=True,
                system="Be brief.",
                thinking=True,
                preset="thinking-general",
                max_new_tokens=4096,
                repeats=3,
                seed=7,
                max_length=8192,
                batch_size=4,
                setups=("mtp1",),
                unsafe_code=True,
            ),
        ),
        ("facts", Task(task="demo:agreement")),
        ("mine", Task(task="./my-task.yaml", chat=True, thinking=False)),
    ]
    assert suite.audit == Audit(0.1, 0.0, 1.0, 0.3, 3.0)
    assert {one.name for one in dataclasses.fields(Task)} == set(suite.resolved()["tasks"]["facts"])


def test_a_suite_without_tasks_has_none_and_the_usual_bounds(tmp_path: Path) -> None:
    suite = load(written(tmp_path, MINIMAL))
    assert suite.tasks == {}
    assert suite.resolved()["audit"] == {
        "cap_hit_share": 0.05,
        "unclosed_share": 0.05,
        "empty_share": 0.05,
        "extraction_failure_share": 0.2,
        "token_inflation_ratio": 2.0,
    }


def test_what_a_task_leaves_out_is_lm_evals_or_the_models_to_say(tmp_path: Path) -> None:
    assert load(written(tmp_path, task(""))).resolved()["tasks"]["sums"] == {
        "task": "demo:arithmetic",
        "version": None,
        "revision": None,
        "num_fewshot": None,
        "limit": None,
        "chat": False,
        "system": None,
        "thinking": None,
        "preset": None,
        "max_new_tokens": None,
        "repeats": 1,
        "seed": 0,
        "max_length": None,
        "batch_size": 16,
        "setups": None,
        "unsafe_code": False,
    }


@pytest.mark.parametrize("preset", PRESETS)
def test_a_task_may_name_any_preset(tmp_path: Path, preset: str) -> None:
    assert load(written(tmp_path, task(f'preset = "{preset}"'))).tasks["sums"].preset == preset


def test_a_task_and_the_audit_are_part_of_the_digest(tmp_path: Path) -> None:
    texts = [MINIMAL, task(""), task("seed = 1"), task("[audit]\nempty_share = 0.1")]
    assert len({load(written(tmp_path, text)).digest for text in texts}) == len(texts)
    same = load(written(tmp_path, task("seed = 0\n[audit]\nempty_share = 0.05"))).digest
    assert same == load(written(tmp_path, task(""))).digest


def test_a_setup_that_a_task_names_and_nobody_describes_is_refused_with_the_nearest(tmp_path: Path) -> None:
    error = refusal(tmp_path, task('setups = ["mtp"]\n[setups.mtp1]\nspeculative_tokens = 1'))
    assert "'tasks.sums.setups' names 'mtp', and there is no [setups.mtp]." in error.problem
    assert "Did you mean 'mtp1'?" in error.remedy


def test_a_variant_may_name_its_scales_and_codes(tmp_path: Path) -> None:
    suite = load(written(tmp_path, MINIMAL + 'scales = "weighted-search"\ncodes = "gptq"\n'))
    assert suite.variants["nvfp4a16"] == Variant("rtn-a16", "weighted-search", "gptq")
    assert suite.digest != load(written(tmp_path, MINIMAL)).digest


def test_the_sources_of_a_calibration_set_are_told_by_their_keys(tmp_path: Path) -> None:
    suite = load(written(tmp_path, MINIMAL + CALIBRATION))
    assert suite.calibration == Calibration(
        (
            DemoSamples(demo="train", samples=8, max_tokens=64),
            FileSamples(path="rows.jsonl", samples=9, max_tokens=65, seed=7, messages="chat"),
            DatasetSamples(
                dataset="openai/gsm8k",
                config="main",
                split="train",
                revision="abc",
                samples=10,
                max_tokens=66,
                user=("question",),
                assistant="answer",
            ),
        ),
        batch_tokens=4096,
        hidden_memory_gb=2.0,
    )


def test_a_calibration_set_alone_in_a_file_is_the_same_as_in_a_suite(tmp_path: Path) -> None:
    alone = CALIBRATION.replace("[calibration]\n", "").replace("calibration.sources", "sources")
    calibration, folder = load_calibration(written(tmp_path, alone))
    assert folder == tmp_path
    assert calibration == load(written(tmp_path, MINIMAL + CALIBRATION)).calibration


def test_a_broken_calibration_file_is_refused_with_its_own_option(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_calibration(tmp_path / "absent.toml")
    assert "the calibration set cannot be read" in caught.value.problem and "--calibration" in caught.value.remedy
    with pytest.raises(UserError) as caught:
        load_calibration(written(tmp_path, "batch_tokens = 0\nsources = []\n"))
    assert caught.value.remedy == "Correct it in the calibration set."
    with pytest.raises(UserError, match="'sources' is missing"):
        load_calibration(written(tmp_path, "batch_tokens = 1\n"))
    with pytest.raises(UserError, match=r"not valid TOML: .*line 1"):
        load_calibration(written(tmp_path, "sources = \n"))


@pytest.mark.parametrize("written_out", ["seed = 0", 'split = "train"'])
def test_writing_a_default_of_a_source_out_does_not_change_the_digest(tmp_path: Path, written_out: str) -> None:
    plain = source('dataset = "a/b", column = "text"')
    assert (
        load(written(tmp_path, plain)).digest
        == load(written(tmp_path, plain.replace("column", f"{written_out}, column"))).digest
    )


def test_a_whole_number_and_a_fraction_of_the_same_value_are_the_same(tmp_path: Path) -> None:
    whole = load(written(tmp_path, MINIMAL + CALIBRATION))
    fraction = load(written(tmp_path, MINIMAL + CALIBRATION.replace("gb = 2", "gb = 2.0")))
    assert whole == fraction and whole.digest == fraction.digest


def test_the_resolved_suite_is_json_with_every_default_and_no_place_of_this_machine(tmp_path: Path) -> None:
    suite = load(written(tmp_path, MINIMAL + '[bench]\ntext = { demo = "heldout" }\n'))
    resolved = suite.resolved()
    assert json.loads(json.dumps(resolved)) == resolved
    assert resolved["bench"]["batch_sizes"] == [1, 2, 4]
    assert resolved["engine"] == {"name": "torch", "dtype": "bfloat16", "device": "auto", "vllm": None}
    assert resolved["ppl"] is None
    assert str(tmp_path) not in json.dumps(resolved)


@pytest.mark.parametrize(
    ("written_out", "remedy"),
    [
        ('versus = "sourse"', "Did you mean 'source'?"),
        ('versus = "b"', "Known: a, a+mtp1, source, source+mtp1."),  # there, and not measured
        ('versus = "a+kv-fp8"', "Known: a, a+mtp1, source, source+mtp1."),
    ],
)
def test_speeds_are_divided_by_those_of_a_row_that_is_measured(tmp_path: Path, written_out: str, remedy: str) -> None:
    text = (
        MINIMAL.partition("[variants")[0] + '[variants.a]\nrecipe = "x"\n[variants.b]\nrecipe = "x"\n'
        "[setups.mtp1]\nspeculative_tokens = 1\n[setups.kv-fp8]\nkv_cache_dtype = 'fp8'\n"
        '[bench]\ntext = { demo = "heldout" }\nvariants = ["a"]\nsetups = ["mtp1"]\n'
    )
    assert (bench := load(written(tmp_path, text)).bench) and bench.versus == "source"
    for row in ("source", "a", "a+mtp1"):
        assert (bench := load(written(tmp_path, f'{text}versus = "{row}"\n')).bench) and bench.versus == row
    with pytest.raises(UserError, match=r"'bench\.versus' names '.*', which the suite does not measure") as caught:
        load(written(tmp_path, text + written_out))
    assert remedy in caught.value.remedy


@pytest.mark.parametrize("row", ["w4a4", "w4a4+mtp1", "source+kv-fp8"])
def test_a_rows_name_is_made_of_its_parts(row: str) -> None:
    assert row_name(*row_parts(row)) == row


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
        ('[ppl]\nprotocols = ["x"]\ntext = { dataset = "x", splitt = "y" }\n', "ppl.text.splitt", "split"),
        ('[variants.b]\nrecipe = "x"\nrecipee = "y"\n', "variants.b.recipee", "recipe"),
        ("[calibration]\nbatch_token = 1\n", "calibration.batch_token", "batch_tokens"),
        ('[tasks.sums]\ntask = "x"\nfewshot = 5\n', "tasks.sums.fewshot", "num_fewshot"),
        ('[tasks.sums]\ntask = "x"\nmax_tokens = 5\n', "tasks.sums.max_tokens", "max_new_tokens"),
        ("[audit]\ncap_hit_shar = 0.1\n", "audit.cap_hit_shar", "cap_hit_share"),
        (
            '[calibration]\nsources = [{ demo = "x", sample = 1 }]\n',
            "calibration.sources[0].sample",
            "samples",
        ),
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
        (MINIMAL + '[ppl]\ntext = { demo = "x" }\n', "'ppl.protocols' is missing"),
        (ppl("protocols = []"), "at least one value"),
        (ppl('protocols = ["x", "x"]'), "none twice"),
        (ppl('protocols = ["x"]\nmax_length = 1'), "'ppl.max_length' must be at least 2, not 1"),
        (ppl('protocols = ["x"]\nexpected.y.num_tokens = 1'), "'ppl.expected' has 'y', which is not among the protoc"),
        (ppl('protocols = ["x"]\nexpected.x.num_tokens = 0'), "'ppl.expected.x.num_tokens' must be at least 1, not 0"),
        (ppl('protocols = ["x"]\nexpected.x.tokens = 1'), "unknown key 'ppl.expected.x.tokens'"),
        (ppl('protocols = ["x"]\nprotocol = "x"'), "unknown key 'ppl.protocol'"),
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
        (MINIMAL + 'scales = "best"\n', "must be one of absmax, search, weighted-search, not 'best'"),
        (MINIMAL + 'codes = "awq"\n', "'variants.nvfp4a16.codes' must be one of rtn, gptq, not 'awq'"),
        (MINIMAL + "[calibration]\nsources = []\n", "at least one value"),
        (MINIMAL + "[calibration]\n", "'calibration.sources' is missing"),
        (source('path = "x.jsonl"'), "needs at [0] exactly one of column, messages, or user with assistant, and has"),
        (source('dataset = "x"'), "and has none of them"),
        (source('dataset = "x", column = "a", messages = "b"'), "and has column and messages"),
        (source('dataset = "x", column = "a", user = ["b"], assistant = "c"'), "has column and user and assistant"),
        (source('path = "x.csv", user = ["b"]'), "and has user"),
        (source('path = "x.csv", assistant = "b"'), "and has assistant"),
        (source('path = "x.csv", user = "b", assistant = "c"'), "'calibration.sources[0].user' must be a list"),
        (source('path = "x.txt", column = "a"'), "has at [0] a .txt file, which has no columns, and names column"),
        (source('path = "x.xml", column = "a"'), "ends in none of .txt, .jsonl, .json, .parquet, .csv"),
        (source('demo = "x", column = "a"'), "unknown key 'calibration.sources[0].column'"),
        (source('demo = "x", path = "y"'), "exactly one of the keys demo, path, dataset, and has demo and path"),
        (source('demo = "x", seed = -1'), "'calibration.sources[0].seed' must be at least 0, not -1"),
        (source('demo = "x"').replace("samples = 1", "samples = 0"), "samples' must be at least 1, not 0"),
        (source('demo = "x"').replace("max_tokens = 9", "max_tokens = 1"), "max_tokens' must be at least 2, not 1"),
        (source('demo = "x"').replace("samples = 1, ", ""), "'calibration.sources[0].samples' is missing"),
        (source('demo = "x"') + "batch_tokens = 0\n", "'calibration.batch_tokens' must be at least 1, not 0"),
        (source('demo = "x"') + "batch_tokens = 1.0\n", "must be a whole number, not a number"),
        (source('demo = "x"') + "hidden_memory_gb = -0.5\n", "must be at least 0, not -0.5"),
        (source('demo = "x"') + "hidden_memory_gb = nan\n", "must be a finite number, not nan"),
        (source('demo = "x"') + "hidden_memory_gb = inf\n", "must be a finite number, not inf"),
        (source('demo = "x"') + "hidden_memory_gb = true\n", "must be a number, not true or false"),
        (MINIMAL + '[bench]\ntext = "x"\n', "'bench.text' must be a table"),
        (MINIMAL + "[tasks.sums]\nchat = true\n", "'tasks.sums.task' is missing"),
        ('tasks = ["gsm8k"]\n' + MINIMAL, "'tasks' must be a table, not a list"),
        (MINIMAL + '[tasks]\nsums = "gsm8k"\n', "'tasks.sums' must be a table, not a string"),
        (MINIMAL + '[tasks.Sums]\ntask = "x"\n', "'tasks' has a task that must be a name of lower-case letters"),
        (MINIMAL + '[tasks."a/b"]\ntask = "x"\n', "not 'a/b'"),
        (MINIMAL + '[tasks."a+b"]\ntask = "x"\n', "not 'a+b'"),
        (MINIMAL + '[tasks.""]\ntask = "x"\n', "not ''"),
        (task("thinking = true"), "has 'sums', where thinking is set and chat is not"),
        (task("thinking = false"), "has 'sums', where thinking is set and chat is not"),
        (task('system = "x"'), "has 'sums', where system is set and chat is not"),
        (task('chat = true\nsystem = ""'), "'tasks.sums.system' must not be empty"),
        (
            task('preset = "thinking"'),
            "'tasks.sums.preset' must be one of thinking-general, thinking-coding, instruct-general, "
            "instruct-reasoning, not 'thinking'",
        ),
        (task("repeats = 0"), "'tasks.sums.repeats' must be at least 1, not 0"),
        (task("limit = 0"), "'tasks.sums.limit' must be at least 1, not 0"),
        (task("seed = -1"), "'tasks.sums.seed' must be at least 0, not -1"),
        (task("num_fewshot = -1"), "'tasks.sums.num_fewshot' must be at least 0, not -1"),
        (task("max_new_tokens = 0"), "'tasks.sums.max_new_tokens' must be at least 1, not 0"),
        (task("max_length = 1"), "'tasks.sums.max_length' must be at least 2, not 1"),
        (task("batch_size = 0"), "'tasks.sums.batch_size' must be at least 1, not 0"),
        (task("version = nan"), "'tasks.sums.version' must be a finite number"),
        (task('version = "1"'), "'tasks.sums.version' must be a number, not a string"),
        (task("chat = 1"), "'tasks.sums.chat' must be true or false, not a whole number"),
        (task("setups = []"), "at least one value"),
        (task('setups = ["mtp1"]'), "'tasks.sums.setups' names 'mtp1', and there is no [setups.mtp1]."),
        (MINIMAL + "[audit]\ncap_hit_share = 1.1\n", "'audit.cap_hit_share' must be between 0 and 1, not 1.1"),
        (MINIMAL + "[audit]\nunclosed_share = -0.1\n", "'audit.unclosed_share' must be between 0 and 1, not -0.1"),
        (MINIMAL + "[audit]\nempty_share = 5\n", "'audit.empty_share' must be between 0 and 1, not 5.0"),
        (MINIMAL + "[audit]\nextraction_failure_share = 2\n", "must be between 0 and 1, not 2.0"),
        (MINIMAL + "[audit]\ntoken_inflation_ratio = inf\n", "must be a finite number, not inf"),
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
AMOUNT = {"samples": COUNTS, "max_tokens": COUNTS}
CONTENTS = st.one_of(
    st.fixed_dictionaries({"column": WORDS}),
    st.fixed_dictionaries({"messages": WORDS}),
    st.fixed_dictionaries({"user": st.lists(WORDS, min_size=1, max_size=2, unique=True), "assistant": WORDS}),
)
SOURCES = st.one_of(
    st.fixed_dictionaries({"demo": WORDS, **AMOUNT}, optional={"seed": COUNTS}),
    st.fixed_dictionaries({"path": NAMES.map(lambda name: name + ".txt"), **AMOUNT}),
    st.tuples(
        st.one_of(
            st.fixed_dictionaries({"path": st.tuples(NAMES, st.sampled_from(ROW_FILES)).map("".join), **AMOUNT}),
            st.fixed_dictionaries({"dataset": WORDS, **AMOUNT}, optional={"split": WORDS, "config": WORDS}),
        ),
        CONTENTS,
    ).map(lambda parts: parts[0] | parts[1]),
)
SHARES = st.floats(0, 1)
TASK_TABLES = st.one_of(
    st.fixed_dictionaries(
        {"task": WORDS},
        optional={
            "limit": COUNTS,
            "num_fewshot": COUNTS,
            "seed": COUNTS,
            "version": st.floats(0, 10),
            "repeats": COUNTS,
        },
    ),
    st.fixed_dictionaries(
        {"task": WORDS, "chat": st.just(True)},
        optional={"thinking": st.booleans(), "system": WORDS, "preset": st.sampled_from(list(PRESETS))},
    ),
)
SUITES = st.fixed_dictionaries(
    {
        "name": NAMES,
        "title": WORDS,
        "source": st.fixed_dictionaries({"location": WORDS}, optional={"revision": WORDS, "license": WORDS}),
        "variants": st.dictionaries(
            NAMES,
            st.fixed_dictionaries({"recipe": WORDS}, optional={"codes": st.sampled_from(["rtn", "gptq"])}),
            min_size=1,
            max_size=3,
        ),
    },
    optional={
        "description": WORDS,
        "calibration": st.fixed_dictionaries(
            {"sources": st.lists(SOURCES, min_size=1, max_size=3, unique_by=repr)},
            optional={"hidden_memory_gb": st.floats(0, 1e6)},
        ),
        "engine": st.fixed_dictionaries({}, optional={"name": WORDS, "dtype": WORDS, "device": WORDS}),
        "ppl": st.fixed_dictionaries(
            {"protocols": st.just(["x", "y"]), "text": TEXTS},
            optional={
                "batch_size": COUNTS,
                "max_length": COUNTS,
                "expected": st.dictionaries(
                    st.sampled_from(["x", "y"]), st.fixed_dictionaries({}, optional={"num_tokens": COUNTS})
                ),
            },
        ),
        "bench": st.fixed_dictionaries(
            {"text": TEXTS},
            optional={"new_tokens": COUNTS, "batch_sizes": st.lists(COUNTS, min_size=1, unique=True)},
        ),
        "tasks": st.dictionaries(NAMES, TASK_TABLES, max_size=3),
        "audit": st.fixed_dictionaries(
            {}, optional={"cap_hit_share": SHARES, "empty_share": SHARES, "token_inflation_ratio": st.floats(1, 10)}
        ),
    },
)


def toml(value: Any) -> str:
    """A value as inline TOML. JSON's strings, numbers and lists are TOML's too, but for the character DEL."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def contains(whole: Any, part: Any) -> bool:
    """Every value of `part` stands in `whole` at the same place."""
    if isinstance(part, dict):
        return all(key in whole and contains(whole[key], value) for key, value in part.items())
    if isinstance(part, list) and len(whole) == len(part):
        return all(map(contains, whole, part))
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
    tables += [document[key] for key in ("calibration", "engine", "ppl", "bench", "audit") if key in document]
    tables += document.get("tasks", {}).values()
    tables += document.get("calibration", {}).get("sources", [])
    data.draw(st.sampled_from(tables))["zzz"] = 1
    text = "".join(f"{key} = {toml(value)}\n" for key, value in document.items())
    with pytest.raises(UserError, match=r"unknown key '(.*\.)?zzz'"):
        load(written(tmp_path_factory.mktemp("suite"), text))


def test_the_demo_text_is_told_by_its_key(tmp_path: Path) -> None:
    suite = load(written(tmp_path, MINIMAL + '[ppl]\nprotocols = ["x"]\ntext = { demo = "heldout" }\n'))
    assert suite.ppl is not None and suite.ppl.text == DemoText("heldout")
