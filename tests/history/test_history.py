"""What clients saw while shards grew and shrank and processes died, checked: it could have been one database."""

from __future__ import annotations

import itertools
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import select

import shardkit
from shardkit.rebalance.preflight import ALLOW_FSYNC_OFF
from shardkit.storage import failpoints, membership
from shardkit.storage.catalog import Catalog, Job
from shardkit.storage.connections import ShardConnections
from tests.fix_postgres import FreshDatabase
from tests.history.checker import Report, check
from tests.history.client import BANDS, Base, Configuration, Item, file_of, keys_of_band
from tests.history.records import Kind, Operation, Outcome, load
from tests.movers import RETRY_LATER, Movers
from tests.sharded import until

SHARDS = 3
WEIGHTS = ({0: 1, 1: 1, 2: 1}, {0: 3, 1: 2, 2: 1}, {0: 1, 1: 0, 2: 1}, {0: 1, 1: 3, 2: 2}, {0: 0, 1: 1, 2: 1})
"""What the shards are to hold, one after the other: a shard is emptied, and filled again."""
OPERATIONS, CHANGES = 1_000_000, 200
POINTS = [point for point in failpoints.MOVE if not point.startswith(("aborting", "catalog.failed"))]


class Run:
    """Clients at work on a cluster while moves go on; all that is random comes of a seed."""

    def __init__(
        self, catalog: str, folder: Path, seed: int, *, clients: int, keys: int, tasks: int, thinking: float
    ) -> None:
        self.catalog = catalog
        self.folder = folder
        self.seed = seed
        self.rng = random.Random(seed)
        self.clients, self.keys, self.tasks, self.thinking = clients, keys, tasks, thinking
        self.began: dict[int, subprocess.Popen[bytes]] = {}
        self.killed = {"clients": 0, "movers": 0}
        self.jobs = {"done": 0, "aborted": 0}
        self._numbers = iter(range(1000))

    def start_client(self, slot: int) -> None:
        """A client with a number of its own; the keys of the one that it replaces are now its own."""
        number = next(n for n in self._numbers if n % self.clients == slot)
        configuration = Configuration(
            self.catalog, str(file_of(self.folder, number)), number, self.clients, self.keys, self.tasks,
            self.thinking, f"{self.seed}",
        )  # fmt: skip
        with (self.folder / f"errors-{number:03}").open("wb") as errors:
            self.began[slot] = subprocess.Popen(
                [sys.executable, "-m", "tests.history.client", configuration.dump()],
                cwd=Path(__file__).parents[2],
                stdin=subprocess.PIPE,
                stderr=errors,
            )

    def kill_client(self) -> None:
        """SIGKILL, in the middle of whatever it does, and another in its place."""
        slot = self.rng.randrange(self.clients)
        self.began[slot].send_signal(signal.SIGKILL)
        self.began[slot].wait()
        self.began[slot].communicate()
        self.killed["clients"] += 1
        self.start_client(slot)

    def stop_clients(self) -> None:
        """Let all come to an end."""
        for process in self.began.values():
            process.communicate(timeout=60)
            assert process.returncode == 0, self.errors()

    def errors(self) -> str:
        """What clients wrote to stderr."""
        return "".join(path.read_text() for path in sorted(self.folder.glob("errors-*")))

    def random_point(self) -> str:
        """Where the next mover is killed, if it comes there."""
        return f"{self.rng.choice(POINTS)}:{self.rng.choice((1, 1, 2))}"

    def change(self, movers: Movers, number: int, point: str = "", then: str = "resume") -> None:
        """One change of topology; the first mover may be killed at a point, and another goes on, or back."""
        before = self._last_job()
        movers.start("move", self.catalog, point=point, weights=WEIGHTS[number % len(WEIGHTS)])
        code = movers.wait()
        if code == -signal.SIGKILL:
            self.killed["movers"] += 1
        else:
            # On a busy machine it may find no moment to cut over.
            assert code in (0, RETRY_LATER), movers.said
        deadline = time.monotonic() + 120
        while self._has_work():
            assert time.monotonic() < deadline, movers.said
            movers.start(then, self.catalog)
            code = movers.wait()
            assert code in (0, RETRY_LATER), movers.said
        job = self._last_job()
        if job is not None and (before is None or job.id > before.id):
            self.jobs[job.state] += 1

    def _last_job(self) -> Job | None:
        with Catalog.open(self.catalog) as catalog:
            return catalog.latest_job()

    def _has_work(self) -> bool:
        with Catalog.open(self.catalog) as catalog:
            return catalog.running_job() is not None or catalog.proposed() is not None

    def versions(self) -> int:
        """How many topologies there have been."""
        with Catalog.open(self.catalog) as catalog:
            return catalog.next_version() - 1

    def operations(self) -> int:
        """How many operations have come to an end so far, roughly."""
        texts = (path.read_bytes() for path in self.folder.glob("client-*.jsonl"))
        return sum(text.count(b"\n") - text.count(b',null,"unknown"') for text in texts)

    def history(self) -> list[Operation]:
        """All that was recorded."""
        return load(sorted(self.folder.glob("client-*.jsonl")))

    def seen_in_the_end(self) -> Iterator[Operation]:
        """A read of every key, and a list of every band, when all is quiet."""
        with shardkit.connect(self.catalog) as cluster, cluster.sessionmaker()() as session:
            began = time.monotonic_ns()
            rows = {item.id: item.row for item in session.scalars(select(Item))}
        ended = time.monotonic_ns()
        for key in range(self.keys):
            yield Operation(Kind.READ, key, began, ended, Outcome.DONE, row=rows.get(key))
        for band in range(BANDS):
            keys = tuple(key for key in keys_of_band(band, self.keys) if key in rows)
            yield Operation(Kind.LIST, band, began, ended, Outcome.DONE, keys=keys, rows=len(keys))

    def check(self) -> Report:
        """What the history tells, with what is there in the end."""
        bands = {band: keys_of_band(band, self.keys) for band in range(BANDS)}
        return check([*self.history(), *self.seen_in_the_end()], bands)


