"""Growth on paper: what plans, topologies and the catalog come to as a cluster grows, up to 1,000 shards.

No row moves. Each scenario plans one job after the other, each from the placement that the one before ends with, and
counts what the jobs would do. What a router pays for the largest topology, and what a catalog on a real server holds
after many changes of it, is measured too. Times are CPU time of this process, so that a busy machine does not matter
much. A table is printed, everything is written to ``benchmarks/results/``, and ``--docs docs/scaling.md`` puts the
tables there between its two marks.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import TypeVar

from shardkit.core.keyrange import SLOTS, ArcSet, slot_arc, slot_of
from shardkit.core.placement import Placement, initial, plan
from shardkit.core.ring import IMPLEMENTATION
from shardkit.core.topology import Fence, Shard, ShardedTable, Topology
from shardkit.dev import Clusters
from shardkit.storage import membership
from shardkit.storage.catalog import Catalog
from shardkit.storage.connections import ShardConnections, connect, value

from . import documents

RESULTS = Path(__file__).parent / "results"
CHANGES_A_TRANSFER = 3
"""Topologies that a transfer makes: marked, cut over, unmarked."""
FIRST, LAST = "one by one to 64", "{}, fifty times one in ten reweighted"
"""The scenarios whose last topology is measured as a router and a catalog have it."""
COMMAND = "python -m benchmarks.growth --docs"
VACUUM_EACH = 25
BAR_MS = 100
"""The most CPU time that a plan for 1,000 shards may take."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Row:
    """A scenario at its end. ``slots_*`` and ``transfers`` are sums over its jobs, times the largest of them.

    ``unpruned_bytes`` is what the documents of all its topologies come to as JSON, were each one kept for good.
    """

    scenario: str
    shards: int
    jobs: int
    slots_moved: int
    slots_minimum: int
    max_over_mean: float
    arcs_a_shard: float
    transfers: int
    transfers_last: int
    plan_ms_last: float
    plan_ms_most: float
    topology_bytes: int
    versions: int
    unpruned_bytes: int


@dataclass(frozen=True, slots=True)
class Router:
    """What one topology costs who reads it: bytes of memory by `tracemalloc`, milliseconds of CPU time."""

    scenario: str
    shards: int
    arcs: int
    document_bytes: int
    topology_bytes: int
    ring_bytes: int
    from_json_ms: float
    digest_ms: float
    ring_ms: float
    next_ms: float


@dataclass(frozen=True, slots=True)
class Kept:
    """A catalog on a server under changes of its topology: bytes of ``shardkit.topologies`` before them, and the most
    that they ever were, with a vacuum after each `VACUUM_EACH`."""

    shards: int
    document_bytes: int
    changes: int
    bytes_before: int
    bytes_most: int
    documents_after: int
    change_ms: float


