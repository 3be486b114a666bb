"""Placements of invented topologies under invented weights, against what a placement has to be."""

from __future__ import annotations

import json
import random
from collections import Counter
from fractions import Fraction
from itertools import product
from math import ceil, floor

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shardkit.core.keyrange import POSITION_MIN, SLOT_BITS, SLOTS, Arc, ArcSet
from shardkit.core.placement import Placement, initial, plan, quotas
from shardkit.core.topology import Topology

from .strategies import shard_ids, slot_topologies, some_weights, topology_of, weights

unhurried = settings(deadline=None)


@st.composite
def changes(draw: st.DrawFn) -> tuple[Topology, dict[int, int]]:
    topology = draw(slot_topologies())
    return topology, draw(some_weights([shard.id for shard in topology.shards]))


def held(tokens: tuple[int, ...], owners: tuple[int, ...]) -> Counter[int]:
    """Slots of each owner."""
    slots: Counter[int] = Counter()
    first = POSITION_MIN
    for token, owner in zip(tokens, owners, strict=True):
        count, rest = divmod(token + 1 - first, 1 << SLOT_BITS)
        assert not rest
        slots[owner] += count
        first = token + 1
    return slots


def surpluses(before: Counter[int], after: Counter[int]) -> int:
    return sum(max(0, before[shard_id] - after[shard_id]) for shard_id in before)


def shares(weights: dict[int, int]) -> dict[int, Fraction]:
    total = sum(weights.values())
    return {shard_id: Fraction(SLOTS * weight, total) for shard_id, weight in weights.items()}


def goal_of(topology: Topology, placement: Placement) -> Topology:
    return topology_of(
        placement.tokens, placement.owners, {shard.id: shard.weight for shard in topology.shards}
    )


@unhurried
@given(changes())
def test_every_count_is_within_one_slot_of_the_exact_share(change: tuple[Topology, dict[int, int]]) -> None:
    topology, wanted = change
    placement = plan(topology, wanted)
    slots = held(placement.tokens, placement.owners)
    assert slots.total() == SLOTS
    for shard_id, share in shares(wanted).items():
        assert slots[shard_id] in (floor(share), ceil(share))


@unhurried
@given(changes())
def test_what_moves_is_the_sum_of_the_surpluses(change: tuple[Topology, dict[int, int]]) -> None:
    topology, wanted = change
    placement = plan(topology, wanted)
    before, after = held(topology.tokens, topology.owners), held(placement.tokens, placement.owners)
    assert placement.slots_moved == surpluses(before, after)
    assert sum(transfer.arcs.width for transfer in placement.transfers) == placement.slots_moved << SLOT_BITS


@unhurried
@given(changes())
def test_no_other_rounding_moves_less(change: tuple[Topology, dict[int, int]]) -> None:
    topology, wanted = change
    before = held(topology.tokens, topology.owners)
    least = min(
        surpluses(before, Counter(dict(zip(wanted, counts, strict=True))))
        for counts in product(*({floor(share), ceil(share)} for share in shares(wanted).values()))
        if sum(counts) == SLOTS
    )
    placement = plan(topology, wanted)
    assert placement.slots_minimum == placement.slots_moved == least


@unhurried
@given(changes())
def test_every_position_has_one_owner_and_changes_it_only_by_a_transfer(
    change: tuple[Topology, dict[int, int]],
) -> None:
    topology, wanted = change
    placement = plan(topology, wanted)
    goal = goal_of(topology, placement)
    first = POSITION_MIN
    for token in sorted({*topology.tokens, *placement.tokens}):
        before, after = topology.ring.owner_at(token), goal.ring.owner_at(token)
        arc = ArcSet([Arc(first, token)])
        carried = [(t.source, t.target) for t in placement.transfers if t.arcs & arc]
        assert carried == ([] if before == after else [(before, after)])
        assert all(t.arcs.issuperset(arc) for t in placement.transfers if t.arcs & arc)
        first = token + 1


@unhurried
@given(changes())
def test_a_shard_gives_or_receives_but_never_both(change: tuple[Topology, dict[int, int]]) -> None:
    placement = plan(*change)
    sources = {transfer.source for transfer in placement.transfers}
    assert sources.isdisjoint(transfer.target for transfer in placement.transfers)


@unhurried
@given(changes())
def test_transfers_are_one_a_pair_in_order(change: tuple[Topology, dict[int, int]]) -> None:
    placement = plan(*change)
    pairs = [(transfer.source, transfer.target) for transfer in placement.transfers]
    assert pairs == sorted(set(pairs))
    assert all(transfer.arcs for transfer in placement.transfers)


