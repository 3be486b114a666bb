"""`shardkit shard set-url`: a shard whose server moved, or whose standby took over, at another URL."""

from __future__ import annotations

import signal

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import BigInteger
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

import shardkit
from shardkit.core.topology import ShardedTable
from shardkit.dev import Cluster, Clusters, Standby
from shardkit.rebalance.preflight import ALLOW_FSYNC_OFF
from shardkit.storage import membership
from shardkit.storage.connections import connect
from tests.acceptance.conftest import Program
from tests.fix_backups import BackUp
from tests.fix_postgres import FreshDatabase, NewCluster
from tests.fix_shards import MakeShards, Shards, fill, owner_of
from tests.movers import run_forked

USERS = 100


class Base(DeclarativeBase):
    pass


@shardkit.sharded(by="id")
class User(Base):
    __tablename__ = "users"

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    name: Mapped[str]
    n: Mapped[int] = mapped_column(default=0)


@pytest.fixture
def two(make_shards: MakeShards, monkeypatch: pytest.MonkeyPatch, call: Program) -> Shards:
    """Two shards of which the first owns everything; their catalog is in the environment."""
    shards = make_shards(2)
    fill(shards.on("s1"), USERS)
    monkeypatch.setenv("SHARDKIT_CATALOG", shards.catalog_url)
    return shards


def rename(servers: Clusters, shards: Shards, name: str, new: str) -> str:
    """Give the database of a shard another name, as if its server had moved; its URL now."""
    connection = shards.on(name)
    old, socket = connection.info.dbname, connection.info.host
    connection.close()
    server: Cluster = next(each for each in servers if str(each.socket_dir) == socket)
    before, after = sql.Identifier(old), sql.Identifier(new)
    with connect(server.url()) as postgres:
        postgres.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS false").format(before))
        postgres.execute(
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = %s", (old,)
        )
        postgres.execute(sql.SQL("ALTER DATABASE {} RENAME TO {}").format(before, after))
        postgres.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS true").format(after))
    return server.url(new)


