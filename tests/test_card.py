"""The card: what it says, that it says the same everywhere, and that it touches nothing but its blocks."""

import dataclasses
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from harness.errors import UserError
from harness.record.run import Record
from harness.record.store import RunWriter, read_all
from harness.report import card, figure_data
from harness.suite.load import load
from harness.suite.schema import Suite, Task
from tests.records import (
    BUILD,
    DATASET,
    ENGINE,
    SENSITIVITY,
    answer,
    decodes,
    demo_records,
    fidelity_record,
    fidelity_windows,
    make_record,
    tasks_record,
    windows,
)

pytestmark = pytest.mark.usefixtures("drawn_once")

SUITE = """
name = "demo"
title = "NVFP4 of the embedded demo model"
description = "A small trained model."
[source]
location = "./models/dense"
base_model = "example/dense"
license = "apache-2.0"
[variants.nvfp4a16]
recipe = "rtn-a16"
[ppl]
protocols = ["wikitext2-512"]
text = { demo = "heldout" }
[fidelity]
text = { demo = "heldout" }
"""
CARD, PAGE_FILE, SVG, PNG = (
    f"reports/demo/{name}" for name in ("README.md", "index.html", "overview.svg", "overview.png")
)


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    (tmp_path / "demo.toml").write_text(SUITE)
    return load(tmp_path / "demo.toml")


def rendered(suite: Suite, records: list[Record], **pages: str) -> dict[str, bytes]:
    return card.generated_files(
        suite, records, results_dir="results", pages={f"{name}.md": text.encode() for name, text in pages.items()}
    )


def text_of(suite: Suite, records: list[Record]) -> str:
    return rendered(suite, records)[CARD].decode()


# -- What it says ------------------------------------------------------------------------------------------------


def test_the_front_matter_is_yaml_that_the_hub_reads(suite: Suite) -> None:
    _, front, _ = text_of(suite, []).split("---\n", 2)
    assert yaml.safe_load(front) == {
        "license": "apache-2.0",
        "base_model": "example/dense",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "tags": ["nvfp4", "compressed-tensors", "deltanet"],
    }


@pytest.mark.parametrize(
    ("location", "base_model"), [("Qwen/Qwen3.5-9B", "Qwen/Qwen3.5-9B"), ("demo:dense", None), ("./a/b", None)]
)
def test_a_hub_source_is_the_base_model_and_a_folder_is_none(
    tmp_path: Path, location: str, base_model: str | None
) -> None:
    text = SUITE.replace('base_model = "example/dense"\n', "").replace("./models/dense", location)
    (tmp_path / "demo.toml").write_text(text)
    front = yaml.safe_load(text_of(load(tmp_path / "demo.toml"), []).split("---\n", 2)[1])
    assert front.get("base_model") == base_model
    assert ("base_model_relation" in front) == (base_model is not None)


def test_the_headline_gives_size_loss_and_speed(suite: Suite) -> None:
    headline = next(line for line in text_of(suite, demo_records()).splitlines() if line.startswith("- **"))
    for words in (
        "**nvfp4a16** (rtn-a16)",
        "6.50 MB of 18.00 MB (36.1 %)",
        "Δ log-perplexity +0.01",
        "tok/s at batch 1",
    ):
        assert words in headline


def test_every_section_is_there_without_any_record_and_says_what_to_run(suite: Suite) -> None:
    text = text_of(suite, [])
    headings = [heading for heading, _ in card.BLOCKS.values() if heading]
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == headings
    for measure in ("build", "verify", "ppl", "fidelity", "bench", "sensitivity"):
        assert f"No record yet: run `nox -s {measure}`." in text
    without = text_of(dataclasses.replace(suite, ppl=None, fidelity=None), demo_records())
    assert "## Perplexity\n\nThe suite measures no perplexity." in without
    assert "## Fidelity\n\nThe suite measures no fidelity." in without
    assert "**nvfp4a16** (rtn-a16): not measured yet." in text


