"""Types as a server names them: for values that were read as text on one shard and are put back on another.

Pure. What a server tells of a type is taken as it is, never what a model declares: a comparison in another type or
collation would be another order.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, case, cast, func, literal_column
from sqlalchemy.types import Integer, UserDefinedType

_UNBOUNDED = {
    # Without a length these mean one character or bit, and a cast cuts off what is longer.
    "character": "pg_catalog.bpchar",
    "character[]": "pg_catalog.bpchar[]",
    "bit": "pg_catalog.varbit",
    "bit[]": "pg_catalog.varbit[]",
}

_DEFAULT = ("default", '"default"', 'pg_catalog."default"')


class ServerType(UserDefinedType[Any]):
    """A type by the name that ``pg_typeof`` or ``format_type`` gave it."""

    cache_ok = True

    def __init__(self, name: str) -> None:
        self.name = _UNBOUNDED.get(name, name)

    def get_col_spec(self, **_: Any) -> str:
        """As it is written in a cast."""
        return self.name


def typed(column: ColumnElement[Any], type_: str, collation: str | None) -> ColumnElement[Any]:
    """A text column as the value of a type, under a collation (quoted, as ``pg_collation_for`` tells it)."""
    made: ColumnElement[Any] = cast(column, ServerType(type_))
    if collation is not None and collation not in _DEFAULT:
        made = made.op("COLLATE")(literal_column(collation))
    return made


def constant(value: int) -> ColumnElement[int]:
    """A number in the text of derived SQL, whose bound values are all those of the statement it is derived from."""
    written: ColumnElement[int] = literal_column(str(value), Integer())
    return written


def as_text(value: ColumnElement[Any]) -> ColumnElement[Any]:
    """A value as its type writes it. (A cast to text cuts off blanks of a ``char``, and arrays have delimiters of their
    own; ``IS NULL`` is true of a row of NULLs.)"""
    return case((func.num_nulls(value) == constant(0), func.concat(value)))
