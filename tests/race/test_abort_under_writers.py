"""A move is taken back in each phase before its decision, while writers write: the source has everything, the target
and the servers are as they were."""

from __future__ import annotations

import threading

import pytest

from shardkit.core.move import Phase, can_abort
from shardkit.rebalance.mover import Mover
from shardkit.rebalance.progress import Progress
from shardkit.rebalance.waiting import Interrupted
from tests.fix_shards import FencedWriter, MakeShards, Shards, fill
from tests.sharded import until

USERS = 200
USUAL = {(Phase.COPYING, True), (Phase.CUTTING_OVER, False)}


def begin(shards: Shards, phase: Phase, keep_source: bool) -> None:
    """A job, stopped as its transfer begins a phase."""
    stop = threading.Event()

    def listener(progress: Progress) -> None:
        if progress.phase is phase:
            stop.set()

    if phase is Phase.PLANNED:
        with Mover(shards.catalog_url) as mover:
            mover.start("rebalance", keep_source=keep_source)
        return
    with pytest.raises(Interrupted):
        shards.move(listener=listener, stop=stop, keep_source=keep_source)


@pytest.mark.parametrize(
    ("phase", "keep_source"),
    [
        pytest.param(phase, keep, marks=() if (phase, keep) in USUAL else pytest.mark.slow)
        for phase in Phase
        if can_abort(phase) and not phase.endswith("back")
        for keep in (False, True)
    ],
)
def test_an_abort_leaves_nothing(make_shards: MakeShards, phase: Phase, keep_source: bool) -> None:
    shards = make_shards(1)
    fill(shards.on("s1"), USERS)
    shards.add("s2", 1)
    writers = [FencedWriter(shards, number, 2, USERS) for number in range(2)]
    for writer in writers:
        writer.start()
    try:
        begin(shards, phase, keep_source)
        before = [writer.done for writer in writers]
        with Mover(shards.catalog_url, patience=30.0) as mover:
            assert mover.abort().state == "aborted"
        until(
            lambda: all(w.done > done or w.errors for w, done in zip(writers, before, strict=True)),
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
    assert not shards.topology().owned(1)
    assert not any(shards.rows(table)["s2"] for table in shards.tables)
