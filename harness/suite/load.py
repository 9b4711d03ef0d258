"""Loads suite files: reads them, checks what one table says of another, and completes rules and claims.

A document becomes classes of the schema or is refused with one sentence: the first thing that pydantic finds wrong,
with its place (`gate[2].variant`) and a remedy.
"""

import dataclasses
import json
import tomllib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from harness.errors import UserError, did_you_mean
from harness.suite.names import BASELINE, SOURCE, row_name
from harness.suite.rules import CLAIM_KINDS, METRICS, SHARE, Claim, Rule
from harness.suite.schema import Suite, SuiteFile
from harness.suite.texts import Calibration
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
_adapter: Callable[[type], TypeAdapter[Any]] = cache(TypeAdapter)  # each takes some 40 ms to make


def narrowed(suite: Suite, variant: str) -> Suite:
    """The suite with one variant alone beside the source, without rules and claims that another variant is part of."""
    alone = dataclasses.replace(suite, variants={variant: suite.variants[variant]})
    rows = alone.rows()
    bench = suite.bench
    if bench is not None and bench.variants is not None:
        bench = dataclasses.replace(bench, variants=tuple(name for name in bench.variants if name in rows))
    if bench is not None and bench.versus not in rows:
        bench = dataclasses.replace(bench, versus=SOURCE)
    gate = tuple(rule for rule in suite.gate if rule.variant in rows and rule.versus in (None, BASELINE, *rows))
    claims = tuple(one for one in suite.claim if one.variant in rows and one.versus in (None, *rows))
    return dataclasses.replace(alone, bench=bench, gate=gate, claim=claims)


def load(path: Path) -> Suite:
    """The suite in a file; `UserError` with the place and a remedy for a file that cannot be meant."""
    suite = _read(_document(path, "suite", "--suite"), path)
    tasks = ((f"tasks.{name}", task) for name, task in suite.tasks.items())
    for table, wanted in (("ppl", suite.ppl), ("fidelity", suite.fidelity), ("bench", suite.bench), *tasks):
        for setup in (wanted and wanted.setups) or ():
            if setup not in suite.setups:
                raise UserError(
                    f"{path}: '{table}.setups' names '{setup}', and there is no [setups.{setup}].",
                    did_you_mean(setup, suite.setups),
                )
    if bench := suite.bench:
        names = (SOURCE, *(suite.variants if bench.variants is None else bench.variants))
        timed = [row_name(name, setup) for setup in (None, *(bench.setups or ())) for name in names]
        if bench.versus not in timed:
            raise UserError(
                f"{path}: 'bench.versus' names '{bench.versus}', which the suite does not measure the speed of.",
                did_you_mean(bench.versus, timed),
            )
    for name in suite.ppl.expected if suite.ppl else ():
        if suite.ppl and name not in suite.ppl.protocols:
            raise UserError(
                f"{path}: 'ppl.expected' has '{name}', which is not among the protocols.",
                did_you_mean(name, suite.ppl.protocols),
            )
    rules = tuple(_completed_rule(f"{path}: 'gate[{place}]", rule, suite) for place, rule in enumerate(suite.gate))
    claims = tuple(_completed_claim(f"{path}: 'claim[{place}]", one, suite) for place, one in enumerate(suite.claim))
    return dataclasses.replace(suite, gate=rules, claim=claims, folder=path.parent)


def restored(resolved: Mapping[str, Any], where: str) -> Suite:
    """The suite that `Suite.resolved` wrote out, for example into a run's header; its folder is not known. `where` it
    stands is for the `UserError` if another version of the harness wrote it."""

    def stated(value: Any) -> Any:
        """The value without keys that are left open, which a TOML file cannot say: null and empty lists."""
        if isinstance(value, dict):
            return {key: stated(one) for key, one in value.items() if one is not None and one != []}
        return [stated(one) for one in value] if isinstance(value, list) else value

    return _read(stated(dict(resolved)), Path(where))


def _read(document: Mapping[str, Any], file: Path) -> Suite:
    return Suite(**vars(_table(SuiteFile, document, file, "suite")))


def _completed_rule(where: str, rule: Rule, suite: Suite) -> Rule:
    """A rule with what it leaves open filled in; `UserError` for one that this suite has no numbers for."""
    metric = METRICS[rule.metric]
    if metric.table and not getattr(suite, metric.table):
        raise UserError(
            f"{where}.metric' is {rule.metric}, and the suite has no [{metric.table}] table.",
            "Add the table, or leave the rule out.",
        )
    rows = suite.variants if metric.unit is None else suite.rows()
    if rule.variant not in rows:
        raise UserError(f"{where}.variant' names '{rule.variant}', which is none.", did_you_mean(rule.variant, rows))
    protocol = suite.ppl.protocols[0] if suite.ppl and metric.option == "protocol" else None
    filled = dataclasses.replace(
        rule, protocol=rule.protocol or protocol, batch=rule.batch or (1 if metric.option == "batch" else None)
    )
    _check_option(where, filled, rule.metric, metric.option, suite)
    if metric.unit is None:
        for key in ("versus", "margin"):
            if getattr(rule, key) is not None:
                raise UserError(f"{where}.{key}' is set, and {rule.metric} looks at one model alone.", "Leave it out.")
        return filled
    versus = rule.versus or SOURCE
    against = [*rows, BASELINE] if metric.has_baseline else list(rows)
    against.remove(rule.variant)
    if rule.variant == SOURCE:  # which the others are held against, and whose fidelity to itself is none
        against = [row for row in against if row == BASELINE and metric.table != "fidelity"]
    if versus not in against:
        raise UserError(
            f"{where}.versus' is '{versus}', which {rule.metric} of '{rule.variant}' cannot be held against.",
            did_you_mean(versus, against) if against else "Name a variant.",
        )
    if rule.margin is None:
        raise UserError(f"{where}.margin' is missing.", f"Say what loss is accepted, for example 0.01 ({metric.unit}).")
    # A gain of speed has no bound.
    if metric.unit == SHARE and (rule.margin >= 1 or (rule.margin <= -1 and metric.has_baseline)):
        raise UserError(f"{where}.margin' is {rule.margin:g}, and a share is below 1.", "Write 0.03 for three points.")
    if rule.margin < 0 and metric.has_baseline and versus in (SOURCE, BASELINE):
        raise UserError(
            f"{where}.margin' is {rule.margin:g}: below zero it asks for a gain, which rounding does not bring.",
            "Use a margin of at least 0.",
        )
    return dataclasses.replace(filled, versus=versus)


