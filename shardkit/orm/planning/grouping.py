"""Grouping: aggregates over the rows of several shards.

Each shard makes its part of every group: the values it is grouped by, and for each aggregate what can be put together
(COUNT and SUM are added up, AVG is a sum and a count, MIN and MAX are of parts, ...). The parts go as text, with the
types that the shards tell, to one shard, which puts them together: the application's own columns, HAVING, ORDER BY,
DISTINCT and LIMIT, with the parts in the place of its aggregates. So all arithmetic is PostgreSQL's. Made by `scatter`
once a shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    CursorResult,
    Numeric,
    Select,
    Text,
    cast,
    false,
    func,
    select,
)
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.engine import Dialect
from sqlalchemy.sql import operators
from sqlalchemy.sql.elements import (
    BindParameter,
    ColumnClause,
    FunctionFilter,
    Label,
    Over,
    Tuple,
    UnaryExpression,
    WithinGroup,
)
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.selectable import ScalarSelect, SelectBase
from sqlalchemy.sql.visitors import iterate, replacement_traverse
from sqlalchemy.types import Float, Integer, TypeDecorator

from .elements import grouped_by, is_aggregate, own_elements, structure, ungrouped
from .merge import Finish
from .prepared import Prepared, raw_rows
from .recorder import Call, Compiled
from .refusals import Refusal
from .servertypes import ServerType, as_text, constant, typed
from .vetting import function_names
from .vocabulary import SET_FUNCTIONS, TIME_FUNCTIONS

_Part = ColumnElement[Any]


@dataclass(frozen=True, slots=True, eq=False)
class _Combined:
    """An aggregate as parts: what a shard makes, and what makes one of the parts of all; to which type that is cast
    (the number of a part, whose type it is), if it is."""

    parts: tuple[_Part, ...]
    combine: Callable[..., ColumnElement[Any]]
    cast_to: int | None = None


def _total(part: _Part) -> ColumnElement[Any]:
    return func.sum(part)


def _counted(part: _Part) -> ColumnElement[Any]:
    return cast(func.coalesce(func.sum(part), constant(0)), BigInteger)


def _mean(total: _Part, count: _Part) -> ColumnElement[Any]:
    # In this type PostgreSQL's own avg() divides; and NULL by 0 is NULL.
    return func.sum(cast(total, Numeric)).op("/")(cast(func.sum(count), Numeric))


_SAME = {"min", "max", "bool_and", "bool_or", "every", "bit_and", "bit_or"}
"""Aggregates that combine by themselves."""


def _combined(aggregate: Any) -> _Combined:
    function = aggregate.func if isinstance(aggregate, FunctionFilter) else aggregate

    def filtered(made: Any) -> Any:
        return made.filter(aggregate.criterion) if isinstance(aggregate, FunctionFilter) else made

    if isinstance(function, WithinGroup):
        raise Refusal("aggregate", "an aggregate with WITHIN GROUP is not made of parts")
    name = str(function.name).lower()
    arguments = list(function.clauses)
    if any(isinstance(ungrouped(one), UnaryExpression) and ungrouped(one).operator is operators.distinct_op
           for one in arguments):  # fmt: skip
        raise Refusal("aggregate-distinct", "an aggregate of distinct values is not made of parts")
    if name == "count":
        return _Combined((aggregate,), _counted)
    if name == "sum":
        return _Combined((aggregate,), _total, cast_to=0)
    if name in _SAME:
        return _Combined((aggregate,), lambda part: getattr(func, name)(part), cast_to=0)
    if name == "avg" and len(arguments) == 1 and _is_exact_number(arguments[0].type):
        return _Combined((filtered(func.sum(arguments[0])), filtered(func.count(arguments[0]))), _mean)
    raise Refusal("aggregate", f"the aggregate {name}() is not made of parts")


def _is_exact_number(type_: Any) -> bool:
    while isinstance(type_, TypeDecorator):
        type_ = type_.impl_instance
    return isinstance(type_, Integer | Numeric) and not isinstance(type_, Float)


# --- once a shape --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Grouping:
    """How the groups of one shape are put together: ``parts`` are the columns of each shard, each as text, type and
    collation; ``empty`` returns no row, but tells the types of the columns."""

    compiled: Compiled
    columns: Sequence[Any]
    groups: int
    aggregates: tuple[tuple[Any, _Combined, int], ...]
    expressions: tuple[Any, ...]
    empty: Prepared
    asks_the_time: bool
    finals: dict[tuple[tuple[str, str | None], ...], Prepared] = field(default_factory=dict)

    @property
    def description(self) -> str:
        """What is done with the rows of all shards, for people."""
        return (
            "parts of groups combined by one shard"
            if self.groups
            else "parts of aggregates combined by one shard"
        )

    def merge(self, call: Call, parameters: Mapping[str, Any], dialect: Dialect) -> _Grouped:
        """The merge of one call."""
        return _Grouped(self, call, parameters, dialect)

    def prepared(self, types: tuple[tuple[str, str | None], ...], dialect: Dialect) -> Prepared:
        """The statement that makes the answer, compiled once for the types that the shards tell."""
        known = self.finals.get(types)
        if known is None:
            names = dict.fromkeys(f"p{number}" for number in range(len(types)))
            known = self.finals[types] = Prepared(dialect, self.final(types), self.compiled, names)
        return known

    def final(self, types: Sequence[tuple[str, str | None]]) -> Any:
        """The statement that makes the answer out of the parts, whose types are these."""
        names = [f"p{number}" for number in range(len(types))]
        given: Any = (
            func.unnest(*(_bound(name) for name in names)).table_valued(*names).render_derived(name="given")
        )
        inner = select(
            *(
                typed(given.c[name], type_, collation).label(name)
                for name, (type_, collation) in zip(names, types, strict=True)
            )
        ).subquery("parts")
        part = [inner.c[name] for name in names]
        found: dict[int, ColumnElement[Any]] = {}
        for number, expression in enumerate(self.expressions):
            found[hash(expression)] = part[number]
        for aggregate, combined, first in self.aggregates:
            made = combined.combine(*part[first : first + len(combined.parts)])
            if combined.cast_to is not None:
                made = cast(made, ServerType(types[first + combined.cast_to][0]))
            found[hash(aggregate)] = made
        groups = {
            written: part[number]
            for number, expression in enumerate(self.expressions)
            # Values that are equal in one call may differ in the next one.
            if not any(isinstance(element, BindParameter) for element in iterate(expression))
            and (written := structure(expression)) is not None
        }
        core = self.compiled.statement

        def put(element: Any) -> Any:
            return _put(element, found, groups)

        statement: Any = select(
            *(put(column).label(f"c{number}") for number, column in enumerate(self.columns))
        ).select_from(inner)
        if self.groups:
            statement = statement.group_by(*part[: self.groups])
        statement = statement.having(*map(put, core._having_criteria)) if core._having_criteria else statement
        statement = statement.order_by(*map(put, core._order_by_clauses))
        statement = statement.distinct() if core._distinct else statement
        return statement.limit(core._limit_clause).offset(core._offset_clause)


def group(
    compiled: Compiled, columns: Sequence[Any], dialect: Dialect, instead: Mapping[int, Any]
) -> tuple[Any, Grouping]:
    """What each shard runs, and how the parts are put together; ``instead`` as `Prepared` has it. `Refusal`."""
    core = compiled.statement
    expressions = tuple(_vetted(element) for element in grouped_by(core))
    seen: dict[int, Any] = {}
    for root in (*columns, *core._having_criteria, *core._order_by_clauses):
        _find(root, seen)
    aggregates: list[tuple[Any, _Combined, int]] = []
    parts: list[Any] = list(expressions)
    for aggregate in seen.values():
        combined = _combined(aggregate)
        aggregates.append((aggregate, combined, len(parts)))
        parts += combined.parts
    texts: list[ColumnElement[Any]] = []
    for number, made in enumerate(parts):
        texts += [
            as_text(made).label(f"shardkit_{number}"),
            cast(func.pg_typeof(made), Text).label(f"shardkit_{number}_type"),
            cast(func.pg_collation_for(func.concat(made)), Text).label(f"shardkit_{number}_collation"),
        ]
    bare: Select[Any] = core.order_by(None).limit(None).offset(None)
    bare._having_criteria = ()
    bare._distinct = False
    if not core._group_by_clauses:
        bare = bare.group_by(None)
    empty = Prepared(dialect, core.where(false()), compiled, instead=instead)
    asks = any(name in TIME_FUNCTIONS for name in function_names(compiled))
    made = Grouping(compiled, columns, len(expressions), tuple(aggregates), expressions, empty, asks)
    made.final([("text", None)] * len(parts))  # tries whether all of it can be made of parts
    return bare.with_only_columns(*texts, maintain_column_froms=True), made


def _vetted(element: Any) -> Any:
    """One thing that is grouped by; `Refusal` if it is no expression."""
    if getattr(element, "__visit_name__", "") == "textual_label_reference":
        raise Refusal("group-by", "GROUP BY of a name that is given as a string is not merged over shards")
    if getattr(element, "is_literal", False) or not isinstance(element, ColumnElement):
        raise Refusal("group-by", "GROUP BY of raw SQL is not merged over shards")
    if isinstance(element, FunctionElement) and str(element.name).lower() in _GROUPING_SETS:
        raise Refusal("group-by", "grouping sets are not merged over shards")
    if isinstance(element, Tuple):
        raise Refusal("group-by", "GROUP BY of a row value is not merged over shards")
    for one in own_elements(element):
        if isinstance(one, FunctionElement) and str(one.name).lower() in SET_FUNCTIONS:
            raise Refusal("group-by", f"GROUP BY of the rows of {one.name}() is not merged over shards")
    return element


_GROUPING_SETS = ("rollup", "cube", "grouping_sets")


def _find(root: Any, seen: dict[int, Any]) -> None:
    """The aggregates in an element, outermost ones first found, each once."""
    todo = [root]
    while todo:
        element = todo.pop()
        if isinstance(element, Over):
            raise Refusal("window", "a window function over groups is not merged over shards")
        if is_aggregate(element):
            seen.setdefault(hash(element), element)
        elif not isinstance(element, SelectBase):
            todo += element.get_children()


def _put(root: Any, found: Mapping[int, ColumnElement[Any]], groups: Mapping[Any, Any]) -> Any:
    """An element with parts in the place of the aggregates (by hash, which annotated copies share) and of what is
    grouped by (``groups``, by their structure too); `Refusal` if more is left."""

    def replace(element: Any, **_: Any) -> Any:
        known = found.get(hash(element))
        if known is None and isinstance(element, ColumnElement):
            known = groups.get(structure(element))
        if known is not None:
            return known
        return element if isinstance(element, BindParameter) else None

    root = ungrouped(root)
    while getattr(root, "__visit_name__", "") == "label_reference" or isinstance(root, Label):
        root = ungrouped(root.element)
    made = replacement_traverse(root, {}, replace)
    allowed = {id(part) for known in found.values() for part in iterate(known)}
    for element in iterate(made):
        if id(element) in allowed:
            continue
        if isinstance(element, ScalarSelect | SelectBase):
            raise Refusal("aggregate", "a subquery beside aggregates is not merged over shards")
        if isinstance(element, ColumnClause) and not element.is_literal:
            raise Refusal("aggregate", f"{element} is neither grouped by nor in an aggregate")
        if getattr(element, "__visit_name__", "") in ("label_reference", "textual_label_reference"):
            raise Refusal(
                "order-by", "ORDER BY of a name that is given as a string is not merged over shards"
            )
    return made


def _bound(name: str) -> Any:
    return BindParameter(name, None, type_=ARRAY(Text), required=True)


# --- each call -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Grouped:
    grouping: Grouping
    call: Call
    parameters: Mapping[str, Any]
    dialect: Dialect
    as_text = True

    def merged(self, results: Mapping[int, CursorResult[Any]], finish: Finish) -> CursorResult[Any]:
        """One result of all groups."""
        rows = [row for result in results.values() for row in raw_rows(result)[1]]
        grouping = self.grouping
        own = finish.times() if grouping.asks_the_time else {}
        if not rows:
            empty = grouping.empty
            description, rows = raw_rows(finish.run(empty, empty.values(self.call, self.parameters, own)))
            return finish.answer(description, rows)
        columns = list(zip(*rows, strict=True))
        types = [(columns[place + 1][0], columns[place + 2][0]) for place in range(0, len(columns), 3)]
        texts = {f"p{number}": list(columns[3 * number]) for number in range(len(types))}
        final = grouping.prepared(tuple(types), self.dialect)
        description, rows = raw_rows(
            finish.run(final, final.values(self.call, self.parameters, {**texts, **own}))
        )
        return finish.answer(description, rows)
