"""`ids split`: primary keys that servers number become disjoint, and stay so as shards join and rows move."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import (
    BigInteger,
    ForeignKeyConstraint,
    Identity,
    SmallInteger,
    String,
    UniqueConstraint,
    insert,
    select,
)
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship
from sqlalchemy.schema import CreateTable

import shardkit
from shardkit.core.errors import IdsNotSplit, JobRunning, MoveWaiting, PreflightFailed, UsageError
from shardkit.orm.declare import sharded_tables
from shardkit.orm.planning import idrouting
from shardkit.rebalance.mover import Mover
from shardkit.storage import change, idjoin, idplan, idsplit, membership, numbering
from shardkit.storage.connections import Connection, connect, connect_shard
from tests.fix_shards import MakeShards, Shards, owner_of
from tests.sharded import until


class Base(DeclarativeBase):
    pass


@shardkit.sharded(by="user_id")
class Post(Base):
    """A serial of 64 bits, with children."""

    __tablename__ = "posts"
    __table_args__ = (UniqueConstraint("user_id", "id"), {"schema": "public"})

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    user_id: Mapped[int] = mapped_column(BigInteger)
    body: Mapped[str] = mapped_column(String, server_default="")
    marks: Mapped[list[Mark]] = relationship(back_populates="post")


@shardkit.sharded(by="user_id")
class Mark(Base):
    """An identity of 32 bits; names that must be quoted, in another schema."""

    __tablename__ = "Mark s"
    __table_args__ = (
        ForeignKeyConstraint(["user_id", "post_id"], ["public.posts.user_id", "public.posts.id"]),
        UniqueConstraint("user_id", "No"),
        {"schema": "Other schema"},
    )

    number: Mapped[int] = mapped_column("No", Identity(), primary_key=True)
    user_id: Mapped[int] = mapped_column(BigInteger)
    post_id: Mapped[int] = mapped_column(BigInteger)
    post: Mapped[Post] = relationship(back_populates="marks")


@shardkit.sharded(by="user_id")
class Small(Base):
    __tablename__ = "small"
    __table_args__ = (UniqueConstraint("user_id", "id"), {"schema": "public"})

    id: Mapped[int] = mapped_column(SmallInteger, Identity(always=True), primary_key=True)
    user_id: Mapped[int] = mapped_column(BigInteger)


SCHEMA = 'CREATE SCHEMA "Other schema";\n' + ";\n".join(
    str(CreateTable(table).compile(dialect=PGDialect_psycopg()))  # type: ignore[no-untyped-call]
    for table in Base.metadata.sorted_tables
)
TABLES = sharded_tables(Base.metadata)
COLUMNS = {"public.posts": "id", "Other schema.Mark s": "No", "public.small": "id"}


@pytest.fixture
def one(make_shards: MakeShards) -> Shards:
    """A shard s1 with the tables."""
    return make_shards(1, schema=SCHEMA, tables=TABLES)


def split(shards: Shards, *names: str, stride: int | None = None, **options: Any) -> list[idplan.Planned]:
    with shards.writer() as (catalog, connections):
        return idsplit.split(catalog, connections, names, stride, **options)


def ids(shards: Shards, table: str) -> list[int]:
    """The ids of the rows on all shards."""
    schema, name = table.split(".")
    query = sql.SQL("SELECT {} FROM {}").format(sql.Identifier(COLUMNS[table]), sql.Identifier(schema, name))
    return [row[0] for shard in shards.topology().shards for row in shards.on(shard.name).execute(query)]


def altered(shards: Shards) -> list[str]:
    """What is not as it was recorded."""
    topology = shards.topology()
    return [
        text
        for shard in topology.shards
        for table in TABLES
        for text in numbering.problems(shards.on(shard.name), topology, table, shard.id)
    ]


def fill(connection: Connection, users: range, posts: int = 2) -> None:
    for user in users:
        for _ in range(posts):
            (made,) = connection.execute(
                "INSERT INTO public.posts (user_id, body) VALUES (%s, '') RETURNING id", (user,)
            ).fetchall()
            connection.execute(
                'INSERT INTO "Other schema"."Mark s" (user_id, post_id) VALUES (%s, %s)', (user, *made)
            )
        connection.execute("INSERT INTO public.small (user_id) VALUES (%s)", (user,))


def test_a_second_shard_joins_only_when_the_ids_are_split(one: Shards) -> None:
    fill(one.on("s1"), range(20))
    with pytest.raises(IdsNotSplit) as caught:
        join(one, "s2", 1)
    assert "public.posts (id)" in caught.value.message
    assert "'Other schema.Mark s' public.posts public.small" in (caught.value.hint or "")
    assert len(one.topology().shards) == 1

    planned = {str(each.table): each for each in split(one)}
    assert {name: each.stride for name, each in planned.items()} == {
        "public.posts": 1024, "Other schema.Mark s": 64, "public.small": 8
    }  # fmt: skip
    assert all(each.done for each in planned.values())
    assert {name: each.floor for name, each in planned.items()} == {
        "public.posts": 40, "Other schema.Mark s": 40, "public.small": 20
    }  # fmt: skip
    version = one.topology().version
    assert all(each.done for each in split(one))
    assert one.topology().version == version, "nothing was to be done"

    join(one, "s2", 1)
    assert altered(one) == []
    with shardkit.connect(one.catalog_url) as cluster:
        assert cluster.topology.splits == one.topology().splits
    one.move()
    one.assert_clean()
    assert altered(one) == [], "the move has left the sequences alone"
    topology = one.topology()
    for number, name in enumerate(("s1", "s2")):
        mine = [user for user in range(60) if owner_of(topology, user) == name]
        before = set(ids(one, "public.small"))
        fill(one.on(name), range(mine[0], mine[0] + 1))
        (new,) = set(ids(one, "public.small")) - before
        assert new % 8 == number
    for table in COLUMNS:
        found = ids(one, table)
        assert len(set(found)) == len(found)
    with pytest.raises(psycopg.errors.SequenceGeneratorLimitExceeded):
        one.on("s2").execute(
            "INSERT INTO public.small (user_id) SELECT %s FROM generate_series(1, 4096)", (mine[0],)
        )


def join(shards: Shards, name: str, server: int) -> None:
    """A shard joins, with the tables, which are declared."""
    url = shards.fresh_database(server)
    with connect(url) as connection:
        connection.execute(SCHEMA)
    with shards.writer() as (catalog, connections):
        membership.join(catalog, connections, name=name, url=url)


@pytest.fixture
def two(one: Shards) -> Shards:
    """Two shards that own halves; their ids are split."""
    split(one)
    join(one, "s2", 1)
    one.move()
    return one


def both(topology: Any) -> tuple[int, int]:
    """A key of each of two shards."""
    return tuple(next(key for key in range(999) if owner_of(topology, key) == name) for name in ("s1", "s2"))  # type: ignore[return-value]


def test_the_session_writes_and_finds_rows(two: Shards, caplog: pytest.LogCaptureFixture) -> None:
    first, second = both(two.topology())
    with shardkit.connect(two.catalog_url) as cluster:
        with cluster.sessionmaker(mode="two_phase")() as session:
            posts = [
                Post(user_id=key, body=f"of {key}", marks=[Mark(), Mark()]) for key in (first, second) * 3
            ]
            session.add_all(posts)
            session.add_all([Small(user_id=first), Small(user_id=second)])
            session.commit()
            made = {post.id: post.body for post in posts}
            assert {post.id % 1024 for post in posts} == {0, 1}
            assert len(made) == 6
        with cluster.sessionmaker()() as session:
            rows = session.scalars(
                insert(Post).returning(Post), [{"user_id": first, "body": f"bulk {n}"} for n in range(5)]
            ).all()
            made |= {post.id: post.body for post in rows}
            session.commit()
        with cluster.sessionmaker()() as session, caplog.at_level(logging.WARNING, logger="shardkit.ids"):
            idrouting._told.clear()
            for id_, body in made.items():
                assert session.get_one(Post, id_).body == body
            (said,) = [record.getMessage() for record in caplog.records if record.name == "shardkit.ids"]
            assert said.startswith("public.posts.id is compared with an id that carries no slot")
            assert session.get(Post, 999_999) is None
            assert {post.id: post.body for post in session.scalars(select(Post))} == made
            assert len(session.scalars(select(Mark)).all()) == 12
    assert len(ids(two, "public.posts")) == 11

    async def main() -> None:
        with shardkit.connect(two.catalog_url) as cluster:
            async with cluster.async_sessionmaker()() as session:
                post = Post(user_id=second, body="async")
                session.add(post)
                await session.commit()
                await session.refresh(post)
                assert post.id % 1024 == 1
                assert (await session.get_one(Post, post.id)).body == "async"
            await cluster.adispose()

    asyncio.run(main())


def test_tables_made_on_two_shards_are_refused_until_they_are_split(make_shards: MakeShards) -> None:
    shards = make_shards(2, schema=SCHEMA, tables=())
    with shards.writer() as (catalog, connections):
        membership.declare(catalog, connections, TABLES)
    with shardkit.connect(shards.catalog_url) as cluster:
        for _ in range(2):
            with cluster.sessionmaker()() as session:
                session.add(Post(user_id=1))
                with pytest.raises(IdsNotSplit, match=r"public\.posts"):
                    session.commit()
            with cluster.sessionmaker()() as session, pytest.raises(IdsNotSplit):
                session.get(Post, 1)
            with cluster.sessionmaker()() as session, pytest.raises(IdsNotSplit):
                session.scalars(select(Post).where(Post.user_id == 1)).all()
        split(shards, "posts")
        # The same process learns of it when it looks.
        with cluster.sessionmaker()() as session:
            session.add(Post(user_id=1))
            session.commit()
        with cluster.sessionmaker()() as session, pytest.raises(IdsNotSplit):
            session.scalars(select(Mark)).all()
    assert [split.name for split in shards.topology().splits] == ["posts"]


def test_ids_that_two_shards_have_already(make_shards: MakeShards) -> None:
    shards = make_shards(2, schema=SCHEMA, tables=())
    for name in ("s1", "s2"):
        shards.on(name).execute("INSERT INTO public.posts (user_id) SELECT g FROM generate_series(1, 5) g")
    with shards.writer() as (catalog, connections):
        change.apply(catalog, connections, lambda now, version: now.declared(version, TABLES))  # type: ignore[union-attr]
    with pytest.raises(PreflightFailed, match="have the same id on two shards: 1, 2, 3, 4, 5"):
        split(shards, "posts")
    assert not shards.topology().splits
    shards.on("s2").execute("DELETE FROM public.posts")
    split(shards, "posts")
    assert [each.name for each in shards.topology().splits] == ["posts"]


def test_ids_by_hand_and_sequences_behind_them(one: Shards) -> None:
    shard = one.on("s1")
    shard.execute("INSERT INTO public.posts (id, user_id) VALUES (5000, 1), (-7, 1)")
    shard.execute("ALTER SEQUENCE public.posts_id_seq CACHE 50 CYCLE")
    shard.execute("SELECT nextval('public.posts_id_seq')")
    (planned,) = split(one, "public.posts", stride=10)
    assert (planned.floor, planned.stride, planned.parts[0].first) == (5000, 10, 5010)
    # The session that has kept numbers for itself drops them.
    assert shard.execute("SELECT nextval('public.posts_id_seq')").fetchall() == [(5010,)]
    (cycles,) = shard.execute(
        "SELECT seqcycle FROM pg_sequence WHERE seqrelid = 'public.posts_id_seq'::regclass"
    )
    assert cycles == (False,)
    shard.execute("TRUNCATE public.posts RESTART IDENTITY CASCADE")
    assert shard.execute("SELECT nextval('public.posts_id_seq')").fetchall() == [(5010,)]
    assert altered(one) == []


def test_what_cannot_be_split(one: Shards) -> None:
    shard = one.on("s1")
    with pytest.raises(UsageError, match="no declared sharded table"):
        split(one, "nothing")
    shard.execute("SELECT setval('public.small_id_seq', 32763)")
    with pytest.raises(PreflightFailed, match="has no number left above 32,763"):
        split(one)
    assert not one.topology().splits, "nothing was changed"
    shard.execute("SELECT setval('public.small_id_seq', 1)")
    shard.execute("ALTER SEQUENCE public.small_id_seq INCREMENT -1 MINVALUE -100")
    with pytest.raises(PreflightFailed, match="counts down"):
        split(one)
    shard.execute("ALTER SEQUENCE public.small_id_seq INCREMENT 1")
    shard.execute("ALTER TABLE public.posts ALTER id SET DEFAULT nextval('public.posts_id_seq') * 2")
    with pytest.raises(PreflightFailed, match="is more than the next number of a sequence"):
        split(one)


def test_a_wider_stride_makes_room_for_more_shards(two: Shards) -> None:
    fill(two.on("s1"), range(5))
    split(two, "small", stride=16)
    with pytest.raises(PreflightFailed, match="only a multiple"):
        split(two, "small", stride=24)
    for number in range(3, 5):
        join(two, f"s{number}", number % 3)
    assert altered(two) == []
    split(two, "small", stride=32)
    assert altered(two) == []
    assert {each.stride for each in two.topology().splits if each.name == "small"} == {32}


def test_a_shard_with_a_number_beyond_the_stride_is_refused(one: Shards) -> None:
    split(one, stride=2)
    join(one, "s2", 1)
    with pytest.raises(IdsNotSplit, match="are split over 2 shards") as caught:
        join(one, "s3", 2)
    assert "--shards 4" in (caught.value.hint or "")
    split(one, stride=4)
    join(one, "s3", 2)
    assert altered(one) == []


def test_sequences_altered_by_hand_stop_a_joining_and_are_set_again(two: Shards) -> None:
    two.on("s2").execute("ALTER SEQUENCE public.posts_id_seq INCREMENT 1 RESTART 7000")
    (found, *_) = altered(two)
    assert (
        "the sequence public.posts_id_seq of public.posts.id was altered: it counts by 1 instead of 1024"
        in found
    )
    with pytest.raises(IdsNotSplit, match="shard s2: the sequence"):
        join(two, "s3", 2)
    planned = {planned.table.name: planned for planned in split(two)}
    assert altered(two) == []
    assert planned["posts"].floor >= 6999
    join(two, "s3", 2)
    assert altered(two) == []


def test_a_number_of_a_shard_that_left_is_not_given_again(two: Shards) -> None:
    """Its rows are on the others."""
    topology = two.topology()
    split_ = topology.by_split["public", "posts"]
    key = both(topology)[0]
    high = split_.stride * 1000 + 2
    two.on("s1").execute("INSERT INTO public.posts (id, user_id) VALUES (%s, %s)", (high, key))
    url = two.fresh_database(2)
    with connect_shard(url, "s3") as connection, two.writer() as (catalog, connections):
        connection.execute(SCHEMA)
        membership.join(catalog, connections, name="s3", url=url)
        idjoin.enter(catalog, connections, connection, two.topology(), 2)
        found = numbering.of_column(connection, TABLES[[t.name for t in TABLES].index("posts")], "id")
    assert found.next == high + split_.stride


def test_no_split_while_rows_move(two: Shards) -> None:
    join(two, "s3", 2)
    with Mover(two.catalog_url) as mover:
        mover.start("rebalance")
    with pytest.raises(JobRunning):
        split(two)
    two.resume()
    two.assert_clean()
    assert altered(two) == []


def test_it_waits_for_who_has_taken_a_number(one: Shards) -> None:
    """And then goes on above it."""
    with connect(one.topology().named("s1").url, application="long writer") as writer:
        writer.execute("BEGIN")
        writer.execute("SELECT nextval('public.posts_id_seq')")
        with pytest.raises(MoveWaiting, match="application long writer"):
            split(one, "posts", patience=0.3)
        assert not one.topology().splits
        told = threading.Event()
        done: list[Any] = []
        thread = threading.Thread(
            target=lambda: done.extend(
                split(one, "posts", report=lambda reason: told.set() if reason else None)
            )
        )
        thread.start()
        assert told.wait(20)
        writer.execute("INSERT INTO public.posts (user_id) VALUES (1)")
        writer.execute("COMMIT")
        thread.join()
    assert done[0].floor == 2


class Inserter(threading.Thread):
    """Inserts with ids that the server makes, several in a transaction; some taken before the transaction inserts."""

    def __init__(self, url: str, user: int, ending: threading.Event) -> None:
        super().__init__()
        self.url, self.user, self.ending = url, user, ending
        self.made: list[int] = []
        self.errors: list[BaseException] = []

    def run(self) -> None:
        try:
            with connect(self.url) as connection:
                while not self.ending.is_set():
                    self.made += self._insert(connection)
        except BaseException as error:
            self.errors.append(error)

    def _insert(self, connection: Connection) -> Iterator[int]:
        # Taken in a transaction of its own, and used in a later one.
        ((early,),) = connection.execute("SELECT nextval('public.posts_id_seq')").fetchall()
        with connection.transaction():
            many = connection.execute(
                "INSERT INTO public.posts (user_id) SELECT %s FROM generate_series(1, 3) RETURNING id",
                (self.user,),
            ).fetchall()
            connection.execute("INSERT INTO public.posts (id, user_id) VALUES (%s, %s)", (early, self.user))
        return (number for number in (early, *(row[0] for row in many)))


def more(writers: list[Inserter]) -> None:
    """Wait until each has inserted more."""

    def is_more() -> bool:
        assert not [writer.errors for writer in writers if writer.errors]
        return all(len(writer.made) > number + 40 for writer, number in zip(writers, seen, strict=True))

    seen = [len(writer.made) for writer in writers]
    until(is_more, "more rows")


@pytest.mark.parametrize("cache", [1, 20])
def test_writers_meanwhile_never_get_a_number_twice(one: Shards, cache: int) -> None:
    """On the first shard alone, then on both while the stride is made wider."""
    one.on("s1").execute(sql.SQL("ALTER SEQUENCE public.posts_id_seq CACHE {}").format(sql.Literal(cache)))
    ending = threading.Event()
    writers = [Inserter(one.topology().named("s1").url, 1, ending) for _ in range(3)]
    try:
        for writer in writers:
            writer.start()
        more(writers)
        split(one, stride=8)
        floor = one.topology().by_split["public", "posts"].floor
        join(one, "s2", 1)
        for _ in range(2):
            writers.append(Inserter(one.topology().named("s2").url, 1, ending))
            writers[-1].start()
        more(writers)
        split(one, stride=32)
        more(writers)
    finally:
        ending.set()
        for writer in writers:
            writer.join()
    made = [number for writer in writers for number in writer.made]
    assert len(set(made)) == len(made)
    assert sorted(ids(one, "public.posts")) == sorted(made)
    wider = one.topology().by_split["public", "posts"]
    assert (wider.stride, wider.floor > floor) == (32, True)
    for shard_id, name in enumerate(("s1", "s2")):
        rows = one.on(name).execute("SELECT id FROM public.posts WHERE id > %s", (wider.floor,)).fetchall()
        assert rows
        assert {row[0] % 32 for row in rows} == {shard_id}
    assert altered(one) == []
