"""Balance, and how much moves: rings and other ways to spread keys, before and after a node comes, goes or gets another
weight.

The same keys are placed by each. What is told does not depend on the machine: the load of the fullest node, as a
multiple of its share, and the keys that change their node, as a multiple of the fewest that must. Printed, written to
``benchmarks/results/``, and put into a document by ``--docs docs/benchmarks.md``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from tempfile import NamedTemporaryFile

import shardkit
from shardkit.core.placement import initial, plan
from shardkit.core.ring import Ring, position
from shardkit.core.topology import Fence, Shard, Topology

from . import documents, peers

RESULTS = Path(__file__).parent / "results"
COMMAND = "python -m benchmarks.balance --docs"
KEYS = 500_000

Weights = Mapping[str, int]
Place = Callable[[Sequence[str]], Sequence[str]]
"""From keys to the name of the node of each."""
Scheme = Callable[[], Callable[[Weights], Place]]
"""Makes what makes a placement of weights; what it makes may go on from the placement before."""


@dataclass(frozen=True, slots=True)
class Row:
    """A scheme in one change. ``max_over_mean`` is the load of the fullest node over its share, after the change;
    ``moved`` and ``fewest`` are fractions of the keys."""

    scheme: str
    change: str
    max_over_mean: float
    moved: float
    fewest: float


def _even(nodes: int) -> dict[str, int]:
    return {f"node {number}": 1 for number in range(nodes)}


def _without(weights: Weights, name: str) -> dict[str, int]:
    return {node: weight for node, weight in weights.items() if node != name}


CHANGES: dict[str, tuple[Weights, Weights]] = {
    "a node joins 10": (_even(10), _even(11)),
    "one of 10 leaves": (_even(10), _without(_even(10), "node 4")),
    "one of 10 gets twice the weight": (_even(10), {**_even(10), "node 4": 2}),
    "a node joins 100": (_even(100), _even(101)),
}


class SlotRing:
    """What a cluster does: the planner changes as few slots of the placement in force as it can."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}
        self._topology: Topology | None = None

    def __call__(self, weights: Weights) -> Place:
        for name in weights:
            self._ids.setdefault(name, len(self._ids))
        # A shard that leaves is drained first.
        wanted = {number: 100 * weights.get(name, 0) for name, number in self._ids.items()}
        if self._topology is None:
            tokens, owners = initial(wanted)
        else:
            placement = plan(self._with(wanted, self._topology.tokens, self._topology.owners), wanted)
            tokens, owners = placement.tokens, placement.owners
        self._topology = self._with(wanted, tokens, owners)
        ring, names = Ring(tokens, owners), list(self._ids)
        return lambda keys: [names[owner] for owner in ring.owners(keys)]

    def _with(self, weights: Mapping[int, int], tokens: Sequence[int], owners: Sequence[int]) -> Topology:
        fence = Fence(1, "0123abcd")
        shards = tuple(
            Shard(number, f"s{number}", f"postgresql://s{number}", fence, weight)
            for number, weight in weights.items()
        )
        return Topology(1, shards, tuple(tokens), tuple(owners))


def _hash_ring(vnodes: int) -> Scheme:
    def place(weights: Weights) -> Place:
        return shardkit.HashRing(weights, vnodes, weights).get_each

    return partial(_always, place)


def _slots(weights: Weights) -> list[str]:
    """Each node as often as its weight says, for what knows no weights."""
    return [name for name, weight in weights.items() for _ in range(weight)]


def _modulo(weights: Weights) -> Place:
    nodes = _slots(weights)
    return lambda keys: [nodes[position(key) % len(nodes)] for key in keys]


def _jump(weights: Weights) -> Place:
    nodes, jump = _slots(weights), import_module("jump").hash
    return lambda keys: [nodes[jump(position(key), len(nodes))] for key in keys]


def _uhashring(weights: Weights) -> Place:
    nodes = {name: {"weight": weight} for name, weight in weights.items()}
    ring = import_module("uhashring").HashRing(nodes=nodes)
    return lambda keys: [ring.get_node(key) for key in keys]


def _ketama(weights: Weights) -> Place:
    names = {f"10.0.0.{name.split()[1]}:11211": name for name in weights}
    with NamedTemporaryFile("w", suffix=".servers") as listed:
        listed.writelines(f"{address}\t{100 * weights[name]}\n" for address, name in names.items())
        listed.flush()
        ring = import_module("ketama").Ketama(listed.name)
    return lambda keys: [names[ring.get_server(key)[1]] for key in keys]


def _always(place: Callable[[Weights], Place]) -> Callable[[Weights], Place]:
    return place


def schemes() -> Iterator[tuple[str, Scheme]]:
    """All that are installed."""
    yield "shardkit, a cluster's slots", SlotRing
    yield "shardkit.HashRing, 128 vnodes", _hash_ring(128)
    yield "shardkit.HashRing, 1,024 vnodes", _hash_ring(1024)
    for module, package, name, place in (
        ("uhashring", "uhashring", "uhashring", _uhashring),
        ("ketama", "ketama", "ketama (C)", _ketama),
        ("jump", "jump-consistent-hash", "jump-consistent-hash", _jump),
    ):
        if peers.is_there(module):
            yield f"{name} {version(package)}", partial(_always, place)
    yield "position % nodes", partial(_always, _modulo)


def measure(scheme: Scheme, change: str, keys: Sequence[str]) -> tuple[float, float, float]:
    """The load of the fullest node after a change, the fraction of the keys that it moves, and the fewest."""
    before, after = CHANGES[change]
    made = scheme()
    old = made(before)(keys)
    new = made(after)(keys)
    load, total = Counter(new), sum(after.values())
    fullest = max(load[name] * total / (len(keys) * weight) for name, weight in after.items())
    moved = sum(one != other for one, other in zip(old, new, strict=True)) / len(keys)
    fewest = sum(
        max(0.0, weight / total - before.get(name, 0) / sum(before.values()))
        for name, weight in after.items()
    )
    return fullest, moved, fewest


def table(rows: Sequence[Row]) -> documents.Table:
    """A row for each scheme, a column for each change: what is moved as a multiple of the fewest, and the load of the
    fullest node as a multiple of its share."""
    by_scheme: dict[str, list[str]] = {}
    for row in rows:
        cells = by_scheme.setdefault(row.scheme, [row.scheme])
        cells.append(f"{row.moved / row.fewest:.2f} ({row.max_over_mean:.2f})")
    return [["moved / fewest (fullest / mean)", *CHANGES], *by_scheme.values()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--keys", type=int, default=KEYS)
    parser.add_argument("--docs", type=Path, help="put the table into this file")
    options = parser.parse_args()
    keys = [f"user:{number:08}" for number in range(options.keys)]
    rows = [
        Row(name, change, *measure(scheme, change, keys)) for name, scheme in schemes() for change in CHANGES
    ]
    print(documents.aligned(table(rows)))
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"balance-{datetime.now(UTC):%Y-%m-%d-%H%M%S}.json"
    path.write_text(json.dumps({"keys": options.keys, "rows": [asdict(row) for row in rows]}, indent=1))
    print(f"\nAll of it is in {path.relative_to(RESULTS.parents[1])}")
    if options.docs is not None:
        said = f"{options.keys:,} text keys, each placed before and after the change."
        documents.put(options.docs, COMMAND, said, documents.markdown(table(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
