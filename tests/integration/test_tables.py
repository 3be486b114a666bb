"""What the server tells about tables: estimates of some never analysed, and of one that changes meanwhile."""

from __future__ import annotations

import threading
from collections import Counter
from uuid import uuid4

import pytest
from psycopg import sql

from shardkit.core.topology import ShardedTable
from shardkit.storage.connections import connect
from shardkit.storage.tables import describe
from tests.fix_postgres import FreshDatabase
from tests.sharded import until

ROWS = 5_000


PLAIN = "CREATE TABLE public.t (id bigint, body text)"
PARTITIONED = """
CREATE TABLE public.t (id bigint, body text) PARTITION BY HASH (id);
CREATE TABLE public.t0 PARTITION OF public.t FOR VALUES WITH (MODULUS 2, REMAINDER 0);
CREATE TABLE public.t1 PARTITION OF public.t FOR VALUES WITH (MODULUS 2, REMAINDER 1);
"""


@pytest.mark.parametrize(
    ("definition", "rows"), [(PLAIN, 0), (PLAIN, 100), (PLAIN, ROWS), (PARTITIONED, ROWS)]
)
def test_an_estimate_without_statistics(fresh_database: FreshDatabase, definition: str, rows: int) -> None:
    table = ShardedTable("public", "t", "id", "int")
    with connect(fresh_database()) as connection:
        connection.execute(definition)
        connection.execute(
            "INSERT INTO public.t SELECT g, repeat('x', 40) FROM generate_series(1, %s) g", (rows,)
        )
        found = describe(connection, table)
        assert found is not None
        assert rows / 4 <= found.rows_estimate <= rows * 4
        assert found.bytes >= rows * 40
        connection.execute("ANALYZE public.t")
        found = describe(connection, table)
        assert found is not None
        assert found.rows_estimate == rows


def test_what_is_no_table(fresh_database: FreshDatabase) -> None:
    """It is described for whoever refuses it; also within a transaction, which goes on."""
    with connect(fresh_database()) as connection:
        connection.execute(
            "CREATE VIEW public.v AS SELECT 1 AS id; CREATE MATERIALIZED VIEW public.m AS SELECT 1 AS id"
        )
        for _ in range(2):
            for schema, name, kind in [("public", "v", "v"), ("public", "m", "m")]:
                found = describe(connection, ShardedTable(schema, name, "id", "int"))
                assert found is not None
                assert found.kind == kind
            for schema, name in [("public", "missing"), ("missing", "t")]:
                assert describe(connection, ShardedTable(schema, name, "id", "int")) is None
            connection.execute("BEGIN")


def test_a_table_that_the_role_may_not_read(fresh_database: FreshDatabase) -> None:
    role = sql.Identifier(f"role_{uuid4().hex[:12]}")
    table = ShardedTable("public", "t", "id", "int")
    with connect(fresh_database()) as connection:
        connection.execute(PLAIN)
        connection.execute("INSERT INTO public.t VALUES (1, 'one'); ANALYZE public.t")
        expected = describe(connection, table)
        connection.execute(sql.SQL("CREATE ROLE {}").format(role))
        try:
            connection.execute(sql.SQL("SET ROLE {}").format(role))
            assert describe(connection, table) == expected
        finally:
            connection.execute("RESET ROLE")
            connection.execute(sql.SQL("DROP ROLE {}").format(role))


def test_indexes_that_come_and_go(fresh_database: FreshDatabase) -> None:
    """As those that a move sets aside: in one transaction they go, and their definitions are kept elsewhere."""
    url = fresh_database()
    table = ShardedTable("public", "t", "id", "int")
    ending = threading.Event()
    seen = Counter[int]()

    def change() -> None:
        with connect(url) as connection:
            while not ending.is_set():
                connection.execute(
                    "CREATE INDEX one ON public.t (body); CREATE INDEX two ON public.t (id, body)"
                )
                connection.execute("DROP INDEX public.one, public.two")

    with connect(url) as connection:
        connection.execute(PLAIN)

        def look() -> bool:
            found = describe(connection, table)
            assert found is not None
            seen[len(found.indexes)] += 1
            # On a busy machine one side may run for long before the other does.
            return seen.total() >= 300 and len(seen) > 1

        thread = threading.Thread(target=change)
        thread.start()
        try:
            until(look, "both of the table's states to be seen")
        finally:
            ending.set()
            thread.join()
    assert set(seen) == {0, 2}
