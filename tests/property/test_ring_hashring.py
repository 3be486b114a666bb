"""Consistent hashing: a function of its members, and no change moves more than it must."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shardkit.core.ring import HashRing, Key

# Two of the names share the position of their first vnode.
names = st.sampled_from(["3vSyP32XGk", "cache-east"]) | st.text(min_size=1, max_size=5)
counts = st.integers(1, 12)
batches = st.lists(
    st.integers(-(2**63), 2**63 - 1) | st.text(max_size=12) | st.uuids(), min_size=1, max_size=40
)


@st.composite
def hash_rings(draw: st.DrawFn, fewest: int = 1) -> HashRing:
    nodes = draw(st.lists(names, min_size=fewest, max_size=7, unique=True))
    some = draw(st.lists(st.sampled_from(nodes), unique=True))
    weights = {node: draw(st.sampled_from([0.01, 0.5, 1, 1.5, 3])) for node in some}
    return HashRing(nodes, draw(counts), weights)


@given(hash_rings(), st.randoms(use_true_random=False))
def test_the_order_of_nodes_never_matters(ring: HashRing, random: object) -> None:
    shuffled = list(ring.nodes)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    other = HashRing(shuffled, ring.vnodes, dict(reversed(list(ring.weights.items()))))
    assert other == ring
    assert other.ring == ring.ring


@given(hash_rings(), names, batches)
def test_a_new_node_takes_keys_from_all_and_nothing_else_moves(
    ring: HashRing, name: str, batch: list[Key]
) -> None:
    if name in ring:
        ring = ring.without_node(name) if len(ring) > 1 else HashRing([name + "+"], ring.vnodes)
    grown = ring.with_node(name, 2.0)
    for before, after in zip(ring.get_each(batch), grown.get_each(batch), strict=True):
        assert after in (before, name)
    assert grown.without_node(name) == ring


@given(hash_rings(fewest=2), batches)
def test_only_the_keys_of_a_node_that_leaves_move(ring: HashRing, batch: list[Key]) -> None:
    for gone in ring.nodes:
        left = ring.without_node(gone)
        for before, after in zip(ring.get_each(batch), left.get_each(batch), strict=True):
            assert after == before or before == gone


@given(hash_rings(), batches)
def test_a_heavier_node_only_gains(ring: HashRing, batch: list[Key]) -> None:
    heavy = ring.nodes[0]
    heavier = HashRing(ring.nodes, ring.vnodes, {**ring.weights, heavy: ring.weights[heavy] * 2})
    for before, after in zip(ring.get_each(batch), heavier.get_each(batch), strict=True):
        assert after in (before, heavy)


@given(hash_rings(), batches, st.integers(1, 8))
def test_successors_are_distinct_and_begin_with_the_owner(ring: HashRing, batch: list[Key], n: int) -> None:
    for key in batch:
        found = ring.get_nodes(key, n)
        assert len(found) == len(set(found)) == min(n, len(ring))
        assert found[0] == ring.get_node(key)
        assert ring.get_nodes(key, n + 1)[:n] == found


@given(hash_rings(fewest=2), batches, st.integers(1, 8), st.data())
def test_a_node_that_is_down_is_passed_over_as_if_it_had_left(
    ring: HashRing, batch: list[Key], n: int, data: st.DataObject
) -> None:
    down = data.draw(st.lists(st.sampled_from(ring.nodes), max_size=len(ring) - 1, unique=True))
    left = ring
    for node in down:
        left = left.without_node(node)
    for key in batch:
        assert ring.get_nodes(key, n, down=down) == left.get_nodes(key, n)
