"""Changes of the topology that move no row: a catalog is made, a shard joins, tables are declared.

Driven by the commands and by an application's `ShardCluster.declare`; each takes the mover's lease for its time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from shardkit.core.errors import AlreadyShard, DeclarationError, NameTaken, PreflightFailed, ShardNotEmpty
from shardkit.core.placement import initial
from shardkit.core.topology import DeclaredTable, HomeTable, ReferenceTable, Shard, ShardedTable, Topology

from . import change, claims, idjoin, migrate, references, servers, tables
from .catalog import Catalog
from .connections import Connection, ShardConnections, connect_catalog, connect_shard, transaction
from .failpoints import failpoint
from .urls import without_password


def initialise(catalog_url: str) -> bool:
    """Make the catalog in this database, or bring an older one and its shards up to date; whether it made one."""
    connect_catalog(catalog_url).close()
    migrate.upgrade(catalog_url, "catalog")
    with Catalog(connect_catalog(catalog_url), catalog_url) as catalog:
        made = catalog.initialise()
        current = catalog.current()
    for shard in current.shards if current is not None else ():
        connect_shard(shard.url, shard.name).close()
        if migrate.pending(shard.url, "shard"):
            migrate.upgrade(shard.url, "shard")
    return made


def check_join(
    catalog: Catalog,
    shards: ShardConnections,
    newcomer: Connection,
    *,
    name: str,
    url: str,
    weight: int = 100,
) -> Topology:
    """The topology as it would be with this database as a shard; changes nothing.

    ``newcomer`` is a connection to the database. Refuses: a name in use, a database that is a shard already, a server
    that cannot be one, tables that are missing, differ or hold rows, primary keys that both would number. Needs every
    other shard to answer. A joining that was interrupted recognises itself by name, URL and weight.
    """
    current = catalog.proposed() or catalog.current()  # a pending one is what `join` begins with
    catalog.require_no_job()
    if current is not None and _has_joined(newcomer, catalog, current, name, without_password(url), weight):
        return current
    claims.check_free(newcomer, catalog.cluster_id(), current)
    if current is not None and any(shard.name == name for shard in current.shards):
        raise NameTaken(f"A shard named {name!r} exists already.", name=name)
    servers.check_server(newcomer)
    for shard in current.shards if current is not None else ():
        shards.get(shard)
    if current is not None:
        resumed = (
            claims.read(newcomer) is not None
        )  # of this cluster, and rows of reference tables may be there
        _check_tables(newcomer, shards.get(current.shards[0]), current, name, resumed)
    newcomer_id = catalog.next_shard_id()
    if current is not None:
        idjoin.check_join(current, shards, newcomer, newcomer_id, name)
    return _joined(current, catalog.next_version(), newcomer_id, name, without_password(url), weight)


def join(
    catalog: Catalog,
    shards: ShardConnections,
    *,
    name: str,
    url: str,
    weight: int = 100,
    patience: float = 60.0,
) -> Topology:
    """A database becomes a shard that owns nothing yet; the first one owns everything.

    It holds the rows of the reference tables, and its sequences are set apart from others', before it is one. The
    caller holds the lease. Can be run again after it was interrupted. What `check_join` refuses changes nothing.
    ``patience`` is how long, in seconds, it waits for the transactions that may write reference tables without it;
    then `MoveWaiting`, and nothing has changed.
    """
    change.settle_no_job(catalog, shards)
    url = without_password(url)
    with connect_shard(url, name) as connection:
        expected = check_join(catalog, shards, connection, name=name, url=url, weight=weight)
        if expected == (before := catalog.current()):
            change.drain(catalog, shards)
            return expected
        migrate.upgrade(url, "shard")
        claim = claims.Claim(catalog.cluster_id(), expected.named(name).id, name)
        claims.write(catalog, connection, claim, url)
        failpoint("join.claimed")
        if before is not None:
            idjoin.enter(catalog, shards, connection, before, claim.shard_id)
            failpoint("join.split")
        if before is not None and before.references:
            _copy_first(catalog, shards, before, connection)

        def copy_rest(source: Connection) -> None:
            # Nobody writes reference tables while the shard that is written first is closed, so this is what every
            # shard holds; and what was copied before is not copied again.
            assert before is not None
            references.copy(source, connection, catalog.token or 0, before.references)
            failpoint("join.copied")

        topology = change.apply(
            catalog,
            shards,
            lambda now, version: _joined(now, version, claim.shard_id, name, url, weight),
            while_closed=copy_rest,
            patience=patience,
        )
    change.drain(catalog, shards)
    return topology


def _copy_first(catalog: Catalog, shards: ShardConnections, current: Topology, newcomer: Connection) -> None:
    """Copy the reference tables while applications go on, so that little is left for the moment when they wait."""
    first = shards.get(min(current.shards, key=lambda shard: shard.id))
    with transaction(first):
        references.copy(first, newcomer, catalog.token or 0, current.references)
    failpoint("join.copied_first")


def _has_joined(
    connection: Connection, catalog: Catalog, current: Topology, name: str, url: str, weight: int
) -> bool:
    """Whether the database is this very shard already, or will be as soon as the pending change is settled."""
    claim = claims.read(connection)
    if claim is None or (claim.cluster, claim.name) != (catalog.cluster_id(), name):
        return False
    shard = current.by_id.get(claim.shard_id)
    if shard is None or (shard.name, shard.url) != (name, url):
        return False
    if shard.weight != weight:
        raise AlreadyShard(
            f"Shard {name} has joined already, with the weight {shard.weight}.",
            hint=f"Go on with `--weight {shard.weight}`, or with `shardkit rebalance run`.",
            name=name,
        )
    return True


def _joined(
    current: Topology | None, version: int, shard_id: int, name: str, url: str, weight: int
) -> Topology:
    if current is None:
        tokens, owners = initial({shard_id: weight})
        return Topology.first(version, [(shard_id, name, url, weight)], tokens, owners)
    return current.joined(version, shard_id=shard_id, name=name, url=url, weight=weight)


def _check_tables(
    connection: Connection, pattern: Connection, current: Topology, name: str, resumed: bool
) -> None:
    problems = []
    everywhere: list[DeclaredTable] = [*current.tables, *current.references]
    for table in everywhere:
        found = tables.describe(connection, table)
        problems += tables.differences(table, tables.describe(pattern, table), found)
        may_hold_rows = resumed and isinstance(table, ReferenceTable)
        if found is not None and not may_hold_rows and not tables.is_empty(connection, table):
            raise ShardNotEmpty(f"Table {table} on the new shard {name} has rows already.", table=str(table))
    if problems:
        raise PreflightFailed(
            f"The tables of the new shard {name} are not those of the others:\n"
            + "\n".join(f"  - {problem}" for problem in problems),
            hint="Create the same tables there first, with the migrations or the models that made the others.",
            reasons=problems,
        )


def declare(catalog: Catalog, shards: ShardConnections, new: Iterable[DeclaredTable]) -> Topology:
    """Add tables to those that are declared; the caller holds the lease.

    Sharded ones must exist, alike, on every shard, and be empty where there is more than one: rows put there without
    the ring would stand on wrong shards. Reference tables must exist with the same rows on every shard, home tables on
    their shard. Declaring what is declared already changes nothing.
    """
    wanted = {(table.schema, table.name): table for table in new}
    if not _added(current := catalog.require_current(), wanted):
        return current
    change.settle_no_job(catalog, shards)
    added = _added(current := catalog.require_current(), wanted)
    if not added:
        return current
    catalog.require_no_job()
    check_declared(current, shards, added)
    topology = change.apply(catalog, shards, lambda before, version: _declared(before, version, added))
    change.announce(catalog, shards, topology)
    return topology


def _added(current: Topology, wanted: Mapping[tuple[str, str], DeclaredTable]) -> list[DeclaredTable]:
    """Those that are not declared; `DeclarationError` for one that is declared as something else."""
    for key, table in wanted.items():
        known = current.declared_tables.get(key)
        if known is not None and known != table:
            raise DeclarationError(
                f"Table {table} is {known.description}, and cannot become {table.description}."
            )
    return [table for key, table in sorted(wanted.items()) if key not in current.declared_tables]


def _declared(before: Topology | None, version: int, added: list[DeclaredTable]) -> Topology:
    assert before is not None
    return before.declared(version, (*before.declared_tables.values(), *added))


def check_declared(current: Topology, shards: ShardConnections, added: Iterable[DeclaredTable]) -> None:
    """Refuse tables that cannot be what they are declared as, as the servers have them; changes nothing."""
    problems = []
    for table in added:
        if isinstance(table, HomeTable):
            problems += _home_problems(table, current, shards)
            continue
        first, *others = current.shards
        pattern = tables.describe(shards.get(first), table)
        found = (
            tables.key_problems(table, pattern)
            if isinstance(table, ShardedTable)
            else references.problems(table, pattern)
        )
        problems += [f"shard {first.name}: {text}" for text in found]
        for shard in others:
            other = tables.describe(shards.get(shard), table)
            problems += [f"shard {shard.name}: {text}" for text in tables.differences(table, pattern, other)]
        if isinstance(table, ReferenceTable):
            problems += _reference_problems(table, current, shards)
        else:
            for shard in current.shards if others else ():
                _check_empty(table, shard, shards)
    if problems:
        raise PreflightFailed(
            "These tables cannot be declared:\n" + "\n".join(f"  - {problem}" for problem in problems),
            hint="Create them alike on every shard first; `cluster.create_all(metadata)` does both.",
            reasons=problems,
        )


def _check_empty(table: DeclaredTable, shard: Shard, shards: ShardConnections) -> None:
    connection = shards.get(shard)
    if tables.describe(connection, table) and not tables.is_empty(connection, table):
        raise ShardNotEmpty(f"Table {table} on shard {shard.name} has rows already.", table=str(table))


def _reference_problems(table: ReferenceTable, current: Topology, shards: ShardConnections) -> list[str]:
    connections = {shard.name: shards.get(shard) for shard in current.shards}
    found = references.digests(connections, table)
    first = current.shards[0].name
    return [
        f"table {table} has other rows on shard {name} than on {first}"
        for name, digest_there in found.items()
        if digest_there is not None and found[first] is not None and digest_there != found[first]
    ]


def _home_problems(table: HomeTable, current: Topology, shards: ShardConnections) -> list[str]:
    home = current.named(table.shard)
    found = tables.describe(shards.get(home), table)
    for shard in current.shards:
        if shard.id != home.id:
            _check_empty(table, shard, shards)
    if found is None:
        return [f"shard {home.name}: table {table} does not exist"]
    return [] if found.kind in ("r", "p") else [f"shard {home.name}: {table} is no table"]
