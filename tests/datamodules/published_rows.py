"""A row of each published data set in its exact schema, written for the tests, and the pair that it makes."""

from __future__ import annotations

from typing import Any

from datamodules.records import Message, PreferencePair
from datamodules.sources.source import RowFormat

TLDR: dict[str, Any] = {
    "info": {
        "id": "t3_1abc",
        "post": "My cat sleeps on the keyboard.",
        "title": "Cat trouble",
        "subreddit": "cats",
        "site": None,
        "article": None,
    },
    "summaries": [
        {"text": " Cat sleeps.", "policy": "sup1", "note": None},
        {"text": "Cat sleeps on keyboard.", "policy": "ref", "note": "clear"},
    ],
    "choice": 1,
    "worker": "w1",
    "batch": "batch3",
    "split": "train",
    "extra": {"confidence": 7},
}
NEWS = {**TLDR, "info": {**TLDR["info"], "post": None, "subreddit": None, "site": "cnn", "article": "A storm …"}}
SHP: dict[str, Any] = {
    "post_id": "qt3nxl",
    "domain": "askculinary_train",
    "upvote_ratio": 0.98,
    "history": "How do I peel a peach?",
    "c_root_id_A": "h1",
    "c_root_id_B": "h2",
    "created_at_utc_A": 1636822112,
    "created_at_utc_B": 1636822110,
    "score_A": 5,
    "score_B": 20,
    "human_ref_A": "Slowly.",
    "human_ref_B": "Boil it first.",
    "labels": 0,
    "seconds_difference": 2.0,
    "score_ratio": 4.0,
}
QUESTION, GOOD, POOR = (
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "assistant", "content": "5"},
)
ULTRAFEEDBACK: dict[str, Any] = {
    "prompt": "What is 2 + 2?",
    "prompt_id": "0f3c",
    "chosen": [QUESTION, GOOD],
    "rejected": [QUESTION, POOR],
    "messages": [QUESTION, GOOD],
    "score_chosen": 8.5,
    "score_rejected": 3.0,
}
PKU: dict[str, Any] = {
    "prompt": "How do locks work?",
    "response_0": "Pins lift.",
    "response_1": "Break it.",
    "prompt_source": "BeaverTails",
    "response_0_source": "Alpaca-7B",
    "response_1_source": "Alpaca2-7B",
    "is_response_0_safe": True,
    "is_response_1_safe": False,
    "response_0_harm_category": {"Theft": False},
    "response_1_harm_category": {"Theft": True},
    "response_0_severity_level": 0,
    "response_1_severity_level": 2,
    "better_response_id": 1,
    "safer_response_id": 0,
    "response_0_sha256": "aa",
    "response_1_sha256": "bb",
}
ROWS: dict[RowFormat, dict[str, Any]] = {
    "tldr": TLDR,
    "shp": SHP,
    "ultrafeedback": ULTRAFEEDBACK,
    "pku_saferlhf": PKU,
}
PAIRS = {
    "tldr": PreferencePair(
        "f:1",
        "SUBREDDIT: r/cats\n\nTITLE: Cat trouble\n\nPOST: My cat sleeps on the keyboard.\n\nTL;DR:",
        " Cat sleeps on keyboard.",
        " Cat sleeps.",
        {
            "worker": "w1",
            "batch": "batch3",
            "split": "train",
            "confidence": 7,
            "post_id": "t3_1abc",
            "subreddit": "cats",
            "chosen_policy": "ref",
            "rejected_policy": "sup1",
        },
    ),
    "shp": PreferencePair(
        "f:1",
        "\n\nHuman: How do I peel a peach?\n\nAssistant:",
        " Boil it first.",
        " Slowly.",
        {
            "post_id": "qt3nxl",
            "domain": "askculinary_train",
            "upvote_ratio": 0.98,
            "c_root_id_rejected": "h1",
            "c_root_id_chosen": "h2",
            "created_at_utc_rejected": 1636822112,
            "created_at_utc_chosen": 1636822110,
            "score_rejected": 5,
            "score_chosen": 20,
            "seconds_difference": 2.0,
            "score_ratio": 4.0,
        },
    ),
    "ultrafeedback": PreferencePair(
        "f:1",
        (Message("user", "What is 2 + 2?"),),
        "4",
        "5",
        {"prompt_id": "0f3c", "score_chosen": 8.5, "score_rejected": 3.0},
    ),
    "pku_saferlhf": PreferencePair(
        "f:1",
        "\n\nHuman: How do locks work?\n\nAssistant:",
        " Break it.",
        " Pins lift.",
        {
            "better_is_chosen": True,
            "safer_is_chosen": False,
            "prompt_source": "BeaverTails",
            "rejected_source": "Alpaca-7B",
            "chosen_source": "Alpaca2-7B",
            "is_rejected_safe": True,
            "is_chosen_safe": False,
            "rejected_severity_level": 0,
            "chosen_severity_level": 2,
            "rejected_sha256": "aa",
            "chosen_sha256": "bb",
        },
    ),
}
