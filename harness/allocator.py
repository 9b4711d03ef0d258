"""The C library's allocator, told to keep freed memory for the next tensor."""

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""`mallopt`'s names for them (malloc.h of glibc)."""
_LARGEST_MMAP_THRESHOLD = 32 << 20
"""What glibc accepts at most (DEFAULT_MMAP_THRESHOLD_MAX); larger tensors go back to the system as before."""


def keep_freed_memory() -> None:
    """From now on, memory up to 32 MB that is freed stays with the process.

    glibc gives it back as soon as a fraction of a megabyte lies free at the end of a heap, and the system clears every
    page that it hands out again: loops over tensors of a megabyte, which is what a cache holds, then spend most of
    their time on that. Where the C library has no `mallopt`, nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
    mallopt(_TRIM_THRESHOLD, 1 << 30)
