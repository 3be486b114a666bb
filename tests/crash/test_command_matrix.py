"""The crash matrix of the commands by which shards come and go: each point that they pass, and everything that can
happen there, under live applications.

Killed, or stopped while something else fails, the command is run again until it ends; then it has done what it says,
and all that is true after a move is true.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.pool import NullPool

import shardkit
from shardkit.storage import failpoints
from shardkit.storage.connections import connect, value
from shardkit.storage.urls import sqlalchemy_url
from tests import applications
from tests.applications import Failure
from tests.outages import World

from .test_matrix import EVENTS, KILL_ABORT, Event, Worlds, concerns

URL = "postgresql:///third?service=two"
COMMANDS = {
    "add": ["shard", "add", "three", URL, "--no-run"],
    "remove": ["shard", "remove", "three", "--yes"],
}
ROWS = 50
INTERRUPTED = {"SIGINT": 130, "SIGTERM": -15}


class Base(DeclarativeBase):
    pass


@shardkit.reference
class Country(Base):
    """With a reference table a shard that joins closes another one for a moment."""

    __tablename__ = "country"
    code: Mapped[str] = mapped_column(primary_key=True)


COMING = (
    *failpoints.JOIN,
    "change.proposed", "change.locked", "change.decided", "change.opened", "change.recorded",
    *(f"{step}.{edge}" for step in ("catalog.propose", "closing", "opening", "catalog.record")
      for edge in ("commit", "committed")),
)  # fmt: skip
GOING = (
    *failpoints.PLACEMENT,
    "change.proposed:2", "change.locked:2", "change.decided:2", "change.opened", "change.recorded:2",
    *(f"{step}.{edge}" for step in ("catalog.propose", "closing", "opening", "catalog.record")
      for edge in ("commit", "committed")),
)  # fmt: skip
CELLS = tuple(
    (command, point, event.name)
    for command, points in (("add", COMING), ("remove", GOING))
    for point in points
    for event in EVENTS
    if event is not KILL_ABORT
)
USUAL = (
    ("add", "join.claimed", "SIGINT"),
    ("add", "closing.commit", "answers lost"),
    ("remove", "leave.closed", "catalog killed"),
    ("remove", "catalog.placement.committed", "target cut off"),
)
BY_NAME = {event.name: event for event in EVENTS}


class ThirdWorld(World):
    """With a database that can become a third shard, and a reference table that everybody has."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.cluster.create_all(Base.metadata)
        with self.cluster.sessionmaker(mode="two_phase").begin() as session:
            session.add_all(Country(code=f"country {number}") for number in range(ROWS))
        self.servers["two"].create_database("third")
        engine = create_engine(sqlalchemy_url(URL), poolclass=NullPool)
        for tables in (applications.Base.metadata, Base.metadata):
            tables.create_all(engine)

    @property
    def has_third(self) -> bool:
        """Whether it has joined."""
        return any(shard.name == "three" for shard in self.topology.shards)

    def command(self, name: str) -> None:
        """Run a command until it has ended well."""
        self.act("command", arguments=COMMANDS[name])

    def countries(self) -> int:
        """Rows of the reference table on the third database."""
        with connect(URL) as connection:
            return int(value(connection, "SELECT count(*) FROM public.country"))


@pytest.fixture(scope="module")
def worlds(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worlds]:
    made = Worlds(lambda: ThirdWorld(tmp_path_factory.mktemp("commands")), run)
    yield made
    made.end(request)


def run(world: World, case: str, event: Event) -> None:
    """Bring a command to a point, let the event happen, run the command to its end, and look."""
    assert isinstance(world, ThirdWorld)
    command, point = case.split(" ", 1)
    if world.has_third == (command == "add"):
        world.command("remove" if command == "add" else "add")
    arguments = COMMANDS[command]
    if event.kills:
        world.until_killed("command", point, arguments=arguments)
    else:
        world.until_stopped("command", point, arguments=arguments)
        event.happen(world, "one", "two")
        code = world.wait()
        assert code in (*event.ends, INTERRUPTED.get(event.name)), f"{command} ended with {code}: {world.movers.said}"
    world.command(command)
    downs = {"source": "one", "target": "two", "catalog": None}[event.downs] if event.downs else None

    def allowed(failure: Failure) -> bool:
        return downs is not None and failure.server_is_away and concerns(world, failure, downs)

    assert world.has_third == (command == "add")
    assert not world.has_work()
    assert world.countries() == ROWS
    world.act("command", arguments=["doctor"])
    world.check(allowed)


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
