"""Where the databases of shards are to be found: their URLs, given anew after servers moved or standbys took over.

Driven by a command. A shard stays the same, so no fence changes and no row moves. An interrupted change of topology is
settled by the new URLs, as nothing may answer at the old ones, and a job that is under way goes on by them.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import psycopg

from shardkit.core.errors import IncompatibleServer, ShardUnreachable, TwoPrimaries, UsageError, no_shard_yet
from shardkit.core.topology import Shard, Topology
from shardkit.storage import change, claims, fence, replication
from shardkit.storage.catalog import Catalog
from shardkit.storage.connections import Connection, ShardConnections, connect_shard, transaction, value
from shardkit.storage.urls import redacted, without_password

from .opening import name_back, settle, stream_name

_OLD_SECONDS = 3
_AWAY = re.compile(
    r"refused|timed out|timeout expired|[Nn]o route to host|unreachable|is down|No such file or directory"
    r"|failed to resolve host|could not translate host name|database .* does not exist"
)
"""What is said of a host at which no server answers, or none that has the database."""


@dataclass(frozen=True, slots=True)
class Located:
    """The topology in force; the shards that did not answer, for which it is to be done again; of those that were
    named, the ones that are behind."""

    topology: Topology
    away: tuple[str, ...]
    behind: tuple[str, ...]


def set_urls(
    catalog: Catalog, shards: ShardConnections, urls: Mapping[str, str], *, old_stopped: bool = False
) -> Located:
    """The databases of shards, by name, are at these URLs from now on; the caller holds the lease. Giving those that
    they have changes nothing.

    `IncompatibleServer` for the database of another shard or a standby, `ShardUnreachable` for one that is not there,
    `TwoPrimaries` if another database at the old URL takes writes as this shard, or may: with ``old_stopped`` a server
    that does not let us look is taken for one that does not.
    """
    urls = {name: without_password(url) for name, url in urls.items()}
    known = [topology for topology in (catalog.current(), catalog.proposed()) if topology is not None]
    if not known:
        raise no_shard_yet()
    _require_own_urls(known, urls)
    for name, url in urls.items():
        shard = _named(known, name)
        connection = connect_shard(url, name)
        shards.put(shard.id, connection)
        claim = claims.Claim(catalog.cluster_id(), shard.id, shard.name)
        _require_primary(connection, claim, url)
        for old in {each.named(name).url for each in known if shard.id in each.by_id} - {url}:
            _require_alone(name, old, connection, claim, old_stopped)
    settle(catalog, shards)
    topology = catalog.require_current()
    by_id = {topology.named(name).id: url for name, url in urls.items()}
    if any(topology.by_id[number].url != url for number, url in by_id.items()):
        topology = change.apply(catalog, shards, lambda now, version: _with_urls(now, version, by_id))
    publishers = {number: replication.peer_conninfo(shards.get(topology.by_id[number])) for number in by_id}
    away = [
        shard.name
        for shard in topology.shards
        if not _told(catalog, shards, topology, shard, publishers)  # it is in force all the same
    ]
    behind = [name for name in urls if name not in away and _is_behind(shards, topology.named(name))]
    return Located(topology, tuple(away), tuple(behind))


def _told(
    catalog: Catalog,
    shards: ShardConnections,
    topology: Topology,
    shard: Shard,
    publishers: Mapping[int, str],
) -> bool:
    """Give a shard the topology, and have its streams look for their publishers where they are now; False where it
    does not answer, or another database does in its place."""
    try:
        connection = shards.get(shard)
        if claims.read(connection) != claims.Claim(catalog.cluster_id(), shard.id, shard.name):
            return False
        change.announce_to(catalog, connection, topology, shard)
        _redirect(catalog, connection, shard.id, publishers)
    except (ShardUnreachable, psycopg.OperationalError, psycopg.errors.ReadOnlySqlTransaction):
        return False
    return True


def _with_urls(now: Topology | None, version: int, urls: Mapping[int, str]) -> Topology:
    assert now is not None
    return now.with_urls(version, urls)


def _named(known: list[Topology], name: str) -> Shard:
    """A shard of the topology in force, or, as one that joins, of the proposed one."""
    found = next((each for topology in known for each in topology.shards if each.name == name), None)
    return found if found is not None else known[0].named(name)


def _is_behind(shards: ShardConnections, shard: Shard) -> bool:
    return shard.fence.relation not in fence.relations(shards.get(shard))


# --- what is at the URLs ---------------------------------------------------------------------------------------------


def _require_own_urls(known: list[Topology], urls: Mapping[str, str]) -> None:
    taken = {each.url: each.name for topology in known for each in topology.shards if each.name not in urls}
    for name, url in urls.items():
        if url in taken:
            raise UsageError(
                f"This is the URL of shard {taken[url]}.", hint="`shardkit shard list` shows those in use."
            )
        taken[url] = name


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


def _require_alone(
    name: str, url: str, connection: Connection, expected: claims.Claim, old_stopped: bool
) -> None:
    """Who knows the old URL alone would go on to write there."""
    try:
        old = connect_shard(url, name, seconds=_OLD_SECONDS)
    except ShardUnreachable as error:
        said = str(error.__cause__)
        # A server that answers is there, whatever it says: that it has no connection left, or wants a password.
        if not is_away(said) and not old_stopped:
            raise TwoPrimaries(
                f"At the old URL of shard {name}, {redacted(url)}, a server answers that does not let us see whether "
                f"it takes writes as this shard: {said.strip().splitlines()[0]}",
                hint="Stop it; if it takes no writes for sure, go on with --old-stopped.",
                shard=name,
            ) from error
        return
    with old:
        if claims.read(old) != expected or value(old, "SELECT pg_is_in_recovery()"):
            return
        if not _are_one(old, connection):
            raise TwoPrimaries(
                f"At the old URL of shard {name}, {redacted(url)}, another database takes writes as this shard.",
                shard=name,
            )


def is_away(said: str) -> bool:
    """Whether libpq's words for a connection that failed say of every host that no server is there."""
    hosts = said.split("connection to server")[1:] or [said]
    return all(_AWAY.search(host) for host in hosts)


def _are_one(one: Connection, other: Connection) -> bool:
    """Whether two connections lead to the same database: a lock that is held by one is not to be had by the other."""
    key = secrets.randbits(63)
    with transaction(one), transaction(other):
        one.execute("SELECT pg_advisory_xact_lock(%s)", (key,))
        return not value(other, "SELECT pg_try_advisory_xact_lock(%s)", (key,))


# --- the streams of a job --------------------------------------------------------------------------------------------


def _redirect(catalog: Catalog, subscriber: Connection, shard_id: int, publishers: Mapping[int, str]) -> None:
    """Have the streams of the unfinished job that come to this shard look for their publishers where they are now.

    A subscription has the address of its publisher written down on its own server, and the way back of a kept source
    goes on with no mover beside it.
    """
    for name, publisher in _streams_to(catalog, shard_id):
        if publisher in publishers:
            with transaction(subscriber, *change.OPENING):
                change.claim(subscriber, catalog.token or 0)
                replication.set_source(subscriber, name, publishers[publisher])


def _streams_to(catalog: Catalog, shard_id: int) -> Iterator[tuple[str, int]]:
    """Streams that a job may have to this shard, with the numbers of the shards that they come from."""
    job = catalog.running_job()
    for row in catalog.transfers(job.id) if job is not None else ():
        name = stream_name(catalog, row.id)
        if row.target == shard_id:
            yield name, row.source
        elif row.source == shard_id:
            yield name_back(name), row.target
