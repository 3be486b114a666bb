"""The mover killed with SIGKILL at named points, under live writers: `resume` ends as if nothing had been."""

from __future__ import annotations

import signal

import pytest

from shardkit.core.errors import PreflightFailed
from shardkit.core.move import Mode
from tests.fix_shards import FencedWriter, MakeShards, Shards, fill
from tests.movers import run_forked

USUAL = [
    "copying.slot",
    "copying.poll",
    "cutting over.before decision",
    "change.decided:2",
    "purge.batch:2",
]
REST = [
    "preparing.begin", "preparing.end", "copying.published", "copying.subscribed", "copying.begin", "copying.end",
    "catching up.begin", "catching up.end", "verifying.begin", "verifying.end", "cutting over.begin",
    "cutting over.end", "cut over.begin", "cut over.end", "purging.begin", "purging.end", "drop.subscription",
    "drop.subscription:2", "drop.slot", "drop.slot:2", "change.proposed:1", "change.proposed:2", "change.proposed:3",
    "change.decided:1", "cutting over.before opening", "change.opened:1", "change.opened:2", "change.recorded:1",
    "change.recorded:2", "change.recorded:3", "purge.batch:1",
]  # fmt: skip
LOCKED = ["locked.before decision:2"]
LOCKED_REST = [
    "preparing.begin", "preparing.end", "copying.begin", "locked.step:1", "locked.step:2", "locked.before decision:1",
    "locked.opened:1", "locked.opened:2", "change.proposed:2", "change.proposed:3", "change.decided:2",
    "change.decided:3", "change.opened:2", "change.opened:3", "change.recorded:2", "change.recorded:3", "copying.end",
    "cut over.begin", "purging.begin", "purging.end",
]  # fmt: skip


def run_mover(shards: Shards, failpoint: str = "", act: str = "run", mode: Mode = Mode.AUTO) -> int:
    """A move, or the rest of one, or an ``abort``."""
    return run_forked("move" if act == "run" else act, shards.catalog_url, failpoint, mode=mode.value)


def killed_then(
    make_shards: MakeShards, failpoint: str, *acts: tuple[str, str], mode: Mode = Mode.AUTO
) -> Shards:
    """A move that is killed at a point; then the acts, each killed at its point, if it has one."""
    users = 300
    shards = make_shards(1)
    fill(shards.on("s1"), users)
    shards.add("s2", 1)
    writers = [FencedWriter(shards, number, 2, users) for number in range(2)]
    for writer in writers:
        writer.start()
    try:
        for act, point in (("run", failpoint), *acts):
            ended = run_mover(shards, point, act, mode)
            assert ended == (-signal.SIGKILL if point else 0), f"the mover never passed {point}"
    finally:
        for writer in writers:
            writer.ending.set()
        for writer in writers:
            writer.join()
    for writer in writers:
        writer.check()
    shards.assert_clean()
    return shards


@pytest.mark.parametrize("failpoint", USUAL)
def test_killed_at(make_shards: MakeShards, failpoint: str) -> None:
    killed_then(make_shards, failpoint, ("run", ""))


@pytest.mark.slow
@pytest.mark.parametrize("failpoint", REST)
def test_killed_at_every_other_point(make_shards: MakeShards, failpoint: str) -> None:
    killed_then(make_shards, failpoint, ("run", ""))


@pytest.mark.parametrize(
    ("failpoint", "killed", "decided"),
    [
        ("cutting over.before decision", "drop.subscription", False),
        pytest.param("preparing.end", "aborting.begin", False, marks=pytest.mark.slow),
        pytest.param("copying.published", "aborting.end", False, marks=pytest.mark.slow),
        pytest.param("copying.slot", "drop.slot", False, marks=pytest.mark.slow),
        pytest.param("copying.subscribed", "drop.slot", False, marks=pytest.mark.slow),
        pytest.param("copying.poll", "change.decided", False, marks=pytest.mark.slow),
        pytest.param("catching up.end", "change.recorded", False, marks=pytest.mark.slow),
        pytest.param("verifying.end", "aborting.batch", False, marks=pytest.mark.slow),
        pytest.param("change.decided:2", "purge.batch", True, marks=pytest.mark.slow),
        pytest.param("cutting over.before opening", "drop.slot", False, marks=pytest.mark.slow),
    ],
)
def test_an_abort_after_a_kill_is_killed_too(
    make_shards: MakeShards, failpoint: str, killed: str, decided: bool
) -> None:
    """Nothing of the copy is left, and the next move is as the first; what was decided is finished instead."""
    shards = killed_then(make_shards, failpoint, ("abort", killed), ("abort", ""))
    assert bool(shards.topology().owned(1)) == decided
    if not decided:
        shards.move()
        shards.assert_clean()


@pytest.mark.parametrize("failpoint", LOCKED)
def test_killed_in_locked_steps_at(make_shards: MakeShards, failpoint: str) -> None:
    killed_then(make_shards, failpoint, ("run", ""), mode=Mode.LOCKED)


@pytest.mark.slow
@pytest.mark.parametrize("failpoint", LOCKED_REST)
def test_killed_in_locked_steps_at_every_other_point(make_shards: MakeShards, failpoint: str) -> None:
    killed_then(make_shards, failpoint, ("run", ""), mode=Mode.LOCKED)


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
