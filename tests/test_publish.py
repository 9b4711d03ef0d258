"""Publishing: what is put together, what is refused, and what arrives at a hub on this machine."""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from harness import demo
from harness.cli import main
from harness.errors import UserError
from harness.model.checkpoint import open_checkpoint
from harness.publication import upload as uploads
from harness.publication.folder import PUBLISHED, Assembled, of_this_machine
from harness.quantize.build import build
from harness.quantize.recipes import recipe_named
from harness.record.run import Record
from harness.suite.load import load, narrowed
from tests.artifacts import quiet
from tests.hub import Hub, Repository, hub
from tests.records import DATASET, TASK, answer, make_record, stored, tasks_record, windows

pytestmark = pytest.mark.usefixtures("drawn_once")

ROOT = Path(__file__).parent.parent
REPO = "someone/tiny-nvfp4"
TOKEN = "hf_thisIsNobodysToken0123456789"
OUT = Path("publish/tiny/a16")
SUITE = """
name = "tiny"
title = "A tiny model"
description = "Random weights."
[source]
location = "./source"
license = "apache-2.0"
[variants.a16]
recipe = "rtn-a16"
[variants.w4a4]
recipe = "w4a4"
[ppl]
protocols = ["wikitext2-512"]
text = { demo = "heldout" }
[[gate]]
metric = "log_ppl"
variant = "a16"
margin = 0.02
[[gate]]
metric = "log_ppl"
variant = "w4a4"
margin = 0.02
"""
LOSS = [0.001 * (-1) ** index for index in range(7)]
"""Nats per token beside what 8.1 against 8.0 is, by window: the whole interval is about 0.0124."""


# -- A project of its own ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, dense_source: Path) -> Path:
    """A folder with a suite, its source with a licence, a built variant and its records. Copied, never changed."""
    root = tmp_path_factory.mktemp("project")
    shutil.copytree(dense_source, root / "source")
    (root / "source/LICENSE").write_text("Do what you like.\n")
    (root / "source/README.md").write_text("Not the card of the variant.\n")
    (root / "suite.toml").write_text(SUITE)
    build(root / "source", recipe_named("rtn-a16"), root / "artifacts/tiny/a16", quiet)
    measure(root)
    return root


@pytest.fixture
def place(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the project as the working directory, without a token and online."""
    shutil.copytree(project, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.delenv(uploads.TOKEN, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return tmp_path / "project"


def measure(
    root: Path, loss: float = 8.1, spread: list[float] = LOSS, of: dict[str, Any] | None = None, **header: Any
) -> list[Record]:
    """Perplexities of the source (8.0) and of the variant that lies in a project, as its only records. `of` goes into
    what the variant's says of the variant, and `header` into its other fields."""
    shutil.rmtree(root / "results", ignore_errors=True)
    suite, source = load(root / "suite.toml"), open_checkpoint(root / "source").fingerprint()
    common = {"suite": suite.resolved(), "suite_digest": suite.digest}
    whole, lossy = windows(8.0, num_tokens=12_288), windows(loss, spread, num_tokens=12_288)
    of_source = make_record("ppl", "source", whole, **common)
    of_source.run.variant.update(artifact_digest=source, source_digest=source)
    of_variant = make_record("ppl", "a16", lossy, **{**common, **header})
    lies_here = {"artifact_digest": manifest_of(root)["digest"], "source_digest": source}
    of_variant.run.variant.update({**lies_here, **(of or {})})
    return stored(root / "results", [of_source, of_variant])


def manifest_of(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / "artifacts/tiny/a16/harness-build.json").read_text())
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(*more: str) -> int:
    return main(["publish", "--suite", "suite.toml", "--variant", "a16", "--repo", REPO, *more])


def rehearse(*more: str) -> int:
    return run("--dry-run", *more)


def edit(path: str, old: str, new: str) -> None:
    text = Path(path).read_text()
    assert old in text
    Path(path).write_text(text.replace(old, new, 1))


