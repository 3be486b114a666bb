"""What a shard says of itself, against what the catalog says of it: whose it is, its fences, its copy of the topology.

The doctor and the audit ask. A change of topology that is under way is no contradiction: the catalog is read before
and after the shard, and what was read between two equal readings is judged by the topology in force and the one that
is pending. Changes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from uuid import UUID

from shardkit.core.errors import RetryLater, TopologyInvalid
from shardkit.core.topology import Fence, Shard, Topology

from . import claims
from .catalog import Catalog, TransferRow
from .connections import Connection

LOOKS = 100
PAUSE = 0.05
RESUME = "`shardkit rebalance resume` settles it."
RESTORED = (
    "The shard was restored or failed over to an older state: keep applications away; restore a newer state, or "
    "`shardkit shard readmit {}` brings it forward."
)
_FENCES = """
SELECT (m[1])::bigint, m[2]
FROM pg_class c CROSS JOIN LATERAL regexp_match(c.relname, '^fence_([0-9]+)_([0-9a-f]{8})$') m
WHERE c.relnamespace = to_regnamespace('shardkit') AND m IS NOT NULL
"""
_TOPOLOGIES = "SELECT state, document FROM shardkit.topologies WHERE state IN ('current', 'proposed')"
_KNOWN = "SELECT version, digest FROM shardkit.topologies WHERE state <> 'impossible'"


@contextmanager
def still(connection: Connection, *settings: tuple[str, str], writing: bool = False) -> Iterator[Connection]:
    """A transaction that sees one snapshot from its first statement to its last, with settings of its own; read-only
    unless it is ``writing``."""
    with connection.transaction():
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        if not writing:
            connection.execute("SET TRANSACTION READ ONLY")
        if settings:
            connection.execute(
                "SELECT set_config(name, setting, true) FROM unnest(%s::text[], %s::text[]) AS s (name, setting)",
                ([name for name, _ in settings], [setting for _, setting in settings]),
            )
        yield connection


@dataclass(frozen=True)
class Believed:
    """What the catalog holds, in one snapshot."""

    cluster: UUID
    current: Topology
    proposed: Topology | None
    unfinished: tuple[TransferRow, ...]
    """The transfers of the unfinished job; also those that are at their end."""
    job: int | None
    jobs: int
    """Number of the latest job."""
    known: frozenset[tuple[int, str]]
    """(version, digest) of every topology that is or was in force, or is proposed."""

    def fence_pending(self, shard: Shard) -> Fence | None:
        """The fence that a pending change gives the shard; None if it leaves that alone."""
        named = self.proposed.by_id.get(shard.id) if self.proposed is not None else None
        return named.fence if named is not None and named.fence != shard.fence else None

    def same_topologies(self, other: Believed) -> bool:
        """Whether no change of topology began or ended between two readings; versions are never used twice."""
        return _versions(self) == _versions(other)


def _versions(believed: Believed) -> tuple[int, int | None]:
    return believed.current.version, believed.proposed.version if believed.proposed is not None else None


def believed(catalog: Catalog) -> Believed | None:
    """What the catalog holds now; None before the first shard."""
    with still(catalog.connection) as connection:
        documents = dict(connection.execute(_TOPOLOGIES).fetchall())
        if "current" not in documents:
            return None
        current = Topology.from_json(documents["current"])
        proposed = Topology.from_json(documents["proposed"]) if "proposed" in documents else None
        job = catalog.running_job()
        return Believed(
            catalog.cluster_id(),
            current,
            proposed,
            tuple(catalog.transfers(job.id)) if job is not None else (),
            job.id if job is not None else None,
            latest.id if (latest := catalog.latest_job()) is not None else 0,
            frozenset((version, digest) for version, digest in connection.execute(_KNOWN)),
        )


@dataclass(frozen=True)
class Seen:
    """What a shard holds, in one snapshot. ``fences`` come oldest first; ``copy`` is None if it is none."""

    claim: claims.Claim | None
    fences: tuple[Fence, ...]
    copy_version: int
    copy_digest: str | None
    copy: Topology | None
    bounds: list[int] | None

    @property
    def newest(self) -> Fence | None:
        """The fence that counts."""
        return self.fences[-1] if self.fences else None


def fences(connection: Connection) -> tuple[Fence, ...]:
    """The fences of a shard, oldest first, as the snapshot of the caller's transaction shows them."""
    return tuple(sorted(Fence(version, digest) for version, digest in connection.execute(_FENCES)))


