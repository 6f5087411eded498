"""Reader of rows of `openai/summarize_from_feedback`, subset `comparisons`: two summaries of a Reddit post."""

from __future__ import annotations

from collections.abc import Mapping

from datamodules.sources.report import BadRow, LeftOut
from datamodules.sources.values import field_of, kind, spaced, text, zero_or_one

FIELDS = ("info", "summaries", "choice")


def tldr_pair(row: Mapping[str, object]) -> dict[str, object]:
    """Return the fields of a pair from one comparison; `summaries[choice].text` is chosen.

    The prompt has the form that the data's authors gave their models (arXiv 2009.01325): the post's subreddit,
    title and text, then "TL;DR:". Labels: `post_id`, `subreddit`, `chosen_policy`, `rejected_policy`, the fields of
    `extra` (`confidence`) and the other columns. Raises LeftOut for a comparison about a news article (a part of
    the validation split), BadRow for a malformed row.
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
        **{name: value for name, value in row.items() if name not in (*FIELDS, "extra")},
        **(dict(extra) if isinstance(extra, Mapping) else {}),
        "post_id": info.get("id"),
        "subreddit": subreddit,
        "chosen_policy": chosen.get("policy"),
        "rejected_policy": rejected.get("policy"),
        "prompt": f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:",
        "chosen": spaced(field_of(chosen, "text"), "text of the chosen summary"),
        "rejected": spaced(field_of(rejected, "text"), "text of the rejected summary"),
    }


def _mapping(value: object, name: str) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise BadRow("wrong type", f"{name} is {kind(value)}, not an object with fields")
    return value
