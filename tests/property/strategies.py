"""Invented arcs, weights and topologies."""

from __future__ import annotations

from hypothesis import strategies as st

from shardkit.core.keyrange import POSITION_MAX, POSITION_MIN, SLOTS, Arc, ArcSet, slot_arc
from shardkit.core.topology import ShardedTable, Topology

EDGES = [POSITION_MIN, POSITION_MIN + 1, -1, 0, 1, POSITION_MAX - 1, POSITION_MAX]

positions = st.sampled_from(EDGES) | st.integers(-20, 20) | st.integers(POSITION_MIN, POSITION_MAX)


@st.composite
def arcs(draw: st.DrawFn) -> Arc:
    first, last = sorted((draw(positions), draw(positions)))
    return Arc(first, last)


arc_sets = st.lists(arcs(), max_size=8).map(ArcSet)

weights = st.integers(0, 5) | st.integers(0, 10**6)


def some_weights(ids: list[int]) -> st.SearchStrategy[dict[int, int]]:
    """A weight for each id, at least one of them above 0."""
    return (
        st.lists(weights, min_size=len(ids), max_size=len(ids))
        .filter(any)
        .map(lambda w: dict(zip(ids, w, strict=True)))
    )


shard_ids = st.lists(st.integers(0, 12) | st.integers(0, 65535), min_size=1, max_size=6, unique=True)


def topology_of(tokens: tuple[int, ...], owners: tuple[int, ...], weights_by_id: dict[int, int]) -> Topology:
    """Version 1 of these tokens, with invented names and URLs."""
    shards = [(i, f"shard-{i}", f"postgresql://db{i}/app", weight) for i, weight in weights_by_id.items()]
    return Topology.first(1, shards, tokens, owners)


@st.composite
def slot_topologies(draw: st.DrawFn) -> Topology:
    """Any ownership of whole slots, uneven and in pieces; neighbouring arcs may have one owner."""
    ids = draw(shard_ids)
    cuts = draw(st.sets(st.integers(1, 40) | st.integers(1, SLOTS - 1), max_size=24))
    tokens = tuple(slot_arc(0, end).last for end in (*sorted(cuts), SLOTS))
    owners = draw(st.lists(st.sampled_from(ids), min_size=len(tokens), max_size=len(tokens)))
    return topology_of(tokens, tuple(owners), dict.fromkeys(ids, 1))


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    """Any tokens, tables, and arcs in transit."""
    ids = draw(shard_ids)
    tokens = tuple(sorted({*draw(st.sets(positions, max_size=12)), POSITION_MAX}))
    owners = draw(st.lists(st.sampled_from(ids), min_size=len(tokens), max_size=len(tokens)))
    topology = topology_of(tokens, tuple(owners), draw(some_weights(ids)))
    if draw(st.booleans()):
        topology = topology.declared(topology.version + draw(st.integers(1, 3)), draw(tables))
    for shard_id in draw(st.lists(st.sampled_from(ids), max_size=2)):
        arriving = draw(arc_sets) - topology.owned(shard_id)
        topology = topology.marked(topology.version + draw(st.integers(1, 3)), shard_id, arriving)
    leaving = draw(st.lists(st.sampled_from(ids), max_size=1))
    if leaving:
        topology = topology.reweighted(topology.version + 1, dict.fromkeys(leaving, 0), leaving)
    return draw(pins_on(topology)) if draw(st.booleans()) else topology


@st.composite
def pins_on(draw: st.DrawFn, topology: Topology) -> Topology:
    """The topology with some arcs pinned: slots near each other, and single positions at their ends and inside."""
    ids = [shard.id for shard in topology.shards if not shard.leaving]
    slots = st.sampled_from([0, 1, SLOTS - 1]) | st.integers(0, 40) | st.integers(0, SLOTS - 1)
    chosen = draw(st.sets(slots, max_size=6)) if ids else set()
    for slot in sorted(chosen):
        whole = slot_arc(slot)
        inside = st.sampled_from([whole.first, whole.first + 1, whole.last]) | st.integers(*whole)
        arcs = [whole]
        if draw(st.booleans()):
            arcs = [Arc(at, at) for at in draw(st.sets(inside, min_size=1, max_size=3))]
        for arc in arcs:
            topology = topology.pinned(topology.version + 1, arc, draw(st.sampled_from(ids)))
    return topology


@st.composite
def with_pins(draw: st.DrawFn, aligned: bool = False) -> Topology:
    """A topology with pins, reached or not, and with tokens anywhere unless they are to be ``aligned``."""
    made = draw(slot_topologies())
    if not aligned and draw(st.booleans()):
        ids = [shard.id for shard in made.shards]
        tokens = tuple(sorted({*draw(st.sets(positions, max_size=12)), POSITION_MAX}))
        owners = draw(st.lists(st.sampled_from(ids), min_size=len(tokens), max_size=len(tokens)))
        made = topology_of(tokens, tuple(owners), dict.fromkeys(ids, 1))
    return draw(pins_on(made))


names = st.sampled_from(["users", "Posts", "order", 'a"b', "prüfung", "日本"]) | st.text(
    min_size=1, max_size=8
)

tables = st.lists(
    st.builds(ShardedTable, names, names, names, st.sampled_from(["int", "text", "uuid"])),
    max_size=4,
    unique_by=lambda table: (table.schema, table.name),
)
