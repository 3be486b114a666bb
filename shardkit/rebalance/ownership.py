"""Rows that stand on a shard which neither owns their position nor has it in transit, found by the servers.

A table is read in pieces of its heap, each in a snapshot of its own that is over soon: nothing is locked, no cutover
waits, and vacuum is not held up. Each piece is judged by the topology that the same snapshot shows to be in force on
the shard (`storage.standing`), as a replica is believed: so a change of topology beside it is never taken for a stray
row. Only the names of rows that stand wrong come here, and of those a bounded number. Changes nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import psycopg
from psycopg import sql

from shardkit.core.keyrange import ArcSet
from shardkit.core.topology import Shard, ShardedTable, Topology
from shardkit.storage import digest, standing
from shardkit.storage.connections import Connection, ShardConnections, value
from shardkit.storage.predicate import position, within
from shardkit.storage.purge import leaves
from shardkit.storage.tables import Table
from shardkit.storage.topologies import read_copy

NAMED = 100
"""So many rows of a table on a shard are named; all are counted."""
SECONDS_A_PIECE = 0.3
_FIRST_PIECE, _LARGEST_PIECE = 128, 131_072
_READING = digest.TEXT_FORM
OnRows = Callable[[int], None]


class State(StrEnum):
    """What the owner of a row that stands on a wrong shard has in its place."""

    SAME = "same"
    DIFFERS = "differs"
    ONLY = "only here"
    GONE = "gone"
    UNKNOWN = "unknown"


class Unjudged(Exception):
    """The fence of a shard and its copy of the topology do not belong together, so no row of it can be judged."""


@dataclass(frozen=True, slots=True)
class Stray:
    """A row that its shard does not own: which row, as `digest.identity_text` has it, and its position."""

    row: str
    position: int | None


@dataclass
class Counts:
    """Rows of one table on one shard: all, those in transit, those not owned, those without a key."""

    rows: int = 0
    in_transit: int = 0
    unowned: int = 0
    null_keys: int = 0
    strays: list[Stray] = field(default_factory=list)
    """Of those not owned, `NAMED` at most."""

    def add(self, other: Counts) -> None:
        """Add what was found in another piece."""
        self.rows += other.rows
        self.in_transit += other.in_transit
        self.unowned += other.unowned
        self.null_keys += other.null_keys
        self.strays += other.strays[: NAMED - len(self.strays)]


class Copies:
    """The topologies that a shard's snapshots show; each is read once."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._latest: tuple[tuple[int, str], Topology] | None = None

    def in_force(self, snapshot: Connection) -> Topology:
        """The topology of the caller's snapshot; `Unjudged`."""
        names = standing.fences(snapshot)
        which = snapshot.execute(
            "SELECT version, digest FROM shardkit.topology ORDER BY version DESC LIMIT 1"
        ).fetchone()
        if self._latest is None or self._latest[0] != which:
            copy = read_copy(snapshot)
            if copy is None or which is None:
                raise Unjudged
            self._latest = (which, copy)
        copy = self._latest[1]
        mine = copy.by_id.get(self._shard.id)
        if mine is None or not names or mine.fence != names[-1]:
            raise Unjudged
        return copy


def held(topology: Topology, shard_id: int) -> ArcSet:
    """The arcs of which a shard may hold rows."""
    return topology.owned(shard_id) | topology.by_id[shard_id].in_transit


def heap_pieces(connection: Connection, heap: sql.Identifier) -> Iterator[sql.Composed]:
    """Conditions that cut a heap into pieces that take about `SECONDS_A_PIECE` each; the last has no end, so that
    nothing is missed which was appended meanwhile."""
    first, step = 0, _FIRST_PIECE
    while True:
        size = value(
            connection,
            "SELECT pg_relation_size(%s::regclass) / current_setting('block_size')::bigint",
            (heap.as_string(connection),),
        )
        begin = sql.SQL("ctid >= {}::tid").format(sql.Literal(f"({first},0)"))
        last = first + step >= size
        end = sql.SQL(" AND ctid < {}::tid").format(sql.Literal(f"({first + step},0)"))
        started = time.monotonic()
        yield begin if last else begin + end
        if last:
            return
        first += step
        spent = max(time.monotonic() - started, 0.001)
        step = int(min(_LARGEST_PIECE, max(1, step * min(4.0, SECONDS_A_PIECE / spent))))


def count(connection: Connection, shard: Shard, table: ShardedTable, found: Table, on_rows: OnRows) -> Counts:
    """Count the rows of a table on a shard, and name those that stand wrong."""
    copies = Copies(shard)
    for attempt in range(3):
        counts = Counts()
        try:
            for heap in leaves(connection, table):
                for piece in heap_pieces(connection, heap):
                    with standing.still(connection, *_READING):
                        topology = copies.in_force(connection)
                        part = _count_piece(connection, shard, table, found, heap, piece, topology)
                    counts.add(part)
                    on_rows(part.rows)
            return counts
        except psycopg.errors.UndefinedTable:  # a partition that was dropped meanwhile
            if attempt == 2:
                raise
    raise AssertionError


