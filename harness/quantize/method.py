"""How a recipe chooses scales and codes."""

from dataclasses import dataclass

from harness.formats.format import ABSMAX, WEIGHTED_SEARCH

ROUND_TO_NEAREST, GPTQ = "rtn", "gptq"
CODES = (ROUND_TO_NEAREST, GPTQ)


@dataclass(frozen=True)
class Method:
    """How scales (`SCALE_METHODS`) and codes (`CODES`, see gptq.py) are chosen. `damping` is added to the
    diagonal of GPTQ's matrix, as a share of its mean; `sweeps` are the visits to every column after GPTQ's own."""

    scales: str
    codes: str
    damping: float = 0.01
    sweeps: int = 0

    @property
    def two_streams(self) -> bool:
        """Whether the unquantized model's hidden states are needed beside the quantized one's."""
        return self.codes == GPTQ

    @property
    def needs_moments(self) -> bool:
        """Whether the second moments of inputs are needed."""
        return self.two_streams or self.scales == WEIGHTED_SEARCH


RTN = Method(ABSMAX, ROUND_TO_NEAREST)
CALIBRATED = Method(WEIGHTED_SEARCH, GPTQ, damping=0.2, sweeps=2)
