"""The programs beside the package: what they may import, print and weigh, and that no wheel carries them."""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from studies.demo_model import __main__ as demo_model

ROOT = Path(__file__).parents[1]
TREES = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in sorted((ROOT / "studies").rglob("*.py"))
}
PACKAGE = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in sorted((ROOT / "harness").rglob("*.py"))
}
ELSEWHERE = ("studies/peers/compressor.py", "studies/peers/stopwatch.py")
"""What runs in an environment without the harness."""
ONLY_IN = {"lm_eval": "studies/peers/answerer.py", "llmcompressor": "studies/peers/compressor.py"}
NUM_LINES, NUM_FUNCTION_LINES = 450, 90


def imported(tree: ast.AST) -> set[str]:
    """The packages that a module imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, ast.unparse(node)
            names.add(node.module.partition(".")[0])
    return names


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def test_the_wheel_is_made_of_the_package_alone() -> None:
    """`nox -s wheel` looks into the built wheel; hatchling puts in what this says."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert build == {"packages": ["harness"]}
    assert len(TREES) > 20 and not any(path.startswith("studies") for path in PACKAGE)


@pytest.mark.parametrize("path", PACKAGE)
def test_the_package_imports_nothing_of_the_studies(path: str) -> None:
    assert "studies" not in imported(PACKAGE[path])


def test_the_side_that_runs_elsewhere_imports_nothing_of_ours() -> None:
    for path in ELSEWHERE:
        assert not imported(TREES[path]) & {"harness", "studies", "tests"}


@pytest.mark.parametrize("package", ONLY_IN)
def test_other_tools_are_imported_in_their_one_place(package: str) -> None:
    assert [path for path, tree in TREES.items() if package in imported(tree)] == [ONLY_IN[package]]


@pytest.mark.parametrize("path", TREES)
def test_a_study_is_written_like_the_package(path: str) -> None:
    tree = TREES[path]
    assert (ast.get_docstring(tree) or "").strip()
    assert len((ROOT / path).read_text().splitlines()) <= NUM_LINES
    assert [one.name for one in functions(tree) if (one.end_lineno or 0) - one.lineno >= NUM_FUNCTION_LINES] == []


@pytest.mark.parametrize("path", TREES)
def test_only_the_command_lines_of_the_studies_print_or_exit(path: str) -> None:
    if not path.endswith("/__main__.py"):
        names = {node.id for node in ast.walk(TREES[path]) if isinstance(node, ast.Name)}
        assert not names & {"print", "exit", "quit"}


def test_the_training_says_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        demo_model.main(["--help"])
    assert ended.value.code == 0
    assert "--evaluate DIR" in capsys.readouterr().out
