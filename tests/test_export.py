"""Exports: formats by their documentation and by the libraries that read them, values by hand, odd names."""

import csv
import hashlib
import io
import itertools
import json
import math
import re
import statistics
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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from lm_eval.utils import make_table

from harness.cli import main
from harness.errors import UserError
from harness.record.store import Record, read_all
from harness.report import build_tables, evidence, speed_tables
from harness.report.columns import COLUMNS
from harness.report.evidence import Evidence
from harness.report.exchange import path_part
from harness.report.export import export, llama_bench, llama_bench_markdown, shared_files, variant_files
from harness.report.hub import BENCHMARKS, eval_results, model_index
from harness.suite.load import load
from harness.suite.schema import Bench, DemoText, Suite, Task, Variant
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


AGGREGATE = re.compile(r"every_eval_ever/.*[0-9a-f]\.json$")


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    (tmp_path / "demo.toml").write_text(SUITE)
    return load(tmp_path / "demo.toml")


def of(suite: Suite, records: Sequence[Record], repo: str | None = None) -> Evidence:
    return evidence.gather(suite, records, "results", repo)


def gsm8k(variant: str, scores: Sequence[float], dataset: dict[str, Any] = GSM8K, **header: Any) -> Record:
    """A run of gsm8k, whose two filters find the same answers but for the first item."""
    outcomes = [
        {"exact_match,strict-match": score, "exact_match,flexible-extract": score if doc_id else 1.0}
        for doc_id, score in enumerate(scores)
    ]
    items = [answer(doc_id, task="gsm8k", outcomes=one) for doc_id, one in enumerate(outcomes)]
    return tasks_record(variant, items, dataset=dataset, **header)


EVERY = 20
"""The lines of a file are made alike: one in so many is looked at."""


def one_of(files: dict[str, bytes], pattern: str | re.Pattern[str]) -> bytes:
    """The one file whose path matches."""
    (found,) = [path for path in files if re.search(pattern, path)]
    return files[found]


def schema_and_documents(path: str, data: bytes) -> tuple[str, Iterable[Any]]:
    """Which schema an exported file has, and what in it must conform to it."""
    kind = PurePosixPath(path)
    if "/.eval_results/" in path:
        return "eval_results", [yaml.safe_load(data)]
    if kind.name == "model-index.yaml":
        return "model_index", [yaml.safe_load(data)]
    if kind.parts[0] == "csv":
        return "csv", csv.DictReader(io.StringIO(data.decode()))
    if kind.name == "llama-bench.json":
        return "llama_bench", [json.loads(data)]
    name = {"every_eval_ever": ("every_eval_ever_samples", "every_eval_ever")}.get(
        kind.parts[0], ("lm_eval_samples", "lm_eval_results")
    )[kind.suffix == ".json"]
    if kind.suffix == ".json":
        return name, [json.loads(data)]
    return name, map(json.loads, data.splitlines()[::EVERY])


def assert_conforming(files: dict[str, bytes]) -> set[str]:
    """The schemas that were put to the test."""
    used = set()
    for path, data in files.items():
        if path == "llama-bench.md":
            continue
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
    logs = [json.loads(data) for path, data in files.items() if AGGREGATE.search(path)]
    scored = sorted((one["evaluation_id"].split("/")[0], one["model_info"]["id"]) for one in logs)
    invalid = {(row["task"], row["variant"]) for row in gathered.tables["answers"].rows if row["verdict"] != "valid"}
    ours = {
        *((label, row) for label, runs in gathered.tasks.items() for row in runs),
        *((f"perplexity-{protocol}", row) for protocol, runs in gathered.perplexities.items() for row in runs),
    } - invalid
    assert scored == sorted((label, f"{name}/{row}") for label, row in ours)


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
    log = json.loads(one_of(files, r"every_eval_ever/data/gsm8k/me/my-model/.*\.json$"))
    assert log["model_info"]["id"] == "me/my-model"
    assert log["source_metadata"]["additional_details"]["url"] == where


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
    results = json.loads(one_of(export(of(suite, [record]), ["w4a4"]), "results_"))
    assert list(results["groups"]) == ["mmlu_pro"] and set(results["versions"]) == set(dataset["tasks"])


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