def test_a_standby_that_took_over(
    new_cluster: NewCluster,
    fresh_database: FreshDatabase,
    call: Program,
    program: Program,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(ALLOW_FSYNC_OFF, "1")
    catalog = fresh_database(0)
    monkeypatch.setenv("SHARDKIT_CATALOG", catalog)
    primary = new_cluster()
    old = primary.create_database("app")
    call("init").ok()
    call("shard", "add", "one", old).ok()
    call("shard", "add", "two", fresh_database(1), "--no-run").ok()
    with Standby(primary) as standby, shardkit.connect(catalog) as cluster:
        cluster.create_all(Base.metadata)
        sessions = cluster.sessionmaker()
        with sessions.begin() as session:
            session.add(User(id=1, name="x"))
        standby.catch_up()
        new = standby.url("app")
        listed = call("shard", "replica", "one", new, "--json").ok().document
        call("shard", "set-url", "one", new).failed(3, "is a standby", "promoted first")
        call("shard", "set-url", "two", new).failed(3, "is shard 'one'")
        call("shard", "set-url", "one", fresh_database(2)).failed(3, "is no shard")
        call("shard", "set-url", "three", new).failed(3, "There is no shard 'three'")
        call("shard", "set-url", "one", "postgresql://host").failed(2, "names no database")

        standby.catch_up()
        with psycopg.connect(standby.conninfo(), autocommit=True) as connection:
            connection.execute("SELECT pg_promote()")
        call("shard", "set-url", "one", new).failed(
            3, "another database takes writes as this shard", "Stop the server at the old URL"
        )
        primary.kill()
        done = program("shard", "set-url", "one", new, "--json").ok().document
        assert done == {
            "version": listed["version"] + 1,
            "shard": "one",
            "url": listed["replicas"][0],
            "behind": False,
            "unreachable": [],
            "next": "`shardkit rebalance run` gives every shard its share; `shardkit rebalance plan` shows what would "
            "move.",
        }
        shards = call("shard", "list", "--json").ok().document["shards"]
        assert [shard["replicas"] for shard in shards] == [[], []]
        again = call("shard", "set-url", "one", new).ok()
        assert call("shard", "list", "--json").ok().document["version"] == done["version"], again
        # It has known the old URL alone.
        with sessions.begin() as session:
            session.get_one(User, 1).n += 1
        call("doctor").ok()
        call("rebalance", "run", "--yes").ok()
        with sessions() as session:
            assert session.get_one(User, 1).n == 1


@pytest.mark.parametrize("point", ["copying.poll", "closing.committed:2", "opening.committed:2"])
def test_in_the_middle_of_a_job(two: Shards, servers: Clusters, call: Program, point: str) -> None:
    """The database that gives keys away moves while nobody carries the job; what was decided stays decided."""
    run = ("rebalance", "run", "--yes")
    assert run_forked("command", two.catalog_url, point, arguments=run) == -signal.SIGKILL
    url = rename(servers, two, "s1", f"moved_{two.on('s1').info.dbname}")
    assert call("rebalance", "resume", "--patience", "1").code in (3, 5)
    set_url = call("shard", "set-url", "s1", url, "--json").ok().document
    assert (set_url["behind"], set_url["next"].split()[0]) == (False, "`shardkit")
    call("rebalance", "resume").ok()
    call("verify").ok()
    two.assert_clean()
    assert sum(map(len, two.rows(two.tables[1]).values())) == USERS


def test_while_a_source_is_kept(two: Shards, servers: Clusters, call: Program) -> None:
    """What is written on the target that moved goes on to flow back."""
    call("rebalance", "run", "--yes", "--keep-source").ok()
    url = rename(servers, two, "s2", f"moved_{two.on('s2').info.dbname}")
    done = call("shard", "set-url", "s2", url, "--json").ok().document
    assert "rebalance finalize" in done["next"]
    with shardkit.connect(two.catalog_url) as cluster, cluster.sessionmaker()() as session:
        for key in (key for key in range(1, USERS + 1) if owner_of(two.topology(), key) == "s2"):
            session.get_one(User, key).n = 7
            session.commit()
    call("rebalance", "rollback").ok()
    two.assert_clean()
    (rows, moved) = (two.rows(two.tables[1])[name] for name in ("s1", "s2"))
    assert (len(rows), moved) == (USERS, [])
    assert any(row[2] == 7 for row in rows)


def test_another_name_of_the_same_database(two: Shards, call: Program) -> None:
    url = two.topology().named("s2").url
    call("shard", "set-url", "s1", url).failed(2, "This is the URL of shard s2")
    mine = two.topology().named("s1").url
    other = f"{mine}{'&' if '?' in mine else '?'}application_name=other"
    assert "other" in call("shard", "set-url", "s1", other).ok().out
    call("doctor").ok()


def test_one_that_is_behind_is_readmitted_at_its_new_url(
    two: Shards, servers: Clusters, call: Program, back_up: BackUp
) -> None:
    """It keeps the copy that tells what it held, whatever is recorded until it is brought forward."""
    backup = back_up(two, "s1")
    two.move()
    backup.restore()
    two.on("s1").close()
    url = rename(servers, two, "s1", f"restored_{two.on('s1').info.dbname}")
    done = call("shard", "set-url", "s1", url, "--json").ok().document
    assert done["behind"] is True
    assert done["next"].startswith("`shardkit shard readmit s1`")
    call("shard", "readmit", "s1", "--yes").ok()
    call("verify", "--repair", "--yes").ok()
    two.assert_clean()
    with shardkit.connect(two.catalog_url) as cluster, cluster.sessionmaker()() as session:
        assert {owner_of(two.topology(), key) for key in range(1, USERS + 1)} == {"s1", "s2"}
        assert all(session.get(User, key) is not None for key in range(1, USERS + 1))


def test_a_shard_that_is_behind_keeps_its_copy(two: Shards, call: Program, back_up: BackUp) -> None:
    """Tables are declared while nobody has noticed."""
    backup = back_up(two, "s1")
    two.move()
    backup.restore()
    for name in ("s1", "s2"):
        two.on(name).execute("CREATE TABLE public.visits (user_id bigint PRIMARY KEY)")
    with two.writer() as (catalog, connections):
        membership.declare(catalog, connections, [ShardedTable("public", "visits", "user_id", "int")])
    call("shard", "readmit", "s1", "--yes").ok()
    call("verify", "--repair", "--yes").ok()
    two.assert_clean()
