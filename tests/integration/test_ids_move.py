"""Rows with slot-carrying ids through a real move: they are found by id before, while and after."""

from __future__ import annotations

import threading

from sqlalchemy import BigInteger, ForeignKey, UniqueConstraint, event
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship
from sqlalchemy.schema import CreateTable

import shardkit
from shardkit.core.topology import ShardedTable
from tests.fix_shards import MakeShards


class Base(DeclarativeBase):
    pass


@shardkit.sharded(by="id")
class Owner(Base):
    __tablename__ = "owner"

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, default=shardkit.slot_id(json_safe=True))
    things: Mapped[list[Thing]] = relationship()


@shardkit.sharded(by="owner_id")
class Thing(Base):
    __tablename__ = "thing"
    __table_args__ = (UniqueConstraint("owner_id", "id"),)

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, default=shardkit.slot_id())
    owner_id: Mapped[int] = mapped_column(ForeignKey("owner.id"))
    name: Mapped[str]


SCHEMA = ";\n".join(
    str(CreateTable(table).compile(dialect=PGDialect_psycopg())).replace("TABLE ", "TABLE public.", 1)  # type: ignore[no-untyped-call]
    for table in Base.metadata.sorted_tables
).replace("REFERENCES ", "REFERENCES public.")
TABLES = (ShardedTable("public", "owner", "id", "int"), ShardedTable("public", "thing", "owner_id", "int"))


def test_ids_are_found_before_while_and_after_a_move(make_shards: MakeShards) -> None:
    shards = make_shards(1, schema=SCHEMA, tables=TABLES)
    with shardkit.connect(shards.catalog_url) as cluster:
        with cluster.sessionmaker()() as session:
            owners = [Owner(things=[Thing(name="a"), Thing(name="b")]) for _ in range(150)]
            session.add_all(owners)
            session.commit()
            made = {thing.id: thing.name for owner in owners for thing in owner.things}
        assert len(made) == 300
        shards.add("s2", 1)

        errors: list[BaseException] = []
        ending = threading.Event()
        rounds = 0

        def read() -> None:
            nonlocal rounds
            try:
                while not ending.is_set() or rounds < 2:
                    for id_, name in made.items():
                        with cluster.sessionmaker()() as session:
                            assert session.get_one(Thing, id_).name == name
                    rounds += 1
            except BaseException as error:
                errors.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        try:
            shards.move()
        finally:
            ending.set()
            reader.join()
        assert not errors, errors
        shards.assert_clean()
        held = shards.rows(TABLES[1])
        assert {row[0] for rows in held.values() for row in rows} == set(made)
        assert all(held.values())

        sent: list[str] = []
        for shard in cluster.topology.shards:
            engine = cluster.engines.shard(shard)
            event.listen(engine, "before_cursor_execute", lambda *_, name=shard.name: sent.append(name))
        for name, rows in held.items():
            for row in rows[:20]:
                sent.clear()
                with cluster.sessionmaker()() as session:
                    thing = session.get_one(Thing, row[0])
                    assert sent == [name]
                    thing.name = "new"
                    session.commit()
