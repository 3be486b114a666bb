"""The bars that speed has to reach, each against a peer of the same run, or as a rate."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

FLOOR = "an empty call, callable(key)"
NUMPY = "numpy, hash and searchsorted"
SLOT_RING, RING_2K, RING_16K = "slot ring", "16 x 128 tokens", "100 x 160 tokens"
ONE_SHARD = (
    "session.get",
    "the last 5 posts of a user",
    "a user and its posts, loaded lazily",
    "insert and commit",
    "get, update and commit",
    "session.get of an object that is known",
)
SCATTERED = ("the first 20 of all rows", "count of all rows", "counts by group")
ASYNC = ("get, asyncio", "insert and commit, asyncio", "10,000 rows in one INSERT")


@dataclass(frozen=True, slots=True)
class Bar:
    """What is measured, beside whom, and what has to come of it: one of the limits."""

    what: str
    peer: str
    above_ns: float | None = None
    """At most so many nanoseconds more than the peer."""
    times: float | None = None
    """At least so many times as fast as the peer."""
    ratio: float | None = None
    """At most so many times the peer's time."""
    per_second: float | None = None
    """At least so many in a second; the peer does not matter."""

    def shown(self) -> str:
        """What is wanted."""
        if self.above_ns is not None:
            return f"at most {self.above_ns:g} ns above {self.peer}"
        if self.times is not None:
            return f"at least {self.times:g} times as fast as {self.peer}"
        if self.ratio is not None:
            return f"at most {self.ratio:g} times {self.peer}"
        return f"at least {_million(self.per_second or 0)} a second"

    def found(self, row: Mapping[str, Any]) -> tuple[bool, str]:
        """Whether a row of `run.ratios` reaches it, and what it has."""
        ours, theirs = row["fastest"], row["peer_fastest"]
        if self.above_ns is not None:
            above = (ours - theirs) * 1e9
            return above <= self.above_ns, f"{above:.1f} ns"
        if self.times is not None:
            return theirs / ours >= self.times, f"{theirs / ours:.1f} times"
        if self.ratio is not None:
            return row["ratio"] <= self.ratio, f"{row['ratio']:.3f} times"
        rate = 1 / ours
        return rate >= (self.per_second or 0), f"{_million(rate)} a second"


def _million(number: float) -> str:
    return f"{number / 1e6:.3g} million"


BARS = (
    *(
        Bar(f"owner of {kind}, {ring}", FLOOR, above_ns=limit)
        for kind, limit in (("an int", 18.0), ("a string", 25.0), ("a UUID", 60.0))
        for ring in (SLOT_RING, RING_2K, RING_16K)
    ),
    Bar("owner of a string, against others", "uhashring", times=30),
    Bar("owner of a string, against others", "fastring (Rust)", times=3),
    Bar(f"owners of a buffer of int64, {SLOT_RING}", NUMPY, per_second=300e6),
    Bar(f"owners of a buffer of int64, {SLOT_RING}", NUMPY, times=25),
    *(Bar(f"owners of a buffer of int64, {ring}", NUMPY, per_second=120e6) for ring in (RING_2K, RING_16K)),
    Bar("owners of a list, an int each", "shardkit, a call a key", per_second=40e6),
    Bar("owners of a list, a string each", "shardkit, a call a key", per_second=30e6),
    *(Bar(what, "plain SQLAlchemy", ratio=1.05) for what in (*ONE_SHARD, *ASYNC)),
    *(Bar(what, "horizontal_shard", ratio=1.0) for what in ONE_SHARD),
    Bar("the route of a select by key", "its SQL, from SQLAlchemy's cache", per_second=200e3),
    *(
        Bar(f"{what}, 4 shards", peer, ratio=1.2)
        for what in SCATTERED
        for peer in ("the slowest shard alone", "the 4 shards at once, bare")
    ),
)


def checked(rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each bar whose peer was measured: what is wanted, what was found, whether it is reached."""
    by_name = {(row["what"], row["peer"]): row for row in rows}
    for bar in BARS:
        row = by_name.get((bar.what, bar.peer))
        if row is not None:
            reached, found = bar.found(row)
            yield {"what": bar.what, "wanted": bar.shown(), "found": found, "reached": reached}


def trips(rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The same of round trips: not more than plain SQLAlchemy makes."""
    for row in rows:
        ours, plain = row["trips"]["shardkit"], row["trips"]["plain SQLAlchemy"]
        yield {
            "what": f"round trips: {row['what']}",
            "wanted": f"at most {plain:g}",
            "found": f"{ours:g}",
            "reached": ours <= plain,
        }
