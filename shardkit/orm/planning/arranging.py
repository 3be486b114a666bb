"""Arranging: ORDER BY, DISTINCT, LIMIT and OFFSET over the rows of several shards.

Each shard sorts, and returns no more than LIMIT + OFFSET rows. What they are sorted by is among the columns or in
hidden columns, which are cut off. Values that Python orders and compares exactly as PostgreSQL does are merged here;
all others (text under a collation, enums, intervals, types of extensions) are sent as text, with the type and collation
that the shards tell, to one shard, which puts the rows into order. Made by `scatter` once a shape.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, NamedTuple

from sqlalchemy import BigInteger, ColumnElement, CursorResult, Text, bindparam, cast, func, select
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.sql import operators
from sqlalchemy.sql.elements import BindParameter, Tuple, UnaryExpression
from sqlalchemy.types import (
    Boolean,
    Date,
    DateTime,
    Enum,
    Integer,
    Interval,
    LargeBinary,
    Numeric,
    TypeDecorator,
    Uuid,
)

from shardkit.core.errors import IdentityConflict, UnmergeableQuery

from .elements import ungrouped, unlabelled
from .merge import Finish, Merge
from .prepared import raw_rows
from .recorder import Call, Compiled, Slot
from .refusals import Refusal
from .servertypes import typed

_EXACT = (Integer, Uuid, Boolean, Date, DateTime, LargeBinary, Numeric)
_EXACT_OIDS = {16, 17, 20, 21, 23, 700, 701, 1082, 1114, 1184, 1700, 2950}
"""bool, bytea, int8, int2, int4, float4, float8, date, timestamp, timestamptz, numeric, uuid."""

MOST = "shardkit_most"
"""The parameter that is the LIMIT of each shard."""


class Key(NamedTuple):
    """One thing that rows are compared by: the place of its value if that is compared here, else the place of its text,
    its type and its collation. ``descending`` and ``nulls_first`` are None for a column that is only distinct."""

    place: int
    descending: bool | None
    nulls_first: bool | None


@dataclass(frozen=True, slots=True, eq=False)
class Arrangement:
    """How the rows of one shape are put together.

    ``width`` is the number of columns but hidden ones, ``identities`` the places of primary keys, ``exact`` whether
    all keys are compared here. ``distinct`` says that rows of two shards can be equal, of which one is kept.
    """

    width: int
    identities: tuple[tuple[int, ...], ...]
    order: tuple[Key, ...]
    distinct: tuple[Key, ...]
    exact: bool
    limit: Slot | None
    offset: Slot | None

    def counts(self, call: Call, parameters: Mapping[str, Any]) -> tuple[int | None, int | None]:
        """LIMIT and OFFSET of one call."""
        values = [
            None if slot is None else slot.value(call, parameters) for slot in (self.limit, self.offset)
        ]
        if any(value is not None and type(value) is not int for value in values):
            raise Refusal("limit", "its LIMIT or OFFSET is no int")
        return values[0], values[1]

    @property
    def can_stream(self) -> bool:
        """Whether rows can be put together as they come."""
        return not self.distinct and (self.exact or not self.order)

    def merge(self, limit: int | None, offset: int | None) -> Merge:
        """The merge of one call."""
        return _Arranged(self, limit, offset)

    @property
    def description(self) -> str:
        """What is done with the rows of all shards, for people."""
        done = ["concatenated"] if not (self.order or self.distinct) else []
        done += ["made distinct"] if self.distinct else []
        done += ["sorted"] if self.order else []
        if not self.exact:
            done[-1] += " by one shard"
        return " and ".join(done) + (", cut to LIMIT and OFFSET" if self.limit or self.offset else "")


@dataclass(frozen=True, slots=True)
class _Arranged:
    arrangement: Arrangement
    limit: int | None
    offset: int | None

    @property
    def as_text(self) -> bool:
        """Whether a shard compares."""
        return not self.arrangement.exact

    def merged(self, results: Mapping[int, CursorResult[Any]], finish: Finish) -> CursorResult[Any]:
        """One result of all rows."""
        plan = self.arrangement
        raw = {shard_id: raw_rows(result) for shard_id, result in results.items()}
        description = next(iter(raw.values()))[0]
        _check_identities({shard_id: rows for shard_id, (_, rows) in raw.items()}, plan.identities)
        rows = [row for _, of_shard in raw.values() for row in of_shard]
        if plan.order or plan.distinct:
            rows = self._sorted(rows, description) if plan.exact else self._sorted_by_shard(rows, finish)
        first = self.offset or 0
        rows = rows[first : None if self.limit is None else first + self.limit]
        if len(description) > plan.width:
            rows = [row[: plan.width] for row in rows]
        return finish.answer(description[: plan.width], rows)

    def _sorted(self, rows: list[Any], description: Any) -> list[Any]:
        plan = self.arrangement
        for key in (*plan.order, *plan.distinct):
            check_exact(description[key.place])
        if plan.distinct:
            places = [key.place for key in plan.distinct]
            first: dict[Any, Any] = {}
            for row in rows:
                first.setdefault(tuple([_same(row[place]) for place in places]), row)
            rows = list(first.values())
        for key in reversed(plan.order):
            rows.sort(key=rank_of(key), reverse=bool(key.descending))
        return rows

    def _sorted_by_shard(self, rows: list[Any], finish: Finish) -> list[Any]:
        if not rows:
            return rows
        plan = self.arrangement
        keys = (*plan.distinct, *plan.order)
        texts = {f"k{number}": [row[key.place] for row in rows] for number, key in enumerate(keys)}
        statement = _ordering(
            [(key, rows[0][key.place + 1], rows[0][key.place + 2]) for key in keys], len(plan.distinct)
        )
        result = finish.run(statement, texts)
        return [rows[number - 1] for (number,) in result.fetchall()]


def _ordering(keys: Sequence[tuple[Key, str, str | None]], distinct: int) -> Any:
    """The statement that returns the numbers of the rows in order; of the rows that are equal in the first ``distinct``
    keys, the number of one."""
    names = [f"k{number}" for number in range(len(keys))]
    texts = func.unnest(*(bindparam(name, type_=ARRAY(Text)) for name in names))
    given: Any = texts.table_valued(*names, with_ordinality="number").render_derived(name="given")
    values = [
        typed(given.c[name], type_, collation)
        for name, (_, type_, collation) in zip(names, keys, strict=True)
    ]
    order = [
        _directed(value, key)
        for value, (key, _, _) in zip(values, keys, strict=True)
        if key.descending is not None
    ]
    if distinct:
        return select(func.min(given.c.number)).group_by(*values).order_by(*order)
    return select(given.c.number).order_by(*order, given.c.number)


def _directed(value: ColumnElement[Any], key: Key) -> ColumnElement[Any]:
    directed = value.desc() if key.descending else value.asc()
    return directed.nulls_first() if key.nulls_first else directed.nulls_last()


def check_exact(column: Any) -> None:
    if column[1] not in _EXACT_OIDS:
        raise UnmergeableQuery(
            f"The column {column[0]} is of another type on the servers than its model says, so its values cannot be "
            "ordered here.",
            hint="Let the model's type be that of the table.",
            reason="type",
        )


def _same(value: Any) -> Any:
    """A value that equals another one where PostgreSQL's are equal."""
    if isinstance(value, float | Decimal) and math.isnan(value):
        return "NaN"
    return _instant(value)


