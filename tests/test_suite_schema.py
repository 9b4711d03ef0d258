"""The JSON Schema of suite files: valid, explained key by key, and at one with the reader about structure."""

import dataclasses
import json
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from jsonschema.protocols import Validator
from jsonschema.validators import validator_for

from harness.cli import main
from harness.demo import SUITE as DEMO_SUITE
from harness.errors import UserError
from harness.suite import rules, schema, texts
from harness.suite.json_schema import json_schema
from harness.suite.load import load
from harness.suite.schema import SuiteFile
from harness.suite.texts import Calibration
from tests.test_suite import CALIBRATION, MINIMAL, TASKS, ppl, source, task, written

SUITES = [*sorted((Path(__file__).parent.parent / "suites").glob("*.toml")), *sorted(DEMO_SUITE.parent.glob("*.toml"))]
BENCH = '[bench]\ntext = { demo = "heldout" }\n'


@pytest.fixture(scope="module")
def validator() -> Validator:
    """Checks a document against the schema of suite files."""
    written_out = json_schema(SuiteFile)
    return validator_for(written_out)(written_out)


@pytest.mark.parametrize("table", [SuiteFile, Calibration])
def test_the_schema_is_json_schema_of_draft_2020_12(table: type) -> None:
    written_out = json_schema(table)
    assert written_out["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert validator_for(written_out) is jsonschema.Draft202012Validator
    jsonschema.Draft202012Validator.check_schema(written_out)


def test_every_key_of_every_table_is_explained() -> None:
    written_out = json_schema(SuiteFile)
    classes = [one for module in (schema, rules, texts) for one in vars(module).values() if isinstance(one, type)]
    tables = {one for one in classes if one.__module__ in (schema.__name__, rules.__name__, texts.__name__)}
    tables -= {schema.Suite, rules.Metric, rules.ClaimKind}
    assert len(tables) > 20
    for table in tables:
        said = written_out if table is SuiteFile else written_out["$defs"][table.__name__]
        assert said["description"].startswith((table.__doc__ or "").split("\n")[0])
        assert list(said["properties"]) == [one.name for one in dataclasses.fields(table)]
        assert all(key["description"].endswith((".", ").")) for key in said["properties"].values())
        assert not said["additionalProperties"]
    assert "null" not in json.dumps(written_out)


@pytest.mark.parametrize("path", SUITES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_suite_of_the_repository_is_valid(validator: Validator, path: Path) -> None:
    validator.validate(tomllib.loads(path.read_text()))


@pytest.mark.parametrize("text", [MINIMAL, MINIMAL + CALIBRATION, MINIMAL + TASKS, task(""), ppl('protocols = ["x"]')])
def test_what_the_reader_takes_is_valid(validator: Validator, tmp_path: Path, text: str) -> None:
    load(written(tmp_path, text))
    validator.validate(tomllib.loads(text))


@pytest.mark.parametrize(
    "text",
    [
        "",
        MINIMAL.replace('title = "A demo"', ""),
        MINIMAL.replace('location = "demo:dense"', ""),
        MINIMAL.replace('"A demo"', "3"),
        MINIMAL.replace('"A demo"', '""'),
        MINIMAL.replace('"demo"', '"De mo"'),
        MINIMAL.replace("variants.nvfp4a16", "variants.NVFP4"),
        MINIMAL + "[engin]\n",
        MINIMAL + '[engine]\ndtpye = "x"\n',
        MINIMAL + 'scales = "best"\n',
        'folder = "x"\n' + MINIMAL,
        'engine = "torch"\n' + MINIMAL,
        ppl(""),
        ppl("protocols = []"),
        ppl('protocols = ["x", "x"]'),
        ppl('protocols = ["x"]\nmax_length = 1'),
        ppl('protocols = ["x"]\nexpected.x.tokens = 1'),
        MINIMAL + BENCH + "starts = true\n",
        MINIMAL + BENCH + "batch_sizes = [1, 0]\n",
        MINIMAL + BENCH + 'batch_sizes = [1, "2"]\n',
        MINIMAL + '[bench]\ntext = { demo = "x", path = "y" }\n',
        MINIMAL + "[bench]\ntext = {}\n",
        MINIMAL + "[calibration]\nsources = []\n",
        source('demo = "x", column = "a"'),
        source('demo = "x", seed = -1'),
        source('path = "x.csv", user = "b", assistant = "c"'),
        task('preset = "thinking"'),
        task("chat = 1"),
        task("num_fewshot = -1"),
        MINIMAL + '[tasks."a/b"]\ntask = "x"\n',
        MINIMAL + "[audit]\nempty_share = 5\n",
        MINIMAL + '[[gate]]\nmetric = "ppl"\nvariant = "nvfp4a16"\n',
        MINIMAL + '[[gate]]\nmetric = "kl"\n',
    ],
)
def test_what_the_reader_refuses_for_its_structure_is_invalid_too(
    validator: Validator, tmp_path: Path, text: str
) -> None:
    with pytest.raises(UserError):
        load(written(tmp_path, text))
    assert not validator.is_valid(tomllib.loads(text))


def test_a_calibration_file_has_a_schema_of_its_own() -> None:
    table: dict[str, Any] = tomllib.loads(CALIBRATION)["calibration"]
    jsonschema.validate(table, json_schema(Calibration))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**table, "batch_token": 1}, json_schema(Calibration))


@pytest.mark.parametrize(("options", "title"), [([], "SuiteFile"), (["--calibration"], "Calibration")])
def test_the_command_prints_the_schema(capsys: pytest.CaptureFixture[str], options: list[str], title: str) -> None:
    assert main(["suite", "schema", *options]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["title"] == title and printed == json_schema(SuiteFile if title == "SuiteFile" else Calibration)
