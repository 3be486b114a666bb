"""The proxy of the tests fails as it says."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import psycopg
import pytest

from shardkit.dev import Clusters
from tests.proxy import CLIENT, PEER, Proxy


@pytest.fixture
def proxy(servers: Clusters) -> Iterator[Proxy]:
    made = Proxy(servers[0].socket_dir / f".s.PGSQL.{servers[0].port}")
    yield made
    made.close()


@pytest.fixture
def conninfo(servers: Clusters, proxy: Proxy) -> str:
    return f"{servers[0].conninfo()} host=127.0.0.1 port={proxy.port} sslmode=disable connect_timeout=10"


def test_it_passes_everything(proxy: Proxy, conninfo: str) -> None:
    with psycopg.connect(conninfo) as connection:
        row = connection.execute("SELECT repeat('x', 1000000)").fetchone()
        assert proxy.connections(CLIENT) == 1
    assert row == ("x" * 1_000_000,)


def test_a_cut_resets_and_refuses(proxy: Proxy, conninfo: str) -> None:
    connection = psycopg.connect(conninfo)
    proxy.cut(CLIENT)
    with pytest.raises(psycopg.OperationalError):
        connection.execute("SELECT 1")
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(conninfo)
    proxy.heal()
    psycopg.connect(conninfo).close()
    connection.close()


@pytest.mark.parametrize("arrives", [False, True])
def test_what_a_blackhole_holds_back_arrives_when_it_heals(
    servers: Clusters, proxy: Proxy, conninfo: str, arrives: bool
) -> None:
    connection = psycopg.connect(conninfo, autocommit=True)
    answers: list[object] = []
    (proxy.mute if arrives else proxy.blackhole)(CLIENT)
    asking = threading.Thread(
        target=lambda: answers.append(connection.execute("SELECT pg_advisory_lock(4711)").fetchone())
    )
    asking.start()
    held = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = 4711"
    with psycopg.connect(servers[0].conninfo(), autocommit=True) as direct:
        asking.join(0.2)
        while arrives and direct.execute(held).fetchone() == (0,):
            asking.join(0.01)
        assert asking.is_alive()
        assert direct.execute(held).fetchone() == (int(arrives),)
        proxy.heal()
        asking.join(10)
        assert direct.execute(held).fetchone() == (1,)
    assert answers == [("",)]
    connection.close()


def test_the_way_between_servers_fails_alone(proxy: Proxy, conninfo: str) -> None:
    with (
        psycopg.connect(conninfo, autocommit=True) as client,
        psycopg.connect(f"{conninfo} replication=database", autocommit=True) as peer,
    ):
        assert (proxy.connections(CLIENT), proxy.connections(PEER)) == (1, 1)
        proxy.cut(PEER)
        assert client.execute("SELECT 1").fetchone() == (1,)
        with pytest.raises(psycopg.OperationalError):
            peer.execute("IDENTIFY_SYSTEM")
