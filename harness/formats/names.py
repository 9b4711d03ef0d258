"""Names of formats as records write them: for readers of records, who need no torch.

A report shows any format by the name that its records give. Only what a report says of one format in particular, and
not of others, is named here.
"""

KEPT = "kept"
"""Stands for the format of a tensor that is not quantized."""

NVFP4A16, NVFP4, FP8_DYNAMIC = "NVFP4A16", "NVFP4", "FP8_DYNAMIC"

FOUR_BIT_INPUTS = frozenset({NVFP4})
"""The formats whose kernels multiply in 4 bits."""