def _completed_claim(where: str, claim: Claim, suite: Suite) -> Claim:
    """A claim with what it leaves open filled in; `UserError` for one that this suite has no numbers for."""
    kind, rows = CLAIM_KINDS[claim.kind], suite.rows()
    if claim.metric is not None and not (kind.names_metric and claim.metric in kind.metrics):
        remedy = f"Name one of {', '.join(kind.metrics)}." if kind.names_metric else "Leave it out."
        raise UserError(f"{where}.metric' is {claim.metric}, which '{claim.kind}' is not about.", remedy)
    is_better = claim.kind == "better"  # in all of the quality that is measured, unless a metric is named
    metric = claim.metric or (kind.metrics[0] if kind.names_metric and not is_better else None)
    about = (metric,) if metric else kind.metrics
    missing = [table for one in about if (table := METRICS[one].table) and not getattr(suite, table)]
    if missing and not (is_better and metric is None and len(missing) < len(about)):
        raise UserError(
            f"{where}.kind' is {claim.kind}, and the suite has no [{missing[0]}] table.",
            "Add the table, or leave the claim out.",
        )
    if claim.variant not in rows:
        raise UserError(f"{where}.variant' names '{claim.variant}', which is none.", did_you_mean(claim.variant, rows))
    versus = claim.versus or SOURCE
    against = [row for row in rows if row != claim.variant and (row == SOURCE or not kind.of_source)]
    if claim.variant == SOURCE and (kind.of_source or "kl" in about):
        against = []
    if versus not in against:
        remedy = did_you_mean(versus, against) if against else "Name a variant."
        problem = f"{where}.versus' is '{versus}', which '{claim.variant}' cannot be held against as {claim.kind}."
        raise UserError(problem, remedy)
    margin = kind.default_margin if claim.margin is None else claim.margin
    if margin is None and kind.needs_margin:
        raise UserError(f"{where}.margin' is missing.", "Say what share is lost at most, for example 0.01.")
    if margin is not None and not kind.needs_margin and kind.default_margin is None:
        raise UserError(f"{where}.margin' is set, and '{claim.kind}' has none.", "Leave it out.")
    if margin is not None and (margin < 0 or (kind.needs_margin and margin > _MOST_LOST)):
        bounds = f"from 0 to {_MOST_LOST}" if kind.needs_margin else "of at least 0"
        raise UserError(f"{where}.margin' is {margin:g}.", f"Use a share {bounds}.")
    batch = claim.batch or (1 if metric == "decode_speed" else None)
    filled = dataclasses.replace(claim, versus=versus, metric=metric, margin=margin, batch=batch)
    options = {METRICS[one].option for one in about} if metric or claim.kind == "recovery" else set()
    _check_option(where, filled, metric or claim.kind, next(iter(options), None), suite)
    return filled


_MOST_LOST = 0.5  # of perplexity, speed or score by a claim: 0.99 is a slip of who means what is left


def _check_option(where: str, entry: Rule | Claim, about: str, option: str | None, suite: Suite) -> None:
    """`UserError` for a task, protocol or batch that the suite does not measure, or that the entry has no use for."""
    measured = {
        "task": tuple(suite.tasks),
        "protocol": suite.ppl.protocols if suite.ppl else (),
        "batch": suite.bench.batch_sizes if suite.bench else (),
    }
    for key, known in measured.items():
        value = getattr(entry, key)
        if value is not None and key != option:
            raise UserError(f"{where}.{key}' is set, and {about} has none.", "Leave it out.")
        if value is not None and value not in known:
            remedy = did_you_mean(str(value), map(str, known))
            raise UserError(f"{where}.{key}' is {value}, which the suite does not measure.", remedy)


def load_calibration(path: Path) -> tuple[Calibration, Path]:
    """A file's calibration set, written like a suite's [calibration] table, and the folder of its relative paths."""
    document = _document(path, "calibration set", "--calibration")
    return _table(Calibration, document, path, "calibration set"), path.parent


def _document(path: Path, what: str, option: str) -> dict[str, Any]:
    """The TOML file `path`, as its own types; `what` and `option` are for messages."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{path}: the {what} cannot be read ({error.strerror}).", f"Give the path of a TOML file with {option}."
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: the {what} is not UTF-8 text.", "Save it as UTF-8.") from error
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        last_line = f"at line {text.count(chr(10)) + 1}, the end of the file"
        where = str(error).replace("at end of document", last_line)
        raise UserError(f"{path}: not valid TOML: {where}.", "Mend that line.") from error


# -- A document as classes of the schema -----------------------------------------------------------------------------


def _table(table: type[T], document: Mapping[str, Any], file: Path, what: str) -> T:
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
