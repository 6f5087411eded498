"""Who decides which of two answers is better: a known reward, a reward model, or a language model that is asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

Answer = dict[str, Any]  # one row of a sample file: `prompt_id`, `prompt`, `response` and what else it holds


class Judge(Protocol):
    """Compares answers to the same prompts."""

    def scores(self, ours: Sequence[Answer], theirs: Sequence[Answer]) -> np.ndarray:
        """[n]: 1 where our answer is better, 0 where theirs is, ½ for a tie, or their mean; NaN without verdict."""
        ...

    def describe(self, answers: Sequence[Answer]) -> dict[str, float]:
        """What there is to say of one model's answers by themselves, name → figure; maybe nothing."""
        ...

    def notes(self) -> list[str]:
        """What a reader of the scores should know, once they have been given."""
        ...
