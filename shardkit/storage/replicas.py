"""Which replicas a shard has: listed in the topology, and looked at.

Driven by the commands. A list is changed as every topology is (`storage.change`), but no fence changes with it, so
nothing closes; applications learn of it with the next topology they meet. Never makes or promotes a standby.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import LiteralString

from shardkit.core.errors import IncompatibleServer, NoReplica, UsageError
from shardkit.core.topology import Shard, Topology

from . import change, claims, fence
from .catalog import Catalog
from .connections import Connection, ShardConnections, connect_shard, value
from .urls import redacted, without_password

_REPLAYED: LiteralString = "SELECT pg_last_wal_replay_lsn()::text"
_BEHIND: LiteralString = "SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), %s::pg_lsn)::bigint"


@dataclass(frozen=True, slots=True)
class Condition:
    """How a replica stands: bytes of WAL that it has not replayed, and whether it shows the shard's fence."""

    bytes_behind: int
    shows_fence: bool


def add(catalog: Catalog, shards: ShardConnections, name: str, url: str) -> Topology:
    """List a replica of a shard; the caller holds the lease. Listing one that is listed changes nothing.

    `IncompatibleServer` for a database that is no standby of this shard, `ShardUnreachable` for one that is not there.
    """
    change.settle_no_job(catalog, shards)
    url = without_password(url)
    current = catalog.require_current()
    shard = current.named(name)
    if url in shard.replicas:
        change.announce(catalog, shards, current)
        return current
    if url == shard.url:
        raise UsageError(
            f"This is the URL of shard {name} itself.", hint="Name the server of one of its standbys."
        )
    with connect(shard, url) as connection:
        check(catalog, shard, url, connection)
    return _change(catalog, shards, name, (*shard.replicas, url))


def remove(catalog: Catalog, shards: ShardConnections, name: str, url: str) -> Topology:
    """Take a replica off the list; the caller holds the lease. It need not answer. `NoReplica`."""
    change.settle_no_job(catalog, shards)
    url = without_password(url)
    shard = catalog.require_current().named(name)
    if url not in shard.replicas:
        listed = ", ".join(map(redacted, shard.replicas)) or "none"
        raise NoReplica(
            f"Shard {name} lists no replica {redacted(url)}; it lists: {listed}.",
            hint="Give the URL as `shardkit shard list` shows it.",
            shard=name,
        )
    return _change(catalog, shards, name, tuple(each for each in shard.replicas if each != url))


def connect(shard: Shard, url: str) -> Connection:
    """An administrative connection to a replica; `ShardUnreachable`."""
    return connect_shard(url, f"{shard.name} (replica)", application="shardkit replica")


def check(catalog: Catalog, shard: Shard, url: str, connection: Connection) -> None:
    """`IncompatibleServer` unless this is a standby of the shard."""
    claim = claims.read(connection)
    if claim != claims.Claim(catalog.cluster_id(), shard.id, shard.name):
        found = f"shard {claim.name!r} of catalog {claim.cluster}" if claim is not None else "no shard"
    elif not value(connection, "SELECT pg_is_in_recovery()"):
        found = "no standby: it takes writes of its own"
    else:
        return
    raise IncompatibleServer(
        f"The database {redacted(url)} is {found}.",
        hint=f"Name a physical standby (streaming or by archive) of shard {shard.name}.",
        shard=shard.name,
    )


def condition(shard: Shard, primary: Connection, replica: Connection) -> Condition:
    """How far a replica is behind its shard now."""
    replayed = value(replica, _REPLAYED)
    behind = int(value(primary, _BEHIND, (replayed or "0/0",)))
    return Condition(max(behind, 0), shard.fence.relation in fence.relations(replica))


def _change(catalog: Catalog, shards: ShardConnections, name: str, urls: tuple[str, ...]) -> Topology:
    catalog.require_no_job()

    def make(before: Topology | None, version: int) -> Topology:
        assert before is not None
        return before.with_replicas(version, before.named(name).id, urls)

    topology = change.apply(catalog, shards, make)
    change.announce(catalog, shards, topology)
    return topology
