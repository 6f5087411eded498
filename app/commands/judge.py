"""The command `beta-dpo judge`, which prints how often one model's answers beat another's."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from app.cli.mistakes import checked_command
from app.core.errors import UserError
from app.core.intervals import Estimate, bootstrap_mean, length_controlled, wilson
from app.judges import Answer, Judge
from app.judges.answers import aligned, rival_answers, sampled_answers
from app.judges.endpoint import Endpoint
from app.judges.rewards import HOW_TO_ASK, VERDICTS, TrueReward, chosen_judge

By = Literal["true_reward", "reward_model", "endpoint"]
OF_A_REPORT = "`report` has no other, leave --baseline out"


@checked_command
def judge(
    answers: list[str],
    by: By = "true_reward",
    model: str | None = None,
    reward: str | None = None,
    reward_args: dict[str, Any] | None = None,
    verdicts: str = VERDICTS,
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
    rivals = cache(rival_answers)  # read once, after the first of `answers`
    compared = [aligned(path, answers[-1], rivals) for path in answers[:-1]]
    last = compared[0][1] if compared else sampled_answers(answers[-1])
    names = short_names([Path(path).with_suffix("") for path in answers])
    with chosen_judge(by, model, reward, reward_args, verdicts, endpoint) as judge:
        rows = [
            {"answers": name} | table_row(ours, theirs, judge)
            for name, both in zip(names, compared, strict=False)
            for ours, theirs in by_temperature(*both)
        ]
        rows.append({"answers": f"{names[-1]} (rival)" if compared else names[-1]} | described(last, judge))
        notes = judge.notes()
    over = f"wins over {names[-1]} by {reward or model or by}; a tie is half a win" if compared else names[-1]
    columns = dict.fromkeys(name for row in rows for name in row)
    table = Table(*columns, title=f"{over}: mean [95 % interval]")
    for row in rows:
        table.add_row(*(row.get(name, "") for name in columns))
    print_table(table)
    for note in notes:
        print(note)


def print_table(table: Table) -> None:
    """Print a table; in a file it may be wide, because one cut to 80 columns is hard to read."""
    # the texts are the user's: "[b]" in one is no markup, and ":x:" no picture
    Console(markup=False, emoji=False, width=None if os.isatty(1) else 240).print(table)


def by_temperature(rows: list[Answer], rivals: list[Answer]) -> Iterator[tuple[list[Answer], list[Answer]]]:
    """Yield the comparisons at each temperature, lowest first; before them those of unknown temperature."""
    temperatures = {row.get("temperature") for row in rows}
    for wanted in sorted(temperatures, key=lambda t: -1.0 if t is None else t):
        here = [pair for pair in zip(rows, rivals, strict=True) if pair[0].get("temperature") == wanted]
        yield [ours for ours, _ in here], [theirs for _, theirs in here]


def table_row(ours: list[Answer], theirs: list[Answer], judge: Judge) -> dict[str, str]:
    """Return the table row, column → text, of one model at one temperature."""
    scores = judge.scores(ours, theirs)
    known = np.flatnonzero(~np.isnan(scores))
    rate = at_equal_length = "no verdict"
    if len(known):
        longer = np.array([len(ours[index]["response"]) - len(theirs[index]["response"]) for index in known])
        prompts = [ours[index]["prompt_id"] for index in known]
        rate = str(mean_by_prompt(ours, scores, share=True))
        at_equal_length = str(length_controlled(scores[known], longer, prompts))
    temperature = ours[0].get("temperature")
    return {
        **({} if temperature is None else {"temperature": f"{temperature:g}"}),
        "win rate": rate,
        "won/tied/lost": f"{(scores > 0.5).sum()}/{(scores == 0.5).sum()}/{(scores < 0.5).sum()}",
        **({"no verdict": str(len(scores) - len(known))} if len(known) < len(scores) else {}),
        "at equal length": at_equal_length,
        **described(ours, judge),
    }


def described(rows: list[Answer], judge: Judge) -> dict[str, str]:
    """Return the mean length of the answers, the judge's figures, the share that ended, and the KL, as text."""
    words = float(np.mean([len(row["response"].split()) for row in rows]))
    return {"words": f"{words:.3g}"} | {name: str(figure) for name, figure in figures(rows, judge).items()}


def figures(rows: Sequence[Answer], judge: Judge) -> dict[str, Estimate]:
    """Return the judge's figures of one model's answers, the share that ended if not all did, and a known KL."""
    found = judge.describe(rows)
    finished = np.array([row.get("finished", True) for row in rows])
    if not finished.all():
        found["finished"] = finished
    known = [row["logp"] - row["reference_logp"] if "reference_logp" in row else np.nan for row in rows]
    if number := int(np.isfinite(known).sum()):
        found["KL" if number == len(rows) else f"KL ({number} of {len(rows)})"] = np.array(known)
    return {name: mean_by_prompt(rows, values, values.dtype == bool) for name, values in found.items()}


def mean_by_prompt(rows: Sequence[Answer], scores: np.ndarray, share: bool = False) -> Estimate:
    """Return the mean of the scores that are not NaN; the bootstrap resamples prompts with all their answers."""
    by_prompt = pd.Series(scores).groupby([row["prompt_id"] for row in rows], sort=False)
    means = by_prompt.mean().dropna().to_numpy(float)
    if share and len(means) and means.mean() in (0.0, 1.0):  # equal values, resampled, give no width
        return wilson(float(means.mean()), len(means))
    return bootstrap_mean(means)


def short_names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that tell them apart, such as `dpo` for `runs/dpo/version_0`."""
    found: list[tuple[str, ...]] = []
    rest = [path.resolve().parts for path in paths]
    while rest != found and len(set(rest)) >= len(set(found)):
        found = rest
        # without last parts that several share and Lightning's numbers of runs, if the rest suffices
        times = Counter(parts[-1] for parts in set(found))
        rest = [p[:-1] if times[p[-1]] > 1 or re.fullmatch(r"version_\d+", p[-1]) else p for p in found]
    tries = (["/".join(parts[-length:]) for parts in found] for length in count(1))
    return next(names for names in tries if len(set(names)) == len(set(found)))


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
