"""Pulling: the answer to what is not made shard by shard, out of the rows that it needs, on one shard.

Where no part of a statement can be proved to be one shard's business (a join on other columns, a window over all rows,
a subquery that counts everything) the rows of its sharded tables are read from all shards, and the statement itself
runs on one of them: in front of it stands, for each sharded table, a common table expression with the table's name
and the rows that were read. What PostgreSQL makes of the statement is then what it would make of it in one database.

Only columns that are used are read, and only rows that conditions of the statement on this one table leave, by one
statement a shard and so from one snapshot each. Values travel as arrays of text, so that nothing is done per row here,
with the types that the servers tell. How many rows that may be is bounded. Made by `statements` once a shape.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Column,
    ColumnElement,
    CursorResult,
    Select,
    Table,
    Text,
    and_,
    bindparam,
    case,
    cast,
    column,
    func,
    literal_column,
    or_,
    select,
    table,
    true,
)
from sqlalchemy.dialects.postgresql import REGCLASS
from sqlalchemy.engine import Dialect
from sqlalchemy.sql import operators
from sqlalchemy.sql.elements import BinaryExpression, BindParameter, ColumnClause
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.selectable import CTE, SelectBase
from sqlalchemy.sql.visitors import iterate, replacement_traverse

from shardkit.core.errors import UnmergeableQuery
from shardkit.core.topology import ShardedTable
from shardkit.orm.declare import key_column

from .binding import possible
from .closure import BlockProof, Bound, Constraint, Node
from .elements import grouped_by, is_aggregate, structure, unlabelled
from .merge import Finish
from .ownership import BOUNDS, ODD, owned_in
from .prepared import Prepared, raw_rows
from .recorder import Block, Call, Compiled
from .refusals import Refusal
from .servertypes import as_text, constant, typed
from .vetting import vet_pulled
from .vocabulary import ROW_FUNCTIONS, ROW_KINDS, TRANSACTION_TIMES

MOST = "shardkit_most"


@dataclass(frozen=True, slots=True, eq=False)
class Pulled:
    """One table whose rows are read: which columns of it, and ``constraints`` on its keys for each FROM it is."""

    table: Table
    declared: ShardedTable
    columns: tuple[Column[Any], ...]
    constraints: tuple[tuple[Bound, ...], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Pull:
    """What is read for all statements of one shape: ``plain`` where no rows are in transit, ``owned`` elsewhere."""

    tables: tuple[Pulled, ...]
    plain: Prepared
    owned: Prepared

    @property
    def description(self) -> str:
        """What is done with the rows of all shards, for people."""
        names = ", ".join(str(pulled.declared) for pulled in self.tables)
        return f"rows of {names} read from all, statement run by one"

    def positions(self, call: Call, parameters: Mapping[str, Any]) -> Mapping[int, Any] | None:
        """The positions of all rows that are read; None if they are not known for each table."""
        found: dict[int, Any] = {}
        for pulled in self.tables:
            for constraints in pulled.constraints:
                allowed = possible(constraints, call, parameters)
                if allowed is None:
                    return None
                found.update(allowed)
        return found

    def merge(self, statement: Any, most: int) -> _Pull:
        """The merge of one call; ``most`` is how many rows of a table it may read."""
        return _Pull(self, statement, most)


# --- once a shape --------------------------------------------------------------------------------------------------


def pull(compiled: Compiled, proofs: list[BlockProof], dialect: Dialect) -> Pull:
    """What has to be read for a statement; `Refusal`."""
    vet_pulled(compiled)
    for proof in proofs:
        _vet_groups(proof.block)
    nodes: dict[Table, list[Node]] = {}
    for proof in proofs:
        for node in proof.nodes:
            if node.derived is not None:
                continue
            nodes.setdefault(_table(node), []).append(node)
    _vet_names(compiled, list(nodes))
    used = _used_columns(compiled)
    tables = []
    conditions = []
    for one, of_it in nodes.items():
        key = key_column(one)
        wanted = [c for c in one.columns if c is key or c.name in used.get(str(one.name), ())]
        tables.append(Pulled(one, of_it[0].table, tuple(wanted), tuple(node.constraints for node in of_it)))
        conditions.append(_needed(compiled, one, of_it))
    format_table = dialect.identifier_preparer.format_table
    own = {MOST: None} | {
        f"shardkit_table_{place}": format_table(pulled.table) for place, pulled in enumerate(tables)
    }

    def reading(owned: bool) -> Prepared:
        given = {**own, BOUNDS: None, ODD: None} if owned else own
        return Prepared(dialect, _reading(tables, conditions, owned), compiled, given)

    return Pull(tuple(tables), reading(owned=False), reading(owned=True))


def _vet_groups(block: Block) -> None:
    """`Refusal` where columns stand beside a primary key that is grouped by: of rows that are read PostgreSQL does not
    know that it is one."""
    core = block.statement
    if not isinstance(core, Select) or not core._group_by_clauses:
        return
    groups = grouped_by(core)
    known = {structure(group) for group in groups} | {hash(group) for group in groups}
    todo = [*block.columns, *core._order_by_clauses, *core._having_criteria]
    while todo:
        element = unlabelled(todo.pop())
        if hash(element) in known or structure(element) in known or is_aggregate(element):
            continue
        if isinstance(element, ColumnClause) and not element.is_literal and element.table is not None:
            raise Refusal(
                "group-by", f"{element} is not grouped by, and rows that are read have no primary key"
            )
        if not isinstance(element, SelectBase):
            todo += element.get_children()


def _table(node: Node) -> Table:
    source: Any = node.source if isinstance(node.source, Table) else node.source.element
    found: Table = source._deannotate()
    return found


def _vet_names(compiled: Compiled, tables: Sequence[Table]) -> None:
    for one in tables:
        if one.schema is not None:
            raise Refusal(
                "schema", f"{one.fullname} cannot be stood in for, since it is named with its schema"
            )
        for cte in compiled.recording.elements.get("cte", ()):
            if str(cte.name) == str(one.name):
                raise Refusal(
                    "ambiguous-name", f"a common table expression of it is named {cte.name!r} as well"
                )


def _used_columns(compiled: Compiled) -> dict[str, set[str]]:
    used: dict[str, set[str]] = {}
    for seen in compiled.recording.elements.get("column", ()):
        of = getattr(seen, "table", None)
        if of is None and not getattr(seen, "is_literal", False):
            raise Refusal("bare-column", f"the column {seen.name} of it names no table")
        of = getattr(of, "element", of) if not isinstance(of, Table) else of
        if isinstance(of, Table):
            if getattr(seen, "system", False):
                raise Refusal("system-column", f"the system column {seen.name} cannot be stood in for")
            used.setdefault(str(of.name), set()).add(str(seen.name))
    return used


def _needed(compiled: Compiled, one: Table, nodes: Sequence[Node]) -> ColumnElement[bool] | None:
    """The condition that every row of a table meets which can matter to any FROM that it is; None for all rows."""
    each: list[ColumnElement[bool]] = []
    for node in nodes:
        conditions = [
            _moved(condition, node, one, compiled)
            for condition, scope in node.block.conditions
            if scope is node.scope and _is_of(condition, node, compiled)
        ]
        conditions += [
            _equality(constraint, one)
            for constraint in node.constraints
            if isinstance(constraint, Constraint) and constraint.part is None
        ]
        if not conditions:
            return None
        each.append(and_(*conditions))
    return or_(*each)


def _equality(constraint: Constraint, one: Table) -> ColumnElement[bool]:
    operator = operators.in_op if constraint.listed else operators.eq
    return BinaryExpression(key_column(one), constraint.slot.bind, operator)


def _is_of(condition: Any, node: Node, compiled: Compiled) -> bool:
    """Whether a condition looks at nothing but one row of a FROM."""
    for element in iterate(condition):
        if isinstance(element, SelectBase):
            return False
        if isinstance(element, FunctionElement):
            if str(getattr(element, "name", "")).lower() not in ROW_FUNCTIONS | TRANSACTION_TIMES:
                return False
        elif isinstance(element, ColumnClause):
            if node.block.find_column(element, compiled.rendered_name) is not node:
                return False
        elif element.__visit_name__ not in ROW_KINDS | {"clauselist", "grouping"}:
            return False
    return True


def _moved(condition: Any, node: Node, one: Table, compiled: Compiled) -> Any:
    """A condition on a FROM as one on the table itself."""

    def replace(element: Any, **_: Any) -> Any:
        if isinstance(element, BindParameter):
            return element
        if isinstance(element, ColumnClause):
            return next(c for c in one.columns if c.name == element.name)
        return None

    return replacement_traverse(condition, {}, replace)


def _reading(
    tables: Sequence[Pulled],
    conditions: Sequence[ColumnElement[bool] | None],
    owned: bool,
) -> Any:
    """The statement that reads all the tables on one shard: for each the number of rows, an array a column as text, and
    the types of the columns."""
    parts = []
    for number, (pulled, condition) in enumerate(zip(tables, conditions, strict=True)):
        rows = select(*(c.label(f"c{place}") for place, c in enumerate(pulled.columns)))
        if condition is not None:
            rows = rows.where(condition)
        if owned:
            rows = rows.where(owned_in(key_column(pulled.table), pulled.declared.key_type))
        given = rows.limit(bindparam(MOST, type_=BigInteger())).subquery(f"rows_{number}")
        arrays = [
            cast(func.array_agg(as_text(given.c[f"c{place}"])), Text).label(f"c{place}")
            for place in range(len(pulled.columns))
        ]
        parts.append(
            select(func.count().label("n"), *arrays, _types(f"shardkit_table_{number}").label("types"))
            .select_from(given)
            .subquery(f"table_{number}")
        )
    joined: Any = parts[0]
    for part in parts[1:]:
        joined = joined.join(part, true())
    return select(*(c.label(f"{part.name}_{c.name}") for part in parts for c in part.c)).select_from(joined)


def _types(name: str) -> Any:
    """The types and collations of a table's columns, by name, as JSON: without lengths, which a cast would cut at.
    ``name`` is the parameter that names the table."""
    attribute = table(
        "pg_attribute", column("attrelid"), column("attname"), column("atttypid"), column("attcollation"),
        column("attnum"), column("attisdropped"), schema="pg_catalog",
    )  # fmt: skip
    collation = table(
        "pg_collation", column("oid"), column("collname"), column("collnamespace"), schema="pg_catalog"
    )
    namespace = table("pg_namespace", column("oid"), column("nspname"), schema="pg_catalog")
    qualified = (
        select(
            func.concat(
                func.quote_ident(namespace.c.nspname),
                literal_column("'.'"),
                func.quote_ident(collation.c.collname),
            )
        )
        .where(collation.c.oid == attribute.c.attcollation, namespace.c.oid == collation.c.collnamespace)
        .where(collation.c.collname != literal_column("'default'"))
        .correlate(attribute)
        .scalar_subquery()
    )
    described = func.json_build_array(
        func.format_type(attribute.c.atttypid, constant(-1)),
        case((attribute.c.attcollation != constant(0), qualified)),
    )
    return (
        select(cast(func.json_object_agg(attribute.c.attname, described), Text))
        .where(attribute.c.attrelid == cast(bindparam(name, type_=Text()), REGCLASS))
        .where(attribute.c.attnum > constant(0), ~attribute.c.attisdropped)
        .scalar_subquery()
    )


# --- each call -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Pull:
    pull: Pull
    statement: Any
    most: int
    as_text = True

    def merged(self, results: Mapping[int, CursorResult[Any]], finish: Finish) -> CursorResult[Any]:
        """The result of the statement over all rows."""
        shards = [raw_rows(result)[1][0] for result in results.values()]
        statement, place = self.statement, 0
        for pulled in self.pull.tables:
            width = len(pulled.columns) + 2
            of_table = [row[place : place + width] for row in shards]
            place += width
            if sum(row[0] for row in of_table) > self.most:
                raise UnmergeableQuery(
                    f"More than {self.most:,} rows of {pulled.declared} would have to be read from their shards to "
                    "answer this statement.",
                    hint="Bind it to a shard key, restrict the table further, or allow more by the execution option "
                    "shardkit_most_rows.",
                    reason="too-many-rows",
                    table=str(pulled.declared),
                )
            statement = statement.add_cte(_standing_in(pulled, of_table))
        return finish.instead(statement)


def _standing_in(pulled: Pulled, rows: Sequence[Sequence[Any]]) -> CTE:
    """The common table expression with a table's name and rows."""
    types = json.loads(rows[0][-1])
    if any(json.loads(row[-1]) != types for row in rows[1:]):
        raise UnmergeableQuery(
            f"The columns of {pulled.declared} differ between shards.",
            hint="Bring the schema of all shards to the same state.",
            reason="schema",
            table=str(pulled.declared),
        )
    names = [f"c{number}" for number in range(len(pulled.columns))]
    arrays = []
    for number in range(len(names)):
        joined = _joined([row[number + 1] for row in rows])
        arrays.append(cast(bindparam(None, joined, type_=Text()), ARRAY(Text)))
    given: Any = func.unnest(*arrays).table_valued(*names).render_derived(name="given")
    values = [
        typed(given.c[name], *types[str(c.name)]).label(c.name)
        for name, c in zip(names, pulled.columns, strict=True)
    ]
    return select(*values).cte(pulled.table.name)


def _joined(arrays: Sequence[str | None]) -> str:
    """One array out of several, each as the server writes it: from 1 on and of one dimension, so without bounds."""
    return "{" + ",".join(array[1:-1] for array in arrays if array is not None) + "}"
