"""INSERT .. SELECT: rows made of rows of the same shard key, which stay on the shard where they are made.

It is routed as its SELECT is, if the shard key of the new rows is that of a table which that reads: on one shard if
it is bound to one key; on all if each shard's rows are the answer's as they are, with nothing to merge. Driven by the
planner.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Column, Executable, Table
from sqlalchemy.engine import Dialect

from shardkit.core.topology import DeclaredTable, Topology
from shardkit.orm import declare
from shardkit.orm.keys import KeyColumn

from . import proof
from .anchor import local_nodes
from .arranging import Arrangement
from .binding import Unbound
from .carriers import id_columns
from .closure import BlockProof, Node
from .elements import unlabelled
from .gather import Rows
from .ownership import owned_only
from .plan import AnyShardPlan, OneKeyPlan, Parameters, Plan, Route, ShardPart
from .proof import prove
from .recorder import Call, Compiled
from .refusals import Refusal
from .rows import vet_conflict
from .scatter import Reading
from .statements import PlannerFacts, SeveralPlan, StatementProof, prove_statement
from .vetting import vet_scatter
from .vocabulary import STEADY_TIMES


@dataclass(frozen=True, slots=True, eq=False)
class InsertSelectProof:
    """What is known of all INSERT .. SELECT of one shape. ``inner`` is what is known of its SELECT, ``several`` how it
    runs on several shards, or why it does not."""

    inner: StatementProof
    tables: tuple[DeclaredTable, ...]
    several: Node | Refusal

    def plan(self, statement: Any, parameters: Parameters) -> Plan:
        """The plan of one call."""
        if isinstance(parameters, Sequence):
            raise Refusal("many", "INSERT .. SELECT takes one set of parameters")
        call = statement.select._generate_cache_key()
        if call is None:
            raise Refusal("insert-from-select", "the values of its SELECT cannot be told apart")
        position = self.inner.position(call, parameters or {})
        if isinstance(position, int):
            return OneKeyPlan(statement, parameters, self.tables, True, position)
        if position is Unbound.NO_ROW:
            return AnyShardPlan(statement, parameters, self.tables, True)
        if isinstance(self.several, Refusal):
            raise self.several.again()
        return InsertSelectPlan(statement, parameters or {}, self, self.several, call)


class InsertSelectPlan(SeveralPlan):
    """An INSERT .. SELECT on several shards."""

    __slots__ = ("_anchor",)
    reason = "each row is made and stays on the shard of the key that it is made of"

    def __init__(
        self,
        statement: Executable,
        parameters: Mapping[str, Any],
        found: InsertSelectProof,
        anchor: Node,
        call: Call,
    ) -> None:
        super().__init__(statement, parameters, found.inner, anchor.constraints, call, anchor.ids)
        self.tables = found.tables
        self.writes = True
        self._anchor = anchor

    def route(self, topology: Topology, *, prefer: Any = ()) -> Route:
        """Every owner of rows, with the ownership predicate where rows are in transit."""
        parts = {shard_id: self._part(topology, shard_id) for shard_id in self._shards(topology)}
        return Route(parts, Rows() if len(parts) > 1 else None)

    def _part(self, topology: Topology, shard_id: int) -> ShardPart:
        statement: Any = self._statement
        if self._strays(topology, shard_id):
            table = self._anchor.table
            column = self._anchor.source.c[declare.key_column(self._anchor.source).key]
            owned, in_transit = topology.owned(shard_id), topology.by_id[shard_id].in_transit
            statement = statement._generate()
            statement.select = statement.select.where(owned_only(column, table.key_type, owned, in_transit))
        return ShardPart(statement, self._parameters)


def prove_insert_select(compiled: Compiled, facts: PlannerFacts) -> InsertSelectProof:
    """What is known of an INSERT .. SELECT into a sharded table; `Refusal`."""
    core = compiled.statement
    target: Table = core.table
    declared, key = proof.sharded(target), declare.key_column(target)
    vet_conflict(core, target, key)
    made = list(compiled.compiler.insert_prefetch)
    if any(one.column is column for one in id_columns(target) for column in made):
        raise Refusal("insert-from-select", "ids of its rows would be made once for all of them")
    select = facts.compile_(compiled.given.select)
    if len(compiled.recording.blocks) != len(select.recording.blocks):
        raise Refusal("subquery", "a subquery beside its SELECT is not routed")
    inner = prove_statement(select, facts)
    if not isinstance(inner, StatementProof) or inner.home is not None:
        raise Refusal("insert-from-select", "the shard key of its rows is that of no sharded table it reads")
    proofs = prove(select)
    node = _source(compiled, select, proofs[0], key)
    if node.table.key_type != declared.key_type or not _fits(node, key):
        raise Refusal("insert-from-select", f"{node} is of another type than {target.name}.{key.name}")
    several: Node | Refusal
    try:
        several = _anchor(compiled, inner, node, made, facts.dialect)
    except Refusal as refusal:
        several = refusal.again()
    return InsertSelectProof(inner, tuple(dict.fromkeys((declared, *inner.tables))), several)


def _source(compiled: Compiled, select: Compiled, top: BlockProof, key: Column[Any]) -> Node:
    """The table whose shard key the new rows have; `Refusal`."""
    names = [str(getattr(name, "key", name)) for name in compiled.given._select_names]
    if top.block.statement is select.statement and key.key in names:
        element = unlabelled(top.block.columns[names.index(key.key)])
        node = top.find_key(element, select.rendered_name)
        if node is not None and any(node is one for one in top.nodes) and _table(node) is not None:
            return node
    raise Refusal(
        "insert-from-select",
        f"the shard key {key.name} of its rows is not selected as the shard key of a table that it reads",
        "Select that column as it is, or read the rows, then insert them.",
    )


def _table(node: Node) -> Table | None:
    """The table that a FROM is; None if it is derived from others."""
    source: Any = getattr(node.source, "element", node.source)
    return source if isinstance(source, Table) else None


def _fits(node: Node, key: Column[Any]) -> bool:
    """Whether each key is stored as it is: spaces at the end are cut off where they are too many."""
    source = _table(node)
    assert source is not None
    most, length = KeyColumn.of(key).length, KeyColumn.of(declare.key_column(source)).length
    return most is None or (length is not None and length <= most)


def _anchor(compiled: Compiled, inner: StatementProof, node: Node, made: list[Any], dialect: Dialect) -> Node:
    reading = inner.several
    if isinstance(reading, Refusal):
        raise reading.again()
    if not isinstance(reading, Reading) or not isinstance(reading.merging, Arrangement):
        raise Refusal("insert-from-select", "the rows of its SELECT are not made shard by shard")
    merging = reading.merging
    if merging.limit is not None or merging.offset is not None or merging.distinct:
        raise Refusal("insert-from-select", "LIMIT, OFFSET and DISTINCT choose among the rows of all shards")
    local = local_nodes(node.block, next(one for one in node.block.nodes if str(one) == str(reading.anchor)))
    if not any(one is node for one in local):
        raise Refusal("insert-from-select", f"{node} is not the key of each row that it makes")
    if not isinstance(reading.anchor.source, Table):
        raise Refusal("insert-from-select", f"its rows are made by an alias, {reading.anchor.name}")
    if made:
        raise Refusal("insert-from-select", f"the default of {made[0].name} would be made on each shard")
    vet_scatter(compiled, STEADY_TIMES)
    return reading.anchor