class Growth:
    """A cluster on paper: its weights, and the placement that its last job ends with."""

    def __init__(self, scenario: str, weights: Mapping[int, int], topology: Topology | None = None) -> None:
        self.scenario = scenario
        self.weights = dict(weights)
        self.topology = topology or made(self.weights, *initial(self.weights))
        self.jobs: list[tuple[Placement, float, int]] = []

    def onwards(self, scenario: str) -> Growth:
        """Another scenario, which begins where this one ends."""
        return Growth(scenario, self.weights, self.topology)

    def grow(self, shards: int) -> None:
        """Add shards of the usual weight until there are so many, as one job."""
        self.change(dict.fromkeys(range(len(self.weights), shards), 100))

    def change(self, weights: Mapping[int, int]) -> None:
        """Plan one job for these weights, beside those that stay."""
        joined = len(self.weights.keys() | weights.keys()) - len(self.weights)
        self.weights |= weights
        before = made(self.weights, self.topology.tokens, self.topology.owners)
        placement, seconds = timed(lambda: plan(before, self.weights))
        self.topology = made(self.weights, placement.tokens, placement.owners)
        self.jobs.append((placement, seconds, joined))

    def row(self) -> Row:
        """The numbers of all jobs so far."""
        placements = [placement for placement, _, _ in self.jobs]
        slots = Counter[int]()
        for arc_slots, owner in arcs_of(self.topology):
            slots[owner] += arc_slots
        total = sum(self.weights.values())
        versions = [
            joined + CHANGES_A_TRANSFER * len(placement.transfers) for placement, _, joined in self.jobs
        ]
        size = bytes_of(self.topology)
        return Row(
            self.scenario,
            sum(weight > 0 for weight in self.weights.values()),
            len(self.jobs),
            sum(placement.slots_moved for placement in placements),
            sum(placement.slots_minimum for placement in placements),
            max(slots[each] * total / (SLOTS * weight) for each, weight in self.weights.items() if weight),
            len(self.topology.tokens) / len(self.weights),
            sum(len(placement.transfers) for placement in placements),
            len(placements[-1].transfers),
            1000 * self.jobs[-1][1],
            1000 * max(seconds for _, seconds, _ in self.jobs),
            size,
            sum(versions),
            # A document is as long as its shards and arcs are many, which the placements tell.
            sum(
                count * size * (len(placement.tokens) + 1) // (len(self.topology.tokens) + 1)
                for count, placement in zip(versions, placements, strict=True)
            ),
        )


def made(weights: Mapping[int, int], tokens: tuple[int, ...], owners: tuple[int, ...]) -> Topology:
    """A topology with names and URLs of a usual length, and ten tables."""
    tables = tuple(ShardedTable("public", f"table_{n}", "user_id", "int") for n in range(10))
    fence = Fence(1, "0123abcd")
    shards = tuple(
        Shard(n, f"shard-{n:04}", f"postgresql://shardkit@db-{n:04}.example.com:5432/app", fence, weight)
        for n, weight in weights.items()
    )
    return Topology(1, shards, tokens, owners, tables)


def arcs_of(topology: Topology) -> Iterator[tuple[int, int]]:
    """(slots, owner) of every arc."""
    first = 0
    for token, owner in zip(topology.tokens, topology.owners, strict=True):
        end = slot_of(token) + 1
        yield end - first, owner
        first = end


def bytes_of(topology: Topology) -> int:
    """Length of the topology as JSON."""
    return len(json.dumps(topology.to_json()))


def timed(act: Callable[[], T]) -> tuple[T, float]:
    """What ``act`` returns, and the seconds of CPU time that it took; garbage of before is not its own."""
    gc.collect()
    began = time.process_time()
    result = act()
    return result, time.process_time() - began