def _count_piece(
    snapshot: Connection,
    shard: Shard,
    table: ShardedTable,
    found: Table,
    heap: sql.Identifier,
    piece: sql.Composed,
    topology: Topology,
) -> Counts:
    stray = sql.SQL("NOT {}").format(within(table, held(topology, shard.id)))
    key = sql.Identifier(table.key)
    row = snapshot.execute(
        sql.SQL(
            "SELECT count(*), count(*) FILTER (WHERE {transit}), count(*) FILTER (WHERE {stray}), "
            "count(*) FILTER (WHERE {key} IS NULL) FROM ONLY {heap} WHERE {piece}"
        ).format(
            transit=within(table, topology.by_id[shard.id].in_transit),
            stray=stray,
            key=key,
            heap=heap,
            piece=piece,
        )
    ).fetchone()
    counts = Counts(*(row or ()))
    if counts.unowned or counts.null_keys:
        wrong = sql.SQL("({} OR {} IS NULL)").format(stray, key)
        counts.strays = strays(snapshot, table, found, heap, sql.SQL(" AND ").join((piece, wrong)), NAMED)
    return counts


def strays(
    snapshot: Connection,
    table: ShardedTable,
    found: Table,
    heap: sql.Identifier,
    condition: sql.Composable,
    limit: int | None,
) -> list[Stray]:
    """Name rows of a heap that meet a condition; all of them where there is no limit."""
    query = sql.SQL(
        "SELECT DISTINCT {row}, {place} FROM ONLY {heap} AS t WHERE {condition} LIMIT {limit}"
    ).format(
        row=digest.identity_text(found.row_identity(table.key), sql.SQL("t")),
        place=position(table),
        heap=heap,
        condition=condition,
        limit=sql.Literal(limit),
    )
    return [Stray(row, place) for row, place in snapshot.execute(query)]


def compared(table: ShardedTable, found: Table) -> digest.Compared:
    """What of a table is compared."""
    types = {column.name: column.type for column in found.columns}
    return digest.Compared(found.row_identity(table.key), tuple(types), types)


def named(row: str) -> dict[str, Any]:
    """Which row it is, as column names and values."""
    found: dict[str, Any] = json.loads(row)
    return found


# --- what the owners have ------------------------------------------------------------------------------------------


class Owners:
    """Looks for strays at their owners. Not for several threads."""

    def __init__(self, topology: Topology, shards: ShardConnections) -> None:
        self._topology = topology
        self._shards = shards

    def states(
        self, shard: Shard, table: ShardedTable, found: Table, wanted: Sequence[Stray]
    ) -> Mapping[Stray, tuple[State, str | None]]:
        """What the owner of each row has in its place, and the owner's name; unknown where it cannot be asked."""
        answer: dict[Stray, tuple[State, str | None]] = dict.fromkeys(wanted, (State.UNKNOWN, None))
        with standing.still(self._shards.get(shard), *_READING, *digest.BY_INDEX) as here:
            mine = digest.by_row(here, table, compared(table, found), [each.row for each in wanted])
        by_owner: dict[int, list[Stray]] = {}
        for stray in wanted:
            if stray.position is not None:
                by_owner.setdefault(self._topology.ring.owner_at(stray.position), []).append(stray)
        for owner_id, theirs in by_owner.items():
            owner = self._topology.by_id[owner_id]
            # Its own by now: rows of these arcs were cleared away before they came.
            digests = None if owner_id == shard.id else self._digests_at(owner, table, found, theirs)
            for stray in theirs:
                answer[stray] = (_state(mine.get(stray.row), digests, stray.row), owner.name)
        return answer

    def _digests_at(
        self, owner: Shard, table: ShardedTable, found: Table, wanted: Sequence[Stray]
    ) -> dict[str, digest.Digest] | None:
        """None if the owner cannot be asked, or owns these positions no more."""
        try:
            with standing.still(self._shards.get(owner), *_READING, *digest.BY_INDEX) as there:
                topology = Copies(owner).in_force(there)
                if any(each.position not in topology.owned(owner.id) for each in wanted):
                    return None
                return digest.by_row(there, table, compared(table, found), [each.row for each in wanted])
        except (psycopg.Error, Unjudged):
            return None


def _state(mine: digest.Digest | None, theirs: Mapping[str, digest.Digest] | None, row: str) -> State:
    if theirs is None:
        return State.UNKNOWN
    if mine is None:
        return State.GONE
    if row not in theirs:
        return State.ONLY
    return State.SAME if theirs[row] == mine else State.DIFFERS
