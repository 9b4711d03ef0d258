"""What the auditor says: one finding a fault.

Findings that differ in nothing but the expert and their numbers are told once, with a count: a tool that forgets the
experts of a layer forgets thousands of tensors.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from harness.model.family import Family

UNINITIALISED = "vLLM leaves the parameter uninitialised without a word, and the model answers with noise"
REFUSED = "vLLM stops while loading"

_NUMBER = re.compile(r"(?<!\w)-?(\d+(\.\d+)?(e[+-]?\d+)?|nan|inf)")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: an `error` breaks or degrades the model, a `warning` may in some release."""

    severity: str
    tensor: str
    problem: str
    consequence: str


def condensed(findings: Iterable[Finding], family: Family) -> tuple[Finding, ...]:
    """The findings in their order, those that say the same of several experts of one layer told by the first."""
    alike: dict[tuple[str, ...], list[Finding]] = {}
    for place, finding in enumerate(findings):
        expert = family.expert_of(finding.tensor)
        said = (_NUMBER.sub("", finding.problem), _NUMBER.sub("", finding.consequence))
        key = (finding.severity, expert.experts, *said) if expert else (str(place),)
        alike.setdefault(key, []).append(finding)
    return tuple(members[0] if len(members) == 1 else _told_once(members, family) for members in alike.values())


def _told_once(members: list[Finding], family: Family) -> Finding:
    experts = {expert.number for finding in members if (expert := family.expert_of(finding.tensor))}
    more = f"{len(members) - 1:,} more of this layer, in {len(experts):,} experts"
    return replace(members[0], problem=f"{members[0].problem}, and so {more}")
