"""Tests, which run without a compiler.

compressed-tensors compiles its rounding to FP4 when it first runs in a process. That takes up to a minute, and a C++
compiler that a machine may not have. Uncompiled, the same comparisons give the same bits. The variable is set here
because torch reads it as it is imported; programs that tests start inherit it.
"""

import os

os.environ["TORCH_COMPILE_DISABLE"] = "1"
