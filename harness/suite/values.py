"""The kinds of values that keys of a suite have: types with a `Check`, as `Annotated` metadata that pydantic
understands."""

import dataclasses
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

T = TypeVar("T")

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
"""How pydantic validates a file's outermost table and all tables in it."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
ADDED = {"added": True}
"""Metadata of a field whose key older suites do not know: `Suite.resolved` leaves it out while it has its default."""


@dataclass(frozen=True)
class Check:
    """What a value must be beyond its type.

    `problem` returns what is wrong with a value, to be read after its key ("must be ..."), or None; the JSON Schema
    `keywords` say the same to an editor, as far as they can.
    """

    problem: Callable[[Any], str | None]
    keywords: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def passed(self, value: T) -> T:
        """The value itself; `ValueError` with the problem if it has one."""
        if problem := self.problem(value):
            raise ValueError(problem)
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.passed, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(schema), **self.keywords}


class ToldByFirstKey:
    """Marks a union of tables: exactly one of their first keys is there, and says which table it is."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        tables = tables_by_first_key(source)

        def present(value: Any) -> str:
            return " and ".join(key for key in tables if isinstance(value, dict) and key in value) or "none of them"

        choices = {key: handler.generate_schema(table) for key, table in tables.items()}
        return core_schema.tagged_union_schema(choices, discriminator=present)


def tables_by_first_key(union: Any) -> dict[str, Any]:
    """The dataclasses of a union by the name of their first field."""
    tables = [one for one in typing.get_args(union) if dataclasses.is_dataclass(one)]
    return {dataclasses.fields(table)[0].name: table for table in tables}


def as_json(value: Any) -> Any:
    """A table of a suite as JSON values: every key with its value or default, `ADDED` keys only if they are set."""
    if dataclasses.is_dataclass(value):
        entries = {key: getattr(value, key.name) for key in dataclasses.fields(value)}
        return {
            key.name: as_json(entry) for key, entry in entries.items() if key.metadata != ADDED or entry != key.default
        }
    if isinstance(value, Mapping):
        return {name: as_json(entry) for name, entry in value.items()}
    return [as_json(entry) for entry in value] if isinstance(value, tuple) else value


def at_least(minimum: int) -> Check:
    """That a number is not below `minimum`."""

    def problem(value: float) -> str | None:
        return f"must be at least {minimum}, not {value}" if value < minimum else None

    return Check(problem, {"minimum": minimum})


def one_of(*known: str) -> Check:
    """That a string is one of those `known`."""

    def problem(value: str) -> str | None:
        return None if value in known else f"must be one of {', '.join(known)}, not '{value}'"

    return Check(problem, {"enum": list(known)})


def keyed_by_name(what: str, problem: Callable[[Mapping[str, Any]], str | None] = lambda _: None) -> Check:
    """That the keys of a table are names, each of them `what` ("a task"), and that the table has no other `problem`."""

    def of_table(tables: Mapping[str, Any]) -> str | None:
        wrong = next((wrong for name in tables if (wrong := _no_name(name))), None)
        return f"has {what} that {wrong}" if wrong else problem(tables)

    return Check(of_table, {"propertyNames": _NAME_KEYWORDS})


def _no_name(value: str) -> str | None:
    if _NAME.fullmatch(value):
        return None
    return f"must be a name of lower-case letters, digits, '.', '_' and '-', not '{value}'"


def _no_share(value: float) -> str | None:
    return None if 0 <= value <= 1 else f"must be between 0 and 1, not {value}"


def _few_or_twice(values: tuple[Any, ...]) -> str | None:
    if not values or len(set(map(repr, values))) < len(values):
        return "must be a list of at least one value, none twice"
    return None


_NAME_KEYWORDS = {"pattern": f"^{_NAME.pattern}$"}
Name = Annotated[str, Check(_no_name, _NAME_KEYWORDS)]
NonEmpty = Annotated[str, Check(lambda text: None if text else "must not be empty", {"minLength": 1})]
Share = Annotated[float, Check(_no_share, {"minimum": 0, "maximum": 1})]
AtLeast0 = Annotated[int, at_least(0)]
AtLeast1 = Annotated[int, at_least(1)]
AtLeast2 = Annotated[int, at_least(2)]
Distinct = Annotated[tuple[T, ...], Check(_few_or_twice, {"minItems": 1, "uniqueItems": True})]
"""A list of at least one value, none twice."""
