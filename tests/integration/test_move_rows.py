"""Which row was written is noted, not only its key: the last comparison reads those rows and no others."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from shardkit.core.keyrange import POSITION_MAX, POSITION_MIN, Arc, ArcSet
from shardkit.core.ring import position
from shardkit.core.topology import ShardedTable
from shardkit.rebalance.verify import Verifier
from shardkit.storage import digest, sourceguard, tables
from shardkit.storage.connections import Connection, connect, transaction, value
from tests.fix_shards import MakeShards, Shards, fill

ALL = ArcSet([Arc(POSITION_MIN, POSITION_MAX)])
ROWS = 30_000


def compared(connection: Connection, table: ShardedTable) -> digest.Compared:
    found = tables.describe(connection, table)
    assert found is not None
    types = {column.name: column.type for column in found.columns}
    return digest.Compared(found.row_identity(table.key), tuple(types), types)


def note(shards: Shards) -> None:
    """The triggers of a transfer 1 of all rows stand on s1."""
    with transaction(shards.on("s1")):
        for index, table in enumerate(shards.tables):
            sourceguard.install(shards.on("s1"), 1, index, table, ALL)


@pytest.fixture
def giant(make_shards: MakeShards) -> Shards:
    """One key has nearly all rows, on both shards."""
    shards = make_shards(2)
    for name in ("s1", "s2"):
        fill(shards.on(name), 50)
        shards.on(name).execute(
            "INSERT INTO public.posts SELECT 7, g, 'x' FROM generate_series(1000, %s) g", (1000 + ROWS,)
        )
    note(shards)
    return shards


def verifier(shards: Shards) -> Verifier:
    one, two = shards.on("s1"), shards.on("s2")
    return Verifier(one, two, 1, 0, shards.tables, ALL, wait_applied=lambda: None, on_rows=lambda rows: None)


def rows_read(connection: Connection) -> int:
    found = value(
        connection,
        "SELECT coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0) FROM pg_stat_xact_user_tables "
        "WHERE relname = 'posts'",
    )
    return int(found)


def test_a_row_of_a_large_key_is_read_alone(giant: Shards) -> None:
    one = giant.on("s1")
    one.execute("UPDATE public.posts SET body = 'y' WHERE user_id = 7 AND id = 2000")
    ((index, row),) = sourceguard.peek_changes(one, 1)
    with digest.snapshot(one, *digest.BY_INDEX):
        found = digest.by_row(one, giant.tables[index], compared(one, giant.tables[index]), [row])
        assert rows_read(one) < 10
    assert [(part, digests.rows) for part, digests in found.items()] == [(row, 1)]


def test_what_differs_in_a_large_key_is_found_by_row(giant: Shards) -> None:
    giant.on("s2").execute("UPDATE public.posts SET body = 'y' WHERE user_id = 7 AND id IN (2000, 3000)")
    giant.on("s2").execute("DELETE FROM public.posts WHERE user_id = 7 AND id = 4000")
    comparing = verifier(giant)
    comparing._compared = [comparing._compared_of(table) for table in giant.tables]
    place = position(7)
    rows = comparing._differing_rows(0, Arc(place, place), ROWS)
    assert [comparing._named(0, row) for row in sorted(rows)] == [
        f"public.posts user_id=7 id={number}" for number in (2000, 3000, 4000)
    ]


THINGS = ShardedTable("public", "Things", "the owner", "text")
SCHEMA = """
CREATE TYPE public.mood AS ENUM ('sad', 'happy');
CREATE DOMAIN public.short AS text NOT NULL CHECK (length(VALUE) < 10);
CREATE TABLE public."Things" (
    "the owner" varchar(40) NOT NULL, at timestamptz, f float8, b bytea, how public.mood, took interval, s public.short,
    n numeric, "50%" int, body text, PRIMARY KEY (n, at, f, b, how, took, s, "the owner", "50%")
);
CREATE INDEX ON public."Things" ("the owner");
"""
INSERT = """
INSERT INTO public."Things" VALUES
    ('a "key" \N{GRINNING FACE}', '2024-03-31 01:30+00', 0.1::float8 + 0.2, '\\x00ff', 'sad',
     '1 mon -3 days 04:05', 'x', 1.10, 1),
    ('', 'infinity', 'NaN', '', 'happy', '0', '\\"''', -1e-30, 2)
"""
STRANGE = (
    "SET TimeZone = 'Asia/Tokyo'",
    "SET DateStyle = 'German'",
    "SET IntervalStyle = 'postgres_verbose'",
    "SET extra_float_digits = -3",
    "SET bytea_output = 'escape'",
)
WRITES: list[Callable[[Connection], object]] = [
    lambda connection: connection.execute("UPDATE public.\"Things\" SET body = 'y'"),
    lambda connection: connection.execute("UPDATE public.\"Things\" SET n = n + 1, body = 'z'"),
    lambda connection: connection.execute(
        "UPDATE public.\"Things\" SET at = at - interval '1 day' WHERE f < 1"
    ),
]


def test_a_note_reads_as_the_comparison_does_whatever_the_writers_settings(make_shards: MakeShards) -> None:
    shards = make_shards(1, tables=(THINGS,), schema=SCHEMA)
    one = shards.on("s1")
    note(shards)
    with connect(shards.topology().named("s1").url) as application:
        for setting in STRANGE:
            application.execute(setting)
        application.execute(INSERT)
        noted = {row for _, row in sourceguard.peek_changes(one, 1)}
        for write in WRITES:
            write(application)
            noted |= {row for _, row in sourceguard.peek_changes(one, 1)}
    with digest.snapshot(one, *digest.BY_INDEX):
        found = digest.by_row(one, THINGS, compared(one, THINGS), sorted(noted))
    assert len(found) == 2
    assert noted > set(found)
    assert {part.rows for part in found.values()} == {1}


def test_a_table_without_any_identity_is_compared_by_key(make_shards: MakeShards) -> None:
    schema = (
        "CREATE TABLE public.marks (owner int NOT NULL, body text); CREATE INDEX ON public.marks (owner);"
    )
    marks = ShardedTable("public", "marks", "owner", "int")
    shards = make_shards(1, tables=(marks,), schema=schema)
    one = shards.on("s1")
    note(shards)
    one.execute("INSERT INTO public.marks SELECT 5, 'x' FROM generate_series(1, 10)")
    ((_, row),) = sourceguard.peek_changes(one, 1)
    with digest.snapshot(one):
        (found,) = digest.by_row(one, marks, compared(one, marks), [row]).values()
    assert found.rows == 10
