"""Physical standbys in a move: what a fail-over must not forget is with them before the next step."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import psycopg
import pytest
from psycopg import pq

from shardkit.core.errors import MoveWaiting, StandbyBehind
from shardkit.core.move import Mode, Phase
from shardkit.dev.standby import Standby
from shardkit.rebalance.progress import Listener, Progress
from shardkit.storage import change, fence, standbys
from shardkit.storage.catalog import Catalog
from shardkit.storage.connections import connect
from tests.fix_postgres import FreshDatabase, NewCluster
from tests.fix_shards import MakeShards, Shards, fill
from tests.sharded import until

USERS = 200
MODES = [Mode.LOGICAL, Mode.LOCKED]
CONFIRMED = "SELECT FROM pg_stat_replication WHERE pid = %s AND replay_lsn IS NOT NULL"
LET_GO = "SELECT FROM pg_replication_slots WHERE slot_name = 'left' AND active_pid IS NULL"


class Follower:
    """A standby that can be made to receive nothing, while its connection stands."""

    def __init__(self, standby: Standby) -> None:
        self.standby = standby
        self._frozen = 0

    def freeze(self) -> None:
        if not self._frozen:
            with closing(psycopg.connect(self.standby.conninfo(), autocommit=True)) as connection:
                row = connection.execute("SELECT pid FROM pg_stat_wal_receiver").fetchone()
            assert row is not None
            self._frozen = row[0]
            os.kill(self._frozen, signal.SIGSTOP)

    def thaw(self) -> None:
        if self._frozen:
            os.kill(self._frozen, signal.SIGCONT)
            self._frozen = 0

    def close(self) -> None:
        self.thaw()
        self.standby.close()


Build = Callable[[str], tuple[Shards, Follower]]


@pytest.fixture
def build(make_shards: MakeShards, new_cluster: NewCluster) -> Iterator[Build]:
    """`build("s2")`: s1 with rows, s2 empty, and a standby of the one that is named."""
    followers: list[Follower] = []

    def make(followed: str) -> tuple[Shards, Follower]:
        primary = new_cluster()
        shards = make_shards(0)
        shards.add("s1", primary if followed == "s1" else 0)
        fill(shards.on("s1"), USERS)
        shards.add("s2", primary if followed == "s2" else 1)
        standby = Standby(primary)
        followers.append(Follower(standby))
        standby.start()
        until(lambda: standbys.connected(shards.on(followed)), "the standby reports")
        return shards, followers[-1]

    yield make
    for follower in followers:
        follower.close()


def at(phase: Phase, act: Callable[[], object]) -> Listener:
    """Do something once, as a phase begins."""
    done: list[bool] = []

    def listen(progress: Progress) -> None:
        if progress.phase is phase and not done:
            done.append(True)
            act()

    return listen


@pytest.mark.parametrize("mode", MODES)
def test_the_decision_waits_for_the_targets_standbys(build: Build, mode: Mode) -> None:
    shards, follower = build("s2")
    phase = Phase.CUTTING_OVER if mode is Mode.LOGICAL else Phase.COPYING
    with pytest.raises(MoveWaiting, match=r"waits for standbys of shard s2: .*\(behind\)"):
        shards.move(mode, patience=1.0, listener=at(phase, follower.freeze))
    assert not shards.topology().owned(1)
    shards.on("s1").execute("UPDATE public.users SET n = 1")  # nobody holds anything up
    follower.thaw()
    shards.resume()
    shards.assert_clean()
    assert {row[2] for rows in shards.rows(shards.tables[1]).values() for row in rows} == {1}


def test_one_that_fell_behind_just_before_is_not_waited_for_while_applications_are(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, follower = build("s2")
    lock_all = fence.lock_all
    waits: list[str] = []

    def locking(connection: psycopg.Connection, names: set[str]) -> None:
        lock_all(connection, names)
        with Catalog.open(shards.catalog_url) as catalog:
            job = catalog.running_job()
            cutting = job is not None and catalog.transfers(job.id)[0].phase is Phase.CUTTING_OVER
        if cutting and not waits:
            follower.freeze()

    def listen(progress: Progress) -> None:
        if progress.waiting_for and "standbys of shard s2" in progress.waiting_for:
            waits.append(progress.waiting_for)
            follower.thaw()

    monkeypatch.setattr(fence, "lock_all", locking)
    shards.move(Mode.LOGICAL, listener=listen)
    assert waits[0].startswith("the cutover waits for standbys of shard s2")
    shards.assert_clean()


@pytest.mark.parametrize("mode", MODES)
def test_the_opening_waits_for_the_sources_standbys(build: Build, mode: Mode) -> None:
    shards, follower = build("s1")
    freeze = at(Phase.CUTTING_OVER if mode is Mode.LOGICAL else Phase.COPYING, follower.freeze)
    seen: list[str] = []

    def listen(progress: Progress) -> None:
        freeze(progress)
        reason = progress.waiting_for
        if reason and reason.startswith("the opening waits for standbys of shard s1") and not seen:
            seen.append(reason)
            with Catalog.open(shards.catalog_url) as catalog:
                proposal = catalog.proposed()
            assert proposal is not None
            assert proposal.owned(1)
            assert proposal.by_id[0].fence.relation in fence.relations(shards.on("s1"))
            assert proposal.by_id[1].fence.relation not in fence.relations(shards.on("s2"))
            follower.thaw()

    shards.move(mode, listener=listen)
    assert seen
    shards.assert_clean()


def test_an_opening_that_waited_in_vain_is_made_later(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(change, "STANDBY_SECONDS", 0.3)
    shards, follower = build("s1")
    with pytest.raises(StandbyBehind, match=r"shard s1 .*\(behind\)") as caught:
        shards.move(Mode.LOGICAL, listener=at(Phase.CUTTING_OVER, follower.freeze))
    assert caught.value.exit_code == 5
    with Catalog.open(shards.catalog_url) as catalog:
        proposal = catalog.proposed()
    assert proposal is not None
    with pytest.raises(StandbyBehind):
        shards.resume()
    follower.thaw()
    shards.resume()
    shards.assert_clean()
    assert shards.topology().owned(1) == proposal.owned(1)


def test_the_purge_waits_for_the_targets_standbys(build: Build) -> None:
    shards, follower = build("s2")

    def act() -> None:
        follower.freeze()
        shards.on("s2").execute("CREATE TABLE public.later ()")

    freeze = at(Phase.PURGING, act)
    seen: list[int] = []

    def listen(progress: Progress) -> None:
        freeze(progress)
        reason = progress.waiting_for
        if reason and reason.startswith("the deletion on shard s1 waits for standbys of shard s2"):
            seen.append(len(shards.rows(shards.tables[1])["s1"]))
            follower.thaw()

    shards.move(Mode.LOGICAL, listener=listen)
    assert seen[0] == USERS
    shards.assert_clean()


def test_one_that_is_gone_is_missed_until_somebody_resumes(build: Build) -> None:
    shards, follower = build("s2")
    with pytest.raises(MoveWaiting, match=r"he cutover waits for standbys of shard s2: .*\(gone\)"):
        shards.move(Mode.LOGICAL, patience=1.0, listener=at(Phase.VERIFYING, follower.standby.stop))
    assert not shards.topology().owned(1)
    shards.resume()
    shards.assert_clean()


def test_what_only_keeps_wal_is_no_standby(new_cluster: NewCluster, tmp_path: Path) -> None:
    """An archiver flushes when a segment is full, which can take hours, and nothing fails over to it."""
    cluster = new_cluster()
    command = [str(cluster.binaries.folder / "pg_receivewal"), "-D", str(tmp_path), "-d", cluster.conninfo()]
    with closing(connect(cluster.url())) as connection, subprocess.Popen(command) as archiver:
        until(
            lambda: connection.execute(
                "SELECT 1 FROM pg_stat_replication WHERE state = 'streaming'"
            ).fetchall(),
            "it streams",
        )
        assert not standbys.connected(connection)
        assert standbys.lacking(connection, standbys.flushed(connection), {}) == []
        archiver.terminate()


def test_what_sends_a_subscription_is_no_standby(fresh_database: FreshDatabase) -> None:
    """Nor as it ends: it has let its slot go by then, and what was confirmed to it still shows."""
    url = fresh_database()
    with closing(connect(url)) as connection, closing(psycopg.connect(url, replication="database")) as sender:
        connection.execute("CREATE PUBLICATION p")
        connection.execute("SELECT pg_create_logical_replication_slot('left', 'pgoutput')")
        sent = sender.pgconn
        try:
            started = sent.exec_(
                b"START_REPLICATION SLOT left LOGICAL 0/0 (proto_version '1', publication_names 'p')"
            )
            assert started.status == pq.ExecStatus.COPY_BOTH
            sent.put_copy_data(struct.pack(">cQQQQB", b"r", 1, 1, 1, 0, 0))  # written, flushed, replayed
            sent.flush()
            until(lambda: connection.execute(CONFIRMED, (sent.backend_pid,)).fetchall(), "it confirms")
            assert not standbys.connected(connection)
            sent.put_copy_end()
            sent.flush()
            until(lambda: connection.execute(LET_GO).fetchall(), "it lets the slot go")
            assert connection.execute(CONFIRMED, (sent.backend_pid,)).fetchall()
            assert not standbys.connected(connection)
        finally:
            sender.close()
            until(lambda: connection.execute(LET_GO).fetchall(), "it has ended")
            connection.execute("SELECT pg_drop_replication_slot('left')")
