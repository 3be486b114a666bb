"""Whose shard a database is: the one row of `shardkit.shard`, written before the topology knows the shard.

Driven by `storage.membership`. A claim whose joining was killed before its topology was proposed is *stale*: no
topology names it, the database took part in nothing, and whoever adds it next may overwrite it. The catalog notes each
joining before the claim is made, so that a stale claim can be found, though no topology leads to it. The claim of a
shard that *left* stays, with a copy of the topology that does not name it: for routers that slept. It, too, may be
overwritten.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from uuid import UUID

from shardkit.core.errors import AlreadyShard, ShardUnreachable
from shardkit.core.topology import Topology

from . import change, topologies
from .catalog import Catalog
from .connections import Connection, connect_shard, transaction, value

_NOTED = """
SELECT DISTINCT detail ->> 'name', detail ->> 'url' FROM shardkit.events WHERE event = 'joining' ORDER BY 1, 2
"""
_READ = "SELECT cluster_id, shard_id, name FROM shardkit.shard"
_WRITE = """
INSERT INTO shardkit.shard (cluster_id, shard_id, name) VALUES (%s, %s, %s)
ON CONFLICT (singleton) DO UPDATE SET shard_id = excluded.shard_id, name = excluded.name
WHERE shard.cluster_id = excluded.cluster_id
"""


@dataclass(frozen=True, slots=True)
class Claim:
    """A database says that it is this shard of this cluster."""

    cluster: UUID
    shard_id: int
    name: str

    def known_to(self, topology: Topology | None) -> bool:
        """Whether the topology has this very shard: a number alone may have been given to another since."""
        shard = topology.by_id.get(self.shard_id) if topology is not None else None
        return shard is not None and shard.name == self.name


def read(connection: Connection) -> Claim | None:
    """The claim on a database, if there is one."""
    if value(connection, "SELECT to_regclass('shardkit.shard')") is None:
        return None
    row = connection.execute(_READ).fetchone()
    return Claim(*row) if row is not None else None


def check_free(connection: Connection, cluster: UUID, topology: Topology | None) -> None:
    """`AlreadyShard` unless the database is nobody's, or its claim is a stale one of this cluster, or of a shard that
    left it."""
    claim = read(connection)
    if claim is None:
        return
    if claim.cluster != cluster:
        # The statement of the default hint would take a catalog away that lives beside the shard.
        catalog_there = value(connection, "SELECT to_regclass('shardkit.cluster')") is not None
        raise AlreadyShard(
            f"This database is shard {claim.name!r} of another catalog ({claim.cluster}).",
            hint="Name another database: this one holds a catalog as well." if catalog_there else None,
            cluster=str(claim.cluster),
            name=claim.name,
        )
    if claim.known_to(topology):
        raise AlreadyShard(
            f"This database is a shard of this catalog already, named {claim.name!r}.",
            hint="Name another database; `shardkit shard list` shows those in use.",
            name=claim.name,
        )
    taken = topologies.read_copy(connection)
    known = topology.version if topology is not None else 0
    if taken is not None and (claim.known_to(taken) or taken.version > known):
        raise AlreadyShard(
            f"This database was shard {claim.name!r} of this catalog in topology {taken.version}, of which the catalog "
            "knows nothing.",
            hint="The catalog is older than the shard: keep applications away and restore its newer state.",
            name=claim.name,
        )


def write(catalog: Catalog, connection: Connection, claim: Claim, url: str) -> None:
    """Note the joining in the catalog, then claim the database, or claim it again; the caller has checked it."""
    with catalog.writing("join.claim") as cursor:
        catalog.event(cursor, "joining", name=claim.name, url=url)
    with transaction(connection):
        # The mover before may only have seemed dead: from here on it cannot claim, nor open.
        change.claim(connection, catalog.token or 0)
        if connection.execute(_WRITE, (claim.cluster, claim.shard_id, claim.name)).rowcount == 0:
            raise AlreadyShard("Another catalog has just made this database its shard.", name=claim.name)


def stale(catalog: Catalog) -> list[tuple[str, str]]:
    """Names and URLs of the databases that were claimed for this cluster, as a shard that never came.

    Those that do not answer are left out: nothing is known of them, and a claim alone does no harm.
    """
    current, cluster = catalog.proposed() or catalog.current(), catalog.cluster_id()
    in_use = {shard.url for shard in current.shards} if current is not None else set()
    ever = catalog.shards_ever()
    return [
        (name, url)
        for name, url in catalog.connection.execute(_NOTED).fetchall()
        if url not in in_use and _is_claimed(cluster, name, url, ever)
    ]


def _is_claimed(cluster: UUID, name: str, url: str, ever: Mapping[int, str]) -> bool:
    try:
        with connect_shard(url, name, application="shardkit doctor") as connection:
            claim = read(connection)
    except ShardUnreachable:
        return False
    if claim is None or (claim.cluster, claim.name) != (cluster, name):
        return False
    return ever.get(claim.shard_id) != name  # of a shard that left, it is as it should be
