"""Exports: formats by their documentation and by the libraries that read them, values by hand, odd names."""

import csv
import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import lm_eval
import pandas as pd
import pytest
import yaml
from huggingface_hub import parse_eval_result_entries
from huggingface_hub.repocard_data import model_index_to_eval_results
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from harness.cli import main
from harness.errors import UserError
from harness.record.run import Record
from harness.record.store import read_all
from harness.report import build_tables
from harness.report.evidence import Evidence, gather
from harness.report.export import (
    BENCHMARKS,
    csv_files,
    eval_results,
    export,
    model_index,
    path_part,
    variant_files,
)
from harness.report.tables import COLUMNS
from harness.suite.load import load
from harness.suite.schema import Suite, Task, Variant
from tests.conftest import DATA
from tests.records import (
    AUDIT,
    BUILD,
    ENGINE,
    TASK,
    answer,
    choice,
    decodes,
    demo_records,
    make_record,
    prefills,
    result,
    stored,
    tasks_record,
    windows,
)

ROOT = Path(__file__).parent.parent
SCHEMAS = {path.stem: json.loads(path.read_text()) for path in sorted((DATA / "schemas").glob("*.json"))}
SUITE = """
name = "demo"
title = "A suite"
[source]
location = "Qwen/Qwen3.5-9B"
[variants.nvfp4a16]
recipe = "rtn-a16"
[variants.w4a4]
recipe = "w4a4"
[setups.mtp1]
speculative_tokens = 1
[ppl]
protocols = ["wikitext2-512"]
text = { demo = "heldout" }
[tasks.gsm8k]
task = "gsm8k"
[tasks.gsm8k-chat]
task = "gsm8k"
chat = true
[tasks.sums]
task = "demo:arithmetic"
"""
GSM8K: dict[str, Any] = {
    **TASK,
    "name": "gsm8k",
    "settings": {"task": "gsm8k", "limit": None, "repeats": 1, "chat": False, "batch_size": 16},
    "tasks": {
        "gsm8k": {
            "version": 3.0,
            "dataset": "openai/gsm8k",
            "dataset_config": "main",
            "dataset_revision": "e53f048856ff4f594e959d75785d2c2d37b678ee",
            "num_fewshot": 5,
            "num_docs": 4,
        }
    },
}


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    (tmp_path / "demo.toml").write_text(SUITE)
    return load(tmp_path / "demo.toml")


def of(suite: Suite, records: Sequence[Record], repo: str | None = None) -> Evidence:
    return gather(suite, records, "results", repo)


def gsm8k(variant: str, scores: Sequence[float], dataset: dict[str, Any] = GSM8K, **header: Any) -> Record:
    """A run of gsm8k, whose two filters find the same answers but for the first item."""
    outcomes = [
        {"exact_match,strict-match": score, "exact_match,flexible-extract": score if doc_id else 1.0}
        for doc_id, score in enumerate(scores)
    ]
    items = [answer(doc_id, task="gsm8k", outcomes=one) for doc_id, one in enumerate(outcomes)]
    return tasks_record(variant, items, dataset=dataset, **header)


def schema_and_documents(path: str, data: bytes) -> tuple[str, Iterable[Any]]:
    """Which schema an exported file has, and what in it must conform to it."""
    kind = PurePosixPath(path)
    if "/.eval_results/" in path:
        return "eval_results", [yaml.safe_load(data)]
    if kind.name == "model-index.yaml":
        return "model_index", [yaml.safe_load(data)]
    assert kind.parts[0] == "csv"
    return "csv", csv.DictReader(io.StringIO(data.decode()))


def assert_conforming(files: dict[str, bytes]) -> set[str]:
    """The schemas that were put to the test."""
    used = set()
    for path, data in files.items():
        name, documents = schema_and_documents(path, data)
        validator = Draft202012Validator(SCHEMAS[name])
        for document in documents:
            for error in validator.iter_errors(document):
                pytest.fail(f"{path} {error.json_path}: {error.message[:300]}")
        used.add(name)
    return used


# -- The formats ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_is_one_and_names_what_it_was_written_from(name: str) -> None:
    Draft202012Validator.check_schema(SCHEMAS[name])
    assert "Written from " in SCHEMAS[name]["description"] and "https://" in SCHEMAS[name]["description"]


