"""A sharded cluster in the middle of a move, and one plain database with the same rows: the entities of both.

Driven by `tests.fix_twins`. Every shard but the first holds stale copies of rows that are in transit to it, so that a
row that is read from the wrong place shows. Works are the same functions of a session for both and roll back what
they write.
"""

from __future__ import annotations

import enum
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    DateTime,
    Engine,
    Enum,
    ForeignKey,
    ForeignKeyConstraint,
    Integer,
    MetaData,
    Numeric,
    String,
    Table,
    create_engine,
    event,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship
from sqlalchemy.types import TypeDecorator

import shardkit
from shardkit.core.keyrange import ArcSet, slot_arc
from shardkit.core.ring import position
from shardkit.orm.declare import is_sharded, key_column
from shardkit.orm.places import is_whole
from shardkit.storage.urls import sqlalchemy_url
from tests.sharded import ShardedCluster

KEYS = [-(2**63), -7, -1, *range(31), 2**31, 2**40 + 1, 2**63 - 1]
NAMES = ["", "a", "A", "b", "ä", "😀", "Z", "q\"uo'te", "_b", "a b", "Ab"]


class Color(enum.Enum):
    RED = "r"
    GREEN = "g"
    BLUE = "b"


class Doubled(TypeDecorator[int]):
    """Stored as twice its value."""

    impl = Integer
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> Any:
        return None if value is None else value * 2

    def process_result_value(self, value: Any, dialect: Any) -> Any:
        return None if value is None else value // 2


class Base(DeclarativeBase):
    pass


@shardkit.reference
class Country(Base):
    __tablename__ = "country"
    code: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]


@shardkit.home("s1")
class Setting(Base):
    __tablename__ = "setting"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    value: Mapped[str]


class Owned:
    """What belongs to a user."""

    user_id: Mapped[int] = mapped_column(BigInteger)


visits = Table(
    "visit",
    Base.metadata,
    Column(
        "user_id",
        BigInteger,
        ForeignKey("User.id", ondelete="CASCADE"),
        primary_key=True,
        autoincrement=False,
    ),
    Column("code", String, ForeignKey("country.code"), primary_key=True),
    info={"shardkit": {"sharded_by": "user_id"}},
)


@shardkit.sharded(by="id")
class User(Base):
    __tablename__ = "User"  # a name that has to be quoted
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    name: Mapped[str] = mapped_column(String(20))
    score: Mapped[Decimal | None] = mapped_column(Numeric(12, 2))
    joined: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))
    rank: Mapped[int | None]
    country_code: Mapped[str | None] = mapped_column(ForeignKey("country.code"))
    setting_id: Mapped[int | None]
    country: Mapped[Country | None] = relationship()
    setting: Mapped[Setting | None] = relationship(
        primaryjoin="foreign(User.setting_id) == Setting.id", viewonly=True
    )
    visited: Mapped[list[Country]] = relationship(
        secondary=visits, order_by=Country.code, passive_deletes=True
    )
    posts: Mapped[list[Post]] = relationship(
        back_populates="user", order_by="Post.id", cascade="all, delete-orphan", passive_deletes=True
    )
    files: Mapped[list[File]] = relationship(back_populates="user", cascade="all, delete-orphan")


post_tags = Table(
    "post_tag",
    Base.metadata,
    Column("user_id", BigInteger, primary_key=True, autoincrement=False),
    Column("post_id", Integer, primary_key=True, autoincrement=False),
    Column("tag_id", Integer, primary_key=True, autoincrement=False),
    ForeignKeyConstraint(["user_id", "post_id"], ["post.user_id", "post.id"], ondelete="CASCADE"),
    ForeignKeyConstraint(["user_id", "tag_id"], ["tag.user_id", "tag.id"]),
    info={"shardkit": {"sharded_by": "user_id"}},
)


@shardkit.sharded(by="user_id")
class Post(Owned, Base):
    __tablename__ = "post"
    user_id: Mapped[int] = mapped_column(ForeignKey("User.id", ondelete="CASCADE"), primary_key=True)
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    title: Mapped[str | None]
    likes: Mapped[int | None]
    user: Mapped[User] = relationship(back_populates="posts")
    tags: Mapped[list[Tag]] = relationship(secondary=post_tags, back_populates="posts", order_by="Tag.id")


