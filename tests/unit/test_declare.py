"""Declarations: what is read from models and tables, and what is refused."""

from __future__ import annotations

import enum
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import (
    CHAR,
    BigInteger,
    Column,
    Enum,
    ForeignKey,
    ForeignKeyConstraint,
    Identity,
    Index,
    Integer,
    MetaData,
    Numeric,
    Sequence,
    SmallInteger,
    String,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
    func,
    text,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator, UserDefinedType

from shardkit.core.errors import DeclarationError
from shardkit.core.topology import ShardedTable
from shardkit.orm import declare
from shardkit.orm.declare import problems, sharded, sharded_table, sharded_tables


class Lower(TypeDecorator[str]):
    impl = String
    cache_ok = True


class Wrapped(TypeDecorator[str]):
    impl = String
    cache_ok = True

    def bind_expression(self, bindparam: Any) -> Any:
        return func.lower(bindparam)


class Colour(enum.Enum):
    RED = "red"


def table(*columns: Any, by: str = "k", **options: Any) -> Table:
    return Table("t", MetaData(), *columns, info={"shardkit": {"sharded_by": by}}, **options)


def fatal(found: Table) -> str:
    with pytest.raises(DeclarationError) as caught:
        sharded_table(found)
    return caught.value.message


# --- classes -------------------------------------------------------------------------------------------------------


def test_a_class_names_an_attribute_and_the_table_its_column() -> None:
    class Base(DeclarativeBase):
        pass

    @sharded(by="owner")
    class Post(Base):
        __tablename__ = "Post"
        __table_args__ = {"schema": "Blog"}  # noqa: RUF012
        owner: Mapped[int] = mapped_column("user", BigInteger, primary_key=True, autoincrement=False)
        id: Mapped[int] = mapped_column(primary_key=True)

    assert sharded_tables(Base.metadata) == (ShardedTable("Blog", "Post", "user", "int"),)


def test_a_table_declares_itself_in_its_info() -> None:
    declared = table(Column("k", Uuid, primary_key=True))
    assert sharded_table(declared) == ShardedTable("public", "t", "k", "uuid")
    assert sharded_table(Table("u", MetaData(), Column("k", Uuid, primary_key=True))) is None


def test_each_class_of_a_joined_inheritance_names_the_column_of_its_own_table() -> None:
    class Base(DeclarativeBase):
        pass

    @sharded(by="id")
    class Person(Base):
        __tablename__ = "person"
        id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
        kind: Mapped[str]
        __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "p"}  # noqa: RUF012

    @sharded(by="id")
    class Worker(Person):
        __tablename__ = "worker"
        id: Mapped[int] = mapped_column("worker_id", ForeignKey("person.id"), primary_key=True)
        __mapper_args__ = {"polymorphic_identity": "w"}  # noqa: RUF012

    assert {(one.name, one.key) for one in sharded_tables(Base.metadata)} == {
        ("person", "id"),
        ("worker", "worker_id"),
    }


@pytest.mark.parametrize("by", ["nothing", "name", "metadata"])
def test_an_attribute_that_is_no_column_of_the_class_is_refused(by: str) -> None:
    class Base(DeclarativeBase):
        pass

    class Plain(Base):
        __tablename__ = "plain"
        id: Mapped[int] = mapped_column(primary_key=True)

    with pytest.raises(DeclarationError, match=by):
        sharded(by=by)(Plain)


def test_a_class_without_a_table_is_refused() -> None:
    class Base(DeclarativeBase):
        pass

    class Abstract(Base):
        __abstract__ = True

    with pytest.raises(DeclarationError, match="not mapped"):
        sharded(by="id")(Abstract)
    with pytest.raises(DeclarationError, match="not mapped"):
        sharded(by="id")(int)


@pytest.mark.parametrize("info", [{"sharded_by": "other"}, {}, "k", None])
def test_an_info_that_names_no_column_is_refused(info: Any) -> None:
    wrong = Table("t", MetaData(), Column("k", Integer, primary_key=True), info={"shardkit": info})
    assert "which is none of its columns" in fatal(wrong)


# --- types of keys -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("type_", "family"),
    [
        (Integer(), "int"),
        (SmallInteger(), "int"),
        (BigInteger(), "int"),
        (String(), "text"),
        (String(20), "text"),
        (Text(), "text"),
        (String(collation="C"), "text"),
        (Lower(), "text"),
        (Enum(Colour, native_enum=False), "text"),
        (Uuid(), "uuid"),
        (Uuid(as_uuid=False), "uuid"),
        (postgresql.UUID(), "uuid"),
        (String().with_variant(BigInteger(), "postgresql"), "int"),
    ],
)
def test_a_key_can_be_of_what_postgresql_hashes_alike(type_: Any, family: str) -> None:
    declared = sharded_table(table(Column("k", type_, primary_key=True, autoincrement=False)))
    assert declared is not None
    assert declared.key_type == family