@pytest.mark.parametrize("name", ["demo", "demo-moe"])
def test_every_export_of_the_committed_records_conforms_to_its_format(name: str) -> None:
    suite, (records, _) = load(ROOT / f"suites/{name}.toml"), read_all(ROOT / "results")
    gathered = of(suite, records)
    files = export(gathered, list(suite.variants))
    # The demos have tasks of their own, which are no registered benchmarks.
    assert assert_conforming(files) == SCHEMAS.keys() - {"eval_results"}
    assert not [path for path in files if ".eval_results" in path]
    for variant in suite.variants:
        assert f"{variant}/model-index.yaml" in files


def test_every_export_of_a_suite_with_benchmarks_and_setups_conforms_to_its_format(suite: Suite) -> None:
    records = [*demo_records(), gsm8k("source", [1, 0, 1, 1]), gsm8k("nvfp4a16", [1, 0, 0, 1])]
    records.append(make_record("bench", "nvfp4a16+mtp1", decodes(0.01)))
    assert assert_conforming(export(of(suite, records), ["nvfp4a16"])) == SCHEMAS.keys()
    assert assert_conforming(export(of(suite, records, "me/my-model"), ["nvfp4a16"])) == SCHEMAS.keys()


# -- .eval_results and model-index -----------------------------------------------------------------------------------


def test_a_score_in_a_registered_benchmark_is_a_percentage_that_huggingface_hub_reads(suite: Suite) -> None:
    gathered = of(suite, [gsm8k("source", [1, 1, 1, 1]), gsm8k("nvfp4a16", [0, 1, 1, 0, 1, 1, 1, 1])])
    files = export(gathered, ["nvfp4a16", "w4a4"])
    assert [path for path in files if ".eval_results" in path] == ["nvfp4a16/.eval_results/gsm8k.yaml"]
    (entry,) = parse_eval_result_entries(yaml.safe_load(files["nvfp4a16/.eval_results/gsm8k.yaml"]))
    assert (entry.dataset_id, entry.task_id) == ("openai/gsm8k", "gsm8k")
    assert entry.dataset_revision == "e53f048856ff4f594e959d75785d2c2d37b678ee"
    assert entry.value == 75, "6 of 8 by the filter that the task names first, 7 of 8 by the other"
    assert entry.date == "2026-03-01T12:00:00Z" and entry.source_url is None
    for words in ("exact_match,strict-match of gsm8k, lm-eval 0.4.13", "5-shot", "n = 8", "95 % interval "):
        assert words in (entry.notes or "")


def test_a_published_variant_is_called_by_its_repository_and_links_to_its_records(suite: Suite) -> None:
    record = gsm8k("nvfp4a16", [1, 0, 1, 1])
    files = export(of(suite, [record], "me/my-model"), ["nvfp4a16"])
    (entry,) = parse_eval_result_entries(yaml.safe_load(files["nvfp4a16/.eval_results/gsm8k.yaml"]))
    where = f"https://huggingface.co/me/my-model/blob/main/{record.path.as_posix()}"
    assert entry.source_url == where and entry.source_name == f"nvfp4-harness, run {record.run.run_id}"
    name, (first, *_) = model_index_to_eval_results(yaml.safe_load(files["nvfp4a16/model-index.yaml"])["model-index"])
    assert name == "my-model" and first.source_url == where


@pytest.mark.parametrize(
    ("why", "record"),
    [
        ("a limit", gsm8k("nvfp4a16", [1, 0], {**GSM8K, "settings": {**GSM8K["settings"], "limit": 2}})),
        ("another dataset", gsm8k("nvfp4a16", [1, 0], {**GSM8K, "tasks": {"gsm8k": {"dataset": "json"}}})),
        ("another model", gsm8k("nvfp4a16", [1, 0], engine={**ENGINE, "served_as": "W4A16"})),
        ("a setup", gsm8k("nvfp4a16+mtp1", [1, 0])),
        (
            "answers that were cut off",
            tasks_record(
                "nvfp4a16",
                [answer(0, 1.0, task="gsm8k", finish_reasons=["length"])],
                dataset=GSM8K,
                audit={**AUDIT, "cap_hit_share": 0.5},
            ),
        ),
        ("no benchmark", tasks_record("nvfp4a16", [answer(0, 1.0), answer(1, 0.0)])),
    ],
)
def test_what_is_no_full_valid_run_of_a_benchmark_is_not_sent_to_its_leaderboard(
    suite: Suite, why: str, record: Record
) -> None:
    assert eval_results(of(suite, [record]), "nvfp4a16") == {}, why


