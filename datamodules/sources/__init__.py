"""Sources of preference pairs: local files and the Hugging Face Hub, in the usual formats."""

from datamodules.sources.formats import RowFormat, RowReading
from datamodules.sources.hh import hh_messages, is_transcript_prompt, prompt_messages
from datamodules.sources.pku_saferlhf import PreferredBy
from datamodules.sources.prompts import answer_keys, prompt_key
from datamodules.sources.reader import OnBadRow, PairReader, Source, SourceAddress, open_source, read_pairs
from datamodules.sources.registry import markdown_table
from datamodules.sources.report import BadRow, LeftOut, RowReport
from datamodules.sources.stream import PairStream, pair_stream

__all__ = [
    "BadRow",
    "LeftOut",
    "OnBadRow",
    "PairReader",
    "PairStream",
    "PreferredBy",
    "RowFormat",
    "RowReading",
    "RowReport",
    "Source",
    "SourceAddress",
    "answer_keys",
    "hh_messages",
    "is_transcript_prompt",
    "markdown_table",
    "open_source",
    "pair_stream",
    "prompt_key",
    "prompt_messages",
    "read_pairs",
]
