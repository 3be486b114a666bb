"""The crash matrix of a commit over two shards: each point that it passes, and everything that can happen there to the
application or to a server, under other applications.

Afterwards what was left is ended, by `transactions recover`; then the rows are on both shards or on none, as the
application was told, and nothing is left.
"""

from __future__ import annotations

import asyncio
import random
import signal
import traceback
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from sqlalchemy import BigInteger
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

import shardkit
from shardkit.core.errors import CommitPending, CommitUnknown
from shardkit.storage import failpoints
from tests.outages import CATALOG, World
from tests.sharded import until

from .test_matrix import EVENTS, KILL_ABORT, Event, Worlds, of_outage

OF_STREAMS = ("target cut off source", "target hears nothing of source")
EVERYWHERE = tuple(event for event in EVENTS if event is not KILL_ABORT and event.name not in OF_STREAMS)
STYLES = ("sync", "async")
PROGRAM = f"{__name__}:commit"
COMMITTED, UNKNOWN, NOTHING = 0, 10, 11
"""Exit codes of the application: what it was told."""


UNPREPARED = ("two_phase.noted", "two_phase.preparing")
DECIDED = ("two_phase.decided", "two_phase.finishing", "two_phase.finished", "two_phase.forgotten")


class Base(DeclarativeBase):
    pass


@shardkit.sharded(by="id")
class Half(Base):
    """One row of a transaction."""

    __tablename__ = "half"
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)


# --- the application -------------------------------------------------------------------------------------------------


def commit(style: str, *keys: str) -> int:
    """Write rows of several shards in one transaction, in a process of its own; what it was told of its end."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    halves = [Half(id=int(key)) for key in keys]
    try:
        if style == "async":
            asyncio.run(_commit_async(halves))
        else:
            with (
                shardkit.connect(CATALOG) as cluster,
                cluster.sessionmaker(mode="two_phase").begin() as session,
            ):
                session.add_all(halves)
    except CommitPending:
        return COMMITTED
    except (CommitUnknown, KeyboardInterrupt):
        return UNKNOWN
    except Exception:
        traceback.print_exc()
        return NOTHING
    return COMMITTED


async def _commit_async(halves: list[Half]) -> None:
    cluster = shardkit.connect(CATALOG)
    try:
        async with cluster.async_sessionmaker(mode="two_phase").begin() as session:
            session.add_all(halves)
    finally:
        await cluster.adispose()


# --- the matrix ------------------------------------------------------------------------------------------------------


class PairWorld(World):
    """With a table whose rows are written two by two."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.cluster.create_all(Base.metadata)
        self._unused = {name: self._keys(name) for name in ("one", "two")}

    def _keys(self, name: str) -> Iterator[int]:
        topology = self.topology
        return (key for key in count() if topology.by_id[topology.ring.owner(key)].name == name)

    def begin(self) -> None:
        super().begin()  # it moves
        self._unused = {name: self._keys(name) for name in ("one", "two")}

    def pair(self) -> tuple[int, int]:
        """A new key of each shard."""
        return next(self._unused["one"]), next(self._unused["two"])

    def holding(self, key: int) -> list[str]:
        """The shards on which the row of a key is to be seen."""
        return [
            name
            for name in ("one", "two")
            if self.shards.on(name).execute("SELECT FROM public.half WHERE id = %s", (key,)).rowcount
        ]

    def recover(self) -> bool:
        """End what was left; whether nothing is."""
        self.act("command", arguments=["transactions", "recover"])
        return not any(
            self.shards.on(name).execute(query).rowcount
            for name in ("one", "two")
            for query in (
                "SELECT FROM pg_prepared_xacts WHERE database = current_database()",
                "SELECT FROM shardkit.decision",
            )
        )


@pytest.fixture(scope="module")
def worlds(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worlds]:
    made = Worlds(lambda: PairWorld(tmp_path_factory.mktemp("pairs")), run)
    yield made
    made.end(request)


def run(world: World, case: str, event: Event) -> None:
    """Bring an application to a point, let the event happen, end what is left, and look. The first shard decides."""
    assert isinstance(world, PairWorld)
    style, point = case.split(" ", 1)
    one, two = world.pair()
    arguments = [PROGRAM, style, str(one), str(two)]
    if event.kills:
        world.until_killed("call", point, arguments=arguments)
        code: str | int = -signal.SIGKILL
    else:
        world.until_stopped("call", point, arguments=arguments)
        event.happen(world, "one", "two")
        code = world.wait()
        assert code in told(point, event), f"{code}: {world.movers.said}"
    until(world.recover, "nothing is left", 30)
    seen = world.holding(one), world.holding(two)
    assert seen in ((["one"], ["two"]), ([], [])), f"{code}: {seen}"
    whole = {COMMITTED: (True,), NOTHING: (False,)}.get(int(code), (True, False))
    assert any(seen) in whole, f"{code}: {seen}: {world.movers.said}"
    world.check(of_outage(event, "one", "two"))


def told(point: str, event: Event) -> tuple[int, ...]:
    """What the application may be told: that it is not known only if the way to the shard that decides was lost."""
    if event.name == "SIGTERM":
        return (-signal.SIGTERM,)
    if event.name == "SIGINT":
        return (UNKNOWN,)
    if point in DECIDED or event.name.startswith("catalog"):
        return (COMMITTED,)
    if event.name.startswith("target"):
        return (NOTHING,) if point in UNPREPARED else (COMMITTED,)
    return (COMMITTED, NOTHING, UNKNOWN)


USUAL = (
    ("sync", "two_phase.preparing", "target killed"),
    ("async", "two_phase.decided", "answers lost"),
    ("sync", "two_phase.deciding", "source killed"),
)
CELLS = tuple(
    (style, point, event.name) for style in STYLES for point in failpoints.TWO_PHASE for event in EVERYWHERE
)
BY_NAME = {event.name: event for event in EVENTS}
SHUFFLED = random.Random(5).sample(CELLS, len(CELLS))


@pytest.mark.parametrize(("style", "point", "event"), USUAL)
def test_all_or_nothing_after(worlds: Worlds, style: str, point: str, event: str) -> None:
    worlds.run(f"{style} {point}", BY_NAME[event])


@pytest.mark.slow
@pytest.mark.parametrize(("style", "point", "event"), SHUFFLED)
def test_all_or_nothing_at_any_point_after(worlds: Worlds, style: str, point: str, event: str) -> None:
    worlds.run(f"{style} {point}", BY_NAME[event])
