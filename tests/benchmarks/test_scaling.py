"""What ranks send in a step: the gradients once, and a fixed number of bytes for each pair of the global batch."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_exchange_of_gaps_grows_with_the_pairs_alone() -> None:
    words = ["-m", "benchmarks.scaling", "steps", "--ranks", "2", "--pairs", "16", "272", "--steps", "4"]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^\| 2 +\| (\d+) +\| [\d.]+ +\| ([\d,]+) +\| ([\d,]+)", done.stdout, re.MULTILINE)
    figures = {int(pairs): tuple(int(each.replace(",", "")) for each in found) for pairs, *found in rows}
    (sent, gaps), (sent_more, gaps_more) = figures[16], figures[272]
    # six float64 a pair; the barrier beside them is the same for both
    assert (gaps_more - gaps) / (272 - 16) == pytest.approx(48, rel=0.01)
    gradients = int(re.search(r"([\d,]+) bytes of float32 gradients", done.stdout)[1].replace(",", ""))
    for other in (sent - gaps, sent_more - gaps_more):
        assert gradients < other < gradients + 5000
