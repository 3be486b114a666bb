"""Entities with columns of many types, and what the ORM makes of columns, spread over a `tests.routed.Fleet`.

Values are few, so that rows are equal, NULL and next to each other often.
"""

from __future__ import annotations

import enum
import uuid
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

from sqlalchemy import (
    BigInteger,
    DateTime,
    Enum,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Interval,
    Numeric,
    String,
    Table,
    func,
    select,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.orm import DeclarativeBase, Mapped, column_property, mapped_column, relationship

from shardkit.orm.declare import sharded

KEYS = [-(2**63), -7, -1, 0, 1, 2, 3, 5, 8, 13, 21, 34, 2**31, 2**40 + 1, 2**63 - 1]
NAMES = ["", "a", "A", "b", "ä", "😀", "Z", "q\"uo'te", "a,b", "{x}", None]


class Mood(enum.Enum):
    """In an order that is neither that of the names nor that of the values."""

    SAD = "sad"
    HAPPY = "happy"
    ANGRY = "angry"


class Base(DeclarativeBase):
    pass


@sharded(by="id")
class Person(Base):
    __tablename__ = "Person"

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    kind: Mapped[str] = mapped_column(String(10))
    name: Mapped[str | None] = mapped_column(String(20))
    code: Mapped[str] = mapped_column(String(collation="C"))
    score: Mapped[Decimal | None] = mapped_column(Numeric)
    height: Mapped[float | None] = mapped_column(Float)
    born: Mapped[date | None]
    mood: Mapped[Mood | None] = mapped_column(Enum(Mood, name="mood"))
    flag: Mapped[bool | None]
    gap: Mapped[timedelta | None] = mapped_column(Interval)
    tags: Mapped[list[str] | None] = mapped_column(ARRAY(String))
    data: Mapped[Any] = mapped_column(JSONB)
    token: Mapped[uuid.UUID]
    posts: Mapped[list[Post]] = relationship(back_populates="person", order_by="Post.number")

    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "person"}  # noqa: RUF012

    @hybrid_property
    def double(self) -> Any:
        return None if self.score is None else self.score * 2


@sharded(by="id")
class Worker(Person):
    __tablename__ = "worker"

    id: Mapped[int] = mapped_column(BigInteger, ForeignKey("Person.id"), primary_key=True)
    wage: Mapped[int | None]

    __mapper_args__ = {"polymorphic_identity": "worker"}  # noqa: RUF012


@sharded(by="owner")
class Post(Base):
    __tablename__ = "post"

    owner: Mapped[int] = mapped_column("user", BigInteger, ForeignKey("Person.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    kind: Mapped[str] = mapped_column(String(10))
    title: Mapped[str | None] = mapped_column(String(20))
    likes: Mapped[int | None]
    rating: Mapped[Decimal | None] = mapped_column(Numeric(8, 3))
    at: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))
    person: Mapped[Person] = relationship(back_populates="posts")
    stars: Mapped[list[Star]] = relationship(back_populates="post", order_by="Star.id")

    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "post"}  # noqa: RUF012


class Photo(Post):
    """In the table of all posts."""

    __mapper_args__ = {"polymorphic_identity": "photo"}  # noqa: RUF012


@sharded(by="owner")
class Star(Base):
    __tablename__ = "star"
    __table_args__ = (ForeignKeyConstraint(["owner", "number"], ["post.user", "post.number"]),)

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    owner: Mapped[int] = mapped_column(BigInteger)
    number: Mapped[int]
    by: Mapped[int | None] = mapped_column(BigInteger)
    post: Mapped[Post] = relationship(back_populates="stars")


Person.post_count = column_property(
    select(func.count(Post.number))
    .where(Post.owner == Person.id)
    .correlate(Person.__table__)
    .scalar_subquery()
)


def rows() -> Iterator[tuple[Table, dict[str, Any]]]:
    """The rows of the one plain database, by column name."""
    tables = Base.metadata.tables
    moods = [*(mood.name for mood in Mood), None]
    for place, key in enumerate(KEYS):
        score = [None, Decimal("1.50"), Decimal("1.5"), Decimal("-2"), Decimal("1e20"), Decimal("NaN")]
        yield (
            tables["Person"],
            {
                "id": key,
                "kind": "worker" if place % 3 == 0 else "person",
                "name": NAMES[place * 7 % len(NAMES)],
                "code": "bBaA_é"[place % 6],
                "score": score[place % 6],
                "height": [1.5, float("nan"), None, -0.0, 0.0, 1e300][place * 5 % 6],
                "born": None if place % 5 == 0 else date(2000, 1, 1 + place % 4),
                "mood": moods[place % 4],
                "flag": [True, False, None][place % 3],
                "gap": None if place % 4 == 3 else timedelta(days=place % 3, seconds=place),
                "tags": [None, [], ["x", 'y"z', ""], ["a,b", None]][place % 4],
                "data": [{"a": place % 2}, [1, None], None, "text"][place % 4],
                "token": uuid.UUID(int=(place * 37) % 15),
            },
        )
        if place % 3 == 0:
            yield tables["worker"], {"id": key, "wage": None if place % 2 else place}
        for number in range(place % 4):
            yield (
                tables["post"],
                {
                    "user": key,
                    "number": number,
                    "kind": "photo" if (place + number) % 2 else "post",
                    "title": NAMES[(place + number) % len(NAMES)],
                    "likes": None if number == 2 else (place * 3 + number) % 5,
                    "rating": None if place % 5 == 4 else Decimal(place - number) / 8,
                    "at": None
                    if number == 1
                    else datetime(2024, 1, 1 + place % 3, number, tzinfo=UTC) + timedelta(microseconds=place),
                },
            )
            for star in range((place + number) % 3):
                yield (
                    tables["star"],
                    {
                        "id": uuid.UUID(int=place << 40 | number << 20 | star),
                        "owner": key,
                        "number": number,
                        "by": None if star else KEYS[(place + number) % len(KEYS)],
                    },
                )
