"""The command `beta-dpo judge`, which prints how often one model's answers beat another's."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from app.cli.mistakes import checked_command
from app.core.errors import UserError
from app.core.intervals import Estimate, bootstrap_mean
from app.judges import Answer, Judge
from app.judges.answers import aligned
from app.judges.endpoint import Endpoint, EndpointJudge
from app.judges.rewards import LearnedReward, TrueReward
from app.judges.verdicts import VerdictFile
from datamodules.controlled_task import grade

By = Literal["true_reward", "reward_model", "endpoint"]
HOW_TO_ASK = Endpoint()


@checked_command
def judge(
    answers: list[str],
    by: By = "true_reward",
    model: str | None = None,
    verdicts: str = "runs/verdicts.jsonl",
    endpoint: Endpoint = HOW_TO_ASK,
) -> None:
    """Print how often each file of ANSWERS beats the last one, with 95 % bootstrap intervals over prompts.

    Args:
        answers: samples written by `beta-dpo generate`; the last may be the file of preference pairs that has the
            prompts, and then its chosen responses are the rivals.
        by: `true_reward` of the controlled task, a `reward_model` (Hugging Face sequence classification), or an
            `endpoint` with OpenAI's chat completions API, which judges every pair in both orders.
        model: folder or Hub id of the reward model, or name of the model at the endpoint.
        verdicts: .jsonl file that keeps the verdicts of a reward model or endpoint, which are not asked for again.
        endpoint: settings of the requests to a language model.
    """
    if len(answers) < 2:
        raise UserError("answers: give at least two files, the last of which is the rival of the others.")
    *contenders, rival = answers
    names = distinct_names(answers)
    compared = [aligned(path, rival) for path in contenders]
    with chosen_judge(by, model, verdicts, endpoint) as judge:
        rows = [
            table_row(names[path], at, *part, judge)
            for path, (rows, rivals) in zip(contenders, compared, strict=True)
            for at, part in by_temperature(rows, rivals)
        ]
        rows.append({"answers": f"{names[rival]} (rival)"} | described(compared[0][1], judge))
        notes = judge.notes()
    table = Table(title=f"wins over {names[rival]} by {model or by}, mean [95 % interval]; a tie is half a win")
    for name in (columns := list(dict.fromkeys(name for row in rows for name in row))):
        table.add_column(name)
    for row in rows:
        table.add_row(*(row.get(name, "") for name in columns))
    # a file has no width limit, and a table cut to 80 columns is hard to read
    Console(width=None if os.isatty(1) else 200).print(table)
    for note in notes:
        print(note)


@contextmanager
def chosen_judge(by: By, model: str | None, verdicts: str, endpoint: Endpoint) -> Iterator[Judge]:
    """Yield the judge for these arguments. Raises UserError if they do not fit together."""
    if by == "true_reward":
        if model is not None:
            raise UserError("model has no part in the true reward: give --by reward_model or --by endpoint.")
        yield TrueReward()
        return
    if model is None:
        raise UserError(f"--by {by} needs --model, {'its name' if by == 'endpoint' else 'a folder or Hub id'}.")
    with VerdictFile.opened(verdicts) as file:
        yield LearnedReward(model, file) if by == "reward_model" else EndpointJudge(model, endpoint, file)


def by_temperature(
    rows: list[Answer], rivals: list[Answer]
) -> Iterator[tuple[float | None, tuple[list[Answer], list[Answer]]]]:
    """Yield (temperature, comparisons), lowest first; the temperature is None for samples that do not record it."""
    temperatures = {row.get("temperature") for row in rows}
    for wanted in sorted(temperatures, key=lambda t: -1.0 if t is None else t):
        here = [index for index, row in enumerate(rows) if row.get("temperature") == wanted]
        yield wanted, ([rows[index] for index in here], [rivals[index] for index in here])


def table_row(
    name: str, temperature: float | None, rows: list[Answer], rivals: list[Answer], judge: Judge
) -> dict[str, str]:
    """Return the table row, column → text, of one model at one temperature."""
    scores = judge.scores(rows, rivals)
    at = {} if temperature is None else {"temperature": f"{temperature:g}"}
    won, tied, lost = (int(where.sum()) for where in (scores > 0.5, scores == 0.5, scores < 0.5))
    unjudged = int(np.isnan(scores).sum())
    return {
        "answers": name,
        **at,
        "win rate": str(mean_by_prompt(rows, scores)) if unjudged < len(scores) else "no verdict",
        "won/tied/lost": f"{won}/{tied}/{lost}",
        **({"no verdict": str(unjudged)} if unjudged else {}),
        **described(rows, judge),
    }


def described(rows: list[Answer], judge: Judge) -> dict[str, str]:
    """Return the mean length of the answers, the judge's figures, and the KL if the samples have a reference."""
    figures = {"words": float(np.mean([len(row["response"].split()) for row in rows]))} | judge.describe(rows)
    if all("reference_logp" in row for row in rows):
        figures["KL"] = float(np.mean([row["logp"] - row["reference_logp"] for row in rows]))
    return {name: f"{figure:.3g}" if name == "words" else f"{figure:.3f}" for name, figure in figures.items()}


def mean_by_prompt(rows: Sequence[Answer], scores: np.ndarray) -> Estimate:
    """Return the mean of the scores that are not NaN; the bootstrap resamples prompts with all their answers."""
    prompts: dict[str, list[float]] = {}
    for row, score in zip(rows, scores, strict=True):
        if not np.isnan(score):
            prompts.setdefault(row["prompt_id"], []).append(score)
    return bootstrap_mean(np.array([np.mean(of_prompt) for of_prompt in prompts.values()]))


def distinct_names(paths: Sequence[str]) -> dict[str, str]:
    """Return a short name per file: `dpo` for `runs/dpo/samples.jsonl` beside `runs/beta_dpo/samples.jsonl`."""
    folder = Path(os.path.commonpath([Path(path).absolute().parent for path in paths]))
    names = {path: Path(path).absolute().relative_to(folder).with_suffix("") for path in paths}
    nested = [name for name in names.values() if len(name.parts) > 1]
    if len({name.name for name in nested}) == 1:  # one file name in several folders: use the folders' names
        names = {path: name.parent if name in nested else name for path, name in names.items()}
    return {path: str(name) for path, name in names.items()}


def win_rate(rows: list[Answer], rivals: list[Answer]) -> Estimate:
    """Return P(better) + ½ P(tie) by the controlled task's true reward, resampled by prompt."""
    return mean_by_prompt(rows, TrueReward().scores(rows, rivals))


def summary(rows: list[Answer]) -> dict[str, Estimate]:
    """Return the figures of one model's samples on the controlled task: reward, malformed share, tokens and KL."""
    malformed = [grade(row["prompt"], row["response"]).malformed for row in rows]
    found = {
        "mean true reward": bootstrap_mean(TrueReward().rewards(rows)),
        "malformed share": bootstrap_mean(np.array(malformed)),
        "tokens": bootstrap_mean(np.array([row["tokens"] for row in rows])),
    }
    if all("reference_logp" in row for row in rows):
        found["KL to the reference"] = bootstrap_mean(
            np.array([row["logp"] - row["reference_logp"] for row in rows])
        )
    return found
