"""Three servers with a proxy before each, two shards and a catalog on them, applications at work, and movers: what the
crash matrix needs, made once for many cases.

Applications reach the servers directly; movers, and the targets that copy from a source, by the proxies. Both use the
same URLs: a service file says where a server is, and each process has its own.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

import shardkit
from shardkit.core.keyrange import ArcSet
from shardkit.core.move import Phase
from shardkit.core.topology import Topology
from shardkit.dev import Clusters
from shardkit.rebalance.preflight import ALLOW_FSYNC_OFF
from shardkit.storage import membership
from shardkit.storage.catalog import Catalog
from shardkit.storage.connections import ShardConnections, connect
from tests import applications
from tests.applications import Applications, Failure
from tests.fix_shards import Shards
from tests.movers import RETRY_LATER, STOPPED, Movers
from tests.proxy import CLIENT, Proxy
from tests.sharded import until

SERVERS = ("one", "two", "catalog")
CATALOG = "postgresql:///catalog?service=catalog"
ACCOUNTS = 1500
WATCHDOG = 300.0
"""Seconds after which a mover is killed, which fails the case. A busy machine may make it wait long for a moment."""
BLOCKED = 2.5
"""Seconds of a network that passes nothing: longer than a server waits for a mover in a transaction."""
LONG = 6.0
"""Seconds in which a subscription would be revived more often than a mover does it in a row."""
ADMINISTRATIVE_LOCKS = """
SELECT l.pid FROM pg_locks l
WHERE l.locktype = 'advisory' AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""


