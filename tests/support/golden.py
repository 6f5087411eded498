"""Golden numbers, computed in float64 by NumPy code that shares nothing with the package."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

FOLDER = Path(os.environ.get("BETA_DPO_GOLDEN", Path(__file__).parents[1] / "golden"))


def golden_numbers(name: str) -> dict[str, Any]:
    """Return the numbers of `name`.json: from the folder that BETA_DPO_GOLDEN names, or from tests/golden."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
