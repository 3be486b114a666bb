"""The topology: what it refuses, how its fences are named, and the document that is kept of it."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from shardkit.core.errors import NoSuchShard, TopologyInvalid
from shardkit.core.keyrange import POSITION_MAX, POSITION_MIN, Arc, ArcSet, slot_arc
from shardkit.core.topology import Fence, Pin, Shard, ShardedTable, Topology

LOWER, UPPER = ArcSet([Arc(POSITION_MIN, -1)]), ArcSet([Arc(0, POSITION_MAX)])
USERS = ShardedTable("public", "users", "id", "int")
POSTS = ShardedTable("app", "Posts", "user", "text")


@pytest.fixture
def halves() -> Topology:
    """Shard 3 owns the lower half of the ring, shard 5 the upper."""
    return Topology.first(
        1,
        [(3, "east", "postgresql://db3/app", 100), (5, "west", "postgresql://db5/app", 100)],
        (-1, POSITION_MAX),
        (3, 5),
    )


def changed(topology: Topology, shard_id: int, **values: Any) -> Topology:
    return replace(
        topology, shards=tuple(replace(s, **values) if s.id == shard_id else s for s in topology.shards)
    )


# --- what is no topology --------------------------------------------------------------------------------------------

REFUSED: list[tuple[str, Callable[[Topology], object]]] = [
    ("the version is below 1", lambda t: replace(t, version=0)),
    ("no shard", lambda t: replace(t, shards=())),
    ("share an id or a name", lambda t: changed(t, 5, id=3)),
    ("share an id or a name", lambda t: changed(t, 5, name="east")),
    ("0 to 65535", lambda t: changed(t, 5, id=65536)),
    ("0 to 65535", lambda t: changed(t, 5, id=-1)),
    ("not a shard name", lambda t: changed(t, 5, name="")),
    ("not a shard name", lambda t: changed(t, 5, name="-west")),
    ("not a shard name", lambda t: changed(t, 5, name="west\n")),
    ("not a shard name", lambda t: changed(t, 5, name="we/st")),
    ("not a shard name", lambda t: changed(t, 5, name="wést")),
    ("not a shard name", lambda t: changed(t, 5, name="w" * 64)),
    ("fence of shard west has no valid name", lambda t: changed(t, 5, fence=Fence(1, "xyz"))),
    ("fence of shard west has no valid name", lambda t: changed(t, 5, fence=Fence(1, "ABCDEF01"))),
    ("fence of shard west has no valid name", lambda t: changed(t, 5, fence=Fence(0, "00000000"))),
    ("fence is newer", lambda t: changed(t, 5, fence=Fence(2, "00000000"))),
    ("weight is negative", lambda t: changed(t, 5, weight=-1)),
    ("differ in number", lambda t: replace(t, owners=(3,))),
    ("differ in number", lambda t: replace(t, tokens=(), owners=())),
    ("not the largest position", lambda t: replace(t, tokens=(-1, POSITION_MAX - 1))),
    ("not the largest position", lambda t: replace(t, tokens=(POSITION_MIN - 1, POSITION_MAX))),
    ("not strictly increasing", lambda t: replace(t, tokens=(POSITION_MAX, POSITION_MAX))),
    ("not strictly increasing", lambda t: replace(t, tokens=(5, 4, POSITION_MAX), owners=(3, 5, 3))),
    ("owner is no shard", lambda t: replace(t, owners=(3, 4))),
    ("owned and in transit", lambda t: changed(t, 5, in_transit=ArcSet([Arc(-1, 0)]))),
    ("declared twice", lambda t: replace(t, tables=(USERS, replace(USERS, key="other")))),
]


@pytest.mark.parametrize(("why", "change"), REFUSED)
def test_what_describes_no_ring_is_refused(
    halves: Topology, why: str, change: Callable[[Topology], object]
) -> None:
    with pytest.raises(TopologyInvalid, match=why):
        change(halves)


def test_it_cannot_be_changed(halves: Topology) -> None:
    with pytest.raises(FrozenInstanceError):
        halves.version = 2  # type: ignore[misc]


# --- reading --------------------------------------------------------------------------------------------------------


def test_who_owns_what(halves: Topology) -> None:
    assert halves.owned(3) == LOWER
    assert halves.owned(5) == UPPER
    assert halves.ring.owner_at(-1) == 3
    assert halves.ring.owner_at(0) == 5


def test_shards_and_tables_are_found_by_name(halves: Topology) -> None:
    assert halves.named("west").id == 5
    assert halves.by_id[3].name == "east"
    topology = halves.declared(2, [USERS, POSTS])
    assert topology.by_table["app", "Posts"] is POSTS
    assert str(POSTS) == "app.Posts"


def test_a_name_of_no_shard_is_answered_with_those_there_are(halves: Topology) -> None:
    with pytest.raises(NoSuchShard, match="east, west") as refused:
        halves.named("north")
    assert refused.value.fields == {"name": "north"}


# --- fences ---------------------------------------------------------------------------------------------------------


def test_a_first_topology_names_all_fences_after_itself(halves: Topology) -> None:
    fence = Fence(1, halves.digest[:8])
    assert [shard.fence for shard in halves.shards] == [fence, fence]
    assert fence.relation == f"fence_1_{halves.digest[:8]}"
    assert len(Fence(2**63 - 1, "0" * 8).relation) < 64


def test_a_version_follows_the_one_before(halves: Topology) -> None:
    later = halves.declared(9, [])
    assert later.version == 9
    for version in (9, 8, 0):
        with pytest.raises(TopologyInvalid, match="does not follow 9"):
            later.marked(version, 3, UPPER)


def test_a_move_from_its_mark_to_the_purge(halves: Topology) -> None:
    arcs = ArcSet([Arc(POSITION_MIN, -1000)])
    marked = halves.marked(2, 5, arcs)
    assert [shard.fence.version for shard in marked.shards] == [1, 2]
    assert marked.by_id[5].in_transit == arcs
    assert (marked.tokens, marked.owners) == (halves.tokens, halves.owners)
    moved = marked.cut_over(3, 3, 5, arcs)
    assert [shard.fence.version for shard in moved.shards] == [3, 3]
    assert (moved.tokens, moved.owners) == ((-1000, -1, POSITION_MAX), (5, 3, 5))
    assert moved.by_id[3].in_transit == arcs
    assert not moved.by_id[5].in_transit
    purged = moved.unmarked(4, 3, arcs)
    assert [shard.fence.version for shard in purged.shards] == [4, 3]
    assert not purged.by_id[3].in_transit


def test_a_cutover_joins_arcs_that_now_have_one_owner(halves: Topology) -> None:
    topology = halves.marked(2, 5, LOWER).cut_over(3, 3, 5, LOWER)
    assert (topology.tokens, topology.owners) == ((POSITION_MAX,), (5,))


def test_a_cutover_takes_only_what_the_source_owns_and_the_target_holds(halves: Topology) -> None:
    with pytest.raises(TopologyInvalid, match="does not hold all"):
        halves.cut_over(2, 3, 5, LOWER)
    with pytest.raises(TopologyInvalid, match="does not own all"):
        halves.cut_over(2, 5, 3, LOWER)


def test_which_shards_a_change_concerns(halves: Topology) -> None:
    assert halves.changed_since(None) == (3, 5)
    assert halves.closing_since(None) == ()
    marked = halves.marked(2, 5, LOWER)
    assert marked.changed_since(halves) == (5,)
    assert marked.closing_since(halves) == (5,)
    moved = marked.cut_over(3, 3, 5, LOWER)
    assert moved.changed_since(marked) == (3, 5)
    assert moved.closing_since(marked) == (3,)
    taken = replace(
        marked, owners=(5, 5), shards=(marked.by_id[3], replace(marked.by_id[5], in_transit=ArcSet()))
    )
    assert taken.closing_since(marked) == (3,)
    alone = replace(moved.unmarked(4, 3, LOWER), shards=(moved.by_id[5],))
    assert alone.closing_since(moved) == (3,)


def test_a_shard_joins_with_nothing(halves: Topology) -> None:
    topology = halves.joined(2, shard_id=8, name="north", url="postgresql://db8/app", weight=50)
    assert topology.by_id[8] == Shard(8, "north", "postgresql://db8/app", Fence(2, topology.digest[:8]), 50)
    assert not topology.owned(8)
    assert [shard.fence.version for shard in topology.shards] == [2, 2, 2]


@pytest.mark.parametrize("same", [{"shard_id": 3}, {"name": "east"}])
def test_a_shard_joins_once(halves: Topology, same: dict[str, Any]) -> None:
    newcomer: dict[str, Any] = {"shard_id": 8, "name": "north", "url": "postgresql://db8/app", "weight": 1}
    with pytest.raises(TopologyInvalid, match="share an id or a name"):
        halves.joined(2, **newcomer | same)


def test_weights_change_no_fence(halves: Topology) -> None:
    weighed = halves.reweighted(2, {5: 7})
    assert [(s.weight, s.leaving) for s in weighed.shards] == [(100, False), (7, False)]
    assert weighed.changed_since(halves) == weighed.closing_since(halves) == ()
    assert "leaving" not in json.dumps(weighed.to_json())


def test_a_shard_that_is_to_leave_says_so_and_may_stay_after_all(halves: Topology) -> None:
    wished = halves.reweighted(2, {3: 0}, leaving=[3])
    assert wished.by_id[3].leaving
    assert wished.changed_since(halves) == ()
    assert Topology.from_json(wished.to_json()) == wished
    assert wished.digest != halves.reweighted(2, {3: 0}).digest
    assert not wished.reweighted(3, {3: 50}).by_id[3].leaving
    with pytest.raises(TopologyInvalid, match="east is leaving and has a weight"):
        halves.reweighted(2, {3: 1}, leaving=[3])


def test_a_shard_leaves_when_it_owns_nothing(halves: Topology) -> None:
    with pytest.raises(TopologyInvalid, match="east owns or holds arcs still"):
        halves.left(2, 3)
    moved = halves.marked(2, 5, LOWER).cut_over(3, 3, 5, LOWER)
    with pytest.raises(TopologyInvalid, match="east owns or holds arcs still"):
        moved.left(4, 3)
    before = moved.unmarked(4, 3, LOWER).joined(5, shard_id=9, name="north", url="u", weight=1)
    after = before.left(6, 3)
    assert [shard.name for shard in after.shards] == ["west", "north"]
    assert after.changed_since(before) == (5, 9)
    assert after.closing_since(before) == (3,), "the one that leaves, though it has the lowest number"
    assert {after.fence_on(shard_id) for shard_id in (3, 5, 9)} == {Fence(6, after.digest[:8])}
    assert before.left(6, 9).closing_since(before) == (9,)


def test_pins_change_no_fence(halves: Topology) -> None:
    arc, position = slot_arc(9), Arc(5, 5)
    pinned = halves.pinned(2, arc, 5).pinned(3, position, 3)
    assert pinned.pins == (Pin(arc, 5), Pin(position, 3))
    assert [pin.is_slot for pin in pinned.pins] == [True, False]
    assert pinned.changed_since(halves) == pinned.closing_since(halves) == ()
    assert Topology.from_json(pinned.to_json()) == pinned
    assert pinned.pinned(4, arc, 3).pins == (Pin(arc, 3), Pin(position, 3))
    assert pinned.pin_of(5) == Pin(position, 3)
    assert pinned.pin_of(6) is None
    assert "pins" not in json.dumps(pinned.unpinned(4, arc).unpinned(5, position).to_json())
    with pytest.raises(TopologyInvalid, match="empty list of pins"):
        Topology.from_json(halves.to_json() | {"pins": []})
    refused: list[tuple[Callable[[], Topology], str]] = [
        (lambda: pinned.pinned(4, Arc(arc.first, arc.first), 5), "out of order or in another"),
        (lambda: pinned.pinned(4, Arc(0, 1), 5), "neither a slot nor a position"),
        (lambda: pinned.pinned(4, Arc(7, 7), 8), "to no shard"),
        (lambda: pinned.reweighted(4, {5: 0}, [5]), "to one that is leaving"),
    ]
    for wrong, why in refused:
        with pytest.raises(TopologyInvalid, match=why):
            wrong()


# --- the document ---------------------------------------------------------------------------------------------------

DOCUMENT: dict[str, Any] = {
    "version": 3,
    "shards": [
        {
            "id": 3,
            "name": "east",
            "url": "postgresql://db3/app",
            "weight": 100,
            "fence": [1, "c09def76"],
            "in_transit": [],
        },
        {
            "id": 5,
            "name": "west",
            "url": "postgresql://db5/app",
            "weight": 100,
            "fence": [3, "2bd72163"],
            "in_transit": [[POSITION_MIN, -1]],
        },
    ],
    "tokens": [-1, POSITION_MAX],
    "owners": [3, 5],
    "tables": [["app", "Posts", "user", "text"], ["public", "users", "id", "int"]],
}


def test_the_document_and_the_digests_stay_as_they_are(halves: Topology) -> None:
    """Shards and catalogs hold them: a release that writes others cannot read what an older one left."""
    topology = halves.declared(2, [USERS, POSTS]).marked(3, 5, LOWER)
    assert topology.to_json() == DOCUMENT


def test_a_document_is_read_back(halves: Topology) -> None:
    assert Topology.from_json(DOCUMENT).to_json() == DOCUMENT


def test_replicas_change_no_fence_and_are_kept(halves: Topology) -> None:
    urls = ["postgresql://replica/app", "postgresql://other/app"]
    listed = halves.with_replicas(2, 5, urls)
    assert listed.by_id[5].replicas == tuple(urls)
    assert listed.changed_since(halves) == listed.closing_since(halves) == ()
    assert Topology.from_json(listed.to_json()) == listed
    assert listed.digest != halves.with_replicas(2, 5, urls[:1]).digest
    moved = listed.marked(3, 5, LOWER).cut_over(4, 3, 5, LOWER).declared(5, [USERS])
    assert moved.by_id[5].replicas == tuple(urls)
    assert "replicas" not in json.dumps(listed.with_replicas(3, 5, []).to_json())


@pytest.mark.parametrize("urls", [["postgresql://a/b", "postgresql://a/b"], None])
def test_a_replica_is_listed_once_and_is_not_the_shard(halves: Topology, urls: list[str] | None) -> None:
    with pytest.raises(TopologyInvalid, match="a replica twice, or itself"):
        halves.with_replicas(2, 5, urls or [halves.by_id[5].url])


def test_a_topology_is_pickled_by_value(halves: Topology) -> None:
    halves.ring.owner(1)
    assert pickle.loads(pickle.dumps(halves)) == halves


@pytest.mark.parametrize("name", ["version", "shards", "tokens", "owners", "tables"])
def test_a_document_that_lacks_something_is_refused(name: str) -> None:
    with pytest.raises(TopologyInvalid, match=name):
        Topology.from_json({key: value for key, value in DOCUMENT.items() if key != name})


@pytest.mark.parametrize(
    "damage",
    [
        {"version": "3"},
        {"version": 3.0},
        {"version": True},
        {"tokens": [-1.0, POSITION_MAX]},
        {"tokens": "x"},
        {"owners": {"3": 5}},
        {"shards": [{}]},
        {"shards": None},
        {"shards": [DOCUMENT["shards"][0] | {"url": None}, DOCUMENT["shards"][1]]},
        {"shards": [DOCUMENT["shards"][0] | {"fence": "1a"}, DOCUMENT["shards"][1]]},
        {"tables": [["app", "Posts", "user", "bytes"]]},
        {"tables": [["app", "Posts", "user"]]},
        {"tables": [["app", "Posts", None, "text"]]},
    ],
)
def test_a_document_with_a_value_of_another_kind_is_refused(damage: dict[str, Any]) -> None:
    with pytest.raises(TopologyInvalid, match="no topology document"):
        Topology.from_json(DOCUMENT | damage)


@pytest.mark.parametrize("document", [[], None, "", 3])
def test_what_is_no_document_is_refused(document: Any) -> None:
    with pytest.raises(TopologyInvalid):
        Topology.from_json(document)