class Anything(UserDefinedType[Any]):
    def get_col_spec(self, **kw: Any) -> str:
        return "bigint"


@pytest.mark.parametrize(
    "type_",
    [
        Numeric(),
        CHAR(5),
        postgresql.CITEXT(),
        Enum(Colour),
        Uuid(native_uuid=False),
        String(collation="und-x-icu"),
        Wrapped(),
        postgresql.DOMAIN("positive", Integer()),
        postgresql.ARRAY(Integer),
        postgresql.JSONB(),
        Anything(),
    ],
)
def test_a_key_of_another_type_is_refused(type_: Any) -> None:
    assert "cannot be hashed" in fatal(table(Column("k", type_, primary_key=True)))


# --- what the server would decide ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "text"),
    [
        (Column("k", BigInteger, primary_key=True), "serial"),
        (Column("k", BigInteger, primary_key=True, autoincrement=True), "serial"),
        (Column("k", BigInteger, Identity(), primary_key=True), "from the server"),
        (
            Column("k", BigInteger, primary_key=True, server_default="1", autoincrement=False),
            "from the server",
        ),
        (Column("k", BigInteger, primary_key=True, default=func.now(), autoincrement=False), "default"),
        (Column("k", BigInteger, primary_key=True, autoincrement=False, onupdate=5), "changes on update"),
    ],
)
def test_a_key_that_the_server_makes_is_refused(column: Column[Any], text: str) -> None:
    assert text in fatal(table(column))


@pytest.mark.parametrize("default", [5, lambda: 5, uuid.uuid4])
def test_a_python_default_is_fine(default: Any) -> None:
    assert sharded_table(
        table(Column("k", BigInteger, primary_key=True, autoincrement=False, default=default))
    )


def test_a_key_that_can_be_null_is_refused() -> None:
    assert "can be NULL" in fatal(table(Column("k", BigInteger), Column("id", Uuid, primary_key=True)))


def test_a_primary_key_holds_the_shard_key_or_is_a_uuid() -> None:
    k = Column("k", BigInteger, nullable=False)
    given = Column("id", Integer, primary_key=True, autoincrement=False)
    assert "can be equal on two shards" in fatal(table(k, given))
    k = Column("k", BigInteger, nullable=False)
    assert sharded_table(table(k, Column("id", Uuid, primary_key=True)))
    k = Column("k", BigInteger, primary_key=True)
    assert sharded_table(table(k, Column("id", Integer, primary_key=True)))


@pytest.mark.parametrize(
    "made",
    [
        lambda: Column("id", Integer, primary_key=True),
        lambda: Column("id", SmallInteger, Identity(), primary_key=True),
        lambda: Column("id", BigInteger, Identity(always=True), primary_key=True),
        lambda: Column("id", Integer, primary_key=True, server_default=Sequence("s").next_value()),
        lambda: Column("id", Integer, primary_key=True, server_default=text("nextval('s'::regclass)")),
    ],
)
def test_a_primary_key_that_the_server_numbers_is_noted(made: Callable[[], Column[Any]]) -> None:
    found = table(Column("k", BigInteger, nullable=False), made())
    declared = sharded_table(found)
    assert declared is not None
    assert declared.numbered == ("id",)
    (problem,) = problems(found.metadata)
    assert "is numbered by each shard by itself" in problem.what
    assert not problem.fatal
    # It is what an application knows of its model, not what is declared.
    assert declared == ShardedTable("public", "t", "k", "int")


@pytest.mark.parametrize(
    "made",
    [
        lambda: Column("id", Integer, primary_key=True, default=lambda: 5),
        lambda: Column("id", Integer, Sequence("s"), primary_key=True),
        lambda: Column("id", Integer, primary_key=True, server_default=text("5")),
        lambda: Column("id", String, primary_key=True, server_default=text("nextval('s'::regclass)::text")),
    ],
)
def test_a_primary_key_that_nothing_vouches_for_is_refused(made: Callable[[], Column[Any]]) -> None:
    found = table(Column("k", BigInteger, nullable=False), made())
    assert "can be equal on two shards" in fatal(found)


def test_what_else_is_unique_needs_no_split() -> None:
    k = Column("k", BigInteger, primary_key=True, autoincrement=False)
    declared = sharded_table(table(k, Column("id", Integer, Identity(), primary_key=True)))
    assert declared is not None
    assert declared.numbered == ()


