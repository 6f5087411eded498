"""Sample files, as `beta-dpo generate` writes them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from app.errors import UserError


def read_samples(path: str) -> Iterator[dict[str, Any]]:
    """The rows that `generate` wrote. Raises UserError, naming the line, for anything else."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            yield {"prompt_id": row["prompt_id"], "prompt": row["prompt"], "response": row["response"], **row}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}:{number} is not a sample as `beta-dpo generate` writes it; sample anew."
            ) from error
