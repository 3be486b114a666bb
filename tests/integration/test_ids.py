"""Slot-carrying ids in models: made where SQLAlchemy evaluates defaults, held to their key, found on one shard."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import pytest
from alembic.autogenerate import produce_migrations, render_python_code
from alembic.migration import MigrationContext
from sqlalchemy import (
    BigInteger,
    Column,
    ForeignKey,
    ForeignKeyConstraint,
    Integer,
    MetaData,
    String,
    Table,
    UniqueConstraint,
    create_engine,
    delete,
    event,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    MappedAsDataclass,
    Session,
    mapped_column,
    relationship,
    selectinload,
)

import shardkit
from shardkit.core import ids
from shardkit.core.errors import DeclarationError, IdMismatch, UnroutableQuery, UsageError
from shardkit.core.keyrange import ArcSet, slot_arc, slot_of
from shardkit.core.ring import position
from shardkit.core.topology import Topology
from shardkit.orm.declare import problems
from shardkit.orm.flush import RoutedInstances
from shardkit.orm.planning import idrouting
from shardkit.orm.planning.carriers import carriers
from shardkit.storage.urls import sqlalchemy_url
from tests.fix_postgres import FreshDatabase
from tests.sharded import ShardedCluster, affected

TimedId = Annotated[int, mapped_column(BigInteger, primary_key=True, default=shardkit.slot_id())]


class Base(DeclarativeBase):
    pass


@shardkit.sharded(by="id")
class Author(Base):
    __tablename__ = "Author"

    id: Mapped[TimedId]
    name: Mapped[str]
    pictures: Mapped[list[Picture]] = relationship(back_populates="author", cascade="all, delete-orphan")


@shardkit.sharded(by="author_id")
class Picture(Base):
    __tablename__ = "picture"
    __table_args__ = (UniqueConstraint("author_id", "id"),)

    id: Mapped[TimedId]
    author_id: Mapped[int] = mapped_column(ForeignKey("Author.id"))
    caption: Mapped[str] = mapped_column(default="")
    author: Mapped[Author] = relationship(back_populates="pictures")
    remarks: Mapped[list[Remark]] = relationship(
        back_populates="picture", primaryjoin="Picture.id == foreign(Remark.picture_id)", viewonly=True
    )


@shardkit.sharded(by="author_id")
class Remark(Base):
    __tablename__ = "remark"
    __table_args__ = (ForeignKeyConstraint(["author_id", "picture_id"], ["picture.author_id", "picture.id"]),)

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=shardkit.slot_id())
    author_id: Mapped[int] = mapped_column(BigInteger)
    picture_id: Mapped[int] = mapped_column(BigInteger)
    text: Mapped[str] = mapped_column(default="")
    picture: Mapped[Picture] = relationship(
        primaryjoin="Picture.id == foreign(Remark.picture_id)", viewonly=True
    )


@shardkit.sharded(by="tag")
class Tagged(Base):
    __tablename__ = "tagged"

    id: Mapped[int] = mapped_column(
        BigInteger, primary_key=True, default=shardkit.slot_id(json_safe=True, floor=5 << 20)
    )
    tag: Mapped[str] = mapped_column(String(40))


KEYS = [1, -5, 2**62, -(2**63), 2**63 - 1, 7]
TAGS = ["a", "", "\N{ROCKET}\N{ZERO WIDTH JOINER}x", "Ä'\"\\", "%s"]


@pytest.fixture(scope="module", autouse=True)
def _tables(_sharded: ShardedCluster) -> None:
    with _sharded.connect() as cluster:
        cluster.create_all(Base.metadata)


@pytest.fixture(autouse=True)
def _empty(_sharded: ShardedCluster) -> None:
    for shard in _sharded.topology.shards:
        tables = 'public."Author", public.picture, public.remark, public.tagged'
        _sharded.admin(shard.name).execute(f"TRUNCATE {tables}")


@contextmanager
def statements(cluster: shardkit.ShardCluster) -> Iterator[list[tuple[str, str]]]:
    """(shard, SQL) of what is sent."""
    sent: list[tuple[str, str]] = []
    listeners = []
    for engines in (cluster.engines, cluster.async_engines):
        for shard in cluster.topology.shards:
            engine = engines.shard(shard)

            def note(_c: Any, _u: Any, text: str, *_: Any, name: str = shard.name) -> None:
                sent.append((name, text))

            event.listen(engine, "before_cursor_execute", note)
            listeners.append((engine, note))
    try:
        yield sent
    finally:
        for engine, note in listeners:
            event.remove(engine, "before_cursor_execute", note)


def slot(key: Any) -> int:
    return slot_of(position(key))


# --- made ------------------------------------------------------------------------------------------------------------


def test_a_flush_makes_ids_of_the_keys_slot(cluster: shardkit.ShardCluster) -> None:
    with cluster.sessionmaker()() as session:
        author = Author(name="a", pictures=[Picture(remarks=[]), Picture()])
        session.add(author)
        session.flush()
        first, second = author.pictures
        for picture in author.pictures:
            parts = ids.timed(picture.id)
            assert parts.slot == slot(author.id)
        assert first.id < second.id
        remark = Remark(author_id=author.id, picture_id=first.id)
        session.add(remark)
        session.commit()
        assert ids.uuid_parts(remark.id).slot == slot(author.id)


def test_keys_of_all_kinds(cluster: shardkit.ShardCluster) -> None:
    for key in KEYS:
        with cluster.sessionmaker()() as session:
            session.add(Author(id=key, name="x", pictures=[Picture()]))
            session.commit()
            (made,) = session.scalars(select(Picture.id).where(Picture.author_id == key))
            assert ids.timed(made).slot == slot(key)
    for tag in TAGS:
        with cluster.sessionmaker()() as session:
            tagged = Tagged(tag=tag)
            session.add(tagged)
            session.commit()
            assert 5 << 20 <= tagged.id < 2**53
            assert ids.counted(tagged.id).slot == slot(tag)


def test_core_and_bulk_inserts(sharded: ShardedCluster, cluster: shardkit.ShardCluster) -> None:
    table: Any = Tagged.__table__
    tags = [f"t{number}" for number in range(40)]
    with cluster.sessionmaker(mode="best_effort")() as session:
        session.execute(insert(table).values(tag="one"))
        session.execute(insert(table), {"tag": "two"})
        session.execute(insert(table), [{"tag": tag} for tag in tags[:10]])
        session.execute(insert(table).values([{"tag": tag} for tag in tags[10:20]]))
        session.execute(insert(Tagged), [{"tag": tag} for tag in tags[20:30]])
        returned = session.execute(
            insert(Tagged).returning(Tagged.id, Tagged.tag, sort_by_parameter_order=True),
            [{"tag": tag} for tag in tags[30:]],
        ).all()
        assert [tag for _, tag in returned] == tags[30:]
        session.commit()
        rows = session.execute(select(Tagged.id, Tagged.tag)).all()
    assert {tag for _, tag in rows} == {"one", "two", *tags}
    assert all(ids.counted(id_).slot == slot(tag) for id_, tag in rows)
    assert len({id_ for id_, _ in rows}) == len(rows)


async def test_async(async_cluster: shardkit.ShardCluster) -> None:
    async with async_cluster.async_sessionmaker(expire_on_commit=False)() as session:
        author = Author(name="a", pictures=[Picture(), Picture()])
        session.add(author)
        await session.commit()
        made = (await session.scalars(select(Picture.id).where(Picture.author_id == author.id))).all()
        assert [ids.timed(id_).slot for id_ in made] == [slot(author.id)] * 2
        session.expunge_all()
        with statements(async_cluster) as sent:
            found = await session.get_one(Picture, made[0])
        assert found.id == made[0]
        assert len(sent) == 1


async def test_a_busy_key_does_not_hold_other_tasks_up(async_cluster: shardkit.ShardCluster) -> None:
    async with async_cluster.async_sessionmaker(expire_on_commit=False)() as session:
        author = Author(name="a", pictures=[Picture() for _ in range(150)])
        session.add(author)
        flush = asyncio.ensure_future(session.commit())
        turns = 0
        while not flush.done():
            await asyncio.sleep(0.01)
            turns += 1
        await flush
    assert turns > 20, "the flush waited for ticks, and nobody else could work meanwhile"
    made = [picture.id for picture in author.pictures]
    assert sorted(set(made)) == made
    assert {ids.timed(id_).slot for id_ in made} == {slot(author.id)}


def test_a_plain_session_makes_them_too(sharded: ShardedCluster, fresh_database: FreshDatabase) -> None:
    engine = create_engine(sqlalchemy_url(fresh_database(1)))
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        author = Author(id=5, name="x")
        session.add_all([author, Picture(author=author)])
        with pytest.raises(UsageError, match="lease_ids"):
            session.flush()
    shardkit.lease_ids(sharded.catalog_url)
    try:
        with Session(engine) as session:
            author = Author(name="x", pictures=[Picture(), Picture()])
            session.add(author)
            session.flush()
            session.add(Remark(author_id=author.id, picture_id=author.pictures[0].id))
            session.commit()
            assert {ids.timed(picture.id).slot for picture in author.pictures} == {slot(author.id)}
    finally:
        shardkit.lease_ids(None)
        engine.dispose()


async def test_a_plain_async_session_makes_them_too(
    sharded: ShardedCluster, fresh_database: FreshDatabase
) -> None:
    engine = create_async_engine(sqlalchemy_url(fresh_database(1)))
    shardkit.lease_ids(sharded.catalog_url)
    try:
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
            await connection.execute(insert(Tagged), [{"tag": "x"}, {"tag": "y"}])
            rows = (await connection.execute(select(Tagged.id, Tagged.tag))).all()
        assert all(ids.counted(id_).slot == slot(tag) for id_, tag in rows)
    finally:
        shardkit.lease_ids(None)
        await engine.dispose()


# --- held to their key -----------------------------------------------------------------------------------------------


def other_id(key: int) -> int:
    return ids.timed_id(2**33, (slot(key) + 1) % 65536, 0, 0)


def test_given_ids_of_another_slot_are_refused(cluster: shardkit.ShardCluster) -> None:
    good = ids.timed_id(2**33, slot(7), 0, 0)
    table: Any = Picture.__table__
    with cluster.sessionmaker()() as session:
        session.add(Author(id=7, name="x"))
        session.flush()
        with statements(cluster) as sent:
            for statement, rows in (
                (insert(table).values(id=other_id(7), author_id=7), None),
                (insert(table), {"id": other_id(7), "author_id": 7}),
                (insert(table), [{"id": good, "author_id": 7}, {"id": other_id(7), "author_id": 7}]),
                (
                    insert(table).values([{"id": good, "author_id": 7}, {"id": other_id(7), "author_id": 7}]),
                    None,
                ),
                (insert(Picture), [{"id": good, "author_id": 7}, {"id": other_id(7), "author_id": 7}]),
            ):
                with pytest.raises(IdMismatch) as caught:
                    session.execute(statement, rows)
                assert caught.value.fields["slot"] == (slot(7) + 1) % 65536
            session.add(Picture(id=other_id(7), author_id=7))
            with pytest.raises(IdMismatch):
                session.flush()
        assert sent == []
        session.rollback()
    with cluster.sessionmaker()() as session:
        session.add(Author(name="x", pictures=[Picture(id=other_id(8))]))
        with pytest.raises(IdMismatch):
            session.flush()


def test_an_id_that_an_event_gives_is_vetted(cluster: shardkit.ShardCluster) -> None:
    def give(session: Any, *_: Any) -> None:
        for instance in session.new:
            instance.id = other_id(7)

    Session = cluster.sessionmaker()
    event.listen(Session, "before_flush", give)  # after the session's own
    with Session() as session, statements(cluster) as sent:
        session.add(Picture(author_id=7))
        with pytest.raises(IdMismatch):
            session.flush()
        assert sent == []
    picture, routed = Picture(author_id=7), RoutedInstances()
    assert routed.ask(picture)
    picture.id = other_id(7)  # as by before_insert, which comes later
    with pytest.raises(IdMismatch):
        routed.end()


def test_changed_ids_keep_their_slot(cluster: shardkit.ShardCluster, pictures: dict[str, int]) -> None:
    with cluster.sessionmaker()() as session:
        picture = session.scalars(select(Picture).where(Picture.caption == "s1", ~Picture.id.in_([1]))).one()
        session.execute(delete(Remark).where(Remark.picture_id == picture.id))
        picture.id = ids.timed_id(2**33, slot(picture.author_id), 1, 1)
        session.flush()
        picture.id = other_id(picture.author_id)
        with pytest.raises(IdMismatch):
            session.flush()
        session.rollback()
        with pytest.raises(UnroutableQuery, match="carry the slot"):
            session.execute(update(Picture).where(Picture.author_id == 5).values(id=5))


def test_the_servers_check_it(sharded: ShardedCluster, cluster: shardkit.ShardCluster) -> None:
    admin = sharded.admin("s0")
    for key in KEYS:
        right = ids.timed_id(2**33, slot(key), 0, 0)
        admin.execute('INSERT INTO public."Author" (id, name) VALUES (%s, %s)', (key, "x"))
        admin.execute("INSERT INTO public.picture (id, author_id, caption) VALUES (%s, %s, '')", (right, key))
        remark = ids.uuid_id(5, 5, slot(key))
        admin.execute(
            "INSERT INTO public.remark (id, author_id, picture_id, text) VALUES (%s, %s, %s, '')",
            (remark, key, right),
        )
        for table, column, wrong in (
            ("picture", "caption", other_id(key)),
            ("remark", "text", ids.uuid_id(5, 5, (slot(key) + 1) % 65536)),
        ):
            more, values = (", picture_id", f", {right}") if table == "remark" else ("", "")
            with pytest.raises(Exception, match="shardkit_slot_of_id"):
                admin.execute(
                    f"INSERT INTO public.{table} (id, author_id, {column}{more}) "  # noqa: S608
                    f"VALUES (%s, %s, ''{values})",
                    (wrong, key),
                )
    for tag in TAGS:
        made = ids.counted_id(2**30, slot(tag))
        admin.execute("INSERT INTO public.tagged VALUES (%s, %s)", (made, tag))
        with pytest.raises(Exception, match="shardkit_slot_of_id"):
            admin.execute("INSERT INTO public.tagged VALUES (%s, %s)", (made + 2**17 + 1, tag))
    admin.execute("INSERT INTO public.tagged VALUES (3, 'an older id'), (-7, 'and one more')")


def test_the_check_on_a_plain_database(fresh_database: FreshDatabase) -> None:
    engine = create_engine(sqlalchemy_url(fresh_database(2)))
    Base.metadata.create_all(engine)
    copied = MetaData()
    for table in Base.metadata.sorted_tables:
        table.to_metadata(copied, schema="copied")
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE SCHEMA copied")
    copied.create_all(engine)
    for metadata, prefix in ((Base.metadata, ""), (copied, "copied.")):
        table = metadata.tables[f"{prefix}tagged"]
        with engine.connect() as connection, pytest.raises(IntegrityError, match="shardkit_slot_of_id"):
            connection.execute(insert(table).values(id=ids.counted_id(2**30, slot("x")) + 1, tag="x"))
    engine.dispose()


def test_migrations_make_it(fresh_database: FreshDatabase) -> None:
    engine = create_engine(sqlalchemy_url(fresh_database(0)))
    with engine.connect() as connection:
        context = MigrationContext.configure(connection)
        operations = produce_migrations(context, Base.metadata).upgrade_ops
        assert operations is not None
        script = render_python_code(operations)
    engine.dispose()
    assert script.count("shardkit_slot_of_id") == 3
    assert "hashint8extended(author_id, 0)" in script


class DataclassBase(MappedAsDataclass, DeclarativeBase):
    pass


@shardkit.sharded(by="owner")
class Dated(DataclassBase):
    __tablename__ = "dated"

    id: Mapped[int] = mapped_column(
        BigInteger, primary_key=True, init=False, insert_default=shardkit.slot_id()
    )
    owner: Mapped[int] = mapped_column(BigInteger, default=0)


def test_dataclasses(sharded: ShardedCluster, cluster: shardkit.ShardCluster) -> None:
    cluster.create_all(Dated.metadata)
    with cluster.sessionmaker()() as session:
        dated = Dated(owner=5)
        session.add(dated)
        session.flush()
        assert ids.timed(dated.id).slot == slot(5)


def test_what_cannot_hold_ids_is_no_declaration() -> None:
    metadata = MetaData()
    Table("small", metadata, Column("id", Integer, primary_key=True, default=shardkit.slot_id()),
          Column("owner", BigInteger, nullable=False), info={"shardkit": {"sharded_by": "owner"}})  # fmt: skip
    Table("fine", metadata, Column("id", BigInteger, primary_key=True, default=shardkit.slot_id()),
          Column("owner", BigInteger, nullable=False), info={"shardkit": {"sharded_by": "owner"}})  # fmt: skip
    Table("serial", metadata, Column("id", BigInteger, primary_key=True, autoincrement=False),
          Column("owner", BigInteger, nullable=False), info={"shardkit": {"sharded_by": "owner"}})  # fmt: skip
    assert {problem.table for problem in problems(metadata) if problem.fatal} == {"small", "serial"}
    assert carriers(metadata.tables["serial"]) == {}


# --- found -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(sharded: ShardedCluster, cluster: shardkit.ShardCluster) -> dict[str, int]:
    """The id of a picture on each shard, with two remarks."""
    found: dict[str, int] = {}
    for name in ("s0", "s1", "s2"):
        with cluster.sessionmaker()() as session:
            (key,) = sharded.keys(name, 1, start=1000)
            author = Author(id=key, name=name, pictures=[Picture(caption=name)])
            session.add(author)
            session.flush()
            found[name] = author.pictures[0].id
            session.add_all([Remark(author_id=key, picture_id=found[name]) for _ in range(2)])
            session.commit()
    return found


def test_get_goes_to_one_shard(cluster: shardkit.ShardCluster, pictures: dict[str, int]) -> None:
    for name, id_ in pictures.items():
        with cluster.sessionmaker()() as session, statements(cluster) as sent:
            assert session.get_one(Picture, id_).caption == name
            assert [shard for shard, _ in sent] == [name]


def test_statements_by_id_go_to_the_shards_of_the_ids(
    cluster: shardkit.ShardCluster, pictures: dict[str, int]
) -> None:
    id_, other = pictures["s1"], pictures["s2"]
    for statement, shards in (
        (select(Picture).where(Picture.id == id_), {"s1"}),
        (select(Picture.caption).where(Picture.id.in_([id_, other])), {"s1", "s2"}),
        (select(Remark).where(Remark.picture_id == id_), {"s1"}),
        (select(Remark).join(Picture, (Picture.id == Remark.picture_id) & (Picture.author_id == Remark.author_id))
         .where(Picture.id == id_), {"s1"}),
        (select(func.count()).select_from(Picture).where(Picture.id == id_), {"s1"}),
        (select(Picture).where((Picture.id == id_) | (Picture.caption == "x")), {"s0", "s1", "s2"}),
        (select(Picture).where(Picture.id != id_), {"s0", "s1", "s2"}),
        (select(Picture).where(Picture.id == None), {"s0", "s1", "s2"}),  # noqa: E711
    ):  # fmt: skip
        with cluster.sessionmaker()() as session, statements(cluster) as sent:
            session.execute(statement).all()
            assert {shard for shard, _ in sent} == shards, statement
    with cluster.sessionmaker()() as session, statements(cluster) as sent:
        changed = session.execute(update(Picture).where(Picture.id == id_).values(caption="new"))
        assert affected(changed) == 1
        session.execute(delete(Remark).where(Remark.picture_id == id_))
        session.commit()
        assert {shard for shard, _ in sent} == {"s1"}


def test_relationships_by_id(cluster: shardkit.ShardCluster, pictures: dict[str, int]) -> None:
    with cluster.sessionmaker()() as session, statements(cluster) as sent:
        picture = session.get_one(Picture, pictures["s2"])
        remarks = picture.remarks
        assert len(remarks) == 2
        session.expunge(picture)
        session.expire_all()
        assert remarks[0].picture.id == pictures["s2"]
        assert {shard for shard, _ in sent} == {"s2"}
    with cluster.sessionmaker()() as session, statements(cluster) as sent:
        chosen = (
            select(Remark).where(Remark.picture_id == pictures["s0"]).options(selectinload(Remark.picture))
        )
        assert [remark.picture.caption for remark in session.scalars(chosen)] == ["s0", "s0"]
        assert {shard for shard, _ in sent} == {"s0"}


def test_an_id_without_a_slot_is_found_and_told_once(
    sharded: ShardedCluster, cluster: shardkit.ShardCluster, caplog: pytest.LogCaptureFixture
) -> None:
    idrouting._told.clear()
    name = sharded.owner("an older id")
    sharded.admin(name).execute("INSERT INTO public.tagged VALUES (3, 'an older id')")
    with cluster.sessionmaker()() as session, caplog.at_level(logging.WARNING, "shardkit.ids"):
        for _ in range(2):
            session.expunge_all()
            with statements(cluster) as sent:
                assert session.get_one(Tagged, 3).tag == "an older id"
            assert {shard for shard, _ in sent} == {"s0", "s1", "s2"}
    (record,) = caplog.records
    assert "tagged.id" in record.getMessage()


def test_a_divided_slot_and_rows_in_transit(sharded: ShardedCluster, cluster: shardkit.ShardCluster) -> None:
    """A slot with two owners is asked on both, and where copies are in transit only owned rows are seen."""
    (key,) = sharded.keys("s0", 1, start=5000)
    with cluster.sessionmaker()() as session:
        session.add(Author(id=key, name="x", pictures=[Picture(caption="kept")]))
        session.commit()
        (id_,) = session.scalars(select(Picture.id).where(Picture.author_id == key))
    arc = slot_arc(slot(key))
    ids_of = {shard.name: shard.id for shard in sharded.topology.shards}
    half = ArcSet([type(arc)(arc.first, position(key) - 1)])
    sharded.move(half, ids_of["s0"], ids_of["s1"])
    try:
        with cluster.sessionmaker()() as session, statements(cluster) as sent:
            assert session.get_one(Picture, id_).caption == "kept"
            assert {shard for shard, _ in sent} == {"s0", "s1"}
        with sharded.lease() as catalog:
            sharded.mark(catalog, ids_of["s1"], ArcSet([type(arc)(position(key), position(key))]))
        s1 = sharded.admin("s1")
        s1.execute('INSERT INTO public."Author" (id, name) VALUES (%s, %s)', (key, "stale"))
        s1.execute("INSERT INTO public.picture (id, author_id, caption) VALUES (%s, %s, 'stale')", (id_, key))
        with cluster.sessionmaker()() as session:
            assert session.get_one(Picture, id_).caption == "kept"
            assert session.scalars(select(Picture.caption).where(Picture.id == id_)).all() == ["kept"]
    finally:
        sharded.admin("s1").execute('TRUNCATE public."Author", public.picture, public.remark')
        with sharded.lease() as catalog:
            current = sharded.topology.named("s1").in_transit

            def unmarked(before: Topology | None, version: int) -> Topology:
                assert before is not None
                return before.unmarked(version, ids_of["s1"], current)

            sharded.change(catalog, unmarked)
        sharded.move(half, ids_of["s1"], ids_of["s0"])


def test_a_floor_above_the_ids_is_refused(sharded: ShardedCluster, fresh_database: FreshDatabase) -> None:
    metadata = MetaData()
    table = Table("high", metadata,
                  Column("id", BigInteger, primary_key=True, default=shardkit.slot_id(floor=2**62)),
                  Column("owner", BigInteger, nullable=False), info={"shardkit": {"sharded_by": "owner"}})  # fmt: skip
    engine = create_engine(sqlalchemy_url(fresh_database(1)))
    metadata.create_all(engine)
    shardkit.lease_ids(sharded.catalog_url)
    try:
        with engine.connect() as connection, pytest.raises(DeclarationError, match="floor"):
            connection.execute(insert(table).values(owner=1))
    finally:
        shardkit.lease_ids(None)
        engine.dispose()
