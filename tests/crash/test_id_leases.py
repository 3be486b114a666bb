"""Leases of ids: many processes, forks, kills, a catalog that dies, clocks that step."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shardkit.core import ids
from shardkit.core.errors import CatalogUnreachable, IdsExhausted, NotInitialised
from shardkit.dev import Cluster
from shardkit.storage import membership
from shardkit.storage.connections import connect
from shardkit.storage.idleases import FIRST_RESERVATION_MS, RESERVATION_MS, SETTLED_MS, IdLeases
from tests.fix_postgres import FreshDatabase, NewCluster
from tests.sharded import until

HOUR_MS = 3600_000


@pytest.fixture
def catalog(fresh_database: FreshDatabase) -> str:
    url = fresh_database(0)
    membership.initialise(url)
    return url


class Clock:
    """A monotonic clock that goes on by itself and can be put forward, and wrongly back."""

    def __init__(self) -> None:
        self.added_ms = 0

    def __call__(self) -> int:
        return time.monotonic_ns() + self.added_ms * 1_000_000


def settled(leases: IdLeases) -> None:
    until(lambda: not leases._renewing, "the renewal ends")


def held(url: str) -> list[tuple[int, int]]:
    """(lane, tick of its reservation's end) of the lanes in use."""
    with connect(url) as connection:
        rows = connection.execute(
            "SELECT lane, reserved_until FROM shardkit.id_lanes WHERE lease IS NOT NULL"
        )
        return [(lane, end) for lane, end in rows]


# --- many processes --------------------------------------------------------------------------------------------------


@contextmanager
def workers(
    url: str, folder: Path, number: int, layout: str, slot: str, count: int
) -> Iterator[list[subprocess.Popen[bytes]]]:
    started = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.idworker",
                url,
                layout,
                slot,
                str(count),
                str(folder / f"{layout}{n}"),
            ],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for n in range(number)
    ]
    try:
        yield started
    finally:
        for one in started:
            one.kill()
            one.communicate()


def made_by(
    url: str, folder: Path, number: int, layout: str, slot: str, count: int
) -> list[np.ndarray[Any, Any]]:
    """What each of some processes makes, all of them alive until the last has ended."""
    with workers(url, folder, number, layout, slot, count) as started:
        for one in started:
            assert one.stdout is not None
            assert one.stdout.readline() == b"done\n"
        for one in started:
            one.communicate()
            assert one.returncode == 0
    return [np.fromfile(folder / f"{layout}{n}", dtype=np.int64) for n in range(number)]


def check(parts: list[np.ndarray[Any, Any]], layout: str, slot: str, count: int) -> None:
    every = np.concatenate(parts)
    assert len(every) == len(parts) * count
    assert len(np.unique(every)) == len(every)
    assert every.min() >= 0
    shift = 13 if layout == "timed" else 0
    if layout == "counted":
        assert every.max() < 2**53
    for part in parts:
        if slot == "spread":
            if layout == "timed":
                assert (np.diff(part >> 29) >= 0).all(), "a tick went back"
        else:
            assert (np.diff(part) > 0).all()
            assert ((part >> shift & 0xFFFF) == int(slot)).all()


@pytest.mark.parametrize("layout", ["timed", "counted"])
@pytest.mark.parametrize(("slot", "count"), [("spread", 20_000), ("40000", 250)])
def test_processes_make_different_ids(
    catalog: str, tmp_path: Path, layout: str, slot: str, count: int
) -> None:
    check(made_by(catalog, tmp_path, 4, layout, slot, count), layout, slot, count)
    assert held(catalog) == [], "a process that ended in order gives its lanes back"


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["timed", "counted"])
@pytest.mark.parametrize("slot", ["spread", "40000"])
def test_sixteen_processes_make_ten_million_ids(catalog: str, tmp_path: Path, layout: str, slot: str) -> None:
    check(made_by(catalog, tmp_path, 16, layout, slot, 625_000), layout, slot, 625_000)


def test_threads_share_a_lane(catalog: str) -> None:
    leases = IdLeases(catalog)

    def make(number: int) -> list[int]:
        return [leases.timed(None if number % 2 else number * 1000 + n % 500) for n in range(2000)]

    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(make, range(8)))
    assert len({id_ for part in made for id_ in part}) == 16_000
    for part in made[1::2]:
        assert part == sorted(part)


def test_a_killed_process_keeps_its_lane_until_its_reservation_ends(catalog: str, tmp_path: Path) -> None:
    with workers(catalog, tmp_path, 1, "timed", "7", 10) as (worker,):
        assert worker.stdout is not None
        worker.stdout.readline()
    ((lane, end),) = held(catalog)
    leases = IdLeases(catalog)
    first = ids.timed(leases.timed(7))
    assert first.lane != lane
    with connect(catalog) as connection:  # all others are in use, and its time is over
        connection.execute("UPDATE shardkit.id_lanes SET reserved_until = 2 ^ 40 WHERE lane <> %s", (lane,))
        connection.execute(
            "UPDATE shardkit.id_lanes SET reserved_until = %s WHERE lane = %s", (first.tick, lane)
        )
    after = ids.timed(IdLeases(catalog).timed(7))
    assert after.lane == lane
    assert after.tick >= first.tick
    assert end > first.tick


