"""The mover killed with SIGKILL while it keeps a source, lets it go or rolls back, under live writers: `resume` ends as
if nothing had been."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shardkit.core.errors import RollbackImpossible
from shardkit.core.move import Phase
from shardkit.rebalance.mover import Mover
from shardkit.rebalance.progress import Progress
from shardkit.rebalance.waiting import Interrupted
from shardkit.storage.catalog import Catalog
from shardkit.storage.connections import value
from tests.crash.test_lost_slot import SMALL, lose_the_slot
from tests.fix_postgres import NewCluster
from tests.fix_shards import FencedWriter, MakeShards, Shards, fill
from tests.movers import run_forked
from tests.sharded import until

USERS = 300

slow = pytest.mark.slow


def points(usual: str, rest: str) -> list[object]:
    """Names of failpoints, one a line: those of every run, then those of the slow one."""
    return [
        *usual.strip().splitlines(),
        *(pytest.param(point, marks=slow) for point in rest.strip().splitlines()),
    ]


KEEPING = points(
    "cut over.begun",
    "cutting over.before opening\n"
    "catching up.published\ncatching up.slot\nchange.decided:2\nchange.opened\nchange.recorded:2\ncut over.begin\n"
    "drop.subscription:3\ndrop.slot:3\ncut over.subscribed\ncut over.enabled\ncut over.end",
)
GOING_BACK = points(
    "purge.batch",
    "cutting back.before decision\ncutting back.before opening\n"
    "rolling back.begin\nrolling back.end\nverifying back.begin\nverifying back.end\ncutting back.begin\n"
    "change.proposed\nchange.decided\nchange.opened\nchange.recorded\ncutting back.end\ncut back.begin\ncut back.end\n"
    "clearing.begin\ndrop.subscription\ndrop.slot\nchange.proposed:2\nchange.recorded:2\nclearing.end",
)
LETTING_GO = points(
    "drop.slot:2",
    "purging.begin\ndrop.subscription:2\npurge.batch\nchange.decided\nchange.recorded\npurging.end",
)


def run_mover(shards: Shards, act: str, failpoint: str = "") -> int:
    return run_forked("resume" if act == "run" else act, shards.catalog_url, failpoint)


def killed(shards: Shards, act: str, failpoint: str) -> None:
    assert run_mover(shards, act, failpoint) == -signal.SIGKILL, f"the mover never passed {failpoint}"


def state(shards: Shards) -> str:
    with Catalog.open(shards.catalog_url) as catalog:
        job = catalog.latest_job()
        assert job is not None
        return "kept" if catalog.is_kept(job) else job.state


@contextmanager
def written(make_shards: MakeShards) -> Iterator[Shards]:
    """Two shards, the second of which owns nothing yet, and writers at work until the end, when all is checked."""
    shards = make_shards(1)
    fill(shards.on("s1"), USERS)
    shards.add("s2", 1)
    writers = [FencedWriter(shards, number, 2, USERS) for number in range(2)]
    for writer in writers:
        writer.start()
    try:
        yield shards
        before = [writer.done for writer in writers]
        until(
            lambda: all(w.done > done + 5 or w.errors for w, done in zip(writers, before, strict=True)),
            "writes after the end",
        )
    finally:
        for writer in writers:
            writer.ending.set()
        for writer in writers:
            writer.join()
    for writer in writers:
        writer.check()
    shards.assert_clean()


@pytest.mark.parametrize("failpoint", KEEPING)
def test_killed_while_it_makes_the_way_back(make_shards: MakeShards, failpoint: str) -> None:
    with written(make_shards) as shards:
        killed(shards, "keep", failpoint)
        assert run_mover(shards, "run") == 0
        assert state(shards) == "kept"
        assert shards.rollback().state == "rolled back"


@pytest.mark.parametrize("failpoint", GOING_BACK)
def test_killed_while_it_rolls_back(make_shards: MakeShards, failpoint: str) -> None:
    with written(make_shards) as shards:
        assert run_mover(shards, "keep") == 0
        killed(shards, "rollback", failpoint)
        assert run_mover(shards, "run") == 0
        assert state(shards) == "rolled back"


@pytest.mark.parametrize("failpoint", LETTING_GO)
def test_killed_while_it_finalises(make_shards: MakeShards, failpoint: str) -> None:
    with written(make_shards) as shards:
        assert run_mover(shards, "keep") == 0
        killed(shards, "finalize", failpoint)
        assert run_mover(shards, "finalize") == 0
        assert state(shards) == "done"


@pytest.mark.parametrize(
    ("point", "then", "end"),
    [
        ("cutting back.before decision", "abort", "kept"),
        pytest.param("cutting back.before opening", "abort", "kept", marks=slow),
        pytest.param("change.decided", "abort", "rolled back", marks=slow),
        pytest.param("verifying back.end", "abort", "kept", marks=slow),
    ],
)
def test_an_abort_finds_whether_the_way_back_was_decided(
    make_shards: MakeShards, point: str, then: str, end: str
) -> None:
    with written(make_shards) as shards:
        assert run_mover(shards, "keep") == 0
        killed(shards, "rollback", point)
        if end == "kept":
            killed(shards, then, "staying.end")
        assert run_mover(shards, then) == 0
        assert state(shards) == end
        if end == "kept":
            assert shards.finalize().state == "done"


# --- servers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", ["source", "target"])
def test_a_server_killed_while_the_source_is_kept(
    make_shards: MakeShards, new_cluster: NewCluster, victim: str
) -> None:
    """The replication goes on by itself, without a mover."""
    server = new_cluster(
        settings={"fsync": "on", "synchronous_commit": "on", "wal_retrieve_retry_interval": "100ms"}
    )
    shards = make_shards(0)
    shards.add("s1", server if victim == "source" else 1)
    fill(shards.on("s1"), USERS)
    shards.add("s2", server if victim == "target" else 2)
    shards.move(keep_source=True)
    write_and_wait(shards, 1)
    server.kill()
    server.start()
    write_and_wait(shards, 2)
    assert shards.rollback().state == "rolled back"
    shards.assert_clean()
    assert len(shards.rows(shards.tables[1])["s1"]) == USERS


def write_and_wait(shards: Shards, n: int) -> None:
    """A write on the target of every row that moved, and its arrival on the source."""
    moved = shards.on("s2").execute("UPDATE public.users SET n = %s", (n,)).rowcount
    count = "SELECT count(*) FROM public.users WHERE n = %s"
    until(lambda: value(shards.on("s1"), count, (n,)) == moved, "the writes on the source", 60.0)


def kept_with_a_promoted(make_shards: MakeShards, new_cluster: NewCluster) -> Shards:
    server = new_cluster()
    shards = make_shards(0)
    shards.add("s1", 1)
    fill(shards.on("s1"), USERS)
    shards.add("s2", server)
    shards.move(keep_source=True)
    folder = Path(value(shards.on("s2"), "SHOW data_directory"))
    server.stop()
    (folder / "standby.signal").touch()
    server.start()
    assert value(shards.on("s2"), "SELECT pg_promote()")
    return shards


def kept_with_a_lost_slot(make_shards: MakeShards, new_cluster: NewCluster) -> Shards:
    shards = make_shards(0)
    shards.add("s1", 1)
    fill(shards.on("s1"), USERS)
    shards.add("s2", new_cluster(settings=SMALL))
    shards.move(keep_source=True)
    lose_the_slot(shards.on("s2"), shards.on("s1"))
    return shards


@pytest.mark.parametrize(
    ("make", "reason"),
    [(kept_with_a_promoted, "is another one than when"), (kept_with_a_lost_slot, "has lost the slot")],
)
def test_a_rollback_is_refused_where_writes_may_be_missing(
    make_shards: MakeShards,
    new_cluster: NewCluster,
    make: Callable[[MakeShards, NewCluster], Shards],
    reason: str,
) -> None:
    shards = make(make_shards, new_cluster)
    with pytest.raises(RollbackImpossible, match=reason) as caught:
        shards.rollback()
    assert "finalize" in caught.value.hint
    assert state(shards) == "kept"
    assert shards.finalize().state == "done"
    shards.assert_clean()


def test_a_slot_that_is_lost_under_a_rollback_stops_it(
    make_shards: MakeShards, new_cluster: NewCluster
) -> None:
    shards = make_shards(0)
    shards.add("s1", 1)
    fill(shards.on("s1"), USERS)
    shards.add("s2", new_cluster(settings=SMALL))
    shards.move(keep_source=True)
    stop = threading.Event()

    def stop_there(progress: Progress) -> None:
        if progress.phase is Phase.CUTTING_BACK:
            stop.set()

    with pytest.raises(Interrupted):
        shards.rollback(listener=stop_there, stop=stop)
    lose_the_slot(shards.on("s2"), shards.on("s1"))
    with pytest.raises(RollbackImpossible, match="has lost the slot"):
        shards.resume()
    with Mover(shards.catalog_url) as mover:
        mover.abort()
    assert shards.finalize().state == "done"
    shards.assert_clean()