def test_fidelity_stands_beside_its_noise_and_says_what_is_not_above_it(suite: Suite) -> None:
    measured = [fidelity_record("nvfp4a16", fidelity_windows([0.01, 0.012, 0.011]))]
    text = text_of(suite, measured)
    assert "**There is no noise floor yet" in text
    assert "**By the tokens before**" in text
    noise = fidelity_record("noise-batch", fidelity_windows([0.02, 0.02], loss_nats=0.03))
    text = text_of(suite, [*demo_records(), *measured, noise])
    assert "There is no noise floor yet" not in text
    section = text.partition("## Fidelity")[2].partition("##")[0]
    assert re.search(r"^\| nvfp4a16 .*≤ noise", section, re.MULTILINE)
    assert re.search(r"^\| noise-batch .*0\.02", section, re.MULTILINE)
    loss = text.partition("## Perplexity")[2].partition("##")[0]
    assert re.search(r"^\| nvfp4a16 .*≤ noise", loss, re.MULTILINE), "0.018 nats, where the source differs by 0.03"
    assert re.search(r"^- \*\*nvfp4a16\*\* .*perplexity 8\.\d+ \(Δ ≤ noise\)", text, re.MULTILINE)


def test_a_suite_with_tasks_has_their_section_with_scores_and_answers(suite: Suite) -> None:
    asked = dataclasses.replace(suite, tasks={"sums": Task(task="demo:arithmetic")})
    assert "## Tasks\n\nNo record yet: run `nox -s tasks`." in text_of(asked, [])
    source, variant = (
        tasks_record(name, [answer(doc_id, float(score)) for doc_id, score in enumerate(scores)])
        for name, scores in (("source", (1, 1, 0, 1)), ("nvfp4a16", (1, 0, 0, 1)))
    )
    text = text_of(asked, [source, variant])
    assert "| nvfp4a16 | exact_match,number |" in re.sub(" +", " ", text)
    assert "**Generated answers**" in text
    assert "1 / 0" in text
    assert "No record yet of `nvfp4a16` in `sums`" in text_of(asked, [source])


def test_a_variant_without_a_run_is_named(suite: Suite) -> None:
    text = text_of(suite, [make_record("ppl", "source", windows(8.0))])
    assert "No record yet of `nvfp4a16`: run `nox -s ppl`." in text


def test_the_headline_speaks_of_the_first_protocol_and_what_is_missing_is_named_by_protocol(suite: Suite) -> None:
    assert suite.ppl is not None
    protocols = ("wikitext2-512", "llamacpp-512")
    both, swapped = (
        dataclasses.replace(suite, ppl=dataclasses.replace(suite.ppl, protocols=order))
        for order in (protocols, protocols[::-1])
    )
    records = [
        make_record(
            "ppl", name, windows(ppl), dataset={**DATASET, "protocol": protocol}, run_id=f"{ppl:.0f}{name[-7:]}"
        )
        for protocol, ppl in zip(protocols, (8.0, 5.0), strict=True)
        for name in ("source", "nvfp4a16")
    ]
    for asked, ppl in ((both, 8.0), (swapped, 5.0)):
        text = text_of(asked, records)
        assert (
            f"perplexity {ppl:.4f} against {ppl:.4f}" in text and "yet of `" not in text.split("## Perplexity")[1][:999]
        )
    assert "No record yet of `nvfp4a16` by llamacpp-512: run `nox -s ppl`." in text_of(both, records[:3])
    assert all(f"[{record.run.run_id}]" in text_of(both, records) for record in records)


