"""Tables of tokenised pairs on disk: building, caching, opening and joining them."""

from datamodules.table.joined import JoinedTables, Part
from datamodules.table.stored import DamagedTable, PairTable, TokenisedTable, find, make_room, open_table
from datamodules.table.writer import build_table, cached_table, table_fingerprint

__all__ = [
    "DamagedTable",
    "JoinedTables",
    "PairTable",
    "Part",
    "TokenisedTable",
    "build_table",
    "cached_table",
    "find",
    "make_room",
    "open_table",
    "table_fingerprint",
]
