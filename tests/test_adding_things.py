"""What CONTRIBUTING says under "Adding things" is enough: each recipe is followed here, in memory, with nothing else.

`tests/test_families.py` follows the recipe of a family, `tests/test_adding_a_format.py` the recipe of a format.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from harness.cli import main
from harness.errors import UserError
from harness.formats.fp8 import FP8_DYNAMIC
from harness.measure.perplexity import PROTOCOLS, Protocol
from harness.quantize.recipes import RECIPES, Recipe
from harness.record import samples, schema, store
from harness.record.keys import Key, Keys
from harness.record.schema import incomparable
from harness.report import card
from harness.suite.load import load
from tests.records import demo_records, make_run

ROOT = Path(__file__).parents[1]
SUITE = """
name = "small"
title = "x"
source.location = "demo:dense"
variants.a16.recipe = "rtn-a16"
engine = { dtype = "float32", device = "cpu" }
[ppl]
text = { demo = "heldout" }
protocols = ["whole-64"]
"""


def bullets() -> dict[str, str]:
    """What "Adding things" says, by the thing."""
    section = (ROOT / "CONTRIBUTING.md").read_text().partition("## Adding things")[2].partition("\n## ")[0]
    found = re.findall(r"^- \*\*(.*?)\*\*(.*?)(?=^- |\Z)", section, re.MULTILINE | re.DOTALL)
    return dict(found)


@pytest.mark.parametrize("thing", bullets())
def test_every_file_that_is_named_for_a_thing_exists(thing: str) -> None:
    named = re.findall(r"`((?:harness|studies|tests|suites|reports)/[\w./-]*)`", bullets()[thing])
    assert named and [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize(
    "thing", ["A family", "A format", "A recipe", "A protocol", "A measure", "A section of the card"]
)
def test_each_of_these_names_the_test_that_follows_it(thing: str) -> None:
    assert re.search(r"`tests/test_\w+\.py`", bullets()[thing])


def test_a_recipe_is_an_entry_of_its_table(
    monkeypatch: pytest.MonkeyPatch, dense_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = Recipe("fp8-attention", ((FP8_DYNAMIC, ("attention",)),))
    monkeypatch.setitem(RECIPES, recipe.name, recipe)
    out = tmp_path / "out"
    assert main(["plan", str(dense_source), "--recipe", "fp8-attention"]) == 0
    assert "FP8_DYNAMIC" in capsys.readouterr().out
    assert main(["build", str(dense_source), "--recipe", "fp8-attention", "--out", str(out)]) == 0
    assert main(["verify", str(out), "--source", str(dense_source)]) == 0


def test_a_protocol_is_an_entry_of_its_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = Protocol("whole-64", 64, 64, "all but the first", keep_tail=False)
    monkeypatch.setitem(PROTOCOLS, whole.name, whole)
    monkeypatch.chdir(tmp_path)
    Path("suite.toml").write_text(SUITE)
    assert main(["ppl", "--suite", "suite.toml", "--variant", "source", "--limit", "2"]) == 0
    ((record,), _) = store.read_all(Path("results"))
    assert record.run.dataset is not None and record.run.dataset["protocol"] == "whole-64"
    assert [(window["first_token"], window["num_scored"]) for window in record.kind("window")] == [(0, 63), (64, 63)]


def test_a_measure_is_its_samples_and_what_makes_two_runs_comparable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    watts = Keys(index=Key("count", "The reading, from 0."), power_watts=Key("number", "Mean power.", "watts", low=0))
    monkeypatch.setitem(cast(dict[str, object], samples.SAMPLES), "power", {"reading": watts})
    monkeypatch.setitem(schema.COMPARABLE, "power", ("measure_version", "machine.name"))
    run = make_run("power", "source")
    with store.RunWriter(tmp_path, run) as writer:
        with pytest.raises(UserError, match="power_watts"):
            writer.sample({"kind": "reading", "index": 0, "power_watts": -1.0})
        with pytest.raises(ValueError, match="volts"):
            writer.sample({"kind": "reading", "index": 0, "power_watts": 300.0, "volts": 12.0})
        writer.sample({"kind": "reading", "index": 0, "power_watts": 300.0})
        writer.finish()
    ((record,), skipped) = store.read_all(tmp_path)
    assert skipped == [] and [one["power_watts"] for one in record.kind("reading")] == [300.0]
    elsewhere = replace(record, run=replace(record.run, machine={**record.run.machine, "name": "another"}))
    assert incomparable(record, record) == []
    assert incomparable(record, elsewhere) == ["machine.name"]


def test_a_section_is_an_entry_of_the_blocks_of_a_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(card.BLOCKS, "rows", ("Rows", lambda evidence, link: ", ".join(evidence.suite.rows())))
    (tmp_path / "small.toml").write_text(SUITE.replace("whole-64", "wikitext2-512"))
    page = "<!-- harness:begin rows suite=small -->\n<!-- harness:end rows -->\n"
    files = card.generated_files(
        load(tmp_path / "small.toml"), demo_records(), results_dir="results", pages={"page.md": page.encode()}
    )
    assert b"## Rows\n\nsource, a16" in files["reports/small/README.md"]
    assert b"source, a16" in files["page.md"]
