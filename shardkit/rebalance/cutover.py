"""The few milliseconds in which arcs change their owner.

`storage.change` locks the fence of the shard that gives the arcs up, renames it, and commits; this is what happens
before that: the write-refusing trigger is switched on, the other side catches up with the last write, and the keys
written since the verification are compared for the last time. Everything is bounded, as applications wait: what does
not end soon is postponed, and nothing has changed. What can be done before the lock is: the look at the subscription,
and all of the other side's opening but its COMMIT.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple, Self

import psycopg
from psycopg import sql

from shardkit.core.errors import MoveWaiting
from shardkit.storage import inspection, numbering, replication, sequences, sourceguard
from shardkit.storage.connections import Connection, at_once, only
from shardkit.storage.failpoints import failpoint

from .opening import Opening
from .stream import Stream
from .verify import IN_CUTOVER, Suspect, TooMany, Verifier

if TYPE_CHECKING:
    from .transfer import TransferRun

CATCH_UP_LIMIT = 0.5
"""Seconds that the target may take for the last writes while applications wait."""
MANY = "too many rows were written since they were compared"
COMPARE_LIMIT = "500ms"
"""Time that one query of the last comparison may take."""


class Postponed(Exception):
    """Not now: says why."""


class Altered(Exception):
    """What was verified was altered since, by DDL or by TRUNCATE: all of it is to be verified again."""


class _Running(NamedTuple):
    """A replication that runs: the process that applies, and the errors that were met so far."""

    applier: int | None
    errors: int

    @classmethod
    def of(cls, state: replication.CopyState) -> Self:
        return cls(state.applier, state.errors)


class Cutover:
    """The hooks of one transfer's cutover along a stream, and the time each part took.

    The publisher of the stream hands the arcs over, the subscriber gets them: source and target, or, where a transfer
    is rolled back, the other way round.
    """

    def __init__(self, run: TransferRun, stream: Stream, verifier: Verifier, opening: Opening) -> None:
        self._run = run
        self._opening = opening
        self._stream = stream
        self._verifier = verifier
        self._moments: dict[str, float] = {}
        self._before = _Running(0, 0)
        self._sequences = numbering.shared(
            stream.publisher, stream.subscriber, run.topology(), run.tables, stream.subscriber_shard.id
        )

    def attempt(self) -> bool:
        """Hand the arcs over, in a moment in which nobody holds the publisher's fence for long.

        False if tables were altered, so that all is to be verified again; `MoveWaiting` when patience ends.
        """
        run, giver, taker = self._run, self._stream.publisher_shard.id, self._stream.subscriber_shard.id
        deadline = time.monotonic() + run.around.patience
        while True:
            run.around.pause(0)
            self._verifier.settle_once()
            run.followers.wait(self._stream.subscriber_shard, "the cutover")
            try:
                self._before = self._running()
                run.change(
                    lambda now, version: now.cut_over(version, giver, taker, run.row.arcs),
                    1.0,
                    while_closed=self.while_closed,
                    on_open=self.on_open,
                    ahead=self._opening.can_stand_ready,
                    clock=self.clock,
                )
                return True
            except Altered as reason:
                run.waits.tell(str(reason))
                return False
            except (Postponed, MoveWaiting) as error:
                if time.monotonic() > deadline:
                    raise MoveWaiting(
                        f"No moment to cut over was found within {run.around.patience:.0f} s: {error}"
                    ) from error
                run.around.pause(0.05)

    def clock(self, moment: str) -> None:
        """Note a moment; the last attempt counts."""
        if moment == "asked":
            self._moments = {}
        self._moments[moment] = time.perf_counter()
        if moment == "recorded":
            topology = self._run.topology()
            self._verifier.certificate |= {
                "decided_at": datetime.now(UTC).isoformat(),
                "decided_by": [topology.version, topology.digest],
            }

    def while_closed(self, source: Connection) -> None:
        """On the publisher, whose fence is locked: `Postponed`, or the subscriber has everything, and the same."""
        run, stream = self._run, self._stream
        steps = (
            sourceguard.wait_for_writers(run.row.id),
            # What triggers do not note, as a partition that was detached with its rows, changes the shape of a table.
            inspection.lock_shape(run.tables),
            sourceguard.set_moved(run.row.id, stream.subscriber_shard.name),
        )
        source.execute(sql.SQL("; ").join(steps), prepare=False)
        with at_once(stream.publisher, stream.subscriber):
            noted = sourceguard.ask_changes(stream.publisher, run.row.id, IN_CUTOVER + 1)
            position = replication.ask_position(stream.publisher)
            shapes = self._verifier.shapes_now()  # meanwhile the subscriber applies the last writes
        written = set(sourceguard.read_changes(noted))
        if len(written) > IN_CUTOVER:
            raise Postponed(MANY)
        if shapes != self._verifier.shapes:
            raise Altered("a table was altered since its rows were compared")
        written |= self._catch_up(str(only(position)))
        self.clock("caught_up")
        self._require_standbys()
        try:
            self._verifier.remaining_differences(written, COMPARE_LIMIT)
        except psycopg.errors.QueryCanceled as error:
            raise Postponed("the last comparison took too long") from error
        except TooMany as error:
            raise Postponed(MANY) from error
        self.clock("verified")
        sequences.pass_over(stream.publisher, stream.subscriber, self._sequences)
        failpoint(f"{run.row.phase.value}.before decision")

    def on_open(self, connection: Connection) -> None:
        """On the subscriber, which owns the arcs from this commit on."""
        failpoint(f"{self._run.row.phase.value}.before opening")
        self._opening.on_open(connection)

    def _catch_up(self, position: str) -> set[Suspect]:
        """Wait until the subscriber has applied everything, and has it on its disk; the rows noted there by then."""
        stream = self._stream
        started = time.monotonic()
        while True:
            with at_once(stream.subscriber):
                asked = replication.ask_copy_state(stream.subscriber, stream.name)
                noted = sourceguard.ask_changes(stream.subscriber, self._run.row.id, IN_CUTOVER + 1)
                # A synchronous commit flushes all that was applied before it without waiting.
                replication.emit(stream.subscriber)
            state = replication.read_copy_state(asked)
            if state is None or not state.enabled or _Running.of(state) != self._before:
                raise Postponed("the subscription has stopped, or met an error")
            if state.has_applied(position):
                return set(sourceguard.read_changes(noted))
            if time.monotonic() - started > CATCH_UP_LIMIT:
                raise Postponed(f"the last writes were not applied within {CATCH_UP_LIMIT * 1000:.0f} ms")

    def _running(self) -> _Running:
        """The replication as it runs before the fence is locked: `Postponed` if it does not. What is the same later has
        not stopped between."""
        stream = self._stream
        state = replication.copy_state(stream.subscriber, stream.name)
        sender = replication.sender(stream.publisher, stream.name)
        if state is None or not state.enabled or state.ready != state.tables or state.applier is None:
            raise Postponed("the subscription is not running")
        if sender is None or sender.state != "streaming":  # from another server, perhaps
            raise Postponed("the subscription is not running")
        return _Running.of(state)

    def _require_standbys(self) -> None:
        """One that took over without the rows would be the only owner of them."""
        stream = self._stream
        if names := self._run.followers.lacking(stream.subscriber_shard, stream.subscriber):
            raise Postponed(f"standbys of shard {stream.subscriber_shard.name} lack rows: {names}")

    def pause_ms(self) -> dict[str, float]:
        """Milliseconds from the request of the lock to the opening, whole and by part."""
        order = ("asked", "locked", "caught_up", "verified", "decided", "opened")
        at = [self._moments[name] for name in order]
        parts = {
            name: round((b - a) * 1000, 2)
            for name, a, b in zip(("lock", "catch_up", "verify", "decide", "open"), at, at[1:], strict=False)
        }
        return {"total": round((at[-1] - at[0]) * 1000, 2), **parts}
