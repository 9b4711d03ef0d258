"""The names that rows of tables have, and the one kind of name that the Hub takes."""

import re

SOURCE = "source"  # the name that the unquantized model has among the variants of a run
BASELINE = "baseline"  # what a rule compares a variant with: an older run of its own
NOISE = ("noise-restart", "noise-batch", "noise-engine")
"""The source beside itself: rows of `harness fidelity`, and no names for variants."""
_SETUP = "+"  # between a variant and the setup that it was measured in
_HUB_ID = re.compile(r"(?!.*(--|\.\.|\.git$))\w([\w.-]{0,94}\w)?/\w([\w.-]{0,94}\w)?", re.ASCII)


def row_name(variant: str, setup: str | None) -> str:
    """How a variant in a setup is called: `w4a4+mtp1`."""
    return variant if setup is None else f"{variant}{_SETUP}{setup}"


def row_parts(row: str) -> tuple[str, str | None]:
    """The variant and the setup of a row; None for the suite's own options."""
    variant, _, setup = row.partition(_SETUP)
    return variant, setup or None


def is_hub_id(name: object) -> bool:
    """Whether a name is `owner/name` as the Hub takes it (https://huggingface.co/docs/huggingface_hub, `HfApi`'s
    `validate_repo_id`). A name without an owner is none: among datasets it may be a kind of local files, such as
    `json`."""
    return isinstance(name, str) and _HUB_ID.fullmatch(name) is not None
