"""Changes of the topology that move no row: a catalog is made, a shard joins, tables are declared.

Driven by the commands and by an application's `ShardCluster.declare`; each takes the mover's lease for its time.
"""

from __future__ import annotations

from collections.abc import Iterable
from uuid import UUID

from ..core.errors import (
    AlreadyShard,
    DeclarationError,
    JobRunning,
    NameTaken,
    NotInitialised,
    PreflightFailed,
    ShardNotEmpty,
)
from ..core.placement import initial
from ..core.topology import ShardedTable, Topology
from . import change, migrate, servers, tables
from .catalog import Catalog
from .connections import Connection, ShardConnections, connect_catalog, connect_shard, value
from .topologies import write_copy
from .urls import without_password


def initialise(catalog_url: str) -> UUID:
    """Make the catalog in this database, or bring an older one up to date; its identity."""
    connect_catalog(catalog_url).close()
    migrate.upgrade(catalog_url, "catalog")
    with Catalog(connect_catalog(catalog_url), catalog_url) as catalog:
        return catalog.initialise()


def join(catalog: Catalog, shards: ShardConnections, *, name: str, url: str, weight: int = 100) -> Topology:
    """A database becomes a shard that owns nothing yet; the first one owns everything.

    The caller holds the lease. Can be run again after it was interrupted. Refuses, with nothing changed: a name in
    use, a database that is a shard already, a server that cannot be one, tables that are missing, differ or hold rows.
    """
    change.settle(catalog, shards)
    current = catalog.current()
    if catalog.running_job() is not None:
        raise JobRunning
    url = without_password(url)
    if current is not None and any(shard.name == name for shard in current.shards):
        raise NameTaken(f"A shard named {name!r} exists already.", name=name)
    with connect_shard(url, name) as connection:
        servers.check_server(connection)
        _check_unclaimed(connection, catalog.cluster_id(), name, current)
        if current is not None:
            _check_tables(connection, shards.get(current.shards[0]), current, name)
        migrate.upgrade(url, "shard")
        shard_id = 0 if current is None else max(shard.id for shard in current.shards) + 1
        _claim(connection, catalog.cluster_id(), shard_id, name)

    def make(before: Topology | None, version: int) -> Topology:
        if before is None:
            tokens, owners = initial({shard_id: weight})
            return Topology.first(version, [(shard_id, name, url, weight)], tokens, owners)
        return before.joined(version, shard_id=shard_id, name=name, url=url, weight=weight)

    topology = change.apply(catalog, shards, make)
    change.drain(catalog, shards)
    return topology


def _check_unclaimed(connection: Connection, cluster: UUID, name: str, current: Topology | None) -> None:
    if value(connection, "SELECT to_regclass('shardkit.shard')") is None:
        return
    row = connection.execute("SELECT cluster_id, name, shard_id FROM shardkit.shard").fetchone()
    if row is None:
        return
    if row[0] != cluster:
        raise AlreadyShard(
            f"This database is shard {row[1]!r} of another catalog ({row[0]}).", cluster=str(row[0]), name=row[1]
        )
    if current is not None and row[2] in current.by_id:
        raise AlreadyShard(f"This database is a shard of this catalog already, named {row[1]!r}.", name=row[1])


def _check_tables(connection: Connection, pattern: Connection, current: Topology, name: str) -> None:
    problems = []
    for table in current.tables:
        found = tables.describe(connection, table)
        problems += tables.differences(table, tables.describe(pattern, table), found)
        if found is not None and not tables.is_empty(connection, table):
            raise ShardNotEmpty(f"Table {table} on the new shard {name} has rows already.", table=str(table))
    if problems:
        raise PreflightFailed(
            f"The tables of the new shard {name} are not those of the others:\n"
            + "\n".join(f"  - {problem}" for problem in problems),
            hint="Create the same tables there first, with the migrations or the models that made the others.",
            reasons=problems,
        )


def _claim(connection: Connection, cluster: UUID, shard_id: int, name: str) -> None:
    connection.execute(
        "INSERT INTO shardkit.shard (cluster_id, shard_id, name) VALUES (%s, %s, %s) "
        "ON CONFLICT (singleton) DO UPDATE SET shard_id = excluded.shard_id, name = excluded.name "
        "WHERE shard.cluster_id = excluded.cluster_id",
        (cluster, shard_id, name),
    )


def declare(catalog: Catalog, shards: ShardConnections, new: Iterable[ShardedTable]) -> Topology:
    """Add tables to those that are sharded; the caller holds the lease.

    They must exist, alike, on every shard, and be empty where there is more than one: rows put there without the
    ring would stand on wrong shards. Declaring what is declared already changes nothing.
    """
    change.settle(catalog, shards)
    current = catalog.current()
    if current is None:
        raise NotInitialised("The catalog has no shard yet.", hint="Add the first with `shardkit shard add NAME URL`.")
    wanted = {(table.schema, table.name): table for table in new}
    for key, table in wanted.items():
        known = current.by_table.get(key)
        if known is not None and known != table:
            raise DeclarationError(
                f"Table {table} is sharded by {known.key} ({known.key_type}), and cannot become sharded by "
                f"{table.key} ({table.key_type})."
            )
    added = [table for key, table in sorted(wanted.items()) if key not in current.by_table]
    if not added:
        return current
    if catalog.running_job() is not None:
        raise JobRunning
    _check_declared(current, shards, added)
    topology = change.apply(
        catalog, shards, lambda before, version: _declared(before, version, added)
    )
    for shard in topology.shards:
        with (connection := shards.get(shard)).transaction():
            change.claim(connection, catalog.token or 0)
            write_copy(connection, topology, shard.id)
    return topology


def _declared(before: Topology | None, version: int, added: list[ShardedTable]) -> Topology:
    assert before is not None
    return before.declared(version, (*before.tables, *added))


def _check_declared(current: Topology, shards: ShardConnections, added: list[ShardedTable]) -> None:
    problems = []
    first = shards.get(current.shards[0])
    for table in added:
        pattern = tables.describe(first, table)
        problems += [f"shard {current.shards[0].name}: {text}" for text in tables.key_problems(table, pattern)]
        for shard in current.shards[1:]:
            found = tables.describe(shards.get(shard), table)
            problems += [f"shard {shard.name}: {text}" for text in tables.differences(table, pattern, found)]
        for shard in current.shards if len(current.shards) > 1 else ():
            if tables.describe(shards.get(shard), table) and not tables.is_empty(shards.get(shard), table):
                raise ShardNotEmpty(f"Table {table} on shard {shard.name} has rows already.", table=str(table))
    if problems:
        raise PreflightFailed(
            "These tables cannot be declared:\n" + "\n".join(f"  - {problem}" for problem in problems),
            hint="Create them alike on every shard first; `cluster.create_all(metadata)` does both.",
            reasons=problems,
        )
