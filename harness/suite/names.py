"""The names of rows in tables, and the names that the Hub takes."""

import re

SOURCE = "source"
"""The row of the unquantized model."""
BASELINE = "baseline"
"""What a rule names as `versus` to compare a row with an older run of its own."""
NOISE = ("noise-restart", "noise-batch", "noise-engine")
"""Rows of `harness fidelity` that compare the source with itself. No variant may have such a name."""
_SETUP = "+"  # between a variant and the setup that it was measured in
_HUB_ID = re.compile(r"(?!.*(--|\.\.|\.git$))\w([\w.-]{0,94}\w)?/\w([\w.-]{0,94}\w)?", re.ASCII)


def row_name(variant: str, setup: str | None) -> str:
    """The name of a variant's row: `w4a4`, or `w4a4+mtp1` in a setup."""
    return variant if setup is None else f"{variant}{_SETUP}{setup}"


def row_parts(row: str) -> tuple[str, str | None]:
    """The variant and the setup that a row's name is made of; the setup is None for the suite's own options."""
    variant, _, setup = row.partition(_SETUP)
    return variant, setup or None


def is_hub_id(name: object) -> bool:
    """Whether a name is `owner/name` as the Hub takes it (`validate_repo_id` of huggingface_hub). Without its owner, a
    data set's name may be a kind of local files, such as `json`."""
    return isinstance(name, str) and _HUB_ID.fullmatch(name) is not None
