"""Leases of ids: what makes the ids of many processes unique, from two tables of the catalog.

`IdLeases` is what a process makes integer ids with (`orm.ids` asks it). It leases a lane when it makes the first one
and keeps it reserved for hours, so that a catalog that is away does not matter; a slot that needs more than a lane
gives (62 ids a second) borrows from the next second and has more lanes leased for minutes. A lane that was reserved by
a process that was killed is free again when its reservation ends; one that ends in order, and `release`, give it back
at once. Leases are not taken across a fork: the child leases its own.

The time is the catalog's at the last lease and this process's monotonic clock from there on: nobody's wall clock can
make two ids equal, nor hold them up.

Connections are opened for each lease and closed; renewals run in a thread that lives as long as they do.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TypeVar
from uuid import uuid4

import psycopg
from sqlalchemy.util.concurrency import await_, in_greenlet

from shardkit.core.errors import CatalogUnreachable, IdsExhausted, NotInitialised, ShardkitError
from shardkit.core.idmaking import CountedMaker, Lane, TimedMaker, Wait
from shardkit.core.ids import COUNTERS, EPOCH_MS, SLOT_WIDTH, TICK_MS

from .catalog import whoami
from .connections import Connection, connect_catalog

T = TypeVar("T")

FIRST_RESERVATION_MS = 15 * 60_000
"""Of a process that has just come: one that is killed again and again must not take all lanes away for hours."""
RESERVATION_MS = 8 * 3600_000
"""Of a process that has lived for `SETTLED_MS`."""
SETTLED_MS = 60_000
EXTRA_RESERVATION_MS = 60_000
"""Of the lanes that a busy slot needs in addition."""
RENEW_EVERY_MS = 10 * 60_000
RETRY_MS = 20_000
MOST_LANES = 48
"""Of one process."""
KEPT_FREE = 256
"""Lanes that are left for processes that have none."""
BLOCK = 256
BIGGEST_BLOCK = 1 << 16
BUSY_SECONDS = 60.0
"""A block that lasted for less is followed by one of twice the size."""

_LEASE = """
WITH clock AS MATERIALIZED (
    SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint - %(epoch)s::bigint AS ms
), supply AS MATERIALIZED (
    SELECT count(*) AS lanes FROM shardkit.id_lanes, clock WHERE reserved_until <= clock.ms / %(tick)s
), free AS MATERIALIZED (
    SELECT lanes.lane FROM shardkit.id_lanes AS lanes, clock, supply
    WHERE lanes.reserved_until <= clock.ms / %(tick)s AND supply.lanes > %(kept)s
    ORDER BY lanes.reserved_until, lanes.lane
    LIMIT %(number)s
    FOR UPDATE OF lanes SKIP LOCKED
)
UPDATE shardkit.id_lanes AS taken
SET lease = %(lease)s, holder = %(holder)s,
    reserved_until = (greatest(clock.ms, %(now)s) + %(reservation)s) / %(tick)s
