"""What the server tells about tables: estimates of tables that were never analysed."""

from __future__ import annotations

import pytest

from shardkit.core.topology import ShardedTable
from shardkit.storage.connections import connect
from shardkit.storage.tables import describe
from tests.fix_postgres import FreshDatabase

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
