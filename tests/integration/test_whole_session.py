"""Reference and home tables through the session, sync and async: where their rows are, and that they stay the same."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import (
    BigInteger,
    Column,
    ForeignKey,
    MetaData,
    Table,
    Text,
    delete,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    joinedload,
    mapped_column,
    relationship,
    selectinload,
)

import shardkit
from shardkit.core.errors import (
    CrossShardWrite,
    DeclarationError,
    NoSuchShard,
    PreflightFailed,
    ReferenceDiffers,
    ShardNotEmpty,
    UndeclaredTable,
    UnroutableQuery,
)
from shardkit.dev import Clusters
from tests.sharded import ShardedCluster, affected

_numbers = itertools.count()


class Base(DeclarativeBase):
    pass


@shardkit.reference
class Region(Base):
    __tablename__ = "region"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    name: Mapped[str]


@shardkit.reference
class Country(Base):
    __tablename__ = "Country 100%"
    code: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(default=lambda: f"made {next(_numbers)}")
    stamp: Mapped[uuid.UUID] = mapped_column(default=uuid.uuid4, onupdate=uuid.uuid4)
    rank: Mapped[int] = mapped_column(server_default="7")
    region_id: Mapped[int | None] = mapped_column(ForeignKey("region.id"))
    region: Mapped[Region | None] = relationship()
    people: Mapped[list[Person]] = relationship(back_populates="country", passive_deletes="all")


@shardkit.home("s1")
class Setting(Base):
    __tablename__ = "setting"
    id: Mapped[int] = mapped_column(primary_key=True)
    value: Mapped[str]
    country_code: Mapped[str | None] = mapped_column(ForeignKey("Country 100%.code"))
    country: Mapped[Country | None] = relationship()


@shardkit.sharded(by="id")
class Person(Base):
    __tablename__ = "person"
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    country_code: Mapped[str] = mapped_column(ForeignKey("Country 100%.code"))
    setting_id: Mapped[int | None]
    country: Mapped[Country] = relationship(back_populates="people")
    setting: Mapped[Setting | None] = relationship(
        primaryjoin="foreign(Person.setting_id) == Setting.id", viewonly=True
    )


COUNTRIES = 'SELECT * FROM public."Country 100%%" ORDER BY code'
Work = Callable[[Callable[[Session], Any]], Awaitable[Any]]


@pytest.fixture(scope="module")
def whole_cluster(servers: Clusters) -> Iterator[ShardedCluster]:
    names = ["whole_catalog", "whole_s0", "whole_s1", "whole_s2"]
    urls = [servers[number % len(servers)].create_database(name) for number, name in enumerate(names)]
    made = ShardedCluster(urls[0], urls[1:])
    with made.connect() as cluster:
        cluster.create_all(Base.metadata)
    yield made
    made.close()


@pytest.fixture
def shards(whole_cluster: ShardedCluster) -> ShardedCluster:
    """Three shards with the tables above, empty."""
    for shard in whole_cluster.topology.shards:
        connection = whole_cluster.admin(shard.name)
        connection.execute('TRUNCATE public.person, public.region, public."Country 100%" CASCADE')
        connection.execute("DROP TABLE IF EXISTS public.later")
    return whole_cluster


class Application:
    """Sessions of one kind; `work` runs a function in one, which is committed at its end."""

    def __init__(self, cluster: shardkit.ShardCluster, is_async: bool) -> None:
        self.cluster = cluster
        self.is_async = is_async

    async def work(self, body: Callable[[Session], Any], *, mode: Any = "best_effort", **options: Any) -> Any:
        if self.is_async:
            async with self.cluster.async_sessionmaker(mode=mode, **options)() as session:
                result = await session.run_sync(body)
                await session.commit()
                return result
        with self.cluster.sessionmaker(mode=mode, **options)() as session:
            result = body(session)
            session.commit()
            return result


@pytest.fixture(params=[False, True], ids=["sync", "async"])
async def app(request: pytest.FixtureRequest, shards: ShardedCluster) -> Any:
    connected = shards.connect()
    yield Application(connected, request.param)
    await connected.adispose()
    connected.dispose()


def everywhere(shards: ShardedCluster, query: str = COUNTRIES) -> list[tuple[Any, ...]]:
    """The rows of a query that must be the same on every shard."""
    first, *others = (shards.query(shard.name, query) for shard in shards.topology.shards)
    assert all(other == first for other in others)
    return first


async def fill(app: Application, shards: ShardedCluster) -> list[int]:
    """Two countries and a person on each shard; the ids of the persons."""
    keys = [shards.keys(name, 1)[0] for name in ("s0", "s1", "s2")]

    def body(session: Session) -> None:
        region = Region(id=1, name="north")
        germany, france = Country(code="de", region=region), Country(code="fr")
        setting = Setting(id=1000, value="on", country=france)
        session.add_all([germany, france, setting])
        session.add_all(Person(id=key, country=germany, setting_id=1000) for key in keys)

    await app.work(body)
    return keys


# --- writing -------------------------------------------------------------------------------------------------------


async def test_a_flush_writes_every_shard_the_same(app: Application, shards: ShardedCluster) -> None:
    keys = await fill(app, shards)
    found = everywhere(shards)
    assert [row[0] for row in found] == ["de", "fr"]
    assert all(row[1].startswith("made ") for row in found)
    assert everywhere(shards, "SELECT name FROM public.region") == [("north",)]
    for name, key in zip(("s0", "s1", "s2"), keys, strict=True):
        assert shards.query(name, "SELECT id FROM public.person") == [(key,)]
    assert shards.holding("SELECT FROM pg_class WHERE relname = 'setting'") == ["s1"]
    assert shards.query("s1", "SELECT value FROM public.setting") == [("on",)]


async def test_what_python_and_the_server_made_is_on_the_object(
    app: Application, shards: ShardedCluster
) -> None:
    def body(session: Session) -> None:
        country = Country(code="de")
        session.add(country)
        session.flush()
        made = (country.code, country.name, country.stamp, country.rank, None)
        assert everywhere_in(session) == [made] * 3
        country.name = "Germany"
        session.flush()
        changed = (country.code, "Germany", country.stamp, country.rank, None)
        assert changed[2] != made[2]
        assert everywhere_in(session) == [changed] * 3
        session.delete(country)
        session.flush()
        assert everywhere_in(session) == []

    def everywhere_in(session: Any) -> list[tuple[Any, ...]]:
        tables = Country.metadata.tables["Country 100%"]
        rows: list[tuple[Any, ...]] = []
        for shard in shards.topology.shards:
            rows += [tuple(row) for row in session.connection(shard=shard.name).execute(select(tables))]
        return rows

    await app.work(body)


STATEMENTS: dict[str, Callable[[Session], Any]] = {
    "insert": lambda session: session.execute(insert(Country).values(code="x")),
    "core insert": lambda session: session.execute(insert(Country.__table__).values(code="x")),  # type: ignore[arg-type]
    "insert of rows": lambda session: session.execute(insert(Country), [{"code": "x"}, {"code": "y"}]),
    "core insert of rows": lambda session: session.execute(
        insert(Country.__table__),  # type: ignore[arg-type]
        [{"code": "x"}, {"code": "y", }],
    ),
    "list of values": lambda session: session.execute(insert(Country).values([{"code": "x"}, {"code": "y"}])),
    "insert returning": lambda session: session.execute(
        insert(Country).returning(Country.code, Country.stamp), [{"code": "x"}, {"code": "y"}]
    ).all(),
    "upsert": lambda session: session.execute(
        upsert(Country).values(code="de", name="z").on_conflict_do_update(
            index_elements=["code"], set_={"name": "again"}
        )
    ),
    "update": lambda session: session.execute(update(Country).where(Country.code == "de").values(rank=1)),
    "update returning": lambda session: session.execute(
        update(Country).where(Country.code == "de").values(rank=1).returning(Country)
    ).all(),
    "update of rows": lambda session: session.execute(update(Country), [{"code": "de", "rank": 3}]),
    "update fetched": lambda session: session.execute(
        update(Country).values(rank=2), execution_options={"synchronize_session": "fetch"}
    ),
    "add_all": lambda session: session.add_all([Country(code="x"), Country(code="y")]),
    "merge": lambda session: session.merge(Country(code="de", name="merged")),
    "delete": lambda session: session.execute(delete(Country).where(Country.code == "fr")),
    "savepoint": lambda session: in_savepoint(session),
}  # fmt: skip


def in_savepoint(session: Session) -> None:
    with session.begin_nested():
        session.execute(insert(Country).values(code="x"))
    with session.begin_nested() as undone:
        session.execute(insert(Country).values(code="y"))
        undone.rollback()
    session.execute(insert(Country).values(code="z"))


@pytest.mark.parametrize("name", STATEMENTS)
async def test_every_way_of_writing(app: Application, shards: ShardedCluster, name: str) -> None:
    await app.work(lambda session: session.add_all([Country(code="de"), Country(code="fr")]))
    before = everywhere(shards)
    await app.work(STATEMENTS[name])
    assert everywhere(shards) != before


@pytest.mark.parametrize("name", STATEMENTS)
async def test_a_session_that_writes_one_shard_writes_no_reference_table(
    app: Application, shards: ShardedCluster, name: str
) -> None:
    await app.work(lambda session: session.add_all([Country(code="de"), Country(code="fr")]))
    before = everywhere(shards)
    with pytest.raises(CrossShardWrite, match="reference table") as error:
        await app.work(STATEMENTS[name], mode="single")
    assert "best_effort" in error.value.hint
    assert everywhere(shards) == before


async def test_counts_and_rows_come_from_one_shard(app: Application, shards: ShardedCluster) -> None:
    await fill(app, shards)

    def body(session: Session) -> None:
        assert affected(session.execute(update(Country).values(rank=5))) == 2
        rows = session.execute(
            insert(Country).returning(Country.code, sort_by_parameter_order=True),
            [{"code": "b"}, {"code": "a"}],
        )
        assert rows.scalars().all() == ["b", "a"]
        assert session.scalar(select(func.count()).select_from(Country)) == 4
        assert affected(session.execute(delete(Country).where(Country.code.in_(["a", "b"])))) == 2

    await app.work(body)
    assert [row[3] for row in everywhere(shards)] == [5, 5]


async def test_a_row_that_is_named_stays(app: Application, shards: ShardedCluster) -> None:
    await fill(app, shards)
    before = everywhere(shards)
    with pytest.raises(IntegrityError):
        await app.work(lambda session: session.execute(delete(Country).where(Country.code == "de")))
    assert everywhere(shards) == before


async def test_shards_that_differ_are_found_by_a_write(app: Application, shards: ShardedCluster) -> None:
    await fill(app, shards)
    shards.admin("s2").execute("DELETE FROM public.\"Country 100%\" WHERE code = 'fr'")
    with pytest.raises(ReferenceDiffers, match="2 rows on one shard and 1 on another"):
        await app.work(lambda session: session.execute(update(Country).values(rank=1)))
    assert {row[3] for row in shards.query("s0", COUNTRIES)} == {7}


@pytest.mark.parametrize("swallowed", ["foreign key", "difference", "difference of a bulk insert"])
async def test_after_an_error_on_one_shard_nothing_is_committed(
    app: Application, shards: ShardedCluster, swallowed: str
) -> None:
    """Also what had come out the same on every shard before: one database would not commit it either."""
    keys = await fill(app, shards)
    await app.work(lambda session: session.execute(delete(Person).where(Person.id != keys[1])))
    before = everywhere(shards)
    if swallowed != "foreign key":
        shards.admin("s2").execute("DELETE FROM public.\"Country 100%\" WHERE code = 'fr'")

    def failing(session: Session) -> None:
        session.execute(insert(Country).values(code="new"))
        if swallowed == "foreign key":
            with pytest.raises(IntegrityError):  # on s1 alone is a person of it
                session.execute(delete(Country).where(Country.code == "de"))
        elif swallowed == "difference":
            with pytest.raises(ReferenceDiffers):
                session.execute(update(Country).values(rank=1))
        else:
            with pytest.raises(ReferenceDiffers):
                session.execute(
                    upsert(Country).on_conflict_do_nothing().returning(Country.code),
                    [{"code": "fr"}, {"code": "it"}],
                )

    with pytest.raises(DBAPIError, match="nothing is committed"):
        await app.work(failing)
    assert shards.query("s0", COUNTRIES) == shards.query("s1", COUNTRIES) == before

    def undone(session: Session) -> None:
        session.execute(insert(Country).values(code="new"))
        nested = session.begin_nested()
        statement: Any = update(Country).values(rank=1)
        if swallowed == "foreign key":
            session.execute(statement)
            statement = delete(Country).where(Country.code == "de")
        with pytest.raises((IntegrityError, ReferenceDiffers)):
            session.execute(statement)
        nested.rollback()

    await app.work(undone)
    assert len(shards.query("s0", COUNTRIES)) == 3
    assert {row[3] for row in shards.query("s0", COUNTRIES)} == {7}


async def test_an_old_snapshot_writes_no_reference_table(app: Application, shards: ShardedCluster) -> None:
    await fill(app, shards)

    def late(session: Session) -> None:
        session.connection(execution_options={"isolation_level": "REPEATABLE READ"}, shard="s0")  # type: ignore[call-arg]
        session.scalars(select(Country)).all()
        session.execute(update(Country).values(rank=1))

    with pytest.raises(UnroutableQuery, match="snapshot"):
        await app.work(late)


# --- reading -------------------------------------------------------------------------------------------------------


async def test_reading_takes_the_shard_that_is_open(app: Application, shards: ShardedCluster) -> None:
    keys = await fill(app, shards)

    def body(session: Any) -> None:
        for key in keys:
            person = session.get_one(Person, key)
            assert person.country.code == "de"
            assert session.get_one(Country, "fr").region is None
            assert len(session.shards.scope.participants) == 1
            session.rollback()

    await app.work(body, mode="single")


async def test_relationships(app: Application, shards: ShardedCluster) -> None:
    keys = await fill(app, shards)

    def body(session: Session) -> None:
        for load in (joinedload, selectinload):
            one = (
                select(Person)
                .where(Person.id == keys[0])
                .options(load(Person.country).joinedload(Country.region))
            )
            person = session.scalars(one).one()
            assert person.country.region is not None
            assert person.country.region.name == "north"
            session.expunge_all()
        everyone = session.scalars(
            select(Person).options(selectinload(Person.country), selectinload(Person.setting))
        )
        assert {(p.id, p.country.code, p.setting and p.setting.value) for p in everyone} == {
            (key, "de", "on") for key in keys
        }
        session.expunge_all()
        person = session.get_one(Person, keys[2])
        assert person.setting is not None
        assert person.setting.country is not None
        assert person.setting.country.code == "fr"
        germany = session.get_one(Country, "de")
        assert sorted(one.id for one in germany.people) == sorted(keys)
        joined = select(Setting).options(joinedload(Setting.country))
        assert [one.country and one.country.code for one in session.scalars(joined)] == ["fr"]
        session.expunge_all()
        eager = select(Person).options(joinedload(Person.setting))
        for statement, wanted in ((eager.where(Person.id == keys[0]), keys[:1]), (eager, keys)):
            found = session.scalars(statement).all()
            assert sorted(one.id for one in found) == sorted(wanted)
            assert all(one.setting is not None and one.setting.value == "on" for one in found)
        counted = select(Setting.value, func.count(Person.id)).outerjoin(
            Person, Person.setting_id == Setting.id
        )
        assert session.execute(counted.group_by(Setting.value)).all() == [("on", len(keys))]

    await app.work(body, mode="single")


async def test_joins_of_sharded_and_reference_tables(app: Application, shards: ShardedCluster) -> None:
    keys = await fill(app, shards)

    def body(session: Session) -> None:
        joined = select(Person.id, Country.code).join(Country, Country.code == Person.country_code)
        assert sorted(tuple(row) for row in session.execute(joined)) == sorted((key, "de") for key in keys)
        assert [tuple(row) for row in session.execute(joined.where(Person.id == keys[1]))] == [
            (keys[1], "de")
        ]
        assert session.scalar(select(func.count()).select_from(Person).join(Country)) == 3
        preserved = select(Person.id, Country.code).outerjoin(
            Country, (Country.code == Person.country_code) & (Country.name == "no such")
        )
        assert sorted(tuple(row) for row in session.execute(preserved)) == sorted((key, None) for key in keys)
        chosen = select(Person.id).where(
            Person.country_code.in_(select(Country.code).where(Country.rank == 7))
        )
        assert sorted(session.scalars(chosen)) == sorted(keys)
        counted = select(Country.code, func.count(Person.id)).join(Person).group_by(Country.code)
        assert [tuple(row) for row in session.execute(counted)] == [("de", 3)]
        nullable = select(Country.code, Person.id).outerjoin(
            Person, (Person.country_code == Country.code) & (Person.id == keys[1])
        )
        assert sorted(tuple(row) for row in session.execute(nullable.order_by(Country.code))) == [
            ("de", keys[1]),
            ("fr", None),
        ]

    await app.work(body, mode="single")


@pytest.mark.parametrize(
    "statement",
    [
        select(Country.code, Person.id).outerjoin(Person, Person.country_code == Country.code),
        select(Country.code).where(select(Person.id).where(Person.country_code == Country.code).exists()),
        select(Country.code).where(~select(Person.id).where(Person.country_code == Country.code).exists()),
    ],
    ids=["left join", "exists", "not exists"],
)
async def test_reference_rows_that_sharded_ones_decide_about(
    app: Application, shards: ShardedCluster, statement: Any
) -> None:
    keys = await fill(app, shards)
    expected = {
        2: sorted([("fr", None), *(("de", key) for key in keys)], key=str),
        1: [("fr",)] if "NOT" in str(statement) else [("de",)],
    }[len(statement.selected_columns)]

    def body(session: Session) -> None:
        found = [tuple(row) for row in session.execute(statement)]
        assert sorted(found, key=str) == expected

    await app.work(body, mode="single")


async def test_home_tables(app: Application, shards: ShardedCluster) -> None:
    await fill(app, shards)

    def body(session: Session) -> None:
        setting = Setting(value="serial")
        session.add(setting)
        session.flush()
        assert isinstance(setting.id, int)
        session.execute(insert(Setting), [{"value": "bulk"}, {"value": "rows"}])
        session.execute(update(Setting).where(Setting.value == "bulk").values(value=func.upper("bulk")))
        session.execute(insert(Setting).from_select(["value"], select(Country.code)))
        values = select(Setting.value).order_by(Setting.value)
        assert session.scalars(values).all() == ["BULK", "de", "fr", "on", "rows", "serial"]
        session.delete(setting)

    await app.work(body, mode="single")
    assert len(shards.query("s1", "SELECT FROM public.setting")) == 5


# --- declaring -----------------------------------------------------------------------------------------------------


def later(info: dict[str, Any]) -> MetaData:
    metadata = MetaData()
    Table("later", metadata, Column("x", Text, primary_key=True), info={"shardkit": info})
    return metadata


async def test_an_undeclared_table_is_refused(app: Application, shards: ShardedCluster) -> None:
    (table,) = later({"reference": True}).tables.values()
    with pytest.raises(UndeclaredTable):
        await app.work(lambda session: session.execute(select(table)).all())
    (homely,) = later({"home": "s1"}).tables.values()
    with pytest.raises(UndeclaredTable):
        await app.work(lambda session: session.execute(select(homely)).all())


def test_a_table_is_what_the_cluster_says(shards: ShardedCluster) -> None:
    metadata = MetaData()
    table = Table("region", metadata, Column("id", Text, primary_key=True), info={"shardkit": {"home": "s1"}})
    with shards.connect() as cluster:
        with cluster.sessionmaker()() as session, pytest.raises(DeclarationError, match="a reference table"):
            session.execute(select(table))
        with pytest.raises(DeclarationError, match="at home on shard s1"):
            cluster.declare(metadata)


def test_a_home_that_is_no_shard(shards: ShardedCluster) -> None:
    with shards.connect() as cluster, pytest.raises(NoSuchShard):
        cluster.create_all(later({"home": "nowhere"}))
    assert shards.holding("SELECT FROM pg_class WHERE relname = 'later'") == []


def test_reference_tables_are_the_same_everywhere_before_they_are_declared(shards: ShardedCluster) -> None:
    for name in ("s0", "s1", "s2"):
        shards.admin(name).execute("CREATE TABLE public.later (x text PRIMARY KEY, y timestamptz)")
    metadata = later({"reference": True})
    with shards.connect() as cluster:
        shards.admin("s1").execute("INSERT INTO public.later VALUES ('x')")
        with pytest.raises(PreflightFailed, match="other rows on shard s1 than on s0"):
            cluster.declare(metadata)
        for name in ("s0", "s2"):
            shards.admin(name).execute("INSERT INTO public.later VALUES ('x')")
            shards.admin(name).execute("ALTER TABLE public.later ALTER y SET DEFAULT now()")
        shards.admin("s1").execute("ALTER TABLE public.later ALTER y SET DEFAULT now()")
        with pytest.raises(PreflightFailed, match=r"DEFAULT now\(\), which each shard makes by itself"):
            cluster.declare(metadata)


def test_home_rows_are_nowhere_else(shards: ShardedCluster) -> None:
    shards.admin("s2").execute("CREATE TABLE public.later AS SELECT 'x'::text AS x")
    with shards.connect() as cluster, pytest.raises(ShardNotEmpty, match="shard s2"):
        cluster.create_all(later({"home": "s1"}))
