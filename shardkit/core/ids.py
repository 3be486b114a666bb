"""Slot-carrying ids: primary keys that tell the slot of the shard key they belong to.

Three layouts, all of them plain arithmetic: no clock, no randomness, no leases here (`core.idmaking` and
`storage.idleases` have those). An id of 63 bits is

    0 | 34 bits of ticks (128 ms since 2025) | 16 slot | 10 lane | 3 sequence

so ids sort by time and last until 2094. One below 2^53, which JSON carries unharmed, is

    37 bits of a counter | 16 slot

and a UUID is an ordinary version 7 whose last 16 bits are the slot; 58 bits of chance remain. The slot of an id says
where a row is looked for, so it must be that of the row's shard key: the session checks it, and a CHECK on the server.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple
from uuid import UUID

from .keyrange import SLOTS

EPOCH_MS = 1_735_689_600_000
"""2025-01-01T00:00:00Z, in milliseconds since 1970: tick 0."""
TICK_MS = 128

SLOT_WIDTH = 16
TICKS = 1 << 34
LANES = 1 << 10
SEQUENCES = 1 << 3
COUNTERS = 1 << 37
RANDOM_BITS = 58

SLOT_SHIFT = 13
"""Bits right of the slot in an id of 63 bits: lane and sequence."""
SLOT_MASK = SLOTS - 1
UUID_VERSION = 7


class Layout(StrEnum):
    """How an id carries its slot."""

    TIMED = "timed"
    """63 bits, sorted by time."""
    COUNTED = "counted"
    """53 bits, exact in JSON."""
    UUID = "uuid"
    """A UUID of version 7."""


class Timed(NamedTuple):
    """The parts of an id of 63 bits."""

    tick: int
    slot: int
    lane: int
    sequence: int

    @property
    def unix_ms(self) -> int:
        """When its tick began, in milliseconds since 1970."""
        return EPOCH_MS + self.tick * TICK_MS


class Counted(NamedTuple):
    """The parts of an id of 53 bits."""

    counter: int
    slot: int


class Carried(NamedTuple):
    """The parts of a UUID that are not chance."""

    unix_ms: int
    slot: int


def _within(name: str, value: int, below: int) -> None:
    if not 0 <= value < below:
        raise ValueError(f"{name} {value} is not within 0 to {below - 1}")


def timed_id(tick: int, slot: int, lane: int, sequence: int) -> int:
    """The id of 63 bits; ValueError for a part that does not fit."""
    _within("tick", tick, TICKS)
    _within("slot", slot, SLOTS)
    _within("lane", lane, LANES)
    _within("sequence", sequence, SEQUENCES)
    return ((tick << SLOT_WIDTH | slot) << 10 | lane) << 3 | sequence


def timed(id_: int) -> Timed:
    """The parts of an id of 63 bits; ValueError for what is none."""
    _within("id", id_, 1 << 63)
    return Timed(id_ >> 29, id_ >> SLOT_SHIFT & SLOT_MASK, id_ >> 3 & LANES - 1, id_ & SEQUENCES - 1)


def counted_id(counter: int, slot: int) -> int:
    """The id of 53 bits; ValueError for a part that does not fit."""
    _within("counter", counter, COUNTERS)
    _within("slot", slot, SLOTS)
    return counter << SLOT_WIDTH | slot


def counted(id_: int) -> Counted:
    """The parts of an id of 53 bits; ValueError for what is none."""
    _within("id", id_, 1 << 53)
    return Counted(id_ >> SLOT_WIDTH, id_ & SLOT_MASK)


def uuid_id(unix_ms: int, random: int, slot: int) -> UUID:
    """The UUID of a time, 58 bits of chance and a slot; ValueError for a part that does not fit."""
    _within("time", unix_ms, 1 << 48)
    _within("random", random, 1 << RANDOM_BITS)
    _within("slot", slot, SLOTS)
    high = unix_ms << 16 | UUID_VERSION << 12 | random >> 46
    low = 0b10 << 62 | (random & (1 << 46) - 1) << SLOT_WIDTH | slot
    return UUID(int=high << 64 | low)


def uuid_parts(id_: UUID) -> Carried:
    """The parts of a UUID; ValueError for one of another version."""
    if id_.version != UUID_VERSION:
        raise ValueError(f"{id_} is no UUID of version {UUID_VERSION}")
    return Carried(id_.int >> 80, id_.int & SLOT_MASK)


@dataclass(frozen=True, slots=True)
class Carrier:
    """How the values of one column carry a slot. Ids below ``floor`` are older than the layout and carry none, as do
    UUIDs of other versions than 7."""

    layout: Layout
    floor: int = 0

    def slot(self, id_: int | UUID) -> int | None:
        """The slot that an id carries, by the same rule as the CHECK on the server; None if it carries none."""
        if isinstance(id_, UUID):
            return id_.int & SLOT_MASK if id_.int >> 76 & 15 == UUID_VERSION else None
        if id_ < self.floor:
            return None
        return (id_ >> SLOT_SHIFT if self.layout is Layout.TIMED else id_) & SLOT_MASK
