"""Tables of tokenised pairs on disk: building, caching, opening and splitting them."""

from datamodules.table.cache import cached_table, load_table, table_fingerprint
from datamodules.table.split import split_by_prompt
from datamodules.table.stored import DamagedTable, TokenisedTable, open_table
from datamodules.table.view import JoinedTables, PairTable, Part, find
from datamodules.table.writer import build_table

__all__ = [
    "DamagedTable",
    "JoinedTables",
    "PairTable",
    "Part",
    "TokenisedTable",
    "build_table",
    "cached_table",
    "find",
    "load_table",
    "open_table",
    "split_by_prompt",
    "table_fingerprint",
]
