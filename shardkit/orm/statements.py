"""Statements: planning of what reads, updates and deletes.

A `StatementProof` is what is known of all statements of one shape; with the values of a call it makes the plan: all
rows at one position, no row at all, or rows on several shards, where each shard is given its own part of a list of
keys or the ownership predicate. Driven by the planner.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Executable, Table

from shardkit.core.topology import ShardedTable, Topology

from . import declare, keys
from .binding import Keys, Terms, Unbound, known, one_position, only_position, possible, terms
from .plan import AnyShardPlan, OneKeyPlan, Parameters, Plan, Route, RowsPlan, ShardPart
from .proof import Constraint, Node, prove
from .recorder import Call, Compiled
from .refusals import Refusal
from .rows import vet_equal_names
from .scatter import Compile, Scatter, scatter
from .splitting import with_list
from .vetting import reads_only, vet_without_tables


@dataclass(frozen=True, slots=True, eq=False)
class StatementProof:
    """What is known of all statements of one shape that read, update or delete."""

    blocks: tuple[Terms, ...]
    tables: tuple[ShardedTable, ...]
    writes: bool
    updates_or_deletes: bool
    scatter: Scatter | Refusal
    only: Constraint | None
    """The one constraint of the one block, which is all there is in most statements."""

    def position(self, call: Call, parameters: Mapping[str, Any]) -> int | Unbound:
        """The position of all rows in one call."""
        if self.only is None:
            return one_position(self.blocks, call, parameters)
        if not self.only.listed:
            return only_position(self.only, call, parameters)
        positions = known(self.only, call, parameters)
        if positions is None or len(positions) > 1:
            return Unbound.SEVERAL
        return next(iter(positions), Unbound.NO_ROW)

    def plan(
        self,
        statement: Any,
        parameters: Parameters,
        single: Mapping[str, Any],
        call: Call,
        options: Mapping[str, Any],
        compile_: Compile,
    ) -> Plan:
        """The plan of one call with one set of parameters, ``single``."""
        position = self.position(call, single)
        if isinstance(position, int):
            return OneKeyPlan(statement, parameters, self.tables, self.writes, position)
        if position is Unbound.NO_ROW:
            return AnyShardPlan(statement, parameters, self.tables, self.writes)
        if isinstance(self.scatter, Refusal):
            raise self.scatter.again()
        if options.get("yield_per") or options.get("stream_results"):
            raise Refusal("stream", "rows of several shards are not streamed")
        if self.updates_or_deletes:
            _refuse_strange_keys(self.scatter.anchor, call, single)
        return ScatterPlan(statement, single, self, self.scatter, call, compile_)

    def plan_each(self, statement: Any, parameters: Sequence[Mapping[str, Any]], call: Call) -> Plan:
        """The plan of one call with a list of parameters: each set is bound to a position of its own."""
        if not self.updates_or_deletes:
            raise Refusal("many", "only INSERT, UPDATE and DELETE take lists of parameters")
        vet_equal_names(parameters)
        positions: list[int] = []
        for row in parameters:
            position = self.position(call, row)
            if position is Unbound.SEVERAL:
                raise Refusal("many", "each set of parameters has to bind it to one shard key")
            positions.append(position if isinstance(position, int) else 0)
        return RowsPlan(statement, parameters, self.tables, positions, ordered=False)


class ScatterPlan(Plan):
    """The rows of the statement are on several shards: on all, or on the owners of ``positions``."""

    __slots__ = ("_call", "_compile", "_positions", "_scatter", "_split")

    def __init__(
        self,
        statement: Executable,
        parameters: Mapping[str, Any],
        proof: StatementProof,
        scattered: Scatter,
        call: Call,
        compile_: Compile,
    ) -> None:
        super().__init__(statement, parameters, proof.tables, proof.writes)
        self._scatter = scattered
        self._call = call
        self._compile = compile_
        constraints = scattered.anchor.constraints
        self._positions = possible(constraints, call, parameters)
        self._split = self._splittable(constraints, parameters)

    def _splittable(
        self, constraints: Sequence[Constraint], parameters: Mapping[str, Any]
    ) -> tuple[Constraint, Keys] | None:
        for constraint in constraints:
            if constraint.listed and constraint.single:
                allowed = known(constraint, self._call, parameters)
                if allowed is not None:
                    return constraint, allowed
        return None

    def route(self, topology: Topology, *, prefer: Collection[int] = ()) -> Route:
        """Every owner of rows, each with its own part of a list of keys, or with the ownership predicate if rows are
        in transit there."""
        try:
            return self._route(topology)
        except Refusal as refusal:
            raise refusal.error() from None

    def _route(self, topology: Topology) -> Route:
        if self._positions is None:
            parts = {
                shard.id: self._part(topology, shard.id)
                for shard in topology.shards
                if topology.owned(shard.id)
            }
        else:
            of_shard: dict[int, list[int]] = {}
            for position in self._positions:
                of_shard.setdefault(topology.ring.owner_at(position), []).append(position)
            parts = {
                shard_id: self._keyed_part(topology, shard_id, positions)
                for shard_id, positions in of_shard.items()
            }
        return Route(parts, self._scatter.merge if len(parts) > 1 else None)

    def _keyed_part(self, topology: Topology, shard_id: int, positions: list[int]) -> ShardPart:
        if self._split is not None:
            constraint, allowed = self._split
            values = [value for position in positions for value in allowed[position]]
            parameters: Any = self._parameters
            part = with_list(self._statement, parameters, constraint.slot, self._call, values)
            if part is not None:
                return part
        return self._part(topology, shard_id)

    def _part(self, topology: Topology, shard_id: int) -> ShardPart:
        statement: Executable = self._statement
        if topology.by_id[shard_id].in_transit:
            owned, in_transit = topology.owned(shard_id), topology.by_id[shard_id].in_transit
            statement = self._scatter.owned_only(statement, owned, in_transit, self._compile)
        return ShardPart(statement, self._parameters)


# --- proving --------------------------------------------------------------------------------------------------------


def prove_statement(compiled: Compiled, compile_: Compile) -> StatementProof:
    """What is known of a statement; `Refusal` if it can be routed with no values at all."""
    if compiled.recording.kinds["insert"]:
        raise Refusal("dml-in-cte", "an INSERT inside another statement is not routed")
    blocks = prove(compiled)
    top_dml = bool(compiled.given.is_update or compiled.given.is_delete)
    if compiled.recording.kinds["update"] + compiled.recording.kinds["delete"] > top_dml:
        raise Refusal("dml-in-cte", "an UPDATE or DELETE inside another statement is not routed")
    if compiled.given.is_update:
        _vet_update(compiled)
    nodes = [node for block in blocks for node in block.nodes]
    if not nodes:
        vet_without_tables(compiled)
    try:
        scattered: Scatter | Refusal = (
            scatter(compiled, blocks, compile_) if nodes else Refusal("no-table", "it names no sharded table")
        )
    except Refusal as refusal:
        scattered = _unbound(refusal, [str(node) for node in nodes if not node.constraints])
    found = tuple(terms(block) for block in blocks)
    classes = found[0].classes if len(found) == 1 else ()
    constraints, present = classes[0] if len(classes) == 1 else ((), False)
    return StatementProof(
        blocks=found,
        tables=tuple({node.table: None for node in nodes}),
        writes=top_dml or not reads_only(compiled),
        updates_or_deletes=top_dml,
        scatter=scattered,
        only=constraints[0] if len(constraints) == 1 and present else None,
    )


def _unbound(refusal: Refusal, names: list[str]) -> Refusal:
    """The refusal of a scatter, told as what would have to be bound to make it none."""
    if not names:
        return refusal.again()
    listed = ", ".join(dict.fromkeys(names))
    return Refusal(
        refusal.reason,
        f"{refusal.text}, and not every sharded table of it is bound to one shard key: {listed}",
        refusal.hint or f"Bind {listed} to one value, in the block where each of them is.",
    )


def _vet_update(compiled: Compiled) -> None:
    """`Refusal` if an UPDATE sets a shard key."""
    table = compiled.statement.table
    table = getattr(table, "element", table)
    if not isinstance(table, Table):
        raise Refusal("unknown-from", "an UPDATE of more than one table is not routed")
    key = declare.key_column(table)
    values = compiled.state._dict_parameters or {}
    names = {name if isinstance(name, str) else name.key for name in values} | set(compiled.column_keys)
    if key.key in names:
        raise keys.changed_key(key)


def _refuse_strange_keys(anchor: Node, call: Call, parameters: Mapping[str, Any]) -> None:
    """A write that is bound to a key, but to a value that is none, is a mistake."""
    names = [str(node) for node in anchor.block.strange]
    names += [one.column for one in anchor.constraints if known(one, call, parameters) is None]
    if names:
        raise Refusal("key-value", f"{names[0]} is compared with a value that is no shard key")
