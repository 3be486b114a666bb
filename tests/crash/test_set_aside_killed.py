"""The mover killed while indexes of the target are set aside: in the end every one is there as before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Any

import pytest

from shardkit.storage import setaside
from shardkit.storage.connections import Connection, connect, value
from tests.crash.test_mover_killed import run_mover
from tests.fix_shards import SCHEMA, FencedWriter, MakeShards, Shards, fill
from tests.sharded import until

MOVER = """
import sys
from shardkit.rebalance.mover import Mover
with Mover(sys.argv[1], patience=30.0) as mover:
    mover.run()
"""
INDEXES = SCHEMA + """
CREATE INDEX posts_body ON public.posts (body) WITH (fillfactor = 60);
COMMENT ON INDEX public.posts_body IS 'of bodies';
CREATE INDEX users_name ON public.users (lower(name)) WHERE n >= 0;
ALTER INDEX public.users_name ALTER COLUMN 1 SET STATISTICS 77;
"""
FACTS = """
SELECT x.relname, pg_get_indexdef(x.oid), obj_description(x.oid, 'pg_class'), i.indisvalid, x.reloptions,
       ARRAY(SELECT a.attstattarget FROM pg_attribute a WHERE a.attrelid = x.oid ORDER BY a.attnum)
FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid WHERE x.relnamespace = 'public'::regnamespace ORDER BY 1
"""
BUILDING = """
SELECT pid FROM pg_stat_activity
WHERE query ~ '^CREATE INDEX CONCURRENTLY' AND datname = current_database() AND wait_event_type = 'Lock'
"""
AFTER_THE_DROP = ["set_aside.committed", "build_set_aside.committed", "put_back.before:2", "put_back.after"]
USUAL = [("set_aside.committed", "run"), ("put_back.after", "run"), ("put_back.before:2", "abort")]
REST = [
    (point, act)
    for point in ("set_aside.commit", "put_back.commit", "put_back.committed", *AFTER_THE_DROP)
    for act in ("run", "abort")
    if (point, act) not in USUAL
]


def facts(connection: Connection) -> list[tuple[Any, ...]]:
    return connection.execute(FACTS).fetchall()


def killed_then(make_shards: MakeShards, point: str, act: str) -> None:
    users = 300
    shards = make_shards(1, schema=INDEXES)
    fill(shards.on("s1"), users)
    shards.add("s2", 1)
    before = facts(shards.on("s2"))
    writers = [FencedWriter(shards, number, 2, users) for number in range(2)]
    for writer in writers:
        writer.start()
    try:
        assert run_mover(shards, point) == -signal.SIGKILL
        if point.partition(":")[0] in AFTER_THE_DROP:
            assert setaside.noted(shards.on("s2"))
        assert run_mover(shards, act=act) == 0
    finally:
        for writer in writers:
            writer.ending.set()
        for writer in writers:
            writer.join()
    for writer in writers:
        writer.check()
    shards.assert_clean()
    assert facts(shards.on("s2")) == before
    assert bool(shards.topology().owned(1)) == (act == "run")


@pytest.mark.parametrize(("point", "act"), USUAL)
def test_killed_at(make_shards: MakeShards, point: str, act: str) -> None:
    killed_then(make_shards, point, act)


@pytest.mark.slow
@pytest.mark.parametrize(("point", "act"), REST)
def test_killed_at_every_other_point(make_shards: MakeShards, point: str, act: str) -> None:
    killed_then(make_shards, point, act)


@pytest.mark.parametrize("act", ["run", "abort"])
def test_killed_in_the_build(make_shards: MakeShards, act: str) -> None:
    """What it left half-made, and what it left at work, is no obstacle."""
    shards = make_shards(1, schema=INDEXES)
    fill(shards.on("s1"), 300)
    shards.add("s2", 1)
    before = facts(shards.on("s2"))
    assert run_mover(shards, "build_set_aside.committed") == -signal.SIGKILL
    with connect(shards.topology().named("s2").url) as reader:
        reader.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1 FROM pg_class")
        mover = start(shards)
        until(lambda: value(shards.on("s2"), BUILDING), "the build waits for the snapshot")
        mover.kill()
        mover.wait()
        # Before the server has noticed, and after it.
        if act == "abort":
            until(lambda: value(shards.on("s2"), BUILDING) is None, "the server ends what nobody waits for")
        invalid = "SELECT NOT indisvalid FROM pg_index WHERE indexrelid = 'public.posts_body'::regclass"
        assert value(shards.on("s2"), invalid)
        reader.execute("ROLLBACK")
    assert run_mover(shards, act=act) == 0
    shards.assert_clean()
    assert facts(shards.on("s2")) == before


@pytest.mark.parametrize("point", ["drop_unfinished.commit", "drop_unfinished.committed"])
def test_killed_while_what_was_half_made_is_dropped(make_shards: MakeShards, point: str) -> None:
    shards = make_shards(1, schema=INDEXES)
    fill(shards.on("s1"), 100)
    shards.add("s2", 1)
    before = facts(shards.on("s2"))
    assert run_mover(shards, "put_back.after") == -signal.SIGKILL
    shards.on("s2").execute(
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'public.posts_body'::regclass"
    )
    assert run_mover(shards, point) == -signal.SIGKILL
    assert run_mover(shards) == 0
    shards.assert_clean()
    assert facts(shards.on("s2")) == before


def start(shards: Shards) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", MOVER, shards.catalog_url], env=dict(os.environ)
    )