def scenarios(most: int) -> Iterator[Growth]:
    """Each kind of growth, at its end."""
    sixty_four = Growth(FIRST, {0: 100})
    for shards in range(2, 65):
        sixty_four.grow(shards)
    yield sixty_four
    growth = Growth(f"doublings to {1 << most.bit_length()}", {0: 100})
    while len(growth.weights) < most:
        growth.grow(2 * len(growth.weights))
    yield growth
    growth = sixty_four.onwards(f"64, then a tenth more at a time, to {most}")
    while (shards := len(growth.weights)) < most:
        growth.grow(min(most, shards + shards // 10))
    yield growth
    yield from single_changes(growth, most)


def single_changes(grown: Growth, most: int) -> Iterator[Growth]:
    """One job each, on what grew."""
    for name, weights in (
        (f"{most}, one more", {most: 100}),
        (f"{most}, a tenth more", {most + n: 100 for n in range(most // 10)}),
        (f"{most}, one drained", {most // 2: 0}),
        (f"{most}, one twice the weight", {most // 3: 200}),
        (f"{most}, every other reweighted", {n: 100 + n % 7 for n in range(0, most, 2)}),
    ):
        growth = grown.onwards(name)
        growth.change(weights)
        yield growth
    growth = grown.onwards(LAST.format(most))
    for step in range(50):
        growth.change({n: 50 + (n * 37 + step * 11) % 100 for n in range(step % 10, most, 10)})
    yield growth


def router(scenario: str, topology: Topology) -> Router:
    """What a router pays to hold a topology, to refresh it, and a mover to make the next."""
    text = json.dumps(topology.to_json())
    tracemalloc.start()
    read = Topology.from_json(json.loads(text))
    gc.collect()
    held = tracemalloc.get_traced_memory()[0]
    _ = read.ring
    gc.collect()
    with_ring = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    document = json.loads(text)
    return Router(
        scenario,
        len(topology.shards),
        len(topology.tokens),
        len(text),
        held,
        with_ring - held,
        *(
            1000 * median(timed(act)[1] for _ in range(5))
            for act in (
                lambda: Topology.from_json(document),
                lambda: replace(topology, version=2).digest,
                lambda: replace(topology, version=2).ring,
                lambda: next_of(topology, 2),
            )
        ),
    )


def next_of(topology: Topology, version: int) -> Topology:
    """The topology with one slot marked on a shard that does not own it, and taken back every other time."""
    shard = topology.shards[-1]
    if shard.in_transit:
        return topology.unmarked(version, shard.id, shard.in_transit)
    return topology.marked(version, shard.id, ArcSet([slot_arc(0)]) - topology.owned(shard.id))


def kept(topology: Topology, changes: int) -> tuple[Kept, str]:
    """Write changes of a topology into a catalog on a server, as a mover does; the server's version too."""
    with Clusters(1) as servers:
        os.environ["PGPASSFILE"] = str(servers[0].passfile)
        url = servers[0].create_database("catalog")
        membership.initialise(url)
        with Catalog.open(url) as catalog, ShardConnections():
            catalog.take_lease()
            catalog.propose(topology)
            catalog.record(topology)
            before = _table_size(url)
            seconds = 0.0
            most = 0
            for number in range(1, changes + 1):
                began = time.process_time()
                topology = next_of(topology, topology.version + 1)
                catalog.propose(topology)
                catalog.record(topology)
                seconds += time.process_time() - began
                if number % VACUUM_EACH == 0:
                    most = max(most, _table_size(url))
                    # What autovacuum does in its time.
                    catalog.connection.execute("VACUUM shardkit.topologies")
        with connect(url) as connection:
            documents = value(
                connection, "SELECT count(*) FROM shardkit.topologies WHERE document ? 'tokens'"
            )
            version = value(connection, "SHOW server_version")
        measured = Kept(
            len(topology.shards),
            bytes_of(topology),
            changes,
            before,
            most,
            documents,
            1000 * seconds / changes,
        )
    return measured, version


def _table_size(url: str) -> int:
    with connect(url) as connection:
        return int(value(connection, "SELECT pg_total_relation_size('shardkit.topologies')"))


# --- what is shown -------------------------------------------------------------------------------------------------

COLUMNS: dict[str, Callable[[Row], str]] = {
    "scenario": lambda row: row.scenario,
    "shards": lambda row: f"{row.shards:,}",
    "jobs": lambda row: f"{row.jobs:,}",
    "slots moved": lambda row: f"{row.slots_moved:,}",
    "minimum": lambda row: f"{row.slots_minimum:,}",
    "max/mean": lambda row: f"{row.max_over_mean:.4f}",
    "arcs a shard": lambda row: f"{row.arcs_a_shard:.1f}",
    "transfers": lambda row: f"{row.transfers:,}",
    "in the last job": lambda row: f"{row.transfers_last:,}",
    "plan, ms": lambda row: f"{row.plan_ms_last:.1f}",
    "at most": lambda row: f"{row.plan_ms_most:.1f}",
    "topology, kB": lambda row: f"{row.topology_bytes / 1e3:,.1f}",
    "versions": lambda row: f"{row.versions:,}",
    "all of them, MB": lambda row: f"{row.unpruned_bytes / 1e6:,.0f}",
}
ROUTER_COLUMNS: dict[str, Callable[[Router], str]] = {
    "topology": lambda one: one.scenario,
    "arcs": lambda one: f"{one.arcs:,}",
    "JSON, kB": lambda one: f"{one.document_bytes / 1e3:,.1f}",
    "in memory, kB": lambda one: f"{one.topology_bytes / 1e3:,.1f}",
    "ring, kB": lambda one: f"{one.ring_bytes / 1e3:,.1f}",
    "from JSON, ms": lambda one: f"{one.from_json_ms:.1f}",
    "digest, ms": lambda one: f"{one.digest_ms:.1f}",
    "ring, ms": lambda one: f"{one.ring_ms:.1f}",
    "next version, ms": lambda one: f"{one.next_ms:.1f}",
}
KEPT_COLUMNS: dict[str, Callable[[Kept], str]] = {
    "shards": lambda one: f"{one.shards:,}",
    "topology, kB": lambda one: f"{one.document_bytes / 1e3:,.1f}",
    "changes": lambda one: f"{one.changes:,}",
    "table before, kB": lambda one: f"{one.bytes_before / 1e3:,.0f}",
    "at most, kB": lambda one: f"{one.bytes_most / 1e3:,.0f}",
    "documents kept": lambda one: f"{one.documents_after:,}",
    "CPU a change, ms": lambda one: f"{one.change_ms:.1f}",
}


def shown(columns: Mapping[str, Callable[[T], str]], rows: Iterable[T]) -> list[list[str]]:
    """The table, its head first."""
    return [list(columns), *([cell(row) for cell in columns.values()] for row in rows)]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--shards", type=int, default=1000, help="shards of the largest cluster")
    parser.add_argument("--changes", type=int, default=200, help="changes written into a catalog on a server")
    parser.add_argument("--docs", type=Path, help="replace the tables in this document")
    options = parser.parse_args()
    grown = list(scenarios(options.shards))
    rows = [growth.row() for growth in grown]
    largest = [growth for growth in grown if growth.scenario in (FIRST, LAST.format(options.shards))]
    routers = [router(growth.scenario, growth.topology) for growth in largest]
    held, server = [], ""
    for growth in largest:
        measured, server = kept(growth.topology, options.changes)
        held.append(measured)
    tables = [shown(COLUMNS, rows), shown(ROUTER_COLUMNS, routers), shown(KEPT_COLUMNS, held)]
    print("\n\n".join(map(documents.aligned, tables)))
    machine = {
        "python": platform.python_version(),
        "postgresql": server,
        "ring": IMPLEMENTATION,
        "machine": platform.machine(),
        "processor": documents.processor(),
        "cores": os.cpu_count(),
    }
    if options.docs is not None:
        said = documents.measured(f"PostgreSQL {server}", f"the ring in {IMPLEMENTATION}")
        documents.put(options.docs, COMMAND, said, *map(documents.markdown, tables))
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"growth-{datetime.now(UTC):%Y-%m-%d-%H%M%S}.json"
    parts = {"rows": rows, "routers": routers, "catalogs": held}
    document = {
        **machine,
        **{name: [asdict(one) for one in ones] for name, ones in parts.items()},  # type: ignore[attr-defined]
    }
    path.write_text(json.dumps(document, indent=1))
    print(f"\nAll of it is in {path.relative_to(RESULTS.parents[1])}")
    missed = [row.scenario for row in rows if row.slots_moved != row.slots_minimum]
    slow = [row.scenario for row in rows if row.plan_ms_most > BAR_MS]
    for what, which in (
        ("More moves than must", missed),
        (f"A plan takes over {BAR_MS} ms of CPU time", slow),
    ):
        if which:
            print(f"{what}: {'; '.join(which)}.", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