@unhurried
@given(changes(), st.data())
def test_transfers_in_any_order_end_at_the_goal(
    change: tuple[Topology, dict[int, int]], data: st.DataObject
) -> None:
    topology, wanted = change
    placement = plan(topology, wanted)
    # Each transfer is marked, cut over and unmarked; the steps of one may come between those of others.
    steps = data.draw(st.permutations([transfer for transfer in placement.transfers for _ in range(3)]))
    done: Counter[tuple[int, int]] = Counter()
    for step in steps:
        stage = done[step.source, step.target]
        done[step.source, step.target] += 1
        version = topology.version + 1
        if stage == 0:
            topology = topology.marked(version, step.target, step.arcs)
        elif stage == 1:
            topology = topology.cut_over(version, step.source, step.target, step.arcs)
        else:
            topology = topology.unmarked(version, step.source, step.arcs)
    assert topology.tokens == placement.tokens
    assert topology.owners == placement.owners
    assert not any(shard.in_transit for shard in topology.shards)


@unhurried
@given(changes())
def test_a_placement_reached_needs_no_other(change: tuple[Topology, dict[int, int]]) -> None:
    topology, wanted = change
    goal = goal_of(topology, plan(topology, wanted))
    again = plan(goal, wanted)
    assert again == Placement((), goal.tokens, goal.owners, 0, 0)


@unhurried
@given(changes(), st.randoms(use_true_random=False))
def test_the_order_of_shards_and_weights_does_not_matter(
    change: tuple[Topology, dict[int, int]], shuffler: random.Random
) -> None:
    topology, wanted = change
    ids = [shard.id for shard in topology.shards]
    shuffler.shuffle(ids)
    shuffled = topology_of(topology.tokens, topology.owners, dict.fromkeys(ids, 1))
    shuffler.shuffle(ids)
    assert plan(shuffled, {shard_id: wanted[shard_id] for shard_id in ids}) == plan(topology, wanted)


@unhurried
@given(changes(), st.integers(2, 1000))
def test_only_the_proportions_of_weights_count(change: tuple[Topology, dict[int, int]], factor: int) -> None:
    topology, wanted = change
    scaled = {shard_id: weight * factor for shard_id, weight in wanted.items()}
    assert plan(topology, scaled) == plan(topology, wanted)


@unhurried
@given(changes())
def test_json_in_and_out(change: tuple[Topology, dict[int, int]]) -> None:
    topology, wanted = change
    placement = plan(topology, wanted)
    assert Placement.from_json(json.loads(json.dumps(placement.to_json()))) == placement
    assert plan(Topology.from_json(json.loads(json.dumps(topology.to_json()))), wanted) == placement


@unhurried
@given(changes())
def test_a_drained_shard_owns_nothing(change: tuple[Topology, dict[int, int]]) -> None:
    topology, wanted = change
    drained = {shard_id for shard_id, weight in wanted.items() if not weight}
    assert drained.isdisjoint(plan(topology, wanted).owners)


# --- shards that join -----------------------------------------------------------------------------------------------


@unhurried
@given(st.integers(1, 20), st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_shards_of_equal_weight_that_join_are_the_only_ones_to_receive(old: int, joining: list[int]) -> None:
    tokens, owners = initial(dict.fromkeys(range(old), 1))
    for count in joining:
        equal = dict.fromkeys(range(old + count), 1)
        placement = plan(topology_of(tokens, owners, equal), equal)
        assert {transfer.target for transfer in placement.transfers} == set(range(old, old + count))
        tokens, owners, old = placement.tokens, placement.owners, old + count


@unhurried
@given(st.data())
def test_old_shards_receive_of_a_join_only_what_rounding_forces(data: st.DataObject) -> None:
    """Weights that differ can leave more surplus than one newcomer may take, each within a slot of its share."""
    old = data.draw(st.integers(1, 8))
    wanted = {shard_id: data.draw(st.integers(1, 1000)) for shard_id in range(old)}
    tokens, owners = initial(wanted)
    wanted[old] = data.draw(st.integers(1, 1000))
    topology = topology_of(tokens, owners, wanted)
    before, share = held(tokens, owners), shares(wanted)
    assume(share[old] >= 1)
    forced = sum(max(0, before[shard_id] - ceil(share[shard_id])) for shard_id in range(old)) - ceil(
        share[old]
    )
    to_old = [transfer for transfer in plan(topology, wanted).transfers if transfer.target != old]
    assert sum(transfer.arcs.width for transfer in to_old) == max(0, forced) << SLOT_BITS


# --- quotas and the first topology ----------------------------------------------------------------------------------


@given(shard_ids, st.data())
def test_a_first_topology_has_one_arc_a_shard(ids: list[int], data: st.DataObject) -> None:
    wanted = data.draw(some_weights(ids))
    tokens, owners = initial(wanted)
    assert list(owners) == sorted(set(owners))
    slots = held(tokens, owners)
    assert slots.total() == SLOTS
    assert slots == Counter(quotas(wanted, {}))


@given(st.dictionaries(st.integers(0, 65535), weights, min_size=1, max_size=40), st.data())
def test_first_quotas_round_up_the_largest_remainders(wanted: dict[int, int], data: st.DataObject) -> None:
    assume(any(wanted.values()))
    quota = quotas(wanted, {})
    share = shares(wanted)
    up = {share[i] - floor(share[i]) for i in wanted if quota[i] > share[i]}
    down = {share[i] - floor(share[i]) for i in wanted if quota[i] < share[i]}
    assert not up or not down or min(up) >= max(down)
