"""A catalog that was restored to an older state, while shards went on: a mover that believes it destroys nothing."""

from __future__ import annotations

import threading

import pytest

from shardkit.core.errors import CatalogBehind
from shardkit.core.move import Phase
from shardkit.core.topology import Topology
from shardkit.rebalance.waiting import Interrupted
from shardkit.storage import change
from shardkit.storage.connections import connect
from tests.fix_shards import TABLES, MakeShards, Shards, fill


def stopped_at(shards: Shards, phase: Phase, *, begin: bool) -> None:
    """Run the move until it has come to a phase."""
    stop = threading.Event()

    def listen(progress: object) -> None:
        if getattr(progress, "phase", None) is phase:
            stop.set()

    with pytest.raises(Interrupted):
        (shards.move if begin else shards.resume)(listener=listen, stop=stop)


def taken_back(shards: Shards, version: int, phase: Phase) -> None:
    """The catalog as it was when a topology was in force and the transfer in a phase. The lease goes on, as an operator
    sees to who restores one."""
    with connect(shards.catalog_url) as catalog:
        catalog.execute("DELETE FROM shardkit.topologies WHERE version > %s", (version,))
        catalog.execute("UPDATE shardkit.topologies SET state = 'current' WHERE version = %s", (version,))
        catalog.execute("UPDATE shardkit.transfers SET phase = %s", (phase.value,))


@pytest.fixture
def moved(make_shards: MakeShards) -> tuple[Shards, Topology, Topology]:
    """A move that stands before its purge; the topologies before the mark, and after it."""
    shards = make_shards(1)
    fill(shards.on("s1"), 300)
    shards.add("s2", 1)
    before = shards.topology()
    stopped_at(shards, Phase.COPYING, begin=True)
    marked = shards.topology()
    stopped_at(shards, Phase.PURGING, begin=False)
    assert shards.topology().owned(1)
    return shards, before, marked


def test_rows_that_the_target_owns_are_not_deleted_as_strays(
    moved: tuple[Shards, Topology, Topology],
) -> None:
    """The name that the mark gave the target still stands beside the one that it was opened with."""
    shards, _, marked = moved
    rows = shards.rows(TABLES[1])["s2"]
    taken_back(shards, marked.version, Phase.PREPARING)
    with pytest.raises(CatalogBehind, match="s2"):
        shards.resume(patience=1.0)
    assert shards.rows(TABLES[1])["s2"] == rows != []


def test_an_owner_is_not_marked_again(moved: tuple[Shards, Topology, Topology]) -> None:
    """The same change under the same number has the same name, digest and all."""
    shards, before, _ = moved
    rows = shards.rows(TABLES[1])["s2"]
    taken_back(shards, before.version, Phase.PREPARING)
    with pytest.raises(CatalogBehind, match="s2"):
        shards.resume(patience=1.0)
    assert shards.rows(TABLES[1])["s2"] == rows != []


def test_a_change_under_a_number_that_a_shard_has_passed_is_refused(make_shards: MakeShards) -> None:
    shards = make_shards(2)
    before = shards.topology()
    arcs = before.owned(0)

    def mark(now: Topology | None, version: int) -> Topology:
        assert now is not None
        return now.marked(version, 1, arcs)

    def unmark(now: Topology | None, version: int) -> Topology:
        assert now is not None
        return now.unmarked(version, 1, arcs)

    with shards.writer() as (catalog, connections):
        change.apply(catalog, connections, mark)
        change.apply(catalog, connections, unmark)
    taken_back(shards, before.version, Phase.PLANNED)
    with shards.writer() as (catalog, connections), pytest.raises(CatalogBehind):
        change.apply(catalog, connections, mark)
