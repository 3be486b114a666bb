"""A session's transaction over shards: provision first, send after.

Before a statement is sent, its whole route is computed under one topology and every shard of it is held behind its
fence; a stale fence leads to a newer topology and to the whole route again. All shards of a transaction are under
one topology. A newer one is taken inside the transaction only if every shard that is open holds the fence which it
names, or can be brought to hold it because nothing was sent there yet or because its snapshot is taken anew by each
statement; otherwise `TopologyChanged`. So nothing is ever sent twice, and an application sees a pause at most.

Driven by `orm.session`; guards live in the outermost transaction, never in a savepoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import psycopg
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from shardkit.core.errors import (
    IncompatibleServer,
    ShardUnreachable,
    TopologyChanged,
    TopologyUnsettled,
    UndeclaredTable,
)
from shardkit.core.topology import DeclaredTable, Shard, Topology
from shardkit.storage.dialect import behind
from shardkit.storage.guard import Guard, GuardedAsyncConnection, GuardedConnection, StaleFence
from shardkit.storage.scope import Participant, Scope
from shardkit.storage.snapshots import Source

from .declared import declares, not_split, unsplit
from .planning.clock import Times, ask

if TYPE_CHECKING:
    from .session import ShardSession

_PAUSE = 0.001
_LONGEST_PAUSE = 0.1
_BRIEF = 0.02
"""Seconds. While the pauses are shorter, a shard that is about to open is asked again, and nobody else is."""
_FOLLOWED = 8
"""So many newer topologies in a row are followed, however long it takes."""


class Routed(Protocol):
    """Whatever a route function returns: it names the shards."""

    @property
    def shards(self) -> Collection[int]:
        """Their ids."""
        ...


R = TypeVar("R", bound=Routed)


class ShardTransaction:
    """The shards that a session's outermost transaction has open, and the topology they are under."""

    def __init__(self, session: ShardSession) -> None:
        self._session = session
        self._cluster = session.cluster
        self._engines = session.engines
        self._admits = session.cluster.admitted.admits
        self._opened: dict[int, Connection] = {}
        self.scope = Scope(session.mode)
        self.topology: Topology | None = None
        self.locked: set[tuple[int, DeclaredTable]] = set()
        """Shards and reference tables of which this transaction is the only writer to its end."""
        self.options: Mapping[str, Any] | None = None
        """Execution options for the connections that are opened next."""

    def provision(
        self,
        route: Callable[[Topology], R],
        *,
        tables: Collection[DeclaredTable] = (),
        writes: bool = False,
        away: dict[int, ShardUnreachable] | None = None,
    ) -> R:
        """The route under one topology that holds ``tables``, every shard of it held. Nothing was sent but guards.

        A shard that does not answer is noted in ``away`` and left out, if that is given.
        Raises `TopologyChanged`, `TopologyUnsettled`, `ShardUnreachable`, `UndeclaredTable`, `IdsNotSplit`, and
        `CrossShardWrite` before any shard is opened for it.
        """
        topology = self.topology
        if topology is not None and self._admits(topology, tables) and self._holds_all(topology):
            found = route(topology)
            if self.scope.participants.keys() >= set(found.shards):
                if writes:
                    self._admit(found.shards, topology)
                return found
        return self._provision(route, tables, writes, away)

    def _provision(
        self,
        route: Callable[[Topology], R],
        tables: Collection[DeclaredTable],
        writes: bool,
        away: dict[int, ShardUnreachable] | None,
    ) -> R:
        topology = self.topology or self._cluster.router.topology
        waiting = Waiting(self._engines.pause, self._cluster.settle_seconds)
        while True:
            if not self._admits(topology, tables):
                topology = self._admitting(topology, tables)
            found = route(topology)
            if writes:
                self._admit(found.shards, topology)
            try:
                self._hold_opened(topology, waiting)
                if away is not None:
                    away.clear()
                for shard_id in sorted(found.shards):
                    if shard_id not in self.scope.participants:
                        self._open_or_note(topology.by_id[shard_id], topology, waiting, away)
            except StaleFence as stale:
                topology = self._after(stale, topology, waiting)
            except Moved as moved:
                topology = moved.topology
            else:
                self.topology = topology
                return found

    def _holds_all(self, topology: Topology) -> bool:
        """Whether every shard that is open holds its fence of ``topology``; a rollback to a savepoint may have
        released one."""
        shards = topology.by_id
        return all(
            shard_id in shards and shards[shard_id].fence in participant.held
            for shard_id, participant in self.scope.participants.items()
        )

    def connection(self, shard_id: int) -> Connection:
        """The connection to a shard that is held, inside the innermost savepoint."""
        connection = self._opened[shard_id]
        if self._session.in_nested_transaction() or not connection.in_transaction():
            # The savepoint is made by asking, and so is the error where the transaction has failed.
            return self._session.bound_connection(connection.engine)
        return connection

    @property
    def first(self) -> int:
        """The shard that was opened first. Its clock is that of the transaction."""
        return next(iter(self.scope.participants))

    def times(self) -> Callable[[], Times]:
        """What time it is for one statement, which is asked once."""
        return cache(lambda: ask(self.connection(self.first)))

    def engine(self, shard_id: int) -> Engine:
        """The engine of a shard that is held."""
        return self._opened[shard_id].engine

    def _admitting(self, topology: Topology, tables: Collection[DeclaredTable]) -> Topology:
        """A newer topology that holds the tables; `UndeclaredTable`, `IdsNotSplit`."""
        newer = self._cluster.router.newer_than(topology.version, self._engines)
        if newer is not None and self._admits(newer, tables):
            return newer
        latest = newer or topology
        if not declares(latest, tables):
            missing = ", ".join(str(table) for table in tables if not declares(latest, (table,)))
            raise UndeclaredTable(
                f"Not declared to the cluster: {missing}. A move would not carry its rows.", tables=missing
            )
        raise not_split(map(str, unsplit(latest, tables)))

    def _admit(self, shard_ids: Iterable[int], topology: Topology) -> None:
        previous: Shard | None = None
        for shard_id in shard_ids:
            shard = topology.by_id[shard_id]
            self.scope.admit_writes(shard_id, shard.name, beside=previous.name if previous else None)
            previous = shard

    # --- holding ---------------------------------------------------------------------------------------------------

    def _hold_opened(self, topology: Topology, waiting: Waiting) -> None:
        """Rule R: every shard that is open holds the fence that ``topology`` names."""
        for participant in list(self.scope.participants.values()):
            shard = topology.by_id.get(participant.shard_id)
            if shard is None:
                self._let_go(participant)
            elif shard.fence not in participant.held:
                self._hold_also(participant, shard, waiting)

    def _let_go(self, participant: Participant) -> None:
        """The shard has left the topology."""
        if participant.sent:
            raise TopologyChanged(
                f"Shard {participant.shard_name} left the cluster while this transaction had it open.",
                shard=participant.shard_name,
            )
        raw = raw_of(participant)
        raw.wait_at_end()  # here, and not in the COMMIT of the others
        self._run(raw.rollback())
        raw.left()
        del self.scope.participants[participant.shard_id]

    def _hold_also(self, participant: Participant, shard: Shard, waiting: Waiting) -> None:
        raw = raw_of(participant)
        guard = self._guard(shard, waiting)
        if participant.sent:
            self._run(raw.lock_more(guard))
        else:
            self._run(raw.rebegin(guard))

    def _open_or_note(
        self, shard: Shard, topology: Topology, waiting: Waiting, away: dict[int, ShardUnreachable] | None
    ) -> None:
        try:
            self._open(shard, topology, waiting)
        except ShardUnreachable as error:
            if away is None:
                raise
            away[shard.id] = error

    def _open(self, shard: Shard, topology: Topology, waiting: Waiting) -> None:
        """Begin on a shard, behind its fence, in the outermost transaction; `ShardUnreachable` at once where it has not
        answered for some time."""
        breaker = self._engines.breaker(shard)
        breaker.admit()
        try:
            self._begin(shard, waiting)
        except StaleFence:
            breaker.succeeded()
            raise
        except Away as away:
            breaker.failed()
            newer = self._cluster.router.without(shard, topology.version, self._engines)
            if newer is not None:
                raise Moved(newer) from away.error
            raise ShardUnreachable(
                f"Shard {shard.name} does not answer: {first_line(away.error.orig)}", shard=shard.name
            ) from away.error
        except ShardUnreachable:  # lost while the engine got to know it
            breaker.failed()
            raise
        except IncompatibleServer as error:
            # The shard may have left the cluster, and its database be another shard by now, or nobody's.
            breaker.gave_up()
            newer = self._cluster.router.without(shard, topology.version, self._engines)
            if newer is not None:
                raise Moved(newer) from error
            raise
        except BaseException:
            breaker.gave_up()
            raise
        breaker.succeeded()

    def _begin(self, shard: Shard, waiting: Waiting, source: Source | None = None) -> None:
        engine = self._engines.shard(shard) if source is None else self._engines.reader(shard, source)
        fresh = False
        while True:
            try:
                with behind(self._guard(shard, waiting, source)):
                    self._opened[shard.id] = self._session.root_connection(engine, self.options)
                return
            except DBAPIError as error:
                # A pooled connection may have died while it was idle. Nothing was sent on it.
                if error.connection_invalidated and not fresh:
                    fresh = True
                    continue
                if not _is_unreachable(error):
                    raise
                raise Away(error) from error

    def _guard(self, shard: Shard, waiting: Waiting, source: Source | None = None) -> Guard:
        return Guard(self._engines.identity(shard), shard.fence, self.scope, waiting.deadline, source)

    def _run(self, outcome: Any) -> None:
        self._engines.run(outcome)

    # --- a stale fence ---------------------------------------------------------------------------------------------

    def _after(self, stale: StaleFence, topology: Topology, waiting: Waiting) -> Topology:
        """What to try next: a newer topology, or the same again where the router is ahead of the shard."""
        # Keys are on their way to a shard that has an older topology, or took this one meanwhile. The catalog, later,
        # knows no more; it would be asked by every session that waits.
        opens = stale.copy is not None and stale.copy.version <= topology.version
        newer = self._cluster.router.newer_than(
            topology.version, self._engines, stale.copy, ask=not (opens and waiting.is_brief)
        )
        if newer is not None:
            waiting.bound(stale)
            return newer
        waiting.pause(stale)
        return topology


