"""The cluster as an application sees it: connect, make sessions, create and declare tables.

`connect` reads the topology once; from then on the sessions keep it current by themselves. It holds the engines, the
planner and the threads that the sessions share.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Self
from uuid import UUID

from sqlalchemy import MetaData, Table, create_engine
from sqlalchemy.engine import Dialect
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import sessionmaker
from sqlalchemy.pool import NullPool
from sqlalchemy.util.concurrency import greenlet_spawn

from shardkit.core.errors import NotInitialised, ShardkitError, ShardUnreachable, UsageError, no_shard_yet
from shardkit.core.topology import DeclaredTable, HomeTable, Topology
from shardkit.storage import membership
from shardkit.storage.breaker import FAILURES, SECONDS
from shardkit.storage.catalog import Catalog
from shardkit.storage.connections import ShardConnections, connect_catalog, value
from shardkit.storage.dialect import DRIVER
from shardkit.storage.engines import Engines
from shardkit.storage.idleases import IdLeases
from shardkit.storage.router import Router
from shardkit.storage.scope import Mode
from shardkit.storage.topologies import read_copy, read_current
from shardkit.storage.urls import sqlalchemy_url

from .declare import declared_table, declared_tables, problems, tables_of_shard
from .declared import Admitted, declares
from .ids import LEASES
from .places import Problem
from .planning.routing import Planner
from .scatterpolicy import Policy
from .session import ShardAsyncSession, ShardSession

SETTLE_SECONDS = 10.0

if TYPE_CHECKING:  # Python's own has defaults since 3.13
    from typing_extensions import TypeVar

    S = TypeVar("S", bound=ShardSession, default=ShardSession)
    A = TypeVar("A", bound=ShardAsyncSession, default=ShardAsyncSession)


class ShardCluster:
    """The shards of a catalog. One a process is enough; safe to share between threads, not across a fork."""

    def __init__(
        self,
        topology: Topology,
        catalog_url: str,
        *,
        cluster: UUID | None = None,
        settle_seconds: float = SETTLE_SECONDS,
        breaker_failures: int = FAILURES,
        breaker_seconds: float = SECONDS,
        engine_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.catalog_url = catalog_url
        self.settle_seconds = settle_seconds
        self.router = Router(topology)
        self.admitted = Admitted()
        self.ids = IdLeases(catalog_url)
        options = dict(engine_options or {})
        options["execution_options"] = {**options.get("execution_options", {}), LEASES: self.ids}
        self.engines, self.async_engines = (
            Engines(
                catalog_url,
                cluster=cluster,
                options=options,
                is_async=is_async,
                breaker_failures=breaker_failures,
                breaker_seconds=breaker_seconds,
            )
            for is_async in (False, True)
        )
        self.dialect: Dialect = create_engine(f"{DRIVER}://").dialect
        self.planner = Planner(self.dialect, ids=self.ids)
        self.workers = _workers()

    @property
    def topology(self) -> Topology:
        """The newest topology that this process has met."""
        return self.router.topology

    # --- sessions --------------------------------------------------------------------------------------------------

    def sessionmaker(
        self,
        *,
        class_: type[S] = ShardSession,  # type: ignore[assignment]  # the default of the type variable
        mode: Mode = "single",
        scatter: Policy = "allow",
        **options: Any,
    ) -> sessionmaker[S]:
        """A factory of sessions; ``options`` are SQLAlchemy's. ``mode`` and ``scatter``: see `ShardSession`, of which
        ``class_`` may be a subclass."""
        _check_class(class_, ShardSession)
        return sessionmaker(class_=class_, cluster=self, mode=mode, scatter=scatter, **options)

    def async_sessionmaker(
        self,
        *,
        class_: type[A] = ShardAsyncSession,  # type: ignore[assignment]
        mode: Mode = "single",
        scatter: Policy = "allow",
        **options: Any,
    ) -> async_sessionmaker[A]:
        """A factory of sessions for asyncio; ``class_`` may be a subclass of `ShardAsyncSession`."""
        _check_class(class_, ShardAsyncSession)
        _check_class(options.get("sync_session_class", class_.sync_session_class), ShardSession)
        return async_sessionmaker(
            class_=class_,
            cluster=self,
            engines=self.async_engines,
            mode=mode,
            scatter=scatter,
            **options,
        )

    # --- tables ----------------------------------------------------------------------------------------------------

    def check(self, metadata: MetaData) -> list[Problem]:
        """Everything in a MetaData that cannot work on shards, or works on each shard alone."""
        return problems(metadata)

    def create_all(self, metadata: MetaData, tables: Iterable[Table] | None = None) -> None:
        """Create the declared tables that are missing, on every shard, home tables on theirs, and declare them.

        All of a MetaData, or some of its tables. Raises `DeclarationError` before anything is created,
        `ShardUnreachable`, and what `declare` raises.
        """
        if tables is None:
            declared_tables(metadata)
        chosen = list(metadata.sorted_tables if tables is None else tables)
        wanted = {table: found for table in chosen if (found := declared_table(table)) is not None}
        self._refresh()
        homes = {found.shard for found in wanted.values() if isinstance(found, HomeTable)}
        for name in sorted(homes):
            self.topology.named(name)
        for shard in self.topology.shards:
            engine = create_engine(sqlalchemy_url(shard.url), poolclass=NullPool)
            try:
                metadata.create_all(engine, tables=tables_of_shard(wanted, shard.name))
            except OperationalError as error:
                raise ShardUnreachable(
                    f"Shard {shard.name} does not answer: {error.orig}".strip(), shard=shard.name
                ) from error
        self._declare(tuple(wanted.values()))

    def declare(self, metadata: MetaData) -> None:
        """Declare the tables, which exist where they belong; what is declared already stays as it is.

        Raises `DeclarationError`, `PreflightFailed`, `ShardNotEmpty`, and `LeaseHeld` or `JobRunning` while a move is
        at work and there is something new to declare.
        """
        self._declare(declared_tables(metadata))

    def _declare(self, tables: tuple[DeclaredTable, ...]) -> None:
        with Catalog.open(self.catalog_url) as catalog, ShardConnections("shardkit declare") as shards:
            current = catalog.current()
            if current is not None and declares(current, tables):
                self.router.adopt(current)
                return
            catalog.take_lease()
            self.router.adopt(membership.declare(catalog, shards, tables))

    def _refresh(self) -> None:
        with Catalog.open(self.catalog_url) as catalog:
            self.router.adopt(catalog.current())

    # --- the end ---------------------------------------------------------------------------------------------------

    def dispose(self) -> None:
        """Close the pools of the sync engines and the threads, and give the leases of ids back."""
        self.ids.release()
        self.engines.dispose()
        self.workers.shutdown()
        self.workers = _workers()

    async def adispose(self) -> None:
        """Close the pools of the async engines; in the event loop that used them."""
        await greenlet_spawn(self.async_engines.dispose)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.dispose()

    def __repr__(self) -> str:
        names = ", ".join(shard.name for shard in self.topology.shards)
        return f"<ShardCluster version {self.topology.version}: {names}>"


def _check_class(given: Any, wanted: type) -> None:
    """A session of another class would not know of shards, or only half."""
    if not issubclass(given, wanted):
        raise UsageError(
            f"{given.__name__} is no subclass of shardkit.{wanted.__name__}.",
            hint="Name shardkit's class among the bases of yours; of an async class, the `sync_session_class` too.",
        )


def _workers() -> ThreadPoolExecutor:
    """Threads in which a sync scatter waits for all shards but one; none runs before the first."""
    return ThreadPoolExecutor(max_workers=64, thread_name_prefix="shardkit-scatter")


def connect(
    url: str,
    *others: str,
    settle_seconds: float = SETTLE_SECONDS,
    breaker_failures: int = FAILURES,
    breaker_seconds: float = SECONDS,
    **engine_options: Any,
) -> ShardCluster:
    """The cluster of a catalog.

    ``url`` is the catalog's; ``others`` are URLs of shards, asked for their copy when the catalog does not answer.
    ``settle_seconds`` is how long a session waits for a change of topology to settle. A shard that did not answer
    ``breaker_failures`` times in a row is not asked, its keys fail at once, but for one try every ``breaker_seconds``.
    ``engine_options`` go to ``create_engine`` for each shard (``pool_size``, ``echo``, ...). Raises `UsageError`,
    `CatalogUnreachable`, `NotInitialised`.
    """
    if engine_options.get("isolation_level") == "AUTOCOMMIT":
        raise UsageError("Statements on shards run in transactions, never in autocommit.")
    problem: ShardkitError | None = None
    for candidate in (url, *others):
        try:
            topology, cluster = _read(candidate)
        except ShardkitError as error:
            problem = problem or error
            continue
        return ShardCluster(
            topology,
            url,
            cluster=cluster,
            settle_seconds=settle_seconds,
            breaker_failures=breaker_failures,
            breaker_seconds=breaker_seconds,
            engine_options=engine_options,
        )
    assert problem is not None
    raise problem


def _read(url: str) -> tuple[Topology, UUID]:
    """Topology and cluster, from a catalog or from a shard's copy."""
    with connect_catalog(url) as connection:
        if value(connection, "SELECT to_regclass('shardkit.topologies')") is not None:
            topology = read_current(connection)
            cluster = value(connection, "SELECT id FROM shardkit.cluster")
        elif value(connection, "SELECT to_regclass('shardkit.topology')") is not None:
            topology = read_copy(connection)
            cluster = value(connection, "SELECT cluster_id FROM shardkit.shard")
        else:
            raise NotInitialised
    if topology is None or cluster is None:
        raise no_shard_yet()
    return topology, cluster