def test_word_perplexity_is_called_by_its_name(suite: Suite) -> None:
    assert suite.ppl is not None
    asked = dataclasses.replace(suite, ppl=dataclasses.replace(suite.ppl, protocols=("lmeval-word",)))
    header = {"protocol": "lmeval-word", "unit": "word", "documents": {"num_words": [5], "num_tokens": [511]}}
    one = [{**windows(8.0)[0], "document": 0}]
    text = text_of(
        asked, [make_record("ppl", name, one, dataset={**DATASET, **header}) for name in ("source", "nvfp4a16")]
    )
    ppl = f"{math.exp(511 * math.log(8) / 5):.4f}"
    assert f"word perplexity {ppl} against {ppl}" in text
    assert "the bootstrap is over documents" in text and "over whole windows" not in text


def test_every_run_that_is_linked_is_a_stored_file(suite: Suite, tmp_path: Path) -> None:
    for record in demo_records():
        with RunWriter(tmp_path / "results", record.run) as writer:
            for sample in record.samples:
                writer.sample(sample)
            writer.finish()
    records, _ = read_all(tmp_path / "results")
    card.write_files(rendered(suite, records), tmp_path)
    page = (tmp_path / CARD).read_text()
    links = [link for link in re.findall(r"\]\(([^)]*)\)", page) if "://" not in link]
    assert {record.path for record in records} <= {(tmp_path / "reports/demo" / link).resolve() for link in links}
    assert all((tmp_path / "reports/demo" / link).exists() for link in links)


def test_torch_speeds_carry_a_warning_and_other_engines_none(suite: Suite) -> None:
    warning = "says nothing about NVFP4 kernels"
    assert warning in text_of(suite, [make_record("bench", "source", decodes(0.1))]).replace("\n", " ")
    vllm = {**ENGINE, "name": "vllm", "kernels": {"linear": "MarlinNvFp4"}}
    text = text_of(suite, [make_record("bench", "source", decodes(0.1), engine=vllm)])
    assert warning not in text
    assert re.search(r"\*\*Kernels that ran\*\*\n\n.*MarlinNvFp4.*run \[", text, re.DOTALL)


def test_incomparable_runs_are_shown_apart_with_the_reason(suite: Suite) -> None:
    records = [make_record("ppl", "source", windows(8.0)), make_record("ppl", "nvfp4a16", windows(8.1)[:9])]
    text = text_of(suite, records)
    assert "perplexity 8.1000 (incomparable: windows)" in text and re.search(r"\| +incomparable: windows \|", text)


def test_step_times_of_another_session_are_not_drawn_beside_the_sources(suite: Suite) -> None:
    source = make_record("bench", "source", decodes(0.01))
    apart = make_record("bench", "nvfp4a16", decodes(0.02), session_id="ffffffff")
    together = make_record("bench", "nvfp4a16", decodes(0.02))
    alone, refused, drawn = (
        rendered(suite, records)[SVG] for records in ([source], [source, apart], [source, together])
    )
    assert (
        figure_data.embedded_digest(refused) == figure_data.embedded_digest(alone) != figure_data.embedded_digest(drawn)
    )


def test_runs_of_different_artifacts_of_a_variant_are_pointed_out(suite: Suite) -> None:
    warning = "The runs of `nvfp4a16` are not all of one artifact"
    assert warning not in text_of(suite, demo_records())
    newer = make_record("build", "nvfp4a16", BUILD, started_utc="2026-04-01T00:00:00Z")
    newer.run.variant["artifact_digest"] = "4" * 64
    assert warning in text_of(suite, [*demo_records(), newer])


def test_the_commands_that_were_run_are_listed_once(suite: Suite) -> None:
    text = text_of(suite, demo_records())
    assert text.count("harness ppl --suite suites/demo.toml\n") == 1


