"""The audit beside writers and moves: whatever moves while it looks, nothing that is right is called wrong."""

from __future__ import annotations

import threading

import pytest

from shardkit.core.move import Mode
from shardkit.rebalance import ownership
from shardkit.rebalance.audit import audit
from shardkit.rebalance.findings import Report
from shardkit.rebalance.mover import Mover
from shardkit.storage import tables
from tests.fix_shards import FencedWriter, MakeShards, fill

USERS = 400


@pytest.mark.parametrize("mode", [Mode.LOGICAL, Mode.LOCKED])
def test_no_false_alarm_while_shards_join_and_writers_write(make_shards: MakeShards, mode: Mode) -> None:
    shards = make_shards(1)
    fill(shards.on("s1"), USERS)
    shards.add("s2", 1)
    writers = [FencedWriter(shards, number, 2, USERS) for number in range(2)]
    reports: list[Report] = []
    errors: list[BaseException] = []
    ending = threading.Event()

    def look() -> None:
        try:
            while not ending.is_set():
                reports.append(audit(shards.catalog_url))
        except BaseException as error:
            errors.append(error)

    looking = threading.Thread(target=look)
    for thread in (*writers, looking):
        thread.start()
    try:
        shards.move(mode)
        shards.add("s3", 2)
        shards.move(mode)
    finally:
        ending.set()
        for writer in writers:
            writer.ending.set()
        for thread in (*writers, looking):
            thread.join()
    assert errors == []
    for writer in writers:
        writer.check()
    assert [problem for report in reports for problem in report.problems] == []
    assert any(report.moves for report in reports), "no move was under way while it looked"
    seen = {version for report in reports for version, _ in report.topologies}
    assert len(seen) > 1, "the topology never changed while it looked"
    shards.assert_clean()


def test_a_move_between_two_pieces_of_a_table(
    make_shards: MakeShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each piece is judged by the topology that its own snapshot shows, not by the one that the table began under."""
    monkeypatch.setattr(ownership, "_FIRST_PIECE", 1)
    shards = make_shards(1)
    fill(shards.on("s1"), 4 * USERS)
    shards.add("s2", 1)
    shards.move()
    owned: list[int] = []

    def between(rows: int) -> None:
        owned.append(shards.topology().owned(1).width)
        if len(owned) == 1:
            with Mover(shards.catalog_url) as mover:
                mover.start("rebalance", {0: 100, 1: 300})
                mover.run()

    table = shards.tables[1]
    found = tables.describe(shards.on("s2"), table)
    assert found is not None
    counts = ownership.count(shards.on("s2"), shards.topology().named("s2"), table, found, between)
    assert len(set(owned)) == 2, "the table was read in one piece"
    assert (counts.unowned, counts.in_transit, counts.strays) == (0, 0, [])
