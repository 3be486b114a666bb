"""Making ids: which comes next, from what is leased and what time it is.

Pure state: time and chance are given, leases are handed in, and where none is left the answer is a `Wait`, for
the driver (`storage.idleases`, `orm.ids`) to act upon. Not for several threads at once: drivers hold a lock.

What makes an id of 63 bits unique is that a lane has one holder in each tick. A lease covers the ticks from ``first``
up to ``until``; the next holder of the lane starts at or after ``until``. A maker's tick never goes back, whatever the
clock does, and never leaves the leases, so no two processes need to agree on the time.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from uuid import UUID

from .ids import COUNTERS, RANDOM_BITS, SEQUENCES, SLOT_MASK, SLOT_WIDTH, timed_id, uuid_id
from .keyrange import SLOTS

BORROWED_TICKS = 7
"""How far the tick may run ahead of the clock: 0.9 seconds."""


@dataclass(slots=True)
class Lane:
    """A lane that is leased for the ticks from ``first`` up to ``until``, which is not its own any more."""

    number: int
    first: int
    until: int


class Wait(Enum):
    """Why there is no id now."""

    CLOCK = "every id of this slot up to a second ahead is taken: wait for the next tick"
    LEASE = "no lease covers this moment"


class TimedMaker:
    """Ids of 63 bits. Those of one slot increase strictly; the ticks of all never decrease.

    On overflow of a tick every other lane is used first, then ticks are borrowed from the next second, then the clock
    has to go on. ``borrowed`` counts how often ticks were: who sees it grow leases more lanes.
    """

    def __init__(self) -> None:
        self.lanes: list[Lane] = []
        self.tick = 0
        self.borrowed = 0
        self._usable: list[int] = []
        self._used: dict[int, int] = {}
        self._free = 0

    def add(self, lane: Lane) -> None:
        """Use a lane, from the next tick on: in mid-tick its ids could be below those that were made."""
        lane.first = max(lane.first, self.tick + 1)
        self.lanes.append(lane)

    def drop(self) -> list[Lane]:
        """Give all lanes up. Their next holders may start at ``tick`` + 1."""
        dropped, self.lanes, self._usable = self.lanes, [], []
        return dropped

    def make(self, slot: int | None, now: int) -> int | Wait:
        """The next id of a slot, at tick ``now``. Without a slot any will do, and ids made so increase strictly."""
        self._go_on_to(now)
        while self._usable:
            made = self._next_free() if slot is None else self._next(slot)
            if made is not None:
                return made
            if self.tick >= now + BORROWED_TICKS:
                return Wait.CLOCK
            self.borrowed += 1
            self._enter(self.tick + 1)
        return Wait.LEASE

    def _go_on_to(self, now: int) -> None:
        if now > self.tick:
            self._enter(now)
        elif not self._usable and any(lane.first == self.tick + 1 for lane in self.lanes):
            # The clock was set back, or the tick was borrowed, when the lane came: it starts in the next one.
            self._enter(self.tick + 1)

    def _enter(self, tick: int) -> None:
        self.tick = tick
        self._used.clear()
        self._free = 0
        self.lanes = [lane for lane in self.lanes if tick < lane.until]
        self._usable = sorted(lane.number for lane in self.lanes if lane.first <= tick)

    def _next(self, slot: int) -> int | None:
        used = self._used.get(slot, 0)
        if used >= len(self._usable) * SEQUENCES:
            return None
        self._used[slot] = used + 1
        return timed_id(self.tick, slot, self._usable[used // SEQUENCES], used % SEQUENCES)

    def _next_free(self) -> int | None:
        while self._free < SLOTS:
            made = self._next(self._free)
            if made is not None:
                return made
            self._free += 1
        return None


class CountedMaker:
    """Ids of 53 bits, from leased blocks of the cluster's counter. A counter serves every slot once, so a block lasts
    as long as its busiest slot. Those of one slot increase strictly."""

    def __init__(self) -> None:
        self._low = self._end = 0
        self._next: dict[int, int] = {}
        self._highest = -1
        self._free = 0
        self._free_counter = -1

    def add(self, first: int, end: int) -> None:
        """Use the counters from ``first`` up to ``end``; what is left of the block before is given up."""
        if not self._end <= first < end <= COUNTERS:
            raise ValueError(f"{first}..{end - 1} is no block that follows {self._end - 1}")
        self._low, self._end = first, end
        self._next.clear()

    def drop(self) -> None:
        """Give the block up."""
        self._low = self._end
        self._next.clear()
        self._free_counter = -1

    @property
    def left(self) -> int:
        """How many ids the busiest slot has left."""
        return max(0, self._end - max(self._low, self._highest + 1))

    def make(self, slot: int | None, floor: int = 0) -> int | Wait:
        """The next id of a slot that is not below ``floor``. Without a slot any will do, and ids made so increase
        strictly."""
        above = max(0, -(-floor >> SLOT_WIDTH))
        if slot is None:
            return self._make_free(above)
        counter = max(self._next.get(slot, 0), self._low, above)
        if counter >= self._end:
            return Wait.LEASE
        self._next[slot] = counter + 1
        self._highest = max(self._highest, counter)
        return counter << SLOT_WIDTH | slot

    def _make_free(self, low: int) -> int | Wait:
        # A counter of its own, which no slot has used nor will, gives 65,536 ids in a row.
        if self._free_counter < low or self._free == SLOTS:
            counter = max(low, self._low, self._highest + 1)
            if counter >= self._end:
                return Wait.LEASE
            self._highest = self._free_counter = counter
            self._low = counter + 1
            self._free = 0
        self._free += 1
        return self._free_counter << SLOT_WIDTH | self._free - 1


class UuidMaker:
    """UUIDs of version 7. All that one maker makes increase strictly, whatever the clock does."""

    def __init__(self) -> None:
        self._ms = -1
        self._random = 0

    def make(self, slot: int, now_ms: int, random: int) -> UUID:
        """The next UUID. ``random`` are 58 bits of chance: a new start in each millisecond, and in the same one
        the step (of at most 2^32) from the one before."""
        if now_ms > self._ms:
            self._ms = now_ms
            # The highest bit stays free, so that steps within the millisecond have room.
            self._random = random >> 1
        else:
            self._random += 1 + (random & (1 << 32) - 1)
            if self._random >> RANDOM_BITS:
                self._ms += 1
                self._random = random >> 1
        return uuid_id(self._ms, self._random, slot & SLOT_MASK)
