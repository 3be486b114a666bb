"""The guard: what a transaction holds, what it waits for, and what it leaves behind when it is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from uuid import uuid4

import pytest
from psycopg import sql
from psycopg.types.json import Jsonb
from sqlalchemy import create_engine, insert, select, text
from sqlalchemy.exc import DBAPIError

import shardkit
from shardkit.core.errors import IncompatibleServer, ShardUnreachable, TopologyUnsettled
from shardkit.core.topology import Fence, Topology
from shardkit.storage.connections import Connection, connect
from shardkit.storage.dialect import DRIVER, behind
from shardkit.storage.guard import Guard, StaleFence
from shardkit.storage.identity import ShardIdentity
from shardkit.storage.scope import Scope
from shardkit.storage.urls import sqlalchemy_url
from tests.sharded import ShardedCluster, User, until

HELD = """
SELECT c.relname, l.mode FROM pg_locks l JOIN pg_class c ON c.oid = l.relation
WHERE c.relnamespace = 'shardkit'::regnamespace AND l.granted AND l.pid = %s
"""
WAITING = """
SELECT a.query_start FROM pg_locks l JOIN pg_class c ON c.oid = l.relation JOIN pg_stat_activity a ON a.pid = l.pid
WHERE c.relnamespace = 'shardkit'::regnamespace AND NOT l.granted
"""


@pytest.fixture
def key(sharded: ShardedCluster) -> int:
    """A user on s0."""
    (key,) = sharded.keys("s0", 1)
    sharded.admin("s0").execute("INSERT INTO public.users (id, name, score) VALUES (%s, 'x', 0)", (key,))
    return key


@contextmanager
def closed(sharded: ShardedCluster, name: str) -> Iterator[Connection]:
    """A transaction of somebody who has a shard's fence in ACCESS EXCLUSIVE mode."""
    shard = sharded.topology.named(name)
    with connect(shard.url) as connection, connection.transaction():
        lock = sql.SQL("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE")
        connection.execute(lock.format(sql.Identifier("shardkit", shard.fence.relation)))
        yield connection


def test_the_fence_is_held_to_the_end(
    sharded: ShardedCluster, cluster: shardkit.ShardCluster, key: int
) -> None:
    with cluster.sessionmaker()() as session:
        connection = session.connection(key=key)
        pid = connection.execute(text("SELECT pg_backend_pid()")).scalar()
        fence = sharded.topology.named("s0").fence.relation
        assert sharded.query("s0", HELD, pid) == [(fence, "AccessShareLock")]
        with session.begin_nested() as nested:
            session.get(User, key)
            nested.rollback()
        assert sharded.query("s0", HELD, pid) == [(fence, "AccessShareLock")]
        session.commit()
        assert sharded.query("s0", HELD, pid) == []


def test_the_guard_of_a_shard_first_used_in_a_savepoint_outlives_it(
    sharded: ShardedCluster, cluster: shardkit.ShardCluster, key: int
) -> None:
    with cluster.sessionmaker()() as session:
        with session.begin_nested() as nested:
            pid = session.connection(key=key).execute(text("SELECT pg_backend_pid()")).scalar()
            nested.rollback()
        assert len(sharded.query("s0", HELD, pid)) == 1


@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
def test_the_isolation_level_is_that_of_the_application(
    cluster: shardkit.ShardCluster, key: int, level: str
) -> None:
    options = {"isolation_level": level, "postgresql_readonly": True, "postgresql_deferrable": True}
    with cluster.sessionmaker(execution_options=options)() as session:
        shown = session.connection(key=key).execute(
            text(
                "SELECT current_setting('transaction_isolation'), current_setting('transaction_read_only'), "
                "current_setting('transaction_deferrable')"
            )
        )
        assert tuple(shown.one()) == (level.lower(), "on", "on")
        assert session.get_one(User, key).name == "x"