FROM free, clock
WHERE taken.lane = free.lane
RETURNING taken.lane, clock.ms, taken.reserved_until
"""
_EXTEND = """
WITH clock AS MATERIALIZED (
    SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint - %(epoch)s::bigint AS ms
)
UPDATE shardkit.id_lanes AS kept
SET reserved_until = greatest(
    kept.reserved_until, (greatest(clock.ms, %(now)s) + %(reservation)s) / %(tick)s
)
FROM clock
WHERE kept.lane = ANY(%(lanes)s) AND kept.lease = %(lease)s
RETURNING kept.lane, clock.ms, kept.reserved_until
"""
_RELEASE = """
UPDATE shardkit.id_lanes SET reserved_until = least(reserved_until, %(until)s), lease = NULL, holder = NULL
WHERE lane = ANY(%(lanes)s) AND lease = %(lease)s
"""
_BLOCK = """
UPDATE shardkit.id_counter SET next = greatest(next, %(first)s) + %(number)s RETURNING next - %(number)s
"""
_FIRST_FREE = "SELECT min(reserved_until) FROM shardkit.id_lanes"

_living: weakref.WeakSet[IdLeases] = weakref.WeakSet()
_holding: set[IdLeases] = set()
"""Those with lanes to give back when the process ends, whoever still knows them."""


class IdLeases:
    """Makes integer ids that no other process makes. Safe to share between threads and event loops; a child of a fork
    leases for itself. ``clock`` is a monotonic clock in nanoseconds."""

    def __init__(self, catalog_url: str, *, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self.catalog_url = catalog_url
        self._clock = clock
        self._ahead_ms: int | None = None
        self._begin()
        _living.add(self)

    def _begin(self) -> None:
        """A process without leases: at first, and in the child of a fork."""
        self._lock = threading.Lock()
        self._leasing = threading.Lock()
        self._lease = uuid4()
        self._timed = TimedMaker()
        self._counted = CountedMaker()
        self._first: int | None = None
        self._since_ms = 0
        self._renew_at_ms = 0
        self._renewing = False
        self._borrowed = 0
        self._block = BLOCK
        self._block_at = 0

    # --- ids -------------------------------------------------------------------------------------------------------

    def timed(self, slot: int | None) -> int:
        """The next id of 63 bits of a slot, of any slot if None. `CatalogUnreachable`, `NotInitialised` or
        `IdsExhausted` if no lane can be had."""
        while True:
            with self._lock:
                made = self._timed.make(slot, self._now_ms() // TICK_MS)
                renew = self._due()
            if renew:
                self._begin_renewal()
            if isinstance(made, int):
                return made
            if made is Wait.LEASE:
                _blocking(self._lease_first)
            else:
                _pause((TICK_MS - self._now_ms() % TICK_MS) / 1000)

    def counted(self, slot: int | None, floor: int = 0) -> int:
        """The next id of 53 bits of a slot, of any slot if None, that is not below ``floor``. Raises as `timed`."""
        while True:
            with self._lock:
                made = self._counted.make(slot, floor)
                block = self._block_at
            if isinstance(made, int):
                return made
            _blocking(partial(self._lease_block, block, floor))

    def release(self) -> None:
        """Give the leases back, for others to use at once; those that the catalog cannot be told of end by
        themselves. Ids can be made again."""
        with self._lock:
            lanes = self._timed.drop()
            # Never before a lane's first tick: until then it was another's.
            until = max([self._timed.tick + 1, *(lane.first for lane in lanes)])
            self._counted.drop()
            self._first = None
            _holding.discard(self)
        if not lanes:
            return
        parameters = {"lanes": [lane.number for lane in lanes], "lease": self._lease, "until": until}
        with suppress(ShardkitError, psycopg.Error):
            with self._catalog(seconds=2) as connection:
                connection.execute(_RELEASE, parameters)

    def _now_ms(self) -> int:
        """Milliseconds since the epoch of ids; 0 before the first lease."""
        return 0 if self._ahead_ms is None else self._clock() // 1_000_000 + self._ahead_ms

    def _reached_ms(self) -> int:
        """What a reservation has to lie beyond: the catalog's clock may have been set back."""
        with self._lock:
            return max(self._now_ms(), self._timed.tick * TICK_MS)

    # --- lanes -----------------------------------------------------------------------------------------------------

    def _lease_first(self) -> None:
        with self._leasing:
            with self._lock:
                if self._timed.make(None, self._now_ms() // TICK_MS) is not Wait.LEASE:
                    return  # another thread has leased meanwhile
                self._timed.drop()
                self._first = None
            with self._catalog() as connection:
                if not self._take(connection, 1, FIRST_RESERVATION_MS, kept=0):
                    raise self._exhausted(connection)

    def _take(self, connection: Connection, number: int, reservation: int, *, kept: int) -> int:
        """Lease lanes; how many there were."""
        before = self._clock()
        parameters = {
            "epoch": EPOCH_MS, "tick": TICK_MS, "number": number, "kept": kept, "reservation": reservation,
            "lease": self._lease, "holder": whoami(), "now": self._reached_ms(),
        }  # fmt: skip
        rows = connection.execute(_LEASE, parameters).fetchall()
        with self._lock:
            for lane, ms, until in rows:
                self._set_clock(ms, before)
                self._timed.add(Lane(lane, ms // TICK_MS, until))
                if self._first is None:
                    _holding.add(self)
                    self._first = lane
                    self._since_ms = self._now_ms()
                    self._renew_at_ms = self._since_ms + SETTLED_MS
        return len(rows)

    def _set_clock(self, catalog_ms: int, before: int) -> None:
        # Of two answers the later time: this clock never goes back. The answer's way home is not known, and not needed.
        ahead = catalog_ms - before // 1_000_000
        self._ahead_ms = ahead if self._ahead_ms is None else max(self._ahead_ms, ahead)

    def _exhausted(self, connection: Connection) -> IdsExhausted:
        row = connection.execute(_FIRST_FREE).fetchone()
        seconds = 0 if row is None else max(0, (row[0] * TICK_MS - self._now_ms()) // 1000)
        return IdsExhausted(f"All lanes are leased; the first is free in {seconds} s.", seconds=seconds)

    # --- renewal ---------------------------------------------------------------------------------------------------

    def _due(self) -> bool:
        """Whether a renewal has to begin; the caller holds the lock, and begins it."""
        if self._renewing or self._first is None:
            return False
        grows = self._timed.borrowed - self._borrowed > 3 and len(self._timed.lanes) < MOST_LANES
        if not grows and self._now_ms() < self._renew_at_ms:
            return False
        self._renewing = True
        return True

    def _begin_renewal(self) -> None:
        try:
            threading.Thread(target=self._renew, name="shardkit-ids", daemon=True).start()
        except RuntimeError:  # the interpreter is ending, and begins no more threads
            with self._lock:
                self._renewing = False

    def _renew(self) -> None:
        """Reserve the first lane for hours again, and as many more as the borrowing since the last time asks for."""
        with self._lock:
            busy = self._timed.borrowed > self._borrowed
            self._borrowed = self._timed.borrowed
            numbers = [lane.number for lane in self._timed.lanes]
            more = min(len(numbers), MOST_LANES - len(numbers)) if busy else 0
            first = self._first
            settled = self._now_ms() - self._since_ms >= SETTLED_MS
        wait = RETRY_MS
        try:
            with self._catalog() as connection:
                # One that has ended is not taken up again: a new one is leased where the next id is made.
                if first in numbers and settled:
                    self._extend(connection, [n for n in numbers if n == first], RESERVATION_MS)
                if busy:
                    self._extend(connection, [n for n in numbers if n != first], EXTRA_RESERVATION_MS)
                if more > 0:
                    self._take(connection, more, EXTRA_RESERVATION_MS, kept=KEPT_FREE)
            wait = RENEW_EVERY_MS if settled else SETTLED_MS
            # Lanes that a busy slot needs are reserved for a minute only.
            wait = min(wait, EXTRA_RESERVATION_MS // 3) if busy else wait
        except (ShardkitError, psycopg.Error):
            pass  # the reservation goes on, and the next one to make an id tries again
        finally:
            with self._lock:
                self._renew_at_ms = self._now_ms() + wait
                self._renewing = False

    def _extend(self, connection: Connection, lanes: list[int], reservation: int) -> None:
        if not lanes:
            return
        before = self._clock()
        parameters = {
            "epoch": EPOCH_MS, "tick": TICK_MS, "reservation": reservation, "lanes": lanes, "lease": self._lease,
            "now": self._reached_ms(),
        }  # fmt: skip
        rows = connection.execute(_EXTEND, parameters).fetchall()
        with self._lock:
            for lane, ms, until in rows:
                self._set_clock(ms, before)
                for held in self._timed.lanes:
                    if held.number == lane:
                        held.until = until

    # --- blocks ----------------------------------------------------------------------------------------------------

    def _lease_block(self, block: int, floor: int) -> None:
        with self._leasing:
            if self._block_at != block:
                return  # another thread has leased meanwhile
            if block and self._clock() - block < BUSY_SECONDS * 1e9:
                self._block = min(2 * self._block, BIGGEST_BLOCK)
            parameters = {"number": self._block, "first": max(0, -(-floor >> SLOT_WIDTH))}
            with self._catalog() as connection:
                row = connection.execute(_BLOCK, parameters).fetchone()
            assert row is not None
            first = int(row[0])
            if first + self._block > COUNTERS:
                raise IdsExhausted("The counter of ids below 2^53 has come to its end.", seconds=None)
            with self._lock:
                self._counted.add(first, first + self._block)
                self._block_at = self._clock()

    def _catalog(self, seconds: int | None = None) -> Connection:
        try:
            connection = connect_catalog(self.catalog_url, application="shardkit ids", seconds=seconds or 5)
        except CatalogUnreachable as error:
            error.hint = (
                "An application that has leased goes on for hours; one that has not needs the catalog once."
            )
            raise
        row = connection.execute("SELECT to_regclass('shardkit.id_lanes')").fetchone()
        if row is None or row[0] is None:
            connection.close()
            raise NotInitialised(
                "This database has no leases of ids.", hint="Run `shardkit init --catalog URL` there."
            )
        return connection


# --- waiting -------------------------------------------------------------------------------------------------------


def _blocking(work: Callable[[], T]) -> T:
    """Run what blocks: here, or for asyncio in a thread, so that other tasks go on."""
    if in_greenlet():
        return await_(asyncio.get_running_loop().run_in_executor(None, work))
    return work()


def _pause(seconds: float) -> None:
    if in_greenlet():
        await_(asyncio.sleep(seconds))
    else:
        time.sleep(seconds)


# --- the ends of a process -----------------------------------------------------------------------------------------


def _forked() -> None:
    _holding.clear()
    for leases in list(_living):
        leases._begin()


def _ending() -> None:
    for leases in list(_holding):
        leases.release()


os.register_at_fork(after_in_child=_forked)
atexit.register(_ending)
