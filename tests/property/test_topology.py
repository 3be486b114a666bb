"""Topologies and the steps from one to the next."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shardkit.core.errors import TopologyInvalid
from shardkit.core.keyrange import POSITION_MAX, POSITION_MIN, Arc, ArcSet
from shardkit.core.topology import Fence, Topology

from .strategies import arc_sets, positions, tables, topologies

unhurried = settings(deadline=None)


def through_json(topology: Topology) -> Topology:
    return Topology.from_json(json.loads(json.dumps(topology.to_json())))


# --- one topology ---------------------------------------------------------------------------------------------------


@unhurried
@given(topologies(), st.lists(positions, max_size=8))
def test_every_position_has_exactly_one_owner(topology: Topology, drawn: list[int]) -> None:
    assert sum(topology.owned(shard.id).width for shard in topology.shards) == 2**64
    for at in (POSITION_MIN, *topology.tokens, *(token + 1 for token in topology.tokens[:-1]), *drawn):
        owners = [shard.id for shard in topology.shards if at in topology.owned(shard.id)]
        assert owners == [topology.ring.owner_at(at)]


@unhurried
@given(topologies())
def test_json_in_and_out(topology: Topology) -> None:
    again = through_json(topology)
    assert again == topology
    assert again.digest == topology.digest
    assert again.to_json() == topology.to_json()


@unhurried
@given(topologies(), st.data())
def test_other_content_has_another_digest(topology: Topology, data: st.DataObject) -> None:
    other = data.draw(st.sampled_from(list(variants(topology))))
    assert other != topology
    assert other.digest != topology.digest


def variants(topology: Topology) -> Iterator[Topology]:
    """Valid topologies that differ from this one in a single thing."""
    first, *rest = topology.shards
    yield replace(topology, version=topology.version + 1)
    for change in (
        {"name": first.name + "-b"},
        {"url": first.url + "?sslmode=require"},
        {"weight": 0 if first.leaving else first.weight + 1},
        {"in_transit": ~topology.owned(first.id) - first.in_transit},
    ):
        changed: Any = replace(first, **change)
        if changed != first:
            yield replace(topology, shards=(changed, *rest))
    if first.id not in {pin.shard for pin in topology.pins}:
        yield replace(topology, shards=(replace(first, weight=0, leaving=not first.leaving), *rest))
    if topology.pins:
        yield replace(topology, pins=topology.pins[1:])
    if topology.tables:
        yield replace(topology, tables=topology.tables[1:])
        yield replace(topology, tables=(replace(topology.tables[0], key="other key"), *topology.tables[1:]))
    if rest and not any(shard.in_transit for shard in topology.shards):
        yield replace(
            topology, owners=(*topology.owners[:-1], (set(topology.by_id) - {topology.owners[-1]}).pop())
        )
    if topology.tokens[0] > POSITION_MIN:
        yield replace(
            topology, tokens=(POSITION_MIN, *topology.tokens), owners=(topology.owners[0], *topology.owners)
        )


@unhurried
@given(topologies(), st.data())
def test_two_proposals_of_one_version_share_no_fence(topology: Topology, data: st.DataObject) -> None:
    version = topology.version + 1
    shard = data.draw(st.sampled_from(topology.shards))
    one, other = (
        topology.marked(version, shard.id, data.draw(arc_sets) - topology.owned(shard.id)) for _ in range(2)
    )
    assume(one != other)
    assert one.by_id[shard.id].fence != other.by_id[shard.id].fence


@unhurried
@given(topologies(), st.data())
def test_a_damaged_document_is_refused_or_means_what_it_says(topology: Topology, data: st.DataObject) -> None:
    document = json.loads(json.dumps(topology.to_json()))
    holder, place = data.draw(st.sampled_from(list(places(document))))
    holder[place] = data.draw(junk)
    try:
        read = Topology.from_json(document)
    except TopologyInvalid:
        return
    # Written out, because in Python True and 1.0 equal 1.
    assert json.dumps(read.to_json(), sort_keys=True) == json.dumps(document, sort_keys=True)
    assert read.ring.owner_at(0) in read.by_id


junk: st.SearchStrategy[Any] = st.sampled_from(
    [None, True, 1.5, 1.0, -1, 0, 2**63, 2**70, "", "x", "1", [], [[]], [1], {}, {"id": 1}]
)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything in a document."""
    for place in value if isinstance(value, dict) else range(len(value)):
        yield value, place
        if isinstance(value[place], dict | list):
            yield from places(value[place])


# --- the next one ---------------------------------------------------------------------------------------------------


def check_step(before: Topology, after: Topology, refenced: set[int]) -> None:
    """A step renames the fences of exactly these shards, after itself."""
    assert through_json(after) == after
    for shard in after.shards:
        if shard.id in refenced:
            assert shard.fence == Fence(after.version, after.digest[:8])
        else:
            assert shard.fence == before.by_id[shard.id].fence
    assert set(after.changed_since(before)) == refenced


@unhurried
@given(topologies(), st.data())
def test_joining_changes_every_fence_and_no_owner(topology: Topology, data: st.DataObject) -> None:
    shard_id = data.draw(st.integers(0, 65535).filter(lambda each: each not in topology.by_id))
    after = topology.joined(
        topology.version + 1, shard_id=shard_id, name="newcomer", url="postgresql://new/app", weight=7
    )
    check_step(topology, after, {shard.id for shard in after.shards})
    assert (after.tokens, after.owners) == (topology.tokens, topology.owners)
    assert not after.owned(shard_id)
    assert not after.named("newcomer").in_transit
    assert after.closing_since(topology) == ()