@pytest.mark.parametrize("name", ["data", "nul", "com1", "v1.", "csv", "lm-eval", "x" * 99, "a"])
def test_a_variants_own_files_are_those_of_its_folder_whatever_it_is_called(suite: Suite, name: str) -> None:
    named = replace(suite, variants={name: Variant("w4a4")})
    gathered = of(named, [gsm8k(name, [1, 0, 1, 1]), make_record("bench", name, prefills(0.5))])
    own, shared = variant_files(gathered, name), shared_files(gathered, named.rows())
    assert list(own) == [".eval_results/gsm8k.yaml", "model-index.yaml"]
    assert export(gathered, [name]) == shared | {f"{path_part(name)}/{path}": data for path, data in own.items()}
    assert "csv/prefill.csv" in shared and "llama-bench.json" in shared


# -- Every Eval Ever -------------------------------------------------------------------------------------------------


def test_an_aggregate_has_lm_evals_error_an_interval_and_its_companion(suite: Suite) -> None:
    files = export(of(suite, [gsm8k("nvfp4a16", [1, 0, 1, 1])]), ["nvfp4a16"])
    (path,) = filter(AGGREGATE.search, files)
    assert path.startswith("every_eval_ever/data/gsm8k/demo/nvfp4a16/")
    log = json.loads(files[path])
    strict, _ = log["evaluation_results"]
    uncertainty = strict["score_details"]["uncertainty"]
    assert strict["score_details"]["score"] == 0.75
    assert uncertainty["standard_error"]["value"] == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
    assert uncertainty["num_samples"] == 4
    interval = uncertainty["confidence_interval"]
    assert interval["lower"] < 0.75 < interval["upper"] and interval["confidence_level"] == 0.95
    assert strict["source_data"]["hf_repo"] == "openai/gsm8k" and strict["source_data"]["hf_config"] == "main"
    assert not strict["metric_config"]["lower_is_better"]
    assert [strict["metric_config"][key] for key in ("min_score", "max_score", "metric_unit")] == [0, 1, "proportion"]
    companion = log["detailed_evaluation_results"]
    lines = files[f"every_eval_ever/{companion['file_path']}"]
    assert f"every_eval_ever/{companion['file_path']}" == path.replace(".json", "_samples.jsonl")
    assert companion["checksum"] == hashlib.sha256(lines).hexdigest()
    rows = [json.loads(line) for line in lines.splitlines()]
    assert companion["total_rows"] == len(rows) == 8, "an item has a line for each metric"
    assert {(row["evaluation_id"], row["model_id"]) for row in rows} == {(log["evaluation_id"], "demo/nvfp4a16")}
    ids = [one["evaluation_result_id"] for one in log["evaluation_results"]]
    assert {row["evaluation_result_id"] for row in rows} == set(ids) and len(set(ids)) == 2
    of_strict = [row for row in rows if row["evaluation_result_id"] == strict["evaluation_result_id"]]
    assert [(row["sample_id"], row["evaluation"]["score"], row["evaluation"]["is_correct"]) for row in of_strict] == [
        ("0", 1, True),
        ("1", 0, False),
        ("2", 1, True),
        ("3", 1, True),
    ]
    assert of_strict[0]["token_usage"] == {"input_tokens": 20, "output_tokens": 10, "total_tokens": 30}


def test_an_aggregate_tells_how_answers_were_drawn(suite: Suite) -> None:
    drawn = {**GSM8K["settings"], "preset": "thinking-general", "thinking": True, "repeats": 2, "max_new_tokens": 512}
    items = [
        answer(doc_id, score, task="gsm8k", repetition=repetition)
        for repetition, scores in enumerate([(1, 0, 0, 1), (1, 1, 0, 1)])
        for doc_id, score in enumerate(scores)
    ]
    record = tasks_record("w4a4", items, dataset={**GSM8K, "settings": drawn})
    files = export(of(suite, [record]), ["w4a4"])
    (one,) = json.loads(one_of(files, AGGREGATE))["evaluation_results"]
    arguments = one["generation_config"]["generation_args"]
    assert [arguments[key] for key in ("temperature", "top_p", "top_k")] == [1.0, 0.95, 20]
    assert arguments["max_tokens"] == 512 and arguments["reasoning"]
    assert one["generation_config"]["additional_details"]["presence_penalty"] == "1.5"
    assert one["score_details"]["score"] == pytest.approx(5 / 8)
    error = one["score_details"]["uncertainty"]["standard_error"]
    by_document = [1, 0.5, 0, 1]
    assert error["value"] == pytest.approx(statistics.stdev(by_document) / 2, rel=0.05), "of a bootstrap over documents"
    assert len([path for path in files if "results_" in path]) == 2, "lm-eval knows no repetitions: a file for each"


