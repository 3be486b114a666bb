"""The repair: removes what is provably nobody's, and nothing else.

A row on a shard that does not own it may be the only copy of what somebody wrote round the session. So a row goes only
while its owner holds the very same row: then nothing is lost, whoever put it there. (That a move passed there earlier
proves nothing: the row may have been written since.) Things of moves go only if the catalog knows their transfer, and
that it is at its end; marks of arcs in transit, when no row is left under them.

It holds the mover's lease from beginning to end, so nothing moves meanwhile; each transaction writes the token and
takes the guard of the topology under which the row is not owned here, and of the one under which it is owned there.
Driven by `shardkit verify --repair`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import psycopg
from psycopg import sql

from shardkit.core.errors import CatalogBehind, MoveWaiting
from shardkit.core.keyrange import ArcSet
from shardkit.core.topology import Shard, ShardedTable, Topology
from shardkit.storage import change, digest, fence, leftovers, standing, tables
from shardkit.storage.connections import SHORT, Connection, ShardConnections, transaction
from shardkit.storage.predicate import relation, within
from shardkit.storage.purge import leaves
from shardkit.storage.standing import Believed

from .mover import Mover
from .orphans import finished_transfers, in_use, is_removable, marks, unfinished
from .ownership import Stray, compared, heap_pieces, strays

ROWS_A_BATCH = 500
ATTEMPTS = 5
_DELETING = (
    *SHORT,
    *digest.TEXT_FORM,
    *digest.BY_INDEX,
    ("statement_timeout", "60s"),
    # While the owner is asked. Nothing moves meanwhile, and only who writes these very rows would wait.
    ("idle_in_transaction_session_timeout", "60s"),
    # Neither the application's triggers nor foreign keys may act: these rows live on, elsewhere.
    ("session_replication_role", "replica"),
    ("synchronous_commit", "on"),
)
_ASKING = (*SHORT, *digest.TEXT_FORM, *digest.BY_INDEX, ("statement_timeout", "60s"))


@dataclass
class Outcome:
    """What was removed and what was left, in words."""

    removed: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)


def repair(
    catalog_url: str, *, patience: float = 60.0, listener: Callable[[str], None] = lambda text: None
) -> Outcome:
    """Remove what can be; `LeaseHeld` while a mover is at work. What an interrupted change left is settled first."""
    with (
        Mover(catalog_url, patience=patience) as mover,
        ShardConnections("shardkit repair") as shards,
        ShardConnections("shardkit repair") as owners,
    ):
        believed = standing.believed(mover.catalog)
        if believed is None:
            return Outcome()
        return _Repair(mover, believed, shards, owners, patience, listener).run()


class _Repair:
    def __init__(
        self,
        mover: Mover,
        believed: Believed,
        shards: ShardConnections,
        owners: ShardConnections,
        patience: float,
        listener: Callable[[str], None],
    ) -> None:
        self._mover = mover
        self._believed = believed
        self._shards = shards
        self._owners = owners
        self._patience = patience
        self._listener = listener
        self._token = mover.catalog.token or 0
        self._outcome = Outcome()

    @property
    def _topology(self) -> Topology:
        return self._believed.current

    def run(self) -> Outcome:
        for shard in self._topology.shards:
            self._orphans(shard)
            region = self._region(shard)
            for table in self._topology.tables if region else ():
                self._rows(shard, table, region)
        for shard in self._topology.shards:
            self._marks(shard)
        return self._outcome

    def _removed(self, shard: Shard, what: str) -> None:
        text = f"{shard.name}: {what}"
        with self._mover.catalog.writing("catalog.repair") as cursor:
            self._mover.catalog.event(cursor, "repaired", shard=shard.name, what=what)
        self._outcome.removed.append(text)
        self._listener(f"Removed from {text}")

    # --- things of moves -------------------------------------------------------------------------------------------

    def _orphans(self, shard: Shard) -> None:
        connection = self._shards.get(shard)
        left = [
            thing
            for thing in leftovers.things(connection, self._believed.cluster)
            if not in_use(thing, self._believed)
        ]
        finished = finished_transfers(self._mover.catalog, left)
        for thing in left:
            if not is_removable(thing, finished):
                self._outcome.kept.append(
                    f"{shard.name}: {thing.what}, as the catalog knows no such transfer"
                )
            elif (
                reason := self._patiently(partial(leftovers.remove, connection, thing, self._token))
            ) is None:
                self._removed(shard, thing.what)
            else:
                self._outcome.kept.append(f"{shard.name}: {thing.what}: {reason}")

    def _patiently(self, act: Callable[[], None]) -> str | None:
        """None when it was done; else why it was not before the patience ended. Each attempt gives up its lock soon."""
        deadline = time.monotonic() + self._patience
        while True:
            try:
                act()
                return None
            except (psycopg.errors.LockNotAvailable, psycopg.errors.ObjectInUse) as error:
                if time.monotonic() > deadline:
                    return str(error.diag.message_primary)
                time.sleep(0.1)
            except psycopg.errors.ProgrammingError as error:
                return str(error.diag.message_primary)

    # --- rows ------------------------------------------------------------------------------------------------------

    def _region(self, shard: Shard) -> ArcSet:
        """The arcs whose rows are not to be on the shard: what it does not own, and no transfer has under way."""
        region = ~self._topology.owned(shard.id)
        for row in unfinished(self._believed).values():
            region -= row.arcs
        return region

    def _rows(self, shard: Shard, table: ShardedTable, region: ArcSet) -> None:
        connection = self._shards.get(shard)
        found = tables.describe(connection, table)
        if found is None:
            return
        removed = kept = 0
        try:
            for batch in self._batches(connection, table, found, region):
                gone, left = self._remove_batch(shard, table, found, batch)
                removed += gone
                kept += left
        except psycopg.errors.UndefinedTable as error:
            self._outcome.kept.append(f"{shard.name}: rows of {table}, as {error.diag.message_primary}")
        if removed:
            self._removed(shard, f"{removed:,} rows of {table} that their owners have just the same")
        if kept:
            self._outcome.kept.append(
                f"{shard.name}: {kept:,} rows of {table}, which their owners have not, or otherwise"
            )

    def _batches(
        self, connection: Connection, table: ShardedTable, found: tables.Table, region: ArcSet
    ) -> Iterator[Sequence[Stray]]:
        for heap in leaves(connection, table):
            for piece in heap_pieces(connection, heap):
                inside = sql.SQL("{} AND {}").format(piece, within(table, region))
                with standing.still(connection, *digest.TEXT_FORM):
                    wanted = strays(connection, table, found, heap, inside, None)
                for start in range(0, len(wanted), ROWS_A_BATCH):
                    yield wanted[start : start + ROWS_A_BATCH]

    def _remove_batch(
        self, shard: Shard, table: ShardedTable, found: tables.Table, batch: Sequence[Stray]
    ) -> tuple[int, int]:
        for _ in range(ATTEMPTS):
            try:
                return self._try_batch(shard, table, found, batch)
            except (psycopg.errors.SerializationFailure, psycopg.errors.LockNotAvailable):
                time.sleep(0.05)  # somebody wrote one of these rows round the session: look again
        return 0, len(batch)

    def _try_batch(
        self, shard: Shard, table: ShardedTable, found: tables.Table, batch: Sequence[Stray]
    ) -> tuple[int, int]:
        """Rows of the batch that were removed, and rows that were not."""
        connection, what = self._shards.get(shard), compared(table, found)
        # In one snapshot: what is deleted is what was compared, or the server refuses.
        with standing.still(connection, *_DELETING, writing=True):
            change.claim(connection, self._token)
            if not fence.guard_newest(connection, shard.fence):
                raise CatalogBehind(shard=shard.name)
            mine = digest.texts_by_row(connection, table, what, [each.row for each in batch])
            theirs = self._at_owners(table, found, batch)
            same = [row for row, text in mine.items() if theirs.get(row) == text]
            wanted = sum(mine[row].rows for row in same)
            if same:
                # Which row it is says its position too, which lies in the region.
                deleted = connection.execute(digest.delete_rows(table, what, same)).rowcount
                if deleted != wanted:
                    raise AssertionError(f"{deleted} rows were about to go, and {wanted} were compared")
            return wanted, sum(text.rows for text in mine.values()) - wanted

    def _at_owners(
        self, table: ShardedTable, found: tables.Table, batch: Sequence[Stray]
    ) -> Mapping[str, digest.Text]:
        """What the owners hold now, each under the guard that proves it the owner."""
        by_owner: dict[int, list[str]] = {}
        for stray in batch:
            if stray.position is not None:
                by_owner.setdefault(self._topology.ring.owner_at(stray.position), []).append(stray.row)
        held: dict[str, digest.Text] = {}
        for owner_id, rows in by_owner.items():
            owner = self._topology.by_id[owner_id]
            connection: Connection = self._owners.get(owner)
            with transaction(connection, *_ASKING):
                fence.guard(connection, owner.fence)
                held |= digest.texts_by_row(connection, table, compared(table, found), rows)
        return held

    # --- marks -----------------------------------------------------------------------------------------------------

    def _marks(self, shard: Shard) -> None:
        arcs = marks(self._believed, shard.id)
        if not arcs:
            return
        connection = self._shards.get(shard)
        for table in self._topology.tables:
            query = sql.SQL("SELECT 1 FROM {} WHERE {} LIMIT 1").format(relation(table), within(table, arcs))
            with transaction(connection, ("row_security", "off")):
                if connection.execute(query).fetchone() is not None:
                    self._outcome.kept.append(
                        f"{shard.name}: marks of {len(arcs)} arcs, as rows of {table} are left there"
                    )
                    return
        try:
            change.apply(
                self._mover.catalog,
                self._shards,
                lambda now, version: _of(now).unmarked(version, shard.id, arcs),
                patience=self._patience,
            )
        except MoveWaiting as error:
            self._outcome.kept.append(f"{shard.name}: marks of {len(arcs)} arcs: {error.message}")
            return
        self._removed(shard, f"marks of {len(arcs)} arcs in transit")


def _of(topology: Topology | None) -> Topology:
    assert topology is not None
    return topology
