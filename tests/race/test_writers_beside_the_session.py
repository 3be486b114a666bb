"""Whoever goes round the session while arcs are cut over: its write comes along or is refused, and is never lost."""

from __future__ import annotations

import threading

import psycopg
import pytest

from shardkit.core.errors import MoveWaiting
from shardkit.core.move import Phase
from shardkit.core.ring import position
from shardkit.rebalance.progress import Progress
from shardkit.storage.catalog import Catalog
from shardkit.storage.connections import Connection, connect, value
from tests.fix_shards import MakeShards, Shards, fill


def a_moving_key(shards: Shards, transfer: int) -> int:
    with Catalog.open(shards.catalog_url) as catalog:
        arcs = catalog.transfer(transfer).arcs
    return next(key for key in range(1, 100) if position(key) in arcs)


def test_an_open_transaction_without_a_fence_holds_the_cutover_up(make_shards: MakeShards) -> None:
    shards = make_shards(1)
    fill(shards.on("s1"), 200)
    shards.add("s2", 1)
    open_ones: list[Connection] = []
    keys: list[int] = []

    def write_without_commit(progress: Progress) -> None:
        if progress.phase is Phase.VERIFYING and not open_ones:
            keys.append(a_moving_key(shards, progress.transfer))
            open_ones.append(connect(shards.topology().named("s1").url, application="batch script"))
            open_ones[0].execute("BEGIN")
            open_ones[0].execute("UPDATE public.users SET name = 'by hand' WHERE id = %s", keys)

    with pytest.raises(MoveWaiting, match="batch script"):
        shards.move(listener=write_without_commit, patience=2.0)
    assert not shards.topology().owned(1)
    open_ones[0].execute("COMMIT")
    open_ones[0].close()
    shards.resume()
    shards.assert_clean()
    assert value(shards.on("s2"), "SELECT name FROM public.users WHERE id = %s", keys) == "by hand"


def test_a_write_that_comes_while_it_is_decided_is_carried_or_refused(make_shards: MakeShards) -> None:
    shards = make_shards(1)
    fill(shards.on("s1"), 200)
    shards.add("s2", 1)
    ending = threading.Event()
    started = threading.Event()
    acknowledged: dict[int, int] = {}
    refused: list[str] = []

    def write(number: int) -> None:
        with connect(shards.topology().named("s1").url) as connection:
            for round_ in range(1, 1_000_000):
                if ending.is_set():
                    return
                try:
                    done = connection.execute(
                        "UPDATE public.users SET n = n + 1 WHERE id = %s RETURNING n", (number,)
                    ).fetchone()
                except psycopg.Error as error:
                    refused.append(str(error.sqlstate))
                    return
                if done is None:
                    return
                acknowledged[number] = done[0]
                if round_ == 3:
                    started.set()

    writers = [threading.Thread(target=write, args=(number,)) for number in range(1, 5)]
    for writer in writers:
        writer.start()
    started.wait()
    try:
        shards.move()
    finally:
        ending.set()
        for writer in writers:
            writer.join()
    shards.assert_clean()
    held = {row[0]: row[2] for rows in shards.rows(shards.tables[1]).values() for row in rows}
    assert {key: held[key] for key in acknowledged} == acknowledged
    assert set(refused) <= {"SK001"}


@pytest.mark.parametrize("isolation", ["REPEATABLE READ", "SERIALIZABLE"])
def test_a_snapshot_from_before_the_decision_does_not_write_after_it(
    make_shards: MakeShards, isolation: str
) -> None:
    """What such a transaction reads says that the rows have not moved."""
    shards = make_shards(1)
    fill(shards.on("s1"), 200)
    shards.add("s2", 1)
    old = connect(shards.topology().named("s1").url)
    keys: list[int] = []
    refused: list[str | None] = []

    def look_before_and_write_after(progress: Progress) -> None:
        if progress.phase is Phase.VERIFYING and not keys:
            keys.append(a_moving_key(shards, progress.transfer))
            old.execute(f"BEGIN ISOLATION LEVEL {isolation}")
            # The lock on the table that says what has moved is held too, so that nothing is read anew with it.
            old.execute("SELECT FROM shardkit.moved")
        if progress.phase is Phase.PURGING and not refused:
            with pytest.raises(psycopg.Error, match="has moved") as caught:
                old.execute("INSERT INTO public.posts VALUES (%s, 4242, 'lost')", keys)
            refused.append(caught.value.sqlstate)
            old.close()

    shards.move(listener=look_before_and_write_after)
    assert refused == ["SK001"]
    shards.assert_clean()


def test_a_snapshot_from_before_the_move_writes_until_the_decision(make_shards: MakeShards) -> None:
    shards = make_shards(1)
    fill(shards.on("s1"), 200)
    shards.add("s2", 1)
    old = connect(shards.topology().named("s1").url)
    old.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
    old.execute("SELECT FROM shardkit.moved")
    keys: list[int] = []

    def write(progress: Progress) -> None:
        if progress.phase is Phase.VERIFYING and not keys:
            keys.append(a_moving_key(shards, progress.transfer))
            old.execute("INSERT INTO public.posts VALUES (%s, 4242, 'kept')", keys)
            old.execute("COMMIT")
            old.close()

    shards.move(listener=write)
    shards.assert_clean()
    assert value(shards.on("s2"), "SELECT body FROM public.posts WHERE id = 4242") == "kept"