class Moved(Exception):
    """A shard does not answer, and a newer topology is known."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology


class Away(Exception):
    """A shard does not answer."""

    def __init__(self, error: DBAPIError) -> None:
        self.error = error


class Waiting:
    """The patience of one provisioning. The clock starts with the first obstacle."""

    def __init__(self, pause: Callable[[float], None], seconds: float) -> None:
        self._pause = pause
        self._seconds = seconds
        self._next = _PAUSE
        self._deadline: float | None = None
        self._followed = 0

    @property
    def deadline(self) -> float:
        """Monotonic time at which patience ends."""
        if self._deadline is None:
            self._deadline = time.monotonic() + self._seconds
        return self._deadline

    @property
    def is_brief(self) -> bool:
        """Whether it has only begun."""
        return self._next < _BRIEF

    def bound(self, stale: StaleFence) -> None:
        """Go on at once, unless the topology keeps changing faster than it can be followed."""
        self._followed += 1
        # A slow machine may be past the deadline at the first change.
        if self._followed > _FOLLOWED and time.monotonic() > self.deadline:
            raise TopologyUnsettled(
                f"The topology kept changing for {self._seconds:.0f} s.", shard=stale.shard_name
            ) from stale

    def pause(self, stale: StaleFence) -> None:
        """Give a shard time to take the topology that others have; `TopologyUnsettled` when patience ends."""
        if time.monotonic() > self.deadline:
            raise TopologyUnsettled(
                f"Shard {stale.shard_name} has not taken {stale.fence.relation} within {self._seconds:.0f} s, "
                "and nobody knows a newer topology.",
                shard=stale.shard_name,
            ) from stale
        self._pause(self._next)
        self._next = min(self._next * 1.5, _LONGEST_PAUSE)


def raw_of(participant: Participant) -> GuardedConnection | GuardedAsyncConnection:
    return cast("GuardedConnection | GuardedAsyncConnection", participant)


def _is_unreachable(error: DBAPIError) -> bool:
    """Whether the server did not answer, as opposed to having answered with an error."""
    if not isinstance(error.orig, psycopg.OperationalError):
        return error.connection_invalidated
    # Connection refused or lost has no state; a server that starts or stops says 57P01 to 57P03.
    state = error.orig.sqlstate
    return state is None or state.startswith(("08", "57P"))


def first_line(error: BaseException | None) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
