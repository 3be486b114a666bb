"""Rows: planning of what is written row by row.

INSERT in all its forms (one row, lists of parameters, lists of VALUES, bulk inserts of the ORM) and the ORM's bulk
update by primary key: each row names its shard key, or its Python default does, and goes to the shard of it. Driven by
the planner. `KeyTypeError` for a row whose key is no key, `Refusal` for what only one database could do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from sqlalchemy import Column, Insert, Table, UniqueConstraint
from sqlalchemy.dialects.postgresql.dml import OnConflictClause
from sqlalchemy.orm import Mapper
from sqlalchemy.sql.elements import BindParameter, ClauseElement

from shardkit.core.errors import KeyTypeError
from shardkit.core.topology import DeclaredTable, ShardedTable
from shardkit.orm import declare, keys

from . import proof
from .binding import Terms, Unbound, one_position
from .carriers import IdColumn, id_attributes, id_columns
from .plan import OneKeyPlan, Parameters, Plan, RowsPlan, ShardPart
from .proof import sharded
from .recorder import MISSING, Call, Compiled, Slot
from .refusals import Refusal

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class InsertProof:
    """How the rows of an INSERT of one shape find their keys: in a bound value, or by the default of ``column``.
    ``scattered`` is why its rows cannot go to several shards, if they cannot."""

    column: Column[Any]
    key: keys.KeyColumn
    slot: Slot | None
    blocks: tuple[Terms, ...]
    tables: tuple[DeclaredTable, ...]
    returning: bool
    upsert: bool
    scattered: Refusal | None
    ids: tuple[tuple[IdColumn, Slot], ...] = ()

    def plan(self, statement: Any, parameters: Parameters, call: Call) -> Plan:
        """The plan of one call."""
        if not isinstance(parameters, Sequence) and not self.blocks:
            row = self._filled(parameters or {})
            (sent,) = self._sent([row], call)
            position = self.key.position(sent)
            self._vet_ids([row], [position], call)
            return OneKeyPlan(statement, row or None, self.tables, True, position)
        rows = parameters if isinstance(parameters, Sequence) else [parameters or {}]
        filled = [self._filled(row) for row in rows]
        positions = self.key.positions(self._sent(filled, call))
        self._vet_ids(filled, positions, call)
        if self.blocks:
            self._agree(positions, one_position(self.blocks, call, filled[0]))
        if len(set(positions)) == 1:
            given = filled if isinstance(parameters, Sequence) else (filled[0] or None)
            return OneKeyPlan(statement, given, self.tables, True, positions[0])
        if self.scattered is not None:
            raise self.scattered.again()
        vet_equal_names(filled)
        return RowsPlan(statement, filled, self.tables, positions, ordered=self.returning and not self.upsert)

    def _filled(self, row: Row) -> Row:
        if self.slot is not None:
            return row
        if not keys.has_default(self.column):
            raise missing_key(self.column)
        return {**row, self.column.key: keys.default_value(self.column)}

    def _sent(self, rows: Sequence[Row], call: Call) -> Sequence[Any]:
        """The keys of rows as they are sent to the server."""
        slot, name = self.slot, self.column.key
        if slot is None:
            return self.key.sent([row[name] for row in rows])
        values = [slot.value(call, row) for row in rows]
        if any(value is MISSING for value in values):
            raise missing_key(self.column)
        return [slot.processed(value) for value in values]

    def _vet_ids(self, rows: Sequence[Row], positions: Sequence[int], call: Call) -> None:
        for column, slot in self.ids:
            for row, position in zip(rows, positions, strict=True):
                value = slot.value(call, row)
                column.vet(None if value is MISSING else value, position)

    def _agree(self, positions: Sequence[int], of_blocks: int | Unbound) -> None:
        if of_blocks is Unbound.SEVERAL or (isinstance(of_blocks, int) and {of_blocks} != set(positions)):
            raise Refusal("subquery", "a subquery in it is not bound to the shard key of the row")


def prove_insert(compiled: Compiled, blocks: tuple[Terms, ...], scattered: Refusal | None) -> InsertProof:
    """What is known of an INSERT of one row or of a list of parameters."""
    statement = compiled.statement
    table, declared, column = _target(statement)
    values = compiled.state._dict_parameters or {}
    given = {key if isinstance(key, str) else key.key: value for key, value in values.items()}
    value = given.get(column.key)
    if isinstance(value, ClauseElement) and not isinstance(value, BindParameter):
        raise Refusal(
            "key-expression", f"the shard key {table.name}.{column.name} is an expression, not a value"
        )
    bind = (
        None
        if value is None and column.key not in compiled.column_keys
        else compiled.column_of_insert(column, value)
    )
    if bind is not None and declare.key_family(bind.type) != declared.key_type:
        raise Refusal(
            "key-expression", f"the shard key {table.name}.{column.name} is bound as a value of another type"
        )
    vet_conflict(statement, table, column)
    ids = tuple(
        (one, slot)
        for one in id_columns(table)
        if one.column.key in given or one.column.key in compiled.column_keys
        if (slot := _id_slot(compiled, one, given.get(one.column.key))) is not None
    )
    return InsertProof(
        column=column,
        key=keys.KeyColumn.of(column),
        slot=None if bind is None else compiled.slot(bind),
        blocks=blocks,
        tables=tuple(dict.fromkeys((declared, *map(proof.declared, compiled.recording.tables)))),
        returning=bool(statement._returning),
        upsert=statement._post_values_clause is not None,
        scattered=scattered,
        ids=ids,
    )


def _id_slot(compiled: Compiled, one: IdColumn, value: Any) -> Slot | None:
    """Where the value of an id comes from; None if it is an expression, which the server's CHECK looks at."""
    if isinstance(value, ClauseElement) and not isinstance(value, BindParameter):
        return None
    bind = compiled.column_of_insert(one.column, value)
    return None if bind is None else compiled.slot(bind)