def test_of_two_runs_of_a_benchmark_the_suites_first_speaks(suite: Suite) -> None:
    chat = {**GSM8K, "name": "gsm8k-chat", "settings": {**GSM8K["settings"], "chat": True}}
    records = [gsm8k("w4a4", [1, 1, 1, 1], chat, run_id="cccccccc"), gsm8k("w4a4", [1, 0, 0, 0])]
    (entry,) = eval_results(of(suite, records), "w4a4")["gsm8k"]
    assert entry["value"] == 25
    alone = eval_results(of(suite, records[:1]), "w4a4")["gsm8k"]
    assert alone[0]["value"] == 100 and "chat template" in alone[0]["notes"]


def test_a_groups_benchmark_is_the_groups_own_figure(suite: Suite) -> None:
    about = {"dataset": "TIGER-Lab/MMLU-Pro", "num_fewshot": 5, "num_docs": 2, "version": 1.0}
    leaves = ("mmlu_pro_law", "mmlu_pro_math")
    dataset = {**TASK, "name": "sums", "tasks": dict.fromkeys(leaves, about)}
    metric = "exact_match,custom-extract"
    items = [answer(doc_id, task=leaf, outcomes={metric: float(doc_id)}) for leaf in leaves for doc_id in (0, 1)]
    figures = [
        *(result(0.5, 0.5, task=leaf, metric=metric, num_items=2) for leaf in leaves),
        result(0.5, 0.3, task="mmlu_pro", metric=metric, num_items=0),
    ]
    record = tasks_record("w4a4", items, figures, dataset=dataset)
    ((name, (entry,)),) = eval_results(of(suite, [record]), "w4a4").items()
    assert (name, entry["dataset"]["task_id"], entry["value"]) == ("mmlu_pro", "mmlu_pro", 50)
    assert "n = 4" in entry["notes"] and "standard error 30.00" in entry["notes"]


def test_the_benchmarks_are_tasks_that_lm_eval_has_on_those_datasets() -> None:
    for name, benchmark in BENCHMARKS.items():
        folder = Path(lm_eval.__file__).parent / "tasks" / benchmark.name
        texts = [
            path.read_text() for path in folder.rglob("*") if path.suffix == ".yaml" or path.name.endswith("_yaml")
        ]
        assert any(re.search(rf'^(task|group): "?{name}"?$', text, re.MULTILINE) for text in texts), name
        assert any(f"dataset_path: {benchmark.dataset}\n" in text for text in texts), name


def test_the_model_index_is_what_huggingface_hub_reads(suite: Suite) -> None:
    records = [*demo_records(), gsm8k("nvfp4a16", [1, 0, 1, 1])]
    name, found = model_index_to_eval_results(model_index(of(suite, records), "nvfp4a16"))
    assert name == "nvfp4a16"
    strict, flexible, ppl = found
    assert (strict.metric_type, strict.metric_value, flexible.metric_value) == ("exact_match", 0.75, 0.75)
    assert (strict.dataset_type, strict.dataset_config) == ("openai/gsm8k", "main")
    assert (ppl.metric_type, ppl.dataset_type) == ("perplexity", "demo:heldout")
    sums = [(one["nll_nats"], one["num_scored"]) for one in records[3].samples]
    assert ppl.metric_value == pytest.approx(math.exp(sum(nats for nats, _ in sums) / sum(num for _, num in sums)))
    assert model_index(of(suite, records), "w4a4") == []


