"""The crash matrix of the commands that change a cluster and move no key range: shards come and go, come back from a
restore, change their address, and the ids that servers make are split. Each point that they pass, and everything that
can happen there, under live applications.

Killed, or stopped while something else fails, the command is run again until it ends; then it has done what it says,
and all that is true after a move is true.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from configparser import ConfigParser
from dataclasses import dataclass
from pathlib import Path

import pytest
from psycopg import sql
from sqlalchemy import BigInteger, UniqueConstraint, create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.pool import NullPool

import shardkit
from shardkit.core.errors import ShardBehind
from shardkit.core.topology import ShardedTable
from shardkit.storage import failpoints, fence, numbering, predicate
from shardkit.storage.connections import connect, value
from shardkit.storage.urls import sqlalchemy_url
from tests import applications
from tests.applications import Failure
from tests.outages import ACCOUNTS, World
from tests.sharded import until

from .test_matrix import EVENTS, KILL_ABORT, Event, Worlds, of_outage

URL = "postgresql:///third?service=two"
ROWS = 50
FAR = 1_000_000
INTERRUPTED = {"SIGINT": 130, "SIGTERM": -15}


class Base(DeclarativeBase):
    pass


@shardkit.reference
class Country(Base):
    """With a reference table a shard that joins closes another one for a moment."""

    __tablename__ = "country"
    code: Mapped[str] = mapped_column(primary_key=True)


@shardkit.sharded(by="account_id")
class Receipt(Base):
    """Numbered by the servers."""

    __tablename__ = "receipt"
    __table_args__ = (UniqueConstraint("account_id", "id"),)
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    account_id: Mapped[int] = mapped_column(BigInteger)


RECEIPTS = ShardedTable("public", "receipt", "account_id", "int")


class Cashier(threading.Thread):
    """A client that writes rows which the servers number, and knows every number that was acknowledged."""

    def __init__(self, cluster: shardkit.ShardCluster) -> None:
        super().__init__(name="cashier")
        self._cluster = cluster
        self._random = random.Random(4)
        self._ending = threading.Event()
        self.turn = threading.Lock()
        """Held while it writes, and by who wants that it does not."""
        self.given: list[tuple[int, int]] = []
        self.failures: list[Failure] = []

    def run(self) -> None:
        sessions = self._cluster.sessionmaker()
        while not self._ending.wait(self._random.expovariate(1 / applications.THINKING)):
            with self.turn:
                receipt = Receipt(account_id=self._random.randrange(ACCOUNTS))
                try:
                    with sessions.begin() as session:
                        session.add(receipt)
                        session.flush()
                        number, account = receipt.id, receipt.account_id
                except Exception as error:
                    self.failures.append(Failure(time.monotonic(), 0, error))
                else:
                    self.given.append((number, account))

    def stop(self) -> None:
        """End it."""
        self._ending.set()
        self.join()


class CommandWorld(World):
    """With a database that can become a third shard, a reference table that everybody has, and one that is numbered."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._services = [folder / "direct.conf", folder / "proxied.conf"]
        self._serve(moved=False)
        self.servers["two"].create_database("third")
        self.cluster.create_all(Base.metadata)
        self.act("command", arguments=SPLIT.arguments)
        with self.cluster.sessionmaker(mode="two_phase").begin() as session:
            session.add_all(Country(code=f"country {number}") for number in range(ROWS))
        engine = create_engine(sqlalchemy_url(URL), poolclass=NullPool)
        for tables in (applications.Base.metadata, Base.metadata):
            tables.create_all(engine)
        self.cashier = Cashier(self.cluster)

    def begin(self) -> None:
        self.cashier.start()
        super().begin()

    def close(self) -> None:
        if self.cashier.is_alive():
            self.cashier.stop()
        super().close()

    def check(self, allowed: Callable[[Failure], bool]) -> None:
        with self.cashier.turn:
            super().check(allowed)
            failures = [failure for failure in self.cashier.failures if not allowed(failure)]
            self.cashier.failures = []
            assert not failures, f"the cashier met {failures}"
            rows: list[tuple[int, int]] = [
                row
                for shard in self.topology.shards
                for row in self.shards.on(shard.name).execute("SELECT id, account_id FROM public.receipt")
            ]
            assert self.cashier.is_alive()
            assert len(dict(self.cashier.given)) == len(self.cashier.given), "a number was given twice"
            assert len(dict(rows)) == len(rows), "two receipts have one number"
            # One in doubt may be there besides.
            assert set(self.cashier.given) <= set(rows)

    # --- the third shard ---------------------------------------------------------------------------------------------

    @property
    def has_third(self) -> bool:
        """Whether it has joined."""
        return any(shard.name == "three" for shard in self.topology.shards)

    def countries(self) -> int:
        """Rows of the reference table on the third database."""
        with connect(URL) as connection:
            return int(value(connection, "SELECT count(*) FROM public.country"))

    # --- the numbers -------------------------------------------------------------------------------------------------

    def number_by_ones(self) -> None:
        """Alter the sequences by hand: they count by ones now, far from each other, as those of servers that were set
        up apart."""
        shards = [self.shards.on(shard.name) for shard in self.topology.shards]
        highest = max(
            int(value(connection, "SELECT last_value FROM public.receipt_id_seq")) for connection in shards
        )
        for number, connection in enumerate(shards, start=1):
            connection.execute(
                sql.SQL("ALTER SEQUENCE public.receipt_id_seq INCREMENT BY 1 RESTART {}").format(
                    sql.Literal(highest + number * FAR)
                )
            )

    def numbers_are_disjoint(self) -> bool:
        """Whether every sequence gives what no other gives."""
        topology = self.topology
        return bool(topology.splits) and not any(
            numbering.problems(self.shards.on(shard.name), topology, RECEIPTS, shard.id)
            for shard in topology.shards
        )

    # --- a shard that went back --------------------------------------------------------------------------------------

    def send_back(self) -> None:
        """Restore a shard to the state before a move that took keys from it. Applications rest meanwhile."""
        if self.has_third:
            self.act("command", arguments=REMOVE.arguments)
        weights, source, _ = self.next_weights()
        if source != "one":
            self.act("move", weights=weights)
            weights, source, _ = self.next_weights()
        assert source == "one"
        server = self.servers["one"]
        self.applications.pause()
        with self.cashier.turn:
            self._end_sessions("one")
            server.create_database("app_before", "app")
            self.act("move", weights=weights)
            # Routers as old as the shard would be let in there: who restores a shard keeps them away.
            self.cluster.router.adopt(self.topology)
            self._end_sessions("one")
            server.drop_database("app")
            server.create_database("app", "app_before")
            server.drop_database("app_before")
        self.applications.go_on()

    def _end_sessions(self, server: str) -> None:
        with connect(self.servers[server].url()) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = 'app'"
            )

    def is_forward(self) -> bool:
        """Whether no shard is behind; rows that came back with one are removed. A repair would do it but for those that
        were written on their owner since, so they are deleted by hand."""
        one = self.topology.named("one")
        connection = self.shards.on("one")
        for table in sorted(self.topology.tables, key=lambda table: table.name == "Account"):  # referred to
            connection.execute(
                sql.SQL("DELETE FROM {} WHERE {}").format(
                    predicate.relation(table), predicate.within(table, one.in_transit)
                )
            )
        self.act("command", arguments=["verify", "--repair", "--yes"])
        return one.fence.relation in fence.relations(connection)

    # --- a server that moves -----------------------------------------------------------------------------------------

    def _serve(self, *, moved: bool) -> None:
        """The second server is at another address; with ``moved`` nothing is at the one that it had."""
        for path in self._services:
            services = ConfigParser()
            services.read(path)
            if "elsewhere" not in services:
                services["elsewhere"] = services["two"]
            services["two"] = dict(services["elsewhere"]) | (
                {"host": "127.0.0.1", "port": "1"} if moved else {}
            )
            with path.open("w") as file:
                services.write(file, space_around_delimiters=False)

    def move_server(self) -> None:
        """Nothing answers any more where the topology says that a shard is."""
        self._serve(moved=False)
        self.act("command", arguments=["shard", "set-url", f"two={TWO}"])
        self._serve(moved=True)
        self._end_sessions("two")

    def is_found(self) -> bool:
        """Whether applications have learned where the shard is."""
        until(lambda: self.cluster.topology.named("two").url == ELSEWHERE, "applications learn of it")
        self._serve(moved=False)
        return self.topology.named("two").url == ELSEWHERE


