"""Placements of invented topologies with pins, and with tokens anywhere, against what a placement has to be."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from itertools import product
from math import ceil, floor

from hypothesis import given, settings
from hypothesis import strategies as st

from shardkit.core.keyrange import POSITION_MIN, SLOT_BITS, SLOTS, Arc, ArcSet, slot_arc, slot_of
from shardkit.core.placement import Placement, plan
from shardkit.core.topology import Topology, assigned

from .strategies import some_weights, with_pins
from .test_placement import held

unhurried = settings(deadline=None)


@st.composite
def changes(draw: st.DrawFn, aligned: bool = False) -> tuple[Topology, dict[int, int]]:
    topology = draw(with_pins(aligned))
    return topology, draw(some_weights([shard.id for shard in topology.shards]))


def goal_of(topology: Topology, placement: Placement) -> Topology:
    return replace(topology, tokens=placement.tokens, owners=placement.owners)


def without_holes(topology: Topology) -> Topology:
    """The same, but that the positions which are pinned alone are of whoever owns a neighbour in their slot."""
    alone = {pin.arc.first for pin in topology.pins if not pin.is_slot}
    tokens, owners = assigned(topology.tokens, topology.owners, ArcSet(), 0)  # no token between equal owners
    for at in sorted(alone):
        neighbour = next(
            other
            for distance in range(1, len(alone) + 2)
            for other in (at - distance, at + distance)
            if other in slot_arc(slot_of(at)) and other not in alone
        )
        tokens, owners = assigned(tokens, owners, ArcSet([Arc(at, at)]), topology.ring.owner_at(neighbour))
    return replace(topology, tokens=tokens, owners=owners)


def slots_of(topology: Topology) -> Counter[int]:
    whole = without_holes(topology)
    return held(whole.tokens, whole.owners)


def pinned_slots(topology: Topology) -> Counter[int]:
    return Counter(pin.shard for pin in topology.pins if pin.is_slot)


def shares(topology: Topology, weights: dict[int, int]) -> tuple[dict[int, Fraction], set[int]]:
    """The exact shares of the shards that share, and those that have nothing but their pins."""
    pinned, over = pinned_slots(topology), set[int]()
    while True:
        slots = SLOTS - sum(pinned[shard_id] for shard_id in over)
        total = sum(weight for shard_id, weight in weights.items() if shard_id not in over)
        share = {s: Fraction(slots * w, total) for s, w in weights.items() if s not in over}
        more = {shard_id for shard_id, exact in share.items() if pinned[shard_id] > exact}
        if not more:
            return share, over
        over |= more


@unhurried
@given(changes())
def test_every_pin_is_where_it_is_pinned(change: tuple[Topology, dict[int, int]]) -> None:
    goal = goal_of(change[0], plan(*change))
    for pin in goal.pins:
        assert goal.owned(pin.shard).issuperset(ArcSet([pin.arc]))


@unhurried
@given(changes())
def test_apart_from_pins_slots_are_whole_and_shared_by_weight(
    change: tuple[Topology, dict[int, int]],
) -> None:
    topology, weights = change
    slots = slots_of(goal_of(topology, plan(topology, weights)))  # whole, or `held` would refuse them
    share, over = shares(topology, weights)
    for shard_id, exact in share.items():
        assert slots[shard_id] in (floor(exact), ceil(exact))
    for shard_id in over:
        assert slots[shard_id] == pinned_slots(topology)[shard_id]


@unhurried
@given(changes(aligned=True))
def test_no_other_rounding_moves_less(change: tuple[Topology, dict[int, int]]) -> None:
    topology, weights = change
    placement = plan(topology, weights)
    before, pinned = slots_of(topology), pinned_slots(topology)
    displaced = 0
    for pin in topology.pins:
        owner = without_holes(topology).ring.owner_at(pin.arc.first)
        if pin.is_slot:
            before[owner] -= 1
            displaced += owner != pin.shard
    share, over = shares(topology, weights)
    given_up = displaced + sum(before[shard_id] for shard_id in over)
    free = SLOTS - sum(pinned[shard_id] for shard_id in over)
    least = min(
        given_up + sum(max(0, before[s] + pinned[s] - n) for s, n in zip(share, counts, strict=True))
        for counts in product(*({floor(exact), ceil(exact)} for exact in share.values()))
        if sum(counts) == free
    )
    assert placement.slots_moved == placement.slots_minimum == least
    moved = sum(transfer.arcs.width for transfer in placement.transfers)
    assert abs(moved - (least << SLOT_BITS)) <= len(topology.pins)


@unhurried
@given(changes())
def test_what_changes_its_owner_is_in_one_transfer(change: tuple[Topology, dict[int, int]]) -> None:
    topology, weights = change
    placement = plan(topology, weights)
    goal = goal_of(topology, placement)
    first = POSITION_MIN
    for token in sorted({*topology.tokens, *placement.tokens}):
        before, after = topology.ring.owner_at(token), goal.ring.owner_at(token)
        arc = ArcSet([Arc(first, token)])
        carried = [(t.source, t.target) for t in placement.transfers if t.arcs & arc]
        assert carried == ([] if before == after else [(before, after)])
        first = token + 1


@unhurried
@given(changes(), st.data())
def test_transfers_in_any_order_end_at_the_goal(
    change: tuple[Topology, dict[int, int]], data: st.DataObject
) -> None:
    topology, weights = change
    placement = plan(topology, weights)
    for transfer in data.draw(st.permutations(placement.transfers)):
        topology = topology.marked(topology.version + 1, transfer.target, transfer.arcs)
        topology = topology.cut_over(topology.version + 1, transfer.source, transfer.target, transfer.arcs)
        topology = topology.unmarked(topology.version + 1, transfer.source, transfer.arcs)
    assert (topology.tokens, topology.owners) == (placement.tokens, placement.owners)
    again = plan(topology, weights)
    assert again == Placement((), placement.tokens, placement.owners, 0, 0)
    assert plan(Topology.from_json(json.loads(json.dumps(topology.to_json()))), weights) == again


@unhurried
@given(changes(), st.data())
def test_after_the_last_pin_is_gone_all_is_as_without_any(
    change: tuple[Topology, dict[int, int]], data: st.DataObject
) -> None:
    topology, weights = change
    topology = goal_of(topology, plan(topology, weights))
    for pin in data.draw(st.permutations(topology.pins)):
        topology = topology.unpinned(topology.version + 1, pin.arc)
        placement = plan(topology, weights)
        topology = goal_of(topology, placement)
    total = sum(weights.values())
    slots = slots_of(topology)
    for shard_id, weight in weights.items():
        assert abs(slots[shard_id] - Fraction(SLOTS * weight, total)) < 1
