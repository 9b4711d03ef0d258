"""Which code each declared version stands for, and a digest of what that code means.

What an engine has answered is stored and used again as long as the versions of the measure and of the engine are the
same, so a version must be raised when its code may give other numbers. `tests/data/computing_code.json` holds, by
version, its number and the digest of its code when the number was last looked at; `test_computing_code.py` fails where
they differ. After a change:

    python -m tests.computing_code          notes the code as it is now, under the versions as they are now

A digest is of the meaning of the code: docstrings, comments, formatting, annotations, imports, what an error says, the
order of definitions and the module that they stand in do not count.
"""

import ast
import hashlib
import importlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness

PACKAGE = Path(harness.__file__).parent
NOTED = Path(__file__).parent / "data" / "computing_code.json"


@dataclass(frozen=True)
class Group:
    """The code that one version stands for: the modules `begin`, and what they import from `rooms`."""

    declared: str
    """Where the version is: a module and a name, or an engine."""
    begin: tuple[str, ...]
    rooms: tuple[str, ...]

    @property
    def version(self) -> int:
        """The declared version."""
        where, _, name = self.declared.partition(":")
        if where == "engine":
            from harness.engines.protocol import ENGINES

            return ENGINES[name].version
        return int(getattr(importlib.import_module(where), name))


_ENGINE_ROOMS = ("engines", "formats", "model")
GROUPS = {
    "the torch engine": Group("engine:torch", ("engines.torch_engine",), _ENGINE_ROOMS),
    "the streamed engine": Group("engine:streamed", ("engines.streamed",), _ENGINE_ROOMS),
    "the vLLM engine": Group(
        "engine:vllm", ("engines.vllm_engine", "engines.vllm_worker", "engines.vllm_cpu"), _ENGINE_ROOMS
    ),
    "the server engine": Group("engine:server", ("engines.server_engine",), ("engines",)),
    "the builder": Group(
        "harness.quantize.artifact:VERSION", ("quantize.build",), ("quantize", "engines", "formats", "model")
    ),
    "perplexity": Group("harness.measure.perplexity:VERSION", ("measure.perplexity", "measure.wikitext"), ("measure",)),
    "fidelity": Group("harness.measure.fidelity:VERSION", ("measure.fidelity", "measure.kept"), ("measure",)),
    "speed": Group("harness.measure.decode:VERSION", ("measure.decode",), ("measure",)),
    "tasks": Group("harness.measure.tasks:VERSION", ("measure.tasks",), ("measure",)),
}
NO_NUMBERS = {
    "engines.protocol": "what an engine is asked, and the versions themselves",
    "engines.describing": "what an engine says of itself",
    "measure.vllm_bench": "numbers of another program, read",
}
"""Modules that compute no number, and what they do instead."""


def modules() -> dict[str, Path]:
    """The file of every module of the rooms that compute, by its name without `harness`."""
    found = {}
    for room in sorted({room for group in GROUPS.values() for room in group.rooms}):
        for path in sorted((PACKAGE / room).rglob("*.py")):
            parts = path.relative_to(PACKAGE).with_suffix("").parts
            if not all(map(_says_nothing, ast.parse(path.read_text(encoding="utf-8")).body)):
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def modules_of(group: Group) -> set[str]:
    """The modules of a group: those that it begins with, and what they import, again and again."""
    known, seen, waiting = modules(), set[str](), list(group.begin)
    while waiting:
        name = waiting.pop()
        if name in seen or name in NO_NUMBERS or name.partition(".")[0] not in group.rooms:
            continue
        seen.add(name)
        waiting += [one for one in imported(ast.parse(known[name].read_text(encoding="utf-8"))) if one in known]
    return seen


def imported(tree: ast.AST) -> Iterator[str]:
    """What a module may import of the harness, without `harness`: modules, and names that may be modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("harness.") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            module = node.module.removeprefix("harness.")
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def digest(group: Group) -> str:
    """The digest of what a group's code means."""
    known = modules()
    sources = [known[name].read_text(encoding="utf-8") for name in modules_of(group)]
    return digest_of(sources)


def digest_of(sources: list[str]) -> str:
    """The digest of what some modules mean, each a text."""
    meanings = sorted(
        hashlib.sha256(json.dumps(meaning(statement)).encode()).hexdigest()
        for source in sources
        for statement in ast.parse(source).body
        if not _says_nothing(statement)
    )
    return hashlib.sha256("".join(meanings).encode()).hexdigest()[:16]


_NOT_MEANT = {"annotation", "returns", "type_comment", "type_params", "kind", "ctx"}


def meaning(node: Any) -> Any:
    """A syntax tree as JSON, without what does not count; the same for every version of Python."""
    if isinstance(node, list):
        return [meaning(one) for one in node if not _says_nothing(one)]
    if not isinstance(node, ast.AST):
        return repr(node)
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
        return ["Raise", meaning(node.exc.func)]
    fields = [
        [name, meaning(value)]
        for name, value in ast.iter_fields(node)
        if name not in _NOT_MEANT and value is not None and value != []
    ]
    return [type(node).__name__, *fields]


def _says_nothing(statement: Any) -> bool:
    """Whether it is a docstring, an import, `pass`, or the version itself."""
    if isinstance(statement, ast.Assign):
        return [ast.unparse(target) for target in statement.targets] == ["VERSION"]
    is_text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return is_text or isinstance(statement, ast.Import | ast.ImportFrom | ast.Pass)


def now(name: str) -> dict[str, Any]:
    """The version and the digest of a group's code as it is."""
    return {"version": GROUPS[name].version, "code": digest(GROUPS[name])}


if __name__ == "__main__":
    noted = {name: now(name) for name in GROUPS}
    NOTED.write_text(json.dumps(noted, indent=2) + "\n", encoding="utf-8")