class World:
    """Everything; `close` it in the end. Whatever a case leaves that it should not makes the world unfit for others."""

    def __init__(self, folder: Path) -> None:
        self.servers = dict(zip(SERVERS, clusters := Clusters(3), strict=True))
        self._clusters = clusters
        self._patch = pytest.MonkeyPatch()
        clusters.start()
        self.proxies = {
            name: Proxy(server.socket_dir / f".s.PGSQL.{server.port}")
            for name, server in self.servers.items()
        }
        self._patch.setenv("PGPASSFILE", str(clusters[0].passfile))
        self._patch.setenv("PGSERVICEFILE", str(folder / "direct.conf"))
        self._patch.setenv(ALLOW_FSYNC_OFF, "1")
        self._write_services(folder)
        self.movers = Movers(folder, {"PGSERVICEFILE": str(folder / "proxied.conf")})
        self._make_cluster()
        self.cluster = shardkit.connect(CATALOG)
        self.cluster.create_all(applications.Base.metadata)
        self.shards = Shards(CATALOG, _no_database, tables=self.topology.tables)
        for name in ("one", "two"):
            self.shards.on(name)
        self.applications = Applications(self.cluster, range(-5, ACCOUNTS), seed=1)
        self.applications.load()

    def _write_services(self, folder: Path) -> None:
        direct, proxied = [], []
        for name, server in self.servers.items():
            direct.append(f"[{name}]\nhost={server.socket_dir}\nport={server.port}\nuser={server.user}\n")
            port = self.proxies[name].port
            proxied.append(f"[{name}]\nhost=127.0.0.1\nport={port}\nuser={server.user}\nsslmode=disable\n")
        (folder / "direct.conf").write_text("".join(direct))
        (folder / "proxied.conf").write_text("".join(proxied))

    def _make_cluster(self) -> None:
        self.servers["catalog"].create_database("catalog")
        membership.initialise(CATALOG)
        with Catalog.open(CATALOG) as catalog, ShardConnections("shardkit tests") as shards:
            catalog.take_lease()
            for name in ("one", "two"):
                self.servers[name].create_database("app")
                membership.join(catalog, shards, name=name, url=f"postgresql:///app?service={name}")

    def begin(self) -> None:
        """Let the applications work, and move once, so that every case begins with rows on both shards."""
        self.applications.start()
        self.act("move", weights={0: 1, 1: 1})
        self.check(allowed=lambda failure: False)

    def close(self) -> None:
        """End everything."""
        for proxy in self.proxies.values():
            proxy.heal()
        self.movers.__exit__(None, None, None)
        if self.applications.is_alive():
            self.applications.stop()
        self.cluster.dispose()
        for connection in self.shards._open.values():
            connection.close()
        for proxy in self.proxies.values():
            proxy.close()
        self._clusters.close()
        self._patch.undo()

    # --- the cluster -----------------------------------------------------------------------------------------------

    @property
    def topology(self) -> Topology:
        """What the catalog holds."""
        with Catalog.open(CATALOG) as catalog:
            current = catalog.current()
        assert current is not None
        return current

    def next_weights(self) -> tuple[dict[int, int], str, str]:
        """Weights that move a part of the keys, with the names of the source and the target."""
        topology = self.topology
        first, second = topology.shards
        if topology.owned(first.id).width > topology.owned(second.id).width:
            return {first.id: 4, second.id: 5}, first.name, second.name
        return {first.id: 5, second.id: 4}, second.name, first.name

    def moves_of_last_job(self) -> tuple[str, list[tuple[int, ArcSet, Phase]]]:
        """State of the last job; targets, arcs and phases of its transfers."""
        with Catalog.open(CATALOG) as catalog:
            job = catalog.latest_job()
            assert job is not None
            rows = catalog.transfers(job.id)
        return job.state, [(row.target, row.arcs, row.phase) for row in rows]

    def has_work(self) -> bool:
        """Whether a job is unfinished, or a change pending."""
        with Catalog.open(CATALOG) as catalog:
            job = catalog.running_job()
            return catalog.proposed() is not None or (job is not None and not catalog.is_kept(job))

    def keeps_sources(self) -> bool:
        """Whether a job waits to be finalised or rolled back."""
        with Catalog.open(CATALOG) as catalog:
            job = catalog.running_job()
            return job is not None and catalog.is_kept(job)

    # --- movers ----------------------------------------------------------------------------------------------------

    def wait(self) -> str | int:
        """What becomes of the mover under way; one that does not come to an end is killed."""
        movers = self.movers
        late = threading.Timer(WATCHDOG, movers.signal, [signal.SIGKILL])
        late.start()
        try:
            return movers.wait()
        finally:
            late.cancel()

    def act(self, what: str, **options: Any) -> None:
        """A mover that comes to its end; one that is to try again later does."""
        deadline = time.monotonic() + WATCHDOG
        while True:
            self.movers.start(what, CATALOG, **options)
            code = self.wait()
            if code == 0:
                return
            assert code == RETRY_LATER, f"{what} ended with {code}: {self.movers.said}"
            assert time.monotonic() < deadline, f"{what} comes to no end: {self.movers.said}"
            time.sleep(0.05)

    def until_stopped(self, what: str, point: str, **options: Any) -> None:
        """A mover that stands at a point."""
        self.movers.start(what, CATALOG, point=f"{point}=stop", **options)
        code = self.wait()
        assert code == STOPPED, f"{what} never passed {point} and ended with {code}: {self.movers.said}"

    def until_killed(self, what: str, point: str, **options: Any) -> None:
        """A mover that was killed at a point."""
        self.movers.start(what, CATALOG, point=point, **options)
        code = self.wait()
        assert code == -signal.SIGKILL, (
            f"{what} never passed {point} and ended with {code}: {self.movers.said}"
        )

    # --- outages ---------------------------------------------------------------------------------------------------

    def crash(self, name: str) -> None:
        """Kill a server while the mover stands, let that go on, and start the server again."""
        self.servers[name].kill()
        self.movers.signal(signal.SIGCONT)
        self.servers[name].start()

    def cut(self, *names: str, kind: str = CLIENT, seconds: float = 0.5) -> None:
        """Reset the connections to servers for a while."""
        with self._failing(kind, names, Proxy.cut):
            self.movers.signal(signal.SIGCONT)
            time.sleep(seconds)

    def blackhole(self, *names: str, kind: str = CLIENT, seconds: float = 0.7) -> None:
        """Let nothing pass for a while, to servers and from them."""
        with self._failing(kind, names, Proxy.blackhole):
            self.movers.signal(signal.SIGCONT)
            time.sleep(seconds)

    def mute(self) -> None:
        """Let everything arrive at the servers and no answer come back; then all connections are lost."""
        with self._failing(CLIENT, SERVERS, Proxy.mute):
            self.movers.signal(signal.SIGCONT)
            time.sleep(0.3)
            for proxy in self.proxies.values():
                proxy.cut(CLIENT)
            time.sleep(0.1)

    @contextmanager
    def _failing(self, kind: str, names: Any, fail: Callable[[Proxy, str], None]) -> Iterator[None]:
        for name in names:
            fail(self.proxies[name], kind)
        try:
            yield
        finally:
            for name in names:
                self.proxies[name].heal()

    # --- what has to be true afterwards ----------------------------------------------------------------------------

    def check(self, allowed: Callable[[Failure], bool]) -> None:
        """Every acknowledged write is there once, and nothing else; nothing of the move is left; no client met an
        error but those ``allowed``."""
        self.applications.pause()
        failures = [failure for failure in self.applications.take_failures() if not allowed(failure)]
        assert not failures, f"clients met {failures}"
        self.applications.check(applications.states_of(self._rows()))
        for name in SERVERS:
            until(partial(self._unlocked, name), f"no lock of a mover is left on {name}", 5.0)
        self.shards.assert_clean()
        self._forget_outages()
        self.applications.go_on()

    def _forget_outages(self) -> None:
        """All servers are up: what clients have learned of one that was not is nothing to the next case."""
        for engines in (self.cluster.engines, self.cluster.async_engines):
            for shard in self.topology.shards:
                engines.breaker(shard).succeeded()

    def _rows(self) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}
        for table in self.shards.tables:
            query = sql.SQL("SELECT * FROM {}").format(sql.Identifier(table.schema, table.name))
            found[table.name] = [
                row for name in ("one", "two") for row in self.shards.on(name).execute(query)
            ]
        return found

    def _unlocked(self, name: str) -> bool:
        url = CATALOG if name == "catalog" else f"postgresql:///app?service={name}"
        with connect(url) as connection:
            return connection.execute(ADMINISTRATIVE_LOCKS).fetchone() is None

    @contextmanager
    def holding_table(self, name: str) -> Iterator[Callable[[], None]]:
        """A transaction that has written "Account" on a shard and stays open; yields what ends it."""
        with connect(f"postgresql:///app?service={name}", application="long transaction") as connection:
            connection.execute('BEGIN; LOCK TABLE public."Account" IN ROW EXCLUSIVE MODE')

            def end() -> None:
                with suppress(psycopg.OperationalError):  # its server may have been killed
                    connection.execute("ROLLBACK")

            yield end
            end()


def _no_database(*_: Any, **__: Any) -> str:
    raise AssertionError("the databases of this cluster are there")