def test_a_perplexity_has_its_interval_by_hand_and_no_bound_above(suite: Suite) -> None:
    files = export(of(suite, demo_records()), ["nvfp4a16"])
    log = json.loads(one_of(files, "data/perplexity-wikitext2-512/Qwen/Qwen3.5-9B/"))
    (one,) = log["evaluation_results"]
    score, uncertainty = one["score_details"]["score"], one["score_details"]["uncertainty"]
    samples = demo_records()[2].samples
    assert score == pytest.approx(math.exp(sum(s["nll_nats"] for s in samples) / sum(s["num_scored"] for s in samples)))
    interval = uncertainty["confidence_interval"]
    assert interval["lower"] < score < interval["upper"]
    half = (math.log(interval["upper"]) - math.log(interval["lower"])) / 2
    assert uncertainty["standard_error"]["value"] == pytest.approx(score * half / 1.96, rel=0.2)
    assert one["metric_config"]["max_score"] == "Infinity" and one["metric_config"]["lower_is_better"]
    assert uncertainty["num_samples"] == len(samples)
    assert "detailed_evaluation_results" not in log
    assert log["source_metadata"]["evaluator_relationship"] == "third_party"


def test_scores_all_alike_have_no_interval_and_lists_of_scores_no_lines(suite: Suite) -> None:
    alike = tasks_record("w4a4", [choice(doc_id, 1.0) for doc_id in range(4)])
    files = export(of(suite, [alike]), ["w4a4"])
    (one,) = json.loads(one_of(files, AGGREGATE))["evaluation_results"]
    assert "confidence_interval" not in one["score_details"]["uncertainty"]
    assert one["metric_config"]["metric_id"] == "accuracy"
    pairs = [choice(doc_id, 1.0, outcomes={"word_perplexity,none": [-20.0, 5.0]}) for doc_id in range(4)]
    figures = [result(54.6, None, metric="word_perplexity,none", higher_is_better=False)]
    log = json.loads(one_of(export(of(suite, [tasks_record("w4a4", pairs, figures)]), ["w4a4"]), "every_eval_ever/"))
    (one,) = log["evaluation_results"]
    assert one["score_details"]["score"] == 54.6 and one["metric_config"]["lower_is_better"]
    assert one["metric_config"]["max_score"] == "Infinity" and "detailed_evaluation_results" not in log


def test_a_run_that_lm_eval_made_no_figure_of_is_in_no_format_of_scores(suite: Suite) -> None:
    files = export(of(suite, [tasks_record("w4a4", [choice(0, 1.0)], results=[])]), ["w4a4"])
    assert files and all(path.startswith("csv/") for path in files)


def test_a_setup_is_the_same_model_in_another_evaluation(suite: Suite) -> None:
    records = [gsm8k("w4a4", [1, 0, 1]), gsm8k("w4a4+mtp1", [1, 1, 1, 0])]
    files = export(of(suite, records), ["w4a4"])
    logs = [json.loads(data) for path, data in files.items() if AGGREGATE.search(path)]
    assert [log["model_info"]["id"] for log in logs] == ["demo/w4a4"] * 2
    assert len({log["evaluation_id"] for log in logs}) == 2


# -- lm-eval ---------------------------------------------------------------------------------------------------------