def test_no_lane_is_left(catalog: str) -> None:
    with connect(catalog) as connection:
        connection.execute("UPDATE shardkit.id_lanes SET reserved_until = 2 ^ 33")
    with pytest.raises(IdsExhausted) as caught:
        IdLeases(catalog).timed(5)
    assert caught.value.retryable
    with connect(catalog) as connection:
        connection.execute("UPDATE shardkit.id_counter SET next = 2 ^ 37 - 1")
    with pytest.raises(IdsExhausted):
        IdLeases(catalog).counted(5)


def test_a_database_without_leases(fresh_database: FreshDatabase) -> None:
    with pytest.raises(NotInitialised):
        IdLeases(fresh_database(0)).timed(1)


# --- forks -----------------------------------------------------------------------------------------------------------


def in_child(work: Callable[[], list[int]]) -> list[int]:
    """What ``work`` returns in the child of a fork."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.write(writing, ",".join(map(str, work())).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    assert os.waitpid(pid, 0)[1] == 0
    return [int(one) for one in text.split(",")]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_leases_for_itself(catalog: str) -> None:
    leases = IdLeases(catalog)
    before = [leases.timed(9) for _ in range(3)] + [leases.counted(9) for _ in range(3)]

    def make() -> list[int]:
        return [leases.timed(9) for _ in range(20)] + [leases.counted(9) for _ in range(20)]

    children = [in_child(make) for _ in range(2)]
    parent = make()
    assert len({*before, *parent, *children[0], *children[1]}) == 6 + 3 * 40
    lanes = [{ids.timed(one).lane for one in made[:20]} for made in (parent, *children)]
    assert not lanes[0] & lanes[1]
    assert not lanes[1] & lanes[2]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_makes_other_uuids() -> None:
    from shardkit.orm.ids import _uuids

    _uuids.make(1)
    child = in_child(lambda: [_uuids.make(1).int for _ in range(100)])
    parent = [_uuids.make(1).int for _ in range(100)]
    assert len({*child, *parent}) == 200


# --- the catalog dies ------------------------------------------------------------------------------------------------


@pytest.fixture
def mortal(new_cluster: NewCluster, monkeypatch: pytest.MonkeyPatch) -> tuple[Cluster, str]:
    """A catalog on a server of its own."""
    server = new_cluster()
    monkeypatch.setenv("PGPASSFILE", str(server.passfile))
    url = server.create_database("ids")
    membership.initialise(url)
    return server, url


def test_an_outage_of_hours_does_not_matter(mortal: tuple[Cluster, str]) -> None:
    server, url = mortal
    clock = Clock()
    leases = IdLeases(url, clock=clock)
    seen = {leases.timed(3)}
    clock.added_ms += SETTLED_MS + 1000
    seen.add(leases.timed(3))  # begins the renewal
    settled(leases)
    seen.add(leases.counted(3))
    server.kill()
    for hours in range(7):
        clock.added_ms += HOUR_MS
        seen |= {leases.timed(3), leases.timed(None), leases.counted(3)}
        settled(leases)
        assert len(seen) == 3 + 3 * (hours + 1)
    clock.added_ms += RESERVATION_MS
    with pytest.raises(CatalogUnreachable, match="does not answer"):
        leases.timed(3)
    server.start()
    made = leases.timed(3)
    assert made > max(seen)


def test_an_outage_right_after_the_start(mortal: tuple[Cluster, str]) -> None:
    server, url = mortal
    clock = Clock()
    leases = IdLeases(url, clock=clock)
    made = [leases.timed(3)]
    server.kill()
    clock.added_ms += FIRST_RESERVATION_MS - 5000
    made.append(leases.timed(3))
    settled(leases)
    assert made[0] < made[1]
    with pytest.raises(CatalogUnreachable):
        IdLeases(url).timed(3)


def test_a_renewal_keeps_the_lane(catalog: str) -> None:
    clock = Clock()
    leases = IdLeases(catalog, clock=clock)
    first = ids.timed(leases.timed(3))
    ((lane, end),) = held(catalog)
    clock.added_ms += SETTLED_MS + 1
    leases.timed(3)
    settled(leases)
    ((still, later),) = held(catalog)
    assert first.lane == lane == still
    assert (later - end) * ids.TICK_MS > RESERVATION_MS - 2 * FIRST_RESERVATION_MS
    leases.release()
    assert held(catalog) == []
    assert leases.timed(3) > ids.timed_id(*first)


def test_clocks_that_step(catalog: str) -> None:
    """Two processes whose clocks step by hours and back: nothing is made twice, nothing goes back."""
    clocks = [Clock(), Clock()]
    both = [IdLeases(catalog, clock=clock) for clock in clocks]
    seen: set[int] = set()
    last = [-1, -1]
    for step in (0, 500, -3000, 2 * HOUR_MS, -HOUR_MS, 300, -2000, 10 * HOUR_MS, 0):
        for number, leases in enumerate(both):
            clocks[number].added_ms += step if number else step // 3
            # A clock that was set back by hours stands: what one tick has is not waited beyond.
            for made in [leases.timed(8), leases.timed(8)]:
                assert made > last[number]
                assert made not in seen
                last[number] = made
                seen.add(made)
            settled(leases)