@shardkit.sharded(by="user_id")
class Tag(Owned, Base):
    __tablename__ = "tag"
    user_id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    label: Mapped[str]
    posts: Mapped[list[Post]] = relationship(secondary=post_tags, back_populates="tags", order_by=Post.id)


class PostTag(Base):
    """The association table as an entity."""

    __table__ = post_tags
    post: Mapped[Post] = relationship(viewonly=True)
    tag: Mapped[Tag] = relationship(viewonly=True)


@shardkit.sharded(by="user_id")
class File(Owned, Base):
    """Its primary key is not its shard key."""

    __tablename__ = "file"
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=uuid.uuid4)
    user_id: Mapped[int] = mapped_column(ForeignKey("User.id"))
    name: Mapped[str]
    size: Mapped[int | None]
    user: Mapped[User] = relationship(back_populates="files")


@shardkit.sharded(by="color")
class Paint(Base):
    __tablename__ = "paint"
    color: Mapped[Color] = mapped_column(Enum(Color, native_enum=False, length=10), primary_key=True)
    liters: Mapped[int]


@shardkit.sharded(by="half")
class Scale(Base):
    __tablename__ = "scale"
    half: Mapped[int] = mapped_column(Doubled, primary_key=True, autoincrement=False)
    weight: Mapped[int | None]


made = iter(range(1_000_000, 10**9))


ticks = iter(range(10**9))


@shardkit.sharded(by="id")
class Made(Base):
    """Its key is made by a Python default, and something with each update."""

    __tablename__ = "made"
    id: Mapped[int] = mapped_column(
        BigInteger, primary_key=True, autoincrement=False, default=lambda: next(made)
    )
    n: Mapped[int]
    tick: Mapped[int] = mapped_column(default=0, onupdate=lambda: next(ticks))


def rows() -> Iterator[tuple[Table, dict[str, Any]]]:
    """The rows of the one plain database, by column name; parents first."""
    tables = Base.metadata.tables
    for code in ("at", "de", "fr", "it"):
        yield tables["country"], {"code": code, "name": code.upper()}
    yield tables["setting"], {"id": 1, "value": "on"}
    start = datetime(2024, 3, 31, tzinfo=UTC)
    for place, key in enumerate(KEYS):
        yield (
            tables["User"],
            {
                "id": key,
                "name": NAMES[place * 7 % len(NAMES)],
                "score": None if place % 6 == 5 else Decimal(place * 13 % 37) / 4,
                "joined": None if place % 7 == 6 else start + timedelta(hours=place, microseconds=place),
                "rank": None if place % 4 == 3 else place % 5,
                "country_code": [None, "de", "fr", "it"][place % 4],
                "setting_id": 1 if place % 5 == 0 else None,
            },
        )
        for code in ("at", "de", "fr")[: place % 4]:
            yield visits, {"user_id": key, "code": code}
        for number in range(1, 3):
            yield tables["tag"], {"user_id": key, "id": number, "label": "xy"[number - 1]}
        for number in range(place % 4):
            title = None if (place + number) % 5 == 4 else NAMES[(place + number) % len(NAMES)]
            likes = None if number == 2 else (place * 3 + number) % 5
            yield tables["post"], {"user_id": key, "id": number, "title": title, "likes": likes}
            for tag in range(1, 1 + (place + number) % 3):
                yield post_tags, {"user_id": key, "post_id": number, "tag_id": tag}
        for number in range(place % 3):
            identity = uuid.UUID(int=place << 40 | number)
            yield tables["file"], {"id": identity, "user_id": key, "name": f"f{number}", "size": place % 4}
    for color in Color:
        yield tables["paint"], {"color": color, "liters": len(color.name)}
    for half in range(12):
        yield tables["scale"], {"half": half, "weight": None if half % 4 == 0 else half % 5}


_STALE = {
    "name": "stale",
    "title": "stale",
    "label": "stale",
    "liters": 99,
    "weight": 99,
    "likes": 99,
    "rank": 99,
}


def stale(row: dict[str, Any]) -> dict[str, Any]:
    """What a copy of a row looks like that should not be seen."""
    return {**row, **{name: value for name, value in _STALE.items() if name in row}}


def sent(table: Table, row: dict[str, Any]) -> Any:
    """The shard key of a row as it is stored."""
    value = row[key_column(table).name]
    if isinstance(value, Color):
        return value.name
    return value * 2 if table.name == "scale" else value


