"""Replicas: reads that a session sends to the standbys of the shards, because they may be a little old.

Asked for by the execution option ``read_from``, of a statement or a call: "replica", or "prefer_replica", which takes
the shard itself where no replica answers or is far enough. They run in transactions of their own, read-only, one
snapshot a shard, so they see nothing that the session has not committed, and neither hold a fence nor take part in its
commit. A replica is believed only if its snapshot shows the fence that the topology names (`storage.snapshots`): one
that has not replayed a move is passed over. Driven by `orm.session` and `orm.dispatch`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import psycopg
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from shardkit.core.errors import (
    NoReplica,
    ReplicaBehind,
    ReplicaReadOnly,
    ShardUnreachable,
    TopologyChanged,
    TopologyUnsettled,
    UsageError,
)
from shardkit.core.topology import Shard, Topology
from shardkit.storage.guard import StaleFence
from shardkit.storage.scope import Participant
from shardkit.storage.snapshots import NoStandby, Source

from .transaction import Away, Moved, ShardTransaction, Waiting, first_line, raw_of

if TYPE_CHECKING:
    from .session import ShardSession

ReadFrom = Literal["primary", "replica", "prefer_replica"]
READ_FROM = "read_from"
"""Execution option."""

_ATTEMPTS = 5
_PAUSE = 0.01
_CANCELLED = "40001"
"""SQLSTATE of a statement that was in the way of replay."""

T = TypeVar("T")


def wanted(options: Mapping[str, Any] | None) -> ReadFrom:
    """The option of a statement or call; `UsageError` for what it cannot be."""
    return checked((options or {}).get(READ_FROM))


def checked(given: Any) -> ReadFrom:
    """Where to read from; `UsageError` for what it cannot be."""
    if given is None:
        return "primary"
    for known in get_args(ReadFrom):
        if given == known:
            found: ReadFrom = known
            return found
    raise UsageError(
        f"{given!r} is nothing to read from.",
        hint=f"read_from is {' or '.join(map(repr, get_args(ReadFrom)))}.",
    )


def refuse_write(read_from: ReadFrom) -> None:
    """`ReplicaReadOnly` unless a write goes to the shards themselves."""
    if read_from != "primary":
        raise ReplicaReadOnly(f"A statement that writes has the option read_from={read_from!r}.")


class ReplicaTransaction(ShardTransaction):
    """The snapshots that a session's outermost transaction has open on replicas, and the topology they are under."""

    def __init__(self, session: ShardSession) -> None:
        super().__init__(session)
        self.or_primary = False
        """Whether the shard itself may stand in for its replicas; each call says."""
        self._delivered = False

    def lent(self, shard_id: int) -> Connection:
        """The connection to a replica that is held, for the application's own use: nothing is repeated from now on."""
        self._delivered = True
        return self.connection(shard_id)

    def repeated(self, run: Callable[[], T]) -> T:
        """What ``run`` returns; run again, in new snapshots, where the replay of a replica has cancelled it and nothing
        was read in this transaction before."""
        attempt = 1
        while True:
            try:
                result = run()
            except DBAPIError as error:
                state = getattr(error.orig, "sqlstate", None)
                if state != _CANCELLED or error.connection_invalidated or attempt == _ATTEMPTS:
                    raise
                if self._delivered or self._session.in_nested_transaction():
                    raise
            else:
                self._delivered = True
                return result
            for participant in self.scope.participants.values():
                participant.sent, participant.held = False, ()
            self._engines.pause(_PAUSE * attempt)
            attempt += 1

    def _admit(self, shard_ids: Iterable[int], topology: Topology) -> None:
        """Functions that could write for all that is known cannot do so in these transactions: the server refuses."""

    # --- holding ---------------------------------------------------------------------------------------------------

    def _open(self, shard: Shard, topology: Topology, waiting: Waiting) -> None:
        """Begin on the first replica that answers and shows the fence; `ReplicaBehind` comes of the last `StaleFence`,
        `ShardUnreachable` names the replicas that are away."""
        behind: StaleFence | None = None
        away: dict[Source, str] = {}
        for source in self._candidates(shard, topology):
            try:
                self._try(shard, waiting, source)
                return
            except StaleFence as stale:
                if stale.copy is not None and stale.copy.version > topology.version:
                    raise  # not the replica is behind but we are
                behind = stale
            except ShardUnreachable as error:
                away[source] = error.message
            except Away as error:
                away[source] = first_line(error.error.orig)
            except NoStandby:
                away[source] = "it is a standby no more"
        if behind is not None:
            raise behind
        newer = self._cluster.router.newer_than(topology.version, self._engines)
        if newer is not None:
            raise Moved(newer)
        listed = "; ".join(f"{source}: {reason}" for source, reason in away.items())
        raise ShardUnreachable(
            f"Shard {shard.name} cannot be read from a replica: {listed}",
            hint='Check the servers; read_from="prefer_replica" reads from the shard itself where none answers.',
            shard=shard.name,
        )

    def _candidates(self, shard: Shard, topology: Topology) -> list[Source]:
        sources = self._engines.sources(shard)
        if self.or_primary:
            return [*sources, Source(shard.url, is_replica=False)]
        if not sources:
            newer = self._cluster.router.newer_than(topology.version, self._engines)
            if newer is not None:
                raise Moved(newer)
            raise NoReplica(f"Shard {shard.name} lists no replica.", shard=shard.name)
        return sources

    def _try(self, shard: Shard, waiting: Waiting, source: Source) -> None:
        breaker = self._engines.breaker(shard, source)
        breaker.admit()
        try:
            self._begin(shard, waiting, source)
        except StaleFence:
            breaker.succeeded()
            raise
        except (Away, ShardUnreachable, NoStandby):
            breaker.failed()
            raise
        except BaseException:
            breaker.gave_up()
            raise
        breaker.succeeded()

    def _hold_also(self, participant: Participant, shard: Shard, waiting: Waiting) -> None:
        """A snapshot that does not show the fence: take another where nothing was read in it."""
        if participant.sent:
            raise TopologyChanged(
                f"Keys of shard {shard.name} have moved since the snapshot that this transaction has read there.",
                shard=shard.name,
            )
        raw = raw_of(participant)
        try:
            self._run(raw.rebegin(self._guard(shard, waiting, raw.source)))
        except (psycopg.OperationalError, NoStandby) as error:
            raise ShardUnreachable(
                f"The {raw.source} of shard {shard.name} was lost: {first_line(error)}",
                hint="Roll back and run the unit of work again.",
                shard=shard.name,
            ) from error

    def _after(self, stale: StaleFence, topology: Topology, waiting: Waiting) -> Topology:
        if stale.source is None or not stale.source.is_replica or stale.copy is None:
            return super()._after(stale, topology, waiting)
        # What it is behind is known, so the catalog is not asked: many may wait for one replica.
        newer = self._cluster.router.adopt(stale.copy)
        if newer.version > topology.version:
            waiting.bound(stale)
            return newer
        try:
            waiting.pause(stale)
        except TopologyUnsettled as error:
            raise ReplicaBehind(
                f"The {stale.source} of shard {stale.shard_name} does not show {stale.fence.relation} yet: it has not "
                "replayed the last move there.",
                shard=stale.shard_name,
                replica=str(stale.source),
            ) from error
        return topology