def test_only_datasets_with_an_owner_are_named_to_the_hub() -> None:
    sources = [
        {"dataset": "json"},
        {"dataset": "openai/gsm8k"},
        {"dataset": "gsm8k"},
        {"path": "a/b"},
        {"demo": "train"},
    ]
    taken = {"kind": "calibration", "num_tokens": 1, "planned_memory_bytes": 1, "peak_vram_bytes": None}
    suite = {"name": "demo", "calibration": {"sources": sources}}
    build = make_record("build", "w4a4", [*BUILD, taken], suite=suite)
    assert build_tables.calibration_datasets({"w4a4": build}) == ["openai/gsm8k"]


def test_a_score_over_repetitions_says_how_many_beside_its_items(suite: Suite) -> None:
    items = [answer(doc_id, 1.0, task="gsm8k", repetition=one) for one in (0, 1) for doc_id in range(4)]
    twice = tasks_record("w4a4", items, dataset={**GSM8K, "settings": {**GSM8K["settings"], "repeats": 2}})
    for record, words in ((twice, "4 items × 2 repetitions"), (gsm8k("w4a4", [1, 0, 1, 1]), "n = 4")):
        gathered = of(suite, [record])
        (first, *_) = model_index(gathered, "w4a4")[0]["results"]
        assert first["metrics"][0]["name"].endswith(f" ({words})")
        assert words in eval_results(gathered, "w4a4")["gsm8k"][0]["notes"].split(", ")


@pytest.mark.parametrize("name", ["nul", "com1", "v1.", "csv", "x" * 99, "a"])
def test_a_variants_own_files_are_those_of_its_folder_whatever_it_is_called(suite: Suite, name: str) -> None:
    named = replace(suite, variants={name: Variant("w4a4")})
    gathered = of(named, [gsm8k(name, [1, 0, 1, 1]), make_record("bench", name, prefills(0.5))])
    own, shared = variant_files(gathered, name), csv_files(gathered, named.rows())
    assert list(own) == [".eval_results/gsm8k.yaml", "model-index.yaml"]
    assert export(gathered, [name]) == shared | {f"{path_part(name)}/{path}": data for path, data in own.items()}
    assert "csv/prefill.csv" in shared


# -- CSV -------------------------------------------------------------------------------------------------------------


def test_a_run_that_lm_eval_made_no_figure_of_is_in_no_format_of_scores(suite: Suite) -> None:
    files = export(of(suite, [tasks_record("w4a4", [choice(0, 1.0)], results=[])]), ["w4a4"])
    assert files and all(path.startswith("csv/") for path in files)


def test_pandas_reads_every_frame_back(suite: Suite) -> None:
    gathered = of(suite, demo_records())
    files = export(gathered, ["nvfp4a16"])
    table = pd.read_csv(io.BytesIO(files["csv/perplexity.csv"]), dtype={"run": str})
    frame = gathered.tables["perplexity"]
    assert table["variant"].tolist() == ["source", "nvfp4a16"]
    assert table["ppl"].tolist() == pytest.approx(frame["ppl"], rel=1e-7)
    loss = frame["delta_log_ppl"][1]
    for column, value in (("", loss.value), ("_low", loss.low), ("_high", loss.high)):
        unknown, found = table[f"delta_log_ppl{column}"]
        assert math.isnan(unknown) and found == pytest.approx(value, rel=1e-7)
    assert table["run"].tolist() == [one.run.run_id for one in frame["run"]]


def test_columns_are_called_as_in_the_tables(suite: Suite) -> None:
    gathered = of(suite, [*demo_records(), gsm8k("source", [1, 1]), gsm8k("nvfp4a16", [1, 0])])
    files = export(gathered, ["nvfp4a16"])
    tables = {path: data for path, data in files.items() if path.startswith("csv/")}
    assert {f"csv/{name}.csv" for name, frame in gathered.tables.items() if frame} == set(tables)
    for path, data in tables.items():
        for column in csv.DictReader(io.StringIO(data.decode())).fieldnames or ():
            assert {column, re.sub("_(low|high|reason|largest|layer)$", "", column)} & COLUMNS.keys(), (path, column)


def test_words_in_place_of_an_estimate_have_a_column_of_their_own(suite: Suite) -> None:
    records = [
        make_record("ppl", "source", windows(8.0)),
        make_record("ppl", "nvfp4a16", windows(8.1, (0.0, 0.1))),
        make_record("ppl", "w4a4", windows(8.2)[:9]),
    ]
    table = pd.read_csv(io.BytesIO(export(of(suite, records), ["nvfp4a16", "w4a4"])["csv/perplexity.csv"]))
    assert table["delta_log_ppl"].notna().tolist() == [False, True, False]
    assert table["delta_log_ppl_reason"].tolist()[2] == "incomparable: windows"