def test_sensitivities_have_a_table_and_a_figure_only_where_they_were_measured(suite: Suite) -> None:
    without = rendered(suite, demo_records())
    record = make_record("sensitivity", "source", SENSITIVITY)
    files = rendered(suite, [*demo_records(), record])
    assert sorted(set(files) - set(without)) == ["reports/demo/sensitivity.png", "reports/demo/sensitivity.svg"]
    assert "## Sensitivity\n\nNo record yet: run `nox -s sensitivity`." in without[CARD].decode()
    section = files[CARD].decode().split("## Sensitivity\n\n")[1].split("\n## ")[0]
    assert section.startswith("FP8 gains most for its bytes in self_attn.o_proj")
    assert "(sensitivity.png)" in section and f"[{record.run.run_id}](" in section
    digests = {figure_data.embedded_digest(files[f"reports/demo/sensitivity.{kind}"]) for kind in ("png", "svg")}
    assert len(digests) == 1 and digests != {None} and digests != {figure_data.embedded_digest(files[PNG])}
    assert without[PNG] == files[PNG]


def test_findings_are_shown_and_a_clean_artifact_is_said_to_be_clean(suite: Suite) -> None:
    assert "finds nothing to object to in `nvfp4a16`" in text_of(suite, demo_records())
    finding = {"kind": "finding", "severity": "error", "tensor": "x.weight", "problem": "cut", "consequence": "crash"}
    text = text_of(suite, [make_record("verify", "nvfp4a16", [finding])])
    assert "x.weight" in text and "nothing to object" not in text


# -- The same everywhere -----------------------------------------------------------------------------------------


def test_the_order_and_the_place_of_the_records_do_not_matter(suite: Suite) -> None:
    records = demo_records()
    moved = [
        Record(Path("/elsewhere/results") / Path(*one.path.parts[1:]), one.run, one.samples, one.end) for one in records
    ]
    assert rendered(suite, records) == rendered(suite, moved[::-1])


