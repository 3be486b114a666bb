"""The mover killed with SIGKILL at named points, under live writers: `resume` ends as if nothing had been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from shardkit.core.errors import PreflightFailed
from shardkit.core.move import Mode
from tests.fix_shards import FencedWriter, MakeShards, Shards, fill

MOVER = """
import sys
from shardkit.core.move import Mode
from shardkit.rebalance import locked
from shardkit.rebalance.mover import Mover
locked.ROWS_A_STEP = 100
with Mover(sys.argv[1], patience=30.0) as mover:
    if mover.catalog.running_job() is None:
        mover.start("rebalance", mode=Mode(sys.argv[2]))
    mover.run()
"""

USUAL = [
    "change.proposed:1",
    "copying.poll",
    "purge.batch:2",
    "cutting over.before decision",
    "cutting over.before opening",
    "copying.slot",
]
REST = [
    "preparing.begin", "preparing.end", "copying.published", "copying.subscribed", "copying.begin", "copying.end",
    "catching up.begin", "catching up.end", "verifying.begin", "verifying.end", "cutting over.begin",
    "cutting over.end", "cut over.begin", "cut over.end", "purging.begin", "purging.end", "drop.subscription",
    "drop.subscription:2", "drop.slot", "drop.slot:2", "change.proposed:2", "change.proposed:3", "change.decided:1",
    "change.decided:2", "change.opened:1", "change.opened:2", "change.recorded:1", "change.recorded:2",
    "change.recorded:3", "purge.batch:1",
]  # fmt: skip
LOCKED = ["locked.before decision:2", "change.decided:3", "locked.opened:2"]
LOCKED_REST = [
    "preparing.begin", "preparing.end", "copying.begin", "locked.step:1", "locked.step:2", "locked.before decision:1",
    "locked.opened:1", "change.proposed:2", "change.proposed:3", "change.decided:2", "change.opened:2",
    "change.opened:3", "change.recorded:2", "change.recorded:3", "copying.end", "cut over.begin", "purging.begin",
    "purging.end",
]  # fmt: skip


def run_mover(shards: Shards, failpoint: str = "", mode: Mode = Mode.AUTO) -> int:
    environment = {**os.environ, "SHARDKIT_FAILPOINT": failpoint}
    done = subprocess.run(
        [sys.executable, "-c", MOVER, shards.catalog_url, mode.value],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    if done.returncode not in (0, -signal.SIGKILL):
        pytest.fail(done.stderr)
    return done.returncode


def killed_then_resumed(make_shards: MakeShards, failpoint: str, mode: Mode = Mode.AUTO) -> None:
    users = 300
    shards = make_shards(1)
    fill(shards.on("s1"), users)
    shards.add("s2", 1)
    writers = [FencedWriter(shards, number, 2, users) for number in range(2)]
    for writer in writers:
        writer.start()
    try:
        assert run_mover(shards, failpoint, mode) == -signal.SIGKILL, f"the mover never passed {failpoint}"
        assert run_mover(shards) == 0
    finally:
        for writer in writers:
            writer.ending.set()
        for writer in writers:
            writer.join()
    for writer in writers:
        writer.check()
    shards.assert_clean()


@pytest.mark.parametrize("failpoint", USUAL)
def test_killed_at(make_shards: MakeShards, failpoint: str) -> None:
    killed_then_resumed(make_shards, failpoint)


@pytest.mark.slow
@pytest.mark.parametrize("failpoint", REST)
def test_killed_at_every_other_point(make_shards: MakeShards, failpoint: str) -> None:
    killed_then_resumed(make_shards, failpoint)


@pytest.mark.parametrize("failpoint", LOCKED)
def test_killed_in_locked_steps_at(make_shards: MakeShards, failpoint: str) -> None:
    killed_then_resumed(make_shards, failpoint, Mode.LOCKED)


@pytest.mark.slow
@pytest.mark.parametrize("failpoint", LOCKED_REST)
def test_killed_in_locked_steps_at_every_other_point(make_shards: MakeShards, failpoint: str) -> None:
    killed_then_resumed(make_shards, failpoint, Mode.LOCKED)


def test_the_preflight_is_made_again_on_resume(make_shards: MakeShards) -> None:
    """The arcs are marked, and the target has changed since."""
    shards = make_shards(2)
    fill(shards.on("s1"), 100)
    assert run_mover(shards, "preparing.end") == -signal.SIGKILL
    assert shards.topology().by_id[1].in_transit
    shards.on("s2").execute("ALTER TABLE public.users RENAME COLUMN n TO number")
    with pytest.raises(PreflightFailed, match=r"public\.users\.n is missing on the target"):
        shards.resume()
    shards.on("s2").execute("ALTER TABLE public.users RENAME COLUMN number TO n")
    shards.resume()
    shards.assert_clean()
