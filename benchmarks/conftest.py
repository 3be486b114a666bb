"""What every benchmark gets: the tests' servers, and `versus`, which measures shardkit and its peers in turns."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple, Protocol

import pytest

import shardkit
from shardkit.core.ring import IMPLEMENTATION

pytest_plugins = ["tests.fix_postgres"]

SECONDS = 2.0
"""About so long each comparison runs."""
ROUNDS = range(10, 2000)

Run = Callable[[], object]


class Peer(NamedTuple):
    """What shardkit is compared with: its version, and the same work done by it."""

    version: str
    run: Run


class Versus(Protocol):
    def __call__(self, what: str, run: Run, peers: Mapping[str, Peer], *, times: int = 1) -> None: ...


@pytest.fixture
def versus(benchmark: Any, request: pytest.FixtureRequest) -> Versus:
    """`versus(what, run, peers, times=1)`: each does its work `times` times a call.

    They take turns, a call each, so that whatever else the machine does meets all of them alike. The clock is the one
    that the marker ``benchmark`` names.
    """
    marker = request.node.get_closest_marker("benchmark")
    clock: Callable[[], float] = marker.kwargs.get("timer", perf_counter) if marker else perf_counter

    def timed(run: Run) -> float:
        began = clock()
        run()
        return clock() - began

    def warm(run: Run) -> None:
        """What takes nanoseconds is timed as a loop of it would find the processor's caches, not as the one before left
        them."""
        if marker is not None:
            run()

    def measure(what: str, run: Run, peers: Mapping[str, Peer], *, times: int = 1) -> None:
        took: dict[str, list[float]] = {who: [] for who in peers}

        def peers_first() -> None:
            for who, peer in peers.items():
                warm(peer.run)
                took[who].append(timed(peer.run))
            warm(run)

        one_round = [timed(run) + sum(timed(peer.run) for peer in peers.values()) for _ in range(3)]
        rounds = max(ROUNDS.start, min(ROUNDS.stop, int(SECONDS / min(one_round))))
        benchmark.pedantic(run, setup=peers_first, rounds=rounds, iterations=1)
        ours = benchmark.stats.stats.data
        benchmark.extra_info.update(
            what=what,
            times=times,
            version=f"{shardkit.__version__} {IMPLEMENTATION}",
            peers={
                who: {
                    "version": peers[who].version,
                    "median": median(all_),
                    "min": min(all_),
                    "ratio": median(mine / theirs for mine, theirs in zip(ours, all_, strict=True)),
                }
                for who, all_ in took.items()
            },
        )

    return measure


def each(function: Callable[[Any], object], keys: Iterable[Any]) -> Run:
    """Calls `function` with each key, in C: the loop costs the same few nanoseconds whatever is called."""
    return lambda: deque(map(function, keys), maxlen=0)
