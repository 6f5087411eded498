"""Reader of rows of `PKU-Alignment/PKU-SafeRLHF`: two responses, compared by helpfulness and harmlessness."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from datamodules.sources.hh import question_prompt
from datamodules.sources.values import field_of, spaced, zero_or_one

FIELDS = ("prompt", "response_0", "response_1", "better_response_id", "safer_response_id")
PreferredBy = Literal["better", "safer"]


def pku_saferlhf_pair(row: Mapping[str, object], preferred_by: PreferredBy = "better") -> dict[str, object]:
    """Return the fields of a pair from one comparison; `preferred_by` selects the id of the chosen response.

    The prompt is the question as a Human turn of an HH transcript. Labels: `better_is_chosen`, `safer_is_chosen`
    and all other columns. Columns of one response are renamed to its side (`is_response_0_safe` to
    `is_chosen_safe`, …). Raises BadRow.
    """
    ids = {name: zero_or_one(row, f"{name}_response_id") for name in ("better", "safer")}
    sides = {
        f"response_{ids[preferred_by]}": "chosen",
        f"response_{1 - ids[preferred_by]}": "rejected",
    }
    labels: dict[str, object] = {
        f"{name}_is_chosen": response == ids[preferred_by] for name, response in ids.items()
    }
    for name, value in row.items():
        if name in FIELDS:
            continue
        for response, side in sides.items():
            name = name.replace(response, side)
        labels[name] = value
    responses = {side: spaced(field_of(row, response), response) for response, side in sides.items()}
    return {**labels, "prompt": question_prompt(field_of(row, "prompt"), "prompt"), **responses}