@unhurried
@given(topologies(), st.data())
def test_leaving_changes_every_fence_and_no_owner(topology: Topology, data: st.DataObject) -> None:
    used = {pin.shard for pin in topology.pins}
    idle = [
        s.id for s in topology.shards if not topology.owned(s.id) and not s.in_transit and s.id not in used
    ]
    assume(idle)
    shard_id = data.draw(st.sampled_from(idle))
    wished = topology.reweighted(topology.version + 1, {shard_id: 0}, leaving=[shard_id])
    check_step(topology, wished, set())
    after = wished.left(wished.version + 1, shard_id)
    check_step(wished, after, {shard.id for shard in after.shards})
    assert (after.tokens, after.owners) == (topology.tokens, topology.owners)
    assert after.closing_since(wished) == (shard_id,)
    assert after.fence_on(shard_id) == Fence(after.version, after.digest[:8])


@unhurried
@given(topologies(), tables)
def test_declaring_tables_changes_no_fence(topology: Topology, declared: list[Any]) -> None:
    after = topology.declared(topology.version + 1, declared)
    check_step(topology, after, set())
    assert set(after.tables) == set(declared)
    assert after == topology.declared(topology.version + 1, reversed(declared))


@unhurried
@given(topologies(), st.data())
def test_marking_and_unmarking(topology: Topology, data: st.DataObject) -> None:
    shard = data.draw(st.sampled_from(topology.shards))
    arcs = data.draw(arc_sets) - topology.owned(shard.id) - shard.in_transit
    marked = topology.marked(topology.version + 1, shard.id, arcs)
    check_step(topology, marked, {shard.id})
    assert marked.by_id[shard.id].in_transit == shard.in_transit | arcs
    assert marked.closing_since(topology) == ((shard.id,) if arcs else ())
    unmarked = marked.unmarked(marked.version + 1, shard.id, arcs)
    check_step(marked, unmarked, {shard.id})
    assert unmarked.by_id[shard.id].in_transit == shard.in_transit
    assert unmarked.closing_since(marked) == ()


@unhurried
@given(topologies(), st.data())
def test_a_cutover_changes_the_owner_of_its_arcs_and_of_nothing_else(
    topology: Topology, data: st.DataObject
) -> None:
    source = data.draw(st.sampled_from([shard for shard in topology.shards if topology.owned(shard.id)]))
    targets = [shard for shard in topology.shards if shard is not source]
    assume(targets)
    target = data.draw(st.sampled_from(targets))
    arcs = data.draw(arc_sets) & topology.owned(source.id) or topology.owned(source.id)
    marked = topology.marked(topology.version + 1, target.id, arcs)
    after = marked.cut_over(marked.version + 1, source.id, target.id, arcs)
    check_step(marked, after, {source.id, target.id})
    assert after.closing_since(marked) == (source.id,)
    assert after.owned(source.id) == topology.owned(source.id) - arcs
    assert after.owned(target.id) == topology.owned(target.id) | arcs
    for shard in topology.shards:
        if shard not in (source, target):
            assert after.owned(shard.id) == topology.owned(shard.id)
            assert after.by_id[shard.id] == topology.by_id[shard.id]
    assert after.by_id[source.id].in_transit == source.in_transit | arcs
    assert after.by_id[target.id].in_transit == marked.by_id[target.id].in_transit - arcs


@unhurried
@given(topologies(), st.data())
def test_there_and_back_is_the_same_ring(topology: Topology, data: st.DataObject) -> None:
    """A cutover joins neighbouring arcs of one owner, so the ring is compared, not the tokens."""
    source = data.draw(st.sampled_from([shard for shard in topology.shards if topology.owned(shard.id)]))
    targets = [shard for shard in topology.shards if shard is not source]
    assume(targets)
    target = data.draw(st.sampled_from(targets))
    arcs = data.draw(arc_sets) & topology.owned(source.id)
    there = topology.marked(topology.version + 1, target.id, arcs)
    there = there.cut_over(there.version + 1, source.id, target.id, arcs)
    back = there.cut_over(there.version + 1, target.id, source.id, arcs)
    assert all(back.owned(shard.id) == topology.owned(shard.id) for shard in topology.shards)
    assert all(a != b for a, b in zip(back.owners, back.owners[1:], strict=False))
    assert back.tokens[-1] == POSITION_MAX


@unhurried
@given(topologies(), arc_sets, st.data())
def test_arcs_that_the_source_does_not_own_or_the_target_does_not_hold_stay(
    topology: Topology, arcs: ArcSet, data: st.DataObject
) -> None:
    source, target = data.draw(st.sampled_from(topology.shards)), data.draw(st.sampled_from(topology.shards))
    possible = topology.owned(source.id).issuperset(arcs) and target.in_transit.issuperset(arcs)
    assume(not possible)
    try:
        topology.cut_over(topology.version + 1, source.id, target.id, arcs)
    except TopologyInvalid:
        return
    raise AssertionError("arcs passed that could not")


@unhurried
@given(topologies(), st.data())
def test_what_is_owned_cannot_be_marked(topology: Topology, data: st.DataObject) -> None:
    token = data.draw(st.sampled_from(topology.tokens))
    owner = topology.ring.owner_at(token)
    try:
        topology.marked(topology.version + 1, owner, ArcSet([Arc(token, token)]))
    except TopologyInvalid:
        return
    raise AssertionError("an arc was owned and in transit")
