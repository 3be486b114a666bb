"""A mover that was superseded without noticing: whatever it does next to a shard is refused."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace

import pytest

from shardkit.core.errors import MoverSuperseded
from shardkit.core.move import Phase
from shardkit.rebalance.logical import LogicalCopier
from shardkit.rebalance.mover import Mover
from shardkit.rebalance.stream import Stream
from shardkit.rebalance.transfer import TransferRun
from shardkit.rebalance.waiting import Interrupted, Surroundings
from shardkit.storage import replication, sourceguard
from shardkit.storage.connections import Connection, value
from tests.fix_shards import MakeShards, Shards, fill


@pytest.fixture
def slow(make_shards: MakeShards) -> Iterator[tuple[Shards, TransferRun]]:
    """A transfer that stands before its cutover, and the driver of it that a second mover has superseded."""
    shards = make_shards(1)
    fill(shards.on("s1"), 300)
    shards.add("s2", 1)
    stop = threading.Event()

    def stop_there(progress: object) -> None:
        if getattr(progress, "phase", None) is Phase.CUTTING_OVER:
            stop.set()

    with pytest.raises(Interrupted):
        shards.move(listener=stop_there, stop=stop)
    with Mover(shards.catalog_url) as first:
        (row,) = first.catalog.transfers(first.job().id)
        token = first.catalog.token or 0
    around = Surroundings(
        shards.catalog_url, token, threading.Event(), lambda progress: None, threading.Lock(), 5.0
    )
    with TransferRun(row, around) as run, Mover(shards.catalog_url) as second:
        for connection in (run.source, run.target):
            connection.execute("UPDATE shardkit.mover SET token = %s", (second.catalog.token,))
        shards.on("s1").execute("UPDATE public.users SET n = 1")
        yield shards, run


def stream(run: TransferRun) -> Stream:
    assert isinstance(run.copier, LogicalCopier)
    return run.copier.stream


def takes_notes(run: TransferRun) -> None:
    sourceguard.take_changes(run.source, run.row.id, run.around.token, 1000)


def forgets_notes(run: TransferRun) -> None:
    sourceguard.forget_changes(run.source, run.row.id, run.around.token)


@pytest.mark.parametrize("act", [takes_notes, forgets_notes])
def test_the_notes_of_what_was_written_stay(
    slow: tuple[Shards, TransferRun], act: Callable[[TransferRun], None]
) -> None:
    shards, run = slow
    noted = sourceguard.peek_changes(run.source, run.row.id)
    with pytest.raises(MoverSuperseded):
        act(run)
    assert sourceguard.peek_changes(shards.on("s1"), run.row.id) == noted != []


def test_a_subscription_that_was_stopped_is_not_started_again(slow: tuple[Shards, TransferRun]) -> None:
    shards, run = slow
    replication.set_enabled(shards.on("s2"), run.name, False)
    with pytest.raises(MoverSuperseded):
        stream(run).state()
    assert (
        value(shards.on("s2"), "SELECT subenabled FROM pg_subscription WHERE subname = %s", (run.name,))
        is False
    )


def test_a_slot_that_a_superseded_mover_makes_late_does_not_stay(
    slow: tuple[Shards, TransferRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It wrote its token, slept while another came and cleared, and woke with the command that makes the slot."""
    shards, run = slow
    later = replace(run.around, token=run.around.token + 1)
    replication.drop_subscription(shards.on("s2"), run.name)
    while not replication.drop_slot(shards.on("s1"), run.name):
        pass
    shards.on("s1").execute("UPDATE shardkit.mover SET token = %s", (run.around.token,))
    create_slot = replication.create_slot

    with TransferRun(run.row, later) as newer:
        dropped: list[bool] = []

        def sleeping(connection: Connection, name: str) -> None:
            dropped.append(stream(newer).drop_slot())
            create_slot(connection, name)

        monkeypatch.setattr(replication, "create_slot", sleeping)
        with suppress(MoverSuperseded):
            stream(run).create_slot()
        while not stream(newer).drop_slot():
            pass
    assert dropped == [False], "nobody waited for the slot"
    assert not replication.slot_exists(shards.on("s1"), run.name)


def test_no_slot_is_made_or_dropped(slow: tuple[Shards, TransferRun]) -> None:
    shards, run = slow
    replication.drop_subscription(shards.on("s2"), run.name)
    with pytest.raises(MoverSuperseded):
        stream(run).drop_slot()
    assert replication.slot_exists(shards.on("s1"), run.name)
    while not replication.drop_slot(shards.on("s1"), run.name):
        pass
    with pytest.raises(MoverSuperseded):
        stream(run).create_slot()
    assert not replication.slot_exists(shards.on("s1"), run.name)
