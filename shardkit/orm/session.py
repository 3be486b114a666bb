"""The session: SQLAlchemy's own, over shards.

Statements are routed where SQLAlchemy would send them to its one connection (`orm.dispatch`); flushed instances by
their shard key; bulk operations are split by row. Objects belong to a key, not to a shard: identity keys hold no
shard, so an object that was loaded before a move is refreshed and flushed where its key lives then. Made by
`ShardCluster.sessionmaker` and `async_sessionmaker`, never by hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from sqlalchemy import Connection, Engine, Executable, event
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import Session, SessionTransaction, SessionTransactionOrigin
from sqlalchemy.util.concurrency import greenlet_spawn

from shardkit.core.errors import ShardUnreachable, UnroutableQuery, UsageError
from shardkit.core.ring import position
from shardkit.core.topology import DeclaredTable, Topology
from shardkit.storage.engines import Engines
from shardkit.storage.scope import MODES, Mode

from . import bulk, partial, rehoming, replicas, replicated
from .byhand import vet_named
from .dispatch import Dispatch
from .flush import RoutedInstances, provision_flush
from .planning.routing import Plan, Route
from .planning.whole import EveryShardPlan
from .replicas import ReadFrom, ReplicaTransaction
from .scatterpolicy import Policy, check_policy
from .transaction import ShardTransaction

if TYPE_CHECKING:
    from .cluster import ShardCluster


_NOT_TAKEN = {"bind", "binds", "twophase"}


class OneShard:
    """The route of a position, or of a shard that was named."""

    __slots__ = ("shards",)

    def __init__(self, shard_id: int) -> None:
        self.shards = (shard_id,)


class _Everywhere:
    """What `ShardSession.get_bind` returns for a statement: the shard is found when it runs."""

    def __init__(self, session: ShardSession, *, by_hand: bool = False) -> None:
        self.dispatch = Dispatch(session, by_hand=by_hand)
        self.dialect = session.cluster.dialect


class ShardSession(Session):
    """A SQLAlchemy session whose entities live on the shards of a cluster.

    ``mode`` "single" lets a transaction write one shard and read any; "two_phase" lets it write several, all or none of
    them; "best_effort" commits several one after the other. Reads of several shards are no snapshot across them.
    ``scatter`` says what is done about statements that ask all shards: "allow", "warn" or "refuse"; so does the
    execution option of that name.
    """

    def __init__(
        self,
        *,
        cluster: ShardCluster,
        engines: Engines | None = None,
        mode: Mode = "single",
        scatter: Policy = "allow",
        **options: Any,
    ) -> None:
        for name in _NOT_TAKEN.intersection(options):
            if options.pop(name):
                raise UsageError(
                    f"A session over shards takes no {name!r}.", hint="Its shards come from the cluster."
                )
        if mode not in MODES:
            known = " or ".join(map(repr, MODES))
            raise UsageError(f"{mode!r} is no mode of a session.", hint=f"It is {known}.")
        super().__init__(**options)
        self.cluster = cluster
        self.engines = engines or cluster.engines
        self.mode: Mode = mode
        self.scatter = check_policy(scatter)
        self._everywhere = _Everywhere(self)
        self._shards: ShardTransaction | None = None
        self._replicas: ReplicaTransaction | None = None
        self.routed = RoutedInstances()
        self._pinned: Engine | None = None

    # --- the transaction -------------------------------------------------------------------------------------------

    @property
    def shards(self) -> ShardTransaction:
        """The shards of the transaction in progress, or of the one that begins."""
        if self._shards is None:
            self._shards = ShardTransaction(self)
        return self._shards

    def replicas(self, read_from: ReadFrom) -> ReplicaTransaction:
        """The same for reads that may be old."""
        if self._replicas is None:
            self._replicas = ReplicaTransaction(self)
        self._replicas.or_primary = read_from == "prefer_replica"
        return self._replicas

    def provision(
        self, plan: Plan, missing: partial.Missing = None, shards: ShardTransaction | None = None
    ) -> Route:
        """Hold every shard of a planned statement; where it runs. A read can leave shards out that do not answer, and
        reports them by ``missing`` (`orm.partial`)."""
        if isinstance(plan, EveryShardPlan):
            replicated.admit(self.mode, plan.target)
        shards = shards or self.shards
        away: dict[int, ShardUnreachable] = {}
        route = shards.provision(
            lambda topology: plan.route(topology, prefer=shards.scope.participants),
            tables=plan.tables,
            writes=plan.writes,
            away=None if missing is None or plan.writes else away,
        )
        if not away:
            return route
        answering = {number: part for number, part in route.shards.items() if number not in away}
        if not answering:
            raise next(iter(away.values()))
        partial.report(missing, [str(error.fields["shard"]) for error in away.values()])
        return route._replace(shards=answering)

    def provision_position(self, at: int, tables: Sequence[DeclaredTable] = ()) -> Connection:
        """The connection to the shard that owns a position, behind its fence."""
        shards = self.shards
        (shard_id,) = shards.provision(
            lambda topology: OneShard(topology.ring.owner_at(at)), tables=tables
        ).shards
        return shards.connection(shard_id)

    def root_connection(self, engine: Engine, options: Any = None) -> Connection:
        """Begin on an engine in the outermost transaction, so that no savepoint can release its guard."""
        root = self.get_transaction()
        if root is None:
            return super().connection({"engine": engine}, options)
        return root.connection(None, options, engine=engine)

    def bound_connection(self, engine: Engine) -> Connection:
        """The open connection of an engine, inside the innermost savepoint."""
        return super()._connection_for_bind(engine)

    # --- where SQLAlchemy asks -------------------------------------------------------------------------------------

    def get_bind(
        self,
        mapper: Any = None,
        *,
        clause: Any = None,
        bind: Any = None,
        engine: Engine | None = None,
        key: Any = None,
        shard: str | None = None,
        scatter: bool = False,
        read_from: ReadFrom | None = None,
        **_: Any,
    ) -> Any:
        """For SQLAlchemy: the engine that is pinned or named, else a place that routes each statement."""
        if bind is not None:
            _refuse_bind()
        if engine is not None:
            return engine
        if key is not None or shard is not None:
            if scatter or (key is not None and shard is not None):
                raise UsageError("bind_arguments name one of key, shard and scatter.")
            vet_named(clause)
            source = replicas.checked(
                read_from or replicas.wanted(getattr(clause, "_execution_options", None))
            )
            return self._provision_asked(key, shard, source).engine
        if scatter:
            return _Everywhere(self, by_hand=True)
        if clause is not None or mapper is None:  # unions and their like come without a clause
            return self._everywhere
        if self._pinned is None:
            _refuse_unnamed(mapper)
        return self._pinned

    def _connection_for_bind(self, engine: Any, execution_options: Any = None, **kw: Any) -> Any:
        if isinstance(engine, _Everywhere):
            return engine.dispatch
        return super()._connection_for_bind(engine, execution_options, **kw)

    def connection(
        self,
        bind_arguments: Any = None,
        execution_options: Any = None,
        *,
        key: Any = None,
        shard: str | None = None,
        read_from: ReadFrom | None = None,
    ) -> Connection:
        """The connection, in this transaction and behind its fence, to the shard of a key or of a name.

        What is executed on it is not routed: it sees every row of that shard, those in transit too. The options count
        where the connection is opened by this call. ``read_from`` "replica" or "prefer_replica" gives one to a replica,
        read-only, in a snapshot of its own.
        """
        arguments = dict(bind_arguments or {})
        source = replicas.checked(arguments.pop("read_from", read_from) or replicas.wanted(execution_options))
        execution_options = {
            name: option for name, option in (execution_options or {}).items() if name != replicas.READ_FROM
        } or None
        key, shard = arguments.pop("key", key), arguments.pop("shard", shard)
        if arguments.get("bind") is not None:
            _refuse_bind()
        if key is None and shard is None:
            if "engine" not in arguments:
                _refuse_unnamed("This")
            return super().connection(arguments, execution_options)
        shards = self.shards if source == "primary" else self.replicas(source)
        known = frozenset(shards.scope.participants)
        shards.options = execution_options
        try:
            found = self._provision_asked(key, shard, source)
        finally:
            shards.options = None
        if execution_options and known >= shards.scope.participants.keys():
            super().connection({"engine": found.engine}, execution_options)  # warns that they are ignored
        return found

    def _provision_asked(self, key: Any, name: str | None, read_from: ReadFrom) -> Connection:
        """The connection to the shard of a key, or of a name where there is no key."""
        at = None if key is None else position(key)

        def route(topology: Topology) -> OneShard:
            return OneShard(topology.named(str(name)).id if at is None else topology.ring.owner_at(at))

        if read_from == "primary":
            (shard_id,) = self.shards.provision(route).shards
            return self.shards.connection(shard_id)
        readers = self.replicas(read_from)
        (shard_id,) = readers.provision(route).shards
        return readers.lent(shard_id)

    @property
    def connection_callable(self) -> Any:  # type: ignore[override]
        """For a flush: the connection of each instance. SQLAlchemy's bulk operations want none, on a pinned shard."""
        return None if self._pinned is not None else self._connection_for_instance

    def _connection_for_instance(self, mapper: Any = None, instance: Any = None, **_: Any) -> Any:
        routed = self.routed.ask(instance)
        if routed is None:  # a reference or home table: the statement itself says where it runs
            return self._everywhere.dispatch
        return self.provision_position(routed.position, routed.tables)

    def rehome(self, instance: object, key: Any) -> None:
        """Give a persistent instance, whose row nothing refers to, another shard key: the row is deleted where it lives
        and inserted where it belongs, at once.

        Not in mode "single". After a rollback the instance is transient. Raises `CrossShardWrite`, `UnroutableQuery`
        where rows could refer to it or its id carries a slot, `KeyTypeError`, and what a flush raises.
        """
        rehoming.rehome(self, instance, key)

    @contextmanager
    def pinned(self, engine: Engine) -> Iterator[None]:
        """SQLAlchemy's bulk operations run on one shard in the block; nothing may be flushed in it."""
        self._pinned = engine
        try:
            with self.no_autoflush:
                yield
        finally:
            self._pinned = None

    def bulk_save_objects(self, *_: Any, **__: Any) -> None:
        """Refused: use ``add_all``, or ``execute(insert(Entity), rows)``."""
        _refuse_legacy("bulk_save_objects")

    def bulk_insert_mappings(self, *_: Any, **__: Any) -> None:
        """Refused: use ``execute(insert(Entity), rows)``."""
        _refuse_legacy("bulk_insert_mappings")

    def bulk_update_mappings(self, *_: Any, **__: Any) -> None:
        """Refused: use ``execute(update(Entity), rows)``."""
        _refuse_legacy("bulk_update_mappings")

    # --- bulk ------------------------------------------------------------------------------------------------------

    if not TYPE_CHECKING:  # the types are the base class's

        def execute(self, statement: Executable, params: Any = None, **options: Any) -> Any:
            """As SQLAlchemy's; rows of a bulk operation go each to its own shard."""
            if bulk.is_bulk(statement, params):
                return bulk.execute(self, super().execute, statement, params, options)
            return super().execute(statement, params, **options)

        def scalars(self, statement: Executable, params: Any = None, **options: Any) -> Any:
            """As SQLAlchemy's."""
            if bulk.is_bulk(statement, params):
                return bulk.execute(self, super().execute, statement, params, options).scalars()
            return super().scalars(statement, params, **options)

        def scalar(self, statement: Executable, params: Any = None, **options: Any) -> Any:
            """As SQLAlchemy's."""
            if bulk.is_bulk(statement, params):
                return bulk.execute(self, super().execute, statement, params, options).scalar()
            return super().scalar(statement, params, **options)


