"""The allocator of the C library, which a step on a CPU asks for the same large blocks again and again."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let freed memory stay with the process for its next tensor; returns whether the allocator agreed.

    By default glibc hands every block above 32 MB, and the free end of its heap, back to the system, which then
    has to clear and map the same pages again at every step (docs/benchmarks.md says what it costs). The peak stays
    what it is; memory between two steps is not given back. Settings of the user's own (`MALLOC_…_`,
    `GLIBC_TUNABLES`) stand, and so does any other C library.
    """
    if any(name in os.environ for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")):
        return False
    with suppress(OSError, AttributeError):  # no glibc
        mallopt = ctypes.CDLL(None).mallopt
        return all(mallopt(option, LARGEST) == 1 for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD))
    return False
