"""Whole tables in statements: planning of what names reference and home tables and no sharded one.

What reads reference tables runs on any one shard; what reads or writes home tables of one shard runs there. What writes
a reference table runs on every shard, and only if each shard makes the same of it: its functions depend on their
arguments alone, no row is chosen by the order in which a shard happens to find it. Driven by the planner; pure.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Executable, Table
from sqlalchemy.orm import Mapper
from sqlalchemy.sql.elements import ClauseElement

from shardkit.core.topology import DeclaredTable, HomeTable, ReferenceTable, ShardedTable, Topology
from shardkit.orm import keys, places

from .closure import BlockProof
from .gather import Same
from .plan import AnyShardPlan, Parameters, Plan, Route, ShardPart
from .proof import declared, prove
from .recorder import Compiled
from .refusals import Refusal
from .vetting import function_names, reads_only, vet_without_tables
from .vocabulary import ROW_FUNCTIONS

Row = Mapping[str, Any]


class HomePlan(Plan):
    """The statement runs on the shard of this name."""

    __slots__ = ("_shard",)

    def __init__(
        self,
        statement: Executable,
        parameters: Parameters,
        tables: tuple[DeclaredTable, ...],
        writes: bool,
        shard: str,
    ) -> None:
        super().__init__(statement, parameters, tables, writes)
        self._shard = shard

    def route(self, topology: Topology, *, prefer: Collection[int] = ()) -> Route:
        """That shard."""
        shard_id = topology.named(self._shard).id
        return Route({shard_id: ShardPart(self._statement, self._parameters)}, None)


class FirstShardPlan(Plan):
    """The statement locks rows of reference tables, on the shard where who writes them comes first."""

    __slots__ = ()

    def route(self, topology: Topology, *, prefer: Collection[int] = ()) -> Route:
        """The shard with the lowest id."""
        return Route({min(topology.by_id): ShardPart(self._statement, self._parameters)}, None)


class EveryShardPlan(Plan):
    """The statement writes ``target``, a reference table, on every shard."""

    __slots__ = ("target",)

    def __init__(
        self,
        statement: Executable,
        parameters: Parameters,
        tables: tuple[DeclaredTable, ...],
        target: tuple[ReferenceTable, ...],
    ) -> None:
        super().__init__(statement, parameters, tables, writes=True)
        self.target = target

    def route(self, topology: Topology, *, prefer: Collection[int] = ()) -> Route:
        """Every shard, that with the lowest id first."""
        part = ShardPart(self._statement, self._parameters)
        return Route(dict.fromkeys(sorted(topology.by_id), part), Same())


@dataclass(frozen=True, slots=True, eq=False)
class WholeProof:
    """What is known of all statements of one shape that name whole tables only. ``home`` is the shard of its home
    tables, ``target`` the reference table that it writes, ``locks`` whether it locks rows."""

    tables: tuple[DeclaredTable, ...]
    home: str | None
    target: ReferenceTable | None
    writes: bool
    lists: bool
    locks: bool

    def plan(self, statement: Any, parameters: Parameters) -> Plan:
        """The plan of one call, with one set of parameters or a list of them."""
        if not self.lists and isinstance(parameters, Sequence) and len(parameters) > 1:
            raise Refusal("many", "only INSERT, UPDATE and DELETE take lists of parameters")
        if self.target is not None:
            return EveryShardPlan(statement, parameters, self.tables, (self.target,))
        if self.home is not None:
            return HomePlan(statement, parameters, self.tables, self.writes, self.home)
        if self.locks:
            return FirstShardPlan(statement, parameters, self.tables, self.writes)
        return AnyShardPlan(statement, parameters, self.tables, self.writes)


# --- proving -------------------------------------------------------------------------------------------------------


def tables_beside(blocks: Sequence[BlockProof]) -> tuple[DeclaredTable, ...]:
    """The whole tables of a statement."""
    found: dict[DeclaredTable, None] = {}
    for block in blocks:
        found.update(dict.fromkeys((*block.references.values(), *block.homes.values())))
    return tuple(found)


def vet_beside(compiled: Compiled, blocks: Sequence[BlockProof]) -> None:
    """`Refusal` if a statement that names sharded tables names whole ones in a way that cannot be right: a home table
    where it writes; a reference table that is written, or locked, on this one shard alone."""
    if compiled.given.is_dml:
        for block in blocks:
            for table in block.homes.values():
                raise Refusal(
                    "home",
                    f"{table} is at home on shard {table.shard}, and sharded tables stand beside it",
                    "Read the one, then write the other by what was found.",
                )
    if compiled.given.is_dml and not isinstance(_target_of(compiled), ShardedTable):
        raise Refusal(
            "reference-write",
            f"it writes the reference table {_target_of(compiled)} by what one shard holds of sharded tables",
            "Read the rows first, then write by what was found.",
        )
    for block in blocks:
        if _locks(compiled, block):
            raise Refusal(
                "reference-lock",
                "FOR UPDATE would lock rows of a reference table on one shard alone",
                "Name the sharded entities to be locked: with_for_update(of=...).",
            )


def home_beside(blocks: Sequence[BlockProof]) -> str | None:
    """The shard of the home tables of a statement; `Refusal` if they are at home on two."""
    shards = {table.shard for block in blocks for table in block.homes.values()}
    if len(shards) > 1:
        listed = " and ".join(sorted(shards))
        raise Refusal("home", f"its home tables are on different shards, {listed}")
    return next(iter(shards), None)


def prove_whole(compiled: Compiled, blocks: Sequence[BlockProof]) -> WholeProof:
    """What is known of a statement whose blocks name no sharded table."""
    tables = tables_beside(blocks)
    target = _target_of(compiled) if compiled.given.is_dml else None
    found = _proof(compiled, tables, target, writes=not reads_only(compiled))
    if found.home is None and target is None:
        vet_without_tables(compiled)
    if found.target is not None:
        _vet_same(compiled)
    locks = any(_locks(compiled, block) for block in blocks)
    return WholeProof(found.tables, found.home, found.target, found.writes, found.lists, locks)


def prove_insert_whole(compiled: Compiled) -> WholeProof:
    """What is known of an INSERT into a whole table."""
    if compiled.given.is_from_statement:
        raise Refusal("from-statement", "from_statement() of an INSERT is not routed: use its returning()")
    kinds = compiled.recording.kinds
    if kinds["insert"] > 1 or kinds["update"] or kinds["delete"]:
        raise Refusal("dml-in-cte", "a writing statement inside another is not routed")
    target = declared(compiled.statement.table)
    blocks = prove(compiled)
    if any(block.nodes for block in blocks):
        raise Refusal("subquery", f"a subquery in an INSERT into {target} names a sharded table")
    found = _proof(compiled, (target, *tables_beside(blocks)), target, writes=True)
    if found.target is not None:
        if compiled.statement.select is not None:
            raise Refusal(
                "insert-from-select",
                "INSERT .. SELECT into a reference table is not routed: read the rows, then insert them",
            )
        _vet_same(compiled)
    return found


def _proof(
    compiled: Compiled, tables: tuple[DeclaredTable, ...], target: DeclaredTable | None, *, writes: bool
) -> WholeProof:
    homes = dict.fromkeys(table.shard for table in tables if isinstance(table, HomeTable))
    if len(homes) > 1:
        listed = " and ".join(homes)
        raise Refusal("home", f"its tables are at home on different shards ({listed})")
    home = next(iter(homes), None)
    reference = target if isinstance(target, ReferenceTable) else None
    if reference is not None and home is not None:
        raise Refusal(
            "reference-write",
            f"it writes the reference table {reference} by what is at home on shard {home} alone",
            "Read the rows first, then write by what was found.",
        )
    lists = target is not None
    return WholeProof(tuple(dict.fromkeys(tables)), home, reference, writes or lists, lists, False)


def _target_of(compiled: Compiled) -> DeclaredTable:
    """The table that the statement writes."""
    table = compiled.statement.table
    table = getattr(table, "element", table)
    if not isinstance(table, Table):
        raise Refusal("unknown-from", "a statement that writes more than one table is not routed")
    return declared(table)


def _locks(compiled: Compiled, proof: BlockProof) -> bool:
    """Whether a block locks rows of reference tables."""
    names = compiled.locked(proof.block)
    return bool(proof.references) if names is None else not names.isdisjoint(proof.references)


_OWN_ORDER = ("_limit_clause", "_offset_clause", "_fetch_clause", "_distinct_on")


def _vet_same(compiled: Compiled) -> None:
    """`Refusal` if a write could come out differently on two shards with equal rows."""
    for name in function_names(compiled):
        if name not in ROW_FUNCTIONS:
            raise Refusal(
                "reference-write",
                f"the function {name}() would make rows of a reference table that differ from shard to shard",
                "Give the value from Python.",
            )
    elements = compiled.recording.elements
    for column in elements.get("column", ()):
        if column.is_literal and not re.fullmatch(r"\*|-?\d+", str(column.name)):
            raise Refusal(
                "raw-sql", f"the raw SQL {column.name!r} is not known to be the same on every shard"
            )
    if elements.get("over"):
        raise Refusal("reference-write", "a window function may count equal rows differently on each shard")
    for block in compiled.recording.blocks:
        for attribute in _OWN_ORDER:
            value = getattr(block.statement, attribute, None)
            if bool(value) if isinstance(value, tuple) else value is not None:
                raise Refusal(
                    "reference-write", "LIMIT may choose other rows of a reference table on each shard"
                )
    if compiled.given.is_update and len(compiled.recording.blocks[0].froms) > 1:
        raise Refusal("reference-write", "UPDATE .. FROM may take another row on each shard")


# --- rows ----------------------------------------------------------------------------------------------------------


def plan_values_whole(statement: Any, parameters: Parameters, compiled: Compiled) -> Plan:
    """The plan of an INSERT with a list of VALUES: of a reference table, with the Python defaults of every row."""
    proof = prove_insert_whole(compiled)
    if proof.target is None:
        return proof.plan(statement, parameters)
    table: Table = compiled.statement.table
    rows = [row for rows in statement._multi_values for row in rows]
    copy = statement._generate()
    copy._multi_values = ([_filled_by_column(row, table) for row in rows],)
    return proof.plan(copy, parameters)


def _filled_by_column(row: Mapping[Any, Any], table: Table) -> Mapping[Any, Any]:
    given = {key if isinstance(key, str) else key.key for key in row}
    missing = [column for column in table.columns if column.key not in given and keys.has_default(column)]
    named = all(isinstance(key, str) for key in row)
    return {
        **row,
        **{(column.key if named else column): keys.default_value(column) for column in missing},
    }


def is_whole(mapper: Mapper[Any]) -> bool:
    """Whether a mapped class is stored in reference or home tables; `Refusal` if in those and sharded ones."""
    kinds = {isinstance(declared(table), ShardedTable) for table in mapper.tables}
    if len(kinds) > 1:
        raise Refusal("mixed", f"{mapper.class_.__name__} is stored in sharded and in other tables")
    return kinds == {False}


def plan_bulk_whole(statement: Any, rows: Sequence[Row], mapper: Mapper[Any]) -> Plan:
    """The plan of a bulk insert or update of the ORM: rows by attribute."""
    tables = tuple(declared(table) for table in mapper.tables)
    homes = {table.shard if isinstance(table, HomeTable) else None for table in tables}
    if len(homes) > 1:
        raise Refusal("mixed", f"{mapper.class_.__name__} is stored in tables of different places")
    (home,) = homes
    if statement._independent_ctes:
        raise Refusal("cte", "a bulk operation with a common table expression is not routed")
    if home is not None:
        return HomePlan(statement, rows, tables, True, home)
    if statement._where_criteria if statement.is_update else statement.select is not None:
        raise Refusal("bulk-values", "a bulk operation with more in its statement than rows is not routed")
    if statement._values or statement._multi_values:
        raise Refusal(
            "bulk-values",
            "a bulk operation with values in its statement is not routed: give them in the rows",
        )
    if any(isinstance(value, ClauseElement) for row in rows for value in row.values()):
        raise Refusal("bulk-values", "a bulk operation on a reference table takes values, no SQL")
    filled = [_filled_by_attribute(row, mapper, update=statement.is_update) for row in rows]
    targets = tuple(table for table in tables if isinstance(table, ReferenceTable))
    return EveryShardPlan(statement, filled, tables, targets)


def _filled_by_attribute(row: Row, mapper: Mapper[Any], *, update: bool) -> Row:
    """A row with the Python defaults that SQLAlchemy would evaluate once on each shard."""
    filled = dict(row)
    for table in mapper.tables:
        for column in table.columns:
            made = column.onupdate if update else column.default
            if made is None or mapper.get_property_by_column(column).key in filled:
                continue
            filled[mapper.get_property_by_column(column).key] = keys.evaluated(made)
    return filled


def is_declared_whole(table: Any) -> bool:
    """Whether the target of an INSERT is a reference or home table."""
    return isinstance(table, Table) and places.is_whole(table)
