"""The command `beta-dpo pairs`, which ranks the samples of each prompt and writes preference pairs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from app.cli.mistakes import checked_command
from app.commands.audit import LABEL, as_row
from app.core.errors import UserError
from app.core.files import atomic_file, refuse_place
from app.core.samples import SAMPLE_FIELDS
from app.judges import Answer
from app.judges.answers import sampled_answers
from app.judges.rewards import HOW_TO_ASK, VERDICTS, chosen_judge
from app.method.ranges import Seed, Share
from datamodules.records import BadRow, PreferencePair, blank
from datamodules.sources.pairs import read_row
from datamodules.sources.source import Source

Ranks = Literal["best_worst", "adjacent"]


@checked_command
def pairs(
    samples: str,
    out: str,
    by: Literal["true_reward", "reward_model"] = "true_reward",
    model: str | None = None,
    reward: str | None = None,
    reward_args: dict[str, Any] | None = None,
    ranks: Ranks | list[list[int]] = "best_worst",
    reuse: bool = False,
    flip_rate: Share = 0.0,
    seed: Seed = 0,
    verdicts: str = VERDICTS,
) -> None:
    """Rank the SAMPLES of each prompt by their reward and write preference pairs to OUT, which `data.path` takes.

    A prompt with a sample that is cut or empty, or with too few samples, makes no pair; neither do two samples of
    equal text or reward, nor two that `data.path` would not read as they are. Each is counted.

    Args:
        samples: file of `beta-dpo generate --samples N`.
        out: the .jsonl file to write, with `chosen_reward`, `rejected_reward` and `flipped`.
        by: `true_reward` of the controlled task, or a `reward_model` (Hugging Face sequence classification).
        model: folder or Hub id of the reward model.
        reward: a reward of your own, in the place of `by`: a column of the samples, or the path `module.name` of a
            function `(prompts, responses) → rewards`, or of a class whose instances are such functions.
        reward_args: arguments of that class, or further ones of that function.
        ranks: `best_worst`; `adjacent`, which pairs ranks 1 and 2, 3 and 4, and so on; or a list of ranks of chosen
            and rejected: `[[1, -1], [2, -2]]`, where -1 is the last.
        reuse: allow a sample in several pairs; a model learns such pairs by heart sooner.
        flip_rate: share of the pairs, drawn one by one, whose sides are exchanged on purpose.
        seed: seed of that draw.
        verdicts: .jsonl file that keeps the rewards of a reward model.
    """
    replaced = refuse_place("out", out, (".jsonl",), samples)
    if isinstance(ranks, list):
        check_ranks(ranks, reuse)
    rows = sampled_answers(samples)
    with chosen_judge(by, model, reward, reward_args, verdicts, HOW_TO_ASK) as judge:
        rewards = judge.rewards(rows)
    groups: dict[str, list[tuple[float, Answer]]] = {}
    for row, each in zip(rows, rewards.tolist(), strict=True):
        groups.setdefault(json.dumps(row["prompt"]), []).append((each, row))
    left_out, written, flipped = Counter[str](), 0, 0
    random = np.random.default_rng(seed)
    with atomic_file(out) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for group in groups.values():
            for pair in pairs_of(group, ranks, reuse, left_out):
                flips = bool(random.random() < flip_rate)
                file.write(json.dumps(as_row(pair, flips), ensure_ascii=False) + "\n")
                written, flipped = written + 1, flipped + flips
        told = "".join(f"; left out: {count} {reason}" for reason, count in left_out.items())
        if not written:
            told += ". Draw more --samples, or longer ones"
            raise UserError(f"{samples} makes no pair: {len(groups)} prompts{told}.")
    print(f"{written} pairs of {len(groups)} prompts: {out}{replaced}; {flipped} are flipped{told}")


def check_ranks(ranks: list[list[int]], reuse: bool) -> None:
    """Raise UserError for ranks that no number of samples makes possible."""
    if not (ranks and all(len(pair) == 2 and all(pair) for pair in ranks)):
        raise UserError("ranks must be a list of two ranks each, from 1 or from -1 down, as [[1, -1]].")
    if not all(best > 0 > worst or (best < worst and best * worst > 0) for best, worst in ranks):
        raise UserError(f"ranks: {ranks} do not name the better one first.")
    if not reuse and len({rank for pair in ranks for rank in pair}) < 2 * len(ranks):
        raise UserError(f"ranks: {ranks} use one twice: set --reuse true for that.")


def pairs_of(
    group: Sequence[tuple[float, Answer]], ranks: Ranks | list[list[int]], reuse: bool, left_out: Counter[str]
) -> Iterator[PreferencePair]:
    """Yield the pairs of one prompt from its samples with rewards, best first, and count in `left_out` why not."""
    if not all(row["finished"] and not blank(row["response"]) for _, row in group):
        left_out["prompts with a sample that is cut or empty"] += 1
        return
    wanted: Sequence[Sequence[int]] = [[1, -1]]
    if ranks == "adjacent":
        wanted = [[first, first + 1] for first in range(1, len(group), 2)]
    elif ranks != "best_worst":
        wanted = ranks
    places = [[rank - 1 if rank > 0 else len(group) + rank for rank in pair] for pair in wanted]
    # rank 3 and rank -2 of four samples are one and the same
    met = not reuse and len({place for pair in places for place in pair}) < 2 * len(places)
    if len(group) < 2 or met or any(not 0 <= best < worst < len(group) for best, worst in places):
        left_out["prompts with too few samples for these ranks"] += 1
        return
    ranked = sorted(group, key=lambda scored: -scored[0])
    for best, worst in places:
        (high, chosen), (low, rejected) = ranked[best], ranked[worst]
        if high == low or chosen["response"].strip() == rejected["response"].strip():
            left_out["pairs of equal text or reward"] += 1
            continue
        shared = [name for name in chosen if name not in SAMPLE_FIELDS and chosen[name] == rejected.get(name)]
        labels = {name: chosen[name] for name in shared}
        labels |= {"chosen_reward": high, "rejected_reward": low, LABEL: False}
        name = f"{chosen['prompt_id']}/{best + 1}-{worst + 1}"
        pair = PreferencePair(name, chosen["prompt"], chosen["response"], rejected["response"], labels)
        try:
            read, _ = read_row(as_row(pair, False), "", Source("pairs"), need_rejected=True)
            same = (read.chosen, read.rejected) == (pair.chosen, pair.rejected)
            why = "" if same else "text that is messages in JSON"
        except BadRow as bad:
            why = bad.reason
        if why:
            left_out[f"pairs that data.path would not read as they are ({why})"] += 1
        else:
            yield pair
