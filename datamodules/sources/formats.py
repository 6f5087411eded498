"""Conversion of a row in any format of the registry to a preference pair, or the reason against it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches

from app.errors import UserError
from datamodules.records import PreferencePair
from datamodules.sources.conversions import Row, refuse_unusable
from datamodules.sources.fields import OwnFormat, ignored_fields, pair_from_row
from datamodules.sources.pku_saferlhf import PreferredBy
from datamodules.sources.registry import FIELDS, FORMATS, NAMES, PROMPTS, Format, nearest
from datamodules.sources.report import BadRow
from datamodules.sources.template_fields import TEMPLATE_FIELDS
from datamodules.sources.values import kind, missing

RowFormat = str  # "auto", or a name in the registry
_COLUMNS = {*FIELDS, *TEMPLATE_FIELDS, "pair_id", "chosen_reward", "rejected_reward"}


@dataclass(frozen=True)
class RowReading:
    """The settings that decide how rows are read.

    `need_rejected`: a demonstration is a bad row. `min_score_ratio`: for SHP, see `shp_pair`. `preferred_by`: for
    PKU-SafeRLHF, see `pku_saferlhf_pair`. `columns`: names of the data's columns by our field. `prompts_only`: rows
    without an answer are read too, and answers are ignored. Raises UserError for settings that do not go together,
    and for unknown names.
    """

    format: RowFormat = "auto"
    need_rejected: bool = False
    min_score_ratio: float = 1.0
    preferred_by: PreferredBy = "better"
    columns: Mapping[str, str] = field(default_factory=dict)
    prompts_only: bool = False

    def __post_init__(self) -> None:
        if self.format not in ("auto", *NAMES):
            raise UserError(
                f"data.format: there is no {self.format!r}{close(self.format, NAMES)}; "
                f"known are auto, {', '.join(NAMES)}."
            )
        if not self.min_score_ratio >= 1:
            raise UserError(f"data.min_score_ratio must be at least 1, not {self.min_score_ratio}.")
        for name, its_format in {"min_score_ratio": "shp", "preferred_by": "pku_saferlhf"}.items():
            if getattr(self, name) != getattr(RowReading, name) and self.format not in ("auto", its_format):
                raise UserError(
                    f"data.{name} belongs to data.format {its_format}, not to {self.format}: leave it out."
                )
        for name in self.columns:
            if name not in _COLUMNS:
                raise UserError(
                    f"data.columns: there is no field {name!r}{close(name, _COLUMNS)}; a column is given as "
                    "`field: name in the data`, as in data.columns: {prompt: question}."
                )
        if len(set(self.columns.values())) < len(self.columns):
            raise UserError("data.columns names one column for two fields: give each field its own.")


def close(name: str, known: Iterable[object]) -> str:
    """Return " (did you mean …?)" if the name is similar to a known one, else an empty text."""
    near = get_close_matches(name, [str(one) for one in known], n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def read_row(row: object, default_id: str, reading: RowReading) -> tuple[PreferencePair, list[str]]:
    """Return the pair of one row in any format, and the columns that cannot be labels.

    Raises BadRow, or LeftOut if the settings leave the row out.
    """
    if not isinstance(row, Mapping):
        raise BadRow("not an object with fields", f"found {kind(row)}")
    row = _own_names(row, reading.columns)
    format = _format_of(row, reading)
    converted = format.convert(row, reading)
    if reading.need_rejected and "rejected" not in converted:
        raise BadRow("missing field", f"rejected; as {format.name} it is for supervised fine-tuning; {_found(row)}")
    own: OwnFormat = "pairs"
    if format.name in ("pairs", "hh"):
        own = "auto" if reading.format == "auto" else "hh" if format.name == "hh" else "pairs"
    if "system" not in converted and "system_prompt" in converted:
        converted = {"system" if name == "system_prompt" else name: value for name, value in converted.items()}
    return pair_from_row(converted, default_id, own, reading.need_rejected), ignored_fields(converted)


def _own_names(row: Row, columns: Mapping[str, str]) -> Row:
    """Return the row with the given columns under our names; a column of that name becomes `<name>_in_data`."""
    for own, theirs in columns.items():
        if theirs not in row:
            raise BadRow(
                "missing field",
                f"{theirs!r}, which data.columns names for {own}{close(theirs, row)}; {_found(row)}",
            )
    if not columns:
        return row
    own_name = {theirs: own for own, theirs in columns.items()}
    return {
        own_name.get(name, f"{name}_in_data" if name in columns else name): value for name, value in row.items()
    }


def _format_of(row: Row, reading: RowReading) -> Format:
    """Return the format of a row. Raises BadRow with the nearest format and the fields that the row lacks."""
    if reading.format == "auto":
        refuse_unusable(row)
    known = (*PROMPTS, *FORMATS) if reading.prompts_only else FORMATS
    formats = tuple(one for one in known if reading.format in ("auto", one.name))
    if not missing(row.get("rejected")):  # a pair is no demonstration, even if it is damaged
        formats = tuple(one for one in formats if one.is_pair)
    for one in formats:
        if not one.lacking(row) and (reading.format != "auto" or one.when(row)):
            return one
    for one in formats:  # the columns exist but are empty: reading the row names the empty one
        if all(any(name in row for name in either.split("|")) for either in one.fields) and (
            reading.format != "auto" or one.when(row)
        ):
            return one
    asked = [one for one in formats if one.lacking(row) and (one.is_pair or not reading.need_rejected)]
    one = nearest(row, tuple(asked) or formats)
    lacking = [name.partition("|")[0] for name in one.lacking(row)]
    yours = ", ".join(
        f"{name}: {(get_close_matches(name, map(str, row), n=1) or ['YOURS'])[0]}" for name in lacking
    )
    raise BadRow(
        "missing field",
        f"{', '.join(lacking)}; the nearest format is {one.name}: {', '.join(one.fields).replace('|', ' or ')}; "
        f"{_found(row)}" + f"; data.columns: {{{yours}}} says what yours are called" * (not reading.prompts_only),
    )


def _found(row: Row) -> str:
    names = [str(name)[:40] for name, value in row.items()]
    empty = [str(name)[:40] for name, value in row.items() if missing(value)]
    told = ", ".join(names[:12]) + ", …" * (len(names) > 12)
    return f"columns found: {told or 'none'}" + f" (empty: {', '.join(empty[:12])})" * bool(empty)
