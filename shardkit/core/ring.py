"""The ring: from a key to a position, from a position to its owner.

Re-exports one of two implementations of the same interface: the native core `shardkit._ring`, or where that is
not built its pure-Python twin. The environment variable ``SHARDKIT_RING`` (``cython`` or ``python``) forces one,
and a forced one that cannot be imported is an error. `HashRing`, consistent hashing over named nodes without any
stored state, is built on either. Nothing here knows shards, topologies or servers.
"""

from __future__ import annotations

import math
import os
from bisect import bisect_left
from itertools import groupby
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, final

from ._ringargs import Key

if TYPE_CHECKING:
    from array import array
    from collections.abc import Collection, Iterable, Mapping

    from ._pyring import Ring, position, positions

    IMPLEMENTATION: str
else:
    _forced = os.environ.get("SHARDKIT_RING", "")
    if _forced not in ("", "cython", "python"):
        raise ImportError(f"SHARDKIT_RING is {_forced!r}; it can be 'cython', 'python' or unset")
    try:
        if _forced == "python":
            raise ImportError("the twin is forced")
        from shardkit._ring import Ring, position, positions

        IMPLEMENTATION = "cython"
    except ImportError as error:
        if _forced == "cython":
            raise ImportError(
                f"SHARDKIT_RING=cython, but the native core cannot be imported ({error}): "
                "install shardkit again where there is a C compiler, or unset SHARDKIT_RING"
            ) from error
        from ._pyring import Ring, position, positions

        IMPLEMENTATION = "python"

__all__ = ["IMPLEMENTATION", "HashRing", "Key", "Ring", "position", "positions"]


