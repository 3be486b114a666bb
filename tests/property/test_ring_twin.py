"""The native core against its twin, and both against the definition of a ring."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkit import _ring as native
from shardkit.core import _pyring as twin
from shardkit.core.errors import KeyTypeError
from shardkit.core.keyrange import POSITION_MAX, POSITION_MIN, SLOTS, slot_arc

places = st.integers(POSITION_MIN, POSITION_MAX) | st.sampled_from([POSITION_MIN, -1, 0, 1, POSITION_MAX])
texts = st.text(max_size=80) | st.text("abcxyz0189-_:", max_size=80)
keys = places | texts | st.uuids() | st.integers(0, 2**128 - 1).map(lambda number: UUID(int=number))


@st.composite
def crowds(draw: st.DrawFn) -> set[int]:
    """Tokens side by side from a place on, more than a scan takes."""
    start = draw(st.integers(POSITION_MIN, POSITION_MAX - 200))
    return {start + step * draw(st.integers(1, 5)) for step in range(draw(st.integers(1, 40)))}


slot_ends = st.sets(st.integers(0, SLOTS - 1), min_size=1, max_size=40).map(
    lambda slots: {slot_arc(slot).last for slot in slots}
)
anywhere = st.sets(places, min_size=1, max_size=40)
token_sets = (
    slot_ends | anywhere | crowds() | st.tuples(slot_ends, anywhere, crowds()).map(lambda s: set().union(*s))
)


@st.composite
def rings(draw: st.DrawFn) -> tuple[native.Ring, twin.Ring]:
    tokens = sorted(draw(token_sets))
    owners = draw(st.lists(st.integers(0, 65535), min_size=len(tokens), max_size=len(tokens)))
    return native.Ring(tokens, owners), twin.Ring(tokens, owners)


def defined_owner(ring: native.Ring, place: int) -> int:
    """The owner of the first token at or after the place, wrapping round."""
    for token, owner in zip(ring.tokens, ring.owners_by_token, strict=True):
        if token >= place:
            return owner
    return ring.owners_by_token[0]


@given(keys)
def test_positions_agree(key: int | str | UUID) -> None:
    assert native.position(key) == twin.position(key)
    assert POSITION_MIN <= native.position(key) <= POSITION_MAX


@given(st.lists(keys, max_size=60))
def test_batches_of_objects_agree(batch: list[int | str | UUID]) -> None:
    expected = array("q", [twin.position(key) for key in batch])
    assert native.positions(batch) == expected
    assert native.positions(tuple(batch)) == expected
    assert twin.positions(batch) == expected


@given(st.lists(places, min_size=1, max_size=60), st.integers(1, 30), st.integers(-7, 7).filter(bool))
def test_batches_of_ints_agree(values: list[int], repeated: int, step: int) -> None:
    """More than a block, in place and with strides."""
    batch = memoryview(array("q", values * repeated))[::step]
    expected = array("q", [twin.position(value) for value in batch.tolist()])
    assert native.positions(batch) == expected
    assert twin.positions(batch) == expected


@given(rings(), st.lists(places, max_size=30))
def test_every_position_has_the_owner_of_the_definition(
    pair: tuple[native.Ring, twin.Ring], more: list[int]
) -> None:
    ring, other = pair
    edges = [token + step for token in ring.tokens for step in (-1, 0, 1)]
    asked = [
        place
        for place in (*edges, *more, POSITION_MIN, POSITION_MAX)
        if POSITION_MIN <= place <= POSITION_MAX
    ]
    expected = array("H", [defined_owner(ring, place) for place in asked])
    for either in pair:
        assert array("H", [either.owner_at(place) for place in asked]) == expected
        assert either.owners_at(asked) == expected
        assert either.owners_at(array("q", asked)) == expected
    assert hash(ring) == hash(other)


@given(rings(), st.lists(keys, max_size=30), st.lists(places, max_size=30), st.integers(1, 40))
def test_owners_of_keys_agree(
    pair: tuple[native.Ring, twin.Ring], batch: list[int | str | UUID], values: list[int], repeated: int
) -> None:
    ring, other = pair
    expected = array("H", [defined_owner(ring, twin.position(key)) for key in batch])
    for either in pair:
        assert array("H", [either[key] for key in batch]) == expected
        assert either.owners(batch) == expected
    ints = array("q", values * repeated)
    assert ring.owners(ints) == other.owners(ints)


not_keys = (
    st.none()
    | st.booleans()
    | st.floats()
    | st.binary()
    | st.integers(min_value=2**63)
    | st.integers(max_value=-(2**63) - 1)
    | st.text(st.characters(categories=["Cs"]), min_size=1)
    | st.tuples(st.text(), st.characters(categories=["Cs"])).map("".join)
)


@given(not_keys)
def test_refusals_agree(value: object) -> None:
    said: set[str] = set()
    calls: list[Callable[..., object]] = [native.position, twin.position]
    for call in calls:
        with pytest.raises(KeyTypeError) as caught:
            call(value)
        said.add(str(caught.value))
    assert len(said) == 1
