"""Totals: COUNT, SUM, MIN and MAX of integers over the rows of several shards, without groups.

The one row of each shard is what one database would return of its rows, and integers are added and compared here
exactly as PostgreSQL does it. Made by `scatter` once a shape; everything else that aggregates is `grouping`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Context, Decimal
from typing import Any, Literal

from sqlalchemy import CursorResult
from sqlalchemy.sql import operators
from sqlalchemy.sql.elements import FunctionFilter, Label, UnaryExpression
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeDecorator

from shardkit.core.errors import UnmergeableQuery
from shardkit.orm import declare

from .elements import ungrouped
from .merge import Finish
from .prepared import raw_rows

AggregateName = Literal["count", "sum", "min", "max"]

_BIGINTS = range(-(2**63), 2**63)
_EXACT = Context(prec=1000)
"""Far beyond the 131,072 digits of numeric only in theory: sums of bigints have 40 at most."""


@dataclass(frozen=True, slots=True)
class Totals:
    """One row of which each column is merged by its own aggregate."""

    columns: tuple[AggregateName, ...]
    as_text = False

    @property
    def description(self) -> str:
        """What is done with the rows of all shards, for people."""
        return "totals added up"

    def merged(self, results: Mapping[int, CursorResult[Any]], finish: Finish) -> CursorResult[Any]:
        """One row."""
        raw = [raw_rows(result) for result in results.values()]
        return finish.answer(raw[0][0], [self.of([row for _, rows in raw for row in rows])])

    def of(self, rows: Sequence[Sequence[Any]]) -> tuple[Any, ...]:
        """The row of one database, from the rows of its parts."""
        return tuple(
            _MERGERS[name](_integers([row[place] for row in rows], name))
            for place, name in enumerate(self.columns)
        )


def totals(core: Any, columns: Sequence[Any]) -> Totals | None:
    """How a statement with aggregates is merged here, or None if it is not."""
    clauses = (core._group_by_clauses, core._having_criteria, core._order_by_clauses, core._distinct)
    if any(clauses) or core._limit_clause is not None or core._offset_clause is not None:
        return None
    names = [_name(column) for column in columns]
    known = tuple(name for name in names if name is not None)
    return Totals(known) if len(known) == len(columns) else None


def _name(column: Any) -> AggregateName | None:
    column = ungrouped(column)
    while isinstance(column, Label):
        column = ungrouped(column.element)
    function = column.func if isinstance(column, FunctionFilter) else column
    if not isinstance(function, FunctionElement):
        return None
    name = str(getattr(function, "name", "")).lower()
    arguments = [ungrouped(argument) for argument in function.clauses]
    if any(isinstance(one, UnaryExpression) and one.operator is operators.distinct_op for one in arguments):
        return None
    if name == "count":
        return "count"
    integers = all(
        declare.key_family(type_) == "int" and not isinstance(type_, TypeDecorator)
        for type_ in (function.type, *(argument.type for argument in arguments))
    )
    return next((known for known in _MERGERS if known == name and integers), None)


def _integers(values: list[Any], name: str) -> list[Any]:
    """The values but NULLs; each an int, or a Decimal as the server sends sums of bigints."""
    present = [value for value in values if value is not None]
    for value in present:
        if type(value) is not int and not (type(value) is Decimal and value.is_finite()):
            raise UnmergeableQuery(
                f"{name.upper()} returned {value!r} on a shard, which is no integer.",
                hint="Let the model's type be that of the table.",
                reason="aggregate-type",
            )
    return present


def _sum(values: list[Any]) -> Any:
    if not values:
        return None
    total = values[0]
    for value in values[1:]:
        total = _EXACT.add(total, value) if isinstance(total, Decimal) else total + value
    if type(total) is int and total not in _BIGINTS:
        raise UnmergeableQuery("The sum is out of the range of bigint.", reason="sum-overflow")
    return total


_MERGERS: dict[AggregateName, Callable[[list[Any]], Any]] = {
    "count": sum,
    "sum": _sum,
    "min": lambda values: min(values, default=None),
    "max": lambda values: max(values, default=None),
}