def _target(statement: Any) -> tuple[Table, ShardedTable, Column[Any]]:
    if statement.select is not None:
        raise Refusal("insert-from-select", "INSERT .. SELECT is not routed: read the rows, then insert them")
    declared = sharded(statement.table)
    table: Table = statement.table
    return table, declared, declare.key_column(table)


def vet_equal_names(rows: Sequence[Row]) -> None:
    """`Refusal` if rows name different columns: SQLAlchemy takes the names of the first, which is another on each
    shard."""
    names = rows[0].keys()
    if any(row.keys() != names for row in rows):
        raise Refusal("row-names", "its rows name different columns")


def missing_key(column: Column[Any]) -> KeyTypeError:
    """The error of a row without a shard key."""
    return KeyTypeError(
        f"A row of {column.table.name} has no value for the shard key {column.name}.",
        hint="Give it, or give the column a Python default.",
    )


# --- lists of VALUES -----------------------------------------------------------------------------------------------


def plan_values(
    statement: Any,
    parameters: Parameters,
    compiled: Compiled,
    blocks: tuple[Terms, ...],
    scattered: Refusal | None,
) -> Plan:
    """The plan of an INSERT with a list of VALUES, which is analysed for each call, as SQLAlchemy compiles it then."""
    core = compiled.statement
    table, declared, column = _target(core)
    vet_conflict(core, table, column)
    rows: list[Mapping[Any, Any]] = compiled.state._multi_parameters
    positions = keys.required_positions([_key_value(row, column) for row in rows], column)
    for row, at in zip(rows, positions, strict=True):
        for one in id_columns(table):
            named = (
                value for name, value in row.items() if one.column.key in (name, getattr(name, "key", None))
            )
            one.vet(next(named, None), at)
    if blocks:
        raise Refusal("subquery", "a subquery in a list of VALUES is not routed")
    if len(set(positions)) == 1:
        return OneKeyPlan(statement, parameters, (declared,), True, positions[0])
    if scattered is not None:
        raise scattered.again()
    given = [row for rows in statement._multi_values for row in rows]

    def made(numbers: list[int]) -> ShardPart:
        copy = statement._generate()
        copy._multi_values = ([given[number] for number in numbers],)
        return ShardPart(copy, parameters)

    ordered = bool(core._returning) and core._post_values_clause is None
    return RowsPlan(statement, parameters, (declared,), positions, ordered=ordered, made=made)


def _key_value(row: Mapping[Any, Any], column: Column[Any]) -> Any:
    for key, value in row.items():
        if (key if isinstance(key, str) else key.key) == column.key:
            if isinstance(value, BindParameter):
                raise Refusal(
                    "key-expression", "a bound parameter in a list of VALUES cannot be the shard key"
                )
            if isinstance(value, ClauseElement):
                raise Refusal("key-expression", f"the shard key {column.name} is an expression, not a value")
            return value
    raise missing_key(column)


# --- bulk operations of the ORM ------------------------------------------------------------------------------------


