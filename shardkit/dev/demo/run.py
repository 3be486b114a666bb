"""The demo from its first server to its last check.

Three real servers, a catalog, two shards; client processes that work on them through the session; a third shard added
meanwhile by the real command in a process of its own, and if so told, one weighed otherwise and one removed; then the
end check of every acknowledged write. Driven by the command `shardkit demo`. Everything it makes is temporary and goes
with it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass

from shardkit.core.errors import DemoFailed, UsageError
from shardkit.core.move import Phase
from shardkit.core.topology import Topology
from shardkit.dev.cluster import Cluster, Clusters
from shardkit.dev.scratch import Scratch, choose_base
from shardkit.storage.catalog import Catalog

from . import endcheck, findings
from .children import ClientProcess, Ended, children_environment, clients, command, stop
from .client import Configuration
from .content import Layout
from .ledger import Expected
from .measures import Measures
from .models import Base
from .narration import Narrator
from .outcome import ClientReport, Kill, Move, Outcome
from .report import Report

TASKS = 4
"""Workers of the client that uses the asynchronous session."""
WARM_UP = 1.0
"""Seconds that are in no phase: connections open, caches fill."""
ALONE = 1.0
"""Seconds that the clients work on after a mover was killed, before the next one takes over."""
MODELS = f"{Base.__module__}:{Base.__name__}"
"""The application's models, as the commands take them."""
REWEIGHT = ("reweight", "s1=200")
REMOVE = ("remove", "s2")
_USERS_A_WORKER = 20

KILL_POINTS: dict[str, tuple[str, Phase]] = {
    "copy": ("copying.poll", Phase.COPYING),
    # A transfer deletes in one batch a table or more, so some of its rows are gone and some are not.
    "purge": ("purging.batch:2", Phase.PURGING),
}
"""Where a mover is killed on request: the failpoint, and the phase that a transfer is then found in."""


@dataclass(frozen=True)
class Options:
    """The sizes of a demo: users at first, client processes, seconds of work before and after the move together, and
    the points of `KILL_POINTS` at which a mover is killed, in this order, while the shard is added; whether another one
    gets another weight after that, and whether one is removed."""

    users: int = 5000
    clients: int = 3
    seconds: float = 20.0
    kill_mover: tuple[str, ...] = ()
    seed: int = 1
    reweight: bool = False
    remove: bool = False

    def check(self) -> None:
        """`UsageError` for what cannot be run."""
        if unknown := [point for point in self.kill_mover if point not in KILL_POINTS]:
            raise UsageError(
                f"A mover cannot be killed in {unknown[0]!r}: it is one of {', '.join(KILL_POINTS)}."
            )
        if self.clients < 1 or self.seconds <= 0:
            raise UsageError("The demo needs a client and some seconds.")
        if self.users < _USERS_A_WORKER * self.layout.workers:
            raise UsageError(f"So many clients need {_USERS_A_WORKER * self.layout.workers} users or more.")

    @property
    def layout(self) -> Layout:
        """How users fall to workers: a client is one, the last of several, which is asynchronous, is `TASKS`."""
        return Layout(self.users, self.clients if self.clients == 1 else self.clients - 1 + TASKS)

    def configurations(self, catalog: str, folder: str) -> list[Configuration]:
        """One for each client process."""
        layout = self.layout
        made = []
        for number in range(self.clients):
            tasks = number > 0 and number == self.clients - 1
            workers = tuple(range(number, layout.workers)) if tasks else (number,)
            made.append(Configuration(catalog, folder, number, workers, tasks, layout, self.seed))
        return made