@pytest.fixture
def catalog(fresh_database: FreshDatabase, monkeypatch: pytest.MonkeyPatch) -> str:
    """Three shards, on as many servers, with the table of the history."""
    monkeypatch.setenv(ALLOW_FSYNC_OFF, "1")
    url = fresh_database(0)
    membership.initialise(url)
    with Catalog.open(url) as opened, ShardConnections("shardkit tests") as shards:
        opened.take_lease()
        for index in range(SHARDS):
            membership.join(opened, shards, name=f"s{index}", url=fresh_database(index))
    with shardkit.connect(url) as cluster:
        cluster.create_all(Base.metadata)
    return url


@contextmanager
def working(run: Run) -> Iterator[Movers]:
    """Clients at work, and movers to be had; the clients have come to their end afterwards."""
    with Movers(run.folder, {}) as movers:
        for slot in range(run.clients):
            run.start_client(slot)
        try:
            yield movers
            run.stop_clients()
        finally:
            for process in run.began.values():
                process.kill()
                process.communicate()


def require_whole(run: Run) -> Report:
    report = run.check()
    assert not report.problems, f"{report.found} problems: " + "\n".join(report.problems)
    assert run.errors() == ""
    return report


def test_what_clients_see_while_topologies_change_and_processes_die(catalog: str, tmp_path: Path) -> None:
    run = Run(catalog, tmp_path, seed=1, clients=2, keys=64, tasks=2, thinking=0.01)
    with working(run) as movers:
        until(lambda: run.operations() > 200, "the clients work", 60)
        run.kill_client()
        run.change(movers, 1, point="closing.committed:2")
    report = require_whole(run)
    assert report.scatters > 20
    assert run.killed == {"clients": 1, "movers": 1}
    assert run.jobs == {"done": 1, "aborted": 0}


@pytest.mark.slow
def test_a_million_operations_over_two_hundred_changes(
    catalog: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run = Run(catalog, tmp_path, seed=2, clients=3, keys=256, tasks=2, thinking=0.002)
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    assert reporter is not None
    with working(run) as movers:
        for number in itertools.count():
            if sum(run.jobs.values()) >= CHANGES and run.operations() >= OPERATIONS:
                break
            point = run.random_point() if number % 2 else ""
            run.change(movers, number, point, "abort" if run.rng.random() < 0.3 else "resume")
            if number % 5 == 4:
                run.kill_client()
                reporter.write_line(f"{number + 1} changes, {run.operations():,} operations")
    report = require_whole(run)
    reporter.write_line(f"{report}\njobs {run.jobs}, killed {run.killed}, {run.versions()} topologies")
