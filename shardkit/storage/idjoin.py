"""The ids of a shard that joins, or comes back from an older state: it must not number rows as another does, or did.

Driven by `storage.membership` and `storage.readmission`, under the lease.
"""

from __future__ import annotations

import shlex

from psycopg import sql
from psycopg.types.json import Jsonb

from shardkit.core.errors import IdsNotSplit
from shardkit.core.topology import Split, Topology

from . import change
from .catalog import Catalog
from .connections import Connection, ShardConnections, transaction, value
from .idsplit import restart
from .numbering import column_of, is_split, of_column

_USED = "SELECT 1 FROM shardkit.topologies WHERE state IN ('current', 'past') AND document @> %s LIMIT 1"


def check_join(
    topology: Topology, shards: ShardConnections, newcomer: Connection, shard_id: int, name: str
) -> None:
    """`IdsNotSplit` if a second shard, or one of this number, could make a primary key that another has."""
    unsplit: dict[str, str] = {}
    narrow: dict[str, int] = {}
    broken: list[str] = []
    for table in topology.tables:
        known = is_split(topology, table)
        if known is None:
            column = column_of(shards.get(topology.shards[0]), table)
            if column is not None:
                unsplit[str(table)] = column
            continue
        if shard_id >= known.stride:
            narrow[str(table)] = known.stride
        for shard in topology.shards:
            try:
                found = of_column(shards.get(shard), table, known.column).problems(known, shard.id)
            except ValueError as error:
                found = [str(error)]
            broken += [f"shard {shard.name}: {text}" for text in found]
        try:
            of_column(newcomer, table, known.column).first(known.floor, known.stride, shard_id)
        except ValueError as error:
            broken.append(f"shard {name}: {error}")
    if unsplit:
        listed = ", ".join(f"{table} ({column})" for table, column in unsplit.items())
        raise IdsNotSplit(
            f"A second shard would number rows as the first does, by its own sequence: {listed}.",
            hint=f"`shardkit ids split {shlex.join(unsplit)}` makes the sequences disjoint; then add the shard.",
            tables=list(unsplit),
        )
    if narrow:
        raise IdsNotSplit(
            f"The ids of {', '.join(narrow)} are split over {min(narrow.values())} shards, and this one would have the "
            f"number {shard_id}.",
            hint=f"`shardkit ids split --shards {_wide_enough(narrow, shard_id)} {shlex.join(narrow)}` makes room.",
            tables=list(narrow),
        )
    if broken:
        raise IdsNotSplit(
            "Sequences are not as they were recorded:\n" + "\n".join(f"  - {text}" for text in broken),
            hint="`shardkit ids split` sets them again; then add the shard.",
            reasons=broken,
        )


def _wide_enough(narrow: dict[str, int], shard_id: int) -> int:
    stride = max(narrow.values())
    while stride <= shard_id:
        stride *= 2
    return stride


def enter(
    catalog: Catalog, shards: ShardConnections, newcomer: Connection, topology: Topology, shard_id: int
) -> None:
    """Set the sequences of a shard that joins, before it can take a row. Can be run again."""
    used = value(catalog.connection, _USED, (Jsonb({"shards": [{"id": shard_id}]}),)) is not None
    for known in topology.splits:
        table = topology.by_table[known.schema, known.name]
        floor = known.floor
        if used:  # by a shard that has left, whose rows are on the others now
            floor = max(
                floor, *(_highest_of(shards.get(shard), known, shard_id) for shard in topology.shards)
            )
        with transaction(newcomer, *change.OPENING):
            change.claim(newcomer, catalog.token or 0)
            restart(newcomer, of_column(newcomer, table, known.column), floor, known.stride, shard_id)


def come_back(
    catalog: Catalog, shards: ShardConnections, connection: Connection, topology: Topology, shard_id: int
) -> None:
    """Set the sequences of a shard that went back in time beyond what it numbered since, as far as the rows are on any
    shard. Can be run again."""
    for known in topology.splits:
        found = of_column(connection, topology.by_table[known.schema, known.name], known.column)
        highest = max(_highest_of(shards.get(shard), known, shard_id) for shard in topology.shards)
        if highest <= found.given and not found.problems(known, shard_id):
            continue
        with transaction(connection, *change.OPENING):
            change.claim(connection, catalog.token or 0)
            restart(connection, found, max(highest, known.floor, found.given), known.stride, shard_id)


def _highest_of(connection: Connection, known: Split, shard_id: int) -> int:
    """The highest id of the numbers of one shard."""
    query = sql.SQL("SELECT max({column}) FROM {table} WHERE {column} %% {stride} = {shard}").format(
        column=sql.Identifier(known.column),
        table=sql.Identifier(known.schema, known.name),
        stride=sql.Literal(known.stride),
        shard=sql.Literal(shard_id),
    )
    return int(value(connection, query, ()) or 0)
