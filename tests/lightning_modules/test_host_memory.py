"""Freed memory stays with the process, and settings of the user's own stand."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PAGES = 64 * 2**20 // os.sysconf("SC_PAGE_SIZE")
PROGRAM = """
import resource
import torch
from lightning_modules.private import keep_freed_memory
print(keep_freed_memory())
torch.ones(2**24)  # 64 MB
faults = []
for _ in range(5):  # under pressure, the kernel takes pages away and adds faults of its own
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**24)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the allocator is glibc's")
@pytest.mark.parametrize("own_setting", [{}, {"MALLOC_MMAP_THRESHOLD_": "1048576"}])
def test_a_freed_tensor_is_not_mapped_again(own_setting: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        text=True,
        capture_output=True,
        check=True,
        env={**os.environ, **own_setting},
    )
    agreed, faults = done.stdout.split()
    if own_setting:
        assert agreed == "False"
        assert int(faults) > 9 * PAGES
    else:
        assert agreed == "True"
        assert int(faults) < 2 * PAGES
