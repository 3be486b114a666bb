"""Plans and routes: a statement understood, and where it runs under one topology.

A `Plan` is made by the planner for one call; the session asks it for a `Route` under each topology that it tries, and
holds the route's shards before it sends anything. Routes are computed, never remembered: a plan knows positions,
not shards.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Executable

from shardkit.core.topology import DeclaredTable, Topology

from .gather import Interleaved, Rows
from .merge import Merge

Parameters = Mapping[str, Any] | Sequence[Mapping[str, Any]] | None
"""As given to ``Session.execute``: none, one set, or a list of sets."""


class ShardPart(NamedTuple):
    """What one shard executes."""

    statement: Executable
    parameters: Parameters


class Route(NamedTuple):
    """Where a statement runs under one topology: shard id to part, and how the results become one.

    ``merge`` is None if there is one shard only, whose result is the answer as it is. ``streamed`` says that rows are
    merged as they come, so that the shards keep cursors open.
    """

    shards: Mapping[int, ShardPart]
    merge: Merge | None
    streamed: bool = False
    made_once: bool = False
    """Whether its parts have a parameter that says on which of the shards rows are made that any of them can make."""


class Plan:
    """One call of one statement, understood.

    ``writes`` says whether it can change rows; ``tables`` are the declared tables it touches, which the session
    compares with the topology's; ``asks_the_time`` whether it names a function that tells the time (`clock`).
    """

    __slots__ = ("_parameters", "_statement", "asks_the_time", "tables", "writes")

    reason: str
    """Why it runs where it does, for people."""
    everywhere = False
    """Whether it asks all shards, however many there are."""
    one_first = False
    """Whether the other shards are sent what Python made (defaults) for the first."""
    merging = "rows concatenated"
    """How the results of several shards become one, for people."""

    def __init__(
        self, statement: Executable, parameters: Parameters, tables: tuple[DeclaredTable, ...], writes: bool
    ) -> None:
        self._statement = statement
        self._parameters = parameters
        self.tables = tables
        self.writes = writes
        self.asks_the_time = False

    def route(self, topology: Topology, *, prefer: Collection[int] = ()) -> Route:
        """The shards under a topology. A statement that any one shard answers takes one of ``prefer`` (the shards that
        the transaction has open), if there is one; the others do not look at it."""
        raise NotImplementedError


class OneKeyPlan(Plan):
    """All rows of the statement have one position."""

    __slots__ = ("position",)
    reason = "all sharded tables are bound to one shard key"

    def __init__(
        self,
        statement: Executable,
        parameters: Parameters,
        tables: tuple[DeclaredTable, ...],
        writes: bool,
        position: int,
    ) -> None:
        self._statement = statement
        self._parameters = parameters
        self.tables = tables
        self.writes = writes
        self.asks_the_time = False
        self.position = position

    def route(self, topology: Topology, *, prefer: Collection[int] = ()) -> Route:
        """The owner of the position."""
        owner = topology.ring.owner_at(self.position)
        return Route({owner: ShardPart(self._statement, self._parameters)}, None)


class AnyShardPlan(Plan):
    """Every shard answers alike: no table is read, or reference tables alone, or no row can match."""

    __slots__ = ()
    reason = "any shard gives the same answer"

    def route(self, topology: Topology, *, prefer: Collection[int] = ()) -> Route:
        """One shard."""
        open_here = [shard.id for shard in topology.shards if shard.id in prefer]
        chosen = open_here[0] if open_here else topology.ring.owner_at(0)
        return Route({chosen: ShardPart(self._statement, self._parameters)}, None)


class RowsPlan(Plan):
    """Sets of parameters or rows, each with a position of its own: every shard is given its own, in order."""

    __slots__ = ("_made", "_ordered", "_positions")
    reason = "each row goes to the shard of its key"
    merging = "results put together in the order of the rows"

    def __init__(
        self,
        statement: Executable,
        parameters: Parameters,
        tables: tuple[DeclaredTable, ...],
        positions: Sequence[int],
        *,
        ordered: bool,
        made: Callable[[list[int]], ShardPart] | None = None,
    ) -> None:
        """``made`` makes the part of some rows, for rows that are in the statement and not in the parameters;
        ``ordered`` says whether each row returns one, in order."""
        super().__init__(statement, parameters, tables, writes=True)
        self._positions = positions
        self._ordered = ordered
        self._made = made

    def route(self, topology: Topology, *, prefer: Collection[int] = ()) -> Route:
        """The owners of the rows' positions."""
        numbers: dict[int, list[int]] = {}
        for number, owner in enumerate(topology.ring.owners_at(self._positions)):
            numbers.setdefault(owner, []).append(number)
        if len(numbers) == 1:
            return Route({next(iter(numbers)): ShardPart(self._statement, self._parameters)}, None)
        merge: Merge = (
            Interleaved({owner: tuple(own) for owner, own in numbers.items()}) if self._ordered else Rows()
        )
        return Route({owner: self._part(own) for owner, own in numbers.items()}, merge)

    def _part(self, numbers: list[int]) -> ShardPart:
        if self._made is not None:
            return self._made(numbers)
        rows: Any = self._parameters
        return ShardPart(self._statement, [rows[number] for number in numbers])