def plan_bulk_insert(statement: Insert, rows: Sequence[Row], mapper: Mapper[Any]) -> Plan:
    """The plan of the ORM's bulk insert: rows by attribute."""
    name, column = keys.shard_key_attribute(mapper), keys.key_column_of(mapper)
    if statement._values or statement._multi_values or statement.select is not None:
        raise Refusal(
            "bulk-values", "a bulk insert with values in its statement is not routed: give them in the rows"
        )
    if statement._independent_ctes:
        raise Refusal("cte", "a bulk insert with a common table expression is not routed")
    vet_conflict(statement, cast(Table, mapper.local_table), column)
    # Where a row has no key, or None for it, the ORM takes the default: here it is taken before the shard is chosen.
    filled = [row if row.get(name) is not None else _with_default(row, name, column) for row in rows]
    positions = keys.required_positions([row[name] for row in filled], column)
    for attribute, one in id_attributes(mapper):
        for row, at in zip(filled, positions, strict=True):
            one.vet(row.get(attribute), at)
    ordered = bool(statement._returning) and statement._post_values_clause is None
    return RowsPlan(statement, filled, tables_of(mapper), positions, ordered=ordered)


def plan_bulk_update(statement: Any, rows: Sequence[Row], mapper: Mapper[Any]) -> Plan:
    """The plan of the ORM's bulk update by primary key."""
    name, column = keys.shard_key_attribute(mapper), keys.key_column_of(mapper)
    if statement._where_criteria or statement._values or statement._returning or statement._independent_ctes:
        raise Refusal(
            "bulk-values", "a bulk update by primary key with more in its statement than rows is not routed"
        )
    if not any(key is column for key in column.table.primary_key.columns):
        raise Refusal(
            "bulk-key", f"the primary key does not hold the shard key {column.name}, so rows have no shard"
        )
    for row in rows:
        if row.get(name) is None:
            raise missing_key(column)
    positions = keys.required_positions([row[name] for row in rows], column)
    return RowsPlan(statement, rows, tables_of(mapper), positions, ordered=False)


def _with_default(row: Row, name: str, column: Column[Any]) -> Row:
    if not keys.has_default(column):
        raise missing_key(column)
    return {**row, name: keys.default_value(column)}


def tables_of(mapper: Mapper[Any]) -> tuple[ShardedTable, ...]:
    """The sharded tables that a mapped class is stored in."""
    return tuple(sharded(table) for table in mapper.tables)


# --- ON CONFLICT ---------------------------------------------------------------------------------------------------


def vet_conflict(statement: Any, table: Table, key: Column[Any]) -> None:
    """`Refusal` if an upsert might meet a row on another shard, or change its row's shard key."""
    clause = statement._post_values_clause
    if clause is None:
        return
    if statement._sort_by_parameter_order:
        raise Refusal(
            "returning-order", "an upsert can return fewer rows than it was given, so they have no order"
        )
    if not isinstance(clause, OnConflictClause):
        raise Refusal("extension", "a syntax extension of INSERT is not understood")
    changed = getattr(clause, "update_values_to_set", None) or {}
    if any((name if isinstance(name, str) else name.key) in (key.key, key.name) for name in changed):
        raise keys.changed_key(key)
    if not _arbiter_holds(clause, table, key):
        raise Refusal(
            "conflict-target",
            f"its ON CONFLICT does not name the shard key {key.name}, so a row on another shard would be no conflict",
            hint="Name a primary key or unique constraint that holds the shard key.",
        )


def _arbiter_holds(clause: OnConflictClause, table: Table, key: Column[Any]) -> bool:
    if clause.inferred_target_elements is not None:
        return any(
            (name if isinstance(name, str) else name.name) == key.name
            for name in clause.inferred_target_elements
        )
    named = {
        str(constraint.name): constraint.columns
        for constraint in table.constraints
        if isinstance(constraint, UniqueConstraint) and constraint.name is not None
    }
    if table.primary_key.columns:
        named[str(table.primary_key.name or f"{table.name}_pkey")] = table.primary_key.columns
    if clause.constraint_target is not None:
        columns = named.get(clause.constraint_target)
        return columns is not None and any(column is key for column in columns)
    # Without a target every unique constraint of the table decides.
    unique = [
        constraint.columns for constraint in table.constraints if isinstance(constraint, UniqueConstraint)
    ]
    unique += [index.columns for index in table.indexes if index.unique]
    unique += [table.primary_key.columns] if table.primary_key.columns else []
    return all(any(column is key for column in columns) for columns in unique)
