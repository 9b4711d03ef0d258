"""Commands start quickly: what they must not import before they need it, and the program that times them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.commands import SUBCOMMANDS, command_named
from studies.startup.__main__ import Compared, Timed, cpu_seconds, rows

ROOT = Path(__file__).parents[1]
HEAVY = {
    *("torch", "transformers", "datasets", "lm_eval", "huggingface_hub", "safetensors", "compressed_tensors"),
    *("pandas", "scipy", "numpy", "matplotlib", "pydantic", "jinja2", "markdown_it", "rich", "tabulate"),
}
COMPUTING = {"torch", "transformers", "datasets", "lm_eval", "huggingface_hub", "pandas", "rich", "matplotlib"}


def imported(*words: str) -> tuple[int, set[str]]:
    """The exit code of `harness WORDS`, and the packages that it imported."""
    program = (
        "import sys\n"
        "from harness.cli import main\n"
        "try: code = main(sys.argv[1:])\n"
        "except SystemExit as ended: code = ended.code\n"
        "print('\\nimported:', code, *sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    _, code, *packages = done.stdout.splitlines()[-1].split()
    return int(code), set(packages)


def test_the_list_of_subcommands_imports_none_of_them() -> None:
    code, packages = imported("--help")
    assert (code, packages & HEAVY) == (0, set())


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_the_grammar_of_a_subcommand_imports_nothing_that_computes(name: str) -> None:
    code, packages = imported(name, "--bogus")
    assert (code, packages & HEAVY) == (2, set())


@pytest.mark.parametrize(
    "words",
    [
        ("gate", "--update-baseline"),
        ("build", "--recipe", "w4a4"),
        ("verify", "--source", "demo:dense"),
        ("plan", "demo:dense", "--scales", "search"),
        ("import", "x.json", "--suite", "suites/demo.toml", "--variant", "w4a4", "--machine", "No Name"),
    ],
)
def test_options_that_do_not_go_together_are_refused_before_anything_is_imported(words: tuple[str, ...]) -> None:
    code, packages = imported(*words)
    assert (code, packages & HEAVY) == (2, set())


@pytest.mark.parametrize("measure", ["ppl", "fidelity", "tasks", "bench"])
@pytest.mark.parametrize("words", [("--engine", "bogus"), ("--variant", "bogus")])
def test_a_measure_refuses_an_unknown_name_before_torch_is_imported(measure: str, words: tuple[str, ...]) -> None:
    code, packages = imported(measure, *words)
    assert (code, packages & COMPUTING) == (2, set())


def test_a_plan_and_an_unknown_recipe_need_no_torch() -> None:
    code, packages = imported("plan", "demo:dense", "--recipe", "w4a4")
    assert (code, packages & (COMPUTING | {"numpy", "scipy", "pydantic"})) == (0, set())
    code, packages = imported("build", "demo:dense", "--recipe", "bogus", "--out", "bogus")
    assert (code, packages & COMPUTING) == (2, set())


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_every_subcommand_has_a_sentence_and_a_module(name: str) -> None:
    assert SUBCOMMANDS[name].endswith(".")
    assert callable(command_named(name).run)


def test_the_study_times_a_process_and_compares_rounds() -> None:
    seconds, code = cpu_seconds(["--version"], ROOT)
    assert 0 < seconds < 10 and code == 0
    found = Compared(Timed("gate", (1.0, 2.0, 3.0), 0), Timed("gate", (2.0, 2.0, 12.0), 0))
    assert rows([found]) == [
        ("gate", "0", "2.000 [2.000, 12.000]", "2.000 [1.000, 3.000]", "0.500 [0.250, 1.000]"),
    ]
