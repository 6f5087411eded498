"""The command `beta-dpo judge`, which prints how often one model's answers beat another's."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from app.cli.mistakes import checked_command
from app.core.errors import UserError
from app.core.intervals import Estimate, bootstrap_mean, length_controlled, wilson
from app.judges import Answer, Judge
from app.judges.answers import aligned, sampled_answers
from app.judges.endpoint import Endpoint
from app.judges.rewards import HOW_TO_ASK, TrueReward, chosen_judge

By = Literal["true_reward", "reward_model", "endpoint"]
OF_A_REPORT = "`report` has no other, leave --baseline out"


@checked_command
def judge(
    answers: list[str],
    by: By = "true_reward",
    model: str | None = None,
    reward: str | None = None,
    reward_args: dict[str, Any] | None = None,
    verdicts: str = "runs/verdicts.jsonl",
    endpoint: Endpoint = HOW_TO_ASK,
) -> None:
    """Print how often each file of ANSWERS beats the last one, its reward and KL, with 95 % bootstrap intervals.

    One file alone gets its reward and KL.

    Args:
        answers: samples written by `beta-dpo generate`; the last may be the file of preference pairs that has the
            prompts, and then its chosen responses are the rivals.
        by: `true_reward` of the controlled task, a `reward_model` (Hugging Face sequence classification), or an
            `endpoint` with OpenAI's chat completions API, which judges every pair in both orders.
        model: folder or Hub id of the reward model, or name of the model at the endpoint.
        reward: a reward of your own, in the place of `by`: a column of the samples, or the path `module.name` of a
            function `(prompts, responses) → rewards`, or of a class whose instances are such functions.
        reward_args: arguments of that class, or further ones of that function.
        verdicts: .jsonl file that keeps the verdicts of a reward model or endpoint, which are not asked for again.
        endpoint: settings of the requests to a language model.
    """
    if not answers or (len(answers) == 1 and by == "endpoint"):
        raise UserError("answers: give at least two files, the last of which is the rival of the others.")
    *contenders, rival = answers
    names = distinct_names(answers)
    compared = [aligned(path, rival) for path in contenders]
    with chosen_judge(by, model, reward, reward_args, verdicts, endpoint) as judge:
        rows = [
            table_row(names[path], at, *part, judge)
            for path, (rows, rivals) in zip(contenders, compared, strict=True)
            for at, part in by_temperature(rows, rivals)
        ]
        last = compared[0][1] if compared else sampled_answers(rival)
        rows.append({"answers": f"{names[rival]} (rival)" if compared else names[rival]} | described(last, judge))
        notes = judge.notes()
    over = f"wins over {names[rival]} by {reward or model or by}; a tie is half a win" if compared else names[rival]
    columns = dict.fromkeys(name for row in rows for name in row)
    table = Table(*columns, title=f"{over}: mean [95 % interval]")
    for row in rows:
        table.add_row(*(row.get(name, "") for name in columns))
    # a file has no width limit, and a table cut to 80 columns is hard to read
    Console(width=None if os.isatty(1) else 240).print(table)
    for note in notes:
        print(note)


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
    rate = at_equal_length = "no verdict"
    if unjudged < len(scores):
        known = np.flatnonzero(~np.isnan(scores))
        longer = np.array([len(rows[index]["response"]) - len(rivals[index]["response"]) for index in known])
        rate = str(mean_by_prompt(rows, scores, share=True))
        at_equal_length = str(
            length_controlled(scores[known], longer, [rows[index]["prompt_id"] for index in known])
        )
    return {
        "answers": name,
        **at,
        "win rate": rate,
        "won/tied/lost": f"{won}/{tied}/{lost}",
        **({"no verdict": str(unjudged)} if unjudged else {}),
        "at equal length": at_equal_length,
        **described(rows, judge),
    }


def described(rows: list[Answer], judge: Judge) -> dict[str, str]:
    """Return the mean length of the answers, the judge's figures, the share that ended, and the KL, as text."""
    words = float(np.mean([len(row["response"].split()) for row in rows]))
    return {"words": f"{words:.3g}"} | {name: str(figure) for name, figure in figures(rows, judge).items()}


def figures(rows: Sequence[Answer], judge: Judge) -> dict[str, Estimate]:
    """Return the judge's figures of one model's answers, the share that ended if not all did, and a known KL."""
    found = judge.describe(rows)
    if not all(row.get("finished", True) for row in rows):
        found["finished"] = np.array([row.get("finished", True) for row in rows])
    if all("reference_logp" in row for row in rows):
        found["KL"] = np.array([row["logp"] - row["reference_logp"] for row in rows])
    return {name: mean_by_prompt(rows, values, values.dtype == bool) for name, values in found.items()}


def mean_by_prompt(rows: Sequence[Answer], scores: np.ndarray, share: bool = False) -> Estimate:
    """Return the mean of the scores that are not NaN; the bootstrap resamples prompts with all their answers.

    A `share` that is 0 or 1 in every prompt has Wilson's interval, because resampling equal values gives no width.
    """
    prompts: dict[str, list[float]] = {}
    for row, score in zip(rows, scores, strict=True):
        if not np.isnan(score):
            prompts.setdefault(row["prompt_id"], []).append(score)
    means = np.array([np.mean(of_prompt) for of_prompt in prompts.values()])
    if share and len(means) and means.mean() in (0.0, 1.0):
        return wilson(float(means.mean()), len(means))
    return bootstrap_mean(means)


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
    return mean_by_prompt(rows, TrueReward(OF_A_REPORT).scores(rows, rivals), share=True)


def summary(rows: list[Answer]) -> dict[str, Estimate]:
    """Return the figures of one model's samples on the controlled task: reward, malformed share, KL and tokens."""
    names = {"true reward": "mean true reward", "malformed": "malformed share", "KL": "KL to the reference"}
    told = figures(rows, TrueReward(OF_A_REPORT))
    found = {name: told[short] for short, name in names.items() if short in told}
    if all(row.get("tokens") is not None for row in rows):
        found["tokens"] = mean_by_prompt(rows, np.array([row["tokens"] for row in rows]))
    return found
