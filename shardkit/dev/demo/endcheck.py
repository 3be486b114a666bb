"""What the servers hold at the end, read directly: round the session and its router, so that no mistake of theirs can
hide one. Where a row belongs is computed by the server that holds it, from the row's key.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from psycopg import sql

from shardkit.core.topology import Shard, Topology
from shardkit.storage.catalog import Catalog
from shardkit.storage.connections import Connection, connect_shard, value
from shardkit.storage.predicate import position, relation

from .content import KEY_COLUMNS
from .findings import Stored
from .models import MODELS

_LEFTOVERS = Path(__file__).with_name("leftovers.sql")


# --- what the servers hold -----------------------------------------------------------------------------------------


def stored_rows(topology: Topology) -> Iterator[Stored]:
    """Every row of the demo's tables on every shard."""
    for shard in topology.shards:
        with connect_shard(shard.url, shard.name) as connection:
            for name in MODELS:
                yield from _rows_of(connection, topology, shard, name)


def _rows_of(connection: Connection, topology: Topology, shard: Shard, name: str) -> Iterator[Stored]:
    table = topology.by_table["public", name]
    keys = KEY_COLUMNS[name]
    others = [column.name for column in MODELS[name].__table__.columns if column.name not in keys]
    query = sql.SQL("SELECT {}, {} FROM {}").format(
        sql.SQL(", ").join(map(sql.Identifier, (*keys, *others))), position(table), relation(table)
    )
    with connection.transaction(), connection.cursor("rows") as cursor:
        cursor.itersize = 5000
        for row in cursor.execute(query):
            values = dict(zip(others, row[len(keys) : -1], strict=True))
            yield Stored(shard.id, name, row[: len(keys)], values, row[-1])


def count_rows(shards: Iterable[Shard]) -> dict[str, dict[str, int]]:
    """Rows by shard and table."""
    counts: dict[str, dict[str, int]] = {}
    for shard in shards:
        with connect_shard(shard.url, shard.name) as connection:
            counts[shard.name] = {
                name: value(
                    connection, sql.SQL("SELECT count(*) FROM {}").format(sql.Identifier("public", name))
                )
                for name in MODELS
            }
    return counts


def analyse(topology: Topology) -> None:
    """Give the servers the statistics that time gives those of an application: a move's estimates are made of them."""
    for shard in topology.shards:
        with connect_shard(shard.url, shard.name) as connection:
            connection.execute("ANALYZE")


def leftovers(catalog: Catalog, topology: Topology, left: Sequence[Shard] = ()) -> list[str]:
    """What a move should have cleaned up and did not: on the shards and those that left, in the topology, in the
    catalog."""
    found = [f"arcs in transit on shard {shard.name}" for shard in topology.shards if shard.in_transit]
    if (job := catalog.running_job()) is not None:
        found.append(f"the unfinished job {job.id} in the catalog")
    if (proposal := catalog.proposed()) is not None:
        found.append(f"the pending topology {proposal.version} in the catalog")
    query = _LEFTOVERS.read_bytes()
    for name, tables in count_rows(left).items():
        found += [f"{rows:,} {table} on shard {name}, which left" for table, rows in tables.items() if rows]
    for shard in (*topology.shards, *left):
        with connect_shard(shard.url, shard.name) as connection:
            rows = connection.execute(query).fetchall()
            found += [f"{kind} {name} on shard {shard.name}" for kind, name in rows]
            if shard in left:
                continue
            if value(connection, "SELECT to_regclass(%s)", (f"shardkit.{shard.fence.relation}",)) is None:
                found.append(f"no fence {shard.fence.relation} on shard {shard.name}")
    return found
