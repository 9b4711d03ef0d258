"""Numbers as they are printed. Apart from the tables, whose libraries a command that only builds need not load."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.record.stats import Estimate


def byte_unit(num_bytes: float) -> tuple[str, int]:
    """The decimal unit that suits a size, and how many bytes it has (1 GB = 10^9 bytes)."""
    units = (("GB", 10**9), ("MB", 10**6), ("kB", 10**3))
    return next(((unit, scale) for unit, scale in units if num_bytes >= scale), ("B", 1))


def format_bytes(num_bytes: float) -> str:
    """Bytes with two decimals in their unit: `18.82 GB`, `11.03 MB`."""
    unit, scale = byte_unit(num_bytes)
    return f"{num_bytes / scale:.2f} {unit}"


def format_estimate(estimate: "Estimate", spec: str) -> str:
    """`value [low, high]`, the value alone where there is no interval."""
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:{spec}}"
    return f"{estimate.value:{spec}} [{estimate.low:{spec}}, {estimate.high:{spec}}]"


def format_percent(ratio: float, spec: str = ".1f") -> str:
    """A ratio as a percentage: 0.595 is `59.5 %`."""
    return f"{100 * ratio:{spec}} %"
