"""Many shards, as databases of one server or two: one job that fills them all, within what the servers have."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import pytest

from shardkit.cli import checkup, status
from shardkit.core.errors import PreflightFailed
from shardkit.core.keyrange import SLOT_BITS, SLOTS, ArcSet
from shardkit.core.move import Mode, Phase
from shardkit.core.placement import plan
from shardkit.dev import Clusters
from shardkit.rebalance import mover
from shardkit.rebalance.mover import weights_of
from shardkit.rebalance.progress import Progress
from shardkit.rebalance.room import Room
from shardkit.storage import membership, migrate, replication, spare
from shardkit.storage.catalog import TransferRow
from shardkit.storage.connections import Connection, ShardConnections, connect
from shardkit.storage.spare import Resource
from tests.fix_postgres import FreshDatabase, NewCluster
from tests.fix_shards import MakeShards, Shards, fill

REPLICATING = (Phase.COPYING, Phase.CATCHING_UP, Phase.VERIFYING, Phase.CUTTING_OVER)
TIGHT = {
    "max_replication_slots": 8,
    "max_wal_senders": 8,
    "max_logical_replication_workers": 5,
    "max_active_replication_origins": 8,
}
"""A server with room for two transfers of two tables each, and some to spare."""


class Watcher:
    """A listener of a mover: which transfers replicated at a time, what they waited for, how many connections there
    were."""

    def __init__(self, on: Sequence[str]) -> None:
        self._lock = threading.Lock()
        self._connections = [connect(url, application="watcher") for url in on]
        self._looked = 0.0
        self._now: dict[int, Phase] = {}
        self.at_once = 0
        self.connections = 0
        self.reasons: set[str] = set()

    def __call__(self, progress: Progress) -> None:
        with self._lock:
            self._now[progress.transfer] = progress.phase
            self.at_once = max(self.at_once, sum(phase in REPLICATING for phase in self._now.values()))
            if progress.waiting_for:
                self.reasons.add(progress.waiting_for)
            if time.monotonic() - self._looked > 0.1:
                self._looked = time.monotonic()
                self.connections = max(self.connections, sum(map(_movers, self._connections)))

    def close(self) -> None:
        for connection in self._connections:
            connection.close()


def _movers(connection: Connection) -> int:
    row = connection.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE application_name ~ '^shardkit mover'"
    ).fetchone()
    assert row is not None
    return int(row[0])


def join(shards: Shards, urls: dict[str, str]) -> None:
    """Databases with the tables become shards that own nothing yet."""
    with shards.writer() as (catalog, connections):
        for name, url in urls.items():
            membership.join(catalog, connections, name=name, url=url)
    for name, url in urls.items():
        shards._open[name] = connect(url)


def fill_by_one_job(shards: Shards, parallel: int, watcher: Watcher) -> None:
    """One job gives every shard its share; all that can be said of the end of it."""
    before = {
        table: sorted(row for rows in shards.rows(table).values() for row in rows) for table in shards.tables
    }
    topology = shards.topology()
    planned = plan(topology, weights_of(topology))
    lacking = sum(
        max(0, SLOTS // len(topology.shards) - (topology.owned(shard.id).width >> SLOT_BITS))
        for shard in topology.shards
    )
    assert lacking <= planned.slots_moved <= lacking + len(topology.shards)
    job = shards.move(mode=Mode.LOGICAL, parallel=parallel, patience=120.0, listener=watcher)
    assert job.state == "done"
    assert (job.last_error, job.attempts) == (None, 0)
    assert job.goal.slots_moved == job.goal.slots_minimum == planned.slots_minimum
    shards.assert_clean()
    topology = shards.topology()
    held = [topology.owned(shard.id).width >> SLOT_BITS for shard in topology.shards]
    assert sum(held) == SLOTS
    assert max(held) - min(held) <= 1
    for table in shards.tables:
        after = shards.rows(table)
        assert sorted(row for rows in after.values() for row in rows) == before[table]
        assert all(after.values()), "a shard got no row"


def test_eight_databases_of_one_server_that_has_room_for_two_transfers(
    make_shards: MakeShards, new_cluster: NewCluster
) -> None:
    server = new_cluster(settings=TIGHT)
    shards = make_shards(0)
    shards._open["s1"] = connect(prepared := server.create_database("s1"))
    shards._open["s1"].execute(shards.schema)
    migrate.upgrade(prepared, "shard")
    shards._open["s1"].close()
    more = {f"s{n}": server.create_database(f"s{n}", "s1") for n in range(2, 9)}
    join(shards, {"s1": prepared})
    with shards.writer() as (catalog, connections):
        membership.declare(catalog, connections, shards.tables)
    fill(shards.on("s1"), 400)
    join(shards, more)
    watcher = Watcher([prepared, shards.catalog_url])
    fill_by_one_job(shards, 4, watcher)
    assert watcher.at_once == 2
    assert any("copy waits for" in reason and "are needed" in reason for reason in watcher.reasons)
    # The lease; of each transfer the catalog, and source and target twice.
    assert 5 < watcher.connections <= 1 + 4 * 5
    watcher.close()


def test_what_a_server_lacks_for_one_transfer_is_refused_before(
    make_shards: MakeShards, new_cluster: NewCluster
) -> None:
    server = new_cluster(settings={**TIGHT, "max_wal_senders": 2})
    shards = make_shards(0)
    shards.add("s1", server)
    shards.add("s2", 1)
    with pytest.raises(PreflightFailed, match=r"2 walsenders are free and 3 are needed \(max_wal_senders\)"):
        shards.move()


def test_who_is_inside_has_all_that_it_needs(make_shards: MakeShards, new_cluster: NewCluster) -> None:
    server = new_cluster(settings=TIGHT)
    shards = make_shards(0)
    shards.add("s1", server)
    shards.add("s2", 1)
    topology = shards.topology()
    source, target = ((shard, shards.on(shard.name)) for shard in topology.shards)
    room = Room()
    assert room.enter(1, "shardkit_0_1", source, target, 2) is None
    assert room.enter(1, "shardkit_0_1", source, target, 2) is None
    assert room.enter(2, "shardkit_0_2", source, target, 2) is None
    full = room.enter(3, "shardkit_0_3", source, target, 2)
    assert full is not None
    assert full.will_end
    assert (
        "replication slots on the server of shard s1: 3 are needed, and those that run take 6 of 8"
        in full.reason
    )
    # The other way they share workers and origins, of which two transfers leave too little as well.
    back = room.enter(4, "shardkit_0_4", target, source, 2)
    assert back is None
    # What those inside have made already does not count twice, what others made does.
    for name in ("shardkit_0_1", "pg_16400_sync_16401_7000000000000000000"):
        replication.create_slot(source[1], name)
    room.leave(2)
    assert spare.sending(source[1])[Resource.SLOTS].free == 6
    assert room.enter(3, "shardkit_0_3", source, target, 2) is None
    room.leave(3)
    for name in ("other", "another", "third", "fourth"):
        replication.create_slot(source[1], name)
    full = room.enter(3, "shardkit_0_3", source, target, 2)
    assert full is not None
    room.leave(1)
    full = room.enter(3, "shardkit_0_3", source, target, 2)
    assert full is not None
    assert not full.will_end, "nobody of this mover will leave"
    for name in (
        "other",
        "another",
        "third",
        "fourth",
        "shardkit_0_1",
        "pg_16400_sync_16401_7000000000000000000",
    ):
        replication.drop_slot(source[1], name)


def test_transfers_side_by_side_leave_different_sources() -> None:
    def row(number: int, source: int, phase: Phase = Phase.PLANNED) -> TransferRow:
        return TransferRow(number, 1, source, 9, ArcSet(), phase, {}, 0, None, None)

    rows = [
        row(1, 0),
        row(2, 0),
        row(3, 0, Phase.DONE),
        row(4, 1, Phase.COPYING),
        row(5, 1),
        row(6, 1),
        row(7, 2),
    ]
    assert [each.id for each in mover._in_order(rows)] == [4, 1, 5, 7, 2, 6]


def is_closed(connection: Connection) -> bool:
    return connection.closed


def test_connections_that_are_not_kept(make_shards: MakeShards) -> None:
    shards = make_shards(3)
    s1, s2, s3 = shards.topology().shards
    with ShardConnections("shardkit tests", at_most=2) as few:
        one, two = few.get(s1), few.get(s2)
        assert few.get(s1) is one
        with two.transaction():
            two.execute("SELECT 1")
            few.get(s3)
            assert is_closed(one), "the one of the two that was idle"
            assert not is_closed(two)
            few.get(s1)
            few.get(s3)
            assert not is_closed(two)
            two.execute("SELECT 1")
        few.get(s3)
        few.get(s1)
        assert is_closed(two)
        assert few.get(s2).execute("SELECT 2").fetchone() == (2,)
        assert len(few.reached) == 2


@pytest.mark.slow
def test_sixty_four_shards(make_shards: MakeShards, fresh_database: FreshDatabase, servers: Clusters) -> None:
    shards = make_shards(0)
    templates = []
    for server in range(2):
        url = fresh_database(server, f"template_{server}")
        with connect(url) as connection:
            connection.execute(shards.schema)
        migrate.upgrade(url, "shard")
        templates.append(f"template_{server}")
    urls = {f"s{n}": fresh_database(n % 2, f"scale_{n}", template=templates[n % 2]) for n in range(1, 65)}
    names = list(urls)
    join(shards, {"s1": urls["s1"]})
    with shards.writer() as (catalog, connections):
        membership.declare(catalog, connections, shards.tables)
    fill(shards.on("s1"), 20_000)
    watcher = Watcher([urls["s1"], urls["s2"]])  # the catalog is on the first one's server
    for upto, parallel in ((8, 4), (64, 16)):
        join(
            shards, {name: urls[name] for name in names if name not in shards._open and int(name[1:]) <= upto}
        )
        began = time.monotonic()
        fill_by_one_job(shards, parallel, watcher)
        print(f"{upto} shards, {parallel} transfers side by side: {time.monotonic() - began:.1f} s")
    assert watcher.connections <= 1 + 16 * 5
    print(f"{watcher.at_once} at a time, {watcher.connections} connections; {sorted(watcher.reasons)[:5]}")
    watcher.close()
    for connection in shards._open.values():
        connection.close()
    began = time.monotonic()
    assert all(shard["fence_held"] for shard in status.look(shards.catalog_url)["shards"])
    looked = time.monotonic()
    assert not [
        found for found in checkup.examine(shards.catalog_url) if found.level is checkup.Level.PROBLEM
    ]
    print(f"status: {looked - began:.2f} s, doctor: {time.monotonic() - looked:.2f} s")
