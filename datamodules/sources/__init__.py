"""Sources of preference pairs: local files and the Hugging Face Hub, in the usual formats."""

from datamodules.sources.pairs import read_row
from datamodules.sources.prompts import answer_keys, hh_messages, is_transcript_prompt, prompt_key, prompt_messages
from datamodules.sources.published import PreferredBy
from datamodules.sources.reader import OnBadRow, PairReader, PairStream, pair_stream, read_pairs
from datamodules.sources.registry import markdown_table
from datamodules.sources.rows import BadRow, LeftOut, RowReport
from datamodules.sources.source import RowFormat, Source

__all__ = [
    "BadRow",
    "LeftOut",
    "OnBadRow",
    "PairReader",
    "PairStream",
    "PreferredBy",
    "RowFormat",
    "RowReport",
    "Source",
    "answer_keys",
    "hh_messages",
    "is_transcript_prompt",
    "markdown_table",
    "pair_stream",
    "prompt_key",
    "prompt_messages",
    "read_pairs",
    "read_row",
]