def _instant(value: Any) -> Any:
    """A timestamp with a zone as PostgreSQL compares it: by what it is in UTC. (Python compares clocks on the wall.)"""
    return value.astimezone(UTC) if isinstance(value, datetime) and value.tzinfo is not None else value


def rank_of(key: Key) -> Any:
    """A sort key in the order of PostgreSQL: NaN above all numbers, NULL at the end that is asked for."""
    place, above = key.place, bool(key.nulls_first) == bool(key.descending)

    def rank(row: Any) -> Any:
        value = row[place]
        if value is None:
            return (above, False, 0)
        if isinstance(value, float | Decimal) and math.isnan(value):
            return (not above, True, 0)
        return (not above, False, _instant(value))

    return rank


def _check_identities(rows: Mapping[int, list[Any]], identities: tuple[tuple[int, ...], ...]) -> None:
    for places in identities:
        owner: dict[tuple[Any, ...], int] = {}
        for shard_id, of_shard in rows.items():
            for row in of_shard:
                identity = tuple([row[place] for place in places])
                if owner.setdefault(identity, shard_id) != shard_id and None not in identity:
                    raise IdentityConflict(
                        f"Shards {owner[identity]} and {shard_id} both returned a row with the primary key {identity}.",
                        identity=identity,
                        shards=[owner[identity], shard_id],
                    )


# --- once a shape --------------------------------------------------------------------------------------------------


