"""A move whose sources are kept is rolled back, or finalised, while writers write: nothing is lost, doubled or
resurrected, and nobody sees an error."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from shardkit.core.move import ROLLBACK, Phase
from shardkit.rebalance.mover import Mover
from shardkit.rebalance.progress import Progress
from shardkit.rebalance.waiting import Interrupted
from shardkit.storage.catalog import Catalog, Job
from tests.fix_shards import FencedWriter, MakeShards, Shards, fill
from tests.sharded import until

USERS = 400


@contextmanager
def writing(
    shards: Shards, number: int = 3, isolation: str = "READ COMMITTED"
) -> Iterator[list[FencedWriter]]:
    writers = [FencedWriter(shards, each, number, USERS, isolation) for each in range(number)]
    for writer in writers:
        writer.start()
    try:
        yield writers
    finally:
        for writer in writers:
            writer.ending.set()
        for writer in writers:
            writer.join()


def wrote(writers: list[FencedWriter]) -> Callable[[], bool]:
    """Whether each has written some more since the call."""
    before = [writer.done for writer in writers]
    return lambda: all(
        writer.done > done + 20 or bool(writer.errors) for writer, done in zip(writers, before, strict=True)
    )


def phases(shards: Shards) -> set[Phase]:
    with Catalog.open(shards.catalog_url) as catalog:
        job = catalog.latest_job()
        assert job is not None
        return {row.phase for row in catalog.transfers(job.id)}


@pytest.mark.parametrize(
    "isolation", ["READ COMMITTED", "REPEATABLE READ", pytest.param("SERIALIZABLE", marks=pytest.mark.slow)]
)
def test_a_rollback_loses_nothing(make_shards: MakeShards, isolation: str) -> None:
    shards = make_shards(1)
    fill(shards.on("s1"), USERS)
    shards.add("s2", 1)
    shards.add("s3", 1)  # of the same server as s2
    with writing(shards, isolation=isolation) as writers:
        assert shards.move(keep_source=True).state == "running"
        assert phases(shards) == {Phase.KEPT}
        until(wrote(writers), "writes where the rows went")
        assert shards.rollback().state == "rolled back"
        until(wrote(writers), "writes where they came back")
        refused = sum(writer.refused for writer in writers)
    assert refused > 0, "no writer met a changed fence"
    assert not shards.topology().owned(1)
    assert not shards.topology().owned(2)
    shards.assert_clean()
    for writer in writers:
        writer.check()


def test_a_finalised_move_is_as_any_other(make_shards: MakeShards) -> None:
    shards = make_shards(1)
    fill(shards.on("s1"), USERS)
    shards.add("s2", 0)  # both on one server
    with writing(shards) as writers:
        assert shards.move(keep_source=True).state == "running"
        until(wrote(writers), "writes where the rows went")
        assert shards.finalize().state == "done"
        until(wrote(writers), "writes after the purge")
    assert shards.topology().owned(1)
    shards.assert_clean()
    for writer in writers:
        writer.check()


@pytest.mark.parametrize(
    "phase",
    [pytest.param(Phase.ROLLING_BACK, marks=pytest.mark.slow), Phase.VERIFYING_BACK, Phase.CUTTING_BACK],
)
def test_a_rollback_is_taken_back(make_shards: MakeShards, phase: Phase) -> None:
    """And tried again: what was written between goes back as well."""
    shards = make_shards(1)
    fill(shards.on("s1"), USERS)
    shards.add("s2", 1)
    with writing(shards) as writers:
        shards.move(keep_source=True)
        stop_in(shards, phase, lambda mover: mover.rollback())
        with Mover(shards.catalog_url, patience=30.0) as mover:
            assert mover.abort().state == "running"
        assert phases(shards) == {Phase.KEPT}
        until(wrote(writers), "writes while the source is kept again")
        assert shards.rollback().state == "rolled back"
    shards.assert_clean()
    for writer in writers:
        writer.check()


def stop_in(shards: Shards, phase: Phase, act: Callable[[Mover], Job]) -> None:
    """Let a mover act until a transfer begins a phase."""
    stop = threading.Event()

    def listener(progress: Progress) -> None:
        if progress.phase is phase:
            stop.set()

    with (
        Mover(shards.catalog_url, patience=30.0, listener=listener, stop=stop) as mover,
        pytest.raises(Interrupted),
    ):
        act(mover)
    assert phases(shards) <= ROLLBACK
