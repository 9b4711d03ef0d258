"""The design's import rules, read from the source with `ast`: floors, no cycles, who may import, print and exit."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import harness
from harness.formats.config import FORMATS

ROOT = Path(harness.__file__).parent
FLOORS = {
    0: ("harness", "errors", "progress", "sampling"),
    1: ("formats",),
    2: ("model", "record", "suite"),
    3: ("engines", "serve"),
    4: ("measure", "quantize", "audit", "report", "demo"),
    5: ("resolve", "doctor", "job", "publication"),
    6: ("commands", "cli", "__main__"),
}
FLOOR = {room: floor for floor, rooms in FLOORS.items() for room in rooms}
ON_ONE_FLOOR = {
    ("job", "resolve"),
    ("doctor", "resolve"),
    ("job", "doctor"),
    ("publication", "job"),
    ("publication", "resolve"),
    ("cli", "commands"),
    ("__main__", "cli"),
}
"""On floor 5 `resolve` lies under `doctor`, that under `job`, and all of them under `publication`; at the top
`commands` lies under `cli`, and that under `__main__`."""

ONLY_IN = {
    "lm_eval": tuple(f"harness/measure/{name}.py" for name in ("tasks", "lm", "wikitext")),
    "vllm": ("harness/engines/vllm_*.py",),
    "llmcompressor": (),
}
REPORT_SEES = {"formats", "model", "suite", "record", "errors", "sampling", "serve", "harness"}
MAY_PRINT: dict[str, str | None] = {
    "harness/cli.py": None,
    "harness/__main__.py": None,
    "harness/engines/vllm_options.py": "capturing",  # it turns both streams aside, and flushes them for that
}
"""By file, the function that may print and exit; None for the whole file. `commands/` may too."""


@dataclass(frozen=True)
class Import:
    """`module` of the harness, or a package from elsewhere, imported by module `by`. `deferred`: inside a function."""

    by: str
    module: str
    deferred: bool


def path_of(module: str) -> Path:
    path = ROOT.parent / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {name_of(path): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}


def imports(module: str, tree: ast.AST, deferred: bool = False) -> Iterator[Import]:
    """Every import in `tree`, relative ones and names of submodules resolved."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(module, alias.name, deferred) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".") if path_of(module).name == "__init__.py" else module.split(".")[:-1]
            base = (
                ".".join([*package[: len(package) - node.level + 1], node.module or ""]) if node.level else node.module
            )
            base = (base or "").removesuffix(".")
            for alias in node.names:
                yield Import(module, name if (name := f"{base}.{alias.name}") in TREES else base, deferred)
        yield from imports(module, node, deferred or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


IMPORTS = [found for module, tree in TREES.items() for found in imports(module, tree)]
OURS = [found for found in IMPORTS if found.module.split(".")[0] == "harness"]


def room(module: str) -> str:
    """`formats` of `harness.formats.nvfp4`, `cli` of `harness.cli`, `harness` of the package itself."""
    return module.partition(".")[2].partition(".")[0] or "harness"


def reachable(module: str, edges: dict[str, set[str]]) -> set[str]:
    """Everything that importing `module` imports."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        for target in edges.get(waiting.pop(), set()) - seen:
            seen.add(target)
            waiting.append(target)
    return seen


def edges(*, deferred: bool) -> dict[str, set[str]]:
    """Imports between the harness's modules, with or without those inside functions."""
    table: dict[str, set[str]] = {}
    for found in OURS:
        if deferred or not found.deferred:
            table.setdefault(found.by, set()).add(found.module)
    return table


def test_the_program_sees_the_source() -> None:
    """Guards the tests below against passing over nothing."""
    assert len(TREES) > 20
    assert {"harness", "harness.formats.nvfp4", "harness.cli"} <= set(TREES)
    assert Import("harness.model.checkpoint", "harness.formats.format", False) in OURS
    assert Import("harness.model.checkpoint", "torch", False) in IMPORTS


def test_every_room_has_a_floor() -> None:
    assert {room(module) for module in TREES} <= set(FLOOR)


@pytest.mark.parametrize("module", TREES)
def test_a_module_imports_only_from_lower_floors_and_its_own_room(module: str) -> None:
    for found in OURS:
        if found.by == module and room(found.module) != room(module):
            lower = FLOOR[room(found.module)] < FLOOR[room(module)]
            assert lower or (room(module), room(found.module)) in ON_ONE_FLOOR, found


@pytest.mark.parametrize("module", TREES)
def test_every_import_names_a_module_that_exists(module: str) -> None:
    assert [found for found in OURS if found.by == module and found.module not in TREES] == []


@pytest.mark.parametrize("module", TREES)
def test_no_module_imports_itself_by_way_of_others(module: str) -> None:
    assert module not in reachable(module, edges(deferred=True))


@pytest.mark.parametrize("module", TREES)
def test_every_module_has_a_docstring(module: str) -> None:
    assert (ast.get_docstring(TREES[module]) or "").strip()


@pytest.mark.parametrize("module", [module for module in TREES if room(module) == "report"])
def test_the_report_sees_records_suites_and_names_of_roles_and_formats_but_nothing_that_imports_torch(
    module: str,
) -> None:
    everything = {module, *reachable(module, edges(deferred=True))}
    assert {room(name) for name in everything} <= {"report", *REPORT_SEES}
    packages = {found.module.split(".")[0] for found in IMPORTS if found.by in everything}
    assert not packages & {"torch", "transformers", "safetensors", "compressed_tensors", "vllm", "lm_eval"}


def test_the_auditor_reaches_no_line_of_the_builder() -> None:
    for module in TREES:
        if room(module) == "audit":
            assert not {name for name in reachable(module, edges(deferred=True)) if room(name) == "quantize"}


@pytest.mark.parametrize(("package", "places"), ONLY_IN.items(), ids=list(ONLY_IN))
def test_heavy_packages_are_imported_in_their_one_place(package: str, places: tuple[str, ...]) -> None:
    importers = {
        path_of(found.by).relative_to(ROOT.parent) for found in IMPORTS if found.module.split(".")[0] == package
    }
    assert [path for path in importers if not any(path.match(place) for place in places)] == []


FORMAT_NAMES = {word for form in FORMATS.values() for word in (form.name, form.compressor)}


def format_names(tree: ast.AST) -> list[str]:
    """The string constants in `tree` that are the name of a format or of a compressor."""
    constants = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return [f"line {node.lineno}: {node.value}" for node in constants if node.value in FORMAT_NAMES]


@pytest.mark.parametrize("module", [module for module in TREES if room(module) != "formats"])
def test_only_the_formats_know_their_names(module: str) -> None:
    """Everything else asks a format what it does, or imports it."""
    assert format_names(TREES[module]) == []


@pytest.mark.parametrize("line", ["form.name == 'NVFP4'", "{'float-quantized': 1}", "x = row['FP8_DYNAMIC']"])
def test_the_program_finds_names_of_formats(line: str) -> None:
    assert format_names(ast.parse(line))
    assert not format_names(ast.parse("x = 'NVFP4 weights'"))


def output_and_exits(tree: ast.AST, allowed: str | None) -> Iterator[str]:
    """Calls of `print`, writes to stdout and exits in `tree`, outside function `allowed`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef) and node.name == allowed:
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
            continue
        if isinstance(node, ast.Name) and node.id in ("print", "SystemExit", "exit", "quit"):
            yield f"line {node.lineno}: {node.id}"
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.exit", "os._exit", "sys.stdout"):
            yield f"line {node.lineno}: {ast.unparse(node)}"
        yield from output_and_exits(node, allowed)


@pytest.mark.parametrize("module", TREES)
def test_only_the_command_line_prints_or_exits(module: str) -> None:
    file = path_of(module).relative_to(ROOT.parent).as_posix()
    if room(module) == "commands" or (file in MAY_PRINT and MAY_PRINT[file] is None):
        return
    assert list(output_and_exits(TREES[module], MAY_PRINT.get(file))) == []


@pytest.mark.parametrize("line", ["print(1)", "x = print", "sys.exit(2)", "raise SystemExit", "os._exit(1)", "exit()"])
def test_the_program_finds_output_and_exits_however_they_are_nested(line: str) -> None:
    assert list(output_and_exits(ast.parse(f"def f():\n    try:\n        {line}\n    finally:\n        pass"), "main"))
    assert not list(output_and_exits(ast.parse(f"def main():\n    {line}"), "main"))
