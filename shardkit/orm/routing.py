"""Routing: from a statement to the shards that answer it, by proof.

Driven by the session: `Planner.plan` for each statement (cached by its shape), `Plan.route` for each topology that is
tried. Pure: never opens a connection, never looks at rows. What is not proved raises `UnroutableQuery`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy import Executable
from sqlalchemy.engine import Dialect
from sqlalchemy.sql import operators
from sqlalchemy.sql.elements import BindParameter

from shardkit.core.ring import position
from shardkit.core.topology import ShardedTable, Topology

from . import declare
from .gather import Merge, Rows

Parameters = Mapping[str, Any] | Sequence[Mapping[str, Any]] | None
"""As given to ``Session.execute``: none, one set, or a list of sets."""


class ShardPart(NamedTuple):
    """What one shard executes."""

    statement: Executable
    parameters: Parameters


@dataclass(frozen=True, slots=True)
class Route:
    """Where a statement runs under one topology: shard id to part, and how the results become one.

    ``merge`` is None if there is one shard only, whose result is the answer as it is.
    """

    shards: dict[int, ShardPart]
    merge: Merge | None


class Plan:
    """One call of one statement, understood: ``writes`` says whether it can change rows, ``tables`` which sharded
    tables it touches (the session compares them with the topology's)."""

    __slots__ = ("_parameters", "_position", "_statement", "tables", "writes")

    def __init__(self, statement: Executable, parameters: Parameters, at: int | None, writes: bool) -> None:
        self.writes = writes
        self.tables: tuple[ShardedTable, ...] = ()
        self._statement, self._parameters, self._position = statement, parameters, at

    def route(self, topology: Topology, *, prefer: Collection[int] = ()) -> Route:
        """The shards under a topology. A statement that any one shard answers takes one of ``prefer`` (the shards that
        the transaction has open), if there are any."""
        part = ShardPart(self._statement, self._parameters)
        if self._position is not None:
            return Route({topology.ring.owner_at(self._position): part}, None)
        ids = [shard.id for shard in topology.shards]
        return Route(dict.fromkeys(ids, part), Rows() if len(ids) > 1 else None)


class Planner:
    """Plans statements for one dialect; safe to share between threads. ``size`` bounds the statement shapes kept."""

    def __init__(self, dialect: Dialect, *, size: int = 500) -> None:
        self._dialect = dialect

    def plan(
        self,
        statement: Executable,
        parameters: Parameters = None,
        execution_options: Mapping[str, Any] | None = None,
    ) -> Plan:
        """Understand a statement and the values it is called with.

        Call it after autoflush, with what ``do_orm_execute`` shows: the statement, the parameters, the execution
        options. `UnroutableQuery` if it cannot be proved right on shards.
        """
        found: int | None = None
        known: Any = statement
        for criterion in getattr(known, "_where_criteria", ()):
            sides: Any = getattr(criterion, "left", None), getattr(criterion, "right", None)
            if getattr(criterion, "operator", None) is operators.eq and isinstance(sides[1], BindParameter):
                table = getattr(sides[0], "table", None)
                if (
                    table is not None
                    and declare.INFO in table.info
                    and sides[0].name == declare.key_column(table).name
                ):
                    given: Any = parameters or {}
                    found = position(given.get(sides[1].key, sides[1].effective_value))
        if known.is_dml and known.is_insert:
            row: Any = parameters[0] if isinstance(parameters, list) else parameters
            found = position(row[declare.key_column(known.table).name])
        return Plan(statement, parameters, found, known.is_dml)
