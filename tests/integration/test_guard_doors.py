"""Whatever would reach a shard without its fence is refused, and leaves nothing open."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from sqlalchemy import create_engine, select, text
from sqlalchemy.orm import Session

import shardkit
from shardkit.core.errors import UnguardedStatement, UnroutableQuery, UsageError
from shardkit.storage.dialect import DRIVER
from shardkit.storage.urls import sqlalchemy_url
from tests.sharded import Post, ShardedCluster, User


@pytest.fixture
def engine(sharded: ShardedCluster, cluster: shardkit.ShardCluster) -> Any:
    engine = cluster.engines.shard(sharded.topology.named("s0"))
    # The first connection asks the server what it is; that door is shut again afterwards.
    with cluster.sessionmaker()() as session:
        session.connection(shard="s0").execute(text("SELECT 1"))
        session.commit()
    return engine


def test_a_transaction_of_the_engine(engine: Any) -> None:
    with engine.connect() as connection, pytest.raises(UnguardedStatement):
        connection.execute(text("SELECT 1"))
    with pytest.raises(UnguardedStatement), engine.begin():
        pass


def test_a_plain_session_on_the_engine(engine: Any) -> None:
    with Session(engine) as session, pytest.raises(UnguardedStatement):
        session.execute(select(User))


def test_two_phase_of_a_plain_session(engine: Any) -> None:
    with Session(engine, twophase=True) as session, pytest.raises(UnguardedStatement):
        session.execute(select(User))


def test_two_phase_of_the_session(cluster: shardkit.ShardCluster) -> None:
    with pytest.raises(UsageError, match="twophase"):
        cluster.sessionmaker(twophase=True)()


def test_autocommit(engine: Any) -> None:
    with engine.connect() as connection, pytest.raises(UnguardedStatement):
        connection.execution_options(isolation_level="AUTOCOMMIT")


def test_autocommit_of_the_session(sharded: ShardedCluster, cluster: shardkit.ShardCluster) -> None:
    (key,) = sharded.keys("s0", 1)
    Session = cluster.sessionmaker(execution_options={"isolation_level": "AUTOCOMMIT"})
    with Session() as session, pytest.raises(UnguardedStatement):
        session.get(User, key)


def test_autocommit_of_the_cluster(sharded: ShardedCluster) -> None:
    with pytest.raises(UsageError):
        sharded.connect(isolation_level="AUTOCOMMIT")


RAW: dict[str, Callable[[psycopg.Connection[Any]], Any]] = {
    "execute": lambda raw: raw.execute("SELECT 1"),
    "cursor": lambda raw: raw.cursor().execute("SELECT 1"),
    "server-side cursor": lambda raw: _by_server_cursor(raw),
    "executemany": lambda raw: raw.cursor().executemany("SELECT %s", [(1,), (2,)]),
    "stream": lambda raw: list(raw.cursor().stream("SELECT 1")),
    "copy": lambda raw: raw.cursor().copy("COPY (SELECT 1) TO STDOUT").__enter__(),
    "another cursor class": lambda raw: psycopg.ClientCursor(raw).execute("SELECT 1"),
    "pipeline": lambda raw: _in_pipeline(raw),
    "transaction": lambda raw: raw.transaction().__enter__(),
    "autocommit": lambda raw: setattr(raw, "autocommit", True),
    "set_autocommit": lambda raw: raw.set_autocommit(True),
    "tpc_begin": lambda raw: raw.tpc_begin("x"),
    "tpc_commit": lambda raw: raw.tpc_commit("x"),
    "tpc_rollback": lambda raw: raw.tpc_rollback("x"),
    "tpc_recover": lambda raw: raw.tpc_recover(),
    "TypeInfo": lambda raw: psycopg.types.TypeInfo.fetch(raw, "hstore"),
}


def _by_server_cursor(raw: psycopg.Connection[Any]) -> None:
    with raw.cursor("named") as cursor:
        cursor.execute("SELECT 1")


def _in_pipeline(raw: psycopg.Connection[Any]) -> None:
    with raw.pipeline():
        raw.execute("SELECT 1")


@pytest.mark.parametrize("door", RAW)
def test_a_raw_connection(engine: Any, door: str) -> None:
    connection = engine.raw_connection()
    raw = connection.driver_connection
    with pytest.raises(UnguardedStatement):
        RAW[door](raw)
    assert raw.pgconn.transaction_status == psycopg.pq.TransactionStatus.IDLE
    connection.close()


@pytest.mark.parametrize("door", ["transaction", "autocommit", "tpc_begin", "tpc_commit", "tpc_rollback"])
def test_a_raw_connection_inside_the_transaction(cluster: shardkit.ShardCluster, door: str) -> None:
    with cluster.sessionmaker()() as session:
        raw: Any = session.connection(shard="s0").connection.driver_connection
        with pytest.raises(UnguardedStatement):
            RAW[door](raw)


@pytest.mark.parametrize(
    "command",
    ["COMMIT", "ROLLBACK", "BEGIN", "START TRANSACTION", "END", "ABORT", "COMMIT AND CHAIN", "ROLLBACK AND CHAIN",
     "PREPARE TRANSACTION 'x'", "COMMIT PREPARED 'x'", "SELECT 1; COMMIT; SELECT 2", "/* */ commit -- and go on"],
)  # fmt: skip
@pytest.mark.parametrize("how", ["text", "driver", "raw", "raw bytes", "raw composed"])
def test_transaction_commands_as_text(cluster: shardkit.ShardCluster, command: str, how: str) -> None:
    with cluster.sessionmaker()() as session:
        connection = session.connection(shard="s0")
        raw: Any = connection.connection.driver_connection
        run: dict[str, Callable[[], Any]] = {
            "text": lambda: connection.execute(text(command)),
            "driver": lambda: connection.exec_driver_sql(command),
            "raw": lambda: raw.execute(command),
            "raw bytes": lambda: raw.execute(command.encode()),
            "raw composed": lambda: raw.execute(psycopg.sql.SQL(command)),
        }
        with pytest.raises(UnguardedStatement):
            run[how]()
        assert connection.execute(text("SELECT 1")).scalar() == 1


def test_transaction_commands_by_a_cursor_class_of_the_application(sharded: ShardedCluster) -> None:
    arguments = {"cursor_factory": psycopg.ClientCursor}
    with sharded.connect(connect_args=arguments) as cluster, cluster.sessionmaker()() as session:
        connection = session.connection(shard="s0")
        with pytest.raises(UnguardedStatement):
            connection.exec_driver_sql("SELECT 1; COMMIT")
        assert connection.exec_driver_sql("SELECT %s::text", ("'; COMMIT; --",)).scalar() == "'; COMMIT; --"


def test_a_transaction_ended_behind_the_back_lets_nothing_through(cluster: shardkit.ShardCluster) -> None:
    with cluster.sessionmaker()() as session:
        connection = session.connection(shard="s0")
        raw: Any = connection.connection.driver_connection
        raw.pgconn.exec_(b"COMMIT")
        with pytest.raises(UnguardedStatement):
            connection.execute(text("SELECT 1"))


def test_a_connection_without_a_shard(cluster: shardkit.ShardCluster) -> None:
    with cluster.sessionmaker()() as session, pytest.raises(UnroutableQuery):
        session.connection()


def test_legacy_bulk_operations(cluster: shardkit.ShardCluster) -> None:
    with cluster.sessionmaker()() as session:
        with pytest.raises(UnroutableQuery):
            session.bulk_save_objects([User(id=1, name="x")])
        with pytest.raises(UnroutableQuery):
            session.bulk_insert_mappings(User, [{"id": 1, "name": "x"}])
        with pytest.raises(UnroutableQuery):
            session.bulk_update_mappings(User, [{"id": 1, "name": "x"}])


def test_a_session_with_a_bind(cluster: shardkit.ShardCluster) -> None:
    plain = create_engine("postgresql+psycopg://")
    with pytest.raises(UsageError):
        cluster.sessionmaker(bind=plain)()


@pytest.mark.parametrize("mode", ["twophase", "", None])
def test_a_mode_that_there_is_not(cluster: shardkit.ShardCluster, mode: Any) -> None:
    with pytest.raises(UsageError, match="best_effort"):
        cluster.sessionmaker(mode=mode)()


def test_an_engine_made_by_hand(sharded: ShardedCluster) -> None:
    engine = create_engine(sqlalchemy_url(sharded.topology.named("s0").url).set(drivername=DRIVER))
    try:
        with engine.connect() as connection, pytest.raises(UnguardedStatement):
            connection.execute(text("SELECT 1"))
    finally:
        engine.dispose()


def test_pre_ping_is_let_through(sharded: ShardedCluster) -> None:
    (key,) = sharded.keys("s0", 1)
    with sharded.connect(pool_pre_ping=True, pool_size=1) as cluster:
        Session = cluster.sessionmaker()
        for _ in range(2):
            with Session() as session:
                assert session.get(User, key) is None


async def test_the_async_doors(sharded: ShardedCluster, async_cluster: shardkit.ShardCluster) -> None:
    (key,) = sharded.keys("s0", 1)
    async with async_cluster.async_sessionmaker()() as session:
        connection = await session.connection(key=key)
        raw: Any = (await connection.get_raw_connection()).driver_connection
        assert await connection.scalar(text("SELECT 1")) == 1
        for command in ("COMMIT", "SELECT 1; ROLLBACK"):
            with pytest.raises(UnguardedStatement):
                await connection.execute(text(command))
            with pytest.raises(UnguardedStatement):
                await raw.execute(command)
        with pytest.raises(UnguardedStatement):
            raw.transaction()
        with pytest.raises(UnguardedStatement):
            await raw.set_autocommit(True)
        with pytest.raises(UnguardedStatement):
            await raw.tpc_begin("x")
        await session.rollback()
        assert await session.get(User, key) is None
        raw.pgconn.exec_(b"ROLLBACK")
        with pytest.raises(UnguardedStatement):
            await raw.execute("SELECT 1")
        async with raw.cursor("named") as cursor:
            with pytest.raises(UnguardedStatement):
                await cursor.execute("SELECT 1")
        with pytest.raises(UnguardedStatement):
            await session.scalars(select(Post).where(Post.user_id == key))
