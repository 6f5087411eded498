"""Reader of rows of `stanfordnlp/SHP`: a Reddit post and two comments, preferred by their scores."""

from __future__ import annotations

from collections.abc import Mapping

from datamodules.sources.hh import question_prompt
from datamodules.sources.report import BadRow, LeftOut
from datamodules.sources.values import field_of, number, spaced, zero_or_one

FIELDS = ("history", "human_ref_A", "human_ref_B", "labels")


def shp_pair(row: Mapping[str, object], min_score_ratio: float = 1.0) -> dict[str, object]:
    """Return the fields of a pair from one comparison; `labels` is 1 if comment A is preferred, 0 for comment B.

    The prompt is the post as a Human turn of an HH transcript. Labels: all other columns; those of one comment
    (`score_A`, …) are renamed to its side (`score_chosen`, …). Raises LeftOut if `score_ratio`, the preferred
    comment's score over the other's, is less than `min_score_ratio`, and BadRow for a malformed row or scores that
    contradict `labels`.
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
        name[:-2] + sides[name[-2:]] if name[-2:] in sides else name: value
        for name, value in row.items()
        if name not in FIELDS
    }
    return {**labels, **pair}
