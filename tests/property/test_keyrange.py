"""Sets of arcs against membership, position by position.

Membership changes only at the ends of arcs, so the ends and their neighbours stand for all 2**64 positions.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator

from hypothesis import given
from hypothesis import strategies as st

from shardkit.core.keyrange import (
    POSITION_MAX,
    POSITION_MIN,
    SLOT_BITS,
    SLOTS,
    Arc,
    ArcSet,
    slot_arc,
    slot_of,
)

from .strategies import arc_sets, arcs, positions


def telling(*groups: ArcSet | list[Arc]) -> Iterator[int]:
    """The positions at which membership in these can differ from that of the position before."""
    yield POSITION_MIN
    for group in groups:
        for first, last in group:
            yield from (at for at in (first - 1, first, last, last + 1) if POSITION_MIN <= at <= POSITION_MAX)


@given(st.lists(arcs(), max_size=8))
def test_a_set_holds_what_its_arcs_hold(listed: list[Arc]) -> None:
    united = ArcSet(listed)
    for at in telling(listed):
        assert (at in united) == any(first <= at <= last for first, last in listed)


@given(arc_sets)
def test_arcs_are_sorted_and_apart(arcs: ArcSet) -> None:
    for before, after in zip(arcs.arcs, arcs.arcs[1:], strict=False):
        assert before.last + 1 < after.first
    assert ArcSet(reversed(arcs.arcs)) == arcs


@given(arc_sets, arc_sets)
def test_the_operators_are_those_of_sets(one: ArcSet, other: ArcSet) -> None:
    for at in telling(one, other):
        assert (at in one | other) == (at in one or at in other)
        assert (at in one & other) == (at in one and at in other)
        assert (at in one - other) == (at in one and at not in other)
        assert (at in ~one) == (at not in one)


@given(arc_sets, arc_sets)
def test_widths_add_up(one: ArcSet, other: ArcSet) -> None:
    assert one.width + (~one).width == 2**64
    assert (one | other).width + (one & other).width == one.width + other.width


@given(arc_sets, arc_sets)
def test_supersets(one: ArcSet, other: ArcSet) -> None:
    assert (one | other).issuperset(other)
    assert one.issuperset(other) == all(at in one for at in telling(one, other) if at in other)


@given(arc_sets, positions)
def test_an_odd_number_of_bounds_is_inside(arcs: ArcSet, drawn: int) -> None:
    bounds = arcs.bounds()
    assert bounds == sorted(bounds)
    for at in (*telling(arcs), drawn):
        assert bisect_right(bounds, at) % 2 == (at in arcs)
    assert all(POSITION_MIN <= bound <= POSITION_MAX for bound in bounds)


@given(positions)
def test_every_position_is_in_its_slot(position: int) -> None:
    assert position in slot_arc(slot_of(position))


@given(st.integers(0, SLOTS - 1), st.data())
def test_slots_in_a_row_are_one_arc(first: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, min(SLOTS - first, 50)))
    arc = slot_arc(first, count)
    assert ArcSet(slot_arc(first + n) for n in range(count)) == ArcSet([arc])
    assert arc.width == count << SLOT_BITS
