"""A server killed with SIGKILL under a move: it comes back, and the same mover goes on to the end by itself."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from shardkit.core.move import Phase
from shardkit.rebalance.progress import Progress
from shardkit.rebalance.waiting import Interrupted
from shardkit.storage import servers
from shardkit.storage.catalog import Job
from shardkit.storage.connections import value
from tests.fix_postgres import NewCluster
from tests.fix_shards import MakeShards, fill


@pytest.mark.parametrize(
    ("victim", "phase"),
    [
        ("source", Phase.COPYING),
        ("target", Phase.COPYING),
        ("catalog", Phase.COPYING),
        ("source", Phase.VERIFYING),
        ("target", Phase.CUTTING_OVER),
        ("source", Phase.PURGING),
        pytest.param("source", Phase.CUTTING_OVER, marks=pytest.mark.slow),
        pytest.param("target", Phase.VERIFYING, marks=pytest.mark.slow),
        pytest.param("target", Phase.PURGING, marks=pytest.mark.slow),
        pytest.param("catalog", Phase.VERIFYING, marks=pytest.mark.slow),
        pytest.param("catalog", Phase.CUTTING_OVER, marks=pytest.mark.slow),
        pytest.param("catalog", Phase.PURGING, marks=pytest.mark.slow),
    ],
)
def test_the_mover_goes_on_after(
    make_shards: MakeShards, new_cluster: NewCluster, victim: str, phase: Phase
) -> None:
    # Flushed for real: what a crash takes back is what this is about.
    server = new_cluster(settings={"fsync": "on", "synchronous_commit": "on"})
    shards = make_shards(0, catalog_server=server if victim == "catalog" else None)
    shards.add("s1", server if victim == "source" else 1)
    fill(shards.on("s1"), 3000, 4)
    before = {table: shards.rows(table)["s1"] for table in shards.tables}
    shards.add("s2", server if victim == "target" else 2)
    reached, finished = threading.Event(), threading.Event()
    jobs: list[Job] = []
    errors: list[BaseException] = []

    def watch(progress: Progress) -> None:
        if progress.phase is phase:
            reached.set()

    def move() -> None:
        try:
            jobs.append(shards.move(listener=watch))
        except BaseException as error:
            errors.append(error)
        finally:
            reached.set()
            finished.set()

    mover = threading.Thread(target=move)
    mover.start()
    reached.wait()
    server.kill()
    server.start()
    mover.join()
    assert not errors, errors
    assert jobs[0].state == "done"
    shards.assert_clean()
    for table in shards.tables:
        assert sorted(row for rows in shards.rows(table).values() for row in rows) == before[table]
        assert shards.rows(table)["s2"]


@pytest.mark.parametrize("promoted", ["source", "target"])
def test_a_server_that_was_promoted_is_another_one(
    make_shards: MakeShards, new_cluster: NewCluster, promoted: str
) -> None:
    """Its slot may be there, and what it streams not what was streamed before: the copy begins again."""
    server = new_cluster()
    shards = make_shards(0)
    shards.add("s1", server if promoted == "source" else 1)
    fill(shards.on("s1"), 300)
    shards.add("s2", server if promoted == "target" else 2)
    name = "s1" if promoted == "source" else "s2"
    stop = threading.Event()

    def stop_there(progress: Progress) -> None:
        if progress.phase is Phase.CATCHING_UP:
            stop.set()

    with pytest.raises(Interrupted):
        shards.move(listener=stop_there, stop=stop)
    before = servers.identity(shards.on(name))
    folder = Path(value(shards.on(name), "SHOW data_directory"))
    server.stop()
    (folder / "standby.signal").touch()
    server.start()
    assert value(shards.on(name), "SELECT pg_promote()")
    after = servers.identity(shards.on(name))
    assert (after.system, after.timeline) == (before.system, before.timeline + 1)
    phases: list[Phase] = []
    shards.resume(listener=lambda progress: phases.append(progress.phase))
    assert Phase.PREPARING in phases
    shards.assert_clean()
