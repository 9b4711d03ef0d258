"""`harness fidelity` on the embedded model: all together in one pass, beside the plain engine; and what it refuses."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from harness import cli
from harness.commands.fidelity import compare_with_source, disjoint_windows, fidelity_work
from harness.demo import SUITE
from harness.engines.protocol import open_engine
from harness.errors import UserError
from harness.job import Job
from harness.measure import fidelity as divergence
from harness.record import store
from harness.suite.load import load
from harness.suite.names import NOISE
from harness.suite.schema import Suite
from studies.peers.chunks import chunks_of

WINDOW, LIMIT = 96, 5


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Artifacts that are built once."""
    return tmp_path_factory.mktemp("fidelity")


@pytest.fixture
def suite() -> Suite:
    loaded = load(SUITE)
    assert loaded.fidelity is not None
    return replace(
        loaded,
        variants={"nvfp4a16": loaded.variants["nvfp4a16"]},
        fidelity=replace(loaded.fidelity, window=WINDOW, batch_size=2),
    )


def job_of(suite: Suite, place: Path, results_dir: Path) -> Job:
    return Job(suite, place / "artifacts", results_dir, lambda *_: None, ("harness", "fidelity"), "0" * 8)


def test_one_pass_gives_what_plain_engines_give_to_the_last_bit(suite: Suite, place: Path, tmp_path: Path) -> None:
    job = job_of(suite, place, tmp_path)
    work = fidelity_work(job, None)
    measured = compare_with_source(job, work, LIMIT)
    windows = disjoint_windows(work.ids, WINDOW)[:LIMIT]
    engines = [open_engine("torch", model.folder, dtype="float32", device="cpu") for model in work.models[:2]]
    chunks = chunks_of(engines, windows, 2)
    wanted = [sample for _, sample in divergence.fidelity_samples(chunks, windows, ["nvfp4a16"])]
    found = measured.records["nvfp4a16"].kind("window")
    keys = ("kl_codes", "num_agreed", "num_scored", "index")
    assert [[one[key] for key in keys] for one in found] == [[one[key] for key in keys] for one in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one["nll_nats"] == pytest.approx(other["nll_nats"], rel=1e-12)
        assert one["first_token"] == one["index"] * WINDOW


def test_the_source_beside_itself_has_rows_of_its_own(suite: Suite, place: Path, tmp_path: Path) -> None:
    measured = compare_with_source(job := job_of(suite, place, tmp_path), fidelity_work(job, None), 2)
    assert list(measured.records) == ["nvfp4a16", *NOISE[:2]]
    assert all(window["kl_nats"] == 0 for window in measured.records["noise-restart"].kind("window"))
    assert max(window["kl_nats"] for window in measured.records["noise-batch"].kind("window")) < 1e-7
    variant = measured.records["noise-batch"].run.variant
    assert (variant["recipe"], variant["artifact_digest"]) == (None, variant["source_digest"])


def test_a_single_variant_is_measured_without_the_noise(suite: Suite, place: Path, tmp_path: Path) -> None:
    measured = compare_with_source(job := job_of(suite, place, tmp_path), fidelity_work(job, ["nvfp4a16"]), 1)
    assert list(measured.records) == ["nvfp4a16"]


def test_noise_can_be_that_of_another_engine(suite: Suite, place: Path, tmp_path: Path) -> None:
    """Here of the same library, whose most probable tokens and the rest are kept in a pack."""
    assert suite.fidelity is not None
    suite = replace(suite, fidelity=replace(suite.fidelity, noise_engine="streamed", named_tokens=8))
    job = job_of(suite, place, tmp_path)
    measured = compare_with_source(job, fidelity_work(job, ["source"]), 2)
    record = measured.records["noise-engine"]
    assert record.run.dataset is not None
    assert record.run.dataset["distribution"] == "8 named tokens"
    assert all(abs(window["kl_nats"]) < 1e-7 for window in record.kind("window"))


def test_windows_are_disjoint_and_a_last_one_of_a_single_token_is_left_out() -> None:
    assert disjoint_windows(range(7), 3) == [[0, 1, 2], [3, 4, 5]]
    assert disjoint_windows(range(8), 3) == [[0, 1, 2], [3, 4, 5], [6, 7]]


def test_an_interrupted_comparison_goes_on_where_it_was(suite: Suite, place: Path, tmp_path: Path) -> None:
    job = job_of(suite, place, tmp_path)
    work = fidelity_work(job, ["nvfp4a16"])
    whole = compare_with_source(job, work, 2).records["nvfp4a16"].kind("window")
    told: list[int] = []

    def interrupt(done: int, total: int, description: str, note: str = "", /) -> None:
        if "layers" in description:
            told.append(done)
            if len(told) == 12:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare_with_source(replace(job, progress=interrupt), work, 2)
    assert told[0] == 0
    at = max(told)
    told.clear()
    told.append(-1)  # so that it is not interrupted again
    seen: list[int] = []
    again = replace(job, progress=lambda done, total, what, note="", /: seen.append(done) if "layers" in what else None)
    assert compare_with_source(again, work, 2).records["nvfp4a16"].kind("window") == whole
    assert seen[0] > 0, "layers that were done are not done again"
    assert seen[0] <= at


def suite_text(text: str) -> str:
    return (
        f'name = "mine"\ntitle = "Mine"\n[source]\nlocation = "demo:dense"\n[variants.a16]\nrecipe = "rtn-a16"\n{text}'
    )


@pytest.mark.parametrize(
    ("text", "arguments", "words"),
    [
        ("", [], "has no [fidelity] table"),
        ('[fidelity]\ntext = { demo = "heldot" }', [], "no text 'heldot'"),
        ('[fidelity]\ntext = { demo = "heldout" }\nwindow = 1', [], "'fidelity.window' must be at least 2"),
        ('[fidelity]\ntext = { path = "one.txt" }', [], "has 1 tokens: none of them has one before it"),
        ('[fidelity]\ntext = { demo = "heldout" }\nnoise_batch_size = 4', [], "noise_batch_size = batch_size = 4"),
        ('[fidelity]\ntext = { demo = "heldout" }\nnoise_engine = "torhc"', [], "There is no engine 'torhc'"),
        ('[fidelity]\ntext = { demo = "heldout" }\nnoise_engine = "torch"', [], "is the engine of suite 'mine' itself"),
        ('[fidelity]\ntext = { demo = "heldout" }\nnoise_engine = "vllm"', [], "vllm, which is not installed"),
        ('[fidelity]\ntext = { demo = "heldout" }\nnoise_engine = "server"', [], "A server is no engine"),
        ('[fidelity]\ntext = { demo = "heldout" }\nwindw = 9', [], "unknown key 'fidelity.windw'"),
        ('[fidelity]\ntext = { demo = "heldout" }', ["--variant", "a61"], "no variant 'a61'"),
        ('[fidelity]\ntext = { demo = "heldout" }', ["--engine", "server"], "A server is no engine"),
        ('[fidelity]\ntext = { demo = "heldout" }\nsetups = ["mtp"]', [], "names 'mtp'"),
    ],
)
def test_bad_input_is_a_sentence_and_exit_2(
    text: str, arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(suite_text(text))
    (tmp_path / "one.txt").write_text("a")
    places = ["--results", str(tmp_path / "r"), "--artifacts", str(tmp_path / "a")]
    assert cli.main(["fidelity", "--suite", str(file), *places, *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "r").exists()
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("name", NOISE)
def test_no_variant_may_be_called_like_a_row_of_noise(name: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(suite_text(f'[variants.{name}]\nrecipe = "rtn-a16"'))
    with pytest.raises(UserError, match=f"must not use '{name}'"):
        load(file)


@pytest.fixture
def small(tmp_path: Path, place: Path) -> Iterator[list[str]]:
    file = tmp_path / "mine.toml"
    file.write_text(
        suite_text(f'[engine]\ndtype = "float32"\n[fidelity]\ntext = {{ demo = "heldout" }}\nwindow = {WINDOW}')
    )
    yield [
        "fidelity",
        "--suite",
        str(file),
        "--results",
        str(tmp_path / "r"),
        "--artifacts",
        str(place / "b"),
        "--limit",
        "2",
    ]


def test_the_command_prints_a_table_with_intervals_noise_and_records(
    small: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(small) == 0
    out = capsys.readouterr().out
    for words in (
        "KL, nats [95 %]",
        "99.9 %",
        "same top token",
        "RMS Δp",
        "noise-batch",
        "scored tokens 190",
        "Records:",
    ):
        assert words in out


def test_json_is_one_document_whose_records_can_be_read(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*small, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document["records"]) == {"a16", "noise-restart", "noise-batch"}
    for path in document["records"].values():
        assert store.read(Path(path)).run.measure == "fidelity"
