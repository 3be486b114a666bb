"""Columns and settings of the application's own that a move has to cope with."""

from __future__ import annotations

import pytest
from psycopg import sql

from shardkit.core.errors import PreflightFailed
from shardkit.core.topology import ShardedTable
from shardkit.storage.connections import connect, value
from tests.fix_shards import MakeShards, fill, owner_of


def carried(make_shards: MakeShards, table: ShardedTable, schema: str, filling: str) -> None:
    """A table moves, written while it does."""
    shards = make_shards(1, tables=(table,), schema=schema)
    shards.on("s1").execute(filling)
    before = shards.rows(table)["s1"]
    # On another server, where the types of the schema have other numbers.
    shards.schema = "CREATE TYPE public.filler AS ENUM ('a'); CREATE TYPE public.more AS (a int);" + schema
    shards.add("s2", 1)
    noted: list[object] = []

    def touch(progress: object) -> None:
        if str(getattr(progress, "phase", "")) == "cutting over" and not noted:
            noted.append(shards.on("s1").execute("UPDATE public.things SET touched = 1"))

    shards.move(listener=touch)
    assert noted
    shards.assert_clean()
    after = shards.rows(table)
    assert all(after.values())
    assert sorted(row[0] for rows in after.values() for row in rows) == sorted(row[0] for row in before)
    assert {row[1] for rows in after.values() for row in rows} == {row[1] for row in before}
    assert {row[2] for rows in after.values() for row in rows} == {1}


def test_a_percent_sign_in_names(make_shards: MakeShards) -> None:
    carried(
        make_shards,
        ShardedTable("public", "things", "rate%", "int"),
        'CREATE TABLE public.things ("rate%" int PRIMARY KEY, "%s" text, touched int)',
        "INSERT INTO public.things SELECT g, 'x' FROM generate_series(1, 200) g",
    )


def test_types_that_have_other_numbers_on_the_target(make_shards: MakeShards) -> None:
    carried(
        make_shards,
        ShardedTable("public", "things", "id", "int"),
        """
        CREATE TYPE public.mood AS ENUM ('sad', 'happy');
        CREATE TYPE public.pair AS (one public.mood, two int);
        CREATE TABLE public.things (id int PRIMARY KEY, moods public.mood[], touched int, p public.pair);
        """,
        "INSERT INTO public.things "
        "SELECT g, '{sad,happy}', 0, ROW('sad', g)::public.pair FROM generate_series(1, 200) g",
    )


SETTINGS = {
    "statement_timeout": "1h",
    "lock_timeout": "1h",
    "idle_in_transaction_session_timeout": "1h",
    "default_transaction_isolation": "serializable",
    "default_transaction_read_only": "on",
    "synchronous_commit": "off",
}


def test_settings_of_a_database_that_are_meant_for_applications(make_shards: MakeShards) -> None:
    shards = make_shards(1)
    fill(shards.on("s1"), 200)
    shards.add("s2", 1)
    for name in ("s1", "s2"):
        database = sql.Identifier(shards.on(name).info.dbname)
        for setting, to in SETTINGS.items():
            shards.on(name).execute(
                sql.SQL("ALTER DATABASE {} SET {} = {}").format(database, sql.SQL(setting), sql.Literal(to))
            )
    with connect(shards.topology().named("s1").url) as connection:
        assert {setting: value(connection, f"SHOW {setting}") for setting in SETTINGS} == {
            "statement_timeout": "0",
            "lock_timeout": "0",
            "idle_in_transaction_session_timeout": "0",
            "default_transaction_isolation": "read committed",
            "default_transaction_read_only": "off",
            "synchronous_commit": "on",
        }
    shards.move()
    shards.assert_clean()


def test_a_type_without_equality_needs_a_primary_key(make_shards: MakeShards) -> None:
    """An UPDATE of such a row could not be applied: its old version cannot be found."""
    schema = """
    CREATE TABLE public.things (id int NOT NULL, "a%" json, p point);
    CREATE INDEX ON public.things (id);
    """
    shards = make_shards(1, tables=(ShardedTable("public", "things", "id", "int"),), schema=schema)
    shards.add("s2", 1)
    with pytest.raises(PreflightFailed) as caught:
        shards.move()
    named = [line for line in caught.value.message.splitlines() if "has no equality" in line]
    assert ["a% is json" in named[0], "p is point" in named[1]] == [True, True]
    assert len(named) == 2
    assert not shards.topology().by_id[1].in_transit


def test_sequences_that_count_down_are_small_or_share_by_steps(make_shards: MakeShards) -> None:
    entries = ShardedTable("public", "entries", "owner", "int")
    schema = """
    CREATE SEQUENCE public.down INCREMENT -1;
    CREATE SEQUENCE public.steps INCREMENT 2;
    CREATE TABLE public.entries (
        owner bigint NOT NULL,
        small smallserial,
        down bigint NOT NULL DEFAULT nextval('public.down'),
        step bigint NOT NULL DEFAULT nextval('public.steps'),
        PRIMARY KEY (owner, small)
    );
    """
    shards = make_shards(1, tables=(entries,), schema=schema)
    one = shards.on("s1")
    one.execute("SELECT setval('public.entries_small_seq', 32000)")
    one.execute("INSERT INTO public.entries (owner) SELECT g % 50 FROM generate_series(1, 500) g")
    shards.add("s2", 1)
    two = shards.on("s2")
    two.execute("ALTER SEQUENCE public.steps RESTART 2")  # the even numbers, beside the odd ones
    shards.move()
    shards.assert_clean()
    owner = next(key for key in range(50) if owner_of(shards.topology(), key) == "s2")
    given = "INSERT INTO public.entries (owner) VALUES (%s) RETURNING small, down, step"
    ((small, down, step),) = two.execute(given, (owner,)).fetchall()
    assert 32500 < small < 32767
    assert down < -500
    assert (step > 999, step % 2) == (True, 0)