def test_an_isolation_level_of_the_cluster(sharded: ShardedCluster, key: int) -> None:
    with sharded.connect(isolation_level="REPEATABLE READ") as cluster, cluster.sessionmaker()() as session:
        level = session.connection(key=key).execute(text("SHOW transaction_isolation")).scalar()
    assert level == "repeatable read"


def test_pipelines_executemany_and_server_side_cursors_run_inside(
    sharded: ShardedCluster, cluster: shardkit.ShardCluster, key: int
) -> None:
    with cluster.sessionmaker()() as session:
        connection = session.connection(key=key)
        raw: Any = connection.connection.driver_connection
        with raw.pipeline(), raw.cursor() as cursor:
            cursor.execute("UPDATE public.users SET score = 1 WHERE id = %s", (key,))
            cursor.executemany(
                "UPDATE public.users SET score = score + %s WHERE id = %s", [(1, key), (2, key)]
            )
        with raw.cursor("named") as cursor:
            assert cursor.execute("SELECT score FROM public.users WHERE id = %s", (key,)).fetchall() == [(4,)]
        with raw.cursor().copy("COPY public.posts (user_id, id, caption) FROM STDIN") as copy:
            copy.write_row((key, 1, "copied"))
        statement = select(User.score).where(User.id == key).execution_options(stream_results=True)
        assert session.scalars(statement).all() == [4]
        session.commit()
    assert sharded.query("s0", "SELECT score FROM public.users") == [(4,)]
    assert sharded.query("s0", "SELECT caption FROM public.posts") == [("copied",)]


# --- refused ---------------------------------------------------------------------------------------------------------


def test_a_stale_fence_passes_through_sqlalchemy_and_leaves_nothing(
    sharded: ShardedCluster, cluster: shardkit.ShardCluster
) -> None:
    engine = cluster.engines.shard(sharded.topology.named("s0"))
    shard = sharded.topology.named("s0")
    guard = Guard(cluster.engines.identity(shard), Fence(1, "0" * 8), Scope("single"), deadline=0.0)
    with pytest.raises(StaleFence) as refused, behind(guard), engine.connect() as connection:
        connection.execute(text("SELECT 1"))
    assert refused.value.copy == sharded.topology
    assert not guard.scope.participants
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    assert sharded.query("s0", HELD.replace("l.pid = %s", "l.pid <> pg_backend_pid()")) == []
    assert until(lambda: not _in_transaction(sharded, "s0"), "the connection is idle")


def _in_transaction(sharded: ShardedCluster, name: str) -> list[tuple[Any, ...]]:
    return sharded.query(
        name,
        "SELECT pid, query FROM pg_stat_activity WHERE datname = current_database() AND state ~ 'transaction'",
    )


# --- impatient roles -------------------------------------------------------------------------------------------------


@pytest.fixture
def role(sharded: ShardedCluster) -> Iterator[dict[str, str]]:
    """A role with no rights but on the application's tables; the arguments to connect as it."""
    name = f"app_{uuid4().hex[:8]}"
    for shard in sharded.topology.shards:
        admin = sharded.admin(shard.name)
        admin.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'secret'").format(sql.Identifier(name)))
        grant = sql.SQL("GRANT SELECT, INSERT, UPDATE, DELETE ON public.users, public.posts TO {}")
        admin.execute(grant.format(sql.Identifier(name)))
    yield {"user": name, "password": "secret"}
    for shard in sharded.topology.shards:
        admin = sharded.admin(shard.name)
        admin.execute(sql.SQL("DROP OWNED BY {}").format(sql.Identifier(name)))
        admin.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(name)))


def _set(sharded: ShardedCluster, role: dict[str, str], setting: str, value: str) -> None:
    statement = sql.SQL("ALTER ROLE {} SET {} = {}")
    for shard in sharded.topology.shards:
        sharded.admin(shard.name).execute(
            statement.format(sql.Identifier(role["user"]), sql.Identifier(setting), sql.Literal(value))
        )


def _seen_more(seen: set[Any], sharded: ShardedCluster) -> set[Any]:
    """The moments at which a guard that waits on s0 was sent."""
    seen.update(sharded.query("s0", WAITING))
    return seen


