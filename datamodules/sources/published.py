"""Rows of published data sets: the fields of a pair from a row in the schema of its authors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from datamodules.sources.prompts import question_prompt
from datamodules.sources.rows import BadRow, LeftOut, field_of, kind, number, spaced, text, zero_or_one

PreferredBy = Literal["better", "safer"]
TLDR_FIELDS = ("info", "summaries", "choice")
SHP_FIELDS = ("history", "human_ref_A", "human_ref_B", "labels")
PKU_FIELDS = ("prompt", "response_0", "response_1", "better_response_id", "safer_response_id")
Row = Mapping[str, object]


def tldr_pair(row: Row) -> Row:
    """Return the fields of a row of `openai/summarize_from_feedback`, `comparisons`: two summaries of one post.

    `summaries[choice].text` is chosen. The prompt has the form that the authors gave their models (arXiv
    2009.01325): the post's subreddit, title and text, then "TL;DR:". Labels: `post_id`, `subreddit`,
    `chosen_policy`, `rejected_policy`, the fields of `extra` (`confidence`) and the other columns. Raises LeftOut
    for a news article (a part of the validation split), BadRow for a malformed row.
    """
    info = _mapping(field_of(row, "info"), "info")
    summaries = field_of(row, "summaries")
    if not isinstance(summaries, list) or len(summaries) != 2:
        raise BadRow("wrong type", "summaries is not a list of two summaries")
    best = zero_or_one(row, "choice")
    chosen, rejected = (_mapping(summaries[index], f"summaries[{index}]") for index in (best, 1 - best))
    if info.get("post") is None and info.get("article") is not None:
        raise LeftOut("summary of a news article, no TL;DR post")
    subreddit, title, post = (text(field_of(info, name), f"info.{name}") for name in ("subreddit", "title", "post"))
    if not post.strip():
        raise BadRow("empty prompt", "info.post")
    extra = row.get("extra")
    return {
        **{name: value for name, value in row.items() if name not in (*TLDR_FIELDS, "extra")},
        **(extra if isinstance(extra, Mapping) else {}),
        "post_id": info.get("id"),
        "subreddit": subreddit,
        "chosen_policy": chosen.get("policy"),
        "rejected_policy": rejected.get("policy"),
        "prompt": f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:",
        "chosen": spaced(field_of(chosen, "text"), "text of the chosen summary"),
        "rejected": spaced(field_of(rejected, "text"), "text of the rejected summary"),
    }


def shp_pair(row: Row, min_score_ratio: float = 1.0) -> Row:
    """Return the fields of a row of `stanfordnlp/SHP`: a Reddit post and two comments, preferred by their scores.

    `labels` is 1 if comment A is preferred, 0 for B. The prompt is the post as a Human turn of an HH transcript.
    Labels: all other columns; those of one comment (`score_A`, …) are renamed to its side (`score_chosen`, …).
    Raises LeftOut if `score_ratio`, the preferred comment's score over the other's, is less than `min_score_ratio`,
    and BadRow for a malformed row or scores that contradict `labels`.
    """
    chosen, rejected = "AB" if zero_or_one(row, "labels") == 1 else "BA"
    if number(row, f"score_{chosen}") < number(row, f"score_{rejected}"):
        raise BadRow("scores contradict the label", f"comment {chosen} is preferred and scores less")
    ratio = number(row, "score_ratio")
    pair = {
        "prompt": question_prompt(field_of(row, "history"), "history"),
        "chosen": spaced(field_of(row, f"human_ref_{chosen}"), f"human_ref_{chosen}"),
        "rejected": spaced(field_of(row, f"human_ref_{rejected}"), f"human_ref_{rejected}"),
    }
    if not ratio >= min_score_ratio:
        raise LeftOut(f"score_ratio below {min_score_ratio:g}", f"{ratio:g}")
    sides = {f"_{chosen}": "_chosen", f"_{rejected}": "_rejected"}
    labels = {
        name[:-2] + sides.get(name[-2:], name[-2:]): value for name, value in row.items() if name not in SHP_FIELDS
    }
    return {**labels, **pair}


def pku_saferlhf_pair(row: Row, preferred_by: PreferredBy = "better") -> Row:
    """Return the fields of a row of `PKU-Alignment/PKU-SafeRLHF`: two responses, one better and one safer.

    `preferred_by` selects the id of the chosen response. The prompt is the question as a Human turn of an HH
    transcript. Labels: `better_is_chosen`, `safer_is_chosen` and all other columns; those of one response are
    renamed to its side (`is_response_0_safe` to `is_chosen_safe`, …). Raises BadRow.
    """
    ids = {name: zero_or_one(row, f"{name}_response_id") for name in ("better", "safer")}
    best = ids[preferred_by]
    sides = {f"response_{best}": "chosen", f"response_{1 - best}": "rejected"}
    labels: dict[str, object] = {f"{name}_is_chosen": response == best for name, response in ids.items()}
    for name, value in row.items():
        if name not in PKU_FIELDS:
            for response, side in sides.items():
                name = name.replace(response, side)
            labels[name] = value
    responses = {side: spaced(field_of(row, response), response) for response, side in sides.items()}
    return {**labels, "prompt": question_prompt(field_of(row, "prompt"), "prompt"), **responses}


def ultrafeedback_pair(row: Row) -> Row:
    """Return the fields of a row of `HuggingFaceH4/ultrafeedback_binarized`: two conversations with scores.

    `chosen` and `rejected` are messages that repeat the prompt. Pairs with equal scores stay, because they are part
    of the published data. Labels: `prompt_id`, both scores and the other columns, but not `messages`, which repeats
    `chosen`. Raises BadRow, also if the rejected response has the higher score.
    """
    for side in ("chosen", "rejected"):
        if not isinstance(field_of(row, side), list):
            raise BadRow("wrong type", f"{side} is {kind(row[side])}, not a list of messages")
    field_of(row, "prompt")
    if number(row, "score_chosen") < number(row, "score_rejected"):
        raise BadRow("scores contradict the label", "score_rejected is higher than score_chosen")
    return {name: value for name, value in row.items() if name != "messages"}


def _mapping(value: object, name: str) -> Row:
    if not isinstance(value, Mapping):
        raise BadRow("wrong type", f"{name} is {kind(value)}, not an object with fields")
    return value
