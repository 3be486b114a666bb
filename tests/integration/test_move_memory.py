"""What a mover holds in memory does not grow with the rows that move, nor with those that are written meanwhile."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import pytest

from shardkit.core.keyrange import ArcSet, slot_arc
from shardkit.core.move import Phase
from shardkit.rebalance import verify
from shardkit.rebalance.progress import Progress
from shardkit.storage import digest, replication
from shardkit.storage.connections import Connection
from tests.fix_shards import TABLES, MakeShards, fill
from tests.sharded import until

T = TypeVar("T")

MARGIN = 4 << 20
"""Bytes by which two runs may differ. It was 7.2 MB where all rows that were written meanwhile were read at once."""


def peak(make_shards: MakeShards, users: int) -> int:
    """Peak memory of a mover that moves half of so many users and posts."""
    shards = make_shards(2)
    fill(shards.on("s1"), users, 1)
    command = [sys.executable, "-m", "tests.memoryworker", shards.catalog_url]
    command.append(shards.topology().named("s1").url)
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
    shards.assert_clean()
    held = [len(rows) for rows in shards.rows(TABLES[1]).values()]
    assert sum(held) == users
    assert min(held) > users / 3
    return int(done.stdout)


@pytest.mark.slow
def test_memory_does_not_grow_with_rows(make_shards: MakeShards) -> None:
    few, many = peak(make_shards, 10_000), peak(make_shards, 200_000)
    print(f"20,000 rows: {few / 1e6:.1f} MB at most; 400,000 rows: {many / 1e6:.1f} MB")
    assert many - few < MARGIN


def written_after(look: Callable[..., T], source: Connection) -> Callable[..., T]:
    """``look`` of a verifier, after which, on the source, all users are written, and the target has applied it."""

    def looked(connection: Connection, *arguments: Any) -> T:
        found = look(connection, *arguments)
        if connection.info.dbname == source.info.dbname:
            source.execute("UPDATE public.users SET n = n + 1")
            position = replication.position_now(source)
            until(lambda: _passed(source, position), "the target applies it")
        return found

    return looked


def _passed(source: Connection, position: str) -> bool:
    row = source.execute(
        "SELECT bool_and(replay_lsn >= %s::pg_lsn) FROM pg_stat_replication WHERE application_name ~ '^shardkit_'",
        (position,),
    ).fetchone()
    return row is not None and bool(row[0])


def test_more_rows_are_written_than_are_held(
    make_shards: MakeShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "SUSPECTS", 20)
    monkeypatch.setattr(verify, "NOTES_A_ROUND", 50)
    monkeypatch.setattr(verify, "SMALL", 5)
    monkeypatch.setattr(digest, "ROWS_A_CHUNK", 40)
    shards = make_shards(2)
    fill(shards.on("s1"), 400, 1)
    most = 0
    settle_once = verify.Verifier.settle_once

    def watched(verifier: verify.Verifier) -> int:
        nonlocal most
        most = max(most, len(verifier.suspects))
        return settle_once(verifier)

    monkeypatch.setattr(verify.Verifier, "settle_once", watched)
    # Everything is written between the looks at the source and at the target: nothing is alike.
    for name in ("by_chunk", "by_bucket_of_chunk", "by_row_of_chunk"):
        monkeypatch.setattr(digest, name, written_after(getattr(digest, name), shards.on("s1")))
    seen: set[Phase] = set()

    def listener(progress: Progress) -> None:
        seen.add(progress.phase)

    shards.move(listener=listener)
    shards.assert_clean()
    assert 20 < most < 200
    assert Phase.DONE in seen
    counts = {row[2] for rows in shards.rows(TABLES[1]).values() for row in rows}
    assert len(counts) == 1
    assert sum(len(rows) for rows in shards.rows(TABLES[1]).values()) == 400


def test_a_table_of_any_size_has_a_bounded_number_of_chunks() -> None:
    arcs = ArcSet(slot_arc(slot) for slot in range(0, 2000, 2))
    assert len(digest.chunks(arcs, 10**6)) == len(arcs)
    assert len(digest.chunks(arcs, 10**12)) <= digest.CHUNKS + len(arcs)
    assert ArcSet(digest.chunks(arcs, 10**12)) == arcs
