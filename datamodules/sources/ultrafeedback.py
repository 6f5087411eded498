"""Reader of rows of `HuggingFaceH4/ultrafeedback_binarized`: two conversations with a judge's scores."""

from __future__ import annotations

from collections.abc import Mapping

from datamodules.sources.report import BadRow
from datamodules.sources.values import field_of, kind, number

FIELDS = ("prompt", "chosen", "rejected", "score_chosen", "score_rejected")


def ultrafeedback_pair(row: Mapping[str, object]) -> dict[str, object]:
    """Return the fields of a pair: `prompt` as text, `chosen` and `rejected` as messages that repeat it.

    Pairs with equal scores stay, because they are part of the published data. Labels: `prompt_id`, both scores and
    the other columns, but not `messages`, which repeats `chosen`. Raises BadRow, also if the rejected response has
    the higher score.
    """
    for side in ("chosen", "rejected"):
        if not isinstance(field_of(row, side), list):
            raise BadRow("wrong type", f"{side} is {kind(row[side])}, not a list of messages")
    field_of(row, "prompt")
    if number(row, "score_chosen") < number(row, "score_rejected"):
        raise BadRow("scores contradict the label", "score_rejected is higher than score_chosen")
    return {name: value for name, value in row.items() if name != "messages"}
