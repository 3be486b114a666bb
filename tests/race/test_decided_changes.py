"""A change that is decided stays decided, whoever fails afterwards; what is pending is finished first."""

from __future__ import annotations

import threading

import pytest

from shardkit.core.keyrange import ArcSet, slot_arc
from shardkit.core.move import Phase
from shardkit.core.topology import Topology
from shardkit.rebalance.mover import Mover
from shardkit.rebalance.transfer import TransferRun
from shardkit.rebalance.waiting import Interrupted, Surroundings
from shardkit.storage import change, fence
from shardkit.storage.catalog import TransferRow
from shardkit.storage.connections import ShardConnections
from tests.fix_shards import MakeShards, Shards, fill

ARCS = ArcSet([slot_arc(0, 100)])


def mark(current: Topology | None, version: int) -> Topology:
    assert current is not None
    return current.marked(version, 1, ARCS)


class BrokenTerminal(Exception):
    pass


def test_an_error_of_whoever_is_told_discards_no_decided_change(make_shards: MakeShards) -> None:
    shards = make_shards(2)

    def told(reason: str | None) -> None:
        raise BrokenTerminal

    with shards.writer() as (catalog, connections):
        before = catalog.current()
        with pytest.raises(BrokenTerminal):
            change.apply(catalog, connections, mark, report=told)
    with shards.writer() as (catalog, connections):
        change.settle(catalog, connections)
        after = catalog.current()
        assert after is not None
        assert after != before
        for shard in after.shards:
            assert shard.fence.relation in fence.relations(shards.on(shard.name))


def stopped_before_the_cutover(shards: Shards) -> None:
    """A job whose only transfer stands at the cutover."""
    stop = threading.Event()

    def stop_there(progress: object) -> None:
        if getattr(progress, "phase", None) is Phase.CUTTING_OVER:
            stop.set()

    with pytest.raises(Interrupted):
        shards.move(listener=stop_there, stop=stop)


def test_a_cutover_that_was_decided_before_a_failover_is_not_prepared_again(make_shards: MakeShards) -> None:
    """The decision is made, the target is not open yet, and then it is another server: its rows are the only ones
    that count, and must not be deleted for a new copy."""
    shards = make_shards(1)
    fill(shards.on("s1"), 300)
    shards.add("s2", 1)
    stopped_before_the_cutover(shards)
    with Mover(shards.catalog_url) as mover:
        (row,) = mover.catalog.transfers(mover.job().id)
        decide_only(mover, row)
        mover.catalog.note(row.id, identities={"s1": ["another", 1], "s2": ["another", 1]})
        seen: list[Phase] = []
        around = Surroundings(
            shards.catalog_url,
            mover.catalog.token or 0,
            threading.Event(),
            lambda progress: seen.append(progress.phase),
            threading.Lock(),
            30.0,
        )
        with TransferRun(row, around) as run:
            run.run()
        assert Phase.PREPARING not in seen
        mover.run()
    shards.assert_clean()
    users = shards.rows(shards.tables[1])
    assert users["s2"]
    assert len(users["s1"]) + len(users["s2"]) == 300


def decide_only(mover: Mover, row: TransferRow) -> None:
    """The decision of a cutover, by a mover that loses its connections in the same moment."""
    catalog = mover.catalog
    current = catalog.current()
    assert current is not None
    proposal = current.cut_over(catalog.next_version(), row.source, row.target, row.arcs)
    catalog.propose(proposal)
    with ShardConnections() as shards:
        source = shards.get(current.by_id[row.source])
        with source.transaction():
            change.claim(source, catalog.token or 0)
            names = fence.relations(source)
            fence.lock_all(source, names)
            source.execute(fence.close(names, proposal, row.source))
