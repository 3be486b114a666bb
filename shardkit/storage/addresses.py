"""Where the database of a shard is to be found: its URL, given anew after its server moved or a standby took over.

Driven by a command. The shard stays the same, so no fence changes and no row moves. An interrupted change of topology
is settled by the new URL, as nothing may answer at the old one; a job that is under way goes on by it.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from shardkit.core.errors import (
    IncompatibleServer,
    NotInitialised,
    ShardUnreachable,
    TwoPrimaries,
    UsageError,
)
from shardkit.core.topology import Shard, Topology

from . import change, claims, fence
from .catalog import Catalog
from .connections import Connection, ShardConnections, connect_shard, transaction, value
from .urls import redacted, without_password

_OLD_SECONDS = 3


@dataclass(frozen=True, slots=True)
class Located:
    """The topology in force; the shards that did not answer and learn of it later; whether this one is behind."""

    topology: Topology
    away: tuple[str, ...]
    is_behind: bool


def set_url(catalog: Catalog, shards: ShardConnections, name: str, url: str) -> Located:
    """The database of a shard is at this URL from now on; the caller holds the lease. Giving the URL that it has
    changes nothing.

    `IncompatibleServer` for the database of another shard or a standby, `ShardUnreachable` for one that is not there,
    `TwoPrimaries` if another database at the old URL takes writes as this shard.
    """
    url = without_password(url)
    before = _current(catalog)
    shard = before.named(name)
    if taken := [each.name for each in before.shards if each.id != shard.id and each.url == url]:
        raise UsageError(
            f"This is the URL of shard {taken[0]}.", hint="`shardkit shard list` shows those in use."
        )
    connection = connect_shard(url, name)
    shards.put(shard.id, connection)
    claim = claims.Claim(catalog.cluster_id(), shard.id, shard.name)
    _require_primary(connection, claim, url)
    _require_alone(shard, connection, claim)
    change.settle(catalog, shards)
    topology = _current(catalog)
    if topology.named(name).url != url:
        topology = change.apply(catalog, shards, lambda now, version: _with_url(now, version, shard.id, url))
    away = []
    for each in topology.shards:
        try:
            change.announce_to(catalog, shards.get(each), topology, each)
        except ShardUnreachable:
            away.append(each.name)
    is_behind = topology.named(name).fence.relation not in fence.relations(connection)
    return Located(topology, tuple(away), is_behind)


def _current(catalog: Catalog) -> Topology:
    current = catalog.current()
    if current is None:
        raise NotInitialised(
            "The catalog has no shard yet.", hint="Add the first with `shardkit shard add NAME URL`."
        )
    return current


def _with_url(now: Topology | None, version: int, shard_id: int, url: str) -> Topology:
    assert now is not None
    return now.with_url(version, shard_id, url)


def _require_primary(connection: Connection, expected: claims.Claim, url: str) -> None:
    claim = claims.read(connection)
    if claim != expected:
        found = f"shard {claim.name!r} of catalog {claim.cluster}" if claim is not None else "no shard"
    elif value(connection, "SELECT pg_is_in_recovery()"):
        found = "a standby, which takes no writes"
    else:
        return
    raise IncompatibleServer(
        f"The database {redacted(url)} is {found}.",
        hint=f"Name the primary of shard {expected.name}; a standby has to be promoted first.",
        shard=expected.name,
    )


def _require_alone(shard: Shard, connection: Connection, expected: claims.Claim) -> None:
    """Who knows the old URL alone would go on to write there."""
    try:
        old = connect_shard(shard.url, shard.name, seconds=_OLD_SECONDS)
    except ShardUnreachable:
        return
    with old:
        if claims.read(old) != expected or value(old, "SELECT pg_is_in_recovery()"):
            return
        if not _are_one(old, connection):
            raise TwoPrimaries(
                f"At the old URL of shard {shard.name}, {redacted(shard.url)}, another database takes writes as this "
                "shard.",
                shard=shard.name,
            )


def _are_one(one: Connection, other: Connection) -> bool:
    """Whether two connections lead to the same database: a lock that is held by one is not to be had by the other."""
    key = secrets.randbits(63)
    with transaction(one), transaction(other):
        one.execute("SELECT pg_advisory_xact_lock(%s)", (key,))
        return not value(other, "SELECT pg_try_advisory_xact_lock(%s)", (key,))
