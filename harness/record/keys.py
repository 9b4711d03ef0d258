"""The keys of a JSON table: what each means, its type, unit and bounds, and the check that follows from them.

A check is compiled once per table, because it runs on every line that is written or read.
"""

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

Form = (
    Literal["text", "flag", "count", "number", "table", "open table", "anything"]
    | Literal["texts", "counts", "numbers", "tables", "named texts", "named numbers", "named tables", "scores"]
)
"""What a value is in JSON. `count`: a whole number; `texts`, `counts`, `numbers`, `tables`: a list of them; `named …`:
an object whose names are not fixed; `scores`: an object of numbers and lists of numbers; `open table`: an object that
another page describes."""

POSITIVE = math.ulp(0.0)
"""The lower bound of what is greater than zero."""
ROUNDING = -1e-3
"""The lower bound of a sum that is negative only by rounding."""
LARGEST_COUNT = 2**63 - 1
LARGEST: Mapping[str, float] = {"nats": 1e15, "seconds": 1e10, "dB": 1e5}
"""The magnitude beyond which a number of a unit is absurd."""

Check = Callable[[object], bool]
_MISSING = object()  # of no JSON type, where None is one


@dataclass(frozen=True)
class Key:
    """One key of a table. `low` and `high` are inclusive bounds of every number in the value; without them a count is
    0 or more, and a number is only finite and not absurd in its `unit`. `keys` are those of the tables in the value.
    An `optional` key may be missing; a `nullable` one may be null."""

    form: Form
    meaning: str
    unit: str = ""
    low: float | None = None
    high: float | None = None
    optional: bool = False
    nullable: bool = False
    keys: "Keys | None" = None

    @property
    def bounds(self) -> tuple[float, float]:
        """The least and the greatest number that the value may hold."""
        is_count = self.form in ("count", "counts")
        most = LARGEST_COUNT if is_count else LARGEST.get(self.unit, sys.float_info.max)
        least = 0 if is_count else -most
        return (least if self.low is None else self.low), (most if self.high is None else self.high)


class Keys(dict[str, Key]):
    """The keys of one table, by name."""

    @cached_property
    def _required(self) -> list[tuple[str, Check]]:
        return [(name, _check(key)) for name, key in self.items() if not key.optional]

    @cached_property
    def _optional(self) -> list[tuple[str, Check]]:
        return [(name, _check(key)) for name, key in self.items() if key.optional]

    def problem(self, values: Mapping[str, Any]) -> str | None:
        """The first key that is missing or whose value is not what it must be; None for a good table. Names that the
        table does not know are no problem here: see `unknown`."""
        get = values.get
        for name, is_good in self._required:
            if not is_good(get(name, _MISSING)):
                return self._place(name, values)
        for name, is_good in self._optional:
            if name in values and not is_good(values[name]):
                return self._place(name, values)
        return None

    def _place(self, name: str, values: Mapping[str, Any]) -> str:
        """The dotted place of the fault within a table that is a value of this one, else the name."""
        below, value = self[name].keys, values.get(name)
        if self[name].form == "table" and below is not None and isinstance(value, dict):
            return f"{name}.{below.problem(value)}"
        return name

    def unknown(self, values: Mapping[str, Any]) -> str | None:
        """The dotted place of the first name that is no key of the table, or of a table within it; None where there is
        none."""
        for name, value in values.items():
            if name not in self:
                return name
            below = self[name].keys
            if below is None or value is None:
                continue
            within = {"table": [value], "tables": value}.get(self[name].form) or list(value.values())
            if found := next(filter(None, map(below.unknown, within)), None):
                return f"{name}.{found}"
        return None

    def without_bounds(self) -> "Keys":
        """The same keys, whose numbers may be of any size; counts keep their bounds."""
        numbers = ("number", "numbers", "named numbers", "scores")
        return Keys(
            {
                name: replace(key, low=-math.inf, high=math.inf)
                if key.form in numbers
                else replace(key, keys=key.keys and key.keys.without_bounds())
                for name, key in self.items()
            }
        )


def optional(**keys: Key) -> dict[str, Key]:
    """The keys as such that may be missing."""
    return {name: replace(key, optional=True) for name, key in keys.items()}


def _check(key: Key) -> Check:
    """Whether a value is what the key says."""
    is_good = _check_of_form(key)
    if key.nullable:
        return lambda value: value is None or is_good(value)
    return is_good


def _check_of_form(key: Key) -> Check:
    low, high = key.bounds

    def is_count(value: object) -> bool:
        return type(value) is int and low <= value <= high

    def is_number(value: object) -> bool:
        # True is no number; NumPy's floats are.
        return (isinstance(value, float) or type(value) is int) and low <= value <= high

    if key.keys is not None:
        is_table = _table(key.keys)
        of_tables = {"table": is_table, "tables": _some(_list_of(is_table)), "named tables": _named(is_table)}
        return of_tables[key.form]
    are_numbers = _some(_list_of(is_number))
    checks: dict[str, Check] = {
        "text": _is_text,
        "texts": _list_of(_is_text),
        "named texts": _named(_is_text),
        "flag": lambda value: value is True or value is False,
        "count": is_count,
        "number": is_number,
        "counts": _list_of(is_count),
        "numbers": are_numbers,
        "named numbers": _some(_named(is_number)),
        "scores": _named(lambda value: is_number(value) or are_numbers(value)),
        "open table": lambda value: isinstance(value, dict),
        "anything": lambda value: value is not _MISSING,
    }
    return checks[key.form]


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _table(keys: Keys) -> Check:
    return lambda value: isinstance(value, dict) and keys.problem(value) is None


def _list_of(is_good: Check) -> Check:
    return lambda value: isinstance(value, list | tuple) and all(map(is_good, value))


def _named(is_good: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(map(is_good, value.values()))


def _some(is_good: Check) -> Check:
    """That, and not empty."""
    return lambda value: bool(value) and is_good(value)