def arrange(
    compiled: Compiled,
    core: Any,
    columns: Sequence[Any],
    identities: tuple[tuple[int, ...], ...],
    *,
    distinct: bool,
) -> tuple[Any, Arrangement]:
    """What each shard runs, and how the rows are put together. ``columns`` are those of the SELECT ``core``,
    ``distinct`` says that rows of two shards may be equal of which only one is wanted. `Refusal` for clauses that are
    not merged."""
    terms = [Term.of(element) for element in core._order_by_clauses]
    exact = all(_is_exact(term.expression, columns) for term in terms)
    # The texts of equal values may differ, and beside them rows that were one are several.
    plain = [*columns] if distinct or (core._distinct and not exact) else []
    exact = exact and all(_is_exact(column, columns) for column in plain)
    hidden: list[ColumnElement[Any]] = []

    def place(expression: Any) -> int:
        if exact:
            for number, column in enumerate(columns):
                if _is_column(column, expression):
                    return number
            added = [expression]
        else:
            expression = unlabelled(expression)
            added = [
                cast(expression, Text),
                cast(func.pg_typeof(expression), Text),
                cast(func.pg_collation_for(func.concat(expression)), Text),
            ]
        hidden.extend(added)
        return len(columns) + len(hidden) - len(added)

    made = Arrangement(
        width=len(columns),
        identities=identities,
        distinct=tuple(Key(place(column), None, None) for column in plain),
        order=tuple(Key(place(term.expression), term.descending, term.nulls_first) for term in terms),
        exact=exact,
        limit=_count(compiled, core._limit_clause),
        offset=_count(compiled, core._offset_clause),
    )
    part = core
    if core._limit_clause is not None or core._offset_clause is not None:
        part = core.limit(None).offset(None)
        # Rows that are equal but for how they are written count once, and that is seen only when all are together.
        if core._limit_clause is not None and (exact or not plain):
            part = part.limit(bindparam(MOST, type_=BigInteger()))
    labelled = [unlabelled(column).label(f"shardkit_{number}") for number, column in enumerate(hidden)]
    return (part.add_columns(*labelled) if labelled else part), made


class Term(NamedTuple):
    """One element of ORDER BY, without what says in which direction."""

    expression: Any
    descending: bool
    nulls_first: bool

    @classmethod
    def of(cls, element: Any, *, names: bool = False) -> Term:
        """An element of ORDER BY; with ``names`` it may be a name, which its expression then is. `Refusal`."""
        descending, nulls_first = False, None
        while True:
            element = ungrouped(element)
            kind = getattr(element, "__visit_name__", "")
            modifier = getattr(element, "modifier", None)
            if kind == "label_reference":
                element = element.element
            elif not isinstance(element, UnaryExpression) or modifier not in _MODIFIERS:
                break
            else:
                if modifier is operators.desc_op:
                    descending = True
                elif modifier in (operators.nulls_first_op, operators.nulls_last_op) and nulls_first is None:
                    nulls_first = modifier is operators.nulls_first_op
                element = element.element
        if kind == "textual_label_reference" and names:
            element = str(element.element)
        elif kind == "textual_label_reference":
            raise Refusal(
                "order-by", "ORDER BY of a name that is given as a string is not merged over shards"
            )
        if isinstance(element, Tuple):
            raise Refusal("order-by", "ORDER BY of a row value is not merged over shards")
        if getattr(element, "is_literal", False):
            raise Refusal("order-by", "ORDER BY of raw SQL is not merged over shards")
        return cls(element, descending, descending if nulls_first is None else nulls_first)


_MODIFIERS = (
    operators.asc_op, operators.desc_op, operators.nulls_first_op, operators.nulls_last_op,
)  # fmt: skip


def _count(compiled: Compiled, clause: Any) -> Slot | None:
    if clause is None:
        return None
    if not isinstance(clause, BindParameter):
        raise Refusal("limit", "a LIMIT or OFFSET that is an expression is not merged over shards")
    return compiled.slot(clause)


def _is_column(column: Any, expression: Any) -> bool:
    # Annotated copies hash alike; SQL equality is no equality.
    return hash(column) == hash(expression) or hash(unlabelled(column)) == hash(unlabelled(expression))


def _is_exact(expression: Any, columns: Sequence[Any]) -> bool:
    """Whether values of an expression are compared here. Of what is not a column of the statement no value may fail to
    be loaded, as infinite dates do."""
    type_ = expression.type
    while isinstance(type_, TypeDecorator):
        type_ = type_.impl_instance
    if isinstance(type_, Date | DateTime) and not any(_is_column(column, expression) for column in columns):
        return False
    # An Enum is a string, an Interval of SQLAlchemy's own may be a timestamp.
    return isinstance(type_, _EXACT) and not isinstance(type_, Enum | Interval)
