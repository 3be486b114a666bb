"""A source that is kept follows what is written on its target, of every kind of table, and nothing else is let near."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from shardkit.core.errors import JobRunning, NothingKept, VerificationFailed
from shardkit.core.topology import ShardedTable
from shardkit.rebalance.mover import Mover
from shardkit.storage.catalog import Catalog
from shardkit.storage.connections import value
from tests.fix_shards import MakeShards, Shards, fill, owner_of

ODD = (
    ShardedTable("Weird Schema", 'Ta"ble', "order", "text"),
    ShardedTable("public", "notes", "owner", "int"),
    ShardedTable("public", "events", "user_id", "int"),
)
ODD_SCHEMA = """
CREATE SCHEMA "Weird Schema";
CREATE TABLE "Weird Schema"."Ta""ble" ("order" varchar(40) NOT NULL PRIMARY KEY, "End" text, "user" jsonb);
CREATE TABLE public.notes (id uuid PRIMARY KEY DEFAULT gen_random_uuid(), owner int NOT NULL, body text);
CREATE INDEX ON public.notes (owner);
CREATE TABLE public.events (user_id bigint NOT NULL, day int NOT NULL, what text, PRIMARY KEY (user_id, day))
    PARTITION BY RANGE (day);
CREATE TABLE public.events_1 PARTITION OF public.events FOR VALUES FROM (0) TO (5);
CREATE TABLE public.events_2 PARTITION OF public.events FOR VALUES FROM (5) TO (10);
"""
WRITES = (
    """UPDATE "Weird Schema"."Ta""ble" SET "user" = NULL WHERE "user" IS NOT NULL""",
    "UPDATE public.notes SET body = NULL WHERE owner % 3 = 0",
    "DELETE FROM public.notes WHERE owner % 3 = 1",
    "UPDATE public.events SET day = 9 WHERE day = 0",  # into another partition
    "DELETE FROM public.events WHERE day = 6",
)


def everything(shards: Shards) -> dict[str, list[str]]:
    """The rows of all shards together."""
    return {
        str(table): sorted(repr(row) for rows in shards.rows(table).values() for row in rows)
        for table in shards.tables
    }


def test_every_kind_of_table_comes_back_as_it_was_written(make_shards: MakeShards) -> None:
    shards = make_shards(1, tables=ODD, schema=ODD_SCHEMA)
    one = shards.on("s1")
    one.execute(
        """
        INSERT INTO "Weird Schema"."Ta""ble"
        SELECT '\N{GRINNING FACE}''' || g || '\\', repeat('long ', 2000), '{"a": 1}' FROM generate_series(1, 200) g
        """
    )
    one.execute("INSERT INTO public.notes (owner, body) SELECT g - 150, 'x' FROM generate_series(1, 300) g")
    one.execute(
        "INSERT INTO public.events SELECT u * 10000000000, d, 'x' FROM generate_series(1, 100) u, "
        "generate_series(0, 8) d"
    )
    shards.add("s2", 1)
    shards.move(keep_source=True)
    for statement in WRITES:
        assert shards.on("s2").execute(statement).rowcount > 0
    shards.rollback()
    shards.assert_clean()
    assert not any(shards.rows(table)["s2"] for table in ODD)
    moved_back = {str(table): shards.rows(table)["s1"] for table in ODD}
    assert len(moved_back[str(ODD[0])]) == 200
    assert sum(row[2] is None for row in moved_back[str(ODD[0])]) > 50
    assert sum(row[2] is None for row in moved_back[str(ODD[1])]) > 20
    assert len(moved_back[str(ODD[1])]) < 300
    assert {row[1] for row in moved_back[str(ODD[2])]} == set(range(10))
    assert value(one, "SELECT relreplident::text FROM pg_class WHERE relname = 'notes'") == "d"
    assert value(shards.on("s2"), "SELECT relreplident::text FROM pg_class WHERE relname = 'notes'") == "d"


def refused(shards: Shards, name: str, statement: str, *parameters: Any) -> str | None:
    try:
        shards.on(name).execute(statement, parameters)
    except psycopg.Error as error:
        return error.sqlstate
    return None


def test_who_goes_round_the_session_is_refused_on_both_sides(make_shards: MakeShards) -> None:
    shards = make_shards(2)
    fill(shards.on("s1"), 100)
    shards.move(keep_source=True)
    key = next(key for key in range(1, 100) if owner_of(shards.topology(), key) == "s2")
    write = "UPDATE public.users SET n = n + 1 WHERE id = %s"
    assert refused(shards, "s1", write, key) == "SK001"
    assert refused(shards, "s2", write, key) is None
    for name in ("s1", "s2"):
        assert refused(shards, name, "TRUNCATE public.posts") == "SK003"
    assert (
        refused(shards, "s2", "UPDATE public.posts SET user_id = -user_id WHERE user_id = %s", key) == "SK002"
    )
    shards.rollback()
    assert refused(shards, "s1", write, key) is None
    assert value(shards.on("s1"), "SELECT n FROM public.users WHERE id = %s", (key,)) == 2
    shards.assert_clean()


def test_a_difference_stops_the_rollback_and_is_named(make_shards: MakeShards) -> None:
    shards = make_shards(2)
    fill(shards.on("s1"), 100)
    shards.move(keep_source=True)
    before = everything(shards)
    key = next(key for key in range(1, 100) if owner_of(shards.topology(), key) == "s2")
    with shards.on("s1").transaction():
        shards.on("s1").execute("SET LOCAL session_replication_role = replica")
        shards.on("s1").execute("UPDATE public.users SET name = 'somebody else' WHERE id = %s", (key,))
    with pytest.raises(VerificationFailed, match=f"public.users id={key}") as caught:
        shards.rollback()
    assert caught.value.exit_code == 4
    with pytest.raises(NothingKept, match="Not every transfer"):
        shards.finalize()
    with Mover(shards.catalog_url) as mover:
        assert mover.abort().state == "running"
    assert shards.finalize().state == "done"
    shards.assert_clean()
    assert everything(shards) != before  # the copies on the source are gone, the right row is left
    assert value(shards.on("s2"), "SELECT name FROM public.users WHERE id = %s", (key,)) == f"user {key}"


def test_nothing_else_begins_while_a_source_is_kept(make_shards: MakeShards) -> None:
    shards = make_shards(2)
    fill(shards.on("s1"), 50)
    with Mover(shards.catalog_url) as mover, pytest.raises(NothingKept):
        mover.rollback()
    shards.move(keep_source=True)
    with Mover(shards.catalog_url) as mover, pytest.raises(JobRunning, match="still keep") as caught:
        mover.start("rebalance")
    assert "rebalance finalize" in caught.value.hint
    assert shards.resume().state == "running"  # nothing to do
    with Catalog.open(shards.catalog_url) as catalog:
        assert catalog.is_kept(catalog.latest_job())  # type: ignore[arg-type]
    shards.finalize()
    shards.assert_clean()
