"""Shards come while writers write: nothing is lost, doubled or resurrected, and nobody sees an error."""

from __future__ import annotations

import pytest

from tests.fix_shards import FencedWriter, MakeShards, fill

USERS = 400


@pytest.mark.parametrize("isolation", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
def test_writers_go_on_while_two_shards_join(make_shards: MakeShards, isolation: str) -> None:
    shards = make_shards(1)
    fill(shards.on("s1"), USERS)
    shards.add("s2", 1)
    writers = [FencedWriter(shards, number, 3, USERS, isolation) for number in range(3)]
    for writer in writers:
        writer.start()
    try:
        shards.move()
        before = sum(writer.done for writer in writers)
        shards.add("s3", 2)
        shards.move()
    finally:
        for writer in writers:
            writer.ending.set()
        for writer in writers:
            writer.join()
    for writer in writers:
        writer.check()
    assert sum(writer.done for writer in writers) > before > 0
    assert sum(writer.refused for writer in writers) > 0, "no writer met a changed fence"
    shards.assert_clean()
