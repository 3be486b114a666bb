"""The audit: whether the content of the whole cluster is right, at any time, beside writers and a move.

The doctor asks whether a cluster can work; the audit asks whether each row is where it belongs, whether reference
tables are the same everywhere, whether shards and catalog tell one story, and whether earlier moves left anything.
What changes while it is looked at is looked at again before anything is said. Driven by `shardkit verify`; changes
nothing (`rebalance.repair` does).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime

import psycopg

from shardkit.core.errors import RetryLater, ShardUnreachable, no_shard_yet
from shardkit.core.move import sentence
from shardkit.core.topology import HomeTable, ReferenceTable, Shard, ShardedTable
from shardkit.storage import references, standing, tables
from shardkit.storage.catalog import Catalog, TransferRow
from shardkit.storage.connections import ShardConnections, connect_shard
from shardkit.storage.sameness import differing
from shardkit.storage.standing import Believed

from . import orphans, ownership
from .findings import CATALOG, Problem, Report
from .ownership import Counts, Owners, State, Unjudged

AT_ONCE = 16
APPLICATION = "shardkit verify"
DAMAGED = "Look at the shard's database: it is not as shardkit made it."
Listener = Callable[[int, int], None]
"""Called from several threads with the rows looked at so far, and those expected by the servers' estimates."""


