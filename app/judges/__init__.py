"""The judges that decide which of two answers is better: a known reward, a reward model or a language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Answer = dict[str, Any]  # one row of a sample file: `prompt_id`, `prompt`, `response` and further columns


class Judge:
    """The base of judges; a subclass has `rewards`, or else methods of its own in the place of the others."""

    def rewards(self, answers: Sequence[Answer]) -> np.ndarray:
        """Return rewards [n]; of two answers to a prompt the one with the higher reward is better."""
        raise NotImplementedError

    def scores(self, ours: Sequence[Answer], theirs: Sequence[Answer]) -> np.ndarray:
        """Return scores [n]: 1 if our answer is better, 0 if theirs is, ½ for a tie, NaN without a verdict."""
        return (1 + np.sign(self.rewards(ours) - self.rewards(theirs))) / 2

    def describe(self, answers: Sequence[Answer]) -> dict[str, np.ndarray]:
        """Return figures [n] of one model's answers alone, by name."""
        return {"reward": self.rewards(answers)}

    def notes(self) -> list[str]:
        """Return notes for a reader of the scores; call it after `scores`."""
        return []
