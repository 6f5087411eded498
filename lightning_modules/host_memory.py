"""Settings of the C library's allocator, because a CPU step allocates the same large blocks repeatedly."""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Make the allocator keep freed memory for later tensors, and return whether it accepted the setting.

    By default glibc returns blocks above 32 MB to the system, which clears and maps the same pages again at every
    step (docs/benchmarks.md). The user's own settings stay, and another C library is left alone.
    """
    own = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"} & os.environ.keys()
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # of glibc
    if own or mallopt is None:
        return False
    return all(mallopt(option, LARGEST) == 1 for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD))