@dataclass(frozen=True)
class Command:
    """A command, the points that it passes, how the world is made ready for it, and whether it has done its work."""

    name: str
    arguments: tuple[str, ...]
    points: tuple[str, ...]
    prepare: Callable[[CommandWorld], None]
    has_worked: Callable[[CommandWorld], bool]
    allowed: Callable[[Failure], bool] = lambda failure: False
    """What clients may meet before it has."""


def edges(*steps: str) -> tuple[str, ...]:
    """The two points of steps."""
    return tuple(f"{step}.{edge}" for step in steps for edge in ("commit", "committed"))


def add_third(world: CommandWorld) -> None:
    if not world.has_third:
        world.act("command", arguments=ADD.arguments)


def remove_third(world: CommandWorld) -> None:
    if world.has_third:
        world.act("command", arguments=REMOVE.arguments)


CHANGE = edges("catalog.propose", "closing", "opening", "catalog.record")
ADD = Command(
    "add",
    ("shard", "add", "three", URL, "--no-run"),
    (
        *failpoints.JOIN,
        "change.proposed", "change.locked", "change.decided", "change.opened", "change.recorded",
        *CHANGE,
    ),
    remove_third,
    lambda world: world.has_third and world.countries() == ROWS,
)  # fmt: skip
REMOVE = Command(
    "remove",
    ("shard", "remove", "three", "--yes"),
    (
        *failpoints.PLACEMENT,
        "change.proposed:2", "change.locked:2", "change.decided:2", "change.opened", "change.recorded:2",
        *CHANGE,
    ),
    add_third,
    lambda world: not world.has_third and world.countries() == ROWS,
)  # fmt: skip
SPLIT = Command(
    "split",
    ("ids", "split", "--yes"),
    (
        *failpoints.IDS,
        "change.proposed", "change.decided", "change.recorded",
        *edges("catalog.propose", "catalog.record"),
    ),
    CommandWorld.number_by_ones,
    CommandWorld.numbers_are_disjoint,
)  # fmt: skip
READMIT = Command(
    "readmit",
    ("shard", "readmit", "one", "--yes"),
    (
        *failpoints.READMISSION,
        "change.proposed", "change.locked", "change.decided",
        *edges("catalog.propose", "closing", "catalog.record"),
    ),
    CommandWorld.send_back,
    CommandWorld.is_forward,
    lambda failure: isinstance(failure.error, ShardBehind) or failure.server_is_away,
)  # fmt: skip
TWO, ELSEWHERE = "postgresql:///app?service=two", "postgresql:///app?service=elsewhere"
SET_URL = Command(
    "set-url",
    ("shard", "set-url", f"two={ELSEWHERE}"),
    (
        "change.proposed", "change.decided", "change.recorded",
        *edges("catalog.propose", "catalog.record"),
    ),
    CommandWorld.move_server,
    CommandWorld.is_found,
    lambda failure: failure.server_is_away,
)  # fmt: skip
COMMANDS = {command.name: command for command in (ADD, REMOVE, SPLIT, READMIT, SET_URL)}
CELLS = tuple(
    (command.name, point, event.name)
    for command in COMMANDS.values()
    for point in command.points
    for event in EVENTS
    if event is not KILL_ABORT
)
USUAL = (
    ("add", "join.claimed", "SIGINT"),
    ("add", "closing.commit", "answers lost"),
    ("remove", "leave.closed", "catalog killed"),
    ("remove", "catalog.placement.committed", "target cut off"),
    ("split", "ids.restarted", "source killed"),
    ("readmit", "closing.committed", "network silent"),
    ("set-url", "catalog.record.commit", "target killed"),
)
BY_NAME = {event.name: event for event in EVENTS}