# -- Names -----------------------------------------------------------------------------------------------------------

ODD = [
    "../../etc/passwd",
    'a "quoted", name',
    "two\nlines\r\n",
    "Ümläut – 模型 🙂",
    "..",
    "/root",
    "con",
    "a|b\\c:*?",
    "\u2028",
]
SIMILAR = ["a", "A", "a.", ".a", "a b", "a_b", "x" * 99, "x" * 100]


@pytest.mark.parametrize("odd", ODD)
def test_odd_names_break_no_file_and_leave_no_folder(suite: Suite, odd: str, tmp_path: Path) -> None:
    about = {odd: {"version": 1.0, "dataset": odd, "num_docs": 2}}
    items = [answer(0, 1.0, task=odd), answer(1, 0.0, task=odd)]
    dataset = {**TASK, "name": odd, "tasks": about, "settings": {**TASK["settings"], "system": odd}}
    engine = {**ENGINE, "name": odd, "device": odd}
    records = [
        tasks_record("w4a4", items, dataset=dataset, engine=engine, command=("harness", odd)),
        make_record("bench", "w4a4", decodes(0.01), engine=engine),
        make_record("build", "w4a4", [{**one, "role": odd} if "role" in one else one for one in BUILD]),
    ]
    for record in records:
        record.run.variant.update(recipe=odd, artifact_digest=odd)
    named = replace(suite, tasks={odd: Task(task=odd)}, source=replace(suite.source, base_model=f"../{odd}"))
    files = export(of(named, records), ["w4a4"])
    assert_conforming(files)
    assert_inside(files)
    table = list(csv.DictReader(io.StringIO(files["csv/tasks.csv"].decode(), newline="")))
    assert table[0]["task"] == odd
    (index,) = yaml.safe_load(files["w4a4/model-index.yaml"])["model-index"]
    assert index["results"][0]["dataset"]["name"] == odd


def assert_inside(files: Iterable[str]) -> None:
    for path in files:
        assert path.isascii() and not path.startswith("/")
        assert not {"", ".", ".."} & set(path.split("/")), path


@example("a\x85b")
@given(st.text(min_size=1, max_size=20))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_name_comes_back_from_every_format(suite: Suite, name: str) -> None:
    dataset = {**TASK, "name": name, "tasks": {name: {"num_docs": 2, "version": 1.0}}}
    record = tasks_record("w4a4", [answer(0, 1.0, task=name), answer(1, 0.0, task=name)], dataset=dataset)
    files = export(of(replace(suite, tasks={name: Task(task=name)}), [record]), ["w4a4"])
    assert_inside(files)
    read = [
        *(row["task"] for row in csv.DictReader(io.StringIO(files["csv/tasks.csv"].decode(), newline=""))),
        yaml.safe_load(files["w4a4/model-index.yaml"])["model-index"][0]["results"][0]["dataset"]["name"],
    ]
    assert read == [name] * 2


@given(st.text(min_size=1).filter(lambda text: text.isprintable() or "\n" in text))
@settings(max_examples=200)
def test_any_name_is_one_part_of_a_path(name: str) -> None:
    part = path_part(name)
    assert re.fullmatch(r"[A-Za-z0-9_.+=@-]{1,89}", part) and part not in (".", "..")
    assert not re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?", part)


@given(
    st.lists(st.sampled_from([*ODD, "a", "A", "a.", ".a", "a b", "a_b", "x" * 99, "x" * 100]), unique=True, min_size=2)
)
def test_two_names_stay_two(names: list[str]) -> None:
    assert len({path_part(name) for name in names}) == len(names)


@pytest.mark.parametrize("name", ["nvfp4a16", "w4a4+mtp1", "demo_arithmetic", "Qwen3.5-9B", "gsm8k"])
def test_a_plain_name_stays_as_it_is(name: str) -> None:
    assert path_part(name) == name


# -- The same everywhere ---------------------------------------------------------------------------------------------