@pytest.mark.parametrize("setting", ["lock_timeout", "statement_timeout"])
@pytest.mark.parametrize("moved", [False, True])
def test_a_role_with_its_own_timeout_waits_for_a_cutover(
    sharded: ShardedCluster, role: dict[str, str], key: int, setting: str, moved: bool
) -> None:
    _set(sharded, role, setting, "20ms")
    sharded_at = sharded.topology.named("s0").fence.relation

    def read() -> str:
        with cluster.sessionmaker()() as session:
            return session.get_one(User, key).name

    with sharded.connect(connect_args=role) as cluster, ThreadPoolExecutor(1) as thread:
        assert read() == "x"
        with closed(sharded, "s0") as connection:
            reading = thread.submit(read)
            seen: set[Any] = set()
            # Its LOCK was sent anew: the timeout of the role has passed at least twice.
            until(lambda: len(_seen_more(seen, sharded)) > 2, "the guard is tried again")
            if moved:
                rename = sql.SQL("ALTER TABLE {} RENAME TO {}")
                old, new = sql.Identifier("shardkit", sharded_at), sql.Identifier("elsewhere")
                connection.execute(rename.format(old, new))
        if moved:
            sharded.admin("s0").execute(
                rename.format(sql.Identifier("shardkit", "elsewhere"), sql.Identifier(sharded_at))
            )
        assert reading.result(20) == "x"


async def test_an_async_session_of_such_a_role_waits_too(
    sharded: ShardedCluster, role: dict[str, str], key: int
) -> None:
    _set(sharded, role, "lock_timeout", "20ms")
    cluster = sharded.connect(connect_args=role)

    async def read() -> str:
        async with cluster.async_sessionmaker()() as session:
            return (await session.get_one(User, key)).name

    assert await read() == "x"
    with closed(sharded, "s0"):
        reading = asyncio.create_task(read())
        seen: set[Any] = set()
        while len(_seen_more(seen, sharded)) < 3:  # noqa: ASYNC110 - the server changes it
            await asyncio.sleep(0.002)
        assert not reading.done()
    assert await reading == "x"
    await cluster.adispose()


def test_patience_ends(sharded: ShardedCluster, role: dict[str, str], key: int) -> None:
    _set(sharded, role, "lock_timeout", "20ms")
    with (
        sharded.connect(connect_args=role, settle_seconds=0.3) as cluster,
        cluster.sessionmaker()() as session,
    ):
        with closed(sharded, "s0"), pytest.raises(TopologyUnsettled, match="s0"):
            session.get(User, key)
        assert session.get_one(User, key).name == "x"


def test_a_role_needs_no_more_than_select(sharded: ShardedCluster, role: dict[str, str], key: int) -> None:
    with sharded.connect(connect_args=role) as cluster, cluster.sessionmaker()() as session:
        session.get_one(User, key).name = "by the role"
        session.commit()
    assert sharded.query("s0", "SELECT name FROM public.users") == [("by the role",)]


# --- lost and wrong servers ------------------------------------------------------------------------------------------


def _kill(sharded: ShardedCluster, name: str) -> None:
    sharded.query(
        name,
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid() AND application_name = 'shardkit'",
    )


def test_a_pooled_connection_that_died_is_replaced(
    sharded: ShardedCluster, cluster: shardkit.ShardCluster, key: int
) -> None:
    Session = cluster.sessionmaker()
    with Session() as one, Session() as other:
        one.get(User, key)
        other.get(User, key)
    _kill(sharded, "s0")
    for _ in range(3):
        with Session() as session:
            assert session.get_one(User, key).name == "x"


async def test_a_pooled_connection_of_an_async_session_too(
    sharded: ShardedCluster, async_cluster: shardkit.ShardCluster, key: int
) -> None:
    Session = async_cluster.async_sessionmaker()
    async with Session() as session:
        await session.get(User, key)
    _kill(sharded, "s0")
    async with Session() as session:
        assert (await session.get_one(User, key)).name == "x"


