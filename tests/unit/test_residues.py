"""Numbers that shards give apart from each other."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkit.core.errors import TopologyInvalid
from shardkit.core.residues import ID_TYPES, STRIDE_MAX, first_above, is_of, left, widens
from shardkit.core.topology import ShardedTable, Split, Topology
from shardkit.storage.numbering import Numbering

STRIDES = st.integers(2, STRIDE_MAX)
FLOORS = st.integers(-(2**63), 2**63 - 1)


@given(st.data(), STRIDES, FLOORS)
def test_the_first_number_is_the_smallest_of_its_residue_above_the_floor(
    data: st.DataObject, stride: int, floor: int
) -> None:
    residue = data.draw(st.integers(0, stride - 1))
    number = first_above(floor, stride, residue)
    assert number > max(floor, 0)
    assert is_of(number, stride, residue)
    assert number - stride <= max(floor, 0)


@pytest.mark.parametrize(
    ("floor", "stride", "residue", "number"),
    [(0, 8, 0, 8), (0, 8, 1, 1), (7, 8, 7, 15), (8, 8, 0, 16), (-9, 8, 0, 8), (1000, 64, 63, 1023)],
)
def test_first_numbers(floor: int, stride: int, residue: int, number: int) -> None:
    assert first_above(floor, stride, residue) == number


@given(st.data(), STRIDES, st.integers(1, 8))
def test_numbers_of_two_shards_never_meet_while_one_has_a_wider_stride(
    data: st.DataObject, stride: int, factor: int
) -> None:
    one, two = data.draw(st.lists(st.integers(0, stride - 1), min_size=2, max_size=2, unique=True))
    wide = stride * factor
    assert widens(wide, stride)
    mine = {first_above(data.draw(FLOORS), wide, one) % stride}
    assert mine == {one} != {two}


def test_what_is_left() -> None:
    assert left(7, 8, 7) == 1
    assert left(8, 8, 7) == 0
    assert left(1, 8, 32767) == 4096
    for kind in ID_TYPES.values():
        # Not even a table that begins with the highest residue is short of numbers.
        assert left(kind.stride - 1, kind.stride, kind.maximum) > 4000


def numbering(**changed: int | bool) -> Numbering:
    given: dict[str, int | bool] = {
        "last": 1025, "called": False, "start": 1025, "step": 1024, "minimum": 1, "maximum": 2**63 - 1,
        "cycles": False, **changed
    }  # fmt: skip
    return Numbering("s", "int8", **given)  # type: ignore[arg-type]


SPLIT = Split("public", "t", "id", 1024, 1000)


def test_a_sequence_as_it_was_recorded() -> None:
    assert numbering().problems(SPLIT, 1) == []
    assert numbering(last=1025 + 5 * 1024, called=True).problems(SPLIT, 1) == []
    # Made wider, and not recorded yet.
    assert numbering(step=4096, last=4097, start=4097).problems(SPLIT, 1) == []


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"step": 1}, "counts by 1 instead of 1024"),
        ({"step": -1024}, "counts by -1024"),
        ({"step": 1536}, "counts by 1536"),
        ({"last": 1026}, "is at 1026, a number of another shard"),
        ({"last": 1}, "is at 1, below the numbers that were given before"),
        ({"start": 1}, ""),
        ({"start": 2}, "starts again with 2"),
        ({"cycles": True}, "CYCLE"),
    ],
)
def test_a_sequence_that_was_altered(changed: dict[str, int | bool], text: str) -> None:
    found = numbering(**changed).problems(SPLIT, 1)
    assert len(found) == bool(text)
    assert all(text in one for one in found)


def test_what_a_sequence_can_have_given() -> None:
    assert numbering(called=True).given == 1025
    assert numbering(last=1).given == 0
    assert numbering(maximum=2**63 - 1).limit == 2**63 - 1
    assert Numbering("s", "int4", 1, False, 1, 1, 1, 2**63 - 1, False).limit == 2**31 - 1
    with pytest.raises(ValueError, match="no number left"):
        Numbering("s", "int2", 32760, True, 1, 1, 1, 32767, False).first(32760, 8, 0)
    assert Numbering("s", "int2", 32759, True, 1, 1, 1, 32767, False).first(32759, 8, 0) == 32760


TABLE = ShardedTable("public", "t", "user_id", "int")


def topology(*shards: int) -> Topology:
    made = Topology.first(
        1, [(n, f"s{n}", f"postgresql://s{n}", 100) for n in shards], [2**63 - 1], [shards[0]]
    )
    return made.declared(2, [TABLE])


def test_a_topology_says_which_ids_are_split() -> None:
    before = topology(0, 1)
    after = before.with_splits(3, [SPLIT])
    assert after.by_split["public", "t"] == SPLIT
    assert Topology.from_json(after.to_json()) == after
    assert "splits" not in before.to_json()
    assert after.changed_since(before) == ()
    assert after.digest != before.digest
    wider = Split("public", "t", "id", 2048, 9999)
    assert after.with_splits(4, [wider]).splits == (wider,)
    assert after.joined(4, shard_id=9, name="n", url="postgresql://n", weight=1).splits == (SPLIT,)


@pytest.mark.parametrize(
    "split",
    [
        Split("public", "other", "id", 1024, 0),
        Split("public", "t", "id", 1, 0),
        Split("public", "t", "id", STRIDE_MAX + 1, 0),
    ],
)
def test_a_split_that_is_none(split: Split) -> None:
    with pytest.raises(TopologyInvalid):
        topology(0, 1).with_splits(3, [split])


def test_a_shard_with_a_number_that_has_no_residue() -> None:
    narrow = topology(0, 1).with_splits(3, [Split("public", "t", "id", 2, 0)])
    with pytest.raises(TopologyInvalid, match="are split by 2"):
        narrow.joined(4, shard_id=2, name="s2", url="postgresql://s2", weight=1)
