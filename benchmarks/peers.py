"""Other rings, as their users call them. Each is there if it is installed; a run says which were.

A *maker* takes the number of nodes and of points a node, and returns what looks the owner of a key up.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable
from functools import partial
from hashlib import md5
from importlib import import_module
from importlib.metadata import version
from tempfile import NamedTemporaryFile
from typing import Any

import numpy

from shardkit.core.ring import Key

Lookup = Callable[[Any], object]
Maker = Callable[[int, int], Lookup]


def md5_and_bisect(nodes: int, vnodes: int) -> Lookup:
    """Consistent hashing as one finds it in most applications: md5 of the key as text, bisect in a sorted list."""

    def place(key: Key) -> int:
        return int.from_bytes(md5(str(key).encode()).digest()[:8], "big")

    placed = sorted((place(f"{node}:{vnode}"), node) for node in range(nodes) for vnode in range(vnodes))
    places, owners = [place for place, _ in placed], [node for _, node in placed]
    return lambda key: owners[bisect(places, place(key)) % len(owners)]


def _uhashring(nodes: int, vnodes: int) -> Any:
    names = [f"node {number}" for number in range(nodes)]
    return import_module("uhashring").HashRing(nodes=names, vnodes=vnodes).get_node


def _fastring(nodes: int, vnodes: int) -> Any:
    ring = import_module("fastring").HashRing(virtual_nodes=vnodes)
    for number in range(nodes):
        ring.add_node(f"node {number}")
    return ring.get_node


def _ketama(nodes: int, vnodes: int) -> Any:
    # It has a number of points of its own, 160 a node, and reads its nodes from a file.
    with NamedTemporaryFile("w", suffix=".servers") as listed:
        listed.writelines(f"10.0.{number >> 8}.{number & 255}:11211\t100\n" for number in range(nodes))
        listed.flush()
        return import_module("ketama").Ketama(listed.name).get_server


def _jump(nodes: int, vnodes: int) -> Any:
    # No ring: nodes can come and go at the end of the list alone.
    return partial(_call, import_module("jump").hash, nodes)


def _call(function: Callable[[Any, int], object], nodes: int, key: Any) -> object:
    return function(key, nodes)


_OF_STRINGS: dict[str, tuple[str, str, Maker]] = {
    "uhashring": ("uhashring", "uhashring", _uhashring),
    "fastring (Rust)": ("fastring", "fastring", _fastring),
    "ketama (C)": ("ketama", "ketama", _ketama),
}
_OF_INTS: dict[str, tuple[str, str, Maker]] = {
    "jump-consistent-hash (C)": ("jump", "jump-consistent-hash", _jump)
}


def of_strings() -> dict[str, tuple[str, Maker]]:
    """Version and maker of what looks strings up and is installed."""
    return _installed(_OF_STRINGS)


def of_ints() -> dict[str, tuple[str, Maker]]:
    """Version and maker of what looks ints up and is installed."""
    return _installed(_OF_INTS)


def _installed(known: dict[str, tuple[str, str, Maker]]) -> dict[str, tuple[str, Maker]]:
    return {
        name: (version(package), make)
        for name, (module, package, make) in known.items()
        if is_there(module)
    }


def is_there(module: str) -> bool:
    """Whether it is installed, and for this version of Python."""
    try:
        import_module(module)
    except ImportError:
        return False
    return True


class NumpyRing:
    """Batches as one writes them with numpy: a mixing function over the whole array, then ``searchsorted``."""

    def __init__(self, tokens: int, nodes: int) -> None:
        self._tokens = numpy.sort(numpy.random.default_rng(1).integers(0, 2**64, tokens, dtype=numpy.uint64))
        self._owners = numpy.arange(tokens, dtype=numpy.uint16) % numpy.uint16(nodes)

    def owners(self, keys: Any) -> Any:
        """Numbers of the owners of an array of int64."""
        hashed = keys.view(numpy.uint64) * numpy.uint64(0x9E3779B97F4A7C15)
        hashed ^= hashed >> numpy.uint64(32)
        return self._owners[numpy.searchsorted(self._tokens, hashed) % len(self._tokens)]
