"""A shard that went back in time, by a fail-over or a restore, and how it is brought forward to the topology in force.

`look` compares what the shard held at the time it went back to with what it is to hold now. Of the arcs that it had and
others own now rows came back, of which no session may see one: they become arcs in transit. Of the arcs that came to it
since, the rows may be missing: that is safe only where another shard has the same rows still. What it held then and
holds now is as old as the shard is, and nothing here can tell. Driven by `rebalance.readmit`, under the lease; never
moves or deletes a row of a sharded table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from psycopg import sql

from shardkit.core.errors import (
    CatalogBehind,
    MoveWaiting,
    PreflightFailed,
    RetryLater,
    RowsGone,
    ShardBehind,
)
from shardkit.core.keyrange import ArcSet
from shardkit.core.move import FINAL, Phase
from shardkit.core.topology import HomeTable, Shard, ShardedTable, Topology

from . import change, claims, digest, idjoin, references, replication, sourceguard, standing, tables
from .catalog import Catalog, TransferRow
from .connections import Connection, ShardConnections, transaction, value
from .identity import ShardIdentity
from .predicate import relation, within
from .standing import Believed, Seen


class Where(StrEnum):
    """Where the rows are of arcs that came to a shard after the moment that it went back to."""

    HERE = "here"
    """On the shard as on the one that had them before, just the same."""
    THERE = "there"
    """On the one that had them before, and not, or otherwise, on the shard."""
    GONE = "gone"
    """Nowhere, as far as can be told: whoever had them before has deleted them."""


@dataclass(frozen=True)
class Gained:
    """Arcs that came to the shard since, from one that owned them then or holds them in transit now; the rows here and
    there, by table, where both were asked."""

    owner: str
    arcs: ArcSet
    where: Where
    here: Mapping[str, int]
    there: Mapping[str, int]


@dataclass(frozen=True)
class Lag:
    """How far a shard is behind. ``then`` is the topology that it holds, ``returned`` are the arcs that it held then
    and does not hold now, and ``outside`` the rows that it has of them, by table."""

    shard: Shard
    now: Topology
    then: Topology
    fences: tuple[str, ...]
    returned: ArcSet
    outside: Mapping[str, int]
    gained: Sequence[Gained]

    @property
    def is_behind(self) -> bool:
        """Whether there is anything to bring forward."""
        return self.shard.fence.relation not in self.fences

    @property
    def missing(self) -> list[Gained]:
        """What it would own without having the rows."""
        return [each for each in self.gained if each.where is not Where.HERE]

    def require_rows(self) -> None:
        """`RowsGone` where rows of keys that it is to own are not there."""
        if not self.missing:
            return
        texts = [_told(each) for each in self.missing]
        raise RowsGone(
            f"Shard {self.shard.name} holds topology {self.then.version}, which is older than the moves that brought "
            f"keys to it, and has not their rows: {'; '.join(texts)}.",
            shard=self.shard.name,
            owners=[each.owner for each in self.missing],
        )


def _told(gained: Gained) -> str:
    arcs = f"{len(gained.arcs):,} arcs of shard {gained.owner}"
    if gained.where is Where.GONE:
        return f"{arcs}, which has deleted them"
    listed = ", ".join(
        f"{rows:,} rows of {table} (here {gained.here[table]:,})" for table, rows in gained.there.items()
    )
    return f"{arcs}, which has them still: {listed}"


# --- the look -------------------------------------------------------------------------------------------------------


def look(catalog: Catalog, shards: ShardConnections, name: str) -> Lag:
    """Compare a shard with the topology in force; changes nothing. `RetryLater` where it has taken one that is pending.

    `CatalogBehind` where the catalog is the older one, `ShardBehind` where the shard's own state makes no sense, so
    that it is not known what it has; `IncompatibleServer` where the database is another's.
    """
    current = catalog.require_current()
    connection = shards.get(current.named(name))
    believed, found = standing.compared(catalog, current.named(name), connection)
    shard = believed.current.named(name)
    _require_own(believed, shard, found)
    _require_older(believed, shard, found)
    fences = tuple(each.relation for each in found.fences)
    then = _consistent(shard, found)
    if shard.fence in found.fences:
        return Lag(shard, believed.current, then, fences, ArcSet(), {}, [])
    now, before = believed.current, then.by_id[shard.id]
    had = then.owned(shard.id) | before.in_transit
    returned = had - now.owned(shard.id) - shard.in_transit
    gained = now.owned(shard.id) - then.owned(shard.id)
    _require_tables(now, shards, shard)
    return Lag(
        shard,
        now,
        then,
        fences,
        returned,
        {str(table): rows for table in now.tables if (rows := _count(connection, table, returned))},
        list(_gained(believed, then, shards, shard, gained)),
    )


def _require_own(believed: Believed, shard: Shard, found: Seen) -> None:
    claim = found.claim
    if claim is None:
        raise ShardBehind(
            f"The database of shard {shard.name} says of no shard that it is one: it is older than the day on which it "
            "joined, or another one.",
            hint="Correct its URL (`shardkit shard set-url`), or restore it to a later moment.",
            shard=shard.name,
        )
    if claim != claims.Claim(believed.cluster, shard.id, shard.name):
        identity = ShardIdentity(shard.id, shard.name, believed.cluster)
        raise identity.refusal(f"shard {claim.name!r} (id {claim.shard_id}) of catalog {claim.cluster}")


def _require_older(believed: Believed, shard: Shard, found: Seen) -> None:
    newest = found.newest
    if newest is not None and newest == believed.fence_pending(shard):
        raise RetryLater(
            f"A change of topology is pending, and shard {shard.name} has taken it already.",
            hint="Wait for the mover at work, if there is one; else `shardkit rebalance resume` settles it.",
            shard=shard.name,
        )
    if newest is not None and newest.version >= shard.fence.version and newest != shard.fence:
        raise CatalogBehind(
            f"Shard {shard.name} has the fence {newest.relation}, and the catalog relies on {shard.fence.relation}, "
            "which is no newer one.",
            shard=shard.name,
        )
    known = (found.copy_version, found.copy_digest) in believed.known
    if found.copy_digest is not None and not known:
        raise CatalogBehind(
            f"Shard {shard.name} holds a topology {found.copy_version} that the catalog does not know.",
            shard=shard.name,
        )


def _consistent(shard: Shard, found: Seen) -> Topology:
    """What the shard held, if its copy, its fence and its arcs tell one story."""
    copy = found.copy
    mine = copy.by_id.get(shard.id) if copy is not None else None
    if copy is None or mine is None or (copy.version, copy.digest) != (found.copy_version, found.copy_digest):
        what = "holds no topology that names it"
    elif found.newest is not None and found.newest != mine.fence:
        what = f"has the fence {found.newest.relation}, and holds a topology by which it is {mine.fence.relation}"
    elif found.bounds != copy.owned(shard.id).bounds():
        what = f"holds topology {copy.version}, and shardkit.owned() goes by other arcs than it"
    else:
        return copy
    raise ShardBehind(
        f"Shard {shard.name} {what}: it is not known what it has.",
        hint="It was edited or damaged: keep applications away, and restore the shard.",
        shard=shard.name,
    )


def _require_tables(now: Topology, shards: ShardConnections, shard: Shard) -> None:
    """The declared tables, as they are on another shard: migrations were made since, perhaps."""
    other = next((each for each in now.shards if each.id != shard.id), None)
    problems = []
    for table in now.declared_tables.values():
        here = tables.describe(shards.get(shard), table)
        if isinstance(table, HomeTable):
            problems += (
                [f"table {table} does not exist"] if here is None and table.shard == shard.name else []
            )
        elif other is None:
            problems += [f"table {table} does not exist"] if here is None else []
        else:
            problems += tables.differences(table, tables.describe(shards.get(other), table), here)
    if problems:
        raise PreflightFailed(
            f"The tables of shard {shard.name} are not those of the others:\n"
            + "\n".join(f"  - {problem}" for problem in problems),
            hint="Bring its schema forward first, with the migrations that were made since.",
            reasons=problems,
        )


def _count(connection: Connection, table: ShardedTable, arcs: ArcSet) -> int:
    if not arcs:
        return 0
    query = sql.SQL("SELECT count(*) FROM {} WHERE {}").format(relation(table), within(table, arcs))
    with digest.snapshot(connection):
        return int(value(connection, query))


def _gained(
    believed: Believed, then: Topology, shards: ShardConnections, shard: Shard, gained: ArcSet
) -> Iterator[Gained]:
    """Where the rows are of what came since: first what another shard holds in transit, then what nobody holds."""
    now = believed.current
    for other in now.shards:
        if other.id == shard.id:
            continue
        if arcs := (gained | _came_back(believed, then, shard, other)) & other.in_transit:
            gained -= arcs
            yield _compared(now, shards, shard, other, arcs)
    for owner in then.shards if gained else ():
        if arcs := gained & then.owned(owner.id):
            yield Gained(owner.name, arcs, Where.GONE, {}, {})


def _came_back(believed: Believed, then: Topology, shard: Shard, other: Shard) -> ArcSet:
    """Arcs that the shard owned then, and had given away and got back since from one that has not purged them yet: its
    rows are the newer ones."""
    arcs = ArcSet()
    for row in believed.unfinished:
        if {row.source, row.target} == {shard.id, other.id}:
            # In transit on the other one before the decision, too; then it is not the one that had them.
            decided = row.target == shard.id or row.phase in (Phase.CUT_BACK, Phase.CLEARING)
            arcs |= row.arcs if decided else ArcSet()
    before = then.by_id.get(other.id)
    as_then = then.owned(shard.id) & before.in_transit if before is not None else ArcSet()
    return (arcs & believed.current.owned(shard.id)) - as_then


def _compared(now: Topology, shards: ShardConnections, shard: Shard, other: Shard, arcs: ArcSet) -> Gained:
    here: dict[str, int] = {}
    there: dict[str, int] = {}
    same = True
    for table in now.tables:
        found = tables.describe(shards.get(shard), table)
        columns = sorted(column.name for column in found.columns) if found is not None else []
        sides = []
        for connection in (shards.get(shard), shards.get(other)):
            with digest.snapshot(connection):
                sides.append(digest.by_chunk(connection, table, columns, list(arcs)))
        same = same and sides[0] == sides[1]
        here[str(table)], there[str(table)] = (sum(each.rows for each in side.values()) for side in sides)
    return Gained(other.name, arcs, Where.HERE if same else Where.THERE, here, there)


# --- bringing it forward --------------------------------------------------------------------------------------------


def bring_forward(
    catalog: Catalog, shards: ShardConnections, lag: Lag, *, report: change.Report, patience: float
) -> Topology:
    """Do it; the caller holds the lease, has settled what was pending, and knows that no row is missing or that it may
    be. Can be run again after it was interrupted. `MoveWaiting` where somebody holds the shard's fences."""
    believed = standing.believed(catalog)
    assert believed is not None
    connection = shards.get(lag.shard)
    _bring_references(catalog, shards, lag)
    idjoin.come_back(catalog, shards, connection, lag.now, lag.shard.id)
    try:
        topology = change.bring_forward(
            catalog,
            shards,
            lag.shard.id,
            lag.returned,
            lag.fences,
            while_closed=lambda closed: _while_closed(closed, believed, lag),
            report=report,
            patience=patience,
        )
    except MoveWaiting as error:
        hint = "End what holds the fence, if something does, and keep applications away; then run it again."
        raise MoveWaiting(error.message, hint=hint, shard=lag.shard.name) from error
    with catalog.writing("catalog.readmitted") as cursor:
        catalog.event(
            cursor,
            "readmitted",
            shard=lag.shard.name,
            held=lag.then.version,
            version=topology.version,
            returned=len(lag.returned),
            missing=sum(len(each.arcs) for each in lag.missing),
        )
    return topology


