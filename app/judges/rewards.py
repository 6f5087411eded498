"""The judges that give each answer a reward; the answer with the higher reward is better."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.progress import track

from app.core.errors import UserError
from app.core.intervals import win_scores
from app.judges import Answer
from app.judges.verdicts import VerdictFile, verdict_key
from datamodules.controlled_task import grade
from datamodules.rewards import RewardModel


class TrueReward:
    """A judge that uses the exact reward of the controlled task."""

    def scores(self, ours: Sequence[Answer], theirs: Sequence[Answer]) -> np.ndarray:
        return win_scores(self.rewards(ours), self.rewards(theirs))

    def rewards(self, answers: Sequence[Answer]) -> np.ndarray:
        """Return rewards [n] from 0 to 4.5. Raises UserError if a prompt is not from the controlled task."""
        try:
            return np.array([grade(str(row["prompt"]), row["response"]).reward for row in answers])
        except UserError as error:
            raise UserError(
                "These prompts are not of the controlled task, whose true reward is the default judge: name "
                "another by --by reward_model --model FOLDER, or --by endpoint --model NAME."
            ) from error

    def describe(self, answers: Sequence[Answer]) -> dict[str, float]:
        malformed = [grade(str(row["prompt"]), row["response"]).malformed for row in answers]
        return {"true reward": float(self.rewards(answers).mean()), "malformed": float(np.mean(malformed))}

    def notes(self) -> list[str]:
        return []


class LearnedReward:
    """A judge that uses a reward model from a folder or the Hub, and stores its rewards in the verdict file."""

    def __init__(self, name: str, verdicts: VerdictFile):
        self.name = name
        self.verdicts = verdicts

    def scores(self, ours: Sequence[Answer], theirs: Sequence[Answer]) -> np.ndarray:
        self._score([*ours, *theirs])
        return win_scores(self.rewards(ours), self.rewards(theirs))

    def rewards(self, answers: Sequence[Answer]) -> np.ndarray:
        """Return rewards [n] of answers that `scores` has already scored."""
        return np.array([self.verdicts[self._key(row)]["reward"] for row in answers])

    def describe(self, answers: Sequence[Answer]) -> dict[str, float]:
        return {"reward": float(self.rewards(answers).mean())}

    def notes(self) -> list[str]:
        return []

    def _key(self, row: Answer) -> str:
        return verdict_key(self.name, row["prompt"], row["response"])

    def _score(self, answers: Sequence[Answer]) -> None:
        new = {key: row for row in answers if (key := self._key(row)) not in self.verdicts}
        if not new:
            return
        rewards = RewardModel(self.name).rewards(
            [row["prompt"] for row in new.values()], [row["response"] for row in new.values()]
        )
        for key, reward in zip(new, track(rewards, "scoring", total=len(new), transient=True), strict=True):
            self.verdicts.add(key, model=self.name, reward=reward)
