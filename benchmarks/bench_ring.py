"""From a key to its owner: the ring against one as it is usually written, and against a call that does nothing."""

from __future__ import annotations

import platform
import random
import ssl
from array import array
from bisect import bisect
from collections.abc import Sequence
from hashlib import md5
from uuid import UUID

import pytest

import shardkit
from shardkit.core import _pyring
from shardkit.core.ring import Key, Ring

from .conftest import Peer, Versus, each

NODES = 16
VNODES = 128
KEYS = 10_000

_random = random.Random(1)
INTS = [_random.randrange(1 << 48) for _ in range(KEYS)]
KINDS: dict[str, Sequence[Key]] = {
    "an int": INTS,
    "a string of 13": [f"user:{_random.randrange(10**8):08}" for _ in range(KEYS)],
    "a UUID": [UUID(int=_random.getrandbits(128)) for _ in range(KEYS)],
}


class Md5Ring:
    """Consistent hashing as one finds it in most applications: md5 of the key as text, bisect in a sorted list."""

    def __init__(self, nodes: int, vnodes: int) -> None:
        placed = sorted(
            (self.place(f"{node}:{vnode}"), node) for node in range(nodes) for vnode in range(vnodes)
        )
        self.places = [place for place, _ in placed]
        self.owners = [node for _, node in placed]

    @staticmethod
    def place(key: Key) -> int:
        return int.from_bytes(md5(str(key).encode()).digest()[:8], "big")

    def owner(self, key: Key) -> int:
        return self.owners[bisect(self.places, self.place(key)) % len(self.owners)]


def _hashed() -> Ring:
    return shardkit.HashRing([f"node {number}" for number in range(NODES)], VNODES).ring


PYTHON = f"Python {platform.python_version()}"


@pytest.mark.parametrize("kind", KINDS)
def test_lookup(versus: Versus, kind: str) -> None:
    keys = KINDS[kind]
    ring = _hashed()
    twin = _pyring.Ring(ring.tokens, ring.owners_by_token)
    peers = {
        "an empty call, callable(key)": Peer(PYTHON, each(callable, keys)),
        "md5 and bisect": Peer(f"{PYTHON}, {ssl.OPENSSL_VERSION}", each(Md5Ring(NODES, VNODES).owner, keys)),
        "shardkit's twin in Python": Peer(PYTHON, each(twin.owner, keys)),
    }
    versus(f"owner of {kind}", each(ring.owner, keys), peers, times=KEYS)


def test_batch(versus: Versus) -> None:
    ring, keys = _hashed(), array("q", INTS)
    peers = {"shardkit, a call a key": Peer(shardkit.__version__, lambda: array("H", map(ring.owner, keys)))}
    versus("owners of 10,000 ints", lambda: ring.owners(keys), peers, times=KEYS)
