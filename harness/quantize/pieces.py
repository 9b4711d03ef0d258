"""How much of a layer calibration works on at a time: this decides its memory, which `plan` computes without torch."""

EXPERTS_TOGETHER = 1 << 27
"""Weights of experts that are widened together."""
ROUNDED_TOGETHER = 1 << 25
"""Weights that GPTQ rounds together: rows do not depend on each other."""
ROUNDED_COPIES, FACTOR_COPIES = 9, 3
"""Arrays that GPTQ holds: of the size of the weights that are rounded together, while they are, and of the size of the
moments, while their Cholesky factor is made."""
