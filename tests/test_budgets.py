"""The house stays small: budgets for files, functions, depth and lines, and names that mean one thing.

A budget is raised only in the commit that needs more, with the reason in its message.
"""

import ast
from collections import defaultdict
from collections.abc import Iterator
from functools import cache

import pytest

from tests.test_architecture import FLOOR, TREES, imports, path_of, room

FILE_LINES, FUNCTION_LINES = 450, 90
PACKAGE_LINES = 25_450
IMPORT_DEPTH = 9
DOCUMENTED_SHARE = 0.95

Function = ast.FunctionDef | ast.AsyncFunctionDef
LINES = {module: len(path_of(module).read_text().splitlines()) for module in TREES}


def at_import(tree: ast.Module) -> Iterator[ast.stmt]:
    """The statements that run when a module is imported: not those for type checkers alone."""
    return (node for node in tree.body if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"))


IMPORTED = {
    module: {
        found.module
        for node in at_import(tree)
        for found in imports(module, ast.Module([node], []))
        if not found.deferred and found.module in TREES and found.module != "harness"
    }
    for module, tree in TREES.items()
}


@cache
def chain(module: str) -> tuple[str, ...]:
    """The longest chain of modules that importing `module` imports one after another, itself first."""
    below = (chain(target) for target in sorted(IMPORTED.get(module, set())))
    return (module, *max(below, key=len, default=()))


def public_definitions(tree: ast.Module) -> Iterator[tuple[str, Function | ast.ClassDef]]:
    """Public functions and classes of a module, and the public methods of these classes, by dotted name."""
    for node in tree.body:
        if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_"):
            continue
        yield node.name, node
        for member in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(member, Function) and not member.name.startswith("_"):
                yield f"{node.name}.{member.name}", member


@pytest.mark.parametrize("module", TREES)
def test_a_file_is_short_enough_to_be_read_at_once(module: str) -> None:
    assert LINES[module] <= FILE_LINES


@pytest.mark.parametrize("module", TREES)
def test_a_function_fits_on_a_page(module: str) -> None:
    sizes = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(TREES[module])
        if isinstance(node, Function) and node.end_lineno is not None
    }
    assert {name: size for name, size in sizes.items() if size > FUNCTION_LINES} == {}


def test_the_package_stays_within_its_lines() -> None:
    assert sum(LINES.values()) <= PACKAGE_LINES


def test_no_chain_of_imports_is_longer_than_its_budget() -> None:
    longest = max((chain(module) for module in TREES), key=len)
    assert len(longest) <= IMPORT_DEPTH, " → ".join(longest)


def test_public_definitions_have_docstrings() -> None:
    documented = {
        f"{module}.{name}": bool(ast.get_docstring(node))
        for module, tree in TREES.items()
        for name, node in public_definitions(tree)
    }
    bare = [name for name, is_documented in documented.items() if not is_documented]
    assert len(bare) <= (1 - DOCUMENTED_SHARE) * len(documented), bare


def test_a_public_name_stands_on_one_floor() -> None:
    floors: dict[str, dict[int, str]] = defaultdict(dict)
    for module, tree in TREES.items():
        for name, _ in public_definitions(tree):
            if "." not in name:
                floors[name][FLOOR[room(module)]] = module
    assert {name: sorted(places.values()) for name, places in floors.items() if len(places) > 1} == {}
