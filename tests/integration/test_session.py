"""The session over three shards: what an ORM user does every day."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from sqlalchemy import (
    BigInteger,
    Column,
    ForeignKey,
    Table,
    delete,
    event,
    func,
    insert,
    inspect,
    select,
    text,
    update,
)
from sqlalchemy.exc import DBAPIError, NoResultFound
from sqlalchemy.orm import DeclarativeBase, Mapped, joinedload, mapped_column, relationship, selectinload

import shardkit
from shardkit.core.errors import (
    DeclarationError,
    KeyTypeError,
    NoSuchShard,
    NotInitialised,
    UnroutableQuery,
    UsageError,
)
from shardkit.storage.connections import connect
from tests.fix_postgres import FreshDatabase
from tests.sharded import Base, Post, ShardedCluster, User, affected, until


@pytest.fixture
def keys(sharded: ShardedCluster) -> list[int]:
    """A user with two posts on each shard, by the session itself."""
    keys = [sharded.keys(name, 1)[0] for name in ("s0", "s1", "s2")]
    with sharded.connect() as cluster:
        for key in keys:
            with cluster.sessionmaker()() as session:
                posts = [Post(id=number, caption=f"post {number}") for number in (1, 2)]
                session.add(User(id=key, name=f"user {key}", score=key, posts=posts))
                session.commit()
    return keys


def test_rows_land_on_the_owner_of_their_key(sharded: ShardedCluster, keys: list[int]) -> None:
    for name, key in zip(("s0", "s1", "s2"), keys, strict=True):
        assert sharded.query(name, "SELECT id FROM public.users") == [(key,)]
        posts = sharded.query(name, "SELECT user_id, id FROM public.posts ORDER BY id")
        assert posts == [(key, 1), (key, 2)]


# --- reading ---------------------------------------------------------------------------------------------------------


def test_get(cluster: shardkit.ShardCluster, keys: list[int]) -> None:
    with cluster.sessionmaker()() as session:
        for key in keys:
            user = session.get(User, key)
            assert user is session.get_one(User, key)
            assert user.name == f"user {key}"
            assert session.get_one(Post, (key, 2)).user is user
        assert session.get(User, -1) is None
        with pytest.raises(NoResultFound):
            session.get_one(User, -1)


def test_identity_keys_hold_no_shard(cluster: shardkit.ShardCluster, keys: list[int]) -> None:
    with cluster.sessionmaker()() as session:
        for user in session.scalars(select(User)):
            assert inspect(user).identity_token is None


def test_select_by_key(cluster: shardkit.ShardCluster, keys: list[int]) -> None:
    with cluster.sessionmaker()() as session:
        for key in keys:
            assert session.scalar(select(User.name).where(User.id == key)) == f"user {key}"
            assert session.scalars(
                select(Post.id).where(Post.user_id == key).order_by(Post.id.desc())
            ).all() == [2, 1]
            joined = select(User.name, Post.id).join(Post, Post.user_id == User.id).where(User.id == key)
            assert len(session.execute(joined).all()) == 2


def test_a_statement_is_sent_to_one_shard_alone(
    sharded: ShardedCluster, cluster: shardkit.ShardCluster, keys: list[int]
) -> None:
    touched: list[str] = []
    for shard in cluster.topology.shards:
        engine = cluster.engines.shard(shard)
        event.listen(engine, "begin", lambda _, name=shard.name: touched.append(name))
    with cluster.sessionmaker()() as session:
        session.get(User, keys[1])
        session.commit()
        assert touched == ["s1"]
        session.scalars(select(User)).all()
    assert touched == ["s1", "s0", "s1", "s2"]


def test_loading_of_relationships(cluster: shardkit.ShardCluster, keys: list[int]) -> None:
    with cluster.sessionmaker()() as session:
        for key in keys:
            assert [post.id for post in session.get_one(User, key).posts] == [1, 2]
        session.expunge_all()
        for option in (selectinload(User.posts), joinedload(User.posts)):
            for key in keys:
                user = session.scalars(select(User).where(User.id == key).options(option)).unique().one()
                assert "posts" in inspect(user).dict
                assert [post.id for post in user.posts] == [1, 2]
            session.expunge_all()


def test_loading_for_instances_of_several_shards(cluster: shardkit.ShardCluster, keys: list[int]) -> None:
    """The second statement of a selectin load asks for all keys at once: each shard for its own."""
    with cluster.sessionmaker()() as session:
        posts = session.scalars(select(Post).options(selectinload(Post.user))).all()
        assert len(posts) == 6
        assert {inspect(post).dict["user"].id for post in posts} == set(keys)


def test_a_scatter(cluster: shardkit.ShardCluster, keys: list[int]) -> None:
    with cluster.sessionmaker()() as session:
        assert sorted(session.scalars(select(User.id))) == sorted(keys)
        assert len(session.execute(select(User, Post).join(User.posts)).all()) == 6
        assert session.scalar(select(func.count()).select_from(Post)) == 6
        assert session.scalar(select(func.sum(User.score))) == sum(keys)
        assert session.execute(select(func.min(User.id), func.max(User.id))).one() == (min(keys), max(keys))
        assert sorted(session.scalars(select(User.id).where(User.id.in_(keys[:2])))) == sorted(keys[:2])
        assert session.scalars(select(User).where(User.name == "nobody")).all() == []


@contextmanager
def locked(sharded: ShardedCluster) -> Iterator[None]:
    """The users of every shard are locked by somebody."""
    with ExitStack() as stack:
        for shard in sharded.topology.shards:
            connection = stack.enter_context(connect(shard.url))
            stack.enter_context(connection.transaction())
            connection.execute("LOCK TABLE public.users IN ACCESS EXCLUSIVE MODE")
        yield


def _all_wait(sharded: ShardedCluster) -> bool:
    waiting = "SELECT FROM pg_locks WHERE NOT granted AND relation = 'public.users'::regclass"
    return len(sharded.holding(waiting)) == 3


def test_shards_of_a_scatter_run_at_the_same_time(
    sharded: ShardedCluster, cluster: shardkit.ShardCluster, keys: list[int]
) -> None:
    def read() -> list[int]:
        with cluster.sessionmaker()() as session:
            return sorted(session.scalars(select(User.id)))

    with ThreadPoolExecutor(1) as thread:
        with locked(sharded):
            reading = thread.submit(read)
            until(lambda: _all_wait(sharded), "every shard is asked")
        assert reading.result(20) == sorted(keys)


def test_streaming(cluster: shardkit.ShardCluster, keys: list[int]) -> None:
    with cluster.sessionmaker()() as session:
        by_key = select(Post.id).where(Post.user_id == keys[0]).order_by(Post.id)
        assert list(session.scalars(by_key.execution_options(yield_per=1))) == [1, 2]
        assert [
            len(part) for part in session.scalars(by_key.execution_options(yield_per=1)).partitions()
        ] == [1, 1]


def test_refusals_are_the_planners(cluster: shardkit.ShardCluster, keys: list[int]) -> None:
    with cluster.sessionmaker()() as session:
        for statement in (select(User).limit(1).with_for_update(), text("SELECT 1")):
            with pytest.raises(UnroutableQuery):
                session.execute(statement)
        assert session.scalar(select(User.name).where(User.id == keys[0])) == f"user {keys[0]}"


def test_rows_in_transit_are_not_seen(
    sharded: ShardedCluster, cluster: shardkit.ShardCluster, keys: list[int]
) -> None:
    """Copies that arrive on s1, and later those that wait on s0 for their purge."""
    key = keys[0]
    arcs, source, target = sharded.next_shard(key)

    def copy() -> None:
        admin = sharded.admin("s1")
        admin.execute(
            "INSERT INTO public.users (id, name, score) VALUES (%s, %s, %s)", (key, f"user {key}", key)
        )
        for number in (1, 2):
            admin.execute(
                "INSERT INTO public.posts (user_id, id, caption) VALUES (%s, %s, 'x')", (key, number)
            )

    def check() -> None:
        with cluster.sessionmaker(mode="best_effort")() as session:
            assert sorted(session.scalars(select(User.id))) == sorted(keys)
            assert sorted(session.scalars(select(User.id).where(User.id.in_(keys)))) == sorted(keys)
            assert session.scalar(select(func.count()).select_from(Post)) == 6
            assert session.scalar(select(func.sum(User.score))) == sum(keys)
            assert affected(session.execute(update(Post).values(caption="x"))) == 6
            assert affected(session.execute(delete(User).where(User.name == f"user {key}"))) == 1
            assert session.get(User, key) is None
            session.rollback()
            assert session.get_one(User, key).name == f"user {key}"

    with sharded.lease() as catalog:
        sharded.mark(catalog, target, arcs)
        copy()
        check()
        sharded.cut_over(catalog, source, target, arcs)
        check()
        sharded.purge(catalog, source, arcs)
        sharded.drain(catalog)
    check()


# --- writing ---------------------------------------------------------------------------------------------------------


def test_a_unit_of_work(sharded: ShardedCluster, cluster: shardkit.ShardCluster, keys: list[int]) -> None:
    key = keys[1]
    with cluster.sessionmaker()() as session:
        user = session.get_one(User, key)
        user.name = "changed"
        user.posts.append(Post(id=3, caption="third"))
        session.delete(user.posts[0])
        session.flush()
        assert session.scalars(select(Post.id).where(Post.user_id == key).order_by(Post.id)).all() == [2, 3]
        session.commit()
        assert [post.id for post in user.posts] == [2, 3]
        session.delete(user)
        session.commit()
    assert sharded.query("s1", "SELECT FROM public.posts") == []
    assert sharded.query("s1", "SELECT FROM public.users") == []


def test_a_rollback(sharded: ShardedCluster, cluster: shardkit.ShardCluster, keys: list[int]) -> None:
    with cluster.sessionmaker()() as session:
        user = session.get_one(User, keys[0])
        user.name = "changed"
        session.flush()
        session.rollback()
        assert user.name == f"user {keys[0]}"


def test_savepoints(sharded: ShardedCluster, cluster: shardkit.ShardCluster, keys: list[int]) -> None:
    with cluster.sessionmaker()() as session:
        user = session.get_one(User, keys[0])
        user.name = "outer"
        with pytest.raises(DBAPIError), session.begin_nested():
            session.execute(insert(Post).values(user_id=keys[0], id=1, caption="twice"))
        with session.begin_nested():
            user.posts.append(Post(id=3, caption="third"))
        with session.begin_nested() as nested:
            session.execute(update(User).where(User.id == keys[0]).values(score=99))
            nested.rollback()
        session.commit()
    assert sharded.query("s0", "SELECT name, score FROM public.users") == [("outer", keys[0])]
    assert sharded.query("s0", "SELECT count(*) FROM public.posts") == [(3,)]


def test_statements_that_write(
    sharded: ShardedCluster, cluster: shardkit.ShardCluster, keys: list[int]
) -> None:
    key = keys[2]
    with cluster.sessionmaker()() as session:
        user = session.get_one(User, key)
        updated = session.execute(update(User).where(User.id == key).values(name="changed"))
        assert affected(updated) == 1
        assert user.name == "changed"
        returned = update(User).where(User.id == key).values(score=User.score + 1).returning(User)
        assert session.scalars(returned).all() == [user]
        assert user.score == key + 1
        assert affected(session.execute(delete(Post).where(Post.user_id == key, Post.id == 1))) == 1
        inserted = insert(Post).values(user_id=key, id=5, caption="x").returning(Post.id)
        assert session.scalars(inserted).one() == 5
        session.execute(insert(Post), [{"user_id": key, "id": number, "caption": "x"} for number in (6, 7)])
        session.execute(update(Post), [{"user_id": key, "id": number, "caption": "y"} for number in (6, 7)])
        session.commit()
    found = sharded.query("s2", "SELECT id, caption FROM public.posts ORDER BY id")
    assert found == [(2, "post 2"), (5, "x"), (6, "y"), (7, "y")]


def test_bulk_over_all_shards(
    sharded: ShardedCluster, cluster: shardkit.ShardCluster, keys: list[int]
) -> None:
    rows = [{"user_id": key, "id": 10 + number, "caption": "bulk"} for number in range(5) for key in keys]
    with cluster.sessionmaker(mode="best_effort")() as session:
        returning = session.scalars(insert(Post).returning(Post, sort_by_parameter_order=True), rows)
        assert [(post.user_id, post.id) for post in returning] == [
            (row["user_id"], row["id"]) for row in rows
        ]
        session.execute(update(Post), [{**row, "caption": "changed"} for row in rows])
        session.commit()
    for name in ("s0", "s1", "s2"):
        assert sharded.query(name, "SELECT count(*) FROM public.posts WHERE caption = 'changed'") == [(5,)]


def test_merge_expire_and_refresh(
    sharded: ShardedCluster, cluster: shardkit.ShardCluster, keys: list[int]
) -> None:
    with cluster.sessionmaker()() as session:
        user = session.get_one(User, keys[0])
        session.commit()
        admin = sharded.admin("s0")
        admin.execute("UPDATE public.users SET name = 'behind' WHERE id = %s", (keys[0],))
        assert user.name == "behind"
        admin.execute("UPDATE public.users SET name = 'again' WHERE id = %s", (keys[0],))
        session.refresh(user)
        assert user.name == "again"
        session.expire(user, ["name"])
        assert user.name == "again"
        assert session.merge(User(id=keys[0], name="merged")) is user
        session.commit()
    assert sharded.query("s0", "SELECT name FROM public.users") == [("merged",)]


def test_a_detached_object_is_written_where_its_key_lives(
    sharded: ShardedCluster, cluster: shardkit.ShardCluster, keys: list[int]
) -> None:
    Session = cluster.sessionmaker(expire_on_commit=False)
    with Session() as session:
        user = session.get_one(User, keys[0])
    sharded.move_key(keys[0])
    user.name = "detached"
    with Session() as session:
        session.add(user)
        session.commit()
    assert sharded.holding("SELECT FROM public.users WHERE name = 'detached'") == [sharded.owner(keys[0])]


# --- keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [None, "5", 5.0, True, 2**63])
def test_what_is_no_key(cluster: shardkit.ShardCluster, key: Any) -> None:
    with cluster.sessionmaker()() as session:
        session.add(User(id=key, name="x"))
        with pytest.raises(KeyTypeError):
            session.flush()


def test_a_changed_key(cluster: shardkit.ShardCluster, keys: list[int]) -> None:
    with cluster.sessionmaker()() as session:
        session.get_one(User, keys[0]).id = 77
        with pytest.raises(UnroutableQuery):
            session.flush()


@contextmanager
def on(name: str, handler: Any, target: Any = User) -> Iterator[None]:
    """An event handler of an application, for the block."""
    event.listen(target, name, handler)
    try:
        yield
    finally:
        event.remove(target, name, handler)


@pytest.mark.parametrize("name", ["before_insert", "before_update"])
def test_a_key_that_an_event_changes_when_its_shard_is_chosen(
    sharded: ShardedCluster, cluster: shardkit.ShardCluster, keys: list[int], name: str
) -> None:
    def rekey(mapper: Any, connection: Any, user: User) -> None:
        user.id = keys[1] + 1000

    sharded.admin("s0").execute("DELETE FROM public.posts")  # which hold the key of their user
    with on(name, rekey), cluster.sessionmaker()() as session:
        if name == "before_insert":
            session.add(User(id=keys[0] + 1000, name="new"))
        else:
            session.get_one(User, keys[0]).name = "changed"
        with pytest.raises(UnroutableQuery, match="The shard key id of User was changed"):
            session.commit()
    assert not sharded.holding("SELECT FROM public.users WHERE id > 1000 OR name IN ('new', 'changed')")
    with cluster.sessionmaker().begin() as session:  # the next flush knows nothing of it
        session.get_one(User, keys[0]).name = "again"
    assert sharded.holding("SELECT FROM public.users WHERE name = 'again'") == ["s0"]


@pytest.mark.parametrize("name", ["before_insert", "before_update"])
def test_an_event_may_change_the_rest(
    sharded: ShardedCluster, cluster: shardkit.ShardCluster, keys: list[int], name: str
) -> None:
    def sign(mapper: Any, connection: Any, user: User) -> None:
        user.name, user.id = "signed", int(str(user.id))  # the same key

    with on(name, sign), cluster.sessionmaker().begin() as session:
        if name == "before_insert":
            session.add(User(id=keys[0] + 1000, name="new"))
        else:
            session.get_one(User, keys[0]).score += 1
    assert sharded.holding("SELECT FROM public.users WHERE name = 'signed'") == [
        sharded.owner(keys[0] + 1000 * (name == "before_insert"))
    ]


def test_a_key_that_is_changed_before_the_flush(
    sharded: ShardedCluster, cluster: shardkit.ShardCluster, keys: list[int]
) -> None:
    """By an event that comes after the session's own."""

    def rekey(session: Any, *_: Any) -> None:
        for instance in session.new:
            instance.id = keys[1] + 1000

    Session = cluster.sessionmaker()
    with on("before_flush", rekey, Session), Session.begin() as session:
        session.add(User(id=keys[0] + 1000, name="new"))
    found = sharded.holding("SELECT FROM public.users WHERE id = %s", keys[1] + 1000)
    assert found == [sharded.owner(keys[1] + 1000)]


