"""Reads one TOML file into the classes of a schema, and refuses with the place and the remedy."""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import UserError, did_you_mean

_TYPE_WORDS = {
    str: "a string",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "a table",
}


def _describe(value: object) -> str:
    return _TYPE_WORDS.get(type(value), f"a {type(value).__name__}")


@dataclass(frozen=True)
class Reader:
    """TOML values to dataclasses, driven by the annotations; `file` and `what` it holds are only for messages."""

    file: Path
    what: str

    def value(self, kind: Any, value: object, dotted: str) -> Any:
        """`value` as an annotation wants it: dataclass, union, tuple, mapping of names, or a plain type."""
        if dataclasses.is_dataclass(kind):
            return self.table(kind, value, dotted)
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if origin is types.UnionType:
            return self.union([one for one in arguments if one is not types.NoneType], value, dotted)
        if origin is tuple:
            items = self.expect(list, value, dotted)
            if not items or len(set(map(repr, items))) < len(items):
                raise self.wrong(dotted, "must be a list of at least one value, none twice")
            return tuple(self.value(arguments[0], item, f"{dotted}[{i}]") for i, item in enumerate(items))
        if origin is Mapping:
            entries = self.expect(dict, value, dotted)
            return {name: self.value(arguments[1], entry, f"{dotted}.{name}") for name, entry in entries.items()}
        if kind is float and type(value) is int:
            value = float(value)
        plain = self.expect(kind, value, dotted)
        if plain == "":
            raise self.wrong(dotted, "must not be empty")
        if kind is float and not math.isfinite(plain):
            raise self.wrong(dotted, f"must be a finite number, not {plain}")
        return plain

    def union(self, kinds: list[Any], value: object, dotted: str) -> Any:
        """The one kind whose first key is present; a union of one kind (`X | None`) needs no telling."""
        if len(kinds) == 1:
            return self.value(kinds[0], value, dotted)
        tags = {dataclasses.fields(kind)[0].name: kind for kind in kinds}
        present = [tag for tag in tags if tag in self.expect(dict, value, dotted)]
        if len(present) != 1:
            found = " and ".join(present) or "none of them"
            raise self.wrong(dotted, f"must have exactly one of the keys {', '.join(tags)}, and has {found}")
        return self.table(tags[present[0]], value, dotted)

    def table(self, kind: Any, value: object, dotted: str) -> Any:
        """A TOML table as the dataclass `kind`: no unknown key, no missing one, every check passed."""
        entries = self.expect(dict, value, dotted)
        prefix = f"{dotted}." if dotted else ""
        fields = {one.name: one for one in dataclasses.fields(kind) if one.metadata.get("in_file", True)}
        for key in entries:
            if key not in fields:
                raise UserError(f"{self.file}: unknown key '{prefix}{key}'.", did_you_mean(key, fields))
        arguments = {}
        for key, one in fields.items():
            if key in entries:
                arguments[key] = self.value(one.type, entries[key], prefix + key)
                wrong = one.metadata.get("check", lambda _: None)(arguments[key])
                if wrong:
                    raise self.wrong(prefix + key, wrong)
            elif one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING:
                raise UserError(
                    f"{self.file}: '{prefix}{key}' is missing.",
                    f"Add it{f' to [{dotted}]' if dotted else ''}.",
                )
        return kind(**arguments)

    def expect(self, kind: Any, value: object, dotted: str) -> Any:
        """`value` if it is exactly a `kind` (true is no number), an error otherwise."""
        if type(value) is not kind:
            raise self.wrong(dotted, f"must be {_TYPE_WORDS[kind]}, not {_describe(value)}")
        return value

    def wrong(self, dotted: str, problem: str) -> UserError:
        return UserError(f"{self.file}: '{dotted}' {problem}.", f"Correct it in the {self.what}.")