def _refuse_bind() -> NoReturn:
    raise UnroutableQuery(
        "A session over shards runs on no other bind.",
        hint="Use `session.connection(key=...)` or `shard=...`.",
    )


def _refuse_unnamed(what: object) -> NoReturn:
    raise UnroutableQuery(
        f"{what} names no shard.", hint="Give `session.connection(key=...)` a shard key, or `shard=` a name."
    )


def _refuse_legacy(name: str) -> NoReturn:
    raise UnroutableQuery(
        f"{name} is a legacy operation of SQLAlchemy that a session over shards does not have.",
        hint="Use add_all(instances), or execute(insert(Entity), rows) and execute(update(Entity), rows).",
    )


@event.listens_for(ShardSession, "before_flush")
def _before_flush(session: ShardSession, *_: Any) -> None:
    provision_flush(session)


@event.listens_for(ShardSession, "after_flush")
def _after_flush(session: ShardSession, *_: Any) -> None:
    session.routed.end()


@event.listens_for(ShardSession, "after_transaction_create")
def _route_associations(session: ShardSession, transaction: SessionTransaction) -> None:
    """A flush asks its own transaction for a connection where it writes an association table, whose rows it has no
    instances of: each of them is routed as the statement that it is."""
    if transaction.origin is not SessionTransactionOrigin.SUBTRANSACTION:
        return
    connection = transaction.connection

    def routed(bindkey: Any, execution_options: Any = None, **arguments: Any) -> Any:
        if session._flushing and session._pinned is None and not arguments:
            return session._everywhere.dispatch
        return connection(bindkey, execution_options, **arguments)

    transaction.connection = routed  # type: ignore[method-assign]


@event.listens_for(ShardSession, "after_transaction_end")
def _forget(session: ShardSession, transaction: SessionTransaction) -> None:
    if transaction.parent is None:
        session._shards = session._replicas = None


class ShardAsyncSession(AsyncSession):
    """The same for asyncio."""

    sync_session_class = ShardSession
    sync_session: ShardSession

    async def rehome(self, instance: object, key: Any) -> None:
        """As on the sync session."""
        await greenlet_spawn(self.sync_session.rehome, instance, key)

    async def connection(
        self,
        bind_arguments: Any = None,
        execution_options: Any = None,
        *,
        key: Any = None,
        shard: str | None = None,
        read_from: ReadFrom | None = None,
        **options: Any,
    ) -> AsyncConnection:
        """As on the sync session."""
        if key is not None:
            bind_arguments = {**(bind_arguments or {}), "key": key}
        if shard is not None:
            bind_arguments = {**(bind_arguments or {}), "shard": shard}
        if read_from is not None:
            bind_arguments = {**(bind_arguments or {}), "read_from": read_from}
        return await super().connection(bind_arguments, execution_options, **options)