def test_an_explicit_shard(cluster: shardkit.ShardCluster, keys: list[int]) -> None:
    # Text is taken for a write unless it says that it is none.
    count = text("SELECT count(*) FROM public.users").execution_options(shardkit_writes=False)
    with cluster.sessionmaker()() as session:
        assert session.connection(key=keys[0]) is session.connection(shard="s0")
        assert session.connection(shard="s1").execute(count).scalar() == 1
        assert session.execute(count, bind_arguments={"shard": "s1"}).scalar() == 1
        assert session.scalar(count, bind_arguments={"key": keys[2]}) == 1
        with pytest.raises(NoSuchShard, match="s0, s1, s2"):
            session.connection(shard="s9")
        with pytest.raises(KeyTypeError):
            session.connection(key=1.5)


# --- other ways to declare -------------------------------------------------------------------------------------------


class Other(DeclarativeBase):
    pass


tags = Table(
    "tags",
    Other.metadata,
    Column("owner_id", BigInteger, ForeignKey("owners.id"), primary_key=True),
    Column("tag_id", BigInteger, ForeignKey("tag.id"), primary_key=True),
)


@shardkit.sharded(by="id")
class Tag(Other):
    __tablename__ = "tag"
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)


@shardkit.sharded(by="id")
class Owner(Other):
    __tablename__ = "owners"
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False, default=lambda: 4711)
    tags: Mapped[list[Tag]] = relationship(secondary=tags)


