"""The session's own ways: transactions, events, registries, SQL text, Core tables; over shards and on one database."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sqlalchemy import Integer, delete, event, func, insert, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session
from sqlalchemy.orm import scoped_session, with_loader_criteria

import shardkit
from shardkit.core.errors import CrossShardWrite, ScatterRefused, UnroutableQuery, UsageError
from tests.fix_sharded import InSession
from tests.fix_twins import Same
from tests.sharded import Post as SmallPost
from tests.sharded import ShardedCluster
from tests.sharded import User as SmallUser
from tests.twins import KEYS, File, Post, Twins, User, post_tags, sending

posts, users = Post.metadata.tables["post"], User.metadata.tables["User"]


# --- transactions --------------------------------------------------------------------------------------------------


def test_savepoints(same: Same) -> None:
    """Kept, rolled back and failed ones, over several shards."""

    def work(session: Any) -> Any:
        user, other = session.get_one(User, 8), session.get_one(User, 9)
        with session.begin_nested():
            user.name, other.name = "kept", "kept"
        nested = session.begin_nested()
        user.name, other.name = "undone", "undone"
        session.execute(update(User).values(rank=99))
        session.add(User(id=800, name="undone"))
        session.flush()
        nested.rollback()
        found = [user.name, other.name, user.rank, session.get(User, 800)]
        with pytest.raises(IntegrityError), session.begin_nested():
            session.execute(insert(User), [{"id": key, "name": "twice"} for key in (801, 802, 8)])
        with session.begin_nested(), session.begin_nested():
            session.add_all([User(id=key, name="new") for key in (801, 802, 803)])
        found += [session.scalar(select(func.count()).select_from(User)), session.get(User, 801).name]
        session.rollback()
        return [*found, user.name, session.scalars(select(User).order_by(User.id)).all()]

    same(work, mode="best_effort")


def test_the_connection_of_a_key(twins: Twins, in_shards: InSession) -> None:
    def work(session: Any) -> None:
        connection = session.connection(key=8)
        assert connection is session.connection(shard=twins.owner(8))
        assert connection is session.connection({"key": 8})
        session.get_one(User, 8).name = "seen"
        session.flush()
        assert connection.scalar(select(users.c.name).where(users.c.id == 8)) == "seen"
        with session.begin_nested():
            connection = session.connection(key=8)
            connection.execute(update(users).where(users.c.id == 8).values(name="within"))
        session.refresh(session.get_one(User, 8))
        assert session.get_one(User, 8).name == "within"
        for arguments in (
            {},
            {"bind_arguments": {"mapper": User}},
            {"bind_arguments": {"clause": select(User)}},
        ):
            with pytest.raises(UnroutableQuery, match="names no shard"):
                session.connection(**arguments)

    in_shards(work)


# --- events --------------------------------------------------------------------------------------------------------


def test_events(sharded: ShardedCluster, in_session: InSession) -> None:
    """In the order of one database, and each once."""
    key = sharded.keys("s1", 1)[0]

    def work(session: Any) -> list[str]:
        seen: list[str] = []

        @event.listens_for(session, "before_flush")
        def _before_flush(session: Any, context: Any, instances: Any) -> None:
            seen.append(f"before flush of {len(session.new)}")
            for one in list(session.new):
                if isinstance(one, SmallUser):
                    session.add(SmallPost(user_id=one.id, id=1, caption="by an event"))

        @event.listens_for(session, "after_flush")
        def _after_flush(session: Any, context: Any) -> None:
            seen.append(f"after flush of {len(session.new)}")

        for name in (
            "before_commit",
            "after_commit",
            "after_rollback",
            "after_soft_rollback",
            "after_flush_postexec",
        ):
            event.listen(session, name, lambda *_, name=name: seen.append(name))
        for name in ("pending_to_persistent", "loaded_as_persistent", "persistent_to_deleted"):
            event.listen(session, name, lambda *_, name=name: seen.append(name))
        session.add(SmallUser(id=key, name="x"))
        session.commit()
        session.expunge_all()
        session.delete(session.get_one(SmallUser, key))
        session.commit()
        session.get(SmallUser, key)
        session.rollback()
        return seen

    assert in_session(work) == [
        "before_commit",
        "before flush of 1",
        "after flush of 2",
        "pending_to_persistent",
        "pending_to_persistent",
        "after_flush_postexec",
        "after_commit",
        "loaded_as_persistent",
        "loaded_as_persistent",
        "before_commit",
        "before flush of 0",
        "after flush of 0",
        "persistent_to_deleted",
        "persistent_to_deleted",
        "after_flush_postexec",
        "after_commit",
        "after_rollback",
        "after_soft_rollback",
    ]


def test_statements_are_changed_by_events(same: Same) -> None:
    """`do_orm_execute` that adds criteria, replaces the statement, answers itself or asks again."""

    def work(session: Any) -> Any:
        @event.listens_for(session, "do_orm_execute")
        def _execute(state: Any) -> Any:
            if state.execution_options.get("answered"):
                return state.invoke_statement(statement=select(User.id).where(User.id == 4))
            if state.is_select and not state.is_column_load and not state.is_relationship_load:
                state.statement = state.statement.options(
                    with_loader_criteria(Post, Post.likes > 1, include_aliases=True),
                    with_loader_criteria(User, lambda cls: cls.rank != 0),
                )
            return None

        found = [
            session.scalars(select(User).order_by(User.id)).all(),
            session.execute(select(User.id, Post.id).join(User.posts).order_by(User.id, Post.id)).all(),
            session.scalar(select(func.count()).select_from(Post)),
            session.scalars(select(User.id), execution_options={"answered": True}).all(),
            [len(user.posts) for user in session.scalars(select(User).order_by(User.id))],
        ]
        likes = select(func.sum(Post.likes)).where(Post.user_id == User.id).scalar_subquery()
        statements: list[Any] = [
            select(User.id, User.posts.any()),
            select(User.id, likes),
            select(User.id).where(User.posts.any()),
            select(User.rank, func.count()).where(~User.posts.any()).group_by(User.rank),
            select(func.sum(likes)).select_from(User),
            select(User.id).where(User.rank.in_(select(Post.likes))),
        ]
        for least in (0, 3):
            found += [sorted(session.execute(statement.options(
                with_loader_criteria(Post, Post.id >= least),
                with_loader_criteria(User, User.rank > least),
            )).all(), key=str) for statement in statements]  # fmt: skip
        return found

    same(work)


# --- text ----------------------------------------------------------------------------------------------------------

NAME = text('SELECT name FROM "User" WHERE id = :id').execution_options(shardkit_writes=False)
OWNED = text('SELECT id, name FROM "User" WHERE shardkit.owned(id) AND rank = :rank').execution_options(
    shardkit_writes=False
)


def test_text_on_a_shard_that_is_named(twins: Twins, in_shards: InSession) -> None:
    expected = twins.plain(lambda session: session.scalar(select(User.name).where(User.id == 8)))

    def work(session: Any) -> None:
        with sending(session) as sent:
            assert session.scalar(NAME, {"id": 8}, bind_arguments={"key": 8}) == expected
            assert session.execute(NAME, {"id": 8}, bind_arguments={"shard": twins.owner(8)}).all() == [
                (expected,)
            ]
            entities = select(User).from_statement(text('SELECT * FROM "User" WHERE id = :id'))
            entities = entities.execution_options(shardkit_writes=False)
            user = session.scalars(entities, {"id": 8}, bind_arguments={"key": 8}).one()
            typed = text('SELECT rank FROM "User" WHERE id = 8').columns(rank=Integer)
            assert session.scalar(typed, bind_arguments={"key": 8}) == user.rank
            assert (
                session.scalar(select(func.current_database()), bind_arguments={"shard": "s2"}) == "twins_s2"
            )
        assert set(sent.shards("SELECT name")) == {twins.owner(8)}
        with pytest.raises(UnroutableQuery):
            session.execute(NAME, {"id": 8})
        with pytest.raises(UsageError):
            session.execute(NAME, {"id": 8}, bind_arguments={"key": 8, "scatter": True})
        with pytest.raises(UsageError):
            session.execute(NAME, {"id": 8}, bind_arguments={"key": 8, "shard": "s0"})

    in_shards(work)


def test_text_is_a_write_unless_it_says_that_it_is_none(twins: Twins, in_shards: InSession) -> None:
    first, second = (next(key for key in KEYS if twins.owner(key) == name) for name in ("s0", "s1"))
    rename = text('UPDATE "User" SET name = :name WHERE id = :id')

    def work(session: Any) -> None:
        session.execute(rename, {"name": "x", "id": first}, bind_arguments={"key": first})
        assert session.get_one(User, first).name == "x"
        assert session.scalar(NAME, {"id": second}, bind_arguments={"key": second}) != "x"
        with pytest.raises(CrossShardWrite):
            session.execute(rename, {"name": "x", "id": second}, bind_arguments={"key": second})

    in_shards(work)


def test_scattered_text(twins: Twins, in_shards: InSession) -> None:
    """It says which rows are owned, or is refused, at rest too."""
    expected = twins.plain(
        lambda session: session.execute(select(User.id, User.name).where(User.rank == 2)).all()
    )
    scattered = {"scatter": True}

    def work(session: Any) -> None:
        assert sorted(session.execute(OWNED, {"rank": 2}, bind_arguments=scattered).all()) == sorted(expected)
        entities = select(User).from_statement(OWNED).execution_options(shardkit_writes=False)
        found = session.scalars(entities, {"rank": 2}, bind_arguments=scattered).all()
        assert sorted((user.id, user.name) for user in found) == sorted(expected)
        with pytest.raises(UnroutableQuery, match=r"shardkit\.owned"):
            session.execute(text('SELECT id FROM "User"'), bind_arguments=scattered)
        with pytest.raises(UnroutableQuery, match="Only text"):
            session.execute(select(User), bind_arguments=scattered)
        with pytest.raises(ScatterRefused):
            session.execute(
                OWNED, {"rank": 2}, bind_arguments=scattered, execution_options={"scatter": "refuse"}
            )
        rename = text('UPDATE "User" SET name = name WHERE shardkit.owned(id)')
        with pytest.raises(CrossShardWrite):
            session.execute(rename, bind_arguments=scattered)

    in_shards(work)

    def write(session: Any) -> None:
        rename = text('UPDATE "User" SET name = :name WHERE shardkit.owned(id)')
        result = session.execute(rename, {"name": "all"}, bind_arguments=scattered)
        assert result.rowcount == len(KEYS)
        assert set(session.scalars(select(User.name))) == {"all"}

    in_shards(write, mode="best_effort")


def test_a_statement_of_declared_tables_is_not_sent_to_a_shard_that_is_named(
    twins: Twins, in_shards: InSession
) -> None:
    """It would load rows in transit as if they lived there."""

    def work(session: Any) -> None:
        for statement in (select(User), select(users.c.id), update(User).values(rank=1), delete(post_tags),
                          select(func.count()).where(select(Post).exists())):  # fmt: skip
            for arguments in ({"shard": "s1"}, {"key": 8}):
                with pytest.raises(UnroutableQuery, match="finds its shards itself"):
                    session.execute(statement, bind_arguments=arguments)

    in_shards(work)


# --- Core tables ---------------------------------------------------------------------------------------------------


def test_core_tables(same: Same) -> None:
    def work(session: Any) -> Any:
        other = posts.alias("other")
        joined = users.join(posts, users.c.id == posts.c.user_id)
        session.execute(posts.insert().values(user_id=8, id=9, title="core"))
        session.execute(posts.update().where(posts.c.user_id == 8).values(likes=7))
        session.execute(posts.delete().where(posts.c.user_id == 4))
        session.execute(users.insert(), [{"id": key, "name": "core"} for key in range(810, 820)])
        session.execute(users.update().where(users.c.id.in_([810, 811])).values(rank=users.c.id))
        return [
            session.execute(select(users).order_by(users.c.id)).all(),
            session.execute(select(joined).order_by(posts.c.user_id, posts.c.id))
            .mappings()
            .all()[0]["title"],
            session.execute(
                select(posts.c.id, other.c.id)
                .join(other, other.c.user_id == posts.c.user_id)
                .where(posts.c.user_id == 8)
                .order_by(posts.c.id, other.c.id)
            ).all(),
            session.scalar(select(func.count()).select_from(posts)),
            session.execute(
                select(users.c.rank, func.count()).group_by(users.c.rank).order_by(users.c.rank)
            ).all(),
            session.execute(posts.select().where(posts.c.likes == 7).order_by(posts.c.id)).all(),
        ]

    same(work, mode="best_effort")


# --- registries and factories --------------------------------------------------------------------------------------


def test_a_scoped_session(twins: Twins) -> None:
    with twins.sharded.connect() as cluster:
        registry = scoped_session(cluster.sessionmaker())
        assert registry.get(User, 8) is registry().get(User, 8)
        assert registry.scalar(select(func.count()).select_from(User)) == len(KEYS)
        statement = select(User).where(User.id == 8)
        assert shardkit.explain(registry, statement).shards == (twins.owner(8),)
        assert registry.connection({"key": 8}) is registry().connection(key=8)
        assert registry.query(User).filter_by(id=8).one().id == 8
        registry.remove()


async def test_an_async_scoped_session(twins: Twins) -> None:
    cluster = twins.sharded.connect()
    registry = async_scoped_session(cluster.async_sessionmaker(), scopefunc=asyncio.current_task)
    try:
        user = await registry.get_one(User, 8)
        assert await registry.scalar(select(User.name).where(User.id == 8)) == user.name
        await registry.refresh(user, ["posts"])
        assert [post.id for post in user.posts] == [0, 1, 2]
        assert shardkit.explain(registry, select(User).where(User.id == 8)).shards == (twins.owner(8),)
        await registry.remove()
    finally:
        await cluster.adispose()
        cluster.dispose()


async def test_the_async_session(twins: Twins) -> None:
    """What `AsyncSession` has beside ``run_sync``."""
    cluster = twins.sharded.connect()
    try:
        factory = cluster.async_sessionmaker(expire_on_commit=False)
        async with factory.begin() as session:
            assert isinstance(session, AsyncSession)
            user = await session.get_one(User, 8)
            found = await session.scalars(select(Post).where(Post.user_id == 8).order_by(Post.id))
            assert found.all() == await session.run_sync(lambda sync: sync.get_one(User, 8).posts)
            result = await session.stream(select(User.id).order_by(User.id).execution_options(yield_per=3))
            assert [row.id async for row in result] == KEYS
            streamed = await session.stream_scalars(select(User).where(User.id.in_(KEYS)).order_by(User.id))
            assert [one.id async for one in streamed] == KEYS
            async with session.begin_nested():
                user.name = "changed"
            await session.refresh(user)
            assert user.name == "changed"
            connection = await session.connection(key=8)
            sql = select(users.c.name).where(users.c.id == 8)
            assert await connection.scalar(sql) == "changed"
            merged = await session.merge(User(id=8, name="merged"))
            assert merged is user
            await session.delete(await session.get_one(File, (await session.scalars(
                select(File.id).where(File.user_id == 8))).first()))  # fmt: skip
            await session.flush()
            expected = 'SELECT name FROM "User" WHERE id = 8'
            reading = text(expected).execution_options(shardkit_writes=False)
            assert await session.scalar(reading, bind_arguments={"key": 8}) == "merged"
            await session.rollback()
    finally:
        await cluster.adispose()
        cluster.dispose()


def test_a_factory_that_begins(sharded: ShardedCluster) -> None:
    key = sharded.keys("s2", 1)[0]
    with sharded.connect() as cluster:
        factory = cluster.sessionmaker(expire_on_commit=False)
        with factory.begin() as session:
            session.add(SmallUser(id=key, name="begun"))
        with pytest.raises(UnroutableQuery), factory.begin() as session:  # noqa: PT012 - what was done before is undone
            session.get_one(SmallUser, key).name = "undone"
            session.flush()
            session.connection()
        with factory() as session, session.begin():
            assert session.get_one(SmallUser, key).name == "begun"


def test_criteria_of_closures(same: Same) -> None:
    """Each call's own values, in subqueries too."""

    def work(session: Any) -> Any:
        def at_least(least: int) -> list[Any]:
            statement = select(User.id, User.posts.any()).order_by(User.id)
            criteria = with_loader_criteria(Post, lambda cls: cls.likes >= least)
            return [*session.execute(statement.options(criteria)).all()]

        return [at_least(least) for least in (0, 2, 4)]

    same(work)
