"""The copier for servers without logical replication: a transfer's arcs pass in steps, under the fence.

Each step is a whole small move. While the source's fence is locked, the rows of a narrow range of positions are copied,
compared, and committed on the target, where the range is marked in transit; the rename of the source's fence is the
decision; then the target opens, and the rows are deleted from the source. Applications wait for the time of a step,
tens of milliseconds, again and again, and work between. The topology itself says how far the transfer is, so a mover
that is killed leaves nothing else to know.

Steps do not end on slots. An abort takes the steps back, one by one, in the other direction.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import sql

from shardkit.core.errors import CatalogBehind, MoveWaiting, VerificationFailed
from shardkit.core.keyrange import ArcSet, hex_position
from shardkit.core.move import Event, Mode
from shardkit.core.topology import Shard, ShardedTable
from shardkit.storage import (
    change,
    digest,
    fence,
    inspection,
    numbering,
    positionindex,
    purge,
    replication,
    rowcopy,
    sequences,
    stepguard,
    tables,
)
from shardkit.storage.attended import attended
from shardkit.storage.connections import SHORT, Connection, transaction, value
from shardkit.storage.failpoints import failpoint
from shardkit.storage.predicate import BETWEEN_AT_MOST, relation, within

from . import preflight
from .clearing import DDL

if TYPE_CHECKING:
    from .transfer import TransferRun

ROWS_A_STEP = 2_000
_BY_INDEX = ("enable_seqscan", "off")
_RECEIVING = (
    *SHORT,
    *digest.TEXT_FORM,
    _BY_INDEX,
    ("statement_timeout", "10s"),
    # Rows come as they are, whatever triggers and foreign keys would make of them.
    ("session_replication_role", "replica"),
    ("synchronous_commit", "on"),
)


@dataclass
class _Done:
    """What the steps of this process did."""

    steps: int = 0
    rows: dict[str, int] = field(default_factory=dict)
    pauses: list[float] = field(default_factory=list)


class LockedCopier:
    """One transfer's rows, carried in steps."""

    def __init__(self, run: TransferRun) -> None:
        self._run = run
        self._done = _Done()
        self._width = 0
        self._copied: dict[ShardedTable, int] = {}
        self._asked = self._opened = 0.0
        self._alike: list[str] = []
        self._committed = False

    def begin_phase(self) -> None:
        """The driver enters a phase."""

    def end(self) -> None:
        """No rows pass any more: they do only while a step is under way."""

    # --- prepare ---------------------------------------------------------------------------------------------------

    def prepare(self) -> Event:
        """Check everything, mark the arcs in transit on the target, build indexes on the position, stand guard on the
        source."""
        run = self._run
        topology = run.topology()
        preflight.check(
            topology,
            run.source_shard,
            run.target_shard,
            run.shards,
            Mode.LOCKED,
            back=run.keeps_source,
            in_force=True,
        )
        if not topology.by_id[run.row.target].in_transit.issuperset(run.row.arcs):
            run.patiently_change(lambda now, version: now.marked(version, run.row.target, run.row.arcs))
        run.clearing.delete_rows(run.target_shard)
        self._build_indexes()
        self._stand_guard(run.source_shard)
        rows, size = self._estimate()
        run.catalog.note(run.row.id, rows_expected=rows, bytes_expected=size)
        return Event.PREPARED

    def _build_indexes(self) -> None:
        run = self._run
        for shard in (run.source_shard, run.target_shard):
            # On a connection of its own: it waits for every transaction that may know the table without the index.
            connection = run.shards.get(shard)
            for index, table in enumerate(run.tables):
                what = f"the index on the position of {table} on shard {shard.name}"
                attended(
                    connection,
                    partial(positionindex.build, connection, run.row.id, index, table, run.around.token),
                    run.waits.looking_after(what, shard, connection.info.backend_pid),
                )
                tables.analyze(connection, table)
        run.waits.tell(None)

    def _stand_guard(self, shard: Shard) -> None:
        run = self._run
        for index, table in enumerate(run.tables):
            install = partial(self._install, run.probes.get(shard), index, table)
            run.waits.with_lock_retries(f"the trigger on {table}", shard, install, table)

    def _install(self, connection: Connection, index: int, table: ShardedTable) -> None:
        with transaction(connection, *DDL, step="locked.install_triggers"):
            change.claim(connection, self._run.around.token)
            stepguard.install(connection, self._run.row.id, index, table, self._run.row.arcs)

    def _estimate(self) -> tuple[int, int]:
        run = self._run
        found = [tables.describe(run.source, table) for table in run.tables]
        share = run.row.arcs.width / (run.topology().owned(run.row.source) | run.row.arcs).width
        rows = sum(max(table.rows_estimate, 0.0) for table in found if table)
        return int(rows * share), int(sum(table.bytes for table in found if table) * share)

    # --- the steps -------------------------------------------------------------------------------------------------

    def copy(self) -> Event:
        """Step by step until the target owns all arcs."""
        run = self._run
        record = run.catalog.transfer(run.row.id).record
        run.track.update(rows_expected=record["rows_expected"], bytes_expected=record["bytes_expected"])
        if "copy_began" not in record:
            record["copy_began"] = time.time()
            run.catalog.note(run.row.id, copy_began=record["copy_began"])
        self._step_all(run.source_shard, run.target_shard)
        self._certify(copy_seconds=max(0.0, time.time() - record["copy_began"]))
        return Event.DECIDED

    def catch_up(self) -> Event:
        """Never: each step ends with everything there."""
        raise AssertionError("a locked transfer has nothing to catch up with")

    verify = cut_over = catch_up

    def take_back(self) -> None:
        """Bring what the target owns already back to the source, in steps."""
        run = self._run
        if run.topology().owned(run.row.target) & run.row.arcs:
            self._build_indexes()
            self._stand_guard(run.target_shard)
            self._step_all(run.target_shard, run.source_shard)

    def stand_down(self) -> None:
        """Drop triggers and indexes on both sides."""
        run = self._run
        for shard in (run.source_shard, run.target_shard):
            connection = run.probes.get(shard)
            for index, table in enumerate(run.tables):
                run.waits.with_lock_retries(
                    f"the trigger on {table}",
                    shard,
                    partial(self._uninstall, connection, index, table),
                    table,
                    inspection.Against.EVERYBODY,
                )
            for name in positionindex.left(connection, run.row.id).values():
                run.waits.with_lock_retries(
                    "the end of an index on positions", shard, partial(self._drop_index, connection, name)
                )

    def _uninstall(self, connection: Connection, index: int, table: ShardedTable) -> None:
        with transaction(connection, *DDL, step="locked.remove_triggers"):
            change.claim(connection, self._run.around.token)
            stepguard.remove(connection, self._run.row.id, index, table)

    def _drop_index(self, connection: Connection, name: sql.Identifier) -> None:
        with transaction(connection, *DDL, step="locked.drop_index"):
            change.claim(connection, self._run.around.token)
            positionindex.drop(connection, name)

    # --- one step --------------------------------------------------------------------------------------------------

    def _step_all(self, giver: Shard, taker: Shard) -> None:
        run = self._run
        run.settle()
        deadline = time.monotonic() + run.around.patience
        self._clear(giver, taker, run.topology().owned(giver.id) & run.row.arcs)
        while remaining := run.topology().owned(giver.id) & run.row.arcs:
            run.around.pause(0)
            piece = self._piece(giver, remaining)
            failpoint("locked.step")
            run.followers.wait(taker, "the next step")
            try:
                self._step(giver, taker, piece)
            except MoveWaiting as error:
                if time.monotonic() > deadline:
                    raise
                run.waits.tell(str(error))
                run.around.pause(0.05)
                continue
            run.waits.tell(None)
            deadline = time.monotonic() + run.around.patience
            # Applications get as much time as they were kept waiting.
            run.around.pause(self._opened - self._asked)

    def _clear(self, giver: Shard, taker: Shard, remaining: ArcSet) -> None:
        """What an interrupted step left: rows copied and not decided, rows decided and not deleted."""
        run = self._run
        if remaining:
            run.clearing.delete_rows(taker, remaining)
        if moved := run.row.arcs - remaining:
            run.wait_for_owner(taker, giver)
            run.clearing.delete_rows(giver, moved)

    def _step(self, giver: Shard, taker: Shard, piece: ArcSet) -> None:
        run = self._run
        shapes = self._shapes(giver, taker)
        run.change(
            lambda now, version: now.cut_over(version, giver.id, taker.id, piece),
            1.0,
            while_closed=lambda connection: self._carry(connection, taker, piece, shapes),
            clock=self._clock,
        )
        self._committed = False
        failpoint("locked.opened")
        run.wait_for_owner(taker, giver)
        deleted = self._delete(giver, piece)
        for table, rows in self._copied.items():
            self._done.rows[str(table)] = self._done.rows.get(str(table), 0) + rows
        self._done.steps += 1
        self._done.pauses.append((self._opened - self._asked) * 1000)
        run.track.update(rows=run.track.now.rows + deleted)
        if self._done.steps % 100 == 0:
            self._certify()

    def _clock(self, moment: str) -> None:
        if moment == "asked":
            self._asked = time.perf_counter()
        elif moment == "opened":
            self._opened = time.perf_counter()

    def _carry(self, giving: Connection, taker: Shard, piece: ArcSet, shapes: tuple[str, str]) -> None:
        """On the giver, whose fence is locked: copy the piece, compare it, commit it on the taker."""
        run = self._run
        taking = run.probes.get(taker)
        giver_shape, taker_shape = shapes
        giving.execute(inspection.lock_shape(run.tables))
        if inspection.shape(giving, run.tables, run.row.id) != giver_shape:
            raise MoveWaiting("A table was altered during the step.")
        giving.execute(
            "SELECT set_config(name, setting, true) FROM unnest(%s::text[], %s::text[]) AS s (name, setting)",
            tuple(map(list, zip(*digest.TEXT_FORM, _BY_INDEX, strict=True))),
        )
        with transaction(taking, *_RECEIVING, step="locked.receive"):
            change.claim(taking, run.around.token)
            if not fence.guard_newest(taking, run.topology().by_id[taker.id].fence):
                raise CatalogBehind(shard=taker.name)
            taking.execute(inspection.lock_shape(run.tables))
            if inspection.shape(taking, run.tables, run.row.id) != taker_shape:
                raise MoveWaiting("A table was altered during the step.")
            for table in run.tables:
                if self._committed:  # by an attempt that ended before its decision
                    taking.execute(
                        sql.SQL("DELETE FROM {} WHERE {}").format(
                            relation(table),
                            within(table, run.row.arcs & run.topology().by_id[taker.id].in_transit),
                        )
                    )
                columns = self._columns(giving, table)
                written = [name for name, generated in columns if not generated]
                self._copied[table] = rowcopy.pipe(giving, taking, table, written, within(table, piece))
                self._compare(giving, taking, table, [name for name, _ in columns], piece)
            self._committed = True
        if names := run.followers.lacking(taker, taking):
            raise MoveWaiting(f"Standbys of shard {taker.name} lack rows: {names}.")
        pairs = numbering.shared(giving, taking, run.topology(), run.tables, taker.id)
        sequences.pass_over(giving, taking, pairs)
        failpoint("locked.before decision")

    def _columns(self, connection: Connection, table: ShardedTable) -> Iterable[tuple[str, bool]]:
        found = tables.describe(connection, table)
        assert found is not None
        return [(column.name, bool(column.generated)) for column in found.columns]

    def _compare(
        self, giving: Connection, taking: Connection, table: ShardedTable, columns: list[str], piece: ArcSet
    ) -> None:
        """Before the commit on the taker, so that a difference leaves nothing there."""
        arcs = list(piece)
        mine = digest.by_chunk(giving, table, columns, arcs)
        theirs = digest.by_chunk(taking, table, columns, arcs)
        if mine == theirs:
            return
        found = tables.describe(giving, table)
        assert found is not None
        types = {column.name: column.type for column in found.columns}
        compared = digest.Compared(found.row_identity(table.key), tuple(types), types)
        differing: set[str] = set()
        for arc in arcs:
            ours, others = (
                digest.by_row_of_chunk(connection, table, compared, arc, 1, [0])
                for connection in (giving, taking)
            )
            differing |= {row for row in ours.keys() | others.keys() if ours.get(row) != others.get(row)}
        named = [f"{table} {row}" for row in sorted(differing)]
        shown = ", ".join(named[:10]) + (f" and {len(named) - 10} more" if len(named) > 10 else "")
        raise VerificationFailed(f"The copy differs from its source in the rows of: {shown}.", keys=named)

    def _shapes(self, giver: Shard, taker: Shard) -> tuple[str, str]:
        """The tables as they are now on both sides, which are alike; `PreflightFailed` where they are not."""
        run = self._run
        found = inspection.shapes([run.probes.get(giver), run.probes.get(taker)], run.tables, run.row.id)
        if found != self._alike:
            preflight.check_tables(
                run.topology(), run.tables, run.source_shard, run.target_shard, run.probes, Mode.LOCKED
            )
            self._alike = found
        return found[0], found[1]

    def _delete(self, giver: Shard, piece: ArcSet) -> int:
        run = self._run
        deleted = 0
        for table in run.tables:
            while True:
                in_force = run.topology().by_id[giver.id].fence
                try:
                    deleted += purge.delete_few(
                        run.probes.get(giver), table, piece, token=run.around.token, in_force=in_force
                    )
                    break
                except (psycopg.errors.UndefinedTable, purge.NewerFence):
                    run.around.pause(0.02)  # another transfer changed this shard's fence
                except psycopg.errors.LockNotAvailable:
                    blocker = replication.oldest_writer(run.probes.get(giver)) or "a session that locks it"
                    run.waits.tell(f"the deletion from {table} on shard {giver.name} waits for {blocker}")
                    run.around.pause(0.02)
        return deleted

    def _piece(self, giver: Shard, remaining: ArcSet) -> ArcSet:
        """The first of what remains, of about `ROWS_A_STEP` rows; of a key that has more, the key alone."""
        run = self._run
        width = self._width or max(1, remaining.width * ROWS_A_STEP // max(1, self._estimate()[0]))
        while True:
            piece = remaining.leading(width, BETWEEN_AT_MOST)
            rows = self._count(run.probes.get(giver), piece, 20 * ROWS_A_STEP)
            if rows <= 2 * ROWS_A_STEP or piece.width == 1:
                break
            width = max(1, piece.width * ROWS_A_STEP // rows)
        self._width = max(
            1, width * min(4 * ROWS_A_STEP, ROWS_A_STEP * ROWS_A_STEP // max(1, rows)) // ROWS_A_STEP
        )
        return piece

    def _count(self, connection: Connection, piece: ArcSet, enough: int) -> int:
        total = 0
        with transaction(connection, _BY_INDEX, ("row_security", "off")):
            for table in self._run.tables:
                total += value(
                    connection,
                    sql.SQL("SELECT count(*) FROM (SELECT 1 FROM {} WHERE {} LIMIT {}) AS few").format(
                        relation(table), within(table, piece), sql.Literal(enough)
                    ),
                )
        return total

    def _certify(self, **facts: Any) -> None:
        """Store what the steps so far did; what a mover that was killed did is added to."""
        run = self._run
        before = run.catalog.transfer(run.row.id).record
        rows = dict(before.get("certificate", {}).get("rows", {}))
        for table, number in self._done.rows.items():
            rows[table] = rows.get(table, 0) + number
        steps = before.get("steps", 0) + self._done.steps
        pauses = self._done.pauses
        worst = max([*pauses, before.get("pause_ms", {}).get("total", 0.0)])
        run.catalog.note(
            run.row.id,
            steps=steps,
            certificate={
                "kind": "move",
                "format": 1,
                "arcs": [[hex_position(arc.first), hex_position(arc.last)] for arc in run.row.arcs],
                "rows": rows,
                "steps": steps,
                "checked_at": datetime.now(UTC).isoformat(),
            },
            pause_ms={"total": round(worst, 2), "median": round(median(pauses or [0.0]), 2)},
            **facts,
        )
        self._done = _Done()