def seen(connection: Connection) -> Seen:
    """What a shard holds now."""
    with still(connection):
        claim = claims.read(connection)
        if claim is None:
            return Seen(None, (), 0, None, None, None)
        row = connection.execute(
            "SELECT version, digest, document FROM shardkit.topology ORDER BY version DESC LIMIT 1"
        ).fetchone()
        version, digest, document = row if row is not None else (0, None, None)
        try:
            copy = Topology.from_json(document) if document is not None else None
        except TopologyInvalid:
            copy = None
        bounds = connection.execute("SELECT bounds FROM shardkit.ownership").fetchone()
        return Seen(claim, fences(connection), version, digest, copy, bounds[0] if bounds else None)


@dataclass(frozen=True, slots=True)
class Judgement:
    """What was found of a shard by one check (``identity``, ``fence`` or ``copy``); ``next`` where it is wrong."""

    check: str
    detail: str
    next: str | None = None


def compared(catalog: Catalog, shard: Shard, connection: Connection) -> tuple[Believed, Seen]:
    """What the catalog holds and what a shard holds, with no change of topology in between; `RetryLater`."""
    before = believed(catalog)
    for _ in range(LOOKS):
        found = seen(connection)
        after = believed(catalog)
        if before is not None and after is not None and before.same_topologies(after):
            return after, found
        before = after
        time.sleep(PAUSE)
    raise RetryLater(f"The topology changes all the time, so shard {shard.name} could not be compared.")


def examine(catalog: Catalog, shard: Shard, connection: Connection) -> list[Judgement]:
    """Compare a shard with the catalog, one judgement a check; none of a shard that has left meanwhile."""
    believed, found = compared(catalog, shard, connection)
    mine = believed.current.by_id.get(shard.id)
    if mine is None:
        return []
    return [_identity(believed, mine, found), _fence(believed, mine, found), _copy(believed, mine, found)]


def _identity(believed: Believed, shard: Shard, found: Seen) -> Judgement:
    claim = found.claim
    if claim == claims.Claim(believed.cluster, shard.id, shard.name):
        return Judgement("identity", f"shard id {shard.id} of this cluster")
    whose = f"shard {claim.name!r} (id {claim.shard_id}) of cluster {claim.cluster}" if claim else "nobody's"
    return Judgement(
        "identity",
        f"this database is {whose}",
        "Restore the shard's database, or correct its URL: `shardkit shard set-url`.",
    )


def _fence(believed: Believed, shard: Shard, found: Seen) -> Judgement:
    expected, pending, newest = shard.fence, believed.fence_pending(shard), found.newest
    if newest is not None and newest == pending:
        return Judgement("fence", f"{newest.relation}, of the topology that is pending")
    if newest != expected:
        if newest is not None and newest.version > expected.version:
            detail = f"{newest.relation} is newer than the catalog, which relies on {expected.relation}"
            return Judgement("fence", detail, RESUME)
        names = ", ".join(fence.relation for fence in found.fences) or "none"
        detail = f"{names} is there, but the catalog relies on {expected.relation}"
        return Judgement("fence", detail, RESTORED.format(shard.name))
    prefixes = {(version, digest[:8]) for version, digest in believed.known}
    strange = [fence.relation for fence in found.fences if (fence.version, fence.digest) not in prefixes]
    if strange:
        return Judgement(
            "fence",
            f"{', '.join(strange)} is there, which is of no topology of the catalog",
            "Somebody else made it, or the catalog was restored to an older state: find out which.",
        )
    older = len(found.fences) - 1
    return Judgement("fence", expected.relation + (f", and {older} older beside it" if older else ""))


def _copy(believed: Believed, shard: Shard, found: Seen) -> Judgement:
    version, digest, copy = found.copy_version, found.copy_digest, found.copy
    if version < shard.fence.version:
        detail = f"of topology {version}, but the shard took part in {shard.fence.version}"
        return Judgement("copy", detail, RESTORED.format(shard.name))
    newest = believed.proposed if found.newest == believed.fence_pending(shard) else None
    if version > (newest or believed.current).version:
        detail = f"of topology {version}, which the catalog does not know as current"
        return Judgement("copy", detail, RESUME)
    if (version, digest) not in believed.known:
        return Judgement(
            "copy",
            f"of topology {version}, which differs from the catalog's",
            "Shard and catalog were not restored to one state: keep applications away, restore both.",
        )
    edited = copy is None or (copy.version, copy.digest) != (version, digest)
    mine = copy.by_id.get(shard.id) if copy is not None else None
    if edited or copy is None or mine is None or mine.fence != found.newest:
        detail = f"of topology {version}, whose content is not what its digest says"
    elif found.bounds != copy.owned(shard.id).bounds():
        detail = f"of topology {version}, but shardkit.owned() goes by other arcs than it"
    else:
        return Judgement("copy", f"of topology {version}")
    return Judgement(
        "copy",
        detail,
        "It was edited or damaged: keep applications away, restore the shard's schema shardkit.",
    )