@final
class HashRing:
    """Consistent hashing: a key belongs to the node whose vnode comes first at or after the key's position.

    Each node has ``vnodes`` tokens, times its weight (1 if it has none, and at least one token); ``vnodes=1`` is
    plain ring hashing. Vnode ``i`` of a node lies at the position of the text ``"<i>:<name>"``, so the ring is a
    function of names, vnodes and weights alone: the order of the nodes never matters. Where two vnodes fall on one
    position, the smaller name (by code points) owns it.

    Immutable; equal, hashed and pickled by value; safe to share between threads.
    """

    __slots__ = ("_nodes", "_places", "_ring", "_vnodes", "_walk", "_weights")

    def __init__(
        self, nodes: Iterable[str], vnodes: int = 128, weights: Mapping[str, float] | None = None
    ) -> None:
        self._nodes = _checked_nodes(nodes)
        if type(vnodes) is not int or vnodes < 1:
            raise ValueError(f"vnodes is a number of tokens a node, 1 or more: {vnodes!r}")
        self._vnodes = vnodes
        self._weights = _checked_weights(self._nodes, weights or {})
        placed = self._placed()
        self._places = [place for place, _ in placed]
        self._walk = [node for _, node in placed]
        first = [next(group) for _, group in groupby(placed, key=lambda vnode: vnode[0])]
        self._ring = Ring([place for place, _ in first], [node for _, node in first])

    def _placed(self) -> list[tuple[int, int]]:
        """(position, index of the node) of every vnode, clockwise; the smaller name first on equal positions."""
        labels: list[str] = []
        numbers: list[int] = []
        for number, node in enumerate(self._nodes):
            count = max(1, math.floor(self._vnodes * self._weights[node] + 0.5))
            labels.extend(f"{index}:{node}" for index in range(count))
            numbers.extend([number] * count)
        return sorted(zip(positions(labels), numbers, strict=True))

    @property
    def nodes(self) -> tuple[str, ...]:
        """The names of the nodes, sorted."""
        return self._nodes

    @property
    def vnodes(self) -> int:
        """Tokens of a node of weight 1."""
        return self._vnodes

    @property
    def weights(self) -> Mapping[str, float]:
        """The weight of every node."""
        return MappingProxyType(self._weights)

    @property
    def ring(self) -> Ring:
        """The ring below; its owners are indexes into `nodes`."""
        return self._ring

    def get_node(self, key: Key) -> str:
        """The node of a key; `KeyTypeError` for what cannot be a key."""
        return self._nodes[self._ring.owner(key)]

    def get_each(self, keys: Iterable[Key]) -> list[str]:
        """The node of each of many keys (a buffer of int64, or an iterable of keys), in their order."""
        return [self._nodes[number] for number in self._ring.owners(keys)]

    def owners(self, keys: Iterable[Key]) -> array[int]:
        """As `get_each`, but indexes into `nodes`, as an array of uint16."""
        return self._ring.owners(keys)

    def get_nodes(self, key: Key, n: int, down: Collection[str] = ()) -> list[str]:
        """The first ``n`` distinct nodes clockwise from a key, its own first: where replicas go.

        A node named in ``down`` is passed over, so its keys go to the next distinct node, exactly as if it were not
        on the ring. Fewer than ``n`` are returned where no more are up. ValueError for a name that is no node.
        """
        if type(n) is not int or n < 1:
            raise ValueError(f"n is a number of nodes, 1 or more: {n!r}")
        passed = {self._number(name) for name in self._listed_down(down)}
        wanted = min(n, len(self._nodes) - len(passed))
        found: list[str] = []
        start = bisect_left(self._places, position(key))
        for step in range(len(self._walk)):
            if len(found) == wanted:
                break
            number = self._walk[(start + step) % len(self._walk)]
            if number not in passed:
                passed.add(number)
                found.append(self._nodes[number])
        return found

    @staticmethod
    def _listed_down(down: Collection[str]) -> Collection[str]:
        if isinstance(down, str):
            raise ValueError(f"down is a collection of names, not one name: {down!r}")
        return down

    def _number(self, name: str) -> int:
        number = bisect_left(self._nodes, name)
        if self._nodes[number : number + 1] != (name,):
            raise ValueError(f"no node of this ring: {name!r}")
        return number

    def with_node(self, node: str, weight: float = 1.0) -> HashRing:
        """This ring and one node more; only keys that go to the new node change theirs."""
        if node in self:
            raise ValueError(f"a node of this name is on the ring already: {node!r}")
        return HashRing((*self._nodes, node), self._vnodes, {**self._weights, node: weight})

    def without_node(self, node: str) -> HashRing:
        """This ring without one of its nodes; only keys of that node change theirs."""
        number = self._number(node)
        nodes = self._nodes[:number] + self._nodes[number + 1 :]
        return HashRing(nodes, self._vnodes, {name: self._weights[name] for name in nodes})

    def __contains__(self, node: object) -> bool:
        return node in self._weights

    def __len__(self) -> int:
        return len(self._nodes)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, HashRing):
            return NotImplemented
        return self._vnodes == other._vnodes and self._weights == other._weights

    def __hash__(self) -> int:
        return hash((self._vnodes, tuple(self._weights.items())))

    def __repr__(self) -> str:
        return f"<HashRing of {len(self._nodes)} nodes, {len(self._places)} vnodes>"

    def __reduce__(self) -> tuple[Any, ...]:
        return (HashRing, (self._nodes, self._vnodes, self._weights))


def _checked_nodes(nodes: Iterable[str]) -> tuple[str, ...]:
    if isinstance(nodes, str):
        raise ValueError(f"nodes are many names, not one: {nodes!r}")
    names = list(nodes)
    if bad := [name for name in names if type(name) is not str or not name]:
        raise ValueError(f"the name of a node is a str that is not empty: {bad[0]!r}")
    if not 1 <= len(names) <= 1 << 16:
        raise ValueError(f"a ring has from 1 to 65,536 nodes, not {len(names)}")
    ordered = tuple(sorted(names))
    if twice := [name for name, same in groupby(ordered) if len(list(same)) > 1]:
        raise ValueError(f"a node is named twice: {twice[0]!r}")
    return ordered


def _checked_weights(nodes: tuple[str, ...], weights: Mapping[str, float]) -> dict[str, float]:
    if unknown := sorted(set(weights) - set(nodes)):
        raise ValueError(f"a weight is given for what is no node of the ring: {unknown[0]!r}")
    for name, weight in weights.items():
        if not 0 < weight < math.inf:
            raise ValueError(f"the weight of node {name!r} is not a positive number: {weight!r}")
    return {name: float(weights.get(name, 1.0)) for name in nodes}