def test_all_that_is_wrong_is_told_at_once() -> None:
    wrong = table(Column("k", Numeric), Column("id", Integer, primary_key=True, autoincrement=False))
    with pytest.raises(DeclarationError) as caught:
        sharded_table(wrong)
    assert len(caught.value.fields["problems"]) == 3


# --- across tables -------------------------------------------------------------------------------------------------


def pair(
    *constraint: Any, target_info: bool = True, own_info: bool = True, target_type: Any = BigInteger
) -> MetaData:
    metadata = MetaData()
    Table(
        "target",
        metadata,
        Column("k", target_type, primary_key=True, autoincrement=False),
        Column("id", BigInteger, primary_key=True),
        info={"shardkit": {"sharded_by": "k"}} if target_info else {},
    )
    Table(
        "own",
        metadata,
        Column("k", BigInteger, primary_key=True),
        Column("other", BigInteger),
        Column("id", BigInteger, primary_key=True),
        *constraint,
        info={"shardkit": {"sharded_by": "k"}} if own_info else {},
    )
    return metadata


def test_a_foreign_key_carries_both_shard_keys() -> None:
    good = ForeignKeyConstraint(["k", "id"], ["target.k", "target.id"])
    assert problems(pair(good)) == []
    for columns in (["other", "id"], ["id", "k"]):
        (problem,) = problems(pair(ForeignKeyConstraint(columns, ["target.k", "target.id"])))
        assert "can name a row on another shard" in problem.what
        with pytest.raises(DeclarationError, match="another shard"):
            sharded_tables(pair(ForeignKeyConstraint(columns, ["target.k", "target.id"])))


def test_a_foreign_key_stays_between_sharded_tables() -> None:
    def constraint() -> ForeignKeyConstraint:
        return ForeignKeyConstraint(["k", "id"], ["target.k", "target.id"])

    assert "leaves the shards" in problems(pair(constraint(), target_info=False))[0].what
    assert "names rows that are spread" in problems(pair(constraint(), own_info=False))[0].what
    assert problems(pair(constraint(), own_info=False, target_info=False)) == []
    assert "two types" in problems(pair(constraint(), target_type=Text))[0].what


def test_unique_constraints_without_the_key_are_told_but_not_refused() -> None:
    metadata = MetaData()
    Table(
        "t",
        metadata,
        Column("k", BigInteger, primary_key=True),
        Column("id", BigInteger, primary_key=True),
        Column("name", Text, unique=True),
        Column("mail", Text),
        UniqueConstraint("k", "mail"),
        Index("ux", "mail", unique=True),
        Index("ix", "mail"),
        info={"shardkit": {"sharded_by": "k"}},
    )
    found = problems(metadata)
    assert sorted(problem.what for problem in found) == [
        "the unique constraint (name) holds on each shard alone",
        "the unique constraint ux (mail) holds on each shard alone",
    ]
    assert not any(problem.fatal for problem in found)
    assert sharded_tables(metadata)


def test_a_table_without_a_primary_key_is_told_but_not_refused() -> None:
    metadata = MetaData()
    Table("t", metadata, Column("k", BigInteger, nullable=False), info={"shardkit": {"sharded_by": "k"}})
    (problem,) = problems(metadata)
    assert "no primary key" in problem.what
    assert not problem.fatal
    assert sharded_tables(metadata)


def test_problems_of_all_tables_come_together() -> None:
    metadata = pair(ForeignKeyConstraint(["other", "id"], ["target.k", "target.id"]))
    Table("bad", metadata, Column("k", Numeric, primary_key=True), info={"shardkit": {"sharded_by": "k"}})
    Table("worse", metadata, Column("x", Numeric, primary_key=True), info={"shardkit": {"sharded_by": "k"}})
    assert [problem.table for problem in problems(metadata)] == ["bad", "own", "worse"]


def test_a_foreign_key_to_a_table_that_is_not_there_is_left_to_create_all() -> None:
    metadata = MetaData()
    Table(
        "t",
        metadata,
        Column("k", BigInteger, ForeignKey("missing.k"), primary_key=True),
        info={"shardkit": {"sharded_by": "k"}},
    )
    assert [problem.what for problem in problems(metadata)] == []


def test_the_declaration_is_read_again_when_it_changes() -> None:
    changing = table(Column("k", BigInteger, primary_key=True), Column("l", BigInteger, primary_key=True))
    assert declare.sharded_table(changing) == ShardedTable("public", "t", "k", "int")
    changing.info["shardkit"] = {"sharded_by": "l"}
    assert declare.sharded_table(changing) == ShardedTable("public", "t", "l", "int")