class Demo:
    """One run. A context manager: the servers, the clients and the folder end with it."""

    def __init__(self, options: Options, narrator: Narrator) -> None:
        options.check()
        self._options = options
        self._narrator = narrator
        self._stack = ExitStack()
        self._seconds: dict[str, float] = {}
        self._phases: dict[str, tuple[float, float]] = {}

    def __enter__(self) -> Demo:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def run(self) -> Report:
        """All of it."""
        with self._timed("start"):
            self._start_servers()
            self._make_shards()
        folder = Scratch(choose_base(None))
        self._stack.callback(folder.remove)
        self._configurations = self._options.configurations(self._catalog, str(folder.path))
        with clients(self._configurations) as started:
            with self._timed("load"):
                self._load(started)
            self._work(started, "warm-up", WARM_UP)
            self._work(started, "before", self._options.seconds / 2)
            with self._phase("during"):
                changes = [self._add_shard(started)]
                for wanted, arguments in (
                    (self._options.reweight, REWEIGHT),
                    (self._options.remove, REMOVE),
                ):
                    if wanted and not changes[-1].status:
                        changes.append(self._change(started, *arguments))
            self._work(started, "after", self._options.seconds / 2)
            self._narrator.say("stopping the clients")
            stop(started)
            with self._timed("check"):
                outcome = self._outcome(started, Move.of(changes))
        return outcome.report(asdict(self._options), self._seconds)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._seconds[name] = time.monotonic() - began

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        with self._timed(name):
            yield
        self._phases[name] = (began, time.monotonic())

    # --- servers, shards, tables -----------------------------------------------------------------------------------

    def _start_servers(self) -> None:
        self._servers = self._stack.enter_context(Clusters(3))
        first: Cluster = self._servers[0]
        self._narrator.say(f"{len(self._servers)} servers run: PostgreSQL {first.binaries.version}")
        self._catalog = first.create_database("catalog")
        self._urls = [server.create_database("app") for server in self._servers]
        self._stack.enter_context(children_environment(first.passfile, self._catalog))

    def _make_shards(self) -> None:
        first, second, _ = self._urls
        self._run("init")
        self._run("shard", "add", "s1", first, "--yes")
        self._run("schema", "declare", MODELS, "--create")
        self._run("shard", "add", "s2", second, "--models", MODELS, "--yes")

    def _run(self, *arguments: str) -> None:
        self._tell_command(arguments)
        ended = command(*arguments, "--json", quiet=True)
        if ended.status:
            raise DemoFailed(
                f"`shardkit {' '.join(arguments)}` ended with status {ended.status}:\n{ended.output}"
            )

    def _tell_command(self, arguments: Sequence[str]) -> None:
        self._narrator.say(f"$ shardkit {' '.join(arguments)}")

    # --- the workload ----------------------------------------------------------------------------------------------

    def _load(self, started: Sequence[ClientProcess]) -> None:
        kinds = f"{len(started)} client processes"
        self._narrator.say(f"{kinds} load {self._options.users:,} users with posts, comments and likes")
        for client in started:
            client.wait_loaded()
        with Catalog.open(self._catalog) as catalog:
            endcheck.analyse(_current(catalog))

    def _work(self, started: Sequence[ClientProcess], phase: str, seconds: float) -> None:
        if phase == "warm-up":
            for client in started:
                client.say("start")
            self._narrator.wait(seconds, lambda: phase)
            return
        with self._phase(phase):
            self._narrator.wait(seconds, lambda: f"{phase}: {_tally(started)}")
        self._narrator.say(f"{phase}: {_tally(started)}")

    # --- the move --------------------------------------------------------------------------------------------------

    def _add_shard(self, started: Sequence[ClientProcess]) -> Move:
        with Catalog.open(self._catalog) as catalog:
            before, job_before = _current(catalog), catalog.latest_job()
            rows_before = endcheck.count_rows(before.shards)
            kills = list(self._options.kill_mover)
            ended = self._mover(kills, "shard", "add", "s3", self._urls[2], "--models", MODELS, "--yes")
            killed = []
            for point in self._options.kill_mover:
                kills.pop(0)
                killed.append(_killed(catalog, point, ended))
                self._narrator.say(f"the mover was killed by SIGKILL; its transfers: {killed[-1].found}")
                self._narrator.wait(ALONE, lambda: _tally(started))
                ended = self._mover(kills, "rebalance", "resume")
            self._narrator.say(f"during: {_tally(started)}")
            job = catalog.latest_job()
            # One that could not even start is no job, and the latest is another one's.
            transfers = catalog.transfers(job.id) if job and job != job_before else []
            after = _current(catalog)
            return Move(
                before, after, rows_before, transfers, ended.status, ended.output, killed, "add shard s3"
            )

    def _change(self, started: Sequence[ClientProcess], *arguments: str) -> Move:
        """Another change of placement, by its command."""
        with Catalog.open(self._catalog) as catalog:
            before, job_before = _current(catalog), catalog.latest_job()
            ended = self._mover((), "shard", *arguments, "--yes")
            self._narrator.say(f"during: {_tally(started)}")
            job = catalog.latest_job()
            transfers = catalog.transfers(job.id) if job and job != job_before else []
            after = _current(catalog)
            return Move(before, after, {}, transfers, ended.status, ended.output, [], " ".join(arguments))

    def _mover(self, kills: Sequence[str], *arguments: str) -> Ended:
        """Run a mover in a process of its own, to be killed at the first of ``kills`` if there is one."""
        self._tell_command(arguments)
        armed = {"SHARDKIT_FAILPOINT": KILL_POINTS[kills[0]][0]} if kills else {}
        try:
            return command(*arguments, "--json", extra=armed)
        finally:
            self._narrator.restore()

    # --- the end ---------------------------------------------------------------------------------------------------

    def _outcome(self, started: Sequence[ClientProcess], move: Move) -> Outcome:
        self._narrator.say("comparing every acknowledged write with what the shards hold")
        expected = Expected.read(client.configuration.ledger for client in started)
        layout = self._options.layout
        found = findings.examine(expected, layout, move.after, endcheck.stored_rows(move.after))
        with Catalog.open(self._catalog) as catalog:
            left = endcheck.leftovers(catalog, move.after, move.left)
        return Outcome(
            clients=[_told(client) for client in started],
            measures=[Measures.load(client.configuration.measures) for client in started if client.report],
            phases=self._phases,
            move=move,
            writes=expected.writes,
            findings=found,
            leftovers=left,
            rows_after=endcheck.count_rows(move.shards.values()),
        )


def _current(catalog: Catalog) -> Topology:
    topology = catalog.current()
    assert topology is not None
    return topology


def _killed(catalog: Catalog, point: str, ended: Ended) -> Kill:
    """What became of a mover that was to be killed: where the transfers stood after it."""
    job = catalog.running_job()
    phases = [row.phase for row in catalog.transfers(job.id)] if job else []
    return Kill(
        point, ended.killed and KILL_POINTS[point][1] in phases, ", ".join(phases) or "no unfinished job"
    )


def _told(client: ClientProcess) -> ClientReport:
    """What a client told at its end, or that it did not live to tell it."""
    died = f"client {client.configuration.number} ended without a report:\n{client.log_tail()}"
    return client.report or ClientReport(client.operations, client.errors + 1, [died], 0, [])


def _tally(started: Sequence[ClientProcess]) -> str:
    operations = sum(client.operations for client in started)
    errors = sum(client.errors for client in started)
    return f"{operations:,} operations, {errors:,} errors"
