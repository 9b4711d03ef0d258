"""What only a study needs of the statistics: sample sizes of items, and tests of non-inferiority and equivalence."""

import math
from dataclasses import replace

from scipy import special

from harness.record.stats import TAIL, Estimate, p_above


def detectable_margin(flip_share: float, num: int, power: float = 0.8, alpha: float = TAIL) -> float:
    """The smallest loss (a share) that `num` paired right-or-wrong items can tell from none with the given power.

    `flip_share` is the share of items that change sides where nothing is lost: the difference then has the standard
    error sqrt(flip_share / num), by the normal approximation of McNemar's test (Miettinen, Biometrics 24 (1968)
    339-352). A loss of z(1 - alpha) + z(power) standard errors is found with that power by a one-sided test at `alpha`;
    alike, a variant that loses nothing is shown with that power to lose less. The default is what a 95 % interval
    decides to one side. With alpha = 0.05 and flip shares of 5, 8, 10, 15 and 25 % it gives the margins that are often
    quoted: 1.5 points for GSM8K's 1,319 items, 3.0 for IFEval's 541, 0.7 for MMLU-Pro's 12,032, 6.8 for GPQA Diamond's
    198 and 23 for AIME's 30; at the default they are 13 % larger.
    """
    return _detectable_errors(power, alpha) * math.sqrt(flip_share / num)


def num_for_margin(flip_share: float, margin: float, power: float = 0.8, alpha: float = TAIL) -> int:
    """How many paired items `detectable_margin` needs for a margin (a share, above zero)."""
    num = flip_share * (_detectable_errors(power, alpha) / margin) ** 2
    return math.ceil(num * (1 - 1e-12))  # an error of rounding is no item more


def _detectable_errors(power: float, alpha: float) -> float:
    return float(special.ndtri(power) - special.ndtri(alpha))


def non_inferiority_p(loss: Estimate, margin: float) -> float | None:
    """One-sided p-value of "the true loss is at least `margin`": small where the loss is shown to be less."""
    low, high = (None if end is None else -end for end in (loss.high, loss.low))
    return p_above(replace(loss, value=-loss.value, low=low, high=high), -margin)


def equivalence_p(difference: Estimate, margin: float) -> float | None:
    """p-value of "the true difference is `margin` or more to either side": small where both sides are shown to be
    equal.

    Two one-sided tests (Schuirmann, Journal of Pharmacokinetics and Biopharmaceutics 15 (1987) 657-680): the larger
    p-value of the two.
    """
    below = non_inferiority_p(difference, margin)
    above = p_above(difference, -margin)
    return None if above is None or below is None else max(above, below)
