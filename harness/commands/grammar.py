"""The grammar of the command line, made of the tables of `grammar.toml`."""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import __version__


def path_or_none(text: str) -> Path | None:
    """A path; None for the empty text that an unset shell variable leaves."""
    return Path(text) if text else None


def positive_number(text: str) -> float:
    """A finite number above zero."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def whole_number(text: str) -> int:
    """An integer from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return value


TYPES: dict[str, Callable[[str], Any]] = {
    "int": int,
    "path": Path,
    "path_or_none": path_or_none,
    "positive_number": positive_number,
    "whole_number": whole_number,
}
"""What the word after an option becomes, by the names of `grammar.toml`."""


def tables() -> dict[str, Any]:
    """What `grammar.toml` says: `commands` by name, and the arguments that several of them have, `shared`."""
    return tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))


def parser(given: Sequence[str]) -> argparse.ArgumentParser:
    """The grammar of a command line: a sentence for every subcommand, and the arguments of the subcommand that the line
    begins with, which is `command` of what is parsed."""
    said = tables()
    top = argparse.ArgumentParser(
        prog="harness", description="Build, verify, measure and report NVFP4 variants of hybrid DeltaNet models."
    )
    top.add_argument("--version", action="version", version=f"harness {__version__}")
    _add_commands(top, said["commands"], said["shared"], given[:1], dest="command", metavar="COMMAND")
    return top


def _add_commands(
    parser: argparse.ArgumentParser,
    commands: Mapping[str, Any],
    shared: Mapping[str, Any],
    whole: Container[str],
    **names: str,
) -> None:
    """Adds subcommands to a parser, and the arguments of those that are named in `whole`: adding them takes time."""
    subparsers = parser.add_subparsers(required=True, **names)
    for name, about in commands.items():
        command = subparsers.add_parser(name, help=about["sentence"], description=about["sentence"])
        if name not in whole:
            continue
        for argument, said in about.get("arguments", {}).items():
            keywords = dict(shared[argument] if said == "shared" else said)
            if "type" in keywords:
                keywords["type"] = TYPES[keywords["type"]]
            command.add_argument(argument, **keywords)
        if "commands" in about:
            _add_commands(command, about["commands"], shared, about["commands"], metavar="WHAT")
