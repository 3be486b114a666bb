"""Statements: planning of what reads, updates and deletes.

A `StatementProof` is what is known of all statements of one shape; with the values of a call it makes the plan: all
rows at one position, no row at all, or rows on several shards. What runs there is a part made for it
(`scatter`), the writing statement itself (`writing`), or only the reading of the rows that it needs
(`pulling`). Driven by the planner.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import CompoundSelect, Executable, Select, Table
from sqlalchemy.engine import Dialect

from shardkit.core.topology import DeclaredTable, Topology
from shardkit.orm import declare, keys

from .binding import Keys, Terms, Unbound, known, one_position, only_position, possible, terms
from .carriers import id_columns
from .closure import BlockProof, Bound, Constraint, Node
from .idrouting import IdConstraint, owners, possible_slots
from .merge import Merge
from .ownership import owned_arcs
from .plan import AnyShardPlan, OneKeyPlan, Parameters, Plan, Route, RowsPlan, ShardPart
from .proof import prove
from .pulling import MOST, Pull, pull
from .recorder import Call, Compiled
from .refusals import Refusal
from .rows import vet_equal_names
from .scatter import Reading, reading
from .splitting import with_list
from .streaming import Streamed
from .vetting import reads_only
from .whole import WholeProof, home_beside, prove_whole, tables_beside, vet_beside
from .writing import Compile, Writing, writing

STREAM_ROWS = 1000
"""How many rows of each shard are at hand at a time where a statement is streamed and does not say."""

MOST_ROWS = "shardkit_most_rows"
"""Execution option: how many rows of a table may be read from its shards for one statement."""


@dataclass(frozen=True, slots=True, eq=False)
class StatementProof:
    """What is known of all statements of one shape that read, update or delete."""

    blocks: tuple[Terms, ...]
    tables: tuple[DeclaredTable, ...]
    writes: bool
    updates_or_deletes: bool
    several: Reading | Writing | Pull | Refusal
    """How it runs on several shards, or why it does not."""
    only: Constraint | None
    """The one constraint of the one block, which is all there is in most statements."""
    home: str | None = None
    """The shard of its home tables, which are nowhere else: so it runs there, over rows that are read."""

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
        planner: PlannerFacts,
    ) -> Plan:
        """The plan of one call with one set of parameters, ``single``."""
        position = self.position(call, single) if self.home is None else Unbound.SEVERAL
        if isinstance(position, int):
            return OneKeyPlan(statement, parameters, self.tables, self.writes, position)
        if position is Unbound.NO_ROW:
            return AnyShardPlan(statement, parameters, self.tables, self.writes)
        several = self.several
        if isinstance(several, Refusal):
            raise several.again()
        if isinstance(several, Writing):
            _refuse_strange_keys(several.anchor, call, single)
            return WritingPlan(statement, single, self, several, call, planner.compile_)
        if isinstance(several, Reading):
            streamed = options.get("yield_per") or (options.get("stream_results") and STREAM_ROWS)
            if several.is_wrong(call, single):
                return AnyShardPlan(statement, parameters, self.tables, self.writes)  # the server says why
            merge, own = several.merge(call, single, planner.dialect, streamed or None)
            return ReadingPlan(statement, single, self, several, call, merge, own)
        return PullPlan(statement, single, self, several, call, options.get(MOST_ROWS, planner.most_rows))

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


@dataclass(frozen=True, slots=True)
class PlannerFacts:
    """What a plan of several shards takes from the planner: its dialect, how to compile a statement of the same
    parameters, and how many rows of a table may be read for one statement."""

    dialect: Dialect
    compile_: Compile
    most_rows: int


# --- several shards ------------------------------------------------------------------------------------------------


class SeveralPlan(Plan):
    """The rows of the statement are on several shards: on all, on the owners of the anchor's keys, or on those of the
    slots that its ids carry."""

    __slots__ = ("_call", "_positions", "_slots", "_split")

    @property
    def everywhere(self) -> bool:  # type: ignore[override]
        """Whether its keys are not known."""
        return self._positions is None

    def __init__(
        self,
        statement: Executable,
        parameters: Mapping[str, Any],
        proof: StatementProof,
        constraints: Sequence[Bound],
        call: Call,
        ids: Sequence[IdConstraint] = (),
    ) -> None:
        super().__init__(statement, parameters, proof.tables, proof.writes)
        self._call = call
        self._positions = possible(constraints, call, parameters)
        self._split = self._splittable(constraints, parameters)
        self._slots = possible_slots(ids, call, parameters) if ids and self._positions is None else None

    def _splittable(
        self, constraints: Sequence[Bound], parameters: Mapping[str, Any]
    ) -> tuple[Constraint, Keys] | None:
        for constraint in constraints:
            if isinstance(constraint, Constraint) and constraint.listed and constraint.single:
                allowed = known(constraint, self._call, parameters)
                if allowed is not None:
                    return constraint, allowed
        return None

    def _shards(self, topology: Topology) -> Mapping[int, list[int] | None]:
        """The shards that hold rows, and the positions of the keys that each of them is asked for, if known."""
        if self._slots is not None:
            return dict.fromkeys(owners(topology, self._slots))
        if self._positions is None:
            return {shard.id: None for shard in topology.shards if topology.owned(shard.id)}
        of_shard: dict[int, list[int] | None] = {}
        for position in self._positions:
            positions = of_shard.setdefault(topology.ring.owner_at(position), [])
            assert positions is not None
            positions.append(position)
        return of_shard

    def _strays(self, topology: Topology, shard_id: int) -> bool:
        """Whether a shard may hold rows that the statement would see there and that it does not own."""
        if self._slots is not None:
            return owners(topology, self._slots)[shard_id]
        return bool(topology.by_id[shard_id].in_transit)

    def _listed(self, positions: list[int] | None) -> list[Any] | None:
        """The part of a list of keys that one shard is given; None if the list cannot be split."""
        if positions is None or self._split is None:
            return None
        return [value for position in positions for value in self._split[1][position]]


class ReadingPlan(SeveralPlan):
    """A SELECT in parts."""

    __slots__ = ("_merge", "_own", "_reading")

    @property
    def reason(self) -> str:  # type: ignore[override]
        """The anchor."""
        several = "several keys of" if self._positions is not None else "every key of"
        return f"{self._reading.reason}; {several} it are asked for"

    @property
    def merging(self) -> str:  # type: ignore[override]
        """What `scatter` found."""
        return self._reading.merging.description

    def __init__(
        self,
        statement: Executable,
        parameters: Mapping[str, Any],
        proof: StatementProof,
        reading: Reading,
        call: Call,
        merge: Merge,
        own: Mapping[str, Any],
    ) -> None:
        anchor = reading.anchor
        super().__init__(statement, parameters, proof, anchor.constraints, call, anchor.ids)
        if anchor.branches:
            self._positions, self._split = reading.positions(call, parameters), None
        self._reading = reading
        self._merge = merge
        self._own = own

    def route(self, topology: Topology, *, prefer: Collection[int] = ()) -> Route:
        """Every owner of rows, each with its own part of a list of keys, or with the ownership predicate if rows are
        in transit there."""
        shards = self._shards(topology) or {topology.ring.owner_at(0): []}  # no row: which any shard may say
        if len(shards) == 1:
            ((shard_id, positions),) = shards.items()
            if positions is not None or not self._strays(topology, shard_id):
                return Route({shard_id: ShardPart(self._statement, self._parameters)}, None)
        parts = {
            shard_id: self._part(topology, shard_id, positions) for shard_id, positions in shards.items()
        }
        streamed = isinstance(self._merge, Streamed)
        return Route(parts, self._merge, streamed, self._reading.made_once)

    def _part(self, topology: Topology, shard_id: int, positions: list[int] | None) -> ShardPart:
        prepared, own = self._reading.plain, dict(self._own)
        listed = self._listed(positions)
        if listed is not None:
            assert self._split is not None
            own[self._split[0].slot.bind.key] = listed
        elif self._strays(topology, shard_id):
            prepared = self._reading.owned
            own.update(owned_arcs(topology.owned(shard_id), topology.by_id[shard_id].in_transit))
        parameters: Any = self._parameters
        return ShardPart(prepared, prepared.values(self._call, parameters, own))


class PullPlan(SeveralPlan):
    """A SELECT that runs on one shard, over rows that are read from all."""

    __slots__ = ("_home", "_most", "_pull")
    reason = "its rows are not made shard by shard, so the rows of its tables are read"

    @property
    def merging(self) -> str:  # type: ignore[override]
        """Which tables are read."""
        return self._pull.description

    def __init__(
        self,
        statement: Executable,
        parameters: Mapping[str, Any],
        proof: StatementProof,
        pull: Pull,
        call: Call,
        most: int,
    ) -> None:
        super().__init__(statement, parameters, proof, (), call)
        self._pull = pull
        self._most = most
        self._home = proof.home
        self._positions = pull.positions(call, parameters)

    def route(self, topology: Topology, *, prefer: Collection[int] = ()) -> Route:
        """Every owner of rows."""
        shards = self._shards(topology)
        if self._home is not None:
            # The shard that comes first runs the statement.
            shards = {topology.named(self._home).id: None, **shards}
        elif not shards:
            shards = {topology.ring.owner_at(0): None}
        if len(shards) == 1:
            ((shard_id, positions),) = shards.items()
            if positions is not None or not topology.by_id[shard_id].in_transit:
                return Route({shard_id: ShardPart(self._statement, self._parameters)}, None)
        parameters: Any = self._parameters
        parts = {}
        for shard_id in shards:
            prepared, own = self._pull.plain, {MOST: self._most + 1}
            if topology.by_id[shard_id].in_transit:
                prepared = self._pull.owned
                own.update(owned_arcs(topology.owned(shard_id), topology.by_id[shard_id].in_transit))
            parts[shard_id] = ShardPart(prepared, prepared.values(self._call, parameters, own))
        return Route(parts, self._pull.merge(self._statement, self._most))


class WritingPlan(SeveralPlan):
    """An UPDATE or DELETE on several shards."""

    __slots__ = ("_compile", "_writing")

    @property
    def one_first(self) -> bool:  # type: ignore[override]
        """Whether Python makes a value on update: one for all rows, also for those of other shards."""
        return self._writing.makes

    @property
    def reason(self) -> str:  # type: ignore[override]
        """The anchor."""
        return f"each row is decided about on the shard of its {self._writing.anchor}"

    def __init__(
        self,
        statement: Executable,
        parameters: Mapping[str, Any],
        proof: StatementProof,
        writing: Writing,
        call: Call,
        compile_: Compile,
    ) -> None:
        super().__init__(statement, parameters, proof, writing.anchor.constraints, call, writing.anchor.ids)
        self._writing = writing
        self._compile = compile_

    def route(self, topology: Topology, *, prefer: Collection[int] = ()) -> Route:
        """Every owner of rows, each with its own part of a list of keys, or with the ownership predicate if rows are
        in transit there."""
        try:
            parts = {
                shard_id: self._part(topology, shard_id, positions)
                for shard_id, positions in self._shards(topology).items()
            }
        except Refusal as refusal:
            raise refusal.error() from None
        return Route(parts, self._writing.merge if len(parts) > 1 else None)

    def _part(self, topology: Topology, shard_id: int, positions: list[int] | None) -> ShardPart:
        parameters: Any = self._parameters
        listed = self._listed(positions)
        if listed is not None:
            assert self._split is not None
            part = with_list(self._statement, parameters, self._split[0].slot, self._call, listed)
            if part is not None:
                return part
        statement: Executable = self._statement
        if self._strays(topology, shard_id):
            owned, in_transit = topology.owned(shard_id), topology.by_id[shard_id].in_transit
            statement = self._writing.owned_only(statement, owned, in_transit, self._compile)
        return ShardPart(statement, parameters)


# --- proving --------------------------------------------------------------------------------------------------------


def prove_statement(compiled: Compiled, planner: PlannerFacts) -> StatementProof | WholeProof:
    """What is known of a statement; `Refusal` if it can be routed with no values at all."""
    if compiled.recording.kinds["insert"]:
        raise Refusal("dml-in-cte", "an INSERT inside another statement is not routed")
    blocks = prove(compiled)
    top_dml = bool(compiled.given.is_update or compiled.given.is_delete)
    if compiled.recording.kinds["update"] + compiled.recording.kinds["delete"] > top_dml:
        raise Refusal("dml-in-cte", "an UPDATE or DELETE inside another statement is not routed")
    nodes = [node for block in blocks for node in block.nodes]
    if not nodes:
        return prove_whole(compiled, blocks)
    vet_beside(compiled, blocks)
    if compiled.given.is_update:
        _vet_update(compiled)
    found = tuple(terms(block) for block in blocks)
    classes = found[0].classes if len(found) == 1 else ()
    constraints, present = classes[0] if len(classes) == 1 else ((), False)
    only = constraints[0] if len(constraints) == 1 and present else None
    return StatementProof(
        blocks=found,
        tables=(*{node.table: None for node in nodes}, *tables_beside(blocks)),
        writes=top_dml or not reads_only(compiled),
        updates_or_deletes=top_dml,
        several=_several(compiled, blocks, nodes, planner),
        only=only if isinstance(only, Constraint) else None,
        home=home_beside(blocks),
    )


def _several(
    compiled: Compiled, blocks: list[BlockProof], nodes: list[Node], planner: PlannerFacts
) -> Reading | Writing | Pull | Refusal:
    """How a statement runs on several shards: in parts if that is possible."""
    ways: list[Callable[[], Reading | Writing | Pull]] = []
    if not isinstance(compiled.statement, Select | CompoundSelect):
        ways.append(lambda: writing(compiled, blocks, planner.compile_))
    else:
        if home_beside(blocks) is None:
            ways.append(lambda: reading(compiled, blocks, planner.dialect))
        ways.append(lambda: pull(compiled, blocks, planner.dialect))
    for way in ways:
        try:
            return way()
        except Refusal as refusal:
            last = refusal
    return _unbound(last, [str(node) for node in nodes if not node.constraints])


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
    for one in id_columns(table):
        if one.column.key in names:
            raise Refusal(
                "changed-id",
                f"it sets {one.column}, whose ids carry the slot of their row's shard key",
                "Change it on a loaded object, whose shard key is known.",
            )


def _refuse_strange_keys(anchor: Node, call: Call, parameters: Mapping[str, Any]) -> None:
    """A write that is bound to a key, but to a value that is none, is a mistake."""
    names = [str(node) for node in anchor.block.strange]
    names += [one.column for one in anchor.constraints if known(one, call, parameters) is None]
    if names:
        raise Refusal("key-value", f"{names[0]} is compared with a value that is no shard key")
