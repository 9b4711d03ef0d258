"""Loads suites: read, checked across tables, and with what gate rules leave open filled in."""

import dataclasses
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.errors import UserError, did_you_mean
from harness.suite.metrics import METRICS, SHARE
from harness.suite.names import BASELINE, SOURCE, row_name
from harness.suite.reader import read_table
from harness.suite.schema import Bench, Rule, Suite, SuiteFile
from harness.suite.texts import Calibration


def narrowed(suite: Suite, variant: str) -> Suite:
    """The suite with one of its variants alone beside the source: without the rules that are about others, or hold it
    against one."""
    alone = dataclasses.replace(suite, variants={variant: suite.variants[variant]})
    rows = alone.rows()
    bench = suite.bench
    if bench is not None and bench.variants is not None:
        bench = dataclasses.replace(bench, variants=tuple(name for name in bench.variants if name in rows))
    if bench is not None and bench.versus not in rows:
        bench = dataclasses.replace(bench, versus=SOURCE)
    gate = tuple(rule for rule in suite.gate if rule.variant in rows and rule.versus in (None, BASELINE, *rows))
    return dataclasses.replace(alone, bench=bench, gate=gate)


def load(path: Path) -> Suite:
    """Read and check one suite file."""
    suite = _read(_document(path, "suite", "--suite"), path)
    tasks = ((f"tasks.{name}", task) for name, task in suite.tasks.items())
    for table, wanted in (("ppl", suite.ppl), ("fidelity", suite.fidelity), ("bench", suite.bench), *tasks):
        for setup in (wanted and wanted.setups) or ():
            if setup not in suite.setups:
                raise UserError(
                    f"{path}: '{table}.setups' names '{setup}', and there is no [setups.{setup}].",
                    did_you_mean(setup, suite.setups),
                )
    if suite.bench and suite.bench.versus not in (timed := _timed_rows(suite, suite.bench)):
        raise UserError(
            f"{path}: 'bench.versus' names '{suite.bench.versus}', which the suite does not measure the speed of.",
            did_you_mean(suite.bench.versus, timed),
        )
    for name in suite.ppl.expected if suite.ppl else ():
        if suite.ppl and name not in suite.ppl.protocols:
            raise UserError(
                f"{path}: 'ppl.expected' has '{name}', which is not among the protocols.",
                did_you_mean(name, suite.ppl.protocols),
            )
    rules = tuple(_completed(f"{path}: 'gate[{place}]", rule, suite) for place, rule in enumerate(suite.gate))
    return dataclasses.replace(suite, gate=rules, folder=path.parent)


def restored(resolved: Mapping[str, Any], where: str) -> Suite:
    """The suite that `Suite.resolved` wrote out, for example into the header of a run; its folder is not known. `where`
    it stands is for the `UserError` of one that another version of the harness wrote."""

    def stated(value: Any) -> Any:
        """Without what is left open: null, which TOML has not, and lists of nothing."""
        if isinstance(value, dict):
            return {key: stated(one) for key, one in value.items() if one is not None and one != []}
        return [stated(one) for one in value] if isinstance(value, list) else value

    return _read(stated(dict(resolved)), Path(where))


def _read(document: Mapping[str, Any], file: Path) -> Suite:
    return Suite(**vars(read_table(SuiteFile, document, file, "suite")))


def _timed_rows(suite: Suite, bench: Bench) -> list[str]:
    """The rows whose speed is measured."""
    names = (SOURCE, *(suite.variants if bench.variants is None else bench.variants))
    return [row_name(name, setup) for setup in (None, *(bench.setups or ())) for name in names]


def _completed(where: str, rule: Rule, suite: Suite) -> Rule:
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
    filled = _with_option(where, rule, suite)
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


def _with_option(where: str, rule: Rule, suite: Suite) -> Rule:
    """The rule with the default of its metric's own key, which must be something that the suite measures."""
    option = METRICS[rule.metric].option
    protocols = suite.ppl.protocols if suite.ppl else ()
    filled = dataclasses.replace(
        rule,
        protocol=rule.protocol or (protocols[0] if option == "protocol" else None),
        batch=rule.batch or (1 if option == "batch" else None),
    )
    measured = {
        "task": tuple(suite.tasks),
        "protocol": protocols,
        "batch": suite.bench.batch_sizes if suite.bench else (),
    }
    for key, known in measured.items():
        value = getattr(filled, key)
        if value is not None and key != option:
            raise UserError(f"{where}.{key}' is set, and {rule.metric} has none.", "Leave it out.")
        if value is not None and value not in known:
            remedy = did_you_mean(str(value), map(str, known))
            raise UserError(f"{where}.{key}' is {value}, which the suite does not measure.", remedy)
    return filled


def load_calibration(path: Path) -> tuple[Calibration, Path]:
    """The calibration set in a file that holds what a suite's [calibration] table does, and the folder that its
    relative paths start at."""
    document = _document(path, "calibration set", "--calibration")
    return read_table(Calibration, document, path, "calibration set"), path.parent


def _document(path: Path, what: str, option: str) -> dict[str, Any]:
    """The TOML file `path`, as its own types; `what` and `option` are for messages."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{path}: the {what} cannot be read ({error.strerror}).",
            f"Give the path of a TOML file with {option}.",
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: the {what} is not UTF-8 text.", "Save it as UTF-8.") from error
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        last_line = f"at line {text.count(chr(10)) + 1}, the end of the file"
        where = str(error).replace("at end of document", last_line)
        raise UserError(f"{path}: not valid TOML: {where}.", "Mend that line.") from error