def test_another_process_renders_the_same_bytes(suite: Suite, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from harness.report import card; from harness.suite.load import load\n"
        "from tests.records import demo_records\n"
        "made = card.generated_files(load(Path(sys.argv[1])), demo_records(), results_dir='results', pages={})\n"
        "card.write_files(made, Path(sys.argv[2]))\n"
        "assert 'torch' not in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    command = [sys.executable, "-c", program, str(suite.folder / "demo.toml"), str(tmp_path / "out")]
    environment = {"PYTHONHASHSEED": "1", "TZ": "Asia/Tokyo", "MPLCONFIGDIR": str(tmp_path)}
    subprocess.run(command, cwd=Path(__file__).parent.parent, env=environment, check=True)
    for path, data in rendered(suite, demo_records()).items():
        assert (tmp_path / "out" / path).read_bytes() == data


def test_the_figures_carry_the_digest_of_their_data(suite: Suite) -> None:
    full, fewer = rendered(suite, demo_records()), rendered(suite, demo_records()[:-1])
    assert figure_data.embedded_digest(full[SVG]) == figure_data.embedded_digest(full[PNG]) is not None
    assert figure_data.embedded_digest(full[SVG]) != figure_data.embedded_digest(fewer[SVG])
    assert figure_data.embedded_digest(full[CARD]) is None
    assert full[PNG].startswith(b"\x89PNG") and b"<svg" in full[SVG]


# -- Stale and written -------------------------------------------------------------------------------------------


def test_write_brings_everything_up_to_date_and_nothing_else(suite: Suite, tmp_path: Path) -> None:
    files = rendered(suite, demo_records(), README="# Mine\n")
    (tmp_path / "README.md").write_text("# Mine\n")
    assert {CARD, PAGE_FILE, SVG, PNG} <= set(files)
    new = sorted(set(files) - {"README.md"})
    assert sorted(card.stale_files(files, tmp_path)) == sorted(card.write_files(files, tmp_path)) == new
    assert card.stale_files(files, tmp_path) == [] and card.write_files(files, tmp_path) == []
    assert [path.name for path in (tmp_path / "reports/demo").iterdir() if path.name.startswith(".")] == []


def test_new_records_make_card_and_figures_stale(suite: Suite, tmp_path: Path) -> None:
    card.write_files(rendered(suite, []), tmp_path)
    files = rendered(suite, demo_records())
    assert sorted(card.stale_files(files, tmp_path)) == sorted(files)


def test_a_hand_edit_of_the_card_is_stale_and_other_pixels_of_the_same_data_are_not(
    suite: Suite, tmp_path: Path
) -> None:
    files = rendered(suite, demo_records())
    card.write_files(files, tmp_path)
    (tmp_path / CARD).write_bytes(files[CARD].replace(b"8.1", b"8.0"))
    (tmp_path / SVG).write_bytes(files[SVG] + b"<!-- another build of the drawing library -->")
    assert card.stale_files(files, tmp_path) == [CARD]


# -- Blocks in other pages ---------------------------------------------------------------------------------------

PAGE = """# Title\r
before
<!-- harness:begin perplexity suite=demo -->
old
<!-- harness:end perplexity -->
between \u2028 here
<!-- harness:begin decode suite=other -->
kept
<!-- harness:end decode -->
```markdown
<!-- harness:begin nonsense -->
```
after, without a last newline"""


def test_only_the_blocks_of_the_suite_change(suite: Suite) -> None:
    page = rendered(suite, demo_records(), README=PAGE)["README.md"].decode()
    start = page.index("<!-- harness:begin perplexity suite=demo -->\n")
    stop = page.index("<!-- harness:end perplexity -->")
    assert page[:start] == PAGE[: PAGE.index("<!-- harness:begin perp")]
    assert page[stop:] == PAGE[PAGE.index("<!-- harness:end perp") :]
    assert "old" not in page[start:stop] and "| nvfp4a16" in page[start:stop]
    assert "](results/test-cpu-2c/" in page[start:stop]


def test_filling_a_filled_page_changes_nothing(suite: Suite) -> None:
    once = rendered(suite, demo_records(), README=PAGE)["README.md"].decode()
    assert rendered(suite, demo_records(), README=once)["README.md"].decode() == once


def test_every_block_can_stand_in_a_page(suite: Suite) -> None:
    page = "\n".join(f"<!-- harness:begin {name} suite=demo -->\n<!-- harness:end {name} -->" for name in card.BLOCKS)
    for records in ([], demo_records()):
        once = rendered(suite, records, docs=page)["docs.md"].decode()
        assert rendered(suite, records, docs=once)["docs.md"].decode() == once


def test_links_start_at_the_page(suite: Suite) -> None:
    page = b"<!-- harness:begin figure suite=demo -->\n<!-- harness:end figure -->"
    made = card.generated_files(suite, demo_records(), results_dir="results", pages={"docs/a/b.md": page})
    assert b"(../../reports/demo/overview.png)" in made["docs/a/b.md"]


@pytest.mark.parametrize(
    ("page", "line", "says"),
    [
        ("x\n<!-- harness:begin perplexty suite=demo -->", 2, "unknown block 'perplexty'"),
        ("<!-- harness:begin perplexity -->", 1, "does not say which block"),
        ("<!-- harness:begin perplexity suite=demo -->\n", 1, "'perplexity' has no end"),
        ("<!-- harness:begin perplexity suite=other -->\n", 1, "'perplexity' has no end"),
        ("x\n<!-- harness:end perplexity -->", 2, "no block is open"),
        (
            "<!-- harness:begin size suite=demo -->\n<!-- harness:begin decode suite=demo -->",
            2,
            "a block begins inside 'size' of line 1",
        ),
        (
            "<!-- harness:begin size suite=demo -->\n\n<!-- harness:end decode -->",
            3,
            "the end of 'decode', where 'size' of line 1 is open",
        ),
    ],
)
def test_a_broken_block_is_named_by_file_and_line(suite: Suite, page: str, line: int, says: str) -> None:
    with pytest.raises(UserError) as caught:
        rendered(suite, [], README=page)
    assert f"README.md, line {line}" in caught.value.problem and says in caught.value.problem


def test_a_page_that_is_no_text_is_refused(suite: Suite) -> None:
    with pytest.raises(UserError, match="not UTF-8"):
        card.generated_files(suite, [], results_dir="results", pages={"README.md": b"\xff"})