class Plain(Other):
    __tablename__ = "plain"
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)


@shardkit.sharded(by="id")
class Animal(Other):
    __tablename__ = "animals"
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    kind: Mapped[str]
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "animal"}  # noqa: RUF012 - as SQLAlchemy has it


@shardkit.sharded(by="id")
class Dog(Animal):
    __tablename__ = "dogs"
    id: Mapped[int] = mapped_column(ForeignKey("animals.id"), primary_key=True, autoincrement=False)
    tricks: Mapped[int] = mapped_column(server_default="3")
    __mapper_args__ = {"polymorphic_identity": "dog"}  # noqa: RUF012 - as SQLAlchemy has it


@pytest.fixture
def others(sharded: ShardedCluster, cluster: shardkit.ShardCluster) -> Iterator[None]:
    """The tables of `Other`, empty."""
    names = ["owners", "tag", "animals", "dogs"]
    cluster.create_all(Other.metadata, tables=[Other.metadata.tables[name] for name in names])
    yield
    for shard in sharded.topology.shards:
        sharded.admin(shard.name).execute("TRUNCATE public.owners, public.tag, public.animals, public.dogs")


def test_joined_inheritance(sharded: ShardedCluster, cluster: shardkit.ShardCluster, others: None) -> None:
    keys = [sharded.keys(name, 1)[0] for name in ("s0", "s1")]
    for key in keys:
        with cluster.sessionmaker()() as session:
            session.add(Dog(id=key))
            session.commit()
    for name, key in zip(("s0", "s1"), keys, strict=True):
        assert sharded.query(name, "SELECT id, tricks FROM public.dogs") == [(key, 3)]
    with cluster.sessionmaker()() as session:
        dog = session.get_one(Dog, keys[1])
        assert session.get(Animal, keys[1]) is dog
        dog.tricks += 1
        session.commit()
        assert sorted(session.execute(select(Dog.id, Dog.tricks)).all()) == sorted(
            [(keys[0], 3), (keys[1], 4)]
        )
        session.delete(dog)
        session.commit()
    assert sharded.query("s1", "SELECT FROM public.animals") == []


