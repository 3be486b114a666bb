"""Ids as arithmetic: what is encoded is decoded, and whatever the clock does, no two are equal and none goes back."""

from __future__ import annotations

from itertools import pairwise
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkit.core import ids
from shardkit.core.idmaking import BORROWED_TICKS, CountedMaker, Lane, TimedMaker, UuidMaker, Wait
from shardkit.core.ids import Carrier, Layout

SLOTS = st.integers(0, 65535)
FEW_SLOTS = st.sampled_from([0, 1, 40000, 65535, None])
RANDOM = st.integers(0, 2**58 - 1)


@given(st.integers(0, 2**34 - 1), SLOTS, st.integers(0, 1023), st.integers(0, 7))
def test_timed_ids_are_decoded(tick: int, slot: int, lane: int, sequence: int) -> None:
    made = ids.timed_id(tick, slot, lane, sequence)
    assert 0 <= made < 2**63
    assert ids.timed(made) == (tick, slot, lane, sequence)
    assert Carrier(Layout.TIMED).slot(made) == slot


@given(st.integers(0, 2**63 - 1))
def test_every_timed_id_is_the_only_one_of_its_parts(id_: int) -> None:
    assert ids.timed_id(*ids.timed(id_)) == id_


@given(st.integers(0, 2**37 - 1), SLOTS)
def test_counted_ids_are_decoded(counter: int, slot: int) -> None:
    made = ids.counted_id(counter, slot)
    assert 0 <= made < 2**53
    assert float(made) == made
    assert ids.counted(made) == (counter, slot)
    assert Carrier(Layout.COUNTED).slot(made) == slot


@given(st.integers(0, 2**48 - 1), RANDOM, SLOTS)
def test_uuids_are_decoded(ms: int, random: int, slot: int) -> None:
    made = ids.uuid_id(ms, random, slot)
    assert made.version == 7
    assert ids.uuid_parts(made) == (ms, slot)
    assert Carrier(Layout.UUID).slot(made) == slot


@given(st.uuids(version=4))
def test_other_uuids_carry_no_slot(id_: UUID) -> None:
    assert Carrier(Layout.UUID).slot(id_) is None


def test_parts_that_do_not_fit_are_refused() -> None:
    for made in (
        lambda: ids.timed_id(2**34, 0, 0, 0),
        lambda: ids.timed_id(0, 65536, 0, 0),
        lambda: ids.timed_id(0, 0, 1024, 0),
        lambda: ids.timed_id(0, 0, 0, 8),
        lambda: ids.counted_id(2**37, 0),
        lambda: ids.counted_id(-1, 0),
        lambda: ids.uuid_id(0, 2**58, 0),
        lambda: ids.timed(-1),
        lambda: ids.counted(2**53),
        lambda: ids.uuid_parts(UUID(int=4 << 76)),
    ):
        with pytest.raises(ValueError):
            made()


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**40))
def test_ids_below_the_floor_carry_no_slot(id_: int, floor: int) -> None:
    assert (Carrier(Layout.TIMED, floor).slot(id_) is None) == (id_ < floor)


# --- making --------------------------------------------------------------------------------------------------------

STEPS = st.lists(
    st.tuples(st.integers(0, 2), FEW_SLOTS, st.integers(-200, 60), st.integers(1, 30)),
    min_size=1,
    max_size=120,
)
"""(which process, slot, how its clock steps, how many ids)"""


@given(STEPS)
def test_no_two_processes_make_one_timed_id(steps: list[tuple[int, int | None, int, int]]) -> None:
    """Three processes whose clocks step as they like take lanes in turn from one table of reservations."""
    reserved = dict.fromkeys(range(4), 0)
    makers = [TimedMaker() for _ in range(3)]
    clocks = [1000, 1000, 1000]
    seen: set[int] = set()
    last: dict[tuple[int, int | None], int] = {}
    ticks = [0, 0, 0]
    for process, slot, step, count in steps:
        clocks[process] = max(0, clocks[process] + step)
        maker, now = makers[process], clocks[process]
        for _ in range(count):
            made = maker.make(slot, now)
            if made is Wait.LEASE:
                lane = min(reserved, key=lambda lane: reserved[lane])
                maker.add(Lane(lane, reserved[lane], max(reserved[lane], now) + 40))
                reserved[lane] = max(reserved[lane], now) + 40
                break
            if made is Wait.CLOCK:
                assert maker.tick >= now + BORROWED_TICKS
                break
            assert isinstance(made, int)
            assert made not in seen
            seen.add(made)
            parts = ids.timed(made)
            assert slot in (None, parts.slot)
            assert made > last.get((process, parts.slot), -1)
            last[process, parts.slot] = made
            assert parts.tick >= ticks[process], "the tick went back"
            ticks[process] = parts.tick
            assert any(
                lane.first <= parts.tick < lane.until for lane in maker.lanes if lane.number == parts.lane
            )


@given(st.lists(st.integers(0, 40), min_size=1, max_size=60))
def test_timed_ids_of_any_slot_increase(steps: list[int]) -> None:
    maker = TimedMaker()
    maker.add(Lane(7, 0, 2**34))
    now, last = 0, -1
    for step in steps:
        now += step // 10
        for _ in range(step):
            made = maker.make(None, now)
            assert isinstance(made, int)
            assert made > last
            last = made


def test_a_hot_slot_takes_every_lane_then_borrows_a_second_then_waits() -> None:
    maker = TimedMaker()
    for number in (5, 3):
        maker.add(Lane(number, 0, 2**34))
    made = []
    while isinstance(id_ := maker.make(9, 100), int):
        made.append(ids.timed(id_))
    assert id_ is Wait.CLOCK
    assert [(one.tick, one.lane, one.sequence) for one in made] == [
        (tick, lane, sequence) for tick in range(100, 108) for lane in (3, 5) for sequence in range(8)
    ]
    assert isinstance(maker.make(9, 101), int)


def test_the_tick_never_passes_the_reservation() -> None:
    maker = TimedMaker()
    maker.add(Lane(0, 0, 102))
    made = 0
    while isinstance(maker.make(9, 100), int):
        made += 1
    assert made == 16
    assert maker.make(9, 100) is Wait.LEASE
    assert maker.make(9, 5000) is Wait.LEASE


@given(
    st.lists(st.tuples(st.integers(0, 2), FEW_SLOTS, st.integers(0, 2**30)), max_size=300),
    st.integers(1, 5),
)
def test_no_two_processes_make_one_counted_id(steps: list[tuple[int, int | None, int]], block: int) -> None:
    makers = [CountedMaker() for _ in range(3)]
    counter = 0
    seen: set[int] = set()
    last: dict[tuple[int, int | None], int] = {}
    for process, slot, floor in steps:
        made = makers[process].make(slot, floor)
        if made is Wait.LEASE:
            first = max(counter, -(-floor >> 16))
            counter = first + block
            makers[process].add(first, counter)
            made = makers[process].make(slot, floor)
        assert isinstance(made, int)
        assert floor <= made < 2**53
        assert made not in seen
        seen.add(made)
        assert slot in (None, made & 0xFFFF)
        assert made > last.get((process, slot), -1)
        last[process, slot] = made


@given(st.lists(st.tuples(st.integers(0, 5), RANDOM, SLOTS), min_size=2, max_size=100))
def test_uuids_of_a_process_increase(steps: list[tuple[int, int, int]]) -> None:
    maker = UuidMaker()
    made = [maker.make(slot, 1000 + ms, random) for ms, random, slot in steps]
    assert all(before < after for before, after in pairwise(made))
    assert [one.int & 0xFFFF for one in made] == [slot for _, _, slot in steps]
