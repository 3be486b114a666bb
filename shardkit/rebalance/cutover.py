"""The few milliseconds in which arcs change their owner.

`storage.change` locks the source's fence and renames it; this is what happens between the two: the target catches up
with the last write, the keys written since the verification are compared for the last time, and the write-refusing
trigger is switched on. Everything is bounded, as applications wait: what does not end soon is postponed, and nothing
has changed.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import psycopg

from shardkit.storage import change, inspection, numbering, replication, sequences, sourceguard
from shardkit.storage.connections import SHORT, Connection, transaction
from shardkit.storage.failpoints import failpoint

from .verify import IN_CUTOVER, TooMany, Verifier

if TYPE_CHECKING:
    from .transfer import TransferRun

CATCH_UP_LIMIT = 0.5
"""Seconds that the target may take for the last writes while applications wait."""
MANY = "too many rows were written since they were compared"
COMPARE_LIMIT = "500ms"
"""Time that one query of the last comparison may take."""
_FLUSH = (*SHORT, ("lock_timeout", "200ms"), ("synchronous_commit", "on"))


class Postponed(Exception):
    """Not now: says why."""


class Altered(Exception):
    """What was verified was altered since, by DDL or by TRUNCATE: all of it is to be verified again."""


class Cutover:
    """The hooks of one transfer's cutover, and the time each part took."""

    def __init__(self, run: TransferRun, verifier: Verifier) -> None:
        self._run = run
        self._verifier = verifier
        self._moments: dict[str, float] = {}
        self._sequences = numbering.shared(
            run.source, run.target, run.topology(), run.tables, run.target_shard.id
        )

    def clock(self, moment: str) -> None:
        """Note a moment; the last attempt counts."""
        if moment == "asked":
            self._moments = {}
        self._moments[moment] = time.perf_counter()

    def while_closed(self, source: Connection) -> None:
        """On the source, whose fence is locked: `Postponed`, or everything is there and the same on the target."""
        run = self._run
        sourceguard.wait_for_writers(source, run.row.id)
        self._require_unaltered(source)
        self._catch_up()
        self.clock("caught_up")
        self._flush_target()
        try:
            self._verifier.remaining_differences(COMPARE_LIMIT)
        except psycopg.errors.QueryCanceled as error:
            raise Postponed("the last comparison took too long") from error
        except TooMany as error:
            raise Postponed(MANY) from error
        self.clock("verified")
        sequences.pass_over(run.source, run.target, self._sequences)
        sourceguard.set_moved(source, run.row.id, run.target_shard.name)
        failpoint("cutting over.before decision")

    def on_open(self, target: Connection) -> None:
        """On the target, which now owns the arcs: nothing may be applied any more, the purge's deletes least of all."""
        failpoint("cutting over.before opening")
        replication.set_enabled(target, self._run.name, False)

    def _require_unaltered(self, source: Connection) -> None:
        """What triggers do not note, as a partition that was detached with its rows, changes the shape of a table."""
        run = self._run
        inspection.lock_shape(source, run.tables)
        if self._verifier.shapes_now() != self._verifier.shapes:
            raise Altered("a table was altered since its rows were compared")

    def _catch_up(self) -> None:
        run = self._run
        started = time.monotonic()
        if len(sourceguard.peek_changes(run.source, run.row.id, IN_CUTOVER + 1)) > IN_CUTOVER:
            raise Postponed(MANY)
        before = replication.copy_state(run.target, run.name)
        first = replication.sender(run.source, run.name)
        if before is None or not before.enabled or before.ready != before.tables or first is None:
            raise Postponed("the subscription is not running")
        position = replication.position_now(run.source)
        while True:
            sender = replication.sender(run.source, run.name, position)
            if sender is None or sender.pid != first.pid or sender.state != "streaming":
                raise Postponed("the replication connection was lost")
            if sender.passed:
                break
            if time.monotonic() - started > CATCH_UP_LIMIT:
                raise Postponed(f"the target lags {sender.lag_bytes} bytes behind")
            self._draw_answer()
        after = replication.copy_state(run.target, run.name)
        if after is None or not after.enabled or after.errors != before.errors:
            raise Postponed("the subscription met an error")

    def _flush_target(self) -> None:
        """One synchronous commit flushes all that the apply worker committed without waiting."""
        run = self._run
        with transaction(run.target, *_FLUSH):
            change.claim(run.target, run.around.token)

    def _draw_answer(self) -> None:
        """Have the target say now how far it is. By itself it reports what it applied only when that is flushed, which
        is up to 400 ms later (twice wal_writer_delay), and it reports when it hears something."""
        self._flush_target()
        replication.position_now(self._run.source)

    def pause_ms(self) -> dict[str, float]:
        """Milliseconds from the request of the lock to the opening of the target, whole and by part."""
        order = ("asked", "locked", "caught_up", "verified", "decided", "opened")
        at = [self._moments[name] for name in order]
        parts = {
            name: round((b - a) * 1000, 2)
            for name, a, b in zip(("lock", "catch_up", "verify", "decide", "open"), at, at[1:], strict=False)
        }
        return {"total": round((at[-1] - at[0]) * 1000, 2), **parts}