def test_an_undeclared_association_table_is_refused_by_name(
    cluster: shardkit.ShardCluster, others: None
) -> None:
    with cluster.sessionmaker()() as session:
        session.add(Owner(id=1, tags=[Tag(id=1)]))
        with pytest.raises(UnroutableQuery, match="tags is not declared"):
            session.flush()
        session.rollback()
        assert session.get(Owner, 1) is None


def test_a_class_that_is_not_sharded(cluster: shardkit.ShardCluster) -> None:
    with cluster.sessionmaker()() as session:
        session.add(Plain(id=1))
        with pytest.raises((UnroutableQuery, UsageError), match=r"[Pp]lain"):
            session.flush()


def test_a_default_key_is_made_before_the_shard_is_chosen(
    sharded: ShardedCluster, cluster: shardkit.ShardCluster, others: None
) -> None:
    with cluster.sessionmaker()() as session:
        owner = Owner()
        session.add(owner)
        session.commit()
        assert owner.id == 4711
    assert sharded.holding("SELECT FROM public.owners WHERE id = 4711") == [sharded.owner(4711)]


# --- connecting ------------------------------------------------------------------------------------------------------


def test_a_database_without_a_catalog(fresh_database: FreshDatabase) -> None:
    with pytest.raises(NotInitialised):
        shardkit.connect(fresh_database())


def test_a_url_that_does_not_answer() -> None:
    with pytest.raises(shardkit.errors.CatalogUnreachable):
        shardkit.connect("postgresql://postgres@127.0.0.1:1/catalog")


def test_create_all_of_what_cannot_work_creates_nothing(
    sharded: ShardedCluster, cluster: shardkit.ShardCluster
) -> None:
    class Bad(DeclarativeBase):
        pass

    @shardkit.sharded(by="owner")
    class Thing(Bad):
        __tablename__ = "things"
        code: Mapped[str] = mapped_column(primary_key=True)
        owner: Mapped[int]

    assert [problem.table for problem in cluster.check(Bad.metadata) if problem.fatal]
    with pytest.raises(DeclarationError, match="things"):
        cluster.create_all(Bad.metadata)
    assert sharded.holding("SELECT FROM pg_class WHERE relname = 'things'") == []


def test_create_all_again_changes_nothing(sharded: ShardedCluster, cluster: shardkit.ShardCluster) -> None:
    before = sharded.topology.version
    cluster.create_all(Base.metadata)
    cluster.declare(Base.metadata)
    assert sharded.topology.version == before