class Tally:
    """Rows looked at, of all shards together."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._lock = threading.Lock()
        self._rows = self._expected = 0

    def add(self, rows: int = 0, expected: int = 0) -> None:
        """Add to what was looked at, or to what is expected."""
        with self._lock:
            self._rows += rows
            self._expected += expected
            self._listener(self._rows, max(self._expected, self._rows))


def audit(catalog_url: str, listener: Listener = lambda rows, expected: None) -> Report:
    """Look at everything; `NotInitialised` where there is no shard yet."""
    with (
        Catalog.open(catalog_url, application=APPLICATION) as catalog,
        ShardConnections(APPLICATION) as shards,
    ):
        return Audit(catalog, shards, Tally(listener)).run()


class Audit:
    """One audit at work."""

    def __init__(self, catalog: Catalog, shards: ShardConnections, tally: Tally) -> None:
        self._catalog = catalog
        self._shards = shards
        self._tally = tally
        believed = self._believed()
        self._first = believed
        now = datetime.now(UTC)
        stamp = (believed.current.version, believed.current.digest)
        self._report = Report(str(believed.cluster), now, (stamp, stamp), now)

    def run(self) -> Report:
        """All checks, one after the other; those of rows on all shards side by side."""
        topology, report = self._first.current, self._report
        for shard in topology.shards:
            with self._asking(shard):
                self._shards.get(shard)
        self._catalogued()
        self._ownership()
        for shard in self._there():
            with self._asking(shard):
                self._standing(shard)
        for table in topology.references:
            self._reference(table)
        for home in topology.homes:
            for shard in self._there():
                with self._asking(shard):
                    self._home(shard, home)
        for shard in self._there():
            with self._asking(shard):
                self._orphans(shard)
        last = self._believed()
        self._marks(last)
        report.moves = [_move(last, row) for row in orphans.unfinished(last).values()]
        self._pending(last)
        report.topologies = (report.topologies[0], (last.current.version, last.current.digest))
        report.finished_at = datetime.now(UTC)
        return report

    def _believed(self) -> Believed:
        found = standing.believed(self._catalog)
        if found is None:
            raise no_shard_yet()
        return found

    def _there(self) -> list[Shard]:
        return [shard for shard in self._first.current.shards if shard.name not in self._report.away]

    @contextmanager
    def _asking(self, shard: Shard) -> Iterator[None]:
        """A shard that does not answer, or is lost meanwhile, is noted as away, unless it has left the cluster."""
        try:
            yield
        except ShardUnreachable as error:
            self._note_away(shard, error.message)
        except Unjudged:
            if self._is_member(shard):
                self._wrong(
                    shard.name, "ownership",
                    "its fence and its copy of the topology do not belong together, so its rows cannot be judged",
                    DAMAGED,
                )  # fmt: skip
        except psycopg.Error as error:
            text = error.diag.message_primary or " ".join(str(error).split())
            if error.sqlstate is None or error.sqlstate.startswith(("08", "57P")):
                self._note_away(shard, f"Shard {shard.name} was lost meanwhile: {text}")
            else:
                self._wrong(shard.name, "readable", text, DAMAGED)

    def _note_away(self, shard: Shard, message: str) -> None:
        if self._is_member(shard):
            self._report.away[shard.name] = message

    def _is_member(self, shard: Shard) -> bool:
        return shard.id in self._believed().current.by_id

    def _wrong(self, subject: str, check: str, detail: str, todo: str, **more: object) -> None:
        self._report.problems.append(Problem(subject, check, detail, todo, **more))  # type: ignore[arg-type]

    # --- rows ------------------------------------------------------------------------------------------------------

    def _ownership(self) -> None:
        there = self._there()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            futures = {shard.id: pool.submit(self._count, shard) for shard in there}
        for shard in there:
            with self._asking(shard):
                counted = futures[shard.id].result()
                self._report.counts[shard.name] = {str(table): counts for table, counts in counted.items()}
                for table, counts in counted.items():
                    self._judge(shard, table, counts)

    def _count(self, shard: Shard) -> dict[ShardedTable, Counts]:
        """In a thread, through a connection of its own."""
        counted: dict[ShardedTable, Counts] = {}
        with connect_shard(shard.url, shard.name, application=APPLICATION) as connection:
            described = {table: tables.describe(connection, table) for table in self._first.current.tables}
            self._tally.add(
                expected=sum(int(max(found.rows_estimate, 0)) for found in described.values() if found)
            )
            for table, found in described.items():
                if found is not None:
                    counted[table] = ownership.count(connection, shard, table, found, self._tally.add)
        return counted

    def _judge(self, shard: Shard, table: ShardedTable, counts: Counts) -> None:
        if counts.null_keys:
            self._wrong(
                shard.name, "ownership", f"{counts.null_keys:,} rows of {table} have no shard key",
                f"Give them one or delete them: without a key no session finds them. Then make {table.key} NOT NULL.",
                table=str(table), rows=counts.null_keys,
                keys=[
                    {"row": ownership.named(stray.row), "owner": None, "state": State.UNKNOWN.value}
                    for stray in counts.strays if stray.position is None
                ],
            )  # fmt: skip
        if not counts.unowned:
            return
        found = tables.describe(self._shards.get(shard), table)
        wanted = [stray for stray in counts.strays if stray.position is not None]
        states = (
            Owners(self._believed().current, self._shards).states(shard, table, found, wanted)
            if found
            else {}
        )
        self._wrong(
            shard.name,
            "ownership",
            f"{counts.unowned:,} rows of {table} stand here, whose positions it neither owns nor has in transit",
            _after_strays({state for state, _ in states.values()}, counts.unowned > len(wanted)),
            table=str(table),
            rows=counts.unowned,
            keys=[
                {"row": ownership.named(stray.row), "owner": owner, "state": state.value}
                for stray, (state, owner) in states.items()
            ],
            repairable=counts.unowned > len(wanted)
            or any(state is State.SAME for state, _ in states.values()),
        )

    # --- shards and catalog ----------------------------------------------------------------------------------------

    def _catalogued(self) -> None:
        current = self._first.current
        if (current.version, current.digest) not in self._first.known:
            self._wrong(
                CATALOG,
                "copy",
                f"the content of topology {current.version} is not what its digest says",
                "It was edited or damaged: restore the catalog; the shards' copies say what it was.",
            )

    def _standing(self, shard: Shard) -> None:
        try:
            for found in standing.examine(self._catalog, shard, self._shards.get(shard)):
                if found.next is not None:
                    self._wrong(shard.name, found.check, found.detail, found.next)
        except RetryLater as error:
            if isinstance(error, ShardUnreachable):
                raise
            self._report.undecided.append(error.message)
        for table in self._first.current.declared_tables.values():
            if isinstance(table, HomeTable) or tables.describe(self._shards.get(shard), table) is not None:
                continue
            todo = "Restore it, or the shard: rows of it may be lost."
            self._wrong(shard.name, "tables", f"table {table} does not exist", todo, table=str(table))

    def _reference(self, table: ReferenceTable) -> None:
        try:
            there = {
                shard.id: self._shards.get(shard)
                for shard in self._there()
                if tables.describe(self._shards.get(shard), table) is not None
            }
            found = differing(self._first.current, there, table) if there else {}
            if not found and there:
                (counted,) = references.digests({"any": there[min(there)]}, table).values()
                self._report.references[str(table)] = counted.rows if counted else 0
        except RetryLater as error:
            self._report.undecided.append(error.message)
            return
        except psycopg.Error as error:
            text = error.diag.message_primary or " ".join(str(error).split())
            self._report.undecided.append(f"The reference table {table} could not be compared: {text}")
            return
        if found:
            listed = ", ".join(
                f"{name}: {each.rows:,} rows" if each else name for name, each in found.items()
            )
            self._wrong(
                CATALOG, "references", f"the rows of {table} differ ({listed})",
                "Find the shard that is right, and make the rows of the others equal, in one transaction each.",
                table=str(table),
            )  # fmt: skip

    def _home(self, shard: Shard, table: HomeTable) -> None:
        connection = self._shards.get(shard)
        there = tables.describe(connection, table) is not None
        if table.shard == shard.name:
            if there:
                self._report.homes.append(str(table))
            else:
                todo = "Restore it: its rows are at home here."
                self._wrong(shard.name, "homes", f"table {table} does not exist", todo, table=str(table))
        elif there and not tables.is_empty(connection, table):
            self._wrong(
                shard.name, "homes", f"rows of {table} stand here, but their home is {table.shard}",
                "Somebody wrote them round the session: bring them home, or delete them here.",
                table=str(table),
            )  # fmt: skip

    # --- what moves left -------------------------------------------------------------------------------------------

    def _orphans(self, shard: Shard) -> None:
        try:
            left = orphans.left_on(self._catalog, self._shards.get(shard), self._first.cluster)
        except orphans.NotSettled:
            self._report.undecided.append(
                f"Jobs come and go on shard {shard.name}: what they left is not known."
            )
            return
        for thing, removable in left:
            whose = "another cluster" if thing.foreign else "no unfinished transfer"
            todo = "`shardkit verify --repair` removes it, by: " if removable else ""
            self._wrong(
                shard.name,
                "leftovers",
                f"{thing.what} belongs to {whose}",
                todo + thing.remedy,
                repairable=removable,
            )

    def _marks(self, believed: Believed) -> None:
        for shard in believed.current.shards:
            if arcs := orphans.marks(believed, shard.id):
                self._wrong(
                    shard.name, "in transit", f"{len(arcs)} arcs are marked, and no transfer is under way",
                    "`shardkit verify --repair` takes the marks away, once no row is left there. Until then answers "
                    "stay right, as sessions leave these arcs out.",
                    repairable=True,
                )  # fmt: skip

    def _pending(self, believed: Believed) -> None:
        if believed.proposed is not None and self._catalog.lease_holder() is None:
            self._report.moves.append(
                {
                    "transfer": None, "source": None, "target": None, "phase": None,
                    "sentence": f"The change to topology {believed.proposed.version} was interrupted; "
                    "`shardkit rebalance resume` settles it.",
                }
            )  # fmt: skip


def _after_strays(states: set[State], more: bool) -> str:
    todo = []
    if State.SAME in states or more:
        todo.append("`shardkit verify --repair` removes the rows that their owner has just the same.")
    if State.ONLY in states:
        todo.append(
            "Rows that are here only may be the only copy: write them through a session and delete them here, or "
            "delete them if the application deleted them."
        )
    if State.DIFFERS in states:
        todo.append(
            "Compare the rows that differ with those of their owner, which count; then delete them here."
        )
    if State.UNKNOWN in states:
        todo.append("Run it again for the rows whose owner could not be asked.")
    return " ".join(todo) or "They are gone by now: run it again."


def _move(believed: Believed, row: TransferRow) -> dict[str, object]:
    names = believed.current.by_id
    return {
        "transfer": row.id,
        "source": names[row.source].name if row.source in names else None,
        "target": names[row.target].name if row.target in names else None,
        "phase": row.phase.value,
        "sentence": sentence(row.phase),
    }
