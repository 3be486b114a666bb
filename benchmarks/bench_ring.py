"""From a key to its owner: the ring against one as it is usually written, and against a call that does nothing."""

from __future__ import annotations

import platform
import random
import ssl
from array import array
from bisect import bisect
from collections.abc import Callable, Sequence
from hashlib import md5
from uuid import UUID

import pytest

import shardkit
from shardkit.core import _pyring
from shardkit.core.ring import IMPLEMENTATION, Key, Ring

from .conftest import Versus, each

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
LOOKUPS: dict[str, tuple[str, Callable[[], Callable[[Key], object]]]] = {
    "shardkit": (f"{shardkit.__version__} {IMPLEMENTATION}", lambda: _hashed().owner),
    "shardkit's twin in Python": (
        PYTHON,
        lambda: _pyring.Ring(_hashed().tokens, _hashed().owners_by_token).owner,
    ),
    "md5 and bisect": (f"{PYTHON}, {ssl.OPENSSL_VERSION}", lambda: Md5Ring(NODES, VNODES).owner),
    "an empty call: callable(key)": (PYTHON, lambda: callable),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("who", LOOKUPS)
def test_lookup(versus: Versus, kind: str, who: str) -> None:
    version, make = LOOKUPS[who]
    versus(f"owner of {kind}", who, version, each(make(), KINDS[kind]), times=KEYS)


def test_batch_of_a_ring(versus: Versus) -> None:
    ring, keys = _hashed(), array("q", INTS)
    versus("owners of 10,000 ints", "shardkit", LOOKUPS["shardkit"][0], lambda: ring.owners(keys), times=KEYS)


def test_batch_one_by_one(versus: Versus) -> None:
    ring, keys = _hashed(), array("q", INTS)
    versus(
        "owners of 10,000 ints",
        "shardkit, a call a key",
        LOOKUPS["shardkit"][0],
        lambda: array("H", map(ring.owner, keys)),
        times=KEYS,
    )