def test_lm_eval_prints_its_own_table_of_our_results(suite: Suite) -> None:
    files = export(of(suite, [gsm8k("nvfp4a16", [1, 0, 1, 1])]), ["nvfp4a16"])
    folder = "lm-eval/nvfp4a16/gsm8k"
    document = json.loads(files[f"{folder}/results_2026-03-01T12-00-00.000000.json"])
    table = make_table(document)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert ["gsm8k", "3", "flexible-extract", "5", "exact_match", "↑", "0.75", "±", "0.25"] in cells
    assert ["", "", "strict-match", "5", "exact_match", "↑", "0.75", "±", "0.25"] in cells
    assert document["n-samples"] == {"gsm8k": {"original": 4, "effective": 4}}
    assert document["n-shot"] == {"gsm8k": 5} and document["versions"] == {"gsm8k": 3.0}
    samples = files[f"{folder}/samples_gsm8k_2026-03-01T12-00-00.000000.jsonl"]
    lines = [json.loads(line) for line in samples.splitlines()]
    strict = [line["exact_match"] for line in lines if line["filter"] == "strict-match"]
    assert strict == [1, 0, 1, 1] and len(lines) == 8


def test_what_lm_eval_has_no_error_for_says_so_in_its_words(suite: Suite) -> None:
    record = tasks_record("w4a4", [choice(0, 1.0)])
    document = json.loads(one_of(export(of(suite, [record]), ["w4a4"]), "results_"))
    assert document["results"]["demo_arithmetic"]["acc_stderr,none"] == "N/A"


# -- CSV -------------------------------------------------------------------------------------------------------------


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


# -- llama-bench -----------------------------------------------------------------------------------------------------


def at_depth(speeds: Sequence[float], prompt_tokens: int) -> list[dict[str, Any]]:
    """Decodes of 32 timed tokens at these speeds, in tokens per second."""
    shape = {"prompt_tokens": prompt_tokens, "warmup": False}
    return [{**decodes(1 / speed, num_steps=32)[0], "step_seconds": [1 / speed] * 32, **shape} for speed in speeds]


def test_a_decode_at_depth_is_a_row_of_llama_bench(suite: Suite) -> None:
    samples = [*at_depth([162.9, 163.4, 163.9], 4096), *decodes(0.01, batch=4), *prefills(0.25)]
    gathered = of(suite, [make_record("build", "w4a4", BUILD), make_record("bench", "w4a4", samples)])
    prefill, decode = llama_bench(gathered, ["source", "w4a4"])
    assert (prefill.n_prompt, prefill.n_gen, prefill.n_depth) == (512, 0, 0)
    assert (prefill.avg_ns, prefill.stddev_ns, prefill.avg_ts, prefill.stddev_ts) == (250_000_000, 0, 2048.0, 0.0)
    assert prefill.samples_ns == [250_000_000] * 6, "the warm-up is not among them"
    assert (decode.n_prompt, decode.n_gen, decode.n_depth) == (0, 32, 4096)
    assert decode.samples_ts == pytest.approx([162.9, 163.4, 163.9])
    assert decode.samples_ns == [round(32e9 / speed) for speed in (162.9, 163.4, 163.9)]
    assert decode.avg_ns == round(statistics.mean(decode.samples_ns))
    assert decode.stddev_ns == pytest.approx(statistics.stdev(decode.samples_ns), abs=1)
    assert (decode.model_size, decode.model_n_params) == (6_500_000, 9_000_000)
    header, rule, *rows, empty, note = llama_bench_markdown([prefill, decode]).splitlines()
    assert header == "| model | size | params | backend | test | t/s |" and set(rule) <= set("|-: ")
    assert rows == [
        "| demo/w4a4 | 6.20 MiB | 9.00 M | torch cpu | pp512 | 2048.00 ± 0.00 |",
        "| demo/w4a4 | 6.20 MiB | 9.00 M | torch cpu | tg32 @ d4096 | 163.40 ± 0.50 |",
    ], "6.5e6 bytes are 6.20 MiB"
    assert not empty and "mean" in note and "the card has medians" in note


def test_a_decode_is_called_as_on_the_card_and_one_token_is_no_depth(suite: Suite) -> None:
    bench = replace(suite.bench or Bench(text=DemoText("heldout")), depths=(0, 4096), depth_tokens=33)
    whole = replace(suite, bench=bench)
    samples = [sample for prompt in (1, 4096) for sample in at_depth([162.0, 163.0, 164.0], prompt)]
    gathered = of(whole, [make_record("bench", "w4a4", samples, suite=whole.resolved())])
    card = speed_tables.by_depth(gathered.tables["decode"])
    speeds = llama_bench(gathered, ["w4a4"])
    assert [speed.test for speed in speeds] == card["test"] == ["tg32", "tg32 @ d4096"]
    assert [speed.n_depth for speed in speeds] == [0, 4096]


