"""Arcs as SQL select exactly the rows whose position lies within them, as text of a query and of a row filter."""

from __future__ import annotations

import random
from collections.abc import Sequence
from uuid import UUID

import pytest
from psycopg import sql

from shardkit.core.keyrange import POSITION_MAX, POSITION_MIN, Arc, ArcSet, slot_arc
from shardkit.core.ring import position
from shardkit.core.topology import KeyType, ShardedTable
from shardkit.storage.connections import connect
from shardkit.storage.predicate import BETWEEN_AT_MOST, relation, within
from tests.fix_postgres import FreshDatabase

EVERYTHING = ArcSet([Arc(POSITION_MIN, POSITION_MAX)])


def some_arcs(number: int, seed: int) -> ArcSet:
    numbers = random.Random(seed)
    ends = sorted({numbers.randint(POSITION_MIN, POSITION_MAX) for _ in range(2 * number)})
    return ArcSet(Arc(first, last) for first, last in zip(ends[::2], ends[1::2], strict=True))


ARCS = {
    "none": ArcSet(),
    "everything": EVERYTHING,
    "one": ArcSet([slot_arc(17, 30_000)]),
    "the first position": ArcSet([Arc(POSITION_MIN, POSITION_MIN)]),
    "to the last position": ArcSet([Arc(0, POSITION_MAX)]),
    "a few": some_arcs(BETWEEN_AT_MOST, 1),
    "many": some_arcs(200, 2),
    "many to the last": some_arcs(50, 3) | ArcSet([Arc(POSITION_MAX - 2**60, POSITION_MAX)]),
    "many from the first": some_arcs(50, 4) | ArcSet([Arc(POSITION_MIN, POSITION_MIN + 2**60)]),
}
KEYS: dict[str, tuple[KeyType, str, Sequence[int | str | UUID]]] = {
    "smallint": ("int", "smallint", [*range(-500, 500), -(2**15), 2**15 - 1]),
    "bigint": ("int", "bigint", [*range(1000), -(2**63), 2**63 - 1, -1]),
    "text": ("text", "varchar(80)", [f"\N{GRINNING FACE}{n}'\\" for n in range(1000)] + [""]),
    "uuid": ("uuid", "uuid", [UUID(int=n**12) for n in range(1000)]),
}


@pytest.mark.parametrize("keys", KEYS)
def test_within(fresh_database: FreshDatabase, keys: str) -> None:
    family, column_type, values = KEYS[keys]
    table = ShardedTable('Sche"ma', "order", "User Key", family)
    with connect(fresh_database()) as database:
        database.execute('CREATE SCHEMA "Sche""ma"')
        database.execute(
            sql.SQL("CREATE TABLE {} ({} {} PRIMARY KEY)").format(
                relation(table), sql.Identifier(table.key), sql.SQL(column_type)
            )
        )
        with database.cursor() as cursor:
            cursor.executemany(
                sql.SQL("INSERT INTO {} VALUES (%s)").format(relation(table)), [(value,) for value in values]
            )
        for name, arcs in ARCS.items():
            found = database.execute(
                sql.SQL("SELECT {} FROM {} WHERE {}").format(
                    sql.Identifier(table.key), relation(table), within(table, arcs)
                )
            )
            assert {row[0] for row in found} == {value for value in values if position(value) in arcs}, name
            if arcs:
                database.execute(
                    sql.SQL("CREATE PUBLICATION p FOR TABLE {} WHERE ({})").format(
                        relation(table), within(table, arcs)
                    )
                )
                database.execute("DROP PUBLICATION p")