# -- What is put together ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The embedded model's variant by the committed records: the upload folder, and what the command printed."""
    root = tmp_path_factory.mktemp("demo")
    build(demo.checkpoint_path("dense"), recipe_named("rtn-a16"), root / "artifacts/demo/nvfp4a16", quiet)
    command = ["publish", "--suite", "suites/demo.toml", "--variant", "nvfp4a16", "--repo", REPO, "--dry-run"]
    printed = io.StringIO()
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(printed):
        assert main([*command, "--artifacts", str(root / "artifacts"), "--out", str(root / "out")]) == 0, (
            printed.getvalue()
        )
    return root, printed.getvalue()


def test_a_dry_run_of_the_embedded_suite_assembles_everything(rehearsed: tuple[Path, str]) -> None:
    root, _ = rehearsed
    found = contents(root / "out")
    artifact = contents(root / "artifacts/demo/nvfp4a16")
    assert {name: found[name] for name in artifact} == artifact
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.json", "merges.txt"):
        assert found[name] == (demo.checkpoint_path("dense") / name).read_bytes()
    assert found["suite.toml"] == (ROOT / "suites/demo.toml").read_bytes()
    records = {name for name in found if name.endswith(".jsonl")}
    cited = set(re.findall(r"\]\((results/[^)]+\.jsonl)\)", found["README.md"].decode()))
    assert records == cited and len(cited) > 10
    assert all(found[name] == (ROOT / name).read_bytes() for name in records)
    assert not [name for name in records if "-demo-w4a4" in name or "-demo-moe-" in name]
    images = set(re.findall(r"\((figures/[^)]+)\)", found["README.md"].decode()))
    assert images and images <= found.keys()
    assert found["index.html"].startswith(b"<!doctype html>") or found["index.html"].startswith(b"<!DOCTYPE html>")
    assert any(name.startswith("results/exports/") for name in found)


def test_what_would_be_uploaded_is_listed_with_its_size_and_the_total(rehearsed: tuple[Path, str]) -> None:
    root, printed = rehearsed
    found = contents(root / "out")
    listed = json.loads(found.pop(PUBLISHED))
    assert listed["files"] == {name: len(data) for name, data in sorted(found.items())}
    assert listed["artifact_digest"] == json.loads(found["harness-build.json"])["digest"]
    files = re.findall(r"^(\S+) {2,}\d", printed, re.MULTILINE)
    assert files == [*sorted(found), PUBLISHED, "total"]
    total = sum(map(len, found.values())) + (root / "out" / PUBLISHED).stat().st_size
    assert re.search(rf"^total +{total / 1e6:.2f} MB$", printed, re.MULTILINE)


def test_the_assembled_card_can_be_traced_where_it_lies(rehearsed: tuple[Path, str]) -> None:
    assert main(["trace", str(rehearsed[0] / "out/README.md")]) == 0


def test_nothing_of_this_machine_is_in_the_folder(rehearsed: tuple[Path, str]) -> None:
    root, _ = rehearsed
    found = contents(root / "out")
    container = b":/root/.cache/huggingface"  # in the commands to serve a variant; whoever tests may be root as well
    for place in (str(root), str(ROOT), str(Path.home()) + "/"):
        assert [name for name, data in found.items() if place.encode() in data.replace(container, b"")] == []


def test_only_weights_are_shared_with_the_artifact_and_everything_else_is_a_copy(place: Path) -> None:
    assert rehearse() == 0
    for file in (place / "artifacts/tiny/a16").iterdir():
        assert file.samefile(OUT / file.name) == (file.suffix == ".safetensors")