def test_the_order_of_the_records_does_not_matter(suite: Suite) -> None:
    records = [*demo_records(), gsm8k("source", [1, 1, 0]), gsm8k("nvfp4a16", [1, 0, 0])]
    names = ["nvfp4a16", "w4a4"]
    assert export(of(suite, records), names) == export(of(suite, records[::-1]), names)


def test_another_process_without_torch_writes_the_same_bytes(suite: Suite, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    stored(folder, [*demo_records(), gsm8k("source", [1, 1, 0]), gsm8k("nvfp4a16", [1, 0, 0])])
    program = (
        "import sys; from harness.cli import main\n"
        "assert main(sys.argv[1:]) == 0 and 'torch' not in sys.modules and 'lm_eval' not in sys.modules"
    )
    command = ["export", "--suite", str(suite.folder / "demo.toml"), "--results", "results", "--out", "out"]
    environment = {"PYTHONHASHSEED": "1", "TZ": "Asia/Tokyo", "MPLCONFIGDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program, *command], cwd=tmp_path, env=environment, check=True)
    out, expected = tmp_path / "out", export(of(suite, read_all(folder)[0]), list(suite.variants))
    made = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert made == expected


# -- What is asked for -----------------------------------------------------------------------------------------------


def test_only_the_wanted_variants_and_the_source_are_exported(suite: Suite) -> None:
    records = [gsm8k(name, [1, 0, 1]) for name in ("source", "nvfp4a16", "w4a4", "w4a4+mtp1")]
    files = export(of(suite, [*demo_records(), *records]), ["w4a4"])
    assert not [path for path in files if "nvfp4a16" in path]
    wanted = {"source", "w4a4", "w4a4+mtp1"}
    assert {row["variant"] for row in csv.DictReader(io.StringIO(files["csv/tasks.csv"].decode()))} == wanted
    assert "csv/size.csv" not in files, "the build is of the other variant"


def test_an_unknown_variant_and_a_suite_without_records_are_said_in_a_sentence(suite: Suite) -> None:
    with pytest.raises(UserError) as caught:
        export(of(suite, demo_records()), ["w4a"])
    assert "has no variant 'w4a'" in caught.value.problem and "w4a4" in caught.value.remedy
    other = make_record("ppl", "source", windows(8.0), suite={"name": "other"})
    with pytest.raises(UserError, match="no whole run of suite 'demo' in results"):
        export(of(suite, [other]), ["w4a4"])


@pytest.fixture
def place(suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the suite and records of it."""
    monkeypatch.chdir(tmp_path)
    stored(tmp_path / "results", demo_records())
    return tmp_path


def test_the_command_lists_what_it_wrote_and_leaves_other_files_alone(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "out/csv").mkdir(parents=True)
    (place / "out/csv/mine.csv").write_text("mine")
    assert main(["export", "--suite", "demo.toml", "--out", "out"]) == 0
    listed = [line.removeprefix("written: ") for line in capsys.readouterr().out.splitlines()]
    present = sorted(path.relative_to(place).as_posix() for path in (place / "out").rglob("*") if path.is_file())
    assert sorted([*listed, "out/csv/mine.csv"]) == present and (place / "out/csv/mine.csv").read_text() == "mine"
    assert main(["export", "--suite", "demo.toml", "--out", "out", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["written"] == [] and [f"out/{path}" for path in told["files"]] == sorted(listed)
    (place / "out/csv/perplexity.csv").write_text("edited")
    assert main(["export", "--suite", "demo.toml", "--out", "out"]) == 0
    assert capsys.readouterr().out == "written: out/csv/perplexity.csv\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--out", "demo.toml"], "demo.toml is not a folder"),
        (["--out", "out", "--variant", "w4a"], "has no variant 'w4a'"),
        (["--out", "out", "--results", "nowhere"], "nowhere is not a folder"),
        (["--out", "out", "--results", "empty"], "no whole run of suite 'demo' in empty"),
    ],
)
def test_bad_input_is_a_sentence_and_writes_nothing(
    place: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "empty").mkdir()
    assert main(["export", "--suite", "demo.toml", *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error and "Traceback" not in error
    assert not (place / "out").exists() and (place / "demo.toml").read_text() == SUITE
