"""Settings of the C library's allocator, because a CPU step allocates the same large blocks repeatedly."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Make the allocator keep freed memory for later tensors, and return whether it accepted the setting.

    By default glibc returns every block above 32 MB, and the free end of its heap, to the system, which then clears
    and maps the same pages again at every step (cost: docs/benchmarks.md). The peak does not change; memory is not
    returned between steps. Nothing changes if the user set `MALLOC_…_` or `GLIBC_TUNABLES`, or with another C
    library.
    """
    if any(name in os.environ for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")):
        return False
    with suppress(OSError, AttributeError):  # no glibc
        mallopt = ctypes.CDLL(None).mallopt
        return all(mallopt(option, LARGEST) == 1 for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD))
    return False