def test_a_connection_that_died_after_the_guard_is_an_error(
    sharded: ShardedCluster, cluster: shardkit.ShardCluster, key: int
) -> None:
    with cluster.sessionmaker()() as session:
        session.get(User, key)
        _kill(sharded, "s0")
        with pytest.raises(ShardUnreachable, match="s0"):
            session.scalars(select(User).where(User.id == key)).all()
        session.rollback()
        assert session.get_one(User, key).name == "x"


def test_a_server_that_does_not_answer(sharded: ShardedCluster, cluster: shardkit.ShardCluster) -> None:
    topology = sharded.topology
    away = topology.named("s0")
    (key,), (other,) = sharded.keys("s0", 1), sharded.keys("s1", 1)
    document = topology.to_json()
    document["shards"][0]["url"] = "postgresql://postgres@127.0.0.1:1/nowhere"
    cluster.router._topology = type(topology).from_json(document)
    with cluster.sessionmaker()() as session:
        with pytest.raises(ShardUnreachable, match=away.name) as raised:
            session.get(User, key)
        assert raised.value.retryable
        assert session.get(User, other) is None


def test_a_server_that_has_gone_elsewhere(
    sharded: ShardedCluster, cluster: shardkit.ShardCluster, key: int
) -> None:
    """The topology is read again before a shard is reported unreachable."""
    (moving,) = sharded.keys("s1", 1)
    sharded.move_key(moving)  # so that there is an older topology
    document = sharded.topology.to_json()
    document["version"] -= 1
    for shard in document["shards"]:
        shard["fence"][0] = min(shard["fence"][0], document["version"])
    document["shards"][0]["url"] = "postgresql://postgres@127.0.0.1:1/nowhere"
    cluster.router._topology = Topology.from_json(document)
    with cluster.sessionmaker()() as session:
        assert session.get_one(User, key).name == "x"


def test_a_database_that_is_another_shard(sharded: ShardedCluster, cluster: shardkit.ShardCluster) -> None:
    document = sharded.topology.to_json()
    first, second = document["shards"][0], document["shards"][1]
    first["url"], second["url"] = second["url"], first["url"]
    cluster.router._topology = type(sharded.topology).from_json(document)
    with cluster.sessionmaker()() as session, pytest.raises(IncompatibleServer, match="is shard 's1'"):
        session.connection(shard="s0")


def test_a_database_of_another_catalog(sharded: ShardedCluster) -> None:
    url = sqlalchemy_url(sharded.topology.named("s0").url).set(drivername=DRIVER)
    engine = create_engine(url, shard=ShardIdentity(0, "s0", uuid4()))
    with pytest.raises(IncompatibleServer, match="catalog"):
        engine.connect()
    engine.dispose()


def test_a_database_that_became_another_shard(
    sharded: ShardedCluster, cluster: shardkit.ShardCluster, key: int
) -> None:
    """Found out by the next connection that the fence refuses; its copy, however new, is not believed."""
    with cluster.sessionmaker()() as session:
        session.get(User, key)
        session.commit()
        admin = sharded.admin("s0")
        ours = sharded.query("s0", "SELECT cluster_id FROM shardkit.shard")
        document = sharded.query(
            "s0", "SELECT document FROM shardkit.topology ORDER BY version DESC LIMIT 1"
        )[0][0]
        theirs = Jsonb({**document, "version": document["version"] + 100})
        relation = sharded.topology.named("s0").fence.relation
        rename = sql.SQL("ALTER TABLE shardkit.{} RENAME TO {}")
        admin.execute(rename.format(sql.Identifier(relation), sql.Identifier("elsewhere")))
        admin.execute("UPDATE shardkit.shard SET cluster_id = %s", (uuid4(),))
        admin.execute("UPDATE shardkit.topology SET version = version + 100, document = %s", (theirs,))
        try:
            before = cluster.topology
            with pytest.raises(IncompatibleServer, match="is shard 's0'"):
                session.get_one(User, key, populate_existing=True)
            assert cluster.topology is before
        finally:
            admin.execute("UPDATE shardkit.shard SET cluster_id = %s", ours[0])
            admin.execute(
                "UPDATE shardkit.topology SET version = version - 100, document = %s", (Jsonb(document),)
            )
            admin.execute(rename.format(sql.Identifier("elsewhere"), sql.Identifier(relation)))
        session.rollback()
        assert session.get_one(User, key).name == "x"