@pytest.fixture(scope="module")
def worlds(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worlds]:
    made = Worlds(lambda: CommandWorld(tmp_path_factory.mktemp("commands")), run)
    yield made
    made.end(request)


def run(world: World, case: str, event: Event) -> None:
    """Bring a command to a point, let the event happen, run the command to its end, and look."""
    assert isinstance(world, CommandWorld)
    name, point = case.split(" ", 1)
    command = COMMANDS[name]
    command.prepare(world)
    if event.kills:
        world.until_killed("command", point, arguments=command.arguments)
    else:
        world.until_stopped("command", point, arguments=command.arguments)
        event.happen(world, "one", "two")
        code = world.wait()
        assert code in (*event.ends, INTERRUPTED.get(event.name)), (
            f"{name} ended with {code}: {world.movers.said}"
        )
    world.act("command", arguments=command.arguments)
    is_of_outage = of_outage(event, "one", "two")
    assert command.has_worked(world)
    assert not world.has_work()
    world.act("command", arguments=["doctor"])
    world.check(lambda failure: is_of_outage(failure) or command.allowed(failure))


@pytest.mark.parametrize(("command", "point", "event"), USUAL)
def test_a_command_is_run_again_after(worlds: Worlds, command: str, point: str, event: str) -> None:
    worlds.run(f"{command} {point}", BY_NAME[event])


SHUFFLED = random.Random(3).sample(CELLS, len(CELLS))


@pytest.mark.slow
@pytest.mark.parametrize(("command", "point", "event"), SHUFFLED)
def test_a_command_is_run_again_at_any_point_after(
    worlds: Worlds, command: str, point: str, event: str
) -> None:
    worlds.run(f"{command} {point}", BY_NAME[event])
