"""From a key to its owner: the ring against others, and against a call that does nothing. Times are CPU time."""

from __future__ import annotations

import platform
import random
import ssl
import time
from array import array
from collections.abc import Callable, Sequence
from functools import partial
from uuid import UUID

import numpy
import pytest

import shardkit
from shardkit.core import _pyring
from shardkit.core.keyrange import SLOTS, slot_arc
from shardkit.core.ring import Key, Ring, positions

from . import peers
from .conftest import Peer, Versus, each

# One thread, and nothing that waits: how busy the machine is shows less in the time of its processor.
pytestmark = pytest.mark.benchmark(timer=time.thread_time)

KEYS = 10_000
BATCH = 1_000_000
NODES, VNODES = 16, 128
PYTHON = f"Python {platform.python_version()}"
MD5 = f"{PYTHON}, {ssl.OPENSSL_VERSION}"
OTHERS = {"a string": peers.of_strings(), "an int": peers.of_ints()}

_random = random.Random(1)
INTS = [_random.randrange(1 << 48) for _ in range(KEYS)]
STRINGS = [f"user:{_random.randrange(10**8):08}" for _ in range(KEYS)]
UUIDS = [UUID(int=_random.getrandbits(128)) for _ in range(KEYS)]
KINDS: dict[str, Sequence[Key]] = {"an int": INTS, "a string": STRINGS, "a UUID": UUIDS}
MANY = array("q", [_random.randrange(1 << 62) for _ in range(BATCH)])


def _hashed(nodes: int, vnodes: int) -> Ring:
    return shardkit.HashRing([f"node {number}" for number in range(nodes)], vnodes).ring


def _slots() -> Ring:
    """What a cluster of 16 shards has: every token is the end of a slot."""
    ends = [slot_arc(slot).last for slot in range(63, SLOTS, 64)]
    return Ring(ends, [number % NODES for number in range(len(ends))])


RINGS: dict[str, Callable[[], Ring]] = {
    "slot ring": _slots,
    "16 x 128 tokens": lambda: _hashed(16, 128),
    "100 x 160 tokens": lambda: _hashed(100, 160),
    "10,000 x 160 tokens": lambda: _hashed(10_000, 160),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", RINGS)
def test_lookup(versus: Versus, name: str, kind: str) -> None:
    empty = {"an empty call, callable(key)": Peer(PYTHON, each(callable, KINDS[kind]))}
    versus(f"owner of {kind}, {name}", each(RINGS[name]().owner, KINDS[kind]), empty, times=KEYS)


@pytest.mark.parametrize("kind", KINDS)
def test_against_others(versus: Versus, kind: str) -> None:
    keys, ring = KINDS[kind], _hashed(NODES, VNODES)
    twin = _pyring.Ring(ring.tokens, ring.owners_by_token)
    found = {"md5 and bisect": (MD5, peers.md5_and_bisect)} | OTHERS.get(kind, {})
    others = {
        name: Peer(version, each(make(NODES, VNODES), keys)) for name, (version, make) in found.items()
    } | {"shardkit's twin in Python": Peer(PYTHON, each(twin.owner, keys))}
    versus(f"owner of {kind}, against others", each(ring.owner, keys), others, times=KEYS)


@pytest.mark.parametrize("name", RINGS)
def test_batch(versus: Versus, name: str) -> None:
    ring = RINGS[name]()
    other = peers.NumpyRing(len(ring.tokens), NODES)
    keys = numpy.frombuffer(MANY, dtype=numpy.int64)
    others = {"numpy, hash and searchsorted": Peer(numpy.__version__, lambda: other.owners(keys))}
    versus(f"owners of a buffer of int64, {name}", lambda: ring.owners(MANY), others, times=BATCH)


def test_hash(versus: Versus) -> None:
    """What a look-up of many costs before it has looked anything up."""
    ring = _slots()
    all_of_it = {"with the look-up, slot ring": Peer(shardkit.__version__, lambda: ring.owners(MANY))}
    versus("positions of a buffer of int64", lambda: positions(MANY), all_of_it, times=BATCH)


@pytest.mark.parametrize("kind", KINDS)
def test_list(versus: Versus, kind: str) -> None:
    ring, keys = _slots(), list(KINDS[kind])
    calls = {"shardkit, a call a key": Peer(shardkit.__version__, lambda: array("H", map(ring.owner, keys)))}
    versus(f"owners of a list, {kind} each", lambda: ring.owners(keys), calls, times=KEYS)


def test_build(versus: Versus) -> None:
    found = {"md5 and bisect": (MD5, peers.md5_and_bisect)} | OTHERS["a string"]
    others = {name: Peer(version, partial(make, 100, 160)) for name, (version, make) in found.items()}
    versus("making a ring of 100 x 160 tokens", lambda: _hashed(100, 160), others)


def test_change(versus: Versus) -> None:
    ring = shardkit.HashRing([f"node {number}" for number in range(100)], 160)
    anew = {"shardkit, the ring anew": Peer(shardkit.__version__, lambda: _hashed(101, 160))}
    versus("one node more in 100 x 160 tokens", lambda: ring.with_node("node 100"), anew)