class Twins:
    """The cluster, and an engine of the plain database. ``plain`` and ``same`` run works."""

    def __init__(self, sharded: ShardedCluster, plain_url: str) -> None:
        self.sharded = sharded
        self.engine: Engine = create_engine(sqlalchemy_url(plain_url))
        metadata: MetaData = Base.metadata
        metadata.create_all(self.engine)
        with sharded.connect() as cluster:
            cluster.create_all(metadata)
        self._mark()
        self.topology = sharded.topology
        self._fill()

    def close(self) -> None:
        self.engine.dispose()
        self.sharded.close()

    def _mark(self) -> None:
        """To s1 half of what s0 owns is in transit, to s2 many small arcs of what s1 owns."""
        coarse = ArcSet([slot_arc(0, 12000)])
        fine = ArcSet([slot_arc(21900 + 40 * number, 20) for number in range(500)])
        with self.sharded.lease() as catalog:
            self.sharded.mark(catalog, self.sharded.topology.named("s1").id, coarse)
            self.sharded.mark(catalog, self.sharded.topology.named("s2").id, fine)
            self.sharded.drain(catalog)

    def _fill(self) -> None:
        listed = list(rows())
        with self.engine.begin() as connection:
            for table, row in listed:
                connection.execute(table.insert(), row)
        topology = self.topology
        for shard in topology.shards:
            engine = create_engine(sqlalchemy_url(shard.url))
            with engine.begin() as connection:
                for table, row in listed:
                    if is_sharded(table):
                        at = position(sent(table, row))
                        if topology.ring.owner_at(at) == shard.id:
                            connection.execute(table.insert(), row)
                        elif at in shard.in_transit:
                            connection.execute(table.insert(), stale(row))
                    elif is_whole(table) and (table.name != "setting" or shard.name == "s1"):
                        connection.execute(table.insert(), row)
            engine.dispose()

    def owner(self, key: Any) -> str:
        """Name of the shard that owns a key."""
        return self.topology.by_id[self.topology.ring.owner(key)].name

    def in_transit(self) -> list[int]:
        """The keys of users of which another shard holds a stale copy."""
        shards = self.topology.shards
        return [key for key in KEYS if any(position(key) in shard.in_transit for shard in shards)]

    def plain(self, work: Callable[[Any], Any]) -> Any:
        """What a work returns of the plain database; what it writes is rolled back."""
        with Session(self.engine) as session:
            return work(session)


# --- what is compared ----------------------------------------------------------------------------------------------


def shown(value: Any) -> Any:
    """A value, or what is loaded of an entity, with its type, so that 1 is neither True nor Decimal(1)."""
    if isinstance(value, Base):
        columns = type(value).__mapper__.column_attrs.keys()
        return type(value).__name__, *((name, shown(value.__dict__.get(name))) for name in columns)
    if isinstance(value, tuple | list):
        return [shown(item) for item in value]
    if hasattr(value, "_fields"):  # a row
        return [shown(item) for item in value]
    if isinstance(value, dict):
        return {key: shown(item) for key, item in value.items()}
    return type(value).__name__, str(value)


_KINDS = {
    "all sharded tables are bound": "one key",
    "any shard gives": "any shard",
    "each row is made on": "parts",
    "each row is decided about": "parts",
    "its rows are not made shard by shard": "pulled",
    "each row goes to": "rows",
}


def how(session: Any, statement: Any) -> str:
    """How a statement is planned: "one key", "any shard", "parts", "pulled" or "rows"."""
    reason = shardkit.explain(session, statement).reason
    return next((kind for start, kind in _KINDS.items() if reason.startswith(start)), reason)


class Sent(list[tuple[str, str]]):
    """What was sent to shards: pairs of a shard's name and SQL, without what guards and savepoints send."""

    def shards(self, start: str = "") -> list[str]:
        """The names of the shards, one for each statement that begins so."""
        return [name for name, text in self if text.startswith(start)]


@contextmanager
def sending(session: Any) -> Iterator[Sent]:
    """Note what a session over shards sends in the block."""
    cluster = session.cluster
    found = Sent()
    listening: list[tuple[Any, Any]] = []
    for shard in cluster.topology.shards:
        engine = session.engines.shard(shard)

        def note(connection: Any, cursor: Any, text: str, *_: Any, name: str = shard.name) -> None:
            found.append((name, text))

        event.listen(engine, "before_cursor_execute", note)
        listening.append((engine, note))
    try:
        yield found
    finally:
        for engine, listener in listening:
            event.remove(engine, "before_cursor_execute", listener)
