"""Arcs and slots at their edges."""

from __future__ import annotations

import pytest

from shardkit.core.keyrange import (
    POSITION_MAX,
    POSITION_MIN,
    SLOTS,
    Arc,
    ArcSet,
    hex_position,
    slot_arc,
    slot_of,
)

WHOLE = ArcSet([Arc(POSITION_MIN, POSITION_MAX)])


def test_positions_are_written_in_ring_order() -> None:
    assert hex_position(POSITION_MIN) == "0000000000000000"
    assert hex_position(0) == "8000000000000000"
    assert hex_position(POSITION_MAX) == "FFFFFFFFFFFFFFFF"
    assert str(slot_arc(1)) == "0001000000000000..0001FFFFFFFFFFFF"


def test_slots_divide_the_ring_evenly() -> None:
    assert slot_arc(0, SLOTS) == Arc(POSITION_MIN, POSITION_MAX)
    assert slot_arc(0).first == POSITION_MIN
    assert slot_arc(SLOTS - 1).last == POSITION_MAX
    assert slot_arc(32768) == Arc(0, 2**48 - 1)
    assert slot_arc(3).width * SLOTS == 2**64
    assert (slot_of(POSITION_MIN), slot_of(-1), slot_of(0), slot_of(POSITION_MAX)) == (0, 32767, 32768, 65535)


@pytest.mark.parametrize(
    ("first", "count"), [(-1, 1), (0, 0), (0, -1), (SLOTS, 1), (1, SLOTS), (SLOTS - 1, 2)]
)
def test_slots_beyond_the_ring_are_refused(first: int, count: int) -> None:
    with pytest.raises(ValueError, match="65536"):
        slot_arc(first, count)


def test_an_arc_holds_both_its_ends_and_nothing_else() -> None:
    arc = Arc(-5, 7)
    assert arc.width == 13
    assert -5 in arc
    assert 7 in arc
    assert -6 not in arc
    assert 8 not in arc


def test_arcs_that_touch_or_overlap_become_one() -> None:
    assert ArcSet([Arc(5, 9), Arc(0, 4)]).arcs == (Arc(0, 9),)
    assert ArcSet([Arc(0, 9), Arc(3, 4)]).arcs == (Arc(0, 9),)
    assert ArcSet([Arc(0, 4), Arc(6, 9)]).arcs == (Arc(0, 4), Arc(6, 9))
    assert ArcSet([Arc(0, 4), Arc(5, POSITION_MAX), Arc(POSITION_MIN, -1)]) == WHOLE


def test_equal_sets_have_equal_arcs_and_hashes() -> None:
    one, other = ArcSet([Arc(0, 4), Arc(5, 9)]), ArcSet([Arc(0, 9)])
    assert one == other
    assert hash(one) == hash(other)
    assert one != ArcSet([Arc(0, 8)])
    assert one != (Arc(0, 9),)


def test_the_empty_set() -> None:
    empty = ArcSet()
    assert not empty
    assert len(empty) == 0
    assert empty.width == 0
    assert empty.bounds() == []
    assert ~empty == WHOLE
    assert ~WHOLE == empty
    assert WHOLE.issuperset(empty)
    assert empty.issuperset(empty)
    assert not empty.issuperset(WHOLE)


@pytest.mark.parametrize(
    ("first", "last"),
    [(1, 0), (POSITION_MIN - 1, 0), (0, POSITION_MAX + 1), (POSITION_MAX + 1, POSITION_MAX + 1)],
)
def test_what_is_no_arc_is_refused(first: int, last: int) -> None:
    with pytest.raises(ValueError, match="not an arc"):
        ArcSet([Arc(first, last)])


def test_bounds_leave_out_the_one_beyond_the_largest_bigint() -> None:
    assert ArcSet([Arc(0, 4), Arc(7, 7)]).bounds() == [0, 5, 7, 8]
    assert ArcSet([Arc(5, POSITION_MAX)]).bounds() == [5]
    assert WHOLE.bounds() == [POSITION_MIN]


def test_only_positions_are_members() -> None:
    assert 3 in WHOLE
    assert "3" not in WHOLE
    assert None not in WHOLE