def _bring_references(catalog: Catalog, shards: ShardConnections, lag: Lag) -> None:
    """What is written to reference tables is written to all shards or to none, and this one takes nothing: so the
    others have had the same rows since it was lost."""
    others = [shard for shard in lag.now.shards if shard.id != lag.shard.id]
    if not others or not lag.now.references:
        return
    source = shards.get(min(others, key=lambda shard: shard.id))
    with transaction(source):
        references.copy(source, shards.get(lag.shard), catalog.token or 0, lag.now.references)


def _while_closed(connection: Connection, believed: Believed, lag: Lag) -> None:
    """On the shard, whose fences are locked: nothing may be streamed to it from where it was, and writes that go round
    the session are refused as its openings and closings since would have had it."""
    prefix = f"shardkit_{believed.cluster.hex[:8]}_"
    streams = connection.execute(
        "SELECT subname FROM pg_subscription WHERE starts_with(subname, %s) "
        "AND subdbid = (SELECT oid FROM pg_database WHERE datname = current_database())",
        (prefix,),
    ).fetchall()
    for (name,) in streams:
        replication.drop_subscription(connection, name)
    for row in believed.unfinished:
        if row.phase not in FINAL:
            _set_refusals(connection, believed.current, lag.shard.id, row)


def _set_refusals(connection: Connection, now: Topology, shard_id: int, row: TransferRow) -> None:
    if row.source != shard_id:
        return
    if now.owned(row.target).issuperset(row.arcs):
        if value(connection, "SELECT to_regclass(%s)", (f"shardkit.moving_{row.id}",)) is not None:
            connection.execute(sourceguard.set_moved(row.id, now.by_id[row.target].name))
    elif now.owned(shard_id).issuperset(row.arcs):
        sourceguard.set_back(connection, row.id)
