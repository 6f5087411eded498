"""The judges that give each answer a reward, and the choice of a judge."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from app.core.errors import UserError
from app.core.files import folder_hash
from app.judges import Answer, Judge
from app.judges.endpoint import Endpoint, EndpointJudge
from app.judges.verdicts import VerdictFile, verdict_key
from datamodules.controlled_task import grade
from datamodules.rewards import RewardModel

HOW_TO_ASK = Endpoint()
VERDICTS = "runs/verdicts.jsonl"
LARGEST = sys.float_info.max
NAME_ANOTHER = (
    "name another by --by reward_model --model FOLDER, --by endpoint --model NAME (`judge` alone), or --reward NAME"
)


class TrueReward(Judge):
    """A judge that uses the exact reward of the controlled task; `cure` is what to do about other prompts."""

    def __init__(self, cure: str = NAME_ANOTHER):
        self.cure = cure

    def rewards(self, answers: Sequence[Answer]) -> np.ndarray:
        """Return rewards [n] from 0 to 4.5. Raises UserError if a prompt is not from the controlled task."""
        return self.describe(answers)["true reward"]

    def describe(self, answers: Sequence[Answer]) -> dict[str, np.ndarray]:
        try:
            grades = [grade(str(row["prompt"]), row["response"]) for row in answers]
        except UserError as error:
            told = "These prompts are not of the controlled task, whose true reward is the default judge"
            raise UserError(f"{told}: {self.cure}.") from error
        return {
            "true reward": np.array([found.reward for found in grades]),
            "malformed": np.array([found.malformed for found in grades]),
        }


class LearnedReward(Judge):
    """A judge that uses a reward model from a folder or the Hub, and stores its rewards in the verdict file."""

    def __init__(self, name: str, verdicts: VerdictFile):
        self.name = name
        self.identity = folder_hash(name) if Path(name).is_dir() else name  # a folder may hold another model later
        self.verdicts = verdicts

    def rewards(self, answers: Sequence[Answer]) -> np.ndarray:
        """Return rewards [n]; only answers that the verdict file lacks are scored."""
        keys = [verdict_key(self.identity, row["prompt"], row["response"]) for row in answers]
        new = {key: row for key, row in zip(keys, answers, strict=True) if key not in self.verdicts}
        if new:
            model = RewardModel(self.name)
            texts = ([row[side] for row in new.values()] for side in ("prompt", "response"))
            rewards = track(model.rewards(*texts), "scoring", total=len(new), transient=True)
            for key, reward in zip(new, rewards, strict=True):
                self.verdicts.add(key, model=self.name, reward=reward)
            model.tell_truncated()
        return np.array([self.verdicts[key]["reward"] for key in keys])


class OwnReward(Judge):
    """A judge by the user's own reward: a column of the samples, or the path of a function or a class."""

    def __init__(self, name: str, settings: dict[str, Any] | None = None) -> None:
        self.name = name
        self.function: Callable[..., Any] | None = None
        if "." not in name:
            if settings:
                raise UserError(f"reward_args: the column {name!r} takes none; they are for a function or class.")
            return
        try:
            module, _, attribute = name.rpartition(".")
            found = getattr(import_module(module), attribute)
            given = settings or {}
            self.function = found(**given) if isinstance(found, type) else partial(found, **given)
        except Exception as error:  # the user's own code may raise anything
            told = f"cannot be imported or built ({type(error).__name__}: {error})"
            raise UserError(f"reward: {name} {told}; PYTHONPATH=. finds a file in the current folder.") from error

    def rewards(self, answers: Sequence[Answer]) -> np.ndarray:
        """Return rewards [n]. Raises UserError unless there is a finite number for each answer."""
        if self.function is None:
            found = [row.get(self.name) for row in answers]
        else:
            try:
                given = self.function([row["prompt"] for row in answers], [row["response"] for row in answers])
                found = list(given.tolist() if hasattr(given, "tolist") else given)  # of an array or a tensor
            except Exception as error:  # the user's own code may raise anything
                told = f"{type(error).__name__}: {error}"
                raise UserError(f"reward: {self.name} failed ({told}): see BETA_DPO_TRACEBACK=1.") from error
            if len(found) != len(answers):
                raise UserError(f"reward: {self.name} gave {len(found)} rewards for {len(answers)} responses.")
        for row, reward in zip(answers, found, strict=True):
            if not isinstance(reward, (int, float, np.number)) or not -LARGEST <= reward <= LARGEST:
                told = "is a column of the samples" if self.function is None else "is a function"
                given = f"{reward!r:.40} for the prompt {row['prompt_id']!r}"
                raise UserError(f"reward: {self.name} {told}, and {given} is no finite number.")
        return np.array(found, dtype=float)


@contextmanager
def chosen_judge(
    by: str, model: str | None, reward: str | None, args: dict[str, Any] | None, verdicts: str, endpoint: Endpoint
) -> Iterator[Judge]:
    """Yield the judge for the options of `judge` and `pairs`. Raises UserError if they do not fit together."""
    if by != "endpoint" and endpoint != HOW_TO_ASK:
        raise UserError("endpoint: its settings are for --by endpoint; add that, or leave them out.")
    if by == "true_reward" and verdicts != VERDICTS:
        raise UserError("verdicts: the true reward keeps none; leave it out, or name another judge by --by.")
    if reward is not None:
        if by != "true_reward" or model is not None:
            raise UserError("reward: it takes the place of --by and --model; leave them out.")
        yield OwnReward(reward, args)
    elif args:
        raise UserError("reward_args: name the reward that takes them by --reward.")
    elif by == "true_reward":
        if model is not None:
            raise UserError("--model does not go with the true reward: add --by reward_model or --by endpoint.")
        yield TrueReward()
    elif model is None:
        wanted = "the name of the model at the server" if by == "endpoint" else "a folder or Hub id"
        raise UserError(f"--by {by} needs --model, {wanted}.")
    else:
        with VerdictFile.opened(verdicts) as file:
            yield EndpointJudge(model, endpoint, file) if by == "endpoint" else LearnedReward(model, file)
