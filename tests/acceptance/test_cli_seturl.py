"""`shardkit shard set-url`: a shard whose server moved, or whose standby took over, at another URL."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import BigInteger
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

import shardkit
from shardkit.core.topology import ShardedTable
from shardkit.dev import Cluster, Clusters, Standby
from shardkit.rebalance.addresses import is_away
from shardkit.rebalance.preflight import ALLOW_FSYNC_OFF
from shardkit.storage import membership
from shardkit.storage.connections import connect
from tests.acceptance.conftest import USERS, Program
from tests.fix_backups import BackUp
from tests.fix_postgres import FreshDatabase, NewCluster
from tests.fix_shards import SCHEMA, Shards, owner_of
from tests.movers import run_forked


class Base(DeclarativeBase):
    pass


@shardkit.sharded(by="id")
class User(Base):
    __tablename__ = "users"

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    name: Mapped[str]
    n: Mapped[int] = mapped_column(default=0)


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
        call("shard", "set-url", f"one={new}").failed(3, "is a standby", "promoted first")
        call("shard", "set-url", f"two={new}").failed(3, "is shard 'one'")
        call("shard", "set-url", f"one={fresh_database(2)}").failed(3, "is no shard")
        call("shard", "set-url", f"three={new}").failed(3, "There is no shard 'three'")
        call("shard", "set-url", "one=postgresql://host").failed(2, "names no database")
        call("shard", "set-url", new).failed(2, "Not NAME=URL")
        call("shard", "set-url", f"one={new}", f"one={new}").failed(2, "named twice")

        standby.catch_up()
        with psycopg.connect(standby.conninfo(), autocommit=True) as connection:
            connection.execute("SELECT pg_promote()")
        call("shard", "set-url", f"one={new}").failed(
            3, "another database takes writes as this shard", "Stop the server at the old URL"
        )
        primary.kill()
        done = program("shard", "set-url", f"one={new}", "--json").ok().document
        assert done == {
            "version": listed["version"] + 1,
            "shards": [{"shard": "one", "url": listed["replicas"][0], "behind": False}],
            "unreachable": [],
            "next": "`shardkit rebalance run` gives every shard its share; `shardkit rebalance plan` shows what would "
            "move.",
        }
        shards = call("shard", "list", "--json").ok().document["shards"]
        assert [shard["replicas"] for shard in shards] == [[], []]
        again = call("shard", "set-url", f"one={new}").ok()
        assert call("shard", "list", "--json").ok().document["version"] == done["version"], again
        # It has known the old URL alone.
        with sessions.begin() as session:
            session.get_one(User, 1).n += 1
        call("doctor").ok()
        call("rebalance", "run", "--yes").ok()
        with sessions() as session:
            assert session.get_one(User, 1).n == 1


@pytest.mark.parametrize(
    ("point", "moved"),
    [
        ("copying.poll", ["s1"]),
        ("closing.committed:2", ["s1"]),
        ("closing.committed:2", ["s1", "s2"]),
        ("opening.committed:2", ["s2"]),
    ],
)
def test_in_the_middle_of_a_job(
    two: Shards, servers: Clusters, call: Program, point: str, moved: list[str]
) -> None:
    """Databases move while nobody carries the job; what was decided stays decided."""
    run = ("rebalance", "run", "--yes")
    assert run_forked("command", two.catalog_url, point, arguments=run) == -signal.SIGKILL
    urls = {name: rename(servers, two, name, f"moved_{two.on(name).info.dbname}") for name in moved}
    if point == "copying.poll":
        # It cannot connect to its publisher; that alone disables no subscription.
        for (name,) in two.on("s2").execute("SELECT subname FROM pg_subscription").fetchall():
            two.on("s2").execute(sql.SQL("ALTER SUBSCRIPTION {} ENABLE").format(sql.Identifier(name)))
    assert call("rebalance", "resume", "--patience", "1").code in (3, 5)
    done = call("shard", "set-url", *(f"{name}={url}" for name, url in urls.items()), "--json").ok().document
    assert [(each["shard"], each["behind"]) for each in done["shards"]] == [(name, False) for name in moved]
    call("rebalance", "resume").ok()
    call("verify").ok()
    two.assert_clean()
    assert sum(map(len, two.rows(two.tables[1]).values())) == USERS


def test_a_way_back_begins_though_the_opening_was_left_to_it(
    two: Shards, servers: Clusters, call: Program
) -> None:
    run = ("rebalance", "run", "--yes", "--keep-source")
    point = "cutting over.before opening"
    assert run_forked("command", two.catalog_url, point, arguments=run) == -signal.SIGKILL
    url = rename(servers, two, "s2", f"moved_{two.on('s2').info.dbname}")
    call("shard", "set-url", f"s2={url}").ok()
    call("rebalance", "resume").ok()
    call("rebalance", "rollback").ok()
    two.assert_clean()
    assert len(two.rows(two.tables[1])["s1"]) == USERS


def test_a_source_takes_writes_again_though_the_opening_was_left_to_it(
    two: Shards, servers: Clusters, call: Program
) -> None:
    call("rebalance", "run", "--yes", "--keep-source").ok()
    back = ("rebalance", "rollback")
    assert run_forked("command", two.catalog_url, "closing.committed", arguments=back) == -signal.SIGKILL
    url = rename(servers, two, "s2", f"moved_{two.on('s2').info.dbname}")
    call("shard", "set-url", f"s2={url}").ok()
    with shardkit.connect(two.catalog_url) as cluster, cluster.sessionmaker()() as session:
        for key in range(1, USERS + 1):
            session.get_one(User, key).n = 7
            session.commit()
    call("rebalance", "resume").ok()
    two.assert_clean()


def test_while_a_source_is_kept(two: Shards, servers: Clusters, call: Program) -> None:
    """What is written on the target that moved goes on to flow back."""
    call("rebalance", "run", "--yes", "--keep-source").ok()
    url = rename(servers, two, "s2", f"moved_{two.on('s2').info.dbname}")
    done = call("shard", "set-url", f"s2={url}", "--json").ok().document
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


def test_a_way_back_is_found_though_the_command_was_killed(
    two: Shards, servers: Clusters, call: Program
) -> None:
    call("rebalance", "run", "--yes", "--keep-source").ok()
    url = rename(servers, two, "s2", f"moved_{two.on('s2').info.dbname}")
    arguments = ("shard", "set-url", f"s2={url}")
    assert run_forked("command", two.catalog_url, "change.proposed", arguments=arguments) == -signal.SIGKILL
    call("rebalance", "rollback", "--patience", "20").ok()
    two.assert_clean()
    assert len(two.rows(two.tables[1])["s1"]) == USERS


@pytest.mark.parametrize(
    ("said", "away"),
    [
        ('connection failed: connection to server at "10.0.0.1", port 5432 failed: Connection refused', True),
        ('connection to server on socket "/x/.s.PGSQL.5432" failed: No such file or directory', True),
        ("connection timeout expired", True),
        ("failed to resolve host 'gone': [Errno -2] Name or service not known", True),
        ('connection to server at "a", port 1 failed: FATAL:  database "app" does not exist', True),
        ('connection to server at "a", port 1 failed: fe_sendauth: no password supplied', False),
        ('connection to server at "a", port 1 failed: FATAL:  sorry, too many clients already', False),
        ('connection to server at "a", port 1 failed: SSL error: certificate verify failed', False),
        (
            'connection to server at "a" failed: FATAL:  sorry\nconnection to server at "b" failed: Connection refused',
            False,
        ),
    ],
)
def test_which_words_say_that_no_server_is_there(said: str, away: bool) -> None:
    assert is_away(said) is away


def test_a_joining_that_was_proposed(
    two: Shards, servers: Clusters, fresh_database: FreshDatabase, call: Program
) -> None:
    url = fresh_database(2)
    with connect(url) as connection:
        connection.execute(SCHEMA)
    add = ("shard", "add", "s3", url, "--no-run")
    assert run_forked("command", two.catalog_url, "change.proposed", arguments=add) == -signal.SIGKILL
    with connect(url) as connection:
        two._open["s3"] = connection
        moved = rename(servers, two, "s3", f"moved_{connection.info.dbname}")
        del two._open["s3"]
    call("shard", "set-url", f"s3={moved}").ok()
    assert [shard.name for shard in two.topology().shards] == ["s1", "s2", "s3"]
    call("doctor").ok()


def test_an_old_server_that_may_take_writes(two: Shards, servers: Clusters, call: Program) -> None:
    """It answers, and lets nobody in."""
    first, second = (_copy(servers, two, "s1", name) for name in ("first_copy", "second_copy"))
    old = two.on("s1").info.dbname
    server = next(each for each in servers if str(each.socket_dir) == two.on("s1").info.host)
    try:
        with connect(server.url()) as postgres:
            postgres.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS false").format(sql.Identifier(old)))
        call("shard", "set-url", f"s1={first}").failed(
            3, "a server answers that does not let us see", "--old-stopped"
        )
        # What is only proposed may take writes, too.
        arguments = ["shard", "set-url", f"s1={first}", "--old-stopped"]
        point = "change.proposed"
        assert run_forked("command", two.catalog_url, point, arguments=arguments) == -signal.SIGKILL
        call("shard", "set-url", f"s1={second}", "--old-stopped").failed(
            3, "another database takes writes as this shard"
        )
        call("shard", "set-url", f"s1={first}", "--old-stopped").ok()
        call("doctor").ok()
    finally:
        with connect(server.url()) as postgres:
            postgres.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS true").format(sql.Identifier(old)))
        two.on("s1").close()
        for name in ("first_copy", "second_copy"):
            server.drop_database(name)


def _copy(servers: Clusters, shards: Shards, name: str, new: str) -> str:
    """A copy of the database of a shard, as it is; its URL."""
    connection = shards.on(name)
    old, socket = connection.info.dbname, connection.info.host
    connection.close()
    server = next(each for each in servers if str(each.socket_dir) == socket)
    server.create_database(new, old)
    return server.url(new)


def test_a_standby_at_the_old_url_is_not_read(
    new_cluster: NewCluster,
    fresh_database: FreshDatabase,
    folder: Path,
    call: Program,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An application that knows that URL alone asks where the shard is."""
    monkeypatch.setenv("PGSERVICEFILE", str(folder / "services.conf"))
    catalog = fresh_database(0)
    monkeypatch.setenv("SHARDKIT_CATALOG", catalog)
    primary = new_cluster()

    def serve(server: Cluster) -> None:
        where = f"host={server.socket_dir}\nport={server.port}\nuser={server.user}\n"
        (folder / "services.conf").write_text(f"[one]\n{where}")

    new = primary.create_database("app")
    serve(primary)
    call("init").ok()
    call("shard", "add", "one", "postgresql:///app?service=one").ok()
    with Standby(primary) as standby, shardkit.connect(catalog) as cluster:
        cluster.create_all(Base.metadata)
        another = shardkit.connect(catalog)
        sessions = cluster.sessionmaker()
        with sessions.begin() as session:
            session.add(User(id=1, name="x"))
        standby.catch_up()
        standby.pause()
        call("shard", "set-url", f"one={new}").ok()
        with connect(new) as connection:
            connection.execute("UPDATE public.users SET n = 100")
            connection.execute(
                "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity "
                "WHERE datname = 'app' AND pid <> pg_backend_pid()"
            )
        serve(standby)
        with sessions() as session:
            assert session.get_one(User, 1).n == 100
        assert asyncio.run(read_async(another)) == 100
        another.dispose()


async def read_async(cluster: shardkit.ShardCluster) -> int:
    async with cluster.async_sessionmaker()() as session:
        found = (await session.get_one(User, 1)).n
    await cluster.adispose()
    return found


def test_another_name_of_the_same_database(two: Shards, call: Program) -> None:
    url = two.topology().named("s2").url
    call("shard", "set-url", f"s1={url}").failed(2, "This is the URL of shard s2")
    mine = two.topology().named("s1").url
    other = f"{mine}{'&' if '?' in mine else '?'}application_name=other"
    assert "other" in call("shard", "set-url", f"s1={other}").ok().out
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
    done = call("shard", "set-url", f"s1={url}", "--json").ok().document
    assert done["shards"][0]["behind"] is True
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