def test_a_catalog_that_became_another(sharded: ShardedCluster, cluster: shardkit.ShardCluster) -> None:
    with connect(sharded.catalog_url) as catalog:
        ours = catalog.execute("SELECT id FROM shardkit.cluster").fetchone()
        catalog.execute("UPDATE shardkit.cluster SET id = %s", (uuid4(),))
        try:
            assert cluster.engines.read_current() is None
        finally:
            catalog.execute("UPDATE shardkit.cluster SET id = %s", ours)
        assert cluster.engines.read_current() == sharded.topology


def test_a_database_that_is_no_shard(sharded: ShardedCluster) -> None:
    engine = create_engine(
        sqlalchemy_url(sharded.catalog_url).set(drivername=DRIVER), shard=ShardIdentity(0, "s0", None)
    )
    for _ in range(2):  # asked again by the next connection: one that was refused is not trusted
        with pytest.raises(IncompatibleServer, match="no shard"):
            engine.connect()
    engine.dispose()


def test_a_server_that_hashes_otherwise(
    sharded: ShardedCluster, cluster: shardkit.ShardCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardkit.storage.dialect.position", lambda key: 0)
    with cluster.sessionmaker()() as session, pytest.raises(IncompatibleServer, match="hashes otherwise"):
        session.connection(shard="s0")


def test_what_was_refused_leaves_the_session_usable(
    sharded: ShardedCluster, cluster: shardkit.ShardCluster, key: int
) -> None:
    with cluster.sessionmaker()() as session:
        with pytest.raises(DBAPIError):
            session.execute(insert(User), [{"id": key, "name": "twice", "score": 0}])
        session.rollback()
        assert session.get_one(User, key).name == "x"


def test_options_of_a_connection_count_where_it_is_opened(
    sharded: ShardedCluster, cluster: shardkit.ShardCluster, key: int
) -> None:
    (other,) = sharded.keys("s1", 1)
    level = text("SHOW transaction_isolation").execution_options(shardkit_writes=False)
    with cluster.sessionmaker()() as session:
        options = {"isolation_level": "SERIALIZABLE"}
        assert (
            session.connection(key=key, execution_options=options).execute(level).scalar() == "serializable"
        )
        assert session.connection(key=other).execute(level).scalar() == "read committed"
        session.commit()
        assert session.connection(key=key).execute(level).scalar() == "read committed"


def test_a_shard_whose_url_changed(sharded: ShardedCluster, cluster: shardkit.ShardCluster, key: int) -> None:
    """A transaction keeps the connection that it has; the next one takes the new URL."""

    def at(url: str) -> None:
        def make(before: Topology | None, version: int) -> Topology:
            assert before is not None
            shards = tuple(replace(one, url=url) if one.name == "s0" else one for one in before.shards)
            return replace(before, version=version, shards=shards)

        with sharded.lease() as catalog:
            sharded.change(catalog, make)

    application = text("SHOW application_name").execution_options(shardkit_writes=False)
    (moving,) = sharded.keys("s1", 1)
    before = sharded.topology.named("s0").url
    try:
        with cluster.sessionmaker()() as session:
            session.get_one(User, key).name = "written"
            session.flush()
            at(before + ("&" if "?" in before else "?") + "application_name=elsewhere")
            sharded.move_key(moving)
            assert session.get(User, moving) is None
            assert cluster.topology.named("s0").url != before
            assert session.connection(key=key).execute(application).scalar() == "shardkit"
            session.commit()
            assert session.connection(key=key).execute(application).scalar() == "elsewhere"
    finally:
        at(before)
    assert sharded.query("s0", "SELECT name FROM public.users") == [("written",)]
