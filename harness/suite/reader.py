"""Turns a TOML document into the classes of the schema, or refuses it with one sentence: the first thing that pydantic
finds wrong, with its place (`gate[2].variant`) and a remedy.
"""

import json
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from harness.errors import UserError, did_you_mean
from harness.suite.values import tables_by_first_key

T = TypeVar("T")

_KINDS = {
    str: "a string",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "a table",
}
_WANTED = {
    "string_type": str,
    "int_type": int,
    "int_from_float": int,
    "float_type": float,
    "bool_type": bool,
    "tuple_type": list,
}
"""By pydantic's type of error: what the key takes, which is a table for all other types."""
_ADAPTERS: dict[type, TypeAdapter[Any]] = {}  # each takes some 40 ms to make


def read_table(table: type[T], document: Mapping[str, Any], file: Path, what: str) -> T:
    """The document as an instance of `table`, a class of the schema. `file` and `what` it holds ("suite") are for the
    `UserError` of a document that the class does not allow."""

    def refuse(value: Any) -> Any:
        raise UserError(f"{file}: {value} is a date or a time, and no key takes one.", f"Correct it in the {what}.")

    try:
        # As JSON, whose lists are tuples to pydantic and whose tables are dataclasses, in its strict mode too.
        read: T = _adapter(table).validate_json(json.dumps(document, default=refuse))
        return read
    except ValidationError as error:
        problems = error.errors(include_url=False)
    # Unknown keys are told first: a misspelt key explains why another one is missing.
    unknown = (one for one in problems if one["type"] == "unexpected_keyword_argument")
    raise _refusal(table, next(unknown, problems[0]), file, what)


def _adapter(table: type) -> TypeAdapter[Any]:
    if table not in _ADAPTERS:
        _ADAPTERS[table] = TypeAdapter(table)
    return _ADAPTERS[table]


def _refusal(table: type, problem: Mapping[str, Any], file: Path, what: str) -> UserError:
    """What pydantic says of one place, as a sentence."""
    kind, value = problem["type"], problem["input"]
    dotted, holder, known = _place(table, problem["loc"])
    if kind == "unexpected_keyword_argument":
        return UserError(f"{file}: unknown key '{dotted}'.", did_you_mean(str(problem["loc"][-1]), known))
    if kind == "missing":
        return UserError(f"{file}: '{dotted}' is missing.", f"Add it{f' to [{holder}]' if holder else ''}.")
    if kind == "value_error":
        wrong = str(problem["ctx"]["error"])
    elif kind == "union_tag_invalid" and isinstance(value, dict):
        keys = problem["ctx"]["expected_tags"].replace("'", "")
        wrong = f"must have exactly one of the keys {keys}, and has {problem['ctx']['tag']}"
    elif kind == "finite_number":
        wrong = f"must be a finite number, not {value}"
    else:
        wrong = f"must be {_KINDS[_WANTED.get(kind, dict)]}, not {_KINDS.get(type(value), 'that')}"
    return UserError(f"{file}: '{dotted}' {wrong}.", f"Correct it in the {what}.")


def _place(table: Any, location: Sequence[str | int]) -> tuple[str, str, Sequence[str]]:
    """A location of pydantic's as a dotted key, the dotted key of the table around it, and the keys that this knows."""
    dotted = holder = ""
    known: Mapping[str, Any] = {}
    for part in location:
        table = _without_none(table)
        inside = typing.get_args(table)
        if typing.get_origin(table) is types.UnionType:  # pydantic names the table that it chose, and no key does
            table = tables_by_first_key(table)[str(part)]
            continue
        holder = dotted
        if isinstance(part, int):
            dotted, table = f"{dotted}[{part}]", inside[0]
            continue
        dotted = f"{dotted}.{part}" if dotted else part
        known = {} if inside else typing.get_type_hints(table)
        table = inside[-1] if inside else known.get(part)
    return dotted, holder, list(known)


def _without_none(kind: Any) -> Any:
    """`X` of `X | None`."""
    kinds = [one for one in typing.get_args(kind) if one is not types.NoneType]
    is_optional = typing.get_origin(kind) in (types.UnionType, typing.Union) and len(kinds) == 1
    return kinds[0] if is_optional else kind