def test_without_a_build_the_size_is_not_known_and_the_source_has_that_of_any(suite: Suite) -> None:
    bench = [make_record("bench", name, decodes(0.01)) for name in ("source", "w4a4+mtp1")]
    unknown, _ = llama_bench(of(suite, bench), ["source", "w4a4+mtp1"])
    assert unknown.model_size is None and "|  |  |" in llama_bench_markdown([unknown])
    source, drafted = llama_bench(of(suite, [*bench, make_record("build", "w4a4", BUILD)]), ["source", "w4a4+mtp1"])
    assert (source.model_size, source.model_type) == (18_000_000, "Qwen/Qwen3.5-9B")
    assert (drafted.model_size, drafted.model_type) == (6_500_000, "demo/w4a4 + mtp1")
    assert (source.n_gen, source.test) == (127, "tg127 @ d128")


def test_sizes_of_large_models_are_in_gibibytes_and_billions(suite: Suite) -> None:
    build = [{**one, "output_bytes": 6 * 2**30, "num_params": 4 * 10**9} for one in BUILD[:2]]
    records = [make_record("build", "w4a4", build), make_record("bench", "w4a4", prefills(0.5))]
    assert "| 12.00 GiB | 8.00 B |" in llama_bench_markdown(llama_bench(of(suite, records), ["w4a4"]))


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
    log = json.loads(one_of(files, AGGREGATE))
    assert log["evaluation_results"][0]["evaluation_name"] == odd
    table = list(csv.DictReader(io.StringIO(files["csv/tasks.csv"].decode(), newline="")))
    assert table[0]["task"] == odd
    assert [row.count(" | ") for row in files["llama-bench.md"].decode().splitlines()] == [5, 5, 5, 0, 0]
    (index,) = yaml.safe_load(files["w4a4/model-index.yaml"])["model-index"]
    assert index["results"][0]["dataset"]["name"] == odd


def assert_inside(files: Iterable[str]) -> None:
    for path in files:
        assert path.isascii() and not path.startswith("/")
        assert not {"", ".", ".."} & set(path.split("/")), path


@given(st.text(min_size=1, max_size=20))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_name_comes_back_from_every_format(suite: Suite, name: str) -> None:
    dataset = {**TASK, "name": name, "tasks": {name: {"num_docs": 2, "version": 1.0}}}
    record = tasks_record("w4a4", [answer(0, 1.0, task=name), answer(1, 0.0, task=name)], dataset=dataset)
    files = export(of(replace(suite, tasks={name: Task(task=name)}), [record]), ["w4a4"])
    assert_inside(files)
    read = [
        json.loads(one_of(files, AGGREGATE))["evaluation_results"][0]["evaluation_name"],
        *json.loads(one_of(files, "results_"))["results"],
        *(row["task"] for row in csv.DictReader(io.StringIO(files["csv/tasks.csv"].decode(), newline=""))),
        yaml.safe_load(files["w4a4/model-index.yaml"])["model-index"][0]["results"][0]["dataset"]["name"],
    ]
    assert read == [name] * 4


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
    assert {PurePosixPath(path).parts[1] for path in files if path.startswith("lm-eval/")} == wanted
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
    (place / "out/llama-bench.md").write_text("edited")
    assert main(["export", "--suite", "demo.toml", "--out", "out"]) == 0
    assert capsys.readouterr().out == "written: out/llama-bench.md\n"


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


def test_the_version_4_uuids_of_two_runs_differ(suite: Suite) -> None:
    records = [gsm8k(name, [1, 0]) for name in ("source", "nvfp4a16", "w4a4")]
    files = export(of(suite, records), ["nvfp4a16", "w4a4"])
    names = [PurePosixPath(path).stem.removesuffix("_samples") for path in files if path.startswith("every_eval_ever")]
    assert len(set(names)) == 3 and all(len(list(same)) == 2 for _, same in itertools.groupby(sorted(names)))
