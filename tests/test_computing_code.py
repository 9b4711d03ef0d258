"""A version is raised when the code that it stands for changes: stored answers of other code are not used again."""

import json

import pytest

from tests.computing_code import GROUPS, NO_NUMBERS, NOTED, digest_of, modules, modules_of, now

CODE = '''
"""A module."""
import math

VERSION = 1
WIDTH = 4


def area(radius: float) -> float:
    """The area of a circle."""
    if radius < 0:
        raise ValueError(f"a radius of {radius}")
    return math.pi * radius**2  # by hand
'''


@pytest.mark.parametrize("name", GROUPS)
def test_code_that_computes_does_not_change_without_its_version(name: str) -> None:
    noted, found = json.loads(NOTED.read_text(encoding="utf-8")).get(name), now(name)
    assert noted == found, (
        f"The code of {name} changed, or its version. If a number can differ, raise the version "
        f"({GROUPS[name].declared}). Then, or at once if no number can differ: python -m tests.computing_code"
    )


def test_every_module_that_computes_belongs_to_a_version() -> None:
    grouped = {module for group in GROUPS.values() for module in modules_of(group)}
    assert grouped.isdisjoint(NO_NUMBERS)
    assert set(modules()) - grouped == set(NO_NUMBERS) | UNVERSIONED


UNVERSIONED = {"quantize.sensitivity"}
"""Nothing of it is stored to be used again."""


def test_a_version_stands_for_what_its_code_computes_with() -> None:
    torch = modules_of(GROUPS["the torch engine"])
    assert {"engines.torch_engine", "engines.loading", "formats.nvfp4", "formats.fp8"} <= torch
    assert "formats.nvfp4" in modules_of(GROUPS["the vLLM engine"]) & modules_of(GROUPS["the builder"])
    assert {"measure.tasks", "measure.lm", "measure.kept"} <= modules_of(GROUPS["tasks"])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"""A module."""', '"""Another module."""'),
        ("The area of a circle.", "Its area."),
        ("# by hand", "# by arithmetic"),
        ("return math.pi * radius**2", "return (\n        math.pi\n        * radius**2\n    )"),
        ("radius: float", "radius: int"),
        ("a radius of", "there is no radius of"),
        ("import math", "import math\nfrom harness.formats import nvfp4"),
        ("VERSION = 1", "VERSION = 2"),
        ("WIDTH = 4\n", ""),  # and moved to the end
    ],
)
def test_what_does_not_compute_does_not_count(old: str, new: str) -> None:
    changed = CODE.replace(old, new) + ("\nWIDTH = 4\n" if "WIDTH = 4" not in CODE.replace(old, new) else "")
    assert changed != CODE
    assert digest_of([changed]) == digest_of([CODE])


def test_the_module_in_which_code_stands_does_not_count() -> None:
    head, _, body = CODE.partition("WIDTH = 4")
    assert digest_of([CODE]) == digest_of([head + "WIDTH = 4", "import math\n" + body])


@pytest.mark.parametrize(
    ("old", "new"),
    [("radius**2", "radius**3"), ("WIDTH = 4", "WIDTH = 5"), ("radius < 0", "radius <= 0"), ("ValueError", "KeyError")],
)
def test_what_computes_counts(old: str, new: str) -> None:
    assert digest_of([CODE.replace(old, new)]) != digest_of([CODE])