def test_a_disk_without_links_gets_copies(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(Path, "hardlink_to", refused)
    assert rehearse() == 0
    for file in (place / "artifacts/tiny/a16").iterdir():
        assert not file.samefile(OUT / file.name) and file.read_bytes() == (OUT / file.name).read_bytes()


def test_links_in_an_artifact_are_followed_and_files_beside_it_stay_at_home(place: Path) -> None:
    artifact, elsewhere = place / "artifacts/tiny/a16", place / "elsewhere"
    before = contents(artifact)
    elsewhere.mkdir()
    for name in ("model-1.safetensors", "vocab.json", "merges.txt"):
        if (artifact / name).exists():
            (artifact / name).rename(elsewhere / name)
            (artifact / name).symlink_to(elsewhere / name)
    (artifact / "notes.txt").write_text("for nobody")
    (artifact / "passwd").symlink_to("/etc/passwd")
    assert rehearse() == 0
    found = contents(OUT)
    assert {name: found[name] for name in before} == before
    assert not [path for path in OUT.rglob("*") if path.is_symlink()]
    assert not {"notes.txt", "passwd"} & found.keys()


def test_the_licence_of_the_source_goes_along_and_its_card_does_not(place: Path) -> None:
    (place / "source/NOTICE").write_text("Made by somebody.\n")  # which the build knew nothing of
    assert rehearse() == 0
    assert (OUT / "LICENSE").read_text() == "Do what you like.\n"
    assert (OUT / "NOTICE").read_text() == "Made by somebody.\n"
    assert 'license: "apache-2.0"' in (OUT / "README.md").read_text()
    assert "Not the card of the variant" not in (OUT / "README.md").read_text()


def test_the_same_records_give_the_same_folder_and_the_old_one_is_replaced(place: Path) -> None:
    assert rehearse() == 0
    first = contents(OUT)
    (OUT / "README.md").write_text("edited")
    assert rehearse() == 0
    assert contents(OUT) == first
    assert [path.name for path in OUT.parent.iterdir()] == [OUT.name]


def test_json_is_one_document(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rehearse("--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["files"] == {name: len(data) for name, data in contents(OUT).items()}
    assert document["uploaded"] is None and document["findings"] == []


def test_scores_of_a_registered_benchmark_lie_where_the_hub_looks_for_them(place: Path) -> None:
    with Path("suite.toml").open("a") as file:
        file.write('[tasks.gsm8k]\ntask = "gsm8k"\n')
    measured, suite = measure(place), load(place / "suite.toml")
    about = {"version": 3.0, "dataset": "openai/gsm8k", "num_fewshot": 5, "num_docs": 4}
    dataset = {**TASK, "name": "gsm8k", "settings": {"task": "gsm8k", "limit": None}, "tasks": {"gsm8k": about}}
    runs = [
        tasks_record(
            name,
            [answer(doc_id, score, task="gsm8k") for doc_id, score in enumerate(scores)],
            dataset=dataset,
            suite=suite.resolved(),
            suite_digest=suite.digest,
        )
        for name, scores in (("source", (1.0, 0.0, 1.0, 1.0)), ("a16", (1.0, 0.0, 0.0, 1.0)))
    ]
    for run, other in zip(runs, measured, strict=True):
        run.run.variant.update(other.run.variant)
    stored(place / "results", runs)
    assert rehearse() == 0
    (entry,) = yaml.safe_load((OUT / ".eval_results/gsm8k.yaml").read_text())
    assert entry["dataset"]["id"] == "openai/gsm8k" and entry["value"] == 50
    assert (OUT / "results/exports/model-index.yaml").exists() and not (OUT / "results/exports/a16").exists()


@pytest.mark.parametrize("name", ["csv", "data", "v1."])
def test_exports_lie_at_the_same_places_whatever_the_variant_is_called(name: str, place: Path) -> None:
    assert rehearse() == 0
    plain = {path for path in contents(OUT) if path.startswith("results/exports/csv/")}
    for path in ("suite.toml", *map(str, Path("results").rglob("*.jsonl"))):
        Path(path).write_text(Path(path).read_text().replace("a16]", f"{name}]").replace('"a16"', f'"{name}"'))
    Path("suite.toml").write_text(Path("suite.toml").read_text().replace("[variants.v1.]", '[variants."v1."]'))
    Path("artifacts/tiny/a16").rename(f"artifacts/tiny/{name}")
    command = ["publish", "--suite", "suite.toml", "--variant", name, "--repo", REPO, "--dry-run"]
    assert main([*command, "--out", "elsewhere"]) == 0
    found = contents(Path("elsewhere"))
    assert {path for path in found if path.startswith("results/exports/csv/")} == plain != set()
    assert "results/exports/model-index.yaml" in found


def test_git_does_not_see_the_default_folder() -> None:
    assert "/publish/" in (ROOT / ".gitignore").read_text().splitlines()


def test_a_narrowed_suite_knows_nothing_of_the_other_variants() -> None:
    suite = load(ROOT / "suites/demo.toml")
    alone = narrowed(suite, "w4a4")
    in_setups = (f"{row}+{one}" for row in ("source", "w4a4") for one in suite.setups)
    assert set(alone.rows()) == {"source", "w4a4", *in_setups}
    assert alone.bench is not None and alone.bench.variants == ()
    assert {rule.variant for rule in suite.gate} == {"source", "nvfp4a16", "w4a4"}
    assert alone.gate == tuple(rule for rule in suite.gate if rule.variant != "nvfp4a16")
    against_another = dataclasses.replace(suite.gate[0], variant="w4a4", versus="nvfp4a16")
    assert narrowed(dataclasses.replace(suite, gate=(against_another,)), "w4a4").gate == ()


# -- What is refused with a sentence -----------------------------------------------------------------------------


def no_artifact(place: Path) -> None:
    shutil.rmtree(place / "artifacts")


def unfinished_artifact(place: Path) -> None:
    (place / "artifacts/tiny/a16/config.json").unlink()


def artifact_of_another_recipe(place: Path) -> None:
    edit("suite.toml", 'recipe = "rtn-a16"', 'recipe = "rtn-a16"\nscales = "search"')


def artifact_of_another_source(place: Path) -> None:
    edit("source/config.json", '"text_config": {', '"text_config": {"note": 1, ')


def manifest_that_is_none(place: Path) -> None:
    Path("artifacts/tiny/a16/harness-build.json").write_text("{}")


def manifest_that_leaves_its_folder(place: Path) -> None:
    manifest = manifest_of(place)
    manifest["files"]["../../../suite.toml"] = {"bytes": 1, "digest": "0"}
    Path("artifacts/tiny/a16/harness-build.json").write_text(json.dumps(manifest))


def manifest_of_its_own_parent(place: Path) -> None:
    manifest = manifest_of(place)
    manifest["files"][".."] = {"bytes": 1, "digest": "0"}
    Path("artifacts/tiny/a16/harness-build.json").write_text(json.dumps(manifest))


def manifest_of_no_objects(place: Path) -> None:
    manifest = manifest_of(place)
    manifest["files"]["config.json"] = 17
    Path("artifacts/tiny/a16/harness-build.json").write_text(json.dumps(manifest))


def one_bit_of_a_weight(place: Path) -> None:
    shard = next(Path("artifacts/tiny/a16").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1000] ^= 1
    shard.write_bytes(data)


def a_cut_shard(place: Path) -> None:
    shard = next(Path("artifacts/tiny/a16").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])


def a_manifest_with_another_digest(place: Path) -> None:
    edit("artifacts/tiny/a16/harness-build.json", manifest_of(place)["digest"], "6" * 64)
    measure(place)


def a_missing_tokenizer(place: Path) -> None:
    Path("artifacts/tiny/a16/tokenizer.json").unlink()


def another_tokenizer(place: Path) -> None:
    edit("artifacts/tiny/a16/tokenizer.json", "1.0", "1.1")


def another_tokenizer_in_the_source(place: Path) -> None:
    edit("source/tokenizer.json", "1.0", "1.1")


def records_of_another_artifact(place: Path) -> None:
    measure(place, of={"artifact_digest": "4" * 64})


def records_of_another_source(place: Path) -> None:
    measure(place, of={"source_digest": "5" * 64})


def no_records(place: Path) -> None:
    shutil.rmtree(place / "results")


def no_rule(place: Path) -> None:
    edit("suite.toml", 'variant = "a16"', 'variant = "w4a4"\nversus = "a16"')


def a_folder_of_somebody_else(place: Path) -> None:
    OUT.mkdir(parents=True)
    (OUT / "thesis.txt").write_text("three years")


def a_file_of_somebody_else(place: Path) -> None:
    assert rehearse() == 0
    (OUT / "thesis.txt").write_text("three years")


def a_file_in_the_way(place: Path) -> None:
    OUT.parent.mkdir(parents=True)
    OUT.write_text("three years")


def a_source_with_a_file_of_ours(place: Path) -> None:
    (place / "source/index.html").write_text("mine")
    shutil.rmtree(place / "artifacts")
    build(place / "source", recipe_named("rtn-a16"), place / "artifacts/tiny/a16", quiet)
    measure(place)


@pytest.mark.parametrize(
    ("situation", "says"),
    [
        (no_artifact, "holds no built artifact of 'a16'"),
        (unfinished_artifact, "holds no built artifact"),
        (artifact_of_another_recipe, "another recipe or source"),
        (artifact_of_another_source, "another recipe or source"),
        (manifest_that_is_none, "is no manifest of a build"),
        (manifest_that_leaves_its_folder, "is no manifest of a build"),
        (manifest_of_its_own_parent, "is no manifest of a build"),
        (manifest_of_no_objects, "is no manifest of a build"),
        (one_bit_of_a_weight, ".safetensors is not as its build wrote it"),
        (a_cut_shard, ".safetensors is not as its build wrote it"),
        (a_manifest_with_another_digest, "harness-build.json is not as its build wrote it"),
        (a_missing_tokenizer, "tokenizer.json is not as its build wrote it"),
        (another_tokenizer, "tokenizer.json is not as its build wrote it"),
        (records_of_another_artifact, "is of another artifact, 444444444444, than the one that lies here"),
        (records_of_another_source, "is of another source, 555555555555, than the one that lies here"),
        (no_records, "There is no record of 'a16'"),
        (no_rule, "has no [[gate]] rule about 'a16'"),
        (a_folder_of_somebody_else, "exists and was not made by `harness publish`"),
        (a_file_of_somebody_else, "holds thesis.txt"),
        (a_file_in_the_way, "exists and was not made by `harness publish`"),
        (a_source_with_a_file_of_ours, "has a file 'index.html', and so have the card"),
    ],
)
def test_what_cannot_be_published_is_a_sentence_and_a_remedy(
    situation: Callable[[Path], None], says: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    situation(place)
    before = contents(place)
    capsys.readouterr()
    assert rehearse() == 2
    out, told = capsys.readouterr()
    assert says in told and len(told.splitlines()) == 2 and out == ""
    assert contents(place) == before


@pytest.mark.parametrize("repo", ["tiny", "a/b/c", "a--b/c", "some one/c", "a/.c", "a/c.git", "a/" + 97 * "c", ""])
def test_an_id_that_the_hub_would_not_take_is_refused(
    repo: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["publish", "--suite", "suite.toml", "--variant", "a16", "--repo", repo, "--dry-run"]) == 2
    told = capsys.readouterr().err
    assert f"'{repo}' is no repository of the Hub" in told and "--repo owner/name" in told
    assert not OUT.exists()


def test_an_unknown_variant_is_refused_with_the_nearest_one(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["publish", "--suite", "suite.toml", "--variant", "a61", "--repo", REPO, "--dry-run"]) == 2
    assert "Did you mean 'a16'?" in capsys.readouterr().err


@pytest.mark.parametrize("token", [None, "", "  ", "hf_two words", "hf_line\nbreak"])
def test_an_upload_without_a_token_is_refused_before_anything_is_done(
    token: str | None, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if token is not None:
        monkeypatch.setenv(uploads.TOKEN, token)
    assert run() == 2
    told = capsys.readouterr().err
    assert uploads.TOKEN in told and "hf_" not in told
    assert not Path("publish").exists()


def test_an_upload_is_refused_where_the_hub_is_switched_off(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(uploads.TOKEN, TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert run() == 2
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err and not Path("publish").exists()


# -- What is found and refused -----------------------------------------------------------------------------------


def a_fp8_cache(place: Path) -> None:
    """A configuration that verify objects to, in an artifact that is otherwise as its manifest says."""
    artifact, manifest = Path("artifacts/tiny/a16"), manifest_of(place)
    config = json.loads((artifact / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8, "type": "float"}
    data = json.dumps(config).encode()
    (artifact / "config.json").write_bytes(data)
    manifest["files"]["config.json"] = {"bytes": len(data), "digest": hashlib.sha256(data).hexdigest()}
    digests = {name: one["digest"] for name, one in manifest["files"].items()}
    manifest["digest"] = hashlib.sha256((json.dumps(digests, indent=2) + "\n").encode()).hexdigest()
    (artifact / "harness-build.json").write_text(json.dumps(manifest))
    measure(place)


def a_loss_beyond_the_margin(place: Path) -> None:
    measure(place, 9.0)


def a_claim_without_evidence(place: Path) -> None:
    edit("suite.toml", "[ppl]", '[[claim]]\nkind = "better"\nvariant = "a16"\nmetric = "log_ppl"\n[ppl]')
    measure(place)


def a_number_without_a_record(place: Path) -> None:
    edit("suite.toml", "Random weights.", "It weighs 5 GB.")
    measure(place)


def a_path_of_this_machine(place: Path) -> None:
    edit("suite.toml", "Random weights.", f"Made in {place}/somewhere.")
    measure(place)


def a_path_in_a_record(place: Path) -> None:
    measure(place, command=("harness", "ppl", "--suite", f"{Path.home()}/suites/tiny.toml"))


@pytest.mark.parametrize(
    ("situation", "says"),
    [
        (another_tokenizer_in_the_source, "verify: tokenizer.json is not identical to the source's"),
        (a_fp8_cache, "verify: config.json kv_cache_scheme is set: vLLM"),
        (a_loss_beyond_the_margin, "gate: a16: log_ppl wikitext2-512 against source: fail: at least 0.1"),
        (a_claim_without_evidence, "claims: "),
        (a_number_without_a_record, "trace: README.md: Line "),
        (a_path_of_this_machine, "README.md, line "),
        (a_path_in_a_record, "-ppl-tiny-a16-"),
    ],
)
def test_a_finding_keeps_the_folder_from_being_there(
    situation: Callable[[Path], None], says: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    situation(place)
    assert rehearse() == 1
    printed = capsys.readouterr().out
    assert says in printed and printed.endswith(f"{OUT}: REFUSED\n") and ".tmp" not in printed
    assert not OUT.exists() and not Path("publish").exists()


def test_a_refusal_leaves_folders_that_were_there_before(place: Path) -> None:
    OUT.parent.mkdir(parents=True)
    a_number_without_a_record(place)
    assert rehearse() == 1
    assert list(Path("publish").rglob("*")) == [OUT.parent]


def test_what_is_refused_leaves_the_folder_that_was_there(place: Path) -> None:
    assert rehearse() == 0
    before = contents(OUT)
    a_number_without_a_record(place)
    assert rehearse() == 1
    assert contents(OUT) == before


def test_the_value_of_a_secret_variable_is_found_and_not_repeated(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STORAGE_API_KEY", "correct horse battery")
    edit("suite.toml", "Random weights.", "A correct horse battery.")
    measure(place)
    assert rehearse() == 1
    printed = capsys.readouterr().out
    assert "suite.toml, line 4 holds the value of the variable STORAGE_API_KEY" in printed
    assert "correct horse battery" not in printed


@pytest.mark.parametrize("situation", ["open", "incomparable"])
def test_what_the_gate_cannot_tell_is_refused_unless_it_is_allowed(
    situation: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if situation == "open":  # a margin in the middle of what may be lost
        measure(place, 8.16, [0.2 * (-1) ** index for index in range(7)])
    else:
        measure(place, dataset={**DATASET, "token_ids_sha256": "7" * 64})
    verdict = "inconclusive" if situation == "open" else "incomparable"
    assert rehearse() == 3
    printed = capsys.readouterr().out
    assert f"gate: a16: log_ppl wikitext2-512 against source: {verdict}" in printed and "--allow-inconcl" in printed
    assert not OUT.exists()
    assert rehearse("--allow-inconclusive") == 0
    assert verdict in capsys.readouterr().out and (OUT / "README.md").exists()


# -- What is nobody's business -----------------------------------------------------------------------------------

# "." is no name: `Path` drops it.
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/\0\n\r"), min_size=1, max_size=8).filter(
    lambda name: name != "."
)


@given(parts=st.lists(NAMES, min_size=2, max_size=4), after=st.sampled_from(["", "/", "/x.toml", " ", '"', "."]))
def test_a_path_is_found_however_it_is_written(
    parts: list[str], after: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place, folder = Path("/", *parts), tmp_path_factory.mktemp("written")
    text = f"{place}{after}"
    (folder / "plain.md").write_text(f"first\nsee ({text})\n")
    (folder / "record.jsonl").write_text("{}\n" + json.dumps({"command": [text]}) + "\n")
    found = list(of_this_machine(folder, ["plain.md", "record.jsonl"], [place], {}))
    assert [one.partition(" holds ")[0] for one in found] == ["plain.md, line 2", "record.jsonl, line 2"]


@pytest.mark.parametrize(
    ("place", "text", "is_found"),
    [
        ("/home/me", "/home/menu", False),
        ("/home/me", "https://example.org/home/me", False),
        ("/home/me", "--suite=/home/me/x.toml", True),
        ("/root", '"/root": 17', False),  # a token of a vocabulary
        ("/root", "/root/models", True),
        ("/root", '{"command": ["/root/.local/results"]}', True),
        ("/root", "-v ~/.cache/huggingface:/root/.cache/huggingface", False),  # of the container
        ("/root", "-v /root/.cache/huggingface:/root/.cache/huggingface", True),
        ("/root", "PATH=/bin:/root/.local/bin", True),
        ("/", "/", False),
    ],
)
def test_a_path_is_found_where_it_is_one(place: str, text: str, is_found: bool, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text)
    assert bool(list(of_this_machine(tmp_path, ["a.txt"], [Path(place)], {}))) == is_found


def test_settings_that_are_no_secrets_may_be_said(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("true en_US.UTF-8 0123456789")
    environment = {"TOKENIZERS_PARALLELISM": "true", "LANG": "en_US.UTF-8", "HF_TOKEN": "0123456789"}
    (found,) = of_this_machine(tmp_path, ["a.txt"], [], environment)
    assert "HF_TOKEN" in found


# -- The upload --------------------------------------------------------------------------------------------------


@pytest.fixture
def server(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on this machine that this process uploads to, with the right token."""
    with hub(TOKEN) as running:
        monkeypatch.setenv(uploads.TOKEN, TOKEN)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", running.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        yield running


@pytest.fixture
def assembled(tmp_path: Path) -> Assembled:
    """A folder to upload, of small files and a large one."""
    files = {
        "README.md": b"---\nlicense: mit\n---\n",
        "model.safetensors": bytes(range(256)) * 99,
        "results/a/b.jsonl": b"{}",
    }
    for name, data in files.items():
        (tmp_path / "assembled" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "assembled" / name).write_bytes(data)
    sizes = {name: len(data) for name, data in files.items()}
    return Assembled(tmp_path / "assembled", "0" * 64, sizes, (), ())


def upload(assembled: Assembled, *, public: bool = False) -> uploads.Uploaded:
    return uploads.upload_folder(assembled.folder, assembled.files, REPO, "tiny a16", TOKEN, public=public, bars=False)


def refusal(assembled: Assembled) -> str:
    """What an upload is refused with: a sentence and a remedy without the token."""
    with pytest.raises(UserError) as caught:
        upload(assembled)
    told = f"{caught.value.problem} {caught.value.remedy}"
    assert TOKEN not in told and "\n" not in told
    return told


def uploaded(server: Hub) -> dict[str, bytes]:
    """What the repository holds, but for the file that the hub itself put there."""
    return {name: data for name, data in server.repositories[REPO].files.items() if name != ".gitattributes"}


def test_an_upload_is_one_commit_of_the_folder_byte_for_byte_and_the_token_is_nowhere(place: Path) -> None:
    """As a user does it: the command in a process of its own, with everything in the environment."""
    with hub(TOKEN) as server:
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))},
            "HF_ENDPOINT": server.url,
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(place / "hub-home"),
            "PYTHONPATH": str(ROOT),
        }
        command = ["publish", "--suite", "suite.toml", "--variant", "a16", "--repo", REPO]
        done = subprocess.run(
            [sys.executable, "-m", "harness", *command], cwd=place, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        repository = server.repositories[REPO]
        assert uploaded(server) == contents(OUT)
        digest = manifest_of(place)["digest"]
        assert repository.private and repository.commits == [f"tiny a16, artifact {digest[:12]}"]
        assert done.stdout.splitlines()[-1] == f"{server.url}/{REPO}/commit/{1:040x}  private"
    assert TOKEN not in done.stdout + done.stderr
    assert [name for name, data in contents(place).items() if TOKEN.encode() in data] == []


def test_a_command_that_breaks_off_half_way_ends_in_a_sentence_and_the_same_one_goes_on(
    server: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    server.trouble = {"/commit/main": "die"}
    assert run() == 2
    out, told = capsys.readouterr()
    assert TOKEN not in out + told and "Traceback" not in told and len(told.splitlines()) == 2, told
    assert f"{server.url} did not take the upload to '{REPO}': " in told and "Run the same command again" in told
    sent, server.trouble = list(server.stored), {}
    assert run() == 0
    assert uploaded(server) == contents(OUT)
    assert server.stored == sent != [], "the weights were there already"


def test_a_wrong_token_is_one_sentence_although_the_server_sends_it_back(
    server: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    server.token = "hf_another"
    assert run() == 2
    out, told = capsys.readouterr()
    assert TOKEN not in out + told and len(told.splitlines()) == 2, told
    assert "401" in told and "Bearer …" in told and "may write" in told
    assert server.repositories == {}


def test_a_refused_folder_is_not_uploaded(server: Hub, place: Path) -> None:
    a_number_without_a_record(place)
    assert run() == 1
    assert server.requests == []


@pytest.mark.parametrize(
    ("end", "trouble", "says"),
    [
        ("/repos/create", "hang", "timed out"),
        ("/repos/create", 500, "500 The hub is not well"),
        ("/validate-yaml", "die", "disconnected"),
        ("/commit/main", "hang", "timed out"),
        ("/commit/main", 413, "413 The hub is not well"),
        (f"/tree/{1:040x}", 403, "403 The hub is not well"),
    ],
)
def test_a_hub_that_hangs_dies_or_fails_is_a_sentence_and_the_next_upload_succeeds(
    end: str, trouble: str | int, says: str, server: Hub, assembled: Assembled, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "_PATIENCE_SECONDS", 0.5)
    server.trouble = {end: trouble}
    told = refusal(assembled)
    assert says in told and server.url in told
    server.trouble = {}
    monkeypatch.setattr(uploads, "_PATIENCE_SECONDS", 30.0)
    upload(assembled)
    assert uploaded(server) == contents(assembled.folder)


def test_a_second_upload_sends_no_weights_again(server: Hub, assembled: Assembled) -> None:
    first, second = upload(assembled, public=True), upload(assembled, public=True)
    assert len(server.stored) == 1
    assert not (first.private or second.private or server.repositories[REPO].private)
    assert first.url == f"{server.url}/{REPO}/commit/{1:040x}" and first.others == ()


def test_a_card_without_metadata_is_refused_by_the_hub_before_anything_is_sent(
    server: Hub, assembled: Assembled
) -> None:
    (assembled.folder / "README.md").write_text("# no metadata")
    assert "Invalid metadata in README.md. - no metadata" in refusal(assembled)
    assert server.stored == [] and uploaded(server) == {}


def test_a_public_repository_gets_nothing_unless_it_is_said(server: Hub, assembled: Assembled) -> None:
    server.repositories[REPO] = Repository(private=False)
    assert "is public" in refusal(assembled)
    assert uploaded(server) == {} and not [one for one in server.requests if "preupload" in one]
    assert not upload(assembled, public=True).private


def test_what_the_repository_holds_besides_is_left_there_and_named(server: Hub, assembled: Assembled) -> None:
    server.repositories[REPO] = Repository(private=True, files={"old.safetensors": b"old"})
    found = upload(assembled, public=True)
    assert found.others == ("old.safetensors",) and found.private
    assert uploaded(server) == {**contents(assembled.folder), "old.safetensors": b"old"}


def test_files_that_the_repository_ignores_are_missed(server: Hub, assembled: Assembled) -> None:
    server.repositories[REPO] = Repository(private=True, ignored=("results/",))
    assert "lacks 1 of the files, such as results/a/b.jsonl" in refusal(assembled)


def test_a_hub_that_is_not_there_is_a_sentence(
    server: Hub, assembled: Assembled, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub(TOKEN) as gone:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", gone.url)
    assert "did not take the upload" in (told := refusal(assembled)) and "refused" in told
