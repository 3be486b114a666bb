"""Routing: from a statement to the shards that answer it, by proof.

Driven by the session: `Planner.plan` for each statement, `Plan.route` for each topology that is tried. Pure: never
opens a connection, never looks at rows.

The promise is that a statement returns what one database would have returned, or raises `UnroutableQuery`. So a
statement runs on one shard if every sharded FROM of every block is bound to one position (`orm.proof`); on several if
its rows are each made on one shard and its result can be put together exactly (`orm.scatter`); row by row if it
writes rows (`orm.rows`); and else not at all. What is not known by name is refused (`orm.vetting`). No answer and no
refusal depends on the topology: two keys that live on one shard today are two keys.

Proofs are kept by SQLAlchemy's own cache key, so by the shape of a statement; each call only looks at its values.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Delete, Executable, Insert, Select, Update
from sqlalchemy.engine import Dialect
from sqlalchemy.orm.context import FromStatement
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.selectable import CompoundSelect

from shardkit.core.topology import ShardedTable, Topology

from . import declare, keys
from .binding import Keys, Terms, Unbound, known, one_position, only_position, possible, terms
from .gather import Merge
from .kept import Kept
from .plan import AnyShardPlan, OneKeyPlan, Parameters, Plan, Route, RowsPlan, ShardPart
from .proof import Constraint, Node, prove
from .recorder import Call, Compiled
from .refusals import Refusal
from .rows import InsertProof, plan_bulk_insert, plan_bulk_update, plan_values, prove_insert, vet_equal_names
from .scatter import Compile, Scatter, scatter
from .splitting import with_list
from .vetting import reads_only, vet_insert_scatter, vet_one_shard, vet_without_tables

__all__ = ["Parameters", "Plan", "Planner", "Route", "ShardPart"]

_NO_PARAMETERS: Mapping[str, Any] = {}
_PLANNED = (Select, CompoundSelect, FromStatement, Insert, Update, Delete)


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


class ScatterPlan(Plan):
    """The rows of the statement are on several shards: on all, or on the owners of ``positions``."""

    __slots__ = ("_call", "_compile", "_positions", "_scatter", "_split")

    reason = "its rows can be on several shards"

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
        merge: Merge | None = self._scatter.merge if len(parts) > 1 else None
        return Route(parts, merge)

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


class Planner:
    """Plans statements for one dialect; safe to share between threads. ``size`` bounds the statement shapes kept."""

    def __init__(self, dialect: Dialect, *, size: int = 500) -> None:
        self._dialect = dialect
        self._proofs: Kept[StatementProof | InsertProof] = Kept(size)

    def plan(
        self,
        statement: Executable,
        parameters: Parameters = None,
        execution_options: Mapping[str, Any] | None = None,
    ) -> Plan:
        """Understand a statement and the values it is called with.

        Call it after autoflush, with what is given to the connection. `UnroutableQuery` if it cannot be proved right on
        shards, `KeyTypeError` if it writes a row whose shard key is no key, `DeclarationError` if a table of it is
        declared wrongly.
        """
        try:
            return self._plan(statement, parameters, execution_options or {})
        except Refusal as refusal:
            raise refusal.error() from None

    def _plan(self, statement: Any, parameters: Parameters, options: Mapping[str, Any]) -> Plan:
        if options.get("schema_translate_map"):
            raise Refusal("schema-map", "schema_translate_map hides which tables it names")
        if type(statement) is Select:
            return self._plan_shape(statement, parameters, options)
        if isinstance(statement, FunctionElement):
            statement = statement.select()
        if not isinstance(statement, _PLANNED):
            raise _unplanned(statement)
        bulk = _bulk_mapper(statement, parameters, options)
        if bulk is not None:
            rows = parameters if isinstance(parameters, Sequence) else [parameters or {}]
            if isinstance(statement, Insert):
                return plan_bulk_insert(statement, rows, bulk)
            return plan_bulk_update(statement, rows, bulk)
        return self._plan_shape(statement, parameters, options)

    def _plan_shape(self, statement: Any, parameters: Parameters, options: Mapping[str, Any]) -> Plan:
        single: Mapping[str, Any] | None = None
        names: tuple[str, ...] = ()
        if not parameters:
            single = _NO_PARAMETERS
        elif isinstance(parameters, Mapping):
            single = parameters
            names = tuple(sorted(single))
        else:
            names = tuple(sorted(parameters[0]))
            if len(parameters) == 1:
                single = parameters[0]
        call = statement._generate_cache_key()
        shape = None if call is None else (call.key, names, single is None)
        proof = None if shape is None else self._proofs.get(shape)
        if proof is None:
            compile_ = self._compiling(names, single is None)
            compiled = compile_(statement)
            vet_one_shard(compiled)
            call = compiled.call
            if isinstance(compiled.given, Insert) and compiled.state._has_multi_parameters:
                return plan_values(statement, parameters, compiled, *_insert_facts(compiled))
            proof = _prove(compiled, compile_)
            if shape is not None:
                self._proofs.put(shape, proof)
        if isinstance(proof, InsertProof):
            return proof.plan(statement, parameters, call)
        if single is None:
            assert isinstance(parameters, Sequence)
            return _plan_each(statement, parameters, proof, call)
        return self._plan_one(statement, parameters, single, proof, call, options)

    def _plan_one(
        self,
        statement: Any,
        parameters: Parameters,
        single: Mapping[str, Any],
        proof: StatementProof,
        call: Call,
        options: Mapping[str, Any],
    ) -> Plan:
        position = proof.position(call, single)
        if isinstance(position, int):
            return OneKeyPlan(statement, parameters, proof.tables, proof.writes, position)
        if position is Unbound.NO_ROW:
            return AnyShardPlan(statement, parameters, proof.tables, proof.writes)
        if isinstance(proof.scatter, Refusal):
            raise proof.scatter.again()
        if options.get("yield_per") or options.get("stream_results"):
            raise Refusal("stream", "rows of several shards are not streamed")
        if proof.updates_or_deletes:
            _refuse_strange_keys(proof.scatter.anchor, call, single)
        recompile = self._compiling(tuple(sorted(single)), False)
        return ScatterPlan(statement, single, proof, proof.scatter, call, recompile)

    def _compiling(self, names: Sequence[str], many: bool) -> Compile:
        return lambda statement: Compiled(self._dialect, statement, names, many)


def _prove(compiled: Compiled, compile_: Compile) -> StatementProof | InsertProof:
    statement = compiled.statement
    if isinstance(statement, Insert):
        if compiled.given.is_from_statement:
            raise Refusal(
                "from-statement", "from_statement() of an INSERT is not routed: use its returning()"
            )
        return prove_insert(compiled, *_insert_facts(compiled))
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


def _unplanned(statement: Any) -> Refusal:
    if getattr(statement, "_is_text_clause", False) or getattr(statement, "_is_textual", False):
        return Refusal("text", "text() can name any table")
    return Refusal("unknown-statement", f"{type(statement).__name__} is not a statement that can be routed")


def _unbound(refusal: Refusal, names: list[str]) -> Refusal:
    """The refusal of a scatter, told as what would have to be bound to make it none."""
    if not names:
        return refusal
    listed = ", ".join(dict.fromkeys(names))
    return Refusal(
        refusal.reason,
        f"{refusal.text}, and not every sharded table of it is bound to one shard key: {listed}",
        refusal.hint or f"Bind {listed} to one value, in the block where each of them is.",
    )


def _bulk_mapper(statement: Any, parameters: Parameters, options: Mapping[str, Any]) -> Any:
    """The mapper of a bulk operation of the ORM, or None if this is none."""
    subject = statement._propagate_attrs.get("plugin_subject")
    if not parameters or subject is None or not isinstance(statement, Insert | Update):
        return None
    strategy = statement._annotations.get("dml_strategy") or options.get("dml_strategy") or "auto"
    if isinstance(statement, Update):
        bulk = isinstance(parameters, Sequence) and "parententity" in statement.table._annotations
        return subject.mapper if bulk and strategy in ("auto", "bulk") else None
    return subject.mapper if strategy in ("auto", "bulk") else None


def _insert_facts(compiled: Compiled) -> tuple[tuple[Terms, ...], Refusal | None]:
    """The terms of the subqueries of an INSERT, and why its rows cannot go to several shards."""
    if (
        compiled.recording.kinds["insert"] > 1
        or compiled.recording.kinds["update"]
        or compiled.recording.kinds["delete"]
    ):
        raise Refusal("dml-in-cte", "a writing statement inside another is not routed")
    blocks = tuple(terms(block) for block in prove(compiled))
    try:
        if blocks:
            raise Refusal("subquery", "a subquery in an INSERT of rows of several shard keys is not routed")
        vet_insert_scatter(compiled)
    except Refusal as refusal:
        return blocks, refusal
    return blocks, None


def _vet_update(compiled: Compiled) -> None:
    """`Refusal` if an UPDATE sets a shard key."""
    table = compiled.statement.table
    table = getattr(table, "element", table)
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


def _plan_each(
    statement: Any, parameters: Sequence[Mapping[str, Any]], proof: StatementProof, call: Call
) -> Plan:
    """The plan of a statement with a list of parameters: each set is bound to a position of its own."""
    if not proof.updates_or_deletes:
        raise Refusal("many", "only INSERT, UPDATE and DELETE take lists of parameters")
    vet_equal_names(parameters)
    positions: list[int] = []
    for row in parameters:
        position = proof.position(call, row)
        if position is Unbound.SEVERAL:
            raise Refusal("many", "each set of parameters has to bind it to one shard key")
        positions.append(position if isinstance(position, int) else 0)
    return RowsPlan(statement, parameters, proof.tables, positions, ordered=False)
