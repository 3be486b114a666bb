"""Consistent hashing over named nodes: where vnodes lie, ties, replicas, fail-over, refusals."""

from __future__ import annotations

import pickle
from array import array
from collections import Counter
from typing import Any

import pytest

from shardkit.core.errors import KeyTypeError
from shardkit.core.ring import HashRing, Ring, position

# Two names whose first vnodes fall on one position, found by running the hash backwards.
TWINS = ("3vSyP32XGk", "cache-east")


def test_vnodes_lie_where_the_server_can_compute_them() -> None:
    """hashtextextended('<i>:<name>', 0)."""
    ring = HashRing(["a", "b"], vnodes=2)
    placed = sorted((position(f"{index}:{name}"), name) for name in "ab" for index in range(2))
    assert ring.ring == Ring([place for place, _ in placed], ["ab".index(name) for _, name in placed])


def test_the_encoding_of_node_and_index_is_unambiguous() -> None:
    """'1' + '1:x' and '11' + ':x' and the like never meet."""
    names = ["1", "11", ":", "1:", "0:1", "1:1"]
    ring = HashRing(names, vnodes=12)
    assert len(ring.ring) == len(names) * 12


def test_one_vnode_is_plain_ring_hashing() -> None:
    ring = HashRing(["a", "b", "c"], vnodes=1)
    assert len(ring.ring) == 3
    by_place = sorted((position(f"0:{name}"), name) for name in ring.nodes)
    for key in range(200):
        after = [name for place, name in by_place if place >= position(key)]
        assert ring.get_node(key) == (after or [by_place[0][1]])[0]


def test_the_order_of_nodes_never_matters() -> None:
    assert HashRing(["b", "c", "a"]) == HashRing(["a", "b", "c"])
    assert HashRing(["b", "c", "a"]).ring == HashRing(["c", "b", "a"]).ring


def test_on_one_position_the_smaller_name_owns() -> None:
    place = position(f"0:{TWINS[0]}")
    assert place == position(f"0:{TWINS[1]}")
    for names in (TWINS, TWINS[::-1]):
        ring = HashRing(names, vnodes=1)
        assert ring.ring == Ring([place], [0])
        assert ring.get_node("any") == "3vSyP32XGk"
        assert ring.get_nodes("any", 2) == ["3vSyP32XGk", "cache-east"]
        assert ring.get_nodes("any", 2, down=["3vSyP32XGk"]) == ["cache-east"]
        assert ring.without_node("3vSyP32XGk").get_node("any") == "cache-east"


def test_a_key_has_one_node_by_every_door() -> None:
    ring = HashRing(["a", "b", "c"])
    keys = [*range(100), "x", ""]
    nodes = [ring.get_node(key) for key in keys]
    assert set(nodes) == {"a", "b", "c"}
    assert ring.get_each(keys) == nodes
    assert ring.owners(keys) == array("H", ["abc".index(node) for node in nodes])
    assert [ring.get_nodes(key, 1) for key in keys] == [[node] for node in nodes]


def test_weights_scale_the_share() -> None:
    ring = HashRing(["a", "b", "c"], vnodes=200, weights={"b": 3, "c": 0.001})
    tokens = Counter(ring.nodes[owner] for owner in ring.ring.owners_by_token)
    assert tokens == {"a": 200, "b": 600, "c": 1}
    assert dict(ring.weights) == {"a": 1.0, "b": 3.0, "c": 0.001}


def test_a_node_that_is_down_hands_its_keys_to_the_next_distinct_node() -> None:
    ring = HashRing(["a", "b", "c", "d"], vnodes=8)
    for key in range(300):
        first, second, third = ring.get_nodes(key, 3)
        assert ring.get_nodes(key, 1, down={first}) == [second]
        assert ring.get_nodes(key, 1, down=(second, first)) == [third]
        assert ring.get_nodes(key, 2, down=[second]) == [first, third]


def test_fewer_nodes_than_asked_for() -> None:
    ring = HashRing(["a", "b"], vnodes=4)
    assert sorted(ring.get_nodes("k", 5)) == ["a", "b"]
    assert ring.get_nodes("k", 5, down=["a"]) == ["b"]
    assert ring.get_nodes("k", 5, down=["a", "b"]) == []


def test_a_node_comes_and_goes() -> None:
    ring = HashRing(["a", "b"], vnodes=16, weights={"a": 2})
    grown = ring.with_node("c", weight=0.5)
    assert grown == HashRing(["a", "b", "c"], vnodes=16, weights={"a": 2, "c": 0.5})
    assert grown.without_node("c") == ring
    assert "c" in grown
    assert "c" not in ring
    assert (len(grown), len(ring)) == (3, 2)


def test_a_hash_ring_is_a_value() -> None:
    ring = HashRing(["a", "b"], weights={"a": 2})
    same = HashRing(["b", "a"], weights={"b": 1, "a": 2.0})
    assert ring == same
    assert hash(ring) == hash(same)
    assert pickle.loads(pickle.dumps(ring)) == ring
    assert ring != HashRing(["a", "b"])
    assert ring != HashRing(["a", "b"], vnodes=64, weights={"a": 2})
    assert ring != "ab"
    assert repr(ring) == "<HashRing of 2 nodes, 384 vnodes>"
    with pytest.raises(AttributeError):
        ring.nodes = ("a",)  # type: ignore[misc]
    with pytest.raises(TypeError):
        ring.weights["a"] = 5  # type: ignore[index]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"nodes": []}, "from 1 to 65,536"),
        ({"nodes": "abc"}, "not one"),
        ({"nodes": ["a", ""]}, "not empty"),
        ({"nodes": ["a", 1]}, "is a str"),
        ({"nodes": ["a", "b", "a"]}, "named twice: 'a'"),
        ({"nodes": ["a"], "vnodes": 0}, "1 or more"),
        ({"nodes": ["a"], "vnodes": 1.5}, "1 or more"),
        ({"nodes": ["a"], "vnodes": True}, "1 or more"),
        ({"nodes": ["a"], "weights": {"b": 1}}, "no node of the ring: 'b'"),
        ({"nodes": ["a"], "weights": {"a": 0}}, "positive"),
        ({"nodes": ["a"], "weights": {"a": float("nan")}}, "positive"),
        ({"nodes": ["a"], "weights": {"a": float("inf")}}, "positive"),
    ],
)
def test_no_hash_ring(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HashRing(**arguments)


def test_what_is_refused_of_a_ring() -> None:
    ring = HashRing(["a", "b"])
    with pytest.raises(ValueError, match="no node of this ring: 'c'"):
        ring.without_node("c")
    with pytest.raises(ValueError, match="on the ring already: 'a'"):
        ring.with_node("a")
    with pytest.raises(ValueError, match="from 1 to 65,536"):
        ring.without_node("a").without_node("b")
    with pytest.raises(ValueError, match="no node of this ring: 'z'"):
        ring.get_nodes("k", 1, down=["z"])
    with pytest.raises(ValueError, match="not one name"):
        ring.get_nodes("k", 1, down="a")
    for count in (0, -1, True, 1.0):
        with pytest.raises(ValueError, match="1 or more"):
            ring.get_nodes("k", count)  # type: ignore[arg-type]
    for call in (ring.get_node, lambda key: ring.get_nodes(key, 1), lambda key: ring.get_each([key])):
        with pytest.raises(KeyTypeError):
            call(None)  # type: ignore[arg-type]
